"""Argument errors of the sampler's calls, and the errors of rows that could not be sampled.

Public functions, registered ops and their fake kernels all call the checks of arguments, which read no
tensor's values or memory, so that ``torch.compile`` can trace them. The extension checks again whatever
keeps it within its tensors, storages included.
"""

from __future__ import annotations

from typing import NoReturn

import torch

from gptkern._native import (
    BAD_DRAFT,
    BAD_DRAFT_LENGTH,
    BAD_DRAFT_PROBS,
    BAD_TOKEN_ID,
    COUNTERS,
    INFINITE,
    MAX_VOCAB,
    MAX_VOCAB_TOP_K,
    NAN,
    NEEDS_COUNTS,
    NOTHING_ALLOWED,
    PARAMETERS,
)
from gptkern.ops import _checks
from gptkern.ops.sample.params import SamplerState, SamplingParams, check_values


def vocabulary(op: str, logits: torch.Tensor, most: int) -> None:
    """The dtype, and 1 to ``most`` tokens in the last dimension."""
    _checks.dtype(op, "logits", logits, _checks.KERNEL_FLOATS)
    if not 0 < logits.shape[-1] <= most:
        raise ValueError(f"{op}: logits have {logits.shape[-1]} tokens; 1 to {most} are accepted")


def rows(op: str, logits: torch.Tensor, params: SamplingParams, state: SamplerState, dim: int = 2) -> None:
    """Logits ``(batch, vocab)``, or of three dimensions, with parameters and a state of as many rows."""
    _checks.tensor(op, "logits", logits, dim=dim)
    _made(op, "params", params, SamplingParams)
    _made(op, "state", state, SamplerState)
    vocabulary(op, logits, MAX_VOCAB)
    _checks.last_dim_contiguous(op, "logits", logits)
    batch, vocab = logits.shape[0], logits.shape[-1]
    _checks.tensor(op, "params.values", params.values, dim=2)
    _checks.tensor(op, "state.counters", state.counters, dim=2)
    if params.values.shape[0] != batch or state.counters.shape[0] != batch:
        raise ValueError(
            f"{op}: logits have {batch} rows, params {params.values.shape[0]} and state "
            f"{state.counters.shape[0]}; all must have the same number"
        )
    _row_of_each(op, "params.values", logits, params.values, torch.float64, len(PARAMETERS))
    _row_of_each(op, "state.counters", logits, state.counters, torch.int64, len(COUNTERS))
    if state.counts is not None:
        _row_of_each(op, "state.counts", logits, state.counts, torch.int32, vocab)
    for name, ids in (
        ("params.bias_ids", params.bias_ids),
        ("params.banned_ids", params.banned_ids),
        ("params.eos_ids", params.eos_ids),
    ):
        if ids is not None:
            _row_of_each(op, name, logits, ids, torch.int32)
    if (params.bias_ids is None) != (params.bias_values is None):
        raise ValueError(f"{op}: params has only one of bias_ids and bias_values; give both or neither")
    if params.bias_ids is not None and params.bias_values is not None:
        width = params.bias_ids.shape[1]
        _row_of_each(op, "params.bias_values", logits, params.bias_values, torch.float32, width)
    if params.bitmask is not None:
        _row_of_each(op, "params.bitmask", logits, params.bitmask, torch.int32)
        if params.bitmask.shape[1] * 32 < vocab:
            raise ValueError(
                f"{op}: params.bitmask has {params.bitmask.shape[1]} words a row; at least "
                f"{-(-vocab // 32)} are needed"
            )


def _made(op: str, name: str, value: object, kind: type) -> None:
    if not isinstance(value, kind):
        wanted = kind.__name__
        raise TypeError(f"{op}: {name} is {type(value).__name__}; a {wanted} is needed: {wanted}.make(...)")


def _row_of_each(
    op: str,
    name: str,
    logits: torch.Tensor,
    value: torch.Tensor,
    dtype: torch.dtype,
    columns: int | None = None,
) -> None:
    """``value`` is ``(batch, columns)`` (None: any number of them), contiguous, beside the logits."""
    _checks.tensor(op, name, value, dim=2)
    _checks.dtype(op, name, value, (dtype,))
    rows, width = value.shape
    if value.device != logits.device:
        raise ValueError(
            f"{op}: logits are on {logits.device} and {name} on {value.device}; one device is needed"
        )
    if rows != logits.shape[0] or (columns is not None and width != columns) or not value.is_contiguous():
        wanted = "any number" if columns is None else columns
        raise ValueError(
            f"{op}: {name} has shape {tuple(value.shape)}, strides {value.stride()}; "
            f"{logits.shape[0]} contiguous rows of {wanted} are needed"
        )


def drafts(
    op: str,
    draft_tokens: torch.Tensor,
    draft_probs: torch.Tensor | None,
    draft_lengths: torch.Tensor | None,
    target_logits: torch.Tensor,
) -> None:
    """Drafts of one position fewer than ``target_logits`` ``(batch, n + 1, vocab)``."""
    batch, positions, vocab = target_logits.shape
    if positions < 1:
        raise ValueError(f"{op}: target_logits have no position; one more than there are drafts is needed")
    _draft(
        op, "draft_tokens", draft_tokens, target_logits, (torch.int64, torch.int32), (batch, positions - 1)
    )
    if draft_probs is not None:
        _draft(op, "draft_probs", draft_probs, target_logits, (torch.float32,), (batch, positions - 1, vocab))
    if draft_lengths is not None:
        _draft(op, "draft_lengths", draft_lengths, target_logits, (torch.int64, torch.int32), (batch,))


def _draft(
    op: str,
    name: str,
    value: torch.Tensor,
    target_logits: torch.Tensor,
    accepted: tuple[torch.dtype, ...],
    shape: tuple[int, ...],
) -> None:
    _checks.tensor(op, name, value)
    _checks.dtype(op, name, value, accepted)
    why = "one for each row" if name == "draft_lengths" else "target_logits have one position more"
    _checks.shape(op, name, value, shape, why)
    if value.device != target_logits.device:
        raise ValueError(f"{op}: target_logits are on {target_logits.device} and {name} on {value.device}")


def best(op: str, logits: torch.Tensor, k: int) -> None:
    """Logits ``(rows, vocab)`` and the number ``k`` of best tokens."""
    _checks.tensor(op, "logits", logits, dim=2)
    vocabulary(op, logits, MAX_VOCAB_TOP_K)
    _checks.last_dim_contiguous(op, "logits", logits)
    if not 0 <= k <= logits.shape[1]:
        raise ValueError(f"{op}: k is {k}; 0 to {logits.shape[1]} are accepted")


def first_bad(status: torch.Tensor) -> int:
    """The first row with a status other than 0, or -1; waits for the device."""
    bad = status.nonzero()
    return int(bad[0, 0].item()) if bad.numel() else -1


def refuse(op: str, logits: torch.Tensor, params: SamplingParams, row: int, status: int) -> NoReturn:
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
        BAD_DRAFT_LENGTH: f"draft_lengths[{row}] is outside of 0 to the number of drafted tokens",
        BAD_DRAFT: f"draft_tokens[{row}] holds a token outside the vocabulary of {logits.shape[-1]}",
        BAD_DRAFT_PROBS: f"draft_probs[{row}] holds NaN, a negative number or infinity; probabilities are "
        "needed",
    }
    raise ValueError(f"{op}: {reasons[status]}")
