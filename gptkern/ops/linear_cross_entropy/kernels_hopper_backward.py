"""The gradients' products for Hopper, on the pipeline of ``_device_hopper``.

    dhidden_hopper    dhidden_kernel in half precision, without soft cap and class weights
    dweight_hopper    dweight_kernel, likewise, for one upstream gradient of all tokens

The copy engine fetches exponentials, of which each warpgroup computes ``dy`` in its registers: the left side
of its products, which the matrix unit takes from there. So ``dy`` is never stored. The next step's is
computed while the products of this one run, and between the two the tensor core works for the other
warpgroup. ``dy`` takes one factor a token and tile of words, which ``loss_kernel`` leaves with tokens side by
side.

Sums run upwards over words, or over the tokens of a chunk, in one accumulator.
"""

from typing import Any, NamedTuple

from gptkern.ops._device_hopper import (
    BLOCK_N,
    PART,
    ROWS,
    SUMS,
    Product,
    finished,
    load,
    part_of,
    quarters,
    run,
    store,
    store_tile,
)
from gptkern.ops._gluon import fence_async_shared, gl, gluon, mbarrier, warpgroup_mma, warpgroup_mma_wait
from gptkern.ops.linear_cross_entropy.kernels import IGNORED

# The left side of products, in registers.
LEFT = gl.constexpr(gl.DotOperandLayout(operand_index=0, parent=SUMS.value, k_width=2))
# A part of a tile as the products leave it: pairs, which fill whole sectors in fp32.
PAIRS = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, PART.value, 16]))


class Epilogue(NamedTuple):
    """Arguments of either kernel beside those of its product; None in place of what the other has."""

    factor_ptr: Any
    word_ptr: Any
    scale_ptr: Any
    out_ptr: Any
    dbias_ptr: Any
    label_smoothing: Any
    spread: Any
    stride_s: Any
    SMOOTHING: Any
    FIRST: Any


# --- products whose left side is computed


@gluon.jit
def _gradient(loaded, pipe, product, e, step, k, row, WARPGROUP: gl.constexpr):
    """A step's ``dy`` in fp32: 64 tokens by words if exponentials are read by rows, or 64 words by tokens."""
    factor, target = loaded
    stage = step % product.STAGES
    mbarrier.wait(pipe.full.index(stage), step // product.STAGES & 1)
    exp = pipe.a_ring.index(2 * stage + WARPGROUP)
    if product.A_ROWS:
        exp = exp.load(LEFT)
        words = (k * product.BLOCK_K + gl.arange(0, product.BLOCK_K, gl.SliceLayout(0, LEFT)))[None, :]
        # Words beyond the vocabulary have weights of 0: what is taken from them here adds nothing.
        factor, target, share = factor[:, None], target[:, None], e.spread
    else:
        exp = exp.permute((1, 0)).load(LEFT)
        words = (row + gl.arange(0, ROWS, gl.SliceLayout(1, LEFT)))[:, None]
        share = gl.where(target == IGNORED, 0.0, e.spread)[None, :]
        factor, target = factor[None, :], target[None, :]
    dy = exp.to(gl.float32) * factor
    dy -= gl.where(words == target, 1.0 - e.label_smoothing, 0.0)
    if e.SMOOTHING:
        dy -= share
    return dy


@gluon.jit
def _multiply(dy, acc, pipe, product, step):
    """Issue the products of ``dy`` and a step's right side."""
    return warpgroup_mma(dy, pipe.b_ring.index(step % product.STAGES), acc, is_async=True)


@gluon.jit
def _products(
    acc, pipe, product, e, step, turn, row, k_tiles, load_step: gl.constexpr, sources,
    WARPGROUP: gl.constexpr,
):  # fmt: skip
    """Issue all products of a tile: (accumulator, row sums of ``dy`` with ``dbias_ptr``, steps so far).

    Those of the last pair may still run. ``load_step(k, product, sources)``: a step's factors and targets.
    """
    dtype: gl.constexpr = pipe.a_ring.dtype
    LEAD: gl.constexpr = product.STAGES // 2
    sums = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, LEFT))
    loaded = load_step(gl.to_tensor(0), product, sources)
    if WARPGROUP == 1:
        mbarrier.wait(pipe.begun, turn & 1)
    newer = _gradient(loaded, pipe, product, e, step, 0, row, WARPGROUP)
    if e.dbias_ptr is not None:
        sums += gl.sum(newer, 1)
    dy = newer.to(dtype)
    for k in range(1, k_tiles):
        acc = _multiply(dy, acc, pipe, product, step)
        loaded = load_step(k, product, sources)
        newer = _gradient(loaded, pipe, product, e, step + 1, k, row, WARPGROUP)
        if e.dbias_ptr is not None:
            sums += gl.sum(newer, 1)
        acc, dy = warpgroup_mma_wait(0, deps=[acc, newer.to(dtype)])
        # The copy engine writes after the lanes' loads, of the step after this one as well.
        fence_async_shared()
        mbarrier.arrive(pipe.empty.index(step % product.STAGES), count=1)
        if WARPGROUP == 0:
            mbarrier.arrive(pipe.begun, count=1, pred=k == LEAD)
        step += 1
    return _multiply(dy, acc, pipe, product, step), sums, step + 1


# --- the gradient of hidden states


@gluon.jit
def _load_factors(k, product, sources):
    """(factors, targets) of the rows' tokens: the factors of the tile that a step's words are in."""
    factors, target = sources
    # int64: tokens times tiles, as in _note
    return gl.load(factors + (k * product.BLOCK_K // BLOCK_N).to(gl.int64) * product.M), target


@gluon.jit
def _compute_dhidden(pipe, product, e, step, turn, WARPGROUP: gl.constexpr):
    """A warpgroup's part of a tile: 64 tokens."""
    tokens, width = product.M, product.N
    row, col, k_tiles, _split, acc = part_of(turn, product, WARPGROUP)
    rows = gl.minimum(row + gl.arange(0, ROWS, gl.SliceLayout(1, LEFT)), tokens - 1)
    sources = (e.factor_ptr + rows, gl.load(e.word_ptr + rows))
    acc, _sums, step = _products(
        acc, pipe, product, e, step, turn, row, k_tiles, _load_factors, sources, WARPGROUP
    )  # fmt: skip
    # The upstream gradient comes while the last products run. An ignored token has none.
    rows = gl.minimum(row + gl.arange(0, ROWS, gl.SliceLayout(1, SUMS)), tokens - 1)
    scale = gl.load(e.scale_ptr + rows * e.stride_s).to(gl.float32)
    counted = gl.load(e.word_ptr + rows) != IGNORED
    acc = finished(acc, pipe, product, step)
    acc = gl.where(counted[:, None], acc * scale[:, None], 0.0)
    store_tile(e.out_ptr, acc, row, col, tokens, width, width)
    return step


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
    run(
        (exp_desc, weight_desc),
        Product(tokens, width, vocab, None, BLOCK_K, STAGES, GROUP_M, True, True, 1),
        _compute_dhidden,
        Epilogue(
            factor_ptr, word_ptr, scale_ptr, dhidden_ptr, None, label_smoothing, spread, stride_s,
            SMOOTHING, True,
        ),
        CONSUMER_REGISTERS,
        PRODUCER_REGISTERS,
    )  # fmt: skip


# --- the gradients of the weight and the bias


@gluon.jit
def _load_tokens(k, product, sources):
    """(factors, targets) of a step's tokens."""
    factors, word_ptr = sources
    at = k * product.BLOCK_K + gl.arange(0, product.BLOCK_K, gl.SliceLayout(0, LEFT))
    factor = gl.load(factors + at, at < product.K, other=0.0)
    return factor, gl.load(word_ptr + at, at < product.K, other=IGNORED)


@gluon.jit
def _add_tile(ptr, acc, row, col, M, N, FIRST: gl.constexpr):
    """Add a warpgroup's tile to fp32 sums in rows of N, PART columns at a time; the first chunk stores."""
    parts = quarters(acc)
    for i in gl.static_range(4):
        part, first = parts[i], col + i * PART
        if not FIRST:
            part += load(ptr, row, first, M, N, N, PAIRS)
        store(ptr, part, row, first, M, N, N, PAIRS)


@gluon.jit
def _add_bias(ptr, dbias, row, vocab, first_column, FIRST: gl.constexpr):
    """Add to the bias's sums. The tiles of one block of words have the same: one of them stores."""
    words = row + gl.arange(0, ROWS, gl.SliceLayout(1, LEFT))
    inside = (words < vocab) & first_column
    if not FIRST:
        dbias += gl.load(ptr + words, inside, other=0.0)
    gl.store(ptr + words, dbias, inside)


@gluon.jit
def _compute_dweight(pipe, product, e, step, turn, WARPGROUP: gl.constexpr):
    """A warpgroup's part of a tile: 64 words."""
    vocab, width = product.M, product.N
    row, col, k_tiles, _split, acc = part_of(turn, product, WARPGROUP)
    # int64: tokens times tiles, as in _note
    sources = (e.factor_ptr + (row // BLOCK_N).to(gl.int64) * product.K, e.word_ptr)
    acc, dbias, step = _products(
        acc, pipe, product, e, step, turn, row, k_tiles, _load_tokens, sources, WARPGROUP
    )  # fmt: skip
    acc = finished(acc, pipe, product, step)
    # Scale after the sum: 1 / tokens would push fp16 gradients below the smallest fp16 number.
    scale = gl.load(e.scale_ptr).to(gl.float32)
    acc *= scale
    dbias *= scale
    _add_tile(e.out_ptr, acc, row, col, vocab, width, e.FIRST)
    if e.dbias_ptr is not None:
        _add_bias(e.dbias_ptr, dbias, row, vocab, col == 0, e.FIRST)
    return step


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
    run(
        (exp_desc, hidden_desc),
        Product(vocab, width, tokens, None, BLOCK_K, STAGES, GROUP_M, False, True, 1),
        _compute_dweight,
        Epilogue(
            factor_ptr, word_ptr, scale_ptr, dweight_ptr, dbias_ptr, label_smoothing, spread, None,
            SMOOTHING, FIRST,
        ),
        CONSUMER_REGISTERS,
        PRODUCER_REGISTERS,
    )  # fmt: skip
