"""Argument errors of the persistent step."""

from __future__ import annotations

import torch

from gptkern.ops import _checks
from gptkern.ops._types import FP8
from gptkern.ops.decode_step.launch import StepArguments

# With more sequences than this the weights are no longer most of what a step reads.
MOST_ROWS = 8


def check(op: str, a: StepArguments) -> None:
    """Raise for arguments that ``persistent_step`` does not accept."""
    rows = a.tokens.shape[0] if a.tokens.dim() else 0
    if not 1 <= rows <= MOST_ROWS:
        raise ValueError(f"{op}: tokens has {rows} rows; 1 to {MOST_ROWS} are accepted")
    integers: dict[str, tuple[torch.Tensor, tuple[int, ...], torch.dtype]] = {
        "tokens": (a.tokens, (rows,), torch.int64),
        "live": (a.live, (1,), torch.int32),
        "page_table": (a.page_table, (rows, a.page_table.shape[-1]), torch.int32),
        "seq_lens": (a.seq_lens, (rows,), torch.int32),
    }
    for name, (value, shape, dtype) in integers.items():
        _checks.shape(op, name, value, shape)
        _checks.dtype(op, name, value, (dtype,))
        _checks.last_dim_contiguous(op, name, value)
    width, heads = a.weights.token_weight.shape[1], a.weights.heads
    head_dim, layers = width // heads, len(a.weights.layers)
    cache_dtype = a.weights.token_weight.dtype if a.scales is None else FP8
    for name, cache in {"k_cache": a.k_cache, "v_cache": a.v_cache}.items():
        _checks.shape(op, name, cache, (layers, *a.k_cache.shape[1:3], heads, head_dim))
        _checks.dtype(op, name, cache, (cache_dtype,))
        if cache.stride()[3:] != (head_dim, 1):
            raise ValueError(
                f"{op}: {name} has strides {cache.stride()}; the last two must be ({head_dim}, 1)"
            )
    if a.scales is not None:
        _checks.fp8_device(op, "the cache", a.k_cache.device)
        _checks.kv_scales(op, a.scales, (layers, heads), "one per layer and head of the cache")
    _checks.same_device(
        op,
        weights=a.weights.token_weight,
        tokens=a.tokens,
        live=a.live,
        k_cache=a.k_cache,
        v_cache=a.v_cache,
        page_table=a.page_table,
        seq_lens=a.seq_lens,
    )
