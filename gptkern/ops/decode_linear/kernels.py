"""Linear layers of one decode step: few rows, so that the time is that of reading the weights once.

    out = activation(norm(x) weight^T + bias) + residual

Gated: out_i = activation(y_i) y_(i + N / 2). Queries and keys: each head's RMS norm, then its rotary
position, before they are rounded; keys and values go to the cache.

Layout: grid (output tiles, SPLIT_K, row blocks). One program owns BLOCK_N outputs of BLOCK_R rows over
one of SPLIT_K equal ranges of K. Weights are the wide side of the matrix unit's tile and rows the
narrow one, so that 1 row and 16 cost the same. Where SPLIT_K > 1 partial sums go through memory and the
last program of a tile adds them up in order. Every weight is read once per row block of up to 64 rows.

A row's bits do not depend on its neighbours: BLOCK_N, BLOCK_K, SPLIT_K and BLOCK_S follow from the
layer's shape and dtype, BLOCK_R alone from the number of rows, and it only says how many rows go side by
side through the same sums over k.

A tile's outputs need not be neighbours in the weight: those that meet in the epilogue lie side by side in the
tile, the gate and up of a hidden value, or the two elements of a rotary pair. Weights stay as the checkpoint
has them, as each output's row is read whole in any order. Where heads are normalised a tile is one whole
head, so that its sum of squares needs no other program: BLOCK_N is head_dim's power of two.

With programmatic dependent launch a program fetches its weights into L2 before it waits for x.
"""

from gptkern.ops._device import activate, tanh
from gptkern.ops._pdl import prefetch, wait
from gptkern.ops._triton import tl, triton
from gptkern.ops.decode_linear.kernels_heads import (
    head_weights,
    norm_heads,
    pair_angles,
    pair_rows,
    store_kv,
    tile_outputs,
    turn_heads,
)


@triton.jit
def row_columns(x_ptr, rows, row_mask, start, K: tl.constexpr, BLOCK_S: tl.constexpr):
    """(BLOCK_S columns of whole rows in fp32, which of them there are)."""
    columns = start + tl.arange(0, BLOCK_S)
    inside = (columns < K)[None, :]
    x = tl.load(x_ptr + rows[:, None] + columns[None, :], mask=row_mask[:, None] & inside, other=0.0)
    return x.to(tl.float32), inside


