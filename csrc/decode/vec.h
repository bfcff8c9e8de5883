// Vectors of fp32 values, as wide as the instruction set that a source is compiled for.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "common/floats.h"

namespace gptkern {
inline namespace GPTKERN_ISA {

#ifdef __AVX512F__
using Vec = __m512;
constexpr int kLanes = 16;

GPTKERN_HD Vec zeros() { return _mm512_setzero_ps(); }
GPTKERN_HD Vec all(float value) { return _mm512_set1_ps(value); }
GPTKERN_HD Vec load(const float* from) { return _mm512_loadu_ps(from); }
GPTKERN_HD void store(float* to, Vec a) { _mm512_storeu_ps(to, a); }
GPTKERN_HD Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
GPTKERN_HD Vec sub(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
GPTKERN_HD Vec mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
GPTKERN_HD Vec div(Vec a, Vec b) { return _mm512_div_ps(a, b); }
GPTKERN_HD Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
// If b is a NaN, the result is b.
GPTKERN_HD Vec larger(Vec a, Vec b) { return _mm512_max_ps(a, b); }
GPTKERN_HD Vec smaller(Vec a, Vec b) { return _mm512_min_ps(a, b); }
GPTKERN_HD Vec nearest(Vec a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
GPTKERN_HD Vec times_power_of_two(Vec a, Vec n) {
    return _mm512_castsi512_ps(
        _mm512_add_epi32(_mm512_castps_si512(a), _mm512_slli_epi32(_mm512_cvtps_epi32(n), 23)));
}
GPTKERN_HD Vec magnitude(Vec a) { return _mm512_abs_ps(a); }
// bf16 to fp32 and back, to the nearest, in order. A NaN stays a NaN.
GPTKERN_HD Vec load(const uint16_t* from) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
GPTKERN_HD void store(uint16_t* to, Vec a) {
    const __m512i bits = _mm512_castps_si512(a), odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i nearest = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    const __m512i nan = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
    const __m512i best = _mm512_mask_mov_epi32(nearest, _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q), nan);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(_mm512_srli_epi32(best, 16)));
}
// The even and the odd elements of the 32 that two vectors hold.
GPTKERN_HD void part(Vec a, Vec b, Vec& even, Vec& odd) {
    const __m512i evens = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    even = _mm512_permutex2var_ps(a, evens, b);
    odd = _mm512_permutex2var_ps(a, _mm512_add_epi32(evens, _mm512_set1_epi32(1)), b);
}
GPTKERN_HD void widen(const uint16_t* from, Vec& even, Vec& odd) {
    const __m512i pairs = _mm512_loadu_si512(from);
    even = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
    odd = _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(static_cast<int>(0xffff0000))));
}
GPTKERN_HD Vec widen(const int8_t* from) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
}
GPTKERN_HD float half_to_float(uint16_t bits) {
    return _mm_cvtss_f32(_mm_maskz_cvtph_ps(1, _mm_cvtsi32_si128(bits)));
}
// The 16 numbers that an int4 group's codes stand for, code 0 for ``least``; they are looked up.
struct Codes {
    Vec numbers;
    GPTKERN_HD Codes(float scale, float least)
        : numbers(fma(_mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), all(scale), all(least))) {}
    // Those of kLanes bytes: of their low halves, and of their high ones.
    GPTKERN_HD void halves(const uint8_t* from, Vec& low, Vec& high) const {
        const __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
        low = _mm512_permutexvar_ps(bytes, numbers);
        high = _mm512_permutexvar_ps(_mm512_srli_epi32(bytes, 4), numbers);
    }
};
GPTKERN_HD float sum(Vec a) {
    const __m256 low = _mm512_castps512_ps256(a);
    const __m256 high = _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(a), 1));
    const __m256 half = _mm256_add_ps(low, high);
    __m128 quarter = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
    quarter = _mm_add_ps(quarter, _mm_movehl_ps(quarter, quarter));
    return _mm_cvtss_f32(_mm_add_ss(quarter, _mm_movehdup_ps(quarter)));
}
// sum() of each of 16 vectors, in order: the same additions, of several vectors at a time.
GPTKERN_HD Vec sums_of(const Vec (&a)[16]) {
    Vec quarters[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        const auto halves = [](Vec x, Vec y) {
            return _mm512_add_ps(_mm512_shuffle_f32x4(x, y, 0x44), _mm512_shuffle_f32x4(x, y, 0xee));
        };
        const Vec x = halves(a[i], a[i + 4]), y = halves(a[i + 8], a[i + 12]);
        quarters[i] = _mm512_add_ps(_mm512_shuffle_f32x4(x, y, 0x88), _mm512_shuffle_f32x4(x, y, 0xdd));
    }
    const auto pairs = [](Vec x, Vec y) {
        const __m512d a = _mm512_castps_pd(x), b = _mm512_castps_pd(y);
        return _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
    };
    const Vec x = pairs(quarters[0], quarters[1]), y = pairs(quarters[2], quarters[3]);
    return _mm512_add_ps(_mm512_shuffle_ps(x, y, 0x88), _mm512_shuffle_ps(x, y, 0xdd));
}
#else
using Vec = __m256;
constexpr int kLanes = 8;

