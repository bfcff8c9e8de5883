// Products of rows of int8 with int8 weights, where the weights lie.
//
// The sum of a lane and panel is exact. What it is scaled to is summed in fp32, in the order of the inputs, and the 16 lanes
// in the end. Neither the number of rows, nor the split of outputs among threads, nor the instruction set changes that
// order.
#pragma once

#include "decode/byte_rows.h"
#include "decode/row_groups.h"

namespace gptkern {
inline namespace GPTKERN_ISA {

constexpr int kByteRows = kLanes == 16 ? 4 : 2;  // rows that are summed at once: the registers hold so many sums
constexpr int kByteParts = kVector / kVecBytes;  // registers of a vector, which take turns in a panel

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
    Vec at[kOuts][kByteParts][R];

    ByteSums() {
#pragma GCC unroll 4
        for (int j = 0; j < kOuts; ++j) {
            for (int p = 0; p < kByteParts; ++p) {
#pragma GCC unroll 4
                for (int r = 0; r < R; ++r) at[j][p][r] = zeros();
            }
        }
    }

    // Adds a panel's sums, times the scales of the row's lanes.
    GPTKERN_HD void add(const ByteTile& tile) {
#pragma GCC unroll 2
        for (int p = 0; p < kByteParts; ++p) add(tile, p);
    }

    GPTKERN_HD void add(const ByteTile& tile, int part) {
        const char* const scales = tile.x + part * kVecBytes;
        const char* const starts = scales + kLaneBytes;
        const char* const values = starts + kLaneBytes;
        const uint8_t* at_part[kOuts];
        Ints sums[kOuts][R];
#pragma GCC unroll 4
        for (int j = 0; j < kOuts; ++j) {
            at_part[j] = tile.at[j] + part * kVecBytes;
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) sums[j][r] = load_ints(starts + r * tile.x_stride);
        }
        const auto add = [&](int i, auto load_weights) __attribute__((always_inline)) {
            ByteVec weights[kOuts];
#pragma GCC unroll 4
            for (int j = 0; j < kOuts; ++j) {
                if (part == 0) _mm_prefetch(reinterpret_cast<const char*>(at_part[j] + tile.ahead + i), _MM_HINT_T0);
                weights[j] = load_weights(at_part[j] + i);
            }
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) {
                const ByteVec x = load_bytes(values + r * tile.x_stride + i);
#pragma GCC unroll 4
                for (int j = 0; j < kOuts; ++j) sums[j][r] = ByteWeights(weights[j]).add(sums[j][r], x);
            }
        };
        const int whole = tile.inputs / kVector * kVector, left = tile.inputs - whole - part * kVecBytes;
        for (int i = 0; i < whole; i += kVector) add(i, [](const uint8_t* from) { return load_bytes(from); });
        if (left > 0) add(whole, [left](const uint8_t* from) { return load_bytes(from, left); });
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
            const Vec own = load(reinterpret_cast<const float*>(scales + r * tile.x_stride));
#pragma GCC unroll 4
            for (int j = 0; j < kOuts; ++j) at[j][part][r] = fma(widened(sums[j][r]), own, at[j][part][r]);
        }
    }

    // A row's sums of the outputs.
    GPTKERN_HD __m128 of_row(int r) const {
#ifdef __AVX512F__
        return sums_of_four(at[0][0][r], at[1][0][r], at[2][0][r], at[3][0][r]);
#else
        __m128 quarters[kOuts];  // added in the order of a vector of 16
#pragma GCC unroll 4
        for (int j = 0; j < kOuts; ++j) {
            const Vec half = gptkern::add(at[j][0][r], at[j][1][r]);
            quarters[j] = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
        }
        const auto pairs = [](__m128 a, __m128 b) { return _mm_add_ps(_mm_unpacklo_ps(a, b), _mm_unpackhi_ps(a, b)); };
        const __m128 low = pairs(quarters[0], quarters[1]), high = pairs(quarters[2], quarters[3]);
        return _mm_add_ps(_mm_movelh_ps(low, high), _mm_movehl_ps(high, low));
#endif
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
        store_sums(sums + (row + r) * stride - first, out, total.of_row(r));
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
