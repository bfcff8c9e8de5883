// Activations as int8, for products with int8 weights.
//
// A row is cut into panels of kBytePanel inputs. A panel's vectors have 64 inputs each, and lane l of a vector is its inputs
// 4 l to 4 l + 3. One lane's inputs of all the panel's vectors share a scale, the largest magnitude over 127: no more than
// kBytePanel / 16 inputs do, and sums of whole numbers run to the end of a panel. gptkern/engine/executors/cpu_bytes.py has
// this in PyTorch.
//
// VNNI's weights get an offset, and a row's sums start at what that adds; elsewhere they start at 0.
#pragma once

#include "decode/byte_vec.h"
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

// One row on its way to bytes.
class ByteRow {
public:
    ByteRow(const float* x, int in) : x_(x), in_(in) {}

    void store(char* to) const {
        for (int first = 0; first < in_; first += kBytePanel) {
            const int inputs = in_ - first < kBytePanel ? in_ - first : kBytePanel, vectors = (inputs + kVector - 1) / kVector;
            Vec factors[kParts];
            take_scales(first, vectors, reinterpret_cast<float*>(to), factors);
            to = store_panel(first, vectors, factors, to + kLaneBytes);
        }
    }

private:
    static constexpr int kParts = kVector / kLanes;

    const float* x_;
    int in_;

    // Some of a vector, kLanes inputs, of the panel that begins at ``first``.
    Vec part(int first, int vector, int n) const {
        const int at = first + kVector * vector + kLanes * n;
        return at < in_ ? load_some(x_ + at, in_ - at) : zeros();
    }

    // The scales of the lanes, and what to multiply each part by. A NaN makes its lane's scale NaN.
    void take_scales(int first, int count, float* scales, Vec (&factors)[kParts]) const {
        for (int n = 0; n < kParts; ++n) {
            Vec most = zeros();
            for (int v = 0; v < count; ++v) most = larger_magnitude(most, magnitude(part(first, v, n)));
            most = larger_magnitude(most, shuffled<0xb1>(most));
            most = larger_magnitude(most, shuffled<0x4e>(most));
            factors[n] = quotient(all(127.0f), most, all(kLeastMagnitude));
            store_every_fourth(scales + kLanes / 4 * n, div(most, all(127.0f)));
        }
    }

    char* store_panel(int first, int vectors, const Vec (&factors)[kParts], char* to) const {
        constexpr int kWords = kVector / kVecBytes;
        Ints starts[kWords] = {};
        char* const at = to;
        to += kLaneBytes;
        for (int v = 0; v < vectors; ++v, to += kVector) {
            for (int n = 0; n < kParts; ++n) store_rounded(to + kLanes * n, mul(part(first, v, n), factors[n]));
            for (int w = 0; w < kWords; ++w) starts[w] = ByteWeights::start(starts[w], load_bytes(to + kVecBytes * w));
        }
        for (int w = 0; w < kWords; ++w) store_bytes(at + kVecBytes * w, reinterpret_cast<ByteVec>(starts[w]));
        return to;
    }
};

}  // namespace GPTKERN_ISA
}  // namespace gptkern
