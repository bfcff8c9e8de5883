"""The numbers that attention's backward for Hopper needs of each query, and its sums' counters at zero."""

from gptkern.ops._device import rounded_product
from gptkern.ops._triton import tl, triton
from gptkern.ops.flash_attention.kernels import head_offset, load_rows, locate, span
from gptkern.ops.flash_attention.kernels_backward import in_base_2


@triton.jit
def padded_row(batch, head, first_q, heads, padded, VARLEN: tl.constexpr, BLOCK_M: tl.constexpr):
    """The row of a head's first query where each sequence begins at a multiple of BLOCK_M."""
    if VARLEN:
        # A sequence's rows end before the next one's begin: at most BLOCK_M - 1 are added to its length.
        return head * padded + (first_q + batch * BLOCK_M) // BLOCK_M * BLOCK_M
    else:
        return (batch * heads + head) * padded


@triton.jit
def flash_attention_delta(
    out_ptr,  # (batch, seq_q, heads, HEAD_DIM), or (tokens, heads, HEAD_DIM), contiguous
    do_ptr,  # the same, with strides
    lse_ptr,  # (batch, heads, seq_q), or (heads, tokens), contiguous
    dlse_ptr,  # as lse, or None
    stats_ptr,  # (rows / 64, 2, 64): lse in base 2, and delta, of 64 rows; rows are those of padded_row
    counters_ptr,  # (rows / BLOCK_M,) int32
    dq_ptr,  # as out; written where no key is seen
    cu_seqlens_q_ptr,  # (batch + 1,), or None
    cu_seqlens_k_ptr,  # (batch + 1,), or None
    heads,
    max_seq_q,
    max_seq_k,
    tokens_q,
    tokens_k,
    window_left,
    window_right,
    padded,  # rows of a head
    stride_dob,
    stride_dos,
    stride_doh,
    HEAD_DIM: tl.constexpr,
    VARLEN: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
):
    """A program owns BLOCK_M queries of a head; delta = rowsum(do * out) - dlse."""
    blocks_m = tl.cdiv(max_seq_q, BLOCK_M)
    block, head, batch, first_q, seq_q, _first_k, seq_k = locate(
        cu_seqlens_q_ptr, cu_seqlens_k_ptr, blocks_m, heads, max_seq_q, max_seq_k, tokens_q, tokens_k, VARLEN
    )  # fmt: skip
    start_m = block * BLOCK_M
    if start_m >= seq_q:
        return
    if VARLEN:
        offset = head_offset(batch, first_q, head, 0, heads * HEAD_DIM, HEAD_DIM)
        lse_offset = head_offset(batch, first_q, head, 0, 1, tokens_q)
    else:
        offset = head_offset(batch, first_q, head, seq_q * heads * HEAD_DIM, heads * HEAD_DIM, HEAD_DIM)
        lse_offset = head_offset(batch, first_q, head, heads * seq_q, 1, seq_q)
    do_ptr += head_offset(batch, first_q, head, stride_dob, stride_dos, stride_doh)
    do = load_rows(do_ptr, start_m, seq_q, stride_dos, BLOCK_M, HEAD_DIM, HEAD_DIM)
    out = load_rows(out_ptr + offset, start_m, seq_q, heads * HEAD_DIM, BLOCK_M, HEAD_DIM, HEAD_DIM)
    delta = tl.sum(rounded_product(out.to(tl.float32), do.to(tl.float32)), 1)
    within = tl.arange(0, BLOCK_M)
    inside = start_m + within < seq_q
    if dlse_ptr is not None:
        delta -= tl.load(dlse_ptr + lse_offset + start_m + within, mask=inside, other=0.0)
    # Queries behind the last have an lse of inf: weights of 0.
    lse = tl.load(lse_ptr + lse_offset + start_m + within, mask=inside, other=float("inf"))
    row = padded_row(batch, head, first_q, heads, padded, VARLEN, BLOCK_M) + start_m
    at = row.to(tl.int64) * 2 + within // 64 * 128 + within % 64
    tl.store(stats_ptr + at, in_base_2(lse))
    tl.store(stats_ptr + at + 64, delta)
    tl.store(counters_ptr + row // BLOCK_M, 0)
    first, _full_first, _full_end, end = span(
        start_m, seq_k - seq_q, window_left, window_right, seq_k, BLOCK_M, BLOCK_KEYS, HAS_LEFT, HAS_RIGHT
    )
    if first >= end:
        rows = (start_m + within).to(tl.int64) * (heads * HEAD_DIM)
        nothing = tl.zeros([BLOCK_M, HEAD_DIM], dq_ptr.dtype.element_ty)
        columns = tl.arange(0, HEAD_DIM)
        tl.store(dq_ptr + offset + rows[:, None] + columns[None, :], nothing, mask=inside[:, None])
