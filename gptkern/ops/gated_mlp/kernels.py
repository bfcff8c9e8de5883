"""The gated perceptron's first product, forward and backward (Shazeer 2020, equation 6).

    hidden = activation(gate) * up        gate = x W[:inner]^T + b[:inner],   up = x W[inner:]^T + b[inner:]
    dgate = dhidden * up * activation'(gate),   dup = dhidden * activation(gate),   dhidden = dout W_proj

Layout as in ``linear``. A program of the forward pass owns a tile of ``hidden`` and so two of the product's:
columns col of the gate and inner + col of up. It reads x's tile once for both, and writes hidden once and,
for the backward pass, gate and up side by side. The backward pass takes both gradients in the epilogue of the
product that gives dhidden, and writes them as one matrix: the gradients of x and W are then plain products.
"""

from gptkern.ops._device import activate, activation_grad, rounded_product, tile_at
from gptkern.ops._triton import tl, triton
from gptkern.ops.linear.kernels import column_sum, halves, linear, linear_dw, product_tile

__all__ = ["column_sum", "gated_linear", "gated_linear_dact", "linear", "linear_dw"]


@triton.jit
def product_pair(
    a, b, row, col, other, M, N, K, stride_am, stride_ak, stride_bk, stride_bn,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, TMA: tl.constexpr,
    A_ROWS: tl.constexpr, B_ROWS: tl.constexpr,
):  # fmt: skip
    """Two fp32 tiles, A[row:] B[:, col:] and A[row:] B[:, other:]; arguments as in ``product_tile``.

    A tile's columns past the end of the gate are those of up, or zeros: the caller does not store them.
    """
    first = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    second = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    k_tiles = tl.cdiv(K, BLOCK_K)
    if TMA:
        # Asynchronous copies of whole tiles, then multiply and accumulate.
        for k in tl.range(0, k_tiles):
            if A_ROWS:
                a_tile = a.load([row, k * BLOCK_K])
            else:
                a_tile = a.load([k * BLOCK_K, row]).T
            if B_ROWS:
                first_tile = b.load([k * BLOCK_K, col])
                second_tile = b.load([k * BLOCK_K, other])
            else:
                first_tile = b.load([col, k * BLOCK_K]).T
                second_tile = b.load([other, k * BLOCK_K]).T
            first = tl.dot(a_tile, first_tile, first)
            second = tl.dot(a_tile, second_tile, second)
    else:
        offs_m = row + tl.arange(0, BLOCK_M)
        offs_n = tl.arange(0, BLOCK_N)
        offs_k = tl.arange(0, BLOCK_K)
        # int64 as in product_tile
        a_ptrs = a + offs_m.to(tl.int64)[:, None] * stride_am + offs_k.to(tl.int64)[None, :] * stride_ak
        b_offs = offs_k.to(tl.int64)[:, None] * stride_bk + offs_n.to(tl.int64)[None, :] * stride_bn
        first_ptrs = b + tl.cast(col, tl.int64) * stride_bn + b_offs
        second_ptrs = b + tl.cast(other, tl.int64) * stride_bn + b_offs
        for k in tl.range(0, k_tiles):
            at = tl.cast(k, tl.int64) * BLOCK_K
            inside = offs_k < K - at
            b_mask = inside[:, None] & (offs_n < N - col)[None, :]
            a_tile = tl.load(a_ptrs + at * stride_ak, (offs_m < M)[:, None] & inside[None, :], other=0.0)
            first_tile = tl.load(first_ptrs + at * stride_bk, b_mask, other=0.0)
            second_tile = tl.load(second_ptrs + at * stride_bk, b_mask, other=0.0)
            first = tl.dot(a_tile, first_tile, first, input_precision="ieee")
            second = tl.dot(a_tile, second_tile, second, input_precision="ieee")
    return first, second


@triton.jit
def _finish(
    gate, up, bias_ptr, out_ptr, pre_ptr, row, col, M, N, stride_bias,
    ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STORE_N: tl.constexpr,
):  # fmt: skip
    """Biases, activation and product of two accumulated tiles, STORE_N columns at a time."""
    if BLOCK_N > STORE_N:
        gate_left, gate_right = halves(gate, BLOCK_M, BLOCK_N)
        up_left, up_right = halves(up, BLOCK_M, BLOCK_N)
        half: tl.constexpr = BLOCK_N // 2
        _finish(
            gate_left, up_left, bias_ptr, out_ptr, pre_ptr, row, col, M, N, stride_bias,
            ACTIVATION, BLOCK_M, half, STORE_N,
        )  # fmt: skip
        _finish(
            gate_right, up_right, bias_ptr, out_ptr, pre_ptr, row, col + half, M, N, stride_bias,
            ACTIVATION, BLOCK_M, half, STORE_N,
        )  # fmt: skip
    else:
        offs_m, offs_n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
        columns = offs_n < N - col
        inside = (offs_m < M - row)[:, None] & columns[None, :]
        # Biases.
        if bias_ptr is not None:
            offs_b = (col + offs_n).to(tl.int64) * stride_bias
            gate += tl.load(bias_ptr + offs_b, columns, other=0.0).to(tl.float32)[None, :]
            offs_b += tl.cast(N, tl.int64) * stride_bias
            up += tl.load(bias_ptr + offs_b, columns, other=0.0).to(tl.float32)[None, :]
        if pre_ptr is not None:
            corner = tl.cast(row, tl.int64) * (2 * N) + col
            offs = offs_m[:, None] * (2 * N) + offs_n[None, :]
            tl.store(pre_ptr + corner + offs, gate.to(pre_ptr.dtype.element_ty), inside)
            tl.store(pre_ptr + corner + N + offs, up.to(pre_ptr.dtype.element_ty), inside)
        # Gate, store.
        hidden = activate(gate, ACTIVATION) * up
        corner = tl.cast(row, tl.int64) * N + col
        offs = offs_m[:, None] * N + offs_n[None, :]
        tl.store(out_ptr + corner + offs, hidden.to(out_ptr.dtype.element_ty), inside)


@triton.jit
def gated_linear(
    a, b,
    bias_ptr,  # (2 N,), or None
    out_ptr,  # (M, N) contiguous
    pre_ptr,  # (M, 2 N) contiguous: gate, then up; or None
    M, N, K, stride_am, stride_ak, stride_bk, stride_bn, stride_bias,
    ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    STORE_N: tl.constexpr, GROUP_M: tl.constexpr, TMA: tl.constexpr, A_ROWS: tl.constexpr,
    B_ROWS: tl.constexpr,
):  # fmt: skip
    """a: (M, K), b: (K, 2 N), the gate's columns and then those of up."""
    tile_m, tile_n = tile_at(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
    row, col = tile_m * BLOCK_M, tile_n * BLOCK_N
    gate, up = product_pair(
        a, b, row, col, N + col, M, N, K, stride_am, stride_ak, stride_bk, stride_bn,
        BLOCK_M, BLOCK_N, BLOCK_K, TMA, A_ROWS, B_ROWS,
    )  # fmt: skip
    _finish(
        gate, up, bias_ptr, out_ptr, pre_ptr, row, col, M, N, stride_bias,
        ACTIVATION, BLOCK_M, BLOCK_N, STORE_N,
    )  # fmt: skip


@triton.jit
def _finish_dact(
    acc, pre_ptr, dpre_ptr, partial_ptr, row, col, M, N,
    ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STORE_N: tl.constexpr,
):  # fmt: skip
    """The gradients of gate and up from that of hidden, and their column sums, STORE_N columns at a time."""
    if BLOCK_N > STORE_N:
        left, right = halves(acc, BLOCK_M, BLOCK_N)
        half: tl.constexpr = BLOCK_N // 2
        _finish_dact(left, pre_ptr, dpre_ptr, partial_ptr, row, col, M, N, ACTIVATION, BLOCK_M, half, STORE_N)
        _finish_dact(
            right, pre_ptr, dpre_ptr, partial_ptr, row, col + half, M, N, ACTIVATION, BLOCK_M, half, STORE_N
        )
    else:
        offs_m, offs_n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
        columns = offs_n < N - col
        inside = (offs_m < M - row)[:, None] & columns[None, :]
        corner = tl.cast(row, tl.int64) * (2 * N) + col
        offs = offs_m[:, None] * (2 * N) + offs_n[None, :]
        gate = tl.load(pre_ptr + corner + offs, inside, other=0.0).to(tl.float32)
        up = tl.load(pre_ptr + corner + N + offs, inside, other=0.0).to(tl.float32)
        # Rows past M are zeros in acc, so they add nothing to the sums.
        dgate = rounded_product(acc * up, activation_grad(gate, ACTIVATION))
        dup = rounded_product(acc, activate(gate, ACTIVATION))
        tl.store(dpre_ptr + corner + offs, dgate.to(dpre_ptr.dtype.element_ty), inside)
        tl.store(dpre_ptr + corner + N + offs, dup.to(dpre_ptr.dtype.element_ty), inside)
        # This tile's part of the bias gradients.
        if partial_ptr is not None:
            at = partial_ptr + tl.cast(row // BLOCK_M, tl.int64) * (2 * N) + col + offs_n
            tl.store(at, tl.sum(dgate, axis=0), columns)
            tl.store(at + N, tl.sum(dup, axis=0), columns)


@triton.jit
def gated_linear_dact(
    a, b,
    pre_ptr,  # (M, 2 N) contiguous: gate, then up
    dpre_ptr,  # as pre
    partial_ptr,  # (ceil(M / BLOCK_M), 2 N) fp32: column sums of dpre's tiles; or None
    M, N, K, stride_am, stride_ak, stride_bk, stride_bn,
    ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    STORE_N: tl.constexpr, GROUP_M: tl.constexpr, TMA: tl.constexpr, A_ROWS: tl.constexpr,
    B_ROWS: tl.constexpr,
):  # fmt: skip
    """a: (M, K) and b: (K, N), whose product is the gradient of hidden."""
    tile_m, tile_n = tile_at(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
    row, col = tile_m * BLOCK_M, tile_n * BLOCK_N
    acc = product_tile(
        a, b, row, col, 0, tl.cdiv(K, BLOCK_K), M, N, K, stride_am, stride_ak, stride_bk, stride_bn,
        BLOCK_M, BLOCK_N, BLOCK_K, TMA, A_ROWS, B_ROWS,
    )  # fmt: skip
    _finish_dact(acc, pre_ptr, dpre_ptr, partial_ptr, row, col, M, N, ACTIVATION, BLOCK_M, BLOCK_N, STORE_N)
