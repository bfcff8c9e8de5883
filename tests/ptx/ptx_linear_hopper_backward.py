"""The backward products' kernels for Hopper through the executor: calls, and faults planted in their texts.

    python tests/ptx/ptx_linear_hopper_backward.py calls [NUMBER...]
    python tests/ptx/ptx_linear_hopper_backward.py faults NAME EVERY FIRST

Needs a process in which kernels are compiled, not interpreted. Prints a line of JSON for each call or fault;
of the faults in the kernel of call NAME each EVERYth, from the FIRST on.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from typing import Any
from unittest import mock

import ptx_attention_hopper
import torch
from ptx_linear_hopper import PROGRAMS, Results, same

from gptkern.ops import _aot, _launch
from gptkern.ops.gated_mlp.launch import product_gated_dact
from gptkern.ops.linear import hopper, launch, reference
from gptkern.testing import assert_accurate
from gptkern.testing.ptx import Fault, execute
from gptkern.testing.ptx import kernels as ptx_kernels


def matrix(rows: int, columns: int, dtype: torch.dtype, room: int = 0, scale: float = 1.0) -> torch.Tensor:
    """Numbers, with NaN in ``room`` elements beside each row and in as many rows below."""
    around = torch.full((rows + room, columns + room), float("nan"), dtype=dtype)
    around[:rows, :columns] = (torch.randn(rows, columns) * scale).to(dtype)
    return around[:rows, :columns]


@dataclass(frozen=True)
class Dact:
    """A call of ``launch.product_dact``, or of ``product_gated_dact``: a gradient through an activation.

    Attributes:
        gated: ``pre`` has n columns of the gate and as many of up.
        in_out: The weight lies by columns.
        sums: The bias's gradient is asked for.
        bad: A row of dout and an element of ``pre`` are NaN.
    """

    m: int
    k: int
    n: int
    activation: str
    dtype: torch.dtype = torch.bfloat16
    in_out: bool = False
    gated: bool = False
    sums: bool = True
    bad: bool = False

    def make(self) -> dict[str, torch.Tensor]:
        """The tensors."""
        torch.manual_seed(0)
        weight = matrix(self.n, self.k, self.dtype, 8, self.k**-0.5).t()
        if not self.in_out:
            weight = matrix(self.k, self.n, self.dtype, 8, self.k**-0.5)
        # Rows of NaN behind a matrix that is contiguous.
        pre = torch.full((self.m + 9, self.n * (1 + self.gated)), float("nan"), dtype=self.dtype)[: self.m]
        pre[:] = torch.randn(pre.shape)
        made = {"dout": matrix(self.m, self.k, self.dtype, 8), "weight": weight, "pre": pre}
        if self.bad:
            made["dout"][7, 3] = made["pre"][9, 11] = float("nan")
        return made

    def run(self, made: dict[str, torch.Tensor]) -> Results:
        """The results by the launches."""
        product = product_gated_dact if self.gated else launch.product_dact
        found = product(
            made["dout"], made["weight"], made["pre"], self.activation, self.dtype if self.sums else None
        )
        return [result for result in found if result is not None]

    def plain(self, made: dict[str, torch.Tensor]) -> Results:
        """The results by PyTorch."""
        pre = made["pre"].clone().requires_grad_()
        gate, up = pre.chunk(2, dim=1) if self.gated else (pre, None)
        hidden = reference.ACTIVATIONS[self.activation](gate)
        hidden = hidden if up is None else hidden * up
        hidden.backward(made["dout"] @ made["weight"])
        assert pre.grad is not None
        return [pre.grad, pre.grad.sum(0)] if self.sums else [pre.grad]

    def fewer(self) -> int | None:
        """A row's bits are the same among so many."""
        return 70


@dataclass(frozen=True)
class Weight:
    """A call of ``launch.weight_grad``: (m, n) of so many tokens, the sum in so many splits.

    Attributes:
        in_out: The weight lies by columns.
    """

    tokens: int
    m: int
    n: int
    splits: int
    dtype: torch.dtype = torch.bfloat16
    in_out: bool = False

    def make(self) -> dict[str, torch.Tensor]:
        """The tensors."""
        torch.manual_seed(0)
        shape = (self.n, self.m) if self.in_out else (self.m, self.n)
        weight = torch.empty(shape, dtype=self.dtype)
        dout, x = (matrix(self.tokens, width, self.dtype, 8) for width in (self.m, self.n))
        return {"dout": dout, "x": x, "weight": weight.t() if self.in_out else weight}

    def run(self, made: dict[str, torch.Tensor]) -> Results:
        """The result by the launches."""
        with mock.patch.object(launch, "_dw_splits", return_value=self.splits):
            dw = launch.weight_grad(made["dout"], made["x"], made["weight"])
        assert dw.stride() == made["weight"].stride()
        return [dw]

    def plain(self, made: dict[str, torch.Tensor]) -> Results:
        """The result by PyTorch."""
        return [made["dout"].t() @ made["x"]]

    def fewer(self) -> int | None:
        """A weight's gradient is of all tokens."""
        return None


