"""Rotary positions of queries and keys, with a norm of each head or without: bound by memory."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from gptkern import ops
from gptkern.bench.problem import Inputs, Problem
from gptkern.bench.suites import _providers as shared

# Tokens, heads, key heads, head dimension: SmolLM2 135M, Llama 3.2 1B, Qwen3 0.6B.
GPU = [(16384, 9, 3, 64), (16384, 32, 8, 64), (16384, 16, 8, 128), (1, 16, 8, 128)]
CPU = [(512, 9, 3, 64), (1, 16, 8, 128)]


def _turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, -1)
    return (x * torch.cat((cos, cos), -1) + torch.cat((-second, first), -1) * torch.cat((sin, sin), -1)).to(
        x.dtype
    )


def _plain(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    cos, sin = cos[:, None], sin[:, None]
    return _turn(q, cos, sin), _turn(k, cos, sin)


def _normed(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    q, k = F.rms_norm(q, q.shape[-1:], q_weight, 1e-6), F.rms_norm(k, k.shape[-1:], k_weight, 1e-6)
    return _plain(q, k, cos, sin)


def _fused(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    return ops.rotary(q, k, cos, sin, norm=(q_weight, k_weight, 1e-6))


def problems(device: torch.device, quick: bool) -> Iterator[Problem]:
    """Forward of both forms, backward where there are enough rows to train on."""
    for dtype in shared.dtypes(device, quick):
        for shape in shared.of_widths(device, GPU, CPU, quick):
            for norm in (False, True):
                for backward in (False, True) if shape[0] > 64 else (False,):
                    yield _problem(shape, dtype, quick, norm, backward)


def _problem(
    shape: tuple[int, int, int, int], dtype: torch.dtype, quick: bool, norm: bool, backward: bool
) -> Problem:
    tokens, heads, kv_heads, head_dim = shape

    def inputs(device: torch.device) -> Inputs:
        q = shared.randn(tokens, heads, head_dim, dtype=dtype, device=device, grad=backward)
        k = shared.randn(tokens, kv_heads, head_dim, dtype=dtype, device=device, grad=backward)
        angles = torch.rand(tokens, head_dim // 2, device=device)
        weights = [shared.randn(head_dim, dtype=dtype, device=device, grad=backward) for _ in range(2)]
        return (q, k, angles.cos(), angles.sin(), *(weights if norm else ()))

    elements = tokens * (heads + kv_heads) * head_dim
    passes = 3 if norm and backward else 2
    plain = _normed if norm else _plain
    return Problem(
        "rotary",
        f"{'norm ' if norm else ''}{tokens}x{heads}+{kv_heads}x{head_dim}",
        dtype,
        inputs,
        {"gptkern": _fused if norm else ops.rotary, **shared.eager_and_compiled(plain, quick)},
        plain,
        bytes_moved=passes * elements * dtype.itemsize + 4 * tokens * head_dim,
        backward=backward,
    )
