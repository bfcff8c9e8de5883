// Products of rows of int8 with int8 weights by VNNI, where the weights lie.
//
// The sum of a lane and panel is exact. What it is scaled to is summed in fp32, in the order of the inputs, and the 16 lanes
// in the end. Neither the number of rows nor the split of outputs among threads changes that order.
#pragma once

#include "decode/byte_rows.h"
#include "decode/row_groups.h"

#ifdef __AVX512VNNI__

namespace gptkern {
inline namespace GPTKERN_ISA {

// A vector of int32 as GCC's dot product takes it: of __m512i it copies every sum.
using Ints = __v16si;

GPTKERN_HD Ints dot(Ints sums, __m512i weights, __m512i values) {
    return reinterpret_cast<Ints>(_mm512_dpbusd_epi32(reinterpret_cast<__m512i>(sums), weights, values));
}
GPTKERN_HD Ints load_ints(const char* from) { return reinterpret_cast<Ints>(_mm512_loadu_si512(from)); }
GPTKERN_HD Vec widened(Ints sums) { return _mm512_cvtepi32_ps(reinterpret_cast<__m512i>(sums)); }

constexpr int kByteRows = 4;  // rows that are summed at once: the registers hold so many sums of two kinds

// A panel of the weights of kOuts outputs and of some rows.
struct ByteTile {
    const uint8_t* at[kOuts];
    int inputs;
    int64_t ahead;  // bytes from a weight to the one to be fetched meanwhile
    const char* x;
    int64_t x_stride;
};

// The sums of R rows over the panels so far.
template <int R>
struct ByteSums {
    Vec at[kOuts][R];

    ByteSums() {
#pragma GCC unroll 4
        for (int j = 0; j < kOuts; ++j) {
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) at[j][r] = zeros();
        }
    }

    // Adds a panel's sums, times the scales of the row's lanes.
    GPTKERN_HD void add(const ByteTile& tile) {
        const char* values = tile.x + kLaneBytes;
        Ints sums[kOuts][R];
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
            for (int j = 0; j < kOuts; ++j) sums[j][r] = load_ints(values + r * tile.x_stride);
        }
        values += kLaneBytes;
        const auto add = [&](int i, __mmask64 some) __attribute__((always_inline)) {
            __m512i w[kOuts];
#pragma GCC unroll 4
            for (int j = 0; j < kOuts; ++j) {
                _mm_prefetch(reinterpret_cast<const char*>(tile.at[j] + tile.ahead + i), _MM_HINT_T0);
                const __m512i bytes = some == ~0ull ? _mm512_loadu_si512(tile.at[j] + i)
                                                    : _mm512_maskz_loadu_epi8(some, tile.at[j] + i);
                w[j] = _mm512_xor_si512(bytes, _mm512_set1_epi8(-128));
            }
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) {
                const __m512i x = _mm512_loadu_si512(values + r * tile.x_stride + i);
#pragma GCC unroll 4
                for (int j = 0; j < kOuts; ++j) sums[j][r] = dot(sums[j][r], w[j], x);
            }
        };
        const int whole = tile.inputs / kVector * kVector;
        for (int i = 0; i < whole; i += kVector) add(i, ~0ull);
        if (whole < tile.inputs) add(whole, (1ull << (tile.inputs - whole)) - 1);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
            const Vec scales = load(reinterpret_cast<const float*>(tile.x + r * tile.x_stride));
#pragma GCC unroll 4
            for (int j = 0; j < kOuts; ++j) at[j][r] = fma(widened(sums[j][r]), scales, at[j][r]);
        }
    }
};

// sums[r * stride + out] for R rows from ``row`` on and the outputs out[0] to out[kOuts - 1], less ``first``.
template <int R>
void byte_tile(const CpuLinear& w, const Bytes& x, int row, const int (&out)[kOuts], int first, int64_t ahead, float* sums,
               int64_t stride) {
    ByteSums<R> total;
    const char* at = x.row(row);
    for (int input = 0; input < w.in; input += kBytePanel) {
        const int inputs = w.in - input < kBytePanel ? w.in - input : kBytePanel;
        ByteTile tile{{}, inputs, ahead, at, x.stride};
        for (int j = 0; j < kOuts; ++j) tile.at[j] = static_cast<const uint8_t*>(w.weight) + out[j] * w.stride + input;
        total.add(tile);
        at += 2 * kLaneBytes + kBytePanel;
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
        const auto& own = total.at;
        const __m128 four = sums_of_four(own[0][r], own[1][r], own[2][r], own[3][r]);
        store_sums(sums + (row + r) * stride - first, out, four);
    }
}

// sums[r * stride + j] = dot(x[r], weights of output first + j) for the outputs up to ``last``.
inline void byte_product(const CpuLinear& w, const Bytes& x, int first, int last, float* sums, int64_t stride) {
    const OutTurns turns(last - first, x.count);
    const int block = turns.block();
    for (int start = 0; start < turns.turns; start += block) {
        row_groups<kByteRows>(x.count, [&](int row, auto rows) {
            const int64_t ahead = row == 0 ? block * turns.step() * w.stride : 0;
            for (int n = start; n < start + block && n < turns.turns; ++n) {
                int out[kOuts];
                for (int j = 0; j < kOuts; ++j) out[j] = first + turns.out(n, j);
                byte_tile<decltype(rows)::value>(w, x, row, out, first, ahead, sums, stride);
            }
        });
    }
}

}  // namespace GPTKERN_ISA
}  // namespace gptkern

#endif  // __AVX512VNNI__
