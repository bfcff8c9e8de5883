"""The kernels of ``bench_launch_costs``: a grid barrier again and again, and one that does nothing."""

from __future__ import annotations

import triton
import triton.language as tl

from gptkern.ops._pdl import wait
from gptkern.ops.decode_step.kernels import arrive, await_arrivals, leave


@triton.jit(do_not_specialize=["count"])
def barriers_kernel(
    barrier_ptr,  # (64,) int32, zero before and after
    count,
):
    programs = tl.num_programs(0)
    for index in range(count):
        arrive(barrier_ptr, True)
        await_arrivals(barrier_ptr, (index + 1) * programs, True)
    leave(barrier_ptr, barrier_ptr + 32, programs, True)


@triton.jit
def empty_kernel(x_ptr, PDL: tl.constexpr):
    wait(PDL)
