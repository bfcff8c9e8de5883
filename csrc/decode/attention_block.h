// The two products of attention, by tiles of a few queries and a block of tokens: scores with its keys, and sums of its
// values by their weights. Both add products of one number after another (of one pair after another, in bf16) to every
// sum, so that a sum depends neither on the tile that holds it nor on its neighbours. A score is made of kFours sums:
// the lanes of a key's vectors, four by four, each of all its vectors.
#pragma once

#include <cfloat>

#include "decode/row_groups.h"

namespace gptkern {
inline namespace GPTKERN_ISA {

constexpr int kTokens = 64;  // of a block; blocks of a sequence begin at the multiples of it
constexpr int kPiece = 16;   // of them that are read at once where all heads of a token are read
constexpr int kDown = 6;     // queries of a tile,
constexpr int kAcross = kLanes == 16 ? 4 : 2;  // and vectors: the registers hold so many sums
constexpr int kStrip = kAcross * kLanes;
constexpr int kFours = kLanes / 4;

GPTKERN_HD constexpr int larger(int a, int b) { return a > b ? a : b; }
GPTKERN_HD constexpr int smaller(int a, int b) { return a < b ? a : b; }

// The lanes [first, last) of one vector, and the others of another.
GPTKERN_HD Vec among(int first, int last, Vec inside, Vec outside) {
#ifdef __AVX512F__
    const auto below = [](int lanes) { return (1u << larger(smaller(lanes, kLanes), 0)) - 1; };
    return _mm512_mask_mov_ps(outside, static_cast<__mmask16>(below(last) & ~below(first)), inside);
#else
    const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const __m256i below = _mm256_cmpgt_epi32(_mm256_set1_epi32(last), lanes);
    const __m256i mask = _mm256_andnot_si256(_mm256_cmpgt_epi32(_mm256_set1_epi32(first), lanes), below);
    return _mm256_blendv_ps(outside, inside, _mm256_castsi256_ps(mask));
#endif
}

GPTKERN_HD float largest_of(Vec a) {
#ifdef __AVX512F__
    return _mm512_reduce_max_ps(a);
#else
    __m128 half = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    half = _mm_max_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_max_ss(half, _mm_movehdup_ps(half)));
#endif
}

// Within each four lanes: lane i of vector j goes to lane j of vector i.
GPTKERN_HD void transpose_fours(Vec (&a)[4]) {
#ifdef __AVX512F__
    const auto low = [](Vec x, Vec y) { return _mm512_unpacklo_ps(x, y); };
    const auto high = [](Vec x, Vec y) { return _mm512_unpackhi_ps(x, y); };
    const auto low_pair = [](Vec x, Vec y) { return _mm512_shuffle_ps(x, y, 0x44); };
    const auto high_pair = [](Vec x, Vec y) { return _mm512_shuffle_ps(x, y, 0xee); };
#else
    const auto low = [](Vec x, Vec y) { return _mm256_unpacklo_ps(x, y); };
    const auto high = [](Vec x, Vec y) { return _mm256_unpackhi_ps(x, y); };
    const auto low_pair = [](Vec x, Vec y) { return _mm256_shuffle_ps(x, y, 0x44); };
    const auto high_pair = [](Vec x, Vec y) { return _mm256_shuffle_ps(x, y, 0xee); };
#endif
    const Vec x = low(a[0], a[1]), y = low(a[2], a[3]), z = high(a[0], a[1]), w = high(a[2], a[3]);
    a[0] = low_pair(x, y);
    a[1] = high_pair(x, y);
    a[2] = low_pair(z, w);
    a[3] = high_pair(z, w);
}

// Each four lanes' J-th in all of them.
template <int J>
GPTKERN_HD Vec of_fours(Vec a) {
#ifdef __AVX512F__
    return _mm512_permute_ps(a, J * 0x55);
#else
    return _mm256_permute_ps(a, J * 0x55);
#endif
}

// The sums of a[i]'s fours, in order, are the four lanes of the result from 4 i on.
GPTKERN_HD Vec sums_of_fours(const Vec (&a)[kFours]) {
#ifdef __AVX512F__
    const Vec x = _mm512_shuffle_f32x4(a[0], a[1], 0x44), y = _mm512_shuffle_f32x4(a[2], a[3], 0x44);
    const Vec z = _mm512_shuffle_f32x4(a[0], a[1], 0xee), w = _mm512_shuffle_f32x4(a[2], a[3], 0xee);
    const Vec two = add(_mm512_shuffle_f32x4(x, y, 0x88), _mm512_shuffle_f32x4(x, y, 0xdd));
    return add(add(two, _mm512_shuffle_f32x4(z, w, 0x88)), _mm512_shuffle_f32x4(z, w, 0xdd));
#else
    return add(_mm256_permute2f128_ps(a[0], a[1], 0x20), _mm256_permute2f128_ps(a[0], a[1], 0x31));
#endif
}

// What one multiplication takes of a query, a key, a weight or a value is a unit of 32 bits. Here it is one number.
template <class Kind>
struct Units {
    using Storage = typename Kind::Storage;
    static constexpr int kNumbers = 1;

