"""Decode layers of Llama's kin: RMS norm, gate, rotary positions, a norm of each head, scale and soft cap."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from gptkern import backend
from gptkern.ops._types import HeadNorm, RmsNorm, Rotary
from gptkern.ops.decode_linear import decode_linear, decode_qkv, quantize, reference

# (heads, kv heads, head dim, rotated elements): heads that tiles cut, and a head that fills no tile.
HEADS = [(4, 2, 16, 16), (3, 1, 20, 12), (2, 2, 40, 2), (1, 1, 6, 6), (5, 1, 64, 32)]


def close(out: torch.Tensor, plain: torch.Tensor, exact: torch.Tensor) -> None:
    """At most twice the error of the plain expression in the same dtype, plus an ulp of its scale."""
    assert out.dtype == plain.dtype
    ulp = torch.finfo(out.dtype).eps * exact.abs().max()
    assert (out.double() - exact).abs().max() <= 2 * (plain.double() - exact).abs().max() + ulp


def widened(value: Any) -> Any:
    if isinstance(value, tuple):
        return type(value)(*map(widened, value)) if hasattr(value, "_fields") else tuple(map(widened, value))
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def qkv_call(
    rows: int,
    shape: tuple[int, int, int, int],
    device: torch.device,
    dtype: torch.dtype,
    *,
    pairs: str = "halves",
    norm: bool = False,
    unit_offset: bool = False,
    width: int = 72,
    rotary: bool = True,
) -> dict[str, Any]:
    heads, kv_heads, head_dim, dim = shape

    def value(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device).to(dtype)

    angles = torch.rand(9, dim // 2, device=device) * torch.arange(9, device=device)[:, None]
    lens = torch.tensor([9, 1, 4, 2, 7, 0] * 12, dtype=torch.int32, device=device)[:rows]
    outputs = (heads + 2 * kv_heads) * head_dim
    return {
        "x": value(rows, width),
        "weight": value(outputs, width),
        "bias": value(outputs),
        "k_cache": torch.zeros(rows, 2, kv_heads, head_dim, device=device, dtype=dtype),
        "v_cache": torch.zeros(rows, 2, kv_heads, head_dim, device=device, dtype=dtype),
        "slots": torch.arange(rows, device=device) * 2 + 1,
        "norm": RmsNorm(value(width).float(), 1e-5, unit_offset),
        "rotary": Rotary(angles.cos(), angles.sin(), lens, pairs) if rotary else None,
        "head_norm": HeadNorm(value(head_dim), value(head_dim), 1e-6, unit_offset) if norm else None,
    }


def run(given: dict[str, Any]) -> list[torch.Tensor]:
    caches = [given[name].clone() for name in ("k_cache", "v_cache")]
    return [decode_qkv(**{**given, "k_cache": caches[0], "v_cache": caches[1]}), *caches]


def plain(given: dict[str, Any]) -> list[torch.Tensor]:
    caches = [given[name].clone() for name in ("k_cache", "v_cache")]
    every = {"normed_out": None, "scales": None, **given, "k_cache": caches[0], "v_cache": caches[1]}
    return [reference.decode_qkv(**every), *caches]


def check_qkv(given: dict[str, Any]) -> None:
    exact = plain({name: widened(value) for name, value in given.items()})
    for got, expected, true in zip(run(given), plain(given), exact, strict=True):
        close(got, expected, true)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("pairs", ["halves", "interleaved"])
@pytest.mark.parametrize("shape", HEADS)
def test_rotary_and_head_norm(
    shape: tuple[int, int, int, int], pairs: str, norm: bool, device: torch.device
) -> None:
    check_qkv(qkv_call(3, shape, device, torch.float32, pairs=pairs, norm=norm))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("norm", [False, True])
def test_half_precision(norm: bool, dtype: torch.dtype, device: torch.device) -> None:
    check_qkv(qkv_call(6, HEADS[1], device, dtype, norm=norm, unit_offset=True, width=300))


def test_norm_of_heads_without_positions(device: torch.device) -> None:
    check_qkv(qkv_call(2, HEADS[1], device, torch.float32, norm=True, rotary=False))


@pytest.mark.parametrize("norm", [False, True])
def test_a_row_alone_and_among_others(norm: bool, device: torch.device) -> None:
    given = qkv_call(70, HEADS[1], device, torch.float16, norm=norm)
    together = run(given)
    for rows in (slice(0, 1), slice(5, 22)):
        cut = {
            name: given[name][rows] if name in ("x", "slots", "k_cache", "v_cache") else value
            for name, value in given.items()
        }
        cut["slots"] = cut["slots"] - cut["slots"][0] + 1
        cut["rotary"] = given["rotary"]._replace(seq_lens=given["rotary"].seq_lens[rows])
        for alone, among in zip(run(cut), together, strict=True):
            assert torch.equal(alone, among[rows])


@pytest.mark.parametrize("format", ["int8", "int4"])
@pytest.mark.parametrize("norm", [False, True])
def test_quantised(format: str, norm: bool, device: torch.device) -> None:
    given = qkv_call(2, HEADS[1], device, torch.float32, norm=norm, width=128)
    given["weight"] = quantize(given["weight"], format, group_size=32)
    dense = {**given, "weight": given["weight"].dequantize(torch.float32)}
    for got, expected in zip(run(given), plain(dense), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("rows", "width", "inner"), [(1, 16, 8), (3, 40, 17), (17, 100, 70), (2, 300, 1)])
def test_gate(rows: int, width: int, inner: int, dtype: torch.dtype, device: torch.device) -> None:
    def value(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device).to(dtype)

    given = {
        "x": value(rows, width),
        "weight": value(2 * inner, width),
        "bias": value(2 * inner),
        "norm": RmsNorm(value(width), 1e-5),
        "residual": value(rows, inner),
        "activation": "silu",
        "gated": True,
    }
    wide = {name: widened(value) for name, value in given.items()}
    exact, expected = (reference.decode_linear(**g, normed_out=None) for g in (wide, given))  # type: ignore[arg-type]
    close(decode_linear(**given), expected, exact)  # type: ignore[arg-type]


def test_gate_with_biases_and_fewer_bits(device: torch.device) -> None:
    x, weight = torch.randn(3, 64, device=device), torch.randn(34, 64, device=device)
    for format in ("int8", "int4"):
        packed = quantize(weight, format, group_size=32)
        dense = reference.decode_linear(
            x, packed.dequantize(torch.float32), None, None, "gelu_tanh", None, None, True
        )
        got = decode_linear(x, packed, activation="gelu_tanh", gated=True)
        torch.testing.assert_close(got, dense, rtol=1e-4, atol=1e-4)


def test_scale_and_soft_cap(device: torch.device) -> None:
    x, weight = torch.randn(3, 64, device=device) * 4, torch.randn(20, 64, device=device)
    residual = torch.randn(3, 20, device=device)
    y = x @ weight.t()
    got = decode_linear(x, weight, scale=0.25, softcap=5.0, residual=residual)
    torch.testing.assert_close(got, residual + 5.0 * torch.tanh(y * 0.25 / 5.0), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(decode_linear(x, weight, scale=0.5), 0.5 * y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("implementation", ["kernel", "reference"])
def test_compiled(implementation: Any, device: torch.device) -> None:
    with backend(implementation):
        given = qkv_call(3, HEADS[0], device, torch.float32, norm=True)
        compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
        for got, expected in zip(compiled(given), run(given), strict=True):
            assert torch.equal(got, expected)
        x, weight = given["x"], given["weight"]
        gated = torch.compile(decode_linear, fullgraph=True, backend="aot_eager")
        options = {"norm": given["norm"], "gated": True, "activation": "silu", "scale": 2.0, "softcap": 3.0}
        assert torch.equal(gated(x, weight, **options), decode_linear(x, weight, **options))


def test_bad_input_is_named(device: torch.device) -> None:
    given = qkv_call(2, HEADS[0], device, torch.float32)
    rotary = given["rotary"]
    with pytest.raises(ValueError, match="seq_lens holds 10; cos has 9 positions"):
        decode_qkv(**{**given, "rotary": rotary._replace(seq_lens=rotary.seq_lens + 1)})
    with pytest.raises(ValueError, match="cos has 9 columns, one for each pair; the head dimension is 16"):
        table = torch.zeros(4, 9)
        decode_qkv(**{**given, "rotary": rotary._replace(cos=table, sin=table)})
    with pytest.raises(ValueError, match="pairs is 'thirds'"):
        decode_qkv(**{**given, "rotary": rotary._replace(pairs="thirds")})
    with pytest.raises(ValueError, match=r"q_weight has shape \(3,\); \(16,\) is needed"):
        decode_qkv(**{**given, "head_norm": HeadNorm(torch.ones(3), torch.ones(16), 1e-6)})
    with pytest.raises(ValueError, match="weight has 7 rows; gated needs an even number"):
        decode_linear(torch.zeros(1, 8), torch.zeros(7, 8), gated=True)
    with pytest.raises(ValueError, match="softcap is -1"):
        decode_linear(torch.zeros(1, 8), torch.zeros(7, 8), softcap=-1.0)
    with pytest.raises(ValueError, match="scale is nan"):
        decode_linear(torch.zeros(1, 8), torch.zeros(7, 8), scale=math.nan)
