"""A language model's head and its loss, in plain PyTorch, a chunk of tokens at a time.

Per token, with ``z = weight @ hidden + bias`` or its soft cap ``cap * tanh(z / cap)``,
``lse = log(sum(exp(z)))``, smoothing ``s`` and class weights ``c``, 1 unless given:
``(1 - s) * c[target] * (lse - z[target]) + s * mean(c * (lse - z)) + z_loss * lse**2``
(label smoothing: Szegedy et al. 2016, section 7; z-loss: Chowdhery et al. 2022, section 5; soft cap: Gemma 2,
2024, section 2). The mean divides by the sum of the targets' class weights, and the z-loss by the tokens.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

CHUNK_LOGITS = 1 << 23
Maybe = torch.Tensor | None


class Losses(NamedTuple):
    """Per token: loss without z-loss, z-loss, and 1 where the target has the highest logit, if asked."""

    loss: torch.Tensor
    z_loss: torch.Tensor
    correct: torch.Tensor


class Settings(NamedTuple):
    """The numbers in a token's loss."""

    ignore_index: int
    z_loss: float
    label_smoothing: float
    softcap: float = 0.0


def token_losses(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: Maybe,
    class_weights: Maybe,
    targets: torch.Tensor,
    settings: Settings,
    accuracy: bool,
) -> Losses:
    """Losses of ``hidden (tokens, width)``, fp32 (float64 for float64 input); 0 for ignored tokens."""
    return product_losses(F.linear(hidden, weight), bias, class_weights, targets, settings, accuracy)


def product_losses(
    products: torch.Tensor,
    bias: Maybe,
    class_weights: Maybe,
    targets: torch.Tensor,
    settings: Settings,
    accuracy: bool,
) -> Losses:
    """``token_losses`` of ``products (tokens, vocab)``, which are ``hidden @ weight.T``."""
    logits = products.to(torch.promote_types(products.dtype, torch.float32))
    if bias is not None:
        logits = logits + bias.to(logits.dtype)
    if settings.softcap:
        logits = settings.softcap * torch.tanh(logits / settings.softcap)
    return _logit_losses(logits, targets, settings, class_weights, accuracy)


def _logit_losses(
    logits: torch.Tensor, targets: torch.Tensor, settings: Settings, class_weights: Maybe, accuracy: bool
) -> Losses:
    ignore_index, z_loss, label_smoothing, _ = settings
    losses = F.cross_entropy(
        logits,
        targets,
        weight=None if class_weights is None else class_weights.to(logits.dtype),
        ignore_index=ignore_index,
        reduction="none",
        label_smoothing=label_smoothing,
    )
    ignored = targets == ignore_index
    squares = correct = torch.zeros_like(losses)
    if z_loss:
        squares = (z_loss * logits.logsumexp(-1).square()).masked_fill(ignored, 0.0)
    if accuracy:
        correct = ((logits.argmax(-1) == targets) & ~ignored).to(losses.dtype)
    return Losses(losses, squares, correct)


def logit_losses(
    logits: torch.Tensor, targets: torch.Tensor, ignore_index: int, z_loss: float, label_smoothing: float
) -> torch.Tensor:
    """Losses of logits ``(tokens, vocab)``, z-loss included, as ``token_losses``."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    losses = _logit_losses(wide, targets, Settings(ignore_index, z_loss, label_smoothing), None, False)
    return losses.loss + losses.z_loss if z_loss else losses.loss


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: Maybe,
    class_weights: Maybe,
    targets: torch.Tensor,
    settings: Settings,
    reduction: str,
    accuracy: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(loss, its part that is z-loss, token accuracy: 0 unless asked)."""
    rows, target_rows = hidden.flatten(0, -2), targets.flatten()
    chunk = chunk_tokens(weight.shape[0])
    head, chosen = (weight, bias, class_weights), (settings, accuracy)
    if len(rows) <= chunk:
        losses = token_losses(rows, *head, target_rows, *chosen)
    else:
        # The backward pass recomputes a chunk's logits, so that one chunk of them is alive at a time.
        pieces = [
            checkpoint(token_losses, h, *head, t, *chosen, use_reentrant=False, preserve_rng_state=False)
            for h, t in zip(rows.split(chunk), target_rows.split(chunk), strict=True)
        ]
        losses = joined(pieces)
    if reduction == "none":
        loss, squares, correct = (part.view(targets.shape) for part in losses)
        return loss + squares, squares, correct
    return reduced(losses, target_rows, class_weights, settings, reduction)


def chunk_tokens(vocab: int) -> int:
    """The tokens of one chunk."""
    return max(1, CHUNK_LOGITS // vocab)


def joined(pieces: list[Losses]) -> Losses:
    """The losses of all chunks."""
    return Losses(*(torch.cat(parts) for parts in zip(*pieces, strict=True)))


def reduced(
    losses: Losses, targets: torch.Tensor, class_weights: Maybe, settings: Settings, reduction: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(loss, its part that is z-loss, token accuracy) of the losses of ``targets (tokens,)``."""
    of_loss, of_square = divisors(targets, class_weights, settings, reduction)
    square = losses.z_loss.sum() / of_square
    hits = losses.correct.sum() / (targets != settings.ignore_index).sum()
    return losses.loss.sum() / of_loss + square, square, hits


def divisors(
    targets: torch.Tensor, class_weights: Maybe, settings: Settings, reduction: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """The divisors of the sum of the losses and of the z-losses; both 1 for ``"sum"``."""
    counted = targets != settings.ignore_index
    tokens = counted.sum()
    if reduction == "sum":
        return torch.ones_like(tokens), torch.ones_like(tokens)
    if class_weights is None:
        return tokens, tokens
    return class_weights[targets.masked_fill(~counted, 0)].masked_fill(~counted, 0.0).sum(), tokens
