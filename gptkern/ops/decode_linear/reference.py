"""The linear layers of one decode step, in plain PyTorch."""

import torch
import torch.nn.functional as F

from gptkern.ops._types import HeadNorm, KvScales, Norm, RmsNorm, Rotary
from gptkern.ops.decode_attention.reference import append_kv
from gptkern.ops.decode_linear.formats import QuantizedWeight
from gptkern.ops.linear.reference import ACTIVATIONS
from gptkern.ops.rms_norm.reference import rms_norm
from gptkern.ops.rotary.reference import head_norm as normed_heads
from gptkern.ops.rotary.reference import rotary as turned


def normed(x: torch.Tensor, norm: Norm | RmsNorm | None) -> torch.Tensor:
    """The norm of x, or x where there is none."""
    if norm is None:
        return x
    if isinstance(norm, RmsNorm):
        return rms_norm(x, norm.weight, norm.eps, norm.unit_offset)
    weight, bias, eps = norm
    weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def decode_linear(
    x: torch.Tensor,
    weight: torch.Tensor | QuantizedWeight,
    bias: torch.Tensor | None,
    norm: Norm | RmsNorm | None,
    activation: str,
    residual: torch.Tensor | None,
    normed_out: torch.Tensor | None,
    gated: bool = False,
    scale: float = 1.0,
    softcap: float | None = None,
) -> torch.Tensor:
    """``softcap(scale * activation(norm(x) @ weight.T + bias)) + residual``, ``(rows, outputs)``.

    ``gated``: the first half of the outputs is a gate, and ``activation(gate) * up`` takes their place.
    """
    x = normed(x, norm)
    if normed_out is not None:
        normed_out.copy_(x)
    if isinstance(weight, QuantizedWeight):
        weight = weight.dequantize(x.dtype)
    out = F.linear(x, weight, bias)
    if gated:
        gate, up = out.chunk(2, dim=-1)
        out = ACTIVATIONS[activation](gate) * up
    elif activation != "none":
        out = ACTIVATIONS[activation](out)
    if scale != 1.0:
        out = out * scale
    if softcap is not None:
        out = softcap * torch.tanh(out / softcap)
    return out if residual is None else residual + out


def decode_qkv(
    x: torch.Tensor,
    weight: torch.Tensor | QuantizedWeight,
    bias: torch.Tensor | None,
    norm: Norm | RmsNorm | None,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slots: torch.Tensor,
    normed_out: torch.Tensor | None,
    scales: KvScales | None = None,
    rotary: Rotary | None = None,
    head_norm: HeadNorm | None = None,
) -> torch.Tensor:
    """The queries, ``(rows, outputs - 2 * kv_heads * head_dim)``; keys and values go to their slots."""
    qkv = decode_linear(x, weight, bias, norm, "none", None, normed_out)
    width = k_cache.shape[2] * k_cache.shape[3]
    q, k, v = qkv.split((qkv.shape[1] - 2 * width, width, width), dim=1)
    heads = k_cache.shape[2:]
    k = k.unflatten(1, heads)
    if rotary is not None or head_norm is not None:
        q, k = _heads(q.unflatten(1, (-1, heads[1])), k, rotary, head_norm)
        q = q.flatten(1)
    append_kv(k, v.unflatten(1, heads), k_cache, v_cache, slots, scales)
    out: torch.Tensor = q
    return out


def _heads(
    q: torch.Tensor, k: torch.Tensor, rotary: Rotary | None, norm: HeadNorm | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and keys after the norm of each head and its rotary position."""
    if rotary is None:
        assert norm is not None
        q_weight, k_weight, eps, unit_offset = norm
        pair = normed_heads(q, q_weight, eps, unit_offset), normed_heads(k, k_weight, eps, unit_offset)
        return pair[0].to(q.dtype), pair[1].to(k.dtype)
    cos, sin, seq_lens, pairs = rotary
    # A padding row, of length 0, stands nowhere: position 0 turns nothing.
    positions = (seq_lens - 1).clamp(min=0)
    weights = None if norm is None else norm[:3]
    q, turned_k = turned(q, k, cos, sin, positions, pairs, weights, norm is not None and norm.unit_offset)
    assert turned_k is not None
    return q, turned_k
