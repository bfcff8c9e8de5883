"""Each check of the executor: a kernel that breaks the rule is refused by its name, the mended one passes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ptx_support import TILE, module, run

from gptkern.testing.ptx import Fault, TensorMap, execute

ADDRESS = "mul.wide.u32 %rd5, %r0, 4; add.s64 %rd6, %rd5, %rd0; add.s64 %rd7, %rd5, %rd1;"
STORE = "st.global.b32 [%rd7], %r1;"


def ints(count: int) -> torch.Tensor:
    return torch.arange(count, dtype=torch.int32)


def refused(check: str, body: str, *tensors: torch.Tensor, **options: object) -> str:
    """The message of the fault, which must come from this check."""
    with pytest.raises(Fault) as caught:
        run(body, *tensors, **options)  # type: ignore[arg-type]
    assert caught.value.check == check, str(caught.value)
    return str(caught.value)


def test_bounds_of_global_memory() -> None:
    body = f"{ADDRESS} ld.global.b32 %r1, [%rd6]; {STORE}"
    run(body, ints(32), ints(32))
    assert "lane 31 accesses 4 bytes, 4 beyond the end of parameter 0" in refused(
        "bounds", body, ints(31), ints(32)
    )
    assert "st.global.b32" in refused("bounds", body, ints(32), ints(30))
    refused("bounds", f"{ADDRESS} mov.b64 %rd6, 64; ld.global.b32 %r1, [%rd6]; {STORE}", ints(32), ints(32))
    masked = f"{ADDRESS} setp.lt.u32 %p1, %r0, 31; mov.b32 %r1, 0; @%p1 ld.global.b32 %r1, [%rd6]; {STORE}"
    run(masked, ints(31), ints(32))


def test_alignment() -> None:
    vector = "ld.global.v2.b32 {%r1, %r2}, [%rd0 + OFFSET]; st.global.b32 [%rd1], %r1;"
    data = torch.zeros(16, dtype=torch.int64).view(torch.int32)
    run(vector.replace("OFFSET", "8"), data, ints(4))
    refused("alignment", vector.replace("OFFSET", "4"), data, ints(4))
    refused("alignment", "mov.b32 %r1, 2; st.shared.b32 [%r1], %r0;", data, data, shared_bytes=64)


def test_memory_that_nobody_wrote() -> None:
    out = ints(32)
    body = f"{ADDRESS} ld.global.b32 %r1, [%rd7]; st.global.b32 [%rd6], %r1;"
    run(body, ints(32), out)
    refused("uninitialised", body, ints(32), out, fresh=[out])
    refused("uninitialised", "shl.b32 %r1, %r0, 2; ld.shared.b32 %r2, [%r1];", out, out, shared_bytes=128)
    assert "register %r9" in refused("uninitialised", "add.s32 %r1, %r9, 1;", out, out)


def test_lanes_that_have_not_set_a_register_hold_no_number() -> None:
    out = torch.zeros(32)
    place, one = ADDRESS.replace("%rd1", "%rd0"), "mov.b32 %r1, 0f3F800000;"
    body = f"{place} setp.eq.b32 %p1, %r0, 3; @%p1 {one} st.global.b32 [%rd6], %r1;"
    run(body, out)
    assert out[3] == 1 and out.isnan().sum() == 31


def test_half_of_a_pair_may_be_unset() -> None:
    """As the compiler leaves it where it uses the other half alone. Set too late is another thing."""
    out = torch.zeros(32, 2, dtype=torch.bfloat16)
    pair = "mov.b32 %r1, 0f3F800000; cvt.rn.bf16x2.f32 %r3, %r2, %r1;"
    run(f"{ADDRESS.replace('%rd1', '%rd0')} {pair} st.global.b32 [%rd6], %r3;", out)
    assert torch.all(out[:, 0] == 1) and torch.all(out[:, 1].isnan())
    refused("uninitialised", f"{pair} mov.b32 %r2, 0;", ints(1), ints(1))


SHARED = (
    "shl.b32 %r1, %r0, 2; st.shared.b32 [%r1], %r0; BARRIER xor.b32 %r2, %r1, 252; ld.shared.b32 %r3, [%r2];"
)


def test_a_read_of_what_another_warp_wrote_needs_a_barrier() -> None:
    run(SHARED.replace("BARRIER", "bar.sync 0;"), ints(1), ints(1), threads=64, shared_bytes=256)
    refused("race", SHARED.replace("BARRIER", ""), ints(1), ints(1), threads=64, shared_bytes=256)


def within_a_warp(body: str, warp_sync: str) -> None:
    """Lanes' own words at %r1, a neighbour's at %r2; lane 0 is %p1, lane 1 %p2."""
    text = f"""shl.b32 %r1, %r0, 2; xor.b32 %r2, %r1, 4; mov.b32 %r3, 128;
    setp.eq.b32 %p1, %r0, 0; setp.eq.b32 %p2, %r0, 1; {body}"""
    run(text.replace("SYNC", warp_sync), ints(1), ints(1), shared_bytes=640)


@pytest.mark.parametrize(
    "body",
    [
        "st.shared.b32 [%r1], %r0; SYNC ld.shared.b32 %r4, [%r2];",
        "@%p1 st.shared.b32 [%r3], %r0; SYNC ld.shared.b32 %r4, [%r3];",
        "@%p1 st.shared.b32 [%r3], %r0; SYNC @%p2 st.shared.b32 [%r3], %r0;",
        # Loaded by many lanes, by two in turn, by one; then another stores.
        "st.shared.b32 [%r1], %r0; bar.warp.sync -1; ld.shared.b32 %r4, [%r2]; SYNC "
        "st.shared.b32 [%r1], %r4;",
        "@%p1 st.shared.b32 [%r3], %r0; bar.warp.sync -1; ld.shared.b32 %r4, [%r3]; SYNC "
        "@%p2 st.shared.b32 [%r3], %r4;",
        "@%p1 st.shared.b32 [%r3], %r0; bar.warp.sync -1; @%p2 ld.shared.b32 %r4, [%r3]; "
        "@%p1 ld.shared.b32 %r4, [%r3]; SYNC @%p1 st.shared.b32 [%r3], %r0;",
        # A matrix load takes what all lanes stored.
        "shl.b32 %r1, %r0, 4; st.shared.v4.b32 [%r1], {%r0, %r0, %r0, %r0}; SYNC "
        "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r20, %r21, %r22, %r23}, [%r1];",
        "shl.b32 %r1, %r0, 4; stmatrix.sync.aligned.m8n8.x4.shared.b16 [%r1], {%r0, %r0, %r0, %r0}; SYNC "
        "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r20, %r21, %r22, %r23}, [%r1];",
    ],
)
def test_lanes_of_a_warp_need_an_order_between_them(body: str) -> None:
    within_a_warp(body, "bar.warp.sync -1;")
    within_a_warp(body, "bar.sync 0;")
    for wrong in ("", "@%p1 bar.warp.sync 1;", "shfl.sync.idx.b32 %r9, %r0, 0, 31, -1;"):
        with pytest.raises(Fault, match=r"race: lane \d+ \w+ .* no bar\.warp\.sync between"):
            within_a_warp(body, wrong)


def test_a_lane_needs_no_order_with_itself() -> None:
    within_a_warp("st.shared.b32 [%r1], %r0; ld.shared.b32 %r4, [%r1]; st.shared.b32 [%r1], %r4;", "")


def test_a_write_over_what_another_warp_reads_needs_a_barrier() -> None:
    body = SHARED.replace("BARRIER", "bar.sync 0;") + "AGAIN st.shared.b32 [%r1], %r3;"
    run(body.replace("AGAIN", "bar.sync 0;"), ints(1), ints(1), threads=64, shared_bytes=256)
    refused("race", body.replace("AGAIN", ""), ints(1), ints(1), threads=64, shared_bytes=256)


def test_lanes_that_write_one_address_must_agree() -> None:
    body = "mov.b32 %r1, 0; st.shared.b32 [%r1], VALUE;"
    run(body.replace("VALUE", "%r1"), ints(1), ints(1), shared_bytes=4)
    refused("tie", body.replace("VALUE", "%r0"), ints(1), ints(1), shared_bytes=4)
    refused("tie", "st.global.b32 [%rd0], %r0;", ints(1), ints(1))


COPY = f"""{ADDRESS} shl.b32 %r1, %r0, 2; cp.async.ca.shared.global [%r1], [%rd6], 4; cp.async.commit_group;
cp.async.ca.shared.global [%r1 + 128], [%rd6], 4; cp.async.commit_group;
WAIT ld.shared.b32 %r2, [%r1 + FROM]; st.global.b32 [%rd7], %r2;"""


def test_a_copy_arrives_at_its_wait() -> None:
    def body(wait: str, place: int) -> str:
        return COPY.replace("WAIT", wait).replace("FROM", str(place))

    out = torch.zeros(32, dtype=torch.int32)
    run(body("cp.async.wait_group 1;", 0), ints(32), out, shared_bytes=256)
    assert torch.equal(out, ints(32))
    run(body("cp.async.wait_group 0;", 128), ints(32), out, shared_bytes=256)
    refused("pending", body("", 0), ints(32), out, shared_bytes=256)
    refused("pending", body("cp.async.wait_group 1;", 128), ints(32), out, shared_bytes=256)
    refused("pending", body("st.shared.b32 [%r1], %r0;", 0), ints(32), out, shared_bytes=256)


def test_a_barrier_that_not_all_reach_is_a_deadlock() -> None:
    body = "setp.lt.u32 %p1, %r0, 32; @%p1 bra $there; bar.sync 0; $there: bar.sync 1; bar.sync 0;"
    refused("deadlock", body, ints(1), ints(1), threads=64)
    run(
        "setp.lt.u32 %p1, %r0, 32; @%p1 bra $there; mov.b32 %r1, 0; $there: bar.sync 0;",
        ints(1),
        ints(1),
        threads=64,
    )


def test_a_part_of_a_warp_does_not_shuffle() -> None:
    body = "setp.lt.u32 %p1, %r0, 16; @%p1 shfl.sync.bfly.b32 %r1, %r0, 1, 31, -1;"
    refused("convergence", body, ints(1), ints(1))


# --- blocks among each other

ARRIVE = "setp.eq.b32 %p1, %r0, 0; @%p1 atom.global.gpu.ORDER.add.u32 %r5, [%rd1], 1;"
SPIN = "$spin: ld.global.gpu.ORDER.b32 %r6, [%rd1]; setp.lt.u32 %p2, %r6, 4; @%p2 bra $spin;"


def grid_barrier(arrive: str, leave: str) -> str:
    """Each block stores its number, all wait for all, each reads its neighbour's."""
    return f"""
    mov.u32 %r10, %ctaid.x; mul.wide.u32 %rd5, %r10, 4; add.s64 %rd6, %rd5, %rd0;
    setp.eq.b32 %p1, %r0, 0; @%p1 st.global.b32 [%rd6], %r10; bar.sync 0;
    {ARRIVE.replace("ORDER", arrive)} {SPIN.replace("ORDER", leave)} bar.sync 0;
    xor.b32 %r11, %r10, 1; mul.wide.u32 %rd7, %r11, 4; add.s64 %rd7, %rd7, %rd0; ld.global.b32 %r12, [%rd7];
    add.s64 %rd8, %rd5, %rd2; @%p1 st.global.b32 [%rd8], %r12;
    """


