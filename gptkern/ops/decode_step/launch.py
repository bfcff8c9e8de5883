"""The one launch of a persistent step: its plan, scratch memory and arguments."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from gptkern.ops import _launch
from gptkern.ops._counters import counters
from gptkern.ops._dispatch import INTERPRETED
from gptkern.ops._triton import triton
from gptkern.ops._types import KvScales
from gptkern.ops.decode_attention.launch import LOG2E, head_blocks
from gptkern.ops.decode_embed.launch import EMBED_COLUMNS
from gptkern.ops.decode_linear.launch import MOMENT_COLUMNS
from gptkern.ops.decode_step import kernels
from gptkern.ops.decode_step.rows import BUFFERS, StepProgram
from gptkern.ops.decode_step.table import Phases, check_tensors, on_device

# Counters of the barrier, in front of those of tiles and heads.
_BARRIER = 64


class StepArguments(NamedTuple):
    """The arguments of ``persistent_step``, in its order."""

    program: StepProgram
    tokens: torch.Tensor
    live: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    page_table: torch.Tensor
    seq_lens: torch.Tensor
    scales: KvScales | None = None


class _Plan:
    """The parts of one pass: items of products and of attention, and the programs that take them."""

    def __init__(self, a: StepArguments) -> None:
        program, device = a.program, a.tokens.device
        dtype = program.token_weight.dtype
        rows, kv_heads, head_dim = a.tokens.shape[0], *a.k_cache.shape[3:]
        capacity = a.page_table.shape[1] * a.k_cache.shape[2]
        self.phases = Phases(program, head_dim, device)
        self.attention = _attention(a, capacity)
        self.max_splits: int = triton.cdiv(capacity, self.attention["SPLIT"])
        kind = "fp32" if dtype == torch.float32 else "half"
        # Unpacking takes registers, which further stages of loads would take too.
        kind = "int4" if self.phases.grouped else kind
        self.config = dict(_launch.config("persistent_step", device, dtype=kind))
        # No more programs than there is work for: a barrier waits for each.
        heads = rows * kv_heads * self.attention["HEAD_BLOCKS"]
        resident = self.config.pop("PROGRAMS_PER_SM") * _launch.multiprocessors(device)
        self.programs: int = min(max(self.phases.items, heads * self.max_splits), resident)
        self.programs_per_head: int = min(self.max_splits, triton.cdiv(self.programs, heads))
        self.counters = max(self.phases.tiles, heads)


def step(a: StepArguments) -> torch.Tensor:
    """Launch the step: logits ``(rows, vocabulary)``."""
    program, device = a.program, a.tokens.device
    check_tensors(program)
    plan = _Plan(a)
    width = program.token_weight.shape[1]
    buffers = _buffers(a)
    table = on_device(plan.phases.table, torch.int64, device)
    tensors = (
        *(a.tokens, a.live, program.token_weight, program.position_weight),
        *(table, _attention_scales(program), a.page_table, a.seq_lens),
        *(a.k_cache, a.v_cache, *(a.scales or (None, None))),
        *(torch.empty(a.tokens.shape[0], dtype=torch.int64, device=device), *buffers, *_scratch(a, plan)),
    )
    options = {
        "ROWS": plan.phases.rows,
        "WIDTH": width,
        "EMBED_BLOCK": min(triton.next_power_of_2(width), EMBED_COLUMNS),
        "OFFSET": program.position_offset,
        "EMBED_SCALE": program.embedding_scale,
        "BLOCK_S": MOMENT_COLUMNS,
        **plan.attention,
        **plan.config,
    }
    interpreted = INTERPRETED and device.type == "cpu"
    if not interpreted:
        options["launch_cooperative_grid"] = True
    phases = len(plan.phases.table)
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
    logits = buffers[BUFFERS.index("logits")]
    assert logits is not None
    return logits


def _buffers(a: StepArguments) -> list[torch.Tensor | None]:
    """Memory for what rows read and write, in the order of ``BUFFERS``; the last is the result."""
    program, rows = a.program, a.tokens.shape[0]
    widths = program.widths(a.k_cache.shape[3] * a.k_cache.shape[4])
    dtype, device = program.token_weight.dtype, a.tokens.device
    return [
        torch.empty((rows, widths[name]), dtype=dtype, device=device) if name in widths else None
        for name in BUFFERS[: BUFFERS.index("logits") + 1]
    ]


def _scratch(a: StepArguments, plan: _Plan) -> tuple[torch.Tensor, ...]:
    """Memory for partial results, and the counters, in the kernel's order."""
    rows, head_dim, device = a.tokens.shape[0], a.k_cache.shape[4], a.tokens.device

    def new(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.float32, device=device)

    counter = counters(device, _BARRIER + plan.counters)
    return (
        new(plan.phases.partial),
        new(rows, a.program.heads, plan.max_splits, head_dim),
        new(rows, a.program.heads, plan.max_splits, 2),
        counter[_BARRIER:],
        counter[:_BARRIER],
    )


def _numbers(a: StepArguments, plan: _Plan) -> tuple[float, ...]:
    """Sizes and strides in the kernel's order."""
    program, positions = a.program, a.program.position_weight
    page_count, page_size = a.k_cache.shape[1:3]
    return (
        *(*program.eps, program.token_weight.shape[0], 0 if positions is None else positions.shape[0]),
        *(page_size, a.page_table.shape[1], page_count, plan.max_splits, plan.programs_per_head),
        *(program.token_weight.stride(0), 0 if positions is None else positions.stride(0)),
        *(a.page_table.stride(0), *a.k_cache.stride()[:3], *a.v_cache.stride()[:3]),
    )


def _attention(a: StepArguments, capacity: int) -> dict[str, Any]:
    """Attention's sizes and blocks. Its warps and stages are those of the whole kernel."""
    page_size, kv_heads, head_dim = a.k_cache.shape[2:]
    dtype, group = a.program.token_weight.dtype, a.program.heads // kv_heads
    kind = "fp32" if dtype == torch.float32 else "half"
    config = _launch.config(
        "decode_attention", a.tokens.device, dtype=kind, head_dim=head_dim, capacity=capacity
    )
    block_h, blocks = head_blocks(group)
    return {
        "KV_HEADS": kv_heads,
        "HEAD_GROUP": group,
        "HEAD_BLOCKS": blocks,
        "HEAD_DIM": head_dim,
        "BLOCK_H": block_h,
        "BLOCK_D": max(16, triton.next_power_of_2(head_dim)),
        "BLOCK_N": config["BLOCK_N"],
        "SPLIT": config["SPLIT"],
        "IN_PAGE": page_size % config["BLOCK_N"] == 0,
    }


def _attention_scales(program: StepProgram) -> torch.Tensor:
    """Each layer's softmax scale, times log2(e), ``(layers,)`` fp32."""
    rows = sorted((row for row in program.rows if row.kind == "attention"), key=lambda row: row.layer)
    scales = tuple(row.attention_scale * LOG2E for row in rows)
    return on_device(scales, torch.float32, program.token_weight.device)
