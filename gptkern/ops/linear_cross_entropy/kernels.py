"""Head and cross-entropy, fused, for one chunk of tokens at a time.

Per token ``t`` with ``y[v] = weight[v] . hidden[t] + bias[v]``, ``z = y`` or ``cap tanh(y / cap)``,
``lse = log(sum(exp(z)))`` and class weights ``c``, 1 unless given, of mean ``C``:
    loss     = (1 - s) c[target] (lse - z[target]) + s (C lse - mean(c z)) + z_loss lse^2
    dz[v]    = softmax(z)[v] ((1 - s) c[target] + s C + 2 z_loss lse)
               - (1 - s) c[target] [v = target] - s c[v] / vocab
    dy       = dz (1 - (z / cap)^2)
    dhidden  = dy @ weight,   dweight = dy^T @ hidden,   dbias = sum over tokens of dy
(label smoothing s: Szegedy et al. 2016; z-loss: Chowdhery et al. 2022, section 5; soft cap: Gemma 2, 2024,
section 2; softmax from partial maxima and sums: Milakov and Gimelshein 2018).

Each logit is multiplied out once. Of one chunk's logits the buffer holds ``exp(z - m)`` in the inputs'
dtype, with ``m`` the maximum of a token's logits in one vocabulary tile. Its relative error is one
rounding, whereas a logit of 20 rounded to bf16 would be 3% off after the exponential. Both gradient
products compute ``dy`` from it as they load it, by one factor per token and tile. The cap's derivative
needs the logit, also where its exponential is 0: with a cap the buffer holds ``z - m`` in fp32.

Layout:
    logits_kernel   one program a (tokens, vocab) tile; reads hidden and weight, writes
                    ``exp(z - m)`` and the tile's statistics
    loss_kernel     one program BLOCK_M tokens; combines the tiles' statistics in a fixed order
    dhidden_kernel  one program a (tokens, width) tile, over the vocabulary
    dweight_kernel  one program a (vocab, width) tile, over the chunk's tokens; adds to fp32 sums,
                    chunk after chunk: the order of summation is fixed
"""

from gptkern.ops._device import rounded_product, tanh
from gptkern.ops._triton import tl, triton

# In place of a target that does not count.
IGNORED = tl.constexpr(-1)


