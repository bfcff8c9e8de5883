"""Attention backward in tiles (Dao 2023, FlashAttention-2), dense and packed.

    p = exp(s' - lse)      dv = p^T do      dp = do v^T
    ds = p * (dp - delta), delta = rowsum(do * out) - dlse      (softcap: ds *= 1 - tanh^2)
    dq = scale * ds k      dk = scale * ds^T q

Layout. One program of the dq kernel owns BLOCK_M queries of one head and runs over the keys they
see; it also computes delta and leaves it for the dk and dv kernel, which runs after it. One program
of that kernel owns BLOCK_N keys of one key head and runs over the queries, and the query heads, that
see them. The weights are recomputed in both. Each output element is written once, by one program,
after a fixed order of additions: no atomics.
"""

import triton
import triton.language as tl

from gptkern.ops._device import LOG2E, dropout_keep, tanh
from gptkern.ops.flash_attention.kernels import (
    head_offset,
    hide,
    load_rows,
    sequence,
    span,
    store_rows,
)


@triton.jit
def _gradient(
    weights,
    dweights,
    delta,
    bent,
    keep,
    dropout_p,
    SOFTCAP: tl.constexpr,
    DROPOUT: tl.constexpr,
):
    """ds from the weights and do v^T; ``bent`` is the tanh of the scaled scores."""
    if DROPOUT:
        dweights = tl.where(keep, dweights * (1.0 / (1.0 - dropout_p)), 0.0)
    dscores = weights * (dweights - delta)
    if SOFTCAP:
        dscores = dscores * (1.0 - bent * bent)
    return dscores


@triton.jit
def _lse_log2(lse):
    # A row that saw nothing has lse = -inf; +inf makes all its weights 0 where -inf makes NaN.
    return tl.where(lse == float("-inf"), float("inf"), lse * LOG2E)


@triton.jit
def flash_attention_dq(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    do_ptr,
    lse_ptr,
    dlse_ptr,  # as lse, or None
    delta_ptr,  # as lse; written here, read by flash_attention_dkdv
    dq_ptr,  # as q, strides as out
    cu_seqlens_q_ptr,
    cu_seqlens_k_ptr,
    seed_ptr,
    heads,
    group,
    max_seq_q,
    max_seq_k,
    tokens_q,  # of all sequences; of a packed batch alone
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
    stride_dob,
    stride_dos,
    stride_doh,
    stride_lb,
    stride_lh,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    VARLEN: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    SOFTCAP: tl.constexpr,
    DROPOUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    blocks_m = tl.cdiv(max_seq_q, BLOCK_M)
    pid = tl.program_id(0)
    start_m = (blocks_m - 1 - pid % blocks_m) * BLOCK_M
    head = pid // blocks_m % heads
    batch = pid // blocks_m // heads
    first_q, seq_q = sequence(cu_seqlens_q_ptr, batch, max_seq_q, tokens_q, VARLEN)
    first_k, seq_k = sequence(cu_seqlens_k_ptr, batch, max_seq_k, tokens_k, VARLEN)
    if start_m >= seq_q:
        return
    q_ptr += head_offset(batch, first_q, head, stride_qb, stride_qs, stride_qh)
    k_ptr += head_offset(batch, first_k, head // group, stride_kb, stride_ks, stride_kh)
    v_ptr += head_offset(batch, first_k, head // group, stride_vb, stride_vs, stride_vh)
    out_offset = head_offset(batch, first_q, head, stride_ob, stride_os, stride_oh)
    do_ptr += head_offset(batch, first_q, head, stride_dob, stride_dos, stride_doh)
    lse_offset = head_offset(batch, first_q, head, stride_lb, 1, stride_lh)
    seed = tl.load(seed_ptr) if DROPOUT else 0
    stream = batch * heads + head
    shift = seq_k - seq_q

    do = load_rows(do_ptr, start_m, seq_q, stride_dos, BLOCK_M, HEAD_DIM, BLOCK_D)
    out = load_rows(out_ptr + out_offset, start_m, seq_q, stride_os, BLOCK_M, HEAD_DIM, BLOCK_D)
    delta = tl.sum(out.to(tl.float32) * do.to(tl.float32), 1)
    rows = start_m + tl.arange(0, BLOCK_M)
    inside = rows < seq_q
    if dlse_ptr is not None:
        delta -= tl.load(dlse_ptr + lse_offset + rows, mask=inside, other=0.0)
    tl.store(delta_ptr + lse_offset + rows, delta, mask=inside)

    q = load_rows(q_ptr, start_m, seq_q, stride_qs, BLOCK_M, HEAD_DIM, BLOCK_D)
    lse_log2 = _lse_log2(tl.load(lse_ptr + lse_offset + rows, mask=inside, other=float("inf")))
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    scale_log2 = LOG2E if SOFTCAP else scale * LOG2E
    first, full_first, full_end, end = span(
        start_m, shift, window_left, window_right, seq_k, BLOCK_M, BLOCK_N, HAS_LEFT, HAS_RIGHT
    )
    for start_n in tl.range(first, end, BLOCK_N):
        start_n = tl.multiple_of(start_n, BLOCK_N)
        k = load_rows(k_ptr, start_n, seq_k, stride_ks, BLOCK_N, HEAD_DIM, BLOCK_D)
        v = load_rows(v_ptr, start_n, seq_k, stride_vs, BLOCK_N, HEAD_DIM, BLOCK_D)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        dweights = tl.dot(do, tl.trans(v), input_precision="ieee")
        bent = scores
        if SOFTCAP:
            bent = tanh(scores * (scale / softcap))
            scores = softcap * bent
        if (start_n < full_first) | (start_n >= full_end):
            cols = start_n + tl.arange(0, BLOCK_N)
            scores = hide(
                scores,
                rows[:, None],
                cols[None, :],
                shift,
                seq_k,
                window_left,
                window_right,
                HAS_LEFT,
                HAS_RIGHT,
            )
        weights = tl.exp2(scores * scale_log2 - lse_log2[:, None])
        keep = True
        if DROPOUT:
            keep = dropout_keep(seed, stream, start_m, start_n, dropout_p, BLOCK_M, BLOCK_N)
        dscores = _gradient(weights, dweights, delta[:, None], bent, keep, dropout_p, SOFTCAP, DROPOUT)
        dq = tl.dot(dscores.to(k.dtype), k, dq, input_precision="ieee")
    store_rows(dq_ptr + out_offset, dq * scale, start_m, seq_q, stride_os, BLOCK_M, HEAD_DIM, BLOCK_D)


@triton.jit
def flash_attention_dkdv(
    q_ptr,
    k_ptr,
    v_ptr,
    do_ptr,
    lse_ptr,
    delta_ptr,
    dk_ptr,  # as k, contiguous
    dv_ptr,  # as v, strides as dk
    cu_seqlens_q_ptr,
    cu_seqlens_k_ptr,
    seed_ptr,
    heads_k,
    group,
    max_seq_q,
    max_seq_k,
    tokens_q,  # of all sequences; of a packed batch alone
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
    stride_dob,
    stride_dos,
    stride_doh,
    stride_db,
    stride_ds,
    stride_dh,
    stride_lb,
    stride_lh,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    VARLEN: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    SOFTCAP: tl.constexpr,
    DROPOUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    blocks_n = tl.cdiv(max_seq_k, BLOCK_N)
    pid = tl.program_id(0)
    # Under a causal mask the first keys have the most queries, and are first.
    start_n = pid % blocks_n * BLOCK_N
    head_k = pid // blocks_n % heads_k
    batch = pid // blocks_n // heads_k
    first_q, seq_q = sequence(cu_seqlens_q_ptr, batch, max_seq_q, tokens_q, VARLEN)
    first_k, seq_k = sequence(cu_seqlens_k_ptr, batch, max_seq_k, tokens_k, VARLEN)
    if start_n >= seq_k:
        return
    k_ptr += head_offset(batch, first_k, head_k, stride_kb, stride_ks, stride_kh)
    v_ptr += head_offset(batch, first_k, head_k, stride_vb, stride_vs, stride_vh)
    d_offset = head_offset(batch, first_k, head_k, stride_db, stride_ds, stride_dh)
    seed = tl.load(seed_ptr) if DROPOUT else 0
    shift = seq_k - seq_q

    k = load_rows(k_ptr, start_n, seq_k, stride_ks, BLOCK_N, HEAD_DIM, BLOCK_D)
    v = load_rows(v_ptr, start_n, seq_k, stride_vs, BLOCK_N, HEAD_DIM, BLOCK_D)
    cols = start_n + tl.arange(0, BLOCK_N)
    scale_log2 = LOG2E if SOFTCAP else scale * LOG2E
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    first, full_first, full_end, end = span(
        start_n, -shift, window_right, window_left, seq_q, BLOCK_N, BLOCK_M, HAS_RIGHT, HAS_LEFT
    )
    for member in range(group):
        head = head_k * group + member
        stream = batch * heads_k * group + head
        q_head = q_ptr + head_offset(batch, first_q, head, stride_qb, stride_qs, stride_qh)
        do_head = do_ptr + head_offset(batch, first_q, head, stride_dob, stride_dos, stride_doh)
        lse_offset = head_offset(batch, first_q, head, stride_lb, 1, stride_lh)
        for start_m in tl.range(first, end, BLOCK_M):
            start_m = tl.multiple_of(start_m, BLOCK_M)
            rows = start_m + tl.arange(0, BLOCK_M)
            q = load_rows(q_head, start_m, seq_q, stride_qs, BLOCK_M, HEAD_DIM, BLOCK_D)
            do = load_rows(do_head, start_m, seq_q, stride_dos, BLOCK_M, HEAD_DIM, BLOCK_D)
            lse = tl.load(lse_ptr + lse_offset + rows, mask=rows < seq_q, other=float("inf"))
            delta = tl.load(delta_ptr + lse_offset + rows, mask=rows < seq_q, other=0.0)
            # Transposed, keys by queries: the weights are then an operand as they stand.
            scores = tl.dot(k, tl.trans(q), input_precision="ieee")
            dweights = tl.dot(v, tl.trans(do), input_precision="ieee")
            bent = scores
            if SOFTCAP:
                bent = tanh(scores * (scale / softcap))
                scores = softcap * bent
            if (start_m < full_first) | (start_m >= full_end):
                scores = hide(
                    scores, rows[None, :], cols[:, None], shift, seq_k, window_left, window_right,
                    HAS_LEFT, HAS_RIGHT,
                )  # fmt: skip
            weights = tl.exp2(scores * scale_log2 - _lse_log2(lse)[None, :])
            keep = True
            if DROPOUT:
                keep = tl.trans(dropout_keep(seed, stream, start_m, start_n, dropout_p, BLOCK_M, BLOCK_N))
            dscores = _gradient(weights, dweights, delta[None, :], bent, keep, dropout_p, SOFTCAP, DROPOUT)
            if DROPOUT:
                weights = tl.where(keep, weights, 0.0)
            dv = tl.dot(weights.to(do.dtype), do, dv, input_precision="ieee")
            dk = tl.dot(dscores.to(q.dtype), q, dk, input_precision="ieee")
    if DROPOUT:
        dv = dv * (1.0 / (1.0 - dropout_p))
    store_rows(dk_ptr + d_offset, dk * scale, start_n, seq_k, stride_ds, BLOCK_N, HEAD_DIM, BLOCK_D)
    store_rows(dv_ptr + d_offset, dv, start_n, seq_k, stride_ds, BLOCK_N, HEAD_DIM, BLOCK_D)
