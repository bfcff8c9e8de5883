"""A whole decode step in one cooperative launch: the decode ops' device functions as phases of one kernel.

Phases are a program's rows: the embeddings, then each layer's products and attention, then the head. The
table says of each phase which of ROWS it is and where its weights lie. The kernel is compiled for ROWS: the
rows that differ in more than that, in sizes, buffers, norm, rotation, activation. Layers share them.

Programs take a phase's items (a split of a tile, a program of a sequence's heads, a row) in turn, program p
those at p, p + programs, ..., and meet at a grid barrier before the next phase, asking meanwhile for the
first of its weights. What is summed in which order is the launch table's choice alone: bits are those of
separate launches, for any number of programs.

The barrier is one counter that every program raises once a phase. A program's stores come before its release;
one thread of it acquires and the others meet it before they read on, so that ordinary loads see what the
other programs stored. All programs must be resident at once, which a cooperative launch ensures or refuses.

Under the interpreter, where programs run one after another, each phase is a launch of its own.
"""

from gptkern.ops._triton import tl, triton
from gptkern.ops.decode_attention.kernels import attend_sequence, attended_tokens, prefetch_split
from gptkern.ops.decode_embed.kernels import embed_row
from gptkern.ops.decode_linear.kernels import linear_tile, prefetch_weights

# Columns of the table, int64, which has a row for each phase: which of ROWS it is, its layer, attention's
# window, the positions of the rotary tables, the phase whose weights to fetch after it (-1: none), and
# addresses, 0 where there is nothing.
(
    ROW, LAYER, WINDOW, CONTEXT, FETCH,
    NORM_WEIGHT_AT, NORM_BIAS_AT, VALUES_AT, BIAS_AT, SCALES_AT, MINIMUMS_AT, COS_AT, SIN_AT, Q_NORM_AT,
    K_NORM_AT, COLUMNS,
) = (tl.constexpr(number) for number in range(16))  # fmt: skip

# Fields of one row of ROWS, which is one flat tuple: Triton 3.6 takes no tuple of tuples. ``table.Fields``
# says what they are.
(
    KIND, READ, WRITE, SAVE, RESIDUAL,
    OUTPUTS, INPUTS, TILE, TILE_COUNT, BLOCK_K, PARTS, SPLIT_K, GROUP, WEIGHT, SCALED, MINIMUMS, BIAS,
    NORM, NORM_BIAS, CENTERED, UNIT_OFFSET, ACTIVATION, GATED, SCALE, SOFTCAP,
    CACHED, DIM, INTERLEAVED, HEAD_NORM, HEAD_UNIT_OFFSET, FIELDS,
) = (tl.constexpr(number) for number in range(31))  # fmt: skip

# Kinds of rows.
EMBED, LINEAR, ATTENTION = (tl.constexpr(number) for number in range(3))

# BLOCK_R of every linear layer.
ROWS_TOGETHER = tl.constexpr(16)


@triton.jit
def address(row_ptr, COLUMN: tl.constexpr, DTYPE: tl.constexpr):
    """The pointer in a column of the table; the host has checked that it is a multiple of 16."""
    # The hint goes on the pointer: on the integer that it is made from, the compiler forgets it.
    return tl.multiple_of(tl.load(row_ptr + COLUMN).to(tl.pointer_type(DTYPE)), 16)


@triton.jit
def arrive(counter_ptr, COMPILED: tl.constexpr):
    """Signal that this program's stores are done."""
    if COMPILED:
        # Every thread's stores come before the one thread's release.
        tl.debug_barrier()
        tl.atomic_add(counter_ptr, 1, sem="release")


@triton.jit
def await_arrivals(counter_ptr, count, COMPILED: tl.constexpr):
    """Wait for ``count`` arrivals; the stores before them are then visible to every thread.

    One thread polls, for the others' polls would stand in the way of the arrivals, which need the same line.
    Its acquire and the barrier after it order all threads behind it, as in a cooperative group's barrier.
    """
    if COMPILED:
        seen = 0
        while seen < count:
            # The other threads leave at once, with the largest number there is.
            seen = tl.inline_asm_elementwise(
                "{ .reg .pred first; .reg .b32 thread; mov.u32 thread, %tid.x; setp.eq.u32 first, thread, 0; "
                "mov.b32 $0, 0x7fffffff; @first ld.acquire.gpu.global.s32 $0, [$1]; }",
                "=&r,l",
                [counter_ptr.to(tl.int64)],
                dtype=tl.int32,
                is_pure=False,
                pack=1,
            )
        tl.debug_barrier()


@triton.jit
def leave(counter_ptr, finished_ptr, programs, COMPILED: tl.constexpr):
    """The last program to leave sets both counters back to zero: nobody waits any more."""
    if COMPILED:
        # A program without an item in the last phase has met no barrier of its own since it waited.
        tl.debug_barrier()
        if tl.atomic_add(finished_ptr, 1, sem="acq_rel") == programs - 1:
            tl.store(counter_ptr, 0)
            tl.store(finished_ptr, 0)


@triton.jit
def fetch_weights(row_ptr, program, ROWS: tl.constexpr, AT: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Fetch the weights of this program's first item of a product into L2."""
    TILES: tl.constexpr = ROWS[AT + TILE_COUNT]
    STRIDE: tl.constexpr = ROWS[AT + INPUTS] // 2 if ROWS[AT + GROUP] else ROWS[AT + INPUTS]
    if program < TILES * ROWS[AT + SPLIT_K]:
        prefetch_weights(
            address(row_ptr, VALUES_AT, ROWS[AT + WEIGHT]), STRIDE, program % TILES, program // TILES,
            ROWS[AT + OUTPUTS], ROWS[AT + INPUTS], ROWS[AT + TILE], ROWS[AT + BLOCK_K], ROWS[AT + SPLIT_K],
            ROWS[AT + GROUP], ROWS[AT + INPUTS], True, ROWS[AT + GATED],
            0 if ROWS[AT + INTERLEAVED] else ROWS[AT + DIM], HEAD_DIM if ROWS[AT + CACHED] else 1,
            ROWS[AT + HEAD_NORM],
        )  # fmt: skip


@triton.jit
def fetch_pages(
    k_ptr, v_ptr, page_table_ptr, lens_ptr, row_count, window, pages_held, max_pages, programs_per_head,
    strides_k, strides_v, stride_tb, program,
    KV_HEADS: tl.constexpr, HEAD_BLOCKS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    SPLIT: tl.constexpr,
):  # fmt: skip
    """Fetch the keys and values of this program's first item of attention into L2, but those written now."""
    sequence = program // (programs_per_head * HEAD_BLOCKS)
    row, kv_head = sequence // KV_HEADS, sequence % KV_HEADS
    if row < row_count:
        begin, end, pages = attended_tokens(
            lens_ptr, None, row, window, max_pages, pages_held[0], pages_held[1]
        )  # fmt: skip
        split = begin // SPLIT + program % programs_per_head
        prefetch_split(
            k_ptr, v_ptr, page_table_ptr, row, kv_head, split, begin, end, (pages_held[0], pages),
            strides_k, strides_v, stride_tb, HEAD_DIM, BLOCK_D, SPLIT, True,
        )  # fmt: skip


@triton.jit
def fetch_next(
    table_ptr, row_ptr, following, k_ptr, v_ptr, page_table_ptr, lens_ptr, row_count, pages_held, max_pages,
    programs_per_head, strides_k, strides_v, stride_tb, program,
    ROWS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_BLOCKS: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Fetch into L2 what this program reads first after the phase at ``row_ptr``, unless it is written now.

    ``following`` is the next phase's row of ROWS. Before attention that is its pages, and the weights of the
    product behind it.
    """
    fetched = tl.load(row_ptr + FETCH)
    fetched_ptr = table_ptr + fetched * COLUMNS
    fetched_row = tl.load(fetched_ptr + ROW, mask=fetched >= 0, other=-1)
    for number in tl.static_range(len(ROWS) // FIELDS):
        if ROWS[number * FIELDS + KIND] == LINEAR:
            if fetched_row == number:
                fetch_weights(fetched_ptr, program, ROWS, number * FIELDS, HEAD_DIM)
        elif ROWS[number * FIELDS + KIND] == ATTENTION:  # noqa: SIM102  (it is decided at compile time)
            if following == number:
                window = tl.load(row_ptr + COLUMNS + WINDOW).to(tl.int32)
                fetch_pages(
                    k_ptr, v_ptr, page_table_ptr, lens_ptr, row_count, window, pages_held, max_pages,
                    programs_per_head, strides_k, strides_v, stride_tb, program,
                    KV_HEADS, HEAD_BLOCKS, HEAD_DIM, BLOCK_D, SPLIT,
                )  # fmt: skip


@triton.jit
def linear_phase(
    buffers, row_ptr, cache, slots_ptr, lens_ptr, scratch, row_count, eps, head_eps, program, programs,
    ROWS: tl.constexpr, AT: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_S: tl.constexpr,
):  # fmt: skip
    """This program's items of one product; ``cache`` and ``scratch`` are as in ``linear_tile``."""
    x_ptr = buffers[ROWS[AT + READ]]
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    weight_ptr = address(row_ptr, VALUES_AT, ROWS[AT + WEIGHT])
    bias_ptr = address(row_ptr, BIAS_AT, DTYPE) if ROWS[AT + BIAS] else None
    SCALES: tl.constexpr = tl.float16 if ROWS[AT + GROUP] else tl.float32
    # In a tuple None must be written in place: Triton refuses a variable that is None.
    packing = (
        address(row_ptr, SCALES_AT, SCALES) if ROWS[AT + SCALED] else None,
        address(row_ptr, MINIMUMS_AT, tl.float16) if ROWS[AT + MINIMUMS] else None,
    )
    norm = (
        address(row_ptr, NORM_WEIGHT_AT, DTYPE) if ROWS[AT + NORM] else None,
        address(row_ptr, NORM_BIAS_AT, DTYPE) if ROWS[AT + NORM_BIAS] else None,
        buffers[ROWS[AT + SAVE]] if ROWS[AT + SAVE] >= 0 else None,
    )
    heads = (
        address(row_ptr, COS_AT, tl.float32) if ROWS[AT + DIM] else None,
        address(row_ptr, SIN_AT, tl.float32) if ROWS[AT + DIM] else None,
        lens_ptr,
        tl.load(row_ptr + CONTEXT) if ROWS[AT + DIM] else None,
        address(row_ptr, Q_NORM_AT, DTYPE) if ROWS[AT + HEAD_NORM] else None,
        address(row_ptr, K_NORM_AT, DTYPE) if ROWS[AT + HEAD_NORM] else None,
        head_eps,
    )
    KV_WIDTH: tl.constexpr = KV_HEADS * HEAD_DIM if ROWS[AT + CACHED] else 0
    STRIDE: tl.constexpr = ROWS[AT + INPUTS] // 2 if ROWS[AT + GROUP] else ROWS[AT + INPUTS]
    TILES: tl.constexpr = ROWS[AT + TILE_COUNT]
    # Triton 3.6 takes no string out of a tuple as an argument.
    ACT: tl.constexpr = ROWS[AT + ACTIVATION]
    for item in tl.range(program, TILES * ROWS[AT + SPLIT_K], programs, disable_licm=True):
        linear_tile(
            x_ptr, weight_ptr, bias_ptr, packing, norm,
            buffers[ROWS[AT + RESIDUAL]] if ROWS[AT + RESIDUAL] >= 0 else None,
            buffers[ROWS[AT + WRITE]], cache, slots_ptr, scratch, row_count, eps, STRIDE,
            item % TILES, TILES, item // TILES, 0,
            ROWS[AT + OUTPUTS], ROWS[AT + INPUTS], KV_WIDTH, ACT,
            ROWS_TOGETHER, ROWS[AT + TILE], ROWS[AT + BLOCK_K], BLOCK_S, ROWS[AT + PARTS],
            ROWS[AT + SPLIT_K], ROWS[AT + GROUP], HEAD_DIM if ROWS[AT + CACHED] else 1,
            heads, ROWS[AT + CENTERED], ROWS[AT + UNIT_OFFSET], ROWS[AT + GATED], ROWS[AT + SCALE],
            ROWS[AT + SOFTCAP], ROWS[AT + DIM], ROWS[AT + INTERLEAVED], ROWS[AT + HEAD_NORM],
            ROWS[AT + HEAD_UNIT_OFFSET],
        )  # fmt: skip


@triton.jit
def attention_phase(
    q_ptr, out_ptr, k_ptr, v_ptr, kv_scales, page_table_ptr, lens_ptr, scratch, scale_log2, row_count, window,
    pages_held, max_pages, max_splits, programs_per_head, strides_k, strides_v, stride_tb, program, programs,
    KV_HEADS: tl.constexpr, HEAD_GROUP: tl.constexpr, HEAD_BLOCKS: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, SPLIT: tl.constexpr,
    IN_PAGE: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """This program's items of attention; strides are of page, slot and head."""
    items = row_count * KV_HEADS * HEAD_BLOCKS * programs_per_head
    for item in tl.range(program, items, programs, disable_licm=True):
        block = item // programs_per_head
        sequence, head_block = block // HEAD_BLOCKS, block % HEAD_BLOCKS
        row, kv_head = sequence // KV_HEADS, sequence % KV_HEADS
        begin, end, pages = attended_tokens(
            lens_ptr, None, row, window, max_pages, pages_held[0], pages_held[1]
        )  # fmt: skip
        attend_sequence(
            q_ptr, k_ptr, v_ptr, kv_scales, out_ptr, page_table_ptr, scratch, scale_log2,
            (pages_held[0], pages), max_splits, begin, end,
            (KV_HEADS * HEAD_GROUP * HEAD_DIM, HEAD_DIM), strides_k, strides_v, stride_tb,
            row, kv_head, item % programs_per_head, programs_per_head, head_block, HEAD_BLOCKS,
            KV_HEADS, HEAD_GROUP, HEAD_DIM, BLOCK_H, BLOCK_D, BLOCK_N, SPLIT, IN_PAGE, SOFTCAP,
        )  # fmt: skip


@triton.jit(
    do_not_specialize=[
        *("first_phase", "end_phase", "row_count", "max_splits", "programs_per_head"),
        *("words", "positions", "max_pages", "page_count"),
    ]
)
def persistent_step_kernel(
    tokens_ptr,  # (rows,) int64
    live_ptr,  # (1,) int32: the number of rows that are not padding
    token_weight_ptr,  # (vocabulary, WIDTH)
    position_weight_ptr,  # (positions, WIDTH), or None
    table_ptr,  # (phases, COLUMNS) int64
    attention_scales_ptr,  # (layers,) fp32: softmax scales, times log2(e)
    page_table_ptr,  # (rows, max_pages) int32
    lens_ptr,  # (rows,) int32, advanced
    k_ptr,  # (layers, pages, page_size, KV_HEADS, HEAD_DIM)
    v_ptr,  # as k
    k_scale_ptr,  # (layers, KV_HEADS) fp32 factors that dequantise an fp8 cache, or None
    v_scale_ptr,  # (layers, KV_HEADS), or None
    slots_ptr,  # (rows,) int64, scratch
    x_ptr,  # (rows, its width), scratch, as the others that rows read and write; None: not used
    q_ptr,
    attended_ptr,
    middle_ptr,
    inner_ptr,
    normed_x_ptr,
    normed_middle_ptr,
    logits_ptr,  # (rows, vocabulary)
    partial_ptr,  # fp32, scratch: splits of a product
    acc_ptr,  # (rows, heads, max_splits, HEAD_DIM) fp32, scratch
    stats_ptr,  # (rows, heads, max_splits, 2) fp32, scratch
    counter_ptr,  # int32, zero before and after: tiles of a product, heads of attention
    barrier_ptr,  # (64,) int32, zero before and after: arrivals at 0, programs that left at 32
    row_count, first_phase, end_phase, eps, head_eps, words, positions, page_size, max_pages, page_count,
    max_splits, programs_per_head,
    stride_token, stride_position, stride_tb,
    stride_kl, stride_kp, stride_ks, stride_vl, stride_vp, stride_vs,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_GROUP: tl.constexpr,
    HEAD_BLOCKS: tl.constexpr, HEAD_DIM: tl.constexpr,
    EMBED_BLOCK: tl.constexpr, OFFSET: tl.constexpr, EMBED_SCALE: tl.constexpr, BLOCK_S: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, SPLIT: tl.constexpr,
    IN_PAGE: tl.constexpr, COMPILED: tl.constexpr,
):  # fmt: skip
    program, programs = tl.program_id(0), tl.num_programs(0)
    buffers = (
        x_ptr, q_ptr, attended_ptr, middle_ptr, inner_ptr, normed_x_ptr, normed_middle_ptr, logits_ptr,
    )  # fmt: skip
    strides_k, strides_v = (stride_kp, stride_ks, HEAD_DIM), (stride_vp, stride_vs, HEAD_DIM)
    pages_held = (page_size, page_count)
    which = tl.load(table_ptr + first_phase * COLUMNS + ROW)
    for phase in tl.range(first_phase, end_phase, disable_licm=True):
        row_ptr = table_ptr + phase * COLUMNS
        layer = tl.load(row_ptr + LAYER)
        window = tl.load(row_ptr + WINDOW).to(tl.int32)
        layer_k_ptr, layer_v_ptr = k_ptr + layer * stride_kl, v_ptr + layer * stride_vl
        cache = (
            layer_k_ptr, layer_v_ptr,
            None if k_scale_ptr is None else k_scale_ptr + layer * KV_HEADS,
            None if v_scale_ptr is None else v_scale_ptr + layer * KV_HEADS,
            page_size, page_count, stride_kp, stride_ks, stride_vp, stride_vs,
        )  # fmt: skip
        no_cache = (None, None, None, None, 1, 0, 0, 0, 0, 0)
        for number in tl.static_range(len(ROWS) // FIELDS):
            if which == number:
                if ROWS[number * FIELDS + KIND] == EMBED:
                    for row in range(program, row_count, programs):
                        embed_row(
                            tokens_ptr, live_ptr, token_weight_ptr, position_weight_ptr, page_table_ptr,
                            lens_ptr, x_ptr, slots_ptr, words, positions, max_pages, page_size,
                            stride_token, stride_position, stride_tb, row, WIDTH, EMBED_BLOCK, OFFSET,
                            EMBED_SCALE,
                        )  # fmt: skip
                elif ROWS[number * FIELDS + KIND] == LINEAR:
                    linear_phase(
                        buffers, row_ptr, cache if ROWS[number * FIELDS + CACHED] else no_cache, slots_ptr,
                        lens_ptr, (partial_ptr, counter_ptr), row_count, eps, head_eps, program, programs,
                        ROWS, number * FIELDS, KV_HEADS, HEAD_DIM, BLOCK_S,
                    )  # fmt: skip
                else:
                    attention_phase(
                        q_ptr, attended_ptr, layer_k_ptr, layer_v_ptr, (cache[2], cache[3]),
                        page_table_ptr, lens_ptr, (acc_ptr, stats_ptr, counter_ptr),
                        tl.load(attention_scales_ptr + layer), row_count, window, pages_held, max_pages,
                        max_splits, programs_per_head, strides_k, strides_v, stride_tb, program, programs,
                        KV_HEADS, HEAD_GROUP, HEAD_BLOCKS, HEAD_DIM, BLOCK_H, BLOCK_D, BLOCK_N, SPLIT,
                        IN_PAGE, ROWS[number * FIELDS + SOFTCAP],
                    )  # fmt: skip
        if phase + 1 < end_phase:
            arrive(barrier_ptr, COMPILED)
            # The table is constant: what comes next is known before the barrier.
            which = tl.load(row_ptr + COLUMNS + ROW)
            if COMPILED:
                fetch_next(
                    table_ptr, row_ptr, which, layer_k_ptr, layer_v_ptr, page_table_ptr, lens_ptr, row_count,
                    pages_held, max_pages, programs_per_head, strides_k, strides_v, stride_tb, program,
                    ROWS, KV_HEADS, HEAD_BLOCKS, HEAD_DIM, BLOCK_D, SPLIT,
                )  # fmt: skip
            await_arrivals(barrier_ptr, (phase + 1 - first_phase) * programs, COMPILED)
    leave(barrier_ptr, barrier_ptr + 32, programs, COMPILED)
