"""``gptkern.testing.check`` passes what is right and catches what is wrong, each kind by name."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from gptkern import testing
from gptkern.ops import layer_norm
from gptkern.testing import Call, assert_accurate, check, layouts

pytestmark = [pytest.mark.kernels, pytest.mark.usefixtures("on_device")]


def _inputs() -> list[Call]:
    x = torch.randn(2, 3, 17, requires_grad=True)
    return [
        Call((x, torch.randn(17, requires_grad=True), torch.randn(17, requires_grad=True)), {"eps": 1e-5})
    ]


def test_a_sound_op_passes() -> None:
    check(layer_norm, _inputs(), dtypes=[torch.float32, torch.bfloat16])


def _plain(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor:
    return torch.nn.functional.layer_norm(x, (x.shape[-1],), weight, bias, eps)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda x, w, b, eps: _plain(x, w, b, eps) * 1.001, "tensor 0 .* error"),
        (lambda x, w, b, eps: _plain(x, w, b.detach(), eps), "tensor 3 .* error"),
        (lambda x, w, b, eps: _plain(x, w, b, eps).double(), "float64; .*float32 is right"),
        (lambda x, w, b, eps: _plain(x.as_strided(x.shape, (51, 17, 1)), w, b, eps), "argument 0"),
        (lambda x, w, b, eps: _plain(x, w, b, eps), "no registered op"),
    ],
    ids=["values", "gradient", "dtype", "layout", "registration"],
)
def test_what_is_wrong_is_named(wrong: Callable[..., Any], message: str) -> None:
    with pytest.raises((AssertionError, RuntimeError), match=message):
        check(wrong, _inputs(), reference=_plain, dtypes=[torch.float32])


class _Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return 3 * grad


def _doubled(x: torch.Tensor) -> torch.Tensor:
    return _Doubled.apply(x)  # type: ignore[no-any-return]


def test_an_op_is_not_compared_with_itself() -> None:
    """One that asks for no backend does the same under each: its wrong gradient would pass."""
    x = torch.randn(3, 5, requires_grad=True)
    with pytest.raises(ValueError, match=r"_doubled does the same .* Give reference="):
        check(_doubled, [(x,)])
    with pytest.raises(ValueError, match="reference is op itself"):
        check(_doubled, [(x,)], reference=_doubled)
    with pytest.raises(ValueError, match="reference calls _doubled"):
        check(_doubled, [(x,)], reference=lambda x: _doubled(x) + 0)
    with pytest.raises(AssertionError, match=r"tensor 1 .* error"):
        check(_doubled, [(x,)], reference=lambda x: 2 * x)
    # An op with a reference of its own may be called there: it runs that.
    check(layer_norm, _inputs(), reference=lambda *a, eps: layer_norm(*a, eps=eps), dtypes=[torch.float32])


def test_wrong_fake_kernel_is_caught() -> None:
    library = torch.library.Library("gptkern_test", "FRAGMENT")
    library.define("twice(Tensor x) -> Tensor")
    library.impl("twice", lambda x: (2 * x).contiguous(), "CompositeExplicitAutograd")
    torch.library.register_fake("gptkern_test::twice", torch.empty_like, lib=library)
    x = torch.randn(4, 3, 8)
    twice = torch.ops.gptkern_test.twice
    for op, called in ((twice, twice.default), (twice.default, twice)):
        with pytest.raises(ValueError, match="reference calls"):
            check(op, [(x,)], reference=lambda x, f=called: f(x), dtypes=[torch.float32])
    with pytest.raises(Exception, match=r"(?i)stride"):
        check(torch.ops.gptkern_test.twice, [(x,)], reference=lambda x: 2 * x, dtypes=[torch.float32])


def test_accuracy_is_twice_the_plain_error_and_an_ulp() -> None:
    exact = torch.tensor([1.0, -8.0], dtype=torch.float64)
    plain = (exact + torch.tensor([0.0, 0.01])).float()
    assert_accurate((exact + 0.0199).float(), plain, exact)
    with pytest.raises(AssertionError, match="error"):
        assert_accurate((exact + 0.0201).float(), plain, exact)


@pytest.mark.parametrize(
    ("got", "exact", "accepted"),
    [
        ([math.nan, 1.0], [math.nan, 1.0], True),
        ([math.inf, 1.0], [math.inf, 1.0], True),
        ([math.nan, math.nan], [math.nan, 1.0], False),
        ([0.0, 1.0], [math.nan, 1.0], False),
        ([-math.inf, 1.0], [math.inf, 1.0], False),
        ([math.inf, 1.0], [2.0, 1.0], False),
    ],
)
def test_nan_and_infinity_stand_where_they_belong(
    got: list[float], exact: list[float], accepted: bool
) -> None:
    exact_tensor = torch.tensor(exact, dtype=torch.float64)
    plain = exact_tensor.float()
    if accepted:
        assert_accurate(torch.tensor(got), plain, exact_tensor)
    else:
        with pytest.raises(AssertionError, match="is right"):
            assert_accurate(torch.tensor(got), plain, exact_tensor)


def test_layouts_keep_the_values() -> None:
    value = torch.randn(2, 3, 4, requires_grad=True)
    found = dict(layouts(value))
    assert set(found) == {"permuted", "sliced"}
    for other in found.values():
        assert torch.equal(other, value)
        assert not other.is_contiguous()
        assert other.stride(-1) == 1
        assert other.requires_grad
        assert other.is_leaf


def test_public_names() -> None:
    assert set(testing.__all__) <= set(dir(testing))
