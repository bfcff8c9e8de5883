"""The sampler as operators of ``torch.library``, for torch.compile and export."""

from __future__ import annotations

import torch

from gptkern.ops.sample import _native
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
_library.define("top_k_rows(Tensor logits, int k) -> (Tensor, Tensor, Tensor)")

Maybe = torch.Tensor | None
Five = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
Three = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


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


def _sample(
    logits: torch.Tensor,
    values: torch.Tensor,
    bias_ids: Maybe,
    bias_values: Maybe,
    banned_ids: Maybe,
    eos_ids: Maybe,
    bitmask: Maybe,
    counters: torch.Tensor,
    counts: Maybe,
    logprobs: int,
) -> Five:
    out = sample_outputs(logits, logprobs)
    params = SamplingParams(values, bias_ids, bias_values, banned_ids, eos_ids, bitmask)
    _native.sample(logits, params, SamplerState(counters, counts), logprobs, _native.COMMIT, **out)
    return out["tokens"], out["logprobs"], out["top_tokens"], out["top_logprobs"], out["status"]


def _accept(
    draft_tokens: torch.Tensor,
    draft_probs: Maybe,
    target_logits: torch.Tensor,
    values: torch.Tensor,
    bias_ids: Maybe,
    bias_values: Maybe,
    banned_ids: Maybe,
    eos_ids: Maybe,
    bitmask: Maybe,
    counters: torch.Tensor,
    counts: Maybe,
) -> Three:
    out = accept_outputs(target_logits)
    params = SamplingParams(values, bias_ids, bias_values, banned_ids, eos_ids, bitmask)
    state = SamplerState(counters, counts)
    drafts = {"draft_tokens": draft_tokens, "draft_probs": draft_probs}
    _native.sample(target_logits, params, state, -1, _native.COMMIT, **out, **drafts)  # type: ignore[arg-type]
    return out["tokens"], out["accepted"], out["status"]


def _top_k_rows(logits: torch.Tensor, k: int) -> Three:
    out = top_k_outputs(logits, k)
    _native.top_k(logits, k, **out)
    return out["tokens"], out["logprobs"], out["status"]


for _backend in ("CPU", "CUDA"):
    _library.impl("sample", _sample, _backend)
    _library.impl("speculative_accept", _accept, _backend)
    _library.impl("top_k_rows", _top_k_rows, _backend)


@torch.library.register_fake("gptkern::sample")
def _(logits: torch.Tensor, *rest: object) -> Five:
    logprobs = rest[-1]
    assert isinstance(logprobs, int)
    out = sample_outputs(logits, logprobs)
    return out["tokens"], out["logprobs"], out["top_tokens"], out["top_logprobs"], out["status"]


@torch.library.register_fake("gptkern::speculative_accept")
def _(draft_tokens: torch.Tensor, draft_probs: Maybe, target_logits: torch.Tensor, *rest: object) -> Three:
    out = accept_outputs(target_logits)
    return out["tokens"], out["accepted"], out["status"]


@torch.library.register_fake("gptkern::top_k_rows")
def _(logits: torch.Tensor, k: int) -> Three:
    out = top_k_outputs(logits, k)
    return out["tokens"], out["logprobs"], out["status"]
