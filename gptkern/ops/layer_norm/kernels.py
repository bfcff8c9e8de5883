"""Layer norm and RMS norm, alone or after a residual addition, forward and backward.

    s = residual + dropout(x)                          (s = x without a residual)
    y = (s - mean) * rstd * weight + bias              mean, rstd over a row's WIDTH columns

Without a weight it is 1; with UNIT_OFFSET the factor is 1 + weight (Gemma's RMS norm).

Layer norm: Ba, Kiros and Hinton 2016, equations 3 and 4; RMS norm, which is CENTERED = False and
has no bias: Zhang and Sennrich 2019, equation 4. With g = dy * weight and h = (s - mean) * rstd,

    ds = rstd * (g - h * mean(g * h) - mean(g)) + d_sum,   dweight = sum over rows of dy * h,
    dbias = sum over rows of dy                            (RMS norm: no mean(g) term)

Layout. A program takes ROWS rows at a time and strides over all rows, so that weight and bias are
read once a program. ROWS, BLOCK and the number of warps follow from WIDTH alone: however many rows
there are, a row is summed in the same order and gives the same bits. Forward reads x (and residual)
once and writes y (and s) once. Backward reads dy, d_sum and s once and writes ds once; weight and
bias grads are summed in registers over a program's rows, written once a program to a buffer of
``parts`` rows, and added up by ``norm_weight_grad_kernel`` in a fixed order.

Rows too wide for registers take the ``wide`` kernels: one program a row, two passes over it in
chunks of BLOCK columns, the second pass from the L2 cache; there the weight and bias grads are
summed by ``norm_wide_weight_grad_kernel``, which owns columns instead of rows.
"""

from gptkern.ops._device import row_dropout, row_offsets, row_statistics, row_terms
from gptkern.ops._triton import tl, triton

# Row counts change from call to call: specialising on them would compile anew at 1 row and at 16.
_VARYING = ("rows", "x_inner", "residual_inner", "threshold", "parts")


@triton.jit
def load_weight(weight_ptr, columns, lanes, UNIT_OFFSET: tl.constexpr):
    """The factors of some columns, fp32."""
    if weight_ptr is None:
        weight = tl.full(columns.shape, 1.0, tl.float32)
    else:
        weight = tl.load(weight_ptr + columns, mask=lanes, other=0.0).to(tl.float32)
        if UNIT_OFFSET:
            weight += 1.0
    return weight


@triton.jit(do_not_specialize=_VARYING)
def norm_forward_kernel(
    x_ptr,  # rows of WIDTH, row r at (r // x_inner) * stride_xo + (r % x_inner) * stride_xi
    residual_ptr,  # rows of WIDTH with their own strides, or None
    weight_ptr,  # (WIDTH,), or None
    bias_ptr,  # (WIDTH,) or None
    out_ptr,  # (rows, WIDTH)
    sum_ptr,  # (rows, WIDTH), or None without a residual
    stats_ptr,  # fp32 (2, rows): rstd, mean (RMS norm: (1, rows)); None if no backward pass follows
    seed_ptr,  # one int64, or None without dropout
    x_inner, stride_xo, stride_xi,
    residual_inner, stride_ro, stride_ri,
    rows,
    eps,
    threshold,  # elements whose 16 random bits are below it are dropped
    keep_scale,
    WIDTH: tl.constexpr,
    CENTERED: tl.constexpr,
    UNIT_OFFSET: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    columns = tl.arange(0, BLOCK)
    lanes = columns < WIDTH
    weight = load_weight(weight_ptr, columns, lanes, UNIT_OFFSET)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + columns, mask=lanes, other=0.0).to(tl.float32)
    for first in range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS):
        # Load ROWS rows; drop elements.
        row = first + tl.arange(0, ROWS)
        mask = (row < rows)[:, None] & lanes[None, :]
        at_x = row_offsets(row, x_inner, stride_xo, stride_xi)[:, None] + columns[None, :]
        at_out = row.to(tl.int64)[:, None] * WIDTH + columns[None, :]
        x = tl.load(x_ptr + at_x, mask=mask, other=0.0).to(tl.float32)
        if seed_ptr is not None:
            x = row_dropout(x, tl.load(seed_ptr), row, 0, threshold, keep_scale, ROWS, BLOCK)
        # Add the residual and store the sum.
        if residual_ptr is not None:
            at_residual = row_offsets(row, residual_inner, stride_ro, stride_ri)[:, None] + columns[None, :]
            x += tl.load(residual_ptr + at_residual, mask=mask, other=0.0).to(tl.float32)
            # The norm is that of the stored, rounded sum, which the backward pass reads.
            rounded = x.to(sum_ptr.dtype.element_ty)
            tl.store(sum_ptr + at_out, rounded, mask=mask)
            x = rounded.to(tl.float32)
        # Statistics, normalise, scale and shift.
        x, rstd, mean = row_statistics(x, lanes, eps, WIDTH, CENTERED)
        out = x * rstd[:, None] * weight[None, :]
        if bias_ptr is not None:
            out += bias[None, :]
        tl.store(out_ptr + at_out, out.to(out_ptr.dtype.element_ty), mask=mask)
        if stats_ptr is not None:
            tl.store(stats_ptr + row, rstd, mask=row < rows)
            if CENTERED:
                tl.store(stats_ptr + rows + row, mean, mask=row < rows)


