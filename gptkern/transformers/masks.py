"""The mask function behind ``attn_implementation="gptkern"``: lengths and padding, not a matrix.

The mask that the attention function gets is one of

- None: every key is visible, up to the causal order aligned to the bottom right;
- ``(batch, keys)`` bool: True for the real ones of the first ``keys`` keys. A static cache passes its whole
  buffer as keys; a shorter mask then is their true length, which the library's masks do not have;
- ``(batch, 1, queries, keys)`` bool: a pattern that the kernels do not know, and the mask of one query over a
  static cache, which must have one shape from the first token to the last.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers.masking_utils import (
    bidirectional_mask_function,
    causal_mask_function,
    prepare_padding_mask,
    sdpa_mask,
)


def gptkern_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    config: Any = None,
    **kwargs: Any,
) -> torch.Tensor | None:
    """The mask of one forward pass, as described above; arguments are ``AttentionMaskInterface``'s."""
    static = kv_length > q_length and not isinstance(q_offset, int)
    # Decoding with a static cache is compiled for the mask's shape: a row of all keys has the same shape at
    # every token, and the length stays on the device.
    compiled = static and (q_length == 1 or torch.compiler.is_compiling())
    plain = allow_is_causal_skip or q_length == 1
    # Lengths alone place the queries only if the mask ends with the last query. PEFT's soft prompts pass
    # narrower and wider masks.
    end = q_offset + q_length if isinstance(q_offset, int) else None
    odd = attention_mask is not None and end not in (None, attention_mask.shape[-1])
    if compiled or odd or not _kernels_know(mask_function, local_size, plain, use_vmap, config):
        pattern: torch.Tensor | None = sdpa_mask(
            batch_size,
            q_length,
            kv_length,
            q_offset,
            kv_offset,
            mask_function,
            attention_mask,
            local_size,
            allow_is_causal_skip=False,
            use_vmap=use_vmap,
            device=device,
        )
        return pattern
    causal = mask_function is not bidirectional_mask_function
    real = _real_length(attention_mask, q_length, q_offset, kv_length, kv_offset) if causal else kv_length
    if attention_mask is None:
        if real == kv_length:
            return None
        return torch.ones(1, 1, dtype=torch.bool, device=device).expand(batch_size, real)
    token_mask: torch.Tensor = prepare_padding_mask(attention_mask, kv_length, kv_offset)
    token_mask = token_mask[:, kv_offset : kv_offset + kv_length][:, :real].bool()
    # Reading a GPU's mask would wait for the GPU: there every mask counts as one with padding.
    if (
        real == kv_length
        and token_mask.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and bool(token_mask.all())
    ):
        return None
    return token_mask


def _kernels_know(
    mask_function: Callable[..., Any],
    local_size: int | None,
    plain: bool,
    use_vmap: bool,
    config: Any,
) -> bool:
    """True for the patterns that the kernels compute: causal, a causal sliding window, no mask."""
    if use_vmap:
        return False
    if mask_function in (causal_mask_function, bidirectional_mask_function):
        return True
    window = getattr(config, "sliding_window", None)
    chunk = getattr(config, "attention_chunk_size", None)
    # The library makes a new sliding-window function at each call: only its size identifies it.
    return plain and local_size is not None and local_size == window and chunk is None


def _real_length(
    attention_mask: torch.Tensor | None,
    q_length: int,
    q_offset: int | torch.Tensor,
    kv_length: int,
    kv_offset: int,
) -> int:
    """The number of real keys: a static cache passes its whole buffer."""
    if attention_mask is not None:
        # It covers past and new tokens: its width is the length, and is known on the host.
        return min(attention_mask.shape[-1] - kv_offset, kv_length)
    if isinstance(q_offset, int):
        return min(q_offset + q_length - kv_offset, kv_length)
    return min(int(q_offset) + q_length - kv_offset, kv_length)
