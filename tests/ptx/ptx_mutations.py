"""Faults planted in compiled kernels, one at a time: which check of the executor catches each.

    python tests/ptx/ptx_mutations.py ARCH NAME...

A mutation takes an instruction out of a kernel's text or changes it: barriers, waits, fences, the guard of an
access, an order between blocks. Prints a line of JSON for each: kernel, instruction, and the check that
caught it: the name of a fault, "result" where numbers are wrong, or "" where nothing was noticed.
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch

from gptkern import backend, testing
from gptkern.ops import _aot, _cases, _launch
from gptkern.testing.ptx import Fault
from gptkern.testing.ptx import kernels as ptx_kernels
from gptkern.testing.ptx.launch import execute

# kernel -> (op, the check's name) whose call launches it
CALLS = {
    "linear": ("linear", "one of each"),
    "linear_k": ("linear", "gelu_tanh, 65 tokens"),
    "attention": ("flash_attention", "causal"),
    "decode": ("decode_linear", "residual, 17 x 100 to 33"),
    "qkv": ("decode_linear", "qkv, 5 x 40"),
    "decode_attention": ("decode_attention", "soft cap, window"),
    "norm": ("layer_norm", "layer_norm (3, 17)"),
    "loss": ("linear_cross_entropy", "5 tokens x 24"),
}
_DROPPED = (
    "bar.sync",
    "cp.async.wait_group",
    "wgmma.wait_group",
    "fence.proxy.async",
    "cp.async.commit_group",
)
_MOST_UNGUARDED = 3
_LINE = re.compile(r"^[^\n]*;", re.MULTILINE)


def mutations(ptx: str) -> Iterator[tuple[str, str]]:
    """(what was changed, the text with it)."""
    body = ptx.index("{", ptx.index(".reqntid"))
    unguarded: Counter[str] = Counter()  # of each kind of access a few are enough
    for found in _LINE.finditer(ptx, body):
        line = found.group(0)
        plain = line.split("//")[0].strip()

        def with_line(new: str, found: re.Match[str] = found) -> str:
            return ptx[: found.start()] + new + ptx[found.end() :]

        if plain.startswith(_DROPPED):
            yield f"without {plain}", with_line("")
        if guard := re.match(r"\s*@%p\d+ ((?:ld|st)\.global\S*|atom\S*)", line):
            unguarded[guard.group(1)] += 1
            if unguarded[guard.group(1)] <= _MOST_UNGUARDED:
                yield (
                    f"unguarded {plain}",
                    with_line(line.replace(line[: line.index(guard.group(1))], "\t", 1)),
                )
        if "atom.global" in plain and "acq_rel" in plain:
            yield f"relaxed {plain}", with_line(line.replace("acq_rel", "relaxed"))
        if group := re.search(r"wait_group(?:\.sync\.aligned)?\s+(\d+);", plain):
            later = plain.replace(f"{group.group(1)};", f"{int(group.group(1)) + 1};")
            yield f"later {plain}", with_line(later)


class _Changed:
    """Runs launches, one kernel's with a changed text."""

    def __init__(self, arch: int, name: str, text: str) -> None:
        self.arch, self.name, self.text = arch, name, text

    def __call__(self, launch: _launch.Launch, *args: Any) -> Any:
        real = execute

        def changed(ptx: str, *args: Any, **kwargs: Any) -> Any:
            return real(self.text if launch.name == self.name else ptx, *args, **kwargs)

        with mock.patch.object(ptx_kernels, "execute", changed):
            return _run(launch, *args)


_run = ptx_kernels.run


def caught(case: _cases.Case, arch: int, name: str, text: str, plain: list[torch.Tensor]) -> str:
    """The check that notices the changed text."""
    torch.manual_seed(0)
    call = case.make(torch.device("cpu"), torch.bfloat16)
    try:
        with (
            mock.patch.object(ptx_kernels, "run", _Changed(arch, name, text)),
            ptx_kernels.executed(arch),
        ):
            found = testing._run(case.op, call)
    except Fault as fault:
        return fault.check
    same = all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(found, plain, strict=True))
    return "" if same else "result"


def main() -> None:
    """The command."""
    arch = int(sys.argv[1])
    for wanted in sys.argv[2:]:
        op, begin = CALLS[wanted]
        case = next(case for case in _cases.checks(op) if case.name.startswith(begin))
        torch.manual_seed(0)
        call = case.make(torch.device("cpu"), torch.bfloat16)
        launches: dict[str, str] = {}

        def noted(launch: _launch.Launch, launches: dict[str, str] = launches) -> None:
            launches.setdefault(launch.name, _aot.compile_launch(launch, arch).asm["ptx"])

        with ptx_kernels.executed(arch, done=noted):
            plain = testing._run(case.op, call)
        first = next(iter(launches))
        for what, text in mutations(launches[first]):
            check = caught(case, arch, first, text, plain)
            print(
                json.dumps({"call": wanted, "kernel": first, "mutation": what, "caught": check}), flush=True
            )


if __name__ == "__main__":
    with backend("auto"):
        main()
