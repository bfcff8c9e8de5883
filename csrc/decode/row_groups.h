// What the products of AVX-512's dot product instructions have in common: groups of rows, and sums over lanes.
#pragma once

#include "decode/row_product.h"

#ifdef __AVX512F__

namespace gptkern {
inline namespace GPTKERN_ISA {

constexpr int kManyRows = 16;  // beyond, a group of rows meets several outputs' weights while it is in the first cache
constexpr int kManyOuts = 4;   // by kOuts

// The sums of four vectors.
GPTKERN_HD __m128 sums_of_four(Vec a, Vec b, Vec c, Vec d) {
    const auto halves = [](Vec x, Vec y) {
        return _mm512_add_ps(_mm512_shuffle_f32x4(x, y, 0x44), _mm512_shuffle_f32x4(x, y, 0xee));
    };
    const Vec x = halves(a, b), y = halves(c, d);
    Vec sums = _mm512_add_ps(_mm512_shuffle_f32x4(x, y, 0x88), _mm512_shuffle_f32x4(x, y, 0xdd));
    sums = _mm512_add_ps(sums, _mm512_permute_ps(sums, 0x4e));
    sums = _mm512_add_ps(sums, _mm512_permute_ps(sums, 0xb1));
    return _mm512_castps512_ps128(_mm512_maskz_compress_ps(0x1111, sums));
}

// use(first row, rows as a constant): all rows in groups of nearly the same size, Most at most.
template <int Most, class Use>
GPTKERN_HD void row_groups(int rows, const Use& use) {
    static_assert(Most == 4 || Most == 6, "a case for each size");
    const int groups = (rows + Most - 1) / Most;
    for (int g = 0, row = 0; g < groups; ++g) {
        const int count = (rows - row + groups - g - 1) / (groups - g);
        switch (count) {
            case 1: use(row, Count<1>{}); break;
            case 2: use(row, Count<2>{}); break;
            case 3: use(row, Count<3>{}); break;
            case 4: use(row, Count<4>{}); break;
            case 5: use(row, Count<Most == 6 ? 5 : Most>{}); break;
            default: use(row, Count<Most>{});
        }
        row += count;
    }
}

}  // namespace GPTKERN_ISA
}  // namespace gptkern

#endif  // __AVX512F__
