// Products of bf16 rows with bf16 weights by the processor's dot product of pairs: a row's 32 inputs at a time meet those
// of several outputs, where the weights lie.
//
// A product is 16 sums over every sixteenth pair, added in the end. Neither the number of rows nor the split of outputs
// among threads changes that order.
#pragma once

#include "decode/operand.h"
#include "decode/row_groups.h"

#ifdef __AVX512BF16__

namespace gptkern {
inline namespace GPTKERN_ISA {

constexpr int kPairOuts = 4;   // outputs that are summed at once
constexpr int kPairRows = 6;   // and rows: the registers hold so many sums
constexpr int kFewRows = 2;    // beyond, a long row does not stay in the first cache:
constexpr int kDepth = 1024;   // so many inputs are summed for
constexpr int kPartOuts = 64;  // so many outputs before those that follow

GPTKERN_HD __m512bh load_pairs(const uint16_t* from) {
    return reinterpret_cast<__m512bh>(_mm512_loadu_si512(from));
}
GPTKERN_HD __m512bh load_pairs(const uint16_t* from, int count) {
    return reinterpret_cast<__m512bh>(_mm512_maskz_loadu_epi16((1u << count) - 1, from));
}

// The part of the next weights that a call fetches while it computes.
struct Ahead {
    int64_t next;  // elements from a weight to the one that follows it
    int first;     // where the part begins
    int share;     // how much of the weights it is, in 65536ths
};

// Some inputs of the weights of kPairOuts outputs; past the last output it stands there again.
struct PairWeights {
    const uint16_t* at[kPairOuts];
    int out[kPairOuts];
    int inputs;
};

// The sums of R rows, to which those inputs' products are added.
template <int R>
struct PairSums {
    Vec at[kPairOuts][R];

    GPTKERN_HD void take(const float* partial, bool first) {
#pragma GCC unroll 6
        for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
            for (int j = 0; j < kPairOuts; ++j) {
                at[j][r] = first ? zeros() : load(partial + (r * kPairOuts + j) * kLanes);
            }
        }
    }
    GPTKERN_HD void give(float* partial) const {
#pragma GCC unroll 6
        for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
            for (int j = 0; j < kPairOuts; ++j) store(partial + (r * kPairOuts + j) * kLanes, at[j][r]);
        }
    }
    GPTKERN_HD void add(const __m512bh (&w)[kPairOuts], const uint16_t* x, int64_t x_stride) {
#pragma GCC unroll 6
        for (int r = 0; r < R; ++r) {
            const __m512bh values = load_pairs(x + r * x_stride);
#pragma GCC unroll 4
            for (int j = 0; j < kPairOuts; ++j) at[j][r] = _mm512_dpbf16_ps(at[j][r], w[j], values);
        }
    }
    GPTKERN_HD void add(const PairWeights& weights, Ahead ahead, const uint16_t* x, int64_t x_stride) {
        const int whole = weights.inputs / 32 * 32;
        __m512bh w[kPairOuts];
        for (int i = 0; i < whole; i += 32) {
#pragma GCC unroll 4
            for (int j = 0; j < kPairOuts; ++j) {
                const uint16_t* const next = weights.at[j] + ahead.next + ahead.first + (static_cast<int64_t>(i) * ahead.share >> 16);
                _mm_prefetch(reinterpret_cast<const char*>(next), _MM_HINT_T0);  // past the end it does nothing
                w[j] = load_pairs(weights.at[j] + i);
            }
            add(w, x + i, x_stride);
        }
        if (whole == weights.inputs) return;
#pragma GCC unroll 4
        for (int j = 0; j < kPairOuts; ++j) w[j] = load_pairs(weights.at[j] + whole, weights.inputs - whole);
        add(w, x + whole, x_stride);
    }
    // The sums themselves, each row's to where its outputs are.
    GPTKERN_HD void finish(const int* out, float* to, int64_t stride) const {
#pragma GCC unroll 6
        for (int r = 0; r < R; ++r) {
            float four[kPairOuts];
            _mm_storeu_ps(four, sums_of_four(at[0][r], at[1][r], at[2][r], at[3][r]));
            for (int j = 0; j < kPairOuts; ++j) to[r * stride + out[j]] = four[j];
        }
    }
};

// A product's part: ``outs`` outputs from ``first`` on, ``inputs`` inputs from ``input`` on.
struct PairPart {
    int first, outs, input, inputs;
};

inline void add_part(const Weights<Bf16>& w, const Pairs& x, const PairPart& part, float* partial, float* sums,
                     int64_t stride) {
    // kPairOuts long runs side by side, as a core's prefetchers follow them.
    const int run = (part.outs + kPairOuts - 1) / kPairOuts, block = x.count > kManyRows ? kManyOuts : 1;
    const bool first = part.input == 0, last = part.input + part.inputs == w.in;
    const int groups = (x.count + kPairRows - 1) / kPairRows;
    for (int start = 0; start < run; start += block) {
        int group = 0;
        row_groups<kPairRows>(x.count, [&](int row, auto rows) {
            const Ahead ahead{block * w.stride, part.inputs / groups * group++, 65536 / groups + 1};
            for (int n = start; n < start + block && n < run; ++n) {
                PairWeights weights{{}, {}, part.inputs};
                for (int j = 0; j < kPairOuts; ++j) {
                    const int out = n + j * run < part.outs ? n + j * run : part.outs - 1;
                    weights.out[j] = part.first + out;
                    weights.at[j] = w.at + weights.out[j] * w.stride + part.input;
                }
                PairSums<decltype(rows)::value> total;
                float* const own = partial + static_cast<int64_t>(n * x.count + row) * kPairOuts * kLanes;
                total.take(own, first);
                total.add(weights, ahead, x.row(row) + part.input, x.stride);
                if (last) {
                    total.finish(weights.out, sums + row * stride, stride);
                } else {
                    total.give(own);
                }
            }
        });
    }
}

// Floats of ``partial`` that ``product`` needs.
GPTKERN_HD int64_t pair_partial(int rows) { return static_cast<int64_t>(rows) * kPartOuts * kLanes; }

// sums[r * stride + j] = dot(x[r], weights of output j) for ``outs`` outputs, 1 or more.
inline void product(const Weights<Bf16>& w, const Pairs& x, int outs, float* partial, float* sums, int64_t stride) {
    const bool whole = x.count <= kFewRows || w.in <= kDepth;
    const int part = whole ? outs : kPartOuts, depth = whole ? w.in : kDepth;
    for (int out = 0; out < outs; out += part) {
        for (int i = 0; i < w.in; i += depth) {
            const int some = outs - out < part ? outs - out : part, inputs = w.in - i < depth ? w.in - i : depth;
            add_part(w, x, {out, some, i, inputs}, partial, sums, stride);
        }
    }
}

}  // namespace GPTKERN_ISA
}  // namespace gptkern

#endif  // __AVX512BF16__
