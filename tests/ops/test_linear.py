"""The linear layers with fused epilogues, against float64."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import gptkern
from gptkern.ops import _cases, _launch
from gptkern.ops._dispatch import Backend
from gptkern.ops.linear import launch, linear, linear_act, linear_residual, reference
from gptkern.testing import DTYPES, Call, assert_accurate, check, check_values

ACTIVATIONS = ("gelu_tanh", "gelu", "relu", "silu", "none")
needs_kernels = pytest.mark.usefixtures("on_device")


def leaf(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(shape) * scale).to(dtype).requires_grad_()


def act_call(m: int, k: int, n: int, activation: str, dtype: torch.dtype = torch.float32) -> Call:
    arguments = (
        leaf(m, k, dtype=dtype),
        leaf(n, k, dtype=dtype, scale=max(k, 1) ** -0.5),
        leaf(n, dtype=dtype),
    )
    return Call(arguments, {"activation": activation})


@contextmanager
def observed() -> Iterator[list[_launch.Launch]]:
    seen: list[_launch.Launch] = []

    def keep(item: _launch.Launch) -> bool:
        seen.append(item)
        return True

    with _launch.observe(keep):
        yield seen


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@needs_kernels
def test_activations_against_float64(activation: str, dtype: torch.dtype) -> None:
    check_values(linear_act, act_call(33, 72, 40, activation, dtype))


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 17, 65), (65, 63, 1), (129, 40, 34)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@needs_kernels
def test_ragged_shapes(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    m, k, n = shape
    x, weight, bias = act_call(m, k, n, "none", dtype).args
    check_values(linear_residual, Call((x, weight, bias, leaf(m, n, dtype=dtype))))


@pytest.mark.parametrize("shape", [(0, 5, 7), (3, 0, 4), (3, 5, 0)])
@needs_kernels
def test_empty(shape: tuple[int, int, int]) -> None:
    m, k, n = shape
    x, weight, bias = act_call(m, k, n, "gelu_tanh").args
    out = linear_act(x, weight, bias)
    out.sum().backward()
    assert out.shape == (m, n)
    if k == 0:
        assert torch.allclose(out, torch.nn.functional.gelu(bias, approximate="tanh").expand(m, n))
    assert torch.equal(weight.grad, torch.zeros_like(weight))
    assert x.grad.shape == x.shape
    assert bias.grad.shape == bias.shape


@pytest.mark.slow
@needs_kernels
def test_cases(device: torch.device) -> None:
    for case in _cases.checks("linear"):
        check_values(case.op, case.make(device, torch.float32), what=case.name)


@pytest.mark.slow
@pytest.mark.parametrize("op", [linear, linear_act, linear_residual], ids=lambda op: op.__name__)
@needs_kernels
def test_registration(op: Any) -> None:
    x, weight, bias = act_call(9, 24, 16, "none").args
    arguments = (x, weight, bias, leaf(9, 16)) if op is linear_residual else (x, weight, bias)
    check(op, [arguments], dtypes=[torch.float32])


@needs_kernels
def test_opcheck_and_compile() -> None:
    x, weight, bias = act_call(5, 16, 8, "none").args
    residual = leaf(5, 8)
    torch.library.opcheck(torch.ops.gptkern.linear, (x, weight, bias, None, "silu", True))
    compiled = torch.compile(linear_residual, fullgraph=True, backend="aot_eager")
    outs = [op(x, weight, bias, residual) for op in (linear_residual, compiled)]
    grads = [torch.autograd.grad(out.sum(), (x, weight, bias, residual)) for out in outs]
    assert torch.equal(*outs)
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@needs_kernels
def test_leading_dimensions() -> None:
    x, weight, bias = leaf(3, 4, 5, 16), leaf(24, 16), leaf(24)
    check_values(linear_act, Call((x, weight, bias)))
    check_values(linear_residual, Call((x[0, 0, 0].detach(), weight, bias, leaf(24))))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@needs_kernels
def test_weights_stored_in_out(dtype: torch.dtype) -> None:
    x, stored, bias = leaf(20, 40, dtype=dtype), leaf(40, 24, dtype=dtype, scale=0.1), leaf(24, dtype=dtype)
    check_values(lambda x, stored, bias: linear_act(x, stored.t(), bias), Call((x, stored, bias)))
    weight = stored.detach().t().requires_grad_()
    linear_act(x, weight, bias).sum().backward()
    assert weight.grad.stride() == weight.stride()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@needs_kernels
def test_any_strides(dtype: torch.dtype) -> None:
    weight, bias = leaf(12, 10, dtype=dtype), leaf(24, dtype=dtype)[::2].detach()
    residual = leaf(12, 9, dtype=dtype).detach().t()
    layouts = {
        "columns": torch.randn(10, 9).to(dtype).t(),
        "every other": torch.randn(18, 20).to(dtype)[::2, ::2],
        "one row": torch.randn(1, 10).to(dtype).expand(9, 10),
        "offset by one": torch.randn(91).to(dtype)[1:].view(9, 10),
    }
    for name, x in layouts.items():
        check_values(linear_residual, Call((x, weight, bias, residual)), what=name)


@needs_kernels
def test_gradient_of_any_layout() -> None:
    x, weight = leaf(6, 8), leaf(10, 8)
    given = torch.randn(10, 6).t()
    got = torch.autograd.grad(linear(x, weight), (x, weight), given)
    assert torch.equal(got[0], torch.autograd.grad(linear(x, weight), x, given.contiguous())[0])
    linear(x, weight).sum().backward()  # a gradient of strides (0, 0)
    assert torch.allclose(x.grad, weight.detach().sum(0).expand(6, 8), atol=1e-5)


def terms(call: Call, grad: torch.Tensor) -> list[float]:
    """The sizes of the sums that ``linear_act``'s output, dx, dweight and dbias are, before terms cancel.

    Where signs are random the partial sums of n terms t are as large as ``sqrt(sum(t^2))``. Each term is off
    by an ulp of itself and each addition by half an ulp of the partial sum, whatever the order, and errors
    add up as their root: ``1 + sqrt(n) / 2`` ulps of that size. What is left after terms have cancelled says
    nothing of it. ``z = x w + bias`` is off by so much, the output by ``act'(z)`` times that, and each of the
    gradients' terms, which hold ``act'(z)``, by ``act''(z)`` times that. ``act'(z)`` itself is a sum of terms
    as large as 1, which cancel where z is negative.
    """

    def size(squares: torch.Tensor, count: int) -> torch.Tensor:
        return squares.sqrt() * (1.0 + 0.5 * count**0.5)

    x, weight, bias = (None if t is None else t.detach().double() for t in call.args)
    z = (x @ weight.t() + (0.0 if bias is None else bias)).requires_grad_()
    out = reference.ACTIVATIONS[call.kwargs["activation"]](z)
    (first,) = torch.autograd.grad(out.sum(), z, create_graph=True)
    second = torch.zeros_like(z)
    if first.requires_grad:
        (second,) = torch.autograd.grad(first.sum(), z)
    off = size(x.square() @ weight.square().t() + (0.0 if bias is None else bias.square()), x.shape[1] + 1)
    dz = (grad.double() * (first.abs().clamp(min=1.0) + second.abs() * off)).square()
    rows, outs = z.shape
    sums = [out.abs() + first.abs() * off, size(dz @ weight.square(), outs), size(dz.t() @ x.square(), rows)]
    return [value.max().item() for value in (*sums, size(dz.sum(0), rows))]


@given(
    m=st.integers(1, 40), k=st.integers(1, 40), n=st.integers(1, 40), seed=st.integers(0, 999),
    activation=st.sampled_from(ACTIVATIONS), transposed=st.booleans(), bias=st.booleans(),
)  # fmt: skip
@settings(max_examples=8, deadline=None)
@needs_kernels
def test_any_shape(m: int, k: int, n: int, seed: int, activation: str, transposed: bool, bias: bool) -> None:
    torch.manual_seed(seed)
    x, weight, shift = act_call(m, k, n, activation).args
    weight = weight.detach().t().contiguous().t().requires_grad_() if transposed else weight
    call = Call((x, weight, shift if bias else None), {"activation": activation})
    grad = torch.randn(m, n)

    def run(backend: Backend, dtype: torch.dtype) -> list[torch.Tensor]:
        leaves = [t if t is None else t.detach().to(dtype).requires_grad_() for t in call.args]
        with gptkern.backend(backend):
            out = linear_act(*leaves, **call.kwargs)
            inputs = [t for t in leaves if t is not None]
            return [out, *torch.autograd.grad(out, inputs, grad.to(dtype))]

    results = (
        run("kernel", torch.float32),
        run("reference", torch.float32),
        run("reference", torch.float64),
    )
    for name, *values, size in zip(
        ("out", "dx", "dweight", "dbias"), *results, terms(call, grad), strict=False
    ):
        assert_accurate(*values, name, terms=size)


@pytest.mark.parametrize("scale", [1e-4, 1e3])
@pytest.mark.parametrize("activation", ["gelu_tanh", "gelu", "silu"])
@needs_kernels
def test_extreme_values(activation: str, scale: float) -> None:
    x, weight, bias = act_call(5, 16, 24, activation, torch.float16).args
    x = (x.detach() * scale).requires_grad_()
    check_values(linear_act, Call((x, weight, bias), {"activation": activation}))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@needs_kernels
def test_a_bad_row_stays_alone(bad: float) -> None:
    x, weight, bias = (t.detach() for t in act_call(70, 40, 24, "none").args)
    clean = linear_act(x, weight, bias)
    x[33, 7] = bad
    out = linear_act(x, weight, bias)
    others = torch.arange(70) != 33
    assert torch.equal(out[others], clean[others])
    if bad != bad:
        assert out[33].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@needs_kernels
def test_a_row_does_not_depend_on_the_others(dtype: torch.dtype) -> None:
    """Alone, among few and among many: the sum over k runs in one order."""
    x, weight, bias = (t.detach() for t in act_call(300, 136, 48, "gelu_tanh", dtype).args)
    together = linear_act(x, weight, bias)
    for rows in (slice(7, 8), slice(40, 57), slice(100, 230)):
        assert torch.equal(linear_act(x[rows], weight, bias), together[rows])


@needs_kernels
def test_k_tile_is_one_for_all_rows_of_a_dtype() -> None:
    for arch in _launch.ARCHS:
        for kernel in ("linear", "linear_dact", "linear_dw"):
            rows = _launch.table(arch)[kernel]
            for dtype in ("half", "fp32"):
                assert len({row["BLOCK_K"] for row in rows if row["dtype"] == dtype}) == 1


@needs_kernels
def test_same_bits_twice() -> None:
    given = act_call(150, 40, 72, "gelu_tanh", torch.float16)
    outs = [linear_act(*given.args) for _ in range(2)]
    grads = [torch.autograd.grad(out, given.args, torch.ones_like(out)) for out in outs]
    assert torch.equal(outs[0], outs[1])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@needs_kernels
def test_weight_gradient_in_parts(dtype: torch.dtype) -> None:
    tokens, out, width = 600, 40, 24
    x, dout = torch.randn(tokens, width).to(dtype), torch.randn(tokens, out).to(dtype)
    for weight in (torch.empty(out, width, dtype=dtype), torch.empty(width, out, dtype=dtype).t()):
        with observed() as seen:
            dw = launch.weight_grad(dout, x, weight)
        assert [item.name for item in seen] == ["linear_dw", "column_sum"]
        assert seen[0].grid[1] > 1
        assert dw.stride() == weight.stride()
        exact = dout.double().t() @ x.double()
        plain = (dout.t() @ x).double()
        ulp = torch.finfo(dtype).eps * exact.abs().max()
        assert (dw.double() - exact).abs().max() <= 2 * (plain - exact).abs().max() + ulp


def test_parts_leave_out_no_token() -> None:
    for tiles in (1, 8, 72, 144, 4000):
        for k_tiles in (0, 1, 5, 9, 1024):
            assert 1 <= launch._dw_splits(tiles, k_tiles) <= max(1, k_tiles)


@needs_kernels
def test_bias_gradient_over_many_rows() -> None:
    x = torch.randn(1000, 70)
    assert torch.allclose(launch.column_sum(x, torch.float32), x.double().sum(0).float(), atol=1e-4)


@needs_kernels
def test_persistent_programs_take_several_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    tiles = {"BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_K": 16, "STORE_N": 16, "GROUP_M": 3}
    row = {**tiles, "PERSISTENT": True, "TMA": True, "num_warps": 4, "num_stages": 2}
    monkeypatch.setattr(_launch, "config", lambda *_, **__: row)
    monkeypatch.setattr(_launch, "multiprocessors", lambda device: 5)
    x, weight = torch.randn(75, 24), torch.randn(200, 24)
    with observed() as seen:
        out = linear(x, weight)
    assert seen[0].grid == (5,)
    assert torch.allclose(out, x @ weight.t(), atol=1e-4)


@pytest.mark.parametrize("step", [2**30 + 8, 2**30 + 9], ids=["descriptors", "pointers"])
@needs_kernels
def test_rows_past_2_to_the_31(step: int) -> None:
    """A row's offset in elements passes 2^31, its stride does not; only three rows of memory are touched."""
    far = torch.empty(3 * step, dtype=torch.float16).as_strided((3, 8), (step, 1))
    x, residual = torch.randn(3, 8).half(), torch.randn(3, 8).half()
    weight = torch.randn(8, 8).half()
    expected = linear_residual(x, weight, None, residual)
    assert torch.equal(linear_residual(far.copy_(x), weight, None, residual), expected)
    assert torch.equal(linear_residual(x, weight, None, far.copy_(residual)), expected)


