"""Counts of attention's backward kernels, without a GPU, and the cycles that they need at least.

    python benchmarks/counted_attention.py > benchmarks/counted_attention.md

Reads the machine code of the loop over tiles that no mask cuts, for sm_90: the kernels that all calls had,
and those for Hopper. Run it without TRITON_INTERPRET.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import Any
from unittest import mock

import torch
from counted import ARCH, CLOCK, loops, machine_code

from gptkern.ops import _aot, _cases, _launch
from gptkern.ops.flash_attention import hopper

MULTIPROCESSORS = 132
# Of a multiprocessor, a cycle: operations of the tensor core, exponentials, bytes of L2 at 5.5 TB/s.
TENSOR, EXPONENTIALS, L2 = 4096, 16, 5500 / CLOCK / MULTIPROCESSORS
QUERIES, KEYS = 64, 128
CASES = {64: "not causal", 128: "head dim 128"}
COLUMNS = {
    "instructions": ("",), "products": ("HGMMA",), "exponentials": ("MUFU.EX2",),
    "barriers": ("BAR", "SYNCS"), "shared": ("LDS", "STS", "LDSM"),
    "memory": ("LDG", "STG", "LDGSTS", "REDG"), "reloads": ("LDL", "STL"),
}  # fmt: skip


def launches(head_dim: int) -> list[_launch.Launch]:
    """The kernels of backward, those that all calls had first."""
    case = next(case for case in _cases.cases("flash_attention") if case.name == CASES[head_dim])
    with mock.patch.object(hopper, "serves", return_value=False):
        before = _cases.record_case(case, torch.bfloat16, ARCH)
    wanted = ("flash_attention_dq", "flash_attention_dkdv", "flash_attention_backward_hopper")
    return [item for item in before + _cases.record_case(case, torch.bfloat16, ARCH) if item.name in wanted]


def tiles(launch: _launch.Launch) -> float:
    """Tiles of 64 queries and 128 keys that the warps of a scheduler take in one turn of the loop."""
    if launch.name.endswith("hopper"):  # the two warpgroups have 64 keys each
        return float(launch.kwargs["BLOCK_M"] / QUERIES)
    return float(launch.kwargs["BLOCK_M"] * launch.kwargs["BLOCK_N"] / (QUERIES * KEYS))


def shortest(code: list[tuple[int, str, str]], first: int, last: int) -> list[str]:
    """The instructions of the shortest way through a loop that stores nothing; none if it has no such way."""
    places = {at: place for place, (at, _, _) in enumerate(code)}
    lengths, following = {last: 1.0}, dict[int, int]()
    for place in range(last - 1, first - 1, -1):
        _, whole, name = code[place]
        ways = [place + 1]
        if name == "BRA":
            target = places[int(whole.split("0x")[-1], 16)]
            ways = [place + 1, target] if whole.startswith("@") else [target]
        following[place] = min(ways, key=lambda way: lengths.get(way, math.inf))
        lengths[place] = 1.0 + lengths.get(following[place], math.inf)
        if name.startswith("STG"):
            lengths[place] = math.inf
    way = [first] if lengths[first] < math.inf else []
    while way and way[-1] != last:
        way.append(following[way[-1]])
    return [code[place][2] for place in way]


def body(launch: _launch.Launch) -> list[str]:
    """The instructions of one warp in the shortest loop with all products of a turn.

    The loop of the kernel for Hopper has ways for queries that a mask cuts, and for the first and the last
    turn at a sum of dq, which are left out.
    """
    code = machine_code(_aot.compile_launch(launch, ARCH).asm["cubin"])
    if launch.name.endswith("hopper"):
        ways, least = [shortest(code, *ends) for ends in loops(code)], 12
    else:
        names = [name for _, _, name in code]
        ways, least = [names[first : last + 1] for first, last in loops(code)], 8
    return min((way for way in ways if sum("HGMMA" in name for name in way) >= least), key=len)


def counted(launch: _launch.Launch) -> dict[str, float]:
    """Counts of both warps that a scheduler has, for 64 queries and 128 keys."""
    names = Counter(body(launch))
    return {
        column: 2 * sum(count for name, count in names.items() if name.startswith(prefixes)) / tiles(launch)
        for column, prefixes in COLUMNS.items()
    }


def l2_bytes(name: str, head_dim: int) -> int:
    """Bytes that pass between a multiprocessor and L2 for 64 queries and 128 keys."""
    queries, keys = (2 * 2 * rows * head_dim for rows in (QUERIES, KEYS))
    if name == "flash_attention_dq":  # keys and values, of 128 queries
        return keys * QUERIES // 128
    if name == "flash_attention_dkdv":
        return queries
    return queries + 4 * QUERIES * head_dim  # sums that L2 adds to are written and not read


def cycles(found: dict[str, float], name: str, head_dim: int) -> dict[str, float]:
    """The cycles that each unit needs at least."""
    products = {"flash_attention_dq": 3, "flash_attention_dkdv": 4}.get(name, 5)
    return {
        "tensor core": products * 2 * QUERIES * KEYS * head_dim / TENSOR,
        "issue": found["instructions"],
        "exponentials": QUERIES * KEYS / EXPONENTIALS,
        "L2": l2_bytes(name, head_dim) / L2,
    }


HEAD = f"""# Attention backward, counted, not timed

Nothing here was measured on a GPU. Made by `python benchmarks/counted_attention.py` of machine code for
sm_90, in bfloat16. Counts are of 64 queries and 128 keys that no mask cuts, of the two warps that a
scheduler of a multiprocessor has: the first two kernels together are the third. Their loops hold the
branch for tiles that a mask cuts, too; of the third, whose loop has ways for these and for the first and the
last turn at a sum of dq, only the way of a turn between them is counted.

| head dim | kernel | {" | ".join(COLUMNS)} | registers | shared memory |
|---|---|{"---|" * len(COLUMNS)}---|---|
"""
CYCLES = f"""
The cycles that each unit needs for that at least, on an H100 at {CLOCK} GHz: {TENSOR} operations of the
tensor core and {EXPONENTIALS} exponentials a cycle, one instruction a scheduler, {L2:.0f} bytes of L2
(5.5 TB/s for {MULTIPROCESSORS} multiprocessors), read and written together. The units work side by
side, so that the largest is the bound of a kernel. Sums of dq are written and not read: L2 adds.

| head dim | kernel | tensor core | issue | exponentials | L2 |
|---|---|---|---|---|---|
"""
WRONG = """
By these bounds the kernel for Hopper needs about three quarters of the cycles of the two before together: it
has five products where they have seven. While each tile of keys loaded the sum of dq and stored it, L2 needed
2,070 and 4,141 cycles, more than the tensor core saved. Besides, the others wait for each tile's copies,
products and exponentials one after another, with one block a multiprocessor, and it has a producer, products
in flight during the exponentials, and two warpgroups that are not held together.

No warp has anything in local memory in bfloat16. Before, a thread had 32 to 104 bytes at a head dimension of
64 and 304 to 488 at 128, in part reloaded in the loops: no accumulators, but bounds of masks and turns,
places in rings, descriptors of operands. They are numbers in shared memory now, or are computed where used.

Tiles of 256 keys at a head dimension of 64 would halve L2's part once more, to 690 cycles; the tensor core
needs 1,280, so that the bound would fall from 1,380 by 7%. A warpgroup would hold dk and dv of 128 keys, in
128 registers a thread, 64 more for scores and gradients of half the keys, 32 for dq: as many as at a head
dimension of 128, at which keys and values pass through shared memory in each step and not in registers. Three
warpgroups of 64 keys have 160 registers a thread, which dk, dv, scores, gradients and dq fill by themselves.
Neither was built.

## What would show that this is wrong

- The kernel for Hopper slower than the two others together, at any length from 1,024 on: then programs
  wait for turns, and not for the tensor core. A profile shows it in the time that the warp with
  `ld.acquire` polls, and the consumers at the barrier `turn`.
- More bytes from memory than q, k, v, the output's gradient and its sums have, once each: then the sums
  of dq do not stay in L2 from one turn to the next, and `_SECTION_BYTES` is too large.
- A rate that follows L2 and not the tensor core at long sequences: then additions in L2 cost more than
  stores do, and tiles of 256 keys at a head dimension of 64 would halve them.
- The tensor core at rest while exponentials are computed, in a profile of issue slots: then the
  warpgroups do not drift apart, and they need turns as the forward has.
"""


def main() -> None:
    """Print the page."""
    rows, needed = "", ""
    for head_dim in CASES:
        for launch in launches(head_dim):
            found = counted(launch)
            compiled = _aot.compile_launch(launch, ARCH)
            registers: Any = launch.kwargs.get("CONSUMER_REGISTERS")
            registers = registers or _aot._resources(compiled.asm["cubin"])[0]
            cells = [f"{found[column]:.0f}" for column in COLUMNS]
            cells += [str(registers), f"{compiled.metadata.shared:,}"]
            rows += f"| {head_dim} | `{launch.name}` | {' | '.join(cells)} |\n"
            least = [f"{value:.0f}" for value in cycles(found, launch.name, head_dim).values()]
            needed += f"| {head_dim} | `{launch.name}` | {' | '.join(least)} |\n"
    print(HEAD + rows + CYCLES + needed + WRONG, end="")


if __name__ == "__main__":
    main()
