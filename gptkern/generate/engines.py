"""The idle engine of a model: ``generate`` and ``stream`` reuse it, so that a second call builds nothing."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from gptkern.engine.cache import PAGE_SIZE
from gptkern.engine.engine import Engine
from gptkern.engine.options import KVCacheDType
from gptkern.model.decoder import Decoder

# Of a conversation's cache on a CPU, where every page is found again.
SMALL_PAGE_SIZE = 8


class Engines:
    """A model's idle engine: its cache, its graphs, its sampler.

    Each call has an engine to itself. A call that ends leaves its engine for the next one; of two engines the
    larger stays. A copy of the model and a pickled model begin without an engine.

    Args:
        keeps_prefixes: True lets a prompt reuse the keys and values of an earlier prompt that began alike, as
            the turns of a conversation do. Off by default: a caller who writes to the weights in a way that
            PyTorch does not count must not get results of the old weights.
    """

    def __init__(self, keeps_prefixes: bool = False) -> None:
        self._keeps_prefixes = keeps_prefixes
        # Reentrant: garbage collection under it may end an abandoned stream, whose engine is left here.
        self._lock = threading.RLock()
        self._idle: Engine | None = None
        self._idle_key: tuple[Any, ...] = ()

    def __reduce__(self) -> tuple[type[Engines], tuple[()]]:
        return Engines, ()

    def clear(self) -> None:
        """Give back the memory of the idle engine."""
        with self._lock:
            self._idle = None

    @contextmanager
    def engine(
        self, model: Decoder, rows: int, tokens: int, kv_cache_dtype: KVCacheDType, steering: bool = False
    ) -> Iterator[Engine]:
        """An engine with room for ``rows`` sequences and ``tokens`` tokens in all, or more.

        Args:
            steering: See ``Engine``.
        """
        key = (*_engine_key(model, kv_cache_dtype), steering)
        with self._lock:
            idle, self._idle = self._idle, None
            if self._idle_key != key:
                idle, self._idle_key = None, key
        if idle is None or idle.cache.max_seqs < rows or _room(idle) < tokens:
            if idle is not None:
                rows, tokens = max(rows, idle.cache.max_seqs), max(tokens, _room(idle))
            del idle
            engine = self._new_engine(model, _rounded(rows), _rounded(tokens), kv_cache_dtype, steering)
        else:
            engine = idle
        try:
            yield engine
        except GeneratorExit:
            self._leave(engine, key)
            raise
        self._leave(engine, key)

    def _new_engine(
        self, model: Decoder, rows: int, tokens: int, kv_cache_dtype: KVCacheDType, steering: bool
    ) -> Engine:
        page_size = PAGE_SIZE
        if self._keeps_prefixes:
            # A new, larger engine has no prefixes to reuse, so that this one gets room for the whole context.
            tokens = max(tokens, rows * (model.spec.context + PAGE_SIZE))
            # Up to a page of what was said before is computed again.
            page_size = SMALL_PAGE_SIZE if model.device.type == "cpu" else PAGE_SIZE
        engine = Engine(
            model,
            max_seqs=rows,
            cache_tokens=tokens,
            page_size=page_size,
            prefix_cache=self._keeps_prefixes,
            kv_cache_dtype=kv_cache_dtype,
            steering=steering,
        )
        # The model keeps the engine, and so the engine must not keep the model.
        engine.let_go()
        return engine

    def _leave(self, engine: Engine, key: tuple[Any, ...]) -> None:
        """Keep the engine of a call for the next one; a call that fails does not come here."""
        engine.clear()
        with self._lock:
            larger = self._idle is None or _room(self._idle) < _room(engine)
            if self._idle_key == key and larger:
                self._idle = engine


def _room(engine: Engine) -> int:
    """The tokens that an engine's cache has room for."""
    return engine.cache.num_pages * engine.cache.page_size


def _rounded(count: int) -> int:
    """The next power of two, so that calls of similar sizes share an engine."""
    return 1 << (count - 1).bit_length()


def _engine_key(model: Decoder, kv_cache_dtype: KVCacheDType) -> tuple[Any, ...]:
    """All that the tensors of an engine depend on: a model's shape, dtype, device and quantisation."""
    kv_scales = (
        None if kv_cache_dtype == "auto" or model.kv_scales is None else tuple(map(id, model.kv_scales))
    )
    weight, quantised = model.transformer.wte.weight, model.quantization
    return (
        (model.config, model.dtype, model.device, tuple(weight.shape)),
        (kv_cache_dtype, kv_scales, None if quantised is None else quantised.format),
    )
