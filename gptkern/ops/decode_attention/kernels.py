"""Attention of one query per sequence over a paged cache, and writing into the cache.

Split-KV (Dao et al. 2023, "Flash-Decoding"): a sequence is cut every SPLIT tokens, counted from its
first, whatever the batch. Each split gives, for weights p_j = 2^(s_j - m) with m the split's largest
score s_j (in base 2), the row m, sum p_j, sum p_j v_j; splits with maxima m_i combine as

    out = sum_i 2^(m_i - M) acc_i / sum_i 2^(m_i - M) l_i,    M = max_i m_i,

in a fixed order. So a sequence's bits depend on its own tokens alone.

Layout: grid (batch * kv_heads, programs, head blocks). Program p of a sequence takes its splits p,
p + programs, ...: how many programs there are changes who computes a split, never what it is. The
last program of a sequence to finish combines. K and V are read once, q once per split; 8 bytes of
partial result per split and head and 4 * head_dim more are written and read once.
"""

from gptkern.ops._device import LOG2E, online_softmax, rounded_product, tanh, to_e4m3
from gptkern.ops._pdl import prefetch, wait
from gptkern.ops._triton import tl, triton


@triton.jit
def cache_pages(
    table_ptr, first, tokens, mask, page_size, page_count, IN_PAGE: tl.constexpr, CACHE: tl.constexpr
):  # fmt: skip
    """(page, offset in it) of consecutive tokens of one sequence; one page for all of them if IN_PAGE.

    A page that the cache does not have becomes one that it has: nothing beyond it is read. int64: a page's
    number times its stride passes 2^31 in pools of a few GB.
    """
    if IN_PAGE:
        pages = tl.load(table_ptr + first // page_size, cache_modifier=CACHE)
        offsets = (first % page_size + tokens - first).to(tl.int64)
    else:
        pages = tl.load(table_ptr + tokens // page_size, mask=mask, other=0, cache_modifier=CACHE)
        offsets = (tokens % page_size).to(tl.int64)
    return tl.maximum(tl.minimum(pages, page_count - 1), 0).to(tl.int64), offsets


@triton.jit
def lacks_pages(table_ptr, begin, end, page_size, page_count, SPLIT: tl.constexpr):
    """True if tokens ``begin <= t < end`` of one split lie in a page that the cache does not have."""
    tokens = begin // SPLIT * SPLIT + tl.arange(0, SPLIT)
    inside = (tokens >= begin) & (tokens < end)
    pages = tl.load(table_ptr + tokens // page_size, mask=inside, other=0)
    return tl.max((inside & ((pages < 0) | (pages >= page_count))).to(tl.int32), 0) > 0


@triton.jit
def combine_splits(
    acc_ptr,
    stats_ptr,
    out_ptr,
    first,
    last,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """One head's output from splits ``first`` to ``last`` of its partial results."""
    # The largest of the splits' maxima.
    dims = tl.arange(0, BLOCK_D)
    top = tl.full([1], float("-inf"), tl.float32)
    for start in range(first, last, CHUNK):
        splits = start + tl.arange(0, CHUNK)
        # .cg: other programs wrote these, so a line in this multiprocessor's L1 would be stale.
        maxima = tl.load(
            stats_ptr + 2 * splits, mask=splits < last, other=float("-inf"), cache_modifier=".cg"
        )
        top = tl.maximum(top, tl.max(maxima, 0))
    top = tl.where(top == float("-inf"), 0.0, top)
    # The weighted sums, CHUNK splits at a time in a fixed order.
    total = tl.zeros([1], tl.float32)
    acc = tl.zeros([BLOCK_D], tl.float32)
    for start in range(first, last, CHUNK):
        splits = start + tl.arange(0, CHUNK)
        valid = splits < last
        maxima = tl.load(stats_ptr + 2 * splits, mask=valid, other=float("-inf"), cache_modifier=".cg")
        sums = tl.load(stats_ptr + 2 * splits + 1, mask=valid, other=0.0, cache_modifier=".cg")
        weights = tl.exp2(maxima - top)
        total += tl.sum(rounded_product(weights, sums), 0)
        parts = tl.load(
            acc_ptr + splits[:, None] * HEAD_DIM + dims[None, :],
            mask=valid[:, None] & (dims < HEAD_DIM)[None, :],
            other=0.0,
            cache_modifier=".cg",
        )
        acc += tl.sum(rounded_product(weights[:, None], parts), 0)
    tl.store(out_ptr + dims, (acc / total).to(out_ptr.dtype.element_ty), mask=dims < HEAD_DIM)


@triton.jit
def attend_split(
    q, k_ptr, v_ptr, table_ptr, begin, end, pages_held, scale_log2, strides_k, strides_v,
    HEAD_DIM: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    SPLIT: tl.constexpr, IN_PAGE: tl.constexpr, SOFTCAP: tl.constexpr = 0.0,
):  # fmt: skip
    """(acc, row_max, row_sum) over tokens ``begin <= t < end`` of one split; NaN if the cache lacks one.

    ``pages_held`` is (page size, pages in the cache), ``strides_k`` and ``strides_v`` are of page and slot.
    With SOFTCAP scores become SOFTCAP * tanh(scores / SOFTCAP).
    """
    page_size, page_count = pages_held
    dims = tl.arange(0, BLOCK_D)
    row_max = tl.full([BLOCK_H], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_H], tl.float32)
    acc = tl.zeros([BLOCK_H, BLOCK_D], tl.float32)
    # A missing page makes the scale NaN, and so the result: the loop itself needs no test.
    lost = lacks_pages(table_ptr, begin, end, page_size, page_count, SPLIT)
    scale_log2 = tl.where(lost, float("nan"), scale_log2)
    for first in tl.range(begin // BLOCK_N * BLOCK_N, end, BLOCK_N):
        # Keys and values of BLOCK_N tokens, by page.
        tokens = first + tl.arange(0, BLOCK_N)
        valid = (tokens >= begin) & (tokens < end)
        mask = valid[:, None] & (dims < HEAD_DIM)[None, :]
        pages, offsets = cache_pages(table_ptr, first, tokens, valid, page_size, page_count, IN_PAGE, "")
        k_rows = pages * strides_k[0] + offsets * strides_k[1]
        v_rows = pages * strides_v[0] + offsets * strides_v[1]
        k = tl.load(k_ptr + k_rows[:, None] + dims[None, :], mask=mask, other=0.0)
        v = tl.load(v_ptr + v_rows[:, None] + dims[None, :], mask=mask, other=0.0)
        # An fp8 cache is exact in q's dtype; the caller applies its scales.
        k, v = k.to(q.dtype), v.to(q.dtype)
        # Scores; new maximum and weights; rescale and accumulate.
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2
        if SOFTCAP != 0.0:
            scores = (SOFTCAP * LOG2E) * tanh(scores * (1.0 / (SOFTCAP * LOG2E)))
        scores = tl.where(valid[None, :], scores, float("-inf"))
        weights, row_max, row_sum, rescale = online_softmax(scores, row_max, row_sum, 1.0)
        acc = tl.dot(weights.to(v.dtype), v, acc * rescale[:, None], input_precision="ieee")
    return acc, row_max, row_sum


@triton.jit
def attended_tokens(lens_ptr, starts_ptr, row, window, max_pages, page_size, page_count):
    """(first token, end, pages in the cache) of the tokens that a sequence's query attends to.

    A length that the page table has no room for becomes one token of a cache without pages: its result is
    NaN, and nothing beyond the table or the cache is read. A cache without pages gives no token.
    """
    # .cg: this may come before the wait for the kernel before, when this multiprocessor's L1 can still hold
    # the line that an earlier step read. L2 has the length that the last step wrote.
    length = tl.load(lens_ptr + row, cache_modifier=".cg")
    possible = (length >= 0) & (length <= max_pages * page_size) & (page_count > 0)
    end = tl.where(possible, length, tl.minimum(tl.minimum(max_pages, page_count), 1))
    begin = tl.maximum(end - window, 0)
    if starts_ptr is not None:
        begin = tl.maximum(begin, tl.load(starts_ptr + row))
    return begin, end, tl.where(possible, page_count, 0)


@triton.jit
def prefetch_split(
    k_ptr, v_ptr, table_ptr, row, kv_head, split, begin, end, pages_held, strides_k, strides_v, stride_tb,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, SPLIT: tl.constexpr, COMPILED: tl.constexpr,
):  # fmt: skip
    """Fetch a split's keys and values into L2; ``strides_k`` and ``strides_v`` are of page, slot and head."""
    page_size, page_count = pages_held
    table_ptr += row.to(tl.int64) * stride_tb
    k_ptr += kv_head.to(tl.int64) * strides_k[2]
    v_ptr += kv_head.to(tl.int64) * strides_v[2]
    LINE: tl.constexpr = 1024 // k_ptr.dtype.element_ty.primitive_bitwidth
    lines = tl.arange(0, BLOCK_D // LINE if BLOCK_D > LINE else 1) * LINE
    tokens = split * SPLIT + tl.arange(0, SPLIT)
    valid = (tokens >= begin) & (tokens < end)
    # .cg as in attended_tokens.
    pages, offsets = cache_pages(table_ptr, 0, tokens, valid, page_size, page_count, False, ".cg")
    wanted = valid[:, None] & (lines < HEAD_DIM)[None, :]
    k_rows = pages * strides_k[0] + offsets * strides_k[1]
    v_rows = pages * strides_v[0] + offsets * strides_v[1]
    prefetch(k_ptr + k_rows[:, None] + lines[None, :], wanted, COMPILED)
    prefetch(v_ptr + v_rows[:, None] + lines[None, :], wanted, COMPILED)


@triton.jit
def attend_sequence(
    q_ptr, k_ptr, v_ptr, kv_scales, out_ptr, table_ptr, scratch, scale_log2, pages_held, max_splits, begin,
    end, strides_q, strides_k, strides_v, stride_tb,
    row, kv_head, program, programs, head_block, head_blocks,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, SPLIT: tl.constexpr,
    IN_PAGE: tl.constexpr, SOFTCAP: tl.constexpr = 0.0,
):  # fmt: skip
    """One program's splits of one sequence's head; the last to come of its programs stores the output.

    ``kv_scales`` is (k, v) pointers or Nones, ``scratch`` (acc, stats, counter) pointers. q's strides are of
    batch and head, those of k and v of page, slot and head.
    """
    acc_ptr, stats_ptr, counter_ptr = scratch
    first = begin // SPLIT
    last = tl.where(begin < end, (end + SPLIT - 1) // SPLIT, first)
    table_ptr += row.to(tl.int64) * stride_tb
    k_ptr += kv_head.to(tl.int64) * strides_k[2]
    v_ptr += kv_head.to(tl.int64) * strides_v[2]
    # An fp8 cache: the keys' scale goes into the scores', the values' onto the accumulator.
    v_scale = 1.0
    if kv_scales[0] is not None:
        scale_log2 *= tl.load(kv_scales[0] + kv_head)
        v_scale = tl.load(kv_scales[1] + kv_head)
    # The queries of BLOCK_H heads that share the keys.
    heads = head_block * BLOCK_H + tl.arange(0, BLOCK_H)
    dims = tl.arange(0, BLOCK_D)
    mask = (heads < GROUP)[:, None] & (dims < HEAD_DIM)[None, :]
    heads += kv_head * GROUP
    q_rows = row.to(tl.int64) * strides_q[0] + heads * strides_q[1]
    q = tl.load(q_ptr + q_rows[:, None] + dims[None, :], mask=mask, other=0.0)
    # (row, head) in the contiguous output and scratch.
    first_head = (row * KV_HEADS + kv_head) * GROUP + head_block * BLOCK_H
    places = first_head + tl.arange(0, BLOCK_H)
    out_at = out_ptr + places.to(tl.int64)[:, None] * HEAD_DIM + dims[None, :]
    for split in range(first + program, last, programs):
        acc, row_max, row_sum = attend_split(
            q, k_ptr, v_ptr, table_ptr, tl.maximum(split * SPLIT, begin),
            tl.minimum(split * SPLIT + SPLIT, end), pages_held, scale_log2, strides_k, strides_v,
            HEAD_DIM, BLOCK_H, BLOCK_D, BLOCK_N, SPLIT, IN_PAGE, SOFTCAP,
        )  # fmt: skip
        if kv_scales[0] is not None:
            acc *= v_scale
        # The output where there is one split, else its partial result.
        if last - first == 1:
            tl.store(out_at, (acc / row_sum[:, None]).to(out_ptr.dtype.element_ty), mask=mask)
        else:
            # int64: batch * heads * splits * head_dim passes 2^31 at 64 sequences of 128k.
            slots = places.to(tl.int64) * max_splits + split
            tl.store(acc_ptr + slots[:, None] * HEAD_DIM + dims[None, :], acc, mask=mask)
            in_group = head_block * BLOCK_H + tl.arange(0, BLOCK_H) < GROUP
            tl.store(stats_ptr + 2 * slots, row_max, mask=in_group)
            tl.store(stats_ptr + 2 * slots + 1, row_sum, mask=in_group)
    if last == first:
        # Nothing to attend: zeros, as attention defines it.
        if program == 0:
            tl.store(out_at, tl.zeros([BLOCK_H, BLOCK_D], out_ptr.dtype.element_ty), mask=mask)
    elif (last - first > 1) & (first + program < last):
        # The last program of the sequence to arrive combines.
        counter_ptr += (row * KV_HEADS + kv_head) * head_blocks + head_block
        # Every thread's stores come before the one thread's release.
        tl.debug_barrier()
        arrived = tl.atomic_add(counter_ptr, 1, sem="acq_rel")
        if arrived == tl.minimum(programs, last - first) - 1:
            tl.store(counter_ptr, 0)
            for head in range(tl.minimum(BLOCK_H, GROUP - head_block * BLOCK_H)):
                place = (first_head + head).to(tl.int64)
                combine_splits(
                    acc_ptr + place * max_splits * HEAD_DIM, stats_ptr + place * max_splits * 2,
                    out_ptr + place * HEAD_DIM, first, last, HEAD_DIM, BLOCK_D, 16,
                )  # fmt: skip


@triton.jit(do_not_specialize=["max_splits", "window", "max_pages", "page_count"])
def decode_attention_kernel(
    q_ptr,  # (batch, heads, head_dim)
    k_ptr,  # (pages, page_size, kv_heads, head_dim)
    v_ptr,  # (pages, page_size, kv_heads, head_dim)
    out_ptr,  # (batch, heads, head_dim)
    table_ptr,  # (batch, max_pages) int32
    lens_ptr,  # (batch,) int32
    starts_ptr,  # (batch,) int32, or None: the first token attended
    acc_ptr,  # (batch, heads, max_splits, head_dim) fp32, scratch
    stats_ptr,  # (batch, heads, max_splits, 2) fp32, scratch: maximum and sum
    counter_ptr,  # (batch * kv_heads * head blocks,) int32, zero before and after
    k_scale_ptr,  # (kv_heads,) fp32 factors that dequantise an fp8 cache, or None
    v_scale_ptr,  # (kv_heads,), or None
    scale_log2, window, page_size, max_pages, page_count, max_splits,
    stride_qb, stride_qh, stride_kp, stride_ks, stride_kh, stride_vp, stride_vs, stride_vh, stride_tb,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, SPLIT: tl.constexpr,
    IN_PAGE: tl.constexpr, PREFETCH: tl.constexpr, PDL: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    if not PREFETCH:
        wait(PDL)
    row = tl.program_id(0) // KV_HEADS
    kv_head = tl.program_id(0) % KV_HEADS
    program, programs = tl.program_id(1), tl.num_programs(1)
    begin, end, page_count = attended_tokens(
        lens_ptr, starts_ptr, row, window, max_pages, page_size, page_count
    )  # fmt: skip
    pages_held = (page_size, page_count)
    strides_k = (stride_kp, stride_ks, stride_kh)
    strides_v = (stride_vp, stride_vs, stride_vh)
    if PREFETCH and PDL:
        prefetch_split(
            k_ptr, v_ptr, table_ptr, row, kv_head, begin // SPLIT + program, begin, end, pages_held,
            strides_k, strides_v, stride_tb, HEAD_DIM, BLOCK_D, SPLIT, PDL,
        )  # fmt: skip
    if PREFETCH:
        wait(PDL)
    attend_sequence(
        q_ptr, k_ptr, v_ptr, (k_scale_ptr, v_scale_ptr), out_ptr, table_ptr,
        (acc_ptr, stats_ptr, counter_ptr), scale_log2, pages_held, max_splits, begin, end,
        (stride_qb, stride_qh), strides_k, strides_v, stride_tb,
        row, kv_head, program, programs, tl.program_id(2), tl.num_programs(2),
        KV_HEADS, GROUP, HEAD_DIM, BLOCK_H, BLOCK_D, BLOCK_N, SPLIT, IN_PAGE, SOFTCAP,
    )  # fmt: skip


@triton.jit
def append_kv_kernel(
    k_ptr,  # (tokens, kv_heads, head_dim)
    v_ptr,  # (tokens, kv_heads, head_dim)
    k_cache_ptr,  # (pages, page_size, kv_heads, head_dim)
    v_cache_ptr,  # as k_cache
    slots_ptr,  # (tokens,) int64; a slot that the cache does not have is not written
    k_scale_ptr,  # (kv_heads,) fp32 factors that dequantise an fp8 cache, or None
    v_scale_ptr,  # (kv_heads,), or None
    page_size, page_count,
    stride_kt, stride_kh, stride_vt, stride_vh,
    stride_kp, stride_ks, stride_kch, stride_vp, stride_vs, stride_vch,
    KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program copies BLOCK_H heads of one token."""
    # The token's slot.
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + token)
    heads = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)[:, None]
    dims = tl.arange(0, BLOCK_D)[None, :]
    page, offset = slot // page_size, slot % page_size
    mask = (heads < KV_HEADS) & (dims < HEAD_DIM) & (slot >= 0) & (page < page_count)
    # Load its keys and values, in e4m3 for an fp8 cache, and store them there.
    k = tl.load(k_ptr + token * stride_kt + heads * stride_kh + dims, mask=mask, other=0.0)
    v = tl.load(v_ptr + token * stride_vt + heads * stride_vh + dims, mask=mask, other=0.0)
    k_at = k_cache_ptr + page * stride_kp + offset * stride_ks + heads * stride_kch + dims
    v_at = v_cache_ptr + page * stride_vp + offset * stride_vs + heads * stride_vch + dims
    if k_scale_ptr is not None:
        k = to_e4m3(k, tl.load(k_scale_ptr + heads, mask=heads < KV_HEADS, other=1.0))
        v = to_e4m3(v, tl.load(v_scale_ptr + heads, mask=heads < KV_HEADS, other=1.0))
    tl.store(k_at, k.to(k_cache_ptr.dtype.element_ty), mask=mask)
    tl.store(v_at, v.to(v_cache_ptr.dtype.element_ty), mask=mask)
