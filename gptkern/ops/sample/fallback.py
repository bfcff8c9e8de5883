"""Sampling without the extension: the reference over a batch's parameters and state.

It serves ``gptkern.backend("reference")``, ``rng="torch"`` and a source tree in which nothing was built.
"""

from __future__ import annotations

import torch

from gptkern._native import (
    BAD_DRAFT,
    BAD_DRAFT_LENGTH,
    BAD_DRAFT_PROBS,
    BAD_TOKEN_ID,
    INFINITE,
    NAN,
    NEEDS_COUNTS,
    NOTHING_ALLOWED,
)
from gptkern.ops.sample import reference
from gptkern.ops.sample.checks import first_bad, refuse
from gptkern.ops.sample.launch import Drafts, Outputs, sample_outputs
from gptkern.ops.sample.params import SamplerState, SamplingParams, check_values


def filtered(
    logits: torch.Tensor, params: SamplingParams, state: SamplerState, ahead: int = 0
) -> torch.Tensor:
    bias = None
    if params.bias_ids is not None and params.bias_values is not None:
        bias = (params.bias_ids, params.bias_values)
    x = reference.processed(
        logits,
        params.values,
        state.steps + ahead,
        state.counts,
        bias,
        params.banned_ids,
        params.eos_ids,
        params.bitmask,
    )
    return reference.filtered(x, params.values)


def _check_rows(op: str, logits: torch.Tensor, params: SamplingParams, state: SamplerState) -> None:
    """Raise for rows that cannot be sampled, as the extension does."""
    vocab = logits.shape[-1]
    for row, values in enumerate(params.values.tolist()):
        check_values(op, values, row, vocab, params.max_logprobs)
        if values[7:10] != [1.0, 0.0, 0.0] and state.counts is None:
            refuse(op, logits, params, row, NEEDS_COUNTS)
    for ids in (params.bias_ids, params.banned_ids, params.eos_ids):
        if ids is not None and bool(((ids < -1) | (ids >= vocab)).any()):
            row = first_bad(((ids < -1) | (ids >= vocab)).any(1))
            refuse(op, logits, params, row, BAD_TOKEN_ID)
    for status, bad in (
        (NAN, logits.isnan()),
        (INFINITE, logits == float("inf")),
    ):
        if bool(bad.any()):
            refuse(op, logits, params, first_bad(bad.flatten(1).any(1)), status)


def sample(logits: torch.Tensor, params: SamplingParams, state: SamplerState, rng: str) -> Outputs:
    """A draw for each row; ``state`` advances."""
    _check_rows("sample", logits, params, state)
    # torch.multinomial is compared with transformers, which filters in the logits' own precision.
    x = filtered(logits.double() if rng == "philox" else logits.float(), params, state)
    empty = (x == -float("inf")).all(-1)
    if bool(empty.any()):
        refuse("sample", logits, params, first_bad(empty), NOTHING_ALLOWED)
    probs = torch.softmax(x, dim=-1)
    if rng == "torch":
        drawn = torch.multinomial(probs, 1)[:, 0]
        tokens = torch.where(params.column("temperature") == 0, x.argmax(-1), drawn)
    else:
        tokens = reference.draw(probs, reference.uniforms(state.counters)[0])
    width = params.max_logprobs
    outputs = sample_outputs(logits, width)
    outputs.tokens, outputs.status = tokens, torch.zeros_like(outputs.status)
    if width is not None:
        outputs.logprobs = torch.log_softmax(logits.double(), -1).gather(1, tokens[:, None])[:, 0].float()
        top_logprobs, top_tokens = reference.top_k_logprobs(logits, width)
        padding = torch.arange(width, device=logits.device) >= params.column("n_logprobs")[:, None]
        padding |= top_logprobs == -float("inf")
        outputs.top_tokens = top_tokens.masked_fill(padding, -1)
        outputs.top_logprobs = top_logprobs.masked_fill(padding, -float("inf"))
    _advance(state, tokens[:, None], torch.ones_like(tokens))
    return outputs


def _advance(state: SamplerState, tokens: torch.Tensor, emitted: torch.Tensor) -> None:
    """Count the first ``emitted (batch,)`` of each row's ``tokens (batch, n)``."""
    state.steps.add_(emitted)
    if state.counts is not None:
        real = (torch.arange(tokens.shape[1], device=tokens.device) < emitted[:, None]).to(torch.int32)
        state.counts.scatter_add_(1, tokens.clamp(min=0), real)


def accept(
    drafts: Drafts, target_logits: torch.Tensor, params: SamplingParams, state: SamplerState
) -> Outputs:
    """Verified drafts of each row; ``state`` advances."""
    op, (draft_tokens, draft_probs, draft_lengths) = "speculative_accept", drafts
    batch, positions, vocab = target_logits.shape
    places = torch.arange(positions, device=target_logits.device)
    if draft_lengths is None:
        draft_lengths = torch.full((batch,), positions - 1, device=target_logits.device)
    wrong_lengths = (draft_lengths < 0) | (draft_lengths >= positions)
    if bool(wrong_lengths.any()):
        refuse(op, target_logits, params, first_bad(wrong_lengths), BAD_DRAFT_LENGTH)
    # Logits after a row's last draft are not read.
    unread = places > draft_lengths[:, None]
    target_logits = target_logits.masked_fill(unread[..., None], 0.0)
    _check_rows(op, target_logits, params, state)
    drafted = places[:-1] < draft_lengths[:, None]
    outside = (drafted & ((draft_tokens < 0) | (draft_tokens >= vocab))).any(-1)
    draft_tokens = draft_tokens.masked_fill(~drafted, 0)
    if bool(outside.any()):
        refuse(op, target_logits, params, first_bad(outside), BAD_DRAFT)
    ahead = SamplerState(state.counters.clone(), None if state.counts is None else state.counts.clone())
    tokens = torch.full((batch, positions), -1, dtype=torch.int64, device=target_logits.device)
    going = torch.ones(batch, dtype=torch.bool, device=target_logits.device)
    emitted = torch.zeros(batch, dtype=torch.int64, device=target_logits.device)
    for position in range(positions):
        x = filtered(target_logits[:, position].double(), params, ahead)
        empty = going & (x == -float("inf")).all(-1)
        if bool(empty.any()):
            refuse(op, target_logits, params, first_bad(empty), NOTHING_ALLOWED)
        probs = torch.softmax(x, dim=-1)
        for_token, for_acceptance = reference.uniforms(ahead.counters)
        own = draft_lengths == position
        chosen, accepted = reference.draw(probs, for_token), torch.zeros_like(going)
        if position < positions - 1:
            q = None if draft_probs is None else draft_probs[:, position]
            if q is not None and bool((wrong := going & ~own & ~((q >= 0) & (q <= 1e30)).all(-1)).any()):
                refuse(op, target_logits, params, first_bad(wrong), BAD_DRAFT_PROBS)
            verified, holds = reference.speculative_step(
                probs, draft_tokens[:, position], q, for_token, for_acceptance
            )
            chosen, accepted = torch.where(own, chosen, verified), holds & ~own
        tokens[:, position] = torch.where(going, chosen, -1)
        emitted += going
        _advance(ahead, chosen[:, None], going.long())
        going = going & accepted
    state.counters.copy_(ahead.counters)
    if state.counts is not None and ahead.counts is not None:
        state.counts.copy_(ahead.counts)
    status = torch.zeros(batch, dtype=torch.int32, device=tokens.device)
    return Outputs(status, tokens=tokens, accepted=emitted - 1)
