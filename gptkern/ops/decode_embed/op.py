"""The beginning of a decode step, one launch."""

from __future__ import annotations

import torch

from gptkern.ops._dispatch import call_key, needs_grad, traced, use_kernel
from gptkern.ops._launch import Again, Plans, on_device, repeated
from gptkern.ops.decode_embed import checks, launch, reference, register  # noqa: F401  (torch.ops)
from gptkern.ops.decode_embed.launch import EmbedArguments

_plans: Plans[Again] = Plans()


def decode_embed(
    tokens: torch.Tensor,
    live: torch.Tensor,
    token_weight: torch.Tensor,
    position_weight: torch.Tensor | None,
    page_table: torch.Tensor,
    seq_lens: torch.Tensor,
    page_size: int,
    *,
    position_offset: int = 0,
    scale: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token and position embeddings of each sequence's next token, whose length then grows by one.

    Forward only.

    Args:
        tokens: ``(rows,)`` int64. A token outside the vocabulary, or a position without a weight or without
            a page, is an error on a CPU. On a GPU, where a check would stall, the row becomes NaN, and a
            position without a page gets no slot.
        live: ``(1,)`` int32: the number of rows that are not padding. Padding rows come last; they get
            zeros and no slot.
        token_weight: ``(vocabulary, width)``.
        position_weight: ``(positions, width)``, of the same dtype; None: positions are not embeddings.
        page_table: ``(rows, max_pages)`` int32: the pages of each sequence, that of its next token included.
        seq_lens: ``(rows,)`` int32: tokens in each sequence's cache, which is the position of its next
            token. Raised by one in place.
        page_size: Tokens in a page.
        position_offset: Rows of ``position_weight`` before that of position 0 (OPT: 2).
        scale: Factor on the token's embedding, before that of its position is added (Gemma).

    Returns:
        (``(rows, width)`` in the weights' dtype, ``(rows,)`` int64 cache slots, -1 for padding).

    Raises:
        TypeError, ValueError: an argument is not as described here, or a weight requires grad on a GPU
            or under ``torch.compile``.
    """
    op = "decode_embed"
    a = EmbedArguments(
        tokens, live, token_weight, position_weight, page_table, seq_lens, page_size, position_offset, scale
    )
    key = call_key(a[:6], *a[6:])
    if _plans.get(key) is None:
        checks.check(op, a)
    else:
        checks.check_values(op, a)
    compiling = traced(token_weight)
    if not (compiling or use_kernel(token_weight)):
        return reference.decode_embed(*a)
    if needs_grad(token_weight, position_weight):
        raise ValueError(f"{op}: a weight requires grad; it is forward only: use torch.no_grad()")
    if compiling:
        x, slots = torch.ops.gptkern.decode_embed(*a)
        return x, slots
    with on_device(tokens):
        x, slots = repeated(_plans, key, a[:6], lambda: launch.embed(a))
    return x, slots