@pytest.mark.parametrize("seed", range(8))
def test_a_grid_barrier_orders_blocks(seed: int) -> None:
    counter, out = torch.zeros(1, dtype=torch.int32), torch.zeros(4, dtype=torch.int32)
    run(
        grid_barrier("release", "acquire"),
        torch.zeros(4, dtype=torch.int32),
        counter,
        out,
        blocks=4,
        seed=seed,
    )
    assert out.tolist() == [1, 0, 3, 2]


@pytest.mark.parametrize(
    ("arrive", "leave"), [("relaxed", "acquire"), ("release", "relaxed"), ("relaxed", "relaxed")]
)
def test_a_grid_barrier_with_a_relaxed_order_is_a_race(arrive: str, leave: str) -> None:
    tensors = (
        torch.zeros(4, dtype=torch.int32),
        torch.zeros(1, dtype=torch.int32),
        torch.zeros(4, dtype=torch.int32),
    )
    assert "without an order to block" in refused("race", grid_barrier(arrive, leave), *tensors, blocks=4)


def test_a_sum_of_floats_whose_order_timing_decides_is_a_race() -> None:
    add = "setp.eq.b32 %p1, %r0, 0; mov.b32 %r5, 0f3F800000; @%p1 red.global.gpu.relaxed.add.f32 [%rd0], %r5;"
    refused("race", add, torch.zeros(1), blocks=2)
    total = torch.zeros(1, dtype=torch.int32)
    run(add.replace("f32", "u32").replace("0f3F800000", "1"), total, blocks=2)
    assert total.tolist() == [2]


