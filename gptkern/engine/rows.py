"""The input of an executor for one pass: new tokens of some sequences, one row for each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from gptkern.engine.cache import KVCache
from gptkern.engine.forward_pass import Storage, pack_table
from gptkern.engine.steering import Steering


@dataclass(frozen=True)
class Rows:
    """The new tokens of one pass: of a sequence many (prefill), one (decoding), or one and its drafts.

    Attributes:
        sequences: Ids of the cache's sequences.
        counts: New tokens of each, 1 or more.
        tokens: ``(sum of counts,)`` whole numbers on the cache's device: the first sequence's, then the
            second's, and so on.
        wanted: After how many of its last tokens logits are wanted, of each sequence, 0 allowed.
        steering: Of each sequence, what is added between the layers, or None; empty where nothing is.
    """

    sequences: Sequence[int]
    counts: Sequence[int]
    tokens: torch.Tensor
    wanted: Sequence[int]
    steering: Sequence[Steering | None] = ()

    def steered(self, place: int) -> Steering | None:
        """The vectors of the sequence at ``place``; None: it has none."""
        return self.steering[place] if self.steering else None

    @classmethod
    def one_each(cls, sequences: Sequence[int], tokens: torch.Tensor) -> Rows:
        """One new token of every sequence, and the logits after each."""
        ones = [1] * len(sequences)
        return cls(sequences, ones, tokens, ones)

    def positions_wanted(self) -> list[int]:
        """The places, among all tokens, of those after which logits are wanted."""
        places: list[int] = []
        end = 0
        for count, wanted in zip(self.counts, self.wanted, strict=True):
            end += count
            places += range(end - wanted, end)
        return places


class RowTable:
    """Pages and lengths on the device with a row for each new token, uploaded only where they have changed.

    Rows of one sequence share its pages and differ in length, so that each attends to those before it.

    Args:
        cache: Where keys and values lie.
        max_rows: Most tokens of one launch.

    Attributes:
        storage: The cache's keys and values, with this table in the place of its own.
        lengths: ``(max_rows,)`` int32: what each row's sequence holds before its token.
    """

    def __init__(self, cache: KVCache, max_rows: int) -> None:
        self._cache = cache
        # As wide as the cache's: decode attention's splits follow the table's width.
        with torch.inference_mode(False):
            shape = (max_rows, cache.max_pages_per_seq)
            table = torch.zeros(shape, dtype=torch.int32, device=cache.device)
            self.lengths = torch.zeros(max_rows, dtype=torch.int32, device=cache.device)
        self.storage = Storage(cache.k, cache.v, cache.storage.kv_scales, table)
        self.forget()

    def forget(self) -> None:
        """Take what is on the device for unknown."""
        self._pages: list[list[int]] = []
        self.forget_lengths()

    def forget_lengths(self) -> None:
        """Take the lengths on the device for unknown."""
        self._lengths: list[int] = []

    def lay(self, rows: Sequence[tuple[list[int], int]]) -> None:
        """Put (pages, length) of every row on the device."""
        pages, lengths = [row[0] for row in rows], [row[1] for row in rows]
        if pages != self._pages[: len(pages)]:
            table = pack_table(pages)
            self.storage.page_table[: len(pages), : table.shape[1]].copy_(table, non_blocking=True)
            self._pages = pages
        if lengths != self._lengths[: len(lengths)]:
            host = torch.tensor(lengths, dtype=torch.int32, device="cpu")
            self.lengths[: len(lengths)].copy_(host, non_blocking=True)
            self._lengths = lengths

    def advanced(self, rows: int) -> None:
        """Note that a pass added 1 to the first ``rows`` lengths on the device."""
        self._lengths = [length + 1 for length in self._lengths[:rows]]
