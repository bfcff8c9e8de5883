"""Small kernels, each right and with one line changed: the first gives its numbers, the second is refused."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from ptx_support import run

from gptkern.testing.ptx import Fault


@dataclass(frozen=True)
class Pair:
    """A kernel, what is changed in it, and the check that refuses the changed one.

    Attributes:
        sizes: Elements of its int32 tensors, all zero: first the result.
        counting: The second holds 0, 1, 2 and so on.
        result: What the right kernel leaves in the first.
    """

    body: str
    line: str
    changed: str
    check: str
    sizes: tuple[int, ...]
    result: list[int]
    threads: int = 64
    blocks: int = 1
    counting: bool = False


PLACE = "shl.b32 %r1, %r0, 2; mul.wide.u32 %rd10, %r0, 4; add.s64 %rd11, %rd10, %rd0;"
FIRST = "setp.eq.b32 %p9, %r0, 0;"
ZERO_BINS = f"{PLACE} mov.b32 %r9, 0; setp.lt.u32 %p1, %r0, 8; @%p1 st.shared.b32 [%r1], %r9; bar.sync 0;"

REDUCTION = f"""{PLACE} st.shared.b32 [%r1], %r0; mov.b32 %r5, 64;
$loop: bar.sync 0; setp.lt.u32 %p1, %r0, %r5; shl.b32 %r6, %r5, 2; add.s32 %r7, %r1, %r6;
@%p1 ld.shared.b32 %r8, [%r7]; @%p1 ld.shared.b32 %r9, [%r1]; @%p1 add.s32 %r9, %r9, %r8;
@%p1 st.shared.b32 [%r1], %r9; shr.u32 %r5, %r5, 1; setp.gt.u32 %p2, %r5, 0; @%p2 bra $loop;
{FIRST} @%p9 st.global.b32 [%rd0], %r9;"""

SCAN = f"""{PLACE} mov.b32 %r4, 1; mov.b32 %r5, 1; st.shared.b32 [%r1], %r4; bar.sync 0;
$loop: setp.ge.u32 %p1, %r0, %r5; shl.b32 %r6, %r5, 2; sub.s32 %r7, %r1, %r6; mov.b32 %r8, 0;
@%p1 ld.shared.b32 %r8, [%r7]; bar.sync 1; add.s32 %r4, %r4, %r8; st.shared.b32 [%r1], %r4; bar.sync 0;
shl.b32 %r5, %r5, 1; setp.lt.u32 %p2, %r5, 64; @%p2 bra $loop; st.global.b32 [%rd11], %r4;"""

TRANSPOSED = f"""{PLACE} st.shared.b32 [%r1], %r0; bar.sync 0; and.b32 %r2, %r0, 7; shl.b32 %r2, %r2, 5;
shr.u32 %r3, %r0, 3; shl.b32 %r3, %r3, 2; add.s32 %r2, %r2, %r3; ld.shared.b32 %r4, [%r2];
st.global.b32 [%rd11], %r4;"""

HISTOGRAM = f"""{ZERO_BINS} and.b32 %r2, %r0, 7; shl.b32 %r2, %r2, 2;
atom.shared.add.u32 %r3, [%r2], 1; bar.sync 0;
@%p1 ld.shared.b32 %r4, [%r1]; @%p1 st.global.b32 [%rd11], %r4;"""

HISTOGRAM_OF_ALL = f"""{PLACE} setp.lt.u32 %p1, %r0, 8; @%p1 red.global.gpu.relaxed.add.u32 [%rd11], 1;"""

SPLIT_K = f"""{FIRST} mov.u32 %r10, %ctaid.x; add.s32 %r11, %r10, 1; mul.lo.s32 %r11, %r11, 10;
mul.wide.u32 %rd5, %r10, 4; add.s64 %rd6, %rd5, %rd1; @%p9 st.global.b32 [%rd6], %r11;
@%p9 atom.global.gpu.acq_rel.add.u32 %r12, [%rd2], 1; setp.eq.b32 %p1, %r12, 3; and.pred %p2, %p1, %p9;
@!%p2 bra $end;
ld.global.b32 %r13, [%rd1]; ld.global.b32 %r14, [%rd1 + 4]; ld.global.b32 %r15, [%rd1 + 8];
ld.global.b32 %r16, [%rd1 + 12]; add.s32 %r13, %r13, %r14; add.s32 %r15, %r15, %r16;
add.s32 %r13, %r13, %r15; st.global.b32 [%rd0], %r13;
$end: mov.b32 %r20, 0;"""

MESSAGE = f"""{FIRST} mov.u32 %r10, %ctaid.x; setp.eq.b32 %p1, %r10, 0; @!%p9 bra $end; @!%p1 bra $wait;
mov.b32 %r11, 42; st.global.b32 [%rd1], %r11; mov.b32 %r12, 1;
st.global.gpu.release.b32 [%rd2], %r12; bra $end;
$wait: ld.global.gpu.acquire.b32 %r13, [%rd2]; setp.eq.b32 %p2, %r13, 0; @%p2 bra $wait;
ld.global.b32 %r14, [%rd1]; st.global.b32 [%rd0], %r14;
$end: mov.b32 %r20, 0;"""

LOCK = f"""{FIRST} @!%p9 bra $end;
$take: atom.global.gpu.acquire.cas.b32 %r5, [%rd1], 0, 1; setp.ne.b32 %p1, %r5, 0; @%p1 bra $take;
ld.global.b32 %r6, [%rd0]; add.s32 %r6, %r6, 1; st.global.b32 [%rd0], %r6; mov.b32 %r7, 0;
st.global.gpu.release.b32 [%rd1], %r7;
$end: mov.b32 %r20, 0;"""

# Two tiles through one stage of shared memory; each thread reads what one of the other warp copied.
STAGE = f"""{PLACE} add.s64 %rd12, %rd10, %rd1; xor.b32 %r2, %r1, 128;
cp.async.ca.shared.global [%r1], [%rd12], 4; cp.async.commit_group; cp.async.wait_group 0; bar.sync 0;
ld.shared.b32 %r3, [%r2]; bar.sync 1;
cp.async.ca.shared.global [%r1], [%rd12 + 256], 4; cp.async.commit_group; cp.async.wait_group 0; bar.sync 0;
ld.shared.b32 %r4, [%r2]; add.s32 %r4, %r4, %r3; st.global.b32 [%rd11], %r4;"""

# The first warp hands two values through one place to the second: full at 256, empty at 264.
HANDED_ON = f"""{FIRST} mov.b32 %r20, 256; mov.b32 %r21, 264;
@%p9 mbarrier.init.shared::cta.b64 [%r20], 32; @%p9 mbarrier.init.shared::cta.b64 [%r21], 32; bar.sync 0;
and.b32 %r3, %r0, 31; shl.b32 %r1, %r3, 2; setp.ge.u32 %p1, %r0, 32; @%p1 bra $consumer;
st.shared.b32 [%r1], %r0; mbarrier.arrive.shared::cta.b64 _, [%r20];
$empty: mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r21], 0; @!%p2 bra $empty;
add.s32 %r2, %r0, 100; st.shared.b32 [%r1], %r2; mbarrier.arrive.shared::cta.b64 _, [%r20]; bra $end;
$consumer: xor.b32 %r4, %r1, 4;
$full: mbarrier.try_wait.parity.shared::cta.b64 %p3, [%r20], 0; @!%p3 bra $full;
ld.shared.b32 %r5, [%r4]; mbarrier.arrive.shared::cta.b64 _, [%r21];
$next: mbarrier.try_wait.parity.shared::cta.b64 %p3, [%r20], 1; @!%p3 bra $next;
ld.shared.b32 %r6, [%r4]; add.s32 %r7, %r5, %r6; mul.wide.u32 %rd10, %r3, 4; add.s64 %rd11, %rd10, %rd0;
st.global.b32 [%rd11], %r7;
$end: mov.b32 %r22, 0;"""
EMPTY = "$empty: mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r21], 0; @!%p2 bra $empty;"

ADDED = "ld.shared.b32 %r3, [%r2]; add.s32 %r3, %r3, 1; st.shared.b32 [%r2], %r3;"
ADDED_IN_GLOBAL = "ld.global.b32 %r3, [%rd11]; add.s32 %r3, %r3, 1; @%p1 st.global.b32 [%rd11], %r3;"
PAIRS = {
    "reduction": Pair(REDUCTION, "bar.sync 0;", "", "race", (1,), [8128], threads=128),
    "scan": Pair(SCAN, "bar.sync 1;", "", "race", (64,), list(range(1, 65))),
    "transposed": Pair(TRANSPOSED, "bar.sync 0;", "", "race", (64,), [t % 8 * 8 + t // 8 for t in range(64)]),
    "histogram": Pair(HISTOGRAM, "atom.shared.add.u32 %r3, [%r2], 1;", ADDED, "race", (8,), [8] * 8),
    "histogram of all": Pair(
        HISTOGRAM_OF_ALL,
        "@%p1 red.global.gpu.relaxed.add.u32 [%rd11], 1;",
        ADDED_IN_GLOBAL.replace("ld.", "@%p1 ld.", 1),
        "race",
        (8,),
        [4] * 8,
        blocks=4,
    ),
    "split-K": Pair(SPLIT_K, "acq_rel", "relaxed", "race", (1, 4, 1), [100], 32, 4),
    "message": Pair(MESSAGE, "release", "relaxed", "race", (1, 1, 1), [42], 32, 2),
    "lock": Pair(LOCK, "acquire", "relaxed", "race", (1, 1), [4], 32, 4),
    "stage": Pair(
        STAGE, "bar.sync 1;", "", "race", (64, 128), [2 * (t ^ 32) + 64 for t in range(64)], counting=True
    ),
    # The second value overtakes the first: two phases have passed, and the reader waits for ever.
    "handed on": Pair(HANDED_ON, EMPTY, "", "deadlock", (32,), [2 * (t ^ 1) + 100 for t in range(32)]),
}


def execute(pair: Pair, body: str, seed: int) -> list[int]:
    tensors = [torch.zeros(size, dtype=torch.int32) for size in pair.sizes]
    if pair.counting:
        tensors[1] += torch.arange(pair.sizes[1], dtype=torch.int32)
    run(body, *tensors, threads=pair.threads, blocks=pair.blocks, shared_bytes=512, seed=seed)
    return tensors[0].tolist()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", PAIRS)
def test_the_right_kernel_gives_its_numbers(name: str, seed: int) -> None:
    assert execute(PAIRS[name], PAIRS[name].body, seed) == PAIRS[name].result


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", PAIRS)
def test_the_racy_kernel_is_refused(name: str, seed: int) -> None:
    pair = PAIRS[name]
    assert pair.line in pair.body
    with pytest.raises(Fault) as caught:
        execute(pair, pair.body.replace(pair.line, pair.changed, 1), seed)
    assert caught.value.check == pair.check, str(caught.value)