@triton.jit
def logits_kernel(
    hidden_ptr,  # (tokens, width), rows stride_ht apart
    weight_ptr,  # (vocab, width), rows stride_wv apart
    bias_ptr,  # (vocab,), or None
    class_weight_ptr,  # (vocab,), or None
    targets_ptr,  # (tokens,)
    exp_ptr,  # (tokens, stride_et): exp(z - tile maximum), with a cap z - tile maximum
    tile_max_ptr,  # (tokens, n_tiles)
    tile_sum_ptr,  # (tokens, n_tiles): sum of exp(z - tile maximum)
    tile_total_ptr,  # (tokens, n_tiles): sum of class weight * z
    tile_best_ptr,  # (tokens, n_tiles) int32: the word of the tile's maximum, or None
    target_logit_ptr,  # (tokens,)
    tokens,
    vocab,
    width,
    n_tiles,
    softcap,
    stride_ht,
    stride_wv,
    stride_et,
    KEEP_EXP: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SMOOTHING: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # Tokens vary fastest: a chunk's hidden states stay in the L2 cache while the weights stream by once.
    row_blocks = tl.cdiv(tokens, BLOCK_M)
    tile = tl.program_id(0) // row_blocks
    rows = tl.program_id(0) % row_blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    row_ok, col_ok = rows < tokens, cols < vocab
    k = tl.arange(0, BLOCK_K)
    # Logits. Rows beyond the end read the last one: in bounds without a mask, and never stored.
    h = hidden_ptr + tl.minimum(rows, tokens - 1).to(tl.int64)[:, None] * stride_ht + k[None, :]
    w = weight_ptr + tl.minimum(cols, vocab - 1).to(tl.int64)[None, :] * stride_wv + k[:, None]
    z = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, width, BLOCK_K):
        if EVEN_K:
            z = tl.dot(tl.load(h), tl.load(w), z, input_precision="ieee")
        else:
            k_ok = k < width - start
            z = tl.dot(
                tl.load(h, mask=k_ok[None, :], other=0.0),
                tl.load(w, mask=k_ok[:, None], other=0.0),
                z,
                input_precision="ieee",
            )
        h += BLOCK_K
        w += BLOCK_K
    if bias_ptr is not None:
        z += tl.load(bias_ptr + cols, mask=col_ok, other=0.0).to(tl.float32)[None, :]
    if SOFTCAP:
        z = softcap * tanh(z * (1.0 / softcap))

    # The target's logit, in the tile that holds it.
    target = tl.load(targets_ptr + rows, mask=row_ok, other=-1)
    hit = cols[None, :] == target[:, None]
    own = (target >= tile * BLOCK_N) & (target < tl.minimum(tile * BLOCK_N + BLOCK_N, vocab))
    tl.store(target_logit_ptr + rows, tl.sum(tl.where(hit, z, 0.0), 1), mask=row_ok & own)
    # Statistics of the tile: maximum and sum of exponentials, and the sum of logits for smoothing.
    stat = rows.to(tl.int64) * n_tiles + tile
    if SMOOTHING:
        counted = tl.where(col_ok[None, :], z, 0.0)
        if class_weight_ptr is not None:
            counted *= tl.load(class_weight_ptr + cols, mask=col_ok, other=0.0).to(tl.float32)[None, :]
        tl.store(tile_total_ptr + stat, tl.sum(counted, 1), mask=row_ok)
    z = tl.where(col_ok[None, :], z, float("-inf"))
    highest = tl.max(z, 1)
    if tile_best_ptr is not None:
        best = tile * BLOCK_N + tl.argmax(z, 1, tie_break_left=True)
        tl.store(tile_best_ptr + stat, best, mask=row_ok)
    # If a row is all -inf: (-inf) - (-inf) would be NaN.
    z -= tl.where(highest == float("-inf"), 0.0, highest)[:, None]
    e = tl.exp(z)
    tl.store(tile_max_ptr + stat, highest, mask=row_ok)
    tl.store(tile_sum_ptr + stat, tl.sum(e, 1), mask=row_ok)
    if KEEP_EXP:
        # stride_et is a whole number of tiles: only rows need a mask.
        out = exp_ptr + rows.to(tl.int64)[:, None] * stride_et + cols[None, :]
        held = z if SOFTCAP else e
        tl.store(out, held.to(exp_ptr.dtype.element_ty), mask=row_ok[:, None])


@triton.jit
def class_weights(class_weight_ptr, class_stats_ptr, target, inside):
    """(the target's class weight, the mean of all, the z-loss's factor): 1 without class weights."""
    if class_weight_ptr is not None:
        own = tl.load(class_weight_ptr + target, mask=inside, other=0.0).to(tl.float32)
        return own, tl.load(class_stats_ptr), tl.load(class_stats_ptr + 1)
    else:
        return 1.0, 1.0, 1.0


