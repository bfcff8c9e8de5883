"""Choosing the next tokens: one call for a batch, in gptkern's C++ and CUDA sampler."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch

from gptkern._native import COMMIT, KEEP_STATE, MAX_VOCAB_TOP_K
from gptkern.ops import _checks
from gptkern.ops.sample import checks, fallback, launch, reference, register  # noqa: F401  (torch.ops.gptkern)
from gptkern.ops.sample.launch import Drafts, Outputs
from gptkern.ops.sample.params import SamplerState, SamplingParams


class TopLogprobs(NamedTuple):
    """The most likely tokens under the raw logits: ``tokens`` int64 and ``logprobs`` fp32, ``(batch, n)``.

    Best first, ties by the lower id; a row with a smaller ``n_logprobs`` is padded with token -1.
    """

    tokens: torch.Tensor
    logprobs: torch.Tensor


class Sampled(NamedTuple):
    """The result of :func:`sample`.

    Attributes:
        tokens: ``(batch,)`` int64.
        logprobs: ``(batch,)`` fp32, log-softmax of the raw logits at ``tokens`` (before bias, penalties
            and temperature); None unless ``SamplingParams.max_logprobs`` asks for it.
        top_logprobs: None unless ``SamplingParams.max_logprobs`` is at least 1.
        status: ``(batch,)`` int32: 0, or the reason why the row could not be sampled (its token is then
            0, and its state does not change). It matters only if ``validate`` is off.
    """

    tokens: torch.Tensor
    logprobs: torch.Tensor | None
    top_logprobs: TopLogprobs | None
    status: torch.Tensor


class Accepted(NamedTuple):
    """The result of :func:`speculative_accept`.

    Attributes:
        tokens: ``(batch, n + 1)`` int64: the accepted drafted tokens, one token more, then -1.
        n_accepted: ``(batch,)`` int64: the number of accepted drafted tokens.
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
    cut-offs. Ties are broken by the lower token id, so that top-k keeps exactly k tokens.

    With ``rng="philox"`` the draw is a function of the row's seed, request and step alone: the same in
    any batch, with any number of threads, on the CPU and on a GPU. Probabilities are whole numbers of
    2^-44 of the largest one; a token less likely than half of that is never drawn. ``rng="torch"`` draws
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
    width = params.max_logprobs
    if rng == "torch" or not launch.serves(logits):
        return as_sampled(width, fallback.sample(logits, params, state, rng))
    if launch.traced(logits):
        columns = -1 if width is None else width
        tensors = torch.ops.gptkern.sample(logits, *_tensors(params), state.counters, state.counts, columns)
        tokens, logprobs, top_tokens, top_logprobs, status = tensors
        return as_sampled(width, Outputs(status, tokens, logprobs, top_tokens, top_logprobs))
    outputs = launch.sample_outputs(logits, width)
    launch.sample_and_commit("sample", logits, params, state, outputs, validate)
    return as_sampled(width, outputs)


def sample_into(
    outputs: Outputs, logits: torch.Tensor, params: SamplingParams, *, state: SamplerState
) -> Sampled:
    """``sample`` for every pass of a batch: into tensors that were made once, with no check in Python.

    A row that cannot be sampled gets a status; on a CPU no row's state changes then.

    Args:
        outputs: ``launch.sample_outputs`` of such logits and ``params.max_logprobs``.
        logits: Logits that ``launch.serves``.
    """
    launch.sample(logits, params, state, outputs, COMMIT)
    return as_sampled(params.max_logprobs, outputs)


def sampling_probs(logits: torch.Tensor, params: SamplingParams, *, state: SamplerState) -> torch.Tensor:
    """The distribution that :func:`sample` draws from, ``(batch, vocab)`` fp32; ``state`` is not advanced.

    Arguments and errors are those of :func:`sample`. A row that cannot be sampled on CUDA is all 0.
    """
    checks.rows("sampling_probs", logits, params, state)
    probs: torch.Tensor | None
    if not launch.serves(logits):
        return torch.softmax(fallback.filtered(logits.double(), params, state), dim=-1).float()
    if launch.traced(logits):
        probs, _ = torch.ops.gptkern.sampling_probs(logits, *_tensors(params), state.counters, state.counts)
    else:
        outputs = launch.probs_outputs(logits)
        bad = launch.sample(logits, params, state, outputs, KEEP_STATE)
        if bad >= 0:
            checks.refuse("sampling_probs", logits, params, bad, int(outputs.status[bad]))
        probs = outputs.probs
    assert probs is not None
    return probs