# Each warp of two blocks stores, one thread counts the blocks, the last reads what all have stored.
SPLITS = """
mov.u32 %r10, %ctaid.x; mad.lo.u32 %r11, %r10, 64, %r0; mul.wide.u32 %rd5, %r11, 4; add.s64 %rd6, %rd5, %rd0;
st.global.b32 [%rd6], %r11; BARRIER setp.eq.b32 %p1, %r0, 0; mov.b32 %r5, 0;
@%p1 atom.global.gpu.acq_rel.add.u32 %r5, [%rd1], 1; @%p1 st.shared.b32 [%r12], %r5; bar.sync 0;
ld.shared.b32 %r5, [%r12]; setp.ne.b32 %p2, %r5, 1; @%p2 ret;
mul.wide.u32 %rd7, %r0, 4; add.s64 %rd7, %rd7, %rd0; ld.global.b32 %r6, [%rd7];
ld.global.b32 %r7, [%rd7 + 256]; add.s32 %r6, %r6, %r7;
mul.wide.u32 %rd8, %r0, 4; add.s64 %rd8, %rd8, %rd2; st.global.b32 [%rd8], %r6;
"""


def test_a_release_gives_on_what_its_own_warp_has_seen() -> None:
    def splits(barrier: str, seed: int) -> torch.Tensor:
        tensors = ints(128), torch.zeros(1, dtype=torch.int32), ints(64)
        body = "mov.b32 %r12, 0;" + SPLITS.replace("BARRIER", barrier)
        run(body, *tensors, threads=64, shared_bytes=4, blocks=2, seed=seed)
        return tensors[2]

    for seed in range(4):
        assert torch.equal(splits("bar.sync 0;", seed), 64 + 2 * ints(64))
        with pytest.raises(Fault, match=r"race: .* without an order to block"):
            splits("", seed)


