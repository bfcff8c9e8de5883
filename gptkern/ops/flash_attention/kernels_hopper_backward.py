"""Attention backward for Hopper: a producer warp, two consumer warpgroups, and a warp that keeps turns.

The sums of ``kernels_backward`` in five products a tile, for half precision and a head dimension of 64 or
128, without soft cap, biases and dropout; ``flash_attention_delta`` runs before.

Layout. A program stays on its multiprocessor and takes one tile of 128 keys of a key head after another. Its
producer warp has the copy engine fetch the keys and values, and queries and output gradients in steps of 64
into a ring of STAGES. Two warpgroups own 64 keys each, and their rows of dk and dv. Of a step each computes

    s^T = k q^T,    dp^T = v do^T,    dv += p^T do,    dk += ds^T q

and leaves ds in shared memory. For each BLOCK_M queries they then share dq = ds k of all 128 keys: each
computes 64 x 64 of it, 64 queries at a head dimension of 64, 64 columns at 128. That is done while the next
step goes on, so that neither warpgroup waits for the other, and while one weighs scores the tensor core works
for the other.

Registers are what the accumulators leave: of dk and dv, of a step's scores and gradients, of dq. Where a tile
lies, what a mask cuts of it, where a turn's dq goes are numbers in shared memory, which the producer and the
warp that keeps turns leave there. Offsets that few steps need, and those that grow with the steps, are
computed where they are used: see ``here`` and ``hidden``.

dq of BLOCK_M queries is a sum over tiles of keys, which lies in global memory in fp32, in L2 while it is in
use. They take turns, the last keys first, so that the sum has one order whatever the timing: the first in
turn stores its part, those that follow have L2 add theirs, which writes the sum without reading it, and the
last loads the sum, adds its part, scales, rounds and stores the result. A counter for each BLOCK_M queries of
a head says how many have added. A warp of its own waits for this counter before and raises it after.

Under a causal mask a tile of keys meets its diagonal first and is the first in turn there, while the tile of
keys behind it, which began with the queries behind, is done with those that come next: in step, nobody waits.

Nobody waits for ever. Tiles have one order in which the last keys of a head come first, each program takes
its tiles in that order, and all programs are resident, which a cooperative launch ensures or refuses. Of the
tiles that are not done the first waits for none: those before it are done, and it waits for these alone. It
is its program's next, since that program's earlier tiles are done, and a program gives on all turns of a tile
before it waits for one of the next.

Barriers in shared memory, and what the end of a phase says:

    kv_full, full          keys and values, a step's queries and all that belongs to them have come
    kv_empty, empty        both warpgroups, and of a tile's numbers the warp that keeps turns, have read them
    landed                 rows have come that the producer has yet to cut off at their sequence's end
    ds_full, ds_empty      both warpgroups have stored their ds, have computed dq of it
    turn                   it is this tile's turn to add to dq
    done                   both warpgroups have added

Source: Dao 2023, FlashAttention-2; Shah et al. 2024, FlashAttention-3.
"""

from gptkern.ops._device import LOG2E
from gptkern.ops._device_hopper import new_barriers
from gptkern.ops._gluon import fence_async_shared, gl, gluon, mbarrier, warpgroup_mma, warpgroup_mma_wait
from gptkern.ops.flash_attention.kernels import hide
from gptkern.ops.flash_attention.kernels_hopper_numbers import (
    BLOCKS,
    FULL_END,
    FULL_FIRST,
    HEADS,
    HEADS_K,
    KEY_ROW,
    LEFT,
    LENGTH_K,
    NUMBERS,
    RIGHT,
    SHIFT,
    SUMS,
    TURN,
    TURN_EARLIER,
    TURN_LENGTH,
    TURN_NUMBERS,
    TURN_OUT,
    TURN_SUM,
    here,
    hidden,
    number,
    tell,
)
from gptkern.ops.flash_attention.kernels_hopper_producer import ROWS, keep_turns, produce

# --- the consumers


