// The draw: the inverse of the cumulative distribution, by ascending token id, at a random number.
#pragma once

#include "sampling/distribution.h"

namespace gptkern {
inline namespace GPTKERN_ISA {

// The token at which the running sum of weight(id), by ascending id, passes target.
template <class Team, class Weight>
GPTKERN_HD uint32_t select_by_id(Team& team, uint32_t vocab, bool listed, Weight weight, uint64_t target) {
    uint64_t before = 0;
    if (!listed) {
        int shift = 0;
        while ((vocab - 1) >> shift >= static_cast<uint32_t>(kCoarseBins)) ++shift;
        const auto bin = [&](uint32_t i) { return static_cast<int>(i >> shift); };
        before = select_bin(team, vocab, bin, weight, target, false).before;
    }
    const Selection chosen = team.inner([&](auto& inner) {
        const auto no_key = [](uint32_t) { return uint64_t{0}; };
        return select_in_list(inner, team.list(), team.list_length(), 0, no_key, weight, target - before);
    });
    return chosen.id;
}

// A token of the distribution. ``uniform`` are 64 random bits.
template <class Team>
GPTKERN_HD uint32_t draw(Team& team, uint32_t vocab, const Distribution& d, const float* values, uint64_t uniform) {
    if (d.greedy) return d.best;
    const TokenFilter filter = d.filter;
    const auto weight = [&](uint32_t id) { return filter.weight_if_passing(id, values[id]); };
    return select_by_id(team, vocab, d.listed, weight, multiply_high(uniform, d.total));
}

}  // namespace GPTKERN_ISA
}  // namespace gptkern