# A warp stores, the block's other warp loads: through global memory.
THROUGH = (
    f"{ADDRESS} {STORE} BARRIER xor.b32 %r2, %r0, 32; mul.wide.u32 %rd8, %r2, 4; add.s64 %rd8, %rd8, %rd1;"
)


def test_warps_of_a_block_need_a_barrier_on_global_memory() -> None:
    body = f"mov.b32 %r1, %r0; {THROUGH} ld.global.b32 %r3, [%rd8];"
    run(body.replace("BARRIER", "bar.sync 0;"), ints(64), ints(64), threads=64)
    message = refused("race", body.replace("BARRIER", ""), ints(64), ints(64), threads=64)
    assert "reads parameter 1 where another warp writes, no barrier between" in message
    # Two stores of different values.
    twice = f"mov.b32 %r1, VALUE; {THROUGH.replace('BARRIER', '')} st.global.b32 [%rd8], %r1;"
    refused("race", twice.replace("VALUE", "%r0"), ints(64), ints(64), threads=64)
    run(twice.replace("VALUE", "7"), ints(64), ints(64), threads=64)


def test_two_blocks_that_store_to_one_place_are_a_race() -> None:
    refused("race", f"mov.b32 %r1, 1; {ADDRESS} {STORE}", ints(32), ints(32), blocks=2)


def test_a_grid_that_waits_for_blocks_that_cannot_start_is_a_deadlock() -> None:
    tensors = (
        torch.zeros(4, dtype=torch.int32),
        torch.zeros(1, dtype=torch.int32),
        torch.zeros(4, dtype=torch.int32),
    )
    refused("deadlock", grid_barrier("release", "acquire"), *tensors, blocks=4, resident=3)


# --- engines

FILL = """shl.b32 %r1, %r0, 2; mov.b32 %r2, 0; $fill: st.shared.b32 [%r1], %r2; add.s32 %r1, %r1, 512;
setp.lt.u32 %p1, %r1, 12288; @%p1 bra $fill;"""
NAMES = ",".join(f"%r{100 + i}" for i in range(16))
# Rows of 128 bytes, swizzled: A at 0, B at 8192; 1024 bytes from one group of 8 rows to the next.
DESCRIPTORS = (1 << 62) | (64 << 32), (1 << 62) | (64 << 32) | (8192 >> 4)
PRODUCT = f"""wgmma.fence.sync.aligned; mov.b64 %rd10, {DESCRIPTORS[0]}; mov.b64 %rd11, {DESCRIPTORS[1]};
setp.ne.b32 %p3, %r2, 0;
wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 {{{NAMES}}}, %rd10, %rd11, %p3, 1, 1, 0, 0;
wgmma.commit_group.sync.aligned;"""
WAIT, FENCE = "wgmma.wait_group.sync.aligned 0;", "fence.proxy.async.shared::cta;"


