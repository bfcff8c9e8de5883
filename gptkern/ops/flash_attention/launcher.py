"""Launching the attention kernels: outputs, grids, strides and launch configurations."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from gptkern.ops import _launch
from gptkern.ops.flash_attention.kernels import flash_attention_forward
from gptkern.ops.flash_attention.kernels_backward import flash_attention_dkdv, flash_attention_dq


class Options(NamedTuple):
    """What a call asks for beside its tensors, in the order of the registered op's arguments."""

    max_seqlen_q: int
    max_seqlen_k: int
    window_left: int
    window_right: int
    scale: float
    softcap: float
    dropout_p: float


class Packing(NamedTuple):
    """Where packed sequences start; both None in a dense batch."""

    cu_seqlens_q: torch.Tensor | None
    cu_seqlens_k: torch.Tensor | None


def _strides(value: torch.Tensor, packed: bool) -> tuple[int, int, int]:
    """Of batch, row and head; a packed batch is one long sequence."""
    row, head = value.stride(-3), value.stride(-2)
    return (0 if packed else value.stride(0)), row, head


def lse_shape(q: torch.Tensor, packed: bool) -> tuple[int, ...]:
    return (q.shape[1], q.shape[0]) if packed else (q.shape[0], q.shape[2], q.shape[1])


def _lse_strides(lse: torch.Tensor, packed: bool) -> tuple[int, int]:
    return (0, lse.stride(0)) if packed else (lse.stride(0), lse.stride(1))


def _kernel_options(q: torch.Tensor, k: torch.Tensor, packed: bool, o: Options) -> tuple[Any, ...]:
    """Sizes and settings in the kernels' order."""
    tokens = (q.shape[0], k.shape[0]) if packed else (0, 0)
    return (*o[:2], *tokens, *o[2:])


def _sequences(q: torch.Tensor, packing: Packing) -> int:
    return q.shape[0] if packing.cu_seqlens_q is None else packing.cu_seqlens_q.shape[0] - 1


def _constants(q: torch.Tensor, packing: Packing, o: Options) -> dict[str, Any]:
    head_dim = q.shape[-1]
    return {
        "HEAD_DIM": head_dim,
        "BLOCK_D": max(16, 1 << (head_dim - 1).bit_length()),
        "VARLEN": packing.cu_seqlens_q is not None,
        # A window as long as the sequence hides nothing.
        "HAS_LEFT": 0 <= o.window_left < o.max_seqlen_k - 1,
        "HAS_RIGHT": 0 <= o.window_right < o.max_seqlen_q - 1,
        "SOFTCAP": o.softcap > 0.0,
        "DROPOUT": o.dropout_p > 0.0,
    }


def _config(kernel: str, q: torch.Tensor, constants: dict[str, Any]) -> dict[str, Any]:
    dtype = "fp32" if q.dtype == torch.float32 else "half"
    # Dropout and softcap need registers: they may need rows of their own.
    variant = "full" if constants["SOFTCAP"] or constants["DROPOUT"] else "plain"
    return _launch.config(kernel, q.device, head_dim=constants["BLOCK_D"], dtype=dtype, variant=variant)


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    packing: Packing,
    seed: torch.Tensor | None,
    o: Options,
) -> tuple[torch.Tensor, torch.Tensor]:
    packed = packing.cu_seqlens_q is not None
    # Packed tokens that belong to no sequence are written by no program.
    new = torch.zeros if packed else torch.empty
    out = new(q.shape, dtype=q.dtype, device=q.device)
    lse = new(lse_shape(q, packed), dtype=torch.float32, device=q.device)
    constants = _constants(q, packing, o)
    config = _config("flash_attention_forward", q, constants)
    heads = q.shape[-2]
    grid = (-(-o.max_seqlen_q // config["BLOCK_M"]) * heads * _sequences(q, packing),)
    with _launch.on_device(q):
        _launch.launch(
            flash_attention_forward,
            grid,
            *(q, k, v, out, lse, *packing, seed),
            *(heads, heads // k.shape[-2], *_kernel_options(q, k, packed, o)),
            *_strides(q, packed),
            *_strides(k, packed),
            *_strides(v, packed),
            *_strides(out, packed),
            *_lse_strides(lse, packed),
            **constants,
            **config,
        )
    return out, lse


def backward(
    do: torch.Tensor,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    packing: Packing,
    seed: torch.Tensor | None,
    o: Options,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    packed = packing.cu_seqlens_q is not None
    # Gradients come as autograd made them, e.g. expanded from a sum; out and lse are the forward's own.
    do = do if do.stride(-1) == 1 else do.contiguous()
    out, lse = out.contiguous(), lse.contiguous()
    dlse = None if dlse is None else dlse.contiguous()
    new = torch.zeros if packed else torch.empty
    dq, dk, dv = (new(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
    delta = torch.empty_like(lse)
    heads, heads_k, sequences = q.shape[-2], k.shape[-2], _sequences(q, packing)
    constants = _constants(q, packing, o)
    settings = _kernel_options(q, k, packed, o)
    inputs = (*_strides(q, packed), *_strides(k, packed), *_strides(v, packed))
    config = _config("flash_attention_dq", q, constants)
    with _launch.on_device(q):
        _launch.launch(
            flash_attention_dq,
            (-(-o.max_seqlen_q // config["BLOCK_M"]) * heads * sequences,),
            *(q, k, v, out, do, lse, dlse, delta, dq, *packing, seed),
            *(heads, heads // heads_k, *settings, *inputs),
            *(*_strides(out, packed), *_strides(do, packed), *_lse_strides(lse, packed)),
            **constants,
            **config,
        )
        config = _config("flash_attention_dkdv", q, constants)
        _launch.launch(
            flash_attention_dkdv,
            (-(-o.max_seqlen_k // config["BLOCK_N"]) * heads_k * sequences,),
            *(q, k, v, do, lse, delta, dk, dv, *packing, seed),
            *(heads_k, heads // heads_k, *settings, *inputs),
            *(*_strides(do, packed), *_strides(dk, packed), *_lse_strides(lse, packed)),
            **constants,
            **config,
        )
    return dq, dk, dv
