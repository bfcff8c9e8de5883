"""Attention forward for Hopper: a producer warp and two consumer warpgroups.

The sums of ``kernels.flash_attention_forward`` for half precision and a head dimension of 64 or 128, without
soft cap, biases and dropout.

Layout. A program stays on its multiprocessor and takes one tile of 128 queries of a head after another. Its
producer warp has the copy engine fetch the queries, and keys and values into a ring of STAGES tiles each. Two
warpgroups own 64 queries each. Each issues the products of the next scores and of the last weights together,
when it has its turn: while one warpgroup weighs its scores the tensor core works for the other.

Barriers in shared memory, and what the end of a phase says:

    q_full, k_full, v_full       a tile has come
    q_empty, k_empty, v_empty    both warpgroups have read it
    v_landed                     values have come that the producer has yet to cut off at their sequence's end
    turns                        a warpgroup may issue its products

Tiles go by sections of heads whose keys and values fit in L2 together, within a section by the number of keys
that they see, most first. Programs take them in turn, there and back, so that all have about the same work.

Source: Shah et al. 2024, FlashAttention-3.
"""

from gptkern.ops._device import LN2, LOG2E, online_softmax
from gptkern.ops._device_hopper import new_barriers
from gptkern.ops._gluon import (
    async_load,
    fence_async_shared,
    gl,
    gluon,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from gptkern.ops.flash_attention.kernels import hide, sequence, span

BLOCK_M = gl.constexpr(128)
ROWS = gl.constexpr(64)  # of a warpgroup


# --- tiles of queries


@gluon.jit
def index_of(turn, programs):
    """The number of this program's tile: there and back."""
    program = gl.program_id(0)
    return gl.where(turn % 2 == 0, turn * programs + program, (turn + 1) * programs - 1 - program)


@gluon.jit
def _tile(
    index, plan,
    VARLEN: gl.constexpr, HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr, BLOCK_N: gl.constexpr,
):  # fmt: skip
    """(first query, head, batch), (first_q, seq_q, first_k, seq_k), and the tile's keys as of ``span``."""
    (
        cu_seqlens_q_ptr, cu_seqlens_k_ptr, sequences, heads, max_seq_q, max_seq_k, tokens_q, tokens_k,
        window_left, window_right, section, blocks, _total, _programs,
    ) = plan  # fmt: skip
    begin = index // (section * blocks) * section
    count = gl.minimum(section, sequences * heads - begin)
    within = index - begin * blocks
    start_m = (blocks - 1 - within // count) * BLOCK_M
    head = (begin + within % count) % heads
    batch = (begin + within % count) // heads
    first_q, seq_q = sequence(cu_seqlens_q_ptr, batch, max_seq_q, tokens_q, VARLEN)
    first_k, seq_k = sequence(cu_seqlens_k_ptr, batch, max_seq_k, tokens_k, VARLEN)
    first, full_first, full_end, end = span(
        start_m, seq_k - seq_q, window_left, window_right, seq_k, BLOCK_M, BLOCK_N, HAS_LEFT, HAS_RIGHT
    )
    # A tile behind the last query of its sequence has no keys.
    end = gl.where(start_m < seq_q, end, first)
    return (start_m, head, batch), (first_q, seq_q, first_k, seq_k), (first, full_first, full_end, end)


# --- the producer


@gluon.jit
def _fetch(desc, where, full, ring, stage):
    """Have the copy engine fetch a tile; ``full`` says when it has come."""
    mbarrier.expect(full, desc.block_type.nbytes)
    async_load(desc, where, full, ring.index(stage))


@gluon.jit
def cut(values, length, BLOCK_N: gl.constexpr, HEAD_DIM: gl.constexpr):
    """Zero a tile's rows from ``length`` on: a weight of 0 does not undo the next sequence's NaN."""
    PIECE: gl.constexpr = 8
    # One warp, 16 bytes a lane.
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // HEAD_DIM, HEAD_DIM // 8], [1, 1], [1, 0])
    rows = gl.arange(0, PIECE, gl.SliceLayout(1, layout))
    for piece in gl.static_range(BLOCK_N // PIECE):
        if (piece + 1) * PIECE > length:
            part = values.slice(piece * PIECE, PIECE)
            inside = (piece * PIECE + rows)[:, None] < length
            part.store(gl.where(inside, part.load(layout), 0.0))


@gluon.jit
def _produce(
    descriptors, rings, barriers, plan, group,
    STAGES: gl.constexpr, BLOCK_N: gl.constexpr, HEAD_DIM: gl.constexpr,
    VARLEN: gl.constexpr, HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr,
):  # fmt: skip
    """The producer warp: all copies."""
    q_desc, k_desc, v_desc = descriptors
    q_ring, k_ring, v_ring = rings
    q_full, q_empty, k_full, k_empty, v_full, v_empty, v_landed, _turns = barriers
    total, programs = plan[12], plan[13]
    # Tiles so far of queries, of keys, and of values that were cut: their parities are the barriers' phases.
    tiles, step, cuts = 0, 0, 0
    for turn in range(gl.cdiv(total, programs)):
        index = index_of(turn, programs)
        if index < total:
            place, extents, keys = _tile(index, plan, VARLEN, HAS_LEFT, HAS_RIGHT, BLOCK_N)
            start_m, head, batch = place
            first_q, _seq_q, first_k, seq_k = extents
            first, _full_first, _full_end, end = keys
            at = 0 if VARLEN else batch
            if first < end:
                # The queries, 64 for each warpgroup.
                mbarrier.wait(q_empty, (tiles & 1) ^ 1)
                mbarrier.expect(q_full, 2 * q_desc.block_type.nbytes)
                for half in gl.static_range(2):
                    where = [at, first_q + start_m + half * ROWS, head, 0]
                    async_load(q_desc, where, q_full, q_ring.index(half))
                tiles += 1
                # Keys and values, as their places in the rings come free.
                for start_n in range(first, end, BLOCK_N):
                    stage = step % STAGES
                    free = (step // STAGES & 1) ^ 1
                    where = [at, first_k + start_n, head // group, 0]
                    mbarrier.wait(k_empty.index(stage), free)
                    _fetch(k_desc, where, k_full.index(stage), k_ring, stage)
                    mbarrier.wait(v_empty.index(stage), free)
                    if VARLEN and start_n + BLOCK_N > seq_k:
                        _fetch(v_desc, where, v_landed, v_ring, stage)
                        mbarrier.wait(v_landed, cuts & 1)
                        cuts += 1
                        values = v_ring.index(stage).reshape([BLOCK_N, HEAD_DIM])
                        cut(values, seq_k - start_n, BLOCK_N, HEAD_DIM)
                        # The tensor core sees the zeros.
                        fence_async_shared()
                        mbarrier.arrive(v_full.index(stage), count=1)
                    else:
                        _fetch(v_desc, where, v_full.index(stage), v_ring, stage)
                    step += 1


# --- the consumers


@gluon.jit
def _scores(
    q, k_ring, k_full, turns, step, SCORES: gl.constexpr, WARPGROUP: gl.constexpr, STAGES: gl.constexpr,
    BLOCK_N: gl.constexpr, HEAD_DIM: gl.constexpr,
):  # fmt: skip
    """Issue the scores of a tile of keys when it has come and it is this warpgroup's turn."""
    stage = step % STAGES
    keys = k_ring.index(stage).reshape([BLOCK_N, HEAD_DIM]).permute((1, 0))
    mbarrier.wait(k_full.index(stage), step // STAGES & 1)
    # The first warpgroup begins.
    mbarrier.wait(turns.index(WARPGROUP), (step & 1) ^ (1 - WARPGROUP))
    nothing = gl.zeros([ROWS, BLOCK_N], gl.float32, SCORES)
    return warpgroup_mma(q, keys, nothing, use_acc=False, is_async=True)


@gluon.jit
def _values(
    weights, acc, v_ring, v_full, step, STAGES: gl.constexpr, BLOCK_N: gl.constexpr, HEAD_DIM: gl.constexpr
):  # fmt: skip
    """Issue the weighted sum of a tile of values when it has come."""
    stage = step % STAGES
    mbarrier.wait(v_full.index(stage), step // STAGES & 1)
    return warpgroup_mma(weights, v_ring.index(stage).reshape([BLOCK_N, HEAD_DIM]), acc, is_async=True)


@gluon.jit
def _weigh(
    scores, row_max, row_sum, row, start_n, extents, plan, scale_log2,
    SCORES: gl.constexpr, BLOCK_N: gl.constexpr, HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr,
    MASKED: gl.constexpr,
):  # fmt: skip
    """``online_softmax`` of a tile's scores."""
    if MASKED:
        _first_q, seq_q, _first_k, seq_k = extents
        rows = row + gl.arange(0, ROWS, gl.SliceLayout(1, SCORES))
        columns = start_n + gl.arange(0, BLOCK_N, gl.SliceLayout(0, SCORES))
        scores = hide(
            scores, rows[:, None], columns[None, :], seq_k - seq_q, seq_k, plan[8], plan[9],
            HAS_LEFT, HAS_RIGHT,
        )  # fmt: skip
    return online_softmax(scores, row_max, row_sum, scale_log2)


@gluon.jit
def _attend(
    state, step, row, rings, barriers, extents, keys, plan, scale_log2,
    WEIGHTS: gl.constexpr, SCORES: gl.constexpr, SUMS: gl.constexpr, WARPGROUP: gl.constexpr,
    STAGES: gl.constexpr, BLOCK_N: gl.constexpr, HEAD_DIM: gl.constexpr, HAS_LEFT: gl.constexpr,
    HAS_RIGHT: gl.constexpr,
):  # fmt: skip
    """Attention of 64 queries to all their keys: (values' sum, maximum, sum), tiles of keys so far."""
    acc, row_max, row_sum = state
    q_ring, k_ring, v_ring = rings
    _q_full, q_empty, k_full, k_empty, v_full, v_empty, _v_landed, turns = barriers
    first, full_first, full_end, end = keys
    q = q_ring.index(WARPGROUP).reshape([ROWS, HEAD_DIM])
    other = turns.index(1 - WARPGROUP)
    # The first tile's scores and weights.
    scores = _scores(q, k_ring, k_full, turns, step, SCORES, WARPGROUP, STAGES, BLOCK_N, HEAD_DIM)
    mbarrier.arrive(other, count=1)
    scores = warpgroup_mma_wait(0, deps=[scores])
    mbarrier.arrive(k_empty.index(step % STAGES), count=1)
    newer, row_max, row_sum, _ = _weigh(
        scores, row_max, row_sum, row, first, extents, plan, scale_log2,
        SCORES, BLOCK_N, HAS_LEFT, HAS_RIGHT, True,
    )  # fmt: skip
    weights = gl.convert_layout(newer.to(v_ring.dtype), WEIGHTS)
    step += 1
    # Tiles that a window cuts at its left, whole ones, and those cut at the right: a loop for each, since a
    # branch between products makes ptxas wait for them there.
    start_n = first + BLOCK_N
    for part in gl.static_range(0 if HAS_LEFT else 1, 3):
        part_end = full_first if part == 0 else full_end if part == 1 else end
        while start_n < part_end:
            # Issue the scores of this tile and the weighted values of the one before.
            scores = _scores(q, k_ring, k_full, turns, step, SCORES, WARPGROUP, STAGES, BLOCK_N, HEAD_DIM)
            sums = _values(weights, acc, v_ring, v_full, step - 1, STAGES, BLOCK_N, HEAD_DIM)
            mbarrier.arrive(other, count=1)
            # Weigh the scores while the values are summed.
            scores = warpgroup_mma_wait(1, deps=[scores])
            mbarrier.arrive(k_empty.index(step % STAGES), count=1)
            newer, row_max, row_sum, rescale = _weigh(
                scores, row_max, row_sum, row, start_n, extents, plan, scale_log2,
                SCORES, BLOCK_N, HAS_LEFT, HAS_RIGHT, part != 1,
            )  # fmt: skip
            acc, newer = warpgroup_mma_wait(0, deps=[sums, newer])
            mbarrier.arrive(v_empty.index((step - 1) % STAGES), count=1)
            acc = acc * gl.convert_layout(rescale, gl.SliceLayout(1, SUMS))[:, None]
            weights = gl.convert_layout(newer.to(v_ring.dtype), WEIGHTS)
            step += 1
            start_n += BLOCK_N
    # The weighted values of the last tile.
    mbarrier.arrive(q_empty, count=1)
    sums = _values(weights, acc, v_ring, v_full, step - 1, STAGES, BLOCK_N, HEAD_DIM)
    acc = warpgroup_mma_wait(0, deps=[sums])
    mbarrier.arrive(v_empty.index((step - 1) % STAGES), count=1)
    return (acc, row_max, row_sum), step


@gluon.jit
def _store(
    out_ptr, lse_ptr, state, count, stride, HEAD_DIM: gl.constexpr, SCORES: gl.constexpr, SUMS: gl.constexpr
):  # fmt: skip
    """Normalise and store the first ``count`` of a warpgroup's rows; a query that saw no key gives 0."""
    acc, row_max, row_sum = state
    divisor = gl.where(row_sum == 0.0, 1.0, row_sum)
    out = acc / gl.convert_layout(divisor, gl.SliceLayout(1, SUMS))[:, None]
    # 16 bytes a lane.
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // HEAD_DIM, HEAD_DIM // 8], [4, 1], [1, 0])
    out = gl.convert_layout(out.to(out_ptr.dtype.element_ty), layout)
    rows = gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    columns = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, layout))
    gl.store(out_ptr + rows[:, None] * stride + columns[None, :], out, mask=(rows < count)[:, None])
    # One rounding of the sum: an error here is a relative error of all the gradients of its row.
    lse = gl.fma(row_max, LN2, gl.log2(row_sum) * LN2)
    rows = gl.arange(0, ROWS, gl.SliceLayout(1, SCORES))
    gl.store(lse_ptr + rows, lse, mask=rows < count)


@gluon.jit
def _consume(
    rings, barriers, plan, out_ptr, lse_ptr, scale_log2,
    WARPGROUP: gl.constexpr, STAGES: gl.constexpr, BLOCK_N: gl.constexpr, HEAD_DIM: gl.constexpr,
    VARLEN: gl.constexpr, HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr,
):  # fmt: skip
    """A consumer warpgroup: 64 queries of every tile."""
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=SUMS, k_width=2)
    q_full = barriers[0]
    heads, tokens_q, total, programs = plan[3], plan[6], plan[12], plan[13]
    tiles, step = 0, 0
    for turn in range(gl.cdiv(total, programs)):
        index = index_of(turn, programs)
        if index < total:
            place, extents, keys = _tile(index, plan, VARLEN, HAS_LEFT, HAS_RIGHT, BLOCK_N)
            start_m, head, batch = place
            row = start_m + WARPGROUP * ROWS
            row_max = gl.full([ROWS], float("-inf"), gl.float32, gl.SliceLayout(1, SCORES))
            row_sum = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, SCORES))
            state = (gl.zeros([ROWS, HEAD_DIM], gl.float32, SUMS), row_max, row_sum)
            if keys[0] < keys[3]:
                mbarrier.wait(q_full, tiles & 1)
                state, step = _attend(
                    state, step, row, rings, barriers, extents, keys, plan, scale_log2,
                    WEIGHTS, SCORES, SUMS, WARPGROUP, STAGES, BLOCK_N, HEAD_DIM, HAS_LEFT, HAS_RIGHT,
                )  # fmt: skip
                tiles += 1
            # int64: batch * seq * heads * head_dim passes 2^31 at 128k context.
            first_q, seq_q, _first_k, _seq_k = extents
            if VARLEN:
                out_row = first_q.to(gl.int64) + row
                lse_at = head.to(gl.int64) * tokens_q + out_row
            else:
                out_row = batch.to(gl.int64) * seq_q + row
                lse_at = (batch.to(gl.int64) * heads + head) * seq_q + row
            out_at = (out_row * heads + head) * HEAD_DIM
            _store(
                out_ptr + out_at, lse_ptr + lse_at, state, seq_q - row, heads * HEAD_DIM,
                HEAD_DIM, SCORES, SUMS,
            )  # fmt: skip


# --- the kernel


@gluon.jit(do_not_specialize=["section", "blocks", "total", "programs"])
def flash_attention_forward_hopper(
    q_desc,  # (batch, seq_q, heads, HEAD_DIM), or (1, tokens, heads, HEAD_DIM); tiles of 64 queries of a head
    k_desc,  # as q, with the heads of keys; tiles of BLOCK_N keys
    v_desc,
    out_ptr,  # as q, contiguous
    lse_ptr,  # (batch, heads, seq_q), or (heads, tokens), contiguous
    cu_seqlens_q_ptr,  # (batch + 1,), or None
    cu_seqlens_k_ptr,  # (batch + 1,), or None
    sequences,
    heads,
    group,
    max_seq_q,
    max_seq_k,
    tokens_q,  # packed: tokens of all sequences; dense: 0
    tokens_k,
    window_left,
    window_right,
    scale,
    section,  # heads whose keys and values fit in L2 together
    blocks,  # tiles of the longest sequence's queries
    total,  # tiles of all sequences and heads
    programs,
    HEAD_DIM: gl.constexpr,
    VARLEN: gl.constexpr,
    HAS_LEFT: gl.constexpr,
    HAS_RIGHT: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr,
    PRODUCER_REGISTERS: gl.constexpr,
):
    # Shared memory: the rings and the barriers.
    dtype: gl.constexpr = q_desc.dtype
    q_ring = gl.allocate_shared_memory(dtype, [2, 1, ROWS, 1, HEAD_DIM], q_desc.layout)
    k_ring = gl.allocate_shared_memory(dtype, [STAGES, 1, BLOCK_N, 1, HEAD_DIM], k_desc.layout)
    v_ring = gl.allocate_shared_memory(dtype, [STAGES, 1, BLOCK_N, 1, HEAD_DIM], v_desc.layout)
    rings = (q_ring, k_ring, v_ring)
    barriers = (
        new_barriers(1, 1).index(0), new_barriers(1, 2).index(0),
        new_barriers(STAGES, 1), new_barriers(STAGES, 2), new_barriers(STAGES, 1), new_barriers(STAGES, 2),
        new_barriers(1, 1).index(0), new_barriers(2, 1),
    )  # fmt: skip
    # The copy engine sees the barriers.
    fence_async_shared()
    plan = (
        cu_seqlens_q_ptr, cu_seqlens_k_ptr, sequences, heads, max_seq_q, max_seq_k, tokens_q, tokens_k,
        window_left, window_right, section, blocks, total, programs,
    )  # fmt: skip
    scale_log2 = scale * LOG2E
    # The kernel's own four warps are the first warpgroup.
    gl.warp_specialize(
        [
            (_consume, (rings, barriers, plan, out_ptr, lse_ptr, scale_log2, 0,
                        STAGES, BLOCK_N, HEAD_DIM, VARLEN, HAS_LEFT, HAS_RIGHT)),
            (_consume, (rings, barriers, plan, out_ptr, lse_ptr, scale_log2, 1,
                        STAGES, BLOCK_N, HEAD_DIM, VARLEN, HAS_LEFT, HAS_RIGHT)),
            (_produce, ((q_desc, k_desc, v_desc), rings, barriers, plan, group,
                        STAGES, BLOCK_N, HEAD_DIM, VARLEN, HAS_LEFT, HAS_RIGHT)),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip
