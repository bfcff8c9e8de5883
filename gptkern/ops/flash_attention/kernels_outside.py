"""Rows that attention leaves of packed tensors: those of no sequence, and of one longer than promised.

Layout. One program owns BLOCK_ROWS rows of one side, queries or keys. It runs over the sequences' offsets,
BLOCK_SEQUENCES at a time, and writes only rows that need it: nearly all programs write nothing.
"""

from gptkern.ops._triton import tl, triton


@triton.jit
def _fill(ptr, rows, state, tokens, width, BLOCK_COLUMNS: tl.constexpr):
    """Write 0 to the whole of rows whose state is 1, NaN to those of 2, and nothing to others."""
    for start in range(0, width, BLOCK_COLUMNS):
        columns = (start + tl.arange(0, BLOCK_COLUMNS))[None, :]
        # int64: tokens * heads * head_dim passes 2^31 at 128k tokens.
        at = ptr + rows.to(tl.int64)[:, None] * width + columns
        value = tl.where(state[:, None] == 2, float("nan"), 0.0)
        value = tl.broadcast_to(value, at.shape).to(ptr.dtype.element_ty)
        tl.store(at, value, mask=((state != 0) & (rows < tokens))[:, None] & (columns < width))


@triton.jit(
    do_not_specialize=[
        "sequences", "tokens", "max_seq", "max_seq_other", "first_width", "second_width", "heads",
    ]
)  # fmt: skip
def flash_attention_outside(
    first_ptr,  # (tokens, first_width), contiguous
    second_ptr,  # (tokens, second_width), contiguous, or None
    lse_ptr,  # (heads, tokens) fp32, contiguous, or None
    cu_seqlens_ptr,  # (sequences + 1,), of this side
    cu_seqlens_other_ptr,  # of the other side
    sequences,
    tokens,
    max_seq,  # the promised lengths, of this side and of the other
    max_seq_other,
    first_width,
    second_width,
    heads,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_SEQUENCES: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    inside = tl.zeros([BLOCK_ROWS], tl.int32)
    broken = tl.zeros([BLOCK_ROWS], tl.int32)
    for start in range(0, sequences, BLOCK_SEQUENCES):
        sequence = start + tl.arange(0, BLOCK_SEQUENCES)
        there = sequence < sequences
        first = tl.load(cu_seqlens_ptr + sequence, mask=there, other=0)
        end = tl.load(cu_seqlens_ptr + sequence + 1, mask=there, other=0)
        other = tl.load(cu_seqlens_other_ptr + sequence, mask=there, other=0)
        other_end = tl.load(cu_seqlens_other_ptr + sequence + 1, mask=there, other=0)
        longer = (end - first > max_seq) | (other_end - other > max_seq_other)
        behind = rows[:, None] >= first[None, :]
        own = behind & (rows[:, None] < end[None, :])
        inside = tl.maximum(inside, tl.max(own.to(tl.int32), 1))
        own = behind & (rows[:, None] < tl.where(longer, end, first)[None, :])
        broken = tl.maximum(broken, tl.max(own.to(tl.int32), 1))
    state = tl.where(broken != 0, 2, tl.where(inside == 0, 1, 0))
    if tl.max(state, 0) != 0:
        _fill(first_ptr, rows, state, tokens, first_width, BLOCK_COLUMNS)
        if second_ptr is not None:
            _fill(second_ptr, rows, state, tokens, second_width, BLOCK_COLUMNS)
        if lse_ptr is not None:
            at = lse_ptr + rows
            for _ in range(heads):
                tl.store(at, tl.where(state == 2, float("nan"), 0.0), mask=(state != 0) & (rows < tokens))
                at += tokens
