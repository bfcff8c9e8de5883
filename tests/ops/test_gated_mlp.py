"""The gated perceptron against float64: values, gradients, activations, layouts, registration."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gptkern import backend
from gptkern.ops import _cases, gated_mlp
from gptkern.testing import DTYPES, Call, check, check_values

needs_kernels = pytest.mark.usefixtures("on_device")
CHECKS = _cases.checks("gated_mlp")


def call(tokens: int, width: int, hidden: int, dtype: torch.dtype = torch.float32, **settings: Any) -> Call:
    def leaf(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(shape) * scale).to(dtype).requires_grad_()

    arguments = (
        leaf(tokens, width),
        leaf(2 * hidden, width, scale=width**-0.5),
        leaf(2 * hidden),
        leaf(width, hidden, scale=hidden**-0.5),
        leaf(width),
    )
    return Call(arguments, {"residual": leaf(tokens, width), **settings})


def grads(given: Call, **settings: Any) -> tuple[torch.Tensor, ...]:
    inputs = (*given.args, given.kwargs["residual"])
    out = gated_mlp(*given.args, **{**given.kwargs, **settings})
    return out, *torch.autograd.grad(out, inputs, torch.ones_like(out))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@needs_kernels
def test_against_float64(dtype: torch.dtype) -> None:
    check_values(gated_mlp, call(17, 24, 40, dtype))


@pytest.mark.parametrize("case", CHECKS, ids=[case.name for case in CHECKS])
@needs_kernels
def test_cases(case: Any, device: torch.device) -> None:
    check_values(case.op, case.make(device, torch.float32), what=case.name)


@pytest.mark.slow
@needs_kernels
def test_registration() -> None:
    check(gated_mlp, [call(9, 16, 24)], dtypes=[torch.float32])


@pytest.mark.parametrize("implementation", ["kernel", "reference"])
@needs_kernels
def test_opcheck_and_compile(implementation: Any) -> None:
    given = call(5, 8, 16)
    operands = (*given.args, given.kwargs["residual"])
    with backend(implementation):
        if implementation == "kernel":  # the reference leaves what it saves uninitialised
            torch.library.opcheck(torch.ops.gptkern.gated_mlp, (*operands, "silu", True))
        compiled = torch.compile(gated_mlp, fullgraph=True, backend="aot_eager")
        out = compiled(*given.args, **given.kwargs)
        expected = grads(given)
        got = torch.autograd.grad(out, operands, torch.ones_like(out))
        for a, b in zip((out, *got), expected, strict=True):
            assert torch.allclose(a, b, rtol=1e-5, atol=1e-5)


@needs_kernels
def test_recomputed_is_the_same_bit_for_bit() -> None:
    given = call(70, 24, 40, torch.float16)
    assert all(torch.equal(a, b) for a, b in zip(grads(given), grads(given, recompute=True), strict=True))


@needs_kernels
def test_weights_stored_in_out() -> None:
    x, w_fc, b_fc, w_proj, b_proj = (t.detach() for t in call(9, 16, 24, torch.float16).args)
    expected = gated_mlp(x, w_fc, b_fc, w_proj, b_proj)
    stored = [w.t().contiguous().t().requires_grad_() for w in (w_fc, w_proj)]
    out = gated_mlp(x, stored[0], b_fc, stored[1], b_proj)
    assert torch.equal(out, expected)
    out.sum().backward()
    assert all(w.grad is not None and w.grad.stride() == w.stride() for w in stored)


@needs_kernels
def test_a_row_does_not_depend_on_the_others() -> None:
    operands = [t.detach() for t in call(140, 24, 72, torch.float16).args]
    together = gated_mlp(*operands)
    for rows in (slice(3, 4), slice(20, 37), slice(60, 140)):
        assert torch.equal(gated_mlp(operands[0][rows], *operands[1:]), together[rows])


@needs_kernels
def test_a_bad_row_stays_alone() -> None:
    operands = [t.detach() for t in call(70, 8, 16).args]
    clean = gated_mlp(*operands)
    operands[0][41, 3] = float("nan")
    out = gated_mlp(*operands)
    others = torch.arange(70) != 41
    assert torch.equal(out[others], clean[others])
    assert out[41].isnan().all()


def test_bad_input_is_named() -> None:
    x, w_fc, b_fc, w_proj, b_proj = (t.detach() for t in call(3, 8, 6).args)
    with pytest.raises(ValueError, match=r"gated_mlp: w_fc has 11 rows; an even number is needed"):
        gated_mlp(x, w_fc[:11], None, w_proj, b_proj)
    with pytest.raises(ValueError, match=r"gated_mlp: w_proj has shape \(8, 6\); \(out, 5\) is needed"):
        gated_mlp(x, w_fc[:10], None, w_proj, b_proj)
    with pytest.raises(ValueError, match=r"gated_mlp: activation is 'swish'"):
        gated_mlp(x, w_fc, b_fc, w_proj, b_proj, activation="swish")
