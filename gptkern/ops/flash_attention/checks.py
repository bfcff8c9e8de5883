"""Argument errors of attention."""

from __future__ import annotations

from itertools import pairwise

import torch

from gptkern.ops import _checks
from gptkern.ops._dispatch import traced, use_kernel
from gptkern.ops.flash_attention.launch import UNLIMITED, Extras, Options, Packed, lse_shape, out_shape

MAX_HEAD_DIM = 256


def check(op: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, packed: Packed | None) -> None:
    """Raise for q, k and v, dense or packed, that attention does not accept."""
    _check_qkv(op, q, k, v, 4 if packed is None else 3)
    if packed is not None:
        _check_packed(op, q, packed)
        check_offsets(op, q, k, packed)


def _check_qkv(op: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dim: int) -> None:
    for name, value in (("q", q), ("k", k), ("v", v)):
        _checks.tensor(op, name, value, dim=dim)
    accepted = _checks.KERNEL_FLOATS if use_kernel(q) else _checks.FLOATS
    for name, value in (("q", q), ("k", k), ("v", v)):
        if not 1 <= value.shape[-1] <= MAX_HEAD_DIM:
            raise ValueError(
                f"{op}: {name} has head dimension {value.shape[-1]}; 1 to {MAX_HEAD_DIM} are accepted"
            )
        _checks.dtype(op, name, value, accepted)
        if value.dtype != q.dtype:
            raise TypeError(
                f"{op}: {name} is {value.dtype}, q is {q.dtype}: one dtype for q, k and v is needed"
            )
        if value.device != q.device:
            raise ValueError(f"{op}: {name} is on {value.device}, q is on {q.device}: one device is needed")
        _checks.last_dim_contiguous(op, name, value)
    heads, head_dim = q.shape[-2:]
    if k.shape[-1] != head_dim:
        raise ValueError(f"{op}: k has head dimension {k.shape[-1]}, q has {head_dim}: they must be equal")
    if k.shape[-2] == 0 or heads % k.shape[-2] != 0:
        raise ValueError(
            f"{op}: k has {k.shape[-2]} heads, q has {heads}: q's heads must be a multiple of k's"
        )
    if dim == 4 and k.shape[0] != q.shape[0]:
        raise ValueError(f"{op}: k has batch size {k.shape[0]}, q has {q.shape[0]}: they must be equal")
    _checks.shape(op, "v", v, (*k.shape[:-1], v.shape[-1]), "the shape of k, but for the head dimension")


def _check_packed(op: str, q: torch.Tensor, packed: Packed) -> None:
    for name, cu_seqlens in (("cu_seqlens_q", packed.cu_q), ("cu_seqlens_k", packed.cu_k)):
        _checks.tensor(op, name, cu_seqlens, dim=1)
        _checks.dtype(op, name, cu_seqlens, (torch.int32,))
        if cu_seqlens.shape[0] < 1 or not cu_seqlens.is_contiguous():
            raise ValueError(
                f"{op}: {name} has shape {tuple(cu_seqlens.shape)} and strides {cu_seqlens.stride()}; "
                "a contiguous (sequences + 1,) is needed"
            )
        if cu_seqlens.device != q.device:
            raise ValueError(
                f"{op}: {name} is on {cu_seqlens.device}, q is on {q.device}: one device is needed"
            )
    if packed.cu_q.shape != packed.cu_k.shape:
        raise ValueError(
            f"{op}: cu_seqlens_q has {packed.cu_q.shape[0]} entries, "
            f"cu_seqlens_k has {packed.cu_k.shape[0]}: they must be equal"
        )
    _checks.whole(op, "max_seqlen_q", packed.max_q, 0)
    _checks.whole(op, "max_seqlen_k", packed.max_k, 0)


def check_offsets(op: str, q: torch.Tensor, k: torch.Tensor, packed: Packed) -> None:
    """Raise for offsets beyond the tokens and sequences longer than promised; on a CPU alone.

    On a GPU, where a check would stall, kernels keep to the tokens that there are, and results of a sequence
    longer than promised are NaN.
    """
    if q.device.type == "cpu" and not traced(q):
        for side, cu_seqlens, longest, tokens in (
            ("q", packed.cu_q, packed.max_q, q.shape[0]),
            ("k", packed.cu_k, packed.max_k, k.shape[0]),
        ):
            offsets = cu_seqlens.tolist()
            _check_offsets(op, f"cu_seqlens_{side}", offsets, tokens)
            length = max((end - begin for begin, end in pairwise(offsets)), default=0)
            if length > longest:
                raise ValueError(
                    f"{op}: max_seqlen_{side} is {longest}; cu_seqlens_{side} has a sequence of {length}: "
                    "at least the longest length is needed"
                )


def _check_offsets(op: str, name: str, offsets: list[int], tokens: int) -> None:
    if offsets[0] != 0 or offsets[-1] > tokens or any(a > b for a, b in pairwise(offsets)):
        shown = str(offsets) if len(offsets) <= 8 else f"{str(offsets[:8])[:-1]}, ...]"
        raise ValueError(
            f"{op}: {name} is {shown}; 0 and then the running total of lengths is needed, at most {tokens}"
        )


def check_slopes(op: str, q: torch.Tensor, packed: Packed | None, slopes: torch.Tensor | None) -> None:
    """Raise for ALiBi slopes that attention does not accept."""
    if slopes is None:
        return
    name, heads = "alibi_slopes", q.shape[-2]
    _checks.tensor(op, name, slopes)
    _checks.dtype(op, name, slopes, (torch.float32,))
    batch = q.shape[0] if packed is None else packed.cu_q.shape[0] - 1
    # Not by ``in``: under torch.compile it compares sizes that may change by identity.
    if slopes.shape != (heads,) and slopes.shape != (batch, heads):
        raise ValueError(
            f"{op}: {name} has shape {tuple(slopes.shape)}; {(heads,)} or {(batch, heads)} is needed"
        )
    _check_constant(op, name, q, slopes)


def check_bias(op: str, q: torch.Tensor, k: torch.Tensor, bias: torch.Tensor | None) -> None:
    """Raise for a bias ``(batch, heads, seq_q, seq_k)``, broadcast but for seq_k, that is not accepted."""
    if bias is None:
        return
    name, expected = "attn_bias", (q.shape[0], q.shape[2], q.shape[1], k.shape[1])
    _checks.tensor(op, name, bias)
    if bias.dtype == torch.bool:
        raise TypeError(f"{op}: {name} is bool; add 0 and -inf: torch.where({name}, 0.0, -torch.inf)")
    _checks.dtype(op, name, bias, _checks.KERNEL_FLOATS if use_kernel(q) else _checks.FLOATS)
    sizes = (*(1,) * (4 - bias.dim()), *bias.shape)
    fits = bias.dim() in (2, 3, 4) and sizes[3] == expected[3]
    if not fits or any(a != 1 and a != b for a, b in zip(sizes, expected, strict=True)):
        raise ValueError(
            f"{op}: {name} has shape {tuple(bias.shape)}; {expected} is needed, of which all but the last "
            "may be 1, or be left out before"
        )
    _check_constant(op, name, q, bias)


def _check_constant(op: str, name: str, q: torch.Tensor, value: torch.Tensor) -> None:
    """``value`` is contiguous in its last dimension, on q's device, and needs no gradient."""
    _checks.last_dim_contiguous(op, name, value)
    _checks.same_device(op, q=q, **{name: value})
    if torch.is_grad_enabled() and value.requires_grad:
        raise ValueError(f"{op}: {name} requires a gradient, which is not computed: detach it")


def check_numbers(op: str, scale: object, softcap: object, dropout_p: object) -> None:
    """Raise for a scale, softcap or dropout probability that attention does not accept."""
    _checks.positive(op, "scale", scale)
    _checks.positive(op, "softcap", softcap, none=True)
    _checks.probability(op, "dropout_p", dropout_p)


def check_registered(
    op: str,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    packed: Packed | None,
    max_seqlens: tuple[int, int],
    extras: Extras,
    o: Options,
) -> None:
    """Raise in a call of ``torch.ops.gptkern`` for what the public functions would have refused."""
    check(op, q, k, v, packed)
    if packed is None and max_seqlens != (q.shape[1], k.shape[1]):
        raise ValueError(
            f"{op}: max_seqlen_q and max_seqlen_k are {max_seqlens[0]} and {max_seqlens[1]}; "
            f"q and k have {q.shape[1]} and {k.shape[1]} positions"
        )
    if min(o.window_left, o.window_right) < UNLIMITED:
        raise ValueError(f"{op}: the window is {o.window_left}, {o.window_right}; -1 or more is accepted")
    check_numbers(op, o.scale, o.softcap or None, o.dropout_p)
    check_slopes(op, q, packed, extras.slopes)
    if packed is not None and extras.bias is not None:
        raise ValueError(f"{op}: attn_bias is given with packed sequences, which have no place for one")
    check_bias(op, q, k, extras.bias)
    if extras.bias is not None and extras.bias.dim() != 4:
        raise ValueError(f"{op}: attn_bias has {extras.bias.dim()} dimensions; 4 are needed")
    seed = extras.seed
    if o.dropout_p > 0.0:
        _checks.tensor(op, "seed", seed, dim=1)
        assert seed is not None
        _checks.dtype(op, "seed", seed, (torch.int64,))
        _checks.shape(op, "seed", seed, (1,))
        _checks.same_device(op, q=q, seed=seed)


def check_gradients(
    op: str, q: torch.Tensor, v: torch.Tensor, packed: bool, **values: torch.Tensor | None
) -> None:
    """Raise for a gradient or a saved result that is not like the forward pass's output."""
    for name, value in values.items():
        if value is not None:
            rows = "lse" in name
            _checks.shape(op, name, value, lse_shape(q, packed) if rows else out_shape(q, v))
            _checks.dtype(op, name, value, (torch.float32,) if rows else (q.dtype,))
    _checks.same_device(op, q=q, **values)
