"""Counts of the CUDA sampler's kernels before and after a change of its sources, without a GPU.

    git archive COMMIT csrc | tar x -C FOLDER
    python benchmarks/counted_sampler.py FOLDER/csrc > benchmarks/counted_sampler.md

FOLDER has the sources before. Registers, sizes and loads are read in machine code; what a row takes is
counted where the compiler's text is executed (``gptkern.testing.ptx``), in the first block of a cluster. It
needs nvcc and takes some minutes.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from counted import BARRIER, CLOCK, LOAD

from gptkern.ops import SamplerState, SamplingParams, _aot
from gptkern.ops.sample import launch as sampler
from gptkern.testing.ptx import launch
from gptkern.testing.ptx.block import Block
from gptkern.testing.ptx.counters import Counters

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "ptx"))
import cuda_sampler

ARCHS = (80, 90, 100)
KERNELS = ("draw_kernel", "sample_kernel", "speculate_kernel", "top_k_kernel")
VOCAB, BLOCKS, SCHEDULERS = 50257, 8, 4
INSTRUCTION = 16  # bytes
EDITS: dict[str, Any] = {
    "repetition_penalty": 1.3,
    "presence_penalty": 0.5,
    "logit_bias": {3: 4.0, 60: 1.0},
    "banned": list(range(40)),
}
FEW = {"top_k": 50, "top_p": 0.9}
ROWS: dict[str, dict[str, Any]] = {
    "the most likely token": {"temperature": 0.0},
    "top-k 50, top-p 0.9": FEW,
    "the same, penalties, biases, bans": FEW | EDITS,
    "the same, 5 log-probabilities": FEW | {"n_logprobs": 5},
    "top-k 200, top-p 0.9": {"top_k": 200, "top_p": 0.9},
    "top-p 0.9": {"top_p": 0.9},
    "temperature alone": {},
}
_FUNCTION = re.compile(r"^\s*Function : (\S+)$", re.MULTILINE)
_LAST = re.compile(r"/\*([0-9a-f]{4,6})\*/\s+\S[^;\n]*;")
_USAGE = re.compile(r"Function (\S+?):\n\s*REG:(\d+) STACK:(\d+).*?LOCAL:(\d+)")
_REGISTERS = re.compile(r"%\w+")
_HEAD = """# The sampler, counted, not timed

Nothing here was measured on a GPU. "Before" is the sampler in which all blocks of a row went every way
together; made by `python benchmarks/counted_sampler.py` of what nvcc {nvcc} makes of both.

## Machine code

KB (1,024 bytes), and registers of a thread, on sm_80, sm_90 and sm_100; nothing spills. A block has 512
threads. Loads of 16 bytes are those of global memory on sm_90, beside all others there.

| kernel | | KB | registers | loads of 16 bytes | other loads |
|---|---|---|---|---|---|
"""
_PATHS = f"""
## What one row takes

A row of bf16 logits over {VOCAB:,} tokens, which {BLOCKS} blocks share on sm_90: what its first block
executes of the compiler's text. "Meetings" are barriers of the cluster, "barriers" those of the block.
"Memory" and "others" are the chain of loads, each of which waits for the one before, or for a branch or a
barrier behind it: of global memory, and of the shared memory of the cluster's other blocks. "Instructions"
are those that one of its {SCHEDULERS} schedulers issues, moves between registers left out; "text" is how much
of the code is executed at all, in KB, at {INSTRUCTION} bytes an instruction. The estimate adds up {LOAD}
cycles a load of the chain, as if none were answered nearer than by the L2 cache, {BARRIER} a barrier and one
an instruction at {CLOCK} GHz. It leaves out the fetching of text, and meetings: a fence in memory and a
barrier of eight blocks, whose cost nobody has measured here.

| row | | meetings | barriers | memory | others | instructions | text | estimate, µs |
|---|---|---|---|---|---|---|---|---|
"""
_WRONG = """
## What would show that this is wrong

- A profile on an H100 in which a row of top-k 50 and top-p 0.9 takes more than its estimate and 2 µs for each
  meeting: then something is on its way that is not in these tables, such as machine code that comes from
  memory for the first time.
- The same row no faster than before by half: then neither meetings nor instructions were what it waited for.
- A row of top-p alone, or of temperature alone, slower than before: then instructions weigh more than
  meetings, and loops that stand once in the machine code should be written out again.
- More than the logits' bytes from memory, read once, for a row that is not edited: then parts of a row do not
  stay in the caches between the first look at them and the second.
"""


def machine_code(source: Path, arch: int, folder: Path) -> dict[str, dict[str, int]]:
    """Each kernel's bytes, registers, spilled bytes and loads."""
    cubin = folder / f"sampler_{arch}.cubin"
    command = [*cuda_sampler.command(arch, source), "-cubin", f"-arch=sm_{arch}", "-o", str(cubin)]
    subprocess.run(command, check=True, capture_output=True)

    def dumped(option: str) -> str:
        done = subprocess.run([_aot._cuobjdump(), option, cubin], capture_output=True, text=True, check=True)
        return done.stdout

    usage = {name: numbers for name, *numbers in _USAGE.findall(dumped("--dump-resource-usage"))}
    _, *parts = _FUNCTION.split(dumped("-sass"))
    found = {}
    for function, text in zip(parts[::2], parts[1::2], strict=True):
        registers, stack, local = map(int, usage[function])
        loads = re.findall(r"\bLDG\.[\w.]+", text)
        wide = sum(".128" in load for load in loads)
        kernel = next((name for name in KERNELS if name in function), "commit_kernel")
        size = int(_LAST.findall(text)[-1], 16) + 16
        found[kernel] = {
            "bytes": size, "registers": registers, "spilled": stack + local, "wide": wide,
            "narrow": len(loads) - wide,
        }  # fmt: skip
    return found


