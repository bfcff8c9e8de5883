"""Products with fp8 weights on a CPU."""

from __future__ import annotations

import pytest
import torch
from cpu_products import PATHS, product

from gptkern.ops.decode_linear.formats import QuantizedWeight, quantize

pytestmark = [
    pytest.mark.skipif(not PATHS, reason="this processor has no AVX2, or gptkern._C is not built"),
    pytest.mark.usefixtures("decode_path"),
]
DTYPES = (torch.bfloat16, torch.float32)
# Some fill no vector; one is summed in parts.
WIDTHS = (5, 32, 100, 768, 1000, 1600)
ROWS = 43


def _made(width: int, dtype: torch.dtype) -> tuple[torch.Tensor, QuantizedWeight]:
    draw = torch.Generator().manual_seed(width)
    x = torch.randn(ROWS, width, generator=draw).to(dtype)
    return x, quantize(torch.randn(2 * ROWS + 1, width, generator=draw), "fp8")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_a_product_against_float64(width: int, dtype: torch.dtype) -> None:
    x, weight = _made(width, dtype)
    matrix = weight.dequantize(torch.float64)
    exact, found = x.double() @ matrix.T, product(x, weight).double()
    # No element meets more than 128 roundings, and the sum is rounded once more.
    within = 128 * 2.0**-24 * (x.double().abs() @ matrix.abs().T)
    if dtype == torch.bfloat16:
        within += 2.0**-8 * exact.abs()
    assert ((found - exact).abs() <= within).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_a_row_is_bitwise_the_same_in_any_company(width: int, dtype: torch.dtype) -> None:
    x, weight = _made(width, dtype)
    whole = product(x, weight)
    for rows in range(1, ROWS):
        assert torch.equal(product(x[:rows], weight, 1 + rows % 3), whole[:rows]), rows


@pytest.mark.parametrize("rows", [1, 2, 4, 9, ROWS])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_whole_numbers_give_the_product_of_the_rows_dtype(rows: int, dtype: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(rows)
    # fp8 holds them, and fp32 their sums: no order rounds.
    codes = torch.randint(-16, 17, (2 * ROWS + 1, 1600), generator=draw).to(torch.float8_e4m3fn)
    weight = QuantizedWeight("fp8", codes.view(torch.uint8), torch.ones(len(codes)))
    x = torch.randint(-8, 9, (rows, 1600), generator=draw).to(dtype)
    assert torch.equal(product(x, weight), product(x, weight.dequantize(dtype)))


@pytest.mark.parametrize("rows", [1, ROWS])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_number_is_read_as_it_is(rows: int, dtype: torch.dtype) -> None:
    codes = torch.arange(256, dtype=torch.uint8)[:, None].repeat(1, 40)
    weight = QuantizedWeight("fp8", codes, torch.ones(256))
    x = torch.zeros(rows, 40, dtype=dtype)
    x[:, 37] = 1
    codes[:, :37] = 0
    found = product(x, weight).double()
    numbers = codes[:, 37].view(torch.float8_e4m3fn).double()
    assert torch.equal(found.nan_to_num(1e9), numbers.nan_to_num(1e9).expand(rows, -1))
