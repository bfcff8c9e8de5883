"""What attention means, in plain PyTorch (Vaswani et al. 2017, equation 1).

Tensors are ``(batch, seq, heads, head_dim)``; masks are aligned to the bottom right, so that the
last query sees the last key.
"""

import math

import torch
import torch.nn.functional as F


def visible(
    seq_q: int, seq_k: int, causal: bool, window: int | None, device: torch.device
) -> torch.Tensor | None:
    """Which keys each query sees, ``(seq_q, seq_k)`` bool; None when it is all of them."""
    if not causal and window is None:
        return None
    ends = torch.arange(seq_q, device=device)[:, None] + (seq_k - seq_q)
    keys = torch.arange(seq_k, device=device)[None, :]
    seen = torch.ones(seq_q, seq_k, dtype=torch.bool, device=device)
    if causal:
        seen &= keys <= ends
    if window is not None:
        seen &= keys > ends - window
        if not causal:
            seen &= keys < ends + window
    return seen


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    causal: bool = True,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    dropout_p: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse): the specification. A query that sees nothing gives 0 and an lse of -inf."""
    group = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(group, dim=2), v.repeat_interleave(group, dim=2)
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * scale
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    seen = visible(q.shape[1], k.shape[1], causal, window, q.device)
    if seen is not None:
        scores = scores.masked_fill(~seen, -math.inf)
    lse = torch.logsumexp(scores, dim=-1)
    weights = torch.exp(scores - lse.masked_fill(lse == -math.inf, 0.0)[..., None])
    weights = F.dropout(weights, dropout_p)
    return torch.einsum("bhqk,bkhd->bqhd", weights.to(v.dtype), v), lse


def attention_cpu(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    causal: bool = True,
    scale: float | None = None,
    dropout_p: float = 0.0,
) -> torch.Tensor:
    """The same through PyTorch's own CPU attention, where that can express it: no window, no softcap."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    square = q.shape[2] == k.shape[2]
    mask = None if square or not causal else visible(q.shape[2], k.shape[2], True, None, q.device)
    if q.shape[2] == 1:
        mask = None
    out = F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask,
        dropout_p=dropout_p,
        is_causal=causal and square and q.shape[2] > 1,
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return out.transpose(1, 2)
