// The rows that a product reads, in the form that its instructions take.
#pragma once

#include "decode/byte_rows.h"

namespace gptkern {
inline namespace GPTKERN_ISA {

enum class Packing {
    kPlaced,   // fp32, as Rows
    kNatural,  // fp32, (rows, in)
    kPairs,    // bf16, as Pairs
    kBytes,    // int8, as Bytes
};

// Rows of bf16, 0 beyond their inputs up to a multiple of kStep.
struct Pairs {
    uint16_t* at;
    int count;
    int64_t stride;

    GPTKERN_HD uint16_t* row(int r) const { return at + r * stride; }
};

// How a layer's product takes its rows, where the model's dtype is Kind's.
template <class Kind>
GPTKERN_HD Packing packing_of(const CpuLinear& layer) {
#ifdef __AVX512BF16__
    if (Kind::kEvenFirst && layer.format == Format::kModel) return Packing::kPairs;
#endif
#ifdef __AVX512VNNI__
    if (Kind::kEvenFirst && takes_bytes(layer)) return Packing::kBytes;
#endif
    return layer.format == Format::kInt4 ? Packing::kNatural : Packing::kPlaced;
}

// Floats that a row takes, of any packing.
GPTKERN_HD int64_t operand_floats(int in) {
    const int64_t bytes = byte_row(in) / static_cast<int64_t>(sizeof(float));
    return padded(in) > bytes ? padded(in) : bytes;
}

// The rows of a layer's input in memory that all threads see. A row takes no more than ``operand_floats(in)``.
template <class Kind>
class Operand {
public:
    Operand(float* at, int count, const CpuLinear& layer)
        : at_(at), count_(count), in_(layer.in), layer_(layer), packing_(packing_of<Kind>(layer)) {}

    Rows placed() const { return {at_, count_}; }
    const float* natural() const { return at_; }
    // A line more to each row: else rows of a power of two would share their places in the cache.
    Pairs pairs() const { return {reinterpret_cast<uint16_t*>(at_), count_, padded(in_) + kStep}; }
    Bytes bytes() const { return {reinterpret_cast<char*>(at_), count_, byte_row(in_)}; }
    int count() const { return count_; }
    Packing packing() const { return packing_; }

    // Takes a row, (in,) fp32.
    void take(int row, const float* x) const {
        if (packing_ == Packing::kNatural) {
            std::memcpy(at_ + static_cast<int64_t>(row) * in_, x, static_cast<size_t>(in_) * sizeof(float));
        } else if (packing_ == Packing::kPairs) {
            uint16_t* const to = pairs().row(row);
            for (int64_t i = 0; i < padded(in_); i += kLanes) store(to + i, load_some(x + i, i < in_ ? in_ - i : 0));
        } else if (packing_ == Packing::kPlaced) {
            place(row, x);
        } else {
#ifdef __AVX512VNNI__
            ByteRow(x, layer_).store(bytes().row(row));
#endif
        }
    }

private:
    void place(int row, const float* x) const {
        const Rows rows = placed();
        const int whole = in_ / kStep * kStep;
        for (int i = 0; i < whole; i += kStep) {
            Vec a = load(x + i), b = load(x + i + kLanes);
            if (Kind::kEvenFirst) part(a, b, a, b);
            store(&rows.value(row, i), a);
            store(&rows.value(row, i + kLanes), b);
        }
        for (int i = whole; i < in_; ++i) rows.value(row, i) = x[i];
    }

    float* at_;
    int count_, in_;
    const CpuLinear& layer_;
    Packing packing_;
};

}  // namespace GPTKERN_ISA
}  // namespace gptkern
