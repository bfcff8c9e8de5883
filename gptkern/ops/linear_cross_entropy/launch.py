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
from gptkern.ops.linear_cross_entropy import hopper, kernels
from gptkern.ops.linear_cross_entropy.checks import OP, Head, Settings

# Bytes of one chunk's exponentials: enough rows to fill a GPU with tiles, and at GPT-2's vocabulary at most
# 8192 of them.
_LEAST_WORKSPACE, _MOST_WORKSPACE = 32 << 20, 832 << 20
_CHUNK_SHARE = 8


class Needs(NamedTuple):
    """The inputs that need a gradient."""

    hidden: bool
    weight: bool
    bias: bool


class Result(NamedTuple):
    """The loss, its part that is z-loss and the accuracy, each a scalar or of one number a token.

    Gradients that are not needed, and the accuracy unless asked, are empty.
    """

    loss: torch.Tensor
    z_loss: torch.Tensor
    accuracy: torch.Tensor
    dhidden: torch.Tensor
    dweight: torch.Tensor
    dbias: torch.Tensor


class Statistics(NamedTuple):
    """The results of a chunk's logits, as ``logits_kernel`` describes them."""

    exp: torch.Tensor
    tile_max: torch.Tensor
    tile_sum: torch.Tensor
    tile_total: torch.Tensor
    tile_best: torch.Tensor | None
    target_logit: torch.Tensor


class Factors(NamedTuple):
    """A chunk's numbers for the gradients' kernels on Hopper, as ``loss_kernel`` describes them."""

    factor: torch.Tensor
    word: torch.Tensor


@dataclass
class _Chunk:
    """One chunk of tokens: its rows, and the results of the forward kernels that gradients need."""

    hidden: torch.Tensor
    targets: torch.Tensor
    exp: torch.Tensor
    tile_max: torch.Tensor
    row_max: torch.Tensor
    log_sum: torch.Tensor
    factors: Factors | None


@dataclass
class _Loss:
    """The constants of a call's launches.

    Attributes:
        class_stats: fp32: the mean of the class weights, and the factor of the z-loss beside the loss.
        on_hopper: Whether the logits are those of the kernel for Hopper.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    ce_weight: torch.Tensor | None
    class_stats: torch.Tensor | None
    settings: Settings
    on_hopper: bool

    @property
    def tile(self) -> int:
        return hopper.TILE_N if self.on_hopper else int(self.launch_row("logits")["BLOCK_N"])

    @property
    def n_tiles(self) -> int:
        return -(-self.weight.shape[0] // self.tile)

    @property
    def numbers(self) -> tuple[float, float, float]:
        """The kernels' z_loss, label_smoothing and softcap."""
        return self.settings.z_loss, self.settings.label_smoothing, self.settings.softcap

    @property
    def flags(self) -> dict[str, bool]:
        """The kernels' flags that follow from the settings."""
        return {"SMOOTHING": self.settings.label_smoothing > 0.0, "SOFTCAP": self.settings.softcap > 0.0}

    def launch_row(self, kernel: str) -> dict[str, Any]:
        """The launch table's row of a kernel: tile sizes, warps, stages."""
        # With a cap the exponentials' buffer is fp32, and its tiles are as large as fp32 weights'.
        wide = self.weight.dtype == torch.float32 or (self.settings.softcap > 0.0 and kernel[0] == "d")
        dtype = "fp32" if wide else "half"
        return _launch.config(f"{OP}_{kernel}", self.weight.device, dtype=dtype)


def chunk_tokens(tokens: int, padded_vocab: int, itemsize: int) -> int:
    """Tokens of one chunk: an eighth of the batch, within fixed bounds of workspace; a multiple of 128."""
    workspace = tokens * padded_vocab * itemsize // _CHUNK_SHARE
    workspace = min(max(workspace, _LEAST_WORKSPACE), _MOST_WORKSPACE)
    rows = workspace // (padded_vocab * itemsize) // 128 * 128
    return max(128, min(rows, -(-tokens // 128) * 128))


def _chunk_logits(
    loss: _Loss, hidden: torch.Tensor, targets: torch.Tensor, stats: Statistics, save_exp: bool
) -> None:
    """Writes the statistics of the chunk's logits and, if asked, their exponentials."""
    if loss.on_hopper:
        hopper.logits(loss, hidden, targets, stats, save_exp)
        return
    (tokens, width), vocab, n_tiles = hidden.shape, loss.weight.shape[0], loss.n_tiles
    row = loss.launch_row("logits")
    _launch.launch(
        kernels.logits_kernel,
        (triton.cdiv(tokens, row["BLOCK_M"]) * n_tiles,),
        hidden, loss.weight, loss.bias, loss.ce_weight, targets, *stats,
        tokens, vocab, width, n_tiles, loss.settings.softcap,
        hidden.stride(0), loss.weight.stride(0), n_tiles * loss.tile,
        KEEP_EXP=save_exp, EVEN_K=width % row["BLOCK_K"] == 0, **loss.flags, **row,
    )  # fmt: skip


def _chunk_forward(
    loss: _Loss,
    hidden: torch.Tensor,
    targets: torch.Tensor,
    exp: torch.Tensor,
    save_exp: bool,
    outputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
) -> _Chunk:
    """The chunk's state for its gradients; its losses, z-losses and, if asked, hits go into ``outputs``."""
    tokens, vocab, n_tiles = hidden.shape[0], loss.weight.shape[0], loss.n_tiles
    per_tile = hidden.new_empty((3, tokens, n_tiles), dtype=torch.float32)
    per_token = hidden.new_empty((3, tokens), dtype=torch.float32)
    tile_max, tile_sum, tile_total = per_tile.unbind(0)
    target_logit, row_max, log_sum = per_token.unbind(0)
    (losses, squares, correct), best = outputs, None
    if loss.settings.accuracy:
        best = hidden.new_empty((tokens, n_tiles), dtype=torch.int32)
    stats = Statistics(exp, tile_max, tile_sum, tile_total, best, target_logit)
    _chunk_logits(loss, hidden, targets, stats, save_exp)
    factors = None
    if save_exp and loss.on_hopper:
        factor = hidden.new_empty((n_tiles, tokens), dtype=torch.float32)
        factors = Factors(factor, hidden.new_empty(tokens, dtype=torch.int32))
    row = loss.launch_row("loss")
    _launch.launch(
        kernels.loss_kernel,
        (triton.cdiv(tokens, row["BLOCK_M"]),),
        tile_max, tile_sum, tile_total, best, target_logit, targets, loss.ce_weight, loss.class_stats,
        losses, squares, correct if loss.settings.accuracy else None, row_max, log_sum,
        *(factors or (None, None)),
        tokens, vocab, n_tiles, loss.settings.ignore_index, *loss.numbers[:2],
        SMOOTHING=loss.flags["SMOOTHING"], **row,
    )  # fmt: skip
    return _Chunk(hidden, targets, exp, tile_max, row_max, log_sum, factors)


def _chunk_dhidden(loss: _Loss, chunk: _Chunk, scale: torch.Tensor, dhidden: torch.Tensor) -> None:
    """Writes the gradient of the chunk's hidden states."""
    if chunk.factors is not None:
        hopper.dhidden(loss, chunk.exp, chunk.factors, scale, dhidden)
        return
    (tokens, width), vocab, n_tiles = chunk.hidden.shape, loss.weight.shape[0], loss.n_tiles
    row = loss.launch_row("dhidden")
    _launch.launch(
        kernels.dhidden_kernel,
        (triton.cdiv(tokens, row["BLOCK_M"]) * triton.cdiv(width, row["BLOCK_N"]),),
        chunk.exp, chunk.tile_max, chunk.row_max, chunk.log_sum, chunk.targets,
        loss.ce_weight, loss.class_stats, scale, loss.weight, dhidden,
        tokens, vocab, width, n_tiles, n_tiles * loss.tile, scale.stride(0) if scale.dim() else 0,
        loss.weight.stride(0), loss.settings.ignore_index, *loss.numbers,
        TILE=loss.tile, **loss.flags, **row,
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
    if chunk.factors is not None and hopper.serves_dweight(chunk.hidden, scale):
        hopper.dweight(loss, chunk.hidden, chunk.exp, chunk.factors, scale, dweight, dbias, first=first)
        return
    (tokens, width), vocab, n_tiles = chunk.hidden.shape, loss.weight.shape[0], loss.n_tiles
    row = loss.launch_row("dweight")
    _launch.launch(
        kernels.dweight_kernel,
        (triton.cdiv(vocab, row["BLOCK_M"]) * triton.cdiv(width, row["BLOCK_N"]),),
        chunk.exp, chunk.tile_max, chunk.row_max, chunk.log_sum, chunk.targets,
        loss.ce_weight, loss.class_stats, scale, chunk.hidden, dweight, dbias,
        tokens, vocab, width, n_tiles, n_tiles * loss.tile, scale.stride(0) if scale.dim() else 0,
        chunk.hidden.stride(0), loss.settings.ignore_index, *loss.numbers,
        FIRST=first, TOKEN_SCALE=scale.dim() > 0, TILE=loss.tile, **loss.flags, **row,
    )  # fmt: skip


def _run(
    hidden: torch.Tensor,
    loss: _Loss,
    targets: torch.Tensor,
    scale: torch.Tensor,
    needs: Needs,
) -> Result:
    """Losses, z-losses and hits ``(tokens,)``, dweight and dbias in fp32.

    ``scale`` is the upstream gradient: one number, or one for each token.
    """
    (hidden_grad, weight_grad, bias_grad), weight = needs, loss.weight
    tokens, width = hidden.shape
    # The bias's gradient comes out of the weight's product.
    head_grad = weight_grad or bias_grad
    needs_exp = hidden_grad or head_grad
    padded = loss.n_tiles * loss.tile
    exp_dtype = torch.float32 if loss.flags["SOFTCAP"] else hidden.dtype
    chunk = chunk_tokens(tokens, padded, exp_dtype.itemsize)
    exp = hidden.new_empty((min(chunk, tokens), padded) if needs_exp else (0,), dtype=exp_dtype)
    losses, squares = (hidden.new_empty(tokens, dtype=torch.float32) for _ in range(2))
    correct = hidden.new_empty(tokens if loss.settings.accuracy else 0, dtype=torch.float32)
    dhidden = hidden.new_empty((tokens, width) if hidden_grad else (0,))
    dweight = hidden.new_empty(weight.shape if head_grad else (0,), dtype=torch.float32)
    dbias = hidden.new_empty(weight.shape[0] if bias_grad else 0, dtype=torch.float32)
    if not tokens:
        dweight.zero_()
        dbias.zero_()
    with _launch.on_device(hidden):
        for start in range(0, tokens, chunk):
            part = slice(start, start + chunk)
            outputs = (losses[part], squares[part], correct[part])
            state = _chunk_forward(loss, hidden[part], targets[part], exp, needs_exp, outputs)
            upstream = scale[part] if scale.dim() else scale
            if hidden_grad:
                _chunk_dhidden(loss, state, upstream, dhidden[part])
            if head_grad:
                _chunk_dweight(loss, state, upstream, dweight, dbias if bias_grad else None, start == 0)
    dweight = dweight if weight_grad else dweight.new_empty(0)
    return Result(losses, squares, correct, dhidden, dweight, dbias)


def _loss(hidden: torch.Tensor, head: Head, settings: Settings, z_factor: torch.Tensor | None) -> _Loss:
    weight, bias, ce_weight = head
    stats = None
    if ce_weight is not None:
        # On the device: nothing waits for it.
        factor = ce_weight.new_ones((), dtype=torch.float32) if z_factor is None else z_factor
        stats = torch.stack([ce_weight.float().mean(), factor])
    weight = weight.to(settings.compute)
    on_hopper = hopper.serves(hidden, head._replace(weight=weight), settings)
    return _Loss(weight, bias, ce_weight, stats, settings, on_hopper)


def forward(
    hidden: torch.Tensor, head: Head, targets: torch.Tensor, settings: Settings, needs: Needs
) -> Result:
    """The result of a call: no gradients if the loss is no scalar."""
    rows = hidden.view(-1, hidden.shape[-1]).to(settings.compute)
    target_rows = _target_rows(targets)
    scale, z_factor = torch.ones((), device=hidden.device), None
    tokens = (target_rows != settings.ignore_index).sum()
    if settings.reduction == "mean":
        divisor = tokens
        if head.ce_weight is not None:
            divisor = _class_weights(head.ce_weight, target_rows, settings.ignore_index).sum()
            z_factor = divisor / tokens.clamp(min=1)
        # If no token counts the loss is 0 / 0, which is NaN, and all gradients are 0.
        scale = torch.where(divisor == 0, 0.0, 1.0 / divisor)
    per_token = settings.reduction == "none"
    computed = Needs(False, False, False) if per_token else needs
    result = _run(rows, _loss(rows, head, settings, z_factor), target_rows, scale, computed)
    loss, z_loss, accuracy = result[:3]
    if per_token:
        loss, z_loss = loss.view(targets.shape), z_loss.view(targets.shape)
        accuracy = accuracy.view(targets.shape) if settings.accuracy else accuracy
    else:
        loss, z_loss = loss.sum(), z_loss.sum()
        accuracy = accuracy.sum() / tokens if settings.accuracy else accuracy
    if settings.reduction == "mean":
        loss, z_loss = loss / divisor, z_loss / tokens
    return Result(loss, z_loss, accuracy, *_gradients(result, hidden, head, computed))


def _target_rows(targets: torch.Tensor) -> torch.Tensor:
    """The targets side by side, as the kernels read them: copied, eight bytes each, where they lie apart."""
    return targets.reshape(-1).contiguous()


def _class_weights(ce_weight: torch.Tensor, targets: torch.Tensor, ignore_index: int) -> torch.Tensor:
    """The class weight of each target, fp32; 0 for ignored ones and those outside the vocabulary."""
    outside = (targets == ignore_index) | (targets < 0) | (targets >= ce_weight.shape[0])
    return ce_weight.float()[targets.masked_fill(outside, 0)].masked_fill(outside, 0.0)


def _gradients(
    result: Result, hidden: torch.Tensor, head: Head, needs: Needs
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dhidden, dweight, dbias) in their inputs' shapes and dtypes."""
    dhidden = result.dhidden.view(hidden.shape) if needs.hidden else result.dhidden
    bias_dtype = head.weight.dtype if head.bias is None else head.bias.dtype
    return dhidden.to(hidden.dtype), result.dweight.to(head.weight.dtype), result.dbias.to(bias_dtype)


def backward_per_token(
    grad: torch.Tensor,
    hidden: torch.Tensor,
    head: Head,
    targets: torch.Tensor,
    settings: Settings,
    needs: Needs,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dhidden, dweight, dbias) for ``reduction="none"``; ``grad`` has one number for each token."""
    rows, target_rows = hidden.view(-1, hidden.shape[-1]).to(settings.compute), _target_rows(targets)
    # An ignored token has no gradient, whatever the upstream one: 0 times NaN is NaN.
    upstream = grad.reshape(-1).masked_fill(target_rows == settings.ignore_index, 0.0)
    loss = _loss(rows, head, settings._replace(accuracy=False), None)
    return _gradients(_run(rows, loss, target_rows, upstream, needs), hidden, head, needs)
