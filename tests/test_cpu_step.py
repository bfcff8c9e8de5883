"""The extension's linear layers of few rows: against float64, and the same row alone and among others."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gptkern.generate.cpu_step import linear
from gptkern.ops.sample._native import _C

pytestmark = pytest.mark.skipif(not _C.has_few_rows, reason="this processor has no AVX2")

DTYPES = [torch.float32, torch.bfloat16]


def layer_of(outs: int, ins: int, dtype: torch.dtype, bias: bool = True, turned: bool = False) -> nn.Linear:
    layer = nn.Linear(ins, outs, bias=bias).to(dtype)
    if turned:
        layer.weight = nn.Parameter(layer.weight.detach().t().contiguous().t())
    return layer


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("outs", "ins"), [(1, 1), (5, 7), (129, 33), (3, 16), (64, 100), (768, 3072)])
@pytest.mark.parametrize("rows", [1, 2, 3, 8])
@pytest.mark.parametrize("turned", [False, True])
def test_against_float64(turned: bool, rows: int, outs: int, ins: int, dtype: torch.dtype) -> None:
    layer, x = layer_of(outs, ins, dtype, turned=turned), torch.randn(rows, ins).to(dtype)
    with torch.inference_mode():
        found, plain = linear(x, layer), layer(x)
        exact = F.linear(x.double(), layer.weight.double(), layer.bias.double())
    ulp = torch.finfo(dtype).eps * exact.abs().max()
    assert (found - exact).abs().max() <= 2 * (plain - exact).abs().max() + ulp


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("turned", [False, True])
def test_a_row_is_bitwise_the_same_in_any_batch_and_with_any_threads(
    turned: bool, dtype: torch.dtype
) -> None:
    layer, x = layer_of(257, 515, dtype, turned=turned), torch.randn(8, 515).to(dtype)
    threads = torch.get_num_threads()
    with torch.inference_mode():
        whole = linear(x, layer)
        try:
            for number in (1, 2, 3):
                torch.set_num_threads(number)
                for rows in range(1, 9):
                    assert torch.equal(linear(x[:rows], layer), whole[:rows])
        finally:
            torch.set_num_threads(threads)


def test_no_bias_strided_weights_and_nan_in_its_row() -> None:
    wide = torch.randn(40, 64)
    layer = layer_of(20, 30, torch.float32, bias=False)
    layer.weight = nn.Parameter(wide[::2, 5:35])
    x = torch.randn(4, 30)
    with torch.inference_mode():
        torch.testing.assert_close(linear(x, layer), x @ layer.weight.T, rtol=1e-5, atol=1e-5)
        x[1, 3] = torch.nan
        found = linear(x, layer)
    assert found[1].isnan().all()
    assert not found[[0, 2, 3]].isnan().any()
