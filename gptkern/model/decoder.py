"""The decoder's modules: they train, run prefill, and are the reference of executors.

Parameter names are those of transformers' GPT-2 (``transformer.h.0.attn.c_attn.weight``), matrices
are ``(out, in)``. The modules of a layer are in ``gptkern.model.layers``.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self, overload

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from gptkern.config import Config
from gptkern.model.attend import Attend, DenseAttend, PackedAttend
from gptkern.model.layers import Block, Norm, Places, add_norm
from gptkern.model.rotary import frequencies
from gptkern.model.spec import DecoderSpec
from gptkern.model.taps import Taps, checked_steering, checked_taps
from gptkern.quantization import Quantization

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
        hidden_states: By layer, those asked for: ``(batch, seq, width)``; None where none were.
    """

    logits: torch.Tensor
    loss: torch.Tensor | None = None
    hidden_states: dict[int, torch.Tensor] | None = None

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


class Transformer(nn.Module):
    """Embeddings, blocks and, unless norms follow each sum, the final norm."""

    def __init__(self, spec: DecoderSpec) -> None:
        super().__init__()
        self.embd_pdrop, self.resid_pdrop = spec.embedding_dropout, spec.residual_dropout
        self.embedding_scale, self.position_offset = spec.embedding_scale, spec.position_offset
        self.parallel = spec.parallel
        self.gradient_checkpointing = False
        self.wte = nn.Embedding(spec.vocab_size, spec.width)
        self.learned_positions = spec.learned_positions
        if spec.learned_positions:
            self.wpe = nn.Embedding(spec.context + spec.position_offset, spec.width)
        self.h = nn.ModuleList(Block(spec, layer) for layer in range(len(spec.layers)))
        self.ln_f = None if spec.norm_place == "after" else Norm(spec.norm, spec.width)
        self._context, self._rotaries = spec.context, spec.rotaries
        self._tables: list[tuple[torch.Tensor, torch.Tensor]] = []

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        attend: Attend,
        taps: Taps | None = None,
    ) -> torch.Tensor:
        places = Places(position_ids.contiguous(), self.rotary_tables(input_ids.device))
        x = self._embedded(input_ids, position_ids)
        dropout_p = self.resid_pdrop if self.training and attend.dropout and not self.parallel else 0.0
        x = F.dropout(x, self.embd_pdrop, self.training and attend.dropout)
        residual: torch.Tensor | None = None
        for layer, block in enumerate(self.h):
            if taps is not None:
                if taps.wants(layer) and residual is not None:
                    x, residual = residual + F.dropout(x, dropout_p), None
                x = taps.steered(layer, x)
                if taps.take(layer, x):
                    return x
            if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
                x, residual = checkpoint(block, x, residual, attend, places, use_reentrant=False)
            else:
                x, residual = block(x, residual, attend, places)
        if taps is not None and len(self.h) in taps.added:
            x = x if residual is None else residual + F.dropout(x, dropout_p)
            x, residual = taps.steered(len(self.h), x), None
        if self.ln_f is not None:
            x = self.ln_f(x) if residual is None else add_norm(self.ln_f, x, residual, dropout_p)[0]
        if taps is not None:
            taps.take(len(self.h), x)
        return x

    def _embedded(self, input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        x: torch.Tensor = self.wte(input_ids)
        if self.embedding_scale != 1.0:
            x = x * self.embedding_scale
        if not self.learned_positions:
            return x
        places = position_ids + self.position_offset if self.position_offset else position_ids
        embedded: torch.Tensor = x + self.wpe(places)
        return embedded

    def rotary_tables(self, device: torch.device) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """(cos, sin) of each kind of rotary positions, in the order of ``spec.rotaries``, on ``device``."""
        if self._rotaries and (not self._tables or self._tables[0][0].device != device):
            # Tensors made in inference mode could not be saved for a backward pass.
            with torch.inference_mode(False):
                tables = [frequencies(rotary, self._context) for rotary in self._rotaries]
                self._tables = [(cos.to(device), sin.to(device)) for cos, sin in tables]
        return self._tables


class Decoder(nn.Module):
    """The network: token ids to logits. Weights are fresh, as the family initialises them.

    Args:
        config: The model's shape and switches.

    Attributes:
        config: The model's shape and switches.
        quantization: The format of the linear layers' weights; None for floats.
        kv_scales: (k_scale, v_scale), each ``(layers, kv_heads)``: the scales of an fp8 cache; None for
            scales of 1. They are saved and loaded with the weights; ``quantize.kv_scales`` finds them.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        spec = config.spec
        self.config = config
        self.quantization: Quantization | None = None
        self.kv_scales: tuple[torch.Tensor, torch.Tensor] | None = None
        self.transformer = Transformer(spec)
        self.lm_head = nn.Linear(spec.width, spec.vocab_size, bias=spec.head_bias)
        if spec.tied:
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
        """Draw fresh weights: N(0, initializer_range); GPT-2's last ones of a branch over sqrt(2 layers)."""
        std = self.config.initializer_range
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                branch_end = name.endswith("c_proj.weight") and self.config.scaled_init
                nn.init.normal_(
                    parameter, std=std / math.sqrt(2 * len(self.spec.layers)) if branch_end else std
                )
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    @property
    def spec(self) -> DecoderSpec:
        """Sizes and switches: all that the decoder computes."""
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

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """The head on last hidden states ``(..., width)``: ``(..., vocab_size)``, scaled and capped."""
        logits: torch.Tensor = self.lm_head(hidden)
        spec = self.spec
        if spec.logits_scale != 1.0:
            logits = logits * spec.logits_scale
        if spec.logits_softcap is not None:
            logits = torch.tanh(logits / spec.logits_softcap) * spec.logits_softcap
        return logits

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
        hidden_states: Sequence[int] = (),
        stop_at_layer: int | None = None,
        steering: Mapping[int, torch.Tensor] | None = None,
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
            hidden_states: Layers whose hidden states are returned, counted as in transformers: 0 is the
                embeddings, i what the first i blocks made; after all blocks with the final norm. Zeros where
                ``attention_mask`` is 0. Not with a cache.
            stop_at_layer: Run only so many blocks, fewer than there are; the logits are then those of no
                position.
            steering: Vectors that are added to hidden states, by layer as above but before the final norm:
                ``(width,)``, or ``(batch, width)`` with one for each row. What follows sees the sum;
                ``hidden_states`` have it too.

        Raises:
            ValueError: Shapes that do not agree, a token outside the vocabulary (on CPU), a sequence
                longer than the model's context, labels together with a cache.
        """
        _check_kinds(labels, attention_mask, cache, position_ids, logits_to_keep, sequences)
        rows = None if sequences is None else list(sequences)
        self._check(input_ids, labels, attention_mask, cache, position_ids, logits_to_keep, rows)
        taps = checked_taps(
            self.spec, hidden_states, stop_at_layer, cached=cache is not None, scored=labels is not None
        )
        if steering is not None:
            batch, seq = input_ids.shape
            packed = cache is not None
            added = checked_steering(
                self.spec, steering, (batch, seq), attention_mask, packed=packed, last=stop_at_layer
            )
            taps = Taps(frozenset(), None, added) if taps is None else replace(taps, added=added)
        if cache is not None:
            return self._forward_cached(
                input_ids, attention_mask, cache, position_ids, logits_to_keep, rows, taps
            )
        batch, seq = input_ids.shape
        if position_ids is None:
            position_ids = torch.arange(seq, device=input_ids.device).expand(batch, seq)
        dropout_p = self.spec.attention_dropout if self.training else 0.0
        states: dict[int, torch.Tensor] | None = None
        if attention_mask is None:
            hidden = self.transformer(input_ids, position_ids, DenseAttend(dropout_p), taps)
            states = None if taps is None else taps.states
            if stop_at_layer is not None:
                return GPTOutput(hidden.new_empty(batch, 0, self.spec.vocab_size), None, states)
            logits = self.logits(hidden[:, -logits_to_keep:] if labels is None else hidden)
        else:
            token_mask = attention_mask.bool()
            lengths = token_mask.sum(1)
            cu_seqlens = F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
            attend = PackedAttend(cu_seqlens, int(lengths.max()) if batch else 0, dropout_p)
            hidden = self.transformer(input_ids[token_mask], position_ids[token_mask], attend, taps)
            if taps is not None:
                states = {layer: _unpacked(state, token_mask) for layer, state in taps.states.items()}
            if stop_at_layer is not None:
                return GPTOutput(hidden.new_empty(batch, 0, self.spec.vocab_size), None, states)
            logits = _unpacked(self.logits(hidden), token_mask)
        loss = None if labels is None else _shifted_loss(logits, labels)
        return GPTOutput(logits[:, -logits_to_keep:], loss, states)

    def _forward_cached(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        cache: KVCache,
        position_ids: torch.Tensor | None,
        logits_to_keep: int,
        sequences: list[int] | None,
        taps: Taps | None,
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
        hidden = self.transformer(ids, positions, attend, taps)
        attend.commit()
        if seq == 1:
            return GPTOutput(self.logits(hidden)[:, None])
        count = logits_to_keep or max(lengths)
        if batch == 1 and count <= lengths[0]:
            return GPTOutput(self.logits(hidden[-count:])[None])
        ends = attend.cu_seqlens_q[1:].long()
        rows = ends[:, None] + torch.arange(-count, 0, device=ends.device)
        present = rows >= attend.cu_seqlens_q[:-1, None]
        logits = self.logits(hidden[rows.clamp_min(0)])
        return GPTOutput(logits.masked_fill(~present[..., None], 0.0))

    def _check_length(self, tokens: int) -> None:
        if tokens > self.spec.context:
            raise ValueError(
                f"GPT: {tokens} tokens are longer than the model's context of {self.spec.context}"
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
            if low < 0 or high >= self.spec.vocab_size:
                raise ValueError(
                    f"GPT: input_ids holds {low if low < 0 else high}; "
                    f"token ids from 0 to {self.spec.vocab_size - 1} are accepted"
                )


def _check_kinds(
    labels: object,
    attention_mask: object,
    cache: object,
    position_ids: object,
    logits_to_keep: object,
    sequences: object,
) -> None:
    tensors = {"labels": labels, "attention_mask": attention_mask, "position_ids": position_ids}
    for name, value in tensors.items():
        if value is not None and not isinstance(value, torch.Tensor):
            raise TypeError(f"GPT: {name} is {type(value).__name__}; a torch.Tensor, or None, is needed")
    # The class is the engine's, which stands above the model.
    if cache is not None and not hasattr(cache, "sequences"):
        raise TypeError(f"GPT: cache is {type(cache).__name__}; a KVCache, or None, is needed")
    if not isinstance(logits_to_keep, int | torch.SymInt):
        raise TypeError(f"GPT: logits_to_keep is {type(logits_to_keep).__name__}; a whole number is needed")
    if sequences is not None and not isinstance(sequences, Sequence):
        raise TypeError(f"GPT: sequences is {type(sequences).__name__}; a list of ids, or None, is needed")


def _unpacked(packed: torch.Tensor, token_mask: torch.Tensor) -> torch.Tensor:
    """``(tokens, n)`` in the places of their tokens, ``(batch, seq, n)``; zeros elsewhere."""
    zeros = packed.new_zeros(*token_mask.shape, packed.shape[-1])
    return zeros.masked_scatter(token_mask[..., None], packed)


def _shifted_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of each next token, in fp32."""
    return F.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(),
        labels[:, 1:].flatten().to(logits.device),
        ignore_index=IGNORE_INDEX,
    )
