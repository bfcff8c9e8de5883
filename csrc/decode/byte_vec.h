// Vectors of bytes and of whole numbers, as wide as Vec, and their products' sums as the instruction set has them: by VNNI
// in one instruction, else by way of 16 bits. All of them are exact, so that every path gives the same.
#pragma once

#include "decode/vec.h"

namespace gptkern {
inline namespace GPTKERN_ISA {

#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
#define GPTKERN_VNNI
constexpr bool kVnni = true;
#else
constexpr bool kVnni = false;
#endif
constexpr int kVecBytes = 4 * kLanes;

#ifdef __AVX512F__
using ByteVec = __m512i;
using Ints = __v16si;  // as GCC's dot product takes it: of __m512i it copies every sum

GPTKERN_HD ByteVec load_bytes(const void* from) { return _mm512_loadu_si512(from); }
// ``count`` bytes, or kVecBytes if there are more; beyond them 0.
GPTKERN_HD ByteVec load_bytes(const void* from, int count) {
    return _mm512_maskz_loadu_epi8(count < kVecBytes ? (1ull << count) - 1 : ~0ull, from);
}
GPTKERN_HD void store_bytes(void* to, ByteVec a) { _mm512_storeu_si512(to, a); }
GPTKERN_HD ByteVec all_bytes(int value) { return _mm512_set1_epi8(static_cast<char>(value)); }
GPTKERN_HD ByteVec all_ints(int value) { return _mm512_set1_epi32(value); }
GPTKERN_HD ByteVec both(ByteVec a, ByteVec b) { return _mm512_and_si512(a, b); }
template <int N>
GPTKERN_HD ByteVec shifted_right(ByteVec a) {
    return _mm512_srli_epi16(a, N);
}
GPTKERN_HD ByteVec bits_of(Vec a) { return _mm512_castps_si512(a); }
GPTKERN_HD Vec vec_of(ByteVec a) { return _mm512_castsi512_ps(a); }
GPTKERN_HD Vec widened(Ints a) { return _mm512_cvtepi32_ps(reinterpret_cast<__m512i>(a)); }
// ``count`` numbers of fp16, or kLanes if there are more; beyond them 0.
GPTKERN_HD Vec load_halves(const uint16_t* from, int count) {
    return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(static_cast<__mmask16>(count < kLanes ? (1 << count) - 1 : -1), from));
}

// The larger of two magnitudes. As whole numbers, NaNs are larger than all others.
GPTKERN_HD Vec larger_magnitude(Vec a, Vec b) { return vec_of(_mm512_max_epi32(bits_of(a), bits_of(b))); }
template <int Order>
GPTKERN_HD Vec shuffled(Vec a) {
    return _mm512_permute_ps(a, Order);
}
// a / b where b is at least ``least``, else 0.
GPTKERN_HD Vec quotient(Vec a, Vec b, Vec least) {
    return _mm512_maskz_div_ps(_mm512_cmp_ps_mask(b, least, _CMP_GE_OQ), a, b);
}
GPTKERN_HD void store_every_fourth(float* to, Vec a) {
    _mm_storeu_ps(to, _mm512_castps512_ps128(_mm512_maskz_compress_ps(0x1111, a)));
}
// To the nearest whole number, kLanes bytes.
GPTKERN_HD void store_rounded(char* to, Vec a) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(a)));
}
#else
using ByteVec = __m256i;
using Ints = __v8si;

GPTKERN_HD ByteVec load_bytes(const void* from) { return _mm256_loadu_si256(static_cast<const __m256i*>(from)); }
GPTKERN_HD ByteVec load_bytes(const void* from, int count) {
    if (count >= kVecBytes) return load_bytes(from);
    char some[kVecBytes] = {};
    std::memcpy(some, from, static_cast<size_t>(count));
    return load_bytes(some);
}
GPTKERN_HD void store_bytes(void* to, ByteVec a) { _mm256_storeu_si256(static_cast<__m256i*>(to), a); }
GPTKERN_HD ByteVec all_bytes(int value) { return _mm256_set1_epi8(static_cast<char>(value)); }
GPTKERN_HD ByteVec all_ints(int value) { return _mm256_set1_epi32(value); }
GPTKERN_HD ByteVec both(ByteVec a, ByteVec b) { return _mm256_and_si256(a, b); }
template <int N>
GPTKERN_HD ByteVec shifted_right(ByteVec a) {
    return _mm256_srli_epi16(a, N);
}
GPTKERN_HD ByteVec bits_of(Vec a) { return _mm256_castps_si256(a); }
GPTKERN_HD Vec vec_of(ByteVec a) { return _mm256_castsi256_ps(a); }
GPTKERN_HD Vec widened(Ints a) { return _mm256_cvtepi32_ps(reinterpret_cast<__m256i>(a)); }
GPTKERN_HD Vec load_halves(const uint16_t* from, int count) {
    uint16_t some[kLanes] = {};
    if (count < kLanes) {
        std::memcpy(some, from, static_cast<size_t>(count) * sizeof(uint16_t));
        from = some;
    }
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}

