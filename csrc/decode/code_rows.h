// Activations as int8, for products with int4 weights.
//
// kBlock inputs of a row share a scale, the largest magnitude over 127. gptkern/engine/executors/cpu_bytes.py has this in
// PyTorch.
#pragma once

#include "decode/byte_rows.h"
#include "decode/model.h"

namespace gptkern {
inline namespace GPTKERN_ISA {

constexpr int kBlock = kLeastGroup;

// Rows of int8. A row is, for each block, its scale (fp32), then for each what its sums start at, then the inputs. Symmetric
// codes are multiplied as they stand, 0 to 15, and stand for what is 8 less: a block's sum starts at -8 times that of its
// inputs (int32). Where groups have minimums, this is instead the sum of the inputs times their scale (fp32).
struct CodeRows {
    char* at;
    int count;
    int64_t stride;
    int in;

    GPTKERN_HD int64_t blocks() const { return in / kBlock; }
    GPTKERN_HD char* scales(int r) const { return at + r * stride; }
    GPTKERN_HD char* starts(int r) const { return scales(r) + blocks() * kNumber; }
    GPTKERN_HD char* inputs(int r) const { return starts(r) + blocks() * kNumber; }

    GPTKERN_HD float scale(int r, int block) const { return bit_cast<float>(number(scales(r) + block * kNumber)); }
    GPTKERN_HD int start(int r, int block) const { return number(starts(r) + block * kNumber); }
    // Four inputs from ``input`` on.
    GPTKERN_HD int four(int r, int input) const { return number(inputs(r) + input); }

    static constexpr int64_t kNumber = 4;  // bytes

private:
    GPTKERN_HD static int number(const char* from) {
        int found;
        std::memcpy(&found, from, kNumber);
        return found;
    }
};

// Bytes of a row. A line more: else rows of a power of two would share their places in the cache.
GPTKERN_HD int64_t code_row(int in) {
    const int64_t bytes = in + in / kBlock * 2 * CodeRows::kNumber;
    return (bytes + 63) / 64 * 64 + 64;
}

GPTKERN_HD bool takes_codes(const CpuLinear& layer) {
    return layer.format == Format::kInt4 && (layer.group == 32 || layer.group == 64 || layer.group == 128);
}

// Takes row r, (in,) fp32.
inline void take_code_row(const CodeRows& rows, int r, const float* x, bool minimums) {
    constexpr int kParts = kBlock / kLanes;
    char *const scales = rows.scales(r), *const starts = rows.starts(r), *const inputs = rows.inputs(r);
    for (int b = 0; b < rows.blocks(); ++b, x += kBlock) {
        Vec most = zeros();  // a NaN makes the scale NaN
        for (int n = 0; n < kParts; ++n) most = larger_magnitude(most, magnitude(load(x + n * kLanes)));
        const float greatest = largest(most);
        const Vec factor = all(greatest >= kLeastMagnitude ? 127.0f / greatest : 0.0f);
        const float scale = greatest / 127.0f;
        char* const to = inputs + b * kBlock;
        for (int n = 0; n < kParts; ++n) store_rounded(to + n * kLanes, mul(load(x + n * kLanes), factor));
        const int sum = sum_of_block(to);
        const int start = minimums ? bit_cast<int>(scale * static_cast<float>(sum)) : -8 * sum;
        std::memcpy(scales + b * CodeRows::kNumber, &scale, CodeRows::kNumber);
        std::memcpy(starts + b * CodeRows::kNumber, &start, CodeRows::kNumber);
    }
}

}  // namespace GPTKERN_ISA
}  // namespace gptkern
