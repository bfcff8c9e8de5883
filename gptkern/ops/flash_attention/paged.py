"""Keys and values of a paged cache, packed for attention of several queries a sequence."""

from __future__ import annotations

import torch

from gptkern.ops import _checks
from gptkern.ops._dispatch import traced


def check_table(op: str, k: torch.Tensor, v: torch.Tensor, table: torch.Tensor) -> None:
    """Raise for blocks ``(blocks, block_size, kv_heads, head_dim)`` or a table that cannot be read."""
    _checks.tensor(op, "k", k, dim=4)
    _checks.tensor(op, "v", v, dim=4)
    _checks.shape(op, "v", v, k.shape, "the shape of k")
    _checks.tensor(op, "block_table", table, dim=2)
    _checks.dtype(op, "block_table", table, (torch.int32,))
    _checks.same_device(op, k=k, v=v, block_table=table)


def packed(
    k: torch.Tensor,
    v: torch.Tensor,
    table: torch.Tensor,
    cu_seqlens: torch.Tensor,
    longest: int,
    starts: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Copies of the sequences' keys and values, one after the other: ``(tokens, kv_heads, head_dim)``.

    Without a wait for the device: on a GPU there is room for ``longest`` tokens of each sequence, and what
    stands after the last is not attended to. In place of blocks that the cache does not have others are read.

    Args:
        table: ``(batch, max_blocks)`` int32.
        cu_seqlens: ``(batch + 1,)`` int32: 0, then the running total of lengths.
        starts: ``(batch,)``: where each sequence begins in its blocks; None: at 0.
    """
    blocks, size = k.shape[:2]
    batch, counted = table.shape[0], cu_seqlens.device.type == "cpu" and not traced(cu_seqlens)
    total = int(cu_seqlens[-1]) if counted else batch * longest
    at = torch.arange(total if batch and blocks and table.shape[1] else 0, device=k.device)
    row = torch.searchsorted(cu_seqlens[1:].long(), at, right=True).clamp_(max=batch - 1)
    place = at - cu_seqlens[row]
    if starts is not None:
        place = place + starts[row]
    place = place.clamp(0, table.shape[1] * size - 1)
    block = table[row, place // size].long().clamp(0, blocks - 1)
    offset = place % size
    return k[block, offset], v[block, offset]
