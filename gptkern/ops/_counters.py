"""Counters by which the programs that share an output find out who is last, and combines.

Kernels find them zero and leave them zero. Each stream has its own, so that calls on different
streams may overlap.
"""

from __future__ import annotations

import torch

_COUNT = 1 << 16

_counters: dict[tuple[torch.device, int], torch.Tensor] = {}


def counters(device: torch.device, count: int) -> torch.Tensor:
    """At least ``count`` int32 zeros on ``device``, for kernels of the current stream."""
    if device.type == "meta":
        return torch.empty(count, dtype=torch.int32, device=device)
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    found = _counters.get((device, stream))
    if found is None or found.numel() < count:
        with torch.inference_mode(False):
            found = torch.zeros(max(count, _COUNT), dtype=torch.int32, device=device)
        _counters[device, stream] = found
    return found
