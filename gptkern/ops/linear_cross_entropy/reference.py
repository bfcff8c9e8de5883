"""A language model's head and its loss, in plain PyTorch, a chunk of tokens at a time.

Per token, with ``z = weight @ hidden``, ``lse = log(sum(exp(z)))`` and smoothing ``s``:
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
) -> torch.Tensor:
    """Losses of ``hidden (tokens, width)``, in fp32 or, for float64 input, float64; 0 where ignored."""
    return logit_losses(F.linear(hidden, weight), targets, ignore_index, z_loss, label_smoothing)


def logit_losses(
    logits: torch.Tensor, targets: torch.Tensor, ignore_index: int, z_loss: float, label_smoothing: float
) -> torch.Tensor:
    """The same of the logits ``(tokens, vocab)`` themselves."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    found = F.cross_entropy(
        logits, targets, ignore_index=ignore_index, reduction="none", label_smoothing=label_smoothing
    )
    if z_loss:
        squares = logits.logsumexp(-1).square()
        found = found + z_loss * squares.masked_fill(targets == ignore_index, 0.0)
    return found


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    ignore_index: int,
    reduction: str,
    z_loss: float,
    label_smoothing: float,
) -> torch.Tensor:
    rows, wanted = hidden.flatten(0, -2), targets.flatten()
    chunk = max(1, CHUNK_LOGITS // weight.shape[0])
    settings = (ignore_index, z_loss, label_smoothing)
    if len(rows) <= chunk:
        losses = token_losses(rows, weight, wanted, *settings)
    else:
        # Recomputing a chunk's logits in the backward pass is what keeps only one chunk of them alive.
        pieces = [
            checkpoint(token_losses, h, weight, t, *settings, use_reentrant=False, preserve_rng_state=False)
            for h, t in zip(rows.split(chunk), wanted.split(chunk), strict=True)
        ]
        losses = torch.cat(pieces)
    if reduction == "none":
        return losses.view(targets.shape)
    return losses.sum() if reduction == "sum" else losses.sum() / (wanted != ignore_index).sum()
