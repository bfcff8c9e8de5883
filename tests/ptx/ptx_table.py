"""The committed tables of ``benchmarks/executed_kernels.md``, of what the scripts beside this one print.

    python tests/ptx/ptx_table.py FOLDER > benchmarks/executed_kernels.md
    python tests/ptx/ptx_table.py launched ARCH  # the kernels that there are, as JSON

FOLDER holds the lines of ``ptx_kernels.py`` and ``ptx_steps.py`` in files ``kernels-ARCH*``, those of
``ptx_orders.py`` in ``orders-*``, those of ``ptx_mutations.py`` in ``mutations-*``.
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import ptx_harmless
import triton

from gptkern.ops import _cases

ARCHS = (80, 90)
TABLE = Path(__file__).parents[2] / "benchmarks" / "executed_kernels.md"
_HEAD = """# Kernels that were executed without a GPU

Compiled by Triton {triton}. Made by `python tests/ptx/ptx_table.py`; `tests/ptx/test_ptx_kernels.py` keeps it
true. See `docs/proof.md`.

## Kernels and architectures

The number of launches in one or two small calls of each op, in bfloat16, whose values and gradients passed by
the ops' own measure, with all checks of the executor. Calls that failed: {failed}.

| kernel | sm_80 | sm_90 |
|---|---|---|
"""
_ORDERS = """
## Orders of blocks

Launches of several blocks under seeded orders of these: every order left the same bits, and none a fault.

| kernel | call | architecture | blocks | orders |
|---|---|---|---|---|
"""
_MUTATIONS = """
## Planted faults

One instruction of a kernel's compiled text is changed, in calls of `tests/ptx/ptx_fault_calls.py`. "Numbers
alone": a comparison of numbers, which is what interpreted tests have, would have shown it too; elsewhere it
would not: their source has no such instruction, or the numbers stay right.

| call | architecture | planted | caught | missed by numbers alone | a right program | not explained |
|---|---|---|---|---|---|---|
{counts}
Calls that are not listed were not run. The last columns of the next table count faults by architecture.

| kernel | kind | changed | line | caught by | numbers alone | sm_80 | sm_90 |
|---|---|---|---|---|---|---|---|
"""
_HARMLESS = """
Nothing noticed the others. What is known of each was tried, not thought: "{same}" is a second text that fails
where the changed instruction would do otherwise than the original, and which passes; "{unused}" is a third,
with noise in place of what it gives; "{double}" is a fourth, without the barrier's neighbour.

| kernel | architecture | kind | changed | line | why |
|---|---|---|---|---|---|
"""


def rows(folder: Path, name: str) -> list[dict[str, Any]]:
    """The lines of the files that begin with ``name``."""
    return [
        json.loads(line) | {"file": file.name}
        for file in sorted(folder.glob(f"{name}-*"))
        for line in file.read_text().splitlines()
    ]


def listed(table: Path = TABLE) -> dict[str, dict[int, int]]:
    """Launches by kernel and architecture, as the committed table has them."""
    part = table.read_text().split("\n## ")[1]
    found = re.findall(r"^\| `(\w+)` \| (\d+) \| (\d+) \|$", part, re.MULTILINE)
    return {kernel: dict(zip(ARCHS, map(int, counts), strict=True)) for kernel, *counts in found}


def _code(text: str) -> str:
    """The changed instruction, without most of a long list of registers."""
    short = re.sub(r"\{ ?(%r\d+),[^}]{20,}\}", r"{\1, ...}", text)
    return f"`{short.replace('|', '/')}`"


def _line(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |\n"


def noticed(row: dict[str, Any]) -> bool:
    """True if a check caught the fault."""
    return row["caught"] not in ("", "bits")


def _instruction(row: dict[str, Any], registers: bool) -> str:
    """What was done, and to which instruction: with its registers, or its form alone."""
    guard, plain = re.fullmatch(r"(@!?%p\d+ )?(.*)", row["instruction"]).groups()  # type: ignore[union-attr]
    if not registers:
        guard, plain = guard and "@", plain.split(" ")[0].rstrip(";")
    return _code(f"{row['what']}: {guard or ''}{plain}")


def caught_line(row: dict[str, Any]) -> str:
    """The line of a fault that was caught, without the counts of such faults at its end."""
    cells = (f"`{row['kernel']}`", row["kind"], _instruction(row, False), row["source"], row["caught"])
    return _line(*cells, "yes" if row["numbers_alone"] else "no")


def missed_line(row: dict[str, Any]) -> str:
    """The line of a fault that nothing caught."""
    cells = (f"`{row['kernel']}`", f"sm_{row['arch']}", row["kind"], _instruction(row, True), row["source"])
    return _line(*cells, ptx_harmless.why(row) or "not explained")


def _planted(every: list[dict[str, Any]]) -> str:
    """The tables of planted faults."""
    counts = ""
    groups = {(row["call"], row["arch"]) for row in every}
    for call, arch in [*sorted(groups), *(("all", arch) for arch in ARCHS)]:
        own = [row for row in every if row["arch"] == arch and call in (row["call"], "all")]
        caught = [row for row in own if noticed(row)]
        missed = sum(not row["numbers_alone"] for row in caught)
        right = sum(bool(ptx_harmless.why(row)) for row in own if not noticed(row))
        counts += _line(
            call, f"sm_{arch}", len(own), len(caught), missed, right, len(own) - len(caught) - right
        )
    text = _MUTATIONS.format(counts=counts)
    lines: dict[str, Counter[int]] = defaultdict(Counter)
    for row in every:
        if noticed(row):
            lines[caught_line(row)][row["arch"]] += 1
    for line, found in lines.items():
        text += line.rstrip("\n") + " " + " | ".join(str(found[arch]) for arch in ARCHS) + " |\n"
    text += _HARMLESS.format(**ptx_harmless.FACTS)
    for row in every:
        if not noticed(row):
            text += missed_line(row)
    return text


def launched(arch: int) -> set[str]:
    """The kernels that the ops' cases launch."""
    return {
        item.name
        for op in _cases.ops()
        for case in _cases.cases(op)
        if case.archs is None or arch in case.archs
        for item in _cases.record_case(case, case.dtypes[0], arch)
    }


def made(folder: Path) -> str:
    """The file."""
    counts: dict[str, Counter[int]] = defaultdict(Counter)
    every = rows(folder, "kernels")
    for row in every:
        for kernel, count in row["kernels"].items():
            counts[kernel][int(row["file"].split("-")[1][:2])] += count
    text = _HEAD.format(triton=triton.__version__, failed=sum(bool(row["failure"]) for row in every))
    for kernel in sorted(counts):
        text += _line(f"`{kernel}`", *(counts[kernel][arch] for arch in ARCHS))
    text += _ORDERS
    for row in rows(folder, "orders"):
        assert not row["differ"], row
        text += _line(f"`{row['kernel']}`", row["call"], f"sm_{row['arch']}", row["blocks"], row["orders"])
    return text + _planted(rows(folder, "mutations"))


if __name__ == "__main__":
    if sys.argv[1] == "launched":
        print(json.dumps(sorted(launched(int(sys.argv[2])))))
    else:
        sys.stdout.write(made(Path(sys.argv[1])))
