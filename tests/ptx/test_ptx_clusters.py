"""Clusters, distributed shared memory and barriers among warps: right kernels pass, broken ones are named."""

from __future__ import annotations

import re

import pytest
import torch
from ptx_support import module

from gptkern.testing.ptx import Fault, execute

UNORDERED = re.compile("^(race|uninitialised|pending)")
SYNC = "barrier.cluster.arrive; barrier.cluster.wait;"


def ints(count: int) -> torch.Tensor:
    return torch.zeros(count, dtype=torch.int32)


def run(
    body: str, out: torch.Tensor, blocks: int = 2, cluster: int = 2, threads: int = 32, seed: int = 0
) -> None:
    """A body with ``%r10`` the block's number and ``%rd5`` the place of its thread in the output."""
    place = f"""mov.u32 %r10, %ctaid.x; mad.lo.u32 %r11, %r10, {threads}, %r0;
    mul.wide.u32 %rd5, %r11, 4; add.s64 %rd5, %rd5, %rd0;"""
    text = module(f"{place} {body}", 1, threads)
    execute(text, (blocks,), (out,), cluster=(cluster, 1, 1), shared_bytes=4096, seed=seed)


def refused(check: str, body: str, **options: int) -> str:
    with pytest.raises(Fault) as caught:
        run(body, ints(512), **options)
    assert caught.value.check == check, str(caught.value)
    return str(caught.value)


# Each thread stores its number and block to its block's shared memory, and reads the next block's.
STORE = "shl.b32 %r1, %r0, 2; mad.lo.u32 %r2, %r10, 100, %r0; st.shared.b32 [%r1], %r2;"
NEXT = """mov.u32 %r3, %cluster_ctarank; add.u32 %r3, %r3, 1; mov.u32 %r4, %cluster_nctarank;
rem.u32 %r3, %r3, %r4; mapa.shared::cluster.u32 %r5, %r1, %r3;"""
READ = f"{NEXT} ld.shared::cluster.b32 %r6, [%r5]; st.global.b32 [%rd5], %r6;"


@pytest.mark.parametrize("seed", range(6))
def test_a_block_reads_its_neighbours_shared_memory(seed: int) -> None:
    out = ints(4 * 32)
    run(f"{STORE} {SYNC} {READ} {SYNC}", out, blocks=4, cluster=2, seed=seed)
    assert out.view(4, 32).tolist() == [[100 * (b ^ 1) + t for t in range(32)] for b in range(4)]


def test_generic_addresses_reach_shared_memory() -> None:
    out = ints(4 * 32)
    generic = """cvt.u64.u32 %rd7, %r1; cvta.shared.u64 %rd8, %rd7; mov.u32 %r3, %cluster_ctarank;
    xor.b32 %r3, %r3, 1; mapa.u64 %rd9, %rd8, %r3; ld.b32 %r6, [%rd9]; ld.b32 %r7, [%rd8];
    getctarank.u64 %r8, %rd9; mad.lo.u32 %r6, %r7, 1000, %r6; mad.lo.u32 %r6, %r8, 1000000, %r6;
    st.b32 [%rd5], %r6;"""
    run(f"{STORE} {SYNC} {generic} {SYNC}", out, blocks=4)
    expected = [
        [1000 * (100 * b + t) + 100 * (b ^ 1) + t + 1000000 * (b % 2 ^ 1) for t in range(32)]
        for b in range(4)
    ]
    assert out.view(4, 32).tolist() == expected


def test_a_cluster_has_its_numbers() -> None:
    names = ("%cluster_ctarank", "%cluster_nctarank", "%cluster_ctaid.x", "%clusterid.x", "%nclusterid.x")
    for name, expected in zip(
        names, ([0, 1, 2, 0, 1, 2], [3] * 6, [0, 1, 2] * 2, [0] * 3 + [1] * 3, [2] * 6), strict=True
    ):
        out = ints(6 * 32)
        run(f"mov.u32 %r1, {name}; st.global.b32 [%rd5], %r1;", out, blocks=6, cluster=3)
        assert out.view(6, 32)[:, 0].tolist() == expected, name


def test_shared_memory_of_another_block_needs_the_barrier() -> None:
    begun = "of which nothing says that it has begun"
    assert begun in refused("race", f"{STORE} {READ} {SYNC}")
    relaxed = SYNC.replace("arrive", "arrive.relaxed")
    assert begun in refused("race", f"{STORE} {relaxed} {READ} {SYNC}")
    # Begun it has, but what it stores after its arrival is not ordered.
    early = "barrier.cluster.arrive; STORE barrier.cluster.wait;".replace("STORE", STORE)
    assert "another warp writes" in refused("race", f"{early} {READ} {SYNC}")
    assert "uninitialised" in refused(
        "uninitialised", f"{NEXT.replace('%r1,', '%r0,')} {SYNC} shl.b32 %r1, %r0, 2; {READ} {SYNC}"
    )