@triton.jit
def row_moments(
    x_ptr, rows, row_mask, eps, K: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr,
    CENTERED: tl.constexpr = True,
):  # fmt: skip
    """(mean, 1 / standard deviation) of whole rows.

    The mean first, then the squares of what is left without it: no cancellation where the mean is large.
    Lanes add up every BLOCK_S-th column and meet once a sum. The loads of PARTS blocks, as many as registers
    hold, are under way at once; those of the second pass are of lines that the first has read.
    Without CENTERED the mean is taken to be 0 (RMS norm).
    """
    BLOCKS: tl.constexpr = (K + BLOCK_S - 1) // BLOCK_S
    PARTS: tl.constexpr = min(128 // BLOCK_R, BLOCKS)
    mean = tl.zeros([BLOCK_R], tl.float32)
    if CENTERED:
        sums = tl.zeros([BLOCK_R, BLOCK_S], tl.float32)
        for start in tl.range(0, K, PARTS * BLOCK_S):
            for part in tl.static_range(PARTS):
                x, inside = row_columns(x_ptr, rows, row_mask, start + part * BLOCK_S, K, BLOCK_S)
                sums += x
        mean = tl.sum(sums, 1) / K
    squares = tl.zeros([BLOCK_R, BLOCK_S], tl.float32)
    for start in tl.range(0, K, PARTS * BLOCK_S):
        for part in tl.static_range(PARTS):
            x, inside = row_columns(x_ptr, rows, row_mask, start + part * BLOCK_S, K, BLOCK_S)
            centred = tl.where(inside, x - mean[:, None], 0.0)
            # A multiply-add of its own: see ``rounded_product``.
            squares = tl.fma(centred, centred, squares)
    return mean, tl.rsqrt(tl.sum(squares, 1) / K + eps)


@triton.jit
def part_columns(start, BLOCK_K: tl.constexpr, PARTS: tl.constexpr, WIDTH: tl.constexpr):
    """``(PARTS, WIDTH)``: the first WIDTH columns of each of the PARTS equal parts of a block.

    Of one part ``(WIDTH,)``: a product with an axis for it would be the same one in every warp.
    """
    columns = start + tl.arange(0, WIDTH)
    if PARTS > 1:
        columns = columns[None, :] + tl.arange(0, PARTS)[:, None] * (BLOCK_K // PARTS)
    return columns


@triton.jit
def empty_sums(BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, PARTS: tl.constexpr):
    """Zeros, ``(PARTS, BLOCK_N, BLOCK_R)``, of one part ``(BLOCK_N, BLOCK_R)``."""
    if PARTS > 1:
        acc = tl.zeros([PARTS, BLOCK_N, BLOCK_R], tl.float32)
    else:
        acc = tl.zeros([BLOCK_N, BLOCK_R], tl.float32)
    return acc


@triton.jit
def load_rows(
    x_ptr, norm, rows, row_mask, columns, moments, store_normed, K: tl.constexpr,
    UNIT_OFFSET: tl.constexpr = False,
):  # fmt: skip
    """``(PARTS, columns, BLOCK_R)`` of x, or of its norm: ``norm`` is (weight, bias, normed_out) or Nones.

    The norm's weight and bias come with x's loads, asynchronously: of 256 columns, 4 bytes for each of a
    block's threads, the fewest that such a copy takes.
    """
    norm_weight_ptr, norm_bias_ptr, normed_ptr = norm
    inside = columns < K
    at = tl.expand_dims(columns, -1) + rows
    mask = tl.expand_dims(inside, -1) & row_mask
    x = tl.load(x_ptr + at, mask=mask, other=0.0)
    if norm_weight_ptr is not None:
        mean, rstd = moments
        scale = tl.load(norm_weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
        if UNIT_OFFSET:
            scale += 1.0
        normed = (x.to(tl.float32) - mean) * rstd * tl.expand_dims(scale, -1)
        if norm_bias_ptr is not None:
            shift = tl.load(norm_bias_ptr + columns, mask=inside, other=0.0).to(tl.float32)
            normed += tl.expand_dims(shift, -1)
        x = normed.to(x_ptr.dtype.element_ty)
        if normed_ptr is not None:
            tl.store(normed_ptr + at, x, mask=mask & store_normed)
    return x


@triton.jit
def sum_parts(acc, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, PARTS: tl.constexpr):
    """``(BLOCK_N, BLOCK_R)``: the sum of ``(PARTS, BLOCK_N, BLOCK_R)``, neighbours first.

    The parts of an element meet in one thread: one exchange through shared memory, and an order that no
    layout changes.
    """
    tl.static_assert(PARTS == 1 or PARTS == 2 or PARTS == 4)
    if PARTS == 4:
        first, second = tl.split(tl.permute(tl.reshape(acc, (2, 2, BLOCK_N, BLOCK_R)), (2, 3, 0, 1)))
        first, second = tl.split(first + second)
        total = first + second
    elif PARTS == 2:
        first, second = tl.split(tl.permute(acc, (1, 2, 0)))
        total = first + second
    else:
        total = acc
    return total


@triton.jit
def product(
    x_ptr, weight_ptr, norm, rows, row_mask, outputs, k_begin, k_end, moments, stride_weight, store_normed,
    N: tl.constexpr, K: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PARTS: tl.constexpr, UNIT_OFFSET: tl.constexpr = False,
):  # fmt: skip
    """``(PARTS, BLOCK_N, BLOCK_R)`` fp32: weight norm(x)^T over columns k_begin to k_end, by their parts.

    Weights of fewer bits than x's are widened without their scales: the caller scales the sums.
    """
    acc = empty_sums(BLOCK_N, BLOCK_R, PARTS)
    # int64: a head of 128k outputs and 16k columns passes 2^31.
    weight_rows = (outputs.to(tl.int64) * stride_weight)[:, None]
    for start in tl.range(k_begin, k_end, BLOCK_K):
        # A tile of weights, the same columns of x, their product.
        columns = part_columns(start, BLOCK_K, PARTS, BLOCK_K // PARTS)
        mask = (outputs < N)[:, None] & tl.expand_dims(columns < K, -2)
        weight = tl.load(weight_ptr + weight_rows + tl.expand_dims(columns, -2), mask=mask, other=0.0)
        x = load_rows(x_ptr, norm, rows, row_mask, columns, moments, store_normed, K, UNIT_OFFSET)
        acc = tl.dot(weight.to(x.dtype), x, acc, input_precision="ieee")
    return acc


@triton.jit
def product_int4(
    x_ptr, weight_ptr, packing, norm, rows, row_mask, outputs, k_begin, k_end, moments, store_normed,
    N: tl.constexpr, K: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr,
    PARTS: tl.constexpr, UNIT_OFFSET: tl.constexpr = False,
):  # fmt: skip
    """``product`` of int4 weights, a group of columns a part; ``packing`` is (scale, minimum) pointers.

    A byte holds one column of each half of its group. Without minimums codes less 8 are exact in every dtype,
    and the sums are scaled. With them weights are rounded to x's dtype, as the reference rounds them: sums of
    x by group, for minimums apart from the codes, would take as many products again.
    """
    scale_ptr, minimum_ptr = packing
    acc = empty_sums(BLOCK_N, BLOCK_R, PARTS)
    HALF: tl.constexpr = GROUP // 2
    weight_rows = (outputs.to(tl.int64) * (K // 2))[:, None]
    scale_rows = outputs.to(tl.int64) * (K // GROUP)
    for start in tl.range(k_begin, k_end, PARTS * GROUP):
        # The groups' packed weights, their scales and their minimums.
        groups = start // GROUP
        if PARTS > 1:
            groups += tl.arange(0, PARTS)[:, None]
        mask = (outputs < N) & (groups < K // GROUP)
        places = part_columns(start // 2, PARTS * HALF, PARTS, HALF)
        packed_at = weight_rows + tl.expand_dims(places, -2)
        packed = tl.load(weight_ptr + packed_at, mask=tl.expand_dims(mask, -1), other=0)
        scale = tl.load(scale_ptr + scale_rows + groups, mask=mask, other=0.0).to(tl.float32)
        scale = tl.expand_dims(scale, -1)
        # x's columns of the low and of the high halves of the bytes.
        columns = part_columns(start, PARTS * GROUP, PARTS, HALF)
        low = load_rows(x_ptr, norm, rows, row_mask, columns, moments, store_normed, K, UNIT_OFFSET)
        high = load_rows(
            x_ptr, norm, rows, row_mask, columns + HALF, moments, store_normed, K, UNIT_OFFSET
        )  # fmt: skip
        first, second = (packed & 15).to(tl.float32), (packed >> 4).to(tl.float32)
        if minimum_ptr is None:
            part = tl.dot((first - 8.0).to(low.dtype), low, input_precision="ieee")
            part = tl.dot((second - 8.0).to(low.dtype), high, part, input_precision="ieee")
            acc += part * scale
        else:
            least = tl.load(minimum_ptr + scale_rows + groups, mask=mask, other=0.0).to(tl.float32)
            least = tl.expand_dims(least, -1)
            acc = tl.dot(tl.fma(first, scale, least).to(low.dtype), low, acc, input_precision="ieee")
            acc = tl.dot(tl.fma(second, scale, least).to(low.dtype), high, acc, input_precision="ieee")
    return acc


@triton.jit
def sum_splits(
    acc, partial_ptr, counter_ptr, split,
    BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, SPLIT_K: tl.constexpr,
):  # fmt: skip
    """(sum of all splits, whether this program is the tile's last one and has it)."""
    if SPLIT_K == 1:
        last = True
    else:
        places = tl.arange(0, BLOCK_N)[:, None] * BLOCK_R + tl.arange(0, BLOCK_R)[None, :]
        tl.store(partial_ptr + split * (BLOCK_N * BLOCK_R) + places, acc)
        # Every thread's stores come before the one thread's release.
        tl.debug_barrier()
        last = tl.atomic_add(counter_ptr, 1, sem="acq_rel") == SPLIT_K - 1
        if last:
            tl.store(counter_ptr, 0)
            acc = tl.zeros([BLOCK_N, BLOCK_R], tl.float32)
            for part in range(SPLIT_K):
                # .cg: other programs wrote these, so a line in this multiprocessor's L1 would be stale.
                acc += tl.load(partial_ptr + part * (BLOCK_N * BLOCK_R) + places, cache_modifier=".cg")
    return acc, last


@triton.jit
def split_columns(split, K: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT_K: tl.constexpr):
    """(first column, end) of one of SPLIT_K ranges of whole blocks."""
    SPAN: tl.constexpr = (K + SPLIT_K * BLOCK_K - 1) // (SPLIT_K * BLOCK_K) * BLOCK_K
    return split * SPAN, tl.minimum(split * SPAN + SPAN, K)


@triton.jit
def prefetch_weights(
    weight_ptr, stride_weight, tile, split,
    N: tl.constexpr, K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT_K: tl.constexpr,
    GROUP: tl.constexpr, FETCH_K: tl.constexpr, COMPILED: tl.constexpr, GATED: tl.constexpr = False,
    HALVES: tl.constexpr = 0, HEAD_DIM: tl.constexpr = 1, HEAD_TILES: tl.constexpr = False,
):  # fmt: skip
    """Fetch the weights of a tile's split into L2, of its first FETCH_K columns."""
    LINE: tl.constexpr = 1024 // weight_ptr.dtype.element_ty.primitive_bitwidth
    PACKED: tl.constexpr = 2 if GROUP else 1
    k_begin, k_end = split_columns(split, K, BLOCK_K, SPLIT_K)
    k_end = tl.minimum(k_end, k_begin + FETCH_K)
    outputs = tile_outputs(tile, N, BLOCK_N, GATED, HALVES, HEAD_DIM, HEAD_TILES)
    for start in range(k_begin // PACKED, k_end // PACKED, 16 * LINE):
        lines = start + tl.arange(0, 16) * LINE
        at = weight_ptr + outputs.to(tl.int64)[:, None] * stride_weight + lines[None, :]
        prefetch(at, (outputs < N)[:, None] & (lines < k_end // PACKED)[None, :], COMPILED)


@triton.jit
def prefetch_vectors(
    norm, bias_ptr, tile, N: tl.constexpr, K: tl.constexpr, BLOCK_N: tl.constexpr, COMPILED: tl.constexpr
):
    """Fetch a tile's biases into L2, and of the norm's weight and bias a line; all tiles read all of them."""
    if bias_ptr is not None:
        outputs = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        prefetch(bias_ptr + outputs, outputs < N, COMPILED)
    if norm[0] is not None:
        LINE: tl.constexpr = 1024 // norm[0].dtype.element_ty.primitive_bitwidth
        column = tile % ((K + LINE - 1) // LINE) * LINE
        prefetch(norm[0] + column, column < K, COMPILED)
        if norm[1] is not None:
            prefetch(norm[1] + column, column < K, COMPILED)


@triton.jit
def stored_outputs(tile, outputs, GATED: tl.constexpr, BLOCK_N: tl.constexpr):
    """The places of a tile's results: its outputs, GATED one for each pair of them."""
    if GATED:
        outputs = tile * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
    return outputs


@triton.jit
def activate_tile(
    acc, GATED: tl.constexpr, ACTIVATION: tl.constexpr, SCALE: tl.constexpr, SOFTCAP: tl.constexpr
):  # fmt: skip
    """A tile after activation, gate, scale and soft cap."""
    if GATED:
        gate, up = pair_rows(acc)
        acc = activate(gate, ACTIVATION) * up
    else:
        acc = activate(acc, ACTIVATION)
    if SCALE != 1.0:
        acc *= SCALE
    if SOFTCAP != 0.0:
        acc = SOFTCAP * tanh(acc / SOFTCAP)
    return acc


@triton.jit
def end_operands(
    tile, outputs, places, numbers, row_mask, mask, scale_ptr, bias_ptr, residual_ptr, slots_ptr, heads,
    N: tl.constexpr, OUT: tl.constexpr, KV_WIDTH: tl.constexpr, BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr, HEAD_NORM: tl.constexpr, HEAD_UNIT_OFFSET: tl.constexpr,
):  # fmt: skip
    """Operands of the end of a tile besides its sums: 0 for what there is not.

    It is under way before the product: after it the loads would come one after another.
    """
    weight_scale, bias, head_weight, cos, sin, residual, slots = 0, 0, 0, 0, 0, 0, 0
    if scale_ptr is not None:
        weight_scale = tl.load(scale_ptr + outputs, mask=outputs < N, other=0.0)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + outputs, mask=outputs < N, other=0.0).to(tl.float32)
    if HEAD_NORM:
        head_weight = head_weights(outputs, heads[4], heads[5], N, KV_WIDTH, HEAD_DIM, HEAD_UNIT_OFFSET)
    if DIM:
        cos, sin = pair_angles(
            tile, heads[0], heads[1], heads[2], heads[3], numbers, row_mask,
            N, KV_WIDTH, HEAD_DIM, DIM, HEAD_NORM, BLOCK_N,
        )  # fmt: skip
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + numbers[None, :] * OUT + places[:, None], mask=mask, other=0.0)
    if KV_WIDTH:
        slots = tl.load(slots_ptr + numbers, mask=row_mask, other=-1)
    return weight_scale, bias, head_weight, cos, sin, residual, slots


@triton.jit
def finish_tile(
    acc, ends, outputs, places, numbers, mask, out_ptr, cache, heads,
    N: tl.constexpr, OUT: tl.constexpr, KV_WIDTH: tl.constexpr, ACTIVATION: tl.constexpr,
    HEAD_DIM: tl.constexpr, SCALED: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr,
    GATED: tl.constexpr, SCALE: tl.constexpr, SOFTCAP: tl.constexpr, DIM: tl.constexpr,
    HEAD_NORM: tl.constexpr,
):  # fmt: skip
    """Store a tile's outputs; ``ends`` is of ``end_operands``."""
    # Weight scale, bias, heads, activation, residual.
    if SCALED:
        acc *= ends[0][:, None]
    if BIAS:
        acc += ends[1][:, None]
    if HEAD_NORM:
        acc = norm_heads(acc, outputs, ends[2], heads[6], N, KV_WIDTH, HEAD_DIM)
    if DIM:
        acc = turn_heads(acc, ends[3], ends[4])
    # A new name: what it holds has another shape.
    values = activate_tile(acc, GATED, ACTIVATION, SCALE, SOFTCAP)
    if RESIDUAL:
        values += ends[5].to(tl.float32)
    # Keys and values go to the cache.
    result = values.to(out_ptr.dtype.element_ty)
    WIDTH: tl.constexpr = OUT - 2 * KV_WIDTH
    # int64: rows times a vocabulary passes 2^31 beyond 16k rows.
    at = numbers.to(tl.int64)[None, :] * WIDTH + places[:, None]
    tl.store(out_ptr + at, result, mask=mask & (places < WIDTH)[:, None])
    if KV_WIDTH:
        store_kv(result, cache, ends[6], (places - WIDTH)[:, None], mask, KV_WIDTH, HEAD_DIM)


@triton.jit
def linear_tile(
    x_ptr, weight_ptr, bias_ptr, packing, norm, residual_ptr, out_ptr, cache, slots_ptr, scratch,
    row_count, eps, stride_weight, tile, tiles, split, row_block,
    N: tl.constexpr, K: tl.constexpr, KV_WIDTH: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_S: tl.constexpr,
    PARTS: tl.constexpr, SPLIT_K: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr,
    heads=None, CENTERED: tl.constexpr = True, UNIT_OFFSET: tl.constexpr = False,
    GATED: tl.constexpr = False, SCALE: tl.constexpr = 1.0, SOFTCAP: tl.constexpr = 0.0,
    DIM: tl.constexpr = 0, INTERLEAVED: tl.constexpr = False, HEAD_NORM: tl.constexpr = False,
    HEAD_UNIT_OFFSET: tl.constexpr = False,
):  # fmt: skip
    """One split of one tile of a layer; the last to come of a tile's splits stores its outputs.

    ``packing`` is (scale, minimum) pointers of a quantised weight, ``norm`` as in ``load_rows``, ``cache`` as
    in ``store_kv``, ``scratch`` (partial sums, counters). With DIM elements of each head turned or with
    HEAD_NORM, ``heads`` is (cos, sin, lengths, context, q weight, k weight, eps). SOFTCAP 0 means none.
    """
    HALVES: tl.constexpr = 0 if INTERLEAVED else DIM
    partial_ptr, counter_ptr = scratch
    k_begin, k_end = split_columns(split, K, BLOCK_K, SPLIT_K)
    outputs = tile_outputs(tile, N, BLOCK_N, GATED, HALVES, HEAD_DIM, HEAD_NORM)
    numbers = row_block * BLOCK_R + tl.arange(0, BLOCK_R)
    row_mask = numbers < row_count
    OUT: tl.constexpr = N // 2 if GATED else N
    places = stored_outputs(tile, outputs, GATED, BLOCK_N)
    mask = (places < OUT)[:, None] & row_mask[None, :]
    ends = end_operands(
        tile, outputs, places, numbers, row_mask, mask, None if GROUP else packing[0], bias_ptr, residual_ptr,
        slots_ptr, heads, N, OUT, KV_WIDTH, BLOCK_N, HEAD_DIM, DIM, HEAD_NORM, HEAD_UNIT_OFFSET,
    )  # fmt: skip
    # The norm's statistics of each row, over all its columns.
    if norm[0] is not None:
        moments = row_moments(x_ptr, numbers * K, row_mask, eps, K, BLOCK_R, BLOCK_S, CENTERED)
    else:
        moments = (eps, eps)
    # The product over this split's columns. The first tile also stores norm(x).
    if GROUP:
        acc = product_int4(
            x_ptr, weight_ptr, packing, norm, numbers * K, row_mask, outputs, k_begin, k_end, moments,
            tile == 0, N, K, BLOCK_R, BLOCK_N, GROUP, PARTS, UNIT_OFFSET,
        )  # fmt: skip
    else:
        acc = product(
            x_ptr, weight_ptr, norm, numbers * K, row_mask, outputs, k_begin, k_end, moments,
            stride_weight, tile == 0, N, K, BLOCK_R, BLOCK_N, BLOCK_K, PARTS, UNIT_OFFSET,
        )  # fmt: skip
    acc = sum_parts(acc, BLOCK_N, BLOCK_R, PARTS)
    # The sum of all splits, in their order.
    place = row_block * tiles + tile
    partial_ptr += place.to(tl.int64) * (SPLIT_K * BLOCK_N * BLOCK_R)
    acc, last = sum_splits(acc, partial_ptr, counter_ptr + place, split, BLOCK_N, BLOCK_R, SPLIT_K)
    if last:
        finish_tile(
            acc, ends, outputs, places, numbers, mask, out_ptr, cache, heads,
            N, OUT, KV_WIDTH, ACTIVATION, HEAD_DIM, packing[0] is not None and not GROUP,
            bias_ptr is not None, residual_ptr is not None, GATED, SCALE, SOFTCAP, DIM, HEAD_NORM,
        )  # fmt: skip


@triton.jit(do_not_specialize=["row_count", "page_count", "context"])
def decode_linear_kernel(
    x_ptr,  # (rows, K), contiguous
    weight_ptr,  # (N, K); with GROUP (N, K / 2), two weights a byte
    bias_ptr,  # (N,) or None
    norm_weight_ptr,  # (K,), or None: x is taken as it is
    norm_bias_ptr,  # (K,) or None
    residual_ptr,  # (rows, N), contiguous, or None
    out_ptr,  # (rows, N less keys and values), GATED (rows, N / 2), contiguous
    normed_ptr,  # (rows, K), contiguous, or None
    k_cache_ptr,  # (pages, page_size, KV_WIDTH), or None: all outputs go to out
    v_cache_ptr,
    slots_ptr,  # (rows,) int64, or None
    partial_ptr,  # (row blocks, tiles, SPLIT_K, BLOCK_N, BLOCK_R) fp32, scratch
    counter_ptr,  # (row blocks * tiles,) int32, zero before and after
    scale_ptr,  # (N,) fp32, with GROUP (N, K / GROUP) fp16: of weights in fewer bits; or None
    minimum_ptr,  # (N, K / GROUP) fp16, or None
    k_scale_ptr,  # (KV_WIDTH / HEAD_DIM,) fp32: of an fp8 cache; or None
    v_scale_ptr,
    cos_ptr,  # (context, DIM / 2) fp32, or None: nothing is turned
    sin_ptr,
    lens_ptr,  # (rows,) int32: of each sequence, its new token included
    q_norm_ptr,  # (HEAD_DIM,), or None: heads have no norm
    k_norm_ptr,
    context, head_eps, row_count, eps, page_size, page_count,
    stride_weight, stride_kp, stride_ks, stride_vp, stride_vs,
    N: tl.constexpr, K: tl.constexpr, KV_WIDTH: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_S: tl.constexpr,
    PARTS: tl.constexpr, SPLIT_K: tl.constexpr, PDL: tl.constexpr, GROUP: tl.constexpr,
    FETCH_K: tl.constexpr, HEAD_DIM: tl.constexpr,
    CENTERED: tl.constexpr, UNIT_OFFSET: tl.constexpr, GATED: tl.constexpr, SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr, DIM: tl.constexpr, INTERLEAVED: tl.constexpr, HEAD_NORM: tl.constexpr,
    HEAD_UNIT_OFFSET: tl.constexpr,
):  # fmt: skip
    tile, split, row_block = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if PDL:
        prefetch_weights(
            weight_ptr, stride_weight, tile, split, N, K, BLOCK_N, BLOCK_K, SPLIT_K, GROUP, FETCH_K, PDL,
            GATED, 0 if INTERLEAVED else DIM, HEAD_DIM, HEAD_NORM,
        )  # fmt: skip
        prefetch_vectors((norm_weight_ptr, norm_bias_ptr), bias_ptr, tile, N, K, BLOCK_N, PDL)
    wait(PDL)
    cache = (
        k_cache_ptr, v_cache_ptr, k_scale_ptr, v_scale_ptr, page_size, page_count,
        stride_kp, stride_ks, stride_vp, stride_vs,
    )  # fmt: skip
    linear_tile(
        x_ptr, weight_ptr, bias_ptr, (scale_ptr, minimum_ptr), (norm_weight_ptr, norm_bias_ptr, normed_ptr),
        residual_ptr, out_ptr, cache, slots_ptr, (partial_ptr, counter_ptr), row_count, eps, stride_weight,
        tile, tl.num_programs(0), split, row_block,
        N, K, KV_WIDTH, ACTIVATION, BLOCK_R, BLOCK_N, BLOCK_K, BLOCK_S, PARTS, SPLIT_K, GROUP, HEAD_DIM,
        (cos_ptr, sin_ptr, lens_ptr, context, q_norm_ptr, k_norm_ptr, head_eps),
        CENTERED, UNIT_OFFSET, GATED, SCALE, SOFTCAP, DIM, INTERLEAVED, HEAD_NORM, HEAD_UNIT_OFFSET,
    )  # fmt: skip
