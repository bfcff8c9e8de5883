// The rows that a product reads, in the form that its instructions take.
#pragma once

#include <type_traits>

#include "decode/code_rows.h"

namespace gptkern {
inline namespace GPTKERN_ISA {

enum class Packing {
    kPlaced,   // fp32, as Rows
    kNatural,  // fp32, as RowsOf<float>
    kPairs,    // bf16, as Pairs
    kBytes,    // int8, as Bytes
    kCodes,    // int8, as CodeRows
};

// How a layer's product takes its rows, where the model's dtype is Kind's.
template <class Kind>
GPTKERN_HD Packing packing_of(const CpuLinear& layer) {
#ifdef __AVX512BF16__
    if (Kind::kEvenFirst && (layer.format == Format::kModel || layer.format == Format::kFp8)) return Packing::kPairs;
#endif
    if (Kind::kEvenFirst && layer.format == Format::kInt8) return Packing::kBytes;
    if (Kind::kEvenFirst && takes_codes(layer)) return Packing::kCodes;
    const bool as_it_is = std::is_same_v<Kind, Fp32> && layer.format == Format::kModel;
    const bool natural = as_it_is || layer.format == Format::kInt4 || layer.format == Format::kFp8;
    return natural ? Packing::kNatural : Packing::kPlaced;
}

// A line more to each row: else rows of a power of two would share their places in the cache.
GPTKERN_HD int64_t row_stride(int in) { return padded(in) + kStep; }

// Floats that a row takes, of any packing.
GPTKERN_HD int64_t operand_floats(int in) {
    const int64_t bytes = byte_row(in) > code_row(in) ? byte_row(in) : code_row(in);
    const int64_t floats = bytes / static_cast<int64_t>(sizeof(float));
    return row_stride(in) > floats ? row_stride(in) : floats;
}

// The rows of a layer's input in memory that all threads see. A row takes no more than ``operand_floats(in)``.
template <class Kind>
class Operand {
public:
    Operand(float* at, int count, const CpuLinear& layer)
        : at_(at), count_(count), in_(layer.in), layer_(layer), packing_(packing_of<Kind>(layer)) {}

    Rows placed() const { return {at_, count_}; }
    RowsOf<float> natural() const { return {at_, count_, row_stride(in_)}; }
    Pairs pairs() const { return {reinterpret_cast<uint16_t*>(at_), count_, row_stride(in_)}; }
    Bytes bytes() const { return {reinterpret_cast<char*>(at_), count_, byte_row(in_)}; }
    CodeRows codes() const { return {reinterpret_cast<char*>(at_), count_, code_row(in_), in_}; }
    int count() const { return count_; }
    Packing packing() const { return packing_; }

    // Takes a row, (in,) fp32.
    void take(int row, const float* x) const {
        if (packing_ == Packing::kNatural) {
            take(natural().row(row), x);
        } else if (packing_ == Packing::kPairs) {
            take(pairs().row(row), x);
        } else if (packing_ == Packing::kPlaced) {
            place(row, x);
        } else if (packing_ == Packing::kBytes) {
            ByteRow(x, in_).store(bytes().row(row));
        } else {
            take_code_row(codes(), row, x, layer_.minimums != nullptr);
        }
    }

private:
    template <class Storage>
    void take(Storage* to, const float* x) const {
        for (int64_t i = 0; i < padded(in_); i += kLanes) store(to + i, load_some(x + i, i < in_ ? in_ - i : 0));
    }

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
