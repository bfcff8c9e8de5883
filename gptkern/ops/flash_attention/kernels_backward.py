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

from gptkern.ops._device import LOG2E, dropout_mask, rounded_product, tanh
from gptkern.ops._triton import tl, triton
from gptkern.ops.flash_attention.kernels import (
    biased,
    head_offset,
    head_slope,
    hide,
    load_rows,
    locate,
    span,
    store_rows,
)


@triton.jit
def _gradient(
    weights,
    dweights,
    delta,
    tanh_s,
    alive,
    dropout_p,
    SOFTCAP: tl.constexpr,
    DROPOUT: tl.constexpr,
):
    """ds = weights * (dweights - delta), through dropout before and the softcap after it."""
    if DROPOUT:
        dweights = tl.where(alive, dweights * (1.0 / (1.0 - dropout_p)), 0.0)
    dscores = weights * (dweights - delta)
    if SOFTCAP:
        dscores = dscores * (1.0 - tanh_s * tanh_s)
    return dscores


@triton.jit
def in_base_2(lse):
    """The log-sum-exp in base 2."""
    # A row that saw nothing has lse = -inf; +inf makes all its weights 0 where -inf makes NaN.
    return tl.where(lse == float("-inf"), float("inf"), lse * LOG2E)


@triton.jit
def flash_attention_dq(
    q_ptr,  # (batch, seq_q, heads, head_dim), or (tokens, heads, head_dim) with stride_qb = 0
    k_ptr,  # (batch, seq_k, heads / group, head_dim)
    v_ptr,  # as k, with V_DIM in place of head_dim
    out_ptr,  # as q, with V_DIM in place of head_dim
    do_ptr,  # as out
    lse_ptr,  # (batch, heads, seq_q), or (heads, tokens)
    dlse_ptr,  # as lse, or None
    delta_ptr,  # as lse; written here, read by flash_attention_dkdv
    dq_ptr,  # as q
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
    stride_dob,
    stride_dos,
    stride_doh,
    stride_dqb,
    stride_dqs,
    stride_dqh,
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
    start_m = (blocks_m - 1 - block) * BLOCK_M
    if start_m >= seq_q:
        return
    q_ptr += head_offset(batch, first_q, head, stride_qb, stride_qs, stride_qh)
    k_ptr += head_offset(batch, first_k, head // group, stride_kb, stride_ks, stride_kh)
    v_ptr += head_offset(batch, first_k, head // group, stride_vb, stride_vs, stride_vh)
    out_ptr += head_offset(batch, first_q, head, stride_ob, stride_os, stride_oh)
    dq_ptr += head_offset(batch, first_q, head, stride_dqb, stride_dqs, stride_dqh)
    do_ptr += head_offset(batch, first_q, head, stride_dob, stride_dos, stride_doh)
    lse_offset = head_offset(batch, first_q, head, stride_lb, 1, stride_lh)
    seed = tl.load(seed_ptr) if DROPOUT else 0
    stream = batch * heads + head
    shift = seq_k - seq_q
    slope = head_slope(slopes_ptr, batch, head, stride_sb)
    bias_at = batch.to(tl.int64) * stride_bb + head.to(tl.int64) * stride_bh

    # delta = rowsum(do * out) - dlse, also for the dk and dv kernel.
    do = load_rows(do_ptr, start_m, seq_q, stride_dos, BLOCK_M, V_DIM, BLOCK_V)
    out = load_rows(out_ptr, start_m, seq_q, stride_os, BLOCK_M, V_DIM, BLOCK_V)
    delta = tl.sum(rounded_product(out.to(tl.float32), do.to(tl.float32)), 1)
    rows = start_m + tl.arange(0, BLOCK_M)
    inside = rows < seq_q
    if dlse_ptr is not None:
        delta -= tl.load(dlse_ptr + lse_offset + rows, mask=inside, other=0.0)
    tl.store(delta_ptr + lse_offset + rows, delta, mask=inside)

    # The queries, and the keys that they see.
    q = load_rows(q_ptr, start_m, seq_q, stride_qs, BLOCK_M, HEAD_DIM, BLOCK_D)
    lse_log2 = in_base_2(tl.load(lse_ptr + lse_offset + rows, mask=inside, other=float("inf")))
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    scale_log2 = LOG2E if SOFTCAP or slopes_ptr is not None or bias_ptr is not None else scale * LOG2E
    first, full_first, full_end, end = span(
        start_m, shift, window_left, window_right, seq_k, BLOCK_M, BLOCK_N, HAS_LEFT, HAS_RIGHT
    )
    for start_n in tl.range(first, end, BLOCK_N):
        start_n = tl.multiple_of(start_n, BLOCK_N)
        k = load_rows(k_ptr, start_n, seq_k, stride_ks, BLOCK_N, HEAD_DIM, BLOCK_D)
        v = load_rows(v_ptr, start_n, seq_k, stride_vs, BLOCK_N, V_DIM, BLOCK_V)
        # Scores and gradients of the weights, (BLOCK_M, BLOCK_N).
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        dweights = tl.dot(do, tl.trans(v), input_precision="ieee")
        tanh_s = scores
        if SOFTCAP:
            tanh_s = tanh(scores * (scale / softcap))
            scores = softcap * tanh_s
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
        # The weights, from the forward pass's log-sum-exp.
        weights = tl.exp2(scores * scale_log2 - lse_log2[:, None])
        alive = True
        if DROPOUT:
            alive = dropout_mask(seed, stream, start_m, start_n, dropout_p, BLOCK_M, BLOCK_N)
        # Gradients of the scores; accumulate dq.
        dscores = _gradient(weights, dweights, delta[:, None], tanh_s, alive, dropout_p, SOFTCAP, DROPOUT)
        dq = tl.dot(dscores.to(k.dtype), k, dq, input_precision="ieee")
    store_rows(dq_ptr, dq * scale, start_m, seq_q, stride_dqs, BLOCK_M, HEAD_DIM, BLOCK_D)


@triton.jit
def flash_attention_dkdv(
    q_ptr,  # (batch, seq_q, heads_k * group, head_dim), or (tokens, heads, head_dim) with stride_qb = 0
    k_ptr,  # (batch, seq_k, heads_k, head_dim)
    v_ptr,  # as k, with V_DIM in place of head_dim
    do_ptr,  # as q, with V_DIM in place of head_dim
    lse_ptr,  # (batch, heads, seq_q), or (heads, tokens)
    delta_ptr,  # as lse, of flash_attention_dq
    dk_ptr,  # as k
    dv_ptr,  # as v
    cu_seqlens_q_ptr,  # (batch + 1,), or None
    cu_seqlens_k_ptr,  # (batch + 1,), or None
    seed_ptr,  # (1,) int64, or None
    slopes_ptr,  # (batch, heads) fp32, or None
    bias_ptr,  # (batch, heads, seq_q, seq_k), or None
    heads_k,
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
    stride_dob,
    stride_dos,
    stride_doh,
    stride_dkb,
    stride_dks,
    stride_dkh,
    stride_dvb,
    stride_dvs,
    stride_dvh,
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
    blocks_n = tl.cdiv(max_seq_k, BLOCK_N)
    block, head_k, batch, first_q, seq_q, first_k, seq_k = locate(
        cu_seqlens_q_ptr, cu_seqlens_k_ptr, blocks_n, heads_k, max_seq_q, max_seq_k, tokens_q, tokens_k,
        VARLEN,
    )  # fmt: skip
    # Under a causal mask the first keys have the most queries, and are first.
    start_n = block * BLOCK_N
    if start_n >= seq_k:
        return
    k_ptr += head_offset(batch, first_k, head_k, stride_kb, stride_ks, stride_kh)
    v_ptr += head_offset(batch, first_k, head_k, stride_vb, stride_vs, stride_vh)
    dk_ptr += head_offset(batch, first_k, head_k, stride_dkb, stride_dks, stride_dkh)
    dv_ptr += head_offset(batch, first_k, head_k, stride_dvb, stride_dvs, stride_dvh)
    seed = tl.load(seed_ptr) if DROPOUT else 0
    shift = seq_k - seq_q

    # The keys and values, and the queries that see them.
    k = load_rows(k_ptr, start_n, seq_k, stride_ks, BLOCK_N, HEAD_DIM, BLOCK_D)
    v = load_rows(v_ptr, start_n, seq_k, stride_vs, BLOCK_N, V_DIM, BLOCK_V)
    cols = start_n + tl.arange(0, BLOCK_N)
    scale_log2 = LOG2E if SOFTCAP or slopes_ptr is not None or bias_ptr is not None else scale * LOG2E
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
    first, full_first, full_end, end = span(
        start_n, -shift, window_right, window_left, seq_q, BLOCK_N, BLOCK_M, HAS_RIGHT, HAS_LEFT
    )
    # One query head after another of those that share the keys.
    for member in range(group):
        head = head_k * group + member
        stream = batch * heads_k * group + head
        q_head = q_ptr + head_offset(batch, first_q, head, stride_qb, stride_qs, stride_qh)
        do_head = do_ptr + head_offset(batch, first_q, head, stride_dob, stride_dos, stride_doh)
        lse_offset = head_offset(batch, first_q, head, stride_lb, 1, stride_lh)
        slope = head_slope(slopes_ptr, batch, head, stride_sb)
        bias_at = batch.to(tl.int64) * stride_bb + head.to(tl.int64) * stride_bh
        for start_m in tl.range(first, end, BLOCK_M):
            start_m = tl.multiple_of(start_m, BLOCK_M)
            rows = start_m + tl.arange(0, BLOCK_M)
            q = load_rows(q_head, start_m, seq_q, stride_qs, BLOCK_M, HEAD_DIM, BLOCK_D)
            do = load_rows(do_head, start_m, seq_q, stride_dos, BLOCK_M, V_DIM, BLOCK_V)
            lse = tl.load(lse_ptr + lse_offset + rows, mask=rows < seq_q, other=float("inf"))
            delta = tl.load(delta_ptr + lse_offset + rows, mask=rows < seq_q, other=0.0)
            # Scores and gradients of the weights, transposed to (BLOCK_N, BLOCK_M): the weights are then an
            # operand as they stand.
            scores = tl.dot(k, tl.trans(q), input_precision="ieee")
            dweights = tl.dot(v, tl.trans(do), input_precision="ieee")
            tanh_s = scores
            if SOFTCAP:
                tanh_s = tanh(scores * (scale / softcap))
                scores = softcap * tanh_s
            scores = biased(
                scores, 1.0 if SOFTCAP else scale, rows[None, :], cols[:, None], shift, seq_q, seq_k,
                slopes_ptr, slope, bias_ptr, bias_at, stride_bq,
            )  # fmt: skip
            # The mask, in tiles that not every key sees whole.
            if (start_m < full_first) | (start_m >= full_end):
                scores = hide(
                    scores, rows[None, :], cols[:, None], shift, seq_k, window_left, window_right,
                    HAS_LEFT, HAS_RIGHT,
                )  # fmt: skip
            # The weights, from the forward pass's log-sum-exp.
            weights = tl.exp2(scores * scale_log2 - in_base_2(lse)[None, :])
            alive = True
            if DROPOUT:
                alive = tl.trans(dropout_mask(seed, stream, start_m, start_n, dropout_p, BLOCK_M, BLOCK_N))
            # Gradients of the scores; accumulate dv and dk.
            dscores = _gradient(weights, dweights, delta[None, :], tanh_s, alive, dropout_p, SOFTCAP, DROPOUT)
            if DROPOUT:
                weights = tl.where(alive, weights, 0.0)
            dv = tl.dot(weights.to(do.dtype), do, dv, input_precision="ieee")
            dk = tl.dot(dscores.to(q.dtype), q, dk, input_precision="ieee")
    if DROPOUT:
        dv = dv * (1.0 / (1.0 - dropout_p))
    store_rows(dk_ptr, dk * scale, start_n, seq_k, stride_dks, BLOCK_N, HEAD_DIM, BLOCK_D)
    store_rows(dv_ptr, dv, start_n, seq_k, stride_dvs, BLOCK_N, V_DIM, BLOCK_V)