def test_a_block_does_not_end_while_another_reads_it() -> None:
    for seed in range(4):
        refused("ended", f"{STORE} {SYNC} {READ}", seed=seed)
    arrival = "barrier.cluster.arrive.relaxed; barrier.cluster.wait;"
    refused("ended", f"{STORE} {SYNC} {READ} {arrival}")


def test_one_place_for_results_is_written_again_too_early() -> None:
    """Two rounds of a sum over the cluster: the second needs another place, or a barrier more."""
    share = "setp.eq.b32 %p1, %r0, 0; mov.b32 %r1, PLACE; @%p1 st.shared.b32 [%r1], %r10;"
    first = f"{share.replace('PLACE', '0')} {SYNC} {READ}"
    run(f"{first} {share.replace('PLACE', '4')} {SYNC} {READ} {SYNC}", ints(64))
    refused("race", f"{first} {share.replace('PLACE', '0')} {SYNC} {READ} {SYNC}")
    run(f"{first} {SYNC} {share.replace('PLACE', '0')} {SYNC} {READ} {SYNC}", ints(64))


def test_blocks_add_to_the_first_blocks_counter() -> None:
    clear = "mov.b32 %r1, 0; setp.eq.b32 %p1, %r0, 0; @%p1 st.shared.b32 [%r1], %r1;"
    add = (
        "mov.b32 %r3, 0; mapa.shared::cluster.u32 %r5, %r1, %r3; atom.shared::cluster.add.u32 %r6, [%r5], 1;"
    )
    read = "ld.shared::cluster.b32 %r6, [%r5]; st.global.b32 [%rd5], %r6;"
    out = ints(4 * 32)
    run(f"{clear} {SYNC} {add} {SYNC} {read} {SYNC}", out, blocks=4, cluster=4)
    assert out.tolist() == [128] * 128
    refused("race", f"{clear} {SYNC} {add} {read} {SYNC}")


def test_the_cluster_barrier_orders_global_memory() -> None:
    neighbour = "xor.b32 %r11, %r11, 32; mul.wide.u32 %rd6, %r11, 4; add.s64 %rd6, %rd6, %rd0;"
    body = f"st.global.b32 [%rd5], %r10; SYNC {neighbour} ld.global.b32 %r6, [%rd6];"
    run(body.replace("SYNC", SYNC), ints(64))
    refused("race", body.replace("SYNC", SYNC.replace("arrive", "arrive.relaxed")))


def test_the_barrier_of_a_cluster_is_used_in_turn() -> None:
    refused("barrier", "barrier.cluster.arrive; barrier.cluster.arrive;")
    refused("barrier", "barrier.cluster.wait;")


def test_clusters_divide_the_grid() -> None:
    with pytest.raises(ValueError, match="do not divide"):
        run("", ints(96), blocks=3, cluster=2)
    with pytest.raises(ValueError, match="more blocks than the 1"):
        execute(module("", 1), (2,), (ints(1),), cluster=(2, 1, 1), resident=1)
    refused("bounds", "mov.b32 %r1, 0; mov.b32 %r3, 2; mapa.shared::cluster.u32 %r5, %r1, %r3;")


# --- stores and arrivals at another block's mbarrier

MADE = """mov.b32 %r20, 2048; setp.eq.b32 %p1, %r0, 0; mov.u32 %r3, %cluster_ctarank; xor.b32 %r3, %r3, 1;
shl.b32 %r1, %r0, 2; mapa.shared::cluster.u32 %r5, %r1, %r3; mapa.shared::cluster.u32 %r21, %r20, %r3;"""
WAIT = "$w: mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r20], 0; @!%p2 bra $w;"
LOAD = "ld.shared.b32 %r6, [%r1]; st.global.b32 [%rd5], %r6;"


def exchange(wait: str, amount: int = 128) -> str:
    return f"""{MADE} @%p1 mbarrier.init.shared::cta.b64 [%r20], 1;
    @%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r20], {amount}; {SYNC}
    st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.b32 [%r5], %r11, [%r21];
    {wait} {LOAD} {SYNC}"""


def test_a_store_to_another_block_arrives_at_its_mbarrier() -> None:
    out = ints(64)
    run(exchange(WAIT), out)
    assert out.tolist() == [*range(32, 64), *range(32)]
    with pytest.raises(Fault, match=UNORDERED):  # by the order of the blocks
        run(exchange(""), out)
    refused("deadlock", exchange(WAIT, amount=132))
    elsewhere = exchange(WAIT).replace("[%r21];", "[%r20];")
    assert "another block than its mbarrier's" in refused("barrier", elsewhere)


