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
GPTKERN_HD void widen(const uint16_t* from, Vec& even, Vec& odd) {
    const __m512i pairs = _mm512_loadu_si512(from);
    even = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
    odd = _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(static_cast<int>(0xffff0000))));
}
GPTKERN_HD Vec widen(const int8_t* from) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
}
GPTKERN_HD void widen(const int8_t* from, Vec& even, Vec& odd) {
    const __m512i pairs = _mm512_cvtepi16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
    even = _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(pairs, 24), 24));
    odd = _mm512_cvtepi32_ps(_mm512_srai_epi32(pairs, 8));
}
GPTKERN_HD float sum(Vec a) {
    const __m256 low = _mm512_castps512_ps256(a);
    const __m256 high = _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(a), 1));
    const __m256 half = _mm256_add_ps(low, high);
    __m128 quarter = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
    quarter = _mm_add_ps(quarter, _mm_movehl_ps(quarter, quarter));
    return _mm_cvtss_f32(_mm_add_ss(quarter, _mm_movehdup_ps(quarter)));
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
GPTKERN_HD Vec times_power_of_two(Vec a, Vec n) {
    return _mm256_castsi256_ps(
        _mm256_add_epi32(_mm256_castps_si256(a), _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23)));
}
GPTKERN_HD void widen(const uint16_t* from, Vec& even, Vec& odd) {
    const __m256i pairs = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    even = _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16));
    odd = _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(static_cast<int>(0xffff0000))));
}
GPTKERN_HD Vec widen(const int8_t* from) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
}
GPTKERN_HD void widen(const int8_t* from, Vec& even, Vec& odd) {
    const __m256i pairs = _mm256_cvtepi16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
    even = _mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_slli_epi32(pairs, 24), 24));
    odd = _mm256_cvtepi32_ps(_mm256_srai_epi32(pairs, 8));
}
GPTKERN_HD float sum(Vec a) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}
#endif

// The values that one turn of a loop over weights takes: two vectors.
constexpr int kStep = 2 * kLanes;

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
    GPTKERN_HD static float load(float value) { return value; }
    GPTKERN_HD static float store(float value) { return value; }
    GPTKERN_HD static int place(int i, int) { return i; }
    GPTKERN_HD static void pair(const float* from, Vec& first, Vec& second) {
        first = gptkern::load(from);
        second = gptkern::load(from + kLanes);
    }
    GPTKERN_HD static void pair(const int8_t* from, Vec& first, Vec& second) {
        first = widen(from);
        second = widen(from + kLanes);
    }
};

struct Bf16 {
    using Storage = uint16_t;
    GPTKERN_HD static float load(uint16_t bits) { return widen_bf16(bits); }
    GPTKERN_HD static uint16_t store(float value) { return round_to_bf16(value); }
    // Even elements come first: a shift and a mask then widen a pair.
    GPTKERN_HD static int place(int i, int n) {
        if (i >= n / kStep * kStep) return i;
        return i / kStep * kStep + (i % 2) * kLanes + i % kStep / 2;
    }
    GPTKERN_HD static void pair(const uint16_t* from, Vec& even, Vec& odd) { widen(from, even, odd); }
    GPTKERN_HD static void pair(const int8_t* from, Vec& even, Vec& odd) { widen(from, even, odd); }
};

// int8 weights, to be multiplied with activations in a Kind's order.
template <class Kind>
struct Int8 {
    using Storage = int8_t;
    GPTKERN_HD static float load(int8_t value) { return static_cast<float>(value); }
    GPTKERN_HD static void pair(const int8_t* from, Vec& first, Vec& second) { Kind::pair(from, first, second); }
};

}  // namespace GPTKERN_ISA
}  // namespace gptkern
