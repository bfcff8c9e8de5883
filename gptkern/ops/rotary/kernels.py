"""Rotary positions of queries and keys (Su et al. 2021, "RoFormer", equation 34).

    pair (a, b) of a head becomes (a cos - b sin, b cos + a sin),   angle = position * frequency of the pair

Pair i is elements i and i + DIM / 2 of a head, or 2 i and 2 i + 1 (INTERLEAVED); elements from DIM on stay.
Before it each head may be normalised, n = x / rms(x) * weight (Zhang and Sennrich 2019). The gradient turns
back: its pairs take the angle with the other sign. With h = x / rms(x), dn the gradient so turned, g = dn w:

    dx = (g - h * mean(g * h)) / rms(x),      dw = sum over tokens and heads of dn * h

Layout. A program owns BLOCK_H heads of one token, of q or of k; the token's cosines and sines are read once
for them. q and k are read once and written once, and may be written where they were read. The backward pass
of the norm takes tokens in turn, so that a program sums the weight's gradient in registers over all of them;
the parts are added up afterwards in a fixed order.

A head is held as three tiles: the first and the second elements of its pairs, and the elements that stay.
"""

from gptkern.ops._device import rounded_product, row_offsets
from gptkern.ops._triton import tl, triton

_VARYING = ("tokens", "rows", "context", "q_inner", "k_inner", "q_out_inner", "k_out_inner")


