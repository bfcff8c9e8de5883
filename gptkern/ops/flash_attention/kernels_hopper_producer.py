"""Attention backward for Hopper: tiles of keys, and the warps that fetch them and keep turns.

See ``kernels_hopper_backward`` for the layout and the barriers.
"""

from gptkern.ops._gluon import async_load, fence_async_shared, gl, gluon, mbarrier
from gptkern.ops.flash_attention.kernels import sequence, span
from gptkern.ops.flash_attention.kernels_hopper import cut, index_of
from gptkern.ops.flash_attention.kernels_hopper_delta import padded_row

BLOCK_N = gl.constexpr(128)
ROWS = gl.constexpr(64)  # keys of a warpgroup, queries of a step, rows and columns of its part of dq


# --- tiles of keys


@gluon.jit
def key_tile(
    index, plan,
    VARLEN: gl.constexpr, HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr, BLOCK_M: gl.constexpr,
):  # fmt: skip
    """(first key, head, batch), (first_q, seq_q, first_k, seq_k), and the tile's queries as of ``span``."""
    (
        cu_seqlens_q_ptr, cu_seqlens_k_ptr, sequences, heads_k, _group, max_seq_q, max_seq_k, tokens_q,
        tokens_k, window_left, window_right, section, blocks, _total, _programs, _padded,
    ) = plan  # fmt: skip
    begin = index // (section * blocks) * section
    count = gl.minimum(section, sequences * heads_k - begin)
    within = index - begin * blocks
    start_n = (blocks - 1 - within // count) * BLOCK_N
    head_k = (begin + within % count) % heads_k
    batch = (begin + within % count) // heads_k
    first_q, seq_q = sequence(cu_seqlens_q_ptr, batch, max_seq_q, tokens_q, VARLEN)
    first_k, seq_k = sequence(cu_seqlens_k_ptr, batch, max_seq_k, tokens_k, VARLEN)
    first, full_first, full_end, end = span(
        start_n, seq_q - seq_k, window_right, window_left, seq_q, BLOCK_N, BLOCK_M, HAS_RIGHT, HAS_LEFT
    )
    # A tile behind the last key of its sequence has no queries; of one that is not whole none sees all keys.
    end = gl.where(start_n < seq_k, end, first)
    full_end = gl.where(start_n + BLOCK_N <= seq_k, full_end, full_first)
    return (start_n, head_k, batch), (first_q, seq_q, first_k, seq_k), (first, full_first, full_end, end)


@gluon.jit
def turns_of(
    start_m, start_n, extents, plan, HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr, BLOCK_M: gl.constexpr
):
    """(tiles of keys that add to dq of BLOCK_M queries before this one, whether it is the last to add)."""
    _first_q, seq_q, _first_k, seq_k = extents
    first, _full_first, _full_end, end = span(
        start_m, seq_k - seq_q, plan[9], plan[10], seq_k, BLOCK_M, BLOCK_N, HAS_LEFT, HAS_RIGHT
    )
    return (end - 1) // BLOCK_N - start_n // BLOCK_N, first == start_n


# --- the producer


@gluon.jit
def _fetch(
    descriptors, rings, piece, where, length, full, landed, cuts,
    PIECES: gl.constexpr, VARLEN: gl.constexpr, HEAD_DIM: gl.constexpr,
):  # fmt: skip
    """Have the copy engine fetch PIECES x 64 rows of two tensors; ``full`` says when they have come.

    ``length`` rows are the sequence's own: of packed sequences the others are zeroed. Returns the number of
    phases of ``landed`` so far.
    """
    at, first, head = where
    # Weights of 0 do not undo the next sequence's NaN.
    ragged = VARLEN and length < PIECES * ROWS
    if ragged:
        barrier = landed
    else:
        barrier = full
    mbarrier.expect(barrier, 2 * PIECES * descriptors[0].block_type.nbytes)
    for i in gl.static_range(PIECES):
        for j in gl.static_range(2):
            place = [at, first + i * ROWS, head, 0]
            async_load(descriptors[j], place, barrier, rings[j].index(piece + i))
    if ragged:
        mbarrier.wait(landed, cuts & 1)
        cuts += 1
        for i in gl.static_range(PIECES):
            for j in gl.static_range(2):
                rows = rings[j].index(piece + i).reshape([ROWS, HEAD_DIM])
                cut(rows, length - i * ROWS, ROWS, HEAD_DIM)
        # The tensor core sees the zeros.
        fence_async_shared()
        mbarrier.arrive(full, count=1)
    return cuts


@gluon.jit
def produce(
    descriptors, rings, barriers, plan, heads, stats_ptr,
    STAGES: gl.constexpr, BLOCK_M: gl.constexpr, HEAD_DIM: gl.constexpr,
    VARLEN: gl.constexpr, HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr,
):  # fmt: skip
    """The producer warp: all copies."""
    q_desc, k_desc, v_desc, do_desc = descriptors
    q_ring, keys, values, do_ring, stats_ring, _ds_ring = rings
    kv_full, kv_empty, full, empty, landed = barriers[:5]
    group, total, programs, padded = plan[4], plan[13], plan[14], plan[15]
    numbers = gl.arange(0, 2 * ROWS, gl.BlockedLayout([4], [32], [1], [0]))
    tiles, step, cuts = 0, 0, 0
    for turn in range(gl.cdiv(total, programs)):
        index = index_of(turn, programs)
        if index < total:
            place, extents, queries = key_tile(index, plan, VARLEN, HAS_LEFT, HAS_RIGHT, BLOCK_M)
            start_n, head_k, batch = place
            first_q, seq_q, first_k, seq_k = extents
            first, end = queries[0], queries[3]
            at = 0 if VARLEN else batch
            if first < end:
                mbarrier.wait(kv_empty, (tiles & 1) ^ 1)
                cuts = _fetch(
                    (k_desc, v_desc), (keys, values), 0, (at, first_k + start_n, head_k),
                    seq_k - start_n, kv_full, landed, cuts, 2, VARLEN, HEAD_DIM,
                )  # fmt: skip
                tiles += 1
                for member in range(group):
                    head = head_k * group + member
                    row = padded_row(batch, head, first_q, heads, padded, VARLEN, BLOCK_M)
                    for start_m in range(first, gl.cdiv(end, BLOCK_M) * BLOCK_M, ROWS):
                        stage = step % STAGES
                        # The numbers come while this warp waits.
                        stats = gl.load(stats_ptr + (row + start_m).to(gl.int64) * 2 + numbers)
                        mbarrier.wait(empty.index(stage), (step // STAGES & 1) ^ 1)
                        stats_ring.index(stage).store(stats)
                        cuts = _fetch(
                            (q_desc, do_desc), (q_ring, do_ring), stage, (at, first_q + start_m, head),
                            seq_q - start_m, full.index(stage), landed, cuts, 1, VARLEN, HEAD_DIM,
                        )  # fmt: skip
                        step += 1


# --- the warp that keeps turns


@gluon.jit
def _await(counter_ptr, count):
    """Wait until a counter has come to ``count``; what was stored before is then visible."""
    seen = 0
    while seen < count:
        seen = gl.inline_asm_elementwise(
            "ld.acquire.gpu.global.s32 $0, [$1];", "=r,l", [counter_ptr.to(gl.int64)],
            dtype=gl.int32, is_pure=False, pack=1,
        )  # fmt: skip


@gluon.jit
def keep_turns(
    barriers, plan, heads, counters_ptr,
    BLOCK_M: gl.constexpr, VARLEN: gl.constexpr, HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr,
):  # fmt: skip
    """The warp that waits for this program's turns at the sums of dq and gives them on."""
    turn_barriers, done = barriers[7], barriers[8]
    group, total, programs, padded = plan[4], plan[13], plan[14], plan[15]
    sums, before = 0, counters_ptr
    for turn in range(gl.cdiv(total, programs)):
        index = index_of(turn, programs)
        if index < total:
            place, extents, queries = key_tile(index, plan, VARLEN, HAS_LEFT, HAS_RIGHT, BLOCK_M)
            start_n, head_k, batch = place
            begin = sums
            for member in range(group):
                head = head_k * group + member
                row = padded_row(batch, head, extents[0], heads, padded, VARLEN, BLOCK_M)
                for start_m in range(queries[0], queries[3], BLOCK_M):
                    counter = counters_ptr + (row + start_m) // BLOCK_M
                    earlier, _last = turns_of(start_m, start_n, extents, plan, HAS_LEFT, HAS_RIGHT, BLOCK_M)
                    # One turn ahead of the consumers: with those before the last but one they are done.
                    _await(counter, earlier)
                    mbarrier.arrive(turn_barriers.index(sums % 2), count=1)
                    if sums > begin:
                        mbarrier.wait(done, (sums - 1) & 1)
                        gl.atomic_add(before, 1, sem="release")
                    before = counter
                    sums += 1
            # All turns are given on before any of the next tile is waited for: a program ahead may need them.
            if sums > begin:
                mbarrier.wait(done, (sums - 1) & 1)
                gl.atomic_add(before, 1, sem="release")
