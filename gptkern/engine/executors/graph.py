"""GraphExecutor: on a GPU, as few launches as there are dependencies, captured once and replayed.

Each stage of the decoder's program (``gptkern.model.program``) is one launch, of an op that works alone. The
whole pass is captured as one CUDA graph per bucket of row counts.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import torch

from gptkern.engine.cache import KVCache
from gptkern.engine.executors.base import TableExecutor, check_cache
from gptkern.engine.executors.changes import weights_alone
from gptkern.engine.rows import RowTable
from gptkern.model.decoder import Decoder
from gptkern.model.program import Buffer, Stage, program
from gptkern.model.spec import DecoderSpec
from gptkern.model.weights import decoder_weights
from gptkern.ops._counters import Pool, counters_from
from gptkern.ops._dispatch import use_kernel
from gptkern.ops._launch import on_device
from gptkern.ops._types import FP8, HeadNorm, Norm, RmsNorm, Rotary
from gptkern.ops.decode_attention import decode_attention
from gptkern.ops.decode_embed import decode_embed
from gptkern.ops.decode_linear import decode_linear, decode_qkv
from gptkern.ops.layer_norm import layer_norm
from gptkern.ops.rms_norm import rms_norm

# The decode kernels are one family for so many rows: one row and sixty-four take the same path.
MOST_ROWS = 64


class GraphExecutor(TableExecutor):
    """Runs new tokens through the decode kernels; on a GPU as one CUDA graph.

    Weights are read where they lie: parameters that an optimizer updates in place are what the next pass
    reads. Nothing waits for the GPU: whoever reads the tokens on the host one pass behind never stalls it.

    Args:
        model: Of one dtype, that of the cache unless it is fp8. Dropout never applies.
        cache: Of the model's shape, on its device.
        max_rows: Most tokens of one launch.

    Raises:
        ValueError: A cache of another dtype, device or shape.
    """

    name = "graph"
    made_for = "cuda"

    def __init__(self, model: Decoder, cache: KVCache, max_rows: int = MOST_ROWS) -> None:
        check_cache(type(self).__name__, model, cache)
        if cache.dtype not in (model.dtype, FP8):
            raise ValueError(
                f"{type(self).__name__}: the cache is {cache.dtype}, the model {model.dtype}: they must agree"
            )
        super().__init__(model, cache, max_rows)
        # Packed weights are buffers.
        self._parameters = [*model.parameters(), *model.buffers()]
        self._addresses: list[int] = []
        with torch.inference_mode(False):
            self._tokens = torch.zeros(max_rows, dtype=torch.int64, device=cache.device)
            self._live = torch.zeros(1, dtype=torch.int32, device=cache.device)
        self._live_count = 0
        self._counters: Pool = {}
        self.graphs = Graphs(self) if cache.device.type == "cuda" else None

    @staticmethod
    def serves(model: Decoder, dtype: torch.dtype) -> str | None:
        """See ``Executor``."""
        if not use_kernel(model.transformer.wte.weight):
            return f"the decode kernels run on CUDA devices; the model is on {model.device}"
        reason = _unserved(model.spec) or weights_alone(model)
        if reason is not None:
            return reason
        if len({(p.dtype, p.device) for p in model.parameters()}) > 1:
            return "the weights are of several dtypes or on several devices"
        if dtype not in (model.dtype, FP8):
            return (
                f"the decode kernels keep keys and values in the weights' {model.dtype} or {FP8}, not {dtype}"
            )
        return None

    def _launch(self, tokens: torch.Tensor, places: Sequence[tuple[list[int], int]]) -> torch.Tensor:
        rows = len(places)
        self._table.lay(places)
        self._tokens[:rows] = tokens
        if rows != self._live_count:
            self._live.fill_(rows)
            self._live_count = rows
        addresses = [parameter.data_ptr() for parameter in self._parameters]
        if addresses != self._addresses:
            self._addresses = addresses
            self._weights_moved()
        # Graphs and streams are those of the current device, which need not be the model's.
        with on_device(self._tokens), counters_from(self._counters):
            out = self.run(rows) if self.graphs is None else self.graphs.replay(rows).clone()
        self._table.advanced(rows)
        return out[:rows]

    def _weights_moved(self) -> None:
        """Forget what holds addresses of weights."""
        if self.graphs is not None:
            self.graphs.clear()

    def run(self, rows: int) -> torch.Tensor:
        """The pass itself, over the first ``rows`` rows of the buffers: what a graph captures."""
        return StagedPass(self._model, self._table, rows).run(self._tokens[:rows], self._live)

    def warm_up(self, rows: int, stream: torch.cuda.Stream) -> None:
        """Compile and load every kernel, which a capture forbids, by a pass that leaves no trace."""
        tokens, live = self._tokens.clone(), self._live.clone()
        # With no row live nothing is written to the cache and no length advances.
        self._live.zero_()
        caller = torch.cuda.current_stream(self._cache.device)
        stream.wait_stream(caller)
        with torch.cuda.stream(stream):
            self.run(rows)
        caller.wait_stream(stream)
        self._live.copy_(live)
        self._tokens.copy_(tokens)


def _unserved(spec: DecoderSpec) -> str | None:
    """The part of a decoder that the decode kernels do not compute; None if there is none."""
    if spec.qk_norm == "whole":
        return "the decode kernels norm queries and keys head by head; this model norms all heads at once"
    if spec.norm_place in ("branch", "both") and spec.residual_scale != 1.0:
        return "the decode kernels scale a branch before its norm; this model scales it after"
    if spec.rotaries and spec.head_dim % 2:
        return f"the decode kernels turn pairs within heads of even size; this model's have {spec.head_dim}"
    return None


class StagedPass:
    """One pass: the stages of the decoder's program over ``rows`` rows of a table, a launch each."""

    def __init__(self, model: Decoder, table: RowTable, rows: int) -> None:
        self._spec, self._weights, self._storage = model.spec, decoder_weights(model), table.storage
        self._page_table, self._lengths = table.storage.page_table[:rows], table.lengths[:rows]
        tables = model.transformer.rotary_tables(model.device)
        self._tables = dict(zip(model.spec.rotaries, tables, strict=True))
        self._buffers: dict[Buffer, torch.Tensor] = {}

    def run(self, tokens: torch.Tensor, live: torch.Tensor) -> torch.Tensor:
        """Logits ``(rows, vocab_size)`` after ``tokens``, of which the first ``live`` are in use."""
        first, *stages = program(self._spec)
        self._buffers[first.write], self._slots = decode_embed(
            tokens,
            live,
            self._weights.tokens,
            self._weights.positions,
            self._page_table,
            self._lengths,
            self._storage.page_size,
            position_offset=self._spec.position_offset,
            scale=self._spec.embedding_scale,
        )
        for stage in stages:
            self._buffers[stage.write] = getattr(self, f"_{stage.kind}")(stage)
        return self._buffers["logits"]

    def _qkv(self, stage: Stage) -> torch.Tensor:
        x, storage, layer = self._read(stage), self._storage, stage.layer
        matrix = self._weights.matrix(layer, "qkv")
        return decode_qkv(
            x,
            matrix.weight,
            matrix.bias,
            storage.k[layer],
            storage.v[layer],
            self._slots,
            norm=self._norm(stage),
            normed_out=self._save(stage, x),
            scales=storage.layer_kv_scales(layer),
            rotary=self._rotary(layer),
            head_norm=self._head_norm(layer),
        )

    def _rotary(self, layer: int) -> Rotary | None:
        rotary = self._spec.layers[layer].rotary
        # The embeddings have counted the new token already.
        return None if rotary is None else Rotary(*self._tables[rotary], self._lengths, rotary.pairs)

    def _head_norm(self, layer: int) -> HeadNorm | None:
        own, norm = self._weights.layers[layer], self._spec.norm
        if own.q_norm is None or own.k_norm is None:
            return None
        return HeadNorm(own.q_norm, own.k_norm, norm.eps, norm.unit_offset)

    def _attention(self, stage: Stage) -> torch.Tensor:
        spec, storage, layer = self._spec, self._storage, stage.layer
        out = decode_attention(
            self._read(stage).unflatten(1, (spec.heads, spec.head_dim)),
            storage.k[layer],
            storage.v[layer],
            self._page_table,
            self._lengths,
            scale=spec.layers[layer].attention_scale,
            window=spec.layers[layer].window,
            # The kernel before it writes neither the table nor the lengths.
            prefetch=True,
            scales=storage.layer_kv_scales(layer),
            softcap=spec.attention_softcap,
        )
        return out.flatten(1)

    def _linear(self, stage: Stage) -> torch.Tensor:
        assert stage.weight is not None
        x, matrix, spec = self._read(stage), self._weights.matrix(stage.layer, stage.weight), self._spec
        is_head, is_branch = stage.weight == "head", stage.weight in ("out", "proj")
        return decode_linear(
            x,
            matrix.weight,
            matrix.bias,
            norm=self._norm(stage),
            activation=spec.activation if stage.activated else "none",
            gated=stage.activated and spec.gated,
            scale=spec.logits_scale if is_head else spec.residual_scale if is_branch else 1.0,
            softcap=spec.logits_softcap if is_head else None,
            residual=None if stage.residual is None else self._buffers[stage.residual],
            normed_out=self._save(stage, x),
        )

    def _add_norm(self, stage: Stage) -> torch.Tensor:
        norm, x = self._norm(stage), self._read(stage)
        assert norm is not None and stage.residual is not None
        if isinstance(norm, RmsNorm):
            normed = rms_norm(x, norm.weight, norm.eps, unit_offset=norm.unit_offset)
        else:
            normed = layer_norm(x, *norm)
        return self._buffers[stage.residual] + normed

    def _read(self, stage: Stage) -> torch.Tensor:
        assert stage.read is not None
        return self._buffers[stage.read]

    def _norm(self, stage: Stage) -> Norm | RmsNorm | None:
        """The norm of what the stage reads."""
        if stage.norm is None:
            return None
        (weight, bias), spec = self._weights.norm(stage.norm), self._spec.norm
        return RmsNorm(weight, spec.eps, spec.unit_offset) if spec.kind == "rms" else (weight, bias, spec.eps)

    def _save(self, stage: Stage, x: torch.Tensor) -> torch.Tensor | None:
        """Memory that keeps the normed input, where a later stage adds to it."""
        if stage.save is None:
            return None
        self._buffers[stage.save] = torch.empty_like(x)
        return self._buffers[stage.save]


class Graphs:
    """One CUDA graph per bucket of row counts, captured on first use.

    A graph holds addresses, not values: growing sequences, new pages and updated weights need no new
    capture. Only weights that moved do.
    """

    def __init__(self, executor: GraphExecutor) -> None:
        # Weak: the executor holds this object.
        self._executor = weakref.proxy(executor)
        self._captured: dict[int, tuple[torch.cuda.CUDAGraph, torch.Tensor]] = {}
        self._stream = torch.cuda.Stream(executor._cache.device)
        self._pool = torch.cuda.graph_pool_handle()

    def clear(self) -> None:
        """Forget every graph: weights have moved."""
        self._captured.clear()
        # PyTorch refuses captures into a pool whose last graph is gone.
        self._pool = torch.cuda.graph_pool_handle()

    def replay(self, live: int) -> torch.Tensor:
        """Run the pass for ``live`` rows; the result lies in the graph's memory until the next one."""
        rows = min(1 << (live - 1).bit_length(), self._executor.max_rows)
        if rows not in self._captured:
            self._captured[rows] = self._capture(rows)
        graph, out = self._captured[rows]
        graph.replay()
        return out

    def _capture(self, rows: int) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
        self._executor.warm_up(rows, self._stream)
        graph = torch.cuda.CUDAGraph()
        # Thread-local: another thread's allocation or event query must not end this capture.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            out = self._executor.run(rows)
        return graph, out
