"""Sampling in plain PyTorch, computed in float64 whatever the logits' dtype.

The order is that of transformers 5. A draw is the inverse of the cumulative distribution in order
of token id, at a uniform number from Philox4x32-10 keyed by seed and counted by (step, request).
"""

from __future__ import annotations

import torch

_MASK = 0xFFFFFFFF
_INF = float("inf")
IN_PROMPT = 1 << 30


def philox4x32(key: int, counter_low: int, counter_high: int) -> tuple[int, int, int, int]:
    """Ten rounds of Philox4x32 (Salmon et al., SC 2011) on 64-bit key and halves of the counter."""
    k0, k1 = key & _MASK, key >> 32 & _MASK
    c0, c1 = counter_low & _MASK, counter_low >> 32 & _MASK
    c2, c3 = counter_high & _MASK, counter_high >> 32 & _MASK
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & _MASK, (p0 >> 32) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = k0 + 0x9E3779B9 & _MASK, k1 + 0xBB67AE85 & _MASK
    return c0, c1, c2, c3


def uniforms(counters: torch.Tensor, ahead: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """The numbers in [0, 1) of each row's step, ``(batch,)`` float64: for the token, for acceptance."""
    pairs = []
    for seed, request, step in counters.tolist():
        w = philox4x32(seed, step + ahead, request)
        pairs.append(((w[0] | w[1] << 32) * 2.0**-64, (w[2] | w[3] << 32) * 2.0**-64))
    both = torch.tensor(pairs, dtype=torch.float64, device=counters.device).reshape(-1, 2)
    return both[:, 0], both[:, 1]


def processed(
    logits: torch.Tensor,
    values: torch.Tensor,
    steps: torch.Tensor,
    counts: torch.Tensor | None,
    bias: tuple[torch.Tensor, torch.Tensor] | None = None,
    banned_ids: torch.Tensor | None = None,
    eos_ids: torch.Tensor | None = None,
    bitmask: torch.Tensor | None = None,
) -> torch.Tensor:
    """``logits (batch, vocab)`` with biases, penalties and bans: the row that temperature divides."""
    x = logits.clone()
    vocab = x.shape[1]
    repetition, presence, frequency, min_new = (values[:, i, None].to(x.dtype) for i in (7, 8, 9, 10))
    if bias is not None:
        ids, amounts = bias
        dense = torch.zeros(x.shape[0], vocab + 1, dtype=x.dtype, device=x.device)
        dense.scatter_(1, torch.where(ids < 0, vocab, ids).long(), amounts.to(x.dtype))
        x = x + dense[:, :vocab]
    if counts is not None:
        generated = (counts & ~IN_PROMPT).to(x.dtype)
        x = torch.where(counts != 0, torch.where(x < 0, x * repetition, x / repetition), x)
        x = torch.where(generated > 0, x - frequency * generated - presence, x)
    if banned_ids is not None:
        x = x.masked_fill(_members(banned_ids, vocab), -_INF)
    if eos_ids is not None:
        early = steps[:, None] < min_new
        x = x.masked_fill(_members(eos_ids, vocab) & early, -_INF)
    if bitmask is not None:
        token = torch.arange(vocab, device=x.device)
        x = x.masked_fill((bitmask[:, token // 32] >> (token % 32) & 1) == 0, -_INF)
    return x


def _members(ids: torch.Tensor, vocab: int) -> torch.Tensor:
    """``(batch, vocab)`` bool: the tokens in a list that is padded with -1."""
    member = torch.zeros(ids.shape[0], vocab + 1, dtype=torch.bool, device=ids.device)
    member.scatter_(1, torch.where(ids < 0, vocab, ids).long(), True)
    return member[:, :vocab]


def _head(x: torch.Tensor, order: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """A mask of the tokens with less than ``p`` of the mass ahead of them, in ``order``."""
    probs = torch.softmax(x, dim=-1).gather(1, order)
    ahead = probs.cumsum(-1) - probs
    head = ahead < p
    head[:, 0] = True
    return torch.zeros_like(head).scatter_(1, order, head)


def filtered(x: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """``x`` from ``processed`` after temperature and the filters: dropped tokens become -inf."""
    temperature, top_k, top_p, min_p, typical_p, epsilon, eta = (
        values[:, i, None].to(x.dtype) for i in range(7)
    )
    greedy = temperature == 0
    best = x.argmax(-1, keepdim=True)
    # Any finite number does. If nothing is allowed, the best is -inf and must stay so.
    only_best = torch.full_like(x, -_INF).scatter_(1, best, x.gather(1, best))
    order = torch.argsort(x, dim=-1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(
        1, order, torch.arange(x.shape[1], device=x.device).expand_as(order)
    )
    x = _divided(x, torch.where(greedy, 1, temperature))
    x = x.masked_fill((top_k > 0) & (rank >= top_k), -_INF)
    x = x.masked_fill((top_p < 1) & ~_head(x, order, top_p), -_INF)
    probs = torch.softmax(x, dim=-1)
    x = x.masked_fill(probs < min_p * probs.amax(-1, keepdim=True), -_INF)
    if bool((typical_p < 1).any()):
        surprise = -torch.log_softmax(x, dim=-1)
        entropy = (surprise * torch.exp(-surprise)).nansum(-1, keepdim=True)
        typical_order = torch.argsort((surprise - entropy).abs(), dim=-1, stable=True)
        x = x.masked_fill((typical_p < 1) & ~_head(x, typical_order, typical_p), -_INF)
    probs = torch.softmax(x, dim=-1)
    x = x.masked_fill((probs < epsilon) & (x < x.amax(-1, keepdim=True)), -_INF)
    log_probs = torch.log_softmax(x, dim=-1)
    entropy = -(log_probs * log_probs.exp()).nansum(-1, keepdim=True)
    cutoff = torch.minimum(eta, eta.sqrt() * torch.exp(-entropy))
    x = x.masked_fill((log_probs.exp() < cutoff) & (x < x.amax(-1, keepdim=True)), -_INF)
    return torch.where(greedy, only_best, x)


def _divided(x: torch.Tensor, temperature: torch.Tensor) -> torch.Tensor:
    """``x / temperature``; rows that overflow are shifted by their best first: the same distribution."""
    scaled = x / temperature
    overflown = (scaled.isinf() & x.isfinite()).any(-1, keepdim=True)
    return torch.where(overflown, (x - x.amax(-1, keepdim=True)) / temperature, scaled)


def draw(probs: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """The first token, by id, at which the cumulative distribution passes ``uniform``: ``(batch,)``."""
    cumulative = probs.double().cumsum(-1)
    target = uniform.double()[:, None] * cumulative[:, -1:]
    return (cumulative <= target).sum(-1).clamp_(max=probs.shape[1] - 1)


def top_k_logprobs(logits: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-softmax of the k most likely tokens of each row, and their ids; ties by the lower id."""
    log_probs = torch.log_softmax(logits.double(), dim=-1)
    order = torch.argsort(logits, dim=-1, descending=True, stable=True)[..., :k]
    return log_probs.gather(-1, order).float(), order


def speculative_step(
    probs: torch.Tensor,
    draft_token: torch.Tensor,
    draft_probs: torch.Tensor | None,
    token_uniform: torch.Tensor,
    accept_uniform: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One position of rejection sampling: the tokens ``(batch,)``, and which of them are accepted drafts."""
    index = draft_token[:, None]
    q = (
        torch.zeros_like(probs).scatter_(1, index, 1.0)
        if draft_probs is None
        else draft_probs.to(probs.dtype)
    )
    accepted = (accept_uniform[:, None] * q.gather(1, index) < probs.gather(1, index))[:, 0]
    residual = (probs - q).clamp_(min=0)
    residual = torch.where(residual.sum(-1, keepdim=True) > 0, residual, probs)
    return torch.where(accepted, draft_token, draw(residual, token_uniform)), accepted
