"""The beginning of a decode step, one launch."""

from __future__ import annotations

import torch
import triton

from gptkern.ops import _checks, _launch, _pdl
from gptkern.ops._dispatch import needs_grad, traced, use_kernel
from gptkern.ops.decode_embed import kernels, reference

EMBED_COLUMNS = 1024


def decode_embed(
    tokens: torch.Tensor,
    live: torch.Tensor,
    token_weight: torch.Tensor,
    position_weight: torch.Tensor,
    page_table: torch.Tensor,
    seq_lens: torch.Tensor,
    page_size: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Embed one token of each sequence, at the place after what its cache holds, and count it.

    Args:
        tokens: ``(rows,)`` int64. One outside the vocabulary, or a place that has no weight or no page, is
            an error on a CPU; on a GPU, where looking would stall, it gives NaN, and no slot without a page.
        live: ``(1,)`` int32: rows from here on are padding. They get zeros and no slot.
        token_weight: ``(vocabulary, width)``.
        position_weight: ``(positions, width)``, of the same dtype.
        page_table: ``(rows, max_pages)`` int32, with a page for each live sequence's new token.
        seq_lens: ``(rows,)`` int32, advanced in place.
        page_size: Tokens a page.

    Returns:
        ``(rows, width)`` of the weights' dtype, and the tokens' cache slots ``(rows,)`` int64, -1 for
        padding.

    Forward only.

    Raises:
        TypeError, ValueError: an argument is not as described here, or a weight requires grad on a GPU
            or under ``torch.compile``.
    """
    op = "decode_embed"
    given = (tokens, live, token_weight, position_weight, page_table, seq_lens, page_size)
    _check(op, *given)
    compiling = traced(token_weight)
    if not (compiling or use_kernel(token_weight)):
        return reference.decode_embed(*given)
    if needs_grad(token_weight, position_weight):
        raise ValueError(f"{op}: a weight requires grad; it is forward only: use torch.no_grad()")
    if compiling:
        x, slots = torch.ops.gptkern.decode_embed(*given)
        return x, slots
    return _launch_kernel(*given)


def _check(
    op: str, tokens: torch.Tensor, live: torch.Tensor, token_weight: torch.Tensor,
    position_weight: torch.Tensor, page_table: torch.Tensor, seq_lens: torch.Tensor, page_size: int,
) -> None:  # fmt: skip
    integers = {"tokens": (tokens, 1, torch.int64), "live": (live, 1, torch.int32)}
    integers |= {"page_table": (page_table, 2, torch.int32), "seq_lens": (seq_lens, 1, torch.int32)}
    for name, (value, dim, dtype) in integers.items():
        _checks.tensor(op, name, value, dim=dim)
        _checks.dtype(op, name, value, (dtype,))
        _checks.last_dim_contiguous(op, name, value)
        if name != "live" and value.shape[0] != tokens.shape[0]:
            raise ValueError(
                f"{op}: {name} has {value.shape[0]} rows, tokens {tokens.shape[0]}: they must agree"
            )
    _checks.shape(op, "live", live, (1,))
    weights = {"token_weight": token_weight, "position_weight": position_weight}
    for name, value in weights.items():
        _checks.tensor(op, name, value, dim=2)
        _checks.dtype(op, name, value, _checks.KERNEL_FLOATS if use_kernel(value) else _checks.FLOATS)
        _checks.last_dim_contiguous(op, name, value)
    if position_weight.shape[1] != token_weight.shape[1] or position_weight.dtype != token_weight.dtype:
        raise ValueError(
            f"{op}: position_weight is {position_weight.dtype} of {position_weight.shape[1]} columns, "
            f"token_weight {token_weight.dtype} of {token_weight.shape[1]}: they must agree"
        )
    _checks.same_device(op, tokens=tokens, live=live, page_table=page_table, seq_lens=seq_lens, **weights)
    if page_size < 1:
        raise ValueError(f"{op}: page_size is {page_size}; at least 1 is needed")
    if tokens.device.type == "cpu" and not traced(tokens):
        _check_values(op, tokens[: int(live)], token_weight, position_weight, page_table, seq_lens, page_size)


def _check_values(
    op: str, tokens: torch.Tensor, token_weight: torch.Tensor, position_weight: torch.Tensor,
    page_table: torch.Tensor, seq_lens: torch.Tensor, page_size: int,
) -> None:  # fmt: skip
    """Of the live rows. On a GPU, where looking would stall, what lies beyond gives NaN and no slot."""
    places = min(position_weight.shape[0], page_table.shape[1] * page_size)
    for name, value, end in (("tokens", tokens, token_weight.shape[0]), ("seq_lens", seq_lens, places)):
        strange = value[: len(tokens)]
        strange = strange[(strange < 0) | (strange >= end)]
        if strange.numel():
            raise ValueError(f"{op}: {name} holds {int(strange[0])}; 0 to {end - 1} is accepted")


def _launch_kernel(
    tokens: torch.Tensor,
    live: torch.Tensor,
    token_weight: torch.Tensor,
    position_weight: torch.Tensor,
    page_table: torch.Tensor,
    seq_lens: torch.Tensor,
    page_size: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    rows, width = tokens.shape[0], token_weight.shape[1]
    x = torch.empty((rows, width), dtype=token_weight.dtype, device=tokens.device)
    slots = torch.empty(rows, dtype=torch.int64, device=tokens.device)
    with _launch.on_device(tokens):
        _launch.launch(
            kernels.decode_embed_kernel, (rows,),
            tokens, live, token_weight, position_weight, page_table, seq_lens, x, slots,
            token_weight.shape[0], position_weight.shape[0], page_table.shape[1], page_size,
            token_weight.stride(0), position_weight.stride(0), page_table.stride(0),
            WIDTH=width, BLOCK=min(triton.next_power_of_2(width), EMBED_COLUMNS), num_warps=4,
            **_pdl.options(tokens.device),
        )  # fmt: skip
    return x, slots


def _embed(
    tokens: torch.Tensor,
    live: torch.Tensor,
    token_weight: torch.Tensor,
    position_weight: torch.Tensor,
    page_table: torch.Tensor,
    seq_lens: torch.Tensor,
    page_size: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    given = (tokens, live, token_weight, position_weight, page_table, seq_lens, page_size)
    _check("decode_embed", *given)
    return (_launch_kernel if use_kernel(token_weight) else reference.decode_embed)(*given)


_library = torch.library.Library("gptkern", "FRAGMENT")
_library.define(
    "decode_embed(Tensor tokens, Tensor live, Tensor token_weight, Tensor position_weight, "
    "Tensor page_table, Tensor(a!) seq_lens, SymInt page_size) -> (Tensor, Tensor)"
)
for _key in ("CUDA", "CPU"):
    _library.impl("decode_embed", _embed, _key)


@torch.library.register_fake("gptkern::decode_embed", lib=_library)
def _(
    tokens: torch.Tensor,
    live: torch.Tensor,
    token_weight: torch.Tensor,
    position_weight: torch.Tensor,
    page_table: torch.Tensor,
    seq_lens: torch.Tensor,
    page_size: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    rows = tokens.shape[0]
    return token_weight.new_empty((rows, token_weight.shape[1])), tokens.new_empty(rows)
