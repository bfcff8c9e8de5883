"""ForwardPass: one forward pass over new tokens of some of a cache's sequences."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Unpack

import torch

from gptkern import ops
from gptkern.model.attend import AttendOptions
from gptkern.ops._dispatch import use_kernel
from gptkern.ops._types import KvScales
from gptkern.ops.decode_attention import reference
from gptkern.ops.flash_attention.reference import attention_cpu


def pack_table(pages: list[list[int]]) -> torch.Tensor:
    """Lists of pages as one int32 table on the CPU, rows filled up with 0."""
    width = max(map(len, pages))
    return torch.tensor([p + [0] * (width - len(p)) for p in pages], dtype=torch.int32, device="cpu")


@dataclass(frozen=True)
class PassRow:
    """One sequence of a pass.

    Attributes:
        table_row: Its row of the page table.
        pages: Its pages, in order; room for the new tokens included.
        length: Tokens that it holds before the pass.
        new: Tokens that the pass brings.
    """

    table_row: int
    pages: list[int]
    length: int
    new: int

    @property
    def total(self) -> int:
        """Tokens that it holds afterwards."""
        return self.length + self.new


@dataclass(frozen=True)
class Storage:
    """The tensors that hold keys and values.

    Attributes:
        k, v: ``(n_layer, num_pages, page_size, n_kv_head, head_dim)``.
        kv_scales: Of an fp8 cache, ``(n_layer, n_kv_head)`` for keys and for values; None of any other.
        page_table: ``(max_seqs, max_pages_per_seq)`` int32, on the same device.
    """

    k: torch.Tensor
    v: torch.Tensor
    kv_scales: KvScales | None
    page_table: torch.Tensor

    @property
    def page_size(self) -> int:
        """Tokens that a page holds."""
        return self.k.shape[2]

    @cached_property
    def layers(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Each layer's keys and values."""
        with torch.inference_mode(False):  # passes outside of it take them, too
            return [(self.k[layer], self.v[layer]) for layer in range(self.k.shape[0])]

    def layer_kv_scales(self, layer: int) -> KvScales | None:
        """A layer's (k_scale, v_scale) of an fp8 cache, ``(n_kv_head,)`` each; None of any other."""
        return None if self.kv_scales is None else (self.kv_scales[0][layer], self.kv_scales[1][layer])


