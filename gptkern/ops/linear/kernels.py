"""Tiled matrix products with fused epilogues (Triton).

    linear        out = activation(A B + bias) + residual, optionally storing A B + bias
    linear_dact   dpre = (A B) * activation'(pre), and its column sums for the bias gradient
    linear_dw     A B over a range of k: a weight gradient, the sum over tokens split in a fixed way
    column_sum    sums of rows, optionally of dout * activation'(pre): bias gradients, split combine

A is (M, K) and B is (K, N), each with its own strides: a weight is B = weight.T without a copy
whichever way it lies in memory. A program owns a BLOCK_M x BLOCK_N tile of the result; tiles are
numbered GROUP_M deep, so that programs running side by side read the same columns of B from L2
(Tillet, Kung and Cox 2019, "Triton"). A is read ceil(N / BLOCK_N) times and B ceil(M / BLOCK_M)
times, mostly from L2; every result is written once.

k runs upwards in steps of BLOCK_K inside one accumulator, and BLOCK_K depends on the dtype alone:
the order of the sums does not change with M, so a row's bits do not depend on its neighbours.
"""

from gptkern.ops._device import activate, activation_grad, rounded_product, tile_at
from gptkern.ops._triton import tl, triton


@triton.jit
def product_tile(
    a,
    b,
    row,
    col,
    k_begin,
    k_end,
    M,
    N,
    K,
    stride_am,
    stride_ak,
    stride_bk,
    stride_bn,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TMA: tl.constexpr,
    A_ROWS: tl.constexpr,
    B_ROWS: tl.constexpr,
):
    """The fp32 tile A[row:, k] @ B[k, col:], k over the k tiles k_begin to k_end.

    With TMA, a and b are descriptors: of the matrix if its rows are contiguous (A_ROWS, B_ROWS), else
    of its transpose. Without, they are pointers. Loads outside the matrix give zeros either way.
    """
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    if TMA:
        # Asynchronous copies of whole tiles, then multiply and accumulate.
        for k in tl.range(k_begin, k_end):
            if A_ROWS:
                a_tile = a.load([row, k * BLOCK_K])
            else:
                a_tile = a.load([k * BLOCK_K, row]).T
            if B_ROWS:
                b_tile = b.load([k * BLOCK_K, col])
            else:
                b_tile = b.load([col, k * BLOCK_K]).T
            acc = tl.dot(a_tile, b_tile, acc)
    else:
        offs_m = row + tl.arange(0, BLOCK_M)
        offs_n = col + tl.arange(0, BLOCK_N)
        offs_k = tl.arange(0, BLOCK_K)
        # int64: rows * stride passes 2^31 at 64k tokens of a 50257-wide layer
        a_ptrs = a + offs_m.to(tl.int64)[:, None] * stride_am + offs_k.to(tl.int64)[None, :] * stride_ak
        b_ptrs = b + offs_k.to(tl.int64)[:, None] * stride_bk + offs_n.to(tl.int64)[None, :] * stride_bn
        # Masked loads, then multiply and accumulate.
        for k in tl.range(k_begin, k_end):
            first = tl.cast(k, tl.int64) * BLOCK_K
            inside = offs_k < K - first
            a_tile = tl.load(a_ptrs + first * stride_ak, (offs_m < M)[:, None] & inside[None, :], other=0.0)
            b_tile = tl.load(b_ptrs + first * stride_bk, inside[:, None] & (offs_n < N)[None, :], other=0.0)
            acc = tl.dot(a_tile, b_tile, acc, input_precision="ieee")
    return acc


@triton.jit
def halves(tile, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The left and right half of a tile; no value moves to another thread."""
    return tl.split(tl.permute(tl.reshape(tile, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1)))


@triton.jit
def _finish(
    acc,
    bias_ptr,
    residual_ptr,
    out_ptr,
    pre_ptr,
    row,
    col,
    M,
    N,
    stride_bias,
    stride_rm,
    stride_rn,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STORE_N: tl.constexpr,
):
    """Bias, activation and residual on an accumulated tile, STORE_N columns at a time to spare registers."""
    if BLOCK_N > STORE_N:
        left, right = halves(acc, BLOCK_M, BLOCK_N)
        half: tl.constexpr = BLOCK_N // 2
        _finish(
            left, bias_ptr, residual_ptr, out_ptr, pre_ptr, row, col, M, N,
            stride_bias, stride_rm, stride_rn, ACTIVATION, BLOCK_M, half, STORE_N,
        )  # fmt: skip
        _finish(
            right, bias_ptr, residual_ptr, out_ptr, pre_ptr, row, col + half, M, N,
            stride_bias, stride_rm, stride_rn, ACTIVATION, BLOCK_M, half, STORE_N,
        )  # fmt: skip
    else:
        # Bias.
        offs_m, offs_n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
        inside = (offs_m < M - row)[:, None] & (offs_n < N - col)[None, :]
        if bias_ptr is not None:
            offs_b = (col + offs_n).to(tl.int64) * stride_bias
            acc += tl.load(bias_ptr + offs_b, offs_n < N - col, other=0.0).to(tl.float32)[None, :]
        # int64 for the tile's corner alone: within a tile offsets stay small, and registers with them
        corner = tl.cast(row, tl.int64) * N + col
        offs = offs_m[:, None] * N + offs_n[None, :]
        if pre_ptr is not None:
            tl.store(pre_ptr + corner + offs, acc.to(pre_ptr.dtype.element_ty), inside)
        # Activation, residual, store.
        acc = activate(acc, ACTIVATION)
        if residual_ptr is not None:
            rows, cols = (row + offs_m).to(tl.int64), (col + offs_n).to(tl.int64)
            offs_r = rows[:, None] * stride_rm + cols[None, :] * stride_rn
            acc += tl.load(residual_ptr + offs_r, inside, other=0.0).to(tl.float32)
        tl.store(out_ptr + corner + offs, acc.to(out_ptr.dtype.element_ty), inside)


@triton.jit
def linear(
    a,
    b,
    bias_ptr,
    residual_ptr,
    out_ptr,
    pre_ptr,
    M,
    N,
    K,
    stride_am,
    stride_ak,
    stride_bk,
    stride_bn,
    stride_bias,
    stride_rm,
    stride_rn,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STORE_N: tl.constexpr,
    GROUP_M: tl.constexpr,
    PERSISTENT: tl.constexpr,
    TMA: tl.constexpr,
    A_ROWS: tl.constexpr,
    B_ROWS: tl.constexpr,
):
    """out and pre, or None for pre: (M, N) contiguous. bias: (N,). residual: (M, N), any strides."""
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=PERSISTENT):
        tile_m, tile_n = tile_at(tile, M, N, BLOCK_M, BLOCK_N, GROUP_M)
        row, col = tile_m * BLOCK_M, tile_n * BLOCK_N
        acc = product_tile(
            a, b, row, col, 0, tl.cdiv(K, BLOCK_K), M, N, K, stride_am, stride_ak, stride_bk, stride_bn,
            BLOCK_M, BLOCK_N, BLOCK_K, TMA, A_ROWS, B_ROWS,
        )  # fmt: skip
        _finish(
            acc, bias_ptr, residual_ptr, out_ptr, pre_ptr, row, col, M, N, stride_bias, stride_rm, stride_rn,
            ACTIVATION, BLOCK_M, BLOCK_N, STORE_N,
        )  # fmt: skip


@triton.jit
def _finish_dact(
    acc,
    pre_ptr,
    dpre_ptr,
    partial_ptr,
    row,
    col,
    M,
    N,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STORE_N: tl.constexpr,
):
    """The activation's gradient on an accumulated tile, and its column sums, STORE_N columns at a time."""
    if BLOCK_N > STORE_N:
        left, right = halves(acc, BLOCK_M, BLOCK_N)
        half: tl.constexpr = BLOCK_N // 2
        _finish_dact(left, pre_ptr, dpre_ptr, partial_ptr, row, col, M, N, ACTIVATION, BLOCK_M, half, STORE_N)
        _finish_dact(
            right, pre_ptr, dpre_ptr, partial_ptr, row, col + half, M, N, ACTIVATION, BLOCK_M, half, STORE_N
        )
    else:
        offs_m, offs_n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
        inside = (offs_m < M - row)[:, None] & (offs_n < N - col)[None, :]
        corner = tl.cast(row, tl.int64) * N + col
        offs = offs_m[:, None] * N + offs_n[None, :]
        # Gradient of the activation. Rows past M are zeros in acc, so they add nothing to the sums.
        pre = tl.load(pre_ptr + corner + offs, inside, other=0.0).to(tl.float32)
        acc = rounded_product(acc, activation_grad(pre, ACTIVATION))
        tl.store(dpre_ptr + corner + offs, acc.to(dpre_ptr.dtype.element_ty), inside)
        # This tile's part of the bias gradient.
        if partial_ptr is not None:
            at = tl.cast(row // BLOCK_M, tl.int64) * N + col
            tl.store(partial_ptr + at + offs_n, tl.sum(acc, axis=0), offs_n < N - col)


@triton.jit
def linear_dact(
    a,
    b,
    pre_ptr,
    dpre_ptr,
    partial_ptr,
    M,
    N,
    K,
    stride_am,
    stride_ak,
    stride_bk,
    stride_bn,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STORE_N: tl.constexpr,
    GROUP_M: tl.constexpr,
    TMA: tl.constexpr,
    A_ROWS: tl.constexpr,
    B_ROWS: tl.constexpr,
):
    """dpre: (M, N) contiguous, as pre. partial: (ceil(M / BLOCK_M), N) fp32, column sums of dpre's tiles."""
    tile_m, tile_n = tile_at(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
    row, col = tile_m * BLOCK_M, tile_n * BLOCK_N
    acc = product_tile(
        a, b, row, col, 0, tl.cdiv(K, BLOCK_K), M, N, K, stride_am, stride_ak, stride_bk, stride_bn,
        BLOCK_M, BLOCK_N, BLOCK_K, TMA, A_ROWS, B_ROWS,
    )  # fmt: skip
    _finish_dact(acc, pre_ptr, dpre_ptr, partial_ptr, row, col, M, N, ACTIVATION, BLOCK_M, BLOCK_N, STORE_N)


@triton.jit
def linear_dw(
    a,
    b,
    out_ptr,
    M,
    N,
    K,
    stride_am,
    stride_ak,
    stride_bk,
    stride_bn,
    stride_om,
    stride_on,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    TMA: tl.constexpr,
    A_ROWS: tl.constexpr,
    B_ROWS: tl.constexpr,
):
    """out: (splits, M, N), the weight's own strides within a split; grid (tiles, splits)."""
    # This program's share of the sum over k.
    tile_m, tile_n = tile_at(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
    row, col = tile_m * BLOCK_M, tile_n * BLOCK_N
    k_tiles = tl.cdiv(K, BLOCK_K)
    split = tl.program_id(1)
    share = tl.cdiv(k_tiles, tl.num_programs(1))
    acc = product_tile(
        a, b, row, col, split * share, tl.minimum(split * share + share, k_tiles), M, N, K,
        stride_am, stride_ak, stride_bk, stride_bn, BLOCK_M, BLOCK_N, BLOCK_K, TMA, A_ROWS, B_ROWS,
    )  # fmt: skip
    # Store the partial sum.
    offs_m = (row + tl.arange(0, BLOCK_M)).to(tl.int64)
    offs_n = (col + tl.arange(0, BLOCK_N)).to(tl.int64)
    inside = (offs_m < M)[:, None] & (offs_n < N)[None, :]
    offs = tl.cast(split, tl.int64) * M * N + offs_m[:, None] * stride_om + offs_n[None, :] * stride_on
    tl.store(out_ptr + offs, acc.to(out_ptr.dtype.element_ty), inside)


@triton.jit
def column_sum(
    x_ptr,
    pre_ptr,
    dpre_ptr,
    sum_ptr,
    M,
    N,
    stride_m,
    stride_n,
    rows_per_program,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """sum: (programs of rows, N), each the sum of rows_per_program rows of x, in their order.

    With pre, (M, N) contiguous, the sum is over the rows of dpre = x * activation'(pre), stored as well.
    """
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    first = tl.program_id(1) * rows_per_program
    last = tl.minimum(first + rows_per_program, M)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for row in tl.range(first, last, BLOCK_M):
        offs_m = row + tl.arange(0, BLOCK_M)
        inside = (offs_m < last)[:, None] & (offs_n < N)[None, :]
        rows = offs_m.to(tl.int64)[:, None]
        x = tl.load(x_ptr + rows * stride_m + offs_n[None, :] * stride_n, inside, other=0.0).to(tl.float32)
        if pre_ptr is not None:
            offs = rows * N + offs_n[None, :]
            x *= activation_grad(tl.load(pre_ptr + offs, inside, other=0.0).to(tl.float32), ACTIVATION)
            tl.store(dpre_ptr + offs, x.to(dpre_ptr.dtype.element_ty), inside)
        acc += x
    if sum_ptr is not None:
        sums = tl.sum(acc, axis=0).to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + tl.cast(tl.program_id(1), tl.int64) * N + offs_n, sums, offs_n < N)
