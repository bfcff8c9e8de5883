"""Attention without a seq x seq matrix in memory: dense and packed batches, forward and backward."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, Literal, overload

import torch

from gptkern.ops import _checks
from gptkern.ops._dispatch import autocast_dtype, needs_grad, traced, use_kernel
from gptkern.ops.flash_attention import launcher, reference
from gptkern.ops.flash_attention.launcher import Options, Packing

MAX_HEAD_DIM = 256
UNLIMITED = -1


@overload
def flash_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = ...,
    scale: float | None = ...,
    window: int | None = ...,
    softcap: float | None = ...,
    dropout_p: float = ...,
    return_lse: Literal[False] = ...,
) -> torch.Tensor: ...
@overload
def flash_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = ...,
    scale: float | None = ...,
    window: int | None = ...,
    softcap: float | None = ...,
    dropout_p: float = ...,
    return_lse: Literal[True],
) -> tuple[torch.Tensor, torch.Tensor]: ...
def flash_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = True,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention, ``softmax(scale * q k^T) v``, computed in tiles (Dao 2023, FlashAttention-2).

    Masks are aligned to the bottom right: the last query sees the last key, whatever the two lengths.
    A query that sees no key gives 0, an lse of -inf and no gradient. Deterministic, forward and
    backward. Under autocast q, k and v are cast to the autocast dtype.

    Args:
        q: ``(batch, seq_q, heads, head_dim)``, fp16, bf16 or fp32 (fp64 too where the reference runs),
            head_dim at most 256. Any strides with a contiguous last dimension, 0 among them.
        k: ``(batch, seq_k, heads_k, head_dim)``; heads is a multiple of heads_k, and query head i
            attends with key head ``i // (heads / heads_k)``.
        v: as k.
        causal: whether a query sees only keys up to its own position.
        scale: factor on the scores, positive; ``1 / sqrt(head_dim)`` unless given.
        window: how far a query sees: its own position and the ``window - 1`` before it, and as many
            after it where not causal.
        softcap: scores become ``softcap * tanh(scores / softcap)``, before the mask.
        dropout_p: probability with which a weight is dropped; the others are divided by
            ``1 - dropout_p``. Drawn from PyTorch's generator of q's device.
        return_lse: also return the log-sum-exp of the scores.

    Returns:
        ``(batch, seq_q, heads, head_dim)`` in q's dtype; with ``return_lse`` also ``(batch, heads,
        seq_q)`` in fp32 (natural logarithm), differentiable too.

    Raises:
        TypeError, ValueError: an argument is not as described here.
    """
    name = "flash_attention"
    q, k, v = cast(q, k, v)
    check(name, q, k, v, 4)
    options = make_options(
        name, q, q.shape[1], k.shape[1], _span(name, causal, window), scale, softcap, dropout_p
    )
    return attend(q, k, v, Packing(None, None), options, return_lse)


@overload
def flash_attention_varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    causal: bool = ...,
    scale: float | None = ...,
    window: int | None = ...,
    softcap: float | None = ...,
    dropout_p: float = ...,
    return_lse: Literal[False] = ...,
) -> torch.Tensor: ...
@overload
def flash_attention_varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    causal: bool = ...,
    scale: float | None = ...,
    window: int | None = ...,
    softcap: float | None = ...,
    dropout_p: float = ...,
    return_lse: Literal[True],
) -> tuple[torch.Tensor, torch.Tensor]: ...
def flash_attention_varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    causal: bool = True,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """``flash_attention`` of packed sequences: sequence i is rows ``cu_seqlens[i]`` to ``cu_seqlens[i + 1]``.

    Args:
        q: ``(tokens_q, heads, head_dim)``, otherwise as in ``flash_attention``.
        k: ``(tokens_k, heads_k, head_dim)``.
        v: as k.
        cu_seqlens_q: ``(sequences + 1,)`` int32 on q's device: 0, then the running total of lengths. On a
            GPU, where looking would stall, what decreases or passes the last token is cut off there.
        cu_seqlens_k: the same of k; sequences of q and k may differ in length.
        max_seqlen_q: at least the longest length in ``cu_seqlens_q``. Not compared with it, which
            would wait for the GPU: rows past it are not computed.
        max_seqlen_k: at least the longest length in ``cu_seqlens_k``.
        causal, scale, window, softcap, dropout_p, return_lse: as in ``flash_attention``.

    Returns:
        ``(tokens_q, heads, head_dim)`` in q's dtype, 0 for tokens of no sequence; with ``return_lse``
        also ``(heads, tokens_q)`` in fp32.

    Raises:
        TypeError, ValueError: an argument is not as described here.
    """
    name = "flash_attention_varlen"
    q, k, v = cast(q, k, v)
    check(name, q, k, v, 3)
    packing = Packing(cu_seqlens_q, cu_seqlens_k)
    check_packing(name, q, k.shape[0], packing, max_seqlen_q, max_seqlen_k)
    span = _span(name, causal, window)
    options = make_options(name, q, max_seqlen_q, max_seqlen_k, span, scale, softcap, dropout_p)
    return attend(q, k, v, packing, options, return_lse)


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, packing: Packing, options: Options, return_lse: bool
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Checked arguments to a result: which implementation runs, and what autograd sees of it."""
    packed = packing.cu_seqlens_q is not None
    compiling = traced(q)
    if not use_kernel(q) and not (packed and compiling):
        if not (packed or return_lse) and _cpu_expresses(options):
            causal = options.window_right == 0
            return reference.attention_cpu(q, k, v, causal, options.scale, options.dropout_p)
        out, lse = _reference(q, k, v, packing, options)
        return (out, lse) if return_lse else out
    seed = None
    if options.dropout_p > 0.0:
        # Drawn on the device: no synchronisation, and a captured graph draws anew at each replay.
        seed = torch.randint(2**62, (1,), dtype=torch.int64, device=q.device)
    if compiling:
        out, lse = torch.ops.gptkern.flash_attention(q, k, v, *packing, seed, *options)
    elif needs_grad(q, k, v):
        out, lse = _FlashAttention.apply(q, k, v, packing, seed, options)
    else:
        out, lse = launcher.forward(q, k, v, packing, seed, options)
    return (out, lse) if return_lse else out


def cast(q: Any, k: Any, v: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k and v in the autocast dtype, where autocast is on; not yet checked arguments."""
    if all(isinstance(t, torch.Tensor) and t.dtype != torch.float64 for t in (q, k, v)):
        dtype = autocast_dtype(q)
        if dtype is not None:
            return q.to(dtype), k.to(dtype), v.to(dtype)
    return q, k, v


def check(op: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dim: int) -> None:
    for name, value in (("q", q), ("k", k), ("v", v)):
        _checks.tensor(op, name, value, dim=dim)
    accepted = _checks.KERNEL_FLOATS if use_kernel(q) else _checks.FLOATS
    for name, value in (("q", q), ("k", k), ("v", v)):
        _checks.dtype(op, name, value, accepted)
        if value.dtype != q.dtype:
            raise TypeError(
                f"{op}: {name} is {value.dtype}, q is {q.dtype}: one dtype for q, k and v is needed"
            )
        if value.device != q.device:
            raise ValueError(f"{op}: {name} is on {value.device}, q is on {q.device}: one device is needed")
        _checks.last_dim_contiguous(op, name, value)
    heads, head_dim = q.shape[-2:]
    if not 1 <= head_dim <= MAX_HEAD_DIM:
        raise ValueError(f"{op}: q has head dimension {head_dim}; 1 to {MAX_HEAD_DIM} are accepted")
    if k.shape[-1] != head_dim:
        raise ValueError(f"{op}: k has head dimension {k.shape[-1]}, q has {head_dim}: they must be equal")
    if k.shape[-2] == 0 or heads % k.shape[-2] != 0:
        raise ValueError(
            f"{op}: k has {k.shape[-2]} heads, q has {heads}: q's heads must be a multiple of k's"
        )
    if dim == 4 and k.shape[0] != q.shape[0]:
        raise ValueError(f"{op}: k has batch size {k.shape[0]}, q has {q.shape[0]}: they must be equal")
    _checks.shape(op, "v", v, k.shape, "the shape of k")


def check_packing(
    op: str, q: torch.Tensor, tokens_k: int, packing: Packing, max_seqlen_q: int, max_seqlen_k: int
) -> None:
    for name, cu_seqlens in zip(packing._fields, packing, strict=True):
        _checks.tensor(op, name, cu_seqlens, dim=1)
        assert cu_seqlens is not None
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
    entries_q, entries_k = (0 if t is None else t.shape[0] for t in packing)
    if entries_q != entries_k:
        raise ValueError(
            f"{op}: cu_seqlens_q has {entries_q} entries, cu_seqlens_k has {entries_k}: they must be equal"
        )
    limits: dict[str, Any] = {"max_seqlen_q": max_seqlen_q, "max_seqlen_k": max_seqlen_k}
    for name, value in limits.items():
        if isinstance(value, torch.Tensor) or value < 0:
            raise ValueError(f"{op}: {name} is {value!r}; an int of at least 0 is needed")

    if q.device.type == "cpu" and not traced(q):
        for name, cu_seqlens, tokens in zip(packing._fields, packing, (q.shape[0], tokens_k), strict=True):
            _check_starts(op, name, cu_seqlens, tokens)


