"""The base of all executors: tokens of some sequences in, logits out, and the cache grown by them."""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import ClassVar, Literal

import torch

from gptkern.engine.cache import KVCache
from gptkern.engine.rows import Rows, RowTable
from gptkern.model.decoder import Decoder

WHOLE = frozenset(
    getattr(torch, name)
    for name in ("int64", "int32", "int16", "int8", "uint8", "uint16", "uint32", "uint64")
)


class Executor(ABC):
    """Runs a model over new tokens of a cache's sequences.

    Every executor computes what the model's own layers compute. One that reads weights where they lie serves
    a model as long as that is as it was built.

    Attributes:
        name: As reasons and ``explain`` call it.
        made_for: The kind of device that it was made for. Where such a model is passed over, that is a
            fallback, which strict mode refuses.
        on_request: It is taken only where it is asked for by name.
        row_invariant: A token's logits are bitwise the same however many tokens of its sequence share the
            pass. They never depend on other sequences.
        max_rows: Most tokens of one launch; a pass of more is several launches. None: any number.
        draft_rows: Most tokens of a pass that has drafts: more cost more time than they save.
        prompt_tokens: Most tokens of a prompt that it computes sooner than the model's layers do. None: any
            number, so that it runs whole prompts.
    """

    name: ClassVar[str]
    made_for: ClassVar[Literal["cpu", "cuda", "any"]]
    on_request: ClassVar[bool] = False
    row_invariant: ClassVar[bool]
    max_rows: int | None = None
    draft_rows: int = 0
    prompt_tokens: int | None = 0

    def __init__(self, model: Decoder, cache: KVCache) -> None:
        # Weak: a model keeps its engine, and is to go when nobody else holds it.
        self._model_ref, self._cache = weakref.ref(model), cache

    @property
    def _model(self) -> Decoder:
        model = self._model_ref()
        if model is None:
            raise RuntimeError(f"{type(self).__name__}: the model is gone: keep it while its executor runs")
        return model

    @staticmethod
    @abstractmethod
    def serves(model: Decoder, dtype: torch.dtype) -> str | None:
        """The reason why this executor cannot run ``model`` over a cache of ``dtype``; None if it can."""

    @abstractmethod
    def forward(self, rows: Rows) -> torch.Tensor:
        """The logits that ``rows`` wants, ``(sum of wanted, vocab_size)`` in the model's dtype.

        Room for the tokens was reserved by the caller; their keys and values are written, and the cache's
        lengths grow by them. Where the pass fails, the cache holds what it held.

        Raises:
            TypeError: Tokens that are no whole numbers.
            ValueError: Tokens that do not fit ``rows``, outside the vocabulary, past the context, or without
                room that was reserved.
        """

    def weights_written(self) -> None:  # noqa: B027  (most have no copies)
        """Make anew what was made of the weights: they were written in a way that PyTorch does not count."""

    def repeated(self, tokens: torch.Tensor) -> tuple[torch.Tensor, Callable[[], torch.Tensor | None]] | None:
        """The last pass again, of one token of each of its rows; None where there is no such short way.

        Args:
            tokens: ``(rows,)`` int64: read in each call.

        Returns:
            The logits, and the call that computes them into this very tensor and returns it: None, with
            nothing done, if the weights have moved. It writes keys and values to the pages that the rows
            have; the cache's lengths are the caller's to advance.
        """
        return None

    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        """Append one token to every sequence of the cache: logits ``(sequences, vocab_size)``.

        Args:
            tokens: ``(sequences,)``, in the order of ``cache.sequences``.

        Raises:
            ValueError: Not one token a sequence; see ``forward``.
            CacheFullError: No room in the cache.
        """
        sequences = self._cache.sequences
        if not sequences or tokens.shape != (len(sequences),):
            raise ValueError(
                f"{type(self).__name__}: tokens has shape {tuple(tokens.shape)}; "
                f"({len(sequences)},), one a sequence of the cache, is needed"
            )
        self._cache.reserve([1] * len(sequences))
        return self.forward(Rows.one_each(sequences, tokens))


