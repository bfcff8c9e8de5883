"""The two-layer perceptron, against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import gptkern
from gptkern.ops import _cases, _launch
from gptkern.ops.gelu_mlp import gelu_mlp
from gptkern.testing import DTYPES, Call, check, check_values

ACTIVATIONS = ("gelu_tanh", "gelu", "relu", "silu", "none")
needs_kernels = pytest.mark.usefixtures("on_device")


def call(tokens: int, width: int, hidden: int, dtype: torch.dtype = torch.float32, **settings: Any) -> Call:
    def leaf(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(shape) * scale).to(dtype).requires_grad_()

    arguments = (
        leaf(tokens, width),
        leaf(hidden, width, scale=width**-0.5),
        leaf(hidden),
        leaf(width, hidden, scale=hidden**-0.5),
        leaf(width),
    )
    return Call(arguments, {"residual": leaf(tokens, width), **settings})


def grads(given: Call, **settings: Any) -> tuple[torch.Tensor, ...]:
    inputs = (*given.args, given.kwargs["residual"])
    out = gelu_mlp(*given.args, **{**given.kwargs, **settings})
    return out, *torch.autograd.grad(out, inputs, torch.ones_like(out))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@needs_kernels
def test_against_float64(dtype: torch.dtype) -> None:
    check_values(gelu_mlp, call(17, 24, 40, dtype))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@needs_kernels
def test_activations(activation: str) -> None:
    check_values(gelu_mlp, call(5, 8, 33, activation=activation))


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 17, 65), (130, 9, 36)])
@needs_kernels
def test_ragged_shapes(shape: tuple[int, int, int]) -> None:
    check_values(gelu_mlp, call(*shape, torch.float16))


@needs_kernels
def test_no_tokens() -> None:
    out, dx, dw_fc, *_ = grads(call(0, 8, 16))
    assert out.shape == dx.shape == (0, 8)
    assert torch.equal(dw_fc, torch.zeros(16, 8))


@pytest.mark.slow
@needs_kernels
def test_cases(device: torch.device) -> None:
    for case in _cases.checks("gelu_mlp"):
        check_values(case.op, case.make(device, torch.float32), what=case.name)


@pytest.mark.slow
@needs_kernels
def test_registration() -> None:
    check(gelu_mlp, [call(9, 16, 24)], dtypes=[torch.float32])


@needs_kernels
def test_opcheck_and_compile() -> None:
    given = call(5, 8, 16)
    operands = (*given.args, given.kwargs["residual"])
    torch.library.opcheck(torch.ops.gptkern.gelu_mlp, (*operands, "gelu_tanh", True))
    compiled = torch.compile(gelu_mlp, fullgraph=True, backend="aot_eager")
    out = compiled(*given.args, **given.kwargs)
    expected = grads(given)
    assert torch.equal(out, expected[0])
    got = torch.autograd.grad(out, operands, torch.ones_like(out))
    assert all(torch.equal(a, b) for a, b in zip(got, expected[1:], strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@needs_kernels
def test_recomputed_is_the_same_bit_for_bit(dtype: torch.dtype) -> None:
    given = call(70, 24, 40, dtype)
    assert all(torch.equal(a, b) for a, b in zip(grads(given), grads(given, recompute=True), strict=True))


@needs_kernels
def test_what_is_kept_for_backward() -> None:
    given = call(6, 8, 32)
    kept: list[torch.Size] = []

    def pack(value: torch.Tensor) -> torch.Tensor:
        kept.append(value.shape)
        return value

    for recompute, hidden_layers in ((False, 2), (True, 0)):
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
            gelu_mlp(*given.args, **given.kwargs, recompute=recompute)
        assert kept.count(torch.Size((6, 32))) == hidden_layers


@needs_kernels
def test_weights_stored_in_out() -> None:
    x, w_fc, b_fc, w_proj, b_proj = (t.detach() for t in call(9, 16, 24, torch.float16).args)
    expected = gelu_mlp(x, w_fc, b_fc, w_proj, b_proj)
    stored = [w.t().contiguous().t().requires_grad_() for w in (w_fc, w_proj)]
    out = gelu_mlp(x, stored[0], b_fc, stored[1], b_proj)
    assert torch.equal(out, expected)
    out.sum().backward()
    assert all(w.grad.stride() == w.stride() for w in stored)


@needs_kernels
def test_a_row_does_not_depend_on_the_others() -> None:
    given = call(140, 24, 72, torch.float16)
    operands = [t.detach() for t in given.args]
    together = gelu_mlp(*operands)
    for rows in (slice(3, 4), slice(20, 37), slice(60, 140)):
        assert torch.equal(gelu_mlp(operands[0][rows], *operands[1:]), together[rows])


@needs_kernels
def test_a_bad_row_stays_alone() -> None:
    operands = [t.detach() for t in call(70, 8, 16).args]
    clean = gelu_mlp(*operands)
    operands[0][41, 3] = float("nan")
    out = gelu_mlp(*operands)
    others = torch.arange(70) != 41
    assert torch.equal(out[others], clean[others])
    assert out[41].isnan().all()


@needs_kernels
def test_same_bits_twice() -> None:
    given = call(130, 16, 24, torch.float16)
    assert all(torch.equal(a, b) for a, b in zip(grads(given), grads(given), strict=True))


@needs_kernels
def test_launches() -> None:
    given = call(5, 8, 16)
    names: list[str] = []

    def keep(item: _launch.Launch) -> bool:
        names.append(item.name)
        return True

    with _launch.observe(keep):
        grads(given)
    assert names[:2] == ["linear", "linear"]
    assert sorted(names[2:]) == [
        "column_sum", "column_sum", "linear", "linear_dact", "linear_dw", "linear_dw",
    ]  # fmt: skip


@needs_kernels
def test_autocast_with_the_residual_in_fp32(device: torch.device) -> None:
    given = call(5, 8, 16)
    with torch.autocast(device.type, torch.bfloat16):
        out = gelu_mlp(*given.args, **given.kwargs)
        inner = gelu_mlp(*given.args)
    assert (out.dtype, inner.dtype) == (torch.float32, torch.bfloat16)
    out.sum().backward()
    assert all(t.grad.dtype == torch.float32 for t in given.args)


def test_reference_operator_without_kernels() -> None:
    given = call(4, 6, 8, torch.float64)
    operands = (*given.args, given.kwargs["residual"])
    with gptkern.backend("reference"):
        torch.autograd.gradcheck(lambda *t: torch.ops.gptkern.gelu_mlp(*t, "gelu_tanh", True)[0], operands)


X, W1, W2 = torch.zeros(4, 8), torch.zeros(16, 8), torch.zeros(8, 16)
WRONG: list[tuple[Any, type[Exception], str]] = [
    (lambda: gelu_mlp(X, W1, None, W2, None, activation="swish"), ValueError, "activation is 'swish'"),
    (lambda: gelu_mlp(X, W2, None, W1, None), ValueError, r"w_fc has shape \(8, 16\)"),
    (lambda: gelu_mlp(X, W1, None, W1, None), ValueError, r"w_proj has shape \(16, 8\)"),
    (lambda: gelu_mlp(X, W1, torch.zeros(8), W2, None), ValueError, r"b_fc has shape \(8,\)"),
    (lambda: gelu_mlp(X, W1, None, W2, torch.zeros(4)), ValueError, r"b_proj has shape \(4,\)"),
    (lambda: gelu_mlp(X, W1, None, W2.half(), None), TypeError, "w_proj is float16"),
    (lambda: gelu_mlp(X, W1, None, W2, None, residual=X[:2]), ValueError, "residual has shape"),
    (lambda: gelu_mlp(None, W1, None, W2, None), TypeError, "x is NoneType"),
]


@pytest.mark.parametrize(("wrong", "error", "message"), WRONG)
def test_wrong_arguments(wrong: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        wrong()
