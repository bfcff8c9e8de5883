"""The fronts of GPT-2's and the GPT of 2018's layers, and of all other families'.

The library's class behind a front undoes everything. A part of the model with another module in the place of
a layer (an adapter, a quantised matrix), or with a hook, runs the library's own code.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.models.gpt2 import modeling_gpt2 as gpt2
from transformers.models.openai import modeling_openai as gpt1
from transformers.pytorch_utils import Conv1D

from gptkern.as_built import forwards_of, own_method, untouched
from gptkern.model.families.table import ACTIVATIONS
from gptkern.transformers.attention import attention_forward
from gptkern.transformers.families import FAMILIES, FRONTS, LIBRARY_MODULES
from gptkern.transformers.parts import (
    CACHE,
    DROPOUT,
    KNOWN_ACTIVATIONS,
    LayerNorm,
    Perceptron,
    Products,
    add_norm,
    add_perceptron,
    as_imported,
    fused_norm,
)

# The activations of transformers' OpenAIGPTModel: its "gelu" is the tanh form
GPT1_ACTIVATIONS = {"gelu": "gelu_tanh", "relu": "relu", "silu": "silu", "swish": "silu"}
_PRODUCTS = Products(("c_fc",), "c_proj", transposed=True)


class GPT2MLP(Perceptron, gpt2.GPT2MLP):
    """A perceptron with bias and activation in the epilogues of its two products."""

    products = _PRODUCTS
    _gptkern_library = (gpt2.GPT2MLP, gpt2.GPT2MLP.forward)


class GPT2Block(gpt2.GPT2Block):
    """A block with the addition fused into its second norm and the residual fused into its perceptron."""

    _gptkern_library = (gpt2.GPT2Block, gpt2.GPT2Block.forward)

    def forward(
        self,
        hidden_states: torch.Tensor,
        cache: Any = None,
        attention_mask: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        use_cache: bool | None = False,
        **kwargs: Any,
    ) -> torch.Tensor:
        cache = kwargs.pop("past_key_values", cache)
        if encoder_hidden_states is not None or not self._fused(hidden_states):
            out: torch.Tensor = super().forward(
                hidden_states,
                cache,
                attention_mask,
                encoder_hidden_states,
                encoder_attention_mask=encoder_attention_mask,
                use_cache=use_cache,
                **kwargs,
            )
            return out
        attended, _ = self.attn(
            self.ln_1(hidden_states),
            attention_mask=attention_mask,
            use_cache=use_cache,
            **{CACHE: cache},
            **kwargs,
        )
        normed, residual = add_norm(self.ln_2, attended, hidden_states)
        return add_perceptron(self.mlp, normed, residual)

    def _fused(self, x: torch.Tensor) -> bool:
        # Under autocast PyTorch's norms give fp32 and ours the autocast dtype: the sums would differ.
        autocast = torch.is_autocast_enabled(x.device.type)
        return not autocast and as_imported(self) and fused_norm(self.ln_2, x)


class GPT1Attention(gpt1.Attention):
    """Attention that never stores the matrix of weights, unless the caller wants it."""

    is_causal = True
    _gptkern_library = (gpt1.Attention, gpt1.Attention.forward)

    def forward(
        self, x: torch.Tensor, attention_mask: torch.Tensor | None = None, output_attentions: bool = False
    ) -> list[torch.Tensor]:
        if output_attentions or not self._fused():
            found: list[torch.Tensor] = super().forward(x, attention_mask, output_attentions)
            return found
        qkv = self.c_attn(x)
        q, k, v = (self.split_heads(t) for t in qkv.split(self.split_size, dim=2))
        dropout = self.attn_dropout.p if self.training else 0.0
        # The library's mask is 0 for tokens and the least number for padding.
        token_mask = None if attention_mask is None else attention_mask[:, 0, 0] == 0
        if token_mask is not None and token_mask.device.type == "cpu" and bool(token_mask.all()):
            token_mask = None
        scale = None if self.scale else 1.0
        out, _ = attention_forward(self, q, k, v, token_mask, dropout=dropout, scaling=scale)
        return [self.resid_dropout(self.c_proj(out.flatten(-2)))]

    def _fused(self) -> bool:
        own = own_method(self, ("_attn", "split_heads", "merge_heads"))
        return as_imported(self) and own is None and untouched(self.attn_dropout, DROPOUT)


class GPT1MLP(Perceptron, gpt1.MLP):
    """The perceptron of the GPT of 2018, fused as ``GPT2MLP``."""

    products = _PRODUCTS
    _gptkern_library = (gpt1.MLP, gpt1.MLP.forward)


class GPT1Block(gpt1.Block):
    """A block with each norm fused with the addition before it."""

    _gptkern_library = (gpt1.Block, gpt1.Block.forward)

    def forward(
        self, x: torch.Tensor, attention_mask: torch.Tensor | None = None, output_attentions: bool = False
    ) -> list[torch.Tensor]:
        autocast = torch.is_autocast_enabled(x.device.type)
        if autocast or not (as_imported(self) and fused_norm(self.ln_1, x) and fused_norm(self.ln_2, x)):
            found: list[torch.Tensor] = super().forward(x, attention_mask, output_attentions)
            return found
        attended, *weights = self.attn(x, attention_mask=attention_mask, output_attentions=output_attentions)
        normed, _ = add_norm(self.ln_1, attended, x)
        out, _ = add_norm(self.ln_2, self.mlp(normed), normed)
        return [out, *weights]


GPT_NORMS = frozenset({"ln_1", "ln_2", "ln_f"})


def norm_names(config: Any) -> frozenset[str]:
    """The names of a model's norms outside attention."""
    family = FAMILIES.get(config.model_type)
    return GPT_NORMS if family is None else family.norms


def activation_of(config: Any) -> str | None:
    """The op's name for a config's activation; None if the op does not have it."""
    if config.model_type == "openai-gpt":
        return GPT1_ACTIVATIONS.get(config.afn)
    return ACTIVATIONS.get(activation_name(config))


def activation_name(config: Any) -> str:
    """A config's activation, under the library's name."""
    family = FAMILIES.get(config.model_type)
    if family is not None:
        return str(getattr(config, family.activation))
    return str(config.afn if config.model_type == "openai-gpt" else config.activation_function)


# The library's class -> gptkern's. Names stay, for the library looks some classes up by name.
_GPTS: tuple[type[nn.Module], ...] = (GPT2Block, GPT2MLP, GPT1Attention, GPT1MLP, GPT1Block)
SWAPS: dict[type[nn.Module], type[nn.Module]] = {
    **{front._gptkern_library[0]: front for front in _GPTS},  # type: ignore[attr-defined]
    **FRONTS,
}
for _old, _new in SWAPS.items():
    _new.__name__ = _old.__name__
# The classes that replace each of the library's in an accelerated model, and the functions of all of them.
INSTEAD: dict[type, tuple[type, ...]] = {old: (new,) for old, new in SWAPS.items()}
INSTEAD[nn.LayerNorm] = (LayerNorm,)
_LIBRARYS: tuple[type, ...] = (Conv1D, nn.Dropout, nn.Embedding, nn.Linear, nn.ModuleList, gpt2.GPT2Model)
_LIBRARYS += (gpt2.GPT2Attention, gpt1.OpenAIGPTModel, *KNOWN_ACTIVATIONS, *LIBRARY_MODULES)
_OURS = [new for news in INSTEAD.values() for new in news]
FORWARDS = {kind: forwards_of(kind) for kind in (*_LIBRARYS, *INSTEAD, *_OURS)}
