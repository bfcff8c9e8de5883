"""Counts of the kernels of a decode pass and of norms, without a GPU, and the times that follow from them.

    python benchmarks/counted.py count > FILE              # the kernels of this tree, for sm_90
    python benchmarks/counted.py table BEFORE AFTER > benchmarks/counted.md
    python benchmarks/counted.py products                  # the part on Hopper's backward products alone

Registers, barriers, matrix products and rounds of loads are read from machine code; sectors come from the
executor (``gptkern.testing.ptx``), on a few tiles of the same layer. Run it without TRITON_INTERPRET.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from gptkern.ops import _aot, _cases, _launch
from gptkern.ops.decode_linear import decode_linear
from gptkern.ops.layer_norm import layer_norm
from gptkern.ops.linear import hopper
from gptkern.testing.ptx.counters import Counters
from gptkern.testing.ptx.kernels import executed

ARCH = 90
# (op, case, kernel)
KERNELS = [
    *(
        ("decode_linear", f"124M {name}", "decode_linear_kernel")
        for name in ("qkv", "out", "fc", "proj", "head")
    ),
    *(
        ("layer_norm", "layer_norm 16384 x 768", f"norm_{name}_kernel")
        for name in ("forward", "backward", "weight_grad")
    ),
]
# An H100's clock in GHz, and cycles: a load that the L2 cache has, a meeting of a block, one matrix product
# that waits for another, an exchange between lanes, a meeting in memory (fence, atomic, reload).
CLOCK = 1.755
LOAD, BARRIER, PRODUCT, EXCHANGE, RENDEZVOUS = 280, 28, 33, 25, 3200
_LINE = re.compile(r"^\s+/\*(\w{4,5})\*/\s+((?:@!?U?P\w+ )?([A-Z][\w.]+)[^;]*);", re.MULTILINE)
_REGISTER = re.compile(r"\bR(\d+)\b")
_WIDTHS = {"128": 4, "64": 2}


def machine_code(cubin: bytes) -> list[tuple[int, str, str]]:
    """(address, instruction, its name) of each line."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [_aot._cuobjdump(), "-sass", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return [(int(at, 16), whole, name) for at, whole, name in _LINE.findall(text)]


def loops(code: list[tuple[int, str, str]]) -> list[tuple[int, int]]:
    """(first, last) positions of loops: from the target of each branch backwards to the branch."""
    places = {at: place for place, (at, _, _) in enumerate(code)}
    found = []
    for place, (at, whole, name) in enumerate(code):
        target = re.search(r"0x([0-9a-f]+)\s*$", whole)
        if name == "BRA" and target and int(target.group(1), 16) < at:
            found.append((places[int(target.group(1), 16)], place))
    return found


def rounds(code: list[tuple[int, str, str]]) -> int:
    """Times that a warp waits for loads into registers: loads without a wait between them are one round."""
    pending: set[int] = set()
    count = 0
    for _, whole, name in code:
        registers = [int(number) for number in _REGISTER.findall(whole)]
        if name.startswith(("LDG.", "ATOMG")) and registers:
            wide = next((n for width, n in _WIDTHS.items() if f".{width}" in name), 1)
            if pending.intersection(registers[1:]):
                count, pending = count + 1, set()
            pending.update(range(registers[0], registers[0] + wide))
        elif pending.intersection(registers):
            count, pending = count + 1, set()
    return count


def chain(code: list[tuple[int, str, str]]) -> int:
    """The longest chain of matrix products, each of which adds to the one before."""
    depth: dict[str, int] = {}
    grouped = 0
    for _, whole, name in code:
        if name.startswith("HGMMA"):
            grouped += 1
        elif name.startswith("HMMA"):
            registers = _REGISTER.findall(whole)
            depth[registers[0]] = depth.get(registers[-1], 0) + 1
    return max([grouped, *depth.values()])


