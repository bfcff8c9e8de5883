"""The meaning of attention, in plain PyTorch (Vaswani et al. 2017, equation 1).

Tensors are ``(batch, seq, heads, head_dim)``, packed ones ``(tokens, heads, head_dim)``. Masks are
aligned to the bottom right, so that the last query sees the last key; ``left`` and ``right`` are how
many keys before and after its own position a query sees, None for all of them.
"""

import math

import torch
import torch.nn.functional as F


def visible(
    seq_q: int,
    seq_k: int,
    left: int | None,
    right: int | None,
    device: torch.device,
    shift: int | None = None,
) -> torch.Tensor | None:
    """The keys that each query sees, ``(seq_q, seq_k)`` bool; None if it sees all of them.

    Query i stands at key ``i + shift``; by default the last query at the last key.
    """
    if left is None and right is None:
        return None
    shift = seq_k - seq_q if shift is None else shift
    own = torch.arange(seq_q, device=device)[:, None] + shift
    keys = torch.arange(seq_k, device=device)[None, :]
    seen = torch.ones(seq_q, seq_k, dtype=torch.bool, device=device)
    if left is not None:
        seen &= keys >= own - left
    if right is not None:
        seen &= keys <= own + right
    return seen


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    left: int | None = None,
    right: int | None = 0,
    scale: float | None = None,
    softcap: float | None = None,
    dropout_p: float = 0.0,
    slopes: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse): the specification. A query that sees nothing gives 0 and an lse of -inf.

    ``slopes``, ``(heads,)`` or ``(batch, heads)``, take off a key's distance from the query's place (Press et
    al. 2022, ALiBi); ``bias`` broadcasts to ``(batch, heads, seq_q, seq_k)``. Both come after the soft cap.
    """
    group = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(group, dim=2), v.repeat_interleave(group, dim=2)
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * scale
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if slopes is not None:
        shift = k.shape[1] - q.shape[1]
        places = torch.arange(q.shape[1], device=q.device)[:, None] + shift
        distance = (places - torch.arange(k.shape[1], device=q.device)).abs()
        scores = scores - slopes.to(scores.dtype)[..., None, None] * distance
    if bias is not None:
        scores = scores + bias.to(scores.dtype)
    seen = visible(q.shape[1], k.shape[1], left, right, q.device)
    if seen is not None:
        scores = scores.masked_fill(~seen, -math.inf)
    lse = torch.logsumexp(scores, dim=-1)
    weights = torch.exp(scores - lse.masked_fill(lse == -math.inf, 0.0)[..., None])
    weights = F.dropout(weights, dropout_p)
    return torch.einsum("bhqk,bkhd->bqhd", weights.to(v.dtype), v), lse


def attention_varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    left: int | None = None,
    right: int | None = 0,
    scale: float | None = None,
    softcap: float | None = None,
    dropout_p: float = 0.0,
    slopes: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse) of packed sequences, lse ``(heads, tokens)``; tokens of no sequence give 0."""
    q_starts, k_starts = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    outs, lses = [], []
    for i in range(len(q_starts) - 1):
        rows, keys = slice(q_starts[i], q_starts[i + 1]), slice(k_starts[i], k_starts[i + 1])
        own = slopes[i] if slopes is not None and slopes.dim() == 2 else slopes
        out, lse = attention(
            q[None, rows], k[None, keys], v[None, keys], left, right, scale, softcap, dropout_p, own
        )
        outs.append(out[0])
        lses.append(lse[0])
    # 0 whatever stands there, and of q all the same where autograd looks.
    beyond = q[q_starts[-1] :, :, :1].masked_fill(torch.ones((), dtype=torch.bool, device=q.device), 0.0)
    outs.append(beyond.expand(-1, -1, v.shape[-1]))
    dtype = torch.promote_types(q.dtype, torch.float32)
    lses.append(torch.zeros(q.shape[1], outs[-1].shape[0], device=q.device, dtype=dtype))
    return torch.cat(outs), torch.cat(lses, dim=1)


# Queries that share one call where a window bounds the keys they see: no mask of the whole square is made.
_WINDOW_QUERIES = 256


def sees_a_key(seq_q: int, seq_k: int, left: int | None, right: int | None) -> bool:
    """True if every query sees a key: its own, or without a window any."""
    return seq_k > 0 and (seq_q <= seq_k or (left is None and right is None))


def attention_cpu(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    left: int | None = None,
    right: int | None = 0,
    scale: float | None = None,
    dropout_p: float = 0.0,
) -> torch.Tensor:
    """``attention`` through PyTorch's own, which makes no matrix of scores; every query must see a key."""
    seq_q, seq_k = q.shape[1], k.shape[1]
    shift = seq_k - seq_q
    left = None if left is not None and left >= seq_k - 1 else left
    right = None if right is not None and right >= seq_q - 1 else right
    if left is None:
        square = shift == 0 and right == 0
        mask = None if square or right is None else visible(seq_q, seq_k, None, right, q.device)
        return _torch_attention(q, k, v, mask, square, scale, dropout_p)
    outs = []
    for start in range(0, seq_q, _WINDOW_QUERIES):
        end = min(start + _WINDOW_QUERIES, seq_q)
        first = max(0, start + shift - left)
        last = seq_k if right is None else min(seq_k, end + shift + right)
        mask = visible(end - start, last - first, left, right, q.device, shift + start - first)
        keys = slice(first, last)
        outs.append(_torch_attention(q[:, start:end], k[:, keys], v[:, keys], mask, False, scale, dropout_p))
    return torch.cat(outs, dim=1) if len(outs) != 1 else outs[0]


def _torch_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    causal: bool,
    scale: float | None,
    dropout_p: float,
) -> torch.Tensor:
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask,
        dropout_p=dropout_p,
        is_causal=causal,
        scale=scale,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    # PyTorch 2.13 gives 0 on a CPU where all scores are NaN.
    return out.transpose(1, 2).masked_fill(q.isnan().any(-1, keepdim=True), math.nan)


def attention_varlen_cpu(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_starts: list[int],
    k_starts: list[int],
    left: int | None,
    right: int | None,
    scale: float,
    dropout_p: float = 0.0,
) -> torch.Tensor:
    """``attention_cpu`` of packed sequences, one at a time: none depends on the others."""
    outs = []
    for i in range(len(q_starts) - 1):
        rows, keys = slice(q_starts[i], q_starts[i + 1]), slice(k_starts[i], k_starts[i + 1])
        if rows.start == rows.stop:
            continue
        outs.append(
            attention_cpu(q[None, rows], k[None, keys], v[None, keys], left, right, scale, dropout_p)[0]
        )
    outs.append(q[q_starts[-1] :].masked_fill(torch.ones((), dtype=torch.bool, device=q.device), 0.0))
    return torch.cat(outs)
