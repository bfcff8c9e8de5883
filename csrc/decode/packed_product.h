// Products of rows with weights of their own dtype: a row's inputs, one after another, meet the weights of several vectors
// of outputs. fp32 by multiply and add, bf16 by the processor's dot product of pairs.
//
// For this weights lie packed: in strips of kStrip outputs, in each of which the weights of one input (of a pair, in bf16)
// stand together. Where there is no packed copy they are brought into this order on the way, a part at a time. A product
// is a sum over every kPartUnits inputs (or pairs), in order, and of these sums, in order: neither the number of rows, nor
// the split of outputs among threads, nor where the weights lie changes that.
#pragma once

#include "decode/attention_block.h"
#include "decode/model.h"

namespace gptkern {
inline namespace GPTKERN_ISA {

// Units of a strip that are summed by themselves: they and their rows' inputs fit the first cache. fp32's sums are shorter,
// as nothing else rounds there.
template <class Kind>
constexpr int kPartUnits = Units<Kind>::kNumbers == 1 ? 64 : 128;
constexpr int kPartFloats = 128 * kStrip;

// Units of a row with so many inputs, filled up with zeros.
template <class Kind>
GPTKERN_HD int units_of(int in) {
    constexpr int kNumbers = kLanes * Units<Kind>::kNumbers;
    return (in + kNumbers - 1) / kNumbers * kLanes;
}

// The packed weights of a layer: of each section's outputs strips, parts of a strip one after another.
template <class Kind>
class PackedOrder {
    using Storage = typename Kind::Storage;

public:
    explicit PackedOrder(const CpuLinear& layer)
        : w_(layer), units_(units_of<Kind>(layer.in)), strips_((layer.section + kStrip - 1) / kStrip) {}

    int units() const { return units_; }
    int64_t floats() const { return static_cast<int64_t>(w_.outs / w_.section * strips_) * units_ * kStrip; }

    // Where the units of an output begin, from ``unit`` on, in floats.
    int64_t place(int out, int unit) const {
        const int column = out % w_.section;
        const int64_t strip = out / w_.section * strips_ + column / kStrip;
        return (strip * units_ + unit) * kStrip + column % kStrip;
    }

    // The first output of the strip after that of ``out``.
    int next_strip(int out) const {
        const int end = out - out % w_.section + w_.section;
        return end - out < kStrip ? end : out + kStrip;
    }

    // Packs a whole strip.
    void take(int out, float* packed) const {
        for (int unit = 0; unit < units_; unit += kPartUnits<Kind>) {
            take(out, unit, units_ - unit < kPartUnits<Kind> ? units_ - unit : kPartUnits<Kind>, packed + place(out, unit));
        }
    }

    // Packs the units [unit, unit + count) of the outputs of a strip, from ``out`` on.
    void take(int out, int unit, int count, float* to) const {
        const int outs = next_strip(out) - out;
        const int input = unit * Units<Kind>::kNumbers, all = count * Units<Kind>::kNumbers;
        const int inputs = w_.in - input < all ? w_.in - input : all;
        const auto* const at = static_cast<const Storage*>(w_.weight);
        int64_t slots[kPartUnits<Kind> * Units<Kind>::kNumbers];
        const Strips strip{to, count};
        if (w_.transposed) {
            for (int i = 0; i < inputs; ++i) slots[i] = (input + i) * w_.stride;
            const int taken = (inputs + Units<Kind>::kNumbers - 1) / Units<Kind>::kNumbers;
            take_values<Kind>(at + out, slots, inputs, outs, strip);
            for (int i = taken * kStrip; i < count * kStrip; i += kLanes) store(to + i, zeros());
        } else {
            for (int j = 0; j < outs; ++j) slots[j] = (out + j) * w_.stride;
            take_keys<Kind>(at + input, slots, outs, inputs, strip);
        }
    }

    // Asks for the weights of the part that follows one of ``count`` units: its strip's next, or the next strip's first.
    void fetch_next(int out, int unit, int count) const {
        const bool more = unit + count < units_;
        const int first = more ? out : next_strip(out), input = (more ? unit + count : 0) * Units<Kind>::kNumbers;
        if (first >= w_.outs) return;
        const int outs = next_strip(first) - first, inputs = smaller(w_.in - input, kPartUnits<Kind> * Units<Kind>::kNumbers);
        const int rows = w_.transposed ? inputs : outs, width = w_.transposed ? outs : inputs;
        const auto* const at = static_cast<const Storage*>(w_.weight) +
                               (w_.transposed ? input * w_.stride + first : first * w_.stride + input);
        constexpr int kLine = 64 / sizeof(Storage);
        for (int r = 0; r < rows; ++r) {
            for (int i = 0; i < width; i += kLine) {
                _mm_prefetch(reinterpret_cast<const char*>(at + r * w_.stride + i), _MM_HINT_T0);
            }
        }
    }

private:
    const CpuLinear& w_;
    const int units_, strips_;
};

// The lines that a call fetches while it computes: one a unit, or two that are neighbours.
struct LinesAhead {
    const float* at;
    int step;    // lines from those of a unit to those of the next, in 65536ths
    int second;  // floats from the first line to the second; 0: one is fetched

    // ``count`` lines, by a call of so many units.
    LinesAhead(const float* at, int count, int units)
        : at(at), step((count << 16) / units), second(count > units ? kLineFloats : 0) {}

    GPTKERN_HD void fetch(int unit) const {
        const float* const line = at + (static_cast<int64_t>(unit) * step >> 16) * kLineFloats;
        _mm_prefetch(reinterpret_cast<const char*>(line), _MM_HINT_T0);  // past the end it does nothing
        _mm_prefetch(reinterpret_cast<const char*>(line + second), _MM_HINT_T0);
    }
    static constexpr int kLineFloats = 16;
};

// sums = products of R rows with C vectors of a strip; or they are added to the sums of the parts before.
template <class Kind, int R, int C>
void multiply_part(const float* part, int units, LinesAhead ahead, const Lines& rows, bool first, const Lines& sums) {
    Vec total[R][C];
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) total[r][c] = zeros();
    }
    for (int u = 0; u < units; ++u) {
        ahead.fetch(u);
        add_unit<Kind, R, C>(rows, part, u, total);
    }
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) {
            float* const to = sums.row(r) + c * kLanes;
            store(to, first ? total[r][c] : add(load(to), total[r][c]));
        }
    }
}

