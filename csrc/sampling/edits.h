// The edits of a row before temperature: logit bias; repetition, frequency and presence penalty; bans (the list
// of banned ids, EOS before the minimum length, the bitmask).
//
// One pass over the vocabulary: penalties and the bitmask, token by token, are what a team's ``rewrite`` does. The
// listed ids come after it. Every member of the team does so for its part of the row alone, so that nobody waits.
#pragma once

#include "sampling/row.h"
#include "sampling/token_filter.h"

namespace gptkern {
inline namespace GPTKERN_ISA {

// A logit after repetition, frequency and presence penalty; ``count`` is the token's entry in counts.
GPTKERN_HD float penalised(float v, int32_t count, float repetition, float presence, float frequency) {
    if (count == 0) return v;
    const float repeated = v < 0 ? v * repetition : v / repetition;
    const int32_t generated = count & ~kInPrompt;
    if (generated == 0) return repeated;
    return (repeated - frequency * static_cast<float>(generated)) - presence;
}

// The edits that every token is asked for.
struct DenseEdits {
    const int32_t* counts;   // null: no penalties
    float repetition, presence, frequency;
    const int32_t* bitmask;  // null: every token is allowed

    GPTKERN_HD float penalise(float v, int32_t count) const {
        return penalised(v, count, repetition, presence, frequency);
    }

    GPTKERN_HD bool allows(uint32_t id) const { return static_cast<uint32_t>(bitmask[id / 32]) >> (id % 32) & 1u; }

    // One token's logit, for whoever edits few.
    GPTKERN_HD float operator()(float v, uint32_t id) const {
        if (counts != nullptr) v = penalise(v, counts[id]);
        return bitmask == nullptr || allows(id) ? v : -INFINITY;
    }
};

GPTKERN_HD DenseEdits dense_edits(const Row& row) {
    const RowParams& p = row.params;
    return {has_penalties(p) ? row.counts : nullptr, static_cast<float>(p.repetition_penalty),
            static_cast<float>(p.presence_penalty), static_cast<float>(p.frequency_penalty), row.bitmask};
}

GPTKERN_HD bool bans_eos(const Row& row) {
    return row.n_eos > 0 && static_cast<double>(row.step) < row.params.min_new_tokens;
}

// Whether listed ids are edited.
GPTKERN_HD bool is_listed(const Row& row) { return row.n_bias > 0 || row.n_banned > 0 || bans_eos(row); }

// Whether anything is done to the row before temperature.
GPTKERN_HD bool is_edited(const Row& row) {
    return has_penalties(row.params) || row.bitmask != nullptr || is_listed(row);
}

// Calls change(id, index) for every id of a padded list that lies in this member's part of the row. True if the list
// holds an id that is outside the vocabulary.
template <class Team, class Change>
GPTKERN_HD bool each_listed(Team& team, const int32_t* ids, uint32_t n, uint32_t vocab, Change change) {
    bool outside = false;
    team.for_each_here(n, [&](uint32_t i) {
        const int32_t id = ids[i];
        if (id == -1) return;
        if (id < 0 || static_cast<uint32_t>(id) >= vocab) {
            outside = true;
        } else if (team.owns(static_cast<uint32_t>(id), vocab)) {
            change(static_cast<uint32_t>(id), i);
        }
    });
    return outside;
}

// The edits of listed ids, in this member's part of the rewritten row. A row's biased ids are distinct.
template <class Team>
GPTKERN_HD Status edit_listed(Team& team, const Row& row, const DenseEdits& dense, float* values) {
    bool outside = false;
    if (row.n_bias > 0) {
        outside = each_listed(team, row.bias_ids, row.n_bias, row.vocab, [&](uint32_t id, uint32_t i) {
            values[id] = dense(row.logits[id] + row.bias_values[i], id);
        });
        team.sync_here();
    }
    const auto ban = [&](uint32_t id, uint32_t) { values[id] = -INFINITY; };
    if (row.n_banned > 0) outside |= each_listed(team, row.banned_ids, row.n_banned, row.vocab, ban);
    if (bans_eos(row)) outside |= each_listed(team, row.eos_ids, row.n_eos, row.vocab, ban);
    return team.any_here(outside) ? kBadTokenId : kOk;
}

// A team's buffers, of vocab floats each: the edited row, and the logits in fp32.
struct Buffers {
    float *values, *widened;
};

// A row as it is drawn from.
struct Loaded {
    Status status;
    const float* raw;     // the logits in fp32 before any edit; null unless asked for
    const float* values;  // after the edits
    bool has_extremes;
    Extremes extremes;    // of values
};

// Logits in fp32: where they are, or widened into the buffer.
template <class Team>
GPTKERN_HD const float* in_fp32(Team& team, const Logits& logits, uint32_t n, float* buffer) {
    team.begin_row(logits, n);
    if (logits.dtype == DType::kFloat32) return static_cast<const float*>(logits.at);
    float* const widened = team.placed(buffer, logits);
    team.rewrite(logits, n, DenseEdits{}, widened, nullptr);
    team.sync_after_rewrite();
    return widened;
}

template <class Team>
GPTKERN_HD Loaded load_row(Team& team, const Row& row, const Buffers& buffers, bool wants_raw) {
    team.begin_row(row.logits, row.vocab);
    const bool edited = is_edited(row), in_place = row.logits.dtype == DType::kFloat32;
    const float* const logits = in_place ? static_cast<const float*>(row.logits.at) : nullptr;
    Loaded loaded{kOk, wants_raw ? logits : nullptr, logits, false, {}};
    if (!edited && in_place) return loaded;
    float* const widened = wants_raw && !in_place ? team.placed(buffers.widened, row.logits) : nullptr;
    float* const values = edited || widened == nullptr ? team.placed(buffers.values, row.logits) : nullptr;
    const DenseEdits dense = dense_edits(row);
    const KeyRange seen = team.rewrite(row.logits, row.vocab, dense, widened, values);
    if (widened != nullptr) loaded.raw = widened;
    loaded.values = values != nullptr ? values : widened;
    if (is_listed(row)) {
        team.sync_here();
        loaded.status = edit_listed(team, row, dense, values);
    } else if (Team::kRewriteSees && values != nullptr) {
        loaded.has_extremes = true;
        loaded.extremes = team.combined(seen);
    }
    team.sync_after_rewrite();
    return loaded;
}

}  // namespace GPTKERN_ISA
}  // namespace gptkern
