"""Attention of one new token per sequence over a paged KV cache, and writing into it."""

from __future__ import annotations

import math

import torch

from gptkern.ops import _checks
from gptkern.ops._dispatch import needs_grad, traced, use_kernel
from gptkern.ops._types import FP8, KvScales
from gptkern.ops.decode_attention import launcher, reference

MAX_HEAD_DIM = 256


def decode_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    page_table: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    scale: float | None = None,
    window: int | None = None,
    prefetch: bool = False,
    scales: KvScales | None = None,
) -> torch.Tensor:
    """Attention of the newest token of each sequence over that sequence's pages (Flash-Decoding, 2023).

    Sequences are split at fixed places and combined in a fixed order: a sequence's result is bitwise
    the same alone and in any batch, and wherever its pages lie. Forward only.

    Args:
        q: ``(batch, heads, head_dim)``, fp32, fp16 or bf16 (float64 on a CPU), head_dim at most 256.
            Any strides with a contiguous last dimension.
        k_cache, v_cache: ``(pages, page_size, kv_heads, head_dim)`` of q's dtype; heads is a multiple
            of kv_heads, query head i attends with ``i // (heads / kv_heads)``.
        page_table: ``(batch, max_pages)`` int32: the pages of each sequence, in order. Pages past a
            sequence's length are never looked at.
        seq_lens: ``(batch,)`` int32: tokens each sequence attends, the newest included; 0 gives zeros. A
            page that the cache does not have, or a length that the page table has no room for, is an
            error on a CPU; on a GPU, where looking would stall, it makes that sequence's result NaN.
        scale: Factor on the scores; ``1 / sqrt(head_dim)`` when None.
        window: Attend to the newest ``window`` tokens only.
        prefetch: On sm_90 and newer, begin to fetch pages while the kernel before this one in the
            stream still runs. That kernel must not write ``page_table`` or ``seq_lens``.
        scales: Of an fp8 (e4m3) cache, of keys and of values: ``(kv_heads,)`` fp32, what the cache is
            multiplied by. Not under ``torch.compile``.

    Returns:
        ``(batch, heads, head_dim)``, contiguous, in q's dtype.

    Raises:
        TypeError, ValueError: an argument is not as described here, or q requires grad on a GPU.
    """
    return attend(
        "decode_attention", q, k_cache, v_cache, page_table, seq_lens, scale, window, None, prefetch, scales
    )


def append_kv(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slots: torch.Tensor,
    *,
    scales: KvScales | None = None,
) -> None:
    """Write new keys and values into the cache, in place.

    Args:
        k, v: ``(tokens, kv_heads, head_dim)``, any floating dtype: cast to the cache's. Any strides with
            a contiguous last dimension.
        k_cache, v_cache: ``(pages, page_size, kv_heads, head_dim)``.
        slots: ``(tokens,)`` int64, ``page * page_size + offset`` of each token; a negative one writes
            nothing. No two tokens may have one slot. One beyond the cache is an error on a CPU; on a GPU,
            where looking would stall, it writes nothing.
        scales: Of an fp8 cache, as of ``decode_attention``; what is beyond its range is kept as its largest.

    Raises:
        TypeError, ValueError: an argument is not as described here.
    """
    _check_append("append_kv", k, v, k_cache, v_cache, slots, scales)
    if traced(k):
        torch.ops.gptkern.append_kv(k, v, k_cache, v_cache, slots)
    else:
        run = launcher.append if use_kernel(k) else reference.append_kv
        run(k.detach(), v.detach(), k_cache, v_cache, slots, scales)


def _check_append(
    op: str, k: torch.Tensor, v: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor,
    slots: torch.Tensor, scales: KvScales | None,
) -> None:  # fmt: skip
    check_cache(op, k_cache, v_cache, scales)
    for name, value in (("k", k), ("v", v)):
        _checks.tensor(op, name, value, dim=3)
        _checks.dtype(op, name, value)
        _checks.shape(op, name, value, (k.shape[0], *k_cache.shape[2:]), "tokens, and the cache's heads")
        _checks.last_dim_contiguous(op, name, value)
    _checks.tensor(op, "slots", slots, dim=1)
    _checks.dtype(op, "slots", slots, (torch.int64,))
    _checks.shape(op, "slots", slots, k.shape[:1], "one per token")
    _checks.same_device(op, k=k, v=v, k_cache=k_cache, v_cache=v_cache, slots=slots)
    check_slots(op, k_cache, slots)


