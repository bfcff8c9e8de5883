"""This machine's ceilings: the rate of a large copy, and of a large matrix product per dtype."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from gptkern.bench.timing import sample, warm_up

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Ceilings:
    """Measured ceilings.

    Attributes:
        copy: Bytes a second of a device-to-device copy, read plus written.
        matmul: Floating-point operations a second of a square product, by dtype name, random data.
    """

    copy: float
    matmul: dict[str, float]

    def floor(self, bytes_moved: float, flops: float, dtype: str) -> float:
        """The least seconds that so many bytes and operations in ``dtype`` take here."""
        return max(bytes_moved / self.copy, flops / self.matmul[dtype])


def measure(device: torch.device) -> Ceilings:
    """Measure both ceilings; seconds on a CPU, less on a GPU."""
    rates = {}
    for dtype in DTYPES:
        n = 8192 if device.type == "cuda" else 1024
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        rates[str(dtype).removeprefix("torch.")] = 2 * n**3 / _fastest(lambda a=a, b=b: a @ b.T, device)
    return Ceilings(copy=copy_rate(device), matmul=rates)


def copy_rate(device: torch.device) -> float:
    """Bytes a second of a copy that no cache holds, read plus written."""
    size = (2 << 30) if device.type == "cuda" else (256 << 20)
    source = torch.empty(size, dtype=torch.int8, device=device).random_()
    target = torch.empty_like(source)
    return 2 * size / _fastest(lambda: target.copy_(source), device)


def _fastest(call: object, device: torch.device) -> float:
    assert callable(call)
    estimate = warm_up([call], device)
    return min(sample([call], device, 10, estimate))
