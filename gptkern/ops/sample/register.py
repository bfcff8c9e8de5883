"""The sampler as operators of ``torch.library``, for torch.compile and export."""

from __future__ import annotations

from typing import Any

import torch

from gptkern._native import COMMIT, KEEP_STATE
from gptkern.ops._register import register
from gptkern.ops.sample import checks, launch
from gptkern.ops.sample.launch import Drafts
from gptkern.ops.sample.params import SamplerState, SamplingParams

_PARAMS = ", ".join(
    ["Tensor values"]
    + [f"Tensor? {name}" for name in ("bias_ids", "bias_values", "banned_ids", "eos_ids", "bitmask")]
)
_STATE = "Tensor(a!) counters, Tensor(b!)? counts"

# Each kernel is its own fake kernel: while a graph is traced it does all but the call of the extension, so
# that the checks and the outputs are the same.


def _sample(logits: torch.Tensor, *rest: Any) -> tuple[torch.Tensor | None, ...]:
    width = None if rest[8] < 0 else rest[8]
    params, state = SamplingParams(*rest[:6]), SamplerState(*rest[6:8])
    params.max_logprobs = width
    checks.rows("sample", logits, params, state)
    out = launch.sample_outputs(logits, width)
    if not launch.traced(logits):
        launch.sample(logits, params, state, out, COMMIT)
    return out.tokens, out.logprobs, out.top_tokens, out.top_logprobs, out.status


def _probs(logits: torch.Tensor, *rest: Any) -> tuple[torch.Tensor | None, ...]:
    params, state = SamplingParams(*rest[:6]), SamplerState(*rest[6:])
    checks.rows("sampling_probs", logits, params, state)
    out = launch.probs_outputs(logits)
    if not launch.traced(logits):
        launch.sample(logits, params, state, out, KEEP_STATE)
    return out.probs, out.status


def _accept(
    draft_tokens: torch.Tensor, draft_probs: torch.Tensor | None, target_logits: torch.Tensor, *rest: Any
) -> tuple[torch.Tensor | None, ...]:
    params, state = SamplingParams(*rest[:6]), SamplerState(*rest[6:8])
    # A default is not passed on.
    op, draft_lengths = "speculative_accept", rest[8] if len(rest) > 8 else None
    checks.rows(op, target_logits, params, state, dim=3)
    checks.drafts(op, draft_tokens, draft_probs, draft_lengths, target_logits)
    out = launch.accept_outputs(target_logits)
    if not launch.traced(target_logits):
        drafts = Drafts.of(draft_tokens, draft_probs, draft_lengths)
        launch.sample(target_logits, params, state, out, COMMIT, drafts)
    return out.tokens, out.accepted, out.status


def _top_k_rows(logits: torch.Tensor, k: int) -> tuple[torch.Tensor | None, ...]:
    checks.best("top_k_rows", logits, k)
    out = launch.top_k_outputs(logits, k)
    if not launch.traced(logits):
        launch.top_k(logits, k, out)
    return out.tokens, out.logprobs, out.status


register(
    f"sample(Tensor logits, {_PARAMS}, {_STATE}, int logprobs) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _sample,
    fake=_sample,
)
register(
    f"sampling_probs(Tensor logits, {_PARAMS}, Tensor counters, Tensor? counts) -> (Tensor, Tensor)",
    _probs,
    fake=_probs,
)
register(
    "speculative_accept(Tensor draft_tokens, Tensor? draft_probs, Tensor target_logits, "
    f"{_PARAMS}, {_STATE}, Tensor? draft_lengths=None) -> (Tensor, Tensor, Tensor)",
    _accept,
    fake=_accept,
)
register("top_k_rows(Tensor logits, int k) -> (Tensor, Tensor, Tensor)", _top_k_rows, fake=_top_k_rows)
