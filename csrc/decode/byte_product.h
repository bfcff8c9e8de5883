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

    GPTKERN_HD void add(const ByteTile& tile, int r, int j, Vec sums) {
        float* const to = at + (r * kOuts + j) * kLanes;
        store(to, fma(sums, lane_scales(tile.x + r * tile.x_stride), tile.input == 0 ? zeros() : load(to)));
    }
    GPTKERN_HD Vec sum(int r, int j) const { return load(at + (r * kOuts + j) * kLanes); }
};

struct Int8Bytes {
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

// Groups of Group inputs.
template <int Group, bool Zeros>
struct Int4Codes {
    static constexpr int kRows = 4;
    static constexpr int kPanel = kInt4Panel;
    template <int R>
    using Sums = MemorySums<R>;
    static constexpr int kGroups = kPairedVectors / Group;  // of one vector of codes
    const uint8_t* at;
    const float* scales;
    const uint8_t* zeros;
    int64_t stride;
    int in;

    static int64_t panel_bytes(int inputs) {
        return kLaneBytes + (inputs + kPairedVectors - 1) / kPairedVectors * (kPairedVectors + kLaneBytes);
    }

    template <int R>
    GPTKERN_HD void add_panel(const ByteTile& tile, Sums<R>& total) const {
        const uint8_t *from[kOuts], *own_zeros[kOuts];
        const float* own_scales[kOuts];
        for (int j = 0; j < kOuts; ++j) {
            const int64_t group = static_cast<int64_t>(tile.out[j]) * (in / Group) + tile.input / Group;
            from[j] = at + tile.out[j] * stride + tile.input / 2;
            own_scales[j] = scales + group;
            own_zeros[j] = Zeros ? zeros + group : nullptr;
        }
        Vec sums[kOuts][R];
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
            for (int j = 0; j < kOuts; ++j) sums[j][r] = gptkern::zeros();
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
                if (Zeros) {
                    const __m512i offsets = lane_offsets(own_zeros[j] + n * kGroups, some);
                    low[j] = _mm512_add_epi8(low[j], offsets);
                    high[j] = _mm512_add_epi8(high[j], offsets);
                }
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

private:
    GPTKERN_HD static void split(__m512i codes, __m512i& low, __m512i& high) {
        low = _mm512_and_si512(codes, _mm512_set1_epi8(15));
        high = _mm512_and_si512(_mm512_srli_epi16(codes, 4), _mm512_set1_epi8(15));
    }

    // The groups of a vector of codes, of whose lanes ``some`` are used.
    GPTKERN_HD static __mmask8 groups(__mmask16 some) {
        constexpr int kLanesOfGroup = kLanes / kGroups;
        __mmask8 used = 0;
        for (int g = 0; g < kGroups; ++g) used |= static_cast<__mmask8>((some >> g * kLanesOfGroup & 1) << g);
        return used;
    }

    // The scale of each lane's group.
    GPTKERN_HD static Vec lane_factors(const float* from, __mmask16 some) {
        if (kGroups == 1) return all(from[0]);
        const __m128 own = _mm_maskz_loadu_ps(groups(some), from);
        const __m512i place = kGroups == 2 ? _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1)
                                           : _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
        return _mm512_permutexvar_ps(place, _mm512_castps128_ps512(own));
    }

    // What each code's zero leaves of the offset.
    GPTKERN_HD static __m512i lane_offsets(const uint8_t* from, __mmask16 some) {
        const __m512i offset = _mm512_set1_epi8(16);
        if (kGroups == 1) return _mm512_sub_epi8(offset, _mm512_set1_epi8(static_cast<char>(from[0])));
        const __m512i own = _mm512_broadcastd_epi32(_mm_maskz_loadu_epi8(groups(some), from));
        const __m512i one = _mm512_set1_epi32(0x01010101);
        const __m512i place = kGroups == 2 ? _mm512_maskz_mov_epi32(0xff00, one)
                                           : _mm512_mullo_epi32(_mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3), one);
        return _mm512_sub_epi8(offset, _mm512_shuffle_epi8(own, place));
    }
};

// sums[r * stride + out] for R rows from ``row`` on and the outputs out[0] to out[kOuts - 1], less ``first``.
template <int R, class Source>
void byte_tile(const Source& w, const Bytes& x, int row, const int (&out)[kOuts], int first, int64_t ahead, float* sums,
               int64_t stride) {
    typename Source::template Sums<R> total;
    const char* at = x.row(row);
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
    const auto grouped = [&](auto group) {
        constexpr int kGroup = decltype(group)::value;
        if (w.zeros == nullptr) return with(Int4Codes<kGroup, false>{at, w.scales, nullptr, w.stride, w.in});
        with(Int4Codes<kGroup, true>{at, w.scales, w.zeros, w.stride, w.in});
    };
    if (w.format == Format::kInt8) return with(Int8Bytes{at, w.stride, w.in});
    if (w.group == 32) return grouped(Count<32>{});
    if (w.group == 64) return grouped(Count<64>{});
    grouped(Count<128>{});
}

}  // namespace GPTKERN_ISA
}  // namespace gptkern

#endif  // __AVX512VNNI__
