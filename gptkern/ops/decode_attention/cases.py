"""Example calls of decode attention: one for every launch row, and small ones that are computed."""

from __future__ import annotations

from typing import Any

import torch

from gptkern.ops._cases import Call, Case, Make, tensor
from gptkern.ops._types import FP8
from gptkern.ops.decode_attention.op import append_kv, decode_attention

# One query, or a few that share keys, are rows: fewer than wgmma's 64.
_N = frozenset({"decode_attention_kernel"})
_HALF, _FP32 = (torch.bfloat16,), (torch.float32,)


def _attend(
    batch: int,
    heads: int,
    kv_heads: int,
    dim: int,
    pages: int,
    page_size: int,
    *,
    prefetch: bool = False,
    fp8: bool = False,
    **settings: Any,
) -> Make:
    def make(device: torch.device, dtype: torch.dtype) -> Call:
        q = tensor(batch, heads, dim, device=device, dtype=dtype, requires_grad=False)
        k, v = (
            tensor(batch * pages, page_size, kv_heads, dim, device=device, dtype=dtype, requires_grad=False)
            for _ in range(2)
        )
        table = torch.arange(batch * pages, dtype=torch.int32, device=device).view(batch, pages)
        lens = torch.arange(batch, dtype=torch.int32, device=device) % (pages * page_size) + 1
        options: dict[str, Any] = {"prefetch": prefetch, **settings}
        if fp8:
            k, v = k.to(FP8), v.to(FP8)
            options["scales"] = _scales(kv_heads, device)
        return Call((q, k, v, table, lens), options)

    return make


def _scales(kv_heads: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.ones(kv_heads, device=device), torch.ones(kv_heads, device=device)


def _append(tokens: int, heads: int, dim: int, fp8: bool = False) -> Make:
    def make(device: torch.device, dtype: torch.dtype) -> Call:
        k, v, k_cache, v_cache = (
            tensor(*lead, heads, dim, device=device, dtype=dtype, requires_grad=False)
            for lead in ((tokens,), (tokens,), (tokens, 16), (tokens, 16))
        )
        options: dict[str, Any] = {}
        if fp8:
            k_cache, v_cache = k_cache.to(FP8), v_cache.to(FP8)
            options["scales"] = _scales(heads, device)
        return Call((k, v, k_cache, v_cache, torch.arange(tokens, device=device) * 3), options)

    return make


CASES = [
    Case("124M step", decode_attention, _attend(1, 12, 12, 64, 1, 1024, prefetch=True), mma_sync=_N),
    Case("124M, context 1024", decode_attention, _attend(1, 12, 12, 64, 1, 1024), mma_sync=_N),
    Case("124M, context 1024, batch 64", decode_attention, _attend(64, 12, 12, 64, 64, 16), mma_sync=_N),
    Case(
        "8 heads a key, context 16k",
        decode_attention,
        _attend(8, 32, 4, 128, 64, 256),
        mma_sync=_N,
    ),
    Case("heads of 64, context 16k", decode_attention, _attend(8, 32, 8, 64, 64, 256), mma_sync=_N),
    Case("context 128k", decode_attention, _attend(1, 25, 25, 64, 512, 256), mma_sync=_N),
    Case("context 128k, heads of 128", decode_attention, _attend(1, 16, 8, 128, 512, 256), mma_sync=_N),
    Case("head dim 256", decode_attention, _attend(1, 8, 1, 256, 16, 256), mma_sync=_N),
    Case("head dim 256, context 16k", decode_attention, _attend(1, 8, 1, 256, 64, 256), mma_sync=_N),
    Case("fp32", decode_attention, _attend(1, 12, 12, 64, 16, 64), dtypes=_FP32),
    Case("fp32, context 16k", decode_attention, _attend(1, 12, 12, 64, 256, 64), dtypes=_FP32),
    Case("fp32, head dim 256", decode_attention, _attend(1, 8, 1, 256, 16, 256), dtypes=_FP32),
    Case("fp32, head dim 256, context 16k", decode_attention, _attend(1, 8, 1, 256, 64, 256), dtypes=_FP32),
    Case(
        "Gemma 2, window, soft cap",
        decode_attention,
        _attend(1, 8, 4, 256, 16, 256, window=4096, softcap=50.0),
        mma_sync=_N,
    ),
    Case("append 124M", append_kv, _append(64, 12, 64)),
]
# e4m3 is converted from sm_89 on.
_E4M3 = (89, 90, 100)
CASES += [
    Case(
        f"{size} step, fp8",
        decode_attention,
        _attend(1, heads, heads, 64, 1, 1024, prefetch=True, fp8=True),
        mma_sync=_N,
        archs=_E4M3,
    )
    for size, heads in (("124M", 12), ("1.5B", 25))
] + [
    Case(
        "8 heads a key, context 16k, fp8",
        decode_attention,
        _attend(8, 32, 4, 128, 64, 256, fp8=True),
        mma_sync=_N,
        archs=_E4M3,
    ),
    Case("append 124M, fp8", append_kv, _append(64, 12, 64, fp8=True), archs=_E4M3),
]
CHECKS = [
    Case("5 sequences over 3 pages of 16", decode_attention, _attend(5, 4, 2, 20, 3, 16)),
    Case("soft cap, window", decode_attention, _attend(3, 4, 2, 20, 3, 16, window=9, softcap=2.0)),
    Case("1 sequence of 1 token", decode_attention, _attend(1, 3, 1, 16, 1, 4)),
    Case("append 7 x 3 x 20", append_kv, _append(7, 3, 20)),
]
