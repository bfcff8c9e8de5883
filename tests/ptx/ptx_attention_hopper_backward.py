"""Attention's backward kernels for Hopper through the executor: calls, orders of blocks, planted faults.

    python tests/ptx/ptx_attention_hopper_backward.py calls [NUMBER...]
    python tests/ptx/ptx_attention_hopper_backward.py orders NUMBER SEEDS
    python tests/ptx/ptx_attention_hopper_backward.py promised
    python tests/ptx/ptx_attention_hopper_backward.py turns
    python tests/ptx/ptx_attention_hopper_backward.py faults EVERY FIRST

Needs a process in which kernels are compiled, not interpreted. Prints a line of JSON for each call, order or
fault: ``turns`` for those in what orders the sums of dq, ``faults`` for each EVERYth wait, arrival and fence,
from the FIRST on.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple
from unittest import mock

import torch
from ptx_attention_hopper import faults

from gptkern import backend, testing
from gptkern.ops import _aot, _launch
from gptkern.ops.flash_attention import (
    flash_attention,
    flash_attention_varlen,
    launch,
)
from gptkern.testing.ptx import Fault, execute
from gptkern.testing.ptx import kernels as ptx_kernels

KERNELS = ("flash_attention_delta", "flash_attention_backward_hopper")
OUTSIDE = ("flash_attention_outside",) * 2  # after them, of packed sequences: rows of queries and of keys
# Programs of a launch, so few that each has several tiles, and a program the last of which are none.
PROGRAMS = 3
Tensors = tuple[torch.Tensor, ...]


class Sizes(NamedTuple):
    """A call: lengths of one sequence a batch row, or, if there are several, of packed ones."""

    lengths_q: list[int]
    lengths_k: list[int]
    heads: tuple[int, int]
    head_dim: int = 64
    causal: bool = True
    window: int | None = None
    batch: int | None = 1  # None: packed


CALLS = {
    "causal, two sequences, grouped": Sizes([200], [200], (2, 1), batch=2),
    "more keys than queries": Sizes([200], [520], (1, 1)),
    "queries that see no key": Sizes([200], [90], (2, 2)),
    "not causal": Sizes([130], [250], (2, 1), causal=False),
    "window": Sizes([300], [400], (1, 1), window=51),
    "window, not causal": Sizes([300], [400], (1, 1), window=30, causal=False),
    "one query": Sizes([1], [140], (2, 1), batch=2),
    "head dim 128": Sizes([200], [300], (2, 1), 128),
    "packed, NaN beside": Sizes([130, 5, 165], [130, 20, 250], (2, 1), batch=None),
    "packed, empty, NaN beside": Sizes([130, 0, 33, 135], [80, 70, 0, 77], (2, 1), causal=False, batch=None),
    "packed, head dim 128, window": Sizes([20, 135, 165], [77, 73, 250], (2, 1), 128, window=100, batch=None),
}


@dataclass
class Call:
    """What backward is given, and its gradients by the plain expression and in float64."""

    arguments: tuple[Any, ...]
    plain: Tensors
    exact: Tensors


def _inputs(sizes: Sizes, dtype: torch.dtype) -> tuple[Tensors, tuple[Any, ...]]:
    """(q, k, v, do), and the packed call's offsets. Of packed sequences every other one is NaN."""
    heads, heads_k = sizes.heads
    rows_q, rows_k = sum(sizes.lengths_q), sum(sizes.lengths_k)
    lead = () if sizes.batch is None else (sizes.batch,)
    shapes = ((rows_q, heads), (rows_k, heads_k), (rows_k, heads_k), (rows_q, heads))
    q, k, v, do = (torch.randn(*lead, *shape, sizes.head_dim).to(dtype) for shape in shapes)
    if sizes.batch is not None:
        return (q, k, v, do), ()
    starts = [
        torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        for lengths in (sizes.lengths_q, sizes.lengths_k)
    ]
    for tensors, offsets in (((q, do), starts[0]), ((k, v), starts[1])):
        for begin, end in zip(offsets[1::2], offsets[2::2], strict=False):
            for x in tensors:
                x[begin:end] = float("nan")
    return (q, k, v, do), (*starts, max(sizes.lengths_q), max(sizes.lengths_k))


def made(sizes: Sizes, dtype: torch.dtype) -> Call:
    """A call with gradients of both results."""
    torch.manual_seed(0)
    (q, k, v, do), offsets = _inputs(sizes, dtype)
    op: Any = flash_attention if sizes.batch is not None else flash_attention_varlen

    def gradients(*wide: torch.Tensor) -> tuple[Tensors, Tensors, torch.Tensor]:
        inputs = tuple(x.detach().requires_grad_() for x in wide)
        with backend("reference"):
            results = op(*inputs, *offsets, causal=sizes.causal, window=sizes.window, return_lse=True)
        dlse = torch.randn(results[1].shape, generator=torch.Generator().manual_seed(1))
        dlse[results[1].isinf()] = 0.0
        given = (do.to(results[0]), dlse.to(results[1]))
        return torch.autograd.grad(results, inputs, given), tuple(x.detach() for x in results), dlse

    plain, (out, lse), dlse = gradients(q, k, v)
    exact, _, _ = gradients(q.double(), k.double(), v.double())
    left = launch.UNLIMITED if sizes.window is None else sizes.window - 1
    options = launch.Options(left, 0 if sizes.causal else left, sizes.head_dim**-0.5, 0.0, 0.0)
    packed = launch.Packed(*offsets) if offsets else None
    return Call((do, dlse, q, k, v, out, lse, packed, launch.NO_EXTRAS, options), plain, exact)


