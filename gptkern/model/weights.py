"""A decoder's tensors where they lie: one walk over its modules, for all who read weights alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import nn

from gptkern.model.decoder import Decoder
from gptkern.model.layers import Block, Norm
from gptkern.model.program import Matrix, NormAt
from gptkern.ops.decode_step import Linear, NormWeights
from gptkern.quantize import QuantizedLinear


@dataclass(frozen=True)
class LayerWeights:
    """One layer; what its decoder has not is None.

    Attributes:
        qkv, out, fc, proj: The products of attention and of the MLP.
        ln_1, ln_2, post_attn_norm, post_mlp_norm: Norms of whole rows: (weight, bias or None).
        q_norm, k_norm: Weights of the norms of queries and of keys.
    """

    qkv: Linear
    out: Linear
    fc: Linear
    proj: Linear
    ln_1: NormWeights | None
    ln_2: NormWeights | None
    post_attn_norm: NormWeights | None
    post_mlp_norm: NormWeights | None
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None


@dataclass(frozen=True)
class DecoderWeights:
    """A whole decoder.

    Attributes:
        tokens: The token embedding, ``(vocab_size, width)``.
        positions: The position embedding, ``(positions, width)``; None without one.
        layers: From the first to the last.
        ln_f: The norm before the head; None without one.
        head: The output layer.
    """

    tokens: torch.Tensor
    positions: torch.Tensor | None
    layers: tuple[LayerWeights, ...]
    ln_f: NormWeights | None
    head: Linear

    def norm(self, at: NormAt) -> NormWeights:
        """The norm that a stage names."""
        found = self.ln_f if at.layer < 0 else getattr(self.layers[at.layer], at.name)
        assert found is not None
        return cast(NormWeights, found)

    def matrix(self, layer: int, name: Matrix) -> Linear:
        """The product that a stage names."""
        return self.head if name == "head" else cast(Linear, getattr(self.layers[layer], name))


def decoder_weights(model: Decoder) -> DecoderWeights:
    """All of the model's weights where they lie now."""
    transformer = model.transformer
    positions = getattr(transformer, "wpe", None)
    return DecoderWeights(
        transformer.wte.weight,
        None if positions is None else positions.weight,
        tuple(_layer(block) for block in transformer.h if isinstance(block, Block)),
        _norm(transformer.ln_f),
        _linear(model.lm_head),
    )


def _layer(block: Block) -> LayerWeights:
    attn, mlp = block.attn, block.mlp
    return LayerWeights(
        qkv=_linear(attn.c_attn),
        out=_linear(attn.c_proj),
        fc=_linear(mlp.c_fc),
        proj=_linear(mlp.c_proj),
        ln_1=_norm(block.ln_1),
        ln_2=_norm(getattr(block, "ln_2", None)),
        post_attn_norm=_norm(getattr(block, "post_attn_norm", None)),
        post_mlp_norm=_norm(getattr(block, "post_mlp_norm", None)),
        q_norm=_weight(getattr(attn, "q_norm", None)),
        k_norm=_weight(getattr(attn, "k_norm", None)),
    )


def _linear(layer: nn.Linear | QuantizedLinear) -> Linear:
    weight = layer.quantized if isinstance(layer, QuantizedLinear) else layer.weight
    return Linear(weight, layer.bias)


def _norm(norm: Norm | None) -> NormWeights | None:
    return None if norm is None else (norm.weight, norm.bias)


def _weight(norm: nn.Module | None) -> torch.Tensor | None:
    return None if norm is None else cast(torch.Tensor, norm.weight)
