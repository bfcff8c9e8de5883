"""One token of every sequence on the CPU, by the extension: all layers in one call.

A step of few rows is bound by how fast the weights stream from memory. PyTorch's operators stream them
at a third to two thirds of what the memory gives, and spend as long again between them.
``csrc/decode_cpu.cpp`` reads each weight once, where it lies, and its threads stay together from the
embeddings to the logits. Weights of int8 it widens in registers: half of bf16's bytes to read.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import nn

from gptkern.model import GPT, Block, Norm
from gptkern.ops.sample._native import _C, DTYPES
from gptkern.quantize import QuantizedLinear

if TYPE_CHECKING:
    from gptkern.cache import KVCache

# More rows are bound by arithmetic, of which PyTorch's products do more a second.
MOST_ROWS = 16
# csrc/decode_cpu.h
_ACTIVATIONS = {"gelu_tanh": 0, "gelu": 1, "relu": 2, "silu": 3}
DTYPES_SERVED = (torch.float32, torch.bfloat16)


class CpuStep:
    """``model(tokens[:, None], cache=cache).logits[:, -1]``, faster.

    A row's logits are bitwise the same whatever else is in the batch, and with any number of threads.

    Args:
        model: One that ``executor.refused`` has no reason against. Its parameters may change, but must
            stay in their places.
        cache: Holds the prompts; every call takes each of its sequences one token on.
    """

    def __init__(self, model: GPT, cache: KVCache) -> None:
        config, transformer = model.config, model.transformer
        self._model, self._cache = model, cache
        blocks = list(transformer.h)
        self._decoder = _C.Decoder(
            DTYPES[cache.dtype],
            config.n_embd,
            config.n_head,
            config.inner_dim,
            config.vocab_size,
            _ACTIVATIONS[config.activation],
            config.post_norm,
            config.layer_norm_epsilon,
            [list(_block(block)) for block in blocks],
            [config.attention_scale(layer) for layer in range(len(blocks))],
            [
                n
                for e in (transformer.wte, transformer.wpe)
                for n in (e.weight.data_ptr(), e.weight.stride(0))
            ],
            [0, 0] if transformer.ln_f is None else list(_norm(transformer.ln_f)),
            list(_linear(model.lm_head)),
        )

    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits ``(rows, vocab_size)`` after ``tokens`` ``(rows,)`` int64."""
        step = self._cache.extend([1] * tokens.shape[0])
        self._check(tokens, max(step.lengths))
        logits = self.logits(tokens, self._cache.page_table, self._cache.seq_lens)
        step.commit()
        return logits

    def logits(self, tokens: torch.Tensor, page_table: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """The same with places of one's own: keys and values are written, the cache's lengths stay.

        Rows may be consecutive tokens of one sequence: each attends to those before it.

        Args:
            tokens: ``(rows,)`` int64.
            page_table: ``(rows or more, pages)`` int32, rows contiguous.
            lengths: ``(rows or more,)`` int32: what each row's sequence holds before its token.
        """
        cache, rows, tokens = self._cache, tokens.shape[0], tokens.contiguous()
        logits = torch.empty(rows, self._model.config.vocab_size, dtype=cache.dtype, device="cpu")
        self._decoder.step(
            cache.k.data_ptr(),
            cache.v.data_ptr(),
            *cache.k.stride()[:3],
            cache.page_size,
            page_table.data_ptr(),
            page_table.stride(0),
            lengths.data_ptr(),
            tokens.data_ptr(),
            rows,
            logits.data_ptr(),
            torch.get_num_threads(),
        )
        return logits

    def _check(self, tokens: torch.Tensor, longest: int) -> None:
        config = self._model.config
        if longest >= config.n_positions:
            raise ValueError(
                f"GPT: a sequence has {longest} tokens, the model's whole context of {config.n_positions}"
            )
        if not 0 <= int(tokens.min()) <= int(tokens.max()) < config.vocab_size:
            raise ValueError(f"GPT: tokens are {tokens.tolist()}; 0 <= token < {config.vocab_size} is needed")


def _block(block: nn.Module) -> Iterator[int]:
    """csrc/decoder.h"""
    assert isinstance(block, Block)
    for norm in (block.ln_1, block.ln_2):
        yield from _norm(norm)
    for layer in (block.attn.c_attn, block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj):
        yield from _linear(layer)


def _norm(norm: Norm) -> tuple[int, int]:
    return norm.weight.data_ptr(), 0 if norm.bias is None else norm.bias.data_ptr()


def _linear(layer: nn.Linear | QuantizedLinear) -> tuple[int, ...]:
    bias = layer.bias
    if isinstance(layer, QuantizedLinear):
        values = layer.values
        address = 0 if bias is None else bias.data_ptr()
        return values.data_ptr(), address, *values.shape, values.stride(0), 0, layer.scales.data_ptr()
    weight = layer.weight
    # Weights of transformers' GPT-2 are kept the other way round, and come here as a view.
    turned = weight.stride(1) != 1
    return (
        weight.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        *weight.shape,
        weight.stride(0 if not turned else 1),
        int(turned),
        0,
    )
