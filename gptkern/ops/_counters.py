"""Counters by which the programs that share an output find out who is last, and combines.

Kernels find them zero and leave them zero. Each stream has its own, so that calls on different streams may
overlap. PyTorch hands out 32 streams in turn, so whoever captures kernels on one and replays them on any
other, as a CUDA graph does, brings a pool of its own (``counters_from``).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

# More than any launch of GPT-2's family asks for.
_LEAST = 1 << 16

# (device, stream, count) -> zeros. A graph holds their addresses: none is replaced by a larger one.
Pool = dict[tuple[torch.device, int, int], torch.Tensor]
_shared: Pool = {}
_current: ContextVar[Pool] = ContextVar("counters", default=_shared)


@contextmanager
def counters_from(pool: Pool) -> Iterator[None]:
    """Within the block, kernels that this thread launches take their counters from ``pool``."""
    token = _current.set(pool)
    try:
        yield
    finally:
        _current.reset(token)


def counters(device: torch.device, count: int) -> torch.Tensor:
    """At least ``count`` int32 zeros on ``device``, for kernels of the current stream."""
    if device.type == "meta":
        return torch.empty(count, dtype=torch.int32, device=device)
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    key = device, stream, max(_LEAST, 1 << (count - 1).bit_length())
    pool = _current.get()
    if key not in pool:
        with torch.inference_mode(False):
            pool[key] = torch.zeros(key[2], dtype=torch.int32, device=device)
    return pool[key]


def are_counters(tensor: torch.Tensor) -> bool:
    """True if ``tensor`` comes from ``counters``, and not from its caller."""
    return any(tensor is known for known in _current.get().values())
