"""Attention among the tokens of one forward pass: dense, packed, or through a cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NotRequired, Protocol, TypedDict, Unpack

import torch

from gptkern import ops


class AttendOptions(TypedDict):
    """Settings of a layer: the softmax scale, its window in tokens, the cap of its scores; None: none."""

    scale: float
    window: NotRequired[int | None]
    softcap: NotRequired[float | None]


class Attend(Protocol):
    """One of the ways; ``gptkern.engine.forward_pass`` has the third.

    Attributes:
        dropout: False leaves every dropout of the pass out, whatever mode a module is in: the mode is the
            model's, shared by all who use it, and a pass that only reads the model must not depend on it.
    """

    @property
    def dropout(self) -> bool: ...

    def attention(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Unpack[AttendOptions]
    ) -> torch.Tensor: ...


@dataclass
class DenseAttend:
    """Every row of the batch is a whole sequence: tensors ``(batch, seq, heads, head_dim)``."""

    dropout_p: float
    dropout: bool = True

    def attention(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Unpack[AttendOptions]
    ) -> torch.Tensor:
        return ops.flash_attention(q, k, v, dropout_p=self.dropout_p, **options)


@dataclass
class PackedAttend:
    """Sequences of different lengths, end to end: tensors ``(tokens, heads, head_dim)``."""

    cu_seqlens: torch.Tensor
    max_seqlen: int
    dropout_p: float
    dropout: bool = True

    def attention(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Unpack[AttendOptions]
    ) -> torch.Tensor:
        cu, longest = self.cu_seqlens, self.max_seqlen
        return ops.flash_attention_varlen(
            q, k, v, cu, cu, longest, longest, dropout_p=self.dropout_p, **options
        )
