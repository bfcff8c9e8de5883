"""Device functions that several of Hopper's kernels in Gluon share, and the skeleton of its matrix products.

A product's program stays on its multiprocessor and takes one tile of 128 x 256 of the result after another,
in the order of ``_device.tile_at``. Its producer warp has the copy engine fetch 128 x BLOCK_K of A and
BLOCK_K x 256 of B at a time into a ring of STAGES such pairs. Each of two consumer warpgroups owns 64 rows of
every tile: both read the same part of B, which so is fetched once for 128 rows.

The second warpgroup follows half a ring behind the first. While the first finishes a tile (its epilogue and
its stores) the tensor core works off what the second has left, and while the second finishes, the first is at
the next tile, as far as the ring goes. Every sum is at least STAGES x BLOCK_K long: the first warpgroup is
then never a whole tile ahead of the second.

A kernel is a ``Product`` and a function that computes a warpgroup's part of a tile, with its arguments: see
``run``.
"""

from typing import Any, NamedTuple

from gptkern.ops._device import tile_at
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


class Product(NamedTuple):
    """A matrix product A B as its warps know it.

    Attributes:
        M, N, K: A is M x K, the result M x N.
        splits: A tile is computed so many times, each over a share of the steps of k; None: once.
        BLOCK_K, STAGES: The steps of k, and the number of them in the rings.
        GROUP_M: As in ``tile_at``.
        A_ROWS, B_ROWS: Whether the operand lies by rows; otherwise its descriptor is of the transpose.
        COPIES: Parts of B, N columns apart, that lie side by side in a tile.
    """

    M: Any
    N: Any
    K: Any
    splits: Any
    BLOCK_K: Any
    STAGES: Any
    GROUP_M: Any
    A_ROWS: Any
    B_ROWS: Any
    COPIES: Any


class Pipe(NamedTuple):
    """Shared memory of the producer and the consumers.

    Attributes:
        a_ring, b_parts, b_ring: Tiles of A, parts of B, and these as whole tiles.
        full: Barriers: a pair of tiles has come.
        empty: Barriers: both warpgroups have read it.
        begun: A barrier: the first warpgroup has issued enough of a tile's products for the second to begin.
    """

    a_ring: Any
    b_parts: Any
    b_ring: Any
    full: Any
    empty: Any
    begun: Any


@gluon.jit
def new_barriers(number: gl.constexpr, arrivals: gl.constexpr):
    """Barriers in shared memory, each of so many arrivals a phase."""
    made = gl.allocate_shared_memory(gl.int64, [number, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(number):
        mbarrier.init(made.index(i), count=arrivals)
    return made


@gluon.jit
def run(
    descriptors, product, compute: gl.constexpr, epilogue,
    CONSUMER_REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """A product's warps: two consumer warpgroups and the producer.

    ``compute(pipe, product, epilogue, step, turn, WARPGROUP)`` computes and stores a warpgroup's part of a
    turn's tile. It returns the warpgroup's steps so far, which were ``step``.
    """
    pipe = _pipe(descriptors, product)
    # The kernel's own four warps are the first warpgroup.
    gl.warp_specialize(
        [
            (_consume, (pipe, product, epilogue, compute, 0)),
            (_consume, (pipe, product, epilogue, compute, 1)),
            (_produce, (descriptors, pipe, product)),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )


@gluon.jit
def _pipe(descriptors, product):
    """Rings and barriers, ready for the copy engine."""
    a_desc, b_desc = descriptors
    dtype: gl.constexpr = a_desc.dtype
    BLOCK_K: gl.constexpr = product.BLOCK_K
    STAGES: gl.constexpr = product.STAGES
    WIDTH: gl.constexpr = BLOCK_N // product.COPIES
    # By columns, a copy of A is as large: BLOCK_K is ROWS.
    a_ring = gl.allocate_shared_memory(dtype, [2 * STAGES, ROWS, BLOCK_K], a_desc.layout)
    b_shape: gl.constexpr = [BLOCK_K, WIDTH] if product.B_ROWS else [WIDTH, BLOCK_K]
    b_parts = gl.allocate_shared_memory(
        dtype, [product.COPIES * STAGES, b_shape[0], b_shape[1]], b_desc.layout
    )
    # Two copies are one tile: rows of 128 bytes, or squares of 64 columns, one behind the other.
    gl.static_assert(BLOCK_K == 64)
    b_ring_shape: gl.constexpr = [STAGES, BLOCK_K, BLOCK_N] if product.B_ROWS else [STAGES, BLOCK_N, BLOCK_K]
    b_ring = reinterpret(b_parts, dtype, b_ring_shape, b_desc.layout)
    full, empty, begun = new_barriers(STAGES, 1), new_barriers(STAGES, 2), new_barriers(1, 1).index(0)
    # The copy engine sees the barriers.
    fence_async_shared()
    return Pipe(a_ring, b_parts, b_ring, full, empty, begun)


# --- the walk over tiles


@gluon.jit
def _turns(product):
    """The number of tiles that this program takes."""
    tiles = gl.cdiv(product.M, BLOCK_M) * gl.cdiv(product.N, BLOCK_N // product.COPIES)
    if product.splits is not None:
        tiles *= product.splits
    return gl.cdiv(tiles - gl.program_id(0), gl.num_programs(0))


@gluon.jit
def _tile(turn, product):
    """A turn's tile: (row, column, its first step of k, its steps of k, the number of its split)."""
    WIDTH: gl.constexpr = BLOCK_N // product.COPIES
    number = gl.program_id(0) + turn * gl.num_programs(0)
    k_tiles = gl.cdiv(product.K, product.BLOCK_K)
    first, split = 0, 0
    if product.splits is not None:
        tiles = gl.cdiv(product.M, BLOCK_M) * gl.cdiv(product.N, WIDTH)
        split = number // tiles
        number %= tiles
        share = gl.cdiv(k_tiles, product.splits)
        first = split * share
        k_tiles = gl.minimum(share, k_tiles - first)
    tile_m, tile_n = tile_at(number, product.M, product.N, BLOCK_M, WIDTH, product.GROUP_M)
    return tile_m * BLOCK_M, tile_n * WIDTH, first, k_tiles, split


@gluon.jit
def part_of(turn, product, WARPGROUP: gl.constexpr):
    """A warpgroup's part of a turn's tile: (row, column, its steps of k, the number of its split, zeros)."""
    row, col, _first, k_tiles, split = _tile(turn, product)
    return row + WARPGROUP * ROWS, col, k_tiles, split, gl.zeros([ROWS, BLOCK_N], gl.float32, SUMS)


# --- the producer


@gluon.jit
def _produce(descriptors, pipe, product):
    """The producer warp: all copies."""
    a_desc, b_desc = descriptors
    COPIES: gl.constexpr = product.COPIES
    step = 0
    for turn in range(_turns(product)):
        row, col, first, k_tiles, _split = _tile(turn, product)
        for k in range(k_tiles):
            stage = step % product.STAGES
            at = (first + k) * product.BLOCK_K
            mbarrier.wait(pipe.empty.index(stage), (step // product.STAGES & 1) ^ 1)
            full = pipe.full.index(stage)
            mbarrier.expect(full, 2 * a_desc.block_type.nbytes + COPIES * b_desc.block_type.nbytes)
            for half in gl.static_range(2):
                rows = row + half * ROWS
                to = pipe.a_ring.index(2 * stage + half)
                if product.A_ROWS:
                    where = [rows, at]
                else:
                    where = [at, rows]
                async_load(a_desc, where, full, to)
            for part in gl.static_range(COPIES):
                columns = col + part * product.N
                if product.B_ROWS:
                    where = [at, columns]
                else:
                    where = [columns, at]
                to = pipe.b_parts.index(COPIES * stage + part)
                async_load(b_desc, where, full, to)
            step += 1


# --- the consumers


@gluon.jit
def _consume(pipe, product, epilogue, compute: gl.constexpr, WARPGROUP: gl.constexpr):
    """A consumer warpgroup: 64 rows of every tile."""
    step = 0
    for turn in range(_turns(product)):
        step = compute(pipe, product, epilogue, step, turn, WARPGROUP)


@gluon.jit
def products(acc, pipe, product, step, turn, k_tiles, WARPGROUP: gl.constexpr):
    """Issue all products of a tile: (accumulator, steps so far); those of the last pair may still run."""
    STAGES: gl.constexpr = product.STAGES
    LEAD: gl.constexpr = STAGES // 2
    if WARPGROUP == 1:
        mbarrier.wait(pipe.begun, turn & 1)
    for k in range(k_tiles):
        stage = step % STAGES
        a, b = pipe.a_ring.index(2 * stage + WARPGROUP), pipe.b_ring.index(stage)
        if not product.A_ROWS:
            a = a.permute((1, 0))
        if not product.B_ROWS:
            b = b.permute((1, 0))
        mbarrier.wait(pipe.full.index(stage), step // STAGES & 1)
        acc = warpgroup_mma(a, b, acc, is_async=True)
        # The pair before has been read when its products are done. Predicates, not branches: a branch between
        # products makes ptxas wait for them there.
        acc = warpgroup_mma_wait(1, deps=[acc])
        mbarrier.arrive(pipe.empty.index((step + STAGES - 1) % STAGES), count=1, pred=k > 0)
        if WARPGROUP == 0:
            mbarrier.arrive(pipe.begun, count=1, pred=k == LEAD)
        step += 1
    return acc, step


@gluon.jit
def finished(acc, pipe, product, step):
    """The accumulator when a tile's products are done, ``step`` steps from the beginning."""
    acc = warpgroup_mma_wait(0, deps=[acc])
    mbarrier.arrive(pipe.empty.index((step - 1) % product.STAGES), count=1)
    return acc


# --- the results


@gluon.jit
def halves(x):
    """The left and right half of a warpgroup's products; no value moves to another thread."""
    HALF: gl.constexpr = x.shape[1] // 2
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HALF, 16])
    left, right = gl.split(gl.permute(gl.reshape(x, (ROWS, 2, HALF)), (0, 2, 1)))
    return (
        gl.convert_layout(left, layout, assert_trivial=True),
        gl.convert_layout(right, layout, assert_trivial=True),
    )


@gluon.jit
def quarters(x):
    """A warpgroup's products, PART columns at a time."""
    left, right = halves(x)
    return halves(left) + halves(right)


@gluon.jit
def inside(row, col, M, N, LAYOUT: gl.constexpr, WIDTH: gl.constexpr = PART):
    """(rows, columns, whether they are inside) of a part of the result."""
    rows = gl.arange(0, ROWS, gl.SliceLayout(1, LAYOUT))[:, None]
    columns = gl.arange(0, WIDTH, gl.SliceLayout(0, LAYOUT))[None, :]
    return rows, columns, (rows < M - row) & (columns < N - col)


@gluon.jit
def load(ptr, row, col, M, N, stride, LAYOUT: gl.constexpr, WIDTH: gl.constexpr = PART):
    """A part of a matrix whose rows are ``stride`` apart."""
    rows, columns, within = inside(row, col, M, N, LAYOUT, WIDTH)
    # int64 for the part's corner alone: within a part offsets stay small, and registers with them
    return gl.load(ptr + (row.to(gl.int64) * stride + col) + (rows * stride + columns), within, other=0.0)


@gluon.jit
def store(ptr, value, row, col, M, N, stride, LAYOUT: gl.constexpr):
    """Store a part of a result whose rows are ``stride`` apart."""
    rows, columns, within = inside(row, col, M, N, LAYOUT, value.shape[1])
    # int64 for the part's corner alone, as in load
    gl.store(ptr + (row.to(gl.int64) * stride + col) + (rows * stride + columns), value, within)


@gluon.jit
def store_tile(
    ptr, acc, row, col, M, N, stride, LAYOUT: gl.constexpr = STORED, BY_ROWS: gl.constexpr = True
):  # fmt: skip
    """Store a warpgroup's tile, PART columns at a time to spare shared memory.

    The result lies by rows, or by columns, which are then ``stride`` apart.
    """
    parts = quarters(acc)
    for i in gl.static_range(4):
        part, first = parts[i].to(ptr.dtype.element_ty), col + i * PART
        if BY_ROWS:
            store(ptr, gl.convert_layout(part, LAYOUT), row, first, M, N, stride, LAYOUT)
        else:
            part = gl.convert_layout(gl.permute(part, (1, 0)), LAYOUT)
            store(ptr, part, first, row, N, M, stride, LAYOUT)
