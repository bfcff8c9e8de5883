"""The beginning of a decode step, in plain PyTorch."""

import torch


def decode_embed(
    tokens: torch.Tensor,
    live: torch.Tensor,
    token_weight: torch.Tensor,
    position_weight: torch.Tensor | None,
    page_table: torch.Tensor,
    seq_lens: torch.Tensor,
    page_size: int,
    position_offset: int = 0,
    scale: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(embeddings ``(rows, width)``, cache slots ``(rows,)``); ``seq_lens`` grows by one in place."""
    alive = torch.arange(len(tokens), device=tokens.device) < live
    positions = seq_lens.long() * alive
    x = token_weight[tokens * alive]
    if scale != 1.0:
        x = x * scale
    if position_weight is not None:
        x = x + position_weight[positions + position_offset]
    pages = page_table.gather(1, (positions // page_size)[:, None])[:, 0].long()
    slots = torch.where(alive, pages * page_size + positions % page_size, -1)
    seq_lens += alive
    return x.masked_fill(~alive[:, None], 0.0), slots
