"""``torch.ops.gptkern.decode_embed``, for torch.compile and export."""

from __future__ import annotations

from typing import Any

import torch

from gptkern.ops._dispatch import use_kernel
from gptkern.ops._register import register
from gptkern.ops.decode_embed import checks, launch, reference
from gptkern.ops.decode_embed.launch import EmbedArguments

Two = tuple[torch.Tensor, torch.Tensor]


def _embed(*arguments: Any) -> Two:
    a = EmbedArguments(*arguments)
    checks.check("decode_embed", a)
    return launch.embed(a) if use_kernel(a.token_weight) else reference.decode_embed(*a)


def _fake(*arguments: Any) -> Two:
    a = EmbedArguments(*arguments)
    rows = a.tokens.shape[0]
    return a.token_weight.new_empty((rows, a.token_weight.shape[1])), a.tokens.new_empty(rows)


register(
    "decode_embed(Tensor tokens, Tensor live, Tensor token_weight, Tensor? position_weight, "
    "Tensor page_table, Tensor(a!) seq_lens, SymInt page_size, "
    "int position_offset=0, float scale=1.0) -> (Tensor, Tensor)",
    _embed,
    fake=_fake,
)
