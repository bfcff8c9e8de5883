"""A model's weights where they lie, as the decode ops take them."""

from __future__ import annotations

import torch
from torch import nn

from gptkern.model.decoder import Block, Decoder, Norm
from gptkern.ops.decode_linear import QuantizedWeight
from gptkern.ops.decode_step import LayerWeights, Linear, NormWeights, StepWeights
from gptkern.quantize import QuantizedLinear


def matrix(layer: nn.Linear | QuantizedLinear) -> torch.Tensor | QuantizedWeight:
    """The layer's weight, packed where it is quantised."""
    return layer.quantized if isinstance(layer, QuantizedLinear) else layer.weight


def norm_weights(norm: Norm | None) -> tuple[torch.Tensor, torch.Tensor | None, float] | None:
    """(weight, bias, epsilon) of a norm."""
    return None if norm is None else (norm.weight, norm.bias, norm.eps)


def step_weights(model: Decoder) -> StepWeights:
    """All of the model's weights where they lie now."""

    def linear(layer: nn.Linear | QuantizedLinear) -> Linear:
        return Linear(matrix(layer), layer.bias)

    def norm(layer: Norm) -> NormWeights:
        return layer.weight, layer.bias

    blocks = [block for block in model.transformer.h if isinstance(block, Block)]
    layers: list[LayerWeights] = []
    # Where norms follow their branches, whoever reads a branch's sum next applies its norm.
    pending: Norm | None = None
    for block in blocks:
        attn, mlp = block.attn, block.mlp
        before_qkv = pending if block.post_norm else block.ln_1
        layers.append(
            LayerWeights(
                None if before_qkv is None else norm(before_qkv),
                linear(attn.c_attn),
                linear(attn.c_proj),
                norm(block.ln_1 if block.post_norm else block.ln_2),
                linear(mlp.c_fc),
                linear(mlp.c_proj),
                attn.scale,
            )
        )
        pending = block.ln_2
    last = model.transformer.ln_f or blocks[-1].ln_2
    return StepWeights(
        model.transformer.wte.weight,
        model.transformer.wpe.weight,
        tuple(layers),
        norm(last),
        linear(model.lm_head),
        heads=model.config.n_head,
        eps=last.eps,
        activation=model.config.activation,
    )
