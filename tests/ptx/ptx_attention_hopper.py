"""Attention's kernel for Hopper through the executor: calls, and faults planted in its text.

    python tests/ptx/ptx_attention_hopper.py calls [NUMBER...]
    python tests/ptx/ptx_attention_hopper.py faults EVERY FIRST

Needs a process in which kernels are compiled, not interpreted. Prints a line of JSON for each call or fault;
of the faults each EVERYth, from the FIRST on.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton

import gptkern
from gptkern.ops import _aot, _cases, _launch
from gptkern.ops.flash_attention import cases
from gptkern.testing.ptx import Fault, execute
from gptkern.testing.ptx import kernels as ptx_kernels

_LINE = re.compile(r"^[^\n]*;", re.MULTILINE)
# Where a wait stands: the number of the file, and the line.
_FILE, _LOCATION = re.compile(r'\.file\s+(\d+) "([^"]*)"'), re.compile(r"\.loc\s+(\d+) (\d+) ")
# Programs of a launch, so few that each has several tiles, and a program the last of which are none.
PROGRAMS = 3


def dense(*shape: int, **options: object) -> _cases.Case:
    return _cases.Case("", cases.flash_attention, cases._dense(*shape, return_lse=True, **options))


def packed(lengths_q: list[int], lengths_k: list[int], *heads: int, **options: object) -> _cases.Case:
    """Sequences whose neighbours' values are NaN: every other one."""

    def make(device: torch.device, dtype: torch.dtype) -> _cases.Call:
        starts = [
            torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
            for lengths in (lengths_q, lengths_k)
        ]
        q = torch.randn(sum(lengths_q), heads[0], heads[2]).to(dtype)
        k, v = (torch.randn(sum(lengths_k), heads[1], heads[2]).to(dtype) for _ in range(2))
        for begin, end in zip(starts[1][1::2], starts[1][2::2], strict=False):
            k[begin:end] = v[begin:end] = float("nan")
        args = (q, k, v, *starts, max(lengths_q), max(lengths_k))
        return _cases.Call(args, {**options, "return_lse": True})

    return _cases.Case("", cases.flash_attention_varlen, make)


CALLS = {
    "causal, two sequences, grouped": dense(2, 300, 300, 2, 1, 64),
    "more keys than queries": dense(1, 200, 520, 2, 2, 64),
    "queries that see no key": dense(1, 200, 90, 2, 2, 64),
    "not causal": dense(1, 130, 250, 2, 1, 64, causal=False),
    "window": dense(1, 300, 400, 2, 2, 64, window=51),
    "window, not causal": dense(1, 300, 400, 2, 2, 64, window=30, causal=False),
    "one query": dense(2, 1, 140, 2, 1, 64),
    "head dim 128": dense(1, 300, 300, 2, 1, 128),
    "packed, NaN beside": packed([130, 5, 165], [130, 20, 250], 2, 1, 64),
    "packed, empty, NaN beside": packed([130, 0, 33, 135], [80, 70, 0, 77], 2, 1, 64, causal=False),
    "packed, head dim 128, window": packed([20, 135, 165], [77, 73, 250], 2, 1, 128, window=100),
}


def worst(case: _cases.Case, dtype: torch.dtype) -> tuple[list[str], float, float]:
    """(kernels, the error of out beside the reference's own in dtype, that of lse) of a call's numbers."""
    torch.manual_seed(0)
    call = case.make(torch.device("cpu"), dtype)
    names: list[str] = []
    with (
        torch.no_grad(),
        mock.patch.object(_launch, "multiprocessors", return_value=PROGRAMS),
        ptx_kernels.executed(90, done=lambda launch: names.append(launch.name)),
    ):
        out, lse = case.op(*call.args, **call.kwargs)
    q, k, v, *rest = call.args
    with torch.no_grad():
        plain = case.op(q, k, v, *rest, **call.kwargs)
        exact = case.op(q.double(), k.double(), v.double(), *rest, **call.kwargs)
    finite = torch.isfinite(exact[1])
    assert torch.equal(torch.isfinite(lse), finite), "lse is finite elsewhere than the reference's"
    assert torch.equal(out.isnan(), exact[0].isnan()), "out is NaN elsewhere than the reference's"
    error, own = ((x.double() - exact[0]).nan_to_num().abs().max().item() for x in (out, plain[0]))
    return names, error / max(own, 1e-3), (lse.double() - exact[1])[finite].abs().max().item()


