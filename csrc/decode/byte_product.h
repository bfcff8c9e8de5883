// Products of rows of int8 with int8 and int4 weights by VNNI, where the weights lie.
//
// Sums of whole numbers are exact: of a lane and panel with int8 weights, of a lane and 128 inputs with int4 ones. What
// they are scaled to is summed in fp32, in the order of the inputs, and the 16 lanes in the end. Neither the number of
// rows nor the split of outputs among threads changes that order.
#pragma once

#include "decode/byte_rows.h"
#include "decode/row_groups.h"

#ifdef __AVX512VNNI__

namespace gptkern {
inline namespace GPTKERN_ISA {

// A vector of int32 as GCC's dot product takes it: of __m512i it copies every sum.
using Ints = __v16si;

GPTKERN_HD Ints dot(Ints sums, __m512i weights, __m512i values) {
    return reinterpret_cast<Ints>(_mm512_dpbusd_epi32(reinterpret_cast<__m512i>(sums), weights, values));
}
GPTKERN_HD Ints load_ints(const char* from) { return reinterpret_cast<Ints>(_mm512_loadu_si512(from)); }
GPTKERN_HD Vec widened(Ints sums) { return _mm512_cvtepi32_ps(reinterpret_cast<__m512i>(sums)); }
GPTKERN_HD Vec lane_scales(const char* panel) { return load(reinterpret_cast<const float*>(panel)); }

// A panel of the weights of kOuts outputs and of some rows.
struct ByteTile {
    const int* out;
    int input, inputs;  // the panel
    int64_t ahead;      // bytes from a weight to the one to be fetched meanwhile
    const char* x;
    int64_t x_stride;
};

// The sums of R rows over the panels so far, in registers, and where those are needed for other things in memory.
template <int R>
struct RegisterSums {
    Vec at[kOuts][R];

    RegisterSums() {
#pragma GCC unroll 4
        for (int j = 0; j < kOuts; ++j) {
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) at[j][r] = zeros();
        }
    }
    // Adds a panel's sums, times the scales of the row's lanes.
    GPTKERN_HD void add(const ByteTile& tile, int r, int j, Vec sums) {
        at[j][r] = fma(sums, lane_scales(tile.x + r * tile.x_stride), at[j][r]);
    }
    GPTKERN_HD Vec sum(int r, int j) const { return at[j][r]; }
};

template <int R>
struct MemorySums {
    alignas(64) float at[R * kOuts * kLanes];
    bool begun = false;

    // Begins an output's sum of a row, before any panel.
    GPTKERN_HD void begin(int r, int j, Vec sums) { store(at + (r * kOuts + j) * kLanes, sums); }
    GPTKERN_HD void add(const ByteTile& tile, int r, int j, Vec sums) {
        float* const to = at + (r * kOuts + j) * kLanes;
        const bool first = tile.input == 0 && !begun;
        store(to, fma(sums, lane_scales(tile.x + r * tile.x_stride), first ? zeros() : load(to)));
    }
    GPTKERN_HD Vec sum(int r, int j) const { return load(at + (r * kOuts + j) * kLanes); }
};

struct Int8Bytes {
    static constexpr bool kGrouped = false;
    static constexpr int kRows = 4;  // that are summed at once: the registers hold so many sums of two kinds
    static constexpr int kPanel = kInt8Panel;
    template <int R>
    using Sums = RegisterSums<R>;
    const uint8_t* at;
    int64_t stride;
    int in;

    static int64_t panel_bytes(int inputs) { return 2 * kLaneBytes + (inputs + kVector - 1) / kVector * kVector; }

    template <int R>
    GPTKERN_HD void add_panel(const ByteTile& tile, Sums<R>& total) const {
        const uint8_t* from[kOuts];
        for (int j = 0; j < kOuts; ++j) from[j] = at + tile.out[j] * stride + tile.input;
        const char* values = tile.x + kLaneBytes;
        Ints sums[kOuts][R];
#pragma GCC unroll 6
        for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
            for (int j = 0; j < kOuts; ++j) sums[j][r] = load_ints(values + r * tile.x_stride);
        }
        values += kLaneBytes;
        const auto add = [&](int i, __mmask64 some) __attribute__((always_inline)) {
            __m512i w[kOuts];
#pragma GCC unroll 4
            for (int j = 0; j < kOuts; ++j) {
                _mm_prefetch(reinterpret_cast<const char*>(from[j] + tile.ahead + i), _MM_HINT_T0);
                const __m512i bytes = some == ~0ull ? _mm512_loadu_si512(from[j] + i)
                                                    : _mm512_maskz_loadu_epi8(some, from[j] + i);
                w[j] = _mm512_xor_si512(bytes, _mm512_set1_epi8(-128));
            }
#pragma GCC unroll 6
            for (int r = 0; r < R; ++r) {
                const __m512i x = _mm512_loadu_si512(values + r * tile.x_stride + i);
#pragma GCC unroll 4
                for (int j = 0; j < kOuts; ++j) sums[j][r] = dot(sums[j][r], w[j], x);
            }
        };
        const int whole = tile.inputs / kVector * kVector;
        for (int i = 0; i < whole; i += kVector) add(i, ~0ull);
        if (whole < tile.inputs) add(whole, (1ull << (tile.inputs - whole)) - 1);
#pragma GCC unroll 6
        for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
            for (int j = 0; j < kOuts; ++j) total.add(tile, r, j, widened(sums[j][r]));
        }
    }
};

