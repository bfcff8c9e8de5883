"""GraphExecutor: on a GPU, as few launches as there are dependencies, captured once and replayed.

A layer is five launches, each one op that works alone: norm, QKV and the cache; attention; output
projection and residual; norm, FC and activation; projection and residual. Before the layers come the
embeddings, after them norm and head. The whole pass is captured as one CUDA graph per bucket of row counts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from gptkern.engine.cache import KVCache
from gptkern.engine.executors.base import TableExecutor, check_cache
from gptkern.engine.executors.changes import reads_weights_alone
from gptkern.engine.executors.weights import matrix, norm_weights
from gptkern.model.decoder import Block, Decoder, Norm
from gptkern.ops._counters import Pool, counters_from
from gptkern.ops._dispatch import use_kernel
from gptkern.ops._launch import on_device
from gptkern.ops._types import FP8
from gptkern.ops.decode_attention import decode_attention
from gptkern.ops.decode_embed import decode_embed
from gptkern.ops.decode_linear import decode_linear, decode_qkv

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
        reason = reads_weights_alone(model)
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
        storage, transformer = self._table.storage, self._model.transformer
        page_table, lengths = storage.page_table[:rows], self._table.lengths[:rows]
        x, slots = decode_embed(
            self._tokens[:rows],
            self._live,
            transformer.wte.weight,
            transformer.wpe.weight,
            page_table,
            lengths,
            storage.page_size,
        )
        norm: Norm | None = None
        for block in transformer.h:
            assert isinstance(block, Block)
            x, norm = self._block(block, x, norm, slots, page_table, lengths)
        norm = norm if transformer.ln_f is None else transformer.ln_f
        return decode_linear(x, matrix(self._model.lm_head), norm=norm_weights(norm))

    def _block(
        self,
        block: Block,
        x: torch.Tensor,
        pending: Norm | None,
        slots: torch.Tensor,
        page_table: torch.Tensor,
        lengths: torch.Tensor,
    ) -> tuple[torch.Tensor, Norm | None]:
        """One layer: (x, the norm that whoever reads x next has to apply).

        Where norms follow a branch (GPT-1), x is what comes before the norm; the next launch normalises
        it on the way in and keeps the result, to which its branch is added.
        """
        attn, mlp, layer = block.attn, block.mlp, block.attn.layer
        storage = self._table.storage
        k_cache, v_cache, kv_scales = storage.k[layer], storage.v[layer], storage.layer_kv_scales(layer)
        normed = torch.empty_like(x) if block.post_norm and pending is not None else None
        q = decode_qkv(
            x,
            matrix(attn.c_attn),
            attn.c_attn.bias,
            k_cache,
            v_cache,
            slots,
            norm=norm_weights(pending if block.post_norm else block.ln_1),
            normed_out=normed,
            scales=kv_scales,
        )
        # The kernel before it is the one above, which writes neither the table nor the lengths.
        attended = decode_attention(
            q.unflatten(1, (attn.n_head, attn.head_dim)),
            k_cache,
            v_cache,
            page_table,
            lengths,
            scale=attn.scale,
            prefetch=True,
            scales=kv_scales,
        )
        residual = x if normed is None else normed
        x = decode_linear(attended.flatten(1), matrix(attn.c_proj), attn.c_proj.bias, residual=residual)
        normed = torch.empty_like(x) if block.post_norm else None
        inner = decode_linear(
            x,
            matrix(mlp.c_fc),
            mlp.c_fc.bias,
            norm=norm_weights(block.ln_1 if block.post_norm else block.ln_2),
            activation=mlp.activation,
            normed_out=normed,
        )
        residual = x if normed is None else normed
        x = decode_linear(inner, matrix(mlp.c_proj), mlp.c_proj.bias, residual=residual)
        return x, block.ln_2 if block.post_norm else None

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


class Graphs:
    """One CUDA graph per bucket of row counts, captured on first use.

    A graph holds addresses, not values: growing sequences, new pages and updated weights need no new
    capture. Only weights that moved do.
    """

    def __init__(self, executor: GraphExecutor) -> None:
        self._executor = executor
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
