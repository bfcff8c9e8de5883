"""Launches of the kernels for Hopper: the calls that they serve, and their arguments."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from gptkern.ops import _launch
from gptkern.ops._hopper import TILE_N, aligned, multiply, runs_gluon
from gptkern.ops.linear_cross_entropy.checks import OP, Head, Settings
from gptkern.ops.linear_cross_entropy.kernels_hopper import logits_hopper
from gptkern.ops.linear_cross_entropy.kernels_hopper_backward import dhidden_hopper, dweight_hopper

if TYPE_CHECKING:
    from gptkern.ops.linear_cross_entropy.launch import Factors, Statistics, _Loss


def _mapped(hidden: torch.Tensor) -> bool:
    """True if the copy engine can read these rows, whose width is a multiple of 16 bytes."""
    step = hidden.stride(0) * hidden.element_size()
    return hidden.data_ptr() % 16 == 0 and (hidden.shape[0] == 1 or (step > 0 and step % 16 == 0))


def _row(kernel: str, device: torch.device) -> dict[str, Any]:
    return _launch.config(f"{OP}_{kernel}_hopper", device)


def serves(hidden: torch.Tensor, head: Head, settings: Settings) -> bool:
    """True if the logits of ``hidden`` are the kernel's: half precision, long sums, a tile of words.

    Soft caps, class weights and accuracy are the other kernel's: here there are no registers for them.

    The number of tokens is not asked for: statistics are of tiles, whose width shows in a loss's last bits,
    and a token's loss is the same among others and alone.
    """
    weight = head.weight
    if settings.softcap or settings.accuracy or head.ce_weight is not None:
        return False
    if not (runs_gluon(hidden) and aligned(weight) and _mapped(hidden)):
        return False
    row = _row("logits", hidden.device)
    vocab, width = weight.shape
    return vocab >= TILE_N and width >= row["STAGES"] * row["BLOCK_K"] and width % 8 == 0


def serves_dweight(hidden: torch.Tensor, scale: torch.Tensor) -> bool:
    """True if a chunk of these tokens is a long sum, and they have one upstream gradient.

    For one of each token there are no registers.
    """
    row = _row("dweight", hidden.device)
    return not scale.dim() and bool(hidden.shape[0] >= row["STAGES"] * row["BLOCK_K"])


def logits(loss: _Loss, hidden: torch.Tensor, targets: torch.Tensor, stats: Statistics, save: bool) -> None:
    """Launch ``logits_kernel``'s counterpart."""
    (tokens, width), vocab = hidden.shape, loss.weight.shape[0]
    multiply(
        logits_hopper,
        _row("logits", hidden.device),
        *(tokens, vocab, (hidden, loss.weight.t())),
        *(loss.bias, targets, *stats[:4], stats.target_logit, tokens, vocab, width),
        KEEP_EXP=save,
        SMOOTHING=loss.flags["SMOOTHING"],
    )


def _smoothing(loss: _Loss) -> tuple[float, float]:
    """The label smoothing, and a word's share of it."""
    smoothing = loss.settings.label_smoothing
    return smoothing, smoothing / loss.weight.shape[0]


def dhidden(loss: _Loss, exp: torch.Tensor, factors: Factors, scale: torch.Tensor, out: torch.Tensor) -> None:
    """Launch ``dhidden_kernel``'s counterpart; ``out`` is contiguous."""
    (tokens, width), vocab = out.shape, loss.weight.shape[0]
    stride_s = scale.stride(0) if scale.dim() else 0
    multiply(
        dhidden_hopper,
        _row("dhidden", out.device),
        *(tokens, width, (exp[:tokens], loss.weight)),
        *(*factors, scale, out, tokens, vocab, width, stride_s, *_smoothing(loss)),
        SMOOTHING=loss.flags["SMOOTHING"],
    )


def dweight(
    loss: _Loss,
    hidden: torch.Tensor,
    exp: torch.Tensor,
    factors: Factors,
    scale: torch.Tensor,
    out: torch.Tensor,
    dbias: torch.Tensor | None,
    *,
    first: bool,
) -> None:
    """Launch ``dweight_kernel``'s counterpart; ``out`` and ``dbias`` hold the sums of the chunks before."""
    tokens, (vocab, width) = hidden.shape[0], out.shape
    multiply(
        dweight_hopper,
        _row("dweight", out.device),
        *(vocab, width, (exp[:tokens], hidden)),
        *(*factors, scale, out, dbias, tokens, vocab, width, *_smoothing(loss)),
        a_rows=False,
        SMOOTHING=loss.flags["SMOOTHING"],
        FIRST=first,
    )