@triton.jit
def loss_kernel(
    tile_max_ptr,  # (tokens, n_tiles)
    tile_sum_ptr,
    tile_total_ptr,
    tile_best_ptr,  # or None
    target_logit_ptr,  # (tokens,)
    targets_ptr,
    class_weight_ptr,  # (vocab,), or None
    class_stats_ptr,  # (2,) fp32: the class weights' mean, the z-loss's factor; or None
    loss_ptr,  # (tokens,) fp32, 0 if ignored, NaN for a target outside the vocabulary
    z_loss_ptr,  # (tokens,) fp32: the z-loss that loss holds, without its factor
    correct_ptr,  # (tokens,) fp32: 1 if the target has the highest logit, 0 if not or ignored; or None
    row_max_ptr,  # (tokens,) fp32; with log_sum, lse without the rounding of a large maximum
    log_sum_ptr,  # (tokens,) fp32: log(sum(exp(z - row maximum)))
    factor_ptr,  # (n_tiles, tokens) fp32: what a tile's exponentials are multiplied by in dy; or None
    word_ptr,  # (tokens,) int32: the target, IGNORED, or vocab where it is outside; or None
    tokens,
    vocab,
    n_tiles,
    ignore_index,
    z_loss,
    label_smoothing,
    SMOOTHING: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_ok = rows < tokens
    highest = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
    weighed = tl.zeros((BLOCK_M,), dtype=tl.float32)
    total = tl.zeros((BLOCK_M,), dtype=tl.float32)
    best = tl.zeros((BLOCK_M,), dtype=tl.int32)
    for start in range(0, n_tiles, BLOCK_N):
        tiles = start + tl.arange(0, BLOCK_N)
        ok = row_ok[:, None] & (tiles < n_tiles)[None, :]
        stat = rows.to(tl.int64)[:, None] * n_tiles + tiles[None, :]
        # Merge a block of tiles: new maximum, rescale, accumulate.
        maxima = tl.load(tile_max_ptr + stat, mask=ok, other=float("-inf"))
        sums = tl.load(tile_sum_ptr + stat, mask=ok, other=0.0)
        new = tl.maximum(highest, tl.max(maxima, 1))
        shift = tl.where(new == float("-inf"), 0.0, new)
        if tile_best_ptr is not None:
            # The lowest word of those with the new maximum; at a tie the tiles before have a lower one.
            words = tl.load(tile_best_ptr + stat, mask=ok & (maxima == new[:, None]), other=2147483647)
            best = tl.where(new > highest, tl.min(words, 1), best)
        merged = tl.sum(rounded_product(sums, tl.exp(maxima - shift[:, None])), 1)
        weighed = weighed * tl.exp(highest - shift) + merged
        highest = new
        if SMOOTHING:
            total += tl.sum(tl.load(tile_total_ptr + stat, mask=ok, other=0.0), 1)
    # Loss.
    log_sum = tl.log(weighed)
    lse = highest + log_sum
    target = tl.load(targets_ptr + rows, mask=row_ok, other=0)
    inside = (target >= 0) & (target < vocab)
    z_target = tl.load(target_logit_ptr + rows, mask=row_ok & inside, other=float("nan"))
    own_weight, mean_weight, z_factor = class_weights(class_weight_ptr, class_stats_ptr, target, inside)
    loss = own_weight * ((highest - z_target) + log_sum)
    if SMOOTHING:
        spread = (mean_weight * highest - total / vocab) + mean_weight * log_sum
        loss = (1.0 - label_smoothing) * loss + label_smoothing * spread
    squared = z_loss * lse * lse
    loss += z_factor * squared
    ignored = target == ignore_index
    tl.store(loss_ptr + rows, tl.where(ignored, 0.0, loss), mask=row_ok)
    tl.store(z_loss_ptr + rows, tl.where(ignored, 0.0, squared), mask=row_ok)
    if tile_best_ptr is not None:
        tl.store(correct_ptr + rows, ((best == target) & ~ignored).to(tl.float32), mask=row_ok)
    tl.store(row_max_ptr + rows, highest, mask=row_ok)
    tl.store(log_sum_ptr + rows, log_sum, mask=row_ok)
    if factor_ptr is not None:
        word = tl.where(ignored, IGNORED, tl.where(inside, target, vocab)).to(tl.int32)
        tl.store(word_ptr + rows, word, mask=row_ok)
        whole = 1.0 + 2.0 * z_loss * lse
        for start in range(0, n_tiles, BLOCK_N):
            tiles = start + tl.arange(0, BLOCK_N)
            ok = row_ok[:, None] & (tiles < n_tiles)[None, :]
            stat = rows.to(tl.int64)[:, None] * n_tiles + tiles[None, :]
            maxima = tl.load(tile_max_ptr + stat, mask=ok, other=0.0)
            factor = tl.exp(maxima - highest[:, None] - log_sum[:, None]) * whole[:, None]
            at = tiles.to(tl.int64)[None, :] * tokens + rows[:, None]
            tl.store(factor_ptr + at, tl.where(ignored[:, None], 0.0, factor), mask=ok)


@triton.jit
def logits_gradient(
    e,  # (BLOCK_M, BLOCK_N): exp(z - tile maximum), with a cap z - tile maximum
    tile_max,  # (BLOCK_M,)
    row_max,
    log_sum,
    target,
    counted,  # (BLOCK_M,): whether the token exists and is not ignored
    cols,
    vocab,
    class_weight_ptr,
    class_stats_ptr,
    z_loss,
    label_smoothing,
    softcap,
    SMOOTHING: tl.constexpr,
    SOFTCAP: tl.constexpr,
):
    """``dy`` of a tile, tokens by vocabulary, in fp32, before the upstream gradient."""
    inside = (target >= 0) & (target < vocab)
    own_weight, mean_weight, z_factor = class_weights(class_weight_ptr, class_stats_ptr, target, inside)
    target_part = (1.0 - label_smoothing) * own_weight
    whole = 1.0 if class_weight_ptr is None else target_part + label_smoothing * mean_weight
    factor = tl.exp(tile_max - row_max - log_sum) * (whole + 2.0 * z_factor * z_loss * (row_max + log_sum))
    e = e.to(tl.float32)
    weights = tl.exp(e) if SOFTCAP else e
    dz = weights * factor[:, None]
    hit = cols[None, :] == target[:, None]
    if class_weight_ptr is not None:
        dz -= tl.where(hit, target_part[:, None], 0.0)
    else:
        dz -= tl.where(hit, target_part, 0.0)
    if SMOOTHING:
        spread = tl.where(cols < vocab, label_smoothing / vocab, 0.0)
        if class_weight_ptr is not None:
            spread *= tl.load(class_weight_ptr + cols, mask=cols < vocab, other=0.0).to(tl.float32)
        dz -= spread[None, :]
    if SOFTCAP:
        # Beyond the vocabulary e is -inf; what is left there is 0.
        capped = tl.where((cols < vocab)[None, :], (e + tile_max[:, None]) * (1.0 / softcap), 0.0)
        dz *= 1.0 - capped * capped
    return tl.where(counted[:, None], dz, 0.0)


@triton.jit
def dhidden_kernel(
    exp_ptr,  # (tokens, stride_et)
    tile_max_ptr,  # (tokens, n_tiles)
    row_max_ptr,  # (tokens,)
    log_sum_ptr,
    targets_ptr,
    class_weight_ptr,  # (vocab,), or None
    class_stats_ptr,  # (2,) fp32, or None
    scale_ptr,  # upstream gradient: element t * stride_s
    weight_ptr,  # (vocab, width)
    dhidden_ptr,  # (tokens, width), contiguous
    tokens,
    vocab,
    width,
    n_tiles,
    stride_et,
    stride_s,
    stride_wv,
    ignore_index,
    z_loss,
    label_smoothing,
    softcap,
    SMOOTHING: tl.constexpr,
    SOFTCAP: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # Width varies fastest: the programs that share rows of exp_ptr run side by side.
    width_blocks = tl.cdiv(width, BLOCK_N)
    rows = tl.program_id(0) // width_blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.program_id(0) % width_blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    row_ok, col_ok = rows < tokens, cols < width
    safe_rows = tl.minimum(rows, tokens - 1)
    safe_cols = tl.minimum(cols, width - 1)
    target = tl.load(targets_ptr + safe_rows)
    row_max = tl.load(row_max_ptr + safe_rows)
    log_sum = tl.load(log_sum_ptr + safe_rows)
    counted = row_ok & (target != ignore_index)
    v = tl.arange(0, BLOCK_K)
    e = exp_ptr + safe_rows.to(tl.int64)[:, None] * stride_et + v[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, vocab, BLOCK_K):
        words = start + v
        w = weight_ptr + tl.minimum(words, vocab - 1).to(tl.int64)[:, None] * stride_wv + safe_cols[None, :]
        tile_max = tl.load(tile_max_ptr + safe_rows.to(tl.int64) * n_tiles + start // TILE)
        # Gradient of a tile of logits, then multiply by the weights.
        dz = logits_gradient(
            tl.load(e), tile_max, row_max, log_sum, target, counted, words,
            vocab, class_weight_ptr, class_stats_ptr, z_loss, label_smoothing, softcap, SMOOTHING, SOFTCAP,
        )  # fmt: skip
        # Beyond the vocabulary dy is exactly 0, so the repeated last row of the weights adds nothing.
        acc = tl.dot(dz.to(weight_ptr.dtype.element_ty), tl.load(w), acc, input_precision="ieee")
        e += BLOCK_K
    # Upstream gradient, store.
    acc *= tl.load(scale_ptr + safe_rows * stride_s).to(tl.float32)[:, None]
    out = dhidden_ptr + rows.to(tl.int64)[:, None] * width + cols[None, :]
    tl.store(out, acc.to(dhidden_ptr.dtype.element_ty), mask=row_ok[:, None] & col_ok[None, :])


@triton.jit
def dweight_kernel(
    exp_ptr,  # (tokens, stride_et)
    tile_max_ptr,  # (tokens, n_tiles)
    row_max_ptr,  # (tokens,)
    log_sum_ptr,
    targets_ptr,
    class_weight_ptr,  # (vocab,), or None
    class_stats_ptr,  # (2,) fp32, or None
    scale_ptr,  # upstream gradient: element t * stride_s
    hidden_ptr,  # (tokens, width), rows stride_ht apart
    dweight_ptr,  # (vocab, width) fp32, contiguous
    dbias_ptr,  # (vocab,) fp32, or None
    tokens,
    vocab,
    width,
    n_tiles,
    stride_et,
    stride_s,
    stride_ht,
    ignore_index,
    z_loss,
    label_smoothing,
    softcap,
    FIRST: tl.constexpr,
    TOKEN_SCALE: tl.constexpr,
    SMOOTHING: tl.constexpr,
    SOFTCAP: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    width_blocks = tl.cdiv(width, BLOCK_N)
    word_start = tl.program_id(0) // width_blocks * BLOCK_M
    words = word_start + tl.arange(0, BLOCK_M)
    cols = tl.program_id(0) % width_blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    safe_cols = tl.minimum(cols, width - 1)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    dbias = tl.zeros((BLOCK_M,), dtype=tl.float32)
    for start in range(0, tokens, BLOCK_K):
        rows = start + tl.arange(0, BLOCK_K)
        row_ok = rows < tokens
        safe_rows = tl.minimum(rows, tokens - 1).to(tl.int64)
        e = tl.load(exp_ptr + safe_rows[:, None] * stride_et + words[None, :])
        h = tl.load(hidden_ptr + safe_rows[:, None] * stride_ht + safe_cols[None, :])
        target = tl.load(targets_ptr + safe_rows)
        row_max = tl.load(row_max_ptr + safe_rows)
        log_sum = tl.load(log_sum_ptr + safe_rows)
        tile_max = tl.load(tile_max_ptr + safe_rows * n_tiles + word_start // TILE)
        counted = row_ok & (target != ignore_index)
        # Gradient of a tile of logits, then multiply by the hidden states.
        dz = logits_gradient(
            e, tile_max, row_max, log_sum, target, counted, words,
            vocab, class_weight_ptr, class_stats_ptr, z_loss, label_smoothing, softcap, SMOOTHING, SOFTCAP,
        )  # fmt: skip
        if TOKEN_SCALE:
            dz *= tl.load(scale_ptr + safe_rows * stride_s).to(tl.float32)[:, None]
        if dbias_ptr is not None:
            dbias += tl.sum(dz, 0)
        acc = tl.dot(tl.trans(dz.to(h.dtype)), h, acc, input_precision="ieee")
    if not TOKEN_SCALE:
        # Scale after the sum: 1 / tokens would push fp16 gradients below the smallest fp16 number.
        scale = tl.load(scale_ptr).to(tl.float32)
        acc *= scale
        dbias *= scale
    # Add to the sums of the chunks before.
    out = dweight_ptr + words.to(tl.int64)[:, None] * width + cols[None, :]
    ok = (words < vocab)[:, None] & (cols < width)[None, :]
    if not FIRST:
        acc += tl.load(out, mask=ok, other=0.0)
    tl.store(out, acc, mask=ok)
    if dbias_ptr is not None:
        # The programs of one block of words have the same sums: one of them stores.
        first = (words < vocab) & (tl.program_id(0) % width_blocks == 0)
        if not FIRST:
            dbias += tl.load(dbias_ptr + words, mask=first, other=0.0)
        tl.store(dbias_ptr + words, dbias, mask=first)
