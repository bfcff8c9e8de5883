"""The product's kernel for Hopper as it is launched; tests/ptx/test_ptx_linear_hopper.py executes it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gptkern.ops._launch import Launch, record
from gptkern.ops.gated_mlp import gated_mlp
from gptkern.ops.linear import linear_act, linear_residual
from gptkern.ops.linear.kernels_hopper import linear_hopper

HOPPER, OTHER = "linear_hopper", "linear"


def matrix(rows: int, columns: int, room: int = 0, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """A matrix without numbers, whose rows have ``room`` elements between them."""
    return torch.empty(rows, columns + room, device="meta", dtype=dtype)[:, :columns]


def launched(
    arch: int, m: int = 2200, k: int = 768, n: int = 3072, *, room: int = 0, in_out: bool = False,
    columns: bool = False, dtype: torch.dtype = torch.bfloat16, residual: torch.Tensor | None = None,
    bias: torch.Tensor | None = None, activation: str = "gelu_tanh",
) -> Launch:  # fmt: skip
    x = matrix(k, m, dtype=dtype).t() if columns else matrix(m, k, room, dtype)
    weight = matrix(k, n, dtype=dtype).t() if in_out else matrix(n, k, dtype=dtype)
    with record(arch) as launches:
        if residual is not None:
            linear_residual(x, weight, bias, residual)
        else:
            linear_act(x, weight, bias, activation=activation)
    (launch,) = launches
    return launch


SERVED: dict[str, dict[str, Any]] = {
    "plain": {},
    "fp16": {"dtype": torch.float16},
    "no activation": {"activation": "none"},
    "weight (in, out)": {"in_out": True},
    "rows apart": {"room": 8},
    "residual": {"residual": matrix(2200, 3072, 5)},
    "residual in fp32": {"residual": matrix(2200, 3072, dtype=torch.float32)},
    "bias": {"bias": torch.empty(3072, device="meta", dtype=torch.bfloat16)},
    "odd width": {"n": 3001},
    "rows beyond whole tiles": {"m": 2201},
}
NOT_SERVED: dict[str, dict[str, Any]] = {
    "fp32": {"dtype": torch.float32},
    "few tiles": {"m": 1280},
    "short sums": {"k": 192},
    "odd sums": {"k": 767},
    "x by columns": {"columns": True},
    "rows 2 bytes from a whole 16": {"room": 1},
    "bias apart": {"bias": torch.empty(3072, 2, device="meta", dtype=torch.bfloat16)[:, 0]},
    "residual by columns": {"residual": matrix(3072, 2200).t()},
}


@pytest.mark.parametrize("spec", SERVED.values(), ids=SERVED)
def test_calls_that_it_serves(spec: dict[str, Any]) -> None:
    assert [launched(arch, **spec).name for arch in (80, 90, 100)] == [OTHER, HOPPER, OTHER]


@pytest.mark.parametrize("spec", NOT_SERVED.values(), ids=NOT_SERVED)
def test_calls_that_it_leaves_to_the_other_kernel(spec: dict[str, Any]) -> None:
    assert launched(90, **spec).name == OTHER


def test_the_gated_product_takes_both_halves_of_the_weight() -> None:
    x, w_proj = matrix(1408, 768), matrix(768, 1536)
    for w_fc, tile in ((matrix(3072, 768), [128, 64]), (matrix(768, 3072).t(), [64, 128])):
        with record(90) as launches:
            gated_mlp(x, w_fc, None, w_proj, None)
        first = launches[0]
        assert (first.name, first.grid, first.args[1].block_shape) == (HOPPER, (132,), tile)
        assert first.arguments["GATED"] and first.arguments["N"] == 1536
    with record(90) as launches:
        gated_mlp(x[:1280], w_fc, None, w_proj, None)
    assert launches[0].name == "gated_linear"


def test_tiles_and_grid() -> None:
    # An H100's multiprocessors, where no GPU is asked: 11 x 12 tiles are one for each.
    launch = launched(90, 1408)
    assert launch.kernel is linear_hopper and launch.grid == (132,)
    assert launched(90, 1409).grid == (132,)
    a, b = launch.args[:2]
    assert (a.shape, a.block_shape) == ([1408, 768], [64, 64])
    assert (b.shape, b.block_shape) == ([3072, 768], [256, 64])
    b = launched(90, in_out=True).args[1]
    assert (b.shape, b.block_shape) == ([768, 3072], [64, 256])
