"""DecodeStep: one token for every live sequence of a cache, in as few launches as there are dependencies.

A layer is five launches, each one op that works alone: norm, QKV and the cache; attention; output
projection and residual; norm, FC and activation; projection and residual. Before the layers come the
embeddings, after them norm and head, and the sampler where one is given. On a GPU the whole step is
captured as one CUDA graph per bucket of batch sizes, and tokens go from the sampler to the next step's
embeddings on the device. With ``persistent`` all layers are one launch (``ops.decode_step``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from gptkern.model.decoder import Block, Decoder, Norm
from gptkern.ops._counters import Pool, counters_from
from gptkern.ops._dispatch import use_kernel
from gptkern.ops._launch import on_device
from gptkern.ops._types import FP8
from gptkern.ops.decode_attention import decode_attention
from gptkern.ops.decode_embed import decode_embed
from gptkern.ops.decode_linear import QuantizedWeight, decode_linear, decode_qkv
from gptkern.ops.decode_step import (
    MOST_ROWS,
    LayerWeights,
    Linear,
    NormWeights,
    StepWeights,
    persistent_step,
)
from gptkern.ops.sample import Sampled, SamplerState, SamplingParams, sample
from gptkern.quantize import QuantizedLinear

if TYPE_CHECKING:
    from gptkern.engine.cache import KVCache


class DecodeStep:
    """Takes every live sequence of a cache one token on.

    ::

        step = DecodeStep(model, cache)
        logits = step(tokens)                   # (batch, vocab_size)

        step = DecodeStep(model, cache, params, state)
        for _ in range(n):
            tokens = step(tokens)               # (batch,), chosen on the device

    Weights are read where they lie: parameters that an optimizer updates in place are what the next step
    reads. A sequence's logits are bitwise the same whatever else is in the batch and however the cache
    is paged. Nothing waits for the GPU: whoever reads the tokens on the host one step behind never
    stalls it.

    Args:
        model: Of one dtype, that of the cache unless it is fp8. Dropout never applies.
        cache: Its live sequences, in order, are the batch. Prompts are prefilled through the model.
        params, state: How tokens are chosen, one row a sequence; without them a step gives logits.
        persistent: Run up to 8 sequences' layers in one cooperative launch in place of five a layer, with
            the same bits, on a GPU. Off by default: it has not been measured to be faster.

    Raises:
        ValueError: Only one of ``params`` and ``state``; a cache of another dtype, device or shape;
            ``persistent`` on a CPU.
    """

    def __init__(
        self,
        model: Decoder,
        cache: KVCache,
        params: SamplingParams | None = None,
        state: SamplerState | None = None,
        *,
        persistent: bool = False,
    ) -> None:
        config = model.config
        if (params is None) != (state is None):
            raise ValueError("DecodeStep: params and state must be given together")
        layers, _, _, heads, head_dim = cache.k.shape
        if (layers, heads, head_dim) != (config.n_layer, config.n_head, config.head_dim):
            raise ValueError(
                f"DecodeStep: the cache has {layers} layers of {heads} x {head_dim}, "
                f"the model {config.n_layer} of {config.n_head} x {config.head_dim}"
            )
        if cache.dtype not in (model.dtype, FP8) or cache.device != model.device:
            raise ValueError(
                f"DecodeStep: the cache is {cache.dtype} on {cache.device}, "
                f"the model {model.dtype} on {model.device}: they must agree"
            )
        if persistent and not use_kernel(model.lm_head.weight):
            raise ValueError(f"DecodeStep: persistent needs a CUDA device; the model is on {model.device}")
        self.model = model
        self.cache = cache
        self.persistent = persistent
        self.params = params
        self.state = state
        # Packed weights are buffers.
        self._parameters = [*model.parameters(), *model.buffers()]
        self._addresses: list[int] = []
        self._weights: StepWeights | None = None
        with torch.inference_mode(False):
            self._tokens = torch.zeros(cache.max_seqs, dtype=torch.int64, device=cache.device)
            self._live = torch.zeros(1, dtype=torch.int32, device=cache.device)
        self._live_count = 0
        self._counters: Pool = {}
        self._graphs = _Graphs(self) if cache.device.type == "cuda" else None

    @torch.no_grad()
    def __call__(self, tokens: torch.Tensor | None = None) -> torch.Tensor:
        """Append one token to every live sequence.

        Args:
            tokens: ``(batch,)`` int64, one a live sequence; None takes those that the last step chose.

        Returns:
            The next tokens, ``(batch,)`` int64, or without a sampler the logits ``(batch, vocab_size)``
            in the model's dtype. Both are the caller's own.

        Raises:
            ValueError: Not one token a sequence, or a sequence at the end of the model's context.
            CacheFullError: No room in the cache; nothing has changed.
        """
        batch = len(self.cache.sequences)
        self._check(tokens, batch)
        self.cache.reserve([1] * batch)
        if tokens is not None:
            self._tokens[:batch] = tokens
        if batch != self._live_count:
            self._live.fill_(batch)
            self._live_count = batch
        self._follow_weights()
        try:
            # Graphs and streams are those of the current device, which need not be the model's.
            with on_device(self._tokens), counters_from(self._counters):
                out = self.run(batch) if self._graphs is None else self._graphs.replay(batch).clone()
        except BaseException:
            self.cache.refresh()
            raise
        self.cache.advance([1] * batch)
        return out[:batch]

    def run(self, rows: int) -> torch.Tensor:
        """The step itself, over the first ``rows`` rows of the buffers: what a graph captures."""
        logits = self._logits(rows)
        if self.params is None or self.state is None:
            return logits
        # The graph's rows are a bucket; the sampler's are the batch.
        chosen: Sampled = sample(logits[: self.params.batch], self.params, state=self.state)
        self._tokens[: self.params.batch] = chosen.tokens
        return chosen.tokens

    def _logits(self, rows: int) -> torch.Tensor:
        cache, transformer = self.cache, self.model.transformer
        page_table, seq_lens = cache.page_table[:rows], cache.seq_lens[:rows]
        if self._weights is not None and rows <= MOST_ROWS:
            return persistent_step(
                self._weights,
                self._tokens[:rows],
                self._live,
                cache.k,
                cache.v,
                page_table,
                seq_lens,
                cache.storage.kv_scales,
            )
        x, slots = decode_embed(
            self._tokens[:rows],
            self._live,
            transformer.wte.weight,
            transformer.wpe.weight,
            page_table,
            seq_lens,
            cache.page_size,
        )
        norm: Norm | None = None
        for block in transformer.h:
            assert isinstance(block, Block)
            x, norm = self._block(block, x, norm, slots, page_table, seq_lens)
        norm = norm if transformer.ln_f is None else transformer.ln_f
        return decode_linear(x, _matrix(self.model.lm_head), norm=_norm(norm))

    def _follow_weights(self) -> None:
        """Forget what holds addresses of weights that have moved."""
        addresses = [parameter.data_ptr() for parameter in self._parameters]
        if addresses == self._addresses:
            return
        self._addresses = addresses
        if self._graphs is not None:
            self._graphs.clear()
        if self.persistent:
            self._weights = _step_weights(self.model)

    def _block(
        self,
        block: Block,
        x: torch.Tensor,
        pending: Norm | None,
        slots: torch.Tensor,
        page_table: torch.Tensor,
        seq_lens: torch.Tensor,
    ) -> tuple[torch.Tensor, Norm | None]:
        """One layer: (x, the norm that whoever reads x next has to apply).

        Where norms follow a branch (GPT-1), x is what comes before the norm; the next launch normalises
        it on the way in and keeps the result, to which its branch is added.
        """
        attn, mlp, layer = block.attn, block.mlp, block.attn.layer
        k_cache, v_cache = self.cache.k[layer], self.cache.v[layer]
        kept = torch.empty_like(x) if block.post_norm and pending is not None else None
        q = decode_qkv(
            x,
            _matrix(attn.c_attn),
            attn.c_attn.bias,
            k_cache,
            v_cache,
            slots,
            norm=_norm(pending if block.post_norm else block.ln_1),
            normed_out=kept,
            scales=self.cache.storage.layer_kv_scales(layer),
        )
        heads = q.unflatten(1, (attn.n_head, attn.head_dim))
        # The kernel before it is the one above, which writes neither the table nor the lengths.
        attended = decode_attention(
            heads,
            k_cache,
            v_cache,
            page_table,
            seq_lens,
            scale=attn.scale,
            prefetch=True,
            scales=self.cache.storage.layer_kv_scales(layer),
        )
        residual = x if kept is None else kept
        x = decode_linear(attended.flatten(1), _matrix(attn.c_proj), attn.c_proj.bias, residual=residual)
        kept = torch.empty_like(x) if block.post_norm else None
        inner = decode_linear(
            x,
            _matrix(mlp.c_fc),
            mlp.c_fc.bias,
            norm=_norm(block.ln_1 if block.post_norm else block.ln_2),
            activation=mlp.activation,
            normed_out=kept,
        )
        residual = x if kept is None else kept
        x = decode_linear(inner, _matrix(mlp.c_proj), mlp.c_proj.bias, residual=residual)
        return x, block.ln_2 if block.post_norm else None

    def _check(self, tokens: torch.Tensor | None, batch: int) -> None:
        if not batch:
            raise ValueError("DecodeStep: the cache has no live sequences")
        if tokens is None and self.params is None:
            raise ValueError("DecodeStep: tokens is None; without a sampler they must be given")
        if tokens is not None and (tokens.shape != (batch,) or tokens.dtype != torch.int64):
            raise ValueError(
                f"DecodeStep: tokens is {tokens.dtype} of shape {tuple(tokens.shape)}; "
                f"int64 of shape ({batch},), one a live sequence, is needed"
            )
        if self.params is not None and self.params.batch != batch:
            raise ValueError(f"DecodeStep: params has {self.params.batch} rows, the cache {batch} sequences")
        longest = max(self.cache.lengths)
        if longest >= self.model.config.n_positions:
            raise ValueError(
                f"DecodeStep: a sequence has {longest} tokens, "
                f"the model's whole context of {self.model.config.n_positions}"
            )


def _matrix(layer: nn.Linear | QuantizedLinear) -> torch.Tensor | QuantizedWeight:
    return layer.quantized if isinstance(layer, QuantizedLinear) else layer.weight


def _norm(norm: Norm | None) -> tuple[torch.Tensor, torch.Tensor | None, float] | None:
    return None if norm is None else (norm.weight, norm.bias, norm.eps)


def _step_weights(model: Decoder) -> StepWeights:
    """The model's weights where they lie now."""

    def linear(layer: nn.Linear | QuantizedLinear) -> Linear:
        return Linear(_matrix(layer), layer.bias)

    def norm(layer: Norm) -> NormWeights:
        return layer.weight, layer.bias

    blocks = [block for block in model.transformer.h if isinstance(block, Block)]
    layers: list[LayerWeights] = []
    # Where norms follow their branches, whoever reads a branch's sum next applies its norm.
    pending: Norm | None = None
    for block in blocks:
        attn, mlp = block.attn, block.mlp
        before_qkv = pending if block.post_norm else block.ln_1
        layers.append(
            LayerWeights(
                None if before_qkv is None else norm(before_qkv),
                linear(attn.c_attn),
                linear(attn.c_proj),
                norm(block.ln_1 if block.post_norm else block.ln_2),
                linear(mlp.c_fc),
                linear(mlp.c_proj),
                attn.scale,
            )
        )
        pending = block.ln_2
    last = model.transformer.ln_f or blocks[-1].ln_2
    return StepWeights(
        model.transformer.wte.weight,
        model.transformer.wpe.weight,
        tuple(layers),
        norm(last),
        linear(model.lm_head),
        heads=model.config.n_head,
        eps=last.eps,
        activation=model.config.activation,
    )


class _Graphs:
    """One CUDA graph per bucket of batch sizes, captured on first use.

    A graph holds addresses, not values: growing sequences, new pages and updated weights need no new
    capture. Only weights that moved do.
    """

    def __init__(self, step: DecodeStep) -> None:
        self._step = step
        self._captured: dict[int, tuple[torch.cuda.CUDAGraph, torch.Tensor]] = {}
        self._stream = torch.cuda.Stream(step.cache.device)
        self._pool = torch.cuda.graph_pool_handle()

    def clear(self) -> None:
        """Forget every graph: weights have moved."""
        self._captured.clear()
        # PyTorch refuses captures into a pool whose last graph is gone.
        self._pool = torch.cuda.graph_pool_handle()

    def replay(self, batch: int) -> torch.Tensor:
        """Run the step for ``batch`` sequences; the result lies in the graph's memory until the next one."""
        rows = min(1 << (batch - 1).bit_length(), self._step.cache.max_seqs)
        if rows not in self._captured:
            self._captured[rows] = self._capture(rows)
        graph, out = self._captured[rows]
        graph.replay()
        return out

    def _capture(self, rows: int) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
        self._warm_up(rows)
        graph = torch.cuda.CUDAGraph()
        # Thread-local: another thread's allocation or event query must not end this capture.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            out = self._step.run(rows)
        return graph, out

    def _warm_up(self, rows: int) -> None:
        """Compile and load every kernel, which a capture forbids, by a step that leaves no trace."""
        step = self._step
        state = step.state
        remembered = [] if state is None else [t for t in (state.counters, state.counts) if t is not None]
        kept = [(t, t.clone()) for t in (*remembered, step._tokens)]
        live = step._live.clone()
        # With no row live nothing is written to the cache and no length advances.
        step._live.zero_()
        caller = torch.cuda.current_stream(step.cache.device)
        self._stream.wait_stream(caller)
        with torch.cuda.stream(self._stream):
            step.run(rows)
        caller.wait_stream(self._stream)
        step._live.copy_(live)
        for tensor, before in kept:
            tensor.copy_(before)