GPTKERN_HD Vec larger_magnitude(Vec a, Vec b) { return vec_of(_mm256_max_epi32(bits_of(a), bits_of(b))); }
template <int Order>
GPTKERN_HD Vec shuffled(Vec a) {
    return _mm256_permute_ps(a, Order);
}
GPTKERN_HD Vec quotient(Vec a, Vec b, Vec least) {
    return _mm256_and_ps(_mm256_cmp_ps(b, least, _CMP_GE_OQ), _mm256_div_ps(a, b));
}
GPTKERN_HD void store_every_fourth(float* to, Vec a) {
    to[0] = _mm256_cvtss_f32(a);
    to[1] = _mm_cvtss_f32(_mm256_extractf128_ps(a, 1));
}
GPTKERN_HD void store_rounded(char* to, Vec a) {
    const __m256i whole = _mm256_cvtps_epi32(a);
    const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm_packs_epi16(words, words));
}
#endif

// The largest of 16 magnitudes or 8, a NaN where there is one.
GPTKERN_HD float largest(Vec a) {
    a = larger_magnitude(a, shuffled<0xb1>(a));
    a = larger_magnitude(a, shuffled<0x4e>(a));
    float fours[kLanes / 4];
    store_every_fourth(fours, a);
    int most = 0;
    for (const float four : fours) most = bit_cast<int>(four) > most ? bit_cast<int>(four) : most;
    return bit_cast<float>(most);
}

// The sum of 32 bytes.
GPTKERN_HD int sum_of_block(const char* from) {
    const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    const __m256i fours = _mm256_madd_epi16(_mm256_maddubs_epi16(_mm256_set1_epi8(1), bytes), _mm256_set1_epi16(1));
    __m128i sum = _mm_add_epi32(_mm256_castsi256_si128(fours), _mm256_extracti128_si256(fours, 1));
    sum = _mm_add_epi32(sum, _mm_unpackhi_epi64(sum, sum));
    return _mm_cvtsi128_si32(sum) + _mm_extract_epi32(sum, 1);
}

GPTKERN_HD Ints load_ints(const void* from) { return reinterpret_cast<Ints>(load_bytes(from)); }

// Numbers of 32 bits from ``at`` + bytes on, kVecBytes from each: number i of pointer j goes to lane j of vector i. There
// are ``left`` bytes, whole times 16; numbers beyond are 0.
GPTKERN_HD void load_transposed(const uint8_t* const (&at)[kLanes], int64_t bytes, int left, ByteVec (&to)[kLanes]) {
#ifdef __AVX512F__
    Vec numbers[kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) numbers[i] = vec_of(load_bytes(at[i] + bytes, left));
    transpose(numbers);
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) to[i] = bits_of(numbers[i]);
#else
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
        __m256i a[4], b[4];
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
            const auto load = [&](int from) {
                const auto* const numbers = reinterpret_cast<const __m128i*>(at[from] + bytes);
                return half == 0 || left > 16 ? _mm_loadu_si128(numbers + half) : _mm_setzero_si128();
            };
            a[i] = _mm256_inserti128_si256(_mm256_castsi128_si256(load(i)), load(i + 4), 1);
        }
#pragma GCC unroll 2
        for (int i = 0; i < 4; i += 2) {
            b[i] = _mm256_unpacklo_epi32(a[i], a[i + 1]);
            b[i + 1] = _mm256_unpackhi_epi32(a[i], a[i + 1]);
        }
        for (int i = 0; i < 2; ++i) {
            to[4 * half + 2 * i] = _mm256_unpacklo_epi64(b[i], b[i + 2]);
            to[4 * half + 2 * i + 1] = _mm256_unpackhi_epi64(b[i], b[i + 2]);
        }
    }
#endif
}

