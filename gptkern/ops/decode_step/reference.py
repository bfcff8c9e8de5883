"""A whole decode step in plain PyTorch: the decode ops' references, one after another."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from gptkern.ops._types import KvScales, Rotary
from gptkern.ops.decode_attention.reference import decode_attention
from gptkern.ops.decode_embed.reference import decode_embed
from gptkern.ops.decode_linear.reference import decode_linear, decode_qkv

if TYPE_CHECKING:
    from gptkern.ops.decode_step.rows import StepProgram


def persistent_step(
    program: StepProgram,
    tokens: torch.Tensor,
    live: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    page_table: torch.Tensor,
    seq_lens: torch.Tensor,
    scales: KvScales | None = None,
) -> torch.Tensor:
    """Logits ``(rows, vocabulary)``; keys, values and lengths change in place."""
    x, slots = decode_embed(
        *(tokens, live, program.token_weight, program.position_weight, page_table, seq_lens),
        *(k_cache.shape[2], program.position_offset, program.embedding_scale),
    )
    buffers = {"x": x}
    for row in program.rows:
        read = buffers[row.read]
        saved = None if row.save is None else buffers.setdefault(row.save, torch.empty_like(read))
        if row.kind == "linear":
            residual = None if row.residual is None else buffers[row.residual]
            weight, bias = row.product.weight, row.product.bias
            form = (row.gated, row.scale, row.softcap)
            out = decode_linear(read, weight, bias, row.norm, row.activation, residual, saved, *form)
        else:
            k, v = k_cache[row.layer], v_cache[row.layer]
            kv_scales = None if scales is None else (scales[0][row.layer], scales[1][row.layer])
            if row.kind == "qkv":
                weight, bias = row.product.weight, row.product.bias
                turned = row.rotary
                rotary = None if turned is None else Rotary(turned.cos, turned.sin, seq_lens, turned.pairs)
                heads = (rotary, row.head_norm)
                out = decode_qkv(read, weight, bias, row.norm, k, v, slots, saved, kv_scales, *heads)
            else:
                q, scale = read.unflatten(1, (program.heads, -1)), row.attention_scale
                options = (row.window, None, kv_scales, row.softcap)
                out = decode_attention(q, k, v, page_table, seq_lens, scale, *options).flatten(1)
        buffers[row.write] = out
    return buffers["logits"]
