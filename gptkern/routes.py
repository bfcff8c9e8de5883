"""How the parts of a model run and why: what ``explain`` tells, and that nothing falls back in silence."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from typing import Any, Literal

# What parts of a transformers model run on where they fall back.
LIBRARY = "transformers' own code"

_told: set[tuple[str, str]] = set()


class FallbackWarning(UserWarning):
    """Something runs on slower code although faster code exists for it."""


def strict() -> bool:
    """Whether ``GPTKERN_STRICT=1`` makes an error of every fallback."""
    return os.environ.get("GPTKERN_STRICT", "0") == "1"


def fallback(part: str, instead: str, reason: str) -> None:
    """Say, once a process, that ``part`` runs on ``instead``, and why.

    Raises:
        RuntimeError: ``GPTKERN_STRICT=1`` is set.
    """
    message = f"gptkern: {part} runs on {instead}: {reason}"
    if strict():
        raise RuntimeError(f"{message} (GPTKERN_STRICT=1 makes this an error)")
    if (part, reason) not in _told:
        _told.add((part, reason))
        warnings.warn(message, FallbackWarning, stacklevel=4)


@dataclass(frozen=True)
class Route:
    """How one part of a model runs.

    Attributes:
        part: "attention", "norm", "mlp", "loss" or "generate" of a transformers model; "norm", "mlp" or
            "decode" (each token after a prompt) of a ``GPT``.
        route: "kernel" (gptkern's ops, on a GPU as kernels), "reference" (the same ops' PyTorch
            expressions, on a CPU), "engine" (gptkern's decode step), "library" (transformers' own) or
            "fallback".
        reason: Why.
    """

    part: str
    route: Literal["kernel", "reference", "engine", "library", "fallback"]
    reason: str


class Explanation(tuple[Route, ...]):
    """The routes of a model's parts; as text, a table."""

    __slots__ = ()

    def __str__(self) -> str:
        rows = [("part", "route", "why"), *((r.part, r.route, r.reason) for r in self)]
        first, second = (max(len(row[i]) for row in rows) for i in (0, 1))
        return "\n".join(f"{a:<{first}}  {b:<{second}}  {c}" for a, b, c in rows)


def explain(model: Any, generation_config: Any = None) -> Explanation:
    """How each part of a model runs, and why.

    Args:
        model: A ``GPT``, or a model of transformers, accelerated or not.
        generation_config: Of a transformers model, what ``generate`` is asked about; its own when None.

    Raises:
        TypeError: Another kind of model.
        ValueError: A ``generation_config`` with a ``GPT``, whose ``generate`` has none.
    """
    from gptkern.model import GPT

    if isinstance(model, GPT):
        from gptkern.generate.executor import routes

        if generation_config is not None:
            raise ValueError("explain: generation_config is for transformers' models; model is a GPT")
        return Explanation(routes(model))
    from gptkern.transformers import swap

    return swap.explain(model, generation_config)