@gluon.jit
def _sum_layout(x):
    """A part of dq as products have it, from the order in which it lies in memory: 16 bytes a lane."""
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16])
    # (column / 8, warp, row % 8, column / 2 % 4, row / 8 % 2, column % 2)
    x = gl.permute(gl.reshape(x, (8, 4, 8, 4, 2, 2)), (1, 4, 2, 0, 3, 5))
    return gl.convert_layout(gl.reshape(x, (ROWS, ROWS)), LAYOUT, assert_trivial=True)


@gluon.jit
def _memory_layout(x):
    """The inverse of ``_sum_layout``; no value moves to another thread."""
    layout: gl.constexpr = gl.BlockedLayout([1, 4], [32, 1], [4, 1], [1, 0])
    x = gl.permute(gl.reshape(x, (4, 2, 8, 8, 4, 2)), (3, 0, 2, 4, 1, 5))
    return gl.convert_layout(gl.reshape(x, (ROWS * ROWS // 4, 4)), layout, assert_trivial=True)


@gluon.jit
def _part_offsets():
    """Offsets of the numbers of a part of dq in the order of ``_memory_layout``."""
    layout: gl.constexpr = gl.BlockedLayout([1, 4], [32, 1], [4, 1], [1, 0])
    rows = gl.arange(0, ROWS * ROWS // 4, gl.SliceLayout(1, layout))
    return rows[:, None] * 4 + gl.arange(0, 4, gl.SliceLayout(0, layout))[None, :]


@gluon.jit
def _dq_products(
    sums, rings, barriers, WARPGROUP: gl.constexpr, BLOCK_M: gl.constexpr, HEAD_DIM: gl.constexpr
):
    """Issue this warpgroup's part of dq of BLOCK_M queries, over this tile's keys."""
    pairs, _stats_ring, ds_ring = rings
    ds_full = barriers[5]
    STEPS: gl.constexpr = BLOCK_M // ROWS
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16])
    slot, phase = sums % 2, sums // 2 & 1
    mbarrier.wait(ds_full.index(slot), phase)
    dq = gl.zeros([ROWS, ROWS], gl.float32, LAYOUT)
    for half in gl.static_range(2):
        # Of 64 queries, or of 64 columns.
        ds = ds_ring.index((slot * STEPS + (WARPGROUP if STEPS == 2 else 0)) * 2 + half)
        keys = pairs.index(2 * half + here()).reshape([ROWS, HEAD_DIM])
        if STEPS == 1:
            keys = keys.slice(WARPGROUP * ROWS, ROWS, dim=1)
        dq = warpgroup_mma(ds.permute((1, 0)), keys, dq, use_acc=half > 0, is_async=True)
    return dq


@gluon.jit
def _dq_add(
    dq, sums, numbers, barriers, pointers, scale,
    WARPGROUP: gl.constexpr, BLOCK_M: gl.constexpr, HEAD_DIM: gl.constexpr,
):  # fmt: skip
    """Add a part of dq to the sum so far when it is its turn, or, in the last turn, store the result."""
    partial_ptr, dq_ptr = pointers[:2]
    ds_empty, turns, done = barriers[6], barriers[7], barriers[8]
    STEPS: gl.constexpr = BLOCK_M // ROWS
    slot = sums % 2
    mbarrier.arrive(ds_empty.index(slot), count=1)
    mbarrier.wait(turns.index(slot), sums // 2 & 1)
    turn = TURN + slot * TURN_NUMBERS
    earlier, out_row = number(numbers, turn + TURN_EARLIER), number(numbers, turn + TURN_OUT)
    part_ptr = partial_ptr + number(numbers, turn + TURN_SUM).to(gl.int64) * HEAD_DIM
    part_ptr += WARPGROUP * (ROWS * ROWS) + _part_offsets()
    if out_row >= 0:
        # A predicate, not a branch; past L1, which may have the sum of an earlier turn.
        added = _part_offsets() < earlier * (ROWS * ROWS)
        before = gl.load(part_ptr, mask=added, other=0.0, cache_modifier=".cg")
        dq = (_sum_layout(before) + dq) * scale
        LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16])
        rows = gl.arange(0, ROWS, gl.SliceLayout(1, LAYOUT)) + (WARPGROUP * ROWS if STEPS == 2 else 0)
        columns = gl.arange(0, ROWS, gl.SliceLayout(0, LAYOUT)) + (WARPGROUP * ROWS if STEPS == 1 else 0)
        rows += here()
        to = dq_ptr + out_row.to(gl.int64) * HEAD_DIM
        to += rows[:, None] * (number(numbers, HEADS) * HEAD_DIM) + columns[None, :]
        inside = rows < number(numbers, turn + TURN_LENGTH)
        gl.store(to, dq.to(dq_ptr.dtype.element_ty), mask=inside[:, None])
    elif earlier == 0:
        gl.store(part_ptr, _memory_layout(dq))
    else:
        # A float atomic, and still one order and the same bits each time: the turns before have added, the
        # next waits for this one, and no number is added to twice in a turn.
        gl.atomic_add(part_ptr, _memory_layout(dq), sem="relaxed")
    mbarrier.arrive(done, count=1)


@gluon.jit
def _step(
    dk, dv, keys, values, sums, block, numbers, rings, barriers, scale_log2,
    WARPGROUP: gl.constexpr, STAGES: gl.constexpr, STEPS: gl.constexpr, NUMBER: gl.constexpr,
    HEAD_DIM: gl.constexpr, HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    """Issue a step's products for dk and dv, and leave its ds in shared memory."""
    pairs, stats_ring, ds_ring = rings
    _kv_full, _kv_empty, full, _empty, _landed, ds_full, ds_empty, _turns, _done = barriers
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16])
    OPERAND: gl.constexpr = gl.DotOperandLayout(
        operand_index=0, parent=gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16]), k_width=2
    )
    step = sums * STEPS + NUMBER
    stage = step % STAGES
    q = pairs.index(2 * (2 + stage)).reshape([ROWS, HEAD_DIM])
    do = pairs.index(2 * (2 + stage) + 1).reshape([ROWS, HEAD_DIM])
    dtype: gl.constexpr = pairs.dtype
    slot = sums % 2
    # Scores and gradients of the weights, (keys, queries).
    mbarrier.wait(full.index(stage), step // STAGES & 1)
    nothing = gl.zeros([ROWS, ROWS], gl.float32, SCORES)
    scores = warpgroup_mma(keys, q.permute((1, 0)), nothing, use_acc=False, is_async=True)
    dweights = warpgroup_mma(values, do.permute((1, 0)), nothing, use_acc=False, is_async=True)
    scores = warpgroup_mma_wait(1, deps=[scores])
    if MASKED:
        rows = number(numbers, SHIFT) + (block * STEPS + NUMBER) * ROWS
        rows += gl.arange(0, ROWS, gl.SliceLayout(0, SCORES))
        columns = WARPGROUP * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, SCORES))
        scores = hide(
            scores, rows[None, :], columns[:, None], 0, number(numbers, LENGTH_K), number(numbers, LEFT),
            number(numbers, RIGHT), HAS_LEFT, HAS_RIGHT,
        )  # fmt: skip
    stats = stats_ring.index(stage)
    lse = stats.slice(0, ROWS).load(gl.SliceLayout(0, SCORES))
    weights = gl.exp2(scores * scale_log2 - lse[None, :])
    # dv of the weights while their gradients become those of the scores.
    dv = warpgroup_mma(gl.convert_layout(weights.to(dtype), OPERAND), do, dv, is_async=True)
    dweights = warpgroup_mma_wait(1, deps=[dweights])
    delta = stats.slice(ROWS, ROWS).load(gl.SliceLayout(0, SCORES))
    dscores = (weights * (dweights - delta[None, :])).to(dtype)
    if NUMBER == 0:
        mbarrier.wait(ds_empty.index(slot), (sums // 2 & 1) ^ 1)
    ds_ring.index((slot * STEPS + NUMBER) * 2 + WARPGROUP).store(dscores)
    dk = warpgroup_mma(gl.convert_layout(dscores, OPERAND), q, dk, is_async=True)
    if NUMBER == STEPS - 1:
        # The tensor core sees what both warpgroups have stored.
        fence_async_shared()
        mbarrier.arrive(ds_full.index(slot), count=1)
    return dk, dv


@gluon.jit
def _queries(
    dk, dv, keys, values, sums, block, numbers, rings, barriers, pointers, scale,
    WARPGROUP: gl.constexpr, STAGES: gl.constexpr, BLOCK_M: gl.constexpr, HEAD_DIM: gl.constexpr,
    HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr, MASKED: gl.constexpr, FIRST: gl.constexpr,
):  # fmt: skip
    """BLOCK_M queries' part in dk and dv, and dq of those before."""
    STEPS: gl.constexpr = BLOCK_M // ROWS
    empty = barriers[3]
    sums = hidden(sums)
    if keys is None:
        keys = rings[0].index(2 * WARPGROUP + here()).reshape([ROWS, HEAD_DIM])
        values = rings[0].index(2 * WARPGROUP + 1 + here()).reshape([ROWS, HEAD_DIM])
    for i in gl.static_range(STEPS):
        dk, dv = _step(
            dk, dv, keys, values, sums, block, numbers, rings, barriers, scale * LOG2E,
            WARPGROUP, STAGES, STEPS, i, HEAD_DIM, HAS_LEFT, HAS_RIGHT, MASKED,
        )  # fmt: skip
        stage = (sums * STEPS + i) % STAGES
        if i == 0 and not FIRST:
            dq = _dq_products(sums - 1, rings, barriers, WARPGROUP, BLOCK_M, HEAD_DIM)
            dk, dv, dq = warpgroup_mma_wait(0, deps=[dk, dv, dq])
            mbarrier.arrive(empty.index(stage), count=1)
            _dq_add(dq, sums - 1, numbers, barriers, pointers, scale, WARPGROUP, BLOCK_M, HEAD_DIM)
        else:
            dk, dv = warpgroup_mma_wait(0, deps=[dk, dv])
            mbarrier.arrive(empty.index(stage), count=1)
    return dk, dv


@gluon.jit
def _tile(
    dk, dv, keys, values, sums, numbers, rings, barriers, pointers, scale,
    WARPGROUP: gl.constexpr, STAGES: gl.constexpr, BLOCK_M: gl.constexpr, HEAD_DIM: gl.constexpr,
    HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr,
):  # fmt: skip
    """All queries that see a tile of keys, head after head: (dk, dv, sums of dq so far)."""
    dk, dv = _queries(
        dk, dv, keys, values, sums, 0, numbers, rings, barriers, pointers, scale,
        WARPGROUP, STAGES, BLOCK_M, HEAD_DIM, HAS_LEFT, HAS_RIGHT, True, True,
    )  # fmt: skip
    end = sums + number(numbers, SUMS)
    sums += 1
    block = 1
    while sums < end:
        block = gl.where(block == number(numbers, BLOCKS), 0, block)
        # Products are not in flight at a branch: ptxas would wait for them there.
        if (block >= number(numbers, FULL_FIRST)) & (block < number(numbers, FULL_END)):
            dk, dv = _queries(
                dk, dv, keys, values, sums, block, numbers, rings, barriers, pointers, scale,
                WARPGROUP, STAGES, BLOCK_M, HEAD_DIM, HAS_LEFT, HAS_RIGHT, False, False,
            )  # fmt: skip
        else:
            dk, dv = _queries(
                dk, dv, keys, values, sums, block, numbers, rings, barriers, pointers, scale,
                WARPGROUP, STAGES, BLOCK_M, HEAD_DIM, HAS_LEFT, HAS_RIGHT, True, False,
            )  # fmt: skip
        sums += 1
        block += 1
    # dq of the last.
    dq = _dq_products(sums - 1, rings, barriers, WARPGROUP, BLOCK_M, HEAD_DIM)
    dq = warpgroup_mma_wait(0, deps=[dq])
    _dq_add(dq, sums - 1, numbers, barriers, pointers, scale, WARPGROUP, BLOCK_M, HEAD_DIM)
    return dk, dv, sums


@gluon.jit
def _store(ptr, value, count, stride, HEAD_DIM: gl.constexpr):
    """Store the first ``count`` of a warpgroup's rows of dk or dv."""
    # 16 bytes a lane.
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // HEAD_DIM, HEAD_DIM // 8], [4, 1], [1, 0])
    value = gl.convert_layout(value.to(ptr.dtype.element_ty), layout)
    rows = gl.arange(0, ROWS, gl.SliceLayout(1, layout)) + here()
    columns = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, layout))
    gl.store(ptr + rows[:, None] * stride + columns[None, :], value, mask=(rows < count)[:, None])


