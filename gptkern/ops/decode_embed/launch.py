"""The launch of the decode step's embedding."""

from __future__ import annotations

from typing import NamedTuple

import torch

from gptkern.ops import _launch, _pdl
from gptkern.ops._triton import triton
from gptkern.ops.decode_embed.kernels import decode_embed_kernel

EMBED_COLUMNS = 1024


class EmbedArguments(NamedTuple):
    """The arguments of ``decode_embed``, in its order."""

    tokens: torch.Tensor
    live: torch.Tensor
    token_weight: torch.Tensor
    position_weight: torch.Tensor | None
    page_table: torch.Tensor
    seq_lens: torch.Tensor
    page_size: int
    position_offset: int = 0
    scale: float = 1.0


def embed(a: EmbedArguments) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch the kernel: (embeddings ``(rows, width)``, cache slots ``(rows,)``)."""
    rows, width = a.tokens.shape[0], a.token_weight.shape[1]
    x = torch.empty((rows, width), dtype=a.token_weight.dtype, device=a.tokens.device)
    slots = torch.empty(rows, dtype=torch.int64, device=a.tokens.device)
    positions, stride_position = 0, 0
    if a.position_weight is not None:
        positions, stride_position = a.position_weight.shape[0], a.position_weight.stride(0)
    with _launch.on_device(a.tokens):
        _launch.launch(
            decode_embed_kernel,
            (rows,),
            *(*a[:6], x, slots),
            *(a.token_weight.shape[0], positions, a.page_table.shape[1], a.page_size),
            *(a.token_weight.stride(0), stride_position, a.page_table.stride(0)),
            WIDTH=width,
            BLOCK=min(triton.next_power_of_2(width), EMBED_COLUMNS),
            OFFSET=a.position_offset,
            SCALE=a.scale,
            num_warps=4,
            **_pdl.options(a.tokens.device),
        )
    return x, slots
