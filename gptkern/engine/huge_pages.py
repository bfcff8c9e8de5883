"""Large memory on the CPU, in huge pages: reading it takes fewer walks of the system's page tables."""

from __future__ import annotations

import contextlib
import math
import mmap

import torch

LEAST_BYTES = 1 << 22  # two huge pages of the usual size: less has hardly a whole one in it


def zeros(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A tensor of zeros on the CPU. What is large takes memory as it is first written or read, not before.

    The system gives huge pages where it has them and allows them; where not, the pages are small.

    Raises:
        OSError, RuntimeError: There is not as much address space.
    """
    size = math.prod(shape) * dtype.itemsize
    if size < LEAST_BYTES:
        return torch.zeros(shape, dtype=dtype)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE)
    with contextlib.suppress(OSError):  # a system without huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8).view(dtype).view(shape)
