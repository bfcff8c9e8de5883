"""Example calls of the decode step's linear layers, at GPT-2's shapes and at small ones."""

from __future__ import annotations

from typing import Any

import torch

from gptkern.ops._cases import Call, Case, Make, tensor
from gptkern.ops._types import FP8, HeadNorm, RmsNorm, Rotary
from gptkern.ops.decode_linear.formats import QuantizedWeight
from gptkern.ops.decode_linear.op import decode_linear, decode_qkv

# Format, group size, whether with zero points.
Packed = tuple[str, int, bool] | None

# Rows are the narrow side, and narrow layers' tiles of 16 outputs are below wgmma's 64.
_N = frozenset({"decode_linear_kernel"})
_FP32 = (torch.float32,)


def _linear(
    rows: int,
    width: int,
    outputs: int,
    *,
    norm: bool = True,
    activation: str = "none",
    weights: Packed = None,
) -> Make:
    def make(device: torch.device, dtype: torch.dtype) -> Call:
        def value(*shape: int) -> torch.Tensor:
            return tensor(*shape, device=device, dtype=dtype, requires_grad=False, scale=0.3)

        options: dict[str, Any] = {"activation": activation}
        if norm:
            options["norm"] = (value(width), value(width), 1e-5)
        else:
            options["residual"] = value(rows, outputs)
        weight = value(outputs, width) if weights is None else packed_matrix(outputs, width, device, *weights)
        return Call((value(rows, width), weight, value(outputs)), options)

    return make


