"""Device code that more than one kernel uses, as small functions on fp32 values."""

from gptkern.ops._triton import tl, triton

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def rounded_product(a, b):
    """``a * b`` in fp32 as a term of a sum over lanes.

    Of a plain ``a * b`` the compiler makes one multiply-add with the first exchange, ``a * b + shuffled(a *
    b)``: it rounds otherwise in each of the two lanes, which then hold different sums, and all of them store
    theirs to one address. A multiply-add of its own cannot be joined with another sum.
    """
    return tl.fma(a, b, 0.0)


@triton.jit
def row_terms(a, b):
    """``a * b`` as terms of sums over rows: see ``rounded_product``.

    Of a row that has more elements than a block has threads (16 warps at most) a lane holds several, which it
    adds up first: the last of them is a multiply-add already, and all of them may be.
    """
    if a.shape[1] > 512:
        terms = a * b
    else:
        terms = rounded_product(a, b)
    return terms


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """The activation of fp32 ``x``: gelu_tanh, gelu, relu, silu or none.

    gelu_tanh is x (1 + tanh u) / 2 = x / (1 + exp(-2 u)) (Hendrycks and Gimpel 2016), the form
    without the cancellation near tanh u = -1; where exp overflows the quotient is 0.
    """
    tl.static_assert(
        ACTIVATION == "gelu_tanh"
        or ACTIVATION == "gelu"
        or ACTIVATION == "relu"
        or ACTIVATION == "silu"
        or ACTIVATION == "none"
    )
    if ACTIVATION == "gelu_tanh":
        x = x / (1.0 + tl.exp(-1.5957691216057308 * x * (1.0 + 0.044715 * x * x)))
    elif ACTIVATION == "gelu":
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "relu":
        x = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif ACTIVATION == "silu":
        x = x / (1.0 + tl.exp(-x))
    return x


@triton.jit
def sigmoid_grad(x):
    """(sigmoid, its derivative) without the cancellation in s (1 - s), and without overflow."""
    e = tl.exp(-tl.abs(x))
    r = 1.0 / (1.0 + e)
    return tl.where(x < 0.0, e * r, r), e * r * r


@triton.jit
def activation_grad(x, ACTIVATION: tl.constexpr):
    """The derivative of ``activate`` at fp32 ``x``."""
    if ACTIVATION == "gelu_tanh":
        s, ds = sigmoid_grad(1.5957691216057308 * x * (1.0 + 0.044715 * x * x))
        grad = s + x * ds * (1.5957691216057308 + 0.2140644488178008 * x * x)
    elif ACTIVATION == "gelu":
        grad = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    elif ACTIVATION == "relu":
        # As PyTorch has it, NaN passes the gradient on.
        grad = tl.where(x <= 0.0, 0.0, 1.0)
    elif ACTIVATION == "silu":
        s, ds = sigmoid_grad(x)
        grad = s + x * ds
    else:
        grad = 1.0
    return grad


@triton.jit
def row_offsets(row, inner, stride_outer, stride_inner):
    """The start of each row in a tensor whose rows lie in two nested strides.

    int64: rows times stride passes 2^31 at 2.8 M tokens of GPT-2 124M.
    """
    outer = row // inner
    return outer.to(tl.int64) * stride_outer + (row - outer * inner).to(tl.int64) * stride_inner


