"""The calls that Hopper's kernels in Gluon can serve at all; each op asks for more."""

from __future__ import annotations

import torch

from gptkern.ops import _launch
from gptkern.ops._dispatch import INTERPRETED


def runs_gluon(x: torch.Tensor) -> bool:
    """True if ``x`` is in half precision on a Hopper GPU, and its kernels are compiled."""
    if INTERPRETED and x.device.type == "cpu":  # the interpreter does not know Gluon
        return False
    return 90 <= _launch.arch(x.device) < 100 and x.dtype in (torch.float16, torch.bfloat16)