@triton.jit
def load_heads(
    heads_ptr, mask, HEAD_DIM: tl.constexpr, DIM: tl.constexpr, INTERLEAVED: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """(first, second, rest) of heads, fp32; ``heads_ptr`` points at each head, ``mask`` says which there are.

    Lanes without an element are 0.
    """
    rest_at = DIM + tl.arange(0, BLOCK_R)
    rest_mask = mask[:, None] & (rest_at < HEAD_DIM)[None, :]
    rest = tl.load(heads_ptr[:, None] + rest_at[None, :], mask=rest_mask, other=0.0).to(tl.float32)
    if INTERLEAVED:
        at = tl.arange(0, 2 * BLOCK_P)
        both_mask = mask[:, None] & (at < DIM)[None, :]
        both = tl.load(heads_ptr[:, None] + at[None, :], mask=both_mask, other=0.0).to(tl.float32)
        first, second = tl.split(tl.reshape(both, (both.shape[0], BLOCK_P, 2)))
    else:
        at = tl.arange(0, BLOCK_P)
        half_mask = mask[:, None] & (at < DIM // 2)[None, :]
        first = tl.load(heads_ptr[:, None] + at[None, :], mask=half_mask, other=0.0).to(tl.float32)
        second = tl.load(heads_ptr[:, None] + (DIM // 2 + at)[None, :], mask=half_mask, other=0.0)
        second = second.to(tl.float32)
    return first, second, rest


@triton.jit
def store_heads(
    heads_ptr, first, second, rest, mask, HEAD_DIM: tl.constexpr, DIM: tl.constexpr,
    INTERLEAVED: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """The inverse of ``load_heads``, rounded to the pointers' dtype."""
    DTYPE: tl.constexpr = heads_ptr.dtype.element_ty
    rest_at = DIM + tl.arange(0, BLOCK_R)
    rest_mask = mask[:, None] & (rest_at < HEAD_DIM)[None, :]
    tl.store(heads_ptr[:, None] + rest_at[None, :], rest.to(DTYPE), mask=rest_mask)
    if INTERLEAVED:
        at = tl.arange(0, 2 * BLOCK_P)
        both = tl.reshape(tl.join(first, second), (first.shape[0], 2 * BLOCK_P))
        tl.store(heads_ptr[:, None] + at[None, :], both.to(DTYPE), mask=mask[:, None] & (at < DIM)[None, :])
    else:
        at = tl.arange(0, BLOCK_P)
        half_mask = mask[:, None] & (at < DIM // 2)[None, :]
        tl.store(heads_ptr[:, None] + at[None, :], first.to(DTYPE), mask=half_mask)
        tl.store(heads_ptr[:, None] + (DIM // 2 + at)[None, :], second.to(DTYPE), mask=half_mask)


@triton.jit
def angles(
    cos_ptr, sin_ptr, positions_ptr, token, rows, context, HALF: tl.constexpr, BLOCK_P: tl.constexpr
):  # fmt: skip
    """(cos, sin) of a token's pairs, ``(1, BLOCK_P)`` fp32; NaN for a position that the tables do not have.

    Positions repeat every ``rows`` tokens; without positions token i of them stands at i.
    """
    position = token % rows
    if positions_ptr is not None:
        position = tl.load(positions_ptr + position).to(tl.int64)
    known = (position >= 0) & (position < context)
    pair = tl.arange(0, BLOCK_P)
    at = position * HALF + pair
    cos = tl.load(cos_ptr + at, mask=(pair < HALF) & known, other=0.0)
    sin = tl.load(sin_ptr + at, mask=(pair < HALF) & known, other=0.0)
    # Lanes without a pair stay 0, so that sums over all lanes do not see the NaN.
    cos = tl.where((pair < HALF) & (known == 0), float("nan"), cos)
    return cos[None, :], sin[None, :]


@triton.jit
def norm_weight(
    weight_ptr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr, INTERLEAVED: tl.constexpr,
    UNIT_OFFSET: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """The norm's factors, as the three tiles of one head."""
    one = tl.zeros([1], tl.int32)
    first, second, rest = load_heads(
        weight_ptr + one, one == 0, HEAD_DIM, DIM, INTERLEAVED, BLOCK_P, BLOCK_R
    )  # fmt: skip
    return first + UNIT_OFFSET, second + UNIT_OFFSET, rest + UNIT_OFFSET


@triton.jit
def products(a_first, b_first, a_second, b_second, a_rest, b_rest):
    """The sum of a * b over each head, whose tiles are (first, second, rest)."""
    pairs = tl.fma(a_second, b_second, a_first * b_first)
    return tl.sum(pairs, 1) + tl.sum(rounded_product(a_rest, b_rest), 1)


@triton.jit
def reciprocal_rms(first, second, rest, eps, HEAD_DIM: tl.constexpr):
    """1 / root mean square of each head, as a column."""
    squares = products(first, first, second, second, rest, rest)
    return tl.rsqrt(squares / HEAD_DIM + eps)[:, None]


@triton.jit
def turn_heads(
    x_ptr, out_ptr, weight_ptr, cos, sin, eps, mask, HEAD_DIM: tl.constexpr, DIM: tl.constexpr,
    INTERLEAVED: tl.constexpr, UNIT_OFFSET: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Normalise, turn and store the heads at ``x_ptr``."""
    first, second, rest = load_heads(x_ptr, mask, HEAD_DIM, DIM, INTERLEAVED, BLOCK_P, BLOCK_R)
    if weight_ptr is not None:
        w_first, w_second, w_rest = norm_weight(
            weight_ptr, HEAD_DIM, DIM, INTERLEAVED, UNIT_OFFSET, BLOCK_P, BLOCK_R
        )  # fmt: skip
        rstd = reciprocal_rms(first, second, rest, eps, HEAD_DIM)
        first, second, rest = first * rstd * w_first, second * rstd * w_second, rest * rstd * w_rest
    store_heads(
        out_ptr, first * cos - second * sin, second * cos + first * sin, rest, mask,
        HEAD_DIM, DIM, INTERLEAVED, BLOCK_P, BLOCK_R,
    )  # fmt: skip


@triton.jit(do_not_specialize=_VARYING)
def rotary_kernel(
    q_ptr,  # (tokens, HEADS, HEAD_DIM), token t at (t // inner) * stride_o + (t % inner) * stride_i
    k_ptr,  # (tokens, KV_HEADS, HEAD_DIM), or None
    q_out_ptr,  # as q, with its own strides
    k_out_ptr,
    cos_ptr,  # (context, DIM / 2) fp32
    sin_ptr,
    positions_ptr,  # (rows,) int32 or int64, or None
    q_weight_ptr,  # (HEAD_DIM,), or None: no norm
    k_weight_ptr,
    rows, context, eps,
    q_inner, stride_qo, stride_qi, stride_qh,
    k_inner, stride_ko, stride_ki, stride_kh,
    q_out_inner, stride_qoo, stride_qoi, stride_qoh,
    k_out_inner, stride_koo, stride_koi, stride_koh,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr,
    INTERLEAVED: tl.constexpr, UNIT_OFFSET: tl.constexpr, BACK: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    token, block = tl.program_id(0), tl.program_id(1)
    cos, sin = angles(cos_ptr, sin_ptr, positions_ptr, token, rows, context, DIM // 2, BLOCK_P)
    if BACK:
        sin = -sin
    BLOCKS: tl.constexpr = (HEADS + BLOCK_H - 1) // BLOCK_H
    if block < BLOCKS:
        head = block * BLOCK_H + tl.arange(0, BLOCK_H)
        x_ptr = q_ptr + row_offsets(token, q_inner, stride_qo, stride_qi) + head * stride_qh
        out_ptr = q_out_ptr + row_offsets(token, q_out_inner, stride_qoo, stride_qoi) + head * stride_qoh
        turn_heads(
            x_ptr, out_ptr, q_weight_ptr, cos, sin, eps, head < HEADS,
            HEAD_DIM, DIM, INTERLEAVED, UNIT_OFFSET, BLOCK_P, BLOCK_R,
        )  # fmt: skip
    elif KV_HEADS:
        head = (block - BLOCKS) * BLOCK_H + tl.arange(0, BLOCK_H)
        x_ptr = k_ptr + row_offsets(token, k_inner, stride_ko, stride_ki) + head * stride_kh
        out_ptr = k_out_ptr + row_offsets(token, k_out_inner, stride_koo, stride_koi) + head * stride_koh
        turn_heads(
            x_ptr, out_ptr, k_weight_ptr, cos, sin, eps, head < KV_HEADS,
            HEAD_DIM, DIM, INTERLEAVED, UNIT_OFFSET, BLOCK_P, BLOCK_R,
        )  # fmt: skip


@triton.jit
def norm_backward_heads(
    d_out_ptr, x_ptr, dx_ptr, weight_ptr, part_ptr, cos_ptr, sin_ptr, positions_ptr,
    tokens, rows, context, eps, d_layout, x_layout, head,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr, INTERLEAVED: tl.constexpr,
    UNIT_OFFSET: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """The gradient of this program's tokens' heads, and its part of the weight's.

    Layouts are (inner, outer stride, inner stride, head stride); dx is contiguous.
    """
    mask = head < HEADS
    w_first, w_second, w_rest = norm_weight(
        weight_ptr, HEAD_DIM, DIM, INTERLEAVED, UNIT_OFFSET, BLOCK_P, BLOCK_R
    )  # fmt: skip
    dw_first = tl.zeros([BLOCK_H, BLOCK_P], tl.float32)
    dw_second = tl.zeros([BLOCK_H, BLOCK_P], tl.float32)
    dw_rest = tl.zeros([BLOCK_H, BLOCK_R], tl.float32)
    for token in tl.range(tl.program_id(0), tokens, tl.num_programs(0)):
        # The gradient, turned back; the normalised heads.
        cos, sin = angles(cos_ptr, sin_ptr, positions_ptr, token, rows, context, DIM // 2, BLOCK_P)
        d_at = row_offsets(token, d_layout[0], d_layout[1], d_layout[2])
        x_at = row_offsets(token, x_layout[0], x_layout[1], x_layout[2])
        d_first, d_second, d_rest = load_heads(
            d_out_ptr + d_at + head * d_layout[3], mask, HEAD_DIM, DIM, INTERLEAVED, BLOCK_P, BLOCK_R
        )  # fmt: skip
        d_first, d_second = d_first * cos + d_second * sin, d_second * cos - d_first * sin
        first, second, rest = load_heads(
            x_ptr + x_at + head * x_layout[3], mask, HEAD_DIM, DIM, INTERLEAVED, BLOCK_P, BLOCK_R
        )  # fmt: skip
        rstd = reciprocal_rms(first, second, rest, eps, HEAD_DIM)
        first, second, rest = first * rstd, second * rstd, rest * rstd
        # The weight's gradient.
        dw_first += d_first * first
        dw_second += d_second * second
        dw_rest += d_rest * rest
        # The input's: without the component along the normalised head.
        d_first, d_second, d_rest = d_first * w_first, d_second * w_second, d_rest * w_rest
        along = products(d_first, first, d_second, second, d_rest, rest)
        mean = (along / HEAD_DIM)[:, None]
        store_heads(
            dx_ptr + tl.cast(token, tl.int64) * (HEADS * HEAD_DIM) + head * HEAD_DIM,
            (d_first - first * mean) * rstd, (d_second - second * mean) * rstd, (d_rest - rest * mean) * rstd,
            mask, HEAD_DIM, DIM, INTERLEAVED, BLOCK_P, BLOCK_R,
        )  # fmt: skip
    one = tl.zeros([1], tl.int32)
    store_heads(
        part_ptr + one, tl.sum(dw_first, 0)[None, :], tl.sum(dw_second, 0)[None, :],
        tl.sum(dw_rest, 0)[None, :], one == 0, HEAD_DIM, DIM, INTERLEAVED, BLOCK_P, BLOCK_R,
    )  # fmt: skip


@triton.jit(do_not_specialize=(*_VARYING, "dq_inner", "dk_inner"))
def rotary_norm_backward_kernel(
    dq_out_ptr,  # the gradients of the results, as q and k
    dk_out_ptr,
    q_ptr,  # (tokens, HEADS, HEAD_DIM): before the norm
    k_ptr,  # (tokens, KV_HEADS, HEAD_DIM), or None
    dq_ptr,  # contiguous
    dk_ptr,
    q_weight_ptr,  # (HEAD_DIM,)
    k_weight_ptr,
    q_part_ptr,  # (programs * blocks of q's heads, HEAD_DIM) fp32
    k_part_ptr,
    cos_ptr,  # (context, DIM / 2) fp32
    sin_ptr,
    positions_ptr,  # (rows,) int32 or int64, or None
    tokens, rows, context, eps,
    dq_inner, stride_dqo, stride_dqi, stride_dqh,
    dk_inner, stride_dko, stride_dki, stride_dkh,
    q_inner, stride_qo, stride_qi, stride_qh,
    k_inner, stride_ko, stride_ki, stride_kh,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr,
    INTERLEAVED: tl.constexpr, UNIT_OFFSET: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(1)
    BLOCKS: tl.constexpr = (HEADS + BLOCK_H - 1) // BLOCK_H
    KV_BLOCKS: tl.constexpr = (KV_HEADS + BLOCK_H - 1) // BLOCK_H
    if block < BLOCKS:
        norm_backward_heads(
            dq_out_ptr, q_ptr, dq_ptr, q_weight_ptr,
            q_part_ptr + (tl.program_id(0) * BLOCKS + block) * HEAD_DIM,
            cos_ptr, sin_ptr, positions_ptr, tokens, rows, context, eps,
            (dq_inner, stride_dqo, stride_dqi, stride_dqh), (q_inner, stride_qo, stride_qi, stride_qh),
            block * BLOCK_H + tl.arange(0, BLOCK_H),
            HEADS, HEAD_DIM, DIM, INTERLEAVED, UNIT_OFFSET, BLOCK_H, BLOCK_P, BLOCK_R,
        )  # fmt: skip
    elif KV_HEADS:
        block -= BLOCKS
        norm_backward_heads(
            dk_out_ptr, k_ptr, dk_ptr, k_weight_ptr,
            k_part_ptr + (tl.program_id(0) * KV_BLOCKS + block) * HEAD_DIM,
            cos_ptr, sin_ptr, positions_ptr, tokens, rows, context, eps,
            (dk_inner, stride_dko, stride_dki, stride_dkh), (k_inner, stride_ko, stride_ki, stride_kh),
            block * BLOCK_H + tl.arange(0, BLOCK_H),
            KV_HEADS, HEAD_DIM, DIM, INTERLEAVED, UNIT_OFFSET, BLOCK_H, BLOCK_P, BLOCK_R,
        )  # fmt: skip
