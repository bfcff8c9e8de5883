"""A whole decode step in one cooperative launch: the decode ops' device functions as phases of one kernel.

Phases: the embeddings; five a layer (norm, QKV and the cache; attention; output projection and residual;
norm, FC and activation; projection and residual); norm and head. Programs take a phase's items (a split of
a tile, a program of a sequence's head, a row) in turn, program p those at p, p + programs, ..., and meet at
a grid barrier before the next phase, asking meanwhile for the first of its weights. What is summed in which
order is the launch table's choice alone: bits are those of separate launches, for any number of programs.

The barrier is one counter that every program raises once a phase. A program's stores come before its release;
one thread of it acquires and the others meet it before they read on, so that ordinary loads see what the
other programs stored. All programs must be resident at once, which a cooperative launch ensures or refuses.

Under the interpreter, where programs run one after another, each phase is a launch of its own.
"""

from gptkern.ops._triton import tl, triton
from gptkern.ops.decode_attention.kernels import attend_sequence, attended_tokens, prefetch_split
from gptkern.ops.decode_embed.kernels import embed_row
from gptkern.ops.decode_linear.kernels import linear_tile, prefetch_weights

# A row of the table of addresses: of a layer, or the last row of the head.
NORM_1 = tl.constexpr(0)  # weight, bias; the head's norm
NORM_2 = tl.constexpr(2)
MATRICES = tl.constexpr(4)  # of each matrix: values, bias, scales, zeros
QKV = tl.constexpr(0)
OUT = tl.constexpr(1)
FC = tl.constexpr(2)
PROJ = tl.constexpr(3)
HEAD = tl.constexpr(0)
COLUMNS = tl.constexpr(20)
PHASES_PER_LAYER = tl.constexpr(5)

# BLOCK_R of every linear layer. Their cuts are tuples: outputs, inputs, BLOCK_N, BLOCK_K, SPLIT_K, GROUP.
ROWS = tl.constexpr(16)


@triton.jit
def address(table_ptr, COLUMN: tl.constexpr, DTYPE: tl.constexpr):
    """The pointer in a column of the table; the host has checked that it is a multiple of 16."""
    # The hint goes on the pointer: on the integer that it is made from, the compiler forgets it.
    return tl.multiple_of(tl.load(table_ptr + COLUMN).to(tl.pointer_type(DTYPE)), 16)


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
def prefetch_matrix(table_ptr, program, MATRIX: tl.constexpr, CUT: tl.constexpr, WEIGHT: tl.constexpr):
    """Fetch the weights of this program's first item of a layer into L2."""
    TILES: tl.constexpr = (CUT[0] + CUT[2] - 1) // CUT[2]
    STRIDE: tl.constexpr = CUT[1] // 2 if CUT[5] else CUT[1]
    if program < TILES * CUT[4]:
        prefetch_weights(
            address(table_ptr, MATRICES + 4 * MATRIX, WEIGHT), STRIDE, program % TILES, program // TILES,
            CUT[0], CUT[1], CUT[2], CUT[3], CUT[4], CUT[5], True,
        )  # fmt: skip


