"""The heads in a tile of a decode product: their outputs, norm, rotary position and place in the cache.

See ``kernels``, whose programs call these functions.
"""

from gptkern.ops._device import rounded_product, to_e4m3
from gptkern.ops._triton import tl, triton


@triton.jit
def lane_places(
    lanes, tile, N: tl.constexpr, BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_TILES: tl.constexpr
):  # fmt: skip
    """The outputs of a tile's lanes as if neighbours were side by side; see ``tile_outputs``."""
    if HEAD_TILES:
        places = tl.where(lanes < HEAD_DIM, tile * HEAD_DIM + lanes, N)
    else:
        places = tile * BLOCK_N + lanes
    return places


@triton.jit
def tile_outputs(
    tile, N: tl.constexpr, BLOCK_N: tl.constexpr, GATED: tl.constexpr, HALVES: tl.constexpr,
    HEAD_DIM: tl.constexpr, HEAD_TILES: tl.constexpr,
):  # fmt: skip
    """The outputs of a tile's lanes; N in a lane that has none.

    Lanes 2 i and 2 i + 1 hold values that meet in the epilogue: GATED, those of the gate and of up; with
    HALVES, the number of elements of each head that are turned, those of a pair of halves. HEAD_TILES: tile h
    is head h.
    """
    places = lane_places(tl.arange(0, BLOCK_N), tile, N, BLOCK_N, HEAD_DIM, HEAD_TILES)
    if GATED:
        places = tl.where(places < N, places // 2 + (places % 2) * (N // 2), N)
    if HALVES:
        element = places % HEAD_DIM
        paired = element // 2 + (element % 2) * (HALVES // 2)
        places = tl.where((element < HALVES) & (places < N), places - element + paired, places)
    return places


@triton.jit
def pair_rows(tile):
    """The even and the odd rows of a tile."""
    pairs = tl.reshape(tile, (tile.shape[0] // 2, 2, tile.shape[1]))
    return tl.split(tl.permute(pairs, (0, 2, 1)))


@triton.jit
def unpair_rows(even, odd):
    """The inverse of ``pair_rows``."""
    return tl.reshape(tl.permute(tl.join(even, odd), (0, 2, 1)), (2 * even.shape[0], even.shape[1]))


@triton.jit
def head_weights(
    outputs, q_weight_ptr, k_weight_ptr, N: tl.constexpr, KV_WIDTH: tl.constexpr, HEAD_DIM: tl.constexpr,
    UNIT_OFFSET: tl.constexpr,
):  # fmt: skip
    """The factors of the RMS norm of a tile that is one head."""
    KEYS: tl.constexpr = N - 2 * KV_WIDTH
    element = outputs % HEAD_DIM
    of_keys = (outputs >= KEYS) & (outputs < N - KV_WIDTH)
    weight = tl.load(q_weight_ptr + element, mask=outputs < KEYS, other=0.0).to(tl.float32)
    weight += tl.load(k_weight_ptr + element, mask=of_keys, other=0.0).to(tl.float32)
    if UNIT_OFFSET:
        weight += 1.0
    return weight


@triton.jit
def norm_heads(
    acc, outputs, weight, eps, N: tl.constexpr, KV_WIDTH: tl.constexpr, HEAD_DIM: tl.constexpr
):  # fmt: skip
    """The RMS norm of a tile that is one head, unless it is of the values."""
    VALUES: tl.constexpr = N - KV_WIDTH
    rstd = tl.rsqrt(tl.sum(rounded_product(acc, acc), 0) / HEAD_DIM + eps)
    return tl.where((outputs < VALUES)[:, None], acc * rstd[None, :] * weight[:, None], acc)


@triton.jit
def pair_angles(
    tile, cos_ptr, sin_ptr, lens_ptr, context, numbers, row_mask,
    N: tl.constexpr, KV_WIDTH: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr,
    HEAD_TILES: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """(cos, sin) of the pairs in a tile: 1 and 0 where nothing turns, NaN at a position beyond the tables.

    The two elements of a pair are in lanes 2 i and 2 i + 1 (see ``tile_outputs``).
    """
    places = lane_places(2 * tl.arange(0, BLOCK_N // 2), tile, N, BLOCK_N, HEAD_DIM, HEAD_TILES)
    element = places % HEAD_DIM
    turned = ((element < DIM) & (places < N - KV_WIDTH))[:, None]
    position = tl.load(lens_ptr + numbers, mask=row_mask, other=1).to(tl.int64)[None, :] - 1
    known = turned & (position >= 0) & (position < context)
    at = position * (DIM // 2) + (element // 2)[:, None]
    # A padding row has no position: it is not turned.
    cos = tl.load(cos_ptr + at, mask=known, other=1.0)
    sin = tl.load(sin_ptr + at, mask=known, other=0.0)
    return tl.where(turned & (position >= context), float("nan"), cos), sin


@triton.jit
def turn_heads(acc, cos, sin):
    """Turn the pairs of queries and keys in a tile by their angles."""
    first, second = pair_rows(acc)
    return unpair_rows(first * cos - second * sin, second * cos + first * sin)


@triton.jit
def store_kv(
    result, cache, slots, column, mask, KV_WIDTH: tl.constexpr, HEAD_DIM: tl.constexpr
):  # fmt: skip
    """Write the keys and values in ``result`` (outputs, rows) to the rows' slots; column 0 is key 0.

    ``cache`` is (k, v, k_scale, v_scale) pointers, page size and count, and strides of page and slot of k and
    of v. A slot that the cache does not have is not written.
    """
    (
        k_cache_ptr, v_cache_ptr, k_scale_ptr, v_scale_ptr, page_size, page_count,
        stride_kp, stride_ks, stride_vp, stride_vs,
    ) = cache  # fmt: skip
    pages, offsets = slots // page_size, slots % page_size
    mask = mask & ((slots >= 0) & (pages < page_count))[None, :] & (column >= 0)
    # Keys.
    k_at = (pages * stride_kp + offsets * stride_ks)[None, :] + column
    k_mask, k = mask & (column < KV_WIDTH), result
    if k_scale_ptr is not None:
        head = tl.minimum(tl.maximum(column, 0), KV_WIDTH - 1) // HEAD_DIM
        k = to_e4m3(result, tl.load(k_scale_ptr + head))
    tl.store(k_cache_ptr + k_at, k, mask=k_mask)
    # Values.
    column -= KV_WIDTH
    v_at = (pages * stride_vp + offsets * stride_vs)[None, :] + column
    v_mask, v = mask & (column >= 0), result
    if k_scale_ptr is not None:
        head = tl.minimum(tl.maximum(column, 0), KV_WIDTH - 1) // HEAD_DIM
        v = to_e4m3(result, tl.load(v_scale_ptr + head))
    tl.store(v_cache_ptr + v_at, v, mask=v_mask)
