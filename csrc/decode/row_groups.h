// What products of many rows have in common: groups of rows, and sums over lanes.
#pragma once

#include "decode/row_product.h"

namespace gptkern {
inline namespace GPTKERN_ISA {

constexpr int kManyRows = 16;  // beyond, a group of rows meets several outputs' weights while it is in the first cache
constexpr int kManyOuts = 8;   // by kOuts

// The order in which ``outs`` outputs are computed, kOuts a turn. Past the last output it stands there again.
struct OutTurns {
    int outs, turns;
    bool many;

    OutTurns(int outs, int rows) : outs(outs), turns((outs + kOuts - 1) / kOuts), many(rows > kManyRows) {}

    // Turns that a group of rows takes before the next group does.
    int block() const { return many ? kManyOuts : 1; }
    // From an output to that of the next turn.
    int step() const { return many ? kOuts : 1; }
    // The j-th output of a turn: of few rows kOuts long runs stand side by side, as a core's prefetchers follow them; of
    // many rows neighbours do, whose sums are stored together.
    int out(int turn, int j) const {
        const int at = many ? turn * kOuts + j : turn + j * turns;
        return at < outs ? at : outs - 1;
    }
};

// The sums of four vectors.
GPTKERN_HD __m128 sums_of_four(Vec a, Vec b, Vec c, Vec d) {
#ifdef __AVX512F__
    const auto halves = [](Vec x, Vec y) {
        return _mm512_add_ps(_mm512_shuffle_f32x4(x, y, 0x44), _mm512_shuffle_f32x4(x, y, 0xee));
    };
    const Vec x = halves(a, b), y = halves(c, d);
    Vec sums = _mm512_add_ps(_mm512_shuffle_f32x4(x, y, 0x88), _mm512_shuffle_f32x4(x, y, 0xdd));
    sums = _mm512_add_ps(sums, _mm512_permute_ps(sums, 0x4e));
    sums = _mm512_add_ps(sums, _mm512_permute_ps(sums, 0xb1));
    return _mm512_castps512_ps128(_mm512_maskz_compress_ps(0x1111, sums));
#else
    const Vec halves = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
    return _mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps(halves, 1));
#endif
}

// Stores a row's sums where its outputs are.
GPTKERN_HD void store_sums(float* to, const int (&out)[kOuts], __m128 sums) {
    const bool neighbours = out[1] == out[0] + 1 && out[kOuts - 1] == out[0] + kOuts - 1;
    if (neighbours) return _mm_storeu_ps(to + out[0], sums);
    float own[kOuts];
    _mm_storeu_ps(own, sums);
    for (int j = 0; j < kOuts; ++j) to[out[j]] = own[j];
}

// use(first row, rows as a constant): all rows in groups of nearly the same size, Most at most.
template <int Most, class Use>
GPTKERN_HD void row_groups(int rows, const Use& use) {
    static_assert(Most == 2 || Most == 4 || Most == 6, "a case for each size");
    const int groups = (rows + Most - 1) / Most;
    for (int g = 0, row = 0; g < groups; ++g) {
        const int count = (rows - row + groups - g - 1) / (groups - g);
        switch (count) {
            case 1: use(row, Count<1>{}); break;
            case 2: use(row, Count<2>{}); break;
            case 3: use(row, Count<Most >= 3 ? 3 : Most>{}); break;
            case 4: use(row, Count<Most >= 4 ? 4 : Most>{}); break;
            case 5: use(row, Count<Most == 6 ? 5 : Most>{}); break;
            default: use(row, Count<Most>{});
        }
        row += count;
    }
}

}  // namespace GPTKERN_ISA
}  // namespace gptkern
