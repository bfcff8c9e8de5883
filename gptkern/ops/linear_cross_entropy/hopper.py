"""Launches of the kernels for Hopper: the calls that they serve, their tensor maps, their grids."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from gptkern.ops import _launch
from gptkern.ops._gluon import descriptor
from gptkern.ops._hopper import runs_gluon
from gptkern.ops.linear.hopper import aligned
from gptkern.ops.linear.kernels_hopper import BLOCK_M, BLOCK_N, ROWS
from gptkern.ops.linear_cross_entropy.checks import OP, Head, Settings
from gptkern.ops.linear_cross_entropy.kernels_hopper import logits_hopper
from gptkern.ops.linear_cross_entropy.kernels_hopper_backward import dhidden_hopper, dweight_hopper

if TYPE_CHECKING:
    from gptkern.ops.linear_cross_entropy.launch import Factors, Statistics, _Loss

TILE = int(BLOCK_N.value)


def _mapped(hidden: torch.Tensor) -> bool:
    """True if the copy engine can read these rows, whose width is a multiple of 16 bytes."""
    step = hidden.stride(0) * hidden.element_size()
    return hidden.data_ptr() % 16 == 0 and (hidden.shape[0] == 1 or (step > 0 and step % 16 == 0))


def _row(kernel: str, device: torch.device) -> dict[str, Any]:
    return _launch.config(f"{OP}_{kernel}_hopper", device)


def _grid(m: int, n: int, device: torch.device) -> tuple[int]:
    """Programs for the tiles of an (m, n) result."""
    tiles = -(-m // int(BLOCK_M.value)) * -(-n // TILE)
    return (min(tiles, _launch.multiprocessors(device)),)


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
    return vocab >= TILE and width >= row["STAGES"] * row["BLOCK_K"] and width % 8 == 0


def serves_dweight(hidden: torch.Tensor, scale: torch.Tensor) -> bool:
    """True if a chunk of these tokens is a long sum, and they have one upstream gradient.

    For one of each token there are no registers.
    """
    row = _row("dweight", hidden.device)
    return not scale.dim() and bool(hidden.shape[0] >= row["STAGES"] * row["BLOCK_K"])


def logits(loss: _Loss, hidden: torch.Tensor, targets: torch.Tensor, stats: Statistics, save: bool) -> None:
    """Launch ``logits_kernel``'s counterpart."""
    row = _row("logits", hidden.device)
    (tokens, width), vocab = hidden.shape, loss.weight.shape[0]
    _launch.launch(
        logits_hopper,
        _grid(tokens, vocab, hidden.device),
        descriptor(hidden, [ROWS.value, row["BLOCK_K"]]),
        descriptor(loss.weight, [TILE, row["BLOCK_K"]]),
        *(loss.bias, targets, *stats[:4], stats.target_logit),
        *(tokens, vocab, width),
        KEEP_EXP=save,
        SMOOTHING=loss.flags["SMOOTHING"],
        **row,
    )


def _smoothing(loss: _Loss) -> tuple[float, float]:
    """The label smoothing, and a word's share of it."""
    smoothing = loss.settings.label_smoothing
    return smoothing, smoothing / loss.weight.shape[0]


def dhidden(loss: _Loss, exp: torch.Tensor, factors: Factors, scale: torch.Tensor, out: torch.Tensor) -> None:
    """Launch ``dhidden_kernel``'s counterpart; ``out`` is contiguous."""
    row = _row("dhidden", out.device)
    (tokens, width), vocab = out.shape, loss.weight.shape[0]
    _launch.launch(
        dhidden_hopper,
        _grid(tokens, width, out.device),
        descriptor(exp[:tokens], [ROWS.value, row["BLOCK_K"]]),
        descriptor(loss.weight, [row["BLOCK_K"], TILE]),
        *(
            *factors,
            scale,
            out,
            tokens,
            vocab,
            width,
            scale.stride(0) if scale.dim() else 0,
            *_smoothing(loss),
        ),
        SMOOTHING=loss.flags["SMOOTHING"],
        **row,
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
    row = _row("dweight", out.device)
    tokens, (vocab, width) = hidden.shape[0], out.shape
    _launch.launch(
        dweight_hopper,
        _grid(vocab, width, out.device),
        descriptor(exp[:tokens], [row["BLOCK_K"], ROWS.value]),
        descriptor(hidden, [row["BLOCK_K"], TILE]),
        *(*factors, scale, out, dbias, tokens, vocab, width, *_smoothing(loss)),
        SMOOTHING=loss.flags["SMOOTHING"],
        FIRST=first,
        **row,
    )