@triton.jit
def prefetch_next(
    weights_ptr, k_ptr, v_ptr, page_table_ptr, lens_ptr, row_count, page_size, max_pages, page_count,
    programs_per_head, strides_k, strides_v, stride_tb, program, kind, last_layer,
    QKV_CUT: tl.constexpr, OUT_CUT: tl.constexpr, FC_CUT: tl.constexpr, PROJ_CUT: tl.constexpr,
    HEAD_CUT: tl.constexpr, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    SPLIT: tl.constexpr, WEIGHT: tl.constexpr,
):  # fmt: skip
    """Fetch into L2 what this program reads first after a phase of ``kind``, unless a program writes it now.

    Before attention that is its pages, and the weights of the output projection.
    """
    if kind == 0:
        sequence = program // programs_per_head
        row, head = sequence // HEADS, sequence % HEADS
        if row < row_count:
            begin, end, pages_held = attended_tokens(
                lens_ptr, None, row, 2147483647, max_pages, page_size, page_count
            )  # fmt: skip
            split = begin // SPLIT + program % programs_per_head
            prefetch_split(
                k_ptr, v_ptr, page_table_ptr, row, head, split, begin, end, (page_size, pages_held),
                strides_k, strides_v, stride_tb, HEAD_DIM, BLOCK_D, SPLIT, True,
            )  # fmt: skip
        prefetch_matrix(weights_ptr, program, OUT, OUT_CUT, WEIGHT)
    elif kind == 2:
        prefetch_matrix(weights_ptr, program, FC, FC_CUT, WEIGHT)
    elif kind == 3:
        prefetch_matrix(weights_ptr, program, PROJ, PROJ_CUT, WEIGHT)
    elif kind == 4:
        if last_layer:
            prefetch_matrix(weights_ptr + COLUMNS, program, HEAD, HEAD_CUT, WEIGHT)
        else:
            prefetch_matrix(weights_ptr + COLUMNS, program, QKV, QKV_CUT, WEIGHT)