def test_a_product_needs_a_fence_and_its_wait() -> None:
    size = {"threads": 128, "shared_bytes": 12288}
    use = "add.f32 %r3, %r100, %r101;"
    run(f"{FILL} {FENCE} bar.sync 0; {PRODUCT} {WAIT} {use}", ints(1), ints(1), **size)  # type: ignore[arg-type]
    refused("proxy", f"{FILL} bar.sync 0; {PRODUCT} {WAIT} {use}", ints(1), ints(1), **size)
    refused("race", f"{FILL} {FENCE} {PRODUCT} {WAIT} {use}", ints(1), ints(1), **size)
    refused("pending", f"{FILL} {FENCE} bar.sync 0; {PRODUCT} {use}", ints(1), ints(1), **size)
    # A wait is for the groups that were closed.
    opened = PRODUCT.replace("wgmma.commit_group.sync.aligned;", "")
    refused("pending", f"{FILL} {FENCE} bar.sync 0; {opened} {WAIT} {use}", ints(1), ints(1), **size)
    over = "bar.sync 0; shl.b32 %r1, %r0, 2; st.shared.b32 [%r1], %r2;"
    refused("pending", f"{FILL} {FENCE} bar.sync 0; {PRODUCT} {over} {WAIT}", ints(1), ints(1), **size)
    run(f"{FILL} {FENCE} bar.sync 0; {PRODUCT} {WAIT} {over}", ints(1), ints(1), **size)  # type: ignore[arg-type]


MADE = f"@%p1 mbarrier.init.shared::cta.b64 [%r1], 1; {FENCE} bar.sync 0;"
ARRIVED = "$w: mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r1], 0; @!%p2 bra $w;"


def tile(wait: str, amount: int = 2048, made: str = MADE, after: str = "", **options: Any) -> None:
    """A tile of 32 x 32 half numbers, read where it arrives by each of two warps."""
    ask = f"""@%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r1], {amount};
    @%p1 {TILE} [%r2], [%rd7, {{%r2, %r2}}], [%r1];"""
    body = f"""
    mov.b64 %rd6, k_param_1; cvta.param.u64 %rd7, %rd6; mov.b32 %r1, 2048; mov.b32 %r2, 0;
    shl.b32 %r3, %r0, 2; setp.eq.b32 %p1, %r0, 0; setp.ge.u32 %p3, %r0, 32; {made} {ask} {wait}
    ld.shared.b32 %r4, [%r3]; {after.replace("AGAIN", ask)}
    """
    source = torch.ones(32, 32, dtype=torch.float16)
    text = module(body, 1, 64, ", .param .align 64 .b8 k_param_1[128]")
    values = (ints(1), TensorMap(source, (32, 32), (32, 1), (32, 32), 2))
    execute(text, (1,), values, shared_bytes=6144, **options)


def test_a_tile_arrives_at_its_barrier() -> None:
    wait = ARRIVED.replace("[%r1], 0", "[%r1], PARITY")
    tile(wait.replace("PARITY", "0"))
    with pytest.raises(Fault, match="pending: lane 0 reads what an asynchronous copy still writes"):
        tile("")
    with pytest.raises(Fault, match="pending: lane 0 reads"):  # the phase before the first counts as over
        tile(wait.replace("PARITY", "1").replace("$w: ", "").replace("@!%p2 bra $w;", ""))
    with pytest.raises(Fault, match="deadlock"):  # more bytes are expected than come
        tile(wait.replace("PARITY", "0"), amount=4096)


