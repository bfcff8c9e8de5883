// Products of bf16 rows with bf16 weights that are stored as (in, outs), by the processor's dot product of pairs: two
// neighbouring inputs' weights interleave in registers.
//
// A product is one sum over the pairs, in order. Neither the number of rows nor the split of outputs among threads
// changes that.
#pragma once

#include "decode/operand.h"

#ifdef __AVX512BF16__

namespace gptkern {
inline namespace GPTKERN_ISA {

constexpr int kMostPairs = 8;     // pairs of inputs whose weights the registers hold
constexpr int kFewPairs = 4;      // for so few rows that memory bounds them: more streams than these are read slower
constexpr int kFewPairsRows = 2;  // up to these
constexpr int kMostSums = 1 << 16;  // sums that stay in the second cache while all inputs are added to them

// The weights of two inputs and 32 outputs, in pairs: of the outputs 0-3, 8-11 .., and of 4-7, 12-15 ...
struct PairedOutputs {
    __m512bh low, high;

    GPTKERN_HD void take(const uint16_t* even, const uint16_t* odd, __mmask32 mask) {
        const __m512i a = _mm512_maskz_loadu_epi16(mask, even);
        const __m512i b = odd == nullptr ? _mm512_setzero_si512() : _mm512_maskz_loadu_epi16(mask, odd);
        low = reinterpret_cast<__m512bh>(_mm512_unpacklo_epi16(a, b));
        high = reinterpret_cast<__m512bh>(_mm512_unpackhi_epi16(a, b));
    }
};

// sums[r * stride + j] += the products of N pairs of inputs from ``i`` on, of the outputs first + j; the sums lie as
// PairedOutputs has them.
template <int N>
GPTKERN_HD void add_pairs(const Weights<Bf16>& w, const Pairs& x, int i, int first, int outs, float* sums,
                          int64_t stride) {
    const uint16_t* const from = w.at + i * w.stride + first;
    RowsAhead<uint16_t> ahead(from + 2 * N * w.stride, w.stride, padded(outs));
    for (int out = 0; out < outs; out += kStep) {
        const __mmask32 mask = outs - out < kStep ? (1u << (outs - out)) - 1 : 0xffffffffu;
        PairedOutputs weights[N];
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) {
            ahead.line();
            ahead.line();
            const uint16_t* const even = from + 2 * n * w.stride + out;
            weights[n].take(even, i + 2 * n + 1 < w.in ? even + w.stride : nullptr, mask);
        }
        for (int r = 0; r < x.count; ++r) {
            const uint16_t* const values = x.row(r) + i;
            float* const to = sums + r * stride + out;
            Vec low = load(to), high = load(to + kLanes);
#pragma GCC unroll 8
            for (int n = 0; n < N; ++n) {
                int pair;
                std::memcpy(&pair, values + 2 * n, sizeof(pair));
                const auto both = reinterpret_cast<__m512bh>(_mm512_set1_epi32(pair));
                low = _mm512_dpbf16_ps(low, weights[n].low, both);
                high = _mm512_dpbf16_ps(high, weights[n].high, both);
            }
            store(to, low);
            store(to + kLanes, high);
        }
    }
}

// 32 sums from the order of PairedOutputs to that of the outputs.
GPTKERN_HD void order(float* sums) {
    const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
    const Vec low = load(sums), high = load(sums + kLanes);
    store(sums, _mm512_permutex2var_ps(low, first, high));
    store(sums + kLanes, _mm512_permutex2var_ps(low, second, high));
}

// The products of all inputs, N pairs at a time, with what is left one by one.
template <int N>
void add_all_pairs(const Weights<Bf16>& w, const Pairs& x, int first, int outs, float* sums, int64_t stride) {
    int i = 0;
    for (; i + 2 * N <= w.in; i += 2 * N) add_pairs<N>(w, x, i, first, outs, sums, stride);
    for (; i < w.in; i += 2) add_pairs<1>(w, x, i, first, outs, sums, stride);
}

// sums[r * stride + j] = dot(x[r], weights of output first + j) for ``outs`` outputs, 1 or more, with room for
// ``padded(outs)`` in each row.
inline void transposed_product(const Weights<Bf16>& w, const Pairs& x, int first, int outs, float* sums,
                               int64_t stride) {
    if (x.count == 0) return;
    const auto fitting = static_cast<int>(padded(kMostSums / x.count));
    for (int from = 0; from < outs; from += fitting) {
        const int some = outs - from < fitting ? outs - from : fitting;
        float* const own = sums + from;
        for (int r = 0; r < x.count; ++r) std::memset(own + r * stride, 0, padded(some) * sizeof(float));
        const auto add = x.count <= kFewPairsRows ? add_all_pairs<kFewPairs> : add_all_pairs<kMostPairs>;
        add(w, x, first + from, some, own, stride);
        for (int r = 0; r < x.count; ++r) {
            for (int out = 0; out < some; out += kStep) order(own + r * stride + out);
        }
    }
}

}  // namespace GPTKERN_ISA
}  // namespace gptkern

#endif  // __AVX512BF16__
