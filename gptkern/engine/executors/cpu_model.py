"""A model's tensors where they lie, as the extension's decoder reads them (``csrc/decode/model.h``)."""

from __future__ import annotations

from typing import NamedTuple

import torch

from gptkern import _native
from gptkern.model.decoder import Decoder
from gptkern.model.program import Stage, program
from gptkern.model.weights import DecoderWeights, decoder_weights
from gptkern.ops.decode_linear.formats import QuantizedWeight
from gptkern.ops.decode_step import Linear


class CpuNorm(NamedTuple):
    """A norm's parameters, ``(width,)`` each; ``bias`` may be None."""

    weight: torch.Tensor
    bias: torch.Tensor | None


class CpuLinear(NamedTuple):
    """A linear layer: ``weight (out, in)``, ``bias (out,)`` or None.

    ``scales`` and ``minimums`` are those of a quantised weight, as ``QuantizedWeight`` has them, else None. A
    weight with scales is int8, or of bytes: fp8 with a scale for each output, int4 with one for each group.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    scales: torch.Tensor | None
    minimums: torch.Tensor | None = None


class CpuStage(NamedTuple):
    """One row of the decoder's program: ``gptkern.model.program.Stage`` with its tensors.

    ``kind`` is one of ``gptkern._native.STAGES``; ``read``, ``write``, ``save`` and ``residual`` are of
    ``BUFFERS`` there.
    """

    kind: int
    layer: int
    read: int
    write: int
    save: int
    residual: int
    norm: CpuNorm | None
    linear: CpuLinear | None
    activated: bool


class CpuLayer(NamedTuple):
    """The attention of one layer.

    Attributes:
        scale: The softmax scale.
        window: Tokens that each token sees, itself included; 0: all before it.
        rotary: Leading elements of each head that turn; 0: none.
        interleaved: Pairs are neighbours, not halves.
        cos, sin: Of every position, ``(context, rotary / 2)`` fp32; None without rotation.
        q_norm, k_norm: Weights of the RMS norms of queries and keys, or None.
    """

    scale: float
    window: int
    rotary: int
    interleaved: bool
    cos: torch.Tensor | None
    sin: torch.Tensor | None
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None


class CpuModel(NamedTuple):
    """A whole model; what is not said here is as in ``gptkern.model.spec.DecoderSpec``.

    Attributes:
        activation: One of ``gptkern._native.ACTIVATIONS``.
        rms: Norms are RMS norms, else layer norms.
        whole_qk_norm: Norms of queries and keys are of all heads together, else of each.
        attention_softcap, logits_softcap: 0: none.
        tokens: The embedding, ``(vocab, width)``.
        positions: ``(context + position_offset, width)`` or None.
        layers: The attention of each.
        stages: From the embeddings to the logits.
    """

    context: int
    heads: int
    kv_heads: int
    head_dim: int
    inner: int
    activation: int
    gated: bool
    rms: bool
    unit_offset: bool
    whole_qk_norm: bool
    eps: float
    embedding_scale: float
    residual_scale: float
    logits_scale: float
    attention_softcap: float
    logits_softcap: float
    position_offset: int
    tokens: torch.Tensor
    positions: torch.Tensor | None
    layers: list[CpuLayer]
    stages: list[CpuStage]


def cpu_model(model: Decoder) -> CpuModel:
    """The model's tensors where they lie now."""
    spec, weights = model.spec, decoder_weights(model)
    return CpuModel(
        context=spec.context,
        heads=spec.heads,
        kv_heads=spec.kv_heads,
        head_dim=spec.head_dim,
        inner=spec.inner,
        activation=_native.ACTIVATIONS[spec.activation],
        gated=spec.gated,
        rms=spec.norm.kind == "rms",
        unit_offset=spec.norm.unit_offset,
        whole_qk_norm=spec.qk_norm == "whole",
        eps=spec.norm.eps,
        embedding_scale=spec.embedding_scale,
        residual_scale=spec.residual_scale,
        logits_scale=spec.logits_scale,
        attention_softcap=spec.attention_softcap or 0.0,
        logits_softcap=spec.logits_softcap or 0.0,
        position_offset=spec.position_offset,
        tokens=weights.tokens,
        positions=weights.positions,
        layers=_layers(model, weights),
        stages=[_stage(stage, weights) for stage in program(spec)],
    )


def _layers(model: Decoder, weights: DecoderWeights) -> list[CpuLayer]:
    spec = model.spec
    tables = dict(zip(spec.rotaries, model.transformer.rotary_tables(model.device), strict=True))
    layers = []
    for own, tensors in zip(spec.layers, weights.layers, strict=True):
        cos, sin = (None, None) if own.rotary is None else tables[own.rotary]
        layers.append(
            CpuLayer(
                scale=own.attention_scale,
                window=own.window or 0,
                rotary=0 if own.rotary is None else own.rotary.dim,
                interleaved=own.rotary is not None and own.rotary.pairs == "interleaved",
                cos=cos,
                sin=sin,
                q_norm=tensors.q_norm,
                k_norm=tensors.k_norm,
            )
        )
    return layers


def _stage(stage: Stage, weights: DecoderWeights) -> CpuStage:
    buffers = _native.BUFFERS
    return CpuStage(
        kind=_native.STAGES[stage.kind],
        layer=stage.layer,
        read=buffers[stage.read or "none"],
        write=buffers[stage.write],
        save=buffers[stage.save or "none"],
        residual=buffers[stage.residual or "none"],
        norm=None if stage.norm is None else CpuNorm(*weights.norm(stage.norm)),
        linear=None if stage.weight is None else _linear(weights.matrix(stage.layer, stage.weight)),
        activated=stage.activated,
    )


def _linear(layer: Linear) -> CpuLinear:
    if isinstance(layer.weight, QuantizedWeight):
        return CpuLinear(layer.weight.values, layer.bias, layer.weight.scales, layer.weight.minimums)
    return CpuLinear(layer.weight, layer.bias, None)
