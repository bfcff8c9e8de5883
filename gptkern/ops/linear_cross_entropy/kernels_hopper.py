"""The kernels of ``kernels`` for Hopper: a producer warp and two consumer warpgroups.

    logits_hopper     logits_kernel in half precision, tiles of 256 words; no cap, class weights, accuracy

The maths and the results are those of ``kernels``; the skeleton, its barriers and the order of its products
are those of ``linear.kernels_hopper``. A warpgroup owns 64 tokens of a tile of 128 tokens and 256 words. The
tile stays in its registers, where its statistics are computed, while the tensor core works for the other
warpgroup; without gradients nothing of it is stored. A token's statistics are those of its row alone, and the
number of words alone fixes the tiles, so that neither other tokens nor the programs' order show in them.
"""

from gptkern.ops._gluon import gl, gluon, mbarrier, warpgroup_mma_wait
from gptkern.ops.linear.kernels_hopper import (
    BLOCK_N,
    PART,
    ROWS,
    STORED,
    SUMS,
    _halves,
    _pipeline,
    _produce,
    _products,
    _store,
    _turns,
    _work,
)


@gluon.jit
def _note(ptr, values, row, tile, tokens, n_tiles, inside):
    """Store one number for each token of a tile, where ``inside``."""
    rows = row + gl.arange(0, ROWS, gl.SliceLayout(1, SUMS))
    # int64: tokens times tiles passes 2^31 at 11 M tokens of GPT-2's vocabulary
    gl.store(ptr + rows.to(gl.int64) * n_tiles + tile, values, inside & (rows < tokens))


@gluon.jit
def _store_tile(ptr, tile, row, col, M, N):
    """Store a warpgroup's tile in rows of N, PART columns at a time to spare shared memory."""
    left, right = _halves(tile)
    parts = _halves(left) + _halves(right)
    for i in gl.static_range(4):
        part = gl.convert_layout(parts[i].to(ptr.dtype.element_ty), STORED)
        _store(ptr, part, row, col + i * PART, M, N, N, STORED)


# --- logits


@gluon.jit
def _finish_logits(
    z, target, row, col, extents, pointers,
    KEEP_EXP: gl.constexpr, SMOOTHING: gl.constexpr,
):  # fmt: skip
    """The statistics and, for gradients, the exponentials of a warpgroup's logits."""
    tokens, vocab, _width = extents
    (
        _bias_ptr, _targets_ptr, exp_ptr, tile_max_ptr, tile_sum_ptr, tile_total_ptr,
        target_logit_ptr,
    ) = pointers  # fmt: skip
    columns = gl.arange(0, BLOCK_N, gl.SliceLayout(0, SUMS))
    inside = columns < vocab - col
    tile, n_tiles = col // BLOCK_N, gl.cdiv(vocab, BLOCK_N)
    # The target's logit, in the tile that holds it; ``at`` is the target's column there, or none.
    own = (target >= col) & (target < gl.minimum(col + BLOCK_N, vocab))
    at = gl.where(own, target - col, -1).to(gl.int32)
    hit = gl.sum(gl.where(columns[None, :] == at[:, None], z, 0.0), 1)
    _note(target_logit_ptr, hit, row, 0, tokens, 1, own)
    # Statistics of the tile: the sum of logits for smoothing, maximum, sum of exponentials.
    if SMOOTHING:
        total = gl.sum(gl.where(inside[None, :], z, 0.0), 1)
        _note(tile_total_ptr, total, row, tile, tokens, n_tiles, True)
    z = gl.where(inside[None, :], z, float("-inf"))
    highest = gl.max(z, 1)
    _note(tile_max_ptr, highest, row, tile, tokens, n_tiles, True)
    # If a row is all -inf: (-inf) - (-inf) would be NaN.
    z -= gl.where(highest == float("-inf"), 0.0, highest)[:, None]
    e = gl.exp(z)
    _note(tile_sum_ptr, gl.sum(e, 1), row, tile, tokens, n_tiles, True)
    if KEEP_EXP:
        _store_tile(exp_ptr, e, row, col, tokens, n_tiles * BLOCK_N)


@gluon.jit
def _consume_logits(
    rings, barriers, extents, pointers,
    WARPGROUP: gl.constexpr, KEEP_EXP: gl.constexpr, SMOOTHING: gl.constexpr,
    BLOCK_K: gl.constexpr, STAGES: gl.constexpr, GROUP_M: gl.constexpr,
):  # fmt: skip
    """A consumer warpgroup: 64 tokens of every tile."""
    tokens, vocab, _width = extents
    bias_ptr, targets_ptr = pointers[0], pointers[1]
    _full, empty, _begun = barriers
    step = 0
    for turn in range(_turns(extents, None, BLOCK_N)):
        row, col, _first, k_tiles, _split = _work(turn, extents, None, BLOCK_N, BLOCK_K, GROUP_M)
        row += WARPGROUP * ROWS
        acc = gl.zeros([ROWS, BLOCK_N], gl.float32, SUMS)
        acc, step = _products(acc, rings, barriers, step, turn, k_tiles, WARPGROUP, STAGES, False)
        # Bias and targets come while the last products run.
        bias = None
        if bias_ptr is not None:
            columns = gl.arange(0, BLOCK_N, gl.SliceLayout(0, SUMS))
            bias = gl.load(bias_ptr + col + columns, columns < vocab - col, other=0.0)
        rows = row + gl.arange(0, ROWS, gl.SliceLayout(1, SUMS))
        target = gl.load(targets_ptr + rows, rows < tokens, other=-1)
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(empty.index((step - 1) % STAGES), count=1)
        if bias_ptr is not None:
            acc += bias.to(gl.float32)[None, :]
        _finish_logits(acc, target, row, col, extents, pointers, KEEP_EXP, SMOOTHING)


@gluon.jit
def logits_hopper(
    hidden_desc,  # (tokens, width); tiles of 64 x BLOCK_K
    weight_desc,  # (vocab, width); tiles of 256 x BLOCK_K
    bias_ptr,  # (vocab,), or None
    targets_ptr,  # (tokens,)
    exp_ptr,  # (tokens, n_tiles * 256): exp(z - tile maximum)
    tile_max_ptr,  # (tokens, n_tiles)
    tile_sum_ptr,  # (tokens, n_tiles): sum of exp(z - tile maximum)
    tile_total_ptr,  # (tokens, n_tiles): sum of z
    target_logit_ptr,  # (tokens,)
    tokens,
    vocab,
    width,
    KEEP_EXP: gl.constexpr,
    SMOOTHING: gl.constexpr,
    BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP_M: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr,
    PRODUCER_REGISTERS: gl.constexpr,
):
    """The width is at least STAGES x BLOCK_K, as ``linear_hopper`` has it of K."""
    rings, barriers = _pipeline(hidden_desc, weight_desc, BLOCK_K, STAGES, False, False)
    extents = (tokens, vocab, width)
    pointers = (
        bias_ptr, targets_ptr, exp_ptr, tile_max_ptr, tile_sum_ptr, tile_total_ptr,
        target_logit_ptr,
    )  # fmt: skip
    # The kernel's own four warps are the first warpgroup.
    gl.warp_specialize(
        [
            (_consume_logits, (rings, barriers, extents, pointers, 0,
                               KEEP_EXP, SMOOTHING, BLOCK_K, STAGES, GROUP_M)),
            (_consume_logits, (rings, barriers, extents, pointers, 1,
                               KEEP_EXP, SMOOTHING, BLOCK_K, STAGES, GROUP_M)),
            (_produce, ((hidden_desc, weight_desc), rings, barriers, extents,
                        BLOCK_K, STAGES, GROUP_M, False, False, True, None)),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip
