"""flash-attn 2's names and signatures (version 2.8) as thin fronts of the same op."""

from __future__ import annotations

from typing import Any

import torch

from gptkern.ops import _checks
from gptkern.ops.flash_attention import checks, op, paged
from gptkern.ops.flash_attention.launch import UNLIMITED, Extras, Options, Packed


def options_of(
    name: str,
    q: torch.Tensor,
    causal: bool,
    window_size: tuple[int, int],
    softmax_scale: float | None,
    softcap: float,
    dropout_p: float = 0.0,
) -> Options:
    """The settings of a call by flash-attn's names, checked; a softcap of 0 is none."""
    if softmax_scale is not None:
        _checks.positive(name, "softmax_scale", softmax_scale)
    capped = _checks.number(name, "softcap", softcap) or None
    return op.make_options(name, q, _span(name, causal, window_size), softmax_scale, capped, dropout_p)


def _span(name: str, causal: bool, window_size: tuple[int, int]) -> tuple[int, int]:
    if not isinstance(window_size, (tuple, list)) or len(window_size) != 2:
        raise TypeError(f"{name}: window_size is {window_size!r}; two ints, (left, right), are needed")
    left, right = window_size
    for side in window_size:
        _checks.whole(name, "each side of window_size", side, UNLIMITED)
    return left, 0 if causal else right


def _refuse(name: str, dropout_p: float, return_attn_probs: bool) -> None:
    if return_attn_probs and dropout_p > 0.0:
        raise ValueError(
            f"{name}: return_attn_probs is True with dropout_p {dropout_p}: the dropout mask is not kept; "
            "it is supported with dropout_p 0, where it returns (out, softmax_lse, None)"
        )


def flash_attn_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """``flash_attn.flash_attn_func`` of flash-attn 2, over ``gptkern.ops.flash_attention``.

    Args:
        q, k, v: as in ``gptkern.ops.flash_attention``, ``(batch, seq, heads, head_dim)``.
        window_size: keys before and after a query's own position that it sees, -1 for no limit.
        softcap: 0 for none.
        alibi_slopes: ``(heads,)`` or ``(batch, heads)`` fp32, as in ``gptkern.ops.flash_attention``.
        deterministic: either way backward is deterministic.
        return_attn_probs: return ``(out, softmax_lse, None)``; only without dropout.

    Raises:
        TypeError, ValueError: an argument is not supported, or not as described.
    """
    name = "flash_attn_func"
    _refuse(name, dropout_p, return_attn_probs)
    q, k, v = op.cast(q, k, v)
    checks.check(name, q, k, v, None)
    checks.check_slopes(name, q, None, alibi_slopes)
    options = options_of(name, q, causal, window_size, softmax_scale, softcap, dropout_p)
    result = op.attend(q, k, v, None, options, return_attn_probs, Extras(None, alibi_slopes))
    return (*result, None) if return_attn_probs else result


def flash_attn_varlen_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: torch.Tensor | None = None,
) -> Any:
    """``flash_attn.flash_attn_varlen_func`` of flash-attn 2, over ``gptkern.ops.flash_attention_varlen``.

    Args:
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k: as in
            ``gptkern.ops.flash_attention_varlen``, tensors ``(tokens, heads, head_dim)``.
        block_table: ``(sequences, max_blocks)`` int32: k and v are then a paged cache, ``(blocks, block_size,
            kv_heads, head_dim)``, of which the tokens are copied first. ``decode_attention`` reads a cache
            where it lies.
        The others: as in ``flash_attn_func``.

    Raises:
        TypeError, ValueError: an argument is not supported, or not as described.
    """
    name = "flash_attn_varlen_func"
    _refuse(name, dropout_p, return_attn_probs)
    if block_table is not None:
        paged.check_table(name, k, v, block_table)
        _checks.tensor(name, "cu_seqlens_k", cu_seqlens_k, dim=1)
        if cu_seqlens_k.shape[0] != block_table.shape[0] + 1:
            raise ValueError(
                f"{name}: block_table has {block_table.shape[0]} rows, cu_seqlens_k {cu_seqlens_k.shape[0]} "
                "entries: one row for each sequence is needed"
            )
        most = block_table.shape[1] * k.shape[1]
        if max_seqlen_k > most:
            raise ValueError(f"{name}: max_seqlen_k is {max_seqlen_k}; block_table holds {most} tokens a row")
        k, v = paged.packed(k, v, block_table, cu_seqlens_k, max_seqlen_k)
    q, k, v = op.cast(q, k, v)
    packed = Packed(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    checks.check(name, q, k, v, packed)
    checks.check_slopes(name, q, packed, alibi_slopes)
    options = options_of(name, q, causal, window_size, softmax_scale, softcap, dropout_p)
    result = op.attend(q, k, v, packed, options, return_attn_probs, Extras(None, alibi_slopes))
    return (*result, None) if return_attn_probs else result


def flash_attn_qkvpacked_func(
    qkv: torch.Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """``flash_attn.flash_attn_qkvpacked_func``: ``flash_attn_func`` of one tensor.

    Args:
        qkv: ``(batch, seq, 3, heads, head_dim)``, read where it lies.
        The others: as in ``flash_attn_func``.

    Raises:
        TypeError, ValueError: an argument is not supported, or not as described.
    """
    q, k, v = _parts("flash_attn_qkvpacked_func", "qkv", qkv, 3)
    rest = (dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic)
    return flash_attn_func(q, k, v, *rest, return_attn_probs)


def flash_attn_kvpacked_func(
    q: torch.Tensor,
    kv: torch.Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """``flash_attn.flash_attn_kvpacked_func``: ``flash_attn_func`` with keys and values in one tensor.

    Args:
        q: ``(batch, seq_q, heads, head_dim)``.
        kv: ``(batch, seq_k, 2, kv_heads, head_dim)``, read where it lies.
        The others: as in ``flash_attn_func``.

    Raises:
        TypeError, ValueError: an argument is not supported, or not as described.
    """
    k, v = _parts("flash_attn_kvpacked_func", "kv", kv, 2)
    rest = (dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic)
    return flash_attn_func(q, k, v, *rest, return_attn_probs)


def _parts(name: str, argument: str, value: torch.Tensor, count: int) -> tuple[torch.Tensor, ...]:
    _checks.tensor(name, argument, value, dim=5)
    if value.shape[2] != count:
        raise ValueError(
            f"{name}: {argument} has shape {tuple(value.shape)}; "
            f"(batch, seq, {count}, heads, head_dim) is needed"
        )
    return value.unbind(2)
