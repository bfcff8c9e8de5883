"""The language model's head and its cross-entropy, fused."""

from __future__ import annotations

import torch

from gptkern.ops._dispatch import autocast_dtype, needs_grad, traced, use_kernel
from gptkern.ops.linear_cross_entropy import launch, reference
from gptkern.ops.linear_cross_entropy.checks import Settings, check
from gptkern.ops.linear_cross_entropy.launch import Head, Needs
from gptkern.ops.linear_cross_entropy.register import LinearCrossEntropy


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
) -> torch.Tensor:
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
        z_loss: Adds ``z_loss * logsumexp(logits)**2`` to each token's loss (Chowdhery et al. 2022).
        bias: ``(vocab,)`` of any floating dtype, added to the logits in fp32; None: none.
        label_smoothing: Share of the target spread evenly over the vocabulary, 0 to 1.

    Returns:
        fp32 (float64 for float64 input): a scalar, or ``targets``' shape for ``"none"``.

    Peak memory beyond the gradients is one chunk's exponentials, at most 832 MiB however many
    tokens and words there are, and an fp32 copy of the weight's gradient. Deterministic.

    Raises:
        TypeError: A dtype that is not accepted.
        ValueError: Shapes, strides or settings that are not accepted; on a CPU also a target outside the
            vocabulary. On a GPU, where the check would have to wait, such a token's loss is NaN.
    """
    check(hidden, weight, bias, targets, Settings(ignore_index, reduction, z_loss, label_smoothing, None))
    values = (ignore_index, reduction, float(z_loss), float(label_smoothing))
    if not use_kernel(hidden):
        return reference.linear_cross_entropy(hidden, weight, targets, *values, bias)
    cast = autocast_dtype(hidden) if hidden.dtype != torch.float64 else None
    settings = Settings(*values, cast or hidden.dtype)
    if traced(hidden):
        grads = torch.is_grad_enabled()
        needs = (grads and hidden.requires_grad, grads and weight.requires_grad)
        loss: torch.Tensor = torch.ops.gptkern.linear_cross_entropy(
            hidden,
            weight,
            targets,
            *settings,
            *needs,
            bias,
            grads and bias is not None and bias.requires_grad,
        )[0]
        return loss
    if needs_grad(hidden, weight, bias):
        loss = LinearCrossEntropy.apply(hidden, weight, bias, targets, settings)
        return loss
    needs_none = Needs(False, False, False)
    return launch.forward(hidden, Head(weight, bias), targets, settings, needs_none)[0]
