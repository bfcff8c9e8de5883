// Products of few rows with a matrix: bound by how fast the weights stream from memory.
//
// A row's result does not depend on how many rows there are, nor on how outputs are shared among threads.
#pragma once

#include "vec.h"

namespace gptkern {
inline namespace GPTKERN_ISA {

// Rows that one pass over the weights takes: what the registers hold of their sums.
constexpr int kMostRows = kLanes == 16 ? 8 : 4;
constexpr int kTurnedRows = 8;  // rows of turned weights that one pass over the outputs takes
constexpr int kPanel = 96;      // rows that are summed before they are added to the rest: smaller errors

// Widened rows in ``place`` order, ``stride`` apart.
struct Rows {
    const float* at;
    int64_t stride;
    int count;
};

template <class Kind>
struct Weights {
    const typename Kind::Storage* at;
    int64_t stride;  // between rows: of outputs, or of inputs where the matrix is turned
    int in;
};

// The sums of J outputs and R rows; ``from`` are the outputs' weights.
template <class Kind, int J, int R>
GPTKERN_HD void dots(const Weights<Kind>& w, const typename Kind::Storage* const* from, const Rows& x, int row,
                     float (*sums)[kMostRows]) {
    Vec total[J][R];
    for (int j = 0; j < J; ++j) {
        for (int r = 0; r < R; ++r) total[j][r] = zeros();
    }
    const float* const rows = x.at + row * x.stride;
    const int whole = w.in / kStep * kStep;
    for (int i = 0; i < whole; i += kStep) {
        Vec first[J], second[J];
        for (int j = 0; j < J; ++j) Kind::pair(from[j] + i, first[j], second[j]);
        for (int r = 0; r < R; ++r) {
            const Vec a = load(rows + r * x.stride + i), b = load(rows + r * x.stride + i + kLanes);
            for (int j = 0; j < J; ++j) total[j][r] = fma(second[j], b, fma(first[j], a, total[j][r]));
        }
    }
    for (int j = 0; j < J; ++j) {
        for (int r = 0; r < R; ++r) {
            float value = sum(total[j][r]);
            for (int i = whole; i < w.in; ++i) {
                value = __builtin_fmaf(Kind::load(from[j][i]), rows[r * x.stride + i], value);
            }
            sums[j][r] = value;
        }
    }
}

// Outputs first to last, J runs of neighbours side by side: so many long streams are what the prefetchers
// of a core follow best.
template <class Kind, int J, int R, class Give>
GPTKERN_HD void streams(const Weights<Kind>& w, const Rows& x, int row, int first, int last, const Give& give) {
    const int run = (last - first + J - 1) / J;
    for (int t = 0; t < run; ++t) {
        const typename Kind::Storage* from[J];
        for (int j = 0; j < J; ++j) {
            const int out = first + j * run + t;
            from[j] = w.at + (out < last ? out : last - 1) * w.stride;
        }
        float sums[J][kMostRows];
        dots<Kind, J, R>(w, from, x, row, sums);
        for (int j = 0; j < J; ++j) {
            const int out = first + j * run + t;
            if (out >= last) continue;
            for (int r = 0; r < R; ++r) give(row + r, out, sums[j][r]);
        }
    }
}

// give(row, out, value) of every row and of outputs first to last.
template <class Kind, class Give>
void product(const Weights<Kind>& w, const Rows& x, int first, int last, const Give& give) {
    if (first >= last) return;
    int row = 0;
    if constexpr (kMostRows == 8) {
        for (; row + 8 <= x.count; row += 8) streams<Kind, 2, 8>(w, x, row, first, last, give);
    }
    for (; row + 4 <= x.count; row += 4) streams<Kind, kLanes == 16 ? 4 : 2, 4>(w, x, row, first, last, give);
    for (; row + 2 <= x.count; row += 2) streams<Kind, 4, 2>(w, x, row, first, last, give);
    for (; row < x.count; ++row) streams<Kind, 4, 1>(w, x, row, first, last, give);
}

// Adds the share of S weight rows from i on to sums ``into`` (rows, outs), outputs first to last, whole steps.
template <class Kind, int S>
GPTKERN_HD void add_turned(const Weights<Kind>& w, const Rows& x, int i, int first, int last, float* into,
                           int64_t stride) {
    for (int out = first; out < last; out += kStep) {
        Vec low[S], high[S];
        for (int s = 0; s < S; ++s) {
            const auto* const from = w.at + (i + s) * w.stride + out;
            // The rows after these, while these are at work; past the end it is asked for in vain.
            _mm_prefetch(reinterpret_cast<const char*>(from + S * w.stride), _MM_HINT_T0);
            Kind::pair(from, low[s], high[s]);
        }
        for (int r = 0; r < x.count; ++r) {
            const float* const values = x.at + r * x.stride;
            float* const sums = into + r * stride + (out - first);
            // Summed apart first: fewer additions to the long sum, and smaller errors.
            Vec a = zeros(), b = zeros();
            for (int s = 0; s < S; ++s) {
                const Vec value = all(values[Kind::place(i + s, w.in)]);
                a = fma(value, low[s], a);
                b = fma(value, high[s], b);
            }
            store(sums, add(load(sums), a));
            store(sums + kLanes, add(load(sums + kLanes), b));
        }
    }
}

// The same of a matrix kept as (in, outs). ``memory`` has room for two rows of last - first values a row of x.
template <class Kind, class Give>
void turned_product(const Weights<Kind>& w, const Rows& x, int first, int last, float* memory, const Give& give) {
    const int outs = last - first, whole = outs / kStep * kStep;
    float *const panel = memory, *const sums = memory + static_cast<int64_t>(x.count) * whole;
    for (int64_t i = 0; i < 2LL * x.count * whole; ++i) memory[i] = 0.0f;
    for (int i = 0; i < w.in;) {
        const int end = i + kPanel < w.in ? i + kPanel : w.in;
        for (; i + kTurnedRows <= end; i += kTurnedRows) {
            add_turned<Kind, kTurnedRows>(w, x, i, first, first + whole, panel, whole);
        }
        for (; i < end; ++i) add_turned<Kind, 1>(w, x, i, first, first + whole, panel, whole);
        for (int64_t n = 0; n < static_cast<int64_t>(x.count) * whole; ++n) {
            sums[n] += panel[n];
            panel[n] = 0.0f;
        }
    }
    for (int r = 0; r < x.count; ++r) {
        for (int out = 0; out < whole; ++out) {
            give(r, first + out, sums[static_cast<int64_t>(r) * whole + Kind::place(out, whole)]);
        }
        for (int out = first + whole; out < last; ++out) {
            double value = 0.0;
            for (int i = 0; i < w.in; ++i) {
                value += static_cast<double>(x.at[r * x.stride + Kind::place(i, w.in)]) * Kind::load(w.at[i * w.stride + out]);
            }
            give(r, out, static_cast<float>(value));
        }
    }
}

}  // namespace GPTKERN_ISA
}  // namespace gptkern
