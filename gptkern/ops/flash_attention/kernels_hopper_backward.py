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

dq of BLOCK_M queries is a sum over tiles of keys, which lies in global memory in fp32, in L2 while it is in
use. Each tile of keys loads it as the accumulator of its products and stores it. They take turns, the last
keys first, so that the sum has one order whatever the timing; the first in turn begins at zero, the last
scales, rounds and stores the result. A counter for each BLOCK_M queries of a head says how many have added. A
warp of its own waits for this counter before and raises it after.

Under a causal mask a tile of keys meets its diagonal first and is the first in turn there, while the tile of
keys behind it, which began with the queries behind, is done with those that come next: in step, nobody waits.

Nobody waits for ever. Tiles have one order in which the last keys of a head come first, each program takes
its tiles in that order, and all programs are resident, which a cooperative launch ensures or refuses. Of the
tiles that are not done the first waits for none: those before it are done, and it waits for these alone. It
is its program's next, since that program's earlier tiles are done, and a program gives on all turns of a tile
before it waits for one of the next.

Barriers in shared memory, and what the end of a phase says:

    kv_full, full          keys and values, a step's queries and all that belongs to them have come
    kv_empty, empty        both warpgroups have read them
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
from gptkern.ops.flash_attention.kernels_hopper import index_of
from gptkern.ops.flash_attention.kernels_hopper_delta import padded_row
from gptkern.ops.flash_attention.kernels_hopper_producer import (
    ROWS,
    keep_turns,
    key_tile,
    produce,
    turns_of,
)

# --- the consumers


@gluon.jit
def _here():
    """Zero, as only the machine knows: what is computed with it stays where it stands.

    Places of a lane's numbers that few tiles need would else be computed before the loops, and held in
    registers that the accumulators need.
    """
    return gl.inline_asm_elementwise("mov.b32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _sum_layout(x):
    """A part of dq as products have it, from the order in which it lies in memory: 16 bytes a lane."""
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16])
    # (column / 8, warp, row % 8, column / 2 % 4, row / 8 % 2, column % 2)
    x = gl.permute(gl.reshape(x, (8, 4, 8, 4, 2, 2)), (1, 4, 2, 0, 3, 5))
    return gl.convert_layout(gl.reshape(x, (ROWS, ROWS)), SUMS, assert_trivial=True)


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
    sums, start_m, where, rings, barriers, partial_ptr, plan,
    WARPGROUP: gl.constexpr, BLOCK_M: gl.constexpr, HEAD_DIM: gl.constexpr, HAS_LEFT: gl.constexpr,
    HAS_RIGHT: gl.constexpr,
):  # fmt: skip
    """Issue this warpgroup's part of dq of BLOCK_M queries, on top of the sum so far, when it is its turn."""
    start_n, extents, row, _out_at, _stride = where
    _q_ring, k_tile, _v_tile, _do_ring, _stats_ring, ds_ring = rings
    ds_full, turns = barriers[5], barriers[7]
    STEPS: gl.constexpr = BLOCK_M // ROWS
    slot, phase = sums % 2, sums // 2 & 1
    earlier, _last = turns_of(start_m, start_n, extents, plan, HAS_LEFT, HAS_RIGHT, BLOCK_M)
    part_ptr = partial_ptr + (row + start_m).to(gl.int64) * HEAD_DIM + WARPGROUP * (ROWS * ROWS)
    mbarrier.wait(turns.index(slot), phase)
    offsets = _part_offsets()
    # A predicate, not a branch; past L1, which may have the sum of an earlier turn.
    part = gl.load(
        part_ptr + offsets, mask=offsets < earlier * (ROWS * ROWS), other=0.0, cache_modifier=".cg"
    )
    dq = _sum_layout(part)
    mbarrier.wait(ds_full.index(slot), phase)
    for half in gl.static_range(2):
        # Of 64 queries, or of 64 columns.
        ds = ds_ring.index((slot * STEPS + (WARPGROUP if STEPS == 2 else 0)) * 2 + half)
        keys = k_tile.index(half).reshape([ROWS, HEAD_DIM])
        if STEPS == 1:
            keys = keys.slice(WARPGROUP * ROWS, ROWS, dim=1)
        dq = warpgroup_mma(ds.permute((1, 0)), keys, dq, is_async=True)
    return dq


