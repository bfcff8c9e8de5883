"""The beginning of a decode step: embeddings, cache slots, and the sequences' new lengths.

One program per row, which alone reads and advances that row's length. Read once, written once.
"""

import triton
import triton.language as tl

from gptkern.ops._pdl import wait


@triton.jit
def embed_row(
    tokens_ptr, live_ptr, token_weight_ptr, position_weight_ptr, table_ptr, lens_ptr, x_ptr, slots_ptr,
    words, positions, max_pages, page_size, stride_token, stride_position, stride_tb, row,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row: its embedding, its token's slot, and its sequence's new length.

    A token or a place that there is no weight for gives NaN; a place without a page has no slot.
    """
    alive = row < tl.load(live_ptr)
    token = tl.load(tokens_ptr + row, mask=alive, other=0)
    place = tl.load(lens_ptr + row, mask=alive, other=0).to(tl.int64)
    known = (token >= 0) & (token < words) & (place >= 0) & (place < positions)
    paged = alive & (place >= 0) & (place // page_size < max_pages)
    page = tl.load(table_ptr + row * stride_tb + place // page_size, mask=paged, other=0).to(tl.int64)
    tl.store(slots_ptr + row, tl.where(paged & (page >= 0), page * page_size + place % page_size, -1))
    # Every thread has read the length before one of them advances it.
    tl.debug_barrier()
    tl.store(lens_ptr + row, (place + 1).to(tl.int32), mask=alive)
    for start in range(0, WIDTH, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        mask = (columns < WIDTH) & alive & known
        a = tl.load(token_weight_ptr + token * stride_token + columns, mask=mask, other=0.0)
        b = tl.load(position_weight_ptr + place * stride_position + columns, mask=mask, other=0.0)
        x = tl.where(alive & (known == 0), float("nan"), a.to(tl.float32) + b.to(tl.float32))
        tl.store(x_ptr + row * WIDTH + columns, x.to(x_ptr.dtype.element_ty), mask=columns < WIDTH)


@triton.jit(do_not_specialize=["words", "positions", "max_pages"])
def decode_embed_kernel(
    tokens_ptr,  # (rows,) int64
    live_ptr,  # (1,) int32: rows from here on are padding
    token_weight_ptr,  # (vocabulary, WIDTH)
    position_weight_ptr,  # (positions, WIDTH)
    table_ptr,  # (rows, max_pages) int32
    lens_ptr,  # (rows,) int32, advanced
    x_ptr,  # (rows, WIDTH)
    slots_ptr,  # (rows,) int64
    words, positions, max_pages, page_size, stride_token, stride_position, stride_tb,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    wait(PDL)
    embed_row(
        tokens_ptr, live_ptr, token_weight_ptr, position_weight_ptr, table_ptr, lens_ptr, x_ptr, slots_ptr,
        words, positions, max_pages, page_size, stride_token, stride_position, stride_tb,
        tl.program_id(0), WIDTH, BLOCK,
    )  # fmt: skip
