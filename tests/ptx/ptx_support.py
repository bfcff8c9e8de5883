"""Small PTX modules for the tests of the executor."""

from __future__ import annotations

import torch

from gptkern.testing.ptx import execute

TILE = "cp.async.bulk.tensor.2d.shared::cta.global.mbarrier::complete_tx::bytes"
REGISTERS = """
    .reg .pred %p<40>;
    .reg .b16 %rs<40>;
    .reg .b32 %r<200>;
    .reg .b64 %rd<40>;
"""


def module(body: str, pointers: int = 2, threads: int = 32, more: str = "") -> str:
    """A module whose kernel has pointers ``%rd0..`` to its parameters and the thread's number in ``%r0``."""
    parameters = ",".join(f".param .u64 k_param_{i}" for i in range(pointers)) + more
    loads = "".join(f"ld.param.b64 %rd{i}, [k_param_{i}];" for i in range(pointers))
    return f"""
.version 8.8
.target sm_90a
.extern .shared .align 1024 .b8 smem[];
.visible .entry k({parameters})
.reqntid {threads}
{{
{REGISTERS}
{loads}
mov.u32 %r0, %tid.x;
{body}
ret;
}}
"""


def run(
    body: str,
    *tensors: torch.Tensor,
    threads: int = 32,
    shared_bytes: int = 0,
    blocks: int = 1,
    **options: object,
) -> None:
    """Execute a body on tensors."""
    text = module(body, len(tensors), threads)
    execute(text, (blocks,), tensors, shared_bytes=shared_bytes, **options)  # type: ignore[arg-type]


def unary(instruction: str, values: torch.Tensor, result: torch.dtype, more: str = "") -> torch.Tensor:
    """``instruction`` with ``OUT`` and ``IN`` as its registers, for each of 32 values of 2, 4 or 8 bytes."""
    out = torch.zeros(32, dtype=result)
    names = {1: "%rs", 2: "%rs", 4: "%r", 8: "%rd"}
    source, target = f"{names[values.element_size()]}10", f"{names[out.element_size()]}20"
    bits = 8 * values.element_size(), 8 * out.element_size()
    body = f"""
mul.wide.u32 %rd30, %r0, {values.element_size()}; add.s64 %rd30, %rd30, %rd0;
ld.global.b{bits[0]} {source}, [%rd30];
{more}
{instruction.replace("OUT", target).replace("IN", source)};
mul.wide.u32 %rd31, %r0, {out.element_size()}; add.s64 %rd31, %rd31, %rd1;
st.global.b{bits[1]} [%rd31], {target};
"""
    run(body, values, out)
    return out
