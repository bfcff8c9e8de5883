"""Layer norm, and the residual addition before it, against float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from norm_cases import add_layer_norm, call, few_programs, grid, layer_norm, leaf

import gptkern
from gptkern.ops import _cases, _launch
from gptkern.ops.layer_norm import launch
from gptkern.testing import DTYPES, Call, assert_accurate, check, check_values, norm_terms

OPS = (layer_norm, add_layer_norm)
needs_kernels = pytest.mark.usefixtures("on_device")


@pytest.mark.parametrize(("width", "dtype"), grid())
@pytest.mark.parametrize("op", OPS)
@needs_kernels
def test_against_float64(op: Any, width: int, dtype: torch.dtype) -> None:
    check_values(op, call(op, 3, width, dtype=dtype))


@pytest.mark.parametrize(
    "values",
    [
        {"scale": 1e4},
        {"scale": 1.0, "shift": 1e4},
        {"scale": 1e-4},
        {"scale": 0.0, "shift": 3.0},
        {"scale": 1.0, "shift": 3e4},
    ],
    ids=["large", "far from 0", "small", "constant", "near the fp16 limit"],
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS)
@needs_kernels
def test_extreme_values(op: Any, dtype: torch.dtype, values: dict[str, float]) -> None:
    check_values(op, call(op, 2, 3, 200, dtype=dtype, **values))


@needs_kernels
def test_checks(device: torch.device) -> None:
    for case in _cases.checks("layer_norm"):
        check_values(case.op, case.make(device, torch.float32), what=case.name)


@pytest.mark.parametrize("op", OPS)
@needs_kernels
def test_registration(op: Any) -> None:
    check(op, [call(op, 2, 3, 65, dtype=torch.float32)], dtypes=[torch.float32])


def _all(op: Any, given: Call) -> list[torch.Tensor]:
    results = _cases.tensors(op(*given.args, **given.kwargs))
    grads = [torch.linspace(-1, 1, t.numel()).view_as(t).to(t) for t in results]
    return results + list(torch.autograd.grad(results, given.args, grads))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("width", [64, 300, pytest.param(8200, marks=pytest.mark.slow)])
@needs_kernels
def test_rows_do_not_depend_on_their_number(op: Any, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    given = call(op, 40, width, dtype=torch.bfloat16)
    many = _all(op, given)
    with few_programs(monkeypatch):
        few = _all(op, given)
    rows = 3 if op is layer_norm else 5
    by_row = [t for t in range(len(many)) if many[t].dim() == 2]
    for index in by_row:
        assert torch.equal(many[index], few[index])
    with torch.no_grad():
        alone = _cases.tensors(op(*(t[7:8] if t.dim() == 2 else t for t in given.args)))
    for whole, one in zip(many, alone, strict=False):
        assert torch.equal(whole[7:8], one)
    assert len(by_row) == rows - 1
    check_values(op, given, what="many programs")
    with few_programs(monkeypatch):
        check_values(op, given, what="few programs")


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("width", [65, 8200])
@needs_kernels
def test_same_inputs_give_same_bits(op: Any, width: int) -> None:
    given = call(op, 9, width, dtype=torch.float32)
    for first, second in zip(_all(op, given), _all(op, given), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("width", [17, pytest.param(16640, marks=pytest.mark.slow)])
@needs_kernels
def test_nan_stays_in_its_row(bad: float, width: int) -> None:
    given = call(add_layer_norm, 6, width, dtype=torch.float32)
    clean = _all(add_layer_norm, given)
    given.args[0].data[2, 5] = bad
    dirty = _all(add_layer_norm, given)
    others = torch.arange(6) != 2
    for before, after in zip(clean[:4], dirty[:4], strict=True):
        assert torch.equal(before[others], after[others])
    assert dirty[0][2].isnan().all()
    assert dirty[1][2].isfinite().sum() == width - 1
    assert dirty[4].isnan().all()  # the weight's gradient has a share of every row


@pytest.mark.parametrize("width", [1, 65, 768, 16640])
@needs_kernels
def test_dropout_is_the_same_backward(width: int) -> None:
    x, residual, weight, bias = call(add_layer_norm, 12, width, dtype=torch.float32).args
    x.data.copy_(x.data.abs() + 0.5)
    normed, total = add_layer_norm(x, residual, weight, bias, dropout_p=0.25)
    kept = (total - residual).detach() != 0
    torch.testing.assert_close(total - residual, torch.where(kept, x / 0.75, 0.0), rtol=1e-5, atol=1e-5)
    with gptkern.backend("reference"):
        torch.testing.assert_close(normed, layer_norm(total, weight, bias), rtol=1e-5, atol=1e-5)
    d_normed, d_total = torch.randn(2, 12, width)
    dx, d_residual, d_weight, d_bias = torch.autograd.grad(
        [normed, total], [x, residual, weight, bias], [d_normed, d_total]
    )
    plain_x, plain_residual, plain_weight, plain_bias = (
        t.detach().requires_grad_() for t in (x, residual, weight, bias)
    )
    plain_total = plain_residual + torch.where(kept, plain_x / 0.75, 0.0)
    plain = torch.autograd.grad(
        [F.layer_norm(plain_total, (width,), plain_weight, plain_bias), plain_total],
        [plain_x, plain_residual, plain_weight, plain_bias],
        [d_normed, d_total],
    )
    for got, expected in zip((dx, d_residual, d_weight, d_bias), plain, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def _mask(rows: int, width: int, p: float) -> torch.Tensor:
    x, weight = torch.ones(rows, width), torch.ones(width)
    return add_layer_norm(x, torch.zeros(rows, width), weight, dropout_p=p)[1] != 0


@needs_kernels
def test_dropout_follows_seed_and_position_alone() -> None:
    masks = {}
    for width in (40, 1000, 16640):
        torch.manual_seed(3)
        masks[width] = _mask(20, width, 0.4)
    assert torch.equal(masks[40], masks[1000][:, :40])
    assert torch.equal(masks[1000], masks[16640][:, :1000])
    assert not torch.equal(_mask(20, 40, 0.4), masks[40])
    kept = masks[16640].float()
    deviation = math.sqrt(0.4 * 0.6 / kept.numel())
    assert abs(kept.mean().item() - 0.6) < 5 * deviation
    # Neighbouring columns share a Philox call, neighbouring rows a counter word: they are independent still.
    centered = kept - 0.6
    for shifted in (centered.roll(1, 1), centered.roll(8, 1), centered.roll(1, 0)):
        assert abs((centered * shifted).mean().item()) < 5 * 0.24 / math.sqrt(kept.numel())


@pytest.mark.parametrize("used", ["normed", "new_residual"])
@needs_kernels
def test_one_result_alone_is_differentiated(used: str) -> None:
    def one(*args: torch.Tensor) -> torch.Tensor:
        return add_layer_norm(*args)[("normed", "new_residual").index(used)]

    check_values(one, call(add_layer_norm, 4, 33, dtype=torch.float32))


@pytest.mark.parametrize("trained", [(0,), (1,), (2,), (3,), (2, 3), (0, 2)])
@needs_kernels
def test_frozen_inputs(trained: tuple[int, ...]) -> None:
    given = call(add_layer_norm, 4, 33, dtype=torch.float32)
    for index, value in enumerate(given.args):
        value.requires_grad_(index in trained)
    check_values(add_layer_norm, given)


@needs_kernels
def test_mixed_dtypes() -> None:
    x = leaf(4, 100, dtype=torch.bfloat16)
    residual, weight, bias = leaf(4, 100), leaf(100), leaf(100)
    check_values(add_layer_norm, Call((x, residual, weight, bias)))
    normed, total = add_layer_norm(x, residual, weight, bias)
    assert normed.dtype == total.dtype == torch.float32
    wide = x.detach().double()
    exact = F.layer_norm(wide, (100,), weight.double(), bias.double())
    assert_accurate(layer_norm(x, weight, bias), F.layer_norm(wide, (100,)).bfloat16(), exact)


@pytest.mark.parametrize("implementation", ["reference", "kernel"])
@needs_kernels
def test_autocast_gives_its_dtype_and_keeps_the_residual(implementation: Any, device: torch.device) -> None:
    x, residual, weight, bias = (t.detach() for t in call(add_layer_norm, 4, 33, dtype=torch.float32).args)
    with gptkern.backend(implementation), torch.autocast(device.type, torch.bfloat16):
        normed, total = add_layer_norm(x, residual, weight, bias)
        alone = layer_norm(x, weight, bias)
    assert (normed.dtype, total.dtype, alone.dtype) == (torch.bfloat16, torch.float32, torch.bfloat16)
    exact = F.layer_norm(x.double(), (33,), weight.double(), bias.double())
    assert_accurate(alone, exact.bfloat16(), exact)


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8)])
@needs_kernels
def test_no_rows(shape: tuple[int, ...]) -> None:
    given = call(add_layer_norm, *shape, dtype=torch.float32)
    normed, total, *grads = _all(add_layer_norm, given)
    assert normed.shape == total.shape == shape
    assert grads[2].abs().max() == 0
    assert grads[3].abs().max() == 0


@needs_kernels
def test_broadcast_rows() -> None:
    check_values(layer_norm, Call((leaf(1, 1, 33).detach().expand(4, 5, 33), leaf(33), leaf(33))))
    x = leaf(5, 33).detach()
    check_values(add_layer_norm, Call((x.expand(3, 5, 33), leaf(3, 5, 33), leaf(33), leaf(33))))
    with pytest.raises(ValueError, match="x has strides"):
        layer_norm(torch.ones(4, 1).expand(4, 8), torch.ones(8))
    with pytest.raises(ValueError, match="two strided loops"):
        layer_norm(torch.ones(3, 4, 5, 8).permute(2, 1, 0, 3), torch.ones(8))


def _rows_nest(x: torch.Tensor) -> bool:
    """Whether two of the three leading dimensions can be seen as one."""
    shape, strides = x.shape, x.stride()
    return (
        x.is_contiguous()
        or 1 in shape[:3]
        or strides[0] == shape[1] * strides[1]
        or strides[1] == shape[2] * strides[2]
    )


@settings(deadline=None, max_examples=40, derandomize=True)
@given(
    shape=st.lists(st.integers(0, 5), max_size=3),
    width=st.integers(1, 140),
    dtype=st.sampled_from(DTYPES),
    order=st.permutations(range(3)),
    step=st.integers(1, 3),
    padding=st.integers(0, 9),
    op=st.sampled_from(OPS),
)
@needs_kernels
def test_any_shape_and_layout(
    shape: list[int], width: int, dtype: torch.dtype, order: list[int], step: int, padding: int, op: Any
) -> None:
    order = [axis for axis in order if axis < len(shape)]
    buffer = torch.randn(*(shape[axis] * step for axis in order), width + padding).to(dtype)
    inverse = [order.index(axis) for axis in range(len(shape))]
    x = buffer[(*[slice(None, None, step)] * len(shape), slice(width))].permute(*inverse, -1)
    plain = call(op, *shape, width, dtype=dtype)
    given = Call((x.requires_grad_(), *plain.args[1:]))
    with gptkern.backend("reference"):
        expected = _cases.tensors(op(*given.args))
        exact = _cases.tensors(op(*(t.detach().double() for t in given.args)))
    if len(shape) == 3 and not _rows_nest(x):
        with pytest.raises(ValueError, match="two strided loops"):
            op(*given.args)
        return
    got = _cases.tensors(op(*given.args))
    for a, b, c in zip(got, expected, exact, strict=True):
        assert_accurate(a, b, c)
        assert a.is_contiguous()


@pytest.mark.parametrize(
    ("axis", "wide"), [(0, False), (1, False), (1, True)], ids=["outer stride", "inner stride", "wide"]
)
@needs_kernels
def test_rows_past_2_to_the_31(axis: int, wide: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row's offset in elements passes 2^31, no stride does; only six rows of memory are touched."""
    _launch.forget()
    if wide:  # the kernels for wide rows, on narrow ones
        monkeypatch.setattr(launch, "_FORWARD_WIDTH", 0)
        monkeypatch.setattr(launch, "_BACKWARD_WIDTH", 0)
    step, width = 2**30 + 8, 8
    far = torch.empty(2 * step + 2 * width, dtype=torch.float16).as_strided((3, 2, width), (step, width, 1))
    far = far.transpose(0, axis).normal_()
    near, d_out = far.contiguous(), torch.randn(far.shape).half()
    weight, bias = leaf(width, dtype=torch.float16), leaf(width, dtype=torch.float16)

    def layer_norm_and_gradients(x: torch.Tensor) -> list[torch.Tensor]:
        x = x.detach().requires_grad_()
        out = layer_norm(x, weight, bias)
        return [out, *torch.autograd.grad(out, (x, weight, bias), d_out)]

    assert all(map(torch.equal, layer_norm_and_gradients(far), layer_norm_and_gradients(near)))
    for x, residual in ((far, d_out), (d_out, far)):
        expected = add_layer_norm(x.contiguous(), residual.contiguous(), weight, bias)
        assert all(map(torch.equal, add_layer_norm(x, residual, weight, bias), expected))


