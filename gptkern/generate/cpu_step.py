"""One token of every sequence on the CPU, with the weights laid out for products of few rows.

Such a product is bound by how fast the weights stream from memory, and their usual layout streams
slowly: with one row of GPT-2 124M on a Zen 4 core, PyTorch's bf16 linear layers read 9 GB/s and
oneDNN's packed weights 16 to 30; fp32 ones read 13 and their transpose 20 to 26. The copy lives as
long as the generation, so that changes to the model are never missed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

from gptkern.model import GPT, Block, Norm
from gptkern.ops.layer_norm import reference
from gptkern.ops.linear.reference import ACTIVATIONS

if TYPE_CHECKING:
    from gptkern.cache import KVCache

# More rows are bound by arithmetic, for which the usual layout is as good.
MOST_ROWS = 16

Linear = Callable[[torch.Tensor], torch.Tensor]


def pays(model: GPT, rows: int) -> bool:
    """Whether a ``CpuStep`` can take this model's place, and is faster."""
    weight = model.lm_head.weight
    laid_out = weight.dtype == torch.float32 or (weight.dtype == torch.bfloat16 and _packs_bf16())
    return laid_out and weight.device.type == "cpu" and rows <= MOST_ROWS


class CpuStep:
    """``model(tokens[:, None], cache=cache).logits[:, -1]``, faster. Made and used in inference mode.

    Args:
        model: In evaluation mode; ``pays`` has said yes.
        cache: Holds the prompts; every call takes each of its sequences one token on.
    """

    def __init__(self, model: GPT, cache: KVCache) -> None:
        self._transformer, self._cache, self._config = model.transformer, cache, model.config
        self._layers = [_Layer(block) for block in model.transformer.h if isinstance(block, Block)]
        self._head = _laid_out(model.lm_head)
        self._scales = [model.config.attention_scale(layer) for layer in range(model.config.n_layer)]

    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits ``(rows, vocab_size)`` after ``tokens`` ``(rows,)`` int64."""
        transformer, heads = self._transformer, self._config.n_head
        step = self._cache.extend([1] * tokens.shape[0])
        x = F.embedding(tokens, transformer.wte.weight) + F.embedding(step.positions, transformer.wpe.weight)
        post_norm = self._config.post_norm
        for index, (layer, scale) in enumerate(zip(self._layers, self._scales, strict=True)):
            h = x if post_norm else _norm(layer.ln_1, x)
            q, k, v = layer.qkv(h).view(x.shape[0], 3, heads, -1).unbind(1)
            x = x + layer.proj(step.attention(index, q, k, v, scale=scale).flatten(1))
            if post_norm:
                x = _norm(layer.ln_1, x)
            h = x if post_norm else _norm(layer.ln_2, x)
            x = x + layer.down(layer.activation(layer.up(h)))
            if post_norm:
                x = _norm(layer.ln_2, x)
        step.commit()
        return self._head(x if transformer.ln_f is None else _norm(transformer.ln_f, x))


class _Layer:
    def __init__(self, block: Block) -> None:
        self.ln_1, self.ln_2 = block.ln_1, block.ln_2
        self.qkv, self.proj = _laid_out(block.attn.c_attn), _laid_out(block.attn.c_proj)
        self.up, self.down = _laid_out(block.mlp.c_fc), _laid_out(block.mlp.c_proj)
        self.activation = ACTIVATIONS[block.mlp.activation]


def _norm(norm: Norm, x: torch.Tensor) -> torch.Tensor:
    return reference.layer_norm(x, norm.weight, norm.bias, norm.eps)


def _packs_bf16() -> bool:
    # The operators that torch.compile's "freezing" uses; they may be missing from a build.
    return (
        torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    )


def _laid_out(linear: nn.Linear) -> Linear:
    weight = linear.weight.detach()
    bias: torch.Tensor | None = linear.bias
    if weight.dtype == torch.bfloat16:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, 1)
        pointwise = torch.ops.mkldnn._linear_pointwise.default
        return lambda x: pointwise(x, packed, bias, "none", [], "")
    if weight.shape[0] < weight.shape[1]:
        # Few long rows stream as well as they are.
        return linear
    turned = weight.t().contiguous()
    if bias is None:
        return lambda x: x @ turned
    return lambda x: torch.addmm(bias, x, turned)
