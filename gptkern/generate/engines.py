"""The engines that a model keeps for ``generate`` and its like, so that a second call makes nothing anew."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from gptkern.engine.cache import PAGE_SIZE
from gptkern.engine.engine import DEFAULT_CHUNK, Engine
from gptkern.engine.options import KVCacheDType
from gptkern.model.decoder import Decoder


class Engines:
    """A model's idle engine: its cache, its graphs, its sampler.

    Each call has an engine to itself. One that is through leaves it for the next, the larger of two stays.
    A copy of the model, and a pickled one, begin without.

    Args:
        keeps_prefixes: Whether a prompt takes over what an earlier one that began alike left behind, as the
            turns of a conversation do. Off by default: whoever writes to the weights past PyTorch's counting
            must not get what was computed before.
    """

    def __init__(self, keeps_prefixes: bool = False) -> None:
        self._keeps_prefixes = keeps_prefixes
        self._lock = threading.Lock()
        self._idle: Engine | None = None
        self._made_for: tuple[Any, ...] = ()

    def __reduce__(self) -> tuple[type[Engines], tuple[()]]:
        return Engines, ()

    def clear(self) -> None:
        """Give back the memory of the idle engine."""
        with self._lock:
            self._idle = None

    @contextmanager
    def engine(
        self, model: Decoder, rows: int, tokens: int, kv_cache_dtype: KVCacheDType
    ) -> Iterator[Engine]:
        """An engine with room for ``rows`` sequences and ``tokens`` of them all; grown where need be."""
        made_for = _made_for(model, kv_cache_dtype)
        with self._lock:
            idle, self._idle = self._idle, None
            if self._made_for != made_for:
                idle, self._made_for = None, made_for
        pages = -(-tokens // PAGE_SIZE)
        if idle is None or idle.cache.max_seqs < rows or idle.cache.num_pages < pages:
            if idle is not None:
                rows, pages = max(rows, idle.cache.max_seqs), max(pages, idle.cache.num_pages)
            del idle
            engine = self._made(model, _rounded(rows), _rounded(pages), kv_cache_dtype)
        else:
            engine = idle
        try:
            yield engine
        except GeneratorExit:
            self._leave(engine, made_for)
            raise
        self._leave(engine, made_for)

    def _made(self, model: Decoder, rows: int, pages: int, kv_cache_dtype: KVCacheDType) -> Engine:
        chunk = DEFAULT_CHUNK
        if self._keeps_prefixes:
            # What is found ends at a multiple of the chunk; small chunks cost a GPU launches.
            chunk = PAGE_SIZE if model.device.type == "cpu" else 4 * PAGE_SIZE
            # An engine that grows begins without prefixes: room for the whole context at once.
            pages = max(pages, rows * (-(-model.config.n_positions // PAGE_SIZE) + 1))
        return Engine(
            model,
            max_seqs=rows,
            cache_tokens=pages * PAGE_SIZE,
            prefix_cache=self._keeps_prefixes,
            prefill_chunk=chunk,
            kv_cache_dtype=kv_cache_dtype,
        )

    def _leave(self, engine: Engine, made_for: tuple[Any, ...]) -> None:
        """Keep an engine for the next call. One whose call failed is not kept."""
        engine.clear()
        with self._lock:
            smaller = self._idle is None or self._idle.cache.num_pages < engine.cache.num_pages
            if self._made_for == made_for and smaller:
                self._idle = engine


def _rounded(count: int) -> int:
    """The next power of two, so that calls of similar sizes share an engine."""
    return 1 << (count - 1).bit_length()


def _made_for(model: Decoder, kv_cache_dtype: KVCacheDType) -> tuple[Any, ...]:
    """What an engine's tensors were made for."""
    kv_scales = (
        None if kv_cache_dtype == "auto" or model.kv_scales is None else tuple(map(id, model.kv_scales))
    )
    weight, quantised = model.transformer.wte.weight, model.quantization
    return (
        (model.config, model.dtype, model.device, tuple(weight.shape)),
        (kv_cache_dtype, kv_scales, None if quantised is None else quantised.format),
    )
