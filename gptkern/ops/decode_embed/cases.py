"""Example calls of the decode step's embedding."""

from __future__ import annotations

import torch

from gptkern.ops._cases import Call, Case, Make, tensor
from gptkern.ops.decode_embed.op import decode_embed


def _embed(rows: int, vocabulary: int, width: int) -> Make:
    def make(device: torch.device, dtype: torch.dtype) -> Call:
        weights = [
            tensor(size, width, device=device, dtype=dtype, requires_grad=False) for size in (vocabulary, 64)
        ]
        live = torch.ones(1, dtype=torch.int32, device=device)
        table = torch.zeros(rows, 4, dtype=torch.int32, device=device)
        lens = torch.zeros(rows, dtype=torch.int32, device=device)
        tokens = torch.arange(rows, device=device)
        return Call((tokens, live, *weights, table, lens, 16))

    return make


CASES = [Case("124M", decode_embed, _embed(8, 50257, 768))]
CHECKS = [Case("3 rows of 20", decode_embed, _embed(3, 11, 20))]
