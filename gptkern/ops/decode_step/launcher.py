"""From tensors to the one launch of a persistent step."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from gptkern.ops import _launch
from gptkern.ops._counters import counters
from gptkern.ops._dispatch import INTERPRETED
from gptkern.ops._types import KvScales
from gptkern.ops.decode_attention.launcher import LEAST_HEADS
from gptkern.ops.decode_embed.op import EMBED_COLUMNS
from gptkern.ops.decode_linear.formats import QuantizedWeight
from gptkern.ops.decode_linear.launcher import MOMENT_COLUMNS, packed_values, tiling
from gptkern.ops.decode_step import kernels
from gptkern.ops.decode_step.weights import Linear, StepWeights

# Counters of the barrier, in front of those of tiles and heads.
_BARRIER = 64
_LINEARS = ("QKV", "OUT", "FC", "PROJ", "HEAD")
_TYPES = {
    torch.float32: tl.float32,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.int8: tl.int8,
    torch.uint8: tl.uint8,
    torch.float8_e4m3fn: tl.float8e4nv,
}


class _Cut:
    """How a linear layer is cut into items."""

    def __init__(self, linear: Linear, dtype: torch.dtype, device: torch.device) -> None:
        config = tiling(linear.weight, dtype, device)
        self.outputs, inputs = linear.weight.shape
        block_n, split_k = config["BLOCK_N"], config["SPLIT_K"]
        self.numbers = (self.outputs, inputs, block_n, config["BLOCK_K"], split_k, config["GROUP"])
        self.tiles: int = triton.cdiv(self.outputs, block_n)
        self.items = self.tiles * split_k
        self.partial = self.items * block_n * kernels.ROWS.value


def launch_step(
    weights: StepWeights,
    tokens: torch.Tensor,
    live: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    page_table: torch.Tensor,
    seq_lens: torch.Tensor,
    scales: KvScales | None,
) -> torch.Tensor:
    """The step by the kernel."""
    rows, width = tokens.shape[0], weights.token_weight.shape[1]
    dtype, device = weights.token_weight.dtype, tokens.device
    layer = weights.layers[0]
    linears = (layer.qkv, layer.out, layer.fc, layer.proj, weights.head)
    cuts = [_Cut(linear, dtype, device) for linear in linears]
    layers, page_count, page_size, heads, head_dim = k_cache.shape
    attention = _attention(head_dim, page_size, page_table.shape[1] * page_size, dtype, device)
    max_splits = triton.cdiv(page_table.shape[1] * page_size, attention["SPLIT"])
    kind = "fp32" if dtype == torch.float32 else "half"
    config = dict(_launch.config("persistent_step", device, dtype=kind))
    # No more programs than there is work for: a barrier waits for each.
    most = max(*(cut.items for cut in cuts), rows * heads * max_splits)
    programs = min(most, config.pop("PROGRAMS_PER_SM") * _launch.multiprocessors(device))

    def scratch(*shape: int, of: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=of, device=device)

    kept = [scratch(rows, width) if weights.post_norm else None for _ in range(2)]
    counter = counters(device, _BARRIER + max(*(cut.tiles for cut in cuts), rows * heads))
    logits = scratch(rows, weights.head.weight.shape[0])
    arguments = (
        tokens, live, weights.token_weight, weights.position_weight, weights.table, weights.attention_scales,
        page_table, seq_lens, k_cache, v_cache, *(scales or (None, None)),
        scratch(rows, of=torch.int64), *(scratch(rows, width) for _ in range(2)), *kept,
        *(scratch(rows, width) for _ in range(2)),
        scratch(rows, layer.fc.weight.shape[0]), scratch(max(cut.partial for cut in cuts), of=torch.float32),
        scratch(rows, heads, max_splits, head_dim, of=torch.float32),
        scratch(rows, heads, max_splits, 2, of=torch.float32),
        counter[_BARRIER:], counter[:_BARRIER], logits, rows,
    )  # fmt: skip
    numbers = (
        weights.eps, weights.token_weight.shape[0], weights.position_weight.shape[0],
        page_size, page_table.shape[1], page_count,
        max_splits, min(max_splits, triton.cdiv(programs, rows * heads)),
        weights.token_weight.stride(0), weights.position_weight.stride(0), page_table.stride(0),
        *k_cache.stride()[:3], *v_cache.stride()[:3],
    )  # fmt: skip
    options = {
        "LAYERS": layers, "HEADS": heads, "HEAD_DIM": head_dim, "WIDTH": width,
        "POST_NORM": weights.post_norm, "BIAS": layer.qkv.bias is not None, "ACTIVATION": weights.activation,
        "EMBED_BLOCK": min(triton.next_power_of_2(width), EMBED_COLUMNS), "BLOCK_S": MOMENT_COLUMNS,
        **{f"{name}_CUT": cut.numbers for name, cut in zip(_LINEARS, cuts, strict=True)},
        **_format(layer.qkv), **attention, **config,
    }  # fmt: skip
    interpreted = INTERPRETED and device.type == "cpu"
    if not interpreted:
        options["launch_cooperative_grid"] = True
    phases = layers * kernels.PHASES_PER_LAYER.value + 2
    with _launch.on_device(tokens):
        # Interpreted programs run one after another: none can wait for those that come after it.
        for first, end in [(p, p + 1) for p in range(phases)] if interpreted else [(0, phases)]:
            _launch.launch(
                kernels.persistent_step_kernel, (programs,), *arguments, first, end, *numbers,
                COMPILED=not interpreted, **options,
            )  # fmt: skip
    return logits


def _attention(
    head_dim: int, page_size: int, capacity: int, dtype: torch.dtype, device: torch.device
) -> dict[str, Any]:
    """What attention is told, but for how many warps and stages the whole kernel has."""
    kind = "fp32" if dtype == torch.float32 else "half"
    config = _launch.config("decode_attention", device, dtype=kind, head_dim=head_dim, capacity=capacity)
    return {
        "BLOCK_H": LEAST_HEADS,
        "BLOCK_D": max(16, triton.next_power_of_2(head_dim)),
        "BLOCK_N": config["BLOCK_N"],
        "SPLIT": config["SPLIT"],
        "IN_PAGE": page_size % config["BLOCK_N"] == 0,
    }


def _format(linear: Linear) -> dict[str, Any]:
    packed = linear.weight if isinstance(linear.weight, QuantizedWeight) else None
    return {
        "WEIGHT": _TYPES[packed_values(linear.weight).dtype],
        "SCALED": packed is not None,
        "ZEROS": packed is not None and packed.zeros is not None,
    }