@needs_kernels
def test_residual_in_fp32() -> None:
    x, weight, bias = act_call(20, 24, 32, "none", torch.float16).args
    residual = leaf(20, 32)
    out = linear_residual(x, weight, bias, residual)
    out.sum().backward()
    assert out.dtype == residual.grad.dtype == torch.float32
    assert x.grad.dtype == weight.grad.dtype == torch.float16
    exact = residual.double() + x.double() @ weight.double().t() + bias.double()
    assert (out - exact).abs().max() < 1e-5


@needs_kernels
def test_autocast(device: torch.device) -> None:
    x, weight, bias = act_call(9, 24, 16, "none").args
    with torch.autocast(device.type, torch.bfloat16):
        out = linear_act(x, weight, bias)
        compiled = torch.compile(linear_act, fullgraph=True, backend="aot_eager")(x, weight, bias)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, compiled)
    out.sum().backward()
    assert x.grad.dtype == weight.grad.dtype == torch.float32


@needs_kernels
def test_only_what_is_needed_is_computed() -> None:
    x, weight, bias = act_call(5, 8, 16, "relu").args
    with observed() as seen:
        linear_act(x.detach(), weight, bias.detach()).sum().backward()
    assert [item.name for item in seen] == ["linear", "column_sum", "linear_dw"]


