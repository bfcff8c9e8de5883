"""A call, its numbers that trip kernels, and its sizes at the edges of their tiles."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import torch

from gptkern.ops import _launch

VALUES = ("normal", "denormal", "low", "equal", "inf", "nan")
"""Kinds of numbers: ``low`` makes all logits about -6e4, ``equal`` all 3e4; ``inf`` is one element of the
first tensor, ``nan`` one row of it."""

_LEVELS = {"low": -6e4, "equal": 3e4}
_PRIMES = (2, 3, 5, 7, 13, 37, 67, 101)


@dataclass(frozen=True)
class Trial:
    """One call.

    Attributes:
        op: A public op of ``gptkern.ops``.
        sizes: The op's extents, in the order in which ``families`` draws them.
        dtype: Of its tensors, by name.
        values: One of ``VALUES``.
        far: The first tensor's rows, or the cache's pages, lie more than 2^31 elements apart.
        options: Keywords of the op.
        seed: Of its numbers.
    """

    op: str
    sizes: tuple[int, ...]
    dtype: str = "float32"
    values: str = "normal"
    far: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    seed: int = 0


class Numbers:
    """The tensors of a trial."""

    def __init__(self, trial: Trial) -> None:
        self.kind, self.dtype = trial.values, getattr(torch, trial.dtype)
        self.far, self.grad = trial.far, not trial.far
        self.generator = torch.Generator().manual_seed(trial.seed)

    def normal(self, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> torch.Tensor:
        """A parameter: no kind of numbers changes it."""
        drawn = torch.randn(shape, generator=self.generator) * scale
        return drawn.to(dtype or self.dtype).requires_grad_(self.grad)

    def first(self, *shape: int) -> torch.Tensor:
        """The op's first tensor, of the kind of numbers that is asked for."""
        x = torch.randn(shape, generator=self.generator)
        if self.kind == "denormal":
            x *= 1e-6 if self.dtype == torch.float16 else 1e-39
        elif self.kind in _LEVELS:
            x = (_LEVELS[self.kind] + (x * 4).round() * (self.kind == "low")).expand(shape).clone()
        elif self.kind == "inf" and x.numel():
            x.view(-1)[x.numel() // 2] = torch.inf
        elif self.kind == "nan" and x.numel():
            x.view(-1, shape[-1])[-1] = torch.nan
        return self._placed(x)

    def pair(self, shape: tuple[int, ...], other: tuple[int, ...], scale: float) -> tuple[Any, Any]:
        """Two tensors whose products over the last dimension, times ``scale``, are an op's logits."""
        if self.kind not in _LEVELS:
            return self.first(*shape), self.normal(*other)
        level = _LEVELS[self.kind]
        size = (abs(level) / (max(shape[-1], 1) * scale)) ** 0.5
        a, b = torch.full(shape, size), torch.full(other, size if level > 0 else -size)
        if self.kind == "low" and other[0] * other[1] > 1:
            b[0, 0] *= 1.125
        return self._placed(a), b.to(self.dtype).requires_grad_(self.grad)

    def _placed(self, x: torch.Tensor) -> torch.Tensor:
        x = x.to(self.dtype)
        return (distant(x) if self.far else x).requires_grad_(self.grad)

    def integers(self, end: int, *shape: int) -> torch.Tensor:
        """Indices below ``end``."""
        return torch.randint(end, shape, generator=self.generator)


def distant(x: torch.Tensor) -> torch.Tensor:
    """A copy whose entries along the first dimension lie over 2^31 elements apart, in virtual memory."""
    if x.shape[0] < 2:
        return x
    apart = (2**31 // (x.shape[0] - 1) + 16) // 16 * 16
    memory = torch.empty((x.shape[0] - 1) * apart + x[0].numel(), dtype=x.dtype)
    return memory.as_strided(x.shape, (apart, *x[0].stride())).copy_(x)


class Draw:
    """Sizes at the edges of tiles."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def edge(self, kernel: str, tile: str, most: int) -> int:
        """1, a prime, or a tile of ``kernel``'s launch rows, and one less or more than it."""
        tiles = sorted({row[tile] for row in _launch.table(90)[kernel] if row.get(tile, most + 1) <= most})
        size = int(self.random.choice(tiles))
        prime = self.random.choice([p for p in _PRIMES if p <= most])
        return max(1, self.random.choice([1, prime, size - 1, size, size + 1]))

    def one(self, *choices: Any) -> Any:
        """One of these."""
        return self.random.choice(choices)
