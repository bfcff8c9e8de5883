"""A whole decode step, one launch."""

from __future__ import annotations

import torch

from gptkern.ops import _checks
from gptkern.ops._dispatch import use_kernel
from gptkern.ops.decode_attention.reference import FP8, Scales
from gptkern.ops.decode_step.launcher import launch_step
from gptkern.ops.decode_step.weights import StepWeights

# With more sequences than this the weights are no longer most of what a step reads.
MOST_ROWS = 8


def persistent_step(
    weights: StepWeights,
    tokens: torch.Tensor,
    live: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    page_table: torch.Tensor,
    seq_lens: torch.Tensor,
    scales: Scales = None,
) -> torch.Tensor:
    """Append one token to each sequence and give the logits, in one cooperative launch.

    The same bits as ``decode_embed``, then of each layer ``decode_qkv``, ``decode_attention`` and three times
    ``decode_linear``, then ``decode_linear`` of the head; but for fp32 heads wider than 128 on GPUs before
    sm_90, where attention alone has more warps and sums in another order. Forward only, by the kernel alone.

    Args:
        weights: The model's. Their addresses are read once, their values at every call.
        tokens: ``(rows,)`` int64, at most ``MOST_ROWS``.
        live: ``(1,)`` int32: rows from here on are padding.
        k_cache, v_cache: ``(layers, pages, page_size, heads, head_dim)`` of the weights' dtype, or e4m3;
            contiguous in the last two.
        page_table: ``(rows, max_pages)`` int32, with a page for each live sequence's new token.
        seq_lens: ``(rows,)`` int32, advanced in place.
        scales: (k_scale, v_scale) of an e4m3 cache, ``(layers, heads)`` fp32, contiguous.

    Returns:
        ``(rows, vocabulary)`` in the weights' dtype.

    Raises:
        TypeError, ValueError: an argument is not as described here, or on a CPU without the interpreter.
    """
    op = "persistent_step"
    if not use_kernel(weights.token_weight):
        raise ValueError(f"{op}: the weights are on {weights.token_weight.device}; a CUDA device is needed")
    rows = tokens.shape[0] if tokens.dim() else 0
    if not 1 <= rows <= MOST_ROWS:
        raise ValueError(f"{op}: tokens has {rows} rows; 1 to {MOST_ROWS} are accepted")
    integers: dict[str, tuple[torch.Tensor, tuple[int, ...], torch.dtype]] = {
        "tokens": (tokens, (rows,), torch.int64),
        "live": (live, (1,), torch.int32),
        "page_table": (page_table, (rows, page_table.shape[-1]), torch.int32),
        "seq_lens": (seq_lens, (rows,), torch.int32),
    }
    for name, (value, shape, dtype) in integers.items():
        _checks.shape(op, name, value, shape)
        _checks.dtype(op, name, value, (dtype,))
        _checks.last_dim_contiguous(op, name, value)
    width, heads = weights.token_weight.shape[1], weights.heads
    head_dim = width // heads
    kept = FP8 if scales is not None else weights.token_weight.dtype
    for name, cache in {"k_cache": k_cache, "v_cache": v_cache}.items():
        expected = (len(weights.layers), *k_cache.shape[1:3], heads, head_dim)
        _checks.shape(op, name, cache, expected)
        _checks.dtype(op, name, cache, (kept,))
        if cache.stride()[3:] != (head_dim, 1):
            raise ValueError(
                f"{op}: {name} has strides {cache.stride()}; the last two must be ({head_dim}, 1)"
            )
    for name, value in zip(("k_scale", "v_scale"), scales or (), strict=False):
        _checks.shape(op, name, value, (len(weights.layers), heads))
        _checks.dtype(op, name, value, (torch.float32,))
    _checks.same_device(
        op, weights=weights.token_weight, tokens=tokens, live=live, k_cache=k_cache, v_cache=v_cache,
        page_table=page_table, seq_lens=seq_lens,
    )  # fmt: skip
    return launch_step(weights, tokens, live, k_cache, v_cache, page_table, seq_lens, scales)