@gluon.jit
def _consume(
    rings, barriers, numbers, pointers, scale,
    WARPGROUP: gl.constexpr, STAGES: gl.constexpr, KV_REGISTERS: gl.constexpr, BLOCK_M: gl.constexpr,
    HEAD_DIM: gl.constexpr, HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr,
):  # fmt: skip
    """A consumer warpgroup: 64 keys of every tile."""
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    OPERAND: gl.constexpr = gl.DotOperandLayout(
        operand_index=0, parent=gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16]), k_width=2
    )
    pairs = rings[0]
    kv_full, kv_empty = barriers[0], barriers[1]
    tiles, sums = 0, 0
    mbarrier.wait(kv_full, 0)
    while number(numbers, SUMS) >= 0:
        dk = gl.zeros([ROWS, HEAD_DIM], gl.float32, LAYOUT)
        dv = gl.zeros([ROWS, HEAD_DIM], gl.float32, LAYOUT)
        if number(numbers, SUMS) > 0:
            keys, values = None, None
            if KV_REGISTERS:
                # The fence of the first step is between these loads and the copy engine's next keys.
                keys = pairs.index(2 * WARPGROUP).reshape([ROWS, HEAD_DIM]).load(OPERAND)
                values = pairs.index(2 * WARPGROUP + 1).reshape([ROWS, HEAD_DIM]).load(OPERAND)
            dk, dv, sums = _tile(
                dk, dv, keys, values, sums, numbers, rings, barriers, pointers, scale,
                WARPGROUP, STAGES, BLOCK_M, HEAD_DIM, HAS_LEFT, HAS_RIGHT,
            )  # fmt: skip
        heads_k = number(numbers, HEADS_K)
        count = number(numbers, LENGTH_K) - WARPGROUP * ROWS
        to = (number(numbers, KEY_ROW).to(gl.int64) + WARPGROUP * ROWS * heads_k) * HEAD_DIM
        _store(pointers[2] + to, dk * scale, count, heads_k * HEAD_DIM, HEAD_DIM)
        # The barrier keeps the two stores' addresses from being held together.
        mbarrier.arrive(kv_empty, count=1)
        tiles += 1
        _store(pointers[3] + to, dv, count, heads_k * HEAD_DIM, HEAD_DIM)
        mbarrier.wait(kv_full, tiles & 1)


