"""The decoder's modules, built of ops only: they train, run prefill, and are the reference of executors.

Parameter names are those of transformers' GPT-2 (``transformer.h.0.attn.c_attn.weight``), matrices
are ``(out, in)``. Blocks pass on a pair, a branch's output and the residual that it is
still to be added to, so that each addition is fused with the norm that follows.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self, overload

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from gptkern import ops
from gptkern.as_built import untouched
from gptkern.attend import Attend, DenseAttend, PackedAttend
from gptkern.config import GPTConfig
from gptkern.model.spec import DecoderSpec
from gptkern.ops.linear.reference import ACTIVATIONS
from gptkern.quantization import Quantization
from gptkern.quantize import QuantizedLinear

if TYPE_CHECKING:
    from gptkern.engine.cache import KVCache

IGNORE_INDEX = -100


@dataclass
class GPTOutput:
    """Logits and loss of a pass: ``output.logits``, ``output["logits"]``, ``loss, logits = output[:2]``.

    Indices count as in transformers: 0 is the loss of a call with labels, else the logits.

    Attributes:
        logits: ``(batch, seq, vocab_size)``, or the last ``logits_to_keep`` positions of it; zeros
            where ``attention_mask`` is 0.
        loss: Mean cross-entropy of the next token, a scalar in fp32; None without labels.
    """

    logits: torch.Tensor
    loss: torch.Tensor | None = None

    def to_tuple(self) -> tuple[torch.Tensor, ...]:
        """The loss, of a call with labels, and the logits."""
        return (self.logits,) if self.loss is None else (self.loss, self.logits)

    @overload
    def __getitem__(self, key: int | str) -> torch.Tensor: ...
    @overload
    def __getitem__(self, key: slice) -> tuple[torch.Tensor, ...]: ...
    def __getitem__(self, key: int | str | slice) -> torch.Tensor | tuple[torch.Tensor, ...]:
        if not isinstance(key, str):
            return self.to_tuple()[key]
        value = {"loss": self.loss, "logits": self.logits}.get(key)
        if value is None:
            raise KeyError(f"GPTOutput has no {key!r} here: logits always, loss where labels were given")
        return value


class Attention(nn.Module):
    """Causal self-attention with one matrix for queries, keys and values."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.n_head, self.head_dim = config.n_head, config.head_dim
        self.scale = config.attention_scale(layer)
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x: torch.Tensor, attend: Attend) -> torch.Tensor:
        qkv = self.c_attn(x).unflatten(-1, (3, self.n_head, self.head_dim))
        q, k, v = qkv.unbind(-3)
        out = attend.attention(self.layer, q, k, v, scale=self.scale)
        projected: torch.Tensor = self.c_proj(out.flatten(-2))
        return projected