def turns(body: list[tuple[int, str, str]], options: dict[str, Any]) -> int:
    """How often a loop is passed in one program, 0 for one that only fetches into L2."""
    names = [name for _, _, name in body]
    if any(name.startswith(("HMMA", "HGMMA")) for name in names):
        return int(-(-options["K"] // options["SPLIT_K"] // options["BLOCK_K"]))
    if any(name.startswith("SHFL") for name in names) and "K" in options:
        return int(-(-options["K"] // options["BLOCK_S"]))
    return 1 if any(name.startswith("LDG.") for name in names) else 0


def counted(launch: _launch.Launch) -> dict[str, Any]:
    """The counts of one kernel: of a program, and of norms' loops of one turn."""
    compiled = _aot.compile_launch(launch, ARCH)
    registers, local = _aot._resources(compiled.asm["cubin"])
    code = machine_code(compiled.asm["cubin"])
    inside = [
        (code[first : last + 1], turns(code[first : last + 1], launch.kwargs)) for first, last in loops(code)
    ]
    inside = [(body, often) for body, often in inside if len(body) > 2]

    def total(*prefixes: str) -> int:
        def number(lines: list[tuple[int, str, str]]) -> int:
            return sum(name.startswith(prefixes) for _, _, name in lines)

        return number(code) + sum((often - 1) * number(body) for body, often in inside if often)

    warps = compiled.metadata.num_warps
    blocks = _aot.blocks_per_sm(ARCH, 32 * warps, registers, compiled.metadata.shared)
    products = chain(code) + sum((often - 1) * chain(body) for body, often in inside if often)
    copies = [body for body, _ in inside if any(name.startswith("LDGSTS") for _, _, name in body)]
    return {
        "grid": list(launch.grid),
        "warps": warps,
        "registers": registers,
        "local": local,
        "shared": compiled.metadata.shared,
        "blocks": blocks,
        "rounds": rounds(code) + sum((often - 1) * rounds(body) for body, often in inside if often > 1),
        "copied": bool(copies) or total("LDGSTS") > 0,
        "barriers": total("BAR"),
        "products": products,
        "exchanges": total("SHFL"),
        "rendezvous": total("ATOMG") > 0,
    }


def sectors() -> dict[str, list[int]]:
    """(sectors, the fewest) of each kernel in small calls: 64 outputs of 768 columns, 33 rows of 768."""
    found: dict[str, Counters] = {}

    def value(*shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=torch.bfloat16)

    with executed(ARCH, counters=found), torch.no_grad():
        decode_linear(value(1, 768), value(64, 768), value(64), norm=(value(768), value(768), 1e-5))
    x, weight, bias = (tensor.requires_grad_() for tensor in (value(33, 768), value(768), value(768)))
    with executed(ARCH, counters=found):
        layer_norm(x, weight, bias).sum().backward()
    return {name: list(counters.total("global")[1:]) for name, counters in found.items()}


def microseconds(found: dict[str, Any]) -> float:
    """From the wait for the kernel before to the last store, by the chain of what one program waits for."""
    cycles: float = LOAD * (found["rounds"] + found["copied"]) + BARRIER * found["barriers"]
    cycles += PRODUCT * found["products"] + RENDEZVOUS * found["rendezvous"]
    # Exchanges of one step go side by side: half of them wait for another.
    return float((cycles + EXCHANGE * found["exchanges"] / 2) / CLOCK / 1000)


def count() -> dict[str, Any]:
    """All counts of this tree."""
    found: dict[str, Any] = {}
    for op, name, kernel in KERNELS:
        case = next(case for case in _cases.cases(op) if case.name == name)
        launch = next(item for item in _cases.record_case(case, torch.bfloat16, ARCH) if item.name == kernel)
        found[f"{name} {kernel}"] = counted(launch)
    return {"kernels": found, "sectors": sectors()}


_HEAD = """# Counted, not timed

Nothing here was measured on a GPU. Each line is a kernel of GPT-2 124M in bfloat16 for sm_90, before and
after a change; made by `python benchmarks/counted.py` of its machine code and of its execution without a GPU.

## Decode products, one row

"Rounds" are the times that a program waits for loads into registers, "products" the longest chain of matrix
products, "meeting" a fence and an atomic in memory by which programs add up their parts; "blocks" are those
of a multiprocessor at once. The estimate is of the time from the end of the kernel before to the last store
of a program that finds its weights in L2, of the cycles that one such thing costs on an H100 by reading:
{load} a round, {barrier} a barrier, {product} a product, {rendezvous} a meeting, at {clock} GHz. Good to a
quarter; it leaves out bytes. The head has more programs than fit at once, so that its estimate is of one of
several that follow one another.

By Triton 3.8.0 nothing spills on sm_80, sm_90 and sm_100. By 3.6.0 two cases of 64 rows do, which did not
before: fp32 16 bytes a thread, and queries and keys behind a norm 8 bytes on sm_90 and sm_100. Blocks of 32
rows spill nothing there (181 and 184 registers on sm_90), but two blocks then read every weight where one
does, by 3.8.0 too, whose 255 and 180 registers spill nothing: 64 rows stay.

| kernel | | grid | warps | registers | blocks | rounds | barriers | products | meeting | estimate, µs |
|---|---|---|---|---|---|---|---|---|---|---|
"""
_NORMS = """
## Norms, 16,384 rows of 768

Barriers and exchanges are those of the text, in which a loop stands once: of one row, or of one turn.

| kernel | | grid | warps | registers | blocks | barriers | exchanges |
|---|---|---|---|---|---|---|---|
"""
_SECTORS = """
## Sectors of 32 bytes

Of small calls in the executor, on the compiler's text: what the requests touch, and the fewest that their
bytes fill.

| kernel | | sectors | fewest |
|---|---|---|---|
"""
_PRODUCTS = """
## Backward products on Hopper

The kernel that stood ("before", now that of other GPUs and of smaller calls) and the one in Gluon ("after").
"Barriers" are those in one step of the loop over K: of all warps before, of one warpgroup after. "Copied" is
what the copy engine brings into shared memory in the whole launch, mostly from L2. "Instructions" are those
that one scheduler issues for 128 x 256 of the result, loops once, and "cycles" what the matrix unit needs for
these: where instructions are more, the activation's gradient bounds the kernel. By Triton 3.6.0 and 3.8.0
nothing spills, and no product waits for the one before.

| kernel | | grid | warps | registers | blocks | stages | barriers | copied, GB | instructions | cycles |
|---|---|---|---|---|---|---|---|---|---|---|
"""
_WRONG = """
## What would show that this is wrong

- A profile of the decode pass on an H100 in which a product's kernel takes as long as before, or in which
  `out` and `proj` take longer without parts in memory than with them: then reading weights by 48 programs is
  the limit, not the chain, and launch rows with `SPLIT_K = 2` are right.
- More bytes from memory than the weights have, in the head: then its early fetch is too much for the L2
  cache, and half of it is the wrong bound.
- A layer norm slower than with four warps a row: then it is bound by what it has in flight, and
  `programs_per_sm` of the launch row is too small.
- A backward product on Hopper that takes as long as the kernel before it: then neither the barriers in its
  loop nor the bytes copied were its bound, and two blocks a multiprocessor had hidden them; or one that takes
  longer: then `serves_dact` or `serves_weight_grad` should leave the call to the other.
- Gradients through an activation that take more than the larger of instructions and cycles by half: then the
  two warpgroups do not overlap, or their text, 60 to 280 KB, does not come fast enough.
- Kernels whose sum in a pass is more than a quarter away from the sum of the estimates and the bytes' time.
"""


# (op, case, whether the kernel adds up over tokens)
BACKWARD = [
    ("gelu_mlp", "gelu_tanh, 16384 tokens x 768", False),
    ("gated_mlp", "SmolLM2 135M, silu", False),
    ("gelu_mlp", "gelu_tanh, 16384 tokens x 768", True),
]


def product_cells(launch: _launch.Launch) -> list[Any]:
    """The cells of a backward product in the page's table."""
    compiled, named = _aot.compile_launch(launch, ARCH), launch.arguments
    registers, _ = _aot._resources(compiled.asm["cubin"])
    code = machine_code(compiled.asm["cubin"])
    in_gluon = launch.kernel.is_gluon()
    tile_m, tile_n = (128, 256) if in_gluon else (named["BLOCK_M"], named["BLOCK_N"])
    m, n, k = (named[name] for name in "MNK")
    steps = -(-k // named["BLOCK_K"])
    products = [code[a : b + 1] for a, b in loops(code)]
    products = [body for body in products if any(name.startswith("HGMMA") for _, _, name in body)]
    inner = min(products, key=len)
    tiles = -(-m // tile_m) * -(-n // tile_n)
    threads = _aot._threads(compiled.asm["ptx"], compiled.metadata.num_warps)
    # Two warpgroups in Gluon have a text each; else all warps have one, two of them on a scheduler.
    issued = len(code) if in_gluon else len(code) * (threads // 128) * (128 * 256 // (tile_m * tile_n))
    cycles = -(-steps // named.get("splits", launch.grid[-1] if "dw" in launch.name else 1)) * 8 * 128
    return [
        " x ".join(map(str, launch.grid)), threads // 32, registers,
        _aot.blocks_per_sm(ARCH, threads, registers, compiled.metadata.shared),
        named.get("STAGES", compiled.metadata.num_stages),
        sum(name.startswith("BAR") for _, _, name in inner),
        f"{tiles * steps * named['BLOCK_K'] * (tile_m + tile_n) * 2 / 1e9:.2f}", issued, cycles,
    ]  # fmt: skip


def products() -> str:
    """The part of the page on Hopper's backward products."""
    text = _PRODUCTS
    for op, name, over_tokens in BACKWARD:
        case = next(case for case in _cases.cases(op) if case.name == name)
        with (
            mock.patch.object(hopper, "serves_dact", return_value=False),
            mock.patch.object(hopper, "serves_weight_grad", return_value=False),
        ):
            before = _cases.record_case(case, torch.bfloat16, ARCH)
        for label, launches in (
            ("before", before),
            ("after", _cases.record_case(case, torch.bfloat16, ARCH)),
        ):
            launch = next(item for item in launches if ("_dw" if over_tokens else "_dact") in item.name)
            text += f"| {' | '.join(map(str, [f'`{launch.name}`', label, *product_cells(launch)]))} |\n"
    return text


def table(before: dict[str, Any], after: dict[str, Any]) -> str:
    """The file."""
    text = _HEAD.format(load=LOAD, barrier=BARRIER, product=PRODUCT, rendezvous=RENDEZVOUS, clock=CLOCK)
    norms = _NORMS
    for name in after["kernels"]:
        for label, side in (("before", before), ("after", after)):
            found = side["kernels"][name]
            grid = " x ".join(map(str, found["grid"]))
            cells = [f"`{name}`", label, grid, found["warps"], found["registers"], found["blocks"]]
            if "norm" in name:
                cells += [found["barriers"], found["exchanges"]]
                norms += f"| {' | '.join(map(str, cells))} |\n"
            else:
                cells += [found["rounds"], found["barriers"], found["products"]]
                cells += ["yes" if found["rendezvous"] else "no", f"{microseconds(found):.1f}"]
                text += f"| {' | '.join(map(str, cells))} |\n"
    text += norms + _SECTORS
    for kernel in after["sectors"]:
        for label, side in (("before", before), ("after", after)):
            text += f"| `{kernel}` | {label} | {' | '.join(map(str, side['sectors'][kernel]))} |\n"
    return text + products() + _WRONG


if __name__ == "__main__":
    if sys.argv[1] == "count":
        print(json.dumps(count(), indent=1))
    elif sys.argv[1] == "products":
        sys.stdout.write(products())
    else:
        sys.stdout.write(table(*(json.loads(Path(file).read_text()) for file in sys.argv[2:4])))
