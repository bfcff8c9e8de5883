// Products of rows of int8 with int4 weights by VNNI. A vector's lanes are 16 outputs: a part of their codes at a time is
// brought into that order, four inputs of each in one vector, and meets those inputs of one row after another.
//
// A block's products are summed exactly. Their sum goes to that of the output in fp32, times the row's scale and then the
// weights', in the order of the inputs. Neither the number of rows nor the split of outputs among threads changes that.
#pragma once

#include "decode/byte_product.h"
#include "decode/code_rows.h"

#ifdef __AVX512VNNI__

namespace gptkern {
inline namespace GPTKERN_ISA {

constexpr int kCodeVectors = 4;                    // vectors of outputs that rows meet together
constexpr int kCodeOuts = kCodeVectors * kLanes;
constexpr int kCodeInputs = 256;                   // inputs of them whose codes stay in the first cache
constexpr int kCodeRows = 6;                       // rows that are summed at once: the registers hold so many sums
constexpr int kFewCodeRows = 4;                    // up to these meet the codes before they are stored anywhere
constexpr int kVectorInputs = 128;                 // inputs whose codes one vector has where they lie
constexpr int kTableGroups = 2 * kLanes;           // groups whose scales are brought into the order of outputs at once

// Numbers of 32 bits: lane i of vector j goes to lane j of vector i.
GPTKERN_HD void transpose(__m512i (&a)[16]) {
    Vec numbers[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) numbers[i] = _mm512_castsi512_ps(a[i]);
    transpose(numbers);
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) a[i] = _mm512_castps_si512(numbers[i]);
}

// The codes of 16 outputs; past the last output it stands there again.
template <int Group>
struct CodesOf16 {
    const uint8_t* at[kLanes];

    CodesOf16(const CpuLinear& w, int first) {
        for (int o = 0; o < kLanes; ++o) {
            const int out = first + o < w.outs ? first + o : w.outs - 1;
            at[o] = static_cast<const uint8_t*>(w.weight) + out * w.stride;
        }
    }

    // use(i, codes of four inputs from ``input`` + i on) for kVectorInputs inputs; past ``left`` of them codes are 0.
    template <class Use>
    GPTKERN_HD void fours(int input, int left, const uint8_t* ahead, const Use& use) const {
        constexpr int kHalf = Group / 2;
        const auto some = static_cast<__mmask16>(left < kVectorInputs ? (1u << left / 8) - 1 : 0xffff);
        __m512i codes[kLanes];
#pragma GCC unroll 16
        for (int o = 0; o < kLanes; ++o) {
            _mm_prefetch(reinterpret_cast<const char*>(ahead + o * kVector), _MM_HINT_T0);  // past the end it does nothing
            codes[o] = _mm512_maskz_loadu_epi32(some, at[o] + input / 2);
        }
        transpose(codes);
        const __m512i low = _mm512_set1_epi8(15);
#pragma GCC unroll 16
        for (int t = 0; t < kLanes; ++t) {
            const int i = 4 * t / kHalf * Group + 4 * t % kHalf;
            use(i, _mm512_and_si512(codes[t], low));
            use(i + kHalf, _mm512_and_si512(_mm512_srli_epi16(codes[t], 4), low));
        }
    }
};

// A number of each group for kCodeOuts outputs, in their order.
struct GroupTable {
    alignas(64) float at[kTableGroups][kCodeVectors][kLanes];

    // Those of up to kTableGroups groups from ``group`` on. ``from``: fp16, (outs, groups).
    void take(const uint16_t* from, int outs, int groups, int first, int group) {
        const __mmask32 some = groups - group < kTableGroups ? (1u << (groups - group)) - 1 : 0xffffffffu;
        for (int v = 0; v < kCodeVectors; ++v) {
            __m512i halves[kLanes];
#pragma GCC unroll 16
            for (int o = 0; o < kLanes; ++o) {
                const int place = first + v * kLanes + o, out = place < outs ? place : outs - 1;
                halves[o] = _mm512_maskz_loadu_epi16(some, from + static_cast<int64_t>(out) * groups + group);
            }
            transpose(halves);
#pragma GCC unroll 16
            for (int t = 0; t < kLanes; ++t) {
                store(at[2 * t][v], _mm512_cvtph_ps(_mm512_cvtepi32_epi16(halves[t])));
                store(at[2 * t + 1][v], _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32(halves[t], 16))));
            }
        }
    }
};

// What a thread brings into order.
struct CodePanel {
    alignas(64) uint8_t codes[kCodeInputs / 4][kCodeVectors][kVector];
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
            switch (x_.count) {
                case 0: break;
                case 1: add_few<1>(input, inputs, sums, stride); break;
                case 2: add_few<2>(input, inputs, sums, stride); break;
                case 3: add_few<3>(input, inputs, sums, stride); break;
                case 4: add_few<4>(input, inputs, sums, stride); break;
                default: add_many(input, inputs, sums, stride);
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

    GPTKERN_HD Ints start(int r, int block) const {
        return Minimums ? Ints{} : reinterpret_cast<Ints>(_mm512_set1_epi32(x_.start(r, block)));
    }

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
        constexpr int kBlocks = kVectorInputs / kBlock;
        const uint8_t* next = ahead(input);
        for (int v = 0; v < kCodeVectors; ++v) {
            const CodesOf16<Group> codes(w_, first_ + v * kLanes);
            Vec total[R];
            for (int r = 0; r < R; ++r) total[r] = input == 0 ? zeros() : load(sums + r * stride + v * kLanes);
            for (int i = input; i < input + inputs; i += kVectorInputs, next += kLanes * kVector) {
                const int left = input + inputs - i;
                Ints products[kBlocks][R];
#pragma GCC unroll 4
                for (int b = 0; b < kBlocks; ++b) {
                    for (int r = 0; r < R; ++r) products[b][r] = b * kBlock < left ? start(r, i / kBlock + b) : Ints{};
                }
                codes.fours(i, left, next, [&](int at, __m512i fours) __attribute__((always_inline)) {
                    for (int r = 0; r < R; ++r) {
                        Ints& sum = products[at / kBlock][r];
                        sum = dot(sum, fours, _mm512_set1_epi32(x_.four(r, i + at)));
                    }
                });
#pragma GCC unroll 4
                for (int b = 0; b < kBlocks; ++b) {
                    if (b * kBlock >= left) break;
                    for (int r = 0; r < R; ++r) {
                        total[r] = with(block_of(r, i / kBlock + b), total[r], products[b][r], v);
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
            const CodesOf16<Group> codes(w_, first_ + v * kLanes);
            for (int i = 0; i < inputs; i += kVectorInputs, next += kLanes * kVector) {
                codes.fours(input + i, inputs - i, next, [&](int at, __m512i fours) __attribute__((always_inline)) {
                    _mm512_store_si512(panel_.codes[(i + at) / 4][v], fours);
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
        Ints products[kCodeVectors][R];
#pragma GCC unroll 6
        for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
            for (int v = 0; v < kCodeVectors; ++v) products[v][r] = start(row + r, block);
        }
        for (int at = i; at < i + kBlock; at += 4) {
            __m512i codes[kCodeVectors];
#pragma GCC unroll 4
            for (int v = 0; v < kCodeVectors; ++v) codes[v] = _mm512_load_si512(panel_.codes[at / 4][v]);
#pragma GCC unroll 6
            for (int r = 0; r < R; ++r) {
                const __m512i fours = _mm512_set1_epi32(x_.four(row + r, input + at));
#pragma GCC unroll 4
                for (int v = 0; v < kCodeVectors; ++v) products[v][r] = dot(products[v][r], codes[v], fours);
            }
        }
#pragma GCC unroll 6
        for (int r = 0; r < R; ++r) {
            const Block own = block_of(row + r, block);
#pragma GCC unroll 4
            for (int v = 0; v < kCodeVectors; ++v) {
                float* const to = sums + (row + r) * stride + v * kLanes;
                store(to, with(own, block == 0 ? zeros() : load(to), products[v][r], v));
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

#endif  // __AVX512VNNI__
