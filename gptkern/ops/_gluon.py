"""Gluon, Triton's language of explicit layouts and warps, as the kernels see it; see ``_triton``."""

from __future__ import annotations

import functools
from typing import Any

import torch

from gptkern.ops import _without_triton

__all__ = [
    "async_load", "descriptor", "fence_async_shared", "gl", "gluon", "mbarrier", "reinterpret",
    "warpgroup_mma", "warpgroup_mma_wait",
]  # fmt: skip

try:
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia.hopper import (
        fence_async_shared,
        mbarrier,
        tma,
        warpgroup_mma,
        warpgroup_mma_wait,
    )
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    class _Tiles(TensorDescriptor):
        """A map whose conditions the ops have asked for already, and which checks none again."""

        round_f32_to_tf32 = False  # Triton 3.6 has no such field

        def __post_init__(self) -> None: ...

    Tiles: Any = _Tiles

    # Triton 3.6 and 3.7 have it by its older name, which 3.9 refuses.
    async_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
    _shared = gl.shared_memory_descriptor
    reinterpret = getattr(_shared, "reinterpret", None) or _shared._reinterpret  # before Triton 3.9
except ImportError:
    gluon, gl = _without_triton.triton, _without_triton.language
    async_load = fence_async_shared = mbarrier = reinterpret = None
    warpgroup_mma = warpgroup_mma_wait = Tiles = None


@functools.cache
def _layout(bits: int, rank: int) -> Any:
    """Tiles in shared memory as the matrix unit reads them, in 128-byte swizzle."""
    return gl.NVMMASharedLayout(128, bits, rank=rank)


def descriptor(x: torch.Tensor, block: list[int]) -> Any:
    """A map of ``x`` for tiles of ``block`` elements whose last dimension is a multiple of 128 bytes.

    Tiles lie in shared memory as the matrix unit reads them, in 128-byte swizzle. Strides are positive
    multiples of 16 bytes, but for dimensions of size 1, whose strides do not matter.
    """
    strides = list(x.stride())
    for axis in range(x.dim() - 2, -1, -1):
        if x.shape[axis] == 1:
            strides[axis] = strides[axis + 1] * x.shape[axis + 1]
    if Tiles is None:
        return _without_triton.TensorDescriptor(x, list(x.shape), strides, block)
    return Tiles(x, list(x.shape), strides, block, _layout(8 * x.element_size(), len(block)))
