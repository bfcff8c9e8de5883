// The result of the filters: TokenFilter, the conditions that a token passes, and the distribution over such tokens.
#pragma once

#include "sampling/row.h"
#include "sampling/select.h"

namespace gptkern {
inline namespace GPTKERN_ISA {

// The filters' result: which tokens may be drawn, as conditions that each token fulfils by itself.
struct TokenFilter {
    float v_max;
    double per_unit;       // halvings per unit of logit: log2(e) / T
    uint32_t cut_key;      // top-k and top-p: the last token that passes, by descending value, then ascending id
    uint32_t cut_id;
    uint64_t min_weight;   // min-p, epsilon and eta
    uint32_t spared_key;   // tokens of this value pass whatever their weight
    bool typical;
    double centre;         // typical: the mean of the halvings, and the last token that passes by distance from it
    uint64_t cut_distance;
    uint32_t cut_distance_id;

    GPTKERN_HD uint64_t weight(float v) const { return weight_of(halvings(v_max, v, per_unit)); }

    // The distance from the centre as an ordered key; a token without weight is infinitely far.
    GPTKERN_HD uint64_t distance(float v, uint64_t w) const {
        const double d = halvings(v_max, v, per_unit) - centre;
        return w == 0 ? 0x7FF0000000000000ull : bit_cast<uint64_t>(d < 0 ? -d : d + 0.0);
    }

    // Whether the token may be drawn. Without branches, as the loops over a row must vectorise.
    GPTKERN_HD bool passes(uint32_t id, float v, uint64_t w) const {
        const uint32_t key = order_key(v);
        const bool above = (key > cut_key) | ((key == cut_key) & (id <= cut_id));
        return above & ((w >= min_weight) | (key == spared_key)) & (!typical || near(id, v, w));
    }

    // The token's weight, 0 if it may not be drawn.
    GPTKERN_HD uint64_t weight_if_passing(uint32_t id, float v) const {
        const uint64_t w = weight(v);
        return passes(id, v, w) ? w : 0;
    }

    GPTKERN_HD bool near(uint32_t id, float v, uint64_t w) const {
        const uint64_t d = distance(v, w);
        return (d < cut_distance) | ((d == cut_distance) & (id <= cut_distance_id));
    }
};

// The distribution that a row's token is drawn from: the same in every thread of the team.
struct Distribution {
    Status status;
    bool greedy;
    bool listed;          // the team's list holds every token that passes, and maybe others
    uint32_t token;       // greedy, or drawn
    uint64_t total;       // the sum of the weights of all tokens that pass
    TokenFilter filter;
    const float* values;  // the row with its biases, penalties and bans
};

// The keys of a row's largest value, and of its smallest above -inf; the lowest id that has the largest one, which a
// CPU's team does not say.
struct Extremes {
    uint32_t max_key, min_key, id;
};

// What one thread has seen of them.
struct KeyRange {
    uint32_t high, inverted_low, id;

    GPTKERN_HD void add(uint32_t i, float v) {
        const uint32_t key = order_key(v);
        id = key > high || (key == high && i < id) ? i : id;
        add(v);
    }

    // Without the id, so that a CPU's loop vectorises.
    GPTKERN_HD void add(float v) {
        const uint32_t key = order_key(v);
        high = key > high ? key : high;
        const uint32_t inverted = ~key & (0u - static_cast<uint32_t>(key != kKeyOfMinusInfinity));
        inverted_low = inverted > inverted_low ? inverted : inverted_low;
    }
};

template <class Team>
GPTKERN_HD Extremes extremes(Team& team, uint32_t n, const float* values) {
    KeyRange seen{};
    team.over_values(values, n, [&](uint32_t i, float v) {
        if constexpr (Team::kTiles) {
            seen.add(v);
        } else {
            seen.add(i, v);
        }
    });
    return team.combined(seen);
}

// The sum of the weights that pass a filter, of weights times halvings, and the largest key that passes.
struct Measured {
    uint64_t total, moment;
    uint32_t best;
};

// What a row's largest key says of it.
GPTKERN_HD Status check_largest(uint32_t key) {
    if (key > kKeyOfInfinity) return kNaN;
    if (key == kKeyOfInfinity) return kInfinite;
    if (key <= kKeyOfMinusInfinity) return kNothingAllowed;
    return kOk;
}
GPTKERN_HD Status check_extremes(const Extremes& e) { return check_largest(e.max_key); }

}  // namespace GPTKERN_ISA
}  // namespace gptkern
