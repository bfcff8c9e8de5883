"""Attention backward for Hopper: tiles of keys, and the warps that fetch them and keep turns.

See ``kernels_hopper_backward`` for the layout and the barriers.
"""

from gptkern.ops._gluon import async_load, fence_async_shared, gl, gluon, mbarrier, reinterpret
from gptkern.ops.flash_attention.kernels import sequence, span
from gptkern.ops.flash_attention.kernels_hopper import index_of
from gptkern.ops.flash_attention.kernels_hopper_delta import padded_row
from gptkern.ops.flash_attention.kernels_hopper_numbers import (
    BLOCKS,
    FULL_END,
    FULL_FIRST,
    GROUP,
    HEADS,
    HEADS_K,
    KEY_ROW,
    LEFT,
    LENGTH_K,
    LENGTH_Q,
    MAX_SEQ_K,
    MAX_SEQ_Q,
    OUT_ROW,
    PADDED,
    PROGRAMS,
    RIGHT,
    SECTION,
    SEQUENCES,
    SHIFT,
    START_N,
    SUM_ROW,
    SUMS,
    TILES,
    TOKENS_K,
    TOKENS_Q,
    TOTAL,
    TURN,
    TURN_EARLIER,
    TURN_LENGTH,
    TURN_NUMBERS,
    TURN_OUT,
    TURN_SUM,
    number,
    tell,
)

BLOCK_N = gl.constexpr(128)
ROWS = gl.constexpr(64)  # keys of a warpgroup, queries of a step, rows and columns of its part of dq


# --- tiles of keys


@gluon.jit
def _key_tile(
    index, numbers, offsets,
    VARLEN: gl.constexpr, HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr, BLOCK_M: gl.constexpr,
):  # fmt: skip
    """(first key, head, batch), (first_q, seq_q, first_k, seq_k), and the tile's queries as of ``span``."""
    section, blocks, heads_k = number(numbers, SECTION), number(numbers, TILES), number(numbers, HEADS_K)
    begin = index // (section * blocks) * section
    count = gl.minimum(section, number(numbers, SEQUENCES) * heads_k - begin)
    within = index - begin * blocks
    start_n = (blocks - 1 - within // count) * BLOCK_N
    head_k = (begin + within % count) % heads_k
    batch = (begin + within % count) // heads_k
    first_q, seq_q = sequence(
        offsets[0], batch, number(numbers, MAX_SEQ_Q), number(numbers, TOKENS_Q), VARLEN
    )
    first_k, seq_k = sequence(
        offsets[1], batch, number(numbers, MAX_SEQ_K), number(numbers, TOKENS_K), VARLEN
    )
    first, full_first, full_end, end = span(
        start_n, seq_q - seq_k, number(numbers, RIGHT), number(numbers, LEFT), seq_q, BLOCK_N, BLOCK_M,
        HAS_RIGHT, HAS_LEFT,
    )  # fmt: skip
    # A tile behind the last key of its sequence has no queries; of one that is not whole none sees all keys.
    end = gl.where(start_n < seq_k, end, first)
    full_end = gl.where(start_n + BLOCK_N <= seq_k, full_end, full_first)
    return (start_n, head_k, batch), (first_q, seq_q, first_k, seq_k), (first, full_first, full_end, end)


# --- the producer


@gluon.jit
def _cut(rows, length, HEAD_DIM: gl.constexpr):
    """Zero 64 rows from ``length`` on: a weight of 0 does not undo the next sequence's NaN."""
    # In memory: 8 rows of 64 columns after the other, one warp, 16 bytes a lane.
    PARTS: gl.constexpr = ROWS * HEAD_DIM // 512
    parts = reinterpret(rows, rows.dtype, [PARTS, 8, 64], gl.NVMMASharedLayout(128, 16, rank=2))
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [1, 1], [1, 0])
    for i in range(PARTS):
        first = i * 8 % ROWS
        if first + 8 > length:
            inside = first + gl.arange(0, 8, gl.SliceLayout(1, layout)) < length
            part = parts.index(i)
            part.store(gl.where(inside[:, None], part.load(layout), 0.0))


