"""GraphExecutor: on a GPU, as few launches as there are dependencies, captured once and replayed.

Each stage of the decoder's program (``gptkern.model.program``) is one launch, of an op that works alone. The
whole pass is captured as one CUDA graph per bucket of row counts.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from functools import cached_property

import torch

from gptkern.as_built import Watch
from gptkern.engine.cache import KVCache
from gptkern.engine.executors.base import TableExecutor, check_cache
from gptkern.engine.executors.changes import weights_alone
from gptkern.engine.executors.weights import step_program
from gptkern.engine.rows import RowTable
from gptkern.model.decoder import Decoder
from gptkern.model.spec import DecoderSpec
from gptkern.ops._counters import Pool, counters_from
from gptkern.ops._dispatch import use_kernel
from gptkern.ops._launch import on_device
from gptkern.ops._types import FP8, RmsNorm, Rotary
from gptkern.ops.decode_attention import append_kv, decode_attention
from gptkern.ops.decode_embed import decode_embed
from gptkern.ops.decode_linear import decode_linear, decode_qkv
from gptkern.ops.decode_step import StepProgram, StepRow
from gptkern.ops.layer_norm import layer_norm
from gptkern.ops.rms_norm import rms_norm
from gptkern.ops.rotary import rotary

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
        self._find_owners()
        self._addresses: list[int] = []
        self._program: StepProgram | None = None
        with torch.inference_mode(False):
            self._tokens = torch.zeros(max_rows, dtype=torch.int64, device=cache.device)
            self._live = torch.zeros(1, dtype=torch.int32, device=cache.device)
        self._live_count = 0
        self._counters: Pool = {}
        self.graphs = Graphs(self) if cache.device.type == "cuda" else None
        self._look_for_weights()

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
        self._look_for_weights()
        # Graphs and streams are those of the current device, which need not be the model's.
        with on_device(self._tokens), counters_from(self._counters):
            out = self.run(rows) if self.graphs is None else self.graphs.replay(rows).clone()
        self._table.advanced(rows)
        return out[:rows]

    def _find_owners(self) -> None:
        """Find the dictionaries of modules that hold weights; packed ones are buffers."""
        self._watch = Watch(self._model)
        modules = list(self._model.modules())
        self._owners = [owner for m in modules for owner in (m._parameters, m._buffers) if owner]

    def _look_for_weights(self) -> None:
        """Make the program anew, and forget the graphs, where weights were moved or replaced."""
        if self._watch.stirred():
            self._find_owners()
        addresses = [t.data_ptr() for owner in self._owners for t in owner.values() if t is not None]
        if addresses != self._addresses:
            # The program holds the tensors themselves: no other one comes to lie at their addresses.
            self._program, self._addresses = step_program(self._model), addresses
            if self.graphs is not None:
                self.graphs.clear()

    def run(self, rows: int) -> torch.Tensor:
        """The pass itself, over the first ``rows`` rows of the buffers: what a graph captures."""
        assert self._program is not None
        return Pass(self._program, self._table, self._tokens[:rows], self._live).run()

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
    if spec.rotaries and spec.head_dim % 2:
        return f"the decode kernels turn pairs within heads of even size; this model's have {spec.head_dim}"
    return None


class Pass:
    """One pass over some rows of a table: the rows of a program, a launch each."""

    def __init__(
        self, program: StepProgram, table: RowTable, tokens: torch.Tensor, live: torch.Tensor
    ) -> None:
        rows = tokens.shape[0]
        self._program, self._storage = program, table.storage
        self._page_table, self._lengths = table.storage.page_table[:rows], table.lengths[:rows]
        x, self._slots = decode_embed(
            tokens,
            live,
            program.token_weight,
            program.position_weight,
            self._page_table,
            self._lengths,
            self._storage.page_size,
            position_offset=program.position_offset,
            scale=program.embedding_scale,
        )
        self._buffers = {"x": x}

    def run(self) -> torch.Tensor:
        """Logits ``(rows, vocab_size)``."""
        for row in self._program.rows:
            self._buffers[row.write] = getattr(self, f"_{row.kind}")(row)
        return self._buffers["logits"]

    def _qkv(self, row: StepRow) -> torch.Tensor:
        x, storage = self._buffers[row.read], self._storage
        return decode_qkv(
            x,
            row.product.weight,
            row.product.bias,
            storage.k[row.layer],
            storage.v[row.layer],
            self._slots,
            norm=row.norm,
            normed_out=self._save(row, x),
            scales=storage.layer_kv_scales(row.layer),
            # The embeddings have counted the new token already.
            rotary=None if row.rotary is None else Rotary(*row.rotary[:2], self._lengths, row.rotary.pairs),
            head_norm=row.head_norm,
        )

    def _heads(self, row: StepRow) -> torch.Tensor:
        storage, norm = self._storage, row.head_norm
        k_cache, v_cache = storage.k[row.layer], storage.v[row.layer]
        kv_heads, head_dim = k_cache.shape[2:]
        widths = [self._program.heads * head_dim, kv_heads * head_dim, kv_heads * head_dim]
        q, k, v = torch.split(self._buffers[row.read], widths, dim=1)
        if norm is not None:
            q = rms_norm(q, norm.q_weight, norm.eps, unit_offset=norm.unit_offset)
            k = rms_norm(k, norm.k_weight, norm.eps, unit_offset=norm.unit_offset)
        q, k, v = (x.unflatten(1, (-1, head_dim)) for x in (q, k, v))
        if row.rotary is not None:
            cos, sin, pairs = row.rotary
            q, turned = rotary(q, k, cos, sin, self._positions, pairs=pairs)
            assert turned is not None
            k = turned
        append_kv(k, v, k_cache, v_cache, self._slots, scales=storage.layer_kv_scales(row.layer))
        out: torch.Tensor = q.flatten(1)
        return out

    @cached_property
    def _positions(self) -> torch.Tensor:
        """The position of each row's token: its embedding has counted it. Padding stands at 0."""
        return (self._lengths - 1).clamp_(min=0)

    def _attention(self, row: StepRow) -> torch.Tensor:
        q, storage = self._buffers[row.read], self._storage
        out = decode_attention(
            q.unflatten(1, (self._program.heads, -1)),
            storage.k[row.layer],
            storage.v[row.layer],
            self._page_table,
            self._lengths,
            scale=row.attention_scale,
            window=row.window,
            # The kernel before it writes neither the table nor the lengths.
            prefetch=True,
            scales=storage.layer_kv_scales(row.layer),
            softcap=row.softcap,
        )
        return out.flatten(1)

    def _linear(self, row: StepRow) -> torch.Tensor:
        x = self._buffers[row.read]
        return decode_linear(
            x,
            row.product.weight,
            row.product.bias,
            norm=row.norm,
            activation=row.activation,
            gated=row.gated,
            scale=row.scale,
            softcap=row.softcap,
            residual=None if row.residual is None else self._buffers[row.residual],
            normed_out=self._save(row, x),
        )

    def _add_norm(self, row: StepRow) -> torch.Tensor:
        norm, x = row.norm, self._buffers[row.read]
        assert norm is not None and row.residual is not None
        if isinstance(norm, RmsNorm):
            normed = rms_norm(x, norm.weight, norm.eps, unit_offset=norm.unit_offset)
        else:
            normed = layer_norm(x, *norm)
        return torch.add(self._buffers[row.residual], normed, alpha=row.scale)

    def _save(self, row: StepRow, x: torch.Tensor) -> torch.Tensor | None:
        """Memory that keeps the normed input, where a later row adds to it."""
        if row.save is None:
            return None
        self._buffers[row.save] = torch.empty_like(x)
        return self._buffers[row.save]


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
