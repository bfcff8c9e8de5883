// The edits of a row before temperature: logit bias; repetition, frequency and presence penalty; bans (the list
// of banned ids, EOS before the minimum length, the bitmask).
#pragma once

#include "sampling/row.h"

namespace gptkern {
inline namespace GPTKERN_ISA {

// Sets values[id] = change(values[id], index) for every id of a padded list. False if the list holds an id
// that is outside the vocabulary.
template <class Team, class Change>
GPTKERN_HD bool edit(Team& team, const int32_t* ids, uint32_t n, uint32_t vocab, float* values, Change change) {
    uint32_t outside = 0;
    team.for_each(n, [&](uint32_t i) {
        const int32_t id = ids[i];
        if (id == -1) return;
        if (id < 0 || static_cast<uint32_t>(id) >= vocab) {
            outside = 1;
        } else {
            values[id] = change(values[id], i);
        }
    });
    return team.max(outside) == 0;
}

// A logit after repetition, frequency and presence penalty; ``count`` is the token's entry in counts.
GPTKERN_HD float penalised(float v, int32_t count, float repetition, float presence, float frequency) {
    if (count == 0) return v;
    const float repeated = v < 0 ? v * repetition : v / repetition;
    const int32_t generated = count & ~kInPrompt;
    if (generated == 0) return repeated;
    return (repeated - frequency * static_cast<float>(generated)) - presence;
}

// Whether anything is done to the row before temperature. If not, the row is not copied.
GPTKERN_HD bool is_edited(const Row& row) {
    const bool early = row.n_eos > 0 && static_cast<double>(row.step) < row.params.min_new_tokens;
    return has_penalties(row.params) || early || row.n_bias > 0 || row.n_banned > 0 || row.bitmask != nullptr;
}

// Copies the row to ``values`` and applies biases, penalties and bans there.
template <class Team>
GPTKERN_HD Status edit_row(Team& team, const Row& row, float* values) {
    constexpr float kBanned = -INFINITY;
    const RowParams& p = row.params;
    const float* raw = row.raw;
    team.for_each(row.vocab, [=](uint32_t i) { values[i] = raw[i]; });
    bool ids_are_known = true;
    team.sync();
    // Logit bias.
    if (row.n_bias > 0) {
        ids_are_known &= edit(team, row.bias_ids, row.n_bias, row.vocab, values,
                              [&](float v, uint32_t i) { return v + row.bias_values[i]; });
    }
    // Penalties.
    if (has_penalties(p)) {
        const float repetition = static_cast<float>(p.repetition_penalty);
        const float presence = static_cast<float>(p.presence_penalty);
        const float frequency = static_cast<float>(p.frequency_penalty);
        team.for_each(row.vocab, [&](uint32_t i) {
            values[i] = penalised(values[i], row.counts[i], repetition, presence, frequency);
        });
        team.sync();
    }
    // Banned tokens, and EOS while the sequence is too short.
    const auto ban = [](float, uint32_t) { return kBanned; };
    if (row.n_banned > 0) ids_are_known &= edit(team, row.banned_ids, row.n_banned, row.vocab, values, ban);
    if (row.n_eos > 0 && static_cast<double>(row.step) < p.min_new_tokens) {
        ids_are_known &= edit(team, row.eos_ids, row.n_eos, row.vocab, values, ban);
    }
    // The bitmask of a grammar or another constraint.
    if (row.bitmask != nullptr) {
        team.for_each(row.vocab, [&](uint32_t i) {
            const bool allowed = static_cast<uint32_t>(row.bitmask[i / 32]) >> (i % 32) & 1u;
            values[i] = allowed ? values[i] : kBanned;
        });
        team.sync();
    }
    return ids_are_known ? kOk : kBadTokenId;
}

}  // namespace GPTKERN_ISA
}  // namespace gptkern
