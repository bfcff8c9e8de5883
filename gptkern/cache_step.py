"""CacheStep: one forward pass through a KVCache."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

import torch

from gptkern import ops
from gptkern.ops._dispatch import use_kernel
from gptkern.ops.decode_attention import reference
from gptkern.ops.flash_attention.reference import attention_cpu

if TYPE_CHECKING:
    from gptkern.cache import KVCache


def pack_table(pages: list[list[int]]) -> torch.Tensor:
    """Lists of pages as one int32 table, rows filled up with 0."""
    width = max(map(len, pages))
    return torch.tensor([p + [0] * (width - len(p)) for p in pages], dtype=torch.int32, device="cpu")


def _varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float,
) -> torch.Tensor:
    out = ops.flash_attention_varlen(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale=scale
    )
    assert isinstance(out, torch.Tensor)  # a pair only where the log-sum-exp is asked for
    return out


class CacheStep:
    """One forward pass over new tokens of some of a cache's sequences.

    Attributes:
        sequences, new_lengths: Ids, and new tokens of each.
        lengths: Tokens of each before this pass.
        max_seqlen_q, max_seqlen_k: Most new tokens of one sequence; longest sequence afterwards.

    Tensors are packed, ``(tokens, heads, head_dim)``: the first sequence's new tokens, then the
    second's, and so on.
    """

    # No gradient comes back through a cache, so a pass through one is never training.
    dropout = False

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
            return self._device(torch.tensor(self.lengths, dtype=torch.int64, device="cpu"))
        return self._device(self._host_positions)

    @cached_property
    def slots(self) -> torch.Tensor:
        """``(tokens,)`` int64: where each new token goes, ``page * page_size + offset``."""
        size = self.cache.page_size
        if self._decoding:
            slots = [p[n // size] * size + n % size for p, n in zip(self._pages, self.lengths, strict=True)]
            return self._device(torch.tensor(slots, dtype=torch.int64, device="cpu"))
        rows = _owners(self.new_lengths)
        return self._device(self._slots_at(rows, self._host_positions))

    @cached_property
    def cu_seqlens_q(self) -> torch.Tensor:
        """``(sequences + 1,)`` int32: where each sequence's new tokens begin."""
        return self._device(_cumulative(self.new_lengths))

    @cached_property
    def seq_lens_k(self) -> torch.Tensor:
        """``(sequences,)`` int32: tokens of each sequence, the new ones included."""
        return self._device(torch.tensor(self._totals, dtype=torch.int32, device="cpu"))

    @cached_property
    def page_table(self) -> torch.Tensor:
        """``(sequences, max_pages_per_seq)`` int32: the pages of these sequences."""
        alive = list(self.cache._rows)
        if self.sequences == alive:
            return self.cache.page_table[: len(alive)]
        rows = torch.tensor([alive.index(s) for s in self.sequences], device="cpu")
        # As wide as the cache's: decode attention's splits follow the table's width.
        return self.cache.page_table[self._device(rows)]

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
        scales = self.cache.scales(layer)
        append(k, v, k_cache, v_cache, self.slots, scales=scales)
        if self._fresh and not self._decoding:
            cu, longest = self.cu_seqlens_q, self.max_seqlen_q
            return _varlen(q, k, v, cu, cu, longest, longest, scale)
        dtype = q.dtype
        if scales is None:
            q = q.to(k_cache.dtype)
        if not kernels:
            out = self._attend_rows(q, k_cache, v_cache, scale, scales)
        elif self._decoding:
            out = ops.decode_attention(
                q, k_cache, v_cache, self.page_table, self.seq_lens_k, scale=scale, scales=scales
            )
        else:
            k_all, v_all = (
                reference.rows(cache.flatten(0, 1), self._slots_k) for cache in (k_cache, v_cache)
            )
            k_all, v_all = reference.widened(k_all, v_all, scales, dtype)
            out = _varlen(
                q,
                k_all,
                v_all,
                self.cu_seqlens_q,
                self._cu_seqlens_k,
                self.max_seqlen_q,
                self.max_seqlen_k,
                scale,
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

    def _attend_rows(
        self,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        scale: float,
        scales: reference.Scales,
    ) -> torch.Tensor:
        out = torch.empty_like(q)
        for tokens, pages, length in self._rows:
            k, v = (reference.sequence(cache, pages, length) for cache in (k_cache, v_cache))
            k, v = reference.widened(k, v, scales, q.dtype)
            if self._decoding:
                out[tokens] = reference.attend(q[tokens][0].contiguous(), k, v, scale)
            else:
                out[tokens] = attention_cpu(q[None, tokens], k[None], v[None], scale=scale)[0]
        return out

    @cached_property
    def _rows(self) -> list[tuple[slice, torch.Tensor | int, int]]:
        """Of each sequence with new tokens: these, its pages (a number: one page, a view), its length."""
        rows: list[tuple[slice, torch.Tensor | int, int]] = []
        start = 0
        for pages, new, total in zip(self._pages, self.new_lengths, self._totals, strict=True):
            used = pages[: -(-total // self.cache.page_size)]
            if new:
                held = used[0] if len(used) == 1 else torch.tensor(used, device="cpu")
                rows.append((slice(start, start + new), held, total))
            start += new
        return rows

    @cached_property
    def _host_positions(self) -> torch.Tensor:
        spans = [torch.arange(n, t, device="cpu") for n, t in zip(self.lengths, self._totals, strict=True)]
        return torch.cat(spans) if spans else torch.empty(0, dtype=torch.int64, device="cpu")

    @cached_property
    def _slots_k(self) -> torch.Tensor:
        rows = _owners(self._totals)
        return self._device(
            self._slots_at(rows, torch.cat([torch.arange(t, device="cpu") for t in self._totals]))
        )

    @cached_property
    def _cu_seqlens_k(self) -> torch.Tensor:
        return self._device(_cumulative(self._totals))

    def _slots_at(self, rows: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        size = self.cache.page_size
        return pack_table(self._pages)[rows, positions // size].long() * size + positions % size

    def _device(self, host: torch.Tensor) -> torch.Tensor:
        return host.to(self.cache.device, non_blocking=True)


def _owners(lengths: list[int]) -> torch.Tensor:
    """Which sequence each token belongs to."""
    counts = torch.tensor(lengths, device="cpu")
    return torch.arange(len(lengths), device="cpu").repeat_interleave(counts)


def _cumulative(lengths: list[int]) -> torch.Tensor:
    ends = [0]
    for length in lengths:
        ends.append(ends[-1] + length)
    return torch.tensor(ends, dtype=torch.int32, device="cpu")
