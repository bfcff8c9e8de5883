"""The product's kernel for Hopper as it is launched; tests/ptx/test_ptx_linear_hopper.py executes it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gptkern.ops._launch import Launch, record
from gptkern.ops.gated_mlp import gated_mlp
from gptkern.ops.gated_mlp.launch import product_gated_dact
from gptkern.ops.linear import hopper, linear_act, linear_residual
from gptkern.ops.linear.kernels_hopper import linear_hopper
from gptkern.ops.linear.launch import product_dact, weight_grad

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


# --- backward


def dact(arch: int, m: int = 2200, k: int = 768, n: int = 3072, *, in_out: bool = False,
         dtype: torch.dtype = torch.bfloat16, room: int = 0) -> Launch:  # fmt: skip
    """The first launch of a gradient through an activation."""
    weight = matrix(n, k, dtype=dtype).t() if in_out else matrix(k, n, dtype=dtype)
    with record(arch) as launches:
        product_dact(matrix(m, k, room, dtype), weight, matrix(m, n, dtype=dtype), "gelu_tanh", dtype)
    return launches[0]


@pytest.mark.parametrize(
    "spec", [{}, {"in_out": True}, {"dtype": torch.float16}, {"room": 8}, {"n": 3056}, {"m": 2201}], ids=str
)
def test_gradients_through_an_activation_that_it_serves(spec: dict[str, Any]) -> None:
    names = [dact(arch, **spec).name for arch in (80, 90, 100)]
    assert names == ["linear_dact", "linear_dact_hopper", "linear_dact"]


@pytest.mark.parametrize(
    "spec", [{"dtype": torch.float32}, {"m": 1280}, {"k": 192}, {"room": 1}, {"n": 3064}], ids=str
)
def test_gradients_through_an_activation_that_it_leaves(spec: dict[str, Any]) -> None:
    assert dact(90, **spec).name == "linear_dact"


def test_sums_of_a_gradient_are_of_64_rows() -> None:
    found = dact(90, 2201).arguments
    assert found["partial_ptr"].shape == (35, 3072)
    with record(90) as launches:
        product_gated_dact(matrix(2201, 768), matrix(768, 3072), matrix(2201, 6144), "silu", torch.bfloat16)
    found = launches[0].arguments
    assert found["GATED"] and found["N"] == 3072 and found["partial_ptr"].shape == (35, 6144)
    with record(90) as launches:
        product_gated_dact(matrix(2201, 768), matrix(768, 3072), matrix(2201, 6144), "silu", None)
    assert [launch.name for launch in launches] == ["linear_dact_hopper"]
    assert launches[0].arguments["partial_ptr"] is None


def weight_gradient(
    arch: int, tokens: int = 16384, m: int = 3072, n: int = 768, *, room: int = 0, columns: bool = False,
    in_out: bool = False, dtype: torch.dtype = torch.bfloat16,
) -> Launch:  # fmt: skip
    x = matrix(n, tokens, dtype=dtype).t() if columns else matrix(tokens, n, room, dtype)
    weight = matrix(n, m, dtype=dtype).t() if in_out else matrix(m, n, dtype=dtype)
    with record(arch) as launches:
        weight_grad(matrix(tokens, m, dtype=dtype), x, weight)
    return launches[0]


@pytest.mark.parametrize("spec", [{}, {"in_out": True}, {"dtype": torch.float16}, {"room": 8}], ids=str)
def test_weight_gradients_that_it_serves_have_the_other_kernel_s_splits(
    spec: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = weight_gradient(90, **spec)
    assert found.name == "linear_dw_hopper" and found.grid == (132,)
    assert found.arguments["OUT_ROWS"] is not spec.get("in_out", False)
    assert found.arguments["stride"] == (3072 if spec.get("in_out") else 768)
    monkeypatch.setattr(hopper, "serves_weight_grad", lambda *_: False)
    other = weight_gradient(90, **spec)
    assert other.name == "linear_dw" and other.grid == (72, found.arguments["splits"])
    assert found.arguments["splits"] > 1
    assert other.arguments["BLOCK_K"] == found.arguments["BLOCK_K"]


@pytest.mark.parametrize(
    "spec",
    [
        {"dtype": torch.float32}, {"m": 128}, {"tokens": 192}, {"tokens": 700, "n": 264, "m": 520},
        {"room": 1}, {"columns": True},
    ],
    ids=str,
)  # fmt: skip
def test_weight_gradients_that_it_leaves(spec: dict[str, Any]) -> None:
    assert weight_gradient(90, **spec).name == "linear_dw"
