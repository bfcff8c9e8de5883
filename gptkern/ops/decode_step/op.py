"""A whole decode step, one launch."""

from __future__ import annotations

import torch

from gptkern.ops._dispatch import needs_grad, traced, use_kernel
from gptkern.ops._types import KvScales
from gptkern.ops.decode_step import checks, launch, reference, register  # noqa: F401  (torch.ops)
from gptkern.ops.decode_step.flat import flat
from gptkern.ops.decode_step.launch import StepArguments
from gptkern.ops.decode_step.rows import StepProgram


def persistent_step(
    program: StepProgram,
    tokens: torch.Tensor,
    live: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    page_table: torch.Tensor,
    seq_lens: torch.Tensor,
    scales: KvScales | None = None,
) -> torch.Tensor:
    """Append one token to each sequence and return its logits, in one cooperative launch.

    Bitwise the same as ``decode_embed``, then for each row ``decode_qkv``, ``decode_attention`` or
    ``decode_linear``. One exception: fp32 heads wider than 128 on GPUs before sm_90, where separate attention
    has more warps and sums in another order. Forward only.

    Args:
        program: The model's stages and weights, whose values are read at every call. It has no ``add_norm``
            and no ``heads``, and norms heads of up to 128 elements (64 in fp32).
        tokens: ``(rows,)`` int64, at most ``MOST_ROWS``.
        live: ``(1,)`` int32: the number of rows that are not padding. Padding rows come last.
        k_cache, v_cache: ``(layers, pages, page_size, kv_heads, head_dim)`` of the weights' dtype, or e4m3;
            contiguous in the last two.
        page_table: ``(rows, max_pages)`` int32: the pages of each sequence, that of its new token included.
        seq_lens: ``(rows,)`` int32, raised by one in place.
        scales: (k_scale, v_scale) of an e4m3 cache, ``(layers, kv_heads)`` fp32, contiguous.

    Returns:
        ``(rows, vocabulary)`` in the weights' dtype.

    Raises:
        TypeError, ValueError: an argument is not as described here, or a weight requires grad.
    """
    op = "persistent_step"
    a = StepArguments(program, tokens, live, k_cache, v_cache, page_table, seq_lens, scales)
    checks.check(op, a)
    # Every tensor of a large model: not looked at where no gradients are kept.
    if torch.is_grad_enabled() and needs_grad(*program.tensors()):
        raise ValueError(f"{op}: a weight requires grad; it is forward only: use torch.no_grad()")
    if traced(program.token_weight):
        logits: torch.Tensor = torch.ops.gptkern.persistent_step(
            *flat(program), *a[1:7], *(scales or (None, None))
        )
        return logits
    return launch.step(a) if use_kernel(program.token_weight) else reference.persistent_step(*a)