# --- the kernel


@gluon.jit(do_not_specialize=["section", "blocks", "total", "programs", "padded"])
def flash_attention_backward_hopper(
    q_desc,  # (batch, seq_q, heads, HEAD_DIM), or (1, tokens, heads, HEAD_DIM); tiles of 64 rows of a head
    k_desc,  # as q, with the heads of keys
    v_desc,
    do_desc,  # as q
    dq_ptr,  # as q, contiguous
    dk_ptr,  # as k, contiguous
    dv_ptr,
    stats_ptr,  # of flash_attention_delta, and the counters
    counters_ptr,
    partial_ptr,  # (rows of stats, HEAD_DIM) fp32: sums of dq; written before they are read
    cu_seqlens_q_ptr,  # (batch + 1,), or None
    cu_seqlens_k_ptr,  # (batch + 1,), or None
    sequences,
    heads_k,
    group,
    max_seq_q,
    max_seq_k,
    tokens_q,  # packed: tokens of all sequences; dense: 0
    tokens_k,
    window_left,
    window_right,
    scale,
    section,  # heads of keys whose tensors fit in L2 together
    blocks,  # tiles of the longest sequence's keys
    total,  # tiles of all sequences and heads of keys
    programs,
    padded,  # rows of stats of a head
    HEAD_DIM: gl.constexpr,
    VARLEN: gl.constexpr,
    HAS_LEFT: gl.constexpr,
    HAS_RIGHT: gl.constexpr,
    BLOCK_M: gl.constexpr,
    STAGES: gl.constexpr,
    KV_REGISTERS: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr,
    PRODUCER_REGISTERS: gl.constexpr,
):
    # A part of dq is 64 x 64: of 128 queries or of 128 columns.
    gl.static_assert(BLOCK_M * HEAD_DIM == 2 * ROWS * ROWS)
    # Shared memory: the rings and the barriers.
    dtype: gl.constexpr = q_desc.dtype
    # Two of keys and values, and STAGES of queries and output gradients.
    pairs = gl.allocate_shared_memory(dtype, [2 * (2 + STAGES), 1, ROWS, 1, HEAD_DIM], q_desc.layout)
    stats_ring = gl.allocate_shared_memory(
        gl.float32, [STAGES, 2 * ROWS], gl.SwizzledSharedLayout(1, 1, 1, [0])
    )
    ds_ring = gl.allocate_shared_memory(
        dtype, [4 * (BLOCK_M // ROWS), ROWS, ROWS], gl.NVMMASharedLayout(128, 16, rank=2)
    )
    rings = (pairs, stats_ring, ds_ring)
    barriers = (
        new_barriers(1, 1).index(0), new_barriers(1, 3).index(0), new_barriers(STAGES, 1),
        new_barriers(STAGES, 2), new_barriers(1, 1).index(0), new_barriers(2, 2), new_barriers(2, 2),
        new_barriers(2, 1), new_barriers(1, 2).index(0),
    )  # fmt: skip
    numbers = gl.allocate_shared_memory(gl.int32, [NUMBERS, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    call = (
        sequences, heads_k * group, heads_k, group, max_seq_q, max_seq_k, tokens_q, tokens_k, window_left,
        window_right, section, blocks, total, programs, padded, 0,
    )  # fmt: skip
    for i in gl.static_range(len(call)):
        tell(numbers, i, call[i])
    tell(numbers, TURN - 1, 0)
    # The copy engine sees the barriers.
    fence_async_shared()
    offsets = (cu_seqlens_q_ptr, cu_seqlens_k_ptr)
    pointers = (partial_ptr, dq_ptr, dk_ptr, dv_ptr)
    # The kernel's own four warps are the first warpgroup.
    gl.warp_specialize(
        [
            (_consume, (rings, barriers, numbers, pointers, scale, 0, STAGES,
                        KV_REGISTERS, BLOCK_M, HEAD_DIM, HAS_LEFT, HAS_RIGHT)),
            (_consume, (rings, barriers, numbers, pointers, scale, 1, STAGES,
                        KV_REGISTERS, BLOCK_M, HEAD_DIM, HAS_LEFT, HAS_RIGHT)),
            (produce, ((q_desc, k_desc, v_desc, do_desc), rings, barriers, numbers, offsets, stats_ptr,
                        STAGES, BLOCK_M, HEAD_DIM, VARLEN, HAS_LEFT, HAS_RIGHT)),
            (keep_turns, (barriers, numbers, counters_ptr, BLOCK_M, HAS_LEFT, HAS_RIGHT)),
        ],
        [4, 1, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip
