"""The backward pass's products for Hopper, on the pipeline of ``kernels_hopper``.

    linear_dact_hopper    dpre = (A B) * activation'(pre), and its column sums for the bias gradient
                          GATED: the gradients of gate and up, side by side as ``pre`` has them
    linear_dw_hopper      A B over a range of k: a weight gradient, the sum over tokens split in a fixed way

Layout as in ``linear_hopper``. A is dout in both: by rows in ``linear_dact_hopper``; by columns, dout's
transpose, in ``linear_dw_hopper``, where the matrix unit reads both operands along k as they lie in memory.

``linear_dact_hopper`` has the values before the activation come while the last products of a tile run, and
those of the next columns while one part is finished. A warpgroup's column sums are of its own 64 rows.
``linear_dw_hopper`` takes the splits of ``kernels.linear_dw`` in the same shares: same sums, same bits.
"""

from gptkern.ops._device import activate, activation_grad, rounded_product
from gptkern.ops._gluon import gl, gluon, mbarrier, warpgroup_mma_wait
from gptkern.ops.linear.kernels_hopper import (
    BLOCK_N,
    PART,
    ROWS,
    STORED,
    SUMS,
    _halves,
    _inside,
    _pipeline,
    _produce,
    _products,
    _store,
    _turns,
    _work,
)

# Columns that are finished together where an activation's gradient takes registers, and how they are stored:
# 16 bytes a lane, the rows that a warp has in SUMS.
NARROW = gl.constexpr(32)
STORED_NARROW = gl.constexpr(
    gl.DistributedLinearLayout(
        [[0, 1], [0, 2], [0, 4], [8, 0]],
        [[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]],
        [[16, 0], [32, 0]],
        [],
        [ROWS.value, NARROW.value],
    )
)
# A part in fp32 as it is stored: 16 bytes a lane, whole lines.
STORED_FP32 = gl.constexpr(
    gl.DistributedLinearLayout(
        [[0, 1], [0, 2], [2, 0], [4, 0], [8, 0]],
        [[0, 4], [0, 8], [0, 16], [0, 32], [1, 0]],
        [[16, 0], [32, 0]],
        [],
        [ROWS.value, PART.value],
    )
)


# --- the gradient of an activation


@gluon.jit
def _eighths(acc):
    """A warpgroup's products, NARROW columns at a time."""
    left, right = _halves(acc)
    a, b = _halves(left)
    c, d = _halves(right)
    return _halves(a) + _halves(b) + _halves(c) + _halves(d)


@gluon.jit
def _load(ptr, row, col, M, N, stride, LAYOUT: gl.constexpr):
    """A part of a matrix whose rows are ``stride`` apart."""
    rows, columns, inside = _inside(row, col, M, N, LAYOUT, NARROW)
    # int64 for the part's corner alone, as in _store
    return gl.load(ptr + (row.to(gl.int64) * stride + col) + (rows * stride + columns), inside, other=0.0)


@gluon.jit
def _store_sum(ptr, value, row, col, M, N, stride, LAYOUT: gl.constexpr):
    """Store the column sums of a part of 64 rows. Rows past M are zeros and add nothing."""
    columns = gl.arange(0, NARROW, gl.SliceLayout(0, LAYOUT))
    at = ptr + ((row // ROWS).to(gl.int64) * stride + col) + columns
    gl.store(at, gl.sum(value, axis=0), (columns < N - col) & (row < M))


@gluon.jit
def _finish_dact(
    acc, pre, pointers, row, col, M, N, ACTIVATION: gl.constexpr, LAYOUT: gl.constexpr
):  # fmt: skip
    """The activation's gradient on a warpgroup's products, and its column sums, NARROW columns at a time.

    ``pre`` is that of the first columns.
    """
    pre_ptr, dpre_ptr, partial_ptr = pointers
    parts = _eighths(acc)
    for i in gl.static_range(8):
        first = col + i * NARROW
        grad = activation_grad(pre.to(gl.float32), ACTIVATION)
        dpre = rounded_product(gl.convert_layout(parts[i], LAYOUT), grad)
        _store(dpre_ptr, dpre.to(dpre_ptr.dtype.element_ty), row, first, M, N, N, LAYOUT)
        # The next values come while this part is summed.
        if i < 7:
            pre = _load(pre_ptr, row, first + NARROW, M, N, N, LAYOUT)
        if partial_ptr is not None:
            _store_sum(partial_ptr, dpre, row, first, M, N, N, LAYOUT)


@gluon.jit
def _finish_gated_dact(
    acc, gate, up, pointers, row, col, M, N, ACTIVATION: gl.constexpr, LAYOUT: gl.constexpr
):  # fmt: skip
    """The gradients of gate and up from that of hidden, and their column sums, NARROW columns at a time.

    ``gate`` and ``up`` are those of the first columns.
    """
    pre_ptr, dpre_ptr, partial_ptr = pointers
    dtype: gl.constexpr = dpre_ptr.dtype.element_ty
    parts = _eighths(acc)
    for i in gl.static_range(8):
        first = col + i * NARROW
        gates, part = gate.to(gl.float32), gl.convert_layout(parts[i], LAYOUT)
        dgate = rounded_product(part * up.to(gl.float32), activation_grad(gates, ACTIVATION))
        _store(dpre_ptr, dgate.to(dtype), row, first, M, N, 2 * N, LAYOUT)
        if partial_ptr is not None:
            _store_sum(partial_ptr, dgate, row, first, M, N, 2 * N, LAYOUT)
        dup = rounded_product(part, activate(gates, ACTIVATION))
        _store(dpre_ptr + N, dup.to(dtype), row, first, M, N, 2 * N, LAYOUT)
        # The next values come while this part is summed.
        if i < 7:
            gate = _load(pre_ptr, row, first + NARROW, M, N, 2 * N, LAYOUT)
            up = _load(pre_ptr + N, row, first + NARROW, M, N, 2 * N, LAYOUT)
        if partial_ptr is not None:
            _store_sum(partial_ptr + N, dup, row, first, M, N, 2 * N, LAYOUT)


@gluon.jit
def _consume_dact(
    rings, barriers, extents, pointers,
    WARPGROUP: gl.constexpr, ACTIVATION: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr,
    GROUP_M: gl.constexpr, B_ROWS: gl.constexpr, GATED: gl.constexpr,
):  # fmt: skip
    """A consumer warpgroup: 64 rows of every tile."""
    M, N, _K = extents
    pre_ptr, _dpre_ptr, _partial_ptr = pointers
    _full, empty, _begun = barriers
    step = 0
    for turn in range(_turns(extents, None, BLOCK_N)):
        row, col, _first, k_tiles, _split = _work(turn, extents, None, BLOCK_N, BLOCK_K, GROUP_M)
        row += WARPGROUP * ROWS
        acc = gl.zeros([ROWS, BLOCK_N], gl.float32, SUMS)
        acc, step = _products(acc, rings, barriers, step, turn, k_tiles, WARPGROUP, STAGES, B_ROWS)
        # The values before the activation come while the last products run.
        if GATED:
            gate = _load(pre_ptr, row, col, M, N, 2 * N, STORED_NARROW)
            up = _load(pre_ptr + N, row, col, M, N, 2 * N, STORED_NARROW)
        else:
            pre = _load(pre_ptr, row, col, M, N, N, STORED_NARROW)
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(empty.index((step - 1) % STAGES), count=1)
        if GATED:
            _finish_gated_dact(acc, gate, up, pointers, row, col, M, N, ACTIVATION, STORED_NARROW)
        else:
            _finish_dact(acc, pre, pointers, row, col, M, N, ACTIVATION, STORED_NARROW)


@gluon.jit
def linear_dact_hopper(
    a_desc,  # (M, K); tiles of 64 x BLOCK_K
    b_desc,  # (K, N), tiles of BLOCK_K x 256; without B_ROWS the transpose
    pre_ptr,  # (M, N), contiguous; GATED: (M, 2 N), gate and up side by side
    dpre_ptr,  # as pre
    partial_ptr,  # (ceil(M / 64), N) fp32, column sums of so many rows of dpre; GATED: 2 N wide; or None
    M,
    N,
    K,
    ACTIVATION: gl.constexpr,
    B_ROWS: gl.constexpr,
    GATED: gl.constexpr,
    BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP_M: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr,
    PRODUCER_REGISTERS: gl.constexpr,
):
    """K is at least STAGES x BLOCK_K, as in ``linear_hopper``."""
    rings, barriers = _pipeline(a_desc, b_desc, BLOCK_K, STAGES, B_ROWS, False)
    extents = (M, N, K)
    pointers = (pre_ptr, dpre_ptr, partial_ptr)
    gl.warp_specialize(
        [
            (_consume_dact, (rings, barriers, extents, pointers, 0, ACTIVATION,
                             BLOCK_K, STAGES, GROUP_M, B_ROWS, GATED)),
            (_consume_dact, (rings, barriers, extents, pointers, 1, ACTIVATION,
                             BLOCK_K, STAGES, GROUP_M, B_ROWS, GATED)),
            (_produce, ((a_desc, b_desc), rings, barriers, extents,
                        BLOCK_K, STAGES, GROUP_M, B_ROWS, False, True, None)),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip


# --- the gradient of a weight


@gluon.jit
def _finish_dw(acc, out_ptr, row, col, M, N, stride, OUT_ROWS: gl.constexpr, LAYOUT: gl.constexpr):
    """Store a warpgroup's sums, PART columns at a time, by the result's rows or by its columns."""
    dtype: gl.constexpr = out_ptr.dtype.element_ty
    left, right = _halves(acc)
    parts = _halves(left) + _halves(right)
    for i in gl.static_range(4):
        part, first = parts[i].to(dtype), col + i * PART
        if OUT_ROWS:
            _store(out_ptr, gl.convert_layout(part, LAYOUT), row, first, M, N, stride, LAYOUT)
        else:
            part = gl.convert_layout(gl.permute(part, (1, 0)), LAYOUT)
            _store(out_ptr, part, first, row, N, M, stride, LAYOUT)


@gluon.jit
def _consume_dw(
    rings, barriers, extents, splits, out_ptr, stride,
    WARPGROUP: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr, GROUP_M: gl.constexpr,
    OUT_ROWS: gl.constexpr,
):  # fmt: skip
    """A consumer warpgroup: 64 rows of every tile."""
    M, N, _K = extents
    _full, empty, _begun = barriers
    FP32: gl.constexpr = out_ptr.dtype.element_ty.primitive_bitwidth == 32
    LAYOUT: gl.constexpr = STORED_FP32 if FP32 else STORED
    step = 0
    for turn in range(_turns(extents, splits, BLOCK_N)):
        row, col, _first, k_tiles, split = _work(turn, extents, splits, BLOCK_N, BLOCK_K, GROUP_M)
        row += WARPGROUP * ROWS
        acc = gl.zeros([ROWS, BLOCK_N], gl.float32, SUMS)
        acc, step = _products(
            acc, rings, barriers, step, turn, k_tiles, WARPGROUP, STAGES, True, False
        )  # fmt: skip
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(empty.index((step - 1) % STAGES), count=1)
        # int64: splits * M * N passes 2^31 at 8 parts of a 50257-wide layer
        part_ptr = out_ptr + split.to(gl.int64) * M * N
        _finish_dw(acc, part_ptr, row, col, M, N, stride, OUT_ROWS, LAYOUT)


@gluon.jit
def linear_dw_hopper(
    a_desc,  # (K, M), the transpose of A; tiles of BLOCK_K x 64
    b_desc,  # (K, N); tiles of BLOCK_K x 256
    out_ptr,  # (splits, M, N), each part by rows or by columns
    M,
    N,
    K,
    splits,
    stride,  # from a part's row to the next; without OUT_ROWS from a column to the next
    OUT_ROWS: gl.constexpr,
    BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP_M: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr,
    PRODUCER_REGISTERS: gl.constexpr,
):
    """Every split has at least STAGES steps of k, as all sums have in ``linear_hopper``."""
    rings, barriers = _pipeline(a_desc, b_desc, BLOCK_K, STAGES, True, False)
    extents = (M, N, K)
    gl.warp_specialize(
        [
            (_consume_dw, (rings, barriers, extents, splits, out_ptr, stride, 0,
                           BLOCK_K, STAGES, GROUP_M, OUT_ROWS)),
            (_consume_dw, (rings, barriers, extents, splits, out_ptr, stride, 1,
                           BLOCK_K, STAGES, GROUP_M, OUT_ROWS)),
            (_produce, ((a_desc, b_desc), rings, barriers, extents,
                        BLOCK_K, STAGES, GROUP_M, True, False, False, splits)),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip
