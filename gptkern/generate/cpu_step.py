"""One token of every sequence on the CPU, its linear layers by the extension.

A product of few rows is bound by how fast the weights stream from memory, and PyTorch's linear layers
stream them at a third of what the memory gives. ``csrc/few_rows.cpp`` reads each weight once, where it
lies.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

from gptkern.model import GPT, Block, Norm
from gptkern.ops.layer_norm import reference
from gptkern.ops.linear.reference import ACTIVATIONS
from gptkern.ops.sample._native import _C, DTYPES

if TYPE_CHECKING:
    from gptkern.cache import KVCache

# More rows are bound by arithmetic, of which PyTorch's products do more a second.
MOST_ROWS = 8
# Of weights kept as (in, outs), whose sums go through memory: fewer pay.
MOST_TURNED_ROWS = 4


def pays(model: GPT, rows: int) -> bool:
    """Whether a ``CpuStep`` can take this model's place, and is faster."""
    weight = model.lm_head.weight
    served = weight.device.type == "cpu" and weight.dtype in (torch.float32, torch.bfloat16)
    return served and rows <= most_rows(model) and _C is not None and bool(_C.has_few_rows)


def most_rows(model: GPT) -> int:
    """The most rows for which a ``CpuStep`` is faster."""
    first = next(iter(model.transformer.h))
    assert isinstance(first, Block)
    return MOST_ROWS if first.attn.c_attn.weight.stride(1) == 1 else MOST_TURNED_ROWS


class CpuStep:
    """``model(tokens[:, None], cache=cache).logits[:, -1]``, faster. Made and used in inference mode.

    Args:
        model: In evaluation mode; ``pays`` has said yes.
        cache: Holds the prompts; every call takes each of its sequences one token on.
    """

    def __init__(self, model: GPT, cache: KVCache) -> None:
        self._transformer, self._cache, self._config = model.transformer, cache, model.config
        self._head = model.lm_head
        self._scales = [model.config.attention_scale(layer) for layer in range(model.config.n_layer)]

    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits ``(rows, vocab_size)`` after ``tokens`` ``(rows,)`` int64."""
        transformer, heads = self._transformer, self._config.n_head
        step = self._cache.extend([1] * tokens.shape[0])
        x = F.embedding(tokens, transformer.wte.weight) + F.embedding(step.positions, transformer.wpe.weight)
        post_norm = self._config.post_norm
        for index, (block, scale) in enumerate(zip(transformer.h, self._scales, strict=True)):
            assert isinstance(block, Block)
            attn, mlp = block.attn, block.mlp
            h = x if post_norm else _norm(block.ln_1, x)
            q, k, v = linear(h, attn.c_attn).view(x.shape[0], 3, heads, -1).unbind(1)
            x = x + linear(step.attention(index, q, k, v, scale=scale).flatten(1), attn.c_proj)
            if post_norm:
                x = _norm(block.ln_1, x)
            h = x if post_norm else _norm(block.ln_2, x)
            x = x + linear(_activated(linear(h, mlp.c_fc), mlp.activation), mlp.c_proj)
            if post_norm:
                x = _norm(block.ln_2, x)
        step.commit()
        return linear(x if transformer.ln_f is None else _norm(transformer.ln_f, x), self._head)


def _activated(x: torch.Tensor, name: str) -> torch.Tensor:
    # PyTorch rounds otherwise what its vectors leave over: row by row, each one's rest is its own.
    return torch.cat([ACTIVATIONS[name](row) for row in x.split(1)])


def _norm(norm: Norm, x: torch.Tensor) -> torch.Tensor:
    return reference.layer_norm(x, norm.weight, norm.bias, norm.eps)


def linear(x: torch.Tensor, layer: nn.Linear) -> torch.Tensor:
    """``layer(x)`` for ``(rows, in)`` of few rows, on the CPU in fp32 or bf16, summed in fp32."""
    weight, bias = layer.weight, layer.bias
    # Weights of transformers' GPT-2 are kept the other way round, and come here as a view.
    turned = weight.stride(1) != 1 and weight.stride(0) == 1
    if not turned and weight.stride(1) != 1 and weight.shape[1] > 1:
        return F.linear(x, weight, bias)
    x = x.contiguous()
    out = x.new_empty(x.shape[0], weight.shape[0])
    _C.few_rows_linear(
        x.data_ptr(),
        weight.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        out.data_ptr(),
        *(x.shape[0], *weight.shape, weight.stride(1 if turned else 0), turned),
        DTYPES[x.dtype],
        torch.get_num_threads(),
    )
    return out
