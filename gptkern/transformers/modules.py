"""The accelerated blocks of GPT-2 and of the GPT of 2018.

Each is a subclass of the library's, whose class an existing module is given: its parameters, their
names, its hooks and its place in the model stay, and giving it its old class back undoes everything.
Where somebody has put another module in the place of a layer (an adapter, a quantised matrix) or hooked
one, that part runs the library's own code.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.models.gpt2 import modeling_gpt2 as gpt2
from transformers.models.openai import modeling_openai as gpt1
from transformers.pytorch_utils import Conv1D

from gptkern import ops
from gptkern.config import ACTIVATIONS
from gptkern.transformers.attention import attention_forward

# Up to transformers 5.23 the cache is called past_key_values, since then cache: as argument and as output.
_RENAMED = "cache" in inspect.signature(gpt2.GPT2LMHeadModel.forward).parameters
CACHE = "cache" if _RENAMED else "past_key_values"
# the activations of transformers' OpenAIGPTModel: its "gelu" is the tanh form
GPT1_ACTIVATIONS = {"gelu": "gelu_tanh", "relu": "relu", "silu": "silu", "swish": "silu"}


def untouched(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a module is the library's own layer that nobody hooked, so that its weights say it all."""
    return (
        type(module) is kind
        and "forward" not in module.__dict__
        and not module._forward_hooks
        and not module._forward_pre_hooks
        and not module._backward_hooks
        and not module._backward_pre_hooks
    )


def _norm(norm: nn.LayerNorm, x: torch.Tensor) -> torch.Tensor:
    return ops.layer_norm(x, norm.weight, norm.bias, norm.eps)


def _fused_norm(norm: nn.Module, x: torch.Tensor) -> bool:
    # Mixed dtypes (an fp32 norm over bf16) promote in PyTorch's way, which is not ours.
    return untouched(norm, nn.LayerNorm) and norm.weight is not None and norm.weight.dtype == x.dtype


def _mlp(module: Any, x: torch.Tensor, activation: str, residual: torch.Tensor | None) -> torch.Tensor:
    """The perceptron without its dropout, on weights stored ``(in, out)``: views, no copies."""
    fc, proj = module.c_fc, module.c_proj
    return ops.gelu_mlp(
        x, fc.weight.t(), fc.bias, proj.weight.t(), proj.bias, activation=activation, residual=residual
    )


class GPT2MLP(gpt2.GPT2MLP):
    """Both layers, bias and activation in the products' epilogues."""

    activation: str

    def fused(self, x: torch.Tensor) -> bool:
        """Whether the op computes what this module does."""
        return (
            untouched(self.c_fc, Conv1D)
            and untouched(self.c_proj, Conv1D)
            and self.c_fc.weight.dtype == self.c_proj.weight.dtype
            and (x.dtype == self.c_fc.weight.dtype or torch.is_autocast_enabled(x.device.type))
        )

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if not self.fused(hidden_states):
            out: torch.Tensor = super().forward(hidden_states)
            return out
        out = self.dropout(_mlp(self, hidden_states, self.activation, None))
        return out


class GPT2Block(gpt2.GPT2Block):
    """Norms, the addition between the branches, and the perceptron with the addition after it."""

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
        dropout = mlp.dropout
        whole = (
            type(mlp) is GPT2MLP
            and untouched(mlp, GPT2MLP)
            and mlp.fused(normed)
            and not (dropout.training and dropout.p > 0)
        )
        return _mlp(mlp, normed, mlp.activation, residual) if whole else residual + mlp(normed)

    def _fused(self, x: torch.Tensor) -> bool:
        # Under autocast PyTorch's norms give fp32 and ours the autocast dtype: the sums would differ.
        if torch.is_autocast_enabled(x.device.type):
            return False
        return _fused_norm(self.ln_1, x) and _fused_norm(self.ln_2, x)


class GPT1Attention(gpt1.Attention):
    """Attention that never holds the matrix of weights, unless it is asked for."""

    is_causal = True

    def forward(
        self, x: torch.Tensor, attention_mask: torch.Tensor | None = None, output_attentions: bool = False
    ) -> list[torch.Tensor]:
        if output_attentions:
            found: list[torch.Tensor] = super().forward(x, attention_mask, output_attentions)
            return found
        qkv = self.c_attn(x)
        q, k, v = (self.split_heads(t) for t in qkv.split(self.split_size, dim=2))
        dropout = self.attn_dropout.p if self.training else 0.0
        # The library's mask is 0 for tokens and the least number for padding.
        kept = None if attention_mask is None else attention_mask[:, 0, 0] == 0
        if kept is not None and kept.device.type == "cpu" and bool(kept.all()):
            kept = None
        scale = None if self.scale else 1.0
        out, _ = attention_forward(self, q, k, v, kept, dropout=dropout, scaling=scale)
        return [self.resid_dropout(self.c_proj(out.flatten(-2)))]


class GPT1MLP(gpt1.MLP):
    """As ``GPT2MLP``."""

    activation: str
    fused = GPT2MLP.fused

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.fused(x):
            out: torch.Tensor = super().forward(x)
            return out
        out = self.dropout(_mlp(self, x, self.activation, None))
        return out


class GPT1Block(gpt1.Block):
    """Each norm in one pass with the addition before it."""

    def forward(
        self, x: torch.Tensor, attention_mask: torch.Tensor | None = None, output_attentions: bool = False
    ) -> list[torch.Tensor]:
        autocast = torch.is_autocast_enabled(x.device.type)
        if autocast or not (_fused_norm(self.ln_1, x) and _fused_norm(self.ln_2, x)):
            found: list[torch.Tensor] = super().forward(x, attention_mask, output_attentions)
            return found
        attended, *weights = self.attn(x, attention_mask=attention_mask, output_attentions=output_attentions)
        normed, _ = ops.add_layer_norm(attended, x, self.ln_1.weight, self.ln_1.bias, self.ln_1.eps)
        out, _ = ops.add_layer_norm(self.mlp(normed), normed, self.ln_2.weight, self.ln_2.bias, self.ln_2.eps)
        return [out, *weights]


class LayerNorm(nn.LayerNorm):
    """The norm at the end of the model."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.is_autocast_enabled(x.device.type) or self.weight is None or self.weight.dtype != x.dtype:
            return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)
        return _norm(self, x)


def activation_of(config: Any) -> str | None:
    """The op's name of a config's activation; None where it has none."""
    if config.model_type == "openai-gpt":
        return GPT1_ACTIVATIONS.get(config.afn)
    return ACTIVATIONS.get(config.activation_function)


# A class of the library's -> ours. Names stay, for the library looks some classes up by name.
SWAPS: dict[type[nn.Module], type[nn.Module]] = {
    gpt2.GPT2Block: GPT2Block,
    gpt2.GPT2MLP: GPT2MLP,
    gpt1.Attention: GPT1Attention,
    gpt1.MLP: GPT1MLP,
    gpt1.Block: GPT1Block,
}
for _old, _new in SWAPS.items():
    _new.__name__ = _old.__name__