GPTKERN_HD Vec zeros() { return _mm256_setzero_ps(); }
GPTKERN_HD Vec all(float value) { return _mm256_set1_ps(value); }
GPTKERN_HD Vec load(const float* from) { return _mm256_loadu_ps(from); }
GPTKERN_HD void store(float* to, Vec a) { _mm256_storeu_ps(to, a); }
GPTKERN_HD Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
GPTKERN_HD Vec sub(Vec a, Vec b) { return _mm256_sub_ps(a, b); }
GPTKERN_HD Vec mul(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
GPTKERN_HD Vec div(Vec a, Vec b) { return _mm256_div_ps(a, b); }
GPTKERN_HD Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
GPTKERN_HD Vec larger(Vec a, Vec b) { return _mm256_max_ps(a, b); }
GPTKERN_HD Vec smaller(Vec a, Vec b) { return _mm256_min_ps(a, b); }
GPTKERN_HD Vec nearest(Vec a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
GPTKERN_HD Vec magnitude(Vec a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
GPTKERN_HD Vec times_power_of_two(Vec a, Vec n) {
    return _mm256_castsi256_ps(
        _mm256_add_epi32(_mm256_castps_si256(a), _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23)));
}
// bf16 to fp32 and back, to the nearest, in order. A NaN stays a NaN.
GPTKERN_HD Vec load(const uint16_t* from) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
GPTKERN_HD void store(uint16_t* to, Vec a) {
    const __m256i bits = _mm256_castps_si256(a), odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i nearest = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
    const __m256i nan = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    const __m256i unordered = _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q));
    const __m256i high = _mm256_srli_epi32(_mm256_blendv_epi8(nearest, nan, unordered), 16);
    const __m256i halves = _mm256_permute4x64_epi64(_mm256_packus_epi32(high, high), 0x08);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_castsi256_si128(halves));
}
// The even and the odd elements of the 16 that two vectors hold.
GPTKERN_HD void part(Vec a, Vec b, Vec& even, Vec& odd) {
    const auto in_order = [](Vec mixed) {
        return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(mixed), 0xd8));
    };
    even = in_order(_mm256_shuffle_ps(a, b, 0x88));
    odd = in_order(_mm256_shuffle_ps(a, b, 0xdd));
}
GPTKERN_HD void widen(const uint16_t* from, Vec& even, Vec& odd) {
    const __m256i pairs = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    even = _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16));
    odd = _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(static_cast<int>(0xffff0000))));
}
GPTKERN_HD Vec widen(const int8_t* from) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
}
GPTKERN_HD float half_to_float(uint16_t bits) { return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(bits))); }
// The numbers that an int4 group's codes stand for, code 0 for ``least``.
struct Codes {
    Vec scales, least;
    GPTKERN_HD Codes(float scale, float least) : scales(all(scale)), least(all(least)) {}
    // Those of kLanes bytes: of their low halves, and of their high ones.
    GPTKERN_HD void halves(const uint8_t* from, Vec& low, Vec& high) const {
        const __m256i bytes = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
        low = number(_mm256_and_si256(bytes, _mm256_set1_epi32(15)));
        high = number(_mm256_srli_epi32(bytes, 4));
    }

private:
    GPTKERN_HD Vec number(__m256i codes) const { return fma(_mm256_cvtepi32_ps(codes), scales, least); }
};
GPTKERN_HD float sum(Vec a) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}
// sum() of each of 8 vectors, in order: the same additions, of several vectors at a time.
GPTKERN_HD Vec sums_of(const Vec (&a)[8]) {
    Vec halves[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        halves[i] = _mm256_add_ps(_mm256_permute2f128_ps(a[i], a[i + 4], 0x20),
                                  _mm256_permute2f128_ps(a[i], a[i + 4], 0x31));
    }
    const auto pairs = [](Vec x, Vec y) {
        const __m256d a = _mm256_castps_pd(x), b = _mm256_castps_pd(y);
        return _mm256_add_ps(_mm256_castpd_ps(_mm256_unpacklo_pd(a, b)), _mm256_castpd_ps(_mm256_unpackhi_pd(a, b)));
    };
    const Vec x = pairs(halves[0], halves[1]), y = pairs(halves[2], halves[3]);
    return _mm256_add_ps(_mm256_shuffle_ps(x, y, 0x88), _mm256_shuffle_ps(x, y, 0xdd));
}
#endif