def _tensors(params: SamplingParams) -> tuple[torch.Tensor | None, ...]:
    p = params
    return p.values, p.bias_ids, p.bias_values, p.banned_ids, p.eos_ids, p.bitmask


def as_sampled(width: int | None, outputs: Outputs) -> Sampled:
    """The result of a draw, as it lies in ``outputs``; ``width`` is ``max_logprobs``."""
    tokens, logprobs = outputs.tokens, outputs.logprobs
    top_tokens, top_logprobs = outputs.top_tokens, outputs.top_logprobs
    assert tokens is not None and top_tokens is not None and top_logprobs is not None
    top = TopLogprobs(top_tokens, top_logprobs) if width else None
    return Sampled(tokens, None if width is None else logprobs, top, outputs.status)


def top_k_logprobs(
    logits: torch.Tensor, k: int, *, scores: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Beam search's step: the k best continuations over all of a sequence's beams.

    Args:
        logits: ``(batch, beams, vocab)`` fp32, fp16 or bf16, contiguous; at most 2^24 tokens.
        k: The number of continuations, at most ``beams * vocab``.
        scores: ``(batch, beams)`` fp32, the beams' sums of log-probabilities so far; None: 0.

    Returns:
        ``(logprobs, beams, tokens)``, each ``(batch, k)``. They are score plus log-softmax (fp32), the
        beam it continues and the token (int64); best first, ties by the lower beam, then the lower token.

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
    if not launch.serves(logits):
        if not bool((logits < float("inf")).all()):
            raise ValueError("top_k_logprobs: logits hold NaN or +inf; numbers and -inf are accepted")
        return reference.top_k_logprobs(logits, k)
    if launch.traced(logits):
        tokens, logprobs, _ = torch.ops.gptkern.top_k_rows(logits, k)
        return logprobs, tokens.clamp(min=0)
    outputs = launch.top_k_outputs(logits, k)
    bad = launch.top_k(logits, k, outputs)
    if bad >= 0:
        raise ValueError(f"top_k_logprobs: row {bad} of logits holds NaN, +inf, or nothing but -inf")
    assert outputs.logprobs is not None and outputs.tokens is not None
    return outputs.logprobs, outputs.tokens.clamp_(min=0)


def speculative_accept(
    draft_tokens: torch.Tensor,
    draft_probs: torch.Tensor | None,
    target_logits: torch.Tensor,
    params: SamplingParams,
    *,
    state: SamplerState,
    draft_lengths: torch.Tensor | None = None,
    validate: bool | None = None,
) -> Accepted:
    """Verify drafted tokens so that the result is distributed as if the target had drawn all of it.

    Exact rejection sampling: token t is accepted with probability min(1, p(t) / q(t)); at the first
    rejection a token is drawn from max(p - q, 0) normalised, and after n acceptances one from p.
    p is the target's distribution as :func:`sample` would use it, penalties counting the tokens
    accepted before. ``state`` advances by the tokens of the result. Temperature 0 accepts the target's best.

    Args:
        draft_tokens: ``(batch, n)`` int64 or int32.
        draft_probs: ``(batch, n, vocab)`` fp32, the draft's distributions; None: it was certain.
        target_logits: ``(batch, n + 1, vocab)``, the target's logits at the drafted positions and after.
        params, state, validate: As for :func:`sample`; log-probabilities are not computed.
        draft_lengths: ``(batch,)`` int64 or int32, 0 to n: the drafted tokens of each row, whose token of the
            target's own is drawn from the logits after them; later ones are not read. None: n for all.

    Raises:
        ValueError, TypeError: As :func:`sample`; a length out of range, a drafted token outside the
            vocabulary, NaN, a negative number or infinity among the draft's probabilities up to the first
            rejection.
    """
    op = "speculative_accept"
    checks.rows(op, target_logits, params, state, dim=3)
    checks.drafts(op, draft_tokens, draft_probs, draft_lengths, target_logits)
    drafts = Drafts.of(draft_tokens, draft_probs, draft_lengths)
    if not launch.serves(target_logits):
        outputs = fallback.accept(drafts, target_logits, params, state)
    elif launch.traced(target_logits):
        tokens, accepted, status = torch.ops.gptkern.speculative_accept(
            *drafts[:2], target_logits, *_tensors(params), state.counters, state.counts, drafts.lengths
        )
        return Accepted(tokens, accepted, status)
    else:
        outputs = launch.accept_outputs(target_logits)
        launch.sample_and_commit(op, target_logits, params, state, outputs, validate, drafts)
    assert outputs.tokens is not None and outputs.accepted is not None
    return Accepted(outputs.tokens, outputs.accepted, outputs.status)