class ForwardPass:
    """One forward pass over new tokens of some of a cache's sequences: where each token stands and goes.

    It knows the rows as they were when it was made, and the tensors that keys and values lie in.
    Tensors are packed, ``(tokens, heads, head_dim)``: the first sequence's new tokens, then the
    second's, and so on.

    Args:
        storage: The tensors that hold keys and values.
        rows: The sequences, in the order of their tokens.
        commit: Called when the pass's tokens are to count as held.

    Attributes:
        max_seqlen_q, max_seqlen_k: Most new tokens of one sequence; longest sequence afterwards.
    """

    # No gradient comes back through a cache, so a pass through one is never training.
    dropout = False

    def __init__(self, storage: Storage, rows: list[PassRow], commit: Callable[[], None]) -> None:
        self.rows = rows
        self._storage = storage
        self._commit = commit
        self.max_seqlen_q = max((row.new for row in rows), default=0)
        self.max_seqlen_k = max((row.total for row in rows), default=0)
        self._decoding = all(row.new == 1 for row in rows)
        self._starting = not any(row.length for row in rows)

    def commit(self) -> None:
        """Count the new tokens as held. Called once, when every layer has them.

        Raises:
            RuntimeError: The cache was changed since this pass began, or it is committed already.
        """
        self._commit()

    @cached_property
    def positions(self) -> torch.Tensor:
        """``(tokens,)`` int64: each new token's place in its sequence, from 0."""
        if self._decoding:
            lengths = [row.length for row in self.rows]
            return self._device(torch.tensor(lengths, dtype=torch.int64, device="cpu"))
        return self._device(self._host_positions)

    @cached_property
    def slots(self) -> torch.Tensor:
        """``(tokens,)`` int64: where each new token goes, ``page * page_size + offset``."""
        size = self._storage.page_size
        if self._decoding:
            slots = [row.pages[row.length // size] * size + row.length % size for row in self.rows]
            return self._device(torch.tensor(slots, dtype=torch.int64, device="cpu"))
        return self._device(self._slots_at([row.new for row in self.rows], self._host_positions))

    @cached_property
    def cu_seqlens_q(self) -> torch.Tensor:
        """``(sequences + 1,)`` int32: where each sequence's new tokens begin."""
        return self._device(_cumulative([row.new for row in self.rows]))

    @cached_property
    def seq_lens_k(self) -> torch.Tensor:
        """``(sequences,)`` int32: tokens of each sequence, the new ones included."""
        return self._device(torch.tensor([r.total for r in self.rows], dtype=torch.int32, device="cpu"))

    @cached_property
    def page_table(self) -> torch.Tensor:
        """``(sequences, max_pages_per_seq)`` int32: the pages of these sequences."""
        table = self._storage.page_table
        places = [row.table_row for row in self.rows]
        if places == list(range(len(places))):
            return table[: len(places)]
        # As wide as the cache's: decode attention's splits follow the table's width.
        return table[self._device(torch.tensor(places, device="cpu"))]

    @torch.no_grad()
    def attention(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Unpack[AttendOptions]
    ) -> torch.Tensor:
        """Append the new tokens' keys and values to one layer, and let the queries attend to it.

        Args:
            layer: From 0.
            q: ``(tokens, heads, head_dim)``.
            k, v: ``(tokens, kv_heads, head_dim)``.
            options: The layer's softmax scale, its window and the cap of its scores.

        Returns:
            ``(tokens, heads, head_dim)``, in q's dtype.
        """
        storage = self._storage
        k_cache, v_cache = storage.layers[layer]
        kernels = use_kernel(k_cache)
        append = ops.append_kv if kernels else reference.append_kv
        kv_scales = storage.layer_kv_scales(layer)
        append(k, v, k_cache, v_cache, self.slots, scales=kv_scales)
        if self._starting and not self._decoding:
            cu, longest = self.cu_seqlens_q, self.max_seqlen_q
            return ops.flash_attention_varlen(q, k, v, cu, cu, longest, longest, **options)
        dtype = q.dtype
        if kv_scales is None:
            q = q.to(k_cache.dtype)
        if not kernels:
            out = self._attend_rows(q, k_cache, v_cache, kv_scales, options)
        elif self._decoding and options.get("softcap") is None:
            out = ops.decode_attention(
                *(q, k_cache, v_cache, self.page_table, self.seq_lens_k),
                scale=options["scale"],
                window=options.get("window"),
                scales=kv_scales,
            )
        else:
            k_all, v_all = (
                reference.rows(cache.flatten(0, 1), self._slots_k) for cache in (k_cache, v_cache)
            )
            k_all, v_all = reference.widened(k_all, v_all, kv_scales, dtype)
            out = ops.flash_attention_varlen(
                q,
                k_all,
                v_all,
                self.cu_seqlens_q,
                self._cu_seqlens_k,
                self.max_seqlen_q,
                self.max_seqlen_k,
                **options,
            )
        return out.to(dtype)

    def _attend_rows(
        self,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        kv_scales: KvScales | None,
        options: AttendOptions,
    ) -> torch.Tensor:
        scale, window, softcap = options["scale"], options.get("window"), options.get("softcap")
        out = torch.empty_like(q)
        for tokens, pages, length in self._host_rows:
            k, v = (reference.sequence(cache, pages, length) for cache in (k_cache, v_cache))
            k, v = reference.widened(k, v, kv_scales, q.dtype)
            if softcap is not None or (window is not None and not self._decoding):
                out[tokens] = ops.flash_attention(q[None, tokens], k[None], v[None], **options)[0]
            elif self._decoding:
                k, v = (k, v) if window is None else (k[-window:], v[-window:])
                out[tokens] = reference.attend(q[tokens][0].contiguous(), k, v, scale)
            else:
                out[tokens] = attention_cpu(q[None, tokens], k[None], v[None], scale=scale)[0]
        return out

    @cached_property
    def _host_rows(self) -> list[tuple[slice, torch.Tensor | int, int]]:
        """For each sequence with new tokens: their slice, its pages, its length.

        A number in place of pages is the first of a run of neighbouring ones, which is a plain view.
        """
        rows: list[tuple[slice, torch.Tensor | int, int]] = []
        start = 0
        for row in self.rows:
            used = row.pages[: -(-row.total // self._storage.page_size)]
            if row.new:
                run = used == list(range(used[0], used[0] + len(used)))
                pages = used[0] if run else torch.tensor(used, device="cpu")
                rows.append((slice(start, start + row.new), pages, row.total))
            start += row.new
        return rows

    @cached_property
    def _host_positions(self) -> torch.Tensor:
        spans = [torch.arange(row.length, row.total, device="cpu") for row in self.rows]
        return torch.cat(spans) if spans else torch.empty(0, dtype=torch.int64, device="cpu")

    @cached_property
    def _slots_k(self) -> torch.Tensor:
        totals = [row.total for row in self.rows]
        positions = torch.cat([torch.arange(total, device="cpu") for total in totals])
        return self._device(self._slots_at(totals, positions))

    @cached_property
    def _cu_seqlens_k(self) -> torch.Tensor:
        return self._device(_cumulative([row.total for row in self.rows]))

    def _slots_at(self, counts: list[int], positions: torch.Tensor) -> torch.Tensor:
        """Slots of so many tokens of each row, at these positions."""
        size = self._storage.page_size
        repeats = torch.tensor(counts, device="cpu")
        owners = torch.arange(len(counts), device="cpu").repeat_interleave(repeats)
        table = pack_table([row.pages for row in self.rows])
        return table[owners, positions // size].long() * size + positions % size

    def _device(self, host: torch.Tensor) -> torch.Tensor:
        return host.to(self._storage.k.device, non_blocking=True)


def _cumulative(lengths: list[int]) -> torch.Tensor:
    ends = [0]
    for length in lengths:
        ends.append(ends[-1] + length)
    return torch.tensor(ends, dtype=torch.int32, device="cpu")