// Lane i of vector j goes to lane j of vector i.
#ifdef __AVX512F__
GPTKERN_HD void transpose(Vec (&a)[16]) {
    Vec b[16];
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
        b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
    }
    const auto doubles = [](Vec x, Vec y, Vec& low, Vec& high) {
        const __m512d c = _mm512_castps_pd(x), d = _mm512_castps_pd(y);
        low = _mm512_castpd_ps(_mm512_unpacklo_pd(c, d));
        high = _mm512_castpd_ps(_mm512_unpackhi_pd(c, d));
    };
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {
        doubles(b[i], b[i + 2], a[i], a[i + 1]);
        doubles(b[i + 1], b[i + 3], a[i + 2], a[i + 3]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        b[i] = _mm512_shuffle_f32x4(a[i], a[i + 4], 0x88);
        b[i + 4] = _mm512_shuffle_f32x4(a[i], a[i + 4], 0xdd);
        b[i + 8] = _mm512_shuffle_f32x4(a[i + 8], a[i + 12], 0x88);
        b[i + 12] = _mm512_shuffle_f32x4(a[i + 8], a[i + 12], 0xdd);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        a[i] = _mm512_shuffle_f32x4(b[i], b[i + 8], 0x88);
        a[i + 8] = _mm512_shuffle_f32x4(b[i], b[i + 8], 0xdd);
        a[i + 4] = _mm512_shuffle_f32x4(b[i + 4], b[i + 12], 0x88);
        a[i + 12] = _mm512_shuffle_f32x4(b[i + 4], b[i + 12], 0xdd);
    }
}
#else
GPTKERN_HD void transpose(Vec (&a)[8]) {
    Vec b[8];
#pragma GCC unroll 2
    for (int i = 0; i < 8; i += 4) {
        const Vec low = _mm256_unpacklo_ps(a[i], a[i + 1]), high = _mm256_unpackhi_ps(a[i], a[i + 1]);
        const Vec more_low = _mm256_unpacklo_ps(a[i + 2], a[i + 3]), more_high = _mm256_unpackhi_ps(a[i + 2], a[i + 3]);
        b[i] = _mm256_shuffle_ps(low, more_low, 0x44);
        b[i + 1] = _mm256_shuffle_ps(low, more_low, 0xee);
        b[i + 2] = _mm256_shuffle_ps(high, more_high, 0x44);
        b[i + 3] = _mm256_shuffle_ps(high, more_high, 0xee);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        a[i] = _mm256_permute2f128_ps(b[i], b[i + 4], 0x20);
        a[i + 4] = _mm256_permute2f128_ps(b[i], b[i + 4], 0x31);
    }
}
#endif

