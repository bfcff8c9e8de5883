"""A program as the registered op's schema names it: tensors, then numbers; there and back."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from gptkern.ops._types import HeadNorm, Norm, RmsNorm
from gptkern.ops.decode_linear.formats import QuantizedWeight
from gptkern.ops.decode_step.rows import (
    BUFFERS,
    TENSORS,
    Kind,
    Linear,
    Positions,
    StepProgram,
    StepRow,
    row_tensors,
)

SCHEMA = (
    "Tensor token_weight, Tensor? position_weight, Tensor?[] weights, int[] numbers, float[] factors, "
    "SymInt heads, int position_offset, float embedding_scale"
)
# Arguments of SCHEMA, and the numbers and the factors of each row.
FIELDS, NUMBERS, FACTORS = 8, 13, 5
Flat = tuple[
    torch.Tensor, torch.Tensor | None, list[torch.Tensor | None], list[int], list[float], int, int, float
]
_KINDS: tuple[Kind, ...] = ("qkv", "attention", "linear", "add_norm", "heads")
_FORMATS = (None, "int8", "fp8", "int4")
_PAIRS = (None, "halves", "interleaved")
_ACTIVATIONS = ("none", "gelu_tanh", "gelu", "relu", "silu")
# No norm, a layer norm, an RMS norm, and one with factors of 1 + weight.
_LAYER, _RMS, _UNIT_OFFSET = 1, 2, 3


def flat(program: StepProgram) -> Flat:
    """The arguments of SCHEMA."""
    return (
        program.token_weight,
        program.position_weight,
        [tensor for row in program.rows for tensor in row_tensors(row)],
        [number for row in program.rows for number in _numbers(row)],
        [factor for row in program.rows for factor in _factors(row)],
        program.heads,
        program.position_offset,
        program.embedding_scale,
    )


def unflat(
    token_weight: torch.Tensor,
    position_weight: torch.Tensor | None,
    tensors: Sequence[torch.Tensor | None],
    numbers: Sequence[int],
    factors: Sequence[float],
    heads: int,
    position_offset: int,
    embedding_scale: float,
) -> StepProgram:
    """The inverse of ``flat``.

    Raises:
        ValueError: Tensors or numbers of no whole number of rows, or a row that lacks one.
    """
    count = len(numbers) // NUMBERS
    given = (len(tensors), len(numbers), len(factors))
    needed = (count * len(TENSORS), count * NUMBERS, count * FACTORS)
    if given != needed:
        raise ValueError(
            f"persistent_step: {given} weights, numbers and factors for {count} rows; {needed} are needed"
        )
    rows = (
        _row(
            tensors[row * len(TENSORS) : (row + 1) * len(TENSORS)],
            numbers[row * NUMBERS : (row + 1) * NUMBERS],
            factors[row * FACTORS : (row + 1) * FACTORS],
        )
        for row in range(count)
    )
    return StepProgram(
        token_weight,
        position_weight,
        tuple(rows),
        heads=heads,
        position_offset=position_offset,
        embedding_scale=embedding_scale,
    )


def _numbers(row: StepRow) -> tuple[int, ...]:
    norm = 0
    if row.norm is not None:
        norm = _LAYER
        if isinstance(row.norm, RmsNorm):
            norm = _UNIT_OFFSET if row.norm.unit_offset else _RMS
    head_norm = 0
    if row.head_norm is not None:
        head_norm = _UNIT_OFFSET if row.head_norm.unit_offset else _RMS
    weight = None if row.linear is None else row.linear.weight
    return (
        _KINDS.index(row.kind),
        row.layer,
        BUFFERS.index(row.read),
        BUFFERS.index(row.write),
        -1 if row.save is None else BUFFERS.index(row.save),
        -1 if row.residual is None else BUFFERS.index(row.residual),
        _ACTIVATIONS.index(row.activation),
        int(row.gated),
        norm,
        head_norm,
        0 if row.rotary is None else _PAIRS.index(row.rotary.pairs),
        -1 if row.window is None else row.window,
        _FORMATS.index(weight.format) if isinstance(weight, QuantizedWeight) else 0,
    )


def _factors(row: StepRow) -> tuple[float, ...]:
    return (
        row.eps or 0.0,
        row.head_eps or 0.0,
        row.scale,
        0.0 if row.softcap is None else row.softcap,
        row.attention_scale,
    )


def _row(tensors: Sequence[torch.Tensor | None], numbers: Sequence[int], factors: Sequence[float]) -> StepRow:
    norm_weight, norm_bias, values, bias, scales, minimums, cos, sin, q_norm, k_norm = tensors
    kind, layer, read, write, save, residual, activation, gated, norm, head_norm, pairs, window, format = (
        numbers
    )
    eps, head_eps, scale, softcap, attention_scale = factors
    linear, rotary, heads = None, None, None
    if _KINDS[kind] in ("qkv", "linear"):
        linear = Linear(_weight(_FORMATS[format], values, scales, minimums), bias)
    pair = _PAIRS[pairs]
    if pair is not None:
        rotary = Positions(_needed(cos), _needed(sin), pair)
    if head_norm:
        heads = HeadNorm(_needed(q_norm), _needed(k_norm), head_eps, head_norm == _UNIT_OFFSET)
    return StepRow(
        _KINDS[kind],
        layer,
        BUFFERS[read],
        BUFFERS[write],
        norm=_norm(norm, norm_weight, norm_bias, eps),
        save=None if save < 0 else BUFFERS[save],
        linear=linear,
        activation=_ACTIVATIONS[activation],
        gated=bool(gated),
        scale=scale,
        residual=None if residual < 0 else BUFFERS[residual],
        softcap=softcap or None,
        rotary=rotary,
        head_norm=heads,
        attention_scale=attention_scale,
        window=None if window < 0 else window,
    )


def _norm(
    kind: int, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float
) -> Norm | RmsNorm | None:
    if not kind:
        return None
    if kind == _LAYER:
        return _needed(weight), bias, eps
    return RmsNorm(_needed(weight), eps, kind == _UNIT_OFFSET)


def _weight(
    format: str | None,
    values: torch.Tensor | None,
    scales: torch.Tensor | None,
    minimums: torch.Tensor | None,
) -> torch.Tensor | QuantizedWeight:
    if format is None:
        return _needed(values)
    return QuantizedWeight(format, _needed(values), _needed(scales), minimums)


def _needed(tensor: torch.Tensor | None) -> torch.Tensor:
    if tensor is None:
        raise ValueError("persistent_step: a weight is None; only those that a row has not may be")
    return tensor