// ByteWeights: int8 weights, four to a lane, to meet rows' values, -127 to 127.
// CodeSums: sums of products of codes, 0 to 15, with a row's values, four to a lane at a time, of a block of 32 inputs.
#ifdef GPTKERN_VNNI
// The instruction multiplies bytes without a sign by bytes with one.
GPTKERN_HD Ints dot(Ints sums, ByteVec weights, ByteVec values) {
#ifdef __AVX512VNNI__
    return reinterpret_cast<Ints>(_mm512_dpbusd_epi32(reinterpret_cast<__m512i>(sums), weights, values));
#else
    return reinterpret_cast<Ints>(_mm256_dpbusd_avx_epi32(reinterpret_cast<__m256i>(sums), weights, values));
#endif
}

// An offset makes weights positive; a row's sums start at what that adds.
struct ByteWeights {
    ByteVec raised;

    GPTKERN_HD explicit ByteWeights(ByteVec weights) : raised(weights ^ all_bytes(-128)) {}
    GPTKERN_HD Ints add(Ints sums, ByteVec values) const { return dot(sums, raised, values); }
    // What sums that started at ``start`` start at when they have these values too.
    GPTKERN_HD static Ints start(Ints start, ByteVec values) { return start - dot(Ints{}, all_bytes(-128), values); }
};

struct CodeSums {
    Ints at;

    GPTKERN_HD void start(int value) { at = reinterpret_cast<Ints>(all_ints(value)); }
    GPTKERN_HD void add(ByteVec codes, int four) { at = dot(at, codes, all_ints(four)); }
    GPTKERN_HD Ints total() const { return at; }
};
#else
// Two neighbours' products: of bytes without a sign and with one, in 16 bits; of 16 bits, in 32.
#ifdef __AVX512F__
GPTKERN_HD ByteVec pairs_of_bytes(ByteVec a, ByteVec b) { return _mm512_maddubs_epi16(a, b); }
GPTKERN_HD Ints sums_of_pairs(ByteVec a) {
    return reinterpret_cast<Ints>(_mm512_madd_epi16(a, _mm512_set1_epi16(1)));
}
GPTKERN_HD ByteVec add_words(ByteVec a, ByteVec b) { return _mm512_add_epi16(a, b); }
#else
GPTKERN_HD ByteVec pairs_of_bytes(ByteVec a, ByteVec b) { return _mm256_maddubs_epi16(a, b); }
GPTKERN_HD Ints sums_of_pairs(ByteVec a) {
    return reinterpret_cast<Ints>(_mm256_madd_epi16(a, _mm256_set1_epi16(1)));
}
GPTKERN_HD ByteVec add_words(ByteVec a, ByteVec b) { return _mm256_add_epi16(a, b); }
#endif

// Magnitudes meet rows' values that take the weights' signs: 2 * 128 * 127 fits in 16 bits.
struct ByteWeights {
    ByteVec magnitudes;
#ifdef __AVX512F__
    __mmask64 negative;

    GPTKERN_HD explicit ByteWeights(ByteVec weights)
        : magnitudes(_mm512_abs_epi8(weights)), negative(_mm512_movepi8_mask(weights)) {}
    GPTKERN_HD ByteVec with_signs(ByteVec values) const {
        return _mm512_mask_sub_epi8(values, negative, _mm512_setzero_si512(), values);
    }
#else
    ByteVec weights;

    GPTKERN_HD explicit ByteWeights(ByteVec weights) : magnitudes(_mm256_abs_epi8(weights)), weights(weights) {}
    GPTKERN_HD ByteVec with_signs(ByteVec values) const { return _mm256_sign_epi8(values, weights); }
#endif
    GPTKERN_HD Ints add(Ints sums, ByteVec values) const {
        return sums + sums_of_pairs(pairs_of_bytes(magnitudes, with_signs(values)));
    }
    GPTKERN_HD static Ints start(Ints start, ByteVec) { return start; }
};

// Half of a lane's inputs are summed in 16 bits. The half in which the start is has that of all 32, -8 times the sum of the
// row's values. So it is of 16 products with -8 to 7, and of 16 values times -8: at most 2 * 16 * 8 * 127, which fits. So
// do 16 products of 15 * 127 alone.
struct CodeSums {
    ByteVec at;

    GPTKERN_HD void start(int value) { at = all_ints(value & 0xffff); }
    GPTKERN_HD void add(ByteVec codes, int four) { at = add_words(at, pairs_of_bytes(codes, all_ints(four))); }
    GPTKERN_HD Ints total() const { return sums_of_pairs(at); }
};
#endif

}  // namespace GPTKERN_ISA
}  // namespace gptkern
