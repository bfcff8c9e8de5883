"""Sequences: which pages of a cache each sequence holds, and how many tokens; no tensor is in its hands.

Sequences that share a prefix share its pages; a shared page that is about to be written is copied first.
Every decision is taken on the host, and is exact, so that using the cache never waits for the device.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from gptkern.engine.pages import CacheFullError, PagePool


@dataclass
class _Row:
    """One sequence: its pages in order, the tokens they hold. Spare pages may follow."""

    pages: list[int] = field(default_factory=list)
    length: int = 0


@dataclass(frozen=True)
class _Demand:
    """The pages that a sequence's new tokens take from the pool, one of them for a copy of its last page."""

    row: _Row
    pages: int
    copies_tail: bool


class Sequences(ABC):
    """The sequences of one cache.

    Args:
        num_pages, page_size: Pages in the pool, and tokens a page holds.
        max_seqs: Most sequences at once.
        max_pages_per_seq: Longest sequence, in pages.

    Attributes:
        copied_pages: Shared pages that were copied before a sequence wrote into them, so far.
        changes: A number that grows with every change to sequences, their pages and lengths.
    """

    def __init__(self, *, num_pages: int, page_size: int, max_seqs: int, max_pages_per_seq: int) -> None:
        self.page_size = page_size
        self.max_seqs = max_seqs
        self.max_pages_per_seq = max_pages_per_seq
        self.copied_pages = self.changes = 0
        self._pool = PagePool(num_pages, max_seqs)
        self._rows: dict[int, _Row] = {}
        self._next_id = 0

    @property
    def num_pages(self) -> int:
        """Pages in the pool, free or not."""
        return self._pool.num_pages

    @property
    def free_pages(self) -> int:
        """Pages that no sequence holds."""
        return self._pool.available

    @property
    def max_len(self) -> int:
        """Longest sequence, in tokens."""
        return self.page_size * self.max_pages_per_seq

    @property
    def sequences(self) -> list[int]:
        """Ids of the sequences, in the order of the page table's rows."""
        return list(self._rows)

    @property
    def num_sequences(self) -> int:
        """The number of sequences."""
        return len(self._rows)

    @property
    def lengths(self) -> list[int]:
        """Tokens held by each sequence, in the same order."""
        return [row.length for row in self._rows.values()]

    def length(self, sequence: int) -> int:
        """Tokens that a sequence holds."""
        return self._row(sequence).length

    def pages(self, sequence: int) -> list[int]:
        """The pages of a sequence, in order, those reserved for later included."""
        return list(self._row(sequence).pages)

    def allocate(self, n: int = 1) -> list[int]:
        """Begin ``n`` empty sequences, after the others; their ids.

        Raises:
            CacheFullError: There would be more than ``max_seqs``.
        """
        if n < 0:
            raise ValueError(f"KVCache.allocate: n is {n}; 0 or more is needed")
        if len(self._rows) + n > self.max_seqs:
            raise CacheFullError(
                f"KVCache.allocate: {n} sequences asked for, {len(self._rows)} of {self.max_seqs} are in use"
            )
        ids = list(range(self._next_id, self._next_id + n))
        self._next_id += n
        self._rows.update((i, _Row()) for i in ids)
        self.changes += 1
        return ids

    def free(self, sequence: int) -> None:
        """End a sequence. The rows after it move up by one."""
        row = self._row(sequence)
        self._pool.release(row.pages)
        del self._rows[sequence]
        self.changes += 1

    def clear(self) -> None:
        """End every sequence."""
        for row in self._rows.values():
            self._pool.release(row.pages)
        self._rows.clear()
        self.changes += 1

    def fork(self, sequence: int) -> int:
        """Begin a sequence, after the others, that holds what ``sequence`` holds, in shared pages; its id.

        Raises:
            CacheFullError: There are ``max_seqs`` sequences already.
        """
        source = self._row(sequence)
        (new,) = self.allocate(1)
        self._rows[new] = self._share(source)
        self.changes += 1
        return new

    def reorder(self, sources: Sequence[int]) -> None:
        """Give every sequence another's contents: the i-th takes what ``sources[i]`` (an id) holds.

        Ids and their order stay. Beam search takes the best beams on by it.

        Raises:
            ValueError: Not one source a sequence, or a source that is none of the sequences.
        """
        if len(sources) != len(self._rows):
            raise ValueError(
                f"KVCache.reorder: {len(sources)} sources for {len(self._rows)} sequences; one each is needed"
            )
        self.assign(dict(zip(self._rows, sources, strict=True)))

    def assign(self, sources: Mapping[int, int]) -> None:
        """Give some sequences the contents of others, in shared pages: all at once, so that two may swap.

        Args:
            sources: Of each sequence that changes the one whose contents it takes.

        Raises:
            ValueError: An id that is none of the sequences.
        """
        old = {sequence: self._row(sequence) for sequence in sources}
        rows = [self._row(source) for source in sources.values()]
        new = {sequence: self._share(row) for sequence, row in zip(sources, rows, strict=True)}
        for row in old.values():
            self._pool.release(row.pages)
        self._rows.update(new)
        self.changes += 1

    def truncate(self, sequence: int, length: int) -> None:
        """Forget a sequence's tokens from ``length`` on, and give back the pages that they alone used.

        Raises:
            ValueError: ``length`` is negative or longer than the sequence.
        """
        row = self._row(sequence)
        if not 0 <= length <= row.length:
            raise ValueError(
                f"KVCache.truncate: length is {length}; sequence {sequence} holds {row.length} tokens"
            )
        used = -(-length // self.page_size)
        self._pool.release(row.pages[used:])
        row.pages, row.length = row.pages[:used], length
        self.changes += 1

    def begin(self, keys: Iterable[bytes], *, group: int = 1) -> tuple[int, int]:
        """Begin a sequence, after the others, with the pages that ``keys`` lead to.

        Args:
            keys: One a whole page of its tokens, in order; the first that leads to no page is the end.
            group: Pages are taken by so many at once; a group that is not whole is left.

        Returns:
            Its id, and how many tokens it holds.

        Raises:
            CacheFullError: There are ``max_seqs`` sequences already.
        """
        (new,) = self.allocate(1)
        pages = self._pool.find(keys)
        pages = pages[: len(pages) // group * group]
        self._pool.share(pages)
        row = self._rows[new] = _Row(pages, len(pages) * self.page_size)
        self.changes += 1
        return new, row.length

    def remember(self, sequence: int, keys: Sequence[bytes]) -> None:
        """Let ``keys`` lead to the first pages of a sequence, even after its end, until memory is wanted.

        Raises:
            ValueError: There are more keys than pages that the sequence has filled.
        """
        row = self._row(sequence)
        if len(keys) * self.page_size > row.length:
            raise ValueError(
                f"KVCache.remember: {len(keys)} keys; sequence {sequence} holds {row.length} tokens, "
                f"a key is of {self.page_size}"
            )
        for page, key in zip(row.pages, keys, strict=False):
            self._pool.remember(page, key)

    def forget_prefixes(self) -> None:
        """Let no key lead to any page any more: what pages hold is not what the model would compute now."""
        self._pool.forget_all()

    def reserve(self, new_lengths: Sequence[int], sequences: Sequence[int] | None = None) -> None:
        """See to it that so many more tokens of each sequence have a page that no other sequence shares.

        Lengths stay. Pages reserved but never filled stay with their sequence until it is truncated
        or freed.

        Args:
            new_lengths: New tokens of each of ``sequences``.
            sequences: Ids; all of them, in order, when None.

        Raises:
            ValueError: Not one length per sequence, a negative one, an unknown or repeated id.
            CacheFullError: Too few free pages, or a sequence would pass ``max_len``.
        """
        rows = self._selected(new_lengths, sequences)
        if all(map(self._has_room, rows, new_lengths)):
            return
        demands = self._demands(rows, new_lengths)
        needed = sum(demand.pages for demand in demands)
        if needed > self._pool.available:
            raise CacheFullError(
                f"KVCache: {needed} pages of {self.page_size} tokens are needed, "
                f"{self._pool.available} of {self.num_pages} are free"
            )
        for demand in demands:
            row = demand.row
            if demand.copies_tail:
                self._own_tail(row)
            added = demand.pages - demand.copies_tail
            if added:
                row.pages += self._pool.take(added, row.pages[-1] if row.pages else None)
        for row, new in zip(rows, new_lengths, strict=True):
            if new and row.length % self.page_size:
                # What a key leads to must not change.
                self._pool.forget(row.pages[row.length // self.page_size])
        if needed:
            self.changes += 1

    def advance(self, new_lengths: Sequence[int], sequences: Sequence[int] | None = None) -> None:
        """Count tokens that were written on the device, into room that ``reserve`` made.

        Raises:
            ValueError: Tokens that were not reserved; nothing has changed.
        """
        rows = self._selected(new_lengths, sequences)
        totals = [row.length + new for row, new in zip(rows, new_lengths, strict=True)]
        if any(total > len(row.pages) * self.page_size for row, total in zip(rows, totals, strict=True)):
            raise ValueError("KVCache.advance: tokens were not reserved")
        for row, total in zip(rows, totals, strict=True):
            row.length = total
        self.changes += 1

    def advance_by_one(self, sequences: Iterable[int]) -> None:
        """``advance`` by a token each, for a caller who knows of the room: nothing is checked."""
        for sequence in sequences:
            self._rows[sequence].length += 1
        self.changes += 1

    def _row(self, sequence: int) -> _Row:
        try:
            return self._rows[sequence]
        except KeyError:
            raise ValueError(
                f"KVCache: sequence {sequence!r} is not alive; alive are {list(self._rows)}"
            ) from None

    def _selected(self, new_lengths: Sequence[int], sequences: Sequence[int] | None) -> list[_Row]:
        rows = list(self._rows.values()) if sequences is None else [self._row(s) for s in sequences]
        if len(new_lengths) != len(rows):
            raise ValueError(
                f"KVCache: {len(new_lengths)} lengths for {len(rows)} sequences; one each is needed"
            )
        if sequences is not None and len(set(sequences)) != len(rows):
            raise ValueError(f"KVCache: sequences repeat an id: {list(sequences)}")
        if min(new_lengths, default=0) < 0:
            raise ValueError(f"KVCache: lengths are {list(new_lengths)}; 0 or more is needed")
        return rows

    def _has_room(self, row: _Row, new: int) -> bool:
        """True if a sequence has pages for ``new`` more tokens and may write to them without a copy."""
        size = self.page_size
        if row.length + new > len(row.pages) * size:
            return False
        # Spare pages are nobody else's.
        return row.length % size == 0 or self._pool.is_own(row.pages[row.length // size])

    def _demands(self, rows: list[_Row], new_lengths: Sequence[int]) -> list[_Demand]:
        """The pages that ``reserve`` takes from the pool, for each row."""
        demands: list[_Demand] = []
        readers_gone: Counter[int] = Counter()
        size = self.page_size
        for row, new in zip(rows, new_lengths, strict=True):
            total = row.length + new
            take = max(-(-total // size) - len(row.pages), 0)
            if take and total > self.max_len:
                raise CacheFullError(
                    f"KVCache: a sequence of {row.length} tokens and {new} more passes "
                    f"the cache's longest sequence of {self.max_len}"
                )
            copies_tail = False
            # Only the page that holds position ``length`` can be both shared and written.
            if new and row.length % size:
                tail = row.pages[row.length // size]
                # Each copy leaves one reader fewer: the last of them may write in place.
                copies_tail = self._pool.holders(tail) - readers_gone[tail] > 1
                readers_gone[tail] += copies_tail
            demands.append(_Demand(row, take + copies_tail, copies_tail))
        return demands

    def _own_tail(self, row: _Row) -> None:
        """Replace the shared page at the end of ``row`` with a copy of what the sequence holds of it."""
        index, filled = divmod(row.length, self.page_size)
        old = row.pages[index]
        (new,) = self._pool.take(1, row.pages[index - 1] if index else None)
        self._copy_page(old, new, filled)
        self._pool.release([old])
        row.pages[index] = new
        self.copied_pages += 1

    @abstractmethod
    def _copy_page(self, source: int, target: int, tokens: int) -> None:
        """Copy what the first ``tokens`` places of a page hold to another page."""

    def _share(self, row: _Row) -> _Row:
        pages = row.pages[: -(-row.length // self.page_size)]
        self._pool.share(pages)
        return _Row(pages, row.length)
