// Products of a few rows with a weight matrix: the speed at which weights stream from memory bounds them.
//
// A row's result depends neither on the number of rows nor on the split of outputs among threads.
#pragma once

#include "decode/vec.h"

namespace gptkern {
inline namespace GPTKERN_ISA {

constexpr int kOuts = 4;  // outputs whose weights are read side by side: a core's prefetchers follow so many streams
constexpr int kRows = kLanes == 16 ? 4 : 2;  // rows that are summed at once: the registers hold so many sums
constexpr int kTransposedRows = 8;  // rows of a transposed matrix that one pass over the outputs takes
constexpr int kPanel = 192;  // inputs that are summed by themselves before they go to the long sum: smaller errors

// Activations in fp32, elements in the order of ``Kind::place``. The rows interleave by kStep elements, so that all
// addresses of a loop's turn are one pointer plus constants.
struct Rows {
    float* at;
    int count;

    GPTKERN_HD int64_t step(int i) const { return static_cast<int64_t>(i / kStep) * count * kStep; }
    GPTKERN_HD float& value(int row, int i) const { return at[step(i) + row * kStep + i % kStep]; }
};

// Rows in natural order, 0 beyond their inputs up to a multiple of kStep.
template <class Storage>
struct RowsOf {
    Storage* at;
    int count;
    int64_t stride;

    GPTKERN_HD Storage* row(int r) const { return at + r * stride; }
};
using Pairs = RowsOf<uint16_t>;  // of bf16

template <class Kind>
struct Weights {
    const typename Kind::Storage* at;
    int64_t stride;  // between the matrix's rows: outputs, or inputs if the matrix is transposed
    int in;
};

// A number of rows that is known when a loop is compiled.
template <int N>
struct Count {
    static constexpr int value = N;
};

// emit(r, j, dot(x[r], weights at from[j])) for R rows of x from ``row`` on and kOuts outputs j.
template <class Kind, int R, class Emit>
GPTKERN_HD void dots(const Weights<Kind>& w, const typename Kind::Storage* const* from, const Rows& x, int row,
                     const Emit& emit) {
    Vec total[kOuts][R];
    for (int j = 0; j < kOuts; ++j) {
        for (int r = 0; r < R; ++r) total[j][r] = zeros();
    }
    const int whole = w.in / kStep * kStep;
    const float* values = x.at + row * kStep;
    for (int i = 0; i < whole; i += kStep, values += x.count * kStep) {
        Vec first[kOuts], second[kOuts];
        for (int j = 0; j < kOuts; ++j) {
            // The next output's weights, ahead of their use. Past the end a prefetch does nothing.
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
            emit(row + r, j, value);
        }
    }
}

// use(places, row, rows as a constant) for kOuts outputs at a time, read as kOuts long runs of [first, last), and up to
// kRows rows: places[j] is the j-th output, or -1 where a run has ended.
template <class Use>
void tiles(int rows, int first, int last, const Use& use) {
    const int run = (last - first + kOuts - 1) / kOuts;
    for (int t = 0; t < run; ++t) {
        int places[kOuts];
        for (int j = 0; j < kOuts; ++j) places[j] = first + j * run + t < last ? first + j * run + t : -1;
        int row = 0;
        for (; row + kRows <= rows; row += kRows) use(places, row, Count<kRows>{});
        if (kRows > 2 && row + 2 <= rows) {
            use(places, row, Count<2>{});
            row += 2;
        }
        if (row < rows) use(places, row, Count<1>{});
    }
}

// emit(row, out, value) for every row and the outputs [first, last).
template <class Kind, class Emit>
void product(const Weights<Kind>& w, const Rows& x, int first, int last, const Emit& emit) {
    tiles(x.count, first, last, [&](const int* places, int row, auto rows) {
        const typename Kind::Storage* from[kOuts];
        for (int j = 0; j < kOuts; ++j) from[j] = w.at + (places[j] < 0 ? last - 1 : places[j]) * w.stride;
        dots<Kind, decltype(rows)::value>(w, from, x, row, [&](int r, int j, float value) {
            if (places[j] >= 0) emit(r, places[j], value);
        });
    });
}

// int4 weights: see CpuLinear.
struct Int4 {
    const uint8_t* at;
    const uint16_t *scales, *minimums;
    int64_t stride;  // bytes between outputs
    int in, group;
};

// emit(r, j, value) for R rows from ``row`` on, and the outputs ``places``.
template <int R, bool Minimums, class Emit>
GPTKERN_HD void dots(const Int4& w, const int* places, const RowsOf<float>& x, int row, const Emit& emit) {
    Vec total[kOuts][R];
    for (int j = 0; j < kOuts; ++j) {
        for (int r = 0; r < R; ++r) total[j][r] = zeros();
    }
    const int groups = w.in / w.group, half = w.group / 2;
    const uint8_t* from[kOuts];
    const uint16_t *scales[kOuts], *minimums[kOuts];
    for (int j = 0; j < kOuts; ++j) {
        const int64_t of_group = static_cast<int64_t>(places[j]) * groups;
        from[j] = w.at + places[j] * w.stride;
        scales[j] = w.scales + of_group;
        minimums[j] = Minimums ? w.minimums + of_group : nullptr;
    }
    const float* values = x.row(row);
    for (int g = 0; g < groups; ++g, values += w.group) {
#pragma GCC unroll 4
        for (int j = 0; j < kOuts; ++j) {
            const float scale = half_to_float(scales[j][g]);
            const Codes codes(scale, Minimums ? half_to_float(minimums[j][g]) : -8.0f * scale);
            const uint8_t* const bytes = from[j] + g * half;
            // The next output's weights, ahead of their use. Past the end a prefetch does nothing.
            _mm_prefetch(reinterpret_cast<const char*>(bytes + w.stride), _MM_HINT_T1);
            for (int i = 0; i < half; i += kLanes) {
                Vec low, high;
                codes.halves(bytes + i, low, high);
#pragma GCC unroll 4
                for (int r = 0; r < R; ++r) {
                    const float* const a = values + r * x.stride + i;
                    total[j][r] = fma(high, load(a + half), fma(low, load(a), total[j][r]));
                }
            }
        }
    }
    for (int j = 0; j < kOuts; ++j) {
        for (int r = 0; r < R; ++r) emit(row + r, j, sum(total[j][r]));
    }
}

// As ``product`` above.
template <bool Minimums, class Emit>
void product(const Int4& w, const RowsOf<float>& x, int first, int last, const Emit& emit) {
    tiles(x.count, first, last, [&](const int* places, int row, auto rows) {
        int read[kOuts];
        for (int j = 0; j < kOuts; ++j) read[j] = places[j] < 0 ? last - 1 : places[j];
        dots<decltype(rows)::value, Minimums>(w, read, x, row, [&](int r, int j, float value) {
            if (places[j] >= 0) emit(r, places[j], value);
        });
    });
}

// Fetches a matrix's rows into the cache in the order in which they lie, ``width`` elements of each: several rows side by
// side are read slower. Past the matrix's end it does nothing.
template <class Storage>
struct RowsAhead {
    const Storage *at, *end;
    int64_t stride, width;

    RowsAhead(const Storage* from, int64_t stride, int64_t width)
        : at(from), end(from + width), stride(stride), width(width) {}

    GPTKERN_HD void line() {
        _mm_prefetch(reinterpret_cast<const char*>(at), _MM_HINT_T0);
        at += kLine / sizeof(Storage);
        if (at < end) return;
        at = end + stride - width;
        end += stride;
    }
    static constexpr size_t kLine = 64;  // bytes
};

// sums[r][out] += sum_s factors[r][s] * W[i + s][out] for out in [first, last), a multiple of kStep; sums lie as Rows.
template <class Kind, int S>
GPTKERN_HD void add_transposed(const Weights<Kind>& w, const float* factors, int rows, int i, int first, int last,
                           float* sums) {
    using Storage = typename Kind::Storage;
    constexpr size_t kLines = (S * kStep * sizeof(Storage) + RowsAhead<Storage>::kLine - 1) / RowsAhead<Storage>::kLine;
    RowsAhead<Storage> ahead(w.at + (i + S) * w.stride + first, w.stride, last - first);
    for (int out = first; out < last; out += kStep) {
        for (size_t line = 0; line < kLines; ++line) ahead.line();
        Vec low[S], high[S];
        for (int s = 0; s < S; ++s) {
            Kind::pair(w.at + (i + s) * w.stride + out, low[s], high[s]);
        }
        for (int r = 0; r < rows; ++r, sums += kStep) {
            // S products are summed before they go to the long sum: fewer additions to it, smaller errors.
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

// As ``product``, with a matrix that is stored as (in, outs). ``memory`` has room, for each row of x, for
// 2 * (last - first) + kTransposedRows floats.
template <class Kind, class Emit>
void transposed_product(const Weights<Kind>& w, const Rows& x, int first, int last, float* memory, const Emit& emit) {
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
        for (; i + kTransposedRows <= end; i += kTransposedRows) {
            take_factors(i, kTransposedRows);
            add_transposed<Kind, kTransposedRows>(w, factors, x.count, i, first, first + whole, panel);
        }
        for (; i < end; ++i) {
            take_factors(i, 1);
            add_transposed<Kind, 1>(w, factors, x.count, i, first, first + whole, panel);
        }
        for (int64_t n = 0; n < static_cast<int64_t>(x.count) * whole; ++n) {
            sums[n] += panel[n];
            panel[n] = 0.0f;
        }
    }
    for (int r = 0; r < x.count; ++r) {
        for (int out = 0; out < whole; ++out) {
            emit(r, first + out, Rows{sums, x.count}.value(r, Kind::place(out, whole)));
        }
        for (int out = first + whole; out < last; ++out) {
            double value = 0.0;
            for (int i = 0; i < w.in; ++i) {
                const float factor = x.value(r, Kind::place(i, w.in));
                value += static_cast<double>(factor) * Kind::load(w.at[i * w.stride + out]);
            }
            emit(r, out, static_cast<float>(value));
        }
    }
}

}  // namespace GPTKERN_ISA
}  // namespace gptkern
