"""GPT-2 as a ``DecoderSpec``: layer norms before each branch, learned positions, biases."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gptkern.model.families.table import MOST_LAYERS
from gptkern.model.spec import DecoderSpec, LayerSpec, NormSpec

if TYPE_CHECKING:
    from gptkern.config import GPTConfig


def spec(config: GPTConfig) -> DecoderSpec:
    """The decoder of a GPT-2's configuration; ``bias=False`` is nanoGPT's.

    Raises:
        ValueError: More layers than any model has.
    """
    if config.n_layer > MOST_LAYERS:
        raise ValueError(f"GPTConfig: n_layer is {config.n_layer}; {MOST_LAYERS} at most are served")
    return DecoderSpec(
        vocab_size=config.vocab_size,
        context=config.n_positions,
        width=config.n_embd,
        heads=config.n_head,
        kv_heads=config.n_head,
        head_dim=config.head_dim,
        inner=config.inner_dim,
        layers=tuple(LayerSpec(config.attention_scale(layer)) for layer in range(config.n_layer)),
        norm=NormSpec("layer", config.layer_norm_epsilon, bias=config.bias),
        activation=config.activation,
        qkv_bias=config.bias,
        out_bias=config.bias,
        fc_bias=config.bias,
        proj_bias=config.bias,
        learned_positions=True,
        tied=config.tie_word_embeddings,
        embedding_dropout=config.embd_pdrop,
        residual_dropout=config.resid_pdrop,
        attention_dropout=config.attn_pdrop,
    )