@triton.jit
def gradient_rows(
    first, d_out_ptr, d_sum_ptr, sum_ptr, stats_ptr, x_inner, stride_xo, stride_xi, rows, columns, lanes,
    WIDTH: tl.constexpr, CENTERED: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """(d_out, sum, d_sum, rstd, mean) of ROWS rows as they are stored; zeros for what there is not."""
    row = first + tl.arange(0, ROWS)
    present = row < rows
    mask = present[:, None] & lanes[None, :]
    at = row.to(tl.int64)[:, None] * WIDTH + columns[None, :]
    at_x = row_offsets(row, x_inner, stride_xo, stride_xi)[:, None] + columns[None, :]
    d_out = tl.load(d_out_ptr + at, mask=mask, other=0.0)
    total = tl.load(sum_ptr + at_x, mask=mask, other=0.0)
    rstd = tl.load(stats_ptr + row, mask=present, other=0.0)
    d_sum, mean = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.float32)
    if d_sum_ptr is not None:
        d_sum = tl.load(d_sum_ptr + at, mask=mask, other=0.0)
    if CENTERED:
        mean = tl.load(stats_ptr + rows + row, mask=present, other=0.0)
    return d_out, total, d_sum, rstd, mean


@triton.jit(do_not_specialize=_VARYING)
def norm_backward_kernel(
    d_out_ptr,  # (rows, WIDTH)
    d_sum_ptr,  # (rows, WIDTH): the gradient of the sum itself, or None
    sum_ptr,  # the rows before normalisation; row r at (r // x_inner) * stride_xo + (r % x_inner) * stride_xi
    weight_ptr,  # (WIDTH,), or None
    stats_ptr,  # fp32 (2, rows): rstd, mean (RMS norm: (1, rows))
    seed_ptr,  # one int64, or None without dropout
    dx_ptr,  # (rows, WIDTH)
    d_residual_ptr,  # (rows, WIDTH), or None if it equals dx: same dtype and no dropout
    d_weight_part_ptr,  # fp32 (programs, WIDTH), or None if the weight needs no gradient
    d_bias_part_ptr,  # fp32 (programs, WIDTH), or None
    x_inner, stride_xo, stride_xi,
    rows,
    threshold,
    keep_scale,
    WIDTH: tl.constexpr,
    CENTERED: tl.constexpr,
    UNIT_OFFSET: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    columns = tl.arange(0, BLOCK)
    lanes = columns < WIDTH
    weight = load_weight(weight_ptr, columns, lanes, UNIT_OFFSET)
    d_weight = tl.zeros([ROWS, BLOCK], tl.float32)
    d_bias = tl.zeros([ROWS, BLOCK], tl.float32)
    # The next rows' loads are under way while these are computed, where registers hold both.
    AHEAD: tl.constexpr = BLOCK <= 2048
    step = tl.num_programs(0) * ROWS
    if AHEAD:
        following = gradient_rows(
            tl.program_id(0) * ROWS, d_out_ptr, d_sum_ptr, sum_ptr, stats_ptr, x_inner, stride_xo, stride_xi,
            rows, columns, lanes, WIDTH, CENTERED, ROWS,
        )  # fmt: skip
    for first in range(tl.program_id(0) * ROWS, rows, step):
        row = first + tl.arange(0, ROWS)
        mask = (row < rows)[:, None] & lanes[None, :]
        at = row.to(tl.int64)[:, None] * WIDTH + columns[None, :]
        if AHEAD:
            d_out, total, d_sum, rstd, mean = following
            following = gradient_rows(
                first + step, d_out_ptr, d_sum_ptr, sum_ptr, stats_ptr, x_inner, stride_xo, stride_xi, rows,
                columns, lanes, WIDTH, CENTERED, ROWS,
            )  # fmt: skip
        else:
            d_out, total, d_sum, rstd, mean = gradient_rows(
                first, d_out_ptr, d_sum_ptr, sum_ptr, stats_ptr, x_inner, stride_xo, stride_xi, rows,
                columns, lanes, WIDTH, CENTERED, ROWS,
            )  # fmt: skip
        # Recompute the normalised rows from the saved sum and statistics.
        d_out = d_out.to(tl.float32)
        normed = total.to(tl.float32)
        if CENTERED:
            normed -= mean[:, None]
        normed = tl.where(mask, normed * rstd[:, None], 0.0)
        # Accumulate weight and bias gradients.
        if d_weight_part_ptr is not None:
            d_weight += d_out * normed
        if d_bias_part_ptr is not None:
            d_bias += d_out
        # Input gradient: project out the components along the normalised row and along the mean.
        grad = row_terms(d_out, weight[None, :])
        inner = grad - normed * (tl.sum(row_terms(grad, normed), axis=1) / WIDTH)[:, None]
        if CENTERED:
            inner -= (tl.sum(grad, axis=1) / WIDTH)[:, None]
        dx = inner * rstd[:, None]
        if d_sum_ptr is not None:
            dx += d_sum.to(tl.float32)
        if d_residual_ptr is not None:
            tl.store(d_residual_ptr + at, dx.to(d_residual_ptr.dtype.element_ty), mask=mask)
        if seed_ptr is not None:
            dx = row_dropout(dx, tl.load(seed_ptr), row, 0, threshold, keep_scale, ROWS, BLOCK)
        tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=mask)
    # Store this program's part of the weight and bias gradients.
    at_part = tl.program_id(0) * WIDTH + columns
    if d_weight_part_ptr is not None:
        tl.store(d_weight_part_ptr + at_part, tl.sum(d_weight, axis=0), mask=lanes)
    if d_bias_part_ptr is not None:
        tl.store(d_bias_part_ptr + at_part, tl.sum(d_bias, axis=0), mask=lanes)


