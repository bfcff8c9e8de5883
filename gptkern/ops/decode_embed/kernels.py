"""The beginning of a decode step: embeddings, cache slots, and the sequences' new lengths.

    x = scale * token_weight[token] + position_weight[position + offset]
    slot = page * page_size + position % page_size

Without a position_weight x is the token's row alone.

Layout. One program owns one row. It alone reads and advances that row's length. It reads one row of each
weight once and writes one row of x once.
"""

from gptkern.ops._pdl import wait
from gptkern.ops._triton import tl, triton


@triton.jit
def embed_row(
    tokens_ptr, live_ptr, token_weight_ptr, position_weight_ptr, table_ptr, lens_ptr, x_ptr, slots_ptr,
    words, positions, max_pages, page_size, stride_token, stride_position, stride_tb, row,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, OFFSET: tl.constexpr = 0, SCALE: tl.constexpr = 1.0,
):  # fmt: skip
    """One row: its embedding, its token's slot, and its sequence's new length.

    A token or a position without a weight gives NaN; a position without a page has no slot.
    """
    # The token and its position; a padding row has neither.
    alive = row < tl.load(live_ptr)
    token = tl.load(tokens_ptr + row, mask=alive, other=0)
    position = tl.load(lens_ptr + row, mask=alive, other=0).to(tl.int64)
    known = (token >= 0) & (token < words) & (position >= 0)
    if position_weight_ptr is not None:
        known = known & (position + OFFSET < positions)
    # The slot: the position's page and the offset in it.
    paged = alive & (position >= 0) & (position // page_size < max_pages)
    page = tl.load(table_ptr + row * stride_tb + position // page_size, mask=paged, other=0).to(tl.int64)
    slot = page * page_size + position % page_size
    tl.store(slots_ptr + row, tl.where(paged & (page >= 0), slot, -1))
    # The new length. Every thread has read the old one before one of them overwrites it.
    tl.debug_barrier()
    tl.store(lens_ptr + row, (position + 1).to(tl.int32), mask=alive)
    # The embedding, BLOCK columns at a time.
    for start in range(0, WIDTH, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        mask = (columns < WIDTH) & alive & known
        a = tl.load(token_weight_ptr + token * stride_token + columns, mask=mask, other=0.0)
        x = a.to(tl.float32)
        if SCALE != 1.0:
            x *= SCALE
        if position_weight_ptr is not None:
            at = (position + OFFSET) * stride_position + columns
            x += tl.load(position_weight_ptr + at, mask=mask, other=0.0).to(tl.float32)
        x = tl.where(alive & (known == 0), float("nan"), x)
        tl.store(x_ptr + row * WIDTH + columns, x.to(x_ptr.dtype.element_ty), mask=columns < WIDTH)


@triton.jit(do_not_specialize=["words", "positions", "max_pages"])
def decode_embed_kernel(
    tokens_ptr,  # (rows,) int64
    live_ptr,  # (1,) int32: the number of rows that are not padding
    token_weight_ptr,  # (vocabulary, WIDTH)
    position_weight_ptr,  # (positions, WIDTH), or None
    table_ptr,  # (rows, max_pages) int32
    lens_ptr,  # (rows,) int32, advanced
    x_ptr,  # (rows, WIDTH)
    slots_ptr,  # (rows,) int64
    words, positions, max_pages, page_size, stride_token, stride_position, stride_tb,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr, OFFSET: tl.constexpr, SCALE: tl.constexpr,
):  # fmt: skip
    wait(PDL)
    embed_row(
        tokens_ptr, live_ptr, token_weight_ptr, position_weight_ptr, table_ptr, lens_ptr, x_ptr, slots_ptr,
        words, positions, max_pages, page_size, stride_token, stride_position, stride_tb,
        tl.program_id(0), WIDTH, BLOCK, OFFSET, SCALE,
    )  # fmt: skip
