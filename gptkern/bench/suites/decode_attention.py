"""Attention of one new token per sequence over the paged cache: bound by memory."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from gptkern import ops
from gptkern.bench.problem import Inputs, Problem
from gptkern.bench.suites import _providers as shared
from gptkern.ops.flash_attention.reference import attention

# (batch, context, heads, head_dim)
GPU = [(1, 1024, 12, 64), (64, 1024, 12, 64), (8, 1024, 25, 64), (8, 16384, 12, 64), (1, 131072, 12, 64)]
CPU = [(1, 512, 12, 64), (8, 256, 12, 64)]
PAGE_SIZE = 64


def _gather(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pages: torch.Tensor, lengths: torch.Tensor
) -> torch.Tensor:
    k, v = (cache[pages.long()].flatten(1, 2) for cache in (k, v))
    return attention(q[:, None], k, v)[0][:, 0]


def problems(device: torch.device, quick: bool) -> Iterator[Problem]:
    """Every shape, pages shuffled."""
    for dtype in shared.dtypes(device, quick):
        for shape in shared.of_widths(device, GPU, CPU, quick):
            yield _problem(shape, dtype)


def _problem(shape: tuple[int, int, int, int], dtype: torch.dtype) -> Problem:
    batch, context, heads, head_dim = shape
    pages = context // PAGE_SIZE

    def inputs(device: torch.device) -> Inputs:
        caches = (
            shared.randn(batch * pages, PAGE_SIZE, heads, head_dim, dtype=dtype, device=device) for _ in "kv"
        )
        table = torch.randperm(batch * pages, device=device).view(batch, pages).int()
        lengths = torch.full((batch,), context, dtype=torch.int32, device=device)
        return shared.randn(batch, heads, head_dim, dtype=dtype, device=device), *caches, table, lengths

    return Problem(
        "decode_attention",
        f"{batch}x{context}x{heads}x{head_dim}",
        dtype,
        inputs,
        {"gptkern": ops.decode_attention, "gather": _gather},
        _gather,
        bytes_moved=2.0 * batch * context * heads * head_dim * dtype.itemsize,
        flops=4.0 * batch * context * heads * head_dim,
    )
