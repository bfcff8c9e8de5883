// What one thread of a pass sees: the call, the memory, its share of the work.
#pragma once

#include <cmath>

#include "common/spin_barrier.h"
#include "decode/attention_block.h"
#include "decode/code_product.h"
#include "decode/dot_product.h"
#include "decode/fp8_product.h"
#include "decode/model.h"
#include "decode/operand.h"
#include "decode/packed_product.h"

namespace gptkern {
inline namespace GPTKERN_ISA {

constexpr int kQueries = 64;  // queries of one sequence that attend together, by the heads that share keys and values
constexpr int kMostRuns = 64;  // of a context
constexpr int kBand = 256;  // outputs that are computed before what follows the product is done with them

inline int64_t most_queries(const CpuModel& m) { return larger(m.heads, kQueries); }

// Tokens whose sums are made apart from those of others, as several threads may take a row's: whole blocks.
inline int run_tokens(const CpuModel& m) {
    return (m.n_positions + kMostRuns * kTokens - 1) / (kMostRuns * kTokens) * kTokens;
}

// The layout of a pass's memory: offsets in floats. Buffers that one thread alone writes exist once a thread.
struct Layout {
    int64_t x, middle, branch, normed, qkv, attended, inner, operand;  // shared: a row of each token
    // Per thread, from the end of the shared part: of products, then of attention.
    int64_t sums, ups, part, partial, scratch, codes, widened;
    int64_t turned, queries, means, totals, tops, keys, values, scores;
    int64_t shared, per_thread;  // sizes of the two parts

    Layout(const CpuModel& m, int rows, int threads) {
        int64_t end = 0;
        const auto take = [&end](int64_t floats) {
            const int64_t at = end;
            end += padded(floats);
            return at;
        };
        x = take(rows * padded(m.width));
        middle = take(rows * padded(m.width));
        branch = take(rows * padded(m.width));
        normed = take(rows * padded(m.width));
        qkv = take(rows * padded(m.qkv_width()));
        attended = take(rows * padded(m.q_width()));
        inner = take(rows * padded(m.inner));
        operand = take(rows * operand_floats(most_inputs(m, false)));
        shared = end;
        end = 0;
        const int64_t share = padded(most_transposed(m) / threads + 2 * kStep), widest = share > kBand ? share : kBand;
        sums = take(rows * widest);
        ups = take(m.gated ? rows * widest : 0);
        part = take(kPartFloats);
        partial = take(dot_partial(rows));
        scratch = take(2 * rows * share + rows * kTransposedRows);
        codes = take(sizeof(CodePanel) / sizeof(float));
        widened = take(fp8_floats(most_inputs(m, true)));
        const int64_t most = most_queries(m), head = padded(m.head_dim);
        const int64_t runs = (m.n_positions + run_tokens(m) - 1) / run_tokens(m), sets = 2 * most + runs * m.heads;
        turned = take(head);
        queries = take(most * head);
        means = take(sets * head);
        totals = take(sets * kLanes);
        tops = take(sets + kLanes);
        keys = take(kTokens * head);
        values = take(kTokens * (head + kStrip));
        scores = take(most * kTokens);
        per_thread = end;
    }

    // Inputs of the widest product, or of the widest with fp8 weights.
    static int most_inputs(const CpuModel& m, bool fp8) {
        int most = 0;
        for (int i = 0; i < m.stages; ++i) {
            const CpuLinear& linear = m.stage[i].linear;
            if ((!fp8 || linear.format == Format::kFp8) && linear.in > most) most = linear.in;
        }
        return most;
    }

    // Outputs of the widest product that reads a transposed matrix as it lies: of bf16, where it is widened.
    static int most_transposed(const CpuModel& m) {
        int most = 0;
#ifdef __AVX512BF16__
        const bool widened = false;
#else
        const bool widened = m.dtype == DType::kBFloat16;
#endif
        for (int i = 0; i < m.stages; ++i) {
            const CpuStage& stage = m.stage[i];
            const int outs = stage.activated ? m.inner : stage.linear.outs;
            if (widened && stage.linear.transposed && outs > most) most = outs;
        }
        return most;
    }

    size_t floats(int threads) const { return static_cast<size_t>(shared + threads * per_thread); }
};

// One thread's view of a pass.
struct Pass {
    const CpuDecode& call;
    const CpuModel& m;
    const Layout& layout;
    SpinBarrier& barrier;
    int rank, threads;
    float* own;
    const int32_t* wanted;  // the rows of the pass that are computed; null: all
    int count;              // how many these are

    // The memory of one thread.
    float* memory_of(int thread) const { return call.memory + layout.shared + thread * layout.per_thread; }

    // A computed row's place among the pass's rows.
    int place(int row) const { return wanted == nullptr ? row : wanted[row]; }

    // A row of a buffer, in order; what lies between its width and ``padded(width)`` is of no meaning.
    float* row(int64_t buffer, int width, int r) const { return call.memory + buffer + padded(width) * place(r); }
    float* row(Buffer buffer, int r) const {
        switch (buffer) {
            case Buffer::kX: return row(layout.x, m.width, r);
            case Buffer::kMiddle: return row(layout.middle, m.width, r);
            case Buffer::kBranch: return row(layout.branch, m.width, r);
            case Buffer::kQ: return row(layout.qkv, m.qkv_width(), r);
            case Buffer::kAttended: return row(layout.attended, m.q_width(), r);
            case Buffer::kInner: return row(layout.inner, m.inner, r);
            default: return row(layout.normed, m.width, r);
        }
    }

    // The start of a thread's share of n elements, a multiple of ``unit``.
    int share(int n, int unit, int of) const {
        const int units = (n + unit - 1) / unit;
        const int at = static_cast<int>(static_cast<int64_t>(units) * of / threads) * unit;
        return at < n ? at : n;
    }

    // use(row, head, heads) for this thread's heads of some rows: a contiguous run of (row, head) pairs, one row at a time.
    template <class Use>
    void for_units(int first, int rows, int of_row, const Use& use) const {
        const int units = rows * of_row, last = share(units, 1, rank + 1);
        for (int unit = share(units, 1, rank); unit < last;) {
            const int head = unit % of_row;
            const int heads = last - unit < of_row - head ? last - unit : of_row - head;
            use(first + unit / of_row, head, heads);
            unit += heads;
        }
    }
};

// Mean and reciprocal standard deviation, in two passes: the mean, then the squared distances from it. An RMS norm's are
// the distances from 0.
inline void moments(const float* values, int n, bool rms, float eps, float& mean, float& rstd) {
    const int whole = n / kLanes * kLanes;
    Vec total = zeros(), squares = zeros();
    float rest = 0.0f, rest_squares = 0.0f;
    mean = 0.0f;
    if (!rms) {
        for (int i = 0; i < whole; i += kLanes) total = add(total, load(values + i));
        for (int i = whole; i < n; ++i) rest += values[i];
        mean = (sum(total) + rest) / static_cast<float>(n);
    }
    for (int i = 0; i < whole; i += kLanes) {
        const Vec centred = sub(load(values + i), all(mean));
        squares = fma(centred, centred, squares);
    }
    for (int i = whole; i < n; ++i) rest_squares += (values[i] - mean) * (values[i] - mean);
    rstd = 1.0f / std::sqrt((sum(squares) + rest_squares) / static_cast<float>(n) + eps);
}

inline float capped(float value, float cap) { return cap > 0.0f ? cap * tanhf(value / cap) : value; }
inline Vec capped(Vec x, float cap) {
    if (cap <= 0.0f) return x;
    float values[kLanes];
    store(values, x);
    for (float& value : values) value = capped(value, cap);
    return load(values);
}

}  // namespace GPTKERN_ISA
}  // namespace gptkern
