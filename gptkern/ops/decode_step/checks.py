"""Argument errors of the persistent step."""

from __future__ import annotations

import torch

from gptkern.ops import _checks
from gptkern.ops._dispatch import traced
from gptkern.ops._types import FP8
from gptkern.ops.decode_linear.formats import QuantizedWeight
from gptkern.ops.decode_step.launch import StepArguments
from gptkern.ops.decode_step.rows import TENSORS, StepProgram, StepRow, row_tensors, widest_normed_head

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
    _check_cache(op, a)
    check_rows(op, a.program, *a.k_cache.shape[3:])
    _checks.same_device(
        op,
        weights=a.program.token_weight,
        tokens=a.tokens,
        live=a.live,
        k_cache=a.k_cache,
        v_cache=a.v_cache,
        page_table=a.page_table,
        seq_lens=a.seq_lens,
    )
    _check_lengths(op, a)


def _check_cache(op: str, a: StepArguments) -> None:
    layers, dtype = a.program.layers, a.program.token_weight.dtype
    for name, cache in {"k_cache": a.k_cache, "v_cache": a.v_cache}.items():
        _checks.tensor(op, name, cache, dim=5)
        _checks.shape(op, name, cache, (layers, *a.k_cache.shape[1:]))
        _checks.dtype(op, name, cache, (dtype if a.scales is None else FP8,))
        if cache.stride()[3:] != (cache.shape[4], 1):
            raise ValueError(
                f"{op}: {name} has strides {cache.stride()}; the last two must be ({cache.shape[4]}, 1)"
            )
    if a.scales is not None:
        _checks.fp8_device(op, "the cache", a.k_cache.device)
        _checks.kv_scales(op, a.scales, (layers, a.k_cache.shape[3]), "one per layer and head of the cache")


def check_rows(op: str, program: StepProgram, kv_heads: int, head_dim: int) -> None:
    """Raise for rows that do not fit each other or a cache of ``kv_heads`` heads."""
    if program.heads % kv_heads:
        raise ValueError(
            f"{op}: {program.heads} heads, the cache has {kv_heads}: the first must be a multiple of it"
        )
    dtype, eps = program.token_weight.dtype, program.eps
    for number, row in enumerate(program.rows):
        if row.kind in ("add_norm", "heads"):
            raise ValueError(f"{op}: row {number} is of kind {row.kind!r}, which is not among its phases")
        most = widest_normed_head(dtype)
        if row.head_norm is not None and head_dim > most:
            raise ValueError(
                f"{op}: row {number} norms heads of {head_dim} elements; in {dtype} up to {most} are accepted"
            )
        if row.eps not in (None, eps[0]) or row.head_eps not in (None, eps[1]):
            raise ValueError(f"{op}: row {number} has eps of its own; all norms must have the same")
        for name, tensor in zip(TENSORS, row_tensors(row), strict=True):
            same = name in ("norm weight", "norm bias", "bias", "q norm", "k norm")
            if tensor is not None and same and tensor.dtype != dtype:
                raise TypeError(f"{op}: {name} of row {number} is {tensor.dtype}, the embeddings {dtype}")
        weight = None if row.linear is None else row.linear.weight
        if isinstance(weight, QuantizedWeight):
            # The kernel reads them by their addresses.
            needed = torch.float16 if weight.format == "int4" else torch.float32
            if weight.scales.dtype != needed:
                raise TypeError(
                    f"{op}: scales of row {number}, {weight.format}, are {weight.scales.dtype}; {needed} is "
                    "needed"
                )
    widths = program.widths(kv_heads * head_dim)
    for number, row in enumerate(program.rows):
        _check_widths(op, number, row, widths, (kv_heads, head_dim))


def _check_widths(op: str, number: int, row: StepRow, widths: dict[str, int], heads: tuple[int, int]) -> None:
    """Raise for a row whose weight does not fit what it reads, adds or writes."""
    kv_width = heads[0] * heads[1]
    if row.linear is None:
        return
    outputs, inputs = row.linear.weight.shape
    if inputs != widths[row.read]:
        raise ValueError(f"{op}: row {number} reads {widths[row.read]} elements, its weight takes {inputs}")
    wanted = {row.write: "writes", row.residual: "adds"}
    for name, verb in wanted.items():
        if name is not None and widths[name] != row.outputs(kv_width):
            raise ValueError(
                f"{op}: row {number} has {row.outputs(kv_width)} outputs; it {verb} {name!r}, which has "
                f"{widths[name]} elements"
            )
    if row.linear.bias is not None:
        _checks.shape(op, f"the bias of row {number}", row.linear.bias, (outputs,))


def _check_lengths(op: str, a: StepArguments) -> None:
    """On a CPU, where a look costs nothing: a position that the rotary tables do not have."""
    contexts = [row.rotary.cos.shape[0] for row in a.program.rows if row.rotary is not None]
    if contexts and a.seq_lens.device.type == "cpu" and not traced(a.seq_lens):
        longest = int(a.seq_lens.max())
        if longest >= min(contexts):
            raise ValueError(f"{op}: seq_lens holds {longest}; rotary tables have {min(contexts)} positions")
