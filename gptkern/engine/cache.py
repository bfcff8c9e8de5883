"""KVCache: keys and values of what came before, in pages, with a page table per sequence.

A page holds ``page_size`` tokens of one sequence, all layers alike. Sequences that share a prefix
share its pages; a shared page that is about to be written is copied first. Pages that lie next to each
other are one run of memory, and a sequence of such pages is read in place.

Every decision is taken on host copies of the page table and the lengths, which are exact, so that
using the cache never waits for the device.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from gptkern.config import GPTConfig
from gptkern.engine.forward_pass import ForwardPass, PassRow, Storage, pack_table
from gptkern.engine.pages import CacheFullError, PagePool
from gptkern.kv_scales import are_kv_scales
from gptkern.ops import _checks
from gptkern.ops._types import FP8, KvScales

# Every BLOCK_N of the decode attention's launch tables divides it: kernels look a page up once a block.
PAGE_SIZE = 64


def _checked_kv_scales(
    dtype: torch.dtype,
    device: torch.device | str,
    shape: tuple[int, int],
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
) -> KvScales | None:
    """The kv scales of an fp8 cache, checked, before any memory is spent; None of any other cache."""
    scales = {"k_scale": k_scale, "v_scale": v_scale}
    if dtype != FP8:
        for name, scale in scales.items():
            if scale is not None:
                raise ValueError(f"KVCache: {name} is given, but dtype is {dtype}; scales are of {FP8}")
        return None
    where = torch.device(device)
    _checks.fp8_device("KVCache", "dtype", where)
    for name, scale in scales.items():
        if scale is not None and not are_kv_scales(scale, shape):
            raise ValueError(
                f"KVCache: {name} has shape {tuple(scale.shape)}; {shape}, of numbers above 0, is needed"
            )
    k, v = (
        torch.ones(shape, device=where) if scale is None else scale.to(device=where, dtype=torch.float32)
        for scale in (k_scale, v_scale)
    )
    return k, v


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


class KVCache:
    """A paged cache of keys and values.

    Args:
        n_layer, n_kv_head, head_dim: The model's shape.
        num_pages, page_size: Pages in the pool, and tokens a page holds.
        max_seqs: Most sequences at once.
        max_pages_per_seq: Longest sequence, in pages.
        dtype, device: Of keys and values; ``torch.float8_e4m3fn`` keeps them in a byte each.
        k_scale, v_scale: Of an fp8 cache, ``(n_layer, n_kv_head)`` fp32: what its numbers are multiplied by;
            1 when None. ``gptkern.quantize.kv_scales`` finds them.

    Attributes:
        k, v: ``(n_layer, num_pages, page_size, n_kv_head, head_dim)``.
        page_table: ``(max_seqs, max_pages_per_seq)`` int32 on the device. Row i is the i-th sequence, in the
            order of ``sequences``; entries past its pages are of no meaning.
        storage: Keys, values, kv scales and page table, as forward passes and kernels take them.
        copied_pages: Shared pages that were copied before a sequence wrote into them, so far.

    No gradient flows through a cache.

    Raises:
        ValueError: A size that is not a positive integer.
    """

    def __init__(
        self,
        *,
        n_layer: int,
        n_kv_head: int,
        head_dim: int,
        num_pages: int,
        page_size: int,
        max_seqs: int,
        max_pages_per_seq: int,
        dtype: torch.dtype,
        device: torch.device | str,
        k_scale: torch.Tensor | None = None,
        v_scale: torch.Tensor | None = None,
    ) -> None:
        sizes = {
            "n_layer": n_layer,
            "n_kv_head": n_kv_head,
            "head_dim": head_dim,
            "num_pages": num_pages,
            "page_size": page_size,
            "max_seqs": max_seqs,
            "max_pages_per_seq": max_pages_per_seq,
        }
        for name, value in sizes.items():
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"KVCache: {name} is {value!r}; a positive integer is needed")
        kv_scales = _checked_kv_scales(dtype, device, (n_layer, n_kv_head), k_scale, v_scale)
        self.page_size = page_size
        self.max_seqs = max_seqs
        self.max_pages_per_seq = max_pages_per_seq
        # Tensors made in inference mode could not be written outside it.
        with torch.inference_mode(False):
            shape = (n_layer, num_pages, page_size, n_kv_head, head_dim)
            # Zeros, for what a masked lane reads must be finite.
            self.k = torch.zeros(shape, dtype=dtype, device=device)
            self.v = torch.zeros(shape, dtype=dtype, device=device)
            self.page_table = torch.zeros(max_seqs, max_pages_per_seq, dtype=torch.int32, device=device)
        self.storage = Storage(self.k, self.v, kv_scales, self.page_table)
        self.copied_pages = 0
        self._pool = PagePool(num_pages, max_seqs)
        self._rows: dict[int, _Row] = {}
        self._next_id = 0
        self._pending: ForwardPass | None = None

    @classmethod
    def for_config(
        cls,
        config: GPTConfig,
        *,
        max_seqs: int,
        max_len: int,
        page_size: int = PAGE_SIZE,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        cache_tokens: int | None = None,
        memory_bytes: int | None = None,
        k_scale: torch.Tensor | None = None,
        v_scale: torch.Tensor | None = None,
    ) -> KVCache:
        """A cache for a model.

        A sequence's bits follow ``max_len`` on a GPU, where attention is split by the page table's width:
        give the model's context, and bound memory by ``cache_tokens`` or ``memory_bytes``.

        Args:
            config: The model's shape.
            max_seqs: Most sequences at once.
            max_len: Longest sequence, in tokens.
            page_size: Tokens a page.
            cache_tokens: Tokens that all sequences together have room for, rounded up to whole pages.
            memory_bytes: Bytes that keys and values may take: as many pages as fit into them.
                With neither, every sequence has room for ``max_len``.

        Raises:
            ValueError: A size out of range, ``memory_bytes`` too small for one page, or both bounds.
        """
        if max_len < 1 or max_seqs < 1:
            raise ValueError(f"KVCache: max_seqs is {max_seqs}, max_len {max_len}; 1 or more is needed")
        if page_size < 1:
            raise ValueError(f"KVCache: page_size is {page_size}; 1 or more is needed")
        pages_per_seq = -(-max_len // page_size)
        num_pages = max_seqs * pages_per_seq
        if cache_tokens is not None and memory_bytes is not None:
            raise ValueError("KVCache: cache_tokens and memory_bytes are given; one of them is accepted")
        if cache_tokens is not None:
            if cache_tokens < 1:
                raise ValueError(f"KVCache: cache_tokens is {cache_tokens}; 1 or more is needed")
            num_pages = -(-cache_tokens // page_size)
        if memory_bytes is not None:
            page_bytes = 2 * config.n_layer * page_size * config.n_embd * dtype.itemsize
            num_pages = memory_bytes // page_bytes
            if num_pages < 1:
                raise ValueError(
                    f"KVCache: memory_bytes is {memory_bytes}; "
                    f"one page of {page_size} tokens takes {page_bytes}"
                )
        return cls(
            n_layer=config.n_layer,
            n_kv_head=config.n_head,
            head_dim=config.head_dim,
            num_pages=num_pages,
            page_size=page_size,
            max_seqs=max_seqs,
            max_pages_per_seq=pages_per_seq,
            dtype=dtype,
            device=device,
            k_scale=k_scale,
            v_scale=v_scale,
        )

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of keys and values."""
        return self.k.dtype

    @property
    def device(self) -> torch.device:
        """The device of keys and values."""
        return self.k.device

    @property
    def num_pages(self) -> int:
        """Pages in the pool, free or not."""
        return self._pool.num_pages

    @property
    def free_pages(self) -> int:
        """Pages that no sequence holds."""
        return self._pool.available

    @property
    def bytes_per_token(self) -> int:
        """Bytes that one token's keys and values take, all layers together."""
        layers, _, _, heads, dim = self.k.shape
        return 2 * layers * heads * dim * self.k.element_size()

    @property
    def max_len(self) -> int:
        """Longest sequence, in tokens."""
        return self.page_size * self.max_pages_per_seq

    @property
    def sequences(self) -> list[int]:
        """Ids of the sequences, in the order of the page table's rows."""
        return list(self._rows)

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
        self._pending = None
        return ids

    def free(self, sequence: int) -> None:
        """End a sequence. The rows after it move up by one."""
        row = self._row(sequence)
        self._pool.release(row.pages)
        del self._rows[sequence]
        self.refresh()

    def clear(self) -> None:
        """End every sequence."""
        for row in self._rows.values():
            self._pool.release(row.pages)
        self._rows.clear()
        self.refresh()

    def fork(self, sequence: int) -> int:
        """Begin a sequence, after the others, that holds what ``sequence`` holds, in shared pages; its id.

        Raises:
            CacheFullError: There are ``max_seqs`` sequences already.
        """
        source = self._row(sequence)
        (new,) = self.allocate(1)
        self._rows[new] = self._share(source)
        self.refresh()
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
        self.refresh()

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
        self.refresh()

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
        self.refresh()
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
            self._upload_table()

    def extend(self, new_lengths: Sequence[int], sequences: Sequence[int] | None = None) -> ForwardPass:
        """Reserve room for new tokens and describe the forward pass that brings them.

        Lengths advance on the pass's ``commit``; until then nothing that the cache holds has changed,
        so that a forward pass that fails leaves it as it was. Any other change to the cache, or
        another ``extend``, makes the pass void.

        Args:
            new_lengths: New tokens of each of ``sequences``, 0 allowed.
            sequences: Ids; all of them, in order, when None.

        Raises:
            ValueError, CacheFullError: As ``reserve``.
        """
        self.reserve(new_lengths, sequences)
        places = {sequence: place for place, sequence in enumerate(self._rows)}
        ids = list(self._rows) if sequences is None else list(sequences)
        rows = [
            PassRow(places[i], list(self._rows[i].pages), self._rows[i].length, new)
            for i, new in zip(ids, new_lengths, strict=True)
        ]

        def commit(forward: ForwardPass) -> None:
            if self._pending is not forward:
                raise RuntimeError("ForwardPass.commit: the cache was changed since this pass began")
            self.advance(new_lengths, ids)

        self._pending = ForwardPass(self.storage, rows, commit)
        return self._pending

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
        self._pending = None

    def refresh(self) -> None:
        """Bring the device's table to what the host knows; pending passes become void."""
        self._pending = None
        self._upload_table()

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
        for cache in (self.k, self.v):
            cache[:, new, :filled].copy_(cache[:, old, :filled])
        self._pool.release([old])
        row.pages[index] = new
        self.copied_pages += 1

    def _share(self, row: _Row) -> _Row:
        pages = row.pages[: -(-row.length // self.page_size)]
        self._pool.share(pages)
        return _Row(pages, row.length)

    def _upload_table(self) -> None:
        if self._rows:
            table = pack_table([row.pages for row in self._rows.values()])
            self.page_table[: table.shape[0], : table.shape[1]].copy_(table, non_blocking=True)