def halves(who: str) -> None:
    """Two halves of 32 rows of a wide tile, in one instruction: each asked for by one of two warps."""
    body = f"""
    mov.b64 %rd6, k_param_1; cvta.param.u64 %rd7, %rd6; mov.b32 %r1, 4096; mov.b32 %r2, 0;
    shl.b32 %r3, %r0, 2; setp.eq.b32 %p1, %r0, 0; shr.u32 %r5, %r0, 5; shl.b32 %r6, %r5, 5;
    shl.b32 %r7, %r5, 11; {MADE} @%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r1], 4096;
    {who} @%p4 {TILE} [%r7], [%rd7, {{%r2, %r6}}], [%r1]; {ARRIVED}
    mad.lo.s32 %r3, %r5, 1920, %r3; ld.shared.b32 %r4, [%r3];
    mul.wide.u32 %rd8, %r0, 4; add.s64 %rd8, %rd8, %rd0; st.global.b32 [%rd8], %r4;
    """
    source = torch.arange(64, dtype=torch.float16)[:, None].expand(64, 32).contiguous()
    text = module(body, 1, 64, ", .param .align 64 .b8 k_param_1[128]")
    out = torch.zeros(64, dtype=torch.int32)
    execute(text, (1,), (out, TensorMap(source, (64, 32), (32, 1), (32, 32), 2)), shared_bytes=8192)
    found = out.view(torch.float16).view(2, 2, 32)
    # A lane's word is of the first two rows of its warp's half.
    assert torch.equal(found[:, :, 0], torch.tensor([[0, 1], [32, 33]], dtype=torch.float16))


def test_a_wide_tile_is_copied_by_a_lane_of_each_warp() -> None:
    halves("elect.sync %r8|%p4, 0xffffffff;")
    halves("and.b32 %r8, %r0, 31; setp.eq.b32 %p4, %r8, 0;")
    with pytest.raises(Fault, match=r"convergence: .* by 4 lanes; one a warp is meant"):
        halves("and.b32 %r8, %r0, 31; setp.lt.u32 %p4, %r8, 2;")


def test_who_asks_once_and_goes_on_has_not_waited() -> None:
    second = f"""mov.b32 %r5, 2056; mov.b32 %r6, 4096; @%p1 mbarrier.init.shared::cta.b64 [%r5], 1; {FENCE}
    bar.sync 0; @%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r5], 2048;
    @%p1 {TILE} [%r6], [%rd7, {{%r2, %r2}}], [%r5];"""
    waits = ARRIVED + ARRIVED.replace("$w", "$v").replace("%r1", "%r5")
    tile(second + waits)
    once = waits.replace("$w:", "").replace("@!%p2 bra $w;", "")
    for seed in range(4):
        with pytest.raises(Fault, match="pending: lane 0 reads what an asynchronous copy still writes"):
            tile(second + once, seed=seed)


def test_the_copy_engine_knows_of_a_barrier_by_a_fence_alone() -> None:
    made = "the copy engine arrives at a barrier that a lane made"
    init, sync = "@%p1 mbarrier.init.shared::cta.b64 [%r1], 1;", "bar.sync 0;"
    for right in (
        f"{init} {FENCE} {sync}",
        f"{init} @%p1 fence.mbarrier_init.release.cluster; {sync}",
        f"{init} {sync} @%p1 {FENCE}",
        f"{init} {sync} @%p3 {FENCE} {sync}",
    ):
        tile(ARRIVED, made=right)
    for wrong in (
        f"{init} {sync}",
        f"{FENCE} {init} {sync}",
        f"@%p1 fence.mbarrier_init.release.cluster; {init} {sync}",
        f"{init} {sync} fence.acq_rel.cta;",
        # The second warp's fence: before it knows of the barrier; with no order to the first warp after it.
        f"{init} @%p3 {FENCE} {sync}",
        f"{init} {sync} @%p3 {FENCE}",
    ):
        with pytest.raises(Fault, match=f"proxy: {made}"):
            tile(ARRIVED, made=wrong)
        tile(ARRIVED, made=wrong, fenced_barriers=False)


@pytest.mark.parametrize("use", ["st.shared.b32 [%r3], %r4;", "", "@%p3 st.shared.b32 [%r3], %r4;"])
def test_the_copy_engine_writes_where_lanes_have_been_after_a_fence_alone(use: str) -> None:
    """What lanes loaded, or stored themselves, is written over by the next tile."""
    tile(ARRIVED, after=f"{use} {FENCE} bar.sync 0; AGAIN {ARRIVED.replace('0;', '1;').replace('$w', '$v')}")
    for wrong in (
        f"{use} bar.sync 0; AGAIN",
        f"{FENCE} {use or 'ld.shared.b32 %r5, [%r3];'} bar.sync 0; AGAIN",
    ):
        with pytest.raises(Fault, match=r"proxy: the copy engine writes where lanes (wrote|read)"):
            tile(ARRIVED, after=wrong)
