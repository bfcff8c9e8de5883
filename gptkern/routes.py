"""The routes of a model's parts, which ``explain`` returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

# The code that a part of a transformers model falls back on.
LIBRARY = "transformers' own code"


@dataclass(frozen=True)
class Route:
    """The way in which one part of a model runs.

    Attributes:
        part: "attention", "norm", "mlp", "loss" or "generate" of a transformers model; "norm", "mlp" or
            "decode" (each token after a prompt) of a ``GPT``.
        route: "kernel" (gptkern's ops, on a GPU as kernels), "reference" (the same ops' PyTorch
            expressions, on a CPU), "engine" (gptkern's decode step), "library" (transformers' own),
            "fallback" or "passed over" (an executor that was not chosen).
        reason: The reason for this route.
    """

    part: str
    route: Literal["kernel", "reference", "engine", "library", "fallback", "passed over"]
    reason: str


class Explanation(tuple[Route, ...]):
    """The routes of a model's parts; as text, a table."""

    __slots__ = ()

    def __str__(self) -> str:
        rows = [("part", "route", "why"), *((r.part, r.route, r.reason) for r in self)]
        first, second = (max(len(row[i]) for row in rows) for i in (0, 1))
        return "\n".join(f"{a:<{first}}  {b:<{second}}  {c}" for a, b, c in rows)