@gluon.jit
def _dq_store(
    dq, sums, start_m, where, barriers, partial_ptr, dq_ptr, plan, scale,
    WARPGROUP: gl.constexpr, BLOCK_M: gl.constexpr, HEAD_DIM: gl.constexpr, HAS_LEFT: gl.constexpr,
    HAS_RIGHT: gl.constexpr,
):  # fmt: skip
    """Store a part of dq: the sum so far, or, of the last turn, the result."""
    start_n, extents, row, out_at, stride = where
    ds_empty, done = barriers[6], barriers[8]
    STEPS: gl.constexpr = BLOCK_M // ROWS
    mbarrier.arrive(ds_empty.index(sums % 2), count=1)
    _earlier, last = turns_of(start_m, start_n, extents, plan, HAS_LEFT, HAS_RIGHT, BLOCK_M)
    if last:
        SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16])
        first = start_m + (WARPGROUP * ROWS if STEPS == 2 else 0)
        rows = gl.arange(0, ROWS, gl.SliceLayout(1, SUMS)) + _here()
        columns = gl.arange(0, ROWS, gl.SliceLayout(0, SUMS)) + (WARPGROUP * ROWS if STEPS == 1 else 0)
        to = dq_ptr + (out_at + first.to(gl.int64) * stride) + (rows[:, None] * stride + columns[None, :])
        gl.store(to, (dq * scale).to(dq_ptr.dtype.element_ty), mask=(first + rows < extents[1])[:, None])
    else:
        part_ptr = partial_ptr + (row + start_m).to(gl.int64) * HEAD_DIM + WARPGROUP * (ROWS * ROWS)
        gl.store(part_ptr + _part_offsets(), _memory_layout(dq))
    mbarrier.arrive(done, count=1)


@gluon.jit
def _step(
    dk, dv, keys, values, step, sums, start_m, key, extents, rings, barriers, plan, scale_log2,
    WARPGROUP: gl.constexpr, STAGES: gl.constexpr, STEPS: gl.constexpr, NUMBER: gl.constexpr,
    HEAD_DIM: gl.constexpr, HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    """Issue a step's products for dk and dv, and leave its ds in shared memory."""
    q_ring, _k_tile, _v_tile, do_ring, stats_ring, ds_ring = rings
    _kv_full, _kv_empty, full, _empty, _landed, ds_full, ds_empty, _turns, _done = barriers
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16])
    OPERAND: gl.constexpr = gl.DotOperandLayout(
        operand_index=0, parent=gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16]), k_width=2
    )
    stage = step % STAGES
    q = q_ring.index(stage).reshape([ROWS, HEAD_DIM])
    do = do_ring.index(stage).reshape([ROWS, HEAD_DIM])
    dtype: gl.constexpr = q_ring.dtype
    slot = sums % 2
    # Scores and gradients of the weights, (keys, queries).
    mbarrier.wait(full.index(stage), step // STAGES & 1)
    nothing = gl.zeros([ROWS, ROWS], gl.float32, SCORES)
    scores = warpgroup_mma(keys, q.permute((1, 0)), nothing, use_acc=False, is_async=True)
    dweights = warpgroup_mma(values, do.permute((1, 0)), nothing, use_acc=False, is_async=True)
    scores = warpgroup_mma_wait(1, deps=[scores])
    if MASKED:
        _first_q, seq_q, _first_k, seq_k = extents
        rows = start_m + NUMBER * ROWS + gl.arange(0, ROWS, gl.SliceLayout(0, SCORES))
        columns = key + gl.arange(0, ROWS, gl.SliceLayout(1, SCORES))
        scores = hide(
            scores, rows[None, :], columns[:, None], seq_k - seq_q, seq_k, plan[9], plan[10],
            HAS_LEFT, HAS_RIGHT,
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
    dk, dv, keys, values, step, sums, start_m, key, where, rings, barriers, pointers, plan, scale,
    WARPGROUP: gl.constexpr, STAGES: gl.constexpr, BLOCK_M: gl.constexpr, HEAD_DIM: gl.constexpr,
    HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr, MASKED: gl.constexpr, FIRST: gl.constexpr,
):  # fmt: skip
    """BLOCK_M queries' part in dk and dv, and dq of those before: (dk, dv, steps so far)."""
    STEPS: gl.constexpr = BLOCK_M // ROWS
    partial_ptr, dq_ptr = pointers
    empty = barriers[3]
    for number in gl.static_range(STEPS):
        dk, dv = _step(
            dk, dv, keys, values, step, sums, start_m, key, where[1], rings, barriers, plan, scale * LOG2E,
            WARPGROUP, STAGES, STEPS, number, HEAD_DIM, HAS_LEFT, HAS_RIGHT, MASKED,
        )  # fmt: skip
        if number == 0 and not FIRST:
            dq = _dq_products(
                sums - 1, start_m - BLOCK_M, where, rings, barriers, partial_ptr, plan,
                WARPGROUP, BLOCK_M, HEAD_DIM, HAS_LEFT, HAS_RIGHT,
            )  # fmt: skip
            dk, dv, dq = warpgroup_mma_wait(0, deps=[dk, dv, dq])
            mbarrier.arrive(empty.index(step % STAGES), count=1)
            _dq_store(
                dq, sums - 1, start_m - BLOCK_M, where, barriers, partial_ptr, dq_ptr, plan, scale,
                WARPGROUP, BLOCK_M, HEAD_DIM, HAS_LEFT, HAS_RIGHT,
            )  # fmt: skip
        else:
            dk, dv = warpgroup_mma_wait(0, deps=[dk, dv])
            mbarrier.arrive(empty.index(step % STAGES), count=1)
        step += 1
    return dk, dv, step


@gluon.jit
def _head(
    dk, dv, keys, values, step, sums, key, queries, where, rings, barriers, pointers, plan, scale,
    WARPGROUP: gl.constexpr, STAGES: gl.constexpr, BLOCK_M: gl.constexpr, HEAD_DIM: gl.constexpr,
    HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr,
):  # fmt: skip
    """All queries of a head that see a tile of keys: (dk, dv, steps, sums of dq so far)."""
    first, full_first, full_end, end = queries
    partial_ptr, dq_ptr = pointers
    dk, dv, step = _queries(
        dk, dv, keys, values, step, sums, first, key, where, rings, barriers, pointers, plan, scale,
        WARPGROUP, STAGES, BLOCK_M, HEAD_DIM, HAS_LEFT, HAS_RIGHT, True, True,
    )  # fmt: skip
    sums += 1
    # Tiles at the mask's near side, whole ones, and those at its far side: a loop for each, since a branch
    # between products makes ptxas wait for them there.
    start_m = first + BLOCK_M
    for part in gl.static_range(0 if HAS_RIGHT else 1, 3):
        part_end = full_first if part == 0 else full_end if part == 1 else end
        while start_m < part_end:
            dk, dv, step = _queries(
                dk, dv, keys, values, step, sums, start_m, key, where, rings, barriers, pointers, plan,
                scale, WARPGROUP, STAGES, BLOCK_M, HEAD_DIM, HAS_LEFT, HAS_RIGHT, part != 1, False,
            )  # fmt: skip
            sums += 1
            start_m += BLOCK_M
    # dq of the last.
    dq = _dq_products(
        sums - 1, start_m - BLOCK_M, where, rings, barriers, partial_ptr, plan,
        WARPGROUP, BLOCK_M, HEAD_DIM, HAS_LEFT, HAS_RIGHT,
    )  # fmt: skip
    dq = warpgroup_mma_wait(0, deps=[dq])
    _dq_store(
        dq, sums - 1, start_m - BLOCK_M, where, barriers, partial_ptr, dq_ptr, plan, scale,
        WARPGROUP, BLOCK_M, HEAD_DIM, HAS_LEFT, HAS_RIGHT,
    )  # fmt: skip
    return dk, dv, step, sums


@gluon.jit
def _store(ptr, value, count, stride, HEAD_DIM: gl.constexpr):
    """Store the first ``count`` of a warpgroup's rows of dk or dv."""
    # 16 bytes a lane.
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // HEAD_DIM, HEAD_DIM // 8], [4, 1], [1, 0])
    value = gl.convert_layout(value.to(ptr.dtype.element_ty), layout)
    rows = gl.arange(0, ROWS, gl.SliceLayout(1, layout)) + _here()
    columns = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, layout))
    gl.store(ptr + rows[:, None] * stride + columns[None, :], value, mask=(rows < count)[:, None])


@gluon.jit
def _consume(
    rings, barriers, plan, heads, pointers, dk_ptr, dv_ptr, scale,
    WARPGROUP: gl.constexpr, STAGES: gl.constexpr, KV_REGISTERS: gl.constexpr, BLOCK_M: gl.constexpr,
    HEAD_DIM: gl.constexpr, VARLEN: gl.constexpr, HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr,
):  # fmt: skip
    """A consumer warpgroup: 64 keys of every tile."""
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    OPERAND: gl.constexpr = gl.DotOperandLayout(
        operand_index=0, parent=gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16]), k_width=2
    )
    k_tile, v_tile = rings[1], rings[2]
    kv_full, kv_empty = barriers[0], barriers[1]
    heads_k, group, total, programs, padded = plan[3], plan[4], plan[13], plan[14], plan[15]
    tiles, step, sums = 0, 0, 0
    for turn in range(gl.cdiv(total, programs)):
        index = index_of(turn, programs)
        if index < total:
            place, extents, queries = key_tile(index, plan, VARLEN, HAS_LEFT, HAS_RIGHT, BLOCK_M)
            start_n, head_k, batch = place
            first_q, seq_q, first_k, seq_k = extents
            key = start_n + WARPGROUP * ROWS
            # int64: batch * seq * heads * head_dim passes 2^31 at 128k context.
            q_row = first_q.to(gl.int64) if VARLEN else batch.to(gl.int64) * seq_q
            k_row = (first_k.to(gl.int64) if VARLEN else batch.to(gl.int64) * seq_k) + key
            dk = gl.zeros([ROWS, HEAD_DIM], gl.float32, SUMS)
            dv = gl.zeros([ROWS, HEAD_DIM], gl.float32, SUMS)
            if queries[0] < queries[3]:
                mbarrier.wait(kv_full, tiles & 1)
                keys = k_tile.index(WARPGROUP).reshape([ROWS, HEAD_DIM])
                values = v_tile.index(WARPGROUP).reshape([ROWS, HEAD_DIM])
                if KV_REGISTERS:
                    # The fence of the first step is between these loads and the copy engine's next keys.
                    keys, values = keys.load(OPERAND), values.load(OPERAND)
                for member in range(group):
                    head = head_k * group + member
                    row = padded_row(batch, head, first_q, heads, padded, VARLEN, BLOCK_M)
                    out_at = (q_row * heads + head) * HEAD_DIM
                    where = (start_n, extents, row, out_at, heads * HEAD_DIM)
                    dk, dv, step, sums = _head(
                        dk, dv, keys, values, step, sums, key, queries, where, rings, barriers, pointers,
                        plan, scale, WARPGROUP, STAGES, BLOCK_M, HEAD_DIM, HAS_LEFT, HAS_RIGHT,
                    )  # fmt: skip
                mbarrier.arrive(kv_empty, count=1)
                tiles += 1
            to = (k_row * heads_k + head_k) * HEAD_DIM
            _store(dk_ptr + to, dk * scale, seq_k - key, heads_k * HEAD_DIM, HEAD_DIM)
            _store(dv_ptr + to, dv, seq_k - key, heads_k * HEAD_DIM, HEAD_DIM)


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
    q_ring = gl.allocate_shared_memory(dtype, [STAGES, 1, ROWS, 1, HEAD_DIM], q_desc.layout)
    do_ring = gl.allocate_shared_memory(dtype, [STAGES, 1, ROWS, 1, HEAD_DIM], do_desc.layout)
    k_tile = gl.allocate_shared_memory(dtype, [2, 1, ROWS, 1, HEAD_DIM], k_desc.layout)
    v_tile = gl.allocate_shared_memory(dtype, [2, 1, ROWS, 1, HEAD_DIM], v_desc.layout)
    stats_ring = gl.allocate_shared_memory(
        gl.float32, [STAGES, 2 * ROWS], gl.SwizzledSharedLayout(1, 1, 1, [0])
    )
    ds_ring = gl.allocate_shared_memory(
        dtype, [4 * (BLOCK_M // ROWS), ROWS, ROWS], gl.NVMMASharedLayout(128, 16, rank=2)
    )
    rings = (q_ring, k_tile, v_tile, do_ring, stats_ring, ds_ring)
    barriers = (
        new_barriers(1, 1).index(0), new_barriers(1, 2).index(0), new_barriers(STAGES, 1),
        new_barriers(STAGES, 2), new_barriers(1, 1).index(0), new_barriers(2, 2), new_barriers(2, 2),
        new_barriers(2, 1), new_barriers(1, 2).index(0),
    )  # fmt: skip
    # The copy engine sees the barriers.
    fence_async_shared()
    heads = heads_k * group
    plan = (
        cu_seqlens_q_ptr, cu_seqlens_k_ptr, sequences, heads_k, group, max_seq_q, max_seq_k, tokens_q,
        tokens_k, window_left, window_right, section, blocks, total, programs, padded,
    )  # fmt: skip
    pointers = (partial_ptr, dq_ptr)
    # The kernel's own four warps are the first warpgroup.
    gl.warp_specialize(
        [
            (_consume, (rings, barriers, plan, heads, pointers, dk_ptr, dv_ptr, scale, 0, STAGES,
                        KV_REGISTERS, BLOCK_M, HEAD_DIM, VARLEN, HAS_LEFT, HAS_RIGHT)),
            (_consume, (rings, barriers, plan, heads, pointers, dk_ptr, dv_ptr, scale, 1, STAGES,
                        KV_REGISTERS, BLOCK_M, HEAD_DIM, VARLEN, HAS_LEFT, HAS_RIGHT)),
            (produce, ((q_desc, k_desc, v_desc, do_desc), rings, barriers, plan, heads, stats_ptr,
                        STAGES, BLOCK_M, HEAD_DIM, VARLEN, HAS_LEFT, HAS_RIGHT)),
            (keep_turns, (barriers, plan, heads, counters_ptr, BLOCK_M, VARLEN, HAS_LEFT, HAS_RIGHT)),
        ],
        [4, 1, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip
