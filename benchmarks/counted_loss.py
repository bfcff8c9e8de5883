"""Counts of the loss's kernels before and after they have kernels of their own for Hopper, without a GPU.

    python benchmarks/counted_loss.py > benchmarks/counted_loss.md

Read in the machine code of the first chunk of 65,536 tokens x 768, GPT-2's vocabulary, in bfloat16. Run it
without TRITON_INTERPRET.
"""

from __future__ import annotations

import sys
from typing import Any
from unittest import mock

import counted
import torch

from gptkern.ops import _aot, _cases, _launch
from gptkern.ops.linear_cross_entropy import hopper

KERNELS = ("logits", "dhidden", "dweight")
# Multiply-adds of half precision a cycle on a multiprocessor, and its schedulers.
TENSOR, SCHEDULERS = 2048, 4
_HEAD = """# The loss, counted, not timed

Nothing here was measured on a GPU. Each line is a kernel of a chunk of 8,192 tokens, 768 wide, GPT-2's
vocabulary, in bfloat16 for sm_90; made by `python benchmarks/counted_loss.py` of its machine code by Triton
{triton}.

"Instructions" are those of one warp in one turn of its loop of products; "slots" are the share of the
schedulers' slots that they take in the time in which the tensor core multiplies that turn: beyond 100% it
waits for instructions. "Waves" are the tiles over the multiprocessors of an H100, {multiprocessors}, and the
share of the last one that is full.

| kernel | | tile | registers | shared | tiles | waves | instructions | slots |
|---|---|---|---|---|---|---|---|---|
"""


def products_loop(launch: _launch.Launch) -> list[str]:
    """The instructions of the shortest loop that multiplies matrices."""
    code = counted.machine_code(_aot.compile_launch(launch, counted.ARCH).asm["cubin"])
    bodies = [[name for _, _, name in code[first : last + 1]] for first, last in counted.loops(code)]
    return min((body for body in bodies if any(n.startswith("HGMMA") for n in body)), key=len)


def line(launch: _launch.Launch, what: str) -> str:
    arguments, compiled = launch.arguments, _aot.compile_launch(launch, counted.ARCH)
    on_hopper = launch.name.endswith("hopper")
    block = (128, 256) if on_hopper else (arguments["BLOCK_M"], arguments["BLOCK_N"])
    tokens, vocab, width = (arguments[name] for name in ("tokens", "vocab", "width"))
    extents = {"logits": (tokens, vocab), "dhidden": (tokens, width), "dweight": (vocab, width)}
    kernel = launch.name.partition("_")[0]
    tiles = -(-extents[kernel][0] // block[0]) * -(-extents[kernel][1] // block[1])
    body = products_loop(launch)
    # Two warpgroups of four warps each: two warps of a scheduler.
    cycles = block[0] * block[1] * arguments["BLOCK_K"] / TENSOR
    slots = len(body) * 8 / SCHEDULERS / cycles
    registers: Any = _aot._resources(compiled.asm["cubin"])[0]
    waves = tiles / _launch.multiprocessors(torch.device("cpu"))
    if on_hopper:
        registers = f"{arguments['CONSUMER_REGISTERS']} and {arguments['PRODUCER_REGISTERS']}"
    cells = [
        f"`{launch.name}`", what, f"{block[0]} x {block[1]}", registers,
        compiled.metadata.shared, tiles, f"{waves:.2f}", len(body), f"{slots:.0%}",
    ]  # fmt: skip
    return f"| {' | '.join(map(str, cells))} |\n"


def chunk(served: bool) -> dict[str, _launch.Launch]:
    """The first chunk's launches by kernel."""
    case = _cases.cases("linear_cross_entropy")[0]
    with mock.patch.object(hopper, "serves", hopper.serves if served else lambda *_: False):
        launches: list[Any] = _cases.record_case(case, torch.bfloat16, counted.ARCH)
    return {item.name.partition("_")[0]: item for item in reversed(launches)}


def main() -> None:
    """Print the page."""
    import triton

    text = _HEAD.format(
        triton=triton.__version__, multiprocessors=_launch.multiprocessors(torch.device("cpu"))
    )
    before, after = chunk(False), chunk(True)
    for kernel in KERNELS:
        text += line(before[kernel], "before") + line(after[kernel], "after")
    sys.stdout.write(text + _END)


_END = """
A logit is multiplied out once, as before: to compute it again for the gradients, so that no exponential is
stored, would be a fourth product beside three. A chunk's exponentials take 100 KB a token, written once and
read once by each gradient; a product of 768 inputs takes the tensor core longer than these bytes take memory.

## What would show that this is wrong

- A profile on an H100 in which `dhidden_hopper` or `dweight_hopper` keeps the tensor core busy for less than
  two thirds of its time while multiprocessors have tiles: then loads of factors, or the fence of each step,
  are on the critical path, not the issue of instructions.
- `dhidden_hopper` no faster than before at 8,192 tokens a chunk: then its last wave, which is not half full,
  costs more than the instructions that it saves, and chunks should be chosen by waves.
- `logits_hopper` with gradients more than a fifth slower than without: then the stores of exponentials are
  not hidden behind the other warpgroup's products.
- More bytes from memory than exponentials once a product, weights four times and hidden states once: then
  `GROUP_M` of the launch rows is wrong.
"""

if __name__ == "__main__":
    main()
