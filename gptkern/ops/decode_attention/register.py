"""``torch.ops.gptkern.decode_attention`` and ``append_kv``, for torch.compile and export.

They take caches of 16 and 32 bits: an fp8 cache's scales are not in their schemas.
"""

from __future__ import annotations

from typing import Any

import torch

from gptkern.ops._dispatch import use_kernel
from gptkern.ops._register import register
from gptkern.ops._types import CachedSequences, PagedCache
from gptkern.ops.decode_attention import checks, launch, reference


def _attend(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    page_table: torch.Tensor,
    seq_lens: torch.Tensor,
    scale: float,
    window: int | None,
    starts: torch.Tensor | None,
    softcap: float | None = None,
) -> torch.Tensor:
    cache, sequences = PagedCache(k_cache, v_cache), CachedSequences(page_table, seq_lens, starts)
    checks.check_attend("decode_attention", q, cache, sequences, scale, window, softcap)
    if use_kernel(q):
        return launch.attend(q, cache, sequences, scale, window, softcap=softcap)[0]
    arguments = (page_table, seq_lens, scale, window, starts, None, softcap)
    return reference.decode_attention(q, k_cache, v_cache, *arguments)


def _append(
    k: torch.Tensor, v: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, slots: torch.Tensor
) -> None:
    cache = PagedCache(k_cache, v_cache)
    checks.check_append("append_kv", k, v, cache, slots)
    if use_kernel(k):
        launch.append(k, v, cache, slots)
    else:
        reference.append_kv(k, v, k_cache, v_cache, slots)


def _fake_attend(q: torch.Tensor, *_: Any) -> torch.Tensor:
    return q.new_empty(q.shape)


def _fake_append(*_: Any) -> None:
    return None


register(
    "decode_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor page_table, Tensor seq_lens, "
    "float scale, int? window, Tensor? starts, float? softcap=None) -> Tensor",
    _attend,
    fake=_fake_attend,
)
register(
    "append_kv(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor slots) -> ()",
    _append,
    fake=_fake_append,
)
