"""KVCache: keys and values of what came before, in pages, with a page table per sequence.

A page holds ``page_size`` tokens of one sequence, all layers alike. Sequences that share a prefix
share its pages (reference counts); a shared page that is about to be written is copied first. With
one page per sequence the cache is the usual contiguous one, and a sequence's keys are a plain view.

Every decision is taken on host copies of the page table and the lengths, which are exact, so that
using the cache never waits for the device.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from gptkern.cache_step import CacheStep, pack_table
from gptkern.config import GPTConfig
from gptkern.ops.decode_attention.reference import FP8, Scales

# Every BLOCK_N of the decode attention's launch tables divides it.
_PAGE_UNIT = 64


class CacheFullError(RuntimeError):
    """The cache has no room for what was asked; it is as it was before the call."""


def _scales_of(
    dtype: torch.dtype,
    device: torch.device | str,
    shape: tuple[int, int],
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
) -> Scales:
    """The scales of an fp8 cache, checked, before any memory is spent."""
    given = {"k_scale": k_scale, "v_scale": v_scale}
    if dtype != FP8:
        for name, value in given.items():
            if value is not None:
                raise ValueError(f"KVCache: {name} is given, but dtype is {dtype}; scales are of {FP8}")
        return None
    where = torch.device(device)
    if where.type == "cuda" and torch.cuda.get_device_capability(where) < (8, 9):
        raise ValueError(f"KVCache: dtype is {dtype}; that needs compute capability 8.9 or newer")
    found = []
    for name, value in given.items():
        if value is None:
            value = torch.ones(shape, device="cpu")
        if tuple(value.shape) != shape or not bool((value.isfinite() & (value > 0)).all()):
            raise ValueError(
                f"KVCache: {name} has shape {tuple(value.shape)}; {shape}, of numbers above 0, is needed"
            )
        found.append(value.to(device=where, dtype=torch.float32))
    return found[0], found[1]


@dataclass
class _Row:
    """One live sequence: its pages in order, the tokens they hold. Spare pages may follow."""

    pages: list[int] = field(default_factory=list)
    length: int = 0


class KVCache:
    """A paged cache of keys and values.

    Args:
        n_layer, n_kv_head, head_dim: The model's shape.
        num_pages, page_size: Pages in the pool, and tokens a page holds.
        max_seqs: Most sequences alive at once.
        max_pages_per_seq: Longest sequence, in pages.
        dtype, device: Of keys and values; ``torch.float8_e4m3fn`` keeps them in a byte each.
        k_scale, v_scale: Of an fp8 cache, ``(n_layer, n_kv_head)`` fp32: what its numbers are multiplied by;
            1 when None. ``gptkern.quantize.kv_scales`` finds them.

    Attributes:
        k, v: ``(n_layer, num_pages, page_size, n_kv_head, head_dim)``.
        page_table: ``(max_seqs, max_pages_per_seq)`` int32 on the device. Row i is the i-th live
            sequence, in the order of ``sequences``; entries past its pages are of no meaning.
        seq_lens: ``(max_seqs,)`` int32 on the device: tokens held by the i-th live sequence, 0 past
            the last one.

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
        self._scales = _scales_of(dtype, device, (n_layer, n_kv_head), k_scale, v_scale)
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
            self.seq_lens = torch.zeros(max_seqs, dtype=torch.int32, device=device)
        self._rows: dict[int, _Row] = {}
        self._next_id = 0
        self._references = [0] * num_pages
        self._free = list(range(num_pages - 1, -1, -1))
        self._pending: CacheStep | None = None

    @classmethod
    def for_config(
        cls,
        config: GPTConfig,
        *,
        max_seqs: int,
        max_len: int,
        page_size: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        memory_bytes: int | None = None,
        k_scale: torch.Tensor | None = None,
        v_scale: torch.Tensor | None = None,
    ) -> KVCache:
        """A cache for a model.

        Args:
            config: The model's shape.
            max_seqs: Most sequences alive at once.
            max_len: Longest sequence, in tokens.
            page_size: Tokens a page; None gives each sequence one page, ``max_len`` rounded up to 64: kernels
                look a page up once a block of keys only where blocks do not straddle pages.
            memory_bytes: Bytes that keys and values may take: as many pages as fit into them. None
                gives every sequence room for ``max_len``.

        Raises:
            ValueError: A size out of range, or ``memory_bytes`` too small for one page.
        """
        if max_len < 1 or max_seqs < 1:
            raise ValueError(f"KVCache: max_seqs is {max_seqs}, max_len {max_len}; 1 or more is needed")
        page_size = -(-max_len // _PAGE_UNIT) * _PAGE_UNIT if page_size is None else page_size
        if page_size < 1:
            raise ValueError(f"KVCache: page_size is {page_size}; 1 or more is needed")
        pages_per_seq = -(-max_len // page_size)
        num_pages = max_seqs * pages_per_seq
        if memory_bytes is not None:
            page_bytes = 2 * config.n_layer * page_size * config.n_embd * dtype.itemsize
            num_pages = min(num_pages, memory_bytes // page_bytes)
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

    def scales(self, layer: int) -> Scales:
        """A layer's (k_scale, v_scale) of an fp8 cache, ``(n_kv_head,)`` each; None of any other."""
        return None if self._scales is None else (self._scales[0][layer], self._scales[1][layer])

    @property
    def all_scales(self) -> Scales:
        """The same of all layers, ``(n_layer, n_kv_head)`` each."""
        return self._scales

    @property
    def dtype(self) -> torch.dtype:
        """Of keys and values."""
        return self.k.dtype

    @property
    def device(self) -> torch.device:
        """Where keys and values are."""
        return self.k.device

    @property
    def num_pages(self) -> int:
        """Pages in the pool, free or not."""
        return len(self._references)

    @property
    def free_pages(self) -> int:
        """Pages that no sequence holds."""
        return len(self._free)

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
        """Ids of the live sequences, in the order of the page table's rows."""
        return list(self._rows)

    @property
    def lengths(self) -> list[int]:
        """Tokens held by each live sequence, in the same order."""
        return [row.length for row in self._rows.values()]

    def allocate(self, n: int = 1) -> list[int]:
        """Begin ``n`` empty sequences, after the live ones; their ids.

        Raises:
            CacheFullError: More than ``max_seqs`` would be alive.
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
        self._release(row.pages)
        del self._rows[sequence]
        self.refresh()

    def clear(self) -> None:
        """End every sequence."""
        for row in self._rows.values():
            self._release(row.pages)
        self._rows.clear()
        self.refresh()

    def fork(self, sequence: int) -> int:
        """Begin a sequence, after the live ones, that holds what ``sequence`` holds, in shared pages; its id.

        Raises:
            CacheFullError: ``max_seqs`` sequences are alive.
        """
        source = self._row(sequence)
        (new,) = self.allocate(1)
        self._rows[new] = self._share(source)
        self.refresh()
        return new

    def reorder(self, sources: Sequence[int]) -> None:
        """Give every live sequence another's contents: the i-th takes what ``sources[i]`` (an id) holds.

        Ids and their order stay. This is the step of beam search that keeps the best beams.

        Raises:
            ValueError: Not one source per live sequence, or a source that is not alive.
        """
        if len(sources) != len(self._rows):
            raise ValueError(
                f"KVCache.reorder: {len(sources)} sources for {len(self._rows)} sequences; one each is needed"
            )
        shared = [self._share(row) for row in [self._row(s) for s in sources]]
        for row in self._rows.values():
            self._release(row.pages)
        self._rows = dict(zip(self._rows, shared, strict=True))
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
        self._release(row.pages[used:])
        row.pages, row.length = row.pages[:used], length
        self.refresh()

    def reserve(self, new_lengths: Sequence[int], sequences: Sequence[int] | None = None) -> None:
        """See to it that so many more tokens of each sequence have a page that no other sequence shares.

        Lengths stay. Pages reserved but never filled stay with their sequence until it is truncated
        or freed.

        Args:
            new_lengths: New tokens of each of ``sequences``.
            sequences: Ids; all live ones, in order, when None.

        Raises:
            ValueError: Not one length per sequence, a negative one, an unknown or repeated id.
            CacheFullError: Too few free pages, or a sequence would pass ``max_len``.
        """
        rows = self._selected(new_lengths, sequences)
        takes, copies = self._plan(rows, new_lengths)
        if not takes:
            return
        needed = sum(take for _, take in takes)
        if needed > len(self._free):
            raise CacheFullError(
                f"KVCache: {needed} pages of {self.page_size} tokens are needed, "
                f"{len(self._free)} of {self.num_pages} are free"
            )
        for row, take in takes:
            if id(row) in copies:
                self._own_tail(row)
                take -= 1
            row.pages.extend(self._take() for _ in range(take))
        self._upload_table()

    def extend(self, new_lengths: Sequence[int], sequences: Sequence[int] | None = None) -> CacheStep:
        """Reserve room for new tokens and describe the forward pass that brings them.

        Lengths advance on the step's ``commit``; until then nothing that the cache holds has changed,
        so that a forward pass that fails leaves it as it was. Any other change to the cache, or
        another ``extend``, makes the step void.

        Args:
            new_lengths: New tokens of each of ``sequences``, 0 allowed.
            sequences: Ids; all live ones, in order, when None.

        Raises:
            ValueError, CacheFullError: As ``reserve``.
        """
        self.reserve(new_lengths, sequences)
        ids = list(self._rows) if sequences is None else list(sequences)
        self._pending = CacheStep(self, ids, list(new_lengths))
        return self._pending

    def advance(self, new_lengths: Sequence[int], sequences: Sequence[int] | None = None) -> None:
        """Count tokens that were written on the device, into room that ``reserve`` made.

        The host's lengths alone change: whoever writes the tokens on the device advances ``seq_lens``
        there (a captured decode step does).
        """
        rows = self._selected(new_lengths, sequences)
        totals = [row.length + new for row, new in zip(rows, new_lengths, strict=True)]
        if any(total > len(row.pages) * self.page_size for row, total in zip(rows, totals, strict=True)):
            raise ValueError("KVCache.advance: tokens were not reserved")
        for row, total in zip(rows, totals, strict=True):
            row.length = total
        self._pending = None

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

    def _plan(self, rows: list[_Row], new_lengths: Sequence[int]) -> tuple[list[tuple[_Row, int]], set[int]]:
        """(rows that need pages and how many, ids of those rows whose last page is to be copied)."""
        takes: list[tuple[_Row, int]] = []
        copies: set[int] = set()
        left: Counter[int] = Counter()
        size = self.page_size
        for row, new in zip(rows, new_lengths, strict=True):
            total = row.length + new
            take = -(-total // size) - len(row.pages)
            if take > 0 and total > self.max_len:
                raise CacheFullError(
                    f"KVCache: a sequence of {row.length} tokens and {new} more passes "
                    f"the cache's longest sequence of {self.max_len}"
                )
            take = max(take, 0)
            # Only the page that holds position ``length`` can be both shared and written.
            if new and row.length % size:
                tail = row.pages[row.length // size]
                # Each copy leaves one reader fewer: the last of them may write in place.
                if self._references[tail] - left[tail] > 1:
                    left[tail] += 1
                    copies.add(id(row))
                    take += 1
            if take:
                takes.append((row, take))
        return takes, copies

    def _own_tail(self, row: _Row) -> None:
        """Replace the shared page at the end of ``row`` with a copy of what the sequence holds of it."""
        index, held = divmod(row.length, self.page_size)
        old, new = row.pages[index], self._take()
        for cache in (self.k, self.v):
            cache[:, new, :held].copy_(cache[:, old, :held])
        self._release([old])
        row.pages[index] = new

    def _take(self) -> int:
        page = self._free.pop()
        self._references[page] = 1
        return page

    def _release(self, pages: Sequence[int]) -> None:
        for page in pages:
            self._references[page] -= 1
            if not self._references[page]:
                self._free.append(page)

    def _share(self, row: _Row) -> _Row:
        pages = row.pages[: -(-row.length // self.page_size)]
        for page in pages:
            self._references[page] += 1
        return _Row(pages, row.length)

    def refresh(self) -> None:
        """Bring the device's table and lengths to what the host knows; pending steps become void."""
        self._pending = None
        self._upload_table()
        self._upload_lengths()

    def _upload_table(self) -> None:
        if self._rows:
            table = pack_table([row.pages for row in self._rows.values()])
            self.page_table[: table.shape[0], : table.shape[1]].copy_(table, non_blocking=True)

    def _upload_lengths(self) -> None:
        lengths = self.lengths + [0] * (self.max_seqs - len(self._rows))
        self.seq_lens.copy_(torch.tensor(lengths, dtype=torch.int32, device="cpu"), non_blocking=True)