def test_reference_operator_without_kernels() -> None:
    x, weight, bias = act_call(6, 8, 10, "gelu_tanh", torch.float64).args
    residual = leaf(6, 10, dtype=torch.float64)
    with gptkern.backend("reference"):
        for activation in ACTIVATIONS:
            for other in (None, residual):
                torch.autograd.gradcheck(
                    lambda *t, a=activation: torch.ops.gptkern.linear(*t, a, a != "none")[0],
                    (x, weight, bias, other),
                )


X, W, B = torch.zeros(4, 8), torch.zeros(6, 8), torch.zeros(6)
WRONG: list[tuple[Any, type[Exception], str]] = [
    (lambda: linear_act(X, W, B, activation="gelu_fast"), ValueError, "activation is 'gelu_fast'"),
    (lambda: linear_act([1.0], W, B), TypeError, "x is list"),
    (lambda: linear_act(X.int(), W, B), TypeError, "x is int32"),
    (lambda: linear_act(X, W.half(), B), TypeError, "weight is float16"),
    (lambda: linear_act(X, torch.zeros(8, 6), B), ValueError, r"weight has shape \(8, 6\)"),
    (lambda: linear_act(X, torch.zeros(6), B), ValueError, "2 dimensions"),
    (lambda: linear_act(X, W, torch.zeros(8)), ValueError, r"bias has shape \(8,\)"),
    (lambda: linear_act(torch.zeros(()), W, B), ValueError, "x has shape"),
    (lambda: linear_residual(X, W, B, torch.zeros(4, 8)), ValueError, "residual has shape"),
    (lambda: linear_residual(X, W, B, torch.zeros(4, 6).half()), TypeError, "residual is float16"),
    (lambda: linear_residual(X, W, B, None), TypeError, "residual is NoneType"),
    (lambda: linear_act(X, W.to("meta"), B), ValueError, "different devices"),
]


@pytest.mark.parametrize(("wrong", "error", "message"), WRONG)
def test_wrong_arguments(wrong: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        wrong()


@needs_kernels
def test_rows_that_do_not_merge_are_refused() -> None:
    with pytest.raises(ValueError, match=r"x has shape .* must merge into one"):
        linear_act(torch.zeros(3, 4, 8).transpose(0, 1), torch.zeros(6, 8), None)
