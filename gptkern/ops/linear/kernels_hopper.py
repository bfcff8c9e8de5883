"""The product of ``kernels.linear`` for Hopper: a producer warp and two consumer warpgroups.

    linear_hopper     out = activation(A B + bias) + residual, optionally storing A B + bias
                      GATED: out = activation(gate) * up; B and bias are the gate's columns, then those of up

Layout. A program stays on its multiprocessor and takes one tile of 128 x 256 of the result after another, in
the order of ``kernels.linear``. Its producer warp has the copy engine fetch 128 x BLOCK_K of A and BLOCK_K x
256 of B at a time into a ring of STAGES such pairs. Each of two warpgroups owns 64 rows of every tile: both
read the same part of B, which so is fetched once for 128 rows. With GATED a tile is 128 columns of the gate
and the same of up, side by side.

The second warpgroup follows half a ring behind the first. While the first finishes a tile (bias, activation,
residual, stores) the tensor core works off what the second has left, and while the second finishes, the first
is at the next tile, as far as the ring goes.

Barriers in shared memory, and what the end of a phase says:

    full      a pair of tiles has come
    empty     both warpgroups have read it
    begun     the first warpgroup has issued enough of a tile's products that the second may begin

k runs upwards inside one accumulator, as in ``kernels.linear``: an element is the same chain of products of
16 in both kernels and in every tile, so which of them computes a row does not show in its bits.

``kernels_hopper_backward`` has the backward pass's products on the same pipeline.
"""

from gptkern.ops._device import activate
from gptkern.ops._device_hopper import new_barriers
from gptkern.ops._gluon import (
    async_load,
    fence_async_shared,
    gl,
    gluon,
    mbarrier,
    reinterpret,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from gptkern.ops.linear.kernels import tile_at

BLOCK_M, BLOCK_N = gl.constexpr(128), gl.constexpr(256)
ROWS = gl.constexpr(64)  # of a warpgroup
PART = gl.constexpr(64)  # columns that are finished together
# The products of a warpgroup, and a part of them as it is stored: 16 bytes of half precision a lane, whole
# lines, the rows that a warp has in SUMS.
SUMS = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N.value, 16]))
STORED = gl.constexpr(
    gl.DistributedLinearLayout(
        [[0, 1], [0, 2], [0, 4], [4, 0], [8, 0]],
        [[0, 8], [0, 16], [0, 32], [1, 0], [2, 0]],
        [[16, 0], [32, 0]],
        [],
        [ROWS.value, PART.value],
    )
)


@gluon.jit
def _turns(extents, splits, WIDTH: gl.constexpr):
    """The number of tiles that this program takes."""
    M, N, _K = extents
    tiles = gl.cdiv(M, BLOCK_M) * gl.cdiv(N, WIDTH)
    if splits is not None:
        tiles *= splits
    return gl.cdiv(tiles - gl.program_id(0), gl.num_programs(0))


@gluon.jit
def _work(turn, extents, splits, WIDTH: gl.constexpr, BLOCK_K: gl.constexpr, GROUP_M: gl.constexpr):
    """A turn's tile: (row, column, its first step of k, its steps of k, the number of its split).

    With ``splits`` a tile is computed so many times, each over a share of the steps of k.
    """
    M, N, K = extents
    number = gl.program_id(0) + turn * gl.num_programs(0)
    k_tiles = gl.cdiv(K, BLOCK_K)
    first, split = 0, 0
    if splits is not None:
        tiles = gl.cdiv(M, BLOCK_M) * gl.cdiv(N, WIDTH)
        split = number // tiles
        number %= tiles
        share = gl.cdiv(k_tiles, splits)
        first = split * share
        k_tiles = gl.minimum(share, k_tiles - first)
    tile_m, tile_n = tile_at(number, M, N, BLOCK_M, WIDTH, GROUP_M)
    return tile_m * BLOCK_M, tile_n * WIDTH, first, k_tiles, split


# --- shared memory


