"""The gradients' products for Hopper, on the pipeline of ``linear.kernels_hopper``.

    dhidden_hopper    dhidden_kernel in half precision, without soft cap and class weights
    dweight_hopper    dweight_kernel, likewise, for one upstream gradient of all tokens

The copy engine fetches exponentials, of which each warpgroup computes ``dy`` in its registers: the left side
of its products, which the matrix unit takes from there. So ``dy`` is never stored. The next step's is
computed while the products of this one run, and between the two the tensor core works for the other
warpgroup. ``dy`` takes one factor a token and tile of words, which ``loss_kernel`` leaves with tokens side by
side.

Sums run upwards over words, or over the tokens of a chunk, in one accumulator.
"""

from gptkern.ops._gluon import fence_async_shared, gl, gluon, mbarrier, warpgroup_mma, warpgroup_mma_wait
from gptkern.ops.linear.kernels_hopper import (
    BLOCK_N,
    PART,
    ROWS,
    SUMS,
    _halves,
    _inside,
    _pipeline,
    _produce,
    _store,
    _turns,
    _work,
)
from gptkern.ops.linear_cross_entropy.kernels import IGNORED
from gptkern.ops.linear_cross_entropy.kernels_hopper import _store_tile

# The left side of products, in registers.
LEFT = gl.constexpr(gl.DotOperandLayout(operand_index=0, parent=SUMS.value, k_width=2))
# A part of a tile as the products leave it: pairs, which fill whole sectors in fp32.
PAIRS = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, PART.value, 16]))


@gluon.jit
def _gradient(e, factor, words, target, spread, label_smoothing, SMOOTHING: gl.constexpr):
    """``dy`` of a part of a tile, in fp32; the arguments broadcast to it, whichever way it lies."""
    dy = e.to(gl.float32) * factor
    dy -= gl.where(words == target, 1.0 - label_smoothing, 0.0)
    if SMOOTHING:
        dy -= spread
    return dy


@gluon.jit
def _multiply(dy, acc, rings, step, STAGES: gl.constexpr):
    """Issue the products of ``dy`` and a step's right side."""
    left_ring, _right_parts, right_ring = rings
    return warpgroup_mma(dy.to(left_ring.dtype), right_ring.index(step % STAGES), acc, is_async=True)


@gluon.jit
def _give_back(barriers, step, STAGES: gl.constexpr):
    """Let the copy engine write a step's pair, whose products are done."""
    mbarrier.arrive(barriers[1].index(step % STAGES), count=1)


# --- the gradient of hidden states


@gluon.jit
def _dhidden_dy(
    rings, barriers, step, k, factor, target, numbers,
    WARPGROUP: gl.constexpr, SMOOTHING: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """A step's ``dy``: 64 tokens by as many words, in half precision."""
    label_smoothing, spread = numbers
    stage = step % STAGES
    mbarrier.wait(barriers[0].index(stage), step // STAGES & 1)
    e = rings[0].index(2 * stage + WARPGROUP).load(LEFT)
    words = k * e.shape[1] + gl.arange(0, e.shape[1], gl.SliceLayout(0, LEFT))
    # Words beyond the vocabulary have weights of 0: what is taken from them here adds nothing.
    dy = _gradient(e, factor[:, None], words[None, :], target[:, None], spread, label_smoothing, SMOOTHING)
    return dy.to(e.dtype)


@gluon.jit
def _dhidden_products(
    acc, rings, barriers, step, turn, row, k_tiles, extents, pointers, numbers,
    WARPGROUP: gl.constexpr, SMOOTHING: gl.constexpr, STAGES: gl.constexpr, BLOCK_K: gl.constexpr,
):  # fmt: skip
    """Issue all products of a tile: (accumulator, its last step); those of the last pair may still run."""
    factor_ptr, word_ptr, _scale_ptr, _dhidden_ptr = pointers
    begun = barriers[2]
    tokens, _width, _vocab = extents
    LEAD: gl.constexpr = STAGES // 2
    rows = gl.minimum(row + gl.arange(0, ROWS, gl.SliceLayout(1, LEFT)), tokens - 1)
    target = gl.load(word_ptr + rows)
    factors = factor_ptr + rows
    factor = gl.load(factors)
    if WARPGROUP == 1:
        mbarrier.wait(begun, turn & 1)
    dy = _dhidden_dy(rings, barriers, step, 0, factor, target, numbers, WARPGROUP, SMOOTHING, STAGES)
    for k in range(1, k_tiles):
        acc = _multiply(dy, acc, rings, step, STAGES)
        # int64: tokens times tiles, as in _note
        factor = gl.load(factors + (k * BLOCK_K // BLOCK_N).to(gl.int64) * tokens)
        newer = _dhidden_dy(
            rings, barriers, step + 1, k, factor, target, numbers, WARPGROUP, SMOOTHING, STAGES
        )
        acc, dy = warpgroup_mma_wait(0, deps=[acc, newer])
        # The copy engine writes after the lanes' loads, of the step after this one as well.
        fence_async_shared()
        _give_back(barriers, step, STAGES)
        if WARPGROUP == 0:
            mbarrier.arrive(begun, count=1, pred=k == LEAD)
        step += 1
    return _multiply(dy, acc, rings, step, STAGES), step


@gluon.jit
def _consume_dhidden(
    rings, barriers, extents, pointers, numbers, stride_s,
    WARPGROUP: gl.constexpr, SMOOTHING: gl.constexpr,
    BLOCK_K: gl.constexpr, STAGES: gl.constexpr, GROUP_M: gl.constexpr,
):  # fmt: skip
    """A consumer warpgroup: 64 tokens of every tile."""
    tokens, width, _vocab = extents
    _factor_ptr, word_ptr, scale_ptr, dhidden_ptr = pointers
    step = 0
    for turn in range(_turns(extents, None, BLOCK_N)):
        row, col, _first, k_tiles, _split = _work(turn, extents, None, BLOCK_N, BLOCK_K, GROUP_M)
        row += WARPGROUP * ROWS
        acc = gl.zeros([ROWS, BLOCK_N], gl.float32, SUMS)
        acc, step = _dhidden_products(
            acc, rings, barriers, step, turn, row, k_tiles, extents, pointers, numbers,
            WARPGROUP, SMOOTHING, STAGES, BLOCK_K,
        )  # fmt: skip
        # The upstream gradient comes while the last products run. An ignored token has none.
        rows = gl.minimum(row + gl.arange(0, ROWS, gl.SliceLayout(1, SUMS)), tokens - 1)
        scale = gl.load(scale_ptr + rows * stride_s).to(gl.float32)
        counted = gl.load(word_ptr + rows) != IGNORED
        acc = warpgroup_mma_wait(0, deps=[acc])
        _give_back(barriers, step, STAGES)
        step += 1
        acc = gl.where(counted[:, None], acc * scale[:, None], 0.0)
        _store_tile(dhidden_ptr, acc, row, col, tokens, width)


@gluon.jit
def dhidden_hopper(
    exp_desc,  # (tokens, n_tiles * 256); tiles of 64 x BLOCK_K
    weight_desc,  # (vocab, width); tiles of BLOCK_K x 256
    factor_ptr,  # (n_tiles, tokens) fp32: what exponentials are multiplied by
    word_ptr,  # (tokens,) int32: the target, or IGNORED
    scale_ptr,  # upstream gradient: element t * stride_s
    dhidden_ptr,  # (tokens, width), contiguous
    tokens,
    vocab,
    width,
    stride_s,
    label_smoothing,
    spread,  # label_smoothing / vocab
    SMOOTHING: gl.constexpr,
    BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP_M: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr,
    PRODUCER_REGISTERS: gl.constexpr,
):
    """The vocabulary is at least STAGES x BLOCK_K, as ``linear_hopper`` has it of K."""
    rings, barriers = _pipeline(exp_desc, weight_desc, BLOCK_K, STAGES, True, False)
    extents = (tokens, width, vocab)
    pointers = (factor_ptr, word_ptr, scale_ptr, dhidden_ptr)
    numbers = (label_smoothing, spread)
    # The kernel's own four warps are the first warpgroup.
    gl.warp_specialize(
        [
            (_consume_dhidden, (rings, barriers, extents, pointers, numbers, stride_s, 0, SMOOTHING,
                                BLOCK_K, STAGES, GROUP_M)),
            (_consume_dhidden, (rings, barriers, extents, pointers, numbers, stride_s, 1, SMOOTHING,
                                BLOCK_K, STAGES, GROUP_M)),
            (_produce, ((exp_desc, weight_desc), rings, barriers, extents,
                        BLOCK_K, STAGES, GROUP_M, True, False, True, None)),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip


# --- the gradients of the weight and the bias


@gluon.jit
def _dweight_dy(
    rings, barriers, step, k, row, tokens, pointers, numbers,
    WARPGROUP: gl.constexpr, SMOOTHING: gl.constexpr, STAGES: gl.constexpr, BLOCK_K: gl.constexpr,
):  # fmt: skip
    """A step's ``dy`` in fp32: 64 words by as many tokens."""
    factor_ptr, word_ptr, _scale_ptr, _dweight_ptr, _dbias_ptr = pointers
    label_smoothing, spread = numbers
    stage = step % STAGES
    at = k * BLOCK_K + gl.arange(0, BLOCK_K, gl.SliceLayout(0, LEFT))
    # int64: tokens times tiles, as in _note
    factor = gl.load(factor_ptr + (row // BLOCK_N).to(gl.int64) * tokens + at, at < tokens, other=0.0)
    target = gl.load(word_ptr + at, at < tokens, other=IGNORED)
    mbarrier.wait(barriers[0].index(stage), step // STAGES & 1)
    e = rings[0].index(2 * stage + WARPGROUP).permute((1, 0)).load(LEFT)
    words = row + gl.arange(0, ROWS, gl.SliceLayout(1, LEFT))
    share = gl.where(target == IGNORED, 0.0, spread)[None, :]
    dy = _gradient(e, factor[None, :], words[:, None], target[None, :], share, label_smoothing, SMOOTHING)
    return dy


@gluon.jit
def _dweight_products(
    acc, dbias, rings, barriers, step, turn, row, k_tiles, extents, pointers, numbers,
    WARPGROUP: gl.constexpr, SMOOTHING: gl.constexpr, STAGES: gl.constexpr, BLOCK_K: gl.constexpr,
):  # fmt: skip
    """Issue all products of a tile: (accumulator, the bias's sums, its last step), as _dhidden_products."""
    begun = barriers[2]
    _vocab, _width, tokens = extents
    dtype: gl.constexpr = rings[0].dtype
    LEAD: gl.constexpr = STAGES // 2
    if WARPGROUP == 1:
        mbarrier.wait(begun, turn & 1)
    newer = _dweight_dy(
        rings, barriers, step, 0, row, tokens, pointers, numbers,
        WARPGROUP, SMOOTHING, STAGES, BLOCK_K,
    )  # fmt: skip
    if pointers[4] is not None:
        dbias += gl.sum(newer, 1)
    dy = newer.to(dtype)
    for k in range(1, k_tiles):
        acc = _multiply(dy, acc, rings, step, STAGES)
        newer = _dweight_dy(
            rings, barriers, step + 1, k, row, tokens, pointers, numbers,
            WARPGROUP, SMOOTHING, STAGES, BLOCK_K,
        )  # fmt: skip
        if pointers[4] is not None:
            dbias += gl.sum(newer, 1)
        acc, dy = warpgroup_mma_wait(0, deps=[acc, newer.to(dtype)])
        # The copy engine writes after the lanes' loads, of the step after this one as well.
        fence_async_shared()
        _give_back(barriers, step, STAGES)
        if WARPGROUP == 0:
            mbarrier.arrive(begun, count=1, pred=k == LEAD)
        step += 1
    return _multiply(dy, acc, rings, step, STAGES), dbias, step


@gluon.jit
def _add_tile(ptr, acc, row, col, M, N, FIRST: gl.constexpr):
    """Add a warpgroup's tile to fp32 sums in rows of N, PART columns at a time; the first chunk stores."""
    left, right = _halves(acc)
    parts = _halves(left) + _halves(right)
    for i in gl.static_range(4):
        part, first = parts[i], col + i * PART
        if not FIRST:
            rows, columns, inside = _inside(row, first, M, N, PAIRS)
            # int64 for the part's corner alone, as in _store
            at = (row.to(gl.int64) * N + first) + (rows * N + columns)
            part += gl.load(ptr + at, inside, other=0.0)
        _store(ptr, part, row, first, M, N, N, PAIRS)


@gluon.jit
def _add_bias(ptr, dbias, row, vocab, first_column, FIRST: gl.constexpr):
    """Add to the bias's sums. The tiles of one block of words have the same: one of them stores."""
    words = row + gl.arange(0, ROWS, gl.SliceLayout(1, LEFT))
    inside = (words < vocab) & first_column
    if not FIRST:
        dbias += gl.load(ptr + words, inside, other=0.0)
    gl.store(ptr + words, dbias, inside)


@gluon.jit
def _consume_dweight(
    rings, barriers, extents, pointers, numbers,
    WARPGROUP: gl.constexpr, SMOOTHING: gl.constexpr, FIRST: gl.constexpr,
    BLOCK_K: gl.constexpr, STAGES: gl.constexpr, GROUP_M: gl.constexpr,
):  # fmt: skip
    """A consumer warpgroup: 64 words of every tile."""
    vocab, width, _tokens = extents
    _factor_ptr, _word_ptr, scale_ptr, dweight_ptr, dbias_ptr = pointers
    step = 0
    for turn in range(_turns(extents, None, BLOCK_N)):
        row, col, _first, k_tiles, _split = _work(turn, extents, None, BLOCK_N, BLOCK_K, GROUP_M)
        row += WARPGROUP * ROWS
        acc = gl.zeros([ROWS, BLOCK_N], gl.float32, SUMS)
        dbias = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, LEFT))
        acc, dbias, step = _dweight_products(
            acc, dbias, rings, barriers, step, turn, row, k_tiles, extents, pointers, numbers,
            WARPGROUP, SMOOTHING, STAGES, BLOCK_K,
        )  # fmt: skip
        acc = warpgroup_mma_wait(0, deps=[acc])
        _give_back(barriers, step, STAGES)
        step += 1
        # Scale after the sum: 1 / tokens would push fp16 gradients below the smallest fp16 number.
        scale = gl.load(scale_ptr).to(gl.float32)
        acc *= scale
        dbias *= scale
        _add_tile(dweight_ptr, acc, row, col, vocab, width, FIRST)
        if dbias_ptr is not None:
            _add_bias(dbias_ptr, dbias, row, vocab, col == 0, FIRST)


@gluon.jit
def dweight_hopper(
    exp_desc,  # (tokens, n_tiles * 256); tiles of BLOCK_K x 64
    hidden_desc,  # (tokens, width); tiles of BLOCK_K x 256
    factor_ptr,  # as in dhidden_hopper
    word_ptr,
    scale_ptr,  # upstream gradient: one number
    dweight_ptr,  # (vocab, width) fp32, contiguous
    dbias_ptr,  # (vocab,) fp32, or None
    tokens,
    vocab,
    width,
    label_smoothing,
    spread,
    SMOOTHING: gl.constexpr,
    FIRST: gl.constexpr,
    BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP_M: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr,
    PRODUCER_REGISTERS: gl.constexpr,
):
    """The tokens are at least STAGES x BLOCK_K, as ``linear_hopper`` has it of K."""
    rings, barriers = _pipeline(exp_desc, hidden_desc, BLOCK_K, STAGES, True, False)
    extents = (vocab, width, tokens)
    pointers = (factor_ptr, word_ptr, scale_ptr, dweight_ptr, dbias_ptr)
    numbers = (label_smoothing, spread)
    gl.warp_specialize(
        [
            (_consume_dweight, (rings, barriers, extents, pointers, numbers, 0, SMOOTHING, FIRST,
                                BLOCK_K, STAGES, GROUP_M)),
            (_consume_dweight, (rings, barriers, extents, pointers, numbers, 1, SMOOTHING, FIRST,
                                BLOCK_K, STAGES, GROUP_M)),
            (_produce, ((exp_desc, hidden_desc), rings, barriers, extents,
                        BLOCK_K, STAGES, GROUP_M, True, False, False, None)),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip
