// Activations as int8, for products with int8 weights by VNNI.
//
// A row is cut into panels of kBytePanel inputs. A panel's vectors have 64 inputs each, and lane l of a vector is its inputs
// 4 l to 4 l + 3. One lane's inputs of all the panel's vectors share a scale, the largest magnitude over 127: no more than
// kBytePanel / 16 inputs do, and sums of whole numbers run to the end of a panel. gptkern/engine/executors/cpu_bytes.py has
// this in PyTorch.
//
// The instruction multiplies bytes without a sign by bytes with one. So weights get an offset that makes them positive,
// and a row's sums start at what that adds.
#pragma once

#include "decode/model.h"
#include "decode/row_product.h"

namespace gptkern {
inline namespace GPTKERN_ISA {

constexpr int kBytePanel = 256;         // half the error of 512, as fast
constexpr int kVector = 64;             // inputs of a vector
constexpr int kLaneBytes = 64;          // 16 numbers of 32 bits
constexpr float kLeastMagnitude = 1e-36f;  // smaller numbers become 0: 127 / x would not be finite

// Rows of int8. A panel is 16 scales (fp32), where the sums start (16 int32), the vectors.
struct Bytes {
    char* at;
    int count;
    int64_t stride;

    GPTKERN_HD char* row(int r) const { return at + r * stride; }
};

// Bytes of a row.
GPTKERN_HD int64_t byte_row(int in) {
    const int64_t panels = (in + kBytePanel - 1) / kBytePanel, vectors = (in + kVector - 1) / kVector;
    return panels * 2 * kLaneBytes + vectors * kVector;
}

#ifdef __AVX512VNNI__

// One row on its way to bytes.
class ByteRow {
public:
    ByteRow(const float* x, int in) : x_(x), in_(in) {}

    void store(char* to) const {
        for (int first = 0; first < in_; first += kBytePanel) {
            const int inputs = in_ - first < kBytePanel ? in_ - first : kBytePanel, vectors = (inputs + kVector - 1) / kVector;
            Vec factors[4];
            take_scales(first, vectors, reinterpret_cast<float*>(to), factors);
            to = store_panel(first, vectors, factors, to + kLaneBytes);
        }
    }

private:
    const float* x_;
    int in_;

    // A quarter of a vector, 16 inputs, of the panel that begins at ``first``.
    Vec quarter(int first, int vector, int part) const {
        const int at = first + kVector * vector + 16 * part;
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

    char* store_panel(int first, int vectors, const Vec (&factors)[4], char* to) const {
        __m512i starts = _mm512_setzero_si512();
        char* const at = to;
        to += kLaneBytes;
        for (int v = 0; v < vectors; ++v, to += kVector) {
            for (int part = 0; part < 4; ++part) {
                const __m512i whole = _mm512_cvtps_epi32(mul(quarter(first, v, part), factors[part]));
                _mm_storeu_si128(reinterpret_cast<__m128i*>(to + 16 * part), _mm512_cvtsepi32_epi8(whole));
            }
            // Less what the offset makes of the vector.
            const __m512i added =
                _mm512_dpbusd_epi32(_mm512_setzero_si512(), _mm512_set1_epi8(-128), _mm512_loadu_si512(to));
            starts = _mm512_sub_epi32(starts, added);
        }
        _mm512_storeu_si512(at, starts);
        return to;
    }
};

#endif  // __AVX512VNNI__

}  // namespace GPTKERN_ISA
}  // namespace gptkern
