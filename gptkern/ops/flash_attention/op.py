"""Attention without a seq x seq matrix in memory: dense and packed batches, forward and backward."""

from __future__ import annotations

import math
from typing import Any, Literal, TypedDict, Unpack, overload

import torch

from gptkern.ops import _checks
from gptkern.ops._dispatch import autocast_dtype, call_key, needs_grad, traced, use_kernel
from gptkern.ops._launch import Plans
from gptkern.ops.flash_attention import checks, launch, register
from gptkern.ops.flash_attention.launch import NO_EXTRAS, UNLIMITED, Extras, Options, Packed

Result = tuple[torch.Tensor, torch.Tensor]

_checked: Plans[Options] = Plans()


class AttentionOptions(TypedDict, total=False):
    """The settings that ``flash_attention`` and ``flash_attention_varlen`` share."""

    causal: bool
    scale: float | None
    window: int | None
    softcap: float | None
    dropout_p: float
    alibi_slopes: torch.Tensor | None


@overload
def flash_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    attn_bias: torch.Tensor | None = ...,
    return_lse: Literal[False] = ...,
    **options: Unpack[AttentionOptions],
) -> torch.Tensor: ...
@overload
def flash_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    attn_bias: torch.Tensor | None = ...,
    return_lse: Literal[True],
    **options: Unpack[AttentionOptions],
) -> Result: ...
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
    alibi_slopes: torch.Tensor | None = None,
    attn_bias: torch.Tensor | None = None,
    return_lse: bool = False,
) -> torch.Tensor | Result:
    """Softmax attention, ``softmax(scale * q k^T) v``, computed in tiles (Dao 2023, FlashAttention-2).

    Masks are aligned to the bottom right: the last query sees the last key, whatever the two lengths.
    A query that sees no key gives 0, an lse of -inf and no gradient. Deterministic, forward and
    backward. Under autocast q, k and v are cast to the autocast dtype.

    Args:
        q: ``(batch, seq_q, heads, head_dim)``, fp16, bf16 or fp32 (fp64 too where the reference runs),
            head_dim at most 256. Any strides with a contiguous last dimension, 0 among them.
        k: ``(batch, seq_k, heads_k, head_dim)``; heads is a multiple of heads_k, and query head i
            attends with key head ``i // (heads / heads_k)``.
        v: as k, but for a head_dim that may be its own.
        causal: whether a query sees only keys up to its own position.
        scale: factor on the scores, positive; ``1 / sqrt(head_dim)`` unless given.
        window: how far a query sees: its own position and the ``window - 1`` before it, and as many
            after it where not causal.
        softcap: scores become ``softcap * tanh(scores / softcap)``, before the mask.
        dropout_p: probability with which a weight is dropped; the others are divided by
            ``1 - dropout_p``. Drawn from PyTorch's generator of q's device.
        alibi_slopes: ``(heads,)`` or ``(batch, heads)`` fp32: the slope times a key's distance from the
            query's place, ``|i + seq_k - seq_q - j|``, is taken off its score (Press et al. 2022), after the
            softcap.
        attn_bias: added to the scores, after the softcap: ``(batch, heads, seq_q, seq_k)`` of any floating
            dtype, -inf to hide a key. Sizes but the last may be 1, or left out before. No gradient.
        return_lse: also return the log-sum-exp of the scores.

    Returns:
        ``(batch, seq_q, heads, v's head_dim)`` in q's dtype; with ``return_lse`` also ``(batch, heads,
        seq_q)`` in fp32 (natural logarithm), differentiable too.

    Raises:
        TypeError, ValueError: an argument is not as described here.
    """
    name = "flash_attention"
    key = call_key((q, k, v, alibi_slopes, attn_bias), causal, window, scale, softcap, dropout_p)
    key = key and (key, needs_grad(alibi_slopes, attn_bias))
    options = _checked.get(key)
    if options is None:
        q, k, v = cast(q, k, v)
        checks.check(name, q, k, v, None)
        checks.check_slopes(name, q, None, alibi_slopes)
        checks.check_bias(name, q, k, attn_bias)
        options = make_options(name, q, _span(name, causal, window), scale, softcap, dropout_p)
        _checked.keep(key, options)
    bias = attn_bias
    if bias is not None:
        bias = bias.expand(q.shape[0], q.shape[2], q.shape[1], k.shape[1])
    return attend(q, k, v, None, options, return_lse, Extras(None, alibi_slopes, bias))


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
    return_lse: Literal[False] = ...,
    **options: Unpack[AttentionOptions],
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
    return_lse: Literal[True],
    **options: Unpack[AttentionOptions],
) -> Result: ...
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
    alibi_slopes: torch.Tensor | None = None,
    return_lse: bool = False,
) -> torch.Tensor | Result:
    """``flash_attention`` of packed sequences: sequence i is rows ``cu_seqlens[i]`` to ``cu_seqlens[i + 1]``.

    Args:
        q: ``(tokens_q, heads, head_dim)``, otherwise as in ``flash_attention``.
        k: ``(tokens_k, heads_k, head_dim)``.
        v: as k, but for a head_dim that may be its own.
        cu_seqlens_q: ``(sequences + 1,)`` int32 on q's device: 0, then the running total of lengths. On a
            GPU, where a check would stall, offsets that decrease or pass the last token are cut off there.
        cu_seqlens_k: the same of k; sequences of q and k may differ in length.
        max_seqlen_q: at least the longest length in ``cu_seqlens_q``. On a GPU, where a check would stall,
            all results of a longer sequence are NaN, its gradients too.
        max_seqlen_k: the same of ``cu_seqlens_k``.
        alibi_slopes: ``(heads,)`` or ``(sequences, heads)`` fp32, as in ``flash_attention``.
        causal, scale, window, softcap, dropout_p, return_lse: as in ``flash_attention``.

    Returns:
        ``(tokens_q, heads, v's head_dim)`` in q's dtype, 0 for tokens of no sequence; with ``return_lse``
        also ``(heads, tokens_q)`` in fp32.

    Raises:
        TypeError, ValueError: an argument is not as described here.
    """
    name = "flash_attention_varlen"
    packed = Packed(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    tensors, longest = (q, k, v, cu_seqlens_q, cu_seqlens_k, alibi_slopes), (max_seqlen_q, max_seqlen_k)
    key = call_key(tensors, *longest, causal, window, scale, softcap, dropout_p)
    key = key and (key, needs_grad(alibi_slopes))
    options = _checked.get(key)
    if options is None:
        q, k, v = cast(q, k, v)
        checks.check(name, q, k, v, packed)
        checks.check_slopes(name, q, packed, alibi_slopes)
        options = make_options(name, q, _span(name, causal, window), scale, softcap, dropout_p)
        _checked.keep(key, options)
    else:
        checks.check_offsets(name, q, k, packed)
    return attend(q, k, v, packed, options, return_lse, Extras(None, alibi_slopes))


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    packed: Packed | None,
    o: Options,
    return_lse: bool,
    extras: Extras = NO_EXTRAS,
) -> torch.Tensor | Result:
    """The result of checked arguments: chooses the implementation, and what autograd sees of it.

    ``extras`` has no seed yet.
    """
    compiling, kernel = traced(q), use_kernel(q)
    if not kernel and not (packed is not None and compiling):
        plain = None
        if not return_lse and extras.slopes is None and extras.bias is None:
            plain = register.attention_without_scores(q, k, v, packed, o)
        if plain is not None:
            return plain
        out, lse = register.reference_attention(q, k, v, packed, extras, o)
        return (out, lse) if return_lse else out
    if o.dropout_p > 0.0:
        # Drawn on the device: no synchronisation, and a captured graph draws anew at each replay.
        seed = torch.randint(2**62, (1,), dtype=torch.int64, device=q.device)
        extras = extras._replace(seed=seed)
    if compiling:
        out, lse = torch.ops.gptkern.flash_attention(*register.flat_arguments(q, k, v, packed, extras, o))
    elif needs_grad(q, k, v):
        out, lse = register.FlashAttention.apply(q, k, v, packed, extras, o)
    else:
        out, lse = launch.forward(q, k, v, packed, extras, o)
    return (out, lse) if return_lse else out


def cast(q: Any, k: Any, v: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k and v in the autocast dtype, where autocast is on; not yet checked arguments."""
    if all(isinstance(t, torch.Tensor) and t.dtype != torch.float64 for t in (q, k, v)):
        dtype = autocast_dtype(q)
        if dtype is not None:
            return q.to(dtype), k.to(dtype), v.to(dtype)
    return q, k, v


def make_options(
    op: str,
    q: torch.Tensor,
    span: tuple[int, int],
    scale: float | None,
    softcap: float | None,
    dropout_p: float,
) -> Options:
    """The settings of a call, checked; ``span`` is the window's left and right."""
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale
    checks.check_numbers(op, scale, softcap, dropout_p)
    return Options(*span, float(scale), float(softcap or 0.0), float(dropout_p))


def _span(op: str, causal: bool, window: int | None) -> tuple[int, int]:
    """The number of keys before and after its own position that a query sees."""
    _checks.whole(op, "window", window, 1, none=True)
    left = UNLIMITED if window is None else window - 1
    return left, 0 if causal else left