def _check_starts(op: str, name: str, cu_seqlens: Any, tokens: int) -> None:
    """On a GPU, where looking would stall, kernels keep to the tokens that there are."""
    starts = cu_seqlens.tolist()
    if starts[0] != 0 or starts[-1] > tokens or any(a > b for a, b in pairwise(starts)):
        raise ValueError(
            f"{op}: {name} is {_short(starts)}; 0 and then the running total of lengths is needed, "
            f"at most {tokens}"
        )


def _short(values: list[int]) -> str:
    return str(values) if len(values) <= 8 else f"{str(values[:8])[:-1]}, ...]"


def _span(op: str, causal: bool, window: int | None) -> tuple[int, int]:
    """How many keys before and after its own position a query sees."""
    if window is not None and window < 1:
        raise ValueError(f"{op}: window is {window}; at least 1 is needed, or None")
    left = UNLIMITED if window is None else window - 1
    return left, 0 if causal else left


def make_options(
    op: str,
    q: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    span: tuple[int, int],
    scale: float | None,
    softcap: float | None,
    dropout_p: float,
) -> Options:
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    if not 0.0 < scale < math.inf:
        raise ValueError(f"{op}: scale is {scale}; a positive, finite number is needed")
    if softcap is not None and not 0.0 < softcap < math.inf:
        raise ValueError(f"{op}: softcap is {softcap}; a positive, finite number is needed, or None")
    _checks.probability(op, "dropout_p", dropout_p)
    return Options(max_seqlen_q, max_seqlen_k, *span, scale, float(softcap or 0.0), float(dropout_p))


def _cpu_expresses(o: Options) -> bool:
    """Whether PyTorch's own attention can express it: causal or not, no window, no query without keys."""
    if o.softcap or o.window_left != UNLIMITED:
        return False
    return o.window_right == UNLIMITED or (o.window_right == 0 and o.max_seqlen_q <= o.max_seqlen_k)


def _reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, packing: Packing, o: Options
) -> tuple[torch.Tensor, torch.Tensor]:
    left, right = (None if side == UNLIMITED else side for side in (o.window_left, o.window_right))
    rest = (left, right, o.scale, o.softcap or None, o.dropout_p)
    if packing.cu_seqlens_q is None or packing.cu_seqlens_k is None:
        return reference.attention(q, k, v, *rest)
    return reference.attention_varlen(q, k, v, packing.cu_seqlens_q, packing.cu_seqlens_k, *rest)


class _FlashAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        packing: Packing,
        seed: torch.Tensor | None,
        options: Options,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = launcher.forward(q, k, v, packing, seed, options)
        ctx.save_for_backward(q, k, v, out, lse, *packing, seed)
        ctx.options = options
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, do: torch.Tensor | None, dlse: torch.Tensor | None) -> Any:
        q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, seed = ctx.saved_tensors
        packing = Packing(cu_seqlens_q, cu_seqlens_k)
        do = torch.zeros_like(out) if do is None else do
        return *launcher.backward(do, dlse, q, k, v, out, lse, packing, seed, ctx.options), None, None, None


_OPTIONS = (
    "SymInt max_seqlen_q, SymInt max_seqlen_k, SymInt window_left, SymInt window_right, "
    "float scale, float softcap, float dropout_p"
)
_PACKING = "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? seed"

_library = torch.library.Library("gptkern", "FRAGMENT")
_library.define(f"flash_attention(Tensor q, Tensor k, Tensor v, {_PACKING}, {_OPTIONS}) -> (Tensor, Tensor)")
_library.define(
    "flash_attention_backward(Tensor do, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, "
    f"Tensor lse, {_PACKING}, {_OPTIONS}) -> (Tensor, Tensor, Tensor)"
)


@contextmanager
def _seeded(seed: torch.Tensor | None) -> Iterator[None]:
    """PyTorch's CPU generator in a state that ``seed`` alone decides: backward draws the same mask."""
    with torch.random.fork_rng(devices=(), enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(int(seed))
        yield


def _check_op(
    op: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, packing: Packing, seed: Any, o: Options
) -> None:
    """What the public functions have checked, of a call that did not come through them."""
    packed = packing.cu_seqlens_q is not None or packing.cu_seqlens_k is not None
    check(op, q, k, v, 3 if packed else 4)
    if packed:
        check_packing(op, q, k.shape[0], packing, o.max_seqlen_q, o.max_seqlen_k)
    elif (o.max_seqlen_q, o.max_seqlen_k) != (q.shape[1], k.shape[1]):
        raise ValueError(
            f"{op}: max_seqlen_q and max_seqlen_k are {o.max_seqlen_q} and {o.max_seqlen_k}; "
            f"q and k have {q.shape[1]} and {k.shape[1]} positions"
        )
    if min(o.window_left, o.window_right) < UNLIMITED:
        raise ValueError(f"{op}: the window is {o.window_left}, {o.window_right}; -1 or more is accepted")
    make_options(op, q, 0, 0, (0, 0), o.scale, o.softcap or None, o.dropout_p)
    if o.dropout_p > 0.0:
        _checks.tensor(op, "seed", seed, dim=1)
        _checks.dtype(op, "seed", seed, (torch.int64,))
        _checks.shape(op, "seed", seed, (1,))
        _checks.same_device(op, q=q, seed=seed)


def _check_grads(q: torch.Tensor, packed: bool, **values: torch.Tensor | None) -> None:
    op = "flash_attention_backward"
    for name, value in values.items():
        if value is not None:
            rows = "lse" in name
            _checks.shape(op, name, value, launcher.lse_shape(q, packed) if rows else q.shape)
            _checks.dtype(op, name, value, (torch.float32,) if rows else (q.dtype,))
    _checks.same_device(op, q=q, **values)


def _op_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor | None,
    cu_seqlens_k: torch.Tensor | None,
    seed: torch.Tensor | None,
    *options: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    packing, o = Packing(cu_seqlens_q, cu_seqlens_k), Options(*options)
    _check_op("flash_attention", q, k, v, packing, seed, o)
    if use_kernel(q):
        return launcher.forward(q, k, v, packing, seed, o)
    with _seeded(seed):
        out, lse = _reference(q, k, v, packing, o)
    return out.contiguous(), lse.to(torch.float32).contiguous()


def _op_backward(
    do: torch.Tensor,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    cu_seqlens_q: torch.Tensor | None,
    cu_seqlens_k: torch.Tensor | None,
    seed: torch.Tensor | None,
    *options: Any,
) -> tuple[torch.Tensor, ...]:
    packing, o = Packing(cu_seqlens_q, cu_seqlens_k), Options(*options)
    _check_op("flash_attention_backward", q, k, v, packing, seed, o)
    _check_grads(q, cu_seqlens_q is not None, do=do, dlse=dlse, out=out, lse=lse)
    if use_kernel(q):
        return launcher.backward(do, dlse, q, k, v, out, lse, packing, seed, o)
    with torch.enable_grad(), _seeded(seed):
        inputs = [t.detach().requires_grad_() for t in (q, k, v)]
        results = _reference(inputs[0], inputs[1], inputs[2], packing, o)
        grads = (do, torch.zeros_like(results[1]) if dlse is None else dlse.to(results[1].dtype))
        return tuple(t.contiguous() for t in torch.autograd.grad(results, inputs, grads))


def _fake_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens_q: torch.Tensor | None, *rest: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    lse_shape = launcher.lse_shape(q, cu_seqlens_q is not None)
    return q.new_empty(q.shape), q.new_empty(lse_shape, dtype=torch.float32)


def _fake_backward(
    do: torch.Tensor, dlse: torch.Tensor | None, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    q, k, v, cu_seqlens_q, cu_seqlens_k, seed, *ctx.options = inputs
    ctx.save_for_backward(q, k, v, *output, cu_seqlens_q, cu_seqlens_k, seed)


def _autograd_backward(ctx: Any, do: torch.Tensor, dlse: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    grads = torch.ops.gptkern.flash_attention_backward(do, dlse, *ctx.saved_tensors, *ctx.options)
    return *grads, *[None] * (3 + len(Options._fields))


for _key in ("CPU", "CUDA"):
    _library.impl("flash_attention", _op_forward, _key)
    _library.impl("flash_attention_backward", _op_backward, _key)
torch.library.register_fake("gptkern::flash_attention", _fake_forward, lib=_library)
torch.library.register_fake("gptkern::flash_attention_backward", _fake_backward, lib=_library)
torch.library.register_autograd(
    "gptkern::flash_attention", _autograd_backward, setup_context=_setup_context, lib=_library
)
