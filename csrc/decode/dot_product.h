// Products of rows with weights that lie by outputs and are widened on the way: a vector of a row's inputs at a time meets
// those of several outputs. fp32 by multiply and add, bf16 by the processor's dot product of pairs.
//
// A product is as many sums as a vector has lanes, over every so many inputs, added in the end. Neither the number of
// rows nor the split of outputs among threads changes that order.
#pragma once

#include "decode/operand.h"
#include "decode/row_groups.h"

namespace gptkern {
inline namespace GPTKERN_ISA {

constexpr int kDotRows = kLanes == 16 ? 6 : 2;  // rows that meet kOuts outputs at once: the registers hold so many sums
constexpr int kFewRows = 2;    // beyond, a long row does not stay in the first cache:
constexpr int kPartOuts = 64;  // kDepth of its inputs are summed for so many outputs before those that follow

// What meets in one instruction, of each dtype.
template <class Kind>
struct Dot;

template <>
struct Dot<Fp32> {
    using Vector = Vec;
    static constexpr int kInputs = kLanes, kDepth = 768;
    GPTKERN_HD static Vec load(const float* from) { return gptkern::load(from); }
    GPTKERN_HD static Vec load(const float* from, int count) { return load_some(from, count); }
    GPTKERN_HD static Vec add(Vec sum, Vec w, Vec x) { return fma(w, x, sum); }
};

#ifdef __AVX512BF16__
template <>
struct Dot<Bf16> {
    using Vector = __m512bh;
    static constexpr int kInputs = 2 * kLanes, kDepth = 1536;
    GPTKERN_HD static Vector load(const uint16_t* from) { return reinterpret_cast<Vector>(_mm512_loadu_si512(from)); }
    GPTKERN_HD static Vector load(const uint16_t* from, int count) {
        return reinterpret_cast<Vector>(_mm512_maskz_loadu_epi16((1u << count) - 1, from));
    }
    GPTKERN_HD static Vec add(Vec sum, Vector w, Vector x) { return _mm512_dpbf16_ps(sum, w, x); }
};
#endif

// The part of the next weights that a call fetches while it computes.
struct Ahead {
    int64_t next;  // elements from a weight to the one that follows it
    int first;     // where the part begins
    int share;     // how much of the weights it is, in 65536ths
};

// Some inputs of the weights of kOuts outputs; past the last output it stands there again.
template <class Storage>
struct PartWeights {
    const Storage* at[kOuts];
    int out[kOuts];
    int inputs;
};

// The sums of R rows, to which those inputs' products are added.
template <class Kind, int R>
struct DotSums {
    using Storage = typename Kind::Storage;
    using Vector = typename Dot<Kind>::Vector;

    Vec at[kOuts][R];

    GPTKERN_HD void take(const float* partial, bool first) {
#pragma GCC unroll 6
        for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
            for (int j = 0; j < kOuts; ++j) {
                at[j][r] = first ? zeros() : load(partial + (r * kOuts + j) * kLanes);
            }
        }
    }
    GPTKERN_HD void give(float* partial) const {
#pragma GCC unroll 6
        for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
            for (int j = 0; j < kOuts; ++j) store(partial + (r * kOuts + j) * kLanes, at[j][r]);
        }
    }
    GPTKERN_HD void add(const Vector (&w)[kOuts], const Storage* x, int64_t x_stride) {
#pragma GCC unroll 6
        for (int r = 0; r < R; ++r) {
            const Vector values = Dot<Kind>::load(x + r * x_stride);
#pragma GCC unroll 4
            for (int j = 0; j < kOuts; ++j) at[j][r] = Dot<Kind>::add(at[j][r], w[j], values);
        }
    }
    GPTKERN_HD void add(const PartWeights<Storage>& weights, Ahead ahead, const Storage* x, int64_t x_stride) {
        constexpr int kInputs = Dot<Kind>::kInputs;
        const int whole = weights.inputs / kInputs * kInputs;
        Vector w[kOuts];
        // By two: the end of a loop of half the turns is foreseen, a fourteenth of a bf16 product's time.
#pragma GCC unroll 2
        for (int i = 0; i < whole; i += kInputs) {
#pragma GCC unroll 4
            for (int j = 0; j < kOuts; ++j) {
                const Storage* const next =
                    weights.at[j] + ahead.next + ahead.first + (static_cast<int64_t>(i) * ahead.share >> 16);
                _mm_prefetch(reinterpret_cast<const char*>(next), _MM_HINT_T0);  // past the end it does nothing
                w[j] = Dot<Kind>::load(weights.at[j] + i);
            }
            add(w, x + i, x_stride);
        }
        if (whole == weights.inputs) return;
#pragma GCC unroll 4
        for (int j = 0; j < kOuts; ++j) w[j] = Dot<Kind>::load(weights.at[j] + whole, weights.inputs - whole);
        add(w, x + whole, x_stride);
    }
    // The sums themselves, each row's to where its outputs are.
    GPTKERN_HD void finish(const int (&out)[kOuts], float* to, int64_t stride) const {
#pragma GCC unroll 6
        for (int r = 0; r < R; ++r) {
            store_sums(to + r * stride, out, sums_of_four(at[0][r], at[1][r], at[2][r], at[3][r]));
        }
    }
};

// A product's part: ``outs`` outputs from ``first`` on, ``inputs`` inputs from ``input`` on.
struct ProductPart {
    int first, outs, input, inputs;
};

template <class Kind>
void add_part(const Weights<Kind>& w, const RowsOf<typename Kind::Storage>& x, const ProductPart& part, float* partial,
              float* sums, int64_t stride) {
    const OutTurns turns(part.outs, x.count);
    const bool first = part.input == 0, last = part.input + part.inputs == w.in;
    const int block = turns.block(), groups = (x.count + kDotRows - 1) / kDotRows;
    for (int start = 0; start < turns.turns; start += block) {
        int group = 0;
        row_groups<kDotRows>(x.count, [&](int row, auto rows) {
            const Ahead ahead{block * turns.step() * w.stride, part.inputs / groups * group++, 65536 / groups + 1};
            for (int n = start; n < start + block && n < turns.turns; ++n) {
                PartWeights<typename Kind::Storage> weights{{}, {}, part.inputs};
                for (int j = 0; j < kOuts; ++j) {
                    weights.out[j] = part.first + turns.out(n, j);
                    weights.at[j] = w.at + weights.out[j] * w.stride + part.input;
                }
                DotSums<Kind, decltype(rows)::value> total;
                float* const own = partial + static_cast<int64_t>(n * x.count + row) * kOuts * kLanes;
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

// Floats of ``partial`` that ``dot_product`` needs.
GPTKERN_HD int64_t dot_partial(int rows) { return static_cast<int64_t>(rows) * kPartOuts * kLanes; }

// sums[r * stride + j] = dot(x[r], weights of output j) for ``outs`` outputs, 1 or more.
template <class Kind>
void dot_product(const Weights<Kind>& w, const RowsOf<typename Kind::Storage>& x, int outs, float* partial, float* sums,
                 int64_t stride) {
    constexpr int kDepth = Dot<Kind>::kDepth;
    const bool whole = x.count <= kFewRows || w.in <= kDepth;
    const int part = whole ? outs : kPartOuts, depth = whole ? w.in : kDepth;
    for (int out = 0; out < outs; out += part) {
        for (int i = 0; i < w.in; i += depth) {
            const int some = outs - out < part ? outs - out : part, inputs = w.in - i < depth ? w.in - i : depth;
            add_part<Kind>(w, x, {out, some, i, inputs}, partial, sums, stride);
        }
    }
}

}  // namespace GPTKERN_ISA
}  // namespace gptkern