CALLS: dict[str, Dact | Weight] = {
    "gelu": Dact(200, 328, 528, "gelu_tanh", bad=True),
    "fp16, erf, weight (in, out)": Dact(140, 264, 528, "gelu", torch.float16, in_out=True),
    "no sums, silu": Dact(200, 256, 272, "silu", sums=False),
    "relu, 65 rows": Dact(65, 264, 528, "relu"),
    "no activation": Dact(70, 264, 272, "none"),
    "gated": Dact(200, 328, 528, "silu", gated=True, bad=True),
    "gated, fp16, weight (in, out), no sums": Dact(
        140, 264, 272, "gelu_tanh", torch.float16, in_out=True, gated=True, sums=False
    ),
    "gated, erf, 65 rows": Dact(65, 264, 528, "gelu", gated=True),
    "weight, one sum": Weight(265, 136, 648, 1),
    "weight, one sum, (in, out), fp16": Weight(400, 648, 136, 1, torch.float16, in_out=True),
    "weight, three splits": Weight(875, 136, 648, 3),
    "weight, two splits, (in, out)": Weight(530, 264, 392, 2, in_out=True),
}
# Of these are the texts into which faults are planted: a program with several tiles.
FAULTS = {
    "gelu": Dact(100, 328, 272, "relu"),
    "gated": Dact(100, 328, 272, "relu", gated=True),
    "weight": Weight(330, 72, 1160, 1),
}


def executed(
    call: Dact | Weight, made: dict[str, torch.Tensor], programs: int = PROGRAMS, **options: Any
) -> Results:
    """The call's results by the executor."""
    with (
        torch.no_grad(),
        mock.patch.object(_launch, "multiprocessors", return_value=programs),
        ptx_kernels.executed(90, **options),
    ):
        return call.run(made)


def run_calls(numbers: list[int]) -> None:
    names = list(CALLS)
    for number in numbers or range(len(names)):
        call = CALLS[names[number]]
        made = call.make()
        kernels: list[str] = []

        def done(item: _launch.Launch, kernels: list[str] = kernels) -> None:
            kernels.append(item.name)

        found = executed(call, made, done=done)
        exact = {name: value.double() for name, value in made.items()}
        for got, rounded, right in zip(found, call.plain(made), call.plain(exact), strict=True):
            assert_accurate(got, rounded, right)
        seeds = [same(found, executed(call, made, seed=seed)) for seed in (1, 2)]
        # The kernel that serves what this one does not, and this one with fewer rows. A bias's gradient is
        # summed by other rows there.
        with (
            mock.patch.object(hopper, "serves_dact", return_value=False),
            mock.patch.object(hopper, "serves_weight_grad", return_value=False),
        ):
            others = executed(call, made, done=done)
        row = {
            "call": names[number], "kernels": kernels, "orders": all(seeds),
            "as_other": same(found[:1], others[:1]),
        }  # fmt: skip
        if call.fewer() is not None:
            few = made | {name: made[name][: call.fewer()] for name in ("dout", "pre")}
            row["as_few"] = same([found[0][: call.fewer()]], executed(call, few)[:1])
        print(json.dumps(row), flush=True)


def caught(call: Dact | Weight, made: dict[str, torch.Tensor], text: str, right: Results) -> str:
    """The check that notices the changed text, in place of the first launch's."""
    launched: list[str] = []

    def changed(ptx: str, *args: Any, **kwargs: Any) -> None:
        execute(ptx if launched else text, *args, **kwargs)
        launched.append(ptx)

    try:
        with mock.patch.object(ptx_kernels, "execute", changed):
            found = executed(call, made, 1, seed=1)
    except Fault as fault:
        return fault.check
    return "" if same(found, right) else "result"


def run_faults(name: str, every: int, first: int) -> None:
    """One program takes all tiles, each of more steps than the ring has, ragged at every side."""
    call = FAULTS[name]
    made = call.make()
    texts: list[str] = []

    def noted(item: _launch.Launch) -> None:
        texts.append(_aot.compile_launch(item, 90).asm["ptx"])

    right = executed(call, made, 1, seed=1, done=noted)
    for what, text in list(ptx_attention_hopper.faults(texts[0]))[first::every]:
        print(json.dumps({"fault": what, "caught": caught(call, made, text, right)}), flush=True)


if __name__ == "__main__":
    if sys.argv[1] == "calls":
        run_calls([int(number) for number in sys.argv[2:]])
    else:
        run_faults(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
