"""The kernels of ``kernels`` for Hopper: a producer warp and two consumer warpgroups.

    logits_hopper     logits_kernel in half precision, tiles of 256 words; no cap, class weights, accuracy

The maths and the results are those of ``kernels``; the skeleton, its barriers and the order of its products
are those of ``_device_hopper``. A warpgroup owns 64 tokens of a tile of 128 tokens and 256 words. The
tile stays in its registers, where its statistics are computed, while the tensor core works for the other
warpgroup; without gradients nothing of it is stored. A token's statistics are those of its row alone, and the
number of words alone fixes the tiles, so that neither other tokens nor the programs' order show in them.
"""

from typing import Any, NamedTuple

from gptkern.ops._device_hopper import (
    BLOCK_N,
    ROWS,
    SUMS,
    Product,
    finished,
    part_of,
    products,
    run,
    store_tile,
)
from gptkern.ops._gluon import gl, gluon


class Epilogue(NamedTuple):
    """The kernel's arguments beside those of its product."""

    bias_ptr: Any
    targets_ptr: Any
    exp_ptr: Any
    tile_max_ptr: Any
    tile_sum_ptr: Any
    tile_total_ptr: Any
    target_logit_ptr: Any
    KEEP_EXP: Any
    SMOOTHING: Any


@gluon.jit
def _note(ptr, values, row, tile, tokens, n_tiles, inside):
    """Store one number for each token of a tile, where ``inside``."""
    rows = row + gl.arange(0, ROWS, gl.SliceLayout(1, SUMS))
    # int64: tokens times tiles passes 2^31 at 11 M tokens of GPT-2's vocabulary
    gl.store(ptr + rows.to(gl.int64) * n_tiles + tile, values, inside & (rows < tokens))


@gluon.jit
def _finish_logits(z, target, e, row, col, tokens, vocab):
    """The statistics and, for gradients, the exponentials of a warpgroup's logits."""
    columns = gl.arange(0, BLOCK_N, gl.SliceLayout(0, SUMS))
    inside = columns < vocab - col
    tile, n_tiles = col // BLOCK_N, gl.cdiv(vocab, BLOCK_N)
    # The target's logit, in the tile that holds it; ``at`` is the target's column there, or none.
    own = (target >= col) & (target < gl.minimum(col + BLOCK_N, vocab))
    at = gl.where(own, target - col, -1).to(gl.int32)
    hit = gl.sum(gl.where(columns[None, :] == at[:, None], z, 0.0), 1)
    _note(e.target_logit_ptr, hit, row, 0, tokens, 1, own)
    # Statistics of the tile: the sum of logits for smoothing, maximum, sum of exponentials.
    if e.SMOOTHING:
        total = gl.sum(gl.where(inside[None, :], z, 0.0), 1)
        _note(e.tile_total_ptr, total, row, tile, tokens, n_tiles, True)
    z = gl.where(inside[None, :], z, float("-inf"))
    highest = gl.max(z, 1)
    _note(e.tile_max_ptr, highest, row, tile, tokens, n_tiles, True)
    # If a row is all -inf: (-inf) - (-inf) would be NaN.
    z -= gl.where(highest == float("-inf"), 0.0, highest)[:, None]
    z = gl.exp(z)
    _note(e.tile_sum_ptr, gl.sum(z, 1), row, tile, tokens, n_tiles, True)
    if e.KEEP_EXP:
        store_tile(e.exp_ptr, z, row, col, tokens, n_tiles * BLOCK_N, n_tiles * BLOCK_N)


@gluon.jit
def _compute_logits(pipe, product, e, step, turn, WARPGROUP: gl.constexpr):
    """A warpgroup's part of a tile: 64 tokens."""
    tokens, vocab = product.M, product.N
    row, col, k_tiles, _split, acc = part_of(turn, product, WARPGROUP)
    acc, step = products(acc, pipe, product, step, turn, k_tiles, WARPGROUP)
    # Bias and targets come while the last products run.
    bias = None
    if e.bias_ptr is not None:
        columns = gl.arange(0, BLOCK_N, gl.SliceLayout(0, SUMS))
        bias = gl.load(e.bias_ptr + col + columns, columns < vocab - col, other=0.0)
    rows = row + gl.arange(0, ROWS, gl.SliceLayout(1, SUMS))
    target = gl.load(e.targets_ptr + rows, rows < tokens, other=-1)
    acc = finished(acc, pipe, product, step)
    if e.bias_ptr is not None:
        acc += bias.to(gl.float32)[None, :]
    _finish_logits(acc, target, e, row, col, tokens, vocab)
    return step


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
    run(
        (hidden_desc, weight_desc),
        Product(tokens, vocab, width, None, BLOCK_K, STAGES, GROUP_M, True, False, 1),
        _compute_logits,
        Epilogue(
            bias_ptr, targets_ptr, exp_ptr, tile_max_ptr, tile_sum_ptr, tile_total_ptr, target_logit_ptr,
            KEEP_EXP, SMOOTHING,
        ),
        CONSUMER_REGISTERS,
        PRODUCER_REGISTERS,
    )  # fmt: skip
