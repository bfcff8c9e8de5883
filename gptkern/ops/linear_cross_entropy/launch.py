"""The launches of the fused head and loss, one chunk of tokens at a time.

If gradients are needed and the loss is a scalar, the forward pass already computes them, chunk by chunk, so
that each logit is multiplied out once; the backward pass scales them. With ``reduction="none"`` the upstream
gradient differs from token to token, and the backward pass computes the chunks again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from gptkern.ops import _launch
from gptkern.ops._triton import triton
from gptkern.ops.linear_cross_entropy import kernels
from gptkern.ops.linear_cross_entropy.checks import OP, Settings

# Bytes of one chunk's exponentials: enough rows to fill a GPU with tiles, and at GPT-2's vocabulary at most
# 8192 of them.
_LEAST_WORKSPACE, _MOST_WORKSPACE = 32 << 20, 832 << 20
_CHUNK_SHARE = 8


class Head(NamedTuple):
    """The head: ``weight (vocab, width)`` and ``bias (vocab,)`` or None."""

    weight: torch.Tensor
    bias: torch.Tensor | None


class Needs(NamedTuple):
    """The inputs that need a gradient."""

    hidden: bool
    weight: bool
    bias: bool


@dataclass
class _Chunk:
    """One chunk of tokens: its rows, and the results of the forward kernels that gradients need."""

    hidden: torch.Tensor
    targets: torch.Tensor
    exp: torch.Tensor
    tile_max: torch.Tensor
    row_max: torch.Tensor
    log_sum: torch.Tensor


@dataclass
class _Loss:
    """The constants of a call's launches; ``tile`` is the number of logits in a vocabulary tile."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    ignore_index: int
    z_loss: float
    label_smoothing: float
    tile: int

    @property
    def n_tiles(self) -> int:
        return -(-self.weight.shape[0] // self.tile)

    def launch_row(self, kernel: str) -> dict[str, Any]:
        """The launch table's row of a kernel: tile sizes, warps, stages."""
        dtype = "fp32" if self.weight.dtype == torch.float32 else "half"
        return _launch.config(f"{OP}_{kernel}", self.weight.device, dtype=dtype)


def chunk_tokens(tokens: int, padded_vocab: int, itemsize: int) -> int:
    """Tokens of one chunk: an eighth of the batch, within fixed bounds of workspace; a multiple of 128."""
    workspace = tokens * padded_vocab * itemsize // _CHUNK_SHARE
    workspace = min(max(workspace, _LEAST_WORKSPACE), _MOST_WORKSPACE)
    rows = workspace // (padded_vocab * itemsize) // 128 * 128
    return max(128, min(rows, -(-tokens // 128) * 128))


def _chunk_forward(
    loss: _Loss, hidden: torch.Tensor, targets: torch.Tensor, exp: torch.Tensor, save_exp: bool
) -> tuple[torch.Tensor, _Chunk]:
    """(losses ``(tokens,)`` fp32, the chunk's state for its gradients)."""
    (tokens, width), vocab, n_tiles = hidden.shape, loss.weight.shape[0], loss.n_tiles
    per_tile = hidden.new_empty((3, tokens, n_tiles), dtype=torch.float32)
    per_token = hidden.new_empty((4, tokens), dtype=torch.float32)
    tile_max, tile_sum, tile_total = per_tile.unbind(0)
    target_logit, losses, row_max, log_sum = per_token.unbind(0)
    smoothing = loss.label_smoothing > 0.0
    row = loss.launch_row("logits")
    _launch.launch(
        kernels.logits_kernel,
        (triton.cdiv(tokens, row["BLOCK_M"]) * n_tiles,),
        hidden, loss.weight, loss.bias, targets, exp, tile_max, tile_sum, tile_total, target_logit,
        tokens, vocab, width, n_tiles, hidden.stride(0), loss.weight.stride(0), n_tiles * loss.tile,
        KEEP_EXP=save_exp, SMOOTHING=smoothing, EVEN_K=width % row["BLOCK_K"] == 0, **row,
    )  # fmt: skip
    row = loss.launch_row("loss")
    _launch.launch(
        kernels.loss_kernel,
        (triton.cdiv(tokens, row["BLOCK_M"]),),
        tile_max, tile_sum, tile_total, target_logit, targets, losses, row_max, log_sum,
        tokens, vocab, n_tiles, loss.ignore_index, loss.z_loss, loss.label_smoothing,
        SMOOTHING=smoothing, **row,
    )  # fmt: skip
    return losses, _Chunk(hidden, targets, exp, tile_max, row_max, log_sum)


def _chunk_dhidden(loss: _Loss, chunk: _Chunk, scale: torch.Tensor, dhidden: torch.Tensor) -> None:
    """Writes the gradient of the chunk's hidden states."""
    (tokens, width), vocab, n_tiles = chunk.hidden.shape, loss.weight.shape[0], loss.n_tiles
    row = loss.launch_row("dhidden")
    _launch.launch(
        kernels.dhidden_kernel,
        (triton.cdiv(tokens, row["BLOCK_M"]) * triton.cdiv(width, row["BLOCK_N"]),),
        chunk.exp, chunk.tile_max, chunk.row_max, chunk.log_sum, chunk.targets, scale, loss.weight, dhidden,
        tokens, vocab, width, n_tiles, n_tiles * loss.tile, scale.stride(0) if scale.dim() else 0,
        loss.weight.stride(0), loss.ignore_index, loss.z_loss, loss.label_smoothing,
        SMOOTHING=loss.label_smoothing > 0.0, TILE=loss.tile, **row,
    )  # fmt: skip


def _chunk_dweight(
    loss: _Loss,
    chunk: _Chunk,
    scale: torch.Tensor,
    dweight: torch.Tensor,
    dbias: torch.Tensor | None,
    first: bool,
) -> None:
    """Adds the chunk's part of the gradients of weight and bias; the first chunk stores it."""
    (tokens, width), vocab, n_tiles = chunk.hidden.shape, loss.weight.shape[0], loss.n_tiles
    row = loss.launch_row("dweight")
    _launch.launch(
        kernels.dweight_kernel,
        (triton.cdiv(vocab, row["BLOCK_M"]) * triton.cdiv(width, row["BLOCK_N"]),),
        chunk.exp, chunk.tile_max, chunk.row_max, chunk.log_sum, chunk.targets, scale, chunk.hidden, dweight,
        dbias,
        tokens, vocab, width, n_tiles, n_tiles * loss.tile, scale.stride(0) if scale.dim() else 0,
        chunk.hidden.stride(0), loss.ignore_index, loss.z_loss, loss.label_smoothing,
        FIRST=first, TOKEN_SCALE=scale.dim() > 0, SMOOTHING=loss.label_smoothing > 0.0,
        TILE=loss.tile, **row,
    )  # fmt: skip


def _run(
    hidden: torch.Tensor,
    head: Head,
    targets: torch.Tensor,
    settings: Settings,
    scale: torch.Tensor,
    needs: Needs,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(losses ``(tokens,)``, dhidden, dweight and dbias in fp32): a gradient that is not needed is empty.

    ``scale`` is the upstream gradient: one number, or one for each token.
    """
    (weight, bias), (hidden_grad, weight_grad, bias_grad) = head, needs
    loss = _Loss(weight, bias, settings.ignore_index, settings.z_loss, settings.label_smoothing, 0)
    loss.tile = loss.launch_row("logits")["BLOCK_N"]
    tokens, width = hidden.shape
    # The bias's gradient comes out of the weight's product.
    head_grad = weight_grad or bias_grad
    needs_exp = hidden_grad or head_grad
    padded = loss.n_tiles * loss.tile
    chunk = chunk_tokens(tokens, padded, hidden.element_size())
    exp = hidden.new_empty((min(chunk, tokens), padded) if needs_exp else (0,))
    losses = hidden.new_empty(tokens, dtype=torch.float32)
    dhidden = hidden.new_empty((tokens, width) if hidden_grad else (0,))
    dweight = hidden.new_empty(weight.shape if head_grad else (0,), dtype=torch.float32)
    dbias = hidden.new_empty(weight.shape[0] if bias_grad else 0, dtype=torch.float32)
    if not tokens:
        dweight.zero_()
        dbias.zero_()
    with _launch.on_device(hidden):
        for start in range(0, tokens, chunk):
            part = slice(start, start + chunk)
            losses[part], state = _chunk_forward(loss, hidden[part], targets[part], exp, needs_exp)
            upstream = scale[part] if scale.dim() else scale
            if hidden_grad:
                _chunk_dhidden(loss, state, upstream, dhidden[part])
            if head_grad:
                _chunk_dweight(loss, state, upstream, dweight, dbias if bias_grad else None, start == 0)
    return losses, dhidden, dweight if weight_grad else dweight.new_empty(0), dbias


def forward(
    hidden: torch.Tensor, head: Head, targets: torch.Tensor, settings: Settings, needs: Needs
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(loss, dhidden, dweight, dbias): empty gradients if not needed or the loss is no scalar."""
    rows = hidden.view(-1, hidden.shape[-1]).to(settings.compute)
    target_rows = targets.reshape(-1)
    mean_of = scale = torch.ones((), device=hidden.device)
    if settings.reduction == "mean":
        counted = (target_rows != settings.ignore_index).sum()
        # If no token counts the loss is 0 * inf, which is NaN, and all gradients are 0.
        mean_of, scale = 1.0 / counted, 1.0 / counted.clamp(min=1)
    per_token = settings.reduction == "none"
    computed = Needs(False, False, False) if per_token else needs
    cast = Head(head.weight.to(settings.compute), head.bias)
    losses, dhidden, dweight, dbias = _run(rows, cast, target_rows, settings, scale, computed)
    loss = losses.view(targets.shape) if per_token else losses.sum() * mean_of
    if computed.hidden:
        dhidden = dhidden.view(hidden.shape)
    return loss, dhidden.to(hidden.dtype), dweight.to(head.weight.dtype), _bias_grad(dbias, head)


def backward_per_token(
    grad: torch.Tensor,
    hidden: torch.Tensor,
    head: Head,
    targets: torch.Tensor,
    settings: Settings,
    needs: Needs,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dhidden, dweight, dbias) for ``reduction="none"``; ``grad`` has one number for each token."""
    rows, target_rows = hidden.view(-1, hidden.shape[-1]).to(settings.compute), targets.reshape(-1)
    # An ignored token has no gradient, whatever the upstream one: 0 times NaN is NaN.
    upstream = grad.reshape(-1).masked_fill(target_rows == settings.ignore_index, 0.0)
    cast = Head(head.weight.to(settings.compute), head.bias)
    _, dhidden, dweight, dbias = _run(rows, cast, target_rows, settings, upstream, needs)
    dhidden = (dhidden.view(hidden.shape) if needs.hidden else dhidden).to(hidden.dtype)
    return dhidden, dweight.to(head.weight.dtype), _bias_grad(dbias, head)


def _bias_grad(dbias: torch.Tensor, head: Head) -> torch.Tensor:
    return dbias.to(head.weight.dtype if head.bias is None else head.bias.dtype)