    GPTKERN_HD static Vec add(Vec sum, Vec one, Vec across) { return fma(one, across, sum); }
    // kLanes units of stored numbers; or of the first of them, then 0.
    GPTKERN_HD static Vec load(const Storage* from) { return gptkern::load(from); }
    GPTKERN_HD static Vec load_some(const Storage* from, int count) { return gptkern::load_some(from, count); }
    // kLanes numbers as units, from the one at ``i`` on, a multiple of kLanes; as they are then.
    GPTKERN_HD static Vec store(float* to, int i, Vec numbers) {
        gptkern::store(to + i, numbers);
        return numbers;
    }
    // The units of kNumbers tokens for each element: of the first alone.
    GPTKERN_HD static void zip(Vec first, Vec, Vec (&zipped)[kNumbers]) { zipped[0] = first; }
    // A unit without the numbers outside [first, last).
    GPTKERN_HD static Vec some(Vec units, int, int) { return units; }
};

#ifdef __AVX512BF16__
// Pairs of bf16.
template <>
struct Units<Bf16> {
    using Storage = uint16_t;
    static constexpr int kNumbers = 2;

    GPTKERN_HD static Vec add(Vec sum, Vec one, Vec across) {
        return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(across), reinterpret_cast<__m512bh>(one));
    }
    GPTKERN_HD static Vec load(const Storage* from) { return _mm512_loadu_ps(from); }
    GPTKERN_HD static Vec load_some(const Storage* from, int count) {
        return count < kStep ? _mm512_castsi512_ps(_mm512_maskz_loadu_epi16((1u << count) - 1, from)) : load(from);
    }
    GPTKERN_HD static Vec store(float* to, int i, Vec numbers) {
        const __m256i rounded = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(numbers));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(reinterpret_cast<uint16_t*>(to) + i), rounded);
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(rounded), 16));
    }
    GPTKERN_HD static void zip(Vec first, Vec second, Vec (&zipped)[kNumbers]) {
        const __m512i low = _mm512_castps_si512(first), high = _mm512_castps_si512(second);
        const __m512i order = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8,  //
                                               39, 7, 38, 6, 37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
        const __m512i later = _mm512_add_epi16(order, _mm512_set1_epi16(16));
        zipped[0] = _mm512_castsi512_ps(_mm512_permutex2var_epi16(low, order, high));
        zipped[1] = _mm512_castsi512_ps(_mm512_permutex2var_epi16(low, later, high));
    }
    GPTKERN_HD static Vec some(Vec units, int first, int last) {
        const __mmask32 mask = (first > 0 ? 0 : 0x55555555) | (last < 2 ? 0 : 0xaaaaaaaa);
        return _mm512_castsi512_ps(_mm512_maskz_mov_epi16(mask, _mm512_castps_si512(units)));
    }
};
#endif

// Units of a block in columns, of a token for keys and of an element for values: strips of kStrip columns.
struct Strips {
    float* at;
    int64_t units;  // of a column

    GPTKERN_HD float* place(int unit, int column) const {
        return at + (column / kStrip * units + unit) * kStrip + column % kStrip;
    }
};

// Rows of numbers: ``stride`` floats from one to the next.
struct Lines {
    float* at;
    int64_t stride;

    GPTKERN_HD float* row(int64_t r) const { return at + r * stride; }
    GPTKERN_HD Lines from(int64_t r) const { return {row(r), stride}; }
};

// A head's keys of some tokens, 1 to kTokens, each of ``dim`` numbers. What fills the last vectors is of no meaning.
template <class Kind>
void take_keys(const typename Kind::Storage* from, const int64_t* slots, int tokens, int dim, const Strips& to) {
    using U = Units<Kind>;
    constexpr int kNumbers = kLanes * U::kNumbers;
    for (int t = 0; t < tokens; t += kLanes) {
        const typename Kind::Storage* at[kLanes];
        for (int j = 0; j < kLanes; ++j) at[j] = from + slots[smaller(t + j, tokens - 1)];
        for (int i = 0; i < dim; i += kNumbers) {
            Vec units[kLanes];
            if (i + kNumbers <= dim) {
#pragma GCC unroll 16
                for (int j = 0; j < kLanes; ++j) units[j] = U::load(at[j] + i);
            } else {
                for (int j = 0; j < kLanes; ++j) units[j] = U::load_some(at[j] + i, dim - i);
            }
            transpose(units);
            float* const place = to.place(i / U::kNumbers, t);
#pragma GCC unroll 16
            for (int j = 0; j < kLanes; ++j) store(place + j * kStrip, units[j]);
        }
    }
}

// Units of the values of kNumbers tokens, from the element ``i`` on: as many as kLanes units of a token have numbers.
template <class Kind, int N>
GPTKERN_HD void values_of(const typename Kind::Storage* first, const typename Kind::Storage* last, int i, int dim,
                          Vec (&zipped)[N]) {
    using U = Units<Kind>;
    if (i + kLanes * N <= dim) {
        U::zip(U::load(first + i), U::load(last + i), zipped);
    } else {
        U::zip(U::load_some(first + i, dim - i), U::load_some(last + i, dim - i), zipped);
    }
}

// A head's values of some tokens.
template <class Kind>
void take_values(const typename Kind::Storage* from, const int64_t* slots, int tokens, int dim, const Strips& to) {
    constexpr int N = Units<Kind>::kNumbers;
    for (int t = 0; t < tokens; t += N) {
        const typename Kind::Storage* const first = from + slots[t];
        const typename Kind::Storage* const last = from + slots[smaller(t + N, tokens) - 1];
        for (int i = 0; i < dim; i += kLanes * N) {
            Vec zipped[N];
            values_of<Kind>(first, last, i, dim, zipped);
            for (int c = 0; c < N; ++c) store(to.place(t / N, i + c * kLanes), zipped[c]);
        }
    }
}

// total += products of R rows' unit u with C vectors of a strip.
template <class Kind, int R, int C>
GPTKERN_HD void add_unit(const Lines& rows, const float* strip, int u, Vec (&total)[R][C]) {
    Vec across[C];
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) across[c] = load(strip + u * kStrip + c * kLanes);
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) {
        const Vec one = all(rows.row(r)[u]);
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) total[r][c] = Units<Kind>::add(total[r][c], one, across[c]);
    }
}

// sums += products of R rows' units [first, last) with C vectors of a strip.
template <class Kind, int R, int C>
void add_strip(const Lines& rows, const float* strip, int first, int last, const Lines& sums) {
    Vec total[R][C];
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) total[r][c] = load(sums.row(r) + c * kLanes);
    }
    for (int u = first; u < last; ++u) add_unit<Kind, R, C>(rows, strip, u, total);
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) store(sums.row(r) + c * kLanes, total[r][c]);
    }
}

// The scores of R queries with C vectors of a strip of keys, of so many units.
template <class Kind, int R, int C>
void score_strip(const Lines& queries, const float* strip, int units, const Lines& scores) {
    for (int four = 0; four < kLanes; four += 4) {
        Vec total[R][C];
#pragma GCC unroll 6
        for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
            for (int c = 0; c < C; ++c) total[r][c] = zeros();
        }
        for (int first = four; first < units; first += kLanes) {
            for (int u = first; u < first + 4; ++u) add_unit<Kind, R, C>(queries, strip, u, total);
        }
#pragma GCC unroll 6
        for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
            for (int c = 0; c < C; ++c) {
                float* const to = scores.row(r) + c * kLanes;
                store(to, four == 0 ? total[r][c] : add(load(to), total[r][c]));
            }
        }
    }
}

// use(strip, its first column, its vectors as a constant) for the columns [0, columns), and those of their last vector.
template <class Use>
void for_strips(const Strips& block, int columns, const Use& use) {
    for (int column = 0; column < columns; column += kStrip) {
        const float* const strip = block.place(0, column);
        switch ((columns - column + kLanes - 1) / kLanes) {
            case 1: use(strip, column, Count<1>{}); break;
            case 2: use(strip, column, Count<2>{}); break;
            case 3: use(strip, column, Count<smaller(3, kAcross)>{}); break;
            default: use(strip, column, Count<kAcross>{});
        }
    }
}

