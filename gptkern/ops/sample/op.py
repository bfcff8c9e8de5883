"""Choosing the next tokens: one call for a batch, in gptkern's C++ and CUDA sampler."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch

from gptkern._native import (
    BAD_DRAFT,
    BAD_TOKEN_ID,
    COMMIT,
    COMMIT_ONLY,
    INFINITE,
    KEEP_STATE,
    MAX_VOCAB_TOP_K,
    NAN,
    NEEDS_COUNTS,
    NOTHING_ALLOWED,
)
from gptkern.ops import _checks
from gptkern.ops.sample import _library, _native, checks, reference
from gptkern.ops.sample.params import SamplerState, SamplingParams, check_values


class TopLogprobs(NamedTuple):
    """The most likely tokens under the raw logits: ``tokens`` int64 and ``logprobs`` fp32, ``(batch, n)``.

    Best first, ties by the lower id; a row that asked for fewer is padded with token -1.
    """

    tokens: torch.Tensor
    logprobs: torch.Tensor


class Sampled(NamedTuple):
    """What :func:`sample` chose.

    Attributes:
        tokens: ``(batch,)`` int64.
        logprobs: ``(batch,)`` fp32, log-softmax of the raw logits at ``tokens`` (before bias, penalties
            and temperature); None unless ``SamplingParams.max_logprobs`` asks for it.
        top_logprobs: None unless asked for.
        status: ``(batch,)`` int32: 0, or why the row could not be sampled (its token is then 0, and
            its state is left alone). Only to be looked at where ``validate`` is off.
    """

    tokens: torch.Tensor
    logprobs: torch.Tensor | None
    top_logprobs: TopLogprobs | None
    status: torch.Tensor


class Accepted(NamedTuple):
    """What :func:`speculative_accept` chose.

    Attributes:
        tokens: ``(batch, n + 1)`` int64: the accepted drafted tokens, one token more, then -1.
        n_accepted: ``(batch,)`` int64: how many drafted tokens were accepted.
        status: As in :class:`Sampled`.
    """

    tokens: torch.Tensor
    n_accepted: torch.Tensor
    status: torch.Tensor


def sample(
    logits: torch.Tensor,
    params: SamplingParams,
    *,
    state: SamplerState,
    rng: Literal["philox", "torch"] = "philox",
    validate: bool | None = None,
) -> Sampled:
    """Choose one token for each row, and advance ``state``.

    ::

        params = SamplingParams.make(batch, vocab, temperature=0.8, top_k=50, top_p=0.9)
        state = SamplerState.make(batch, vocab, seed=1)
        for _ in range(n):
            tokens = sample(logits, params, state=state).tokens

    Order and meaning are those of ``transformers`` 5: logit bias; repetition, then frequency and
    presence penalty; banned tokens; EOS before ``min_new_tokens``; bitmask; then temperature (0: the
    most likely token), top-k, top-p on what is left and renormalised, min-p, typical, epsilon and eta
    cut-offs. Ties are broken by the lower token id, so that exactly k tokens are kept.

    With ``rng="philox"`` the draw is a function of the row's seed, request and step alone: the same in
    any batch, with any number of threads, on the CPU and on a GPU. Probabilities are whole numbers of
    2^-44 of the largest one; what is less likely than half of that is never drawn. ``rng="torch"`` draws
    with ``torch.multinomial`` from torch's global generator, as ``transformers`` does; it is slower.

    Args:
        logits: ``(batch, vocab)`` fp32, fp16 or bf16, contiguous in the vocabulary; at most 2^19 tokens.
        params: Per row, on the logits' device.
        state: Per row, on the logits' device.
        validate: Raise for a row that cannot be sampled, changing nothing. On CUDA this waits for the
            device; the default is on for CPU tensors and off for CUDA, where ``status`` tells.

    Raises:
        ValueError: NaN or +inf in a row, nothing left to choose from, a parameter out of range, a
            token id outside the vocabulary, tensors that do not fit.
        TypeError: A dtype that is not accepted.
    """
    checks.rows("sample", logits, params, state)
    if rng not in ("philox", "torch"):
        raise ValueError(f"sample: rng is {rng!r}; accepted are 'philox' and 'torch'")
    if rng == "torch" or not _native.serves(logits):
        return _sample_reference(logits, params, state, rng)
    if _native.traced(logits):
        width = -1 if params.max_logprobs is None else params.max_logprobs
        out = torch.ops.gptkern.sample(logits, *_tensors(params), state.counters, state.counts, width)
        return _sampled(width, *out)
    return _sample(logits, params, state, logits.device.type == "cpu" if validate is None else validate)


def sampling_probs(logits: torch.Tensor, params: SamplingParams, *, state: SamplerState) -> torch.Tensor:
    """The distribution that :func:`sample` draws from, ``(batch, vocab)`` fp32; ``state`` is not advanced.

    Arguments and errors are those of :func:`sample`. A row that cannot be sampled on CUDA is all 0.
    """
    checks.rows("sampling_probs", logits, params, state)
    if not _native.serves(logits):
        return torch.softmax(_filtered(logits.double(), params, state), dim=-1).float()
    if _native.traced(logits):
        probs: torch.Tensor
        probs, _ = torch.ops.gptkern.sampling_probs(logits, *_tensors(params), state.counters, state.counts)
        return probs
    out = _library.probs_outputs(logits)
    bad = _native.sample(logits, params, state, -1, KEEP_STATE, **out)
    if bad >= 0:
        _refuse("sampling_probs", logits, params, state, bad, int(out["status"][bad]))
    return out["probs"]


def _sample(logits: torch.Tensor, params: SamplingParams, state: SamplerState, validate: bool) -> Sampled:
    width = -1 if params.max_logprobs is None else params.max_logprobs
    out = _library.sample_outputs(logits, width)
    on_cuda = logits.device.type == "cuda"
    # The CPU path commits nothing when a row is bad; a kernel cannot know of the other rows.
    commit = KEEP_STATE if on_cuda and validate else COMMIT
    bad = _native.sample(logits, params, state, width, commit, **out)
    if on_cuda and validate:
        bad = _first_bad(out["status"])
    if bad >= 0 and validate:
        _refuse("sample", logits, params, state, bad, int(out["status"][bad]))
    if on_cuda and validate:
        _native.sample(logits, params, state, width, COMMIT_ONLY, **out)
    return _sampled(width, **out)


def _tensors(params: SamplingParams) -> tuple[torch.Tensor | None, ...]:
    p = params
    return p.values, p.bias_ids, p.bias_values, p.banned_ids, p.eos_ids, p.bitmask


def _sampled(
    width: int,
    tokens: torch.Tensor,
    logprobs: torch.Tensor,
    top_tokens: torch.Tensor,
    top_logprobs: torch.Tensor,
    status: torch.Tensor,
) -> Sampled:
    top = TopLogprobs(top_tokens, top_logprobs) if width > 0 else None
    return Sampled(tokens, logprobs if width >= 0 else None, top, status)


def _first_bad(status: torch.Tensor) -> int:
    """The first row with a status other than 0, or -1; waits for the device."""
    bad = status.nonzero()
    return int(bad[0, 0].item()) if bad.numel() else -1


def _refuse(
    op: str, logits: torch.Tensor, params: SamplingParams, state: SamplerState, row: int, status: int
) -> None:
    """Raise for a row that could not be sampled."""
    check_values(op, params.values[row].tolist(), row, logits.shape[-1], params.max_logprobs)
    reasons = {
        NAN: f"logits[{row}] holds NaN; numbers and -inf are accepted",
        INFINITE: f"logits[{row}], with its biases, holds +inf; numbers and -inf are accepted",
        NOTHING_ALLOWED: f"logits[{row}] leaves no token to choose: every one is -inf or banned",
        NEEDS_COUNTS: f"row {row} asks for a penalty, which needs a state that keeps counts: "
        "SamplerState.make(..., history=True)",
        BAD_TOKEN_ID: f"params name a token for row {row} that is outside the vocabulary of "
        f"{logits.shape[-1]} (ids are 0 to {logits.shape[-1] - 1}, padding is -1)",
        BAD_DRAFT: f"draft_tokens[{row}] holds a token outside the vocabulary of {logits.shape[-1]}",
    }
    raise ValueError(f"{op}: {reasons[status]}")


# The reference path: plain PyTorch, for gptkern.backend("reference") and where the extension is missing.


def _filtered(
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
    """What the extension checks in the row, for the reference."""
    vocab = logits.shape[-1]
    for row, values in enumerate(params.values.tolist()):
        check_values(op, values, row, vocab, params.max_logprobs)
        if values[7:10] != [1.0, 0.0, 0.0] and state.counts is None:
            _refuse(op, logits, params, state, row, NEEDS_COUNTS)
    for ids in (params.bias_ids, params.banned_ids, params.eos_ids):
        if ids is not None and bool(((ids < -1) | (ids >= vocab)).any()):
            row = _first_bad(((ids < -1) | (ids >= vocab)).any(1))
            _refuse(op, logits, params, state, row, BAD_TOKEN_ID)
    for status, bad in (
        (NAN, logits.isnan()),
        (INFINITE, logits == float("inf")),
    ):
        if bool(bad.any()):
            _refuse(op, logits, params, state, _first_bad(bad.flatten(1).any(1)), status)


def _sample_reference(logits: torch.Tensor, params: SamplingParams, state: SamplerState, rng: str) -> Sampled:
    _check_rows("sample", logits, params, state)
    # torch.multinomial is compared with transformers, which filters in the logits' own precision.
    x = _filtered(logits.double() if rng == "philox" else logits.float(), params, state)
    empty = (x == -float("inf")).all(-1)
    if bool(empty.any()):
        _refuse("sample", logits, params, state, _first_bad(empty), NOTHING_ALLOWED)
    probs = torch.softmax(x, dim=-1)
    if rng == "torch":
        drawn = torch.multinomial(probs, 1)[:, 0]
        tokens = torch.where(params.column("temperature") == 0, x.argmax(-1), drawn)
    else:
        tokens = reference.draw(probs, reference.uniforms(state.counters)[0])
    width = -1 if params.max_logprobs is None else params.max_logprobs
    out = _library.sample_outputs(logits, width)
    out["tokens"], out["status"] = tokens, torch.zeros_like(out["status"])
    if width >= 0:
        out["logprobs"] = torch.log_softmax(logits.double(), -1).gather(1, tokens[:, None])[:, 0].float()
        top_logprobs, top_tokens = reference.top_k_logprobs(logits, width)
        unasked = torch.arange(width, device=logits.device) >= params.column("n_logprobs")[:, None]
        unasked |= top_logprobs == -float("inf")
        out["top_tokens"] = top_tokens.masked_fill(unasked, -1)
        out["top_logprobs"] = top_logprobs.masked_fill(unasked, -float("inf"))
    _advance(state, tokens[:, None], torch.ones_like(tokens))
    return _sampled(width, **out)


def _advance(state: SamplerState, tokens: torch.Tensor, given: torch.Tensor) -> None:
    """Count the first ``given`` ``(batch,)`` of each row's ``tokens`` ``(batch, n)``."""
    state.steps.add_(given)
    if state.counts is not None:
        real = (torch.arange(tokens.shape[1], device=tokens.device) < given[:, None]).to(torch.int32)
        state.counts.scatter_add_(1, tokens.clamp(min=0), real)


def top_k_logprobs(
    logits: torch.Tensor, k: int, *, scores: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Beam search's step: the k best continuations over all of a sequence's beams.

    Args:
        logits: ``(batch, beams, vocab)`` fp32, fp16 or bf16, contiguous; at most 2^24 tokens.
        k: How many continuations, at most ``beams * vocab``.
        scores: ``(batch, beams)`` fp32, the beams' sums of log-probabilities so far; None: 0.

    Returns:
        ``(logprobs, beams, tokens)``, each ``(batch, k)``: score plus log-softmax (fp32), the beam it
        continues and the token (int64); best first, ties by the lower beam, then the lower token.

    Raises:
        ValueError: k out of range, NaN or +inf in the logits, shapes that do not fit.
    """
    _checks.tensor("top_k_logprobs", "logits", logits, dim=3)
    checks.vocabulary("top_k_logprobs", logits, MAX_VOCAB_TOP_K)
    batch, beams, vocab = logits.shape
    if not 1 <= k <= beams * vocab:
        raise ValueError(f"top_k_logprobs: k is {k}; 1 to beams * vocab = {beams * vocab} is needed")
    if scores is not None:
        _checks.shape("top_k_logprobs", "scores", scores, (batch, beams))
        _checks.same_device("top_k_logprobs", logits=logits, scores=scores)
    per_beam = min(k, vocab)
    flat = logits.flatten(0, 1).contiguous()
    values, tokens = _best_of_rows(flat, per_beam)
    values = values.reshape(batch, beams, per_beam)
    if scores is not None:
        values = values + scores[..., None]
    best, index = torch.sort(values.flatten(1), dim=-1, descending=True, stable=True)
    chosen = index[:, :k]
    return best[:, :k], chosen // per_beam, tokens.reshape(batch, beams * per_beam).gather(1, chosen)


def _best_of_rows(logits: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    if not _native.serves(logits):
        if not bool((logits < float("inf")).all()):
            raise ValueError("top_k_logprobs: logits hold NaN or +inf; numbers and -inf are accepted")
        return reference.top_k_logprobs(logits, k)
    if _native.traced(logits):
        tokens, logprobs, _ = torch.ops.gptkern.top_k_rows(logits, k)
        return logprobs, tokens.clamp(min=0)
    out = _library.top_k_outputs(logits, k)
    bad = _native.top_k(logits, k, **out)
    if bad >= 0:
        raise ValueError(f"top_k_logprobs: row {bad} of logits holds NaN, +inf, or nothing but -inf")
    return out["logprobs"], out["tokens"].clamp_(min=0)


def speculative_accept(
    draft_tokens: torch.Tensor,
    draft_probs: torch.Tensor | None,
    target_logits: torch.Tensor,
    params: SamplingParams,
    *,
    state: SamplerState,
    validate: bool | None = None,
) -> Accepted:
    """Verify drafted tokens so that what comes out is distributed as if the target had drawn it all.

    Exact rejection sampling: token t is accepted with probability min(1, p(t) / q(t)); at the first
    rejection a token is drawn from max(p - q, 0) normalised, and after n acceptances one from p.
    p is the target's distribution as :func:`sample` would use it, penalties counting the tokens
    accepted before. ``state`` advances by the tokens given. Temperature 0 accepts the target's best.

    Args:
        draft_tokens: ``(batch, n)`` int64.
        draft_probs: ``(batch, n, vocab)`` fp32, what the draft drew from; None: it was certain.
        target_logits: ``(batch, n + 1, vocab)``, the target's logits at the drafted positions and after.
        params, state, validate: As for :func:`sample`; log-probabilities are not computed.

    Raises:
        ValueError, TypeError: As :func:`sample`; a drafted token outside the vocabulary.
    """
    op = "speculative_accept"
    checks.rows(op, target_logits, params, state, dim=3)
    checks.drafts(op, draft_tokens, draft_probs, target_logits)
    draft_tokens = draft_tokens.contiguous()
    draft_probs = None if draft_probs is None else draft_probs.contiguous()
    if not _native.serves(target_logits):
        return _accept_reference(draft_tokens, draft_probs, target_logits, params, state)
    if _native.traced(target_logits):
        given = torch.ops.gptkern.speculative_accept(
            draft_tokens, draft_probs, target_logits, *_tensors(params), state.counters, state.counts
        )
        return Accepted(*given)
    out = _library.accept_outputs(target_logits)
    on_cuda = target_logits.device.type == "cuda"
    validate = not on_cuda if validate is None else validate
    commit = KEEP_STATE if on_cuda and validate else COMMIT
    drafts = {"draft_tokens": draft_tokens, "draft_probs": draft_probs}
    bad = _native.sample(target_logits, params, state, -1, commit, **out, **drafts)
    if on_cuda and validate:
        bad = _first_bad(out["status"])
    if bad >= 0 and validate:
        _refuse(op, target_logits, params, state, bad, int(out["status"][bad]))
    if on_cuda and validate:
        _native.sample(target_logits, params, state, -1, COMMIT_ONLY, **out)
    return Accepted(out["tokens"], out["accepted"], out["status"])


def _accept_reference(
    draft_tokens: torch.Tensor,
    draft_probs: torch.Tensor | None,
    target_logits: torch.Tensor,
    params: SamplingParams,
    state: SamplerState,
) -> Accepted:
    op = "speculative_accept"
    batch, positions, vocab = target_logits.shape
    _check_rows(op, target_logits, params, state)
    outside = ((draft_tokens < 0) | (draft_tokens >= vocab)).any(-1)
    if bool(outside.any()):
        _refuse(op, target_logits, params, state, _first_bad(outside), BAD_DRAFT)
    ahead = SamplerState(state.counters.clone(), None if state.counts is None else state.counts.clone())
    tokens = torch.full((batch, positions), -1, dtype=torch.int64, device=target_logits.device)
    going = torch.ones(batch, dtype=torch.bool, device=target_logits.device)
    given = torch.zeros(batch, dtype=torch.int64, device=target_logits.device)
    for position in range(positions):
        x = _filtered(target_logits[:, position].double(), params, ahead)
        empty = going & (x == -float("inf")).all(-1)
        if bool(empty.any()):
            _refuse(op, target_logits, params, state, _first_bad(empty), NOTHING_ALLOWED)
        probs = torch.softmax(x, dim=-1)
        for_token, for_acceptance = reference.uniforms(ahead.counters)
        if position == positions - 1:
            chosen, taken = reference.draw(probs, for_token), torch.zeros_like(going)
        else:
            q = None if draft_probs is None else draft_probs[:, position]
            chosen, taken = reference.speculative_step(
                probs, draft_tokens[:, position], q, for_token, for_acceptance
            )
        tokens[:, position] = torch.where(going, chosen, -1)
        given += going
        _advance(ahead, chosen[:, None], going.long())
        going = going & taken
    state.counters.copy_(ahead.counters)
    if state.counts is not None and ahead.counts is not None:
        state.counts.copy_(ahead.counts)
    return Accepted(tokens, given - 1, torch.zeros(batch, dtype=torch.int32, device=tokens.device))
