"""KVCache: keys and values of what came before, in pages, with a page table per sequence.

A page holds ``page_size`` tokens of one sequence, all layers alike. Pages that lie next to each other are one
run of memory, and a sequence of such pages is read in place. Who holds which page is the business of
``Sequences``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from gptkern.config import Config
from gptkern.engine import huge_pages
from gptkern.engine.forward_pass import ForwardPass, PassRow, Storage, pack_table
from gptkern.engine.sequences import Sequences
from gptkern.kv_scales import are_kv_scales
from gptkern.ops import _checks
from gptkern.ops._types import FP8, KvScales

# Every BLOCK_N of the decode attention's launch tables divides it: kernels look a page up once a block.
PAGE_SIZE = 64
_MOST_PAGES = 2**31 - 1
_MOST_BYTES = 2**62
_BOUND = "bound the cache by cache_tokens or memory_bytes"


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


def _memory(
    shape: tuple[int, ...], max_seqs: int, width: int, dtype: torch.dtype, device: torch.device | str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Keys, values and the page table.

    All are zeros, for what a masked lane reads must be finite.

    Raises:
        ValueError: More pages than an int32 can number.
        MemoryError: The device does not have as much.
    """
    pages, bytes_ = shape[1], 2 * math.prod(shape) * dtype.itemsize
    needed = f"{max_seqs} sequences with {pages} pages of {shape[2]} tokens take {bytes_ / 1e9:.1f} GB"
    if max(pages, max_seqs * width) > _MOST_PAGES or bytes_ > _MOST_BYTES:
        raise ValueError(
            f"KVCache: {needed}; at most {_MOST_PAGES} pages are accepted: lower max_seqs, or {_BOUND}"
        )
    # Tensors made in inference mode could not be written outside it.
    with torch.inference_mode(False):
        try:
            if torch.device(device).type == "cpu":
                k, v = (huge_pages.zeros(shape, dtype) for _ in range(2))
            else:
                k, v = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
            return k, v, torch.zeros(max_seqs, width, dtype=torch.int32, device=device)
        except (RuntimeError, OSError) as error:
            raise MemoryError(
                f"KVCache: {needed}, which {device} does not have: lower max_seqs, or {_BOUND}"
            ) from error


class KVCache(Sequences):
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
        # Memory first: the lists of pages are long only where there is room for pages.
        shape = (n_layer, num_pages, page_size, n_kv_head, head_dim)
        self.k, self.v, page_table = _memory(shape, max_seqs, max_pages_per_seq, dtype, device)
        super().__init__(
            num_pages=num_pages, page_size=page_size, max_seqs=max_seqs, max_pages_per_seq=max_pages_per_seq
        )
        self._storage = Storage(self.k, self.v, kv_scales, page_table)
        # The page table on the device: it is brought up to date when somebody asks for it.
        self._laid: list[list[int]] = []

    @classmethod
    def for_config(
        cls,
        config: Config,
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
        spec = config.spec
        pages_per_seq = -(-max_len // page_size)
        num_pages = max_seqs * pages_per_seq
        if cache_tokens is not None and memory_bytes is not None:
            raise ValueError("KVCache: cache_tokens and memory_bytes are given; one of them is accepted")
        if cache_tokens is not None:
            if cache_tokens < 1:
                raise ValueError(f"KVCache: cache_tokens is {cache_tokens}; 1 or more is needed")
            num_pages = -(-cache_tokens // page_size)
        if memory_bytes is not None:
            page_bytes = 2 * len(spec.layers) * page_size * spec.kv_width * dtype.itemsize
            num_pages = memory_bytes // page_bytes
            if num_pages < 1:
                raise ValueError(
                    f"KVCache: memory_bytes is {memory_bytes}; "
                    f"one page of {page_size} tokens takes {page_bytes}"
                )
        return cls(
            n_layer=len(spec.layers),
            n_kv_head=spec.kv_heads,
            head_dim=spec.head_dim,
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
    def storage(self) -> Storage:
        """Keys, values, kv scales and page table, as forward passes and kernels take them."""
        pages = [row.pages for row in self._rows.values()]
        if pages and pages != self._laid:
            table = pack_table(pages)
            self._storage.page_table[: table.shape[0], : table.shape[1]].copy_(table, non_blocking=True)
            self._laid = [list(row) for row in pages]
        return self._storage

    @property
    def page_table(self) -> torch.Tensor:
        """``(max_seqs, max_pages_per_seq)`` int32 on the device: row i holds the pages of the i-th sequence.

        Sequences are in the order of ``sequences``; entries past their pages are of no meaning.
        """
        return self.storage.page_table

    @property
    def bytes_per_token(self) -> int:
        """Bytes that one token's keys and values take, all layers together."""
        layers, _, _, heads, dim = self.k.shape
        return 2 * layers * heads * dim * self.k.element_size()

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

        # This makes an earlier pass void.
        self.changes += 1
        changes = self.changes

        def commit() -> None:
            if self.changes != changes:
                raise RuntimeError("ForwardPass.commit: the cache was changed since this pass began")
            self.advance(new_lengths, ids)

        return ForwardPass(self.storage, rows, commit)

    def _copy_page(self, source: int, target: int, tokens: int) -> None:
        for cache in (self.k, self.v):
            cache[:, target, :tokens].copy_(cache[:, source, :tokens])
