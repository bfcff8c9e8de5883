"""Attention without a seq x seq matrix in memory."""

from __future__ import annotations

import torch

from gptkern.ops.flash_attention import reference


def flash_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = True,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention, tensors ``(batch, seq, heads, head_dim)``."""
    if window is None and softcap is None and not return_lse and q.shape[1] <= k.shape[1]:
        return reference.attention_cpu(q, k, v, causal, scale, dropout_p)
    out, lse = reference.attention(q, k, v, causal, scale, window, softcap, dropout_p)
    return (out, lse) if return_lse else out


def flash_attention_varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    causal: bool = True,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    dropout_p: float = 0.0,
) -> torch.Tensor:
    """The same for packed sequences, tensors ``(tokens, heads, head_dim)``."""
    starts_q, starts_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    parts = []
    for i in range(len(starts_q) - 1):
        part = flash_attention(
            q[None, starts_q[i] : starts_q[i + 1]],
            k[None, starts_k[i] : starts_k[i + 1]],
            v[None, starts_k[i] : starts_k[i + 1]],
            causal=causal,
            scale=scale,
            window=window,
            softcap=softcap,
            dropout_p=dropout_p,
        )
        assert isinstance(part, torch.Tensor)
        parts.append(part[0])
    return torch.cat(parts) if parts else torch.empty_like(q)