@triton.jit
def linear_phase(
    x_ptr, residual_ptr, out_ptr, normed_ptr, table_ptr, cache, slots_ptr, scratch, row_count, eps,
    program, programs,
    MATRIX: tl.constexpr, CUT: tl.constexpr, NORM: tl.constexpr, NORM_BIAS: tl.constexpr,
    BIAS: tl.constexpr, ACTIVATION: tl.constexpr, KV_WIDTH: tl.constexpr, HEAD_DIM: tl.constexpr,
    WEIGHT: tl.constexpr, SCALED: tl.constexpr, ZEROS: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """This program's items of one linear layer; ``cache`` and ``scratch`` are as in ``linear_tile``."""
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    AT: tl.constexpr = MATRICES + 4 * MATRIX
    weight_ptr = address(table_ptr, AT, WEIGHT)
    bias_ptr = address(table_ptr, AT + 1, DTYPE) if BIAS else None
    # In a tuple None must be written in place: Triton refuses a variable that is None.
    packing = (
        address(table_ptr, AT + 2, tl.float32) if SCALED else None,
        address(table_ptr, AT + 3, tl.uint8) if ZEROS else None,
    )
    norm = (
        address(table_ptr, NORM, DTYPE) if NORM >= 0 else None,
        address(table_ptr, NORM + 1, DTYPE) if NORM >= 0 and NORM_BIAS else None,
        normed_ptr,
    )
    TILES: tl.constexpr = (CUT[0] + CUT[2] - 1) // CUT[2]
    STRIDE: tl.constexpr = CUT[1] // 2 if CUT[5] else CUT[1]
    for item in tl.range(program, TILES * CUT[4], programs, disable_licm=True):
        linear_tile(
            x_ptr, weight_ptr, bias_ptr, packing, norm,
            residual_ptr, out_ptr, cache, slots_ptr, scratch, row_count, eps, STRIDE,
            item % TILES, TILES, item // TILES, 0,
            CUT[0], CUT[1], KV_WIDTH, ACTIVATION, ROWS, CUT[2], CUT[3], BLOCK_S, CUT[4], CUT[5], HEAD_DIM,
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
    position_weight_ptr,  # (positions, WIDTH)
    table_ptr,  # (LAYERS + 1, COLUMNS) int64: addresses
    attention_scales_ptr,  # (LAYERS,) fp32: softmax scales, times log2(e)
    page_table_ptr,  # (rows, max_pages) int32
    lens_ptr,  # (rows,) int32, advanced
    k_ptr,  # (LAYERS, pages, page_size, HEADS, HEAD_DIM)
    v_ptr,  # as k
    k_scale_ptr,  # (LAYERS, HEADS) fp32 factors that dequantise an fp8 cache, or None
    v_scale_ptr,  # (LAYERS, HEADS), or None
    slots_ptr,  # (rows,) int64, scratch
    x_ptr,  # (rows, WIDTH), scratch: a layer's input
    middle_ptr,  # (rows, WIDTH), scratch: after attention's branch
    normed_x_ptr,  # (rows, WIDTH), scratch of POST_NORM: norm(x), the residual of attention's branch; or None
    normed_middle_ptr,  # (rows, WIDTH), scratch of POST_NORM: norm(middle); or None
    q_ptr,  # (rows, WIDTH), scratch
    attended_ptr,  # (rows, WIDTH), scratch
    inner_ptr,  # (rows, inner width), scratch
    partial_ptr,  # fp32, scratch: splits of a layer
    acc_ptr,  # (rows, HEADS, max_splits, HEAD_DIM) fp32, scratch
    stats_ptr,  # (rows, HEADS, max_splits, 2) fp32, scratch
    counter_ptr,  # int32, zero before and after: tiles of a layer, heads of attention
    barrier_ptr,  # (64,) int32, zero before and after: arrivals at 0, programs that left at 32
    logits_ptr,  # (rows, vocabulary)
    row_count, first_phase, end_phase, eps, words, positions, page_size, max_pages, page_count,
    max_splits, programs_per_head,
    stride_token, stride_position, stride_tb,
    stride_kl, stride_kp, stride_ks, stride_vl, stride_vp, stride_vs,
    LAYERS: tl.constexpr, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr,
    QKV_CUT: tl.constexpr, OUT_CUT: tl.constexpr, FC_CUT: tl.constexpr, PROJ_CUT: tl.constexpr,
    HEAD_CUT: tl.constexpr, POST_NORM: tl.constexpr, BIAS: tl.constexpr, ACTIVATION: tl.constexpr,
    WEIGHT: tl.constexpr, SCALED: tl.constexpr, ZEROS: tl.constexpr,
    EMBED_BLOCK: tl.constexpr, BLOCK_S: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, SPLIT: tl.constexpr,
    IN_PAGE: tl.constexpr, COMPILED: tl.constexpr,
):  # fmt: skip
    program, programs = tl.program_id(0), tl.num_programs(0)
    for phase in tl.range(first_phase, end_phase, disable_licm=True):
        # Embeddings count as the last phase of layer -1, so that layer 0 comes next.
        layer = (phase + PHASES_PER_LAYER - 1) // PHASES_PER_LAYER - 1
        kind = (phase + PHASES_PER_LAYER - 1) % PHASES_PER_LAYER
        weights_ptr = table_ptr + layer * COLUMNS
        layer_k_ptr = k_ptr + layer.to(tl.int64) * stride_kl
        layer_v_ptr = v_ptr + layer.to(tl.int64) * stride_vl
        cache = (
            layer_k_ptr, layer_v_ptr,
            None if k_scale_ptr is None else k_scale_ptr + layer * HEADS,
            None if v_scale_ptr is None else v_scale_ptr + layer * HEADS,
            page_size, page_count, stride_kp, stride_ks, stride_vp, stride_vs,
        )  # fmt: skip
        no_cache = (None, None, None, None, 1, 0, 0, 0, 0, 0)
        scratch = (partial_ptr, counter_ptr)
        strides_k, strides_v = (stride_kp, stride_ks, HEAD_DIM), (stride_vp, stride_vs, HEAD_DIM)
        if phase == 0:
            for row in range(program, row_count, programs):
                embed_row(
                    tokens_ptr, live_ptr, token_weight_ptr, position_weight_ptr, page_table_ptr, lens_ptr,
                    normed_x_ptr if POST_NORM else x_ptr, slots_ptr, words, positions, max_pages, page_size,
                    stride_token, stride_position, stride_tb, row, WIDTH, EMBED_BLOCK,
                )  # fmt: skip
        elif phase == LAYERS * PHASES_PER_LAYER + 1:
            linear_phase(
                x_ptr, None, logits_ptr, None, weights_ptr, no_cache, None, scratch, row_count, eps,
                program, programs,
                HEAD, HEAD_CUT, NORM_1, BIAS, False, "none", 0, 1, WEIGHT, SCALED, ZEROS, BLOCK_S,
            )  # fmt: skip
        elif POST_NORM and phase == 1:
            # The embeddings have no norm before them.
            linear_phase(
                normed_x_ptr, None, q_ptr, None, weights_ptr, cache, slots_ptr, scratch, row_count, eps,
                program, programs,
                QKV, QKV_CUT, -1, False, BIAS, "none", WIDTH, HEAD_DIM, WEIGHT, SCALED, ZEROS, BLOCK_S,
            )  # fmt: skip
        elif kind == 0:
            linear_phase(
                x_ptr, None, q_ptr, normed_x_ptr, weights_ptr, cache, slots_ptr, scratch, row_count, eps,
                program, programs,
                QKV, QKV_CUT, NORM_1, BIAS, BIAS, "none", WIDTH, HEAD_DIM, WEIGHT, SCALED, ZEROS, BLOCK_S,
            )  # fmt: skip
        elif kind == 1:
            scale_log2 = tl.load(attention_scales_ptr + layer)
            items = row_count * HEADS * programs_per_head
            for item in tl.range(program, items, programs, disable_licm=True):
                sequence = item // programs_per_head
                row, head = sequence // HEADS, sequence % HEADS
                begin, end, pages_held = attended_tokens(
                    lens_ptr, None, row, 2147483647, max_pages, page_size, page_count
                )  # fmt: skip
                attend_sequence(
                    q_ptr, layer_k_ptr, layer_v_ptr, (cache[2], cache[3]), attended_ptr,
                    page_table_ptr, (acc_ptr, stats_ptr, counter_ptr), scale_log2, (page_size, pages_held),
                    max_splits, begin, end, (WIDTH, HEAD_DIM), strides_k, strides_v, stride_tb,
                    row, head, item % programs_per_head, programs_per_head, 0, 1,
                    HEADS, 1, HEAD_DIM, BLOCK_H, BLOCK_D, BLOCK_N, SPLIT, IN_PAGE,
                )  # fmt: skip
        elif kind == 2:
            linear_phase(
                attended_ptr, normed_x_ptr if POST_NORM else x_ptr, middle_ptr, None, weights_ptr,
                no_cache, None, scratch, row_count, eps, program, programs,
                OUT, OUT_CUT, -1, False, BIAS, "none", 0, 1, WEIGHT, SCALED, ZEROS, BLOCK_S,
            )  # fmt: skip
        elif kind == 3:
            linear_phase(
                middle_ptr, None, inner_ptr, normed_middle_ptr, weights_ptr, no_cache, None, scratch,
                row_count, eps, program, programs,
                FC, FC_CUT, NORM_2, BIAS, BIAS, ACTIVATION, 0, 1, WEIGHT, SCALED, ZEROS, BLOCK_S,
            )  # fmt: skip
        else:
            linear_phase(
                inner_ptr, normed_middle_ptr if POST_NORM else middle_ptr, x_ptr, None, weights_ptr,
                no_cache, None, scratch, row_count, eps, program, programs,
                PROJ, PROJ_CUT, -1, False, BIAS, "none", 0, 1, WEIGHT, SCALED, ZEROS, BLOCK_S,
            )  # fmt: skip
        if phase + 1 < end_phase:
            arrive(barrier_ptr, COMPILED)
            if COMPILED:
                prefetch_next(
                    weights_ptr, layer_k_ptr, layer_v_ptr, page_table_ptr, lens_ptr, row_count, page_size,
                    max_pages, page_count, programs_per_head, strides_k, strides_v, stride_tb, program, kind,
                    layer == LAYERS - 1,
                    QKV_CUT, OUT_CUT, FC_CUT, PROJ_CUT, HEAD_CUT, HEADS, HEAD_DIM, BLOCK_D, SPLIT, WEIGHT,
                )  # fmt: skip
            await_arrivals(barrier_ptr, (phase + 1 - first_phase) * programs, COMPILED)
    leave(barrier_ptr, barrier_ptr + 32, programs, COMPILED)