// sums += products of R rows' units [first, last) with all strips.
template <class Kind, int R>
void add_products(const Lines& rows, const Strips& block, int first, int last, int columns, const Lines& sums) {
    for_strips(block, columns, [&](const float* strip, int column, auto vectors) {
        const Lines to{sums.at + column, sums.stride};
        add_strip<Kind, R, decltype(vectors)::value>(rows, strip, first, last, to);
    });
}

// The scores of R queries with the keys of ``tokens`` tokens.
template <class Kind, int R>
void score(const Lines& queries, const Strips& keys, int dim, int tokens, const Lines& scores) {
    constexpr int kNumbers = kLanes * Units<Kind>::kNumbers;
    const int units = (dim + kNumbers - 1) / kNumbers * kLanes;
    for_strips(keys, tokens, [&](const float* strip, int column, auto vectors) {
        const Lines to{scores.at + column, scores.stride};
        score_strip<Kind, R, decltype(vectors)::value>(queries, strip, units, to);
    });
}

// The tokens [first, last) of a block, or of a part of it, that a query sees; none: both are 0.
struct Seen {
    int first, last;

    GPTKERN_HD Seen within(int from, int count) const {
        const Seen part{larger(first - from, 0), smaller(last - from, count)};
        return part.first < part.last ? part : Seen{0, 0};
    }
    // Numbers of the tokens from ``i`` on where they are seen, and the rest of another vector.
    GPTKERN_HD Vec of(int i, Vec numbers, Vec rest) const {
        return first <= i && i + kLanes <= last ? numbers : among(first - i, last - i, numbers, rest);
    }
};

// What R queries see that see the same.
template <int R>
struct SeenAlike {
    Seen at[R];

    explicit SeenAlike(Seen seen) {
        for (Seen& each : at) each = seen;
    }
};

// A query's sums += its weights times the values of tokens that it sees, which need not be whole units.
template <class Kind>
void add_values(const Lines& weights, const Strips& values, Seen seen, int dim, const Lines& sums) {
    constexpr int kNumbers = Units<Kind>::kNumbers;
    const auto part = [&](int unit, int from, int to) {
        for (int i = 0; i < dim; i += kLanes) {
            const Vec across = Units<Kind>::some(load(values.place(unit, i)), from, to);
            store(sums.at + i, Units<Kind>::add(load(sums.at + i), all(weights.at[unit]), across));
        }
    };
    if (seen.first >= seen.last) return;
    int unit = seen.first / kNumbers;
    const int last = seen.last / kNumbers;
    if (seen.first % kNumbers != 0) part(unit++, seen.first % kNumbers, kNumbers);
    if (unit < last) add_products<Kind, 1>(weights, values, unit, last, dim, sums);
    if (seen.last % kNumbers != 0) part(last, 0, seen.last % kNumbers);
}

// The same of R queries: what all of them see, at once. No query takes a value that it does not see, not even by a
// weight of 0, which a value that is not finite would make a NaN of.
template <class Kind, int R>
void add_values(const Lines& weights, const Strips& values, const Seen* seen, int dim, const Lines& sums) {
    constexpr int kNumbers = Units<Kind>::kNumbers;
    int first = 0, last = kTokens;
    for (int r = 0; r < R; ++r) {
        first = larger(first, seen[r].first);
        last = smaller(last, seen[r].last);
    }
    const int from = (first + kNumbers - 1) / kNumbers, to = last / kNumbers;
    for (int r = 0; r < R; ++r) {
        const int end = from < to ? from * kNumbers : seen[r].last;
        add_values<Kind>(weights.from(r), values, {seen[r].first, end}, dim, sums.from(r));
    }
    if (from >= to) return;
    add_products<Kind, R>(weights, values, from, to, dim, sums);
    for (int r = 0; r < R; ++r) {
        add_values<Kind>(weights.from(r), values, {to * kNumbers, seen[r].last}, dim, sums.from(r));
    }
}

