// Products of rows with fp8 weights (e4m3), which are widened to the rows' dtype. It holds them exactly. Sums are those of
// dot_product.h: of a few rows in registers, of more by way of memory that stays in the caches, some outputs at a time.
#pragma once

#include "decode/dot_product.h"

namespace gptkern {
inline namespace GPTKERN_ISA {

constexpr float kFp8Unit = 256.0f;  // weights are widened to what, times this, they stand for
constexpr int kFewFp8Rows = kLanes == 16 ? 4 : 2;  // up to these meet weights in registers
constexpr int kFewFp8Outs = 8;    // outputs that are widened in memory at a time
constexpr int kManyFp8Outs = 32;  // the same where rows are so many that a group of them meets several outputs

// kStep weights in the dtype of Kind's rows.
template <class Kind>
struct Fp8Step;

// The bits of e4m3, moved, are those of a fp16 number 2^8 times smaller. Its last code is its only NaN.
template <>
struct Fp8Step<Fp32> {
    static constexpr int kVectors = 2;
    Vec at[kVectors];

#ifdef __AVX512F__
    GPTKERN_HD explicit Fp8Step(const uint8_t* from) {
        const __m512i words = _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
        const __m512i moved = _mm512_and_si512(_mm512_slli_epi16(words, 7), _mm512_set1_epi16(static_cast<int16_t>(0xbf80)));
        const __m512i last = _mm512_set1_epi16(0x7f);
        const __mmask32 nan = _mm512_cmpeq_epi16_mask(_mm512_and_si512(words, last), last);
        const __m512i halves = _mm512_mask_mov_epi16(moved, nan, _mm512_set1_epi16(-1));
        at[0] = _mm512_cvtph_ps(_mm512_castsi512_si256(halves));
        at[1] = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(halves, 1));
    }
#else
    GPTKERN_HD explicit Fp8Step(const uint8_t* from) {
        const __m256i words = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
        const __m256i moved = _mm256_and_si256(_mm256_slli_epi16(words, 7), _mm256_set1_epi16(static_cast<int16_t>(0xbf80)));
        const __m256i last = _mm256_set1_epi16(0x7f);
        const __m256i nan = _mm256_cmpeq_epi16(_mm256_and_si256(words, last), last);
        const __m256i halves = _mm256_or_si256(moved, nan);
        at[0] = _mm256_cvtph_ps(_mm256_castsi256_si128(halves));
        at[1] = _mm256_cvtph_ps(_mm256_extracti128_si256(halves, 1));
    }
#endif
    GPTKERN_HD void store(float* to) const {
        gptkern::store(to, at[0]);
        gptkern::store(to + kLanes, at[1]);
    }
};

#ifdef __AVX512BF16__
struct Fp8Magnitudes {
    uint16_t at[128];  // in bf16

    constexpr Fp8Magnitudes() : at() {
        for (int code = 1; code < 127; ++code) {
            // A code's exponent is 7 more than the number's, bf16's 127. Codes below 8 are multiples of 2^-9.
            int exponent = (code >> 3) + 127 - 7 - 8, fraction = code & 7;
            if (code < 8) {
                for (exponent += 1; fraction < 8; fraction *= 2) --exponent;
            }
            at[code] = static_cast<uint16_t>(exponent << 7 | (fraction & 7) << 4);
        }
        at[127] = 0x7fc0;
    }
};
constexpr Fp8Magnitudes kFp8Magnitudes{};

// Magnitudes are looked up among 128.
template <>
struct Fp8Step<Bf16> {
    static constexpr int kVectors = 1;
    __m512bh at[kVectors];

    GPTKERN_HD explicit Fp8Step(const uint8_t* from) {
        const auto numbers = [](int part) { return _mm512_loadu_si512(kFp8Magnitudes.at + 32 * part); };
        const __m512i codes = _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
        const __m512i low = _mm512_permutex2var_epi16(numbers(0), codes, numbers(1));
        const __m512i high = _mm512_permutex2var_epi16(numbers(2), codes, numbers(3));
        const __mmask32 large = _mm512_test_epi16_mask(codes, _mm512_set1_epi16(64));
        const __m512i magnitude = _mm512_mask_mov_epi16(low, large, high);
        // magnitude | (codes & sign)
        const __m512i sign = _mm512_set1_epi16(INT16_MIN);
        at[0] = reinterpret_cast<__m512bh>(_mm512_ternarylogic_epi64(magnitude, codes, sign, 0xf8));
    }
    GPTKERN_HD void store(uint16_t* to) const { _mm512_storeu_si512(to, reinterpret_cast<__m512i>(at[0])); }
};
#endif

// use(kStep of ``count`` weights from i on); those beyond are 0. ``ahead``: bytes to what is fetched meanwhile.
template <class Kind, class Use>
GPTKERN_HD void fp8_step(const uint8_t* from, int i, int count, int64_t ahead, const Use& use) {
    _mm_prefetch(reinterpret_cast<const char*>(from + ahead + i), _MM_HINT_T0);  // past the end it does nothing
    if (count - i >= kStep) return use(Fp8Step<Kind>(from + i));
    uint8_t some[kStep] = {};
    std::memcpy(some, from + i, static_cast<size_t>(count - i));
    use(Fp8Step<Kind>(some));
}

// What fp8_product does, of R rows.
template <class Kind, int R>
void few_fp8_product(const CpuLinear& w, const RowsOf<typename Kind::Storage>& x, int first, int last, float* sums,
                     int64_t stride) {
    const OutTurns turns(last - first, R);
    for (int n = 0; n < turns.turns; ++n) {
        int out[kOuts];
        const uint8_t* at[kOuts];
        Vec total[kOuts][R];
#pragma GCC unroll 4
        for (int j = 0; j < kOuts; ++j) {
            out[j] = turns.out(n, j);
            at[j] = static_cast<const uint8_t*>(w.weight) + (first + out[j]) * w.stride;
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) total[j][r] = zeros();
        }
        for (int i = 0; i < w.in; i += kStep) {
#pragma GCC unroll 4
            for (int j = 0; j < kOuts; ++j) {
                const auto add = [&](const Fp8Step<Kind>& weights) __attribute__((always_inline)) {
#pragma GCC unroll 2
                    for (int v = 0; v < Fp8Step<Kind>::kVectors; ++v) {
#pragma GCC unroll 4
                        for (int r = 0; r < R; ++r) {
                            const auto values = Dot<Kind>::load(x.row(r) + i + v * Dot<Kind>::kInputs);
                            total[j][r] = Dot<Kind>::add(total[j][r], weights.at[v], values);
                        }
                    }
                };
                fp8_step<Kind>(at[j], i, w.in, turns.step() * w.stride, add);
            }
        }
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
            store_sums(sums + r * stride, out, sums_of_four(total[0][r], total[1][r], total[2][r], total[3][r]));
        }
    }
}

// Elements of a weight that is widened in memory, and floats of that memory.
GPTKERN_HD int64_t fp8_stride(int in) { return row_stride(in); }
GPTKERN_HD int64_t fp8_floats(int in) { return kManyFp8Outs * fp8_stride(in); }

// sums[r * stride + j] = dot(x[r], weights of output first + j) / kFp8Unit for the outputs up to ``last``. ``partial`` is
// as dot_product takes it.
template <class Kind>
void fp8_product(const CpuLinear& w, const RowsOf<typename Kind::Storage>& x, int first, int last,
                 typename Kind::Storage* memory, float* partial, float* sums, int64_t stride) {
    if (x.count <= kFewFp8Rows) {  // one group
        return row_groups<kFewFp8Rows>(x.count, [&](int, auto rows) {
            few_fp8_product<Kind, decltype(rows)::value>(w, x, first, last, sums, stride);
        });
    }
    const int most = x.count > kManyRows ? kManyFp8Outs : kFewFp8Outs;
    const Weights<Kind> wide{memory, fp8_stride(w.in), w.in};
    for (int out = first; out < last; out += most) {
        const int outs = last - out < most ? last - out : most;
        for (int j = 0; j < outs; ++j) {
            const uint8_t* const from = static_cast<const uint8_t*>(w.weight) + (out + j) * w.stride;
            typename Kind::Storage* const to = memory + j * wide.stride;
            for (int i = 0; i < w.in; i += kStep) {
                fp8_step<Kind>(from, i, w.in, most * w.stride, [&](const auto& weights) { weights.store(to + i); });
            }
        }
        dot_product<Kind>(wide, x, outs, partial, sums + out - first, stride);
    }
}

}  // namespace GPTKERN_ISA
}  // namespace gptkern