class TableExecutor(Executor):
    """An executor whose every token is a row of a table: rows of one sequence differ in length alone.

    Keys and values of all rows are in the cache before attention reads, so that each row sees those before
    it and no other. A row is computed whatever its neighbours are.
    """

    row_invariant = True
    max_rows: int

    def __init__(self, model: Decoder, cache: KVCache, max_rows: int) -> None:
        super().__init__(model, cache)
        self.max_rows = self.draft_rows = max_rows
        self._table = RowTable(cache, max_rows)

    @torch.no_grad()
    def forward(self, rows: Rows) -> torch.Tensor:
        """See ``Executor``."""
        self._check(rows)
        places = self._places(rows)
        wanted = rows.positions_wanted()
        logits: list[torch.Tensor] = []
        try:
            for start in range(0, len(places), self.max_rows):
                end = min(start + self.max_rows, len(places))
                own = [place - start for place in wanted if start <= place < end]
                logits.append(self._logits_of(own, rows.tokens[start:end], places[start:end]))
        except BaseException:
            self._table.forget()
            raise
        self._cache.advance(rows.counts, rows.sequences)
        return logits[0] if len(logits) == 1 else torch.cat(logits)

    def _logits_of(
        self, wanted: list[int], tokens: torch.Tensor, places: Sequence[tuple[list[int], int]]
    ) -> torch.Tensor:
        """Logits of the wanted rows of a launch: here all are computed, and the others dropped."""
        out = self._launch(tokens, places)
        return out if len(wanted) == len(places) else out[wanted]

    @abstractmethod
    def _launch(self, tokens: torch.Tensor, places: Sequence[tuple[list[int], int]]) -> torch.Tensor:
        """Logits after each of up to ``max_rows`` tokens, whose rows are ``places``; the caller's own."""

    def _places(self, rows: Rows) -> list[tuple[list[int], int]]:
        """For each token the pages of its sequence and the number of tokens before it."""
        places: list[tuple[list[int], int]] = []
        for sequence, count in zip(rows.sequences, rows.counts, strict=True):
            pages, length = self._cache.pages(sequence), self._cache.length(sequence)
            if length + count > len(pages) * self._cache.page_size:
                raise ValueError(f"{type(self).__name__}: no room was reserved for {count} tokens")
            places += [(pages, length + ahead) for ahead in range(count)]
        return places

    def _check(self, rows: Rows) -> None:
        total = sum(rows.counts)
        if rows.tokens.dtype not in WHOLE:
            raise TypeError(f"GPT: tokens are {rows.tokens.dtype}; whole numbers are accepted")
        if rows.tokens.shape != (total,):
            raise ValueError(
                f"{type(self).__name__}: tokens has shape {tuple(rows.tokens.shape)}; ({total},) is needed"
            )
        context = self._model.spec.context
        for sequence, count in zip(rows.sequences, rows.counts, strict=True):
            length = self._cache.length(sequence) + count
            if length > context:
                raise ValueError(
                    f"{type(self).__name__}: {length} tokens are longer than the model's context of {context}"
                )


@contextmanager
def undone_on_failure(cache: KVCache, sequences: Sequence[int]) -> Iterator[None]:
    """Sequences hold what they held before the body, where that fails."""
    before = [cache.length(sequence) for sequence in sequences]
    try:
        yield
    except BaseException:
        for sequence, length in zip(sequences, before, strict=True):
            cache.truncate(sequence, length)
        raise


def check_cache(name: str, model: Decoder, cache: KVCache) -> None:
    """Refuse a cache that was made for another model.

    Raises:
        ValueError: It has another shape or another device.
    """
    spec = model.spec
    layers, _, _, heads, head_dim = cache.k.shape
    if (layers, heads, head_dim) != (len(spec.layers), spec.kv_heads, spec.head_dim):
        raise ValueError(
            f"{name}: the cache has {layers} layers of {heads} x {head_dim}, "
            f"the model {len(spec.layers)} of {spec.kv_heads} x {spec.head_dim}"
        )
    if cache.device != model.device:
        raise ValueError(f"{name}: the cache is on {cache.device}, the model on {model.device}")
