"""A language model's head and its loss, in plain PyTorch, a chunk of tokens at a time.

Per token, with ``z = weight @ hidden + bias``, ``lse = log(sum(exp(z)))`` and smoothing ``s``:
``(1 - s) * (lse - z[target]) + s * (lse - mean(z)) + z_loss * lse**2``
(label smoothing: Szegedy et al. 2016, section 7; z-loss: Chowdhery et al. 2022, section 5).
"""

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

CHUNK_LOGITS = 1 << 23


def token_losses(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    ignore_index: int,
    z_loss: float,
    label_smoothing: float,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Losses of ``hidden (tokens, width)``, fp32 (float64 for float64 input); 0 for ignored tokens."""
    logits = F.linear(hidden, weight)
    if bias is not None:
        wide = torch.promote_types(logits.dtype, torch.float32)
        logits = logits.to(wide) + bias.to(wide)
    return logit_losses(logits, targets, ignore_index, z_loss, label_smoothing)


def logit_losses(
    logits: torch.Tensor, targets: torch.Tensor, ignore_index: int, z_loss: float, label_smoothing: float
) -> torch.Tensor:
    """Losses of logits ``(tokens, vocab)``, as ``token_losses``."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    losses = F.cross_entropy(
        logits, targets, ignore_index=ignore_index, reduction="none", label_smoothing=label_smoothing
    )
    if z_loss:
        squares = logits.logsumexp(-1).square()
        losses = losses + z_loss * squares.masked_fill(targets == ignore_index, 0.0)
    return losses


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    ignore_index: int,
    reduction: str,
    z_loss: float,
    label_smoothing: float,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    rows, target_rows = hidden.flatten(0, -2), targets.flatten()
    chunk = max(1, CHUNK_LOGITS // weight.shape[0])
    settings = (ignore_index, z_loss, label_smoothing, bias)
    if len(rows) <= chunk:
        losses = token_losses(rows, weight, target_rows, *settings)
    else:
        # The backward pass recomputes a chunk's logits, so that one chunk of them is alive at a time.
        pieces = [
            checkpoint(token_losses, h, weight, t, *settings, use_reentrant=False, preserve_rng_state=False)
            for h, t in zip(rows.split(chunk), target_rows.split(chunk), strict=True)
        ]
        losses = torch.cat(pieces)
    if reduction == "none":
        return losses.view(targets.shape)
    return losses.sum() if reduction == "sum" else losses.sum() / (target_rows != ignore_index).sum()
