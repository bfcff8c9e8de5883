"""A model's tensors where they lie, as the extension's decoder reads them (``csrc/decode/model.h``)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from gptkern import _native
from gptkern.model.decoder import Block, Decoder, Norm
from gptkern.quantize import QuantizedLinear


class CpuNorm(NamedTuple):
    """A layer norm's parameters, ``(width,)`` each; ``bias`` may be None."""

    weight: torch.Tensor
    bias: torch.Tensor | None


class CpuLinear(NamedTuple):
    """A linear layer: ``weight (out, in)``, ``bias (out,)`` or None.

    ``scales (out,)`` fp32 are those of an int8 weight, else None.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    scales: torch.Tensor | None


class CpuBlock(NamedTuple):
    """One layer of a model; ``scale`` is the softmax scale of its attention."""

    norm1: CpuNorm
    norm2: CpuNorm
    qkv: CpuLinear
    projection: CpuLinear
    fc: CpuLinear
    out: CpuLinear
    scale: float


class CpuModel(NamedTuple):
    """A whole model.

    Attributes:
        heads: Attention heads.
        activation: One of ``gptkern._native.ACTIVATIONS``.
        post_norm: Norms follow their branches, and there is no final norm.
        eps: Added to the variance in every norm.
        tokens, positions: Embeddings, ``(vocab, width)`` and ``(context, width)``.
        blocks: The layers.
        final_norm: The norm before the head; None with ``post_norm``.
        head: The output layer.
    """

    heads: int
    activation: int
    post_norm: bool
    eps: float
    tokens: torch.Tensor
    positions: torch.Tensor
    blocks: list[CpuBlock]
    final_norm: CpuNorm | None
    head: CpuLinear


def cpu_model(model: Decoder) -> CpuModel:
    """The model's tensors where they lie now."""
    config, transformer = model.config, model.transformer
    return CpuModel(
        heads=config.n_head,
        activation=_native.ACTIVATIONS[config.activation],
        post_norm=config.post_norm,
        eps=config.layer_norm_epsilon,
        tokens=transformer.wte.weight,
        positions=transformer.wpe.weight,
        blocks=[_block(block, config.attention_scale(layer)) for layer, block in enumerate(transformer.h)],
        final_norm=None if transformer.ln_f is None else _norm(transformer.ln_f),
        head=_linear(model.lm_head),
    )


def _block(block: nn.Module, scale: float) -> CpuBlock:
    assert isinstance(block, Block)
    return CpuBlock(
        norm1=_norm(block.ln_1),
        norm2=_norm(block.ln_2),
        qkv=_linear(block.attn.c_attn),
        projection=_linear(block.attn.c_proj),
        fc=_linear(block.mlp.c_fc),
        out=_linear(block.mlp.c_proj),
        scale=scale,
    )


def _norm(norm: Norm) -> CpuNorm:
    return CpuNorm(norm.weight, norm.bias)


def _linear(layer: nn.Linear | QuantizedLinear) -> CpuLinear:
    if isinstance(layer, QuantizedLinear):
        return CpuLinear(layer.values, layer.bias, layer.scales)
    return CpuLinear(layer.weight, layer.bias, None)