def check_slots(op: str, cache: torch.Tensor, slots: torch.Tensor) -> None:
    """On a CPU, raise for a slot beyond the cache."""
    if slots.device.type != "cpu" or not slots.numel() or traced(slots):
        return
    count = cache.shape[0] * cache.shape[1]
    if int(slots.max()) >= count:
        raise ValueError(f"{op}: slots holds {int(slots.max())}; the cache has slots 0 to {count - 1}")


def attend(
    op: str,
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    page_table: torch.Tensor,
    seq_lens: torch.Tensor,
    scale: float | None,
    window: int | None,
    starts: torch.Tensor | None,
    prefetch: bool = False,
    scales: KvScales | None = None,
) -> torch.Tensor:
    """``decode_attention`` under the name ``op``, from token ``starts[i]`` of each sequence on."""
    _check(op, q, k_cache, v_cache, page_table, seq_lens, starts, scales)
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    _check_settings(op, scale, window)
    if traced(q):
        out: torch.Tensor = torch.ops.gptkern.decode_attention(
            q, k_cache, v_cache, page_table, seq_lens, scale, window, starts
        )
        return out
    if use_kernel(q) and needs_grad(q):
        raise ValueError(f"{op}: q requires grad; decode attention is forward only: use torch.no_grad()")
    if not use_kernel(q):
        return reference.decode_attention(
            q, k_cache, v_cache, page_table, seq_lens, scale, window, starts, scales
        )
    return launcher.attend(q, k_cache, v_cache, page_table, seq_lens, scale, window, starts, prefetch, scales)


def _check_settings(op: str, scale: float, window: int | None) -> None:
    if not math.isfinite(scale):
        raise ValueError(f"{op}: scale is {scale}; a finite number is needed")
    if window is not None and window < 1:
        raise ValueError(f"{op}: window is {window}; at least 1 is needed, or None")


def _attend(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    page_table: torch.Tensor,
    seq_lens: torch.Tensor,
    scale: float,
    window: int | None,
    starts: torch.Tensor | None,
) -> torch.Tensor:
    _check("decode_attention", q, k_cache, v_cache, page_table, seq_lens, starts, None)
    _check_settings("decode_attention", scale, window)
    run = launcher.attend if use_kernel(q) else reference.decode_attention
    return run(q, k_cache, v_cache, page_table, seq_lens, scale, window, starts)


def _append(
    k: torch.Tensor, v: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, slots: torch.Tensor
) -> None:
    _check_append("append_kv", k, v, k_cache, v_cache, slots, None)
    run = launcher.append if use_kernel(k) else reference.append_kv
    run(k, v, k_cache, v_cache, slots)


def check_cache(op: str, k_cache: torch.Tensor, v_cache: torch.Tensor, scales: KvScales | None) -> None:
    """Raise for a cache that no op takes, or scales that do not fit it."""
    for name, value in (("k_cache", k_cache), ("v_cache", v_cache)):
        _checks.tensor(op, name, value, dim=4)
        floats = _checks.KERNEL_FLOATS if use_kernel(value) else _checks.FLOATS
        _checks.dtype(op, name, value, floats if scales is None else (FP8,))
        _checks.last_dim_contiguous(op, name, value)
    _checks.shape(op, "v_cache", v_cache, k_cache.shape, "the shape of k_cache")
    if v_cache.dtype != k_cache.dtype:
        raise TypeError(f"{op}: v_cache is {v_cache.dtype}, k_cache {k_cache.dtype}: one dtype is needed")
    if not 1 <= k_cache.shape[3] <= MAX_HEAD_DIM:
        raise ValueError(
            f"{op}: k_cache has head dimension {k_cache.shape[3]}; 1 to {MAX_HEAD_DIM} are accepted"
        )
    _check_scales(op, k_cache, scales)


def _check_scales(op: str, k_cache: torch.Tensor, scales: KvScales | None) -> None:
    if scales is None:
        return
    if traced(k_cache):
        raise ValueError(f"{op}: the cache is fp8; torch.compile takes it in 16 or 32 bits")
    _checks.fp8_device(op, "the cache", k_cache.device)
    _checks.kv_scales(op, scales, k_cache.shape[2:3], "one per head of the cache")
    _checks.same_device(op, k_cache=k_cache, k_scale=scales[0], v_scale=scales[1])


def _check(
    op: str,
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    page_table: torch.Tensor,
    seq_lens: torch.Tensor,
    starts: torch.Tensor | None,
    scales: KvScales | None,
) -> None:
    _checks.tensor(op, "q", q, dim=3)
    check_cache(op, k_cache, v_cache, scales)
    if scales is not None:
        _checks.dtype(op, "q", q, _checks.KERNEL_FLOATS if use_kernel(q) else _checks.FLOATS)
    elif q.dtype != k_cache.dtype:
        raise TypeError(f"{op}: q is {q.dtype}, the cache {k_cache.dtype}: one dtype is needed")
    _checks.last_dim_contiguous(op, "q", q)
    batch, heads, head_dim = q.shape
    kv_heads = k_cache.shape[2]
    if head_dim != k_cache.shape[3]:
        raise ValueError(
            f"{op}: q has head dimension {head_dim}, the cache {k_cache.shape[3]}: they must be equal"
        )
    if not kv_heads or heads % kv_heads:
        raise ValueError(
            f"{op}: k_cache has {kv_heads} heads, q has {heads}: q's must be a multiple of k_cache's"
        )
    _checks.tensor(op, "page_table", page_table, dim=2)
    _checks.tensor(op, "seq_lens", seq_lens, dim=1)
    lists = {"page_table": page_table, "seq_lens": seq_lens, "starts": starts}
    for name, value in lists.items():
        if value is None:
            continue
        _checks.dtype(op, name, value, (torch.int32,))
        if value.shape[0] != batch:
            raise ValueError(f"{op}: {name} has {value.shape[0]} rows, q {batch}: one per sequence is needed")
        _checks.last_dim_contiguous(op, name, value)
    _checks.same_device(op, q=q, k_cache=k_cache, v_cache=v_cache, **lists)
    if seq_lens.device.type == "cpu" and batch and not traced(seq_lens):
        longest = int(seq_lens.max())
        if int(seq_lens.min()) < 0 or longest > page_table.shape[1] * k_cache.shape[1]:
            raise ValueError(
                f"{op}: seq_lens goes from {int(seq_lens.min())} to {longest}; "
                f"{page_table.shape[1]} pages hold 0 to {page_table.shape[1] * k_cache.shape[1]} tokens"
            )
        needed = (
            torch.arange(page_table.shape[1], device=page_table.device)[None, :] * k_cache.shape[1]
            < seq_lens[:, None]
        )
        strange = page_table[needed & ((page_table < 0) | (page_table >= k_cache.shape[0]))]
        if strange.numel():
            raise ValueError(
                f"{op}: page_table holds {int(strange[0])}; the cache has pages 0 to {k_cache.shape[0] - 1}"
            )


_library = torch.library.Library("gptkern", "FRAGMENT")
_library.define(
    "decode_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor page_table, Tensor seq_lens, "
    "float scale, int? window, Tensor? starts) -> Tensor"
)
_library.define("append_kv(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor slots) -> ()")
for _key in ("CUDA", "CPU"):
    _library.impl("decode_attention", _attend, _key)
    _library.impl("append_kv", _append, _key)


@torch.library.register_fake("gptkern::decode_attention", lib=_library)
def _(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    page_table: torch.Tensor,
    seq_lens: torch.Tensor,
    scale: float,
    window: int | None,
    starts: torch.Tensor | None,
) -> torch.Tensor:
    return q.new_empty(q.shape)


@torch.library.register_fake("gptkern::append_kv", lib=_library)
def _(
    k: torch.Tensor, v: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, slots: torch.Tensor
) -> None:
    return None
