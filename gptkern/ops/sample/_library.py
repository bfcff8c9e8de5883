"""The sampler as operators of ``torch.library``, for torch.compile and export."""

from __future__ import annotations

from typing import Any

import torch

from gptkern._native import COMMIT, KEEP_STATE
from gptkern.ops.sample import _native, checks
from gptkern.ops.sample.params import SamplerState, SamplingParams

_library = torch.library.Library("gptkern", "FRAGMENT")
_PARAMS = ", ".join(
    ["Tensor values"]
    + [f"Tensor? {name}" for name in ("bias_ids", "bias_values", "banned_ids", "eos_ids", "bitmask")]
)
_STATE = "Tensor(a!) counters, Tensor(b!)? counts"
_library.define(
    f"sample(Tensor logits, {_PARAMS}, {_STATE}, int logprobs) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_library.define(
    "speculative_accept(Tensor draft_tokens, Tensor? draft_probs, Tensor target_logits, "
    f"{_PARAMS}, {_STATE}) -> (Tensor, Tensor, Tensor)"
)
_library.define(
    f"sampling_probs(Tensor logits, {_PARAMS}, Tensor counters, Tensor? counts) -> (Tensor, Tensor)"
)
_library.define("top_k_rows(Tensor logits, int k) -> (Tensor, Tensor, Tensor)")

Five = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
Three = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
Two = tuple[torch.Tensor, torch.Tensor]


def sample_outputs(logits: torch.Tensor, logprobs: int) -> dict[str, torch.Tensor]:
    """Where a call writes; ``logprobs`` is the width of the top arrays, -1: none, no log-probabilities."""
    batch, device = logits.shape[0], logits.device
    scored, width = (batch, logprobs) if logprobs >= 0 else (0, 0)
    return {
        "tokens": torch.empty(batch, dtype=torch.int64, device=device),
        "logprobs": torch.empty(scored, dtype=torch.float32, device=device),
        "top_tokens": torch.empty(scored, width, dtype=torch.int64, device=device),
        "top_logprobs": torch.empty(scored, width, dtype=torch.float32, device=device),
        "status": torch.empty(batch, dtype=torch.int32, device=device),
    }


def probs_outputs(logits: torch.Tensor) -> dict[str, torch.Tensor]:
    """Where distributions are written."""
    return {
        "probs": torch.empty(logits.shape, dtype=torch.float32, device=logits.device),
        "status": torch.empty(logits.shape[0], dtype=torch.int32, device=logits.device),
    }


def accept_outputs(target_logits: torch.Tensor) -> dict[str, torch.Tensor]:
    """Where a verification writes."""
    batch, positions, _ = target_logits.shape
    device = target_logits.device
    return {
        "tokens": torch.empty(batch, positions, dtype=torch.int64, device=device),
        "accepted": torch.empty(batch, dtype=torch.int64, device=device),
        "status": torch.empty(batch, dtype=torch.int32, device=device),
    }


def top_k_outputs(logits: torch.Tensor, k: int) -> dict[str, torch.Tensor]:
    """Where the k best of each row are written."""
    rows, device = logits.shape[0], logits.device
    return {
        "tokens": torch.empty(rows, k, dtype=torch.int64, device=device),
        "logprobs": torch.empty(rows, k, dtype=torch.float32, device=device),
        "status": torch.empty(rows, dtype=torch.int32, device=device),
    }


def _sample(logits: torch.Tensor, *rest: Any) -> Five:
    params, state, logprobs = SamplingParams(*rest[:6]), SamplerState(*rest[6:8]), rest[8]
    checks.rows("sample", logits, params, state)
    out = sample_outputs(logits, logprobs)
    if not _native.traced(logits):
        _native.sample(logits, params, state, logprobs, COMMIT, **out)
    return out["tokens"], out["logprobs"], out["top_tokens"], out["top_logprobs"], out["status"]


def _probs(logits: torch.Tensor, *rest: Any) -> Two:
    params, state = SamplingParams(*rest[:6]), SamplerState(*rest[6:])
    checks.rows("sampling_probs", logits, params, state)
    out = probs_outputs(logits)
    if not _native.traced(logits):
        _native.sample(logits, params, state, -1, KEEP_STATE, **out)
    return out["probs"], out["status"]


def _accept(
    draft_tokens: torch.Tensor, draft_probs: torch.Tensor | None, target_logits: torch.Tensor, *rest: Any
) -> Three:
    params, state = SamplingParams(*rest[:6]), SamplerState(*rest[6:])
    op = "speculative_accept"
    checks.rows(op, target_logits, params, state, dim=3)
    checks.drafts(op, draft_tokens, draft_probs, target_logits)
    out = accept_outputs(target_logits)
    if not _native.traced(target_logits):
        drafts = {
            "draft_tokens": draft_tokens.contiguous(),
            "draft_probs": None if draft_probs is None else draft_probs.contiguous(),
        }
        _native.sample(target_logits, params, state, -1, COMMIT, **out, **drafts)
    return out["tokens"], out["accepted"], out["status"]


def _top_k_rows(logits: torch.Tensor, k: int) -> Three:
    checks.best("top_k_rows", logits, k)
    out = top_k_outputs(logits, k)
    if not _native.traced(logits):
        _native.top_k(logits, k, **out)
    return out["tokens"], out["logprobs"], out["status"]


# The fake kernel is the kernel without its last step: the same checks, the same outputs.
for _name, _kernel in (
    ("sample", _sample),
    ("sampling_probs", _probs),
    ("speculative_accept", _accept),
    ("top_k_rows", _top_k_rows),
):
    for _backend in ("CPU", "CUDA"):
        _library.impl(_name, _kernel, _backend)
    torch.library.register_fake(f"gptkern::{_name}", _kernel)
