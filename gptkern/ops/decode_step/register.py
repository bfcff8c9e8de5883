"""``torch.ops.gptkern.persistent_step``, for torch.compile and export."""

from __future__ import annotations

from typing import Any

import torch

from gptkern.ops._dispatch import use_kernel
from gptkern.ops._register import register
from gptkern.ops.decode_step import checks, launch, reference
from gptkern.ops.decode_step.flat import FIELDS, SCHEMA, unflat
from gptkern.ops.decode_step.launch import StepArguments
from gptkern.ops.decode_step.rows import TENSORS


def _step(*arguments: Any) -> torch.Tensor:
    own, tensors, (k_scale, v_scale) = arguments[:FIELDS], arguments[FIELDS:-2], arguments[-2:]
    program = unflat(*own)
    if (k_scale is None) != (v_scale is None):
        raise ValueError("persistent_step: k_scale and v_scale: both or neither are needed")
    scales = None if k_scale is None else (k_scale, v_scale)
    a = StepArguments(program, *tensors)._replace(scales=scales)
    checks.check("persistent_step", a)
    return launch.step(a) if use_kernel(program.token_weight) else reference.persistent_step(*a)


def _fake(token_weight: torch.Tensor, *rest: Any) -> torch.Tensor:
    tensors, tokens = rest[1], rest[FIELDS - 1]
    head = tensors[len(tensors) - len(TENSORS) + TENSORS.index("values")]
    assert head is not None
    return token_weight.new_empty((tokens.shape[0], head.shape[0]))


register(
    f"persistent_step({SCHEMA}, Tensor tokens, Tensor live, Tensor(a!) k_cache, Tensor(b!) v_cache, "
    "Tensor page_table, Tensor(c!) seq_lens, Tensor? k_scale, Tensor? v_scale) -> Tensor",
    _step,
    fake=_fake,
)
