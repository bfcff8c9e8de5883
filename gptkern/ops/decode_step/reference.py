"""A whole decode step in plain PyTorch: the decode ops' references, one after another."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from gptkern.ops._types import KvScales
from gptkern.ops.decode_attention.reference import decode_attention
from gptkern.ops.decode_embed.reference import decode_embed
from gptkern.ops.decode_linear.reference import decode_linear, decode_qkv, normed

if TYPE_CHECKING:
    from gptkern.ops.decode_step.weights import StepWeights


def persistent_step(
    weights: StepWeights,
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
        tokens, live, weights.token_weight, weights.position_weight, page_table, seq_lens, k_cache.shape[2]
    )
    for index, layer in enumerate(weights.layers):
        k, v = k_cache[index], v_cache[index]
        kv_scales = None if scales is None else (scales[0][index], scales[1][index])
        norm_1 = None if layer.norm_1 is None else (*layer.norm_1, weights.eps)
        norm_2 = (*layer.norm_2, weights.eps)
        # The attention branch. Of post-norm models the residual is the normalised input.
        residual = normed(x, norm_1) if weights.post_norm else x
        q = decode_qkv(x, layer.qkv.weight, layer.qkv.bias, norm_1, k, v, slots, None, kv_scales)
        heads = q.unflatten(1, (weights.heads, -1))
        scale = layer.attention_scale
        attended = decode_attention(heads, k, v, page_table, seq_lens, scale, scales=kv_scales).flatten(1)
        x = decode_linear(attended, layer.out.weight, layer.out.bias, None, "none", residual, None)
        # The MLP branch.
        residual = normed(x, norm_2) if weights.post_norm else x
        inner = decode_linear(x, layer.fc.weight, layer.fc.bias, norm_2, weights.activation, None, None)
        x = decode_linear(inner, layer.proj.weight, layer.proj.bias, None, "none", residual, None)
    norm = (*weights.norm, weights.eps)
    return decode_linear(x, weights.head.weight, weights.head.bias, norm, "none", None, None)
