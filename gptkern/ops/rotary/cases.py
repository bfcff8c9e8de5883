"""Example calls of rotary positions: every launch row to compile, small ones to compute."""

from __future__ import annotations

from typing import Any

import torch

from gptkern.ops._cases import Call, Case, Make, tensor
from gptkern.ops.rotary.op import rotary


def _heads(
    batch: int,
    seq: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    *,
    dim: int | None = None,
    norm: bool = False,
    **settings: Any,
) -> Make:
    """q and k out of one product, as a decoder has them, with fp32 tables and weights of x's dtype."""

    def make(device: torch.device, dtype: torch.dtype) -> Call:
        width = (heads + 2 * kv_heads) * head_dim
        qkv = tensor(batch, seq, width, device=device, dtype=dtype).detach()
        parts = qkv.split((heads * head_dim, kv_heads * head_dim, kv_heads * head_dim), dim=-1)
        q, k = (part.unflatten(-1, (-1, head_dim)).requires_grad_() for part in parts[:2])
        tables = [
            tensor(seq, (dim or head_dim) // 2, device=device, dtype=torch.float32, requires_grad=False)
            for _ in range(2)
        ]
        options = dict(settings)
        if norm:
            q_weight, k_weight = (tensor(head_dim, device=device, dtype=dtype) for _ in range(2))
            options["norm"] = (q_weight, k_weight, 1e-6)
        return Call((q, k, *tables), options)

    return make


_BOTH = (torch.bfloat16, torch.float32)
CASES = [
    Case("SmolLM2, 16 x 1024", rotary, _heads(16, 1024, 9, 3, 64), _BOTH),
    Case("Llama 1B, 16 x 1024", rotary, _heads(16, 1024, 32, 8, 64)),
    Case("Qwen3 0.6B, 16 x 1024", rotary, _heads(16, 1024, 16, 8, 128, norm=True), _BOTH),
    Case("Pythia, partial", rotary, _heads(4, 2048, 8, 8, 64, dim=16)),
    Case("GPT-J, interleaved, partial", rotary, _heads(1, 2048, 16, 16, 256, dim=64, pairs="interleaved")),
    Case(
        "Gemma 3, norm with an offset", rotary, _heads(4, 2048, 4, 1, 256, norm=True, unit_offset=True), _BOTH
    ),
    Case("interleaved, norm", rotary, _heads(1, 2048, 32, 8, 128, norm=True, pairs="interleaved")),
]

CHECKS = [
    Case("halves", rotary, _heads(2, 3, 4, 2, 16)),
    Case("interleaved, partial", rotary, _heads(2, 3, 3, 1, 20, dim=12, pairs="interleaved")),
    Case("halves, partial, norm", rotary, _heads(1, 5, 3, 3, 24, dim=6, norm=True)),
    Case("norm with an offset", rotary, _heads(2, 2, 4, 1, 16, norm=True, unit_offset=True)),
    Case("interleaved, norm", rotary, _heads(1, 4, 2, 2, 8, norm=True, pairs="interleaved")),
    Case("one pair", rotary, _heads(1, 1, 1, 1, 2)),
    Case("no token", rotary, _heads(2, 0, 4, 2, 16)),
]