class MLP(nn.Module):
    """The two-layer perceptron."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.activation = config.activation
        self.c_fc = nn.Linear(config.n_embd, config.inner_dim, bias=config.bias)
        self.c_proj = nn.Linear(config.inner_dim, config.n_embd, bias=config.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        fc, proj = self.c_fc, self.c_proj
        if untouched(fc, *LINEAR) and untouched(proj, *LINEAR):
            return ops.gelu_mlp(x, fc.weight, fc.bias, proj.weight, proj.bias, activation=self.activation)
        out: torch.Tensor = proj(ACTIVATIONS[self.activation](fc(x)))
        return out


class Norm(nn.Module):
    """Layer normalisation, alone or fused with the residual addition before it."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.eps = config.layer_norm_epsilon
        self.weight = nn.Parameter(torch.ones(config.n_embd))
        self.bias = nn.Parameter(torch.zeros(config.n_embd)) if config.bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return ops.layer_norm(x, self.weight, self.bias, self.eps)

    def add(
        self, x: torch.Tensor, residual: torch.Tensor, dropout_p: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The norm of ``residual + dropout(x)``, and that sum."""
        return ops.add_layer_norm(x, residual, self.weight, self.bias, self.eps, dropout_p=dropout_p)


# The functions that a fused op may replace, as it computes them from weights alone.
LINEAR = (nn.Linear.forward, QuantizedLinear.forward)
NORM = (Norm.forward,)


def add_norm(
    norm: nn.Module, x: torch.Tensor, residual: torch.Tensor, dropout_p: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The norm of ``residual + dropout(x)``, and that sum; in one kernel if ``norm`` may be fused."""
    if isinstance(norm, Norm) and untouched(norm, *NORM):
        return norm.add(x, residual, dropout_p)
    residual = residual + F.dropout(x, dropout_p)
    return norm(residual), residual


class Block(nn.Module):
    """One decoder block: norm before each branch (GPT-2), or after (GPT-1)."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.post_norm = config.post_norm
        self.resid_pdrop = config.resid_pdrop
        self.ln_1 = Norm(config)
        self.attn = Attention(config, layer)
        self.ln_2 = Norm(config)
        self.mlp = MLP(config)

    def forward(
        self, x: torch.Tensor, residual: torch.Tensor | None, attend: Attend
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Map ``(x, residual)`` to the next such pair; a residual of None stands for nothing to add."""
        dropout_p = self.resid_pdrop if self.training and attend.dropout else 0.0
        if self.post_norm:
            h, _ = add_norm(self.ln_1, self.attn(x, attend), x, dropout_p)
            h, _ = add_norm(self.ln_2, self.mlp(h), h, dropout_p)
            return h, None
        if residual is None:
            h, residual = self.ln_1(x), x
        else:
            h, residual = add_norm(self.ln_1, x, residual, dropout_p)
        h, residual = add_norm(self.ln_2, self.attn(h, attend), residual, dropout_p)
        return self.mlp(h), residual


class Transformer(nn.Module):
    """Embeddings, blocks and, before-norm models only, the final norm."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.embd_pdrop, self.resid_pdrop = config.embd_pdrop, config.resid_pdrop
        self.gradient_checkpointing = False
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.h = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_f = None if config.post_norm else Norm(config)

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor, attend: Attend) -> torch.Tensor:
        x: torch.Tensor = self.wte(input_ids) + self.wpe(position_ids)
        x = F.dropout(x, self.embd_pdrop, self.training and attend.dropout)
        residual: torch.Tensor | None = None
        for block in self.h:
            if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
                x, residual = checkpoint(block, x, residual, attend, use_reentrant=False)
            else:
                x, residual = block(x, residual, attend)
        if self.ln_f is None:
            return x
        assert residual is not None
        dropout_p = self.resid_pdrop if self.training and attend.dropout else 0.0
        return add_norm(self.ln_f, x, residual, dropout_p)[0]


class Decoder(nn.Module):
    """The network: token ids to logits. Weights are fresh, as GPT-2 initialises them.

    Args:
        config: The model's shape and switches.

    Attributes:
        config: The model's shape and switches.
        quantization: The format of the linear layers' weights; None for floats.
        kv_scales: (k_scale, v_scale), each ``(n_layer, n_head)``: the scales of an fp8 cache; None for scales
            of 1. They are saved and loaded with the weights; ``gptkern.quantize.kv_scales`` computes them.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.quantization: Quantization | None = None
        self.kv_scales: tuple[torch.Tensor, torch.Tensor] | None = None
        self.transformer = Transformer(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.transformer.wte.weight
        self.reset_parameters()

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        # to_empty and moves off the meta device make a new parameter for each place of a shared one
        head = self.lm_head
        tied = isinstance(head, nn.Linear) and head.weight is self.transformer.wte.weight
        super()._apply(fn, recurse)
        if tied:
            head.weight = self.transformer.wte.weight
        return self

    def reset_parameters(self) -> None:
        """Draw fresh weights: N(0, initializer_range); branches' last layers divided by sqrt(2 n_layer)."""
        std = self.config.initializer_range
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                branch_end = name.endswith("c_proj.weight") and not self.config.post_norm
                nn.init.normal_(
                    parameter, std=std / math.sqrt(2 * self.config.n_layer) if branch_end else std
                )
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    @property
    def spec(self) -> DecoderSpec:
        """What the decoder computes: its sizes and switches."""
        return self.config.spec

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.transformer.wte.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The weights' dtype."""
        return self.transformer.wte.weight.dtype

    def cache_options(self, kv_cache_dtype: str = "auto") -> dict[str, Any]:
        """``KVCache.for_config``'s dtype and scales for this model."""
        if kv_cache_dtype == "auto":
            return {"dtype": self.dtype}
        k_scale, v_scale = self.kv_scales or (None, None)
        return {"dtype": torch.float8_e4m3fn, "k_scale": k_scale, "v_scale": v_scale}

    def gradient_checkpointing_enable(self, enabled: bool = True) -> None:
        """Recompute each block in the backward pass instead of keeping its activations."""
        self.transformer.gradient_checkpointing = enabled

    def forward(
        self,
        input_ids: torch.Tensor,
        labels: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        cache: KVCache | None = None,
        position_ids: torch.Tensor | None = None,
        *,
        logits_to_keep: int = 0,
        sequences: Sequence[int] | None = None,
    ) -> GPTOutput:
        """Logits, and the loss if there are labels.

        Args:
            input_ids: ``(batch, seq)`` int64.
            labels: ``(batch, seq)`` int64, usually ``input_ids`` themselves, for they are shifted inside; the
                mean leaves out labels of -100.
            attention_mask: ``(batch, seq)``, 1 for tokens and 0 for padding, on any side. Padding is
                left out of the computation. With a cache it speaks of the new tokens only.
            cache: Keys and values of the tokens before; row i of the batch continues the cache's i-th
                sequence, and in an empty cache begins one. The cache grows by this call's tokens. A pass
                with a cache has no dropout, as no gradient comes back through it.
            position_ids: ``(batch, seq)`` int64. None counts 0, 1, ... along the row, as transformers does,
                or with a cache from each sequence's number of tokens on.
            logits_to_keep: The number of last positions whose logits are returned (of each sequence, with a
                cache or a mask); 0 returns all.
            sequences: Ids of the cache's sequences that the rows belong to; None: all of them, in order.

        Raises:
            ValueError: Shapes that do not agree, a token outside the vocabulary (on CPU), a sequence
                longer than ``config.n_positions``, labels together with a cache.
        """
        rows = None if sequences is None else list(sequences)
        self._check(input_ids, labels, attention_mask, cache, position_ids, logits_to_keep, rows)
        if cache is not None:
            return self._forward_cached(input_ids, attention_mask, cache, position_ids, logits_to_keep, rows)
        batch, seq = input_ids.shape
        if position_ids is None:
            position_ids = torch.arange(seq, device=input_ids.device).expand(batch, seq)
        dropout_p = self.config.attn_pdrop if self.training else 0.0
        if attention_mask is None:
            hidden = self.transformer(input_ids, position_ids, DenseAttend(dropout_p))
            logits = self.lm_head(hidden[:, -logits_to_keep:] if labels is None else hidden)
        else:
            token_mask = attention_mask.bool()
            lengths = token_mask.sum(1)
            cu_seqlens = F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
            attend = PackedAttend(cu_seqlens, int(lengths.max()) if batch else 0, dropout_p)
            hidden = self.transformer(input_ids[token_mask], position_ids[token_mask], attend)
            packed = self.lm_head(hidden)
            zeros = packed.new_zeros(batch, seq, packed.shape[-1])
            logits = zeros.masked_scatter(token_mask[..., None], packed)
        loss = None if labels is None else _shifted_loss(logits, labels)
        return GPTOutput(logits[:, -logits_to_keep:], loss)

    def _forward_cached(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        cache: KVCache,
        position_ids: torch.Tensor | None,
        logits_to_keep: int,
        sequences: list[int] | None,
    ) -> GPTOutput:
        batch, seq = input_ids.shape
        if attention_mask is None:
            lengths, ids = [seq] * batch, input_ids.flatten()
        else:
            token_mask = attention_mask.bool()
            lengths, ids = token_mask.sum(1).tolist(), input_ids[token_mask]
            position_ids = None if position_ids is None else position_ids[token_mask]
        if not cache.sequences:
            cache.allocate(batch)
        past = cache.lengths if sequences is None else [cache.length(sequence) for sequence in sequences]
        self._check_length(max(map(operator.add, past, lengths), default=0))
        attend = cache.extend(lengths, sequences)
        positions = attend.positions if position_ids is None else position_ids.flatten()
        hidden = self.transformer(ids, positions, attend)
        attend.commit()
        if seq == 1:
            return GPTOutput(self.lm_head(hidden)[:, None])
        count = logits_to_keep or max(lengths)
        ends = attend.cu_seqlens_q[1:].long()
        rows = ends[:, None] + torch.arange(-count, 0, device=ends.device)
        present = rows >= attend.cu_seqlens_q[:-1, None]
        logits = self.lm_head(hidden[rows.clamp_min(0)])
        return GPTOutput(logits.masked_fill(~present[..., None], 0.0))

    def _check_length(self, tokens: int) -> None:
        if tokens > self.config.n_positions:
            raise ValueError(
                f"GPT: {tokens} tokens are longer than the model's context of {self.config.n_positions}"
            )

    def _check(
        self,
        input_ids: torch.Tensor,
        labels: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        cache: KVCache | None,
        position_ids: torch.Tensor | None,
        logits_to_keep: int,
        sequences: list[int] | None,
    ) -> None:
        if not isinstance(input_ids, torch.Tensor):
            raise TypeError(f"GPT: input_ids is {type(input_ids).__name__}; a torch.Tensor is needed")
        if input_ids.dim() != 2 or input_ids.dtype not in (torch.int64, torch.int32):
            raise ValueError(
                f"GPT: input_ids is {input_ids.dtype} of shape {tuple(input_ids.shape)}; "
                "integers of shape (batch, seq) are needed"
            )
        for name, value in (
            ("labels", labels),
            ("attention_mask", attention_mask),
            ("position_ids", position_ids),
        ):
            if value is not None and value.shape != input_ids.shape:
                raise ValueError(
                    f"GPT: {name} has shape {tuple(value.shape)}, input_ids {tuple(input_ids.shape)}: "
                    "they must be the same"
                )
        if logits_to_keep < 0:
            raise ValueError(f"GPT: logits_to_keep is {logits_to_keep}; 0 or more is needed")
        if cache is not None and labels is not None:
            raise ValueError("GPT: labels cannot be given together with a cache: score without one")
        if sequences is not None and cache is None:
            raise ValueError("GPT: sequences are those of a cache, and no cache is given")
        if cache is not None and cache.sequences:
            owners = cache.sequences if sequences is None else sequences
            if len(owners) != input_ids.shape[0]:
                raise ValueError(
                    f"GPT: input_ids has {input_ids.shape[0]} rows, the cache {len(owners)} sequences: "
                    "one row a sequence is needed"
                )
        if cache is None:
            self._check_length(input_ids.shape[1])
        # A compiled graph must not branch on a tensor's values; there the embedding's own lookup fails.
        if input_ids.device.type == "cpu" and input_ids.numel() and not torch.compiler.is_compiling():
            low, high = input_ids.min().item(), input_ids.max().item()
            if low < 0 or high >= self.config.vocab_size:
                raise ValueError(
                    f"GPT: input_ids holds {low if low < 0 else high}; "
                    f"token ids from 0 to {self.config.vocab_size - 1} are accepted"
                )


def _shifted_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of each next token, in fp32."""
    return F.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(),
        labels[:, 1:].flatten().to(logits.device),
        ignore_index=IGNORE_INDEX,
    )
