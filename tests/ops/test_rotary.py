"""Rotary positions against float64: values, gradients, layouts, positions, registration."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from gptkern.ops import _cases, rotary
from gptkern.testing import DTYPES, Call, check, check_values

pytestmark = pytest.mark.usefixtures("on_device")

CASES = _cases.checks("rotary")


def tables(context: int, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    frequencies = 10000.0 ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    angles = torch.arange(context, dtype=torch.float64)[:, None] * frequencies
    return angles.cos().float(), angles.sin().float()


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_against_float64(case: Any, device: torch.device) -> None:
    for dtype in DTYPES:
        check_values(case.op, case.make(device, dtype), what=case.name)


def test_layouts_and_registration() -> None:
    q, k = torch.randn(2, 3, 4, 8, requires_grad=True), torch.randn(2, 3, 2, 8, requires_grad=True)
    weights = [torch.randn(8, requires_grad=True) for _ in range(2)]
    call = Call((q, k, *tables(5, 8)), {"norm": (*weights, 1e-6)})
    check(rotary, [call], dtypes=[torch.float32])
    check(rotary, [Call((q, k, *tables(5, 4)), {"pairs": "interleaved"})], dtypes=[torch.float32])
    check(lambda q, *rest: rotary(q, None, *rest)[0], [(q, *tables(5, 8))], dtypes=[torch.float32])


def test_a_pair_turns_by_its_angle() -> None:
    cos, sin = tables(7, 2)
    q = torch.tensor([[[1.0, 0.0]]])
    turned, none = rotary(q, None, cos, sin, torch.tensor([3]))
    assert none is None
    assert turned.flatten().tolist() == pytest.approx([math.cos(3.0), math.sin(3.0)], abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_positions_choose_rows_of_the_tables(dtype: torch.dtype) -> None:
    q, k, (cos, sin) = torch.randn(2, 3, 4, 8), torch.randn(2, 3, 2, 8), tables(9, 8)
    positions = torch.tensor([[4, 0, 8], [1, 1, 5]], dtype=dtype)
    every = [
        rotary(q[b : b + 1, t : t + 1], k[b : b + 1, t : t + 1], cos[p : p + 1], sin[p : p + 1])
        for b in range(2)
        for t, p in enumerate(positions[b].tolist())
    ]
    for whole, parts in zip(rotary(q, k, cos, sin, positions), zip(*every, strict=True), strict=True):
        assert torch.equal(whole, torch.cat(parts, 1).view_as(whole))
    shared = rotary(q, k, cos, sin, positions[0].contiguous())
    assert torch.equal(shared[0], rotary(q, k, cos, sin, positions[:1].repeat(2, 1))[0])
    assert torch.equal(rotary(q, k, cos, sin)[1], rotary(q, k, cos, sin, torch.arange(3))[1])


def test_heads_of_another_layout_and_in_place() -> None:
    cos, sin = tables(6, 4)
    qkv = torch.randn(2, 5, 6 * 8)
    q, k = qkv[..., :32].unflatten(-1, (4, 8)), qkv[..., 32:40].unflatten(-1, (1, 8))
    expected = rotary(q.contiguous(), k.contiguous(), cos, sin)
    heads_first = q.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(rotary(heads_first, k, cos, sin)[0], expected[0])
    values = qkv[..., 40:].clone()
    got = rotary(q, k, cos, sin, inplace=True)
    assert got[0] is q
    assert torch.equal(q, expected[0])
    assert torch.equal(k, expected[1])
    assert torch.equal(qkv[..., 40:], values)


def test_nan_stays_in_its_head() -> None:
    cos, sin = tables(3, 8)
    q = torch.randn(3, 2, 8)
    q[1, 1, 2] = math.nan
    turned, _ = rotary(q, None, cos, sin, norm=(torch.ones(8), None, 1e-6))
    assert turned.isnan().flatten(1).all(1).tolist() == [False] * 3
    assert turned.isnan().any(2).tolist() == [[False, False], [False, True], [False, False]]


def test_bad_input_is_named() -> None:
    q, k, (cos, sin) = torch.randn(2, 3, 4, 8), torch.randn(2, 3, 2, 8), tables(4, 8)
    with pytest.raises(ValueError, match=r"pairs is 'other'; accepted are 'halves' and 'interleaved'"):
        rotary(q, k, cos, sin, pairs="other")
    with pytest.raises(ValueError, match="cos has 4 columns, one for each pair; q's heads have 6 elements"):
        rotary(q[..., :6].contiguous(), None, cos, sin)
    with pytest.raises(ValueError, match="positions goes from 1 to 4; cos has positions 0 to 3"):
        rotary(q, k, cos, sin, torch.tensor([1, 2, 4]))
    with pytest.raises(ValueError, match="q has 3 tokens, cos 2 positions"):
        rotary(q, k, cos[:2], sin[:2])
    with pytest.raises(TypeError, match=r"k is torch\.float16, q torch\.float32"):
        rotary(q, k.half(), cos, sin)
    with pytest.raises(ValueError, match="inplace is True and an argument requires grad"):
        rotary(q.clone().requires_grad_(), k, cos, sin, inplace=True)
    with pytest.raises(ValueError, match="cos or sin requires grad"):
        rotary(q, k, cos.clone().requires_grad_(), sin)
    with pytest.raises(ValueError, match=r"k_weight has shape \(7,\); \(8,\) is needed"):
        rotary(q, k, cos, sin, norm=(torch.ones(8), torch.ones(7), 1e-6))