def run(call: Call, seed: int = 0, programs: int = PROGRAMS, done: Any = None) -> Tensors:
    """The gradients by the kernels."""
    with (
        torch.no_grad(),
        mock.patch.object(_launch, "multiprocessors", return_value=programs),
        ptx_kernels.executed(90, seed=seed, done=done),
    ):
        return launch.backward(*call.arguments)


def failure(call: Call, found: Tensors) -> str:
    """What is wrong with gradients by the ops' own measure: '' if nothing is."""
    for name, got, plain, exact in zip(("dq", "dk", "dv"), found, call.plain, call.exact, strict=True):
        if not torch.equal(got.isnan(), exact.isnan()):
            return f"{name} is NaN elsewhere than the reference's"
        try:
            testing.assert_accurate(got, plain, exact, name)
        except AssertionError as error:
            return str(error)
    return ""


def run_calls(numbers: list[int]) -> None:
    names = list(CALLS)
    for number in numbers or range(len(names)):
        for dtype in (torch.bfloat16, torch.float16)[: 2 if number == 0 else 1]:
            kernels: list[str] = []
            call = made(CALLS[names[number]], dtype)
            found = run(call, done=lambda launch, kernels=kernels: kernels.append(launch.name))
            row = {"call": names[number], "dtype": str(dtype), "kernels": kernels}
            print(json.dumps(row | {"failure": failure(call, found)}), flush=True)


def run_orders(number: int, seeds: int) -> None:
    """The same call under seeded orders of blocks and warps, and with other numbers of programs."""
    call = made(list(CALLS.values())[number], torch.bfloat16)
    first = run(call)
    for seed in range(1, seeds + 1):
        programs = 1 + seed % 4
        found = run(call, seed, programs)
        same = all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(first, found, strict=True))
        print(json.dumps({"seed": seed, "programs": programs, "same": same}), flush=True)


def run_promised() -> None:
    """More queries than promised, a sequence of NaN, one as promised, one of NaN, more keys than promised."""
    call = made(Sizes([150, 5, 70, 5, 10], [80, 5, 70, 5, 150], (1, 1), batch=None), torch.bfloat16)
    *others, packed, extras, options = call.arguments
    sound = run(call)
    short = Call((*others, packed._replace(max_q=100, max_k=100), extras, options), (), ())
    for name, got, expected in zip(("dq", "dk", "dv"), run(short), sound, strict=True):
        first, end = (packed.cu_q if name == "dq" else packed.cu_k)[2:4].tolist()
        same = torch.equal(got[first:end], expected[first:end])
        rest = torch.cat([got[:first], got[end:]])
        print(json.dumps({"gradient": name, "same": same, "nan": bool(rest.isnan().all())}), flush=True)


def turn_faults(text: str) -> Iterator[tuple[str, str]]:
    """(what was changed, the text with it): what orders the sums of dq."""
    for pattern, new in (
        (r"ld\.acquire\.gpu", "ld.relaxed.gpu"),
        (r"(atom|red)\.global\.gpu\.release|(atom|red)\.release\.gpu", r"\1\2.relaxed.gpu"),
    ):
        for found in re.finditer(pattern, text):
            changed = text[: found.start()] + found.expand(new) + text[found.end() :]
            yield f"{found.group(0)} relaxed", changed
    for found in re.finditer(r"ld\.acquire\.gpu\.global\.s32 (%r\d+), ", text):
        changed = f"mov.b32 {found.group(1)}, 1000; // "
        yield "no turn is waited for", text[: found.start()] + changed + text[found.end() :]


def caught(call: Call, text: str, plain: Tensors) -> str:
    """The check that notices the changed text."""

    def changed(ptx: str, *args: Any, **kwargs: Any) -> None:
        execute(text if "setmaxnreg" in ptx else ptx, *args, **kwargs)

    try:
        with mock.patch.object(ptx_kernels, "execute", changed):
            found = run(call, 1, 2)
    except Fault as fault:
        return fault.check
    same = all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(found, plain, strict=True))
    return "" if same else "result"


def run_faults(every: int = 0, first: int = 0) -> None:
    """Tiles that the mask cuts at either side and at neither, two heads, cut rows of all four tensors."""
    call = made(Sizes([330, 9], [380, 9], (2, 1), window=370, batch=None), torch.bfloat16)
    texts: list[str] = []

    def noted(launch: _launch.Launch) -> None:
        texts.append(_aot.compile_launch(launch, 90).asm["ptx"])

    plain = run(call, 1, 2, noted)
    text = texts[KERNELS.index("flash_attention_backward_hopper")]
    planted = list(faults(text, tries=False))[first::every] if every else turn_faults(text)
    for what, changed in planted:
        print(json.dumps({"fault": what, "caught": caught(call, changed, plain)}), flush=True)


if __name__ == "__main__":
    numbers = [int(number) for number in sys.argv[2:]]
    if sys.argv[1] == "calls":
        run_calls(numbers)
    elif sys.argv[1] == "orders":
        run_orders(*numbers)
    elif sys.argv[1] == "promised":
        run_promised()
    else:
        run_faults(*numbers)
