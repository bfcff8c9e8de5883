"""The language model's head and its cross-entropy, fused."""

from __future__ import annotations

from typing import Literal, NamedTuple, overload

import torch

from gptkern.ops import _checks
from gptkern.ops._dispatch import autocast_dtype, needs_grad, traced, use_kernel
from gptkern.ops.linear_cross_entropy import chunked, launch, reference, register
from gptkern.ops.linear_cross_entropy.checks import OP, Head, Settings, check
from gptkern.ops.linear_cross_entropy.launch import Needs


class CrossEntropy(NamedTuple):
    """A loss and what was asked for beside it.

    Attributes:
        loss: As ``linear_cross_entropy`` returns it alone.
        z_loss: The part of the loss that is z-loss, or None.
        token_accuracy: The share of the tokens, without ignored ones, whose target has the highest logit, or
            of one such token 0 or 1; None if not asked for.
    """

    loss: torch.Tensor
    z_loss: torch.Tensor | None
    token_accuracy: torch.Tensor | None


@overload
def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    ignore_index: int = ...,
    reduction: str = ...,
    z_loss: float = ...,
    label_smoothing: float = ...,
    *,
    bias: torch.Tensor | None = ...,
    ce_weight: torch.Tensor | None = ...,
    softcap: float | None = ...,
    return_z_loss: Literal[False] = ...,
    return_token_accuracy: Literal[False] = ...,
) -> torch.Tensor: ...
@overload
def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    ignore_index: int = ...,
    reduction: str = ...,
    z_loss: float = ...,
    label_smoothing: float = ...,
    *,
    bias: torch.Tensor | None = ...,
    ce_weight: torch.Tensor | None = ...,
    softcap: float | None = ...,
    return_z_loss: bool = ...,
    return_token_accuracy: bool = ...,
) -> torch.Tensor | CrossEntropy: ...
def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    ignore_index: int = -100,
    reduction: str = "mean",
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    *,
    bias: torch.Tensor | None = None,
    ce_weight: torch.Tensor | None = None,
    softcap: float | None = None,
    return_z_loss: bool = False,
    return_token_accuracy: bool = False,
) -> torch.Tensor | CrossEntropy:
    """Cross-entropy of ``hidden @ weight.T + bias`` against ``targets``; the batch's logits never exist.

    Args:
        hidden: ``(..., width)`` float32, float16 or bfloat16 (on CPU float64 too); its leading
            dimensions must be viewable as one, the last contiguous.
        weight: ``(vocab, width)``, hidden's dtype; rows may be any stride apart. Under autocast both
            are cast to its dtype, and the weight's gradient comes back in the weight's own.
        targets: ``(...)`` int64, hidden's leading dimensions; 0 to ``vocab - 1``, or ``ignore_index``.
        ignore_index: Target of the tokens that are left out of loss and gradient.
        reduction: ``"mean"`` over the tokens that are not ignored (NaN if all are), ``"sum"``, or
            ``"none"``: one loss for each token, 0 if it is ignored.
        z_loss: Adds ``z_loss * logsumexp(logits)**2`` to each token's loss (Chowdhery et al. 2022);
            ``lse_square_scale`` of flash-attn and Liger.
        label_smoothing: Share of the target spread evenly over the vocabulary, 0 to 1.
        bias: ``(vocab,)`` of any floating dtype, added to the logits in fp32; None: none.
        ce_weight: ``(vocab,)`` of any floating dtype: the weight of each class, as ``weight`` of
            ``torch.nn.functional.cross_entropy``. A mean then divides by the sum of the targets' weights; the
            z-loss has none, and its mean is over the tokens. No gradient.
        softcap: Logits, with their bias, become ``softcap * tanh(logits / softcap)``; None: as they are.
        return_z_loss: Also return the part of the loss that is z-loss, without a gradient of its own.
        return_token_accuracy: Also return whether the target has the highest logit, or the first of equal
            ones: the share of the tokens that are not ignored, or one number a token for ``"none"``.

    Returns:
        fp32 (float64 for float64 input): a scalar, or ``targets``' shape for ``"none"``; a ``CrossEntropy``
        if ``return_z_loss`` or ``return_token_accuracy`` asks for more.

    Peak memory beyond the gradients is one chunk's exponentials, at most 832 MiB however many
    tokens and words there are, and an fp32 copy of the weight's gradient. Deterministic.

    Raises:
        TypeError: A dtype that is not accepted.
        ValueError: Shapes, strides or settings that are not accepted, ``return_z_loss`` without a z-loss; on
            a CPU also a target outside the vocabulary. On a GPU, where the check would have to wait, such a
            token's loss is NaN.
    """
    _checks.positive(OP, "softcap", softcap, none=True)
    z_loss = float(_checks.number(OP, "z_loss", z_loss))
    label_smoothing = float(_checks.number(OP, "label_smoothing", label_smoothing))
    if return_z_loss and z_loss == 0.0:
        raise ValueError(f"{OP}: return_z_loss is True with z_loss 0.0: there is none to return")
    head = Head(weight, bias, ce_weight)
    values = (ignore_index, reduction, z_loss, label_smoothing, float(softcap or 0.0))
    settings = Settings(*values, return_token_accuracy, None)
    check(hidden, head, targets, settings)
    loss, z_part, accuracy = _result(hidden, head, targets, settings)
    if not return_z_loss and not return_token_accuracy:
        return loss
    return CrossEntropy(
        loss,
        z_part.detach() if return_z_loss else None,
        accuracy.detach() if return_token_accuracy else None,
    )


def _result(
    hidden: torch.Tensor, head: Head, targets: torch.Tensor, settings: Settings
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(loss, z-loss, accuracy) of checked arguments."""
    if not use_kernel(hidden):
        numbers = reference.Settings(settings.ignore_index, *settings[2:5])
        return chunked.linear_cross_entropy(
            hidden, head, targets, numbers, settings.reduction, settings.accuracy
        )
    cast = autocast_dtype(hidden) if hidden.dtype != torch.float64 else None
    settings = settings._replace(compute=cast or hidden.dtype)
    grads = torch.is_grad_enabled()
    needs = Needs(*(grads and t is not None and t.requires_grad for t in (hidden, head.weight, head.bias)))
    if traced(hidden):
        op = torch.ops.gptkern.linear_cross_entropy
        loss, z_loss, accuracy, *_ = op(*register.arguments(hidden, head, targets, settings, needs))
    elif needs_grad(hidden, head.weight, head.bias):
        loss, z_loss, accuracy = register.LinearCrossEntropy.apply(hidden, *head, targets, settings)
    else:
        loss, z_loss, accuracy, *_ = launch.forward(hidden, head, targets, settings, needs)
    return loss, z_loss, accuracy
