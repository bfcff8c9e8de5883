"""Linear layers of weights in fewer bits: the formats, and the kernel against the dequantised matrix."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from gptkern import ops
from gptkern.ops.decode_linear import QuantizedWeight, decode_linear, decode_qkv, quantize
from gptkern.ops.decode_linear.formats import pack, unpack
from gptkern.quantization import GROUP_SIZES
from gptkern.testing import assert_accurate

KINDS: list[dict[str, Any]] = [
    {"format": "int8"},
    {"format": "fp8"},
    *({"format": "int4", "group_size": size, "zero_point": size == 64} for size in GROUP_SIZES),
    {"format": "int4", "group_size": 32, "zero_point": True},
]


def kind_of(options: dict[str, Any]) -> str:
    return " ".join(map(str, options.values()))


def drawn(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape).to(dtype)


@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_packing_is_undone_for_every_width(group_size: int) -> None:
    for width in range(1, 2 * group_size + 1):
        values = torch.randint(16, (3, width), dtype=torch.uint8)
        packed = pack(values, group_size)
        assert packed.shape == (3, -(-width // group_size) * group_size // 2)
        assert torch.equal(unpack(packed, group_size, width), values)


def test_a_byte_holds_one_of_each_half_of_its_group() -> None:
    packed = pack(torch.arange(64, dtype=torch.uint8)[None] % 16, 32)
    assert packed[0, 0] == 0 | 0 << 4 and packed[0, 3] == 3 | 3 << 4
    assert packed[0, 17] == (33 % 16) | (49 % 16) << 4


@pytest.mark.parametrize("options", KINDS, ids=kind_of)
def test_quantising_is_as_near_as_its_steps_allow(options: dict[str, Any]) -> None:
    weight = drawn(9, 256)
    made = quantize(weight, **options)
    assert made.shape == (9, 256)
    error = (made.dequantize(torch.float64) - weight).abs()
    if options["format"] == "int8":
        assert (error <= 0.5001 * made.scales[:, None]).all()
    elif options["format"] == "fp8":
        # Half a step of 3 bits of mantissa, or of the smallest numbers.
        assert (error <= weight.abs() * 2**-4 + made.scales[:, None] * 2**-10).all()
    else:
        size = options["group_size"]
        assert made.group_size == size
        plain = weight.unflatten(1, (-1, size))
        steps = (plain.amax(2) - plain.amin(2)) / 15
        assert (error.unflatten(1, (-1, size)).square().mean(2) < steps.square() / 6).all()
    again = quantize(made.dequantize(torch.float32), **options)
    assert (again.dequantize(torch.float64) - made.dequantize(torch.float64)).abs().max() < error.max()


def test_zero_rows_and_outliers_stay_finite() -> None:
    weight = torch.zeros(3, 64)
    weight[1, 5] = 1e30
    weight[2] = 1e-30
    for name in ("int8", "fp8"):
        found = quantize(weight, name).dequantize(torch.float32)
        assert found.isfinite().all() and not found[0].any()
        assert found[1, 5] == pytest.approx(1e30, rel=0.3)


@pytest.mark.parametrize("zero_point", [False, True])
def test_numbers_at_the_ends_of_a_group(zero_point: bool) -> None:
    weight = torch.zeros(6, 64)
    weight[1, 5] = 6e4
    weight[2] = 1e-30
    weight[3] = 0.7
    weight[4] = 1000 + torch.arange(64) / 100
    weight[5, ::2] = -6e4
    made = quantize(weight, "int4", group_size=32, zero_point=zero_point)
    found = made.dequantize(torch.float32)
    assert found.isfinite().all() and not found[0].any() and not found[2].any()
    torch.testing.assert_close(found[[1, 3, 5]], weight[[1, 3, 5]], rtol=2**-11, atol=0)
    # Far from 0 the minimum itself has steps of a half.
    assert (found[4] - weight[4]).abs().max() < (0.6 if zero_point else 70)
    weight[3, 3] = torch.nan
    assert (
        quantize(weight, "int4", group_size=32, zero_point=zero_point)
        .dequantize(torch.float32)[3]
        .isnan()
        .any()
    )
    for beyond in (1e5, torch.inf):
        weight[3, 3] = beyond
        with pytest.raises(ValueError, match=r"a weight is (100000|inf); int4 holds up to 65504"):
            quantize(weight, "int4", group_size=32, zero_point=zero_point)


@pytest.mark.parametrize("options", KINDS[2:], ids=kind_of)
def test_a_matrix_on_the_format_s_own_grid_is_held_exactly(options: dict[str, Any]) -> None:
    codes = torch.randint(16, (9, 256 // options["group_size"], options["group_size"]))
    codes[..., 0], codes[..., 1] = 0, 15
    scales = (torch.rand(codes.shape[:2]) + 0.1).half()
    minimums = (-8 * torch.rand(codes.shape[:2])).half() if options["zero_point"] else None
    packed = pack(codes.to(torch.uint8).flatten(1), options["group_size"])
    weight = QuantizedWeight("int4", packed, scales, minimums).dequantize(torch.float32)
    assert torch.equal(quantize(weight, **options).dequantize(torch.float32), weight)


def test_a_minimum_is_worth_its_bytes() -> None:
    weight = drawn(64, 256) + 2 * drawn(64, 1)
    errors = {
        zero_point: (
            quantize(weight, "int4", group_size=32, zero_point=zero_point).dequantize(weight.dtype) - weight
        )
        .square()
        .mean()
        .item()
        for zero_point in (False, True)
    }
    steps = (weight.unflatten(1, (-1, 32)).amax(2) - weight.unflatten(1, (-1, 32)).amin(2)) / 15
    # Rounding to even steps between the ends would leave a twelfth of a step's square.
    assert errors[True] < 0.85 * (steps.square() / 12).mean() and errors[True] < 0.4 * errors[False]


@pytest.mark.usefixtures("on_device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", KINDS, ids=kind_of)
@pytest.mark.parametrize("rows", [1, 3, 17])
def test_the_kernel_against_the_dequantised_matrix(
    rows: int, options: dict[str, Any], dtype: torch.dtype
) -> None:
    outputs, width = 37, 256
    weight = quantize(drawn(outputs, width) * 0.1, **options)
    x, bias = drawn(rows, width, dtype=dtype), drawn(outputs, dtype=dtype)
    norm = (drawn(width, dtype=dtype), drawn(width, dtype=dtype), 1e-5)
    kept = torch.empty_like(x)
    found = decode_linear(x, weight, bias, norm=norm, activation="gelu_tanh", normed_out=kept)

    def expected(kind: torch.dtype) -> torch.Tensor:
        normed = F.layer_norm(x.to(kind), (width,), norm[0].to(kind), norm[1].to(kind), 1e-5)
        if kind == torch.float64:
            # As every launch does, its input is rounded.
            normed = kept.double()
        return F.gelu(F.linear(normed, weight.dequantize(kind), bias.to(kind)), approximate="tanh")

    assert_accurate(found, expected(dtype), expected(torch.float64))
    residual = drawn(rows, outputs, dtype=dtype)
    found = decode_linear(x, weight, residual=residual)
    exact = residual.double() + x.double() @ weight.dequantize(torch.float64).T
    assert_accurate(found, residual + F.linear(x, weight.dequantize(dtype)), exact)


@pytest.mark.usefixtures("on_device")
@pytest.mark.parametrize("options", KINDS, ids=kind_of)
def test_a_row_is_bitwise_the_same_alone_and_among_others(options: dict[str, Any]) -> None:
    # Up to 16 rows: beyond them the interpreter's products of other tile shapes sum in another order.
    weight, x = quantize(drawn(70, 768), **options), drawn(16, 768)
    whole = decode_linear(x, weight)
    for row in (0, 7, 15):
        assert torch.equal(decode_linear(x[row : row + 1], weight)[0], whole[row])


@pytest.mark.usefixtures("on_device")
@pytest.mark.parametrize("options", KINDS, ids=kind_of)
def test_queries_keys_and_values_reach_their_places(options: dict[str, Any]) -> None:
    weight, x = quantize(drawn(3 * 128, 128), **options), drawn(4, 128)
    caches = [torch.zeros(2, 8, 2, 64) for _ in range(2)]
    slots = torch.tensor([3, -1, 9, 15])
    q = decode_qkv(x, weight, None, *caches, slots)
    expected = decode_linear(x, weight)
    assert torch.equal(q, expected[:, :128])
    for cache, part in zip(caches, expected[:, 128:].split(128, 1), strict=True):
        flat = cache.view(16, 128)
        assert torch.equal(flat[[3, 9, 15]], part[[0, 2, 3]])
        assert not flat[[0, 1, 2, 4, 8, 14]].any()


def test_the_reference_is_the_product_with_the_dequantised_matrix() -> None:
    weight, x = quantize(drawn(5, 64), "int8"), drawn(2, 64)
    with ops.backend("reference"):
        found = decode_linear(x, weight)
    assert torch.equal(found, F.linear(x, weight.dequantize(torch.float32)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "int2"}, "weights is 'int2'; accepted are int8, fp8, int4"),
        ({"format": "int4", "group_size": 48}, "group_size is 48; accepted are 128, 64, 32"),
        (
            {"format": "int4", "group_size": 128},
            "groups of 128 do not divide a width of 96; group_size=32 does",
        ),
    ],
)
def test_bad_formats(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quantize(drawn(4, 96), **options)
    with pytest.raises(ValueError, match="do not divide a width of 90; no group size does"):
        quantize(drawn(4, 90), "int4")


def test_bad_arguments() -> None:
    weight = quantize(drawn(4, 96), "int8")
    with pytest.raises(ValueError, match="weight has 96 columns, x 64"):
        decode_linear(drawn(1, 64), weight)
    elsewhere = QuantizedWeight("int8", weight.values, weight.scales.to("meta"))
    with pytest.raises(ValueError, match="different devices"):
        decode_linear(drawn(1, 96), elsewhere)
    compiled = torch.compile(lambda x: decode_linear(x, weight), backend="eager", fullgraph=True)
    with pytest.raises(Exception, match=r"torch\.compile takes tensors"):
        compiled(drawn(1, 96))
