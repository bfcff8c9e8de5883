"""A whole decode step, one launch."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from gptkern.ops import _checks
from gptkern.ops._dispatch import needs_grad, traced, use_kernel
from gptkern.ops._types import FP8, KvScales
from gptkern.ops.decode_step.launcher import launch_step
from gptkern.ops.decode_step.weights import COLUMNS, MATRICES, StepWeights, flat, unflat

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
    scales: KvScales | None = None,
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
        TypeError, ValueError: an argument is not as described here, a weight requires grad, or on a CPU
            without the interpreter.
    """
    _check(weights, tokens, live, k_cache, v_cache, page_table, seq_lens, scales)
    # Every tensor of a large model: nobody looks at them where no gradients are kept.
    if torch.is_grad_enabled() and needs_grad(
        weights.token_weight, weights.position_weight, *(t for row in weights.rows() for t in row)
    ):
        raise ValueError("persistent_step: a weight requires grad; it is forward only: use torch.no_grad()")
    if traced(weights.token_weight):
        logits: torch.Tensor = torch.ops.gptkern.persistent_step(
            *flat(weights), tokens, live, k_cache, v_cache, page_table, seq_lens, *(scales or (None, None))
        )
        return logits
    return launch_step(weights, tokens, live, k_cache, v_cache, page_table, seq_lens, scales)


def _check(
    weights: StepWeights, tokens: torch.Tensor, live: torch.Tensor, k_cache: torch.Tensor,
    v_cache: torch.Tensor, page_table: torch.Tensor, seq_lens: torch.Tensor, scales: KvScales | None,
) -> None:  # fmt: skip
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
    if scales is not None:
        _checks.fp8_device(op, "the cache", k_cache.device)
        _checks.kv_scales(op, scales, (len(weights.layers), heads), "one per layer and head of the cache")
    _checks.same_device(
        op, weights=weights.token_weight, tokens=tokens, live=live, k_cache=k_cache, v_cache=v_cache,
        page_table=page_table, seq_lens=seq_lens,
    )  # fmt: skip


def _step(
    token_weight: torch.Tensor,
    position_weight: torch.Tensor,
    weights: Sequence[torch.Tensor | None],
    attention_scales: Sequence[float],
    heads: int,
    eps: float,
    activation: str,
    format: str | None,
    tokens: torch.Tensor,
    live: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    page_table: torch.Tensor,
    seq_lens: torch.Tensor,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
) -> torch.Tensor:
    model = unflat(token_weight, position_weight, weights, attention_scales, heads, eps, activation, format)
    if (k_scale is None) != (v_scale is None):
        raise ValueError("persistent_step: k_scale and v_scale: both or neither are needed")
    scales = None if k_scale is None or v_scale is None else (k_scale, v_scale)
    given = (model, tokens, live, k_cache, v_cache, page_table, seq_lens, scales)
    _check(*given)
    return launch_step(*given)


_library = torch.library.Library("gptkern", "FRAGMENT")
_library.define(
    "persistent_step(Tensor token_weight, Tensor position_weight, Tensor?[] weights, "
    "float[] attention_scales, SymInt heads, float eps, str activation, str? format, Tensor tokens, "
    "Tensor live, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor page_table, Tensor(c!) seq_lens, "
    "Tensor? k_scale, Tensor? v_scale) -> Tensor"
)
for _key in ("CUDA", "CPU"):
    _library.impl("persistent_step", _step, _key)


@torch.library.register_fake("gptkern::persistent_step", lib=_library)
def _(
    token_weight: torch.Tensor,
    position_weight: torch.Tensor,
    weights: Sequence[torch.Tensor | None],
    attention_scales: Sequence[float],
    heads: int,
    eps: float,
    activation: str,
    format: str | None,
    tokens: torch.Tensor,
    live: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    page_table: torch.Tensor,
    seq_lens: torch.Tensor,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
) -> torch.Tensor:
    head = weights[len(weights) - COLUMNS + MATRICES]
    assert head is not None
    return token_weight.new_empty((tokens.shape[0], head.shape[0]))
