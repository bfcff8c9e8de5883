"""The product's kernel for Hopper through the executor: calls, and faults planted in its text.

    python tests/ptx/ptx_linear_hopper.py calls [NUMBER...]
    python tests/ptx/ptx_linear_hopper.py faults EVERY FIRST

Needs a process in which kernels are compiled, not interpreted. Prints a line of JSON for each call or fault;
of the faults each EVERYth, from the FIRST on.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from typing import Any
from unittest import mock

import ptx_attention_hopper
import torch

from gptkern.ops import _aot, _launch
from gptkern.ops.gated_mlp.launch import product_gated
from gptkern.ops.linear import hopper, launch, reference
from gptkern.testing import assert_accurate
from gptkern.testing.ptx import Fault, execute
from gptkern.testing.ptx import kernels as ptx_kernels

# Programs of a launch, so few that each has several tiles, and one has fewer than the others.
PROGRAMS = 2


@dataclass(frozen=True)
class Product:
    """A call of ``launch.product``, or of ``product_gated``.

    Attributes:
        gated: Half of the n columns are the gate's, half are up's.
        in_out: The weight lies by columns.
        residual: The residual's dtype, or None.
        room: Elements from one of x's rows, and of the residual's, to the next, beyond its width.
    """

    m: int
    k: int
    n: int
    activation: str = "none"
    dtype: torch.dtype = torch.bfloat16
    in_out: bool = False
    bias: bool = True
    residual: torch.dtype | None = None
    save: bool = False
    room: int = 0
    gated: bool = False

    def make(self) -> dict[str, Any]:
        """The arguments; a row of x holds NaN."""
        torch.manual_seed(0)
        x = torch.randn(self.m, self.k + self.room).to(self.dtype)[:, : self.k]
        x[7 % self.m, 3] = float("nan")
        weight = torch.randn(self.n, self.k).to(self.dtype) * self.k**-0.5
        stored = weight.t().contiguous() if self.in_out else weight.t()
        residual = None
        if self.residual is not None:
            residual = torch.randn(self.m, self.n + self.room).to(self.residual)[:, : self.n]
        bias = torch.randn(self.n).to(self.dtype) if self.bias else None
        return {
            "a": x, "b": stored, "bias": bias, "residual": residual, "activation": self.activation,
            "save_pre": self.save, "gated": self.gated,
        }  # fmt: skip


CALLS = {
    "gelu, saved": Product(200, 328, 520, "gelu_tanh", save=True),
    "fp16, erf, saved": Product(200, 264, 520, "gelu", torch.float16, save=True),
    "weight (in, out)": Product(200, 328, 520, "gelu_tanh", in_out=True),
    "residual": Product(200, 600, 272, residual=torch.bfloat16),
    "residual in fp32, rows apart": Product(200, 328, 272, residual=torch.float32, room=24),
    "no bias, rows apart": Product(390, 256, 250, bias=False, room=8),
    "odd width": Product(140, 256, 533, "silu", save=True),
    "gated, saved": Product(200, 328, 2 * 300, "silu", save=True, gated=True),
    "gated, weight (in, out), odd width": Product(
        140, 264, 2 * 268, "gelu_tanh", in_out=True, bias=False, gated=True
    ),
    "one row": Product(1, 264, 520, "relu", residual=torch.bfloat16),
}


Results = list[torch.Tensor]


def executed(call: dict[str, Any], programs: int = PROGRAMS, **options: Any) -> Results:
    """The call's results by the executor."""
    with (
        torch.no_grad(),
        mock.patch.object(_launch, "multiprocessors", return_value=programs),
        ptx_kernels.executed(90, **options),
    ):
        if call["gated"]:
            weight = call["b"].t()
            results = product_gated(call["a"], weight, call["bias"], call["activation"], call["save_pre"])
        else:
            results = launch.product(**{name: call[name] for name in call if name != "gated"})
        return [result for result in results if result is not None]


def plain(call: dict[str, Any], dtype: torch.dtype | None = None) -> Results:
    """The call's results by PyTorch, in ``dtype`` or as they are."""
    a, b, bias, residual = (
        value if value is None or dtype is None else value.to(dtype)
        for value in (call[name] for name in ("a", "b", "bias", "residual"))
    )
    pre = torch.nn.functional.linear(a, b.t(), bias)
    gate, up = pre.chunk(2, dim=1) if call["gated"] else (pre, None)
    out = reference.ACTIVATIONS[call["activation"]](gate)
    out = out if up is None else out * up
    out = out if residual is None else residual + out
    return [out, pre] if call["save_pre"] else [out]


def same(some: Results, others: Results) -> bool:
    """True if they are the same bits, where they are numbers, and NaN in the same places."""
    return all(
        torch.equal(a.nan_to_num(nan=7.0), b.nan_to_num(nan=7.0)) for a, b in zip(some, others, strict=True)
    )


def run_calls(numbers: list[int]) -> None:
    names = list(CALLS)
    for number in numbers or range(len(names)):
        call = CALLS[names[number]].make()
        kernels: list[str] = []
        found = executed(call, done=lambda item, kernels=kernels: kernels.append(item.name))
        for got, rounded, exact in zip(found, plain(call), plain(call, torch.float64), strict=True):
            assert_accurate(got, rounded, exact)
        # The kernel that serves what this one does not, and this one with fewer rows.
        with mock.patch.object(hopper, "serves", return_value=False):
            others = executed(call, done=lambda item, kernels=kernels: kernels.append(item.name))
        few = call | {name: call[name][:70] for name in ("a", "residual") if call[name] is not None}
        row = {
            "call": names[number], "kernels": kernels, "as_other": same(found, others),
            "as_few": same([result[:70] for result in found], executed(few)),
        }  # fmt: skip
        print(json.dumps(row), flush=True)


def caught(call: dict[str, Any], text: str, right: Results) -> str:
    """The check that notices the changed text."""

    def changed(ptx: str, *args: Any, **kwargs: Any) -> None:
        execute(text, *args, **kwargs)

    try:
        with mock.patch.object(ptx_kernels, "execute", changed):
            found = executed(call, 1, seed=1)
    except Fault as fault:
        return fault.check
    return "" if same(found, right) else "result"


def run_faults(every: int, first: int) -> None:
    """A program with two tiles of more pairs than the ring has, ragged at every side."""
    call = Product(100, 520, 300, "relu", residual=torch.bfloat16, save=True).make()
    texts: list[str] = []

    def noted(item: _launch.Launch) -> None:
        texts.append(_aot.compile_launch(item, 90).asm["ptx"])

    right = executed(call, 1, seed=1, done=noted)
    planted = ptx_attention_hopper.faults(texts[0])
    for what, text in list(planted)[first::every]:
        print(json.dumps({"fault": what, "caught": caught(call, text, right)}), flush=True)


if __name__ == "__main__":
    if sys.argv[1] == "calls":
        run_calls([int(number) for number in sys.argv[2:]])
    else:
        run_faults(int(sys.argv[2]), int(sys.argv[3]))