def test_layouts_are_named_by_two_strides() -> None:
    base = torch.empty(6, 4, 10, 8)
    rows = torch.arange(base.numel()).view_as(base)
    for view in (rows, rows[:, 0], rows[:, :, ::2], rows[::2, :1], rows[:, 0].transpose(0, 1), rows[0, 0, 0]):
        inner, outer, step = launch.layout("op", "x", view)
        count = view.numel() // 8
        starts = [int(view.reshape(-1, 8)[r, 0] - view.flatten()[0]) for r in range(count)]
        assert starts == [(r // inner) * outer + (r % inner) * step for r in range(count)]


X, W = torch.ones(2, 8), torch.ones(8)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([1.0], W), TypeError, "layer_norm: x is list"),
        ((X, 1.0), TypeError, "layer_norm: weight is float"),
        ((X.int(), W), TypeError, "layer_norm: x is int32; accepted"),
        ((X, W.long()), TypeError, "layer_norm: weight is int64"),
        ((torch.tensor(1.0), W), ValueError, "a last dimension of 1 to 65536"),
        ((torch.ones(2, 0), torch.ones(0)), ValueError, "a last dimension of 1 to 65536"),
        ((torch.ones(1, 65537), W), ValueError, "a last dimension of 1 to 65536"),
        ((X, torch.ones(7)), ValueError, r"weight has shape \(7,\); \(8,\) is needed"),
        ((X, W, torch.ones(2, 8)), ValueError, "bias has shape"),
        ((X, torch.ones(16)[::2]), ValueError, "weight has strides"),
        ((X.to("meta"), W), ValueError, "different devices"),
    ],
)
def test_bad_arguments_are_named(arguments: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        layer_norm(*arguments)


@pytest.mark.parametrize(
    ("residual", "p", "error", "message"),
    [
        (torch.ones(1, 8), 0.0, ValueError, "residual has shape"),
        (torch.ones(2, 16)[:, ::2], 0.0, ValueError, "residual has strides"),
        (X.int(), 0.0, TypeError, "residual is int32"),
        (X, 1.0, ValueError, "dropout_p is 1.0"),
        (X, -0.1, ValueError, "dropout_p is -0.1"),
    ],
)
def test_bad_residuals_are_named(
    residual: torch.Tensor, p: float, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"add_layer_norm: .*{message}"):
        add_layer_norm(X, residual, W, dropout_p=p)


@pytest.mark.parametrize("eps", [-9.0, float("nan"), float("inf")])
def test_an_eps_without_a_root_is_refused(eps: float) -> None:
    with pytest.raises(ValueError, match=f"^layer_norm: eps is {eps}"):
        layer_norm(X, W, None, eps)
    with pytest.raises(ValueError, match=f"add_layer_norm: eps is {eps}"):
        add_layer_norm(X, X, W, None, eps)


@needs_kernels
def test_kernels_refuse_float64_by_name() -> None:
    x, weight = torch.ones(2, 8, dtype=torch.float64), torch.ones(8)
    with pytest.raises(TypeError, match="x is float64"):
        layer_norm(x, weight)
    with gptkern.backend("reference"):
        assert layer_norm(x, weight).dtype == torch.float64


@pytest.mark.parametrize("mean", [0.0, 1.0, 1e3, 1e6])
@pytest.mark.parametrize("width", [2, 3, 17, 129])
@needs_kernels
def test_small_steps_beside_a_large_mean(width: int, mean: float) -> None:
    """Rows of ``mean + i * 1e-3``, where E[x^2] - E[x]^2 has no digit left, and dx is what terms leave."""
    x = (mean + 1e-3 * torch.arange(4 * width).float().view(4, width)).requires_grad_()
    weight, bias, d_out = leaf(width), leaf(width), torch.randn(4, width)

    def run(dtype: torch.dtype, op: Any) -> list[torch.Tensor]:
        leaves = [t.detach().to(dtype).requires_grad_() for t in (x, weight, bias)]
        out = op(*leaves)
        return [out, *torch.autograd.grad(out, leaves, d_out.to(dtype))]

    def expression(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, (width,), weight, bias)

    got, rough = run(torch.float32, layer_norm), run(torch.float32, expression)
    exact = run(torch.float64, expression)
    terms = norm_terms(x, weight, d_out, 1e-5)
    for name, *tensors in zip(("out", "dx", "dweight", "dbias"), got, rough, exact, strict=True):
        assert_accurate(*tensors, name, terms=terms.get(name, 0.0))


@needs_kernels
def test_without_a_weight() -> None:
    x, residual = leaf(3, 65), leaf(3, 65)
    check(layer_norm, [(x,)], dtypes=[torch.float32])
    check_values(add_layer_norm, Call((x, residual)))
    check_values(layer_norm, Call((leaf(2, 16640),)))


@needs_kernels
def test_several_dimensions() -> None:
    x, weight, bias = leaf(3, 4, 5, 6), leaf(5, 6), leaf(5, 6)
    check(layer_norm, [Call((x, weight, bias), {"dims": 2})], dtypes=[torch.float32])
    expected = F.layer_norm(x, (4, 5, 6))
    assert torch.allclose(layer_norm(x, dims=3), expected, atol=1e-6)


def test_dimensions_that_do_not_merge_are_named() -> None:
    with pytest.raises(ValueError, match=r"its last 2 dimensions must merge into one"):
        layer_norm(torch.ones(4, 3, 5).transpose(0, 1), dims=2)
    with pytest.raises(ValueError, match=r"dims is 4, x has shape \(3, 5, 6\): 1 to 3 is accepted"):
        layer_norm(torch.ones(3, 5, 6), dims=4)
    with pytest.raises(ValueError, match="bias is given without a weight"):
        layer_norm(torch.ones(3, 5), None, torch.ones(5))