@triton.jit(do_not_specialize=_VARYING)
def norm_weight_grad_kernel(
    d_weight_part_ptr,  # fp32 (parts, WIDTH)
    d_bias_part_ptr,  # fp32 (parts, WIDTH), or None
    d_weight_ptr,  # (WIDTH,)
    d_bias_ptr,  # (WIDTH,), or None
    parts,
    WIDTH: tl.constexpr,
    PARTS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Add up the parts of a block of columns, in the order of the parts' numbers."""
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    lanes = columns < WIDTH
    d_weight = tl.zeros([PARTS, COLUMNS], tl.float32)
    d_bias = tl.zeros([PARTS, COLUMNS], tl.float32)
    for first in range(0, parts, PARTS):
        part = first + tl.arange(0, PARTS)
        mask = (part < parts)[:, None] & lanes[None, :]
        at = part[:, None] * WIDTH + columns[None, :]
        d_weight += tl.load(d_weight_part_ptr + at, mask=mask, other=0.0)
        if d_bias_part_ptr is not None:
            d_bias += tl.load(d_bias_part_ptr + at, mask=mask, other=0.0)
    total = tl.sum(d_weight, axis=0)
    tl.store(d_weight_ptr + columns, total.to(d_weight_ptr.dtype.element_ty), mask=lanes)
    if d_bias_part_ptr is not None:
        total = tl.sum(d_bias, axis=0)
        tl.store(d_bias_ptr + columns, total.to(d_bias_ptr.dtype.element_ty), mask=lanes)


@triton.jit(do_not_specialize=_VARYING)
def norm_wide_forward_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, out_ptr, sum_ptr, stats_ptr, seed_ptr,
    x_inner, stride_xo, stride_xi,
    residual_inner, stride_ro, stride_ri,
    rows,
    eps,
    threshold,
    keep_scale,
    WIDTH: tl.constexpr,
    CENTERED: tl.constexpr,
    UNIT_OFFSET: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """``norm_forward_kernel`` for one row a program, in chunks; arguments as there.

    Chunk statistics are merged pairwise (Chan, Golub and LeVeque 1983, equation 2.1).
    """
    row = tl.program_id(0) + tl.arange(0, 1)
    x_ptr += row_offsets(row, x_inner, stride_xo, stride_xi)[:, None]
    out_ptr += row.to(tl.int64)[:, None] * WIDTH
    if residual_ptr is not None:
        residual_ptr += row_offsets(row, residual_inner, stride_ro, stride_ri)[:, None]
        sum_ptr += row.to(tl.int64)[:, None] * WIDTH
    # First pass: sum with the residual, running mean and sum of squares.
    mean = tl.zeros([1], tl.float32)
    squares = tl.zeros([1], tl.float32)
    for start in range(0, WIDTH, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        lanes = columns < WIDTH
        x = tl.load(x_ptr + columns[None, :], mask=lanes[None, :], other=0.0).to(tl.float32)
        if seed_ptr is not None:
            x = row_dropout(x, tl.load(seed_ptr), row, start, threshold, keep_scale, 1, BLOCK)
        if residual_ptr is not None:
            x += tl.load(residual_ptr + columns[None, :], mask=lanes[None, :], other=0.0).to(tl.float32)
            rounded = x.to(sum_ptr.dtype.element_ty)
            tl.store(sum_ptr + columns[None, :], rounded, mask=lanes[None, :])
            x = rounded.to(tl.float32)
        count = tl.minimum(BLOCK, WIDTH - start).to(tl.float32)
        if CENTERED:
            chunk_mean = tl.sum(x, axis=1) / count
            x = tl.where(lanes[None, :], x - chunk_mean[:, None], 0.0)
            shift = chunk_mean - mean
            mean += shift * (count / (start + count))
            squares += shift * shift * (start * count / (start + count))
        squares += tl.sum(row_terms(x, x), axis=1)
    rstd = tl.rsqrt(squares / WIDTH + eps)
    if stats_ptr is not None:
        tl.store(stats_ptr + row, rstd)
        if CENTERED:
            tl.store(stats_ptr + rows + row, mean)
    if residual_ptr is not None:
        tl.debug_barrier()  # a thread reads elements of the sum that others wrote
        x_ptr = sum_ptr
    # Second pass: normalise, scale and shift.
    for start in range(0, WIDTH, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        lanes = columns < WIDTH
        x = tl.load(x_ptr + columns[None, :], mask=lanes[None, :], other=0.0).to(tl.float32)
        out = (x - mean[:, None]) * rstd[:, None]
        out *= load_weight(weight_ptr, columns, lanes, UNIT_OFFSET)[None, :]
        if bias_ptr is not None:
            out += tl.load(bias_ptr + columns, mask=lanes, other=0.0).to(tl.float32)[None, :]
        tl.store(out_ptr + columns[None, :], out.to(out_ptr.dtype.element_ty), mask=lanes[None, :])


@triton.jit(do_not_specialize=_VARYING)
def norm_wide_backward_kernel(
    d_out_ptr, d_sum_ptr, sum_ptr, weight_ptr, stats_ptr, seed_ptr, dx_ptr, d_residual_ptr,
    x_inner, stride_xo, stride_xi,
    rows,
    threshold,
    keep_scale,
    WIDTH: tl.constexpr,
    CENTERED: tl.constexpr,
    UNIT_OFFSET: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """``norm_backward_kernel`` for one row a program, in chunks, without weight and bias grads."""
    row = tl.program_id(0) + tl.arange(0, 1)
    base = row.to(tl.int64)[:, None] * WIDTH
    sum_ptr += row_offsets(row, x_inner, stride_xo, stride_xi)[:, None]
    rstd = tl.load(stats_ptr + row)
    mean = tl.load(stats_ptr + rows + row) if CENTERED else tl.zeros([1], tl.float32)
    # First pass: the means of g * h and of g.
    product_mean = tl.zeros([1], tl.float32)
    grad_mean = tl.zeros([1], tl.float32)
    for start in range(0, WIDTH, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        lanes = (columns < WIDTH)[None, :]
        weight = load_weight(weight_ptr, columns, columns < WIDTH, UNIT_OFFSET)[None, :]
        grad = tl.load(d_out_ptr + base + columns[None, :], mask=lanes, other=0.0).to(tl.float32)
        grad = row_terms(grad, weight)
        normed = tl.load(sum_ptr + columns[None, :], mask=lanes, other=0.0).to(tl.float32)
        normed = tl.where(lanes, (normed - mean[:, None]) * rstd[:, None], 0.0)
        product_mean += tl.sum(row_terms(grad, normed), axis=1) / WIDTH
        if CENTERED:
            grad_mean += tl.sum(grad, axis=1) / WIDTH
    # Second pass: the input gradient.
    for start in range(0, WIDTH, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        lanes = (columns < WIDTH)[None, :]
        weight = load_weight(weight_ptr, columns, columns < WIDTH, UNIT_OFFSET)[None, :]
        grad = tl.load(d_out_ptr + base + columns[None, :], mask=lanes, other=0.0).to(tl.float32) * weight
        normed = tl.load(sum_ptr + columns[None, :], mask=lanes, other=0.0).to(tl.float32)
        normed = (normed - mean[:, None]) * rstd[:, None]
        dx = (grad - normed * product_mean[:, None] - grad_mean[:, None]) * rstd[:, None]
        if d_sum_ptr is not None:
            dx += tl.load(d_sum_ptr + base + columns[None, :], mask=lanes, other=0.0).to(tl.float32)
        if d_residual_ptr is not None:
            d_residual = dx.to(d_residual_ptr.dtype.element_ty)
            tl.store(d_residual_ptr + base + columns[None, :], d_residual, mask=lanes)
        if seed_ptr is not None:
            dx = row_dropout(dx, tl.load(seed_ptr), row, start, threshold, keep_scale, 1, BLOCK)
        tl.store(dx_ptr + base + columns[None, :], dx.to(dx_ptr.dtype.element_ty), mask=lanes)


@triton.jit(do_not_specialize=_VARYING)
def norm_wide_weight_grad_kernel(
    d_out_ptr, sum_ptr, stats_ptr, d_weight_part_ptr, d_bias_part_ptr,
    x_inner, stride_xo, stride_xi,
    rows,
    WIDTH: tl.constexpr,
    CENTERED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """Parts of the weight and bias grads of wide rows: a program owns COLUMNS columns of some rows."""
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    lanes = columns < WIDTH
    d_weight = tl.zeros([ROWS, COLUMNS], tl.float32)
    d_bias = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(tl.program_id(1) * ROWS, rows, tl.num_programs(1) * ROWS):
        row = first + tl.arange(0, ROWS)
        present = row < rows
        mask = present[:, None] & lanes[None, :]
        at = row.to(tl.int64)[:, None] * WIDTH + columns[None, :]
        at_x = row_offsets(row, x_inner, stride_xo, stride_xi)[:, None] + columns[None, :]
        d_out = tl.load(d_out_ptr + at, mask=mask, other=0.0).to(tl.float32)
        normed = tl.load(sum_ptr + at_x, mask=mask, other=0.0).to(tl.float32)
        if CENTERED:
            normed -= tl.load(stats_ptr + rows + row, mask=present, other=0.0)[:, None]
        normed *= tl.load(stats_ptr + row, mask=present, other=0.0)[:, None]
        d_weight += d_out * normed
        if d_bias_part_ptr is not None:
            d_bias += d_out
    at_part = tl.program_id(1) * WIDTH + columns
    tl.store(d_weight_part_ptr + at_part, tl.sum(d_weight, axis=0), mask=lanes)
    if d_bias_part_ptr is not None:
        tl.store(d_bias_part_ptr + at_part, tl.sum(d_bias, axis=0), mask=lanes)
