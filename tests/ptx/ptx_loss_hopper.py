"""The loss's kernels for Hopper through the executor: calls, orders of blocks, faults planted in their text.

    python tests/ptx/ptx_loss_hopper.py calls [NUMBER...]
    python tests/ptx/ptx_loss_hopper.py orders SEEDS
    python tests/ptx/ptx_loss_hopper.py faults KERNEL EVERY FIRST

Needs a process in which kernels are compiled, not interpreted. Prints a line of JSON for each call, order or
fault; of the faults each EVERYth, from the FIRST on.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import ptx_attention_hopper
import ptx_recorded
import torch

from gptkern import backend
from gptkern.ops import _launch, linear_cross_entropy
from gptkern.ops.linear_cross_entropy import launch
from gptkern.testing import assert_accurate
from gptkern.testing.ptx import Fault
from gptkern.testing.ptx import kernels as ptx_kernels

# Programs of a launch, so few that each has several tiles, and one has fewer than the others.
PROGRAMS = 2
FEW = 70
NAN_TOKEN = 5


@dataclass(frozen=True)
class Loss:
    """A call of ``linear_cross_entropy``.

    Attributes:
        room: Elements from one of the rows to the next beyond the width, all of them NaN.
        chunk: Tokens of a chunk.
        gradients: Whether hidden states, weights and bias need theirs; without, a token is NaN.
    """

    tokens: int
    width: int
    vocab: int
    dtype: torch.dtype = torch.bfloat16
    room: int = 0
    bias: bool = False
    chunk: int = 8192
    gradients: bool = True
    settings: dict[str, Any] = field(default_factory=dict)

    def make(self) -> dict[str, Any]:
        """The arguments; of the targets each fourth is ignored."""
        torch.manual_seed(0)
        hidden, weight = self._rows(self.tokens, 1.0), self._rows(self.vocab, 3 * self.width**-0.5)
        if not self.gradients:
            hidden[NAN_TOKEN] = float("nan")
        targets = torch.randint(self.vocab, (self.tokens,))
        targets[:2] = torch.tensor([self.vocab - 1, 0])[: self.tokens]
        targets[3::4] = -100
        call = {"hidden": hidden, "weight": weight, "targets": targets, **self.settings}
        if self.bias:
            call["bias"] = torch.randn(self.vocab)
        return call

    def _rows(self, rows: int, scale: float) -> torch.Tensor:
        whole = torch.full((rows, self.width + self.room), float("nan"), dtype=self.dtype)
        whole[:, : self.width] = scale * torch.randn(rows, self.width)
        return whole[:, : self.width]


EACH = {"reduction": "none"}
CALLS = {
    "ragged": Loss(300, 264, 600),
    "a loss a token, rows apart": Loss(200, 328, 523, room=8, settings=EACH),
    "fp16, smoothed, bias": Loss(270, 264, 300, torch.float16, bias=True, settings={"label_smoothing": 0.1}),
    "chunks": Loss(520, 264, 270, chunk=256, bias=True, settings={"z_loss": 1e-2, "reduction": "sum"}),
    "all at once, a loss a token": Loss(
        140, 264, 530, bias=True, settings={**EACH, "label_smoothing": 0.2, "z_loss": 1e-2}
    ),
    "no gradients, a token NaN": Loss(200, 264, 600, gradients=False, settings=EACH),
    "one token": Loss(1, 256, 256, settings=EACH),
}  # fmt: skip

Results = list[torch.Tensor]


def results(call: dict[str, Any], gradients: bool, dtype: torch.dtype | None = None) -> Results:
    """Loss, gradients of hidden states, weight and bias; in ``dtype``, or as given."""
    given = dict(call)
    for name, value in call.items():
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            given[name] = value.detach() if dtype is None else value.to(dtype)
    leaves = [given[name] for name in ("hidden", "weight", "bias") if gradients and name in given]
    for leaf in leaves:
        leaf.requires_grad_()
    loss = linear_cross_entropy(**given)
    if not leaves:
        return [loss]
    upstream = (0.5 + torch.arange(loss.numel()) % 7 / 4).to(loss.dtype).view(loss.shape)
    return [loss.detach(), *torch.autograd.grad(loss, leaves, upstream)]


def executed(
    call: dict[str, Any], gradients: bool, programs: int = PROGRAMS, chunk: int = 8192, **options: Any
) -> Results:
    """The call's results by the executor; memory that nobody has written is NaN."""
    torch.use_deterministic_algorithms(True)
    try:
        with (
            mock.patch.object(_launch, "multiprocessors", return_value=programs),
            mock.patch.object(launch, "chunk_tokens", return_value=chunk),
            ptx_kernels.executed(90, **options),
        ):
            return results(call, gradients)
    finally:
        torch.use_deterministic_algorithms(False)


def same(some: Results, others: Results) -> bool:
    """True if they are the same bits, where they are numbers, and NaN in the same places."""
    return all(
        torch.equal(a.nan_to_num(nan=7.0), b.nan_to_num(nan=7.0)) for a, b in zip(some, others, strict=True)
    )


def as_few(call: dict[str, Any], found: Results) -> bool:
    """True if the first tokens' losses and gradients have the same bits without the other tokens."""
    few = call | {name: call[name][:FEW] for name in ("hidden", "targets")}
    got = executed(few, len(found) > 1)
    of_tokens = [i for i, result in enumerate(found) if result.shape[:1] == call["targets"].shape]
    return same([found[i][:FEW] for i in of_tokens], [got[i] for i in of_tokens])


def run_calls(numbers: list[int]) -> None:
    names = list(CALLS)
    for number in numbers or range(len(names)):
        spec = CALLS[names[number]]
        call = spec.make()
        kernels: list[str] = []

        def noted(item: _launch.Launch, kernels: list[str] = kernels) -> None:
            kernels.append(item.name)

        found = executed(call, spec.gradients, chunk=spec.chunk, done=noted)
        with backend("reference"):
            rounded = results(call, spec.gradients)
            exact = results(call, spec.gradients, torch.float64)
        for index, (got, plain, right) in enumerate(zip(found, rounded, exact, strict=True)):
            assert_accurate(got, plain, right, f"{names[number]}: result {index}")
        each = spec.settings.get("reduction") == "none"
        same_bits = as_few(call, found) if each else None
        row = {"call": names[number], "kernels": sorted(set(kernels)), "as_few": same_bits}
        print(json.dumps(row), flush=True)


def run_orders(seeds: int) -> None:
    """Several tiles a program, three programs."""
    call = Loss(300, 264, 300).make()
    first = executed(call, True, 3)
    for seed in range(1, seeds + 1):
        print(json.dumps({"seed": seed, "same": same(first, executed(call, True, 3, seed=seed))}), flush=True)


def caught(launch: ptx_recorded.Recorded, text: str, right: Results) -> str:
    """The check that notices the changed text."""
    try:
        after = launch.again(text, seed=1)
    except Fault as fault:
        return fault.check
    return "" if same(after, right) else "result"


def run_faults(kernel: str, every: int, first: int) -> None:
    """A program with several tiles of more pairs than the ring has, ragged at every side."""
    call = Loss(300, 264, 300).make()
    with mock.patch.object(_launch, "multiprocessors", return_value=1):
        launches = ptx_recorded.recorded(lambda: results(call, True), 90)
    (launch,) = (item for item in launches if item.name == kernel)
    right = launch.again(seed=1)
    for what, text in list(ptx_attention_hopper.faults(launch.text))[first::every]:
        print(json.dumps({"fault": what, "caught": caught(launch, text, right)}), flush=True)


if __name__ == "__main__":
    if sys.argv[1] == "calls":
        run_calls([int(number) for number in sys.argv[2:]])
    elif sys.argv[1] == "orders":
        run_orders(int(sys.argv[2]))
    else:
        run_faults(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
