// Activations as int8, for products with int8 and int4 weights by VNNI.
//
// A row is cut into panels. A panel's vectors have 64 inputs each, and lane l of a vector is its inputs 4 l to 4 l + 3. One
// lane's inputs of all the panel's vectors share a scale, the largest magnitude over 127: a sixteenth of a panel's inputs
// do. Sums of whole numbers run to the end of a panel with int8 weights, to the end of a group with int4 ones. gptkern/engine/executors/cpu_bytes.py has
// this in PyTorch.
//
// The instruction multiplies bytes without a sign by bytes with one. So weights get an offset that makes them positive,
// and a row's sums start at what that adds.
#pragma once

#include "decode/model.h"
#include "decode/row_product.h"

namespace gptkern {
inline namespace GPTKERN_ISA {

constexpr int kInt8Panel = 256;  // half the error of 512, as fast
constexpr int kInt4Panel = 512;  // shorter ones are slower, and an error far below that of 4 bits
constexpr int kVector = 64;             // inputs of a vector
constexpr int kPairedVectors = 128;     // and of two: a vector of int4 codes
constexpr int kLaneBytes = 64;          // 16 numbers of 32 bits
constexpr float kLeastMagnitude = 1e-36f;  // smaller numbers become 0: 127 / x would not be finite

// Rows of int8. A panel is 16 scales (fp32), then of int8 weights: where the sums start (16 int32), the vectors. Of int4
// weights, for each 128 inputs: those of the codes' low halves, those of the high ones, where the sums start. After all
// panels stand, of int4 weights, the sums of each group's rounded activations (fp32), 0 up to whole vectors.
struct Bytes {
    char* at;
    int count;
    int64_t stride;

    GPTKERN_HD char* row(int r) const { return at + r * stride; }
};

// Bytes of a row's panels, of either kind of weights.
GPTKERN_HD int64_t byte_panels(int in) {
    const int64_t panels = (in + kInt8Panel - 1) / kInt8Panel, pairs = (in + kPairedVectors - 1) / kPairedVectors;
    return panels * kLaneBytes + pairs * (kPairedVectors + kLaneBytes);
}

// Bytes of a row: the smallest groups have four sums for each 128 inputs.
GPTKERN_HD int64_t byte_row(int in) {
    const int64_t sums = static_cast<int64_t>(in + kPairedVectors - 1) / kPairedVectors * (kPairedVectors / kLeastGroup);
    return byte_panels(in) + (sums + kLanes - 1) / kLanes * kLaneBytes;
}

// What makes a layer's weights positive: added to int8, and what int4's codes have more than is multiplied.
GPTKERN_HD int byte_offset(const CpuLinear& layer) { return layer.format == Format::kInt8 ? 128 : 8; }

#ifdef __AVX512VNNI__

GPTKERN_HD bool takes_bytes(const CpuLinear& layer) {
    if (layer.format == Format::kInt8) return true;
    return layer.format == Format::kInt4 && (layer.group == 32 || layer.group == 64 || layer.group == 128);
}

// One row on its way to bytes.
class ByteRow {
public:
    ByteRow(const float* x, const CpuLinear& layer)
        : x_(x), in_(layer.in), half_(layer.format == Format::kInt4 ? layer.group / 2 : 0),
          offset_(_mm512_set1_epi8(static_cast<char>(byte_offset(layer)))) {}

    void store(char* to) const {
        const int panel = half_ > 0 ? kInt4Panel : kInt8Panel;
        auto* sums = reinterpret_cast<float*>(to + byte_panels(in_));
        float* const end = reinterpret_cast<float*>(to + byte_row(in_));
        for (int first = 0; first < in_; first += panel) {
            const int inputs = in_ - first < panel ? in_ - first : panel;
            Vec factors[4];
            take_scales(first, vectors(inputs), reinterpret_cast<float*>(to), factors);
            to = half_ > 0 ? store_pairs(first, inputs, factors, to, sums)
                           : store_vectors(first, inputs, factors, to + kLaneBytes);
        }
        while (sums < end) *sums++ = 0.0f;
    }

private:
    const float* x_;
    int in_;
    int half_;  // of a group of int4 weights; 0: they are int8
    __m512i offset_;

    int vectors(int inputs) const {
        if (half_ == 0) return (inputs + kVector - 1) / kVector;
        return (inputs + kPairedVectors - 1) / kPairedVectors * 2;
    }

    // A quarter of a vector, 16 inputs, of the panel that begins at ``first``.
    Vec quarter(int first, int vector, int part) const {
        int at = first + kVector * vector + 16 * part;
        if (half_ > 0) {
            const int code = 16 * part;
            at = first + vector / 2 * kPairedVectors + code / half_ * 2 * half_ + code % half_ + vector % 2 * half_;
        }
        return at < in_ ? load_some(x_ + at, in_ - at) : zeros();
    }

    // The scales of the lanes, and what to multiply each quarter by. A NaN makes its lane's scale NaN: as whole numbers,
    // NaNs are larger than all others.
    void take_scales(int first, int count, float* scales, Vec (&factors)[4]) const {
        for (int part = 0; part < 4; ++part) {
            __m512i most = _mm512_setzero_si512();
            for (int v = 0; v < count; ++v) {
                most = _mm512_max_epi32(most, _mm512_castps_si512(magnitude(quarter(first, v, part))));
            }
            most = _mm512_max_epi32(most, _mm512_shuffle_epi32(most, _MM_PERM_CDAB));
            most = _mm512_max_epi32(most, _mm512_shuffle_epi32(most, _MM_PERM_BADC));
            const Vec largest = _mm512_castsi512_ps(most);
            const __mmask16 some = _mm512_cmp_ps_mask(largest, all(kLeastMagnitude), _CMP_GE_OQ);
            factors[part] = _mm512_maskz_div_ps(some, all(127.0f), largest);
            const Vec lanes = _mm512_maskz_compress_ps(0x1111, div(largest, all(127.0f)));
            _mm_storeu_ps(scales + 4 * part, _mm512_castps512_ps128(lanes));
        }
    }

    // One vector of the panel, and ``starts`` less what the offset makes of it.
    __m512i store_vector(int first, int vector, const Vec (&factors)[4], __m512i starts, char* to) const {
        for (int part = 0; part < 4; ++part) {
            const __m512i whole = _mm512_cvtps_epi32(mul(quarter(first, vector, part), factors[part]));
            _mm_storeu_si128(reinterpret_cast<__m128i*>(to + 16 * part), _mm512_cvtsepi32_epi8(whole));
        }
        const __m512i added = _mm512_dpbusd_epi32(_mm512_setzero_si512(), offset_, _mm512_loadu_si512(to));
        return _mm512_sub_epi32(starts, added);
    }

    char* store_vectors(int first, int inputs, const Vec (&factors)[4], char* to) const {
        __m512i starts = _mm512_setzero_si512();
        char* const at = to;
        to += kLaneBytes;
        for (int v = 0; v < vectors(inputs); ++v, to += kVector) starts = store_vector(first, v, factors, starts, to);
        _mm512_storeu_si512(at, starts);
        return to;
    }

    // The panel that begins at ``to`` with its scales, and the sums of its groups.
    char* store_pairs(int first, int inputs, const Vec (&factors)[4], char* to, float*& sums) const {
        const Vec scales = load(reinterpret_cast<const float*>(to));
        to += kLaneBytes;
        for (int v = 0; v < vectors(inputs); v += 2, to += kPairedVectors + kLaneBytes) {
            __m512i starts = _mm512_setzero_si512();
            starts = store_vector(first, v, factors, starts, to);
            starts = store_vector(first, v + 1, factors, starts, to + kVector);
            _mm512_storeu_si512(to + kPairedVectors, starts);
            // The starts are -8 times the sums of lanes.
            sums = store_sums(mul(_mm512_cvtepi32_ps(starts), mul(scales, all(-0.125f))), sums);
        }
        return to;
    }

    // The sums of groups' lanes, half_ / 4 of them each: 4, 2 or 1 numbers. What is stored behind them is 0.
    float* store_sums(Vec lanes, float* to) const {
        lanes = add(lanes, _mm512_permute_ps(lanes, 0xb1));
        lanes = add(lanes, _mm512_permute_ps(lanes, 0x4e));
        if (half_ > 16) lanes = add(lanes, _mm512_shuffle_f32x4(lanes, lanes, 0xb1));
        if (half_ > 32) lanes = add(lanes, _mm512_shuffle_f32x4(lanes, lanes, 0x4e));
        const auto firsts = static_cast<__mmask16>(half_ == 16 ? 0x1111 : half_ == 32 ? 0x0101 : 1);
        _mm_storeu_ps(to, _mm512_castps512_ps128(_mm512_maskz_compress_ps(firsts, lanes)));
        return to + kVector / half_;
    }
};

#endif  // __AVX512VNNI__

}  // namespace GPTKERN_ISA
}  // namespace gptkern
