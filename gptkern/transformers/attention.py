"""``attn_implementation="gptkern"``: the attention of every model that honours ``AttentionInterface``."""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface

from gptkern import ops
from gptkern._at_import import NAME, PAGED
from gptkern.environment import fallback
from gptkern.routes import LIBRARY
from gptkern.transformers.masks import gptkern_mask


def register() -> None:
    """Replace the placeholders that ``import gptkern`` registered by the functions themselves."""
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, gptkern_mask)
    AttentionInterface.register(PAGED, paged_attention_forward)


def attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    cache: Any = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention with the signature of ``AttentionInterface``.

    Args:
        query: ``(batch, heads, queries, head_dim)``.
        key, value: ``(batch, kv_heads, keys, head_dim)``, the unused places of a static cache included.
        attention_mask: The result of ``gptkern_mask``, or any 4-dimensional mask.
        scaling: The complete factor on the scores.
        cache, cu_seq_lens_q: Packed sequences; see ``paged_attention_forward``.

    Returns:
        ``(batch, queries, heads, head_dim)``, and the weights if the caller wants attentions.

    Raises:
        ValueError: Attention sinks or a position bias, which are not supported.
    """
    if cache is not None or kwargs.get("cu_seq_lens_q") is not None:
        options: dict[str, Any] = {"scaling": scaling, "softcap": softcap, "sliding_window": sliding_window}
        return paged_attention_forward(module, query, key, value, attention_mask, cache, **options, **kwargs)
    for name in ("s_aux", "position_bias", "sinks"):
        if kwargs.get(name) is not None:
            raise ValueError(f"gptkern attention: {name} was given; choose attn_implementation='eager'")
    if is_causal is None:
        is_causal = bool(getattr(module, "is_causal", True))
    if attention_mask is not None and attention_mask.dim() == 2:
        key, value = key[:, :, : attention_mask.shape[1]], value[:, :, : attention_mask.shape[1]]
    window = sliding_window if is_causal else None
    if _wants_weights(kwargs):
        fallback("attention", LIBRARY, "output_attentions needs the matrix of weights")
        return _eager(module, query, key, value, attention_mask, dropout, scaling, window, softcap, is_causal)
    if attention_mask is not None and attention_mask.dim() == 4:
        if softcap is not None:
            return _eager(
                module, query, key, value, attention_mask, dropout, scaling, window, softcap, is_causal
            )
        return _masked(query, key, value, attention_mask, dropout, scaling), None
    q, k, v = (t.transpose(1, 2) for t in (query, key, value))
    options = {"scale": scaling, "window": window, "softcap": softcap, "dropout_p": dropout}
    if attention_mask is None:
        out = ops.flash_attention(q, k, v, causal=is_causal, **options)
        assert isinstance(out, torch.Tensor)
        return out, None
    padding_attends = getattr(module, "padding_attends", False)
    if padding_attends and window is not None:
        # Which keys of a window are real differs from one place of padding to the next.
        pattern = _visible(query.shape[2], key.shape[2], query.device, attention_mask, window, is_causal)
        return _masked(query, key, value, pattern, dropout, scaling), None
    out = _padded(q, k, v, attention_mask, causal=is_causal, options=options)
    if padding_attends and q.shape[1] == k.shape[1] == attention_mask.shape[1]:
        seen = _padded(q, k, v, attention_mask, causal=False, options=options)
        out = torch.where(attention_mask[..., None, None], out, seen)
    return out, None


def _padded(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor,
    *,
    causal: bool,
    options: dict[str, Any],
) -> torch.Tensor:
    """Attention among the tokens that are not padding, packed; 0 for padding.

    Tensors are ``(batch, seq, heads, head_dim)``. Padding is sorted to the end rather than left out, so that
    shapes do not depend on its amount and nothing waits for the device.
    """
    batch, seq_q, seq_k = *q.shape[:2], k.shape[1]
    q_mask = mask[:, -seq_q:] if causal else mask.new_ones(batch, seq_q)
    if q_mask.shape[1] < seq_q:
        q_mask = F.pad(q_mask, (seq_q - q_mask.shape[1], 0), value=True)
    order_q, cu_q = _packing(q_mask)
    order_k, cu_k = (order_q, cu_q) if causal and seq_q == seq_k else _packing(mask)
    packed = ops.flash_attention_varlen(
        q.reshape(-1, *q.shape[2:])[order_q],
        k.reshape(-1, *k.shape[2:])[order_k],
        v.reshape(-1, *v.shape[2:])[order_k],
        cu_q,
        cu_k,
        seq_q,
        seq_k,
        causal=causal,
        **options,
    )
    assert isinstance(packed, torch.Tensor)
    back = torch.empty_like(order_q).scatter_(
        0, order_q, torch.arange(order_q.numel(), device=order_q.device)
    )
    return packed[back].view(batch, seq_q, *packed.shape[1:])


def _packing(mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The order that puts real tokens first, and the beginning of each sequence in it."""
    order = torch.argsort(~mask.reshape(-1), stable=True)
    cu_seqlens = F.pad(mask.sum(1).cumsum(0), (1, 0)).to(torch.int32)
    return order, cu_seqlens


def _masked(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    dropout: float,
    scaling: float | None,
) -> torch.Tensor:
    """PyTorch's attention, for patterns that need a matrix."""
    # One query has no matrix of scores to save; and a compiled graph cannot warn.
    if query.device.type == "cuda" and query.shape[2] > 1 and not torch.compiler.is_compiling():
        fallback("attention", LIBRARY, "the mask is a matrix")
    out = F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask[..., : key.shape[2]],
        dropout_p=dropout,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return out.transpose(1, 2).contiguous()