// A layer's products with rows of units, a part of a strip at a time.
template <class Kind>
class PackedProduct {
public:
    // ``memory``: kPartFloats, for weights that are not packed.
    PackedProduct(const CpuLinear& layer, const Lines& x, int rows, float* memory)
        : layer_(layer), order_(layer), x_(x), rows_(rows), groups_((rows + kDown - 1) / kDown), memory_(memory) {}

    // sums[r * stride + j] = dot(x[r], weights of output first + j) for the outputs up to ``last``, of one section; and
    // up to a multiple of kStep beyond them, of no meaning.
    void run(int first, int last, const Lines& sums) const {
        for (int out = first; out < last && rows_ > 0;) {
            const bool whole = out % layer_.section % kStrip == 0 && last - out > kStep;
            const Lines to{sums.at + out - first, sums.stride};
            for (int unit = 0; unit < order_.units(); unit += kPartUnits<Kind>) {
                if (whole) {
                    multiply<kAcross>(out, unit, to);
                } else {
                    multiply<2>(out, unit, to);
                }
            }
            out += whole ? kStrip : kStep;
        }
    }

private:
    template <int C>
    void multiply(int out, int unit, const Lines& sums) const {
        const int units = smaller(order_.units() - unit, kPartUnits<Kind>);
        const float* const part = part_of(out, unit, units);
        // One group's weights stream by themselves. Later groups read them again, and would leave the memory idle.
        const int lines = groups_ == 1 ? 0 : kAcross * kLanes / LinesAhead::kLineFloats * units / groups_;
        const float* next = part + units * kStrip;
        row_groups<kDown>(rows_, [&](int row, auto count) {
            const Lines inputs{x_.row(row) + unit, x_.stride};
            multiply_part<Kind, decltype(count)::value, C>(part, units, {next, lines, units}, inputs, unit == 0,
                                                           sums.from(row));
            next += lines * LinesAhead::kLineFloats;
        });
    }

    const float* part_of(int out, int unit, int units) const {
        if (layer_.packed != nullptr) return layer_.packed + order_.place(out, unit);
        const int column = out % layer_.section % kStrip;
        order_.take(out - column, unit, units, memory_);
        order_.fetch_next(out - column, unit, units);
        return memory_ + column;
    }

    const CpuLinear& layer_;
    const PackedOrder<Kind> order_;
    const Lines x_;
    const int rows_, groups_;
    float* const memory_;
};

}  // namespace GPTKERN_ISA
}  // namespace gptkern
