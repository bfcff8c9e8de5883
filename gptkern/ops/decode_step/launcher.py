"""From tensors to the one launch of a persistent step."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from gptkern.ops import _launch
from gptkern.ops._counters import counters
from gptkern.ops._dispatch import INTERPRETED
from gptkern.ops.decode_attention.launcher import LEAST_HEADS
from gptkern.ops.decode_attention.reference import Scales
from gptkern.ops.decode_embed.op import EMBED_COLUMNS
from gptkern.ops.decode_linear.formats import QuantizedWeight
from gptkern.ops.decode_linear.launcher import MOMENT_COLUMNS, packed_values, tiling
from gptkern.ops.decode_step import kernels
from gptkern.ops.decode_step.weights import Linear, StepWeights

# More sequences than this, and the weights are no longer most of what a step reads.
MOST_ROWS = 8
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


def persistent_step(
    weights: StepWeights,
    tokens: torch.Tensor,
    live: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    page_table: torch.Tensor,
    seq_lens: torch.Tensor,
    scales: Scales = None,
) -> torch.Tensor:
    """Append one token to each sequence and give the logits, in one launch.

    The same bits as ``decode_embed``, then of each layer ``decode_qkv``, ``decode_attention`` and three of
    ``decode_linear``, then ``decode_linear`` of the head.

    Args:
        weights: The model's. Their addresses are read once, their values at every call.
        tokens: ``(rows,)`` int64, at most ``MOST_ROWS``.
        live: ``(1,)`` int32: rows from here on are padding.
        k_cache, v_cache: ``(layers, pages, page_size, heads, head_dim)`` of the weights' dtype, or e4m3 with
            ``scales``.
        page_table: ``(rows, max_pages)`` int32, with a page for each live sequence's new token.
        seq_lens: ``(rows,)`` int32, advanced in place.
        scales: (k_scale, v_scale) of an fp8 cache, ``(layers, heads)`` fp32.

    Returns:
        ``(rows, vocabulary)`` in the weights' dtype.

    Raises:
        ValueError: No row or more than ``MOST_ROWS``.
    """
    rows, width = tokens.shape[0], weights.token_weight.shape[1]
    if not 1 <= rows <= MOST_ROWS:
        raise ValueError(f"persistent_step: tokens has {rows} rows; 1 to {MOST_ROWS} are accepted")
    dtype, device = weights.token_weight.dtype, tokens.device
    layer = weights.layers[0]
    cuts = [
        _Cut(linear, dtype, device) for linear in (layer.qkv, layer.out, layer.fc, layer.proj, weights.head)
    ]
    layers, _, page_size, heads, head_dim = k_cache.shape
    capacity = page_table.shape[1] * page_size
    kind = "fp32" if dtype == torch.float32 else "half"
    attention = dict(
        _launch.config("decode_attention", device, dtype=kind, head_dim=head_dim, capacity=capacity)
    )
    max_splits = triton.cdiv(capacity, attention["SPLIT"])
    config = dict(_launch.config("persistent_step", device, dtype=kind))
    # No more programs than there is work for: a barrier waits for each.
    most = max(*(cut.items for cut in cuts), rows * heads * max_splits)
    programs = min(most, config.pop("PROGRAMS_PER_SM") * _launch.multiprocessors(device))
    programs_per_head = min(max_splits, triton.cdiv(programs, rows * heads))

    def scratch(*shape: int, of: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=of, device=device)

    counter = counters(device, _BARRIER + max(*(cut.tiles for cut in cuts), rows * heads))
    logits = scratch(rows, cuts[-1].outputs)
    arguments = (
        tokens, live, weights.token_weight, weights.position_weight, weights.table, weights.attention_scales,
        page_table, seq_lens, k_cache, v_cache, *(scales or (None, None)),
        scratch(rows, of=torch.int64), *(scratch(rows, width) for _ in range(4)),
        scratch(rows, cuts[2].outputs), scratch(max(cut.partial for cut in cuts), of=torch.float32),
        scratch(rows, heads, max_splits, head_dim, of=torch.float32),
        scratch(rows, heads, max_splits, 2, of=torch.float32),
        counter[_BARRIER:], counter[:_BARRIER], logits, rows,
    )  # fmt: skip
    options: dict[str, Any] = {
        "LAYERS": layers, "HEADS": heads, "HEAD_DIM": head_dim, "WIDTH": width,
        **{f"{name}_CUT": cut.numbers for name, cut in zip(_LINEARS, cuts, strict=True)},
        "BIAS": layer.qkv.bias is not None, "ACTIVATION": weights.activation, **_format(layer.qkv),
        "EMBED_BLOCK": min(triton.next_power_of_2(width), EMBED_COLUMNS), "BLOCK_S": MOMENT_COLUMNS,
        "BLOCK_H": LEAST_HEADS, "BLOCK_D": max(16, triton.next_power_of_2(head_dim)),
        "BLOCK_N": attention["BLOCK_N"], "SPLIT": attention["SPLIT"],
        "IN_PAGE": page_size % attention["BLOCK_N"] == 0, **config,
    }  # fmt: skip
    strides = (
        weights.token_weight.stride(0), weights.position_weight.stride(0), page_table.stride(0),
        *k_cache.stride()[:3], *v_cache.stride()[:3],
    )  # fmt: skip
    phases = layers * kernels.PHASES_PER_LAYER.value + 2
    interpreted = INTERPRETED and device.type == "cpu"
    if not interpreted:
        options["launch_cooperative_grid"] = True
    with _launch.on_device(tokens):
        # One after another where a program cannot wait for those that come after it.
        for first in range(phases) if interpreted else (0,):
            _launch.launch(
                kernels.persistent_step_kernel, (programs,),
                *arguments, first, first + 1 if interpreted else phases,
                weights.eps, page_size, max_splits, programs_per_head, *strides,
                COMPILED=not interpreted, **options,
            )  # fmt: skip
    return logits


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


def _format(linear: Linear) -> dict[str, Any]:
    packed = linear.weight if isinstance(linear.weight, QuantizedWeight) else None
    return {
        "WEIGHT": _TYPES[packed_values(linear.weight).dtype],
        "SCALED": packed is not None,
        "ZEROS": packed is not None and packed.zeros is not None,
    }