# Loads, each of which waits for the one before: of global memory, and of the shared memory of other blocks.
Chain = tuple[int, int]


def longer(one: Chain, other: Chain) -> Chain:
    return max(one, other, key=sum)


@dataclass
class Way(Counters):
    """The way of a row through one block.

    Loads are not moved across branches and barriers; between these, all begin that can, and whoever uses one
    waits.

    Attributes:
        issued: Instructions of warps, without moves between registers.
        text: Those instructions that are executed at all.
        ready: By register, the chain of loads until it has its value.
        used: The chain of the latest value that anybody has used; ``begun``: that before the last branch.
    """

    meetings: int = 0
    barriers: int = 0
    issued: int = 0
    text: set[int] = field(default_factory=set)
    ready: dict[str, Chain] = field(default_factory=dict)
    used: Chain = (0, 0)
    begun: Chain = (0, 0)

    def executed(self, instruction: Any, warps: int) -> None:
        super().executed(instruction, warps)
        opcode, operands = instruction.opcode, instruction.operands
        self.issued += warps * (not opcode.startswith("mov."))
        self.text.add(id(instruction))
        self.meetings += warps * opcode.startswith("barrier.cluster.arrive")
        self.barriers += warps * opcode.startswith(("bar.sync", "barrier.sync"))
        writes = not opcode.startswith(("st", "red", "bar", "fence", "membar")) and len(operands) > 1
        known = self._of(instruction, operands[writes:])
        self.used = longer(self.used, known)
        if opcode.startswith(("bar", "ret", "exit")) or (opcode.startswith("br") and instruction.predicate):
            self.begun = longer(self.begun, self.used)
        elif writes:
            self._set(operands[0], known)

    def touched(self, instruction: Any, space: str, addresses: Any, size: int, lanes: Any) -> None:
        super().touched(instruction, space, addresses, size, lanes)
        opcode = instruction.opcode
        if not opcode.startswith("ld") or (space == "shared" and ".shared." in opcode):
            return
        memory, others = longer(self.begun, self._of(instruction, instruction.operands[1:]))
        self._set(instruction.operands[0], (memory + (space == "global"), others + (space != "global")))

    def _of(self, instruction: Any, operands: tuple[str, ...]) -> Chain:
        names = [*_REGISTERS.findall(" ".join(operands)), instruction.predicate]
        return max((self.ready.get(name, (0, 0)) for name in names), key=sum)

    def _set(self, registers: str, chain: Chain) -> None:
        self.ready |= dict.fromkeys(_REGISTERS.findall(registers), chain)


def first_block(number: int, *arguments: Any) -> Block:
    """A block that is counted if it is the launch's first."""
    block = Block(number, *arguments)
    block.counters = block.counters if number == 0 else None
    return block


def path(ptx: str, options: dict[str, Any]) -> Way:
    """What a row takes. Sources before have one kernel for all draws."""
    torch.manual_seed(0)
    logits = (torch.randn(1, VOCAB) * 3).bfloat16()
    params = SamplingParams.make(1, VOCAB, **options)
    state = SamplerState.make(1, VOCAB, seed=1, history="repetition_penalty" in options)
    outputs, found = sampler.sample_outputs(logits, params.max_logprobs), Way()
    kernel = cuda_sampler._kernel if "draw_kernel" in ptx else lambda arguments: "sample_kernel"
    with mock.patch.object(launch, "Block", first_block), mock.patch.object(cuda_sampler, "_kernel", kernel):
        cuda_sampler.sample(ptx, logits, params, state, outputs, blocks=BLOCKS, counters=found)
    assert int(outputs.status[0]) == 0
    return found


def cells(found: Way) -> list[Any]:
    warps = cuda_sampler.THREADS // 32
    meetings, barriers = found.meetings // warps, found.barriers // warps
    issued = found.issued // SCHEDULERS
    cycles = LOAD * sum(found.used) + BARRIER * barriers + issued
    text = f"{len(found.text) * INSTRUCTION / 1024:.0f}"
    return [
        meetings, barriers, *found.used, f"{issued:,}", text, f"{cycles / CLOCK / 1000:.1f}"
    ]  # fmt: skip


def line(*values: Any) -> str:
    return f"| {' | '.join(map(str, values))} |\n"


def page(before: Path) -> str:
    """The file."""
    version = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    text = _HEAD.format(nvcc=re.search(r"release ([\d.]+)", version)[1])  # type: ignore[index]
    sources = {"before": before, "after": cuda_sampler.CSRC}
    with tempfile.TemporaryDirectory() as name:
        code = {
            label: [machine_code(source, arch, Path(name)) for arch in ARCHS]
            for label, source in sources.items()
        }
        ptx = {label: cuda_sampler.compiled(90, Path(name), source) for label, source in sources.items()}
    for kernel in KERNELS:
        for label, archs in code.items():
            if kernel not in archs[0]:
                continue
            those = [found[kernel] for found in archs]
            assert not any(found["spilled"] for found in those), (label, kernel)
            sizes = ", ".join(f"{found['bytes'] / 1024:.0f}" for found in those)
            registers = ", ".join(str(found["registers"]) for found in those)
            text += line(f"`{kernel}`", label, sizes, registers, those[1]["wide"], those[1]["narrow"])
    text += _PATHS
    for row, options in ROWS.items():
        for label in sources:
            text += line(row, label, *cells(path(ptx[label], options)))
    return text + _WRONG


if __name__ == "__main__":
    sys.stdout.write(page(Path(sys.argv[1])))
