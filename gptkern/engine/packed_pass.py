"""Whole rows of tokens through a model, packed into one pass without a cache: for scores of given tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F

from gptkern.model.attend import PackedAttend
from gptkern.model.decoder import Decoder
from gptkern.model.taps import Taps

# The head takes so many rows at once: logits of GPT-2's vocabulary are 200 kB a row.
ROWS_AT_ONCE = 256


def hidden_states(
    model: Decoder, rows: Sequence[Sequence[int]], taps: Taps | None = None
) -> tuple[torch.Tensor, ...]:
    """The hidden states that the head reads, ``(tokens, width)`` of each row; no row sees another."""
    lengths = [len(row) for row in rows]
    ends = F.pad(torch.tensor(lengths, device="cpu").cumsum(0), (1, 0))
    ids = torch.tensor([token for row in rows for token in row], device=model.device)
    positions = torch.cat([torch.arange(count, device=model.device) for count in lengths])
    attend = PackedAttend(ends.to(model.device, torch.int32), max(lengths), 0.0, dropout=False)
    hidden: tuple[torch.Tensor, ...] = model.transformer(ids, positions, attend, taps).split(lengths)
    return hidden


def logits_at(
    model: Decoder, hidden: torch.Tensor, targets: Sequence[int]
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The logits of hidden states ``(tokens, width)``, fp32, some rows at a time.

    Yields:
        ``(rows, vocab_size)`` logits and the ``(rows, 1)`` targets in their places.
    """
    wanted = torch.tensor(list(targets), device=model.device)[:, None]
    for rows, part in zip(hidden.split(ROWS_AT_ONCE), wanted.split(ROWS_AT_ONCE), strict=True):
        yield model.logits(rows).float(), part