// The values that one turn of a loop over weights takes: two vectors.
constexpr int kStep = 2 * kLanes;
GPTKERN_HD int64_t padded(int64_t n) { return (n + kStep - 1) / kStep * kStep; }

// A vector of ``count`` elements, or of kLanes if there are more; beyond them it is 0.
template <class Storage>
GPTKERN_HD Vec load_some(const Storage* from, int64_t count) {
    if (count >= kLanes) return load(from);
    Storage some[kLanes] = {};
    std::memcpy(some, from, static_cast<size_t>(count) * sizeof(Storage));
    return load(some);
}
template <class Storage>
GPTKERN_HD void store_some(Storage* to, int64_t count, Vec a) {
    if (count >= kLanes) return store(to, a);
    Storage some[kLanes];
    store(some, a);
    std::memcpy(to, some, static_cast<size_t>(count) * sizeof(Storage));
}

// e^x within 2 ulp, with x clamped to the range of normal results (the coefficients are those of Cephes' expf).
GPTKERN_HD Vec exponential(Vec x) {
    x = smaller(all(88.0f), larger(all(-87.0f), x));
    const Vec n = nearest(mul(x, all(1.44269504088896341f)));
    const Vec r = fma(n, all(2.12194440e-4f), fma(n, all(-0.693359375f), x));
    Vec p = all(1.9875691500e-4f);
    p = fma(p, r, all(1.3981999507e-3f));
    p = fma(p, r, all(8.3334519073e-3f));
    p = fma(p, r, all(4.1665795894e-2f));
    p = fma(p, r, all(1.6666665459e-1f));
    p = fma(p, r, all(5.0000001201e-1f));
    return times_power_of_two(add(fma(p, mul(r, r), r), all(1.0f)), n);
}

// A storage format of weights and of the cache. ``place(i, n)`` is the index of element i, of n, after the even/odd
// permutation that ``pair`` applies: activations that are multiplied with stored numbers lie permuted the same way.
struct Fp32 {
    using Storage = float;
    static constexpr bool kEvenFirst = false;
    GPTKERN_HD static float load(float value) { return value; }
    GPTKERN_HD static float store(float value) { return value; }
    GPTKERN_HD static int place(int i, int) { return i; }
    GPTKERN_HD static void pair(const float* from, Vec& first, Vec& second) {
        first = gptkern::load(from);
        second = gptkern::load(from + kLanes);
    }
};

struct Bf16 {
    using Storage = uint16_t;
    static constexpr bool kEvenFirst = true;
    GPTKERN_HD static float load(uint16_t bits) { return widen_bf16(bits); }
    GPTKERN_HD static uint16_t store(float value) { return round_to_bf16(value); }
    // Even elements come first: a shift and a mask then widen a pair.
    GPTKERN_HD static int place(int i, int n) {
        if (i >= n / kStep * kStep) return i;
        return i / kStep * kStep + (i % 2) * kLanes + i % kStep / 2;
    }
    GPTKERN_HD static void pair(const uint16_t* from, Vec& even, Vec& odd) { widen(from, even, odd); }
};

// int8 weights, to be multiplied with activations in fp32.
struct Int8 {
    using Storage = int8_t;
    GPTKERN_HD static float load(int8_t value) { return static_cast<float>(value); }
    GPTKERN_HD static void pair(const int8_t* from, Vec& first, Vec& second) {
        first = widen(from);
        second = widen(from + kLanes);
    }
};

}  // namespace GPTKERN_ISA
}  // namespace gptkern
