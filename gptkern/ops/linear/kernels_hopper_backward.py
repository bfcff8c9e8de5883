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

from typing import Any, NamedTuple

from gptkern.ops._device import activate, activation_grad, rounded_product
from gptkern.ops._device_hopper import (
    PART,
    ROWS,
    STORED,
    Product,
    finished,
    halves,
    load,
    part_of,
    products,
    quarters,
    run,
    store,
    store_tile,
)
from gptkern.ops._gluon import gl, gluon

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


class Dact(NamedTuple):
    """The arguments of ``linear_dact_hopper`` beside those of its product."""

    pre_ptr: Any
    dpre_ptr: Any
    partial_ptr: Any
    ACTIVATION: Any
    GATED: Any


@gluon.jit
def _eighths(acc):
    """A warpgroup's products, NARROW columns at a time."""
    a, b, c, d = quarters(acc)
    return halves(a) + halves(b) + halves(c) + halves(d)


@gluon.jit
def _store_sum(ptr, value, row, col, M, N, stride):
    """Store the column sums of a part of 64 rows. Rows past M are zeros and add nothing."""
    columns = gl.arange(0, NARROW, gl.SliceLayout(0, STORED_NARROW))
    at = ptr + ((row // ROWS).to(gl.int64) * stride + col) + columns
    gl.store(at, gl.sum(value, axis=0), (columns < N - col) & (row < M))


@gluon.jit
def _finish_dact(acc, pre, e, row, col, M, N):
    """The activation's gradient on a warpgroup's products, and its column sums, NARROW columns at a time.

    ``pre`` is that of the first columns.
    """
    parts = _eighths(acc)
    for i in gl.static_range(8):
        first = col + i * NARROW
        grad = activation_grad(pre.to(gl.float32), e.ACTIVATION)
        dpre = rounded_product(gl.convert_layout(parts[i], STORED_NARROW), grad)
        store(e.dpre_ptr, dpre.to(e.dpre_ptr.dtype.element_ty), row, first, M, N, N, STORED_NARROW)
        # The next values come while this part is summed.
        if i < 7:
            pre = load(e.pre_ptr, row, first + NARROW, M, N, N, STORED_NARROW, NARROW)
        if e.partial_ptr is not None:
            _store_sum(e.partial_ptr, dpre, row, first, M, N, N)


@gluon.jit
def _finish_gated_dact(acc, gate, up, e, row, col, M, N):
    """The gradients of gate and up from that of hidden, and their column sums, NARROW columns at a time.

    ``gate`` and ``up`` are those of the first columns.
    """
    dtype: gl.constexpr = e.dpre_ptr.dtype.element_ty
    parts = _eighths(acc)
    for i in gl.static_range(8):
        first = col + i * NARROW
        gates, part = gate.to(gl.float32), gl.convert_layout(parts[i], STORED_NARROW)
        dgate = rounded_product(part * up.to(gl.float32), activation_grad(gates, e.ACTIVATION))
        store(e.dpre_ptr, dgate.to(dtype), row, first, M, N, 2 * N, STORED_NARROW)
        if e.partial_ptr is not None:
            _store_sum(e.partial_ptr, dgate, row, first, M, N, 2 * N)
        dup = rounded_product(part, activate(gates, e.ACTIVATION))
        store(e.dpre_ptr + N, dup.to(dtype), row, first, M, N, 2 * N, STORED_NARROW)
        # The next values come while this part is summed.
        if i < 7:
            gate = load(e.pre_ptr, row, first + NARROW, M, N, 2 * N, STORED_NARROW, NARROW)
            up = load(e.pre_ptr + N, row, first + NARROW, M, N, 2 * N, STORED_NARROW, NARROW)
        if e.partial_ptr is not None:
            _store_sum(e.partial_ptr + N, dup, row, first, M, N, 2 * N)


@gluon.jit
def _compute_dact(pipe, product, e, step, turn, WARPGROUP: gl.constexpr):
    """A warpgroup's part of a tile: 64 rows."""
    M, N = product.M, product.N
    row, col, k_tiles, _split, acc = part_of(turn, product, WARPGROUP)
    acc, step = products(acc, pipe, product, step, turn, k_tiles, WARPGROUP)
    # The values before the activation come while the last products run.
    if e.GATED:
        gate = load(e.pre_ptr, row, col, M, N, 2 * N, STORED_NARROW, NARROW)
        up = load(e.pre_ptr + N, row, col, M, N, 2 * N, STORED_NARROW, NARROW)
    else:
        pre = load(e.pre_ptr, row, col, M, N, N, STORED_NARROW, NARROW)
    acc = finished(acc, pipe, product, step)
    if e.GATED:
        _finish_gated_dact(acc, gate, up, e, row, col, M, N)
    else:
        _finish_dact(acc, pre, e, row, col, M, N)
    return step


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
    run(
        (a_desc, b_desc),
        Product(M, N, K, None, BLOCK_K, STAGES, GROUP_M, True, B_ROWS, 1),
        _compute_dact,
        Dact(pre_ptr, dpre_ptr, partial_ptr, ACTIVATION, GATED),
        CONSUMER_REGISTERS,
        PRODUCER_REGISTERS,
    )


# --- the gradient of a weight


class Dw(NamedTuple):
    """The arguments of ``linear_dw_hopper`` beside those of its product."""

    out_ptr: Any
    stride: Any
    OUT_ROWS: Any


@gluon.jit
def _compute_dw(pipe, product, e, step, turn, WARPGROUP: gl.constexpr):
    """A warpgroup's part of a tile: 64 rows."""
    M, N = product.M, product.N
    FP32: gl.constexpr = e.out_ptr.dtype.element_ty.primitive_bitwidth == 32
    LAYOUT: gl.constexpr = STORED_FP32 if FP32 else STORED
    row, col, k_tiles, split, acc = part_of(turn, product, WARPGROUP)
    acc, step = products(acc, pipe, product, step, turn, k_tiles, WARPGROUP)
    acc = finished(acc, pipe, product, step)
    # int64: splits * M * N passes 2^31 at 8 parts of a 50257-wide layer
    part_ptr = e.out_ptr + split.to(gl.int64) * M * N
    store_tile(part_ptr, acc, row, col, M, N, e.stride, LAYOUT, e.OUT_ROWS)
    return step


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
    run(
        (a_desc, b_desc),
        Product(M, N, K, splits, BLOCK_K, STAGES, GROUP_M, False, True, 1),
        _compute_dw,
        Dw(out_ptr, stride, OUT_ROWS),
        CONSUMER_REGISTERS,
        PRODUCER_REGISTERS,
    )
