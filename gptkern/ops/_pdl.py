"""Programmatic dependent launch, on the device and on the host (sm_90 and newer).

A kernel launched with ``launch_pdl`` may start before its predecessor in the stream has ended. It reads its
predecessor's results after ``wait`` alone; before, it fetches into the L2 cache, which is coherent, so that
weights and pages that the predecessor changes are still read right.
A kernel lets its dependents start only after its own ``wait``: whatever the predecessor's own
predecessors wrote is then visible to a dependent even before its ``wait``.

Every function takes PDL, false where kernels are interpreted, as the interpreter has no inline assembly.
"""

from __future__ import annotations

from typing import Any

import torch

from gptkern.ops import _launch
from gptkern.ops._dispatch import INTERPRETED
from gptkern.ops._triton import gdc_launch_dependents, gdc_wait, tl, triton


@triton.jit
def prefetch(pointers, mask, PDL: tl.constexpr):  # type: ignore[no-untyped-def]
    """Fetch the 128-byte lines of ``pointers`` into L2."""
    if PDL:
        tl.inline_asm_elementwise(
            "{ .reg .pred wanted; setp.ne.b32 wanted, $2, 0; "
            "@wanted prefetch.global.L2 [$1]; mov.b32 $0, 0; }",
            "=r,l,r",
            [pointers.to(tl.int64), mask.to(tl.int32)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit
def wait(PDL: tl.constexpr):  # type: ignore[no-untyped-def]
    """Wait until the predecessor has ended and its writes are visible; then let the dependents start."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()


def options(device: torch.device) -> dict[str, Any]:
    """The launch arguments that switch programmatic dependent launch on where the GPU has it."""
    if _launch.arch(device) >= 90 and not (INTERPRETED and device.type == "cpu"):
        return {"PDL": True, "launch_pdl": True}
    return {"PDL": False}
