"""Launches of the attention kernels: outputs, grids, strides and launch configurations."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from gptkern.ops import _launch
from gptkern.ops._dispatch import call_key
from gptkern.ops.flash_attention import hopper
from gptkern.ops.flash_attention.kernels import flash_attention_forward
from gptkern.ops.flash_attention.kernels_backward import flash_attention_dkdv, flash_attention_dq
from gptkern.ops.flash_attention.kernels_outside import flash_attention_outside

# The window that means none.
UNLIMITED = -1

# Rows that one program looks at.
OUTSIDE_ROWS = 64

Maybe = torch.Tensor | None

_forwards: _launch.Plans[_launch.Again] = _launch.Plans()
_outsides: _launch.Plans[_launch.Again] = _launch.Plans()


class Options(NamedTuple):
    """The settings of a call, in the order of the registered op's arguments.

    Attributes:
        window_left, window_right: Keys that a query sees before and after its own position, or ``UNLIMITED``.
        softcap: 0 means none.
    """

    window_left: int
    window_right: int
    scale: float
    softcap: float
    dropout_p: float


class Extras(NamedTuple):
    """The tensors that a call may have beside q, k and v.

    Attributes:
        seed: ``(1,)`` int64, the dropout's.
        slopes: ALiBi slopes, fp32, ``(heads,)`` or ``(batch, heads)``.
        bias: Added to the scores, ``(batch, heads, seq_q, seq_k)``, of strides 0 where it is broadcast.
    """

    seed: Maybe = None
    slopes: Maybe = None
    bias: Maybe = None


NO_EXTRAS = Extras()


class Packed(NamedTuple):
    """Packed sequences: where each starts in q and in k, and the longest lengths."""

    cu_q: torch.Tensor
    cu_k: torch.Tensor
    max_q: int
    max_k: int


def lse_shape(q: torch.Tensor, packed: bool) -> tuple[int, ...]:
    """The shape of the log-sum-exp: ``(heads, tokens)`` packed, ``(batch, heads, seq)`` dense."""
    return (q.shape[1], q.shape[0]) if packed else (q.shape[0], q.shape[2], q.shape[1])


def out_shape(q: torch.Tensor, v: torch.Tensor) -> tuple[int, ...]:
    """The shape of the output: q's, with v's head dimension."""
    return (*q.shape[:-1], v.shape[-1])


class Shape:
    """Sizes and offsets of a call as the kernels take them. A packed batch is one long sequence.

    Attributes:
        sequences: The batch size.
        extents: Longest lengths of q and of k, then, if packed, the tokens of each.
        offsets: The pointers ``cu_seqlens_q`` and ``cu_seqlens_k``, or None.
    """

    def __init__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, packed: Packed | None, extras: Extras
    ) -> None:
        self.packed, self.extras = packed is not None, extras
        self.heads, self.heads_k = q.shape[-2], k.shape[-2]
        self.head_dim, self.v_dim = q.shape[-1], v.shape[-1]
        self.sequences: int
        self.extents: tuple[int, int, int, int]
        self.offsets: tuple[torch.Tensor | None, torch.Tensor | None]
        if packed is None:
            self.sequences = q.shape[0]
            self.extents = (q.shape[1], k.shape[1], 0, 0)
            self.offsets = (None, None)
        else:
            self.sequences = packed.cu_q.shape[0] - 1
            self.extents = (packed.max_q, packed.max_k, q.shape[0], k.shape[0])
            self.offsets = (packed.cu_q, packed.cu_k)

    def grid(self, block: int, *, of_keys: bool = False) -> tuple[int]:
        """One program for each block of queries, or of keys, of each head of each sequence."""
        heads = self.heads_k if of_keys else self.heads
        return (-(-self.extents[of_keys] // block) * heads * self.sequences,)

    def strides(self, *values: torch.Tensor) -> tuple[int, ...]:
        """Strides of batch, position and head of each tensor."""
        return tuple(
            stride
            for value in values
            for stride in (0 if self.packed else value.stride(0), value.stride(-3), value.stride(-2))
        )

    def lse_strides(self, lse: torch.Tensor) -> tuple[int, int]:
        """Strides of batch and head."""
        return (0, lse.stride(0)) if self.packed else (lse.stride(0), lse.stride(1))

    def extra_strides(self) -> tuple[int, int, int, int]:
        """The slopes' stride of batch; the bias's of batch, head and query."""
        _, slopes, bias = self.extras
        of_slopes = slopes.stride(0) if slopes is not None and slopes.dim() == 2 else 0
        if bias is None:
            return of_slopes, 0, 0, 0
        return of_slopes, bias.stride(0), bias.stride(1), bias.stride(2)

    def constants(self, o: Options) -> dict[str, Any]:
        """The kernels' flags and sizes that follow from the call."""
        return {
            "HEAD_DIM": self.head_dim,
            "BLOCK_D": max(16, 1 << (self.head_dim - 1).bit_length()),
            "V_DIM": self.v_dim,
            "BLOCK_V": max(16, 1 << (self.v_dim - 1).bit_length()),
            "VARLEN": self.packed,
            # A window as long as the sequence hides nothing.
            "HAS_LEFT": 0 <= o.window_left < self.extents[1] - 1,
            "HAS_RIGHT": 0 <= o.window_right < self.extents[0] - 1,
            "SOFTCAP": o.softcap > 0.0,
            "DROPOUT": o.dropout_p > 0.0,
        }


def _config(kernel: str, q: torch.Tensor, constants: dict[str, Any], extras: Extras) -> dict[str, Any]:
    dtype = "fp32" if q.dtype == torch.float32 else "half"
    # What needs more registers may need rows of its own.
    variant = "full" if constants["SOFTCAP"] or constants["DROPOUT"] else "plain"
    if extras.slopes is not None or extras.bias is not None or constants["HEAD_DIM"] != constants["V_DIM"]:
        variant = "extra"
    head_dim = max(constants["BLOCK_D"], constants["BLOCK_V"])
    return _launch.config(kernel, q.device, head_dim=head_dim, dtype=dtype, variant=variant)


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    packed: Packed | None,
    extras: Extras,
    o: Options,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch the forward kernel: (out in q's dtype, lse in fp32)."""
    out = torch.empty(out_shape(q, v), dtype=q.dtype, device=q.device)
    lse = torch.empty(lse_shape(q, packed is not None), dtype=torch.float32, device=q.device)
    cu_q, cu_k, *longest = packed or (None, None)
    offsets = (cu_q, None if cu_k is cu_q else cu_k)
    key = call_key((q, k, v, *offsets, *extras), *longest, *o, _launch.multiprocessors(q.device))
    with _launch.on_device(q):
        _launch.repeated(
            _forwards,
            key,
            (q, k, v, *offsets, *extras, out, lse),
            lambda: _forward(q, k, v, packed, extras, o, out, lse),
        )
        if packed is not None:
            _launch.repeated(
                _outsides, key, (*offsets, out, lse), lambda: _fill_outside(packed, False, out, lse=lse)
            )
    return out, lse


def _fill_outside(
    packed: Packed,
    of_keys: bool,
    first: torch.Tensor,
    second: Maybe = None,
    lse: Maybe = None,
) -> None:
    """Write what the kernels before left of packed results, ``(tokens, heads, head_dim)`` and contiguous."""
    own, other, longest, longest_other = packed
    if of_keys:
        own, other, longest, longest_other = other, own, longest_other, longest
    tokens = first.shape[0]
    _launch.launch(
        flash_attention_outside,
        (-(-tokens // OUTSIDE_ROWS),),
        *(first, second, lse, own, other, own.shape[0] - 1, tokens, longest, longest_other),
        *(first[0].numel() if tokens else 0, 0 if second is None or not tokens else second[0].numel()),
        first.shape[1],
        BLOCK_ROWS=OUTSIDE_ROWS,
        BLOCK_SEQUENCES=32,
        BLOCK_COLUMNS=64,
        num_warps=4,
    )


def _forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    packed: Packed | None,
    extras: Extras,
    o: Options,
    out: torch.Tensor,
    lse: torch.Tensor,
) -> None:
    shape = Shape(q, k, v, packed, extras)
    if hopper.serves(q, k, v, extras, o):
        hopper.forward(q, k, v, out, lse, shape, o)
        return
    constants = shape.constants(o)
    config = _config("flash_attention_forward", q, constants, extras)
    _launch.launch(
        flash_attention_forward,
        shape.grid(config["BLOCK_M"]),
        *(q, k, v, out, lse, *shape.offsets, *extras),
        *(shape.heads, shape.heads // shape.heads_k, *shape.extents, *o),
        *(*shape.strides(q, k, v, out), *shape.lse_strides(lse), *shape.extra_strides()),
        **constants,
        **config,
    )


def backward(
    do: torch.Tensor,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    packed: Packed | None,
    extras: Extras,
    o: Options,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Launch the backward kernels: (dq, dk, dv)."""
    shape = Shape(q, k, v, packed, extras)
    # Gradients come as autograd made them, e.g. expanded from a sum; out and lse are the forward's own.
    do = do if do.stride(-1) == 1 else do.contiguous()
    out, lse = out.contiguous(), lse.contiguous()
    dlse = None if dlse is None else dlse.contiguous()
    dq, dk, dv = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
    with _launch.on_device(q):
        if hopper.serves(q, k, v, extras, o):
            hopper.backward(do, dlse, q, k, v, out, lse, (dq, dk, dv), shape, o)
        else:
            _backward(do, dlse, q, k, v, out, lse, (dq, dk, dv), shape, o)
        if packed is not None:
            _fill_outside(packed, False, dq)
            _fill_outside(packed, True, dk, dv)
    return dq, dk, dv


def _backward(
    do: torch.Tensor,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    gradients: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    shape: Shape,
    o: Options,
) -> None:
    """Launch both kernels; out, lse and ``gradients``, which are dq, dk and dv, are contiguous."""
    (dq, dk, dv), extras = gradients, shape.extras
    delta = torch.empty_like(lse)
    constants = shape.constants(o)
    group = shape.heads // shape.heads_k
    config = _config("flash_attention_dq", q, constants, extras)
    _launch.launch(
        flash_attention_dq,
        shape.grid(config["BLOCK_M"]),
        *(q, k, v, out, do, lse, dlse, delta, dq, *shape.offsets, *extras),
        *(shape.heads, group, *shape.extents, *o),
        *(*shape.strides(q, k, v, out, do, dq), *shape.lse_strides(lse), *shape.extra_strides()),
        **constants,
        **config,
    )
    config = _config("flash_attention_dkdv", q, constants, extras)
    _launch.launch(
        flash_attention_dkdv,
        shape.grid(config["BLOCK_N"], of_keys=True),
        *(q, k, v, do, lse, delta, dk, dv, *shape.offsets, *extras),
        *(shape.heads_k, group, *shape.extents, *o),
        *(*shape.strides(q, k, v, do, dk, dv), *shape.lse_strides(lse), *shape.extra_strides()),
        **constants,
        **config,
    )