def handover(store: str) -> str:
    """Lane 0 of each block arrives at the other's mbarrier when its warp has stored there."""
    arrive = "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%r21];"
    return f"""{MADE} @%p1 mbarrier.init.shared::cta.b64 [%r20], 1; {SYNC}
    {store.replace("ARRIVE", f"@%p1 {arrive}")} {WAIT} {LOAD} {SYNC}"""


def test_an_arrival_at_another_blocks_mbarrier_orders() -> None:
    store = "st.shared::cluster.b32 [%r5], %r11;"
    for seed in range(6):
        out = ints(64)
        run(handover(f"{store} ARRIVE"), out, seed=seed)
        assert out.tolist() == [*range(32, 64), *range(32)]
    with pytest.raises(Fault, match=UNORDERED):
        run(handover(f"ARRIVE {store}"), ints(64))
    # An arrival at one's own is none at the other's, who waits for ever.
    with pytest.raises(Fault, match=UNORDERED):
        run(handover(f"{store} ARRIVE").replace("[%r21];", "[%r20];"), ints(64))


# --- warps of one block

STAGE = "shl.b32 %r1, %r0, 2; and.b32 %r1, %r1, 127; setp.lt.u32 %p3, %r0, 32; mov.b32 %r20, 2048;"


def handed_on(produce: str, consume: str) -> str:
    """The first warp stores, the second reads."""
    return f"""{STAGE} setp.eq.b32 %p1, %r0, 0; @%p1 mbarrier.init.shared::cta.b64 [%r20], 32; bar.sync 0;
    @!%p3 bra $consumer; st.shared.b32 [%r1], %r0; {produce} bra $done;
    $consumer: {consume} ld.shared.b32 %r6, [%r1]; st.global.b32 [%rd5], %r6; $done: mov.b32 %r9, 0;"""


@pytest.mark.parametrize(
    ("produce", "consume"),
    [
        ("bar.sync 1, 64;", "bar.sync 1, 64;"),
        ("bar.arrive 1, 64;", "bar.sync 1, 64;"),
        ("mbarrier.arrive.shared::cta.b64 _, [%r20];", WAIT),
    ],
)
def test_a_warp_hands_on_to_another(produce: str, consume: str) -> None:
    out = ints(64)
    run(handed_on(produce, consume), out, blocks=1, cluster=1, threads=64)
    assert out.tolist()[32:] == list(range(32))
    with pytest.raises(Fault, match=UNORDERED):
        run(handed_on("", ""), ints(64), blocks=1, cluster=1, threads=64)
    # What is stored after the arrival is not handed on.
    late = handed_on(produce, consume).replace(
        f"st.shared.b32 [%r1], %r0; {produce}", f"{produce} st.shared.b32 [%r1], %r0;"
    )
    with pytest.raises(Fault, match=UNORDERED):
        run(late, ints(64), blocks=1, cluster=1, threads=64)


def test_a_barrier_of_some_warps_orders_no_others() -> None:
    """Two of four warps meet; the third reads what the first stored."""
    body = f"""{STAGE} setp.lt.u32 %p4, %r0, 64; @%p3 st.shared.b32 [%r1], %r0;
    @%p4 bar.sync 1, 64; @!%p4 ld.shared.b32 %r6, [%r1];"""
    with pytest.raises(Fault, match=UNORDERED):
        run(body, ints(128), blocks=1, cluster=1, threads=128)
    run(body.replace("@!%p4 ld", "bar.sync 0; @!%p4 ld"), ints(128), blocks=1, cluster=1, threads=128)


def test_atomics_of_warps_agree_and_plain_accesses_do_not() -> None:
    clear = "mov.b32 %r1, 0; setp.eq.b32 %p1, %r0, 0; @%p1 st.shared.b32 [%r1], %r1; bar.sync 0;"
    add, read = "atom.shared.add.u32 %r5, [%r1], 1;", "ld.shared.b32 %r6, [%r1]; st.global.b32 [%rd5], %r6;"
    out = ints(64)
    run(f"{clear} {add} bar.sync 0; {read}", out, blocks=1, cluster=1, threads=64)
    assert out.tolist() == [64] * 64
    refused("race", f"{clear} {add} {read}", blocks=1, cluster=1, threads=64)
    refused("race", f"{clear.replace('bar.sync 0;', '')} {add}", blocks=1, cluster=1, threads=64)
