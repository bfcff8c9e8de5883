"""From tensors to launches of the decode step's linear layers."""

from __future__ import annotations

from typing import Any

import torch
import triton

from gptkern.ops import _launch, _pdl
from gptkern.ops._counters import counters
from gptkern.ops._types import KvScales, Norm
from gptkern.ops.decode_linear import kernels
from gptkern.ops.decode_linear.formats import QuantizedWeight

LEAST_ROWS, _MOST_ROWS = 16, 64
# Columns of x whose moments are taken at once: as many as registers hold of 64 rows.
MOMENT_COLUMNS = 128


def tiling(
    weight: torch.Tensor | QuantizedWeight, dtype: torch.dtype, device: torch.device
) -> dict[str, int]:
    """How a layer is cut: its launch row, no more splits than there are blocks, and int4's GROUP or 0."""
    outputs, width = weight.shape
    kind = "fp32" if dtype == torch.float32 else "half"
    if isinstance(weight, QuantizedWeight):
        kind = "int4" if weight.format == "int4" else "byte"
    config = dict(_launch.config("decode_linear", device, dtype=kind, n=outputs, k=width))
    config["GROUP"] = 0
    if kind == "int4" and isinstance(weight, QuantizedWeight):
        config["GROUP"] = config["BLOCK_K"] = weight.group_size
    config["SPLIT_K"] = min(config["SPLIT_K"], triton.cdiv(width, config["BLOCK_K"]))
    return config


def packed_values(weight: torch.Tensor | QuantizedWeight) -> torch.Tensor:
    """A weight's numbers in the dtype that kernels read them in."""
    if not isinstance(weight, QuantizedWeight):
        return weight
    return weight.values.view(torch.float8_e4m3fn) if weight.format == "fp8" else weight.values


def decode_linear(
    x: torch.Tensor,
    weight: torch.Tensor | QuantizedWeight,
    bias: torch.Tensor | None,
    norm: Norm | None,
    activation: str,
    residual: torch.Tensor | None,
    normed_out: torch.Tensor | None,
    cache: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None,
    cache_scales: KvScales | None = None,
) -> torch.Tensor:
    """The layer by the kernel; ``cache`` is (k_cache, v_cache, slots) of queries, keys and values."""
    rows, width = x.shape
    outputs = weight.shape[0]
    k_cache, v_cache, slots = (None, None, None) if cache is None else cache
    kv_width = 0 if k_cache is None else k_cache.shape[2] * k_cache.shape[3]
    device = x.device
    config = tiling(weight, x.dtype, device)
    scales = zeros = None
    if isinstance(weight, QuantizedWeight):
        scales, zeros = weight.scales, weight.zeros
    weight = packed_values(weight)
    block_n, split_k = config["BLOCK_N"], config["SPLIT_K"]
    block_r = min(max(LEAST_ROWS, triton.next_power_of_2(rows)), _MOST_ROWS)
    tiles, row_blocks = triton.cdiv(outputs, block_n), triton.cdiv(rows, block_r)
    out = torch.empty((rows, outputs - 2 * kv_width), dtype=x.dtype, device=device)
    partial = counter = None
    if split_k > 1:
        shape = (row_blocks, tiles, split_k, block_n, block_r)
        partial = torch.empty(shape, dtype=torch.float32, device=device)
        counter = counters(device, row_blocks * tiles)
    norm_weight, norm_bias, eps = (None, None, 0.0) if norm is None else norm
    page_size, page_count = 1, 0
    strides: tuple[Any, ...] = (0, 0, 0, 0)
    if k_cache is not None and v_cache is not None:
        page_count, page_size = k_cache.shape[:2]
        strides = (*k_cache.stride()[:2], *v_cache.stride()[:2])
    with _launch.on_device(x):
        _launch.launch(
            kernels.decode_linear_kernel, (tiles, split_k, row_blocks),
            x, weight, bias, norm_weight, norm_bias, residual, out, normed_out, k_cache, v_cache, slots,
            out if partial is None else partial, out if counter is None else counter, scales, zeros,
            *(cache_scales or (None, None)),
            rows, eps, page_size, page_count, weight.stride(0), *strides,
            N=outputs, K=width, KV_WIDTH=kv_width, ACTIVATION=activation,
            BLOCK_R=block_r, BLOCK_S=MOMENT_COLUMNS,
            HEAD_DIM=1 if k_cache is None else k_cache.shape[3], **_pdl.options(device), **config,
        )  # fmt: skip
    return out
