"""The accelerated blocks of GPT-2 and of the GPT of 2018.

Each is a subclass of the library's class. An existing module changes its ``__class__`` to it: parameters,
their names, hooks and the place in the model stay, and the old class undoes everything. A part of the
model with another module in the place of a layer (an adapter, a quantised matrix), or with a hook, runs the
library's own code.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.models.gpt2 import modeling_gpt2 as gpt2
from transformers.models.openai import modeling_openai as gpt1
from transformers.pytorch_utils import Conv1D

from gptkern import ops
from gptkern.as_built import forwards_of, own_method, untouched
from gptkern.model.families.table import ACTIVATIONS
from gptkern.transformers.attention import attention_forward

# Up to transformers 5.23 the cache is called past_key_values, since then cache: as argument and as output.
_RENAMED = "cache" in inspect.signature(gpt2.GPT2LMHeadModel.forward).parameters
CACHE = "cache" if _RENAMED else "past_key_values"
# The activations of transformers' OpenAIGPTModel: its "gelu" is the tanh form
GPT1_ACTIVATIONS = {"gelu": "gelu_tanh", "relu": "relu", "silu": "silu", "swish": "silu"}


# The functions that the ops here compute, before anybody could have put others into their classes.
CONV, NORM, DROPOUT, HEAD = Conv1D.forward, nn.LayerNorm.forward, nn.Dropout.forward, nn.Linear.forward
_BLOCK, _GPT1_ATTENTION = gpt2.GPT2Block.forward, gpt1.Attention.forward
_GPT1_BLOCK, _MLPS = gpt1.Block.forward, (gpt2.GPT2MLP.forward, gpt1.MLP.forward)
_ACTIVATIONS = {
    kind: (ours, kind.forward)
    for kind, ours in ((type(ACT2FN[theirs]), ours) for theirs, ours in ACTIVATIONS.items())
}


def activation(act: Any) -> str | None:
    """The op's name for an activation module; None for an unknown module or one with a hook."""
    ours, forward = _ACTIVATIONS.get(type(act), (None, None))
    return ours if ours is not None and untouched(act, forward) else None


def _norm(norm: nn.LayerNorm, x: torch.Tensor) -> torch.Tensor:
    return ops.layer_norm(x, norm.weight, norm.bias, norm.eps)


def _fused_norm(norm: nn.Module, x: torch.Tensor) -> bool:
    # Mixed dtypes (an fp32 norm over bf16) promote by PyTorch's rules, which the op does not follow.
    return untouched(norm, NORM) and norm.weight is not None and norm.weight.dtype == x.dtype


def _mlp(module: Any, x: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor:
    """The perceptron without its dropout, on weights stored ``(in, out)``: views, no copies."""
    fc, proj, name = module.c_fc, module.c_proj, activation(module.act)
    assert name is not None
    return ops.gelu_mlp(
        x, fc.weight.t(), fc.bias, proj.weight.t(), proj.bias, activation=name, residual=residual
    )


def library_reason(mlp: Any) -> str | None:
    """The reason why the op cannot compute a perceptron; None if it computes all but the dropout."""
    for name in ("c_fc", "c_proj"):
        if not untouched(getattr(mlp, name), CONV):
            return f"{name} is a {type(getattr(mlp, name)).__name__} that was put in or hooked"
    if activation(mlp.act) is None:
        return f"act is a {type(mlp.act).__name__} that was put in or hooked"
    if (gpt2.GPT2MLP.forward, gpt1.MLP.forward) != _MLPS:
        return "the library's class was given another forward"
    return None


class GPT2MLP(gpt2.GPT2MLP):
    """A perceptron with bias and activation in the epilogues of its two products."""

    def fused(self, x: torch.Tensor) -> bool:
        """True if the op computes all of this module but its dropout."""
        return (
            library_reason(self) is None
            and self.c_fc.weight.dtype == self.c_proj.weight.dtype
            and (x.dtype == self.c_fc.weight.dtype or torch.is_autocast_enabled(x.device.type))
        )

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if not self.fused(hidden_states):
            out: torch.Tensor = super().forward(hidden_states)
            return out
        out = self.dropout(_mlp(self, hidden_states, None))
        return out


_OWN_MLP = GPT2MLP.forward


class GPT2Block(gpt2.GPT2Block):
    """A block with the addition fused into its second norm and the residual fused into its perceptron."""

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
            _norm(self.ln_1, hidden_states),
            attention_mask=attention_mask,
            use_cache=use_cache,
            **{CACHE: cache},
            **kwargs,
        )
        normed, residual = ops.add_layer_norm(
            attended, hidden_states, self.ln_2.weight, self.ln_2.bias, self.ln_2.eps
        )
        mlp = self.mlp
        dropout: Any = getattr(mlp, "dropout", None)
        whole = (
            untouched(mlp, _OWN_MLP)
            and mlp.fused(normed)
            and untouched(dropout, DROPOUT)
            and not (dropout.training and dropout.p > 0)
        )
        return _mlp(mlp, normed, residual) if whole else residual + mlp(normed)

    def _fused(self, x: torch.Tensor) -> bool:
        # Under autocast PyTorch's norms give fp32 and ours the autocast dtype: the sums would differ.
        if torch.is_autocast_enabled(x.device.type) or gpt2.GPT2Block.forward is not _BLOCK:
            return False
        return _fused_norm(self.ln_1, x) and _fused_norm(self.ln_2, x)


class GPT1Attention(gpt1.Attention):
    """Attention that never stores the matrix of weights, unless the caller wants it."""

    is_causal = True

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
        return (
            gpt1.Attention.forward is _GPT1_ATTENTION
            and own is None
            and untouched(self.attn_dropout, DROPOUT)
        )


class GPT1MLP(gpt1.MLP):
    """The perceptron of the GPT of 2018, fused as ``GPT2MLP``."""

    fused = GPT2MLP.fused

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.fused(x):
            out: torch.Tensor = super().forward(x)
            return out
        out = self.dropout(_mlp(self, x, None))
        return out


class GPT1Block(gpt1.Block):
    """A block with each norm fused with the addition before it."""

    def forward(
        self, x: torch.Tensor, attention_mask: torch.Tensor | None = None, output_attentions: bool = False
    ) -> list[torch.Tensor]:
        autocast = torch.is_autocast_enabled(x.device.type)
        original = gpt1.Block.forward is _GPT1_BLOCK
        if autocast or not (original and _fused_norm(self.ln_1, x) and _fused_norm(self.ln_2, x)):
            found: list[torch.Tensor] = super().forward(x, attention_mask, output_attentions)
            return found
        attended, *weights = self.attn(x, attention_mask=attention_mask, output_attentions=output_attentions)
        normed, _ = ops.add_layer_norm(attended, x, self.ln_1.weight, self.ln_1.bias, self.ln_1.eps)
        out, _ = ops.add_layer_norm(self.mlp(normed), normed, self.ln_2.weight, self.ln_2.bias, self.ln_2.eps)
        return [out, *weights]


class LayerNorm(nn.LayerNorm):
    """The norm at the end of the model."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mixed = self.weight is None or self.weight.dtype != x.dtype
        if mixed or torch.is_autocast_enabled(x.device.type) or nn.LayerNorm.forward is not NORM:
            return super().forward(x)
        return _norm(self, x)


def activation_of(config: Any) -> str | None:
    """The op's name for a config's activation; None if the op does not have it."""
    if config.model_type == "openai-gpt":
        return GPT1_ACTIVATIONS.get(config.afn)
    return ACTIVATIONS.get(config.activation_function)


# The library's class -> gptkern's. Names stay, for the library looks some classes up by name.
SWAPS: dict[type[nn.Module], type[nn.Module]] = {
    gpt2.GPT2Block: GPT2Block,
    gpt2.GPT2MLP: GPT2MLP,
    gpt1.Attention: GPT1Attention,
    gpt1.MLP: GPT1MLP,
    gpt1.Block: GPT1Block,
}
for _old, _new in SWAPS.items():
    _new.__name__ = _old.__name__
# The classes that replace each of the library's in an accelerated model, and the functions of all of them.
INSTEAD: dict[type, tuple[type, ...]] = {old: (new,) for old, new in SWAPS.items()}
INSTEAD[nn.LayerNorm] = (LayerNorm,)
_LIBRARYS: tuple[type, ...] = (Conv1D, nn.Dropout, nn.Embedding, nn.Linear, nn.ModuleList, gpt2.GPT2Model)
_LIBRARYS += (gpt2.GPT2Attention, gpt1.OpenAIGPTModel, *_ACTIVATIONS)
_OURS = [new for news in INSTEAD.values() for new in news]
FORWARDS = {kind: forwards_of(kind) for kind in (*_LIBRARYS, *INSTEAD, *_OURS)}
