"""The prompts of one call: their checks, and the forms that the model and the output need."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Prompts:
    """A batch of prompts.

    Attributes:
        ids: ``(batch, width)`` int64, the caller's tokens with their padding.
        mask: ``(batch, width)`` bool, True for tokens and False for padding; None if there is no padding.
        rows: The tokens of each prompt, without padding.
    """

    ids: torch.Tensor
    mask: torch.Tensor | None
    rows: list[list[int]]

    @property
    def width(self) -> int:
        """The number of tokens in a row, padding included."""
        return self.ids.shape[1]

    @property
    def longest(self) -> int:
        """The number of tokens in the longest prompt."""
        return max(map(len, self.rows))


def prompts(
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    device: torch.device,
    vocab_size: int,
    pad: int | None,
    eos: Sequence[int],
) -> Prompts:
    """Check a batch and bring it to the model's device.

    Without a mask, tokens equal to ``pad`` count as padding unless ``pad`` is an end-of-text token, as in
    transformers.

    Raises:
        TypeError, ValueError: Not integers ``(batch, width)``, an empty row, a token outside the
            vocabulary, a mask of another shape or other values than 0 and 1.
    """
    if not isinstance(input_ids, torch.Tensor):
        raise TypeError(
            f"generate: input_ids is {type(input_ids).__name__}; a torch.Tensor is needed"
            + ("; for text there is generate_text or stream" if isinstance(input_ids, str) else "")
        )
    if input_ids.dim() != 2 or input_ids.dtype not in (torch.int64, torch.int32) or not input_ids.numel():
        raise ValueError(
            f"generate: input_ids is {input_ids.dtype} of shape {tuple(input_ids.shape)}; "
            "integers of shape (batch, seq), neither of them 0, are needed"
        )
    ids = input_ids.to(torch.int64)
    if attention_mask is None:
        mask = ids != pad if pad is not None and pad not in eos else None
    else:
        mask = _mask(attention_mask, ids)
    if mask is not None and bool(mask.all()):
        mask = None
    rows = ids.tolist()
    if mask is not None:
        rows = [
            [t for t, real in zip(*row, strict=True) if real] for row in zip(rows, mask.tolist(), strict=True)
        ]
    for index, row in enumerate(rows):
        if not row:
            raise ValueError(
                f"generate: row {index} of the prompt is all padding; one token or more is needed"
            )
        if min(row) < 0 or max(row) >= vocab_size:
            bad = next(t for t in row if not 0 <= t < vocab_size)
            raise ValueError(
                f"generate: input_ids holds {bad}; token ids from 0 to {vocab_size - 1} are accepted"
            )
    return Prompts(ids.to(device), None if mask is None else mask.to(device), rows)


def _mask(attention_mask: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    if not isinstance(attention_mask, torch.Tensor):
        raise TypeError(
            f"generate: attention_mask is {type(attention_mask).__name__}; a torch.Tensor is needed"
        )
    if attention_mask.shape != ids.shape:
        raise ValueError(
            f"generate: attention_mask has shape {tuple(attention_mask.shape)}, "
            f"input_ids {tuple(ids.shape)}: they must be the same"
        )
    mask = attention_mask.to(ids.device)
    if bool(((mask != 0) & (mask != 1)).any()):
        raise ValueError("generate: attention_mask holds other values than 0 and 1")
    return mask.bool()
