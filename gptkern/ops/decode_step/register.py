"""``torch.ops.gptkern.persistent_step``, for torch.compile and export."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from gptkern.ops._dispatch import use_kernel
from gptkern.ops._register import register
from gptkern.ops.decode_step import checks, launch, reference
from gptkern.ops.decode_step.launch import StepArguments
from gptkern.ops.decode_step.weights import COLUMNS, FLAT_FIELDS, MATRICES, unflat


def _step(*arguments: Any) -> torch.Tensor:
    weights, tensors, (k_scale, v_scale) = arguments[:FLAT_FIELDS], arguments[FLAT_FIELDS:-2], arguments[-2:]
    model = unflat(*weights)
    if (k_scale is None) != (v_scale is None):
        raise ValueError("persistent_step: k_scale and v_scale: both or neither are needed")
    scales = None if k_scale is None else (k_scale, v_scale)
    a = StepArguments(model, *tensors)._replace(scales=scales)
    checks.check("persistent_step", a)
    return launch.step(a) if use_kernel(model.token_weight) else reference.persistent_step(*a)


def _fake(
    token_weight: torch.Tensor,
    position_weight: torch.Tensor,
    weights: Sequence[torch.Tensor | None],
    attention_scales: Sequence[float],
    heads: int,
    eps: float,
    activation: str,
    format: str | None,
    tokens: torch.Tensor,
    *_: Any,
) -> torch.Tensor:
    head = weights[len(weights) - COLUMNS + MATRICES]
    assert head is not None
    return token_weight.new_empty((tokens.shape[0], head.shape[0]))


register(
    "persistent_step(Tensor token_weight, Tensor position_weight, Tensor?[] weights, "
    "float[] attention_scales, SymInt heads, float eps, str activation, str? format, Tensor tokens, "
    "Tensor live, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor page_table, Tensor(c!) seq_lens, "
    "Tensor? k_scale, Tensor? v_scale) -> Tensor",
    _step,
    fake=_fake,
)
