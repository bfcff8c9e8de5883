"""The language model's head and its cross-entropy, fused: logits of one chunk of tokens at a time.

With gradients asked for and a scalar result, the forward pass already computes them, chunk by
chunk, so that each logit is multiplied out once; the backward pass scales them. For
``reduction="none"`` the upstream gradient differs from token to token, and the backward pass
computes the chunks again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton

from gptkern.ops import _checks, _launch
from gptkern.ops._dispatch import autocast_dtype, needs_grad, traced, use_kernel
from gptkern.ops.linear_cross_entropy import kernels, reference

REDUCTIONS = ("mean", "sum", "none")
_OP = "linear_cross_entropy"
# Bytes of exponentials that one chunk of tokens keeps: enough rows to fill a GPU with tiles, and
# at GPT-2's vocabulary at most 8192 of them.
_LEAST_WORKSPACE, _MOST_WORKSPACE = 32 << 20, 832 << 20
_CHUNK_SHARE = 8


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    ignore_index: int = -100,
    reduction: str = "mean",
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """Cross-entropy of ``hidden @ weight.T`` against ``targets``, without the logits of the whole batch.

    Args:
        hidden: ``(..., width)`` float32, float16 or bfloat16 (on CPU float64 too); its leading
            dimensions must be viewable as one, the last contiguous.
        weight: ``(vocab, width)``, hidden's dtype; rows may be any stride apart. Under autocast both
            are cast to its dtype, and the weight's gradient comes back in the weight's own.
        targets: ``(...)`` int64, hidden's leading dimensions; 0 to ``vocab - 1``, or ``ignore_index``.
        ignore_index: Target of the tokens that are left out of loss and gradient.
        reduction: ``"mean"`` over the tokens that are not ignored (NaN where all are), ``"sum"``, or
            ``"none"``: one loss a token, 0 where ignored.
        z_loss: Adds ``z_loss * logsumexp(logits)**2`` to each token's loss (Chowdhery et al. 2022).
        label_smoothing: Share of the target spread evenly over the vocabulary, 0 to 1.

    Returns:
        fp32 (float64 for float64 input): a scalar, or ``targets``' shape for ``"none"``.

    Peak memory beyond the gradients is one chunk's exponentials, at most 832 MiB however many
    tokens and words there are, and an fp32 copy of the weight's gradient. Deterministic.

    Raises:
        TypeError: A dtype that is not accepted.
        ValueError: Shapes, strides or settings that are not; on CPU a target outside the vocabulary,
            which on a GPU, where looking would stall, makes that token's loss NaN.
    """
    _check(hidden, weight, targets, ignore_index, reduction, z_loss, label_smoothing)
    settings = (ignore_index, reduction, float(z_loss), float(label_smoothing))
    if not use_kernel(hidden):
        return reference.linear_cross_entropy(hidden, weight, targets, *settings)
    cast = autocast_dtype(hidden)
    cast = cast if cast is not None and hidden.dtype != torch.float64 else None
    if traced(hidden):
        grads = torch.is_grad_enabled()
        loss: torch.Tensor = torch.ops.gptkern.linear_cross_entropy(
            hidden, weight, targets, *settings, cast or hidden.dtype,
            grads and hidden.requires_grad, grads and weight.requires_grad,
        )[0]  # fmt: skip
        return loss
    if needs_grad(hidden, weight):
        return _LinearCrossEntropy.apply(hidden, weight, targets, cast or hidden.dtype, *settings)  # type: ignore[no-any-return]
    return _forward(hidden, weight, targets, *settings, cast or hidden.dtype, False, False)[0]


def _check(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    ignore_index: int,
    reduction: str,
    z_loss: float,
    label_smoothing: float,
    compute: torch.dtype | None = None,
) -> None:
    """Raise for what is not accepted; ``compute`` is the dtype that both are cast to, autocast's if None."""
    _checks.tensor(_OP, "hidden", hidden)
    _checks.tensor(_OP, "weight", weight, dim=2)
    _checks.tensor(_OP, "targets", targets)
    if hidden.dim() < 2:
        raise ValueError(f"{_OP}: hidden has shape {tuple(hidden.shape)}; (..., width) is needed")
    accepted = _checks.KERNEL_FLOATS if hidden.device.type == "cuda" else _checks.FLOATS
    _checks.dtype(_OP, "hidden", hidden, accepted)
    _checks.dtype(_OP, "weight", weight, accepted)
    if hidden.dtype != weight.dtype and (compute or autocast_dtype(hidden)) is None:
        raise TypeError(f"{_OP}: weight is {weight.dtype}, hidden {hidden.dtype}: they must be the same")
    _checks.dtype(_OP, "targets", targets, (torch.int64,))
    _checks.same_device(_OP, hidden=hidden, weight=weight, targets=targets)
    if not weight.shape[0] or not weight.shape[1]:
        raise ValueError(f"{_OP}: weight has shape {tuple(weight.shape)}; at least one word and one column")
    _checks.shape(_OP, "hidden", hidden, (*hidden.shape[:-1], weight.shape[1]), "weight's width")
    _checks.shape(_OP, "targets", targets, hidden.shape[:-1], "hidden's leading dimensions")
    _checks.last_dim_contiguous(_OP, "hidden", hidden)
    _checks.last_dim_contiguous(_OP, "weight", weight)
    try:
        hidden.view(-1, hidden.shape[-1])
    except RuntimeError:
        raise ValueError(
            f"{_OP}: hidden has strides {hidden.stride()}; its leading dimensions must be viewable as one: "
            "call hidden.contiguous() if a copy is acceptable"
        ) from None
    if compute is not None and compute not in accepted:
        raise TypeError(f"{_OP}: compute is {compute}; a floating dtype that hidden may have is needed")
    if reduction not in REDUCTIONS:
        raise ValueError(f"{_OP}: reduction is {reduction!r}; accepted are {', '.join(REDUCTIONS)}")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"{_OP}: label_smoothing is {label_smoothing}; 0 to 1 is accepted")
    if not z_loss >= 0.0:
        raise ValueError(f"{_OP}: z_loss is {z_loss}; 0 or more is accepted")
    if targets.device.type == "cpu" and not traced(targets):
        outside = targets[(targets != ignore_index) & ((targets < 0) | (targets >= weight.shape[0]))]
        if outside.numel():
            raise ValueError(
                f"{_OP}: targets holds {outside[0].item()}; 0 to {weight.shape[0] - 1} or "
                f"ignore_index {ignore_index} is accepted"
            )


@dataclass
class _Chunk:
    """What one chunk's launches share: its rows, and what the forward kernels keep of them."""

    hidden: torch.Tensor
    targets: torch.Tensor
    exp: torch.Tensor
    tile_max: torch.Tensor
    row_max: torch.Tensor
    log_sum: torch.Tensor


@dataclass
class _Loss:
    """One call's constants."""

    weight: torch.Tensor
    ignore_index: int
    z_loss: float
    label_smoothing: float
    tile: int

    @property
    def n_tiles(self) -> int:
        return -(-self.weight.shape[0] // self.tile)

    def launch_row(self, kernel: str) -> dict[str, Any]:
        """The launch table's row of one of the kernels, ``BLOCK_*`` and all."""
        dtype = "fp32" if self.weight.dtype == torch.float32 else "half"
        return _launch.config(f"{_OP}_{kernel}", self.weight.device, dtype=dtype)


def chunk_tokens(tokens: int, padded_vocab: int, itemsize: int) -> int:
    """Tokens of one chunk: an eighth of the batch, within fixed bounds of workspace; a multiple of 128."""
    workspace = tokens * padded_vocab * itemsize // _CHUNK_SHARE
    workspace = min(max(workspace, _LEAST_WORKSPACE), _MOST_WORKSPACE)
    rows = workspace // (padded_vocab * itemsize) // 128 * 128
    return max(128, min(rows, -(-tokens // 128) * 128))


def _chunk_forward(
    loss: _Loss, hidden: torch.Tensor, targets: torch.Tensor, exp: torch.Tensor, keep: bool
) -> tuple[torch.Tensor, _Chunk]:
    """Losses of one chunk, ``(tokens,)`` fp32, and what its gradients need."""
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
        hidden, loss.weight, targets, exp, tile_max, tile_sum, tile_total, target_logit,
        tokens, vocab, width, n_tiles, hidden.stride(0), loss.weight.stride(0), n_tiles * loss.tile,
        KEEP_EXP=keep, SMOOTHING=smoothing, EVEN_K=width % row["BLOCK_K"] == 0, **row,
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
    loss: _Loss, chunk: _Chunk, scale: torch.Tensor, dweight: torch.Tensor, first: bool
) -> None:
    """Adds the chunk's part of the weight's gradient; the first chunk's is stored."""
    (tokens, width), vocab, n_tiles = chunk.hidden.shape, loss.weight.shape[0], loss.n_tiles
    row = loss.launch_row("dweight")
    _launch.launch(
        kernels.dweight_kernel,
        (triton.cdiv(vocab, row["BLOCK_M"]) * triton.cdiv(width, row["BLOCK_N"]),),
        chunk.exp, chunk.tile_max, chunk.row_max, chunk.log_sum, chunk.targets, scale, chunk.hidden, dweight,
        tokens, vocab, width, n_tiles, n_tiles * loss.tile, scale.stride(0) if scale.dim() else 0,
        chunk.hidden.stride(0), loss.ignore_index, loss.z_loss, loss.label_smoothing,
        FIRST=first, TOKEN_SCALE=scale.dim() > 0, SMOOTHING=loss.label_smoothing > 0.0,
        TILE=loss.tile, **row,
    )  # fmt: skip


def _run(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    ignore_index: int,
    z_loss: float,
    label_smoothing: float,
    scale: torch.Tensor,
    hidden_grad: bool,
    weight_grad: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Losses ``(tokens,)``, hidden's gradient, the weight's in fp32 (empty where not asked for).

    ``scale`` is the upstream gradient: one number, or one a token.
    """
    loss = _Loss(weight, ignore_index, z_loss, label_smoothing, 0)
    loss.tile = loss.launch_row("logits")["BLOCK_N"]
    tokens, width = hidden.shape
    keep = hidden_grad or weight_grad
    padded = loss.n_tiles * loss.tile
    chunk = chunk_tokens(tokens, padded, hidden.element_size())
    exp = hidden.new_empty((min(chunk, tokens), padded) if keep else (0,))
    losses = hidden.new_empty(tokens, dtype=torch.float32)
    dhidden = hidden.new_empty((tokens, width) if hidden_grad else (0,))
    dweight = hidden.new_empty(weight.shape if weight_grad else (0,), dtype=torch.float32)
    if weight_grad and not tokens:
        dweight.zero_()
    with _launch.on_device(hidden):
        for start in range(0, tokens, chunk):
            part = slice(start, start + chunk)
            losses[part], state = _chunk_forward(loss, hidden[part], targets[part], exp, keep)
            upstream = scale[part] if scale.dim() else scale
            if hidden_grad:
                _chunk_dhidden(loss, state, upstream, dhidden[part])
            if weight_grad:
                _chunk_dweight(loss, state, upstream, dweight, start == 0)
    return losses, dhidden, dweight


def _forward(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    ignore_index: int,
    reduction: str,
    z_loss: float,
    label_smoothing: float,
    compute: torch.dtype,
    hidden_grad: bool,
    weight_grad: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The loss and, where asked for and the loss is a scalar, both gradients in their inputs' dtypes."""
    rows, wanted = hidden.view(-1, hidden.shape[-1]).to(compute), targets.reshape(-1)
    cast_weight = weight.to(compute)
    mean_of = scale = torch.ones((), device=hidden.device)
    if reduction == "mean":
        counted = (wanted != ignore_index).sum()
        # Where no token counts the loss is 0 * inf, which is NaN, and no gradient is anything but 0.
        mean_of, scale = 1.0 / counted, 1.0 / counted.clamp(min=1)
    grads = (hidden_grad, weight_grad) if reduction != "none" else (False, False)
    losses, dhidden, dweight = _run(
        rows, cast_weight, wanted, ignore_index, z_loss, label_smoothing, scale, *grads
    )
    loss = losses.view(targets.shape) if reduction == "none" else losses.sum() * mean_of
    if grads[0]:
        dhidden = dhidden.view(hidden.shape)
    return loss, dhidden.to(hidden.dtype), dweight.to(weight.dtype)


def _backward_per_token(
    grad: torch.Tensor,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    ignore_index: int,
    z_loss: float,
    label_smoothing: float,
    compute: torch.dtype,
    hidden_grad: bool,
    weight_grad: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients for ``reduction="none"``, ``grad`` having one number a token."""
    rows, wanted = hidden.view(-1, hidden.shape[-1]).to(compute), targets.reshape(-1)
    # An ignored token has no gradient, whatever comes from above: 0 times NaN is NaN.
    upstream = grad.reshape(-1).masked_fill(wanted == ignore_index, 0.0)
    _, dhidden, dweight = _run(
        rows, weight.to(compute), wanted, ignore_index, z_loss, label_smoothing, upstream,
        hidden_grad, weight_grad,
    )  # fmt: skip
    return (dhidden.view(hidden.shape) if hidden_grad else dhidden).to(hidden.dtype), dweight.to(weight.dtype)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        compute: torch.dtype,
        ignore_index: int,
        reduction: str,
        z_loss: float,
        label_smoothing: float,
    ) -> torch.Tensor:
        ctx.wanted = ctx.needs_input_grad[:2]
        ctx.settings = (ignore_index, z_loss, label_smoothing, compute)
        loss, dhidden, dweight = _forward(
            hidden, weight, targets, ignore_index, reduction, z_loss, label_smoothing, compute, *ctx.wanted
        )
        ctx.per_token = reduction == "none"
        ctx.save_for_backward(*((hidden, weight, targets) if ctx.per_token else (dhidden, dweight)))
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if ctx.per_token:
            dhidden, dweight = _backward_per_token(grad, *ctx.saved_tensors, *ctx.settings, *ctx.wanted)
        else:
            # Not in place: a graph that is kept may be walked twice.
            dhidden, dweight = (saved * grad.to(saved.dtype) for saved in ctx.saved_tensors)
        return (
            dhidden if ctx.wanted[0] else None,
            dweight if ctx.wanted[1] else None,
            None, None, None, None, None, None,
        )  # fmt: skip


_library = torch.library.Library("gptkern", "FRAGMENT")
_library.define(
    "linear_cross_entropy(Tensor hidden, Tensor weight, Tensor targets, int ignore_index, str reduction, "
    "float z_loss, float label_smoothing, ScalarType compute, bool hidden_grad, bool weight_grad) "
    "-> (Tensor, Tensor, Tensor)"
)
_library.define(
    "linear_cross_entropy_backward(Tensor grad, Tensor hidden, Tensor weight, Tensor targets, "
    "int ignore_index, float z_loss, float label_smoothing, ScalarType compute, bool hidden_grad, "
    "bool weight_grad) -> (Tensor, Tensor)"
)


def _op_forward(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, ignore_index: int, reduction: str,
    z_loss: float, label_smoothing: float, compute: torch.dtype, *grads: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    settings = (ignore_index, reduction, z_loss, label_smoothing)
    _check(hidden, weight, targets, *settings, compute)
    return _forward(hidden, weight, targets, *settings, compute, *grads)


def _op_backward(
    grad: torch.Tensor, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, ignore_index: int,
    z_loss: float, label_smoothing: float, compute: torch.dtype, *grads: bool,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    _check(hidden, weight, targets, ignore_index, "none", z_loss, label_smoothing, compute)
    _checks.shape(_OP, "grad", grad, targets.shape, "one a token")
    _checks.same_device(_OP, grad=grad, hidden=hidden)
    settings = (ignore_index, z_loss, label_smoothing, compute)
    return _backward_per_token(grad, hidden, weight, targets, *settings, *grads)


for _key in ("CUDA", "CPU"):
    _library.impl("linear_cross_entropy", _op_forward, _key)
    _library.impl("linear_cross_entropy_backward", _op_backward, _key)


@torch.library.register_fake("gptkern::linear_cross_entropy")
def _(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    ignore_index: int,
    reduction: str,
    *rest: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    hidden_grad, weight_grad = rest[-2:]
    per_token = reduction == "none"
    return (
        hidden.new_empty(targets.shape if per_token else (), dtype=torch.float32),
        hidden.new_empty(hidden.shape if hidden_grad and not per_token else (0,)),
        weight.new_empty(weight.shape if weight_grad and not per_token else (0,)),
    )


@torch.library.register_fake("gptkern::linear_cross_entropy_backward")
def _(
    grad: torch.Tensor, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, *rest: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    hidden_grad, weight_grad = rest[-2:]
    return (
        hidden.new_empty(hidden.shape if hidden_grad else (0,)),
        weight.new_empty(weight.shape if weight_grad else (0,)),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    hidden, weight, targets, ignore_index, reduction, z_loss, label_smoothing, compute, *ctx.wanted = inputs
    ctx.settings = (ignore_index, z_loss, label_smoothing, compute)
    ctx.per_token = reduction == "none"
    ctx.save_for_backward(*((hidden, weight, targets) if ctx.per_token else output[1:]))


def _registered_backward(ctx: Any, grad: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, ...]:
    if ctx.per_token:
        dhidden, dweight = torch.ops.gptkern.linear_cross_entropy_backward(
            grad, *ctx.saved_tensors, *ctx.settings, *ctx.wanted
        )
    else:
        dhidden, dweight = (saved * grad.to(saved.dtype) for saved in ctx.saved_tensors)
    return (
        dhidden if ctx.wanted[0] else None,
        dweight if ctx.wanted[1] else None,
        None, None, None, None, None, None, None, None,
    )  # fmt: skip


torch.library.register_autograd(
    "gptkern::linear_cross_entropy", _registered_backward, setup_context=_setup_context
)