@gluon.jit
def _fetch(
    descriptors, pairs, pair, where, length, full, landed, cuts,
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
            async_load(descriptors[j], place, barrier, pairs.index(2 * (pair + i) + j))
    if ragged:
        mbarrier.wait(landed, cuts & 1)
        cuts += 1
        for tile in range(2 * PIECES):
            _cut(pairs.index(2 * pair + tile), length - tile // 2 * ROWS, HEAD_DIM)
        # The tensor core sees the zeros.
        fence_async_shared()
        mbarrier.arrive(full, count=1)
    return cuts


@gluon.jit
def _tell_tile(numbers, place, extents, queries, VARLEN: gl.constexpr, BLOCK_M: gl.constexpr):
    """Leave the numbers of a tile in shared memory; returns BLOCKS."""
    start_n, head_k, batch = place
    first_q, seq_q, first_k, seq_k = extents
    first, full_first, full_end, end = queries
    blocks = gl.cdiv(gl.maximum(end - first, 0), BLOCK_M)
    group, heads, padded = number(numbers, GROUP), number(numbers, HEADS), number(numbers, PADDED)
    head = head_k * group
    q_row = first_q if VARLEN else batch * seq_q
    k_row = first_k if VARLEN else batch * seq_k
    tell(numbers, SUMS, blocks * group)
    tell(numbers, BLOCKS, blocks)
    tell(numbers, FULL_FIRST, (full_first - first) // BLOCK_M)
    tell(numbers, FULL_END, (full_end - first) // BLOCK_M)
    tell(numbers, START_N, start_n)
    tell(numbers, LENGTH_K, seq_k - start_n)
    tell(numbers, LENGTH_Q, seq_q - first)
    tell(numbers, SHIFT, first + seq_k - seq_q - start_n)
    tell(numbers, KEY_ROW, (k_row + start_n) * number(numbers, HEADS_K) + head_k)
    tell(numbers, OUT_ROW, (q_row + first) * heads + head)
    tell(numbers, SUM_ROW, padded_row(batch, head, first_q, heads, padded, VARLEN, BLOCK_M) + first)
    return blocks


@gluon.jit
def produce(
    descriptors, rings, barriers, numbers, offsets, stats_ptr,
    STAGES: gl.constexpr, BLOCK_M: gl.constexpr, HEAD_DIM: gl.constexpr,
    VARLEN: gl.constexpr, HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr,
):  # fmt: skip
    """The producer warp: all copies."""
    q_desc, k_desc, v_desc, do_desc = descriptors
    pairs, stats_ring, _ds_ring = rings
    kv_full, kv_empty, full, empty, landed = barriers[:5]
    lanes = gl.arange(0, 2 * ROWS, gl.BlockedLayout([4], [32], [1], [0]))
    turn, step, cuts = 0, 0, 0
    index = gl.program_id(0)
    while index < number(numbers, TOTAL):
        place, extents, queries = _key_tile(index, numbers, offsets, VARLEN, HAS_LEFT, HAS_RIGHT, BLOCK_M)
        start_n, head_k, batch = place
        first_q, seq_q, first_k, seq_k = extents
        at = 0 if VARLEN else batch
        first = queries[0]
        mbarrier.wait(kv_empty, (turn & 1) ^ 1)
        blocks = _tell_tile(numbers, place, extents, queries, VARLEN, BLOCK_M)
        if blocks > 0:
            cuts = _fetch(
                (k_desc, v_desc), pairs, 0, (at, first_k + start_n, head_k),
                seq_k - start_n, kv_full, landed, cuts, 2, VARLEN, HEAD_DIM,
            )  # fmt: skip
            row = number(numbers, SUM_ROW)
            for member in range(number(numbers, GROUP)):
                head = head_k * number(numbers, GROUP) + member
                for ahead in range(0, blocks * BLOCK_M, ROWS):
                    stage = step % STAGES
                    # The numbers come while this warp waits.
                    stats = gl.load(stats_ptr + (row + ahead).to(gl.int64) * 2 + lanes)
                    mbarrier.wait(empty.index(stage), (step // STAGES & 1) ^ 1)
                    stats_ring.index(stage).store(stats)
                    cuts = _fetch(
                        (q_desc, do_desc), pairs, 2 + stage, (at, first_q + first + ahead, head),
                        seq_q - first - ahead, full.index(stage), landed, cuts, 1, VARLEN, HEAD_DIM,
                    )  # fmt: skip
                    step += 1
                row += number(numbers, PADDED)
        else:
            mbarrier.arrive(kv_full, count=1)
        turn += 1
        index = index_of(turn, number(numbers, PROGRAMS))
    mbarrier.wait(kv_empty, (turn & 1) ^ 1)
    tell(numbers, SUMS, -1)
    mbarrier.arrive(kv_full, count=1)


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
def _tell_turn(
    numbers, block, member, slot,
    BLOCK_M: gl.constexpr, HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr,
):  # fmt: skip
    """Leave the numbers of a turn in shared memory: (the row of its sum, earlier turns)."""
    turn = TURN + slot * TURN_NUMBERS
    ahead = block * BLOCK_M
    # The keys of these queries, from the tile's first on, as of ``span``.
    shift = number(numbers, SHIFT) + ahead
    end = number(numbers, LENGTH_K)
    if HAS_RIGHT:
        end = gl.minimum(end, shift + BLOCK_M + number(numbers, RIGHT))
    last = number(numbers, START_N) == 0
    if HAS_LEFT:
        last = last | (shift >= number(numbers, LEFT))
    earlier = (end - 1) // BLOCK_N
    sum_row = number(numbers, SUM_ROW) + member * number(numbers, PADDED) + ahead
    out_row = number(numbers, OUT_ROW) + ahead * number(numbers, HEADS) + member
    tell(numbers, turn + TURN_SUM, sum_row)
    tell(numbers, turn + TURN_EARLIER, earlier)
    tell(numbers, turn + TURN_LENGTH, number(numbers, LENGTH_Q) - ahead)
    tell(numbers, turn + TURN_OUT, gl.where(last, out_row, -1))
    return sum_row, earlier


@gluon.jit
def keep_turns(
    barriers, numbers, counters_ptr,
    BLOCK_M: gl.constexpr, HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr,
):  # fmt: skip
    """The warp that waits for this program's turns at the sums of dq and gives them on."""
    kv_full, kv_empty, turn_barriers, done = barriers[0], barriers[1], barriers[7], barriers[8]
    tiles, sums, before = 0, 0, counters_ptr
    mbarrier.wait(kv_full, 0)
    while number(numbers, SUMS) >= 0:
        begin = sums
        for member in range(number(numbers, GROUP)):
            for block in range(number(numbers, BLOCKS)):
                row, earlier = _tell_turn(numbers, block, member, sums % 2, BLOCK_M, HAS_LEFT, HAS_RIGHT)
                counter = counters_ptr + row // BLOCK_M
                # One turn ahead of the consumers: with those before the last but one they are done.
                _await(counter, earlier)
                mbarrier.arrive(turn_barriers.index(sums % 2), count=1)
                if sums > begin:
                    mbarrier.wait(done, (sums - 1) & 1)
                    gl.atomic_add(before, 1, sem="release")
                before = counter
                sums += 1
        mbarrier.arrive(kv_empty, count=1)
        # All turns are given on before any of the next tile is waited for: a program ahead may need them.
        if sums > begin:
            mbarrier.wait(done, (sums - 1) & 1)
            gl.atomic_add(before, 1, sem="release")
        tiles += 1
        mbarrier.wait(kv_full, tiles & 1)
