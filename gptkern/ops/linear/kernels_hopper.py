"""The product of ``kernels.linear`` for Hopper: a producer warp and two consumer warpgroups.

    linear_hopper     out = activation(A B + bias) + residual, optionally storing A B + bias
                      GATED: out = activation(gate) * up; B and bias are the gate's columns, then those of up

Layout and pipeline are those of ``_device_hopper``. With GATED a tile is 128 columns of the gate and the same
of up, side by side. A tile is finished (bias, activation, residual) and stored while the tensor core works
for the other warpgroup.

k runs upwards inside one accumulator, as in ``kernels.linear``: an element is the same chain of products of
16 in both kernels and in every tile, so which of them computes a row does not show in its bits.

``kernels_hopper_backward`` has the backward pass's products on the same pipeline.
"""

from typing import Any, NamedTuple

from gptkern.ops._device import activate
from gptkern.ops._device_hopper import (
    BLOCK_N,
    PART,
    STORED,
    SUMS,
    Product,
    finished,
    halves,
    inside,
    part_of,
    products,
    quarters,
    run,
    store,
)
from gptkern.ops._gluon import gl, gluon


class Epilogue(NamedTuple):
    """The kernel's arguments beside those of its product."""

    bias_ptr: Any
    residual_ptr: Any
    out_ptr: Any
    pre_ptr: Any
    stride_rm: Any
    ACTIVATION: Any
    GATED: Any


@gluon.jit
def _residual(e, row, col, M, N):
    """A part of the residual."""
    rows, columns, within = inside(row, col, M, N, STORED)
    # int64: rows * stride passes 2^31 at 64k tokens of a 50257-wide layer
    offs = (row + rows).to(gl.int64) * e.stride_rm + (col + columns)
    return gl.load(e.residual_ptr + offs, within, other=0.0)


@gluon.jit
def _finish(acc, residual, e, row, col, M, N, AHEAD: gl.constexpr):
    """Activation and residual on a warpgroup's products, PART columns at a time to spare shared memory.

    ``residual`` is that of the first columns.
    """
    parts = quarters(acc)
    for i in gl.static_range(4):
        part, first = parts[i], col + i * PART
        if e.pre_ptr is not None:
            pre = gl.convert_layout(part.to(e.pre_ptr.dtype.element_ty), STORED)
            store(e.pre_ptr, pre, row, first, M, N, N, STORED)
        part = activate(part, e.ACTIVATION)
        if e.residual_ptr is None:
            out = gl.convert_layout(part.to(e.out_ptr.dtype.element_ty), STORED)
        else:
            if not AHEAD:
                residual = _residual(e, row, first, M, N)
            before = residual.to(gl.float32)
            # The next residual comes while this part is finished.
            if AHEAD and i < 3:
                residual = _residual(e, row, first + PART, M, N)
            out = (gl.convert_layout(part, STORED) + before).to(e.out_ptr.dtype.element_ty)
        store(e.out_ptr, out, row, first, M, N, N, STORED)


@gluon.jit
def _finish_gated(acc, e, row, col, M, N):
    """The product of the activated gate and up, PART columns at a time."""
    gate, up = halves(acc)
    gates, ups = halves(gate), halves(up)
    dtype: gl.constexpr = e.out_ptr.dtype.element_ty  # pre's, too
    for i in gl.static_range(2):
        first = col + i * PART
        if e.pre_ptr is not None:
            pre = gl.convert_layout(gates[i].to(dtype), STORED)
            store(e.pre_ptr, pre, row, first, M, N, 2 * N, STORED)
            pre = gl.convert_layout(ups[i].to(dtype), STORED)
            store(e.pre_ptr + N, pre, row, first, M, N, 2 * N, STORED)
        hidden = activate(gates[i], e.ACTIVATION) * ups[i]
        hidden = gl.convert_layout(hidden.to(dtype), STORED)
        store(e.out_ptr, hidden, row, first, M, N, N, STORED)


@gluon.jit
def _bias(e, col, N):
    """A tile's bias."""
    columns = gl.arange(0, BLOCK_N, gl.SliceLayout(0, SUMS))
    if e.GATED:
        within = columns % (BLOCK_N // 2)
        at = col + gl.where(columns < BLOCK_N // 2, within, N + within)
    else:
        within = columns
        at = col + columns
    return gl.load(e.bias_ptr + at, within < N - col, other=0.0)


@gluon.jit
def _compute(pipe, product, e, step, turn, WARPGROUP: gl.constexpr):
    """A warpgroup's part of a tile: 64 rows."""
    M, N = product.M, product.N
    # There are registers for a residual in half precision to come early.
    AHEAD: gl.constexpr = (
        e.residual_ptr is not None and e.residual_ptr.dtype.element_ty.primitive_bitwidth == 16
    )
    row, col, k_tiles, _split, acc = part_of(turn, product, WARPGROUP)
    acc, step = products(acc, pipe, product, step, turn, k_tiles, WARPGROUP)
    # Bias and residual come while the last products run.
    bias, residual = None, None
    if e.bias_ptr is not None:
        bias = _bias(e, col, N)
    if AHEAD:
        residual = _residual(e, row, col, M, N)
    acc = finished(acc, pipe, product, step)
    if e.bias_ptr is not None:
        acc += bias.to(gl.float32)[None, :]
    if e.GATED:
        _finish_gated(acc, e, row, col, M, N)
    else:
        _finish(acc, residual, e, row, col, M, N, AHEAD)
    return step


@gluon.jit
def linear_hopper(
    a_desc,  # (M, K); tiles of 64 x BLOCK_K
    b_desc,  # (K, N), tiles of BLOCK_K x 256 (GATED: (K, 2 N), BLOCK_K x 128); without B_ROWS the transpose
    bias_ptr,  # (N,), or None; GATED: (2 N,)
    residual_ptr,  # (M, N), contiguous rows; or None
    out_ptr,  # (M, N), contiguous
    pre_ptr,  # (M, N), contiguous; or None; GATED: (M, 2 N), gate and up side by side
    M,
    N,
    K,
    stride_rm,
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
        Product(M, N, K, None, BLOCK_K, STAGES, GROUP_M, True, B_ROWS, 2 if GATED else 1),
        _compute,
        Epilogue(bias_ptr, residual_ptr, out_ptr, pre_ptr, stride_rm, ACTIVATION, GATED),
        CONSUMER_REGISTERS,
        PRODUCER_REGISTERS,
    )