@gluon.jit
def _pipeline(
    a_desc, b_desc, BLOCK_K: gl.constexpr, STAGES: gl.constexpr, B_ROWS: gl.constexpr, GATED: gl.constexpr
):
    """(rings, barriers): shared memory of the producer and the consumers, ready for the copy engine."""
    dtype: gl.constexpr = a_desc.dtype
    COPIES: gl.constexpr = 2 if GATED else 1
    b_ring_shape: gl.constexpr = [STAGES, BLOCK_K, BLOCK_N] if B_ROWS else [STAGES, BLOCK_N, BLOCK_K]
    # By columns, a copy of A is as large: BLOCK_K is ROWS.
    a_ring = gl.allocate_shared_memory(dtype, [2 * STAGES, ROWS, BLOCK_K], a_desc.layout)
    b_shape: gl.constexpr = [BLOCK_K, BLOCK_N // COPIES] if B_ROWS else [BLOCK_N // COPIES, BLOCK_K]
    b_parts = gl.allocate_shared_memory(dtype, [COPIES * STAGES, b_shape[0], b_shape[1]], b_desc.layout)
    # Two copies are one tile: rows of 128 bytes, or squares of 64 columns, one behind the other.
    gl.static_assert(BLOCK_K == 64)
    rings = (a_ring, b_parts, reinterpret(b_parts, dtype, b_ring_shape, b_desc.layout))
    barriers = (new_barriers(STAGES, 1), new_barriers(STAGES, 2), new_barriers(1, 1).index(0))
    # The copy engine sees the barriers.
    fence_async_shared()
    return rings, barriers


# --- the producer


@gluon.jit
def _produce(
    descriptors, rings, barriers, extents,
    BLOCK_K: gl.constexpr, STAGES: gl.constexpr, GROUP_M: gl.constexpr, B_ROWS: gl.constexpr,
    GATED: gl.constexpr, A_ROWS: gl.constexpr = True, splits=None,
):  # fmt: skip
    """The producer warp: all copies."""
    a_desc, b_desc = descriptors
    COPIES: gl.constexpr = 2 if GATED else 1
    WIDTH: gl.constexpr = BLOCK_N // COPIES
    a_ring, b_parts, _b_ring = rings
    full, empty, _begun = barriers
    _M, N, _K = extents
    step = 0
    for turn in range(_turns(extents, splits, WIDTH)):
        row, col, first, k_tiles, _split = _work(turn, extents, splits, WIDTH, BLOCK_K, GROUP_M)
        for k in range(k_tiles):
            stage = step % STAGES
            at = (first + k) * BLOCK_K
            mbarrier.wait(empty.index(stage), (step // STAGES & 1) ^ 1)
            mbarrier.expect(
                full.index(stage), 2 * a_desc.block_type.nbytes + COPIES * b_desc.block_type.nbytes
            )
            for half in gl.static_range(2):
                rows = row + half * ROWS
                to = a_ring.index(2 * stage + half)
                if A_ROWS:
                    where = [rows, at]
                else:
                    where = [at, rows]
                async_load(a_desc, where, full.index(stage), to)
            for part in gl.static_range(COPIES):
                columns = col + part * N
                if B_ROWS:
                    where = [at, columns]
                else:
                    where = [columns, at]
                to = b_parts.index(COPIES * stage + part)
                async_load(b_desc, where, full.index(stage), to)
            step += 1


# --- the consumers


@gluon.jit
def _products(
    acc, rings, barriers, step, turn, k_tiles,
    WARPGROUP: gl.constexpr, STAGES: gl.constexpr, B_ROWS: gl.constexpr, A_ROWS: gl.constexpr = True,
):  # fmt: skip
    """Issue all products of a tile: (accumulator, steps so far); those of the last pair may still run."""
    a_ring, _b_parts, b_ring = rings
    full, empty, begun = barriers
    LEAD: gl.constexpr = STAGES // 2
    if WARPGROUP == 1:
        mbarrier.wait(begun, turn & 1)
    for k in range(k_tiles):
        stage = step % STAGES
        a, b = a_ring.index(2 * stage + WARPGROUP), b_ring.index(stage)
        if not A_ROWS:
            a = a.permute((1, 0))
        if not B_ROWS:
            b = b.permute((1, 0))
        mbarrier.wait(full.index(stage), step // STAGES & 1)
        acc = warpgroup_mma(a, b, acc, is_async=True)
        # The pair before has been read when its products are done. Predicates, not branches: a branch between
        # products makes ptxas wait for them there.
        acc = warpgroup_mma_wait(1, deps=[acc])
        mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), count=1, pred=k > 0)
        if WARPGROUP == 0:
            mbarrier.arrive(begun, count=1, pred=k == LEAD)
        step += 1
    return acc, step


@gluon.jit
def _halves(x):
    """The left and right half of a warpgroup's products; no value moves to another thread."""
    HALF: gl.constexpr = x.shape[1] // 2
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HALF, 16])
    left, right = gl.split(gl.permute(gl.reshape(x, (ROWS, 2, HALF)), (0, 2, 1)))
    return (
        gl.convert_layout(left, layout, assert_trivial=True),
        gl.convert_layout(right, layout, assert_trivial=True),
    )


@gluon.jit
def _inside(row, col, M, N, LAYOUT: gl.constexpr, WIDTH: gl.constexpr = PART):
    """(rows, columns, whether they are inside) of a part of the result."""
    rows = gl.arange(0, ROWS, gl.SliceLayout(1, LAYOUT))[:, None]
    columns = gl.arange(0, WIDTH, gl.SliceLayout(0, LAYOUT))[None, :]
    return rows, columns, (rows < M - row) & (columns < N - col)


@gluon.jit
def _residual(residual_ptr, row, col, M, N, stride_rm, LAYOUT: gl.constexpr):
    """A part of the residual."""
    rows, columns, inside = _inside(row, col, M, N, LAYOUT)
    # int64: rows * stride passes 2^31 at 64k tokens of a 50257-wide layer
    offs = (row + rows).to(gl.int64) * stride_rm + (col + columns)
    return gl.load(residual_ptr + offs, inside, other=0.0)


@gluon.jit
def _store(ptr, value, row, col, M, N, stride, LAYOUT: gl.constexpr):
    """Store a part of a result whose rows are ``stride`` apart."""
    rows, columns, inside = _inside(row, col, M, N, LAYOUT, value.shape[1])
    # int64 for the part's corner alone: within a part offsets stay small, and registers with them
    gl.store(ptr + (row.to(gl.int64) * stride + col) + (rows * stride + columns), value, inside)


@gluon.jit
def _finish(
    acc, residual, pointers, row, col, M, N, stride_rm, ACTIVATION: gl.constexpr, LAYOUT: gl.constexpr,
    AHEAD: gl.constexpr,
):  # fmt: skip
    """Activation and residual on a warpgroup's products, PART columns at a time to spare shared memory.

    ``residual`` is that of the first columns.
    """
    _bias_ptr, residual_ptr, out_ptr, pre_ptr = pointers
    left, right = _halves(acc)
    parts = _halves(left) + _halves(right)
    for i in gl.static_range(4):
        part, first = parts[i], col + i * PART
        if pre_ptr is not None:
            pre = gl.convert_layout(part.to(pre_ptr.dtype.element_ty), LAYOUT)
            _store(pre_ptr, pre, row, first, M, N, N, LAYOUT)
        part = activate(part, ACTIVATION)
        if residual_ptr is None:
            out = gl.convert_layout(part.to(out_ptr.dtype.element_ty), LAYOUT)
        else:
            if not AHEAD:
                residual = _residual(residual_ptr, row, first, M, N, stride_rm, LAYOUT)
            before = residual.to(gl.float32)
            # The next residual comes while this part is finished.
            if AHEAD and i < 3:
                residual = _residual(residual_ptr, row, first + PART, M, N, stride_rm, LAYOUT)
            out = (gl.convert_layout(part, LAYOUT) + before).to(out_ptr.dtype.element_ty)
        _store(out_ptr, out, row, first, M, N, N, LAYOUT)


@gluon.jit
def _finish_gated(acc, pointers, row, col, M, N, ACTIVATION: gl.constexpr, LAYOUT: gl.constexpr):
    """The product of the activated gate and up, PART columns at a time."""
    _bias_ptr, _residual_ptr, out_ptr, pre_ptr = pointers
    gate, up = _halves(acc)
    gates, ups = _halves(gate), _halves(up)
    dtype: gl.constexpr = out_ptr.dtype.element_ty  # pre's, too
    for i in gl.static_range(2):
        first = col + i * PART
        if pre_ptr is not None:
            pre = gl.convert_layout(gates[i].to(dtype), LAYOUT)
            _store(pre_ptr, pre, row, first, M, N, 2 * N, LAYOUT)
            pre = gl.convert_layout(ups[i].to(dtype), LAYOUT)
            _store(pre_ptr + N, pre, row, first, M, N, 2 * N, LAYOUT)
        hidden = activate(gates[i], ACTIVATION) * ups[i]
        hidden = gl.convert_layout(hidden.to(dtype), LAYOUT)
        _store(out_ptr, hidden, row, first, M, N, N, LAYOUT)


@gluon.jit
def _bias(bias_ptr, col, N, GATED: gl.constexpr, SUMS: gl.constexpr):
    """A tile's bias."""
    columns = gl.arange(0, BLOCK_N, gl.SliceLayout(0, SUMS))
    if GATED:
        within = columns % (BLOCK_N // 2)
        at = col + gl.where(columns < BLOCK_N // 2, within, N + within)
    else:
        within = columns
        at = col + columns
    return gl.load(bias_ptr + at, within < N - col, other=0.0)


@gluon.jit
def _consume(
    rings, barriers, extents, pointers, stride_rm,
    WARPGROUP: gl.constexpr, ACTIVATION: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr,
    GROUP_M: gl.constexpr, B_ROWS: gl.constexpr, GATED: gl.constexpr,
):  # fmt: skip
    """A consumer warpgroup: 64 rows of every tile."""
    WIDTH: gl.constexpr = BLOCK_N // 2 if GATED else BLOCK_N
    M, N, _K = extents
    bias_ptr, residual_ptr, _out_ptr, _pre_ptr = pointers
    _full, empty, _begun = barriers
    # There are registers for a residual in half precision to come early.
    AHEAD: gl.constexpr = residual_ptr is not None and residual_ptr.dtype.element_ty.primitive_bitwidth == 16
    step = 0
    for turn in range(_turns(extents, None, WIDTH)):
        row, col, _first, k_tiles, _split = _work(turn, extents, None, WIDTH, BLOCK_K, GROUP_M)
        row += WARPGROUP * ROWS
        acc = gl.zeros([ROWS, BLOCK_N], gl.float32, SUMS)
        acc, step = _products(acc, rings, barriers, step, turn, k_tiles, WARPGROUP, STAGES, B_ROWS)
        # Bias and residual come while the last products run.
        bias, residual = None, None
        if bias_ptr is not None:
            bias = _bias(bias_ptr, col, N, GATED, SUMS)
        if AHEAD:
            residual = _residual(residual_ptr, row, col, M, N, stride_rm, STORED)
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(empty.index((step - 1) % STAGES), count=1)
        if bias_ptr is not None:
            acc += bias.to(gl.float32)[None, :]
        if GATED:
            _finish_gated(acc, pointers, row, col, M, N, ACTIVATION, STORED)
        else:
            _finish(acc, residual, pointers, row, col, M, N, stride_rm, ACTIVATION, STORED, AHEAD)


# --- the kernel


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
    """K is at least STAGES x BLOCK_K: the first warpgroup is then never a whole tile ahead of the second."""
    rings, barriers = _pipeline(a_desc, b_desc, BLOCK_K, STAGES, B_ROWS, GATED)
    extents = (M, N, K)
    pointers = (bias_ptr, residual_ptr, out_ptr, pre_ptr)
    # The kernel's own four warps are the first warpgroup.
    gl.warp_specialize(
        [
            (_consume, (rings, barriers, extents, pointers, stride_rm, 0, ACTIVATION,
                        BLOCK_K, STAGES, GROUP_M, B_ROWS, GATED)),
            (_consume, (rings, barriers, extents, pointers, stride_rm, 1, ACTIVATION,
                        BLOCK_K, STAGES, GROUP_M, B_ROWS, GATED)),
            (_produce, ((a_desc, b_desc), rings, barriers, extents,
                        BLOCK_K, STAGES, GROUP_M, B_ROWS, GATED)),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip
