// Products of rows of int8 with int4 weights. A vector's lanes are outputs: a part of their codes at a time is brought into
// that order, four inputs of each in one vector, and meets those inputs of one row after another.
//
// A block's products are summed exactly. Their sum goes to that of the output in fp32, times the row's scale and then the
// weights', in the order of the inputs. Neither the number of rows, nor the split of outputs among threads, nor the
// instruction set changes that.
#pragma once

#include "decode/byte_product.h"
#include "decode/code_rows.h"

namespace gptkern {
inline namespace GPTKERN_ISA {

constexpr int kCodeVectors = kLanes == 16 ? 4 : 2;  // vectors of outputs that rows meet together
constexpr int kCodeOuts = kCodeVectors * kLanes;
constexpr int kCodeInputs = 256;                    // inputs of them whose codes stay in the first cache
constexpr int kCodeRows = kLanes == 16 || kVnni ? 6 : 4;  // rows that are summed at once: the registers hold so many sums
constexpr int kFewCodeRows = kLanes == 16 ? 4 : 2;  // up to these meet the codes before they are stored anywhere
constexpr int kTurnInputs = 128;                    // inputs whose codes are brought into order at a time: whole groups
constexpr int kTurnBytes = kTurnInputs / 2;         // of them, from each output
constexpr int kTableGroups = 2 * kLanes;            // groups whose scales are brought into the order of outputs at once

// The codes of a vector's outputs; past the last output it stands there again.
template <int Group>
struct VectorCodes {
    const uint8_t* at[kLanes];

    VectorCodes(const CpuLinear& w, int first) {
        for (int o = 0; o < kLanes; ++o) {
            const int out = first + o < w.outs ? first + o : w.outs - 1;
            at[o] = static_cast<const uint8_t*>(w.weight) + out * w.stride;
        }
    }

    // use(i, codes of four inputs from ``input`` + i on) for kTurnInputs inputs, or ``left``, which are whole blocks; beyond
    // them codes are 0, or there is no use of them.
    template <class Use>
    GPTKERN_HD void fours(int input, int left, const uint8_t* ahead, const Use& use) const {
        constexpr int kHalf = Group / 2;
        const ByteVec low = all_bytes(15);
#pragma GCC unroll 2
        for (int part = 0; part < kTurnBytes; part += kVecBytes) {
            const int bytes = left / 2 - part;
            if (bytes <= 0) break;
            ByteVec codes[kLanes];
#pragma GCC unroll 16
            for (int o = 0; o < kLanes && part == 0; ++o) {  // past the end it does nothing
                _mm_prefetch(reinterpret_cast<const char*>(ahead + o * kTurnBytes), _MM_HINT_T0);
            }
            load_transposed(at, input / 2 + part, bytes, codes);
#pragma GCC unroll 16
            for (int t = 0; t < kLanes; ++t) {
                const int byte = part + 4 * t, i = byte / kHalf * Group + byte % kHalf;
                use(i, both(codes[t], low));
                use(i + kHalf, both(shifted_right<4>(codes[t]), low));
            }
        }
    }
};

// A number of each group for kCodeOuts outputs, in their order.
struct GroupTable {
    alignas(64) float at[kTableGroups][kCodeVectors][kLanes];

    // Those of up to kTableGroups groups from ``group`` on. ``from``: fp16, (outs, groups).
    void take(const uint16_t* from, int outs, int groups, int first, int group) {
        for (int part = 0; part < kTableGroups && group + part < groups; part += kLanes) {
            for (int v = 0; v < kCodeVectors; ++v) {
                Vec numbers[kLanes];
#pragma GCC unroll 16
                for (int o = 0; o < kLanes; ++o) {
                    const int place = first + v * kLanes + o, out = place < outs ? place : outs - 1;
                    const int64_t offset = static_cast<int64_t>(out) * groups + group + part;
                    numbers[o] = load_halves(from + offset, groups - group - part);
                }
                transpose(numbers);
#pragma GCC unroll 16
                for (int t = 0; t < kLanes; ++t) store(at[part + t][v], numbers[t]);
            }
        }
    }
};

// What a thread brings into order.
struct CodePanel {
    alignas(64) uint8_t codes[kCodeInputs / 4][kCodeVectors][kVecBytes];
    GroupTable scales, minimums;
};

// The product of some rows with kCodeOuts outputs from ``first`` on.
template <int Group, bool Minimums>
class CodeProduct {
public:
    CodeProduct(const CpuLinear& w, const CodeRows& x, int first, CodePanel& panel)
        : w_(w), x_(x), first_(first), panel_(panel) {}

    // sums[r * stride + j] = dot(x[r], weights of output first + j).
    void store_sums(float* sums, int64_t stride) const {
        // A few rows take all the codes whose groups' numbers fit in the tables.
        const int groups = w_.in / Group, step = x_.count > kFewCodeRows ? kCodeInputs : kTableGroups * Group;
        for (int input = 0; input < w_.in; input += step) {
            const int group = input / Group;
            if (group % kTableGroups == 0) {
                panel_.scales.take(w_.group_scales, w_.outs, groups, first_, group);
                if (Minimums) panel_.minimums.take(w_.minimums, w_.outs, groups, first_, group);
            }
            const int inputs = w_.in - input < step ? w_.in - input : step;
            if (x_.count > kFewCodeRows) {
                add_many(input, inputs, sums, stride);
            } else {  // one group
                row_groups<kFewCodeRows>(x_.count, [&](int, auto rows) {
                    add_few<decltype(rows)::value>(input, inputs, sums, stride);
                });
            }
        }
    }

private:
    const CpuLinear& w_;
    const CodeRows x_;
    const int first_;
    CodePanel& panel_;

    // What the next call fetches meanwhile, for the vectors of codes from ``input`` on: the next outputs, as they lie.
    const uint8_t* ahead(int input) const {
        return static_cast<const uint8_t*>(w_.weight) + (first_ + kCodeOuts) * w_.stride + input / 2 * kCodeOuts;
    }

    GPTKERN_HD int start(int r, int block) const { return Minimums ? 0 : x_.start(r, block); }

    // A row's block: its scale, and the sum of its inputs.
    struct Block {
        Vec scale, inputs;
        int group;
    };
    GPTKERN_HD Block block_of(int r, int block) const {
        const Vec inputs = Minimums ? all(bit_cast<float>(x_.start(r, block))) : zeros();
        return {all(x_.scale(r, block)), inputs, block * kBlock / Group % kTableGroups};
    }
    // A sum with what a block adds to it.
    GPTKERN_HD Vec with(const Block& block, Vec total, Ints products, int v) const {
        const Vec scaled = mul(widened(products), block.scale);
        total = fma(scaled, load(panel_.scales.at[block.group][v]), total);
        return Minimums ? fma(block.inputs, load(panel_.minimums.at[block.group][v]), total) : total;
    }

    // Adds the products of R rows, which are all, with inputs from ``input`` on.
    template <int R>
    void add_few(int input, int inputs, float* sums, int64_t stride) const {
        constexpr int kBlocks = kTurnInputs / kBlock;
        const uint8_t* next = ahead(input);
        for (int v = 0; v < kCodeVectors; ++v) {
            const VectorCodes<Group> codes(w_, first_ + v * kLanes);
            Vec total[R];
            for (int r = 0; r < R; ++r) total[r] = input == 0 ? zeros() : load(sums + r * stride + v * kLanes);
            for (int i = input; i < input + inputs; i += kTurnInputs, next += kLanes * kTurnBytes) {
                const int left = input + inputs - i;
                CodeSums products[kBlocks][R];
#pragma GCC unroll 4
                for (int b = 0; b < kBlocks; ++b) {
                    for (int r = 0; r < R; ++r) products[b][r].start(b * kBlock < left ? start(r, i / kBlock + b) : 0);
                }
                codes.fours(i, left, next, [&](int at, ByteVec fours) __attribute__((always_inline)) {
                    for (int r = 0; r < R; ++r) products[at / kBlock][r].add(fours, x_.four(r, i + at));
                });
#pragma GCC unroll 4
                for (int b = 0; b < kBlocks; ++b) {
                    if (b * kBlock >= left) break;
                    for (int r = 0; r < R; ++r) {
                        total[r] = with(block_of(r, i / kBlock + b), total[r], products[b][r].total(), v);
                    }
                }
            }
            for (int r = 0; r < R; ++r) store(sums + r * stride + v * kLanes, total[r]);
        }
    }

    // Adds the products of all rows.
    void add_many(int input, int inputs, float* sums, int64_t stride) const {
        const uint8_t* next = ahead(input);
        for (int v = 0; v < kCodeVectors; ++v) {
            const VectorCodes<Group> codes(w_, first_ + v * kLanes);
            for (int i = 0; i < inputs; i += kTurnInputs, next += kLanes * kTurnBytes) {
                codes.fours(input + i, inputs - i, next, [&](int at, ByteVec fours) __attribute__((always_inline)) {
                    store_bytes(panel_.codes[(i + at) / 4][v], fours);
                });
            }
        }
        row_groups<kCodeRows>(x_.count, [&](int row, auto rows) {
            for (int i = 0; i < inputs; i += kBlock) add_block<decltype(rows)::value>(row, input, i, sums, stride);
        });
    }

    // Adds the products of R rows from ``row`` on with the panel's block that begins at its input i.
    template <int R>
    GPTKERN_HD void add_block(int row, int input, int i, float* sums, int64_t stride) const {
        const int block = (input + i) / kBlock;
        CodeSums products[kCodeVectors][R];
#pragma GCC unroll 6
        for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
            for (int v = 0; v < kCodeVectors; ++v) products[v][r].start(start(row + r, block));
        }
        for (int at = i; at < i + kBlock; at += 4) {
            ByteVec codes[kCodeVectors];
#pragma GCC unroll 4
            for (int v = 0; v < kCodeVectors; ++v) codes[v] = load_bytes(panel_.codes[at / 4][v]);
#pragma GCC unroll 6
            for (int r = 0; r < R; ++r) {
                const int four = x_.four(row + r, input + at);
#pragma GCC unroll 4
                for (int v = 0; v < kCodeVectors; ++v) products[v][r].add(codes[v], four);
            }
        }
#pragma GCC unroll 6
        for (int r = 0; r < R; ++r) {
            const Block own = block_of(row + r, block);
#pragma GCC unroll 4
            for (int v = 0; v < kCodeVectors; ++v) {
                float* const to = sums + (row + r) * stride + v * kLanes;
                store(to, with(own, block == 0 ? zeros() : load(to), products[v][r].total(), v));
            }
        }
    }
};

// sums[r * stride + j] = dot(x[r], weights of output first + j) for the outputs up to ``last``; each row has room for a
// multiple of kCodeOuts.
inline void code_product(const CpuLinear& w, const CodeRows& x, int first, int last, float* sums, int64_t stride,
                         CodePanel& panel) {
    const auto with = [&](auto group, auto minimums) {
        for (int out = first; out < last; out += kCodeOuts) {
            const CodeProduct<decltype(group)::value, decltype(minimums)::value == 1> product(w, x, out, panel);
            product.store_sums(sums + out - first, stride);
        }
    };
    const auto grouped = [&](auto group) {
        if (w.minimums == nullptr) return with(group, Count<0>{});
        with(group, Count<1>{});
    };
    if (w.group == 32) return grouped(Count<32>{});
    if (w.group == 64) return grouped(Count<64>{});
    grouped(Count<128>{});
}

}  // namespace GPTKERN_ISA
}  // namespace gptkern
