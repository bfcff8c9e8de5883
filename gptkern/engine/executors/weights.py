"""A whole pass as the decode kernels take it: the stages of a decoder's program with their weights."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from gptkern.model.decoder import Decoder
from gptkern.model.program import Stage, program
from gptkern.model.weights import DecoderWeights, decoder_weights
from gptkern.ops._types import HeadNorm, Norm, RmsNorm
from gptkern.ops.decode_step import Positions, StepProgram, StepRow


def step_program(model: Decoder) -> StepProgram:
    """All of the model's weights where they lie now, in the order in which a pass reads them."""
    spec, weights = model.spec, decoder_weights(model)
    _, *stages = program(spec)
    return StepProgram(
        weights.tokens,
        weights.positions,
        tuple(row for stage in stages for row in _rows(model, weights, stage)),
        heads=spec.heads,
        position_offset=spec.position_offset,
        embedding_scale=spec.embedding_scale,
    )


def _rows(model: Decoder, weights: DecoderWeights, stage: Stage) -> tuple[StepRow, ...]:
    """One row, but for a norm of all heads at once: no tile of the product before it has them all."""
    row = _row(model, weights, stage)
    if stage.kind != "qkv" or model.spec.qk_norm != "whole":
        return (row,)
    product = replace(row, kind="linear", write="qkv", rotary=None, head_norm=None)
    heads = StepRow("heads", stage.layer, "qkv", "q", rotary=row.rotary, head_norm=row.head_norm)
    return product, heads


def _row(model: Decoder, weights: DecoderWeights, stage: Stage) -> StepRow:
    spec = model.spec
    assert stage.kind != "embed" and stage.read is not None
    row = partial(
        StepRow,
        *(stage.kind, stage.layer, stage.read, stage.write),
        norm=_norm(model, weights, stage),
        save=stage.save,
        linear=None if stage.weight is None else weights.matrix(stage.layer, stage.weight),
        residual=stage.residual,
    )
    if stage.kind == "qkv":
        return row(rotary=_positions(model, stage.layer), head_norm=_head_norm(model, weights, stage.layer))
    if stage.kind == "attention":
        own = spec.layers[stage.layer]
        return row(attention_scale=own.attention_scale, window=own.window, softcap=spec.attention_softcap)
    if stage.weight == "head":
        return row(scale=spec.logits_scale, softcap=spec.logits_softcap)
    return row(
        activation=spec.activation if stage.activated else "none",
        gated=stage.activated and spec.gated,
        # Of a branch's output: where a norm follows the product, the norm's row scales.
        scale=1.0 if stage.residual is None else spec.residual_scale,
    )


def _norm(model: Decoder, weights: DecoderWeights, stage: Stage) -> Norm | RmsNorm | None:
    if stage.norm is None:
        return None
    (weight, bias), spec = weights.norm(stage.norm), model.spec.norm
    return RmsNorm(weight, spec.eps, spec.unit_offset) if spec.kind == "rms" else (weight, bias, spec.eps)


def _positions(model: Decoder, layer: int) -> Positions | None:
    spec = model.spec
    rotary = spec.layers[layer].rotary
    if rotary is None:
        return None
    tables = model.transformer.rotary_tables(model.device)
    return Positions(*tables[spec.rotaries.index(rotary)], rotary.pairs)


def _head_norm(model: Decoder, weights: DecoderWeights, layer: int) -> HeadNorm | None:
    own, norm = weights.layers[layer], model.spec.norm
    if own.q_norm is None or own.k_norm is None:
        return None
    return HeadNorm(own.q_norm, own.k_norm, norm.eps, norm.unit_offset)
