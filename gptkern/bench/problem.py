"""Problems to measure, and the providers that each solve them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

Inputs = tuple[Any, ...]
Provider = Callable[..., Any]

# Largest ||out - ref|| / ||ref|| that counts as solved; bf16 rounds at 2^-9, fp16 at 2^-12.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 2e-2}


class Unavailable(Exception):
    """A provider that cannot run here; the message says why."""


@dataclass
class Problem:
    """One operation on one shape and dtype.

    Attributes:
        suite: The suite it belongs to, named for the op.
        shape: What tells it from the others, for people.
        dtype: Of its inputs.
        inputs: Fresh random inputs on a device; tensors that require grad are differentiated in
            problems with ``backward``.
        providers: By name; each takes the inputs and returns a tensor or a tuple of them. A
            provider may raise ``Unavailable``.
        reference: The same in any precision; called on the inputs widened to float64 where they
            are floating-point, and so the judge of every provider.
        bytes_moved: The fewest bytes to read and write.
        flops: Floating-point operations, causal attention counted half.
        backward: Time the gradients instead of the forward pass.
        exact: Results must equal the reference's, not only be near them.
        comparable: (result, inputs) -> the tensors to compare instead of the result, for outputs with more
            than one right value, such as a random draw.
        restart: Takes a provider's name and takes the state that its calls change back to what the first
            call found, for outputs that depend on the calls before; None where no output does.
    """

    suite: str
    shape: str
    dtype: torch.dtype
    inputs: Callable[[torch.device], Inputs]
    providers: dict[str, Provider]
    reference: Provider
    bytes_moved: float = 0.0
    flops: float = 0.0
    backward: bool = False
    exact: bool = False
    comparable: Callable[[Any, Inputs], Any] = lambda result, inputs: result
    restart: Callable[[str], None] | None = None

    @property
    def name(self) -> str:
        """``suite/shape/dtype``, with the direction where it is backward."""
        kind = str(self.dtype).removeprefix("torch.")
        return f"{self.suite}/{self.shape}/{kind}" + ("/backward" if self.backward else "")


def outputs(result: Any) -> list[torch.Tensor]:
    """A provider's result as a list of tensors."""
    return list(result) if isinstance(result, (tuple, list)) else [result]


def widened(inputs: Inputs) -> Inputs:
    """Copies in float64, for the reference."""
    return tuple(
        value.detach().double().requires_grad_(value.requires_grad)
        if isinstance(value, torch.Tensor) and value.is_floating_point()
        else value
        for value in inputs
    )


def gradient_call(provider: Provider, inputs: Inputs, seed: int = 0) -> Callable[[], list[torch.Tensor]]:
    """A call that computes ``provider``'s gradients once more, the forward pass done before."""
    results = [t for t in outputs(provider(*inputs)) if t.requires_grad]
    leaves = [t for t in inputs if isinstance(t, torch.Tensor) and t.requires_grad]
    generator = torch.Generator(device="cpu").manual_seed(seed)
    seeds = [torch.randn(t.shape, generator=generator).to(t) for t in results]
    return lambda: list(torch.autograd.grad(results, leaves, seeds, retain_graph=True))


def call_of(problem: Problem, provider: Provider, inputs: Inputs) -> Callable[[], list[torch.Tensor]]:
    """The call that is timed: the forward pass, or with ``backward`` the gradients alone."""
    if problem.backward:
        return gradient_call(provider, inputs)
    return lambda: outputs(provider(*inputs))


def expected_of(problem: Problem, inputs: Inputs) -> list[torch.Tensor]:
    """The reference's result in float64, with which every provider's is compared."""
    return call_of(problem, problem.reference, widened(inputs))()


def error(problem: Problem, provider: Provider, inputs: Inputs, expected: list[torch.Tensor]) -> float:
    """The error of one call: see ``difference``."""
    return difference(problem, call_of(problem, provider, inputs)(), inputs, expected)


def difference(
    problem: Problem, result: list[torch.Tensor], inputs: Inputs, expected: list[torch.Tensor]
) -> float:
    """Largest relative error over the outputs: ||out - ref|| / ||ref||, inf where shapes or NaN differ."""
    got = outputs(problem.comparable(result, inputs))
    if len(got) != len(expected):
        return math.inf
    return max(
        (_relative_error(a, b, problem.exact) for a, b in zip(got, expected, strict=True)), default=math.inf
    )


def _relative_error(got: torch.Tensor, expected: torch.Tensor, exact: bool) -> float:
    if got.shape != expected.shape:
        return math.inf
    if exact or not got.is_floating_point():
        return 0.0 if torch.equal(got, expected.to(got.dtype)) else math.inf
    difference = (got.double() - expected).norm() / expected.norm().clamp_min(1e-30)
    return float(difference) if math.isfinite(difference) else math.inf
