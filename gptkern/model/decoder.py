"""The decoder's modules, built of ops only: they train, run prefill, and are the reference of executors.

Parameter names are those of transformers' GPT-2 (``transformer.h.0.attn.c_attn.weight``), matrices
are ``(out, in)``. Blocks pass on a pair, a branch's output and the residual that it is
still to be added to, so that each addition is fused with the norm that follows.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Self, overload

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from gptkern import ops
from gptkern.as_built import untouched
from gptkern.config import Config
from gptkern.model.attend import Attend, AttendOptions, DenseAttend, PackedAttend
from gptkern.model.rotary import frequencies
from gptkern.model.spec import DecoderSpec, NormSpec
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


@dataclass(frozen=True, eq=False)
class Places:
    """Positions of the tokens of a pass, and the tables that rotate them.

    Attributes:
        ids: Each token's position, of the shape of the tokens.
        tables: The (cos, sin) of each kind of rotary positions of the decoder, ``(context, dim / 2)`` fp32.
    """

    ids: torch.Tensor
    tables: Sequence[tuple[torch.Tensor, torch.Tensor]]


@dataclass
class Taps:
    """The hidden states that a pass hands out, what is added to them, and the layer where it ends.

    Attributes:
        layers: Counted as in transformers: 0 is the embeddings, i what block i - 1 made; after the last block
            with the final norm.
        stop: Run only so many blocks; None: all.
        added: By layer, what is added to the residual stream there; after the last block before the norm.
        states: What was found, by layer.
    """

    layers: frozenset[int]
    stop: int | None
    added: Mapping[int, torch.Tensor] = field(default_factory=dict)
    states: dict[int, torch.Tensor] = field(default_factory=dict)

    def wants(self, layer: int) -> bool:
        """True if the whole residual stream is needed there."""
        return layer in self.layers or layer in self.added or layer == self.stop

    def steered(self, layer: int, x: torch.Tensor) -> torch.Tensor:
        """``x`` with what is added there."""
        return x + self.added[layer].to(x.dtype) if layer in self.added else x

    def take(self, layer: int, x: torch.Tensor) -> bool:
        """Note ``x`` if it is wanted; True if the pass ends here."""
        if layer in self.layers:
            self.states[layer] = x
        return layer == self.stop


class Attention(nn.Module):
    """Causal self-attention with one matrix for queries, keys and values."""

    def __init__(self, spec: DecoderSpec, layer: int) -> None:
        super().__init__()
        own = spec.layers[layer]
        self.layer = layer
        self.n_head, self.n_kv_head, self.head_dim = spec.heads, spec.kv_heads, spec.head_dim
        self.scale, self.window, self.softcap = own.attention_scale, own.window, spec.attention_softcap
        self.rotary = None if own.rotary is None else spec.rotaries.index(own.rotary)
        self.pairs = None if own.rotary is None else own.rotary.pairs
        self.c_attn = nn.Linear(spec.width, spec.qkv_width, bias=spec.qkv_bias)
        self.c_proj = nn.Linear(spec.q_width, spec.width, bias=spec.out_bias)
        self.whole_norm = spec.qk_norm == "whole"
        if spec.qk_norm is not None:
            per_head = NormSpec("rms", spec.norm.eps, unit_offset=spec.norm.unit_offset)
            self.q_norm: Norm | None = Norm(per_head, spec.q_width if self.whole_norm else spec.head_dim)
            self.k_norm: Norm | None = Norm(per_head, spec.kv_width if self.whole_norm else spec.head_dim)
        else:
            self.q_norm = self.k_norm = None

    def forward(self, x: torch.Tensor, attend: Attend, places: Places) -> torch.Tensor:
        q_width, kv_width = self.n_head * self.head_dim, self.n_kv_head * self.head_dim
        q, k, v = self.c_attn(x).split((q_width, kv_width, kv_width), dim=-1)
        if self.whole_norm and self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q = q.unflatten(-1, (self.n_head, self.head_dim))
        k, v = (t.unflatten(-1, (self.n_kv_head, self.head_dim)) for t in (k, v))
        q, k = self._rotated(q, k, places)
        options: AttendOptions = {"scale": self.scale, "window": self.window, "softcap": self.softcap}
        out = attend.attention(self.layer, q, k, v, **options)
        projected: torch.Tensor = self.c_proj(out.flatten(-2))
        return projected

    def _rotated(self, q: torch.Tensor, k: torch.Tensor, places: Places) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries and keys with the norm of each head and their rotation, where the layer has them."""
        q_norm, k_norm = self.q_norm, self.k_norm
        norm = None
        if q_norm is not None and k_norm is not None and not self.whole_norm:
            if self.rotary is not None and untouched(q_norm, *NORM) and untouched(k_norm, *NORM):
                norm = (q_norm.weight, k_norm.weight, q_norm.eps)
            else:
                q, k = q_norm(q), k_norm(k)
        if self.rotary is None or self.pairs is None:
            return q, k
        cos, sin = places.tables[self.rotary]
        unit_offset = q_norm is not None and q_norm.unit_offset
        q, turned = ops.rotary(
            q, k, cos, sin, places.ids, pairs=self.pairs, norm=norm, unit_offset=unit_offset
        )
        assert turned is not None
        return q, turned


class MLP(nn.Module):
    """The two-layer perceptron, plain or gated: ``act(gate) * up``."""

    def __init__(self, spec: DecoderSpec) -> None:
        super().__init__()
        self.activation, self.gated = spec.activation, spec.gated
        self.c_fc = nn.Linear(spec.width, spec.fc_width, bias=spec.fc_bias)
        self.c_proj = nn.Linear(spec.inner, spec.width, bias=spec.proj_bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        fc, proj = self.c_fc, self.c_proj
        if untouched(fc, *LINEAR) and untouched(proj, *LINEAR):
            op = ops.gated_mlp if self.gated else ops.gelu_mlp
            return op(x, fc.weight, fc.bias, proj.weight, proj.bias, activation=self.activation)
        inner = fc(x)
        activation = ACTIVATIONS[self.activation]
        if self.gated:
            gate, up = inner.chunk(2, dim=-1)
            out: torch.Tensor = proj(activation(gate) * up)
        else:
            out = proj(activation(inner))
        return out


class Norm(nn.Module):
    """Layer or RMS normalisation, alone or fused with the residual addition before it."""

    def __init__(self, spec: NormSpec, width: int) -> None:
        super().__init__()
        self.kind, self.eps, self.unit_offset = spec.kind, spec.eps, spec.unit_offset
        self.weight = nn.Parameter(torch.zeros(width) if spec.unit_offset else torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if spec.bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.kind == "rms":
            return ops.rms_norm(x, self.weight, self.eps, unit_offset=self.unit_offset)
        return ops.layer_norm(x, self.weight, self.bias, self.eps)

    def add(
        self, x: torch.Tensor, residual: torch.Tensor, dropout_p: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The norm of ``residual + dropout(x)``, and that sum."""
        if self.kind == "rms":
            return ops.add_rms_norm(
                x, residual, self.weight, self.eps, dropout_p=dropout_p, unit_offset=self.unit_offset
            )
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
    """One decoder block; ``DecoderSpec`` says where its norms are and whether its branches are parallel."""

    def __init__(self, spec: DecoderSpec, layer: int) -> None:
        super().__init__()
        self.norm_place, self.parallel, self.shared_norm = spec.norm_place, spec.parallel, spec.shared_norm
        self.residual_scale = spec.residual_scale
        self.resid_pdrop = spec.residual_dropout
        self.ln_1 = Norm(spec.norm, spec.width)
        self.attn = Attention(spec, layer)
        if not spec.shared_norm:
            self.ln_2 = Norm(spec.norm, spec.width)
        self.mlp = MLP(spec)
        both = spec.norm_place == "both"
        self.post_attn_norm = Norm(spec.norm, spec.width) if both else None
        self.post_mlp_norm = Norm(spec.norm, spec.width) if both else None

    def forward(
        self, x: torch.Tensor, residual: torch.Tensor | None, attend: Attend, places: Places
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Map ``(x, residual)`` to the next such pair; a residual of None stands for nothing to add."""
        dropout_p = self.resid_pdrop if self.training and attend.dropout else 0.0
        if self.norm_place == "after":
            h, _ = add_norm(self.ln_1, self._scaled(self.attn(x, attend, places)), x, dropout_p)
            h, _ = add_norm(self.ln_2, self._scaled(self.mlp(h)), h, dropout_p)
            return h, None
        if self.norm_place == "branch":
            h = x + F.dropout(self._scaled(self.ln_1(self.attn(x, attend, places))), dropout_p)
            return h + F.dropout(self._scaled(self.ln_2(self.mlp(h))), dropout_p), None
        if residual is None:
            h, residual = self.ln_1(x), x
        else:
            # Parallel branches are dropped out before their sum.
            h, residual = add_norm(self.ln_1, x, residual, 0.0 if self.parallel else dropout_p)
        if self.parallel:
            other = h if self.shared_norm else self.ln_2(residual)
            branches = self.attn(h, attend, places), self.mlp(other)
            attended, inner = (F.dropout(self._scaled(branch), dropout_p) for branch in branches)
            return attended + inner, residual
        attended = self._branch(self.attn(h, attend, places), self.post_attn_norm)
        h, residual = add_norm(self.ln_2, attended, residual, dropout_p)
        return self._branch(self.mlp(h), self.post_mlp_norm), residual

    def _branch(self, x: torch.Tensor, norm: Norm | None) -> torch.Tensor:
        """A branch's output as it is added: normed, scaled."""
        return self._scaled(x if norm is None else norm(x))

    def _scaled(self, x: torch.Tensor) -> torch.Tensor:
        return x if self.residual_scale == 1.0 else x * self.residual_scale


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
        rows = None if sequences is None else list(sequences)
        self._check(input_ids, labels, attention_mask, cache, position_ids, logits_to_keep, rows)
        taps = self._taps(hidden_states, stop_at_layer, labels, cache)
        if steering:
            repeats = 0 if cache is None else input_ids.shape[1]
            spread = partial(_spread, token_mask=attention_mask, repeats=repeats)
            added = self._steering(steering, input_ids.shape[0], stop_at_layer, spread)
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

    def _taps(
        self,
        hidden_states: Sequence[int],
        stop_at_layer: int | None,
        labels: torch.Tensor | None,
        cache: KVCache | None,
    ) -> Taps | None:
        """The hidden states that a pass hands out; None where none are asked for."""
        if not hidden_states and stop_at_layer is None:
            return None
        layers = len(self.spec.layers)
        last = layers if stop_at_layer is None else stop_at_layer
        if stop_at_layer is not None and not 0 <= stop_at_layer < layers:
            raise ValueError(
                f"GPT: stop_at_layer is {stop_at_layer}; a number from 0 to {layers - 1} is needed"
            )
        if not hidden_states or not all(0 <= layer <= last for layer in hidden_states):
            raise ValueError(
                f"GPT: hidden_states is {list(hidden_states)}; layers from 0 to {last} are needed"
            )
        if cache is not None:
            raise ValueError("GPT: hidden_states are not handed out of a pass with a cache: run one without")
        if labels is not None and stop_at_layer is not None:
            raise ValueError("GPT: labels need all layers; stop_at_layer is given")
        return Taps(frozenset(hidden_states), stop_at_layer)

    def _steering(
        self,
        steering: Mapping[int, torch.Tensor],
        batch: int,
        stop_at_layer: int | None,
        spread: Callable[[torch.Tensor], torch.Tensor],
    ) -> dict[int, torch.Tensor]:
        """The vectors, those of each row spread over its tokens."""
        last = len(self.spec.layers) if stop_at_layer is None else stop_at_layer
        width, found = self.spec.width, {}
        for layer, vectors in steering.items():
            if layer not in range(last + 1):
                raise ValueError(f"GPT: steering has layer {layer!r}; layers from 0 to {last} are needed")
            if not isinstance(vectors, torch.Tensor) or vectors.shape not in ((width,), (batch, width)):
                shape = tuple(vectors.shape) if isinstance(vectors, torch.Tensor) else type(vectors).__name__
                raise ValueError(
                    f"GPT: steering of layer {layer} is {shape}; a tensor of shape ({width},) or "
                    f"({batch}, {width}) is needed"
                )
            found[layer] = vectors if vectors.dim() == 1 else spread(vectors)
        return found

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


def _spread(vectors: torch.Tensor, *, token_mask: torch.Tensor | None, repeats: int) -> torch.Tensor:
    """Vectors of rows ``(batch, width)`` for all of their tokens: ``(batch, 1, width)``, or packed."""
    if token_mask is not None:
        return vectors[token_mask.bool().nonzero()[:, 0]]
    return vectors.repeat_interleave(repeats, 0) if repeats else vectors[:, None]


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
