"""Attention forward in tiles (Dao 2023, FlashAttention-2), dense and packed; backward is in its own file.

    s = scale * q k^T      s' = softcap * tanh(s / softcap) + bias - slope |i + shift - j|
    p = exp(s' - lse)      out = p v

Query i sees keys [i + shift - window_left, i + shift + window_right], shift = seq_k - seq_q: the
mask is aligned to the bottom right, causal is window_right = 0.

Layout. One program owns BLOCK_M queries of one head and runs over the keys they see. It reads its
queries once and each tile of keys and values once, and writes out and lse once. Tiles of keys that
none of the queries sees are not visited, and tiles that all of them see take a branch around the
mask. One loop and not one a kind of tile: the software pipeline then never drains, the kernel needs
fewer registers, and LLVM cannot unroll a tail loop of at most one turn, after which ptxas serialises
every wgmma (its warning C7515).

Packed sequences (VARLEN) differ in where a sequence starts and how long it is, and in nothing else: rows of
no sequence are left to ``kernels_outside``.
"""

from gptkern.ops._device import LN2, LOG2E, dropout_mask, online_softmax, tanh
from gptkern.ops._triton import tl, triton


@triton.jit
def sequence(cu_seqlens_ptr, batch, max_seq, tokens, VARLEN: tl.constexpr):
    """First row and length of a sequence; of packed tokens none but those that there are.

    A packed sequence has at most ``max_seq`` rows here: that is what the grid and other kernels' results have
    room for. Results of a longer one are NaN, by ``flash_attention_outside``.
    """
    if VARLEN:
        first = tl.maximum(tl.load(cu_seqlens_ptr + batch), 0)
        end = tl.minimum(tl.load(cu_seqlens_ptr + batch + 1), tokens)
        return first, tl.minimum(tl.maximum(end - first, 0), max_seq)
    else:
        return batch * 0, max_seq


@triton.jit
def locate(
    cu_seqlens_q_ptr, cu_seqlens_k_ptr, blocks, heads, max_seq_q, max_seq_k, tokens_q, tokens_k,
    VARLEN: tl.constexpr,
):  # fmt: skip
    """(block, head, batch, first_q, seq_q, first_k, seq_k) of this program.

    Neighbouring programs share a head, so that its keys stay in L2.
    """
    pid = tl.program_id(0)
    head = pid // blocks % heads
    batch = pid // blocks // heads
    first_q, seq_q = sequence(cu_seqlens_q_ptr, batch, max_seq_q, tokens_q, VARLEN)
    first_k, seq_k = sequence(cu_seqlens_k_ptr, batch, max_seq_k, tokens_k, VARLEN)
    return pid % blocks, head, batch, first_q, seq_q, first_k, seq_k


@triton.jit
def head_offset(batch, first_row, head, stride_b, stride_s, stride_h):
    """The offset from a tensor's start to a sequence's first row of one head."""
    # int64: batch * seq * heads * head_dim passes 2^31 at 128k context.
    return batch.to(tl.int64) * stride_b + first_row.to(tl.int64) * stride_s + head.to(tl.int64) * stride_h


@triton.jit
def _pointers(ptr, first_row, stride_s, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    """Pointers to the ``(ROWS, BLOCK_D)`` elements from ``first_row`` on."""
    rows = tl.arange(0, ROWS).to(tl.int64)
    # What depends on first_row is one scalar, so that a loop over tiles keeps the rest.
    return (
        ptr + first_row.to(tl.int64) * stride_s + (rows[:, None] * stride_s + tl.arange(0, BLOCK_D)[None, :])
    )


@triton.jit
def _inside(first_row, end_row, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Mask of a ``(ROWS, BLOCK_D)`` tile: rows before ``end_row``, columns within the head dimension."""
    inside = (first_row + tl.arange(0, ROWS))[:, None] < end_row
    if HEAD_DIM != BLOCK_D:
        inside = inside & (tl.arange(0, BLOCK_D)[None, :] < HEAD_DIM)
    return inside


@triton.jit
def load_rows(
    ptr,
    first_row,
    end_row,
    stride_s,
    ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A ``(ROWS, BLOCK_D)`` tile, zero past ``end_row`` and past the head dimension."""
    ptrs = _pointers(ptr, first_row, stride_s, ROWS, BLOCK_D)
    return tl.load(ptrs, mask=_inside(first_row, end_row, ROWS, HEAD_DIM, BLOCK_D), other=0.0)


@triton.jit
def store_rows(
    ptr,
    value,
    first_row,
    end_row,
    stride_s,
    ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Store a ``(ROWS, BLOCK_D)`` tile in the pointer's dtype, up to ``end_row`` and the head dimension."""
    ptrs = _pointers(ptr, first_row, stride_s, ROWS, BLOCK_D)
    mask = _inside(first_row, end_row, ROWS, HEAD_DIM, BLOCK_D)
    tl.store(ptrs, value.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def span(
    start,
    shift,
    before,
    after,
    length,
    OWN: tl.constexpr,
    OTHER: tl.constexpr,
    BOUND_BEFORE: tl.constexpr,
    BOUND_AFTER: tl.constexpr,
):
    """The rows of the other side that a tile of OWN rows from ``start`` on meets.

    Row i meets rows [i + shift - before, i + shift + after] of ``length``. Returns first, full_first,
    full_end, end: some row of the tile meets [first, end), every row meets [full_first, full_end);
    all but ``end`` are multiples of OTHER.
    """
    first = 0
    full_first = 0
    end = length
    full_end = length
    if BOUND_BEFORE:
        first = tl.maximum(start + shift - before, 0) // OTHER * OTHER
        full_first = tl.cdiv(tl.maximum(start + OWN - 1 + shift - before, 0), OTHER) * OTHER
    if BOUND_AFTER:
        end = tl.maximum(tl.minimum(start + OWN + shift + after, length), 0)
        full_end = tl.maximum(tl.minimum(start + shift + after + 1, length), 0)
    full_first = tl.minimum(full_first, tl.cdiv(end, OTHER) * OTHER)
    full_end = tl.maximum(full_end // OTHER * OTHER, full_first)
    return first, full_first, full_end, end


@triton.jit
def hide(
    scores,
    rows,
    cols,
    shift,
    seq_k,
    window_left,
    window_right,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
):
    """The mask: -inf where the queries ``rows`` do not see the keys ``cols``, which broadcast to the tile."""
    ahead = cols - (rows + shift)
    seen = cols < seq_k
    if HAS_LEFT:
        seen = seen & (ahead >= -window_left)
    if HAS_RIGHT:
        seen = seen & (ahead <= window_right)
    return tl.where(seen, scores, float("-inf"))


@triton.jit
def head_slope(slopes_ptr, batch, head, stride_sb):
    """The ALiBi slope of a head, 0 without."""
    if slopes_ptr is not None:
        return tl.load(slopes_ptr + batch * stride_sb + head)
    else:
        return 0.0


@triton.jit
def biased(scores, scale, rows, cols, shift, seq_q, seq_k, slopes_ptr, slope, bias_ptr, bias_at, stride_bq):
    """Scores, scaled and with the slope's bias (Press et al. 2022, ALiBi) and the one in memory, if any.

    ``rows`` and ``cols`` are the queries and keys, and broadcast to the tile; the head's bias is ``bias_at``
    elements in.
    """
    if slopes_ptr is not None or bias_ptr is not None:
        scores *= scale
    if slopes_ptr is not None:
        scores -= slope * tl.abs(rows + shift - cols).to(tl.float32)
    if bias_ptr is not None:
        at = bias_ptr + bias_at + rows.to(tl.int64) * stride_bq + cols
        scores += tl.load(at, mask=(rows < seq_q) & (cols < seq_k), other=0.0).to(tl.float32)
    return scores


@triton.jit
def flash_attention_forward(
    q_ptr,  # (batch, seq_q, heads, head_dim), or (tokens, heads, head_dim) with stride_qb = 0
    k_ptr,  # (batch, seq_k, heads / group, head_dim)
    v_ptr,  # as k, with V_DIM in place of head_dim
    out_ptr,  # as q, with V_DIM in place of head_dim
    lse_ptr,  # (batch, heads, seq_q), or (heads, tokens)
    cu_seqlens_q_ptr,  # (batch + 1,), or None
    cu_seqlens_k_ptr,  # (batch + 1,), or None
    seed_ptr,  # (1,) int64, or None
    slopes_ptr,  # (batch, heads) fp32, or None
    bias_ptr,  # (batch, heads, seq_q, seq_k), or None
    heads,
    group,
    max_seq_q,
    max_seq_k,
    tokens_q,  # packed: tokens of all sequences; dense: 0
    tokens_k,
    window_left,
    window_right,
    scale,
    softcap,
    dropout_p,
    stride_qb,
    stride_qs,
    stride_qh,
    stride_kb,
    stride_ks,
    stride_kh,
    stride_vb,
    stride_vs,
    stride_vh,
    stride_ob,
    stride_os,
    stride_oh,
    stride_lb,
    stride_lh,
    stride_sb,  # slopes
    stride_bb,  # bias
    stride_bh,
    stride_bq,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    V_DIM: tl.constexpr,
    BLOCK_V: tl.constexpr,
    VARLEN: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    SOFTCAP: tl.constexpr,
    DROPOUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    blocks_m = tl.cdiv(max_seq_q, BLOCK_M)
    block, head, batch, first_q, seq_q, first_k, seq_k = locate(
        cu_seqlens_q_ptr, cu_seqlens_k_ptr, blocks_m, heads, max_seq_q, max_seq_k, tokens_q, tokens_k, VARLEN
    )  # fmt: skip
    # Under a causal mask the last rows have the most work and start first, so that no long program is left
    # for the end.
    start_m = (blocks_m - 1 - block) * BLOCK_M
    if start_m >= seq_q:
        return
    q_ptr += head_offset(batch, first_q, head, stride_qb, stride_qs, stride_qh)
    k_ptr += head_offset(batch, first_k, head // group, stride_kb, stride_ks, stride_kh)
    v_ptr += head_offset(batch, first_k, head // group, stride_vb, stride_vs, stride_vh)
    out_ptr += head_offset(batch, first_q, head, stride_ob, stride_os, stride_oh)
    lse_ptr += head_offset(batch, first_q, head, stride_lb, 1, stride_lh)
    slope = head_slope(slopes_ptr, batch, head, stride_sb)
    bias_at = batch.to(tl.int64) * stride_bb + head.to(tl.int64) * stride_bh
    # Every (sequence, head) draws its dropout mask from a stream of its own.
    seed = tl.load(seed_ptr) if DROPOUT else 0
    stream = batch * heads + head
    shift = seq_k - seq_q

    # The queries, and the online softmax's state: maximum, sum of weights, weighted sum of values.
    rows = start_m + tl.arange(0, BLOCK_M)
    q = load_rows(q_ptr, start_m, seq_q, stride_qs, BLOCK_M, HEAD_DIM, BLOCK_D)
    acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    scale_log2 = LOG2E if SOFTCAP or slopes_ptr is not None or bias_ptr is not None else scale * LOG2E
    first, full_first, full_end, end = span(
        start_m, shift, window_left, window_right, seq_k, BLOCK_M, BLOCK_N, HAS_LEFT, HAS_RIGHT
    )
    for start_n in tl.range(first, end, BLOCK_N):
        start_n = tl.multiple_of(start_n, BLOCK_N)
        # Scores of one tile of keys, (BLOCK_M, BLOCK_N).
        k = load_rows(k_ptr, start_n, seq_k, stride_ks, BLOCK_N, HEAD_DIM, BLOCK_D)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        if SOFTCAP:
            scores = softcap * tanh(scores * (scale / softcap))
        cols = start_n + tl.arange(0, BLOCK_N)
        scores = biased(
            scores, 1.0 if SOFTCAP else scale, rows[:, None], cols[None, :], shift, seq_q, seq_k,
            slopes_ptr, slope, bias_ptr, bias_at, stride_bq,
        )  # fmt: skip
        # The mask, in tiles that not every query sees whole.
        if (start_n < full_first) | (start_n >= full_end):
            scores = hide(
                scores, rows[:, None], cols[None, :], shift, seq_k, window_left, window_right,
                HAS_LEFT, HAS_RIGHT,
            )  # fmt: skip
        # New maximum, weights relative to it, and the factor that rescales what was accumulated before.
        weights, row_max, row_sum, rescale = online_softmax(scores, row_max, row_sum, scale_log2)
        if DROPOUT:
            alive = dropout_mask(seed, stream, start_m, start_n, dropout_p, BLOCK_M, BLOCK_N)
            weights = tl.where(alive, weights, 0.0)
        # Accumulate the weighted values.
        v = load_rows(v_ptr, start_n, seq_k, stride_vs, BLOCK_N, V_DIM, BLOCK_V)
        acc = tl.dot(weights.to(v.dtype), v, acc * rescale[:, None], input_precision="ieee")

    # Normalise. A query that saw no key has a sum of 0 and gives 0.
    total = tl.where(row_sum == 0.0, 1.0, row_sum)
    if DROPOUT:
        total = total * (1.0 - dropout_p)
    store_rows(out_ptr, acc / total[:, None], start_m, seq_q, stride_os, BLOCK_M, V_DIM, BLOCK_V)
    # One rounding of the sum: an error here is a relative error of all the gradients of its row.
    lse = tl.fma(row_max, LN2, tl.log2(row_sum) * LN2)
    tl.store(lse_ptr + rows, lse, mask=rows < seq_q)
