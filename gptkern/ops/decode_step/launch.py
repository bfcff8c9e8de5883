"""The one launch of a persistent step: its plan, scratch memory and arguments."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from gptkern.ops import _launch
from gptkern.ops._counters import counters
from gptkern.ops._dispatch import INTERPRETED
from gptkern.ops._triton import tl, triton
from gptkern.ops._types import KvScales
from gptkern.ops.decode_attention.launch import MIN_BLOCK_H
from gptkern.ops.decode_embed.launch import EMBED_COLUMNS
from gptkern.ops.decode_linear.formats import QuantizedWeight
from gptkern.ops.decode_linear.launch import MOMENT_COLUMNS, packed_values, tiling
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


class StepArguments(NamedTuple):
    """The arguments of ``persistent_step``, in its order."""

    weights: StepWeights
    tokens: torch.Tensor
    live: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    page_table: torch.Tensor
    seq_lens: torch.Tensor
    scales: KvScales | None = None


class _Cut:
    """The items of a linear layer: one for each split of each tile.

    Attributes:
        numbers: Outputs, inputs, BLOCK_N, BLOCK_K, SPLIT_K, GROUP: what the kernel is compiled for.
        partial: Scratch memory for all items' partial sums, in numbers.
    """

    def __init__(self, linear: Linear, dtype: torch.dtype, device: torch.device) -> None:
        config = tiling(linear.weight, dtype, device)
        outputs, inputs = linear.weight.shape
        block_n, split_k = config["BLOCK_N"], config["SPLIT_K"]
        self.numbers = (outputs, inputs, block_n, config["BLOCK_K"], split_k, config["GROUP"])
        self.tiles: int = triton.cdiv(outputs, block_n)
        self.items = self.tiles * split_k
        self.partial = self.items * block_n * kernels.ROWS.value


class _Plan:
    """The parts of one pass: items of layers and of attention, and the number of programs that take them."""

    def __init__(self, a: StepArguments) -> None:
        weights, device = a.weights, a.tokens.device
        dtype, layer = weights.token_weight.dtype, weights.layers[0]
        rows, heads, head_dim = a.tokens.shape[0], *a.k_cache.shape[3:]
        capacity = a.page_table.shape[1] * a.k_cache.shape[2]
        linears = (layer.qkv, layer.out, layer.fc, layer.proj, weights.head)
        self.cuts = [_Cut(linear, dtype, device) for linear in linears]
        self.attention = _attention(head_dim, a.k_cache.shape[2], capacity, dtype, device)
        self.max_splits: int = triton.cdiv(capacity, self.attention["SPLIT"])
        kind = "fp32" if dtype == torch.float32 else "half"
        self.config = dict(_launch.config("persistent_step", device, dtype=kind))
        # No more programs than there is work for: a barrier waits for each.
        most_items = max(*(cut.items for cut in self.cuts), rows * heads * self.max_splits)
        resident = self.config.pop("PROGRAMS_PER_SM") * _launch.multiprocessors(device)
        self.programs: int = min(most_items, resident)
        self.programs_per_head: int = min(self.max_splits, triton.cdiv(self.programs, rows * heads))
        self.counters = max(*(cut.tiles for cut in self.cuts), rows * heads)


def step(a: StepArguments) -> torch.Tensor:
    """Launch the step: logits ``(rows, vocabulary)``."""
    weights, plan, device = a.weights, _Plan(a), a.tokens.device
    width, layer = weights.token_weight.shape[1], weights.layers[0]
    logits = torch.empty(
        (a.tokens.shape[0], weights.head.weight.shape[0]), dtype=weights.token_weight.dtype, device=device
    )
    tensors = (
        *(a.tokens, a.live, weights.token_weight, weights.position_weight),
        *(weights.table, weights.attention_scales, a.page_table, a.seq_lens),
        *(a.k_cache, a.v_cache, *(a.scales or (None, None))),
        *_scratch(a, plan),
        logits,
    )
    options = {
        "LAYERS": a.k_cache.shape[0],
        "HEADS": weights.heads,
        "HEAD_DIM": a.k_cache.shape[4],
        "WIDTH": width,
        "POST_NORM": weights.post_norm,
        "BIAS": layer.qkv.bias is not None,
        "ACTIVATION": weights.activation,
        "EMBED_BLOCK": min(triton.next_power_of_2(width), EMBED_COLUMNS),
        "BLOCK_S": MOMENT_COLUMNS,
        **{f"{name}_CUT": cut.numbers for name, cut in zip(_LINEARS, plan.cuts, strict=True)},
        **_format(layer.qkv),
        **plan.attention,
        **plan.config,
    }
    interpreted = INTERPRETED and device.type == "cpu"
    if not interpreted:
        options["launch_cooperative_grid"] = True
    phases = a.k_cache.shape[0] * kernels.PHASES_PER_LAYER.value + 2
    with _launch.on_device(a.tokens):
        # Interpreted programs run one after another: none can wait for those that come after it.
        for first, end in [(p, p + 1) for p in range(phases)] if interpreted else [(0, phases)]:
            _launch.launch(
                kernels.persistent_step_kernel,
                (plan.programs,),
                *(*tensors, a.tokens.shape[0], first, end, *_numbers(a, plan)),
                COMPILED=not interpreted,
                **options,
            )
    return logits


def _scratch(a: StepArguments, plan: _Plan) -> tuple[torch.Tensor | None, ...]:
    """Memory that a step writes and reads, and the counters, in the kernel's order."""
    weights, device = a.weights, a.tokens.device
    rows, width = a.tokens.shape[0], weights.token_weight.shape[1]
    heads, head_dim = a.k_cache.shape[3:]

    def new(*shape: int, dtype: torch.dtype = weights.token_weight.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    counter = counters(device, _BARRIER + plan.counters)
    return (
        new(rows, dtype=torch.int64),
        *(new(rows, width) for _ in range(2)),
        *(new(rows, width) if weights.post_norm else None for _ in range(2)),
        *(new(rows, width) for _ in range(2)),
        new(rows, weights.layers[0].fc.weight.shape[0]),
        new(max(cut.partial for cut in plan.cuts), dtype=torch.float32),
        new(rows, heads, plan.max_splits, head_dim, dtype=torch.float32),
        new(rows, heads, plan.max_splits, 2, dtype=torch.float32),
        counter[_BARRIER:],
        counter[:_BARRIER],
    )


def _numbers(a: StepArguments, plan: _Plan) -> tuple[float, ...]:
    """Sizes and strides in the kernel's order."""
    weights = a.weights
    page_count, page_size = a.k_cache.shape[1:3]
    return (
        *(weights.eps, weights.token_weight.shape[0], weights.position_weight.shape[0]),
        *(page_size, a.page_table.shape[1], page_count, plan.max_splits, plan.programs_per_head),
        *(weights.token_weight.stride(0), weights.position_weight.stride(0), a.page_table.stride(0)),
        *(*a.k_cache.stride()[:3], *a.v_cache.stride()[:3]),
    )


def _attention(
    head_dim: int, page_size: int, capacity: int, dtype: torch.dtype, device: torch.device
) -> dict[str, Any]:
    """Attention's block sizes. Its warps and stages are those of the whole kernel."""
    kind = "fp32" if dtype == torch.float32 else "half"
    config = _launch.config("decode_attention", device, dtype=kind, head_dim=head_dim, capacity=capacity)
    return {
        "BLOCK_H": MIN_BLOCK_H,
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