def _eager(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    dropout: float,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
    is_causal: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The textbook's attention, which computes the weights and returns them."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = query @ key.transpose(-1, -2) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    least = torch.finfo(scores.dtype).min
    if mask is not None and mask.dim() == 4 and mask.dtype != torch.bool:
        scores = scores + mask[..., : key.shape[2]]
    else:
        if mask is None or mask.dim() == 2:
            visible = _visible(query.shape[2], key.shape[2], query.device, mask, window, is_causal)
        else:
            visible = mask[..., : key.shape[2]]
        scores = scores.masked_fill(~visible, least)
    weights = scores.softmax(-1, dtype=torch.float32).to(value.dtype)
    weights = F.dropout(weights, dropout, training=module.training)
    return (weights @ value).transpose(1, 2), weights


def _visible(
    queries: int,
    keys: int,
    device: torch.device,
    mask: torch.Tensor | None,
    window: int | None,
    is_causal: bool,
) -> torch.Tensor:
    """True where a query sees a key: ``(queries, keys)``; with a mask ``(batch, 1, queries, keys)``."""
    distance = (torch.arange(queries, device=device)[:, None] + keys - queries) - torch.arange(
        keys, device=device
    )
    visible = torch.ones_like(distance, dtype=torch.bool)
    if is_causal:
        visible &= distance >= 0
    if window is not None:
        visible &= distance < window
    return visible if mask is None else visible & mask[:, None, None, :]


def _wants_weights(kwargs: dict[str, Any]) -> bool:
    """True if the caller wants attention weights; most models do not pass ``output_attentions`` on."""
    if kwargs.get("output_attentions"):
        return True
    collected = _collector()
    return collected is not None and any("attentions" in key for key in collected)


def _collector() -> dict[str, Any] | None:
    try:
        from transformers.utils.output_capturing import _active_collector
    except ImportError:
        return None
    collector: dict[str, Any] | None = _active_collector.get()
    return collector


def paged_attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    cache: Any = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    cu_seq_lens_k: torch.Tensor | dict[str, torch.Tensor] | None = None,
    scaling: float | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of transformers' continuous batching: packed queries over the library's paged cache.

    Args:
        query: ``(1, heads, tokens, head_dim)``: the new tokens of all requests, end to end.
        key, value: Keys and values of the new tokens if there is a cache, else of all tokens.
        cache: The library's cache: its ``update`` takes the new keys and values and returns those of all
            requests, end to end. From transformers 5.24 on the models call it themselves.
        cu_seq_lens_q, cu_seq_lens_k: The beginning of each request; for keys a dict with one tensor for each
            kind of layer is possible.
        scaling: The complete factor on the scores; the module's own when None.

    Raises:
        ValueError: A call without the packed sequences that continuous batching prepares.
    """
    if cu_seq_lens_q is None or cu_seq_lens_k is None:
        raise ValueError(
            f"gptkern attention: {PAGED!r} was called without packed sequences; it serves generate_batch, "
            f"and attn_implementation={NAME!r} every other call"
        )
    window = sliding_window or getattr(module, "sliding_window", None) or None
    kind = "full_attention" if window is None else "sliding_attention"
    if isinstance(cu_seq_lens_k, dict):
        cu_seq_lens_k = cu_seq_lens_k[kind]
    longest_q, longest_k = (_longest(kwargs, side, kind) for side in "qk")
    if cache is None:
        keys, values = key[0].transpose(0, 1), value[0].transpose(0, 1)
    else:
        keys, values = _all_of(cache, module, key, value, {**kwargs, "cu_seq_lens_k": {kind: cu_seq_lens_k}})
    out = ops.flash_attention_varlen(
        query[0].transpose(0, 1),
        keys,
        values,
        cu_seq_lens_q.to(torch.int32),
        cu_seq_lens_k.to(torch.int32),
        longest_q or query.shape[2],
        longest_k or keys.shape[0],
        scale=getattr(module, "scaling", None) if scaling is None else scaling,
        window=window,
        softcap=softcap,
    )
    assert isinstance(out, torch.Tensor)
    return out[None], None


def _longest(kwargs: dict[str, Any], side: str, kind: str) -> int:
    """The longest sequence of queries or keys, under either of the library's names; 0 if unknown."""
    length = kwargs.get(f"max_length_{side}", kwargs.get(f"max_seqlen_{side}"))
    return int((length[kind] if isinstance(length, dict) else length) or 0)


def _all_of(
    cache: Any, module: torch.nn.Module, key: torch.Tensor, value: torch.Tensor, kwargs: dict[str, Any]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of all requests, ``(tokens, kv_heads, head_dim)``; the cache takes in the new ones."""
    new = {"key_states": key, "value_states": value, "layer_idx": module.layer_idx}
    if "kwargs" not in inspect.signature(cache.update).parameters:  # up to transformers 5.22
        both: tuple[torch.Tensor, torch.Tensor] = cache.update(
            **new, read_index=kwargs["read_index"], write_index=kwargs["write_index"]
        )
        return both
    kwargs.setdefault("max_length_k", dict.fromkeys(kwargs["cu_seq_lens_k"], 0))
    keys, values = cache.update(**new, kwargs=kwargs)
    return keys[0].transpose(0, 1), values[0].transpose(0, 1)


register()