// One query's sums += its weights times the values that it sees: the elements from ``i`` on, as many as V vectors of
// units have. Several hide how long an addition takes.
template <class Kind, int V>
GPTKERN_HD void add_some_values(const float* weights, const typename Kind::Storage* from, const int64_t* slots,
                                int tokens, Seen seen, int i, int dim, float* sums) {
    using U = Units<Kind>;
    constexpr int N = U::kNumbers, kNumbers = kLanes * N;
    Vec total[V][N];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
        for (int c = 0; c < N; ++c) total[v][c] = load(sums + i + v * kNumbers + c * kLanes);
    }
    const auto take = [&](int t, const auto& seen_of) {
        const typename Kind::Storage* const first = from + slots[t];
        const typename Kind::Storage* const last = from + slots[smaller(t + N, tokens) - 1];
        const Vec weight = all(weights[t / N]);
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) {
            Vec zipped[N];
            values_of<Kind>(first, last, i + v * kNumbers, dim, zipped);
            for (int c = 0; c < N; ++c) total[v][c] = U::add(total[v][c], weight, seen_of(zipped[c]));
        }
    };
    const auto take_some = [&](int t) {
        const Seen part = seen.within(t, N);
        take(t, [&](Vec units) { return U::some(units, part.first, part.last); });
    };
    int t = seen.first / N * N;
    if (t < seen.first) {
        take_some(t);
        t += N;
    }
    for (; t + N <= seen.last; t += N) take(t, [](Vec units) { return units; });
    if (t < seen.last) take_some(t);
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
        for (int c = 0; c < N; ++c) store(sums + i + v * kNumbers + c * kLanes, total[v][c]);
    }
}

// One query's sums += its weights times the values that it sees: what take_values and add_values give, without a strip
// between the two.
template <class Kind>
void add_values_alone(const float* weights, const typename Kind::Storage* from, const int64_t* slots, int tokens,
                      Seen seen, int dim, float* sums) {
    constexpr int kNumbers = kLanes * Units<Kind>::kNumbers, V = 4 / Units<Kind>::kNumbers;
    int i = 0;
    for (; i + V * kNumbers <= dim; i += V * kNumbers) {
        add_some_values<Kind, V>(weights, from, slots, tokens, seen, i, dim, sums);
    }
    for (; i < dim; i += kNumbers) add_some_values<Kind, 1>(weights, from, slots, tokens, seen, i, dim, sums);
}

// The scores of one query with a head's keys of some tokens: those that ``take_keys`` and ``score`` give, without a
// strip between the two.
template <class Kind>
void score_alone(const float* query, const typename Kind::Storage* from, const int64_t* slots, int tokens, int dim,
                 float* scores) {
    using U = Units<Kind>;
    constexpr int kNumbers = kLanes * U::kNumbers;
    for (int t = 0; t < tokens; t += kLanes) {
        Vec total[kFours];
#pragma GCC unroll 4
        for (int f = 0; f < kFours; ++f) total[f] = zeros();
        for (int i = 0; i < dim; i += kNumbers) {
            const Vec own = load(query + i / U::kNumbers);
            const Vec one[4] = {of_fours<0>(own), of_fours<1>(own), of_fours<2>(own), of_fours<3>(own)};
#pragma GCC unroll 4
            for (int f = 0; f < kFours; ++f) {
                Vec units[4];
#pragma GCC unroll 4
                for (int j = 0; j < 4; ++j) {
                    const typename Kind::Storage* const at = from + slots[smaller(t + 4 * f + j, tokens - 1)] + i;
                    units[j] = i + kNumbers <= dim ? U::load(at) : U::load_some(at, dim - i);
                }
                transpose_fours(units);
#pragma GCC unroll 4
                for (int j = 0; j < 4; ++j) total[f] = U::add(total[f], one[j], units[j]);
            }
        }
        store(scores + t, sums_of_fours(total));
    }
}

// The largest score that a query sees, or ``least`` if none is larger.
GPTKERN_HD float top_score(const float* scores, Seen seen, float least) {
    Vec top = all(least);
    for (int i = 0; i < seen.last; i += kLanes) top = larger(top, seen.of(i, load(scores + i), all(least)));
    return largest_of(top);
}

// The weights of a query, in place of its scores: powers of e relative to ``top``, 0 where it sees nothing. Returned is
// their sum over lanes, as they are rounded.
template <class Kind>
GPTKERN_HD Vec weigh(float* scores, Seen seen, float top) {
    Vec total = zeros();
    for (int i = 0; i < seen.last; i += kLanes) {
        const Vec weights = seen.of(i, exponential(sub(load(scores + i), all(top))), zeros());
        total = add(total, Units<Kind>::store(scores, i, weights));
    }
    return total;
}

}  // namespace GPTKERN_ISA
}  // namespace gptkern
