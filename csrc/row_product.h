// Products of few rows with a matrix: bound by how fast the weights stream from memory.
//
// A row's result does not depend on how many rows there are, nor on how outputs are shared among threads.
#pragma once

#include "vec.h"

namespace gptkern {
inline namespace GPTKERN_ISA {

constexpr int kOuts = 4;  // outputs whose weights are read side by side: so many streams a core's prefetchers follow
constexpr int kRows = kLanes == 16 ? 4 : 2;  // rows that are summed at once: what the registers hold of their sums
constexpr int kTurnedRows = 8;  // rows of turned weights that one pass over the outputs takes
constexpr int kPanel = 192;     // rows that are summed before they are added to the rest: smaller errors

// Widened rows, of each value ``Kind::place``, and of the same kStep values of all rows one after another: so
// that the addresses of a pass are one pointer and constants.
struct Rows {
    float* at;
    int count;

    GPTKERN_HD int64_t step(int i) const { return static_cast<int64_t>(i / kStep) * count * kStep; }
    GPTKERN_HD float& value(int row, int i) const { return at[step(i) + row * kStep + i % kStep]; }
};

template <class Kind>
struct Weights {
    const typename Kind::Storage* at;
    int64_t stride;  // between rows: of outputs, or of inputs where the matrix is turned
    int in;
};

// give(r, j, value) of R rows of x from ``row`` on and of the kOuts outputs whose weights begin at ``from``.
template <class Kind, int R, class Give>
GPTKERN_HD void dots(const Weights<Kind>& w, const typename Kind::Storage* const* from, const Rows& x, int row,
                     const Give& give) {
    Vec total[kOuts][R];
    for (int j = 0; j < kOuts; ++j) {
        for (int r = 0; r < R; ++r) total[j][r] = zeros();
    }
    const int whole = w.in / kStep * kStep;
    const float* values = x.at + row * kStep;
    for (int i = 0; i < whole; i += kStep, values += x.count * kStep) {
        Vec first[kOuts], second[kOuts];
        for (int j = 0; j < kOuts; ++j) {
            // The next output's, while this one's are at work; past the end it is asked for in vain.
            _mm_prefetch(reinterpret_cast<const char*>(from[j] + w.stride + i), _MM_HINT_T1);
            Kind::pair(from[j] + i, first[j], second[j]);
        }
        for (int r = 0; r < R; ++r) {
            const Vec a = load(values + r * kStep), b = load(values + r * kStep + kLanes);
            for (int j = 0; j < kOuts; ++j) total[j][r] = fma(second[j], b, fma(first[j], a, total[j][r]));
        }
    }
    for (int j = 0; j < kOuts; ++j) {
        for (int r = 0; r < R; ++r) {
            float value = sum(total[j][r]);
            for (int i = whole; i < w.in; ++i) {
                value = __builtin_fmaf(Kind::load(from[j][i]), x.value(row + r, i), value);
            }
            give(row + r, j, value);
        }
    }
}

// give(row, out, value) of every row and of outputs first to last, which are read as kOuts long runs.
template <class Kind, class Give>
void product(const Weights<Kind>& w, const Rows& x, int first, int last, const Give& give) {
    const int run = (last - first + kOuts - 1) / kOuts;
    for (int t = 0; t < run; ++t) {
        const typename Kind::Storage* from[kOuts];
        for (int j = 0; j < kOuts; ++j) {
            const int out = first + j * run + t;
            from[j] = w.at + (out < last ? out : last - 1) * w.stride;
        }
        const auto placed = [&](int row, int j, float value) {
            const int out = first + j * run + t;
            if (out < last) give(row, out, value);
        };
        int row = 0;
        for (; row + kRows <= x.count; row += kRows) dots<Kind, kRows>(w, from, x, row, placed);
        if (kRows > 2 && row + 2 <= x.count) {
            dots<Kind, 2>(w, from, x, row, placed);
            row += 2;
        }
        if (row < x.count) dots<Kind, 1>(w, from, x, row, placed);
    }
}

// Adds the share of S weight rows from i on to sums of outputs first to last, whole steps, which lie as Rows do.
// ``factors`` (rows, S) are what x has for these weight rows.
template <class Kind, int S>
GPTKERN_HD void add_turned(const Weights<Kind>& w, const float* factors, int rows, int i, int first, int last,
                           float* sums) {
    for (int out = first; out < last; out += kStep) {
        Vec low[S], high[S];
        for (int s = 0; s < S; ++s) {
            const auto* const from = w.at + (i + s) * w.stride + out;
            // The rows after these, while these are at work; past the end it is asked for in vain.
            _mm_prefetch(reinterpret_cast<const char*>(from + S * w.stride), _MM_HINT_T1);
            Kind::pair(from, low[s], high[s]);
        }
        for (int r = 0; r < rows; ++r, sums += kStep) {
            // Summed apart first: fewer additions to the long sum, and smaller errors.
            Vec a = zeros(), b = zeros();
            for (int s = 0; s < S; ++s) {
                const Vec factor = all(factors[r * S + s]);
                a = fma(factor, low[s], a);
                b = fma(factor, high[s], b);
            }
            store(sums, add(load(sums), a));
            store(sums + kLanes, add(load(sums + kLanes), b));
        }
    }
}

// The same of a matrix kept as (in, outs). ``memory`` has room for two rows of last - first values, and
// kTurnedRows more, a row of x.
template <class Kind, class Give>
void turned_product(const Weights<Kind>& w, const Rows& x, int first, int last, float* memory, const Give& give) {
    const int outs = last - first, whole = outs / kStep * kStep;
    float *const panel = memory, *const sums = memory + static_cast<int64_t>(x.count) * whole;
    float* const factors = sums + static_cast<int64_t>(x.count) * whole;
    const auto take_factors = [&](int i, int count) {
        for (int r = 0; r < x.count; ++r) {
            for (int s = 0; s < count; ++s) factors[r * count + s] = x.value(r, Kind::place(i + s, w.in));
        }
    };
    for (int64_t i = 0; i < 2LL * x.count * whole; ++i) memory[i] = 0.0f;
    for (int i = 0; i < w.in;) {
        const int end = i + kPanel < w.in ? i + kPanel : w.in;
        for (; i + kTurnedRows <= end; i += kTurnedRows) {
            take_factors(i, kTurnedRows);
            add_turned<Kind, kTurnedRows>(w, factors, x.count, i, first, first + whole, panel);
        }
        for (; i < end; ++i) {
            take_factors(i, 1);
            add_turned<Kind, 1>(w, factors, x.count, i, first, first + whole, panel);
        }
        for (int64_t n = 0; n < static_cast<int64_t>(x.count) * whole; ++n) {
            sums[n] += panel[n];
            panel[n] = 0.0f;
        }
    }
    for (int r = 0; r < x.count; ++r) {
        for (int out = 0; out < whole; ++out) {
            give(r, first + out, Rows{sums, x.count}.value(r, Kind::place(out, whole)));
        }
        for (int out = first + whole; out < last; ++out) {
            double value = 0.0;
            for (int i = 0; i < w.in; ++i) {
                const float factor = x.value(r, Kind::place(i, w.in));
                value += static_cast<double>(factor) * Kind::load(w.at[i * w.stride + out]);
            }
            give(r, out, static_cast<float>(value));
        }
    }
}

}  // namespace GPTKERN_ISA
}  // namespace gptkern
