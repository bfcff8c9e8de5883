"""How fast this machine reads memory and multiplies, as PyTorch's own calls reach it."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

Clock = Callable[[], float]


def seconds_of(call: Callable[[], object], clock: Clock = time.perf_counter) -> float:
    """The time that one call takes."""
    start = clock()
    call()
    return clock() - start


def read_speed(rounds: int, clock: Clock = time.perf_counter) -> float:
    """Bytes a second that PyTorch's sum reads of 256 MiB."""
    numbers = torch.ones(1 << 25, dtype=torch.int64)
    return numbers.nbytes / min(seconds_of(numbers.sum, clock) for _ in range(rounds + 2))


def product_speed(dtype: torch.dtype, rounds: int, clock: Clock = time.perf_counter) -> float:
    """Multiplications and additions a second of a product of 1024 x 3072 x 3072."""
    left, right = torch.ones(1024, 3072, dtype=dtype), torch.ones(3072, 3072, dtype=dtype)
    least = min(seconds_of(lambda: left @ right, clock) for _ in range(rounds + 2))
    return 2 * 1024 * 3072 * 3072 / least
