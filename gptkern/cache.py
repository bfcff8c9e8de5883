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
from functools import cached_property

import torch

from gptkern import ops
from gptkern.config import GPTConfig
from gptkern.ops.decode_attention import reference
from gptkern.ops._dispatch import use_kernel


class CacheFullError(RuntimeError):
    """The cache has no room for what was asked; it is as it was before the call."""


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
        dtype, device: Of keys and values.

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
    ) -> None:
        sizes = dict(
            n_layer=n_layer,
            n_kv_head=n_kv_head,
            head_dim=head_dim,
            num_pages=num_pages,
            page_size=page_size,
            max_seqs=max_seqs,
            max_pages_per_seq=max_pages_per_seq,
        )
        for name, value in sizes.items():
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"KVCache: {name} is {value!r}; a positive integer is needed")
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
    ) -> KVCache:
        """A cache for a model.

        Args:
            config: The model's shape.
            max_seqs: Most sequences alive at once.
            max_len: Longest sequence, in tokens.
            page_size: Tokens a page; None gives each sequence one page of ``max_len``.
            memory_bytes: Bytes that keys and values may take: as many pages as fit into them. None
                gives every sequence room for ``max_len``.

        Raises:
            ValueError: A size out of range, or ``memory_bytes`` too small for one page.
        """
        if max_len < 1 or max_seqs < 1:
            raise ValueError(f"KVCache: max_seqs is {max_seqs}, max_len {max_len}; 1 or more is needed")
        page_size = max_len if page_size is None else page_size
        if page_size < 1:
            raise ValueError(f"KVCache: page_size is {page_size}; 1 or more is needed")
        pages_per_seq = -(-max_len // page_size)
        num_pages = max_seqs * pages_per_seq
        if memory_bytes is not None:
            page_bytes = 2 * config.n_layer * page_size * config.n_embd * dtype.itemsize
            num_pages = min(num_pages, memory_bytes // page_bytes)
            if num_pages < 1:
                raise ValueError(
                    f"KVCache: memory_bytes is {memory_bytes}; one page of {page_size} tokens takes {page_bytes}"
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
        )

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
        self._upload()

    def clear(self) -> None:
        """End every sequence."""
        for row in self._rows.values():
            self._release(row.pages)
        self._rows.clear()
        self._upload()

    def fork(self, sequence: int) -> int:
        """Begin a sequence, after the live ones, that holds what ``sequence`` holds, in shared pages; its id.

        Raises:
            CacheFullError: ``max_seqs`` sequences are alive.
        """
        source = self._row(sequence)
        (new,) = self.allocate(1)
        self._rows[new] = self._share(source)
        self._upload()
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
        self._upload()

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
        self._upload()

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
        for row, new in zip(self._selected(new_lengths, sequences), new_lengths, strict=True):
            if row.length + new > len(row.pages) * self.page_size:
                raise ValueError("KVCache.advance: tokens were not reserved")
            row.length += new
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

    def _upload(self) -> None:
        """Bring the device's table and lengths to what the host knows; pending steps become void."""
        self._pending = None
        self._upload_table()
        self._upload_lengths()

    def _upload_table(self) -> None:
        if self._rows:
            table = _table([row.pages for row in self._rows.values()])
            self.page_table[: table.shape[0], : table.shape[1]].copy_(table, non_blocking=True)

    def _upload_lengths(self) -> None:
        lengths = self.lengths + [0] * (self.max_seqs - len(self._rows))
        self.seq_lens.copy_(torch.tensor(lengths, dtype=torch.int32), non_blocking=True)


def _table(pages: list[list[int]]) -> torch.Tensor:
    width = max(map(len, pages))
    return torch.tensor([p + [0] * (width - len(p)) for p in pages], dtype=torch.int32)


@dataclass(frozen=True)
class _Run:
    """Consecutive rows of one length whose keys are a view: what one CPU attention call serves."""

    tokens: slice
    rows: int
    pages: slice | torch.Tensor
    length: int


class CacheStep:
    """One forward pass over new tokens of some of a cache's sequences.

    Attributes:
        sequences, new_lengths: Ids, and new tokens of each.
        lengths: Tokens of each before this pass.
        max_seqlen_q, max_seqlen_k: Most new tokens of one sequence; longest sequence afterwards.

    Tensors are packed, ``(tokens, heads, head_dim)``: the first sequence's new tokens, then the
    second's, and so on.
    """

    def __init__(self, cache: KVCache, sequences: list[int], new_lengths: list[int]) -> None:
        self.cache = cache
        self.sequences = sequences
        self.new_lengths = new_lengths
        rows = [cache._rows[s] for s in sequences]
        self._pages = [row.pages for row in rows]
        self.lengths = [row.length for row in rows]
        self._totals = [row.length + new for row, new in zip(rows, new_lengths, strict=True)]
        self.max_seqlen_q = max(new_lengths, default=0)
        self.max_seqlen_k = max(self._totals, default=0)
        self._decoding = all(new == 1 for new in new_lengths)
        self._fresh = not any(self.lengths)

    @cached_property
    def positions(self) -> torch.Tensor:
        """``(tokens,)`` int64: each new token's place in its sequence, from 0."""
        if self._decoding:
            return self._device(torch.tensor(self.lengths, dtype=torch.int64))
        return self._device(self._host_positions)

    @cached_property
    def slots(self) -> torch.Tensor:
        """``(tokens,)`` int64: where each new token goes, ``page * page_size + offset``."""
        size = self.cache.page_size
        if self._decoding:
            slots = [p[n // size] * size + n % size for p, n in zip(self._pages, self.lengths, strict=True)]
            return self._device(torch.tensor(slots, dtype=torch.int64))
        rows = torch.arange(len(self.lengths)).repeat_interleave(torch.tensor(self.new_lengths))
        return self._device(self._slots_at(rows, self._host_positions))

    @cached_property
    def cu_seqlens_q(self) -> torch.Tensor:
        """``(sequences + 1,)`` int32: where each sequence's new tokens begin."""
        return self._device(_cumulative(self.new_lengths))

    @cached_property
    def seq_lens_k(self) -> torch.Tensor:
        """``(sequences,)`` int32: tokens of each sequence, the new ones included."""
        return self._device(torch.tensor(self._totals, dtype=torch.int32))

    @cached_property
    def page_table(self) -> torch.Tensor:
        """``(sequences, pages)`` int32: the pages of these sequences."""
        if self.sequences == list(self.cache._rows):
            return self.cache.page_table[: len(self.sequences)]
        return self._device(_table(self._pages))

    @torch.no_grad()
    def attention(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale: float
    ) -> torch.Tensor:
        """Append the new tokens' keys and values to one layer, and let the queries attend to it.

        Args:
            layer: From 0.
            q: ``(tokens, heads, head_dim)``.
            k, v: ``(tokens, kv_heads, head_dim)``.
            scale: What scores are multiplied by.

        Returns:
            ``(tokens, heads, head_dim)``, in q's dtype.
        """
        k_cache, v_cache = self.cache.k[layer], self.cache.v[layer]
        kernels = use_kernel(k_cache)
        append = ops.append_kv if kernels else reference.append_kv
        append(k, v, k_cache, v_cache, self.slots)
        if self._fresh and not self._decoding:
            cu, longest = self.cu_seqlens_q, self.max_seqlen_q
            return ops.flash_attention_varlen(q, k, v, cu, cu, longest, longest, scale=scale)
        dtype, q = q.dtype, q.to(k_cache.dtype)
        if not kernels:
            out = self._attend_runs(q, k_cache, v_cache, scale)
        elif self._decoding:
            out = ops.decode_attention(
                q, k_cache, v_cache, self.page_table, self.seq_lens_k, scale=scale
            )
        else:
            slots = self._slots_k
            out = ops.flash_attention_varlen(
                q,
                k_cache.flatten(0, 1)[slots],
                v_cache.flatten(0, 1)[slots],
                self.cu_seqlens_q,
                self._cu_seqlens_k,
                self.max_seqlen_q,
                self.max_seqlen_k,
                scale=scale,
            )
        return out.to(dtype)

    def commit(self) -> None:
        """Count the new tokens as held. Called once, when every layer has them.

        Raises:
            RuntimeError: The cache was changed since ``extend``, or this step is committed already.
        """
        cache = self.cache
        if cache._pending is not self:
            raise RuntimeError("CacheStep.commit: the cache was changed since this step began")
        cache.advance(self.new_lengths, self.sequences)
        cache._upload_lengths()

    def _attend_runs(
        self, q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, scale: float
    ) -> torch.Tensor:
        parts = []
        for run in self._runs:
            queries = q[run.tokens].unflatten(0, (run.rows, -1))
            if isinstance(run.pages, slice):
                k, v = k_cache[run.pages, : run.length], v_cache[run.pages, : run.length]
            else:
                k, v = (c[run.pages].flatten(0, 1)[None, : run.length] for c in (k_cache, v_cache))
            parts.append(reference.attention_cpu(queries, k, v, scale=scale).flatten(0, 1))
        return parts[0] if len(parts) == 1 else torch.cat(parts or [q])

    @cached_property
    def _runs(self) -> list[_Run]:
        """The rows that have new tokens, those side by side in memory and of one length taken together."""
        runs: list[_Run] = []
        start = 0
        for pages, new, total in zip(self._pages, self.new_lengths, self._totals, strict=True):
            tokens = slice(start, start + new)
            start += new
            if not new:
                continue
            used = pages[: -(-total // self.cache.page_size)]
            if len(used) > 1:
                runs.append(_Run(tokens, 1, torch.tensor(used), total))
                continue
            first, rows = used[0], 1
            last = runs[-1] if runs else None
            if last is not None and isinstance(last.pages, slice) and last.pages.stop == first:
                held = last.tokens.stop - last.tokens.start
                if last.length == total and held == last.rows * new:
                    tokens, rows, first = slice(last.tokens.start, start), last.rows + 1, last.pages.start
                    runs.pop()
            runs.append(_Run(tokens, rows, slice(first, used[0] + 1), total))
        return runs

    @cached_property
    def _host_positions(self) -> torch.Tensor:
        spans = [torch.arange(n, t) for n, t in zip(self.lengths, self._totals, strict=True)]
        return torch.cat(spans) if spans else torch.empty(0, dtype=torch.int64)

    @cached_property
    def _slots_k(self) -> torch.Tensor:
        rows = torch.arange(len(self._totals)).repeat_interleave(torch.tensor(self._totals))
        return self._device(self._slots_at(rows, torch.cat([torch.arange(t) for t in self._totals])))

    @cached_property
    def _cu_seqlens_k(self) -> torch.Tensor:
        return self._device(_cumulative(self._totals))

    def _slots_at(self, rows: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        size = self.cache.page_size
        return _table(self._pages)[rows, positions // size].long() * size + positions % size

    def _device(self, host: torch.Tensor) -> torch.Tensor:
        return host.to(self.cache.device, non_blocking=True)


def _cumulative(lengths: list[int]) -> torch.Tensor:
    ends = [0]
    for length in lengths:
        ends.append(ends[-1] + length)
    return torch.tensor(ends, dtype=torch.int32)