def packed_matrix(
    outputs: int, width: int, device: torch.device, format: str, group_size: int, zero_point: bool
) -> QuantizedWeight:
    """A matrix in fewer bits; what its values are, nobody asks here."""
    groups, packed = (width // group_size, 2) if format == "int4" else (1, 1)
    dtype = torch.int8 if format == "int8" else torch.uint8
    values = torch.zeros(outputs, width // packed, dtype=dtype, device=device)
    of_groups = format == "int4"
    scales = torch.ones(
        (outputs, groups) if of_groups else (outputs,),
        dtype=torch.float16 if of_groups else torch.float32,
        device=device,
    )
    minimums = torch.full_like(scales, -8) if zero_point else None
    return QuantizedWeight(format, values, scales, minimums)


def _qkv(rows: int, width: int, heads: int, *, post_norm: bool = False, fp8: bool = False) -> Make:
    def make(device: torch.device, dtype: torch.dtype) -> Call:
        def value(*shape: int) -> torch.Tensor:
            return tensor(*shape, device=device, dtype=dtype, requires_grad=False, scale=0.3)

        options: dict[str, Any] = {"norm": (value(width), value(width), 1e-5)}
        if post_norm:
            options["normed_out"] = value(rows, width)
        caches = [value(rows, 16, heads, width // heads) for _ in range(2)]
        slots = torch.arange(rows, device=device) * 5
        if fp8:
            caches = [cache.to(FP8) for cache in caches]
            options["scales"] = (torch.ones(heads, device=device), torch.ones(heads, device=device))
        return Call((value(rows, width), value(3 * width, width), value(3 * width), *caches, slots), options)

    return make


def _modern_qkv(
    rows: int,
    width: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    *,
    dim: int | None = None,
    pairs: str = "halves",
    norm: bool = False,
    unit_offset: bool = False,
    weights: Packed = None,
    fp8: bool = False,
) -> Make:
    """Queries, keys and values of Llama's kin: RMS norm, rotary positions, a norm of each head or none."""

    def make(device: torch.device, dtype: torch.dtype) -> Call:
        def value(*shape: int) -> torch.Tensor:
            return tensor(*shape, device=device, dtype=dtype, requires_grad=False, scale=0.3)

        outputs = (heads + 2 * kv_heads) * head_dim
        caches = [value(rows, 16, kv_heads, head_dim) for _ in range(2)]
        slots = torch.arange(rows, device=device) * 5
        pair_count = (dim or head_dim) // 2
        cos, sin = (torch.rand(64, pair_count, device=device) for _ in range(2))
        lens = torch.arange(rows, dtype=torch.int32, device=device) + 1
        options: dict[str, Any] = {
            "norm": RmsNorm(value(width), 1e-5, unit_offset),
            "rotary": Rotary(cos, sin, lens, pairs),
        }
        if norm:
            options["head_norm"] = HeadNorm(value(head_dim), value(head_dim), 1e-6, unit_offset)
        if fp8:
            caches = [cache.to(FP8) for cache in caches]
            options["scales"] = (torch.ones(kv_heads, device=device), torch.ones(kv_heads, device=device))
        weight = value(outputs, width) if weights is None else packed_matrix(outputs, width, device, *weights)
        return Call((value(rows, width), weight, None, *caches, slots), options)

    return make


def _gated(rows: int, width: int, inner: int, *, weights: Packed = None, activation: str = "silu") -> Make:
    def make(device: torch.device, dtype: torch.dtype) -> Call:
        def value(*shape: int) -> torch.Tensor:
            return tensor(*shape, device=device, dtype=dtype, requires_grad=False, scale=0.3)

        outputs = 2 * inner
        weight = value(outputs, width) if weights is None else packed_matrix(outputs, width, device, *weights)
        options = {"norm": RmsNorm(value(width), 1e-5), "activation": activation, "gated": True}
        return Call((value(rows, width), weight), options)

    return make


def _head(rows: int, width: int, words: int) -> Make:
    def make(device: torch.device, dtype: torch.dtype) -> Call:
        def value(*shape: int) -> torch.Tensor:
            return tensor(*shape, device=device, dtype=dtype, requires_grad=False, scale=0.3)

        options = {"norm": RmsNorm(value(width), 1e-5), "scale": 0.125, "softcap": 30.0}
        return Call((value(rows, width), value(words, width)), options)

    return make


_SIZES = {"124M": (768, 12), "355M": (1024, 16), "774M": (1280, 20), "1.5B": (1600, 25)}
CASES = [
    sample
    for size, (width, heads) in _SIZES.items()
    for sample in (
        Case(f"{size} qkv", decode_qkv, _qkv(1, width, heads), mma_sync=_N),
        Case(f"{size} out", decode_linear, _linear(1, width, width, norm=False), mma_sync=_N),
        Case(f"{size} fc", decode_linear, _linear(1, width, 4 * width, activation="gelu_tanh"), mma_sync=_N),
        Case(f"{size} proj", decode_linear, _linear(1, 4 * width, width, norm=False), mma_sync=_N),
    )
] + [
    Case("124M head", decode_linear, _linear(1, 768, 50257), mma_sync=_N),
    Case("124M head, 64 rows", decode_linear, _linear(64, 768, 50257), mma_sync=_N),
    Case("124M qkv, 64 rows, post-norm", decode_qkv, _qkv(64, 768, 12, post_norm=True), mma_sync=_N),
    Case("1.5B proj, 64 rows", decode_linear, _linear(64, 6400, 1600, norm=False), mma_sync=_N),
    Case("124M out, fp32", decode_linear, _linear(1, 768, 768, norm=False), dtypes=_FP32),
    Case("124M fc, fp32, 64 rows", decode_linear, _linear(64, 768, 3072), dtypes=_FP32),
]
# Group sizes that divide the widths; fp8 is converted from sm_89 on.
_FORMATS: dict[str, tuple[str, int, bool]] = {
    "int8": ("int8", 0, False),
    "fp8": ("fp8", 0, False),
    "int4, groups of 64": ("int4", 64, False),
    "int4, groups of 64, zeros": ("int4", 64, True),
}
CASES += [
    Case(
        f"{size} {name}, {format}",
        decode_linear,
        _linear(rows, *shape, norm=norm, weights=packed),
        mma_sync=_N,
        archs=(89, 90, 100) if packed[0] == "fp8" else None,
    )
    for size, (width, _) in _SIZES.items()
    for name, rows, shape, norm in (
        ("out", 1, (width, width), False),
        ("fc", 1, (width, 4 * width), True),
        ("proj", 1, (4 * width, width), False),
        ("head", 1, (width, 50257), True),
        ("fc, 64 rows", 64, (width, 4 * width), True),
    )
    for format, packed in _FORMATS.items()
] + [
    Case(
        "124M proj, int8, fp32", decode_linear, _linear(1, 3072, 768, weights=_FORMATS["int8"]), dtypes=_FP32
    ),
    Case(
        "124M fc, int4, fp32", decode_linear, _linear(1, 768, 3072, weights=("int4", 128, True)), dtypes=_FP32
    ),
    Case(
        "124M fc, int4, groups of 128",
        decode_linear,
        _linear(1, 768, 3072, weights=("int4", 128, True)),
        mma_sync=_N,
    ),
    Case(
        "124M fc, int4, groups of 32",
        decode_linear,
        _linear(1, 768, 3072, weights=("int4", 32, True)),
        mma_sync=_N,
    ),
]
CASES += [
    Case(
        f"{size} qkv, fp8 cache",
        decode_qkv,
        _qkv(1, width, heads, fp8=True),
        mma_sync=_N,
        archs=(89, 90, 100),
    )
    for size, (width, heads) in _SIZES.items()
]
# Llama's kin: width, heads, key heads, head dimension, inner width.
_MODERN = {
    "SmolLM2 135M": (576, 9, 3, 64, 1536),
    "Llama 1B": (2048, 32, 8, 64, 8192),
    "Qwen3 0.6B": (1024, 16, 8, 128, 3072),
}
CASES += [
    case
    for size, (width, heads, kv_heads, head_dim, inner) in _MODERN.items()
    for rows in (1, 64)
    for case in (
        Case(
            f"{size} qkv, {rows} rows",
            decode_qkv,
            _modern_qkv(rows, width, heads, kv_heads, head_dim, norm=size.startswith("Qwen3")),
            mma_sync=_N,
        ),
        Case(f"{size} gate and up, {rows} rows", decode_linear, _gated(rows, width, inner), mma_sync=_N),
    )
] + [
    Case(
        "GPT-J qkv, interleaved, partial",
        decode_qkv,
        _modern_qkv(1, 4096, 16, 16, 256, dim=64, pairs="interleaved"),
        mma_sync=_N,
    ),
    Case("Pythia qkv, partial", decode_qkv, _modern_qkv(1, 512, 8, 8, 64, dim=16), mma_sync=_N),
    *(
        Case(
            f"Gemma 3 1B qkv, {rows} rows",
            decode_qkv,
            _modern_qkv(rows, 1152, 4, 1, 256, norm=True, unit_offset=True),
            mma_sync=_N,
        )
        for rows in (1, 64)
    ),
    Case("Gemma head, soft cap", decode_linear, _head(1, 1152, 262144), mma_sync=_N),
    Case(
        "Qwen3 0.6B qkv, fp8 cache",
        decode_qkv,
        _modern_qkv(1, 1024, 16, 8, 128, norm=True, fp8=True),
        mma_sync=_N,
        archs=(89, 90, 100),
    ),
    *(
        Case(
            f"Qwen3 0.6B {name}, {format}",
            op,
            make(packed),
            mma_sync=_N,
            archs=(89, 90, 100) if packed[0] == "fp8" else None,
        )
        for format, packed in _FORMATS.items()
        for name, op, make in (
            (
                "qkv",
                decode_qkv,
                lambda packed: _modern_qkv(1, 1024, 16, 8, 128, norm=True, weights=packed),
            ),
            ("gate and up", decode_linear, lambda packed: _gated(1, 1024, 3072, weights=packed)),
        )
    ),
    *(
        Case(
            f"Gemma 3 1B qkv, {format}",
            decode_qkv,
            _modern_qkv(64, 1152, 4, 1, 256, norm=True, weights=_FORMATS[format]),
            mma_sync=_N,
            # Two registers beyond half of a multiprocessor; fewer stages would cost more.
            spills={100: 8} if format == "int8" else {},
        )
        for format in ("int8", "int4, groups of 64")
    ),
    Case("SmolLM2 qkv, fp32", decode_qkv, _modern_qkv(1, 576, 9, 3, 64), dtypes=_FP32),
    Case("Qwen3 0.6B qkv, fp32", decode_qkv, _modern_qkv(64, 1024, 16, 8, 128, norm=True), dtypes=_FP32),
    Case("Gemma 3 1B qkv, fp32", decode_qkv, _modern_qkv(1, 1152, 4, 1, 256, norm=True), dtypes=_FP32),
    Case("SmolLM2 gate and up, fp32", decode_linear, _gated(64, 576, 1536), dtypes=_FP32),
]
CHECKS = [
    Case("qkv, rotary, 5 x 40", decode_qkv, _modern_qkv(5, 40, 4, 2, 20)),
    Case("qkv, head norm, 3 x 140", decode_qkv, _modern_qkv(3, 140, 3, 1, 12, dim=4, norm=True)),
    Case("gate and up, 3 x 40 to 17", decode_linear, _gated(3, 40, 17)),
    Case("head, soft cap", decode_linear, _head(2, 40, 33)),
    Case("norm, 3 x 40 to 20", decode_linear, _linear(3, 40, 20)),
    Case("residual, 17 x 100 to 33", decode_linear, _linear(17, 100, 33, norm=False, activation="relu")),
    Case("qkv, 5 x 40", decode_qkv, _qkv(5, 40, 2)),
]