@triton.jit
def tile_at(index, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """(row, column) of tile number ``index``, in tiles."""
    tiles_m = tl.cdiv(M, BLOCK_M)
    group = GROUP_M * tl.cdiv(N, BLOCK_N)
    top = (index // group) * GROUP_M
    height = tl.minimum(tiles_m - top, GROUP_M)
    return top + (index % group) % height, (index % group) // height


@triton.jit
def row_statistics(x, lanes, eps, WIDTH: tl.constexpr, CENTERED: tl.constexpr):
    """(x less its mean, 1 / its standard deviation, mean) of each row of an fp32 tile.

    The mean is taken away before squaring: E[x^2] - E[x]^2 cancels where the mean is large.
    Without CENTERED the mean is taken to be 0 (RMS norm). Lanes beyond WIDTH must hold 0.
    """
    if CENTERED:
        mean = tl.sum(x, axis=1) / WIDTH
        x = tl.where(lanes[None, :], x - mean[:, None], 0.0)
    else:
        mean = tl.zeros([x.shape[0]], tl.float32)
    variance = tl.sum(row_terms(x, x), axis=1) / WIDTH
    return x, tl.rsqrt(variance + eps), mean


@triton.jit
def random_words(seed, counter, row, stream, ROWS: tl.constexpr, CALLS: tl.constexpr):
    """``(ROWS, CALLS, 2, 2)`` random 32-bit words: four for each Philox counter (counter, row, stream).

    ``counter`` ``(1, CALLS)`` and ``row`` ``(ROWS, 1)`` broadcast. Philox 4x32 (Salmon et al. 2011) with 7
    rounds, the fewest that pass BigCrush there.
    """
    zero = tl.zeros([ROWS, CALLS], tl.int32)
    a, b, c, d = tl.philox(seed, zero + counter, zero + row, zero + stream, zero, n_rounds=7)
    return tl.join(tl.join(a, c), tl.join(b, d))


@triton.jit
def row_dropout(x, seed, row, start, threshold, scale, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Dropout of columns ``start`` to ``start + BLOCK`` of a tile whose rows are ``row``.

    A Philox counter gives eight 16-bit numbers, one for each of eight columns; an element stays where its
    number is at least ``threshold``. The mask follows from seed, row and column alone, so the backward pass
    draws the same one.
    """
    counter = (start // 8 + tl.arange(0, BLOCK // 8))[None, :]
    words = random_words(seed, counter, row[:, None], 0, ROWS, BLOCK // 8)
    bits = tl.join(words & 0xFFFF, words >> 16)
    alive = tl.reshape(bits, [ROWS, BLOCK]).to(tl.int32) >= threshold
    return tl.where(alive, x * scale, 0.0)


@triton.jit
def online_softmax(scores, row_max, row_sum, scale_log2):
    """One step of the online softmax (Milakov and Gimelshein 2018) over the last axis, in base 2.

    Returns the tile's weights relative to the new maximum, the new maximum and sum, and the factor
    that brings what was accumulated before to the new maximum. ``row_max`` is of ``scores *
    scale_log2``; the scale must be positive, so that it can be applied inside one multiply-add.
    """
    new_max = tl.maximum(row_max, tl.max(scores, 1) * scale_log2)
    # A row that has seen nothing yet: (-inf) - (-inf) is NaN.
    origin = tl.where(new_max == float("-inf"), 0.0, new_max)
    weights = tl.exp2(scores * scale_log2 - origin[:, None])
    rescale = tl.exp2(row_max - origin)
    return weights, new_max, row_sum * rescale + tl.sum(weights, 1), rescale


@triton.jit
def tanh(x):
    """tanh to within a few ulp: a series near 0, where the exponential form loses digits."""
    x2 = x * x
    near = x * (1.0 + x2 * (-1.0 / 3 + x2 * (2.0 / 15 + x2 * (-17.0 / 315 + x2 * (62.0 / 2835)))))
    t = tl.exp2(tl.abs(x) * (-2 * LOG2E))
    far = (1.0 - t) / (1.0 + t)
    return tl.where(tl.abs(x) < 0.25, near, tl.where(x < 0, -far, far))


@triton.jit
def dropout_mask(seed, stream, first_row, first_col, dropout_p, ROWS: tl.constexpr, COLS: tl.constexpr):
    """The elements of a ``(ROWS, COLS)`` tile that dropout leaves: a function of seed, stream and position.

    A Philox counter gives four neighbouring columns, so ``first_col`` must be a multiple of 4; tiles of any
    shape agree on the elements they share.
    """
    row = first_row + tl.arange(0, ROWS)[:, None]
    counter = first_col // 4 + tl.arange(0, COLS // 4)[None, :]
    bits = random_words(seed, counter, row, stream, ROWS, COLS // 4).reshape(ROWS, COLS)
    # The upper 24 bits are exact in fp32.
    return (bits >> 8).to(tl.float32) * 5.9604644775390625e-08 >= dropout_p


@triton.jit
def to_e4m3(x, scale):
    """``x / scale`` in e4m3, the largest number where it is beyond it; NaN stays."""
    x = x.to(tl.float32) / scale
    x = tl.where(x > 448.0, 448.0, tl.where(x < -448.0, -448.0, x))
    return x.to(tl.float8e4nv)
