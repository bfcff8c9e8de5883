"""The linear layers of one decode step, in plain PyTorch."""

import torch
import torch.nn.functional as F

from gptkern.ops._types import KvScales, Norm
from gptkern.ops.decode_attention.reference import append_kv
from gptkern.ops.decode_linear.formats import QuantizedWeight
from gptkern.ops.linear.reference import ACTIVATIONS


def normed(x: torch.Tensor, norm: Norm | None) -> torch.Tensor:
    """Layer norm of x, or x where there is no norm."""
    if norm is None:
        return x
    weight, bias, eps = norm
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def decode_linear(
    x: torch.Tensor,
    weight: torch.Tensor | QuantizedWeight,
    bias: torch.Tensor | None,
    norm: Norm | None,
    activation: str,
    residual: torch.Tensor | None,
    normed_out: torch.Tensor | None,
) -> torch.Tensor:
    """``activation(norm(x) @ weight.T + bias) + residual``, ``(rows, outputs)``."""
    x = normed(x, norm)
    if normed_out is not None:
        normed_out.copy_(x)
    if isinstance(weight, QuantizedWeight):
        weight = weight.dequantize(x.dtype)
    out = F.linear(x, weight, bias)
    if activation != "none":
        out = ACTIVATIONS[activation](out)
    return out if residual is None else residual + out


def decode_qkv(
    x: torch.Tensor,
    weight: torch.Tensor | QuantizedWeight,
    bias: torch.Tensor | None,
    norm: Norm | None,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slots: torch.Tensor,
    normed_out: torch.Tensor | None,
    scales: KvScales | None = None,
) -> torch.Tensor:
    """The queries, ``(rows, outputs - 2 * kv_heads * head_dim)``; keys and values go to their slots."""
    qkv = decode_linear(x, weight, bias, norm, "none", None, normed_out)
    width = k_cache.shape[2] * k_cache.shape[3]
    q, k, v = qkv.split((qkv.shape[1] - 2 * width, width, width), dim=1)
    heads = k_cache.shape[2:]
    append_kv(k.unflatten(1, heads), v.unflatten(1, heads), k_cache, v_cache, slots, scales)
    out: torch.Tensor = q
    return out