// Groups of Group inputs. Codes are multiplied less 8, and a group's minimum is that of such codes, times the sum of the
// group's activations.
template <int Group>
struct Int4Codes {
    static constexpr bool kGrouped = true;
    static constexpr int kRows = 4;
    static constexpr int kPanel = kInt4Panel;
    template <int R>
    using Sums = MemorySums<R>;
    static constexpr int kGroups = kPairedVectors / Group;  // of one vector of codes
    static constexpr int kAhead = 256;                      // scales and minimums from those used to those fetched
    const uint8_t* at;
    const uint16_t *scales, *minimums;
    int64_t stride;
    int in;

    static int64_t panel_bytes(int inputs) {
        return kLaneBytes + (inputs + kPairedVectors - 1) / kPairedVectors * (kPairedVectors + kLaneBytes);
    }

    template <int R>
    GPTKERN_HD void add_panel(const ByteTile& tile, Sums<R>& total) const {
        const uint8_t* from[kOuts];
        const uint16_t* own_scales[kOuts];
        for (int j = 0; j < kOuts; ++j) {
            from[j] = at + tile.out[j] * stride + tile.input / 2;
            own_scales[j] = scales + static_cast<int64_t>(tile.out[j]) * (in / Group) + tile.input / Group;
        }
        Vec sums[kOuts][R];
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
            for (int j = 0; j < kOuts; ++j) sums[j][r] = zeros();
        }
        const char* values = tile.x + kLaneBytes;
        const auto add = [&](int n, __mmask16 some) __attribute__((always_inline)) {
            __m512i low[kOuts], high[kOuts];
            Vec factors[kOuts];
#pragma GCC unroll 4
            for (int j = 0; j < kOuts; ++j) {
                const uint8_t* const codes = from[j] + n * kVector;
                _mm_prefetch(reinterpret_cast<const char*>(codes + tile.ahead), _MM_HINT_T0);
                split(_mm512_maskz_loadu_epi32(some, codes), low[j], high[j]);
                factors[j] = lane_factors(own_scales[j] + n * kGroups, some);
            }
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) {
                const char* const x = values + r * tile.x_stride;
                const __m512i a = _mm512_loadu_si512(x), b = _mm512_loadu_si512(x + kVector);
                const Ints start = load_ints(x + kPairedVectors);
#pragma GCC unroll 4
                for (int j = 0; j < kOuts; ++j) {
                    sums[j][r] = fma(widened(dot(dot(start, low[j], a), high[j], b)), factors[j], sums[j][r]);
                }
            }
            values += kPairedVectors + kLaneBytes;
        };
        const int whole = tile.inputs / kPairedVectors;
        for (int n = 0; n < whole; ++n) add(n, 0xffff);
        const int rest = tile.inputs % kPairedVectors;
        if (rest > 0) add(whole, static_cast<__mmask16>((1u << rest / 8) - 1));
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
            for (int j = 0; j < kOuts; ++j) total.add(tile, r, j, sums[j][r]);
        }
    }

    // Begins ``total`` with what the minimums make of R rows' sums of groups, which begin at ``x``.
    template <int R>
    GPTKERN_HD void begin(const int (&out)[kOuts], const char* x, int64_t x_stride, Sums<R>& total) const {
        if (minimums == nullptr) return;
        const int groups = in / Group;
        Vec sums[kOuts][R];
#pragma GCC unroll 4
        for (int j = 0; j < kOuts; ++j) {
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) sums[j][r] = zeros();
        }
        for (int g = 0; g < groups; g += kLanes, x += kLaneBytes) {
            const auto some = static_cast<__mmask16>(groups - g < kLanes ? (1u << (groups - g)) - 1 : 0xffff);
#pragma GCC unroll 4
            for (int j = 0; j < kOuts; ++j) {
                const int64_t place = static_cast<int64_t>(out[j]) * groups + g;
                // Lines of later outputs: with the codes these are more streams than a core's prefetchers follow.
                _mm_prefetch(reinterpret_cast<const char*>(scales + place + kAhead), _MM_HINT_T0);
                _mm_prefetch(reinterpret_cast<const char*>(minimums + place + kAhead), _MM_HINT_T0);
                const Vec middle = fma(halves(scales + place, some), all(8.0f), halves(minimums + place, some));
#pragma GCC unroll 4
                for (int r = 0; r < R; ++r) {
                    sums[j][r] = fma(load(reinterpret_cast<const float*>(x + r * x_stride)), middle, sums[j][r]);
                }
            }
        }
        total.begun = true;
#pragma GCC unroll 4
        for (int j = 0; j < kOuts; ++j) {
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) total.begin(r, j, sums[j][r]);
        }
    }

private:
    GPTKERN_HD static void split(__m512i codes, __m512i& low, __m512i& high) {
        low = _mm512_and_si512(codes, _mm512_set1_epi8(15));
        high = _mm512_and_si512(_mm512_srli_epi16(codes, 4), _mm512_set1_epi8(15));
    }

    // Up to 16 numbers in fp16.
    GPTKERN_HD static Vec halves(const uint16_t* from, __mmask16 some) {
        return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(some, from));
    }

    // The groups of a vector of codes, of whose lanes ``some`` are used.
    GPTKERN_HD static __mmask8 groups_of(__mmask16 some) {
        constexpr int kLanesOfGroup = kLanes / kGroups;
        __mmask8 used = 0;
        for (int g = 0; g < kGroups; ++g) used |= static_cast<__mmask8>((some >> g * kLanesOfGroup & 1) << g);
        return used;
    }

    // The scale of each lane's group.
    GPTKERN_HD static Vec lane_factors(const uint16_t* from, __mmask16 some) {
        if (kGroups == 1) return _mm512_cvtph_ps(_mm256_set1_epi16(static_cast<short>(from[0])));
        const __m128 own = _mm_maskz_cvtph_ps(15, _mm_maskz_loadu_epi16(groups_of(some), from));
        const __m512i place = kGroups == 2 ? _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1)
                                           : _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
        return _mm512_permutexvar_ps(place, _mm512_castps128_ps512(own));
    }
};

// sums[r * stride + out] for R rows from ``row`` on and the outputs out[0] to out[kOuts - 1], less ``first``.
template <int R, class Source>
void byte_tile(const Source& w, const Bytes& x, int row, const int (&out)[kOuts], int first, int64_t ahead, float* sums,
               int64_t stride) {
    typename Source::template Sums<R> total;
    const char* at = x.row(row);
    if constexpr (Source::kGrouped) w.template begin<R>(out, at + byte_panels(w.in), x.stride, total);
    for (int input = 0; input < w.in; input += Source::kPanel) {
        const int inputs = w.in - input < Source::kPanel ? w.in - input : Source::kPanel;
        w.template add_panel<R>({out, input, inputs, ahead, at, x.stride}, total);
        at += Source::panel_bytes(inputs);
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
        const __m128 four = sums_of_four(total.sum(r, 0), total.sum(r, 1), total.sum(r, 2), total.sum(r, 3));
        store_sums(sums + (row + r) * stride - first, out, four);
    }
}

// sums[r * stride + j] = dot(x[r], weights of output first + j) for the outputs up to ``last``.
template <class Source>
void byte_product(const Source& w, const Bytes& x, int first, int last, float* sums, int64_t stride) {
    const OutTurns turns(last - first, x.count);
    const int block = turns.block();
    for (int start = 0; start < turns.turns; start += block) {
        row_groups<Source::kRows>(x.count, [&](int row, auto rows) {
            const int64_t ahead = row == 0 ? block * turns.step() * w.stride : 0;
            for (int n = start; n < start + block && n < turns.turns; ++n) {
                int out[kOuts];
                for (int j = 0; j < kOuts; ++j) out[j] = first + turns.out(n, j);
                byte_tile<decltype(rows)::value>(w, x, row, out, first, ahead, sums, stride);
            }
        });
    }
}

inline void byte_product(const CpuLinear& w, const Bytes& x, int first, int last, float* sums, int64_t stride) {
    const auto* const at = static_cast<const uint8_t*>(w.weight);
    const auto with = [&](const auto& source) { byte_product(source, x, first, last, sums, stride); };
    if (w.format == Format::kInt8) return with(Int8Bytes{at, w.stride, w.in});
    const auto grouped = [&](auto group) {
        with(Int4Codes<decltype(group)::value>{at, w.group_scales, w.minimums, w.stride, w.in});
    };
    if (w.group == 32) return grouped(Count<32>{});
    if (w.group == 64) return grouped(Count<64>{});
    grouped(Count<128>{});
}

}  // namespace GPTKERN_ISA
}  // namespace gptkern

#endif  // __AVX512VNNI__
