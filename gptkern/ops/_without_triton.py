"""The few names of Triton that modules use outside of device code, for where it is not installed."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NoReturn

import torch


class NamedKernel:
    """A kernel that cannot be compiled here: its function, for name and parameters."""

    def __init__(self, fn: Callable[..., Any], do_not_specialize: Iterable[str | int] = ()) -> None:
        self.fn, self.do_not_specialize = fn, tuple(do_not_specialize)

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., NoReturn]:
        """A launch that fails."""
        return self._cannot

    def _cannot(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise ImportError(
            f"{self.fn.__name__} is in no pack in use and Triton, which would compile it, is not installed: "
            "pip install triton, or make a pack that holds it (gptkern pack)"
        )


@dataclass(frozen=True)
class _Dtype:
    name: str
    primitive_bitwidth: int

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class constexpr:
    value: Any


class _Language:
    float32, float16, bfloat16 = _Dtype("fp32", 32), _Dtype("fp16", 16), _Dtype("bf16", 16)
    float8e4nv, int8, uint8 = _Dtype("fp8e4nv", 8), _Dtype("int8", 8), _Dtype("uint8", 8)

    constexpr = constexpr

    @staticmethod
    def NVMMADistributedLayout(*_: Any, **__: Any) -> None:
        """A layout over lanes, as which a kernel's file names it."""

    DistributedLinearLayout = DotOperandLayout = NVMMADistributedLayout


class _Triton:
    @staticmethod
    def jit(fn: Callable[..., Any] | None = None, **options: Any) -> Any:
        """A kernel, or a decorator that makes one."""
        return (
            NamedKernel(fn, **options)
            if fn is not None
            else lambda decorated: NamedKernel(decorated, **options)
        )

    @staticmethod
    def cdiv(x: int, y: int) -> int:
        """The quotient, rounded up."""
        return -(-x // y)

    @staticmethod
    def next_power_of_2(n: int) -> int:
        """The least power of two that is at least ``n``."""
        return 1 << (n - 1).bit_length() if n > 0 else 0


@dataclass
class TensorDescriptor:
    """A matrix and the tile that is copied from it at a time."""

    base: torch.Tensor
    shape: list[int]
    strides: list[int]
    block_shape: list[int]
    padding: str = "zero"
    round_f32_to_tf32: bool = False


triton, language = _Triton(), _Language()
