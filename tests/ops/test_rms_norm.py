"""RMS norm, and the residual addition before it, against float64; see test_layer_norm for what they share."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from norm_cases import add_rms_norm, call, few_programs, grid, leaf, rms_norm

from gptkern.testing import Call, check, check_values

pytestmark = pytest.mark.usefixtures("on_device")

OPS = (rms_norm, add_rms_norm)


@pytest.mark.parametrize(("width", "dtype"), grid())
@pytest.mark.parametrize("op", OPS)
def test_against_float64(op: Any, width: int, dtype: torch.dtype) -> None:
    check_values(op, call(op, 3, width, dtype=dtype))


@pytest.mark.parametrize("values", [{"scale": 1e4}, {"scale": 1e-4}, {"shift": 3e4}], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_extreme_values(op: Any, values: dict[str, float]) -> None:
    check_values(op, call(op, 2, 3, 200, dtype=torch.bfloat16, **values))


@pytest.mark.parametrize("op", OPS)
def test_registration(op: Any) -> None:
    check(op, [call(op, 3, 65, dtype=torch.float32)], dtypes=[torch.float32])


@pytest.mark.parametrize(("rows", "width"), [(40, 300), (9, 8200)])
def test_programs_take_several_rows(rows: int, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with few_programs(monkeypatch):
        check_values(rms_norm, call(rms_norm, rows, width, dtype=torch.float32))


@pytest.mark.parametrize("width", [65, 8200, 16640])
def test_unit_offset_and_weights_of_fp32(width: int) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        x, residual = leaf(2, width, dtype=dtype), leaf(2, width, dtype=torch.float32)
        weight = leaf(width, scale=0.01)
        for unit_offset in (False, True):
            options = {"unit_offset": unit_offset}
            check_values(rms_norm, Call((x, weight), options))
            check_values(add_rms_norm, Call((x, residual, weight), options))


def test_unit_offset_is_one_more() -> None:
    x, weight = torch.randn(3, 33), torch.randn(33)
    expected = rms_norm(x, weight + 1.0)
    assert torch.equal(rms_norm(x, weight, unit_offset=True), expected)
    assert torch.equal(add_rms_norm(x, torch.zeros(3, 33), weight, unit_offset=True)[0], expected)


def test_without_a_weight() -> None:
    x, residual = leaf(3, 65), leaf(3, 65)
    check(rms_norm, [(x,), (x, None, 1e-5)], dtypes=[torch.float32])
    check_values(add_rms_norm, Call((x, residual)))
    check(rms_norm, [Call((x, leaf(65)), {"unit_offset": True})], dtypes=[torch.float32])
    check(add_rms_norm, [Call((x, residual, leaf(65)), {"unit_offset": True})], dtypes=[torch.float32])


def test_nan_stays_in_its_row() -> None:
    x, weight = torch.randn(5, 33), torch.randn(33)
    clean = rms_norm(x, weight)
    x[3, 2] = math.nan
    dirty = rms_norm(x, weight)
    assert dirty[3].isnan().all()
    assert torch.equal(clean[:3], dirty[:3])
    assert torch.equal(clean[4], dirty[4])


def test_dropout_mask_is_the_same_backward() -> None:
    x, residual, weight = (
        t.detach().abs() + 0.5 for t in call(add_rms_norm, 6, 100, dtype=torch.float32).args
    )
    x.requires_grad_()
    _, total = add_rms_norm(x, residual, weight, dropout_p=0.5)
    (dx,) = torch.autograd.grad(total, x, torch.ones_like(total))
    kept = (total - residual).detach() > 0.1
    assert torch.equal(dx, torch.where(kept, 2.0, 0.0))
    assert 0.3 < kept.float().mean() < 0.7


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="rms_norm: weight has shape"):
        rms_norm(torch.ones(2, 8), torch.ones(7))
    with pytest.raises(ValueError, match="add_rms_norm: residual has shape"):
        add_rms_norm(torch.ones(2, 8), torch.ones(8), torch.ones(8))
    with pytest.raises(ValueError, match=r"^rms_norm: eps is -9"):
        rms_norm(torch.ones(2, 8), torch.ones(8), eps=-9.0)
    with pytest.raises(ValueError, match="add_rms_norm: eps is -9"):
        add_rms_norm(torch.ones(2, 8), torch.ones(2, 8), torch.ones(8), eps=-9.0)