def installed(name: str) -> Path:
    """A file named by compiled text, as it is installed here.

    Triton's cache gives the same text to equal sources wherever they lie, so that the text may name a
    checkout or an environment that is gone.
    """
    for package in (gptkern, triton):
        # An environment may lie in a checkout: the last folder of that name is the package.
        tail = name.rpartition(f"/{package.__name__}/")[2]
        if (found := Path(package.__file__).parent / tail).is_file():
            return found
    raise ValueError(f"compiled text names {name!r}, which is neither gptkern's nor Triton's")


def faults(text: str, tries: bool = True) -> Iterator[tuple[str, str]]:
    """(what was changed, the text with it): waits, arrivals and fences, each by itself.

    Args:
        text: Of a kernel that has two warpgroups and a producer.
        tries: A wait that is taken out still asks once, and what it finds done is ordered: whether the fault
            is noticed then depends on the order of warps.
    """
    lines = {number: installed(name).read_text().splitlines() for number, name in _FILE.findall(text)}
    body = text.index("{", text.index(".reqntid"))
    for found in _LINE.finditer(text, body):
        plain = found.group(0).split("//")[0].strip()
        # The text has the first warpgroup, the second, which begins by taking registers, and the producer.
        taken = len(re.findall("setmaxnreg.inc", text[body : found.start()]))
        group = (taken > 1) + (taken > 1 and text.count("setmaxnreg.dec", body, found.start()) > 4)

        def with_line(new: str, found: re.Match[str] = found) -> str:
            return text[: found.start()] + new + text[found.end() :]

        if plain == "@!complete bra.uni waitLoop;":
            begin = text.rindex("// begin inline asm", 0, found.start())
            file, line = _LOCATION.findall(text, 0, begin)[-1]
            source = lines[file][int(line) - 1].strip()
            first = found.start() if tries else text.rindex("mbarrier.try_wait", begin, found.start())
            yield f"part {group}: without {source}", text[:first] + text[found.end() :]
        elif re.match(r"wgmma\.wait|wgmma\.commit|fence\.proxy|@%p\d+ mbarrier\.arrive\.shared", plain):
            yield f"without {plain}", with_line("")
        elif arrivals := re.match(r"@%p\d+ mbarrier\.init\..*, ([23]);", plain):
            count = int(arrivals[1])
            fewer = found.group(0).replace(f", {count};", f", {count - 1};")
            yield f"one arrival less: {plain}", with_line(fewer)


def caught(call: _cases.Call, text: str, plain: list[torch.Tensor]) -> str:
    """The check that notices the changed text."""

    def changed(ptx: str, *args: Any, **kwargs: Any) -> None:
        execute(text if "setmaxnreg" in ptx else ptx, *args, **kwargs)

    try:
        with mock.patch.object(ptx_kernels, "execute", changed), ptx_kernels.executed(90, seed=1):
            found = cases.flash_attention_varlen(*call.args, **call.kwargs)
    except Fault as fault:
        return fault.check
    same = all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(found, plain, strict=True))
    return "" if same else "result"


def run_faults(every: int, first: int) -> None:
    """A window that cuts tiles at both sides, more tiles of keys than the ring has, and cut values."""
    case = packed([130, 65], [130, 1030], 1, 1, 64, window=720)
    with mock.patch.object(_launch, "multiprocessors", return_value=1), torch.no_grad():
        torch.manual_seed(0)
        call = case.make(torch.device("cpu"), torch.bfloat16)
        texts: list[str] = []

        def noted(launch: _launch.Launch) -> None:
            texts.append(_aot.compile_launch(launch, 90).asm["ptx"])

        with ptx_kernels.executed(90, seed=1, done=noted):
            plain = list(case.op(*call.args, **call.kwargs))
        for what, text in list(faults(texts[0]))[first::every]:
            print(json.dumps({"fault": what, "caught": caught(call, text, plain)}), flush=True)


def run_calls(numbers: list[int]) -> None:
    names = list(CALLS)
    for number in numbers or range(len(names)):
        name = names[number]
        for dtype in (torch.bfloat16, torch.float16)[: 2 if number == 0 else 1]:
            kernels, error, lse = worst(CALLS[name], dtype)
            row = {"call": name, "dtype": str(dtype), "kernels": kernels, "error": error, "lse": lse}
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    if sys.argv[1] == "calls":
        run_calls([int(number) for number in sys.argv[2:]])
    else:
        run_faults(int(sys.argv[2]), int(sys.argv[3]))
