"""Argument errors of the decode step's embedding."""

from __future__ import annotations

import math

import torch

from gptkern.ops import _checks
from gptkern.ops._dispatch import traced, use_kernel
from gptkern.ops.decode_embed.launch import EmbedArguments


def check(op: str, a: EmbedArguments) -> None:
    """Raise for arguments that ``decode_embed`` does not accept."""
    integers = {"tokens": (a.tokens, 1, torch.int64), "live": (a.live, 1, torch.int32)}
    integers |= {"page_table": (a.page_table, 2, torch.int32), "seq_lens": (a.seq_lens, 1, torch.int32)}
    for name, (value, dim, dtype) in integers.items():
        _checks.tensor(op, name, value, dim=dim)
        _checks.dtype(op, name, value, (dtype,))
        _checks.last_dim_contiguous(op, name, value)
        if name != "live" and value.shape[0] != a.tokens.shape[0]:
            raise ValueError(
                f"{op}: {name} has {value.shape[0]} rows, tokens {a.tokens.shape[0]}: they must agree"
            )
    _checks.shape(op, "live", a.live, (1,))
    weights = {"token_weight": a.token_weight}
    if a.position_weight is not None:
        weights["position_weight"] = a.position_weight
    for name, value in weights.items():
        _checks.tensor(op, name, value, dim=2)
        _checks.dtype(op, name, value, _checks.KERNEL_FLOATS if use_kernel(value) else _checks.FLOATS)
        _checks.last_dim_contiguous(op, name, value)
    tokens, positions = a.token_weight, a.position_weight
    if positions is not None and (positions.shape[1] != tokens.shape[1] or positions.dtype != tokens.dtype):
        raise ValueError(
            f"{op}: position_weight is {positions.dtype} of {positions.shape[1]} columns, "
            f"token_weight {tokens.dtype} of {tokens.shape[1]}: they must agree"
        )
    _checks.same_device(
        op, tokens=a.tokens, live=a.live, page_table=a.page_table, seq_lens=a.seq_lens, **weights
    )
    if a.position_offset < 0:
        raise ValueError(f"{op}: position_offset is {a.position_offset}; 0 or more is needed")
    if not math.isfinite(a.scale):
        raise ValueError(f"{op}: scale is {a.scale}; a finite number is needed")
    if a.page_size < 1:
        raise ValueError(f"{op}: page_size is {a.page_size}; at least 1 is needed")
    check_values(op, a)


def check_values(op: str, a: EmbedArguments) -> None:
    """Raise for a token or a position out of range in a row that is not padding; on a CPU alone."""
    if a.tokens.device.type != "cpu" or traced(a.tokens):
        return
    count = int(a.live)
    positions = a.page_table.shape[1] * a.page_size
    if a.position_weight is not None:
        positions = min(positions, a.position_weight.shape[0] - a.position_offset)
    ends = (("tokens", a.tokens, a.token_weight.shape[0]), ("seq_lens", a.seq_lens, positions))
    for name, value, end in ends:
        values = value[:count]
        outside = values[(values < 0) | (values >= end)]
        if outside.numel():
            raise ValueError(f"{op}: {name} holds {int(outside[0])}; 0 to {end - 1} is accepted")
