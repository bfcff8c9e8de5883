// Rejection sampling of drafted tokens (Leviathan, Kalman, Matias: "Fast inference from transformers via
// speculative decoding", ICML 2023; Chen et al. 2023): whatever the draft, the resulting tokens have the target's
// distribution.
#pragma once

#include "sampling/sample_row.h"

namespace gptkern {
inline namespace GPTKERN_ISA {

// A probability in units of 2^-44.
GPTKERN_HD uint64_t fixed_probability(double p) {
    return static_cast<uint64_t>((p < 1 ? (p > 0 ? p : 0.0) : 1.0) * static_cast<double>(kMaxWeight));
}

// The draft at one position: its token, and its distribution; null if it was certain of the token.
struct Draft {
    int64_t token;
    const float* probs;

    GPTKERN_HD double probability(uint32_t id) const {
        if (probs != nullptr) return static_cast<double>(probs[id]);
        return static_cast<int64_t>(id) == token ? 1.0 : 0.0;
    }
};

// Acceptance with probability min(1, p / q): u q < p.
GPTKERN_HD bool accepts(double p, double q, uint64_t uniform) {
    const double u = static_cast<double>(uniform >> 11) * 0x1p-53;
    return u * q < p;
}

// A token of the distribution, or of its residual against the draft: max(p - q, 0) normalised. ``uniform`` are 64
// random bits.
template <class Team>
GPTKERN_HD uint32_t draw(Team& team, uint32_t vocab, const Distribution& d, const Draft& draft, bool residual,
                         uint64_t uniform) {
    const TokenFilter filter = d.filter;
    const double scale = 1.0 / static_cast<double>(d.total);
    const auto weight = [&](uint32_t id, float v) {
        const uint64_t w = filter.weight_if_passing(id, v);
        if (!residual) return w;
        const uint64_t p = fixed_probability(static_cast<double>(w) * scale);
        const uint64_t q = fixed_probability(draft.probability(id));
        return p > q ? p - q : 0;
    };
    uint64_t total = d.total;
    if (residual) {
        uint64_t rest = 0;
        team.over_values(d.values, vocab, [&](uint32_t id, float v) { rest += weight(id, v); });
        rest = team.sum(rest);
        // A rejection with an empty residual can only come from rounding: p and q are then the same.
        residual = rest != 0;
        total = residual ? rest : total;
    }
    if (!residual && d.greedy) return d.token;
    uint64_t target = multiply_high(uniform, total);
    if (!d.listed || residual) {
        const int shift = id_shift(vocab);
        const auto bin = [&](uint32_t id, float) { return static_cast<int>(id >> shift); };
        target -= select_bin(team, d.values, vocab, bin, weight, target, false).before;
    }
    const Selection chosen = team.inner([&](auto& inner) {
        const auto no_key = [](uint32_t) { return uint64_t{0}; };
        const auto weight_of_id = [&](uint32_t id) { return weight(id, d.values[id]); };
        return select_in_list(inner, team.list(), team.list_length(), 0, no_key, weight_of_id, target);
    });
    return chosen.id;
}

GPTKERN_HD Status check_draft(const SampleArguments& a, int64_t row, int64_t drafted) {
    if (drafted < 0 || drafted >= a.positions) return kBadDraftLength;
    for (int i = 0; i < drafted; ++i) {
        const int64_t token = a.draft_tokens[row * (a.positions - 1) + i];
        if (token < 0 || token >= a.vocab) return kBadDraft;
    }
    return kOk;
}

// A NaN would accept nothing and leave no residual: the row is refused, as one with NaN logits is.
template <class Team>
GPTKERN_HD Status check_draft_probs(Team& team, uint32_t vocab, const float* probs) {
    uint64_t bad = 0;
    team.for_each(vocab, [&](uint32_t i) { bad += probs[i] >= 0.0f && probs[i] <= 1e30f ? 0 : 1; });
    return team.sum(bad) != 0 ? kBadDraftProbs : kOk;
}

// Verifies one row's draft: its first draft_lengths[row] tokens. tokens[row] becomes the accepted tokens, one more of
// the target's own, then -1; what stands at later positions is not read.
// A row that cannot be sampled accepts nothing and gets token 0 and its status.
template <class Team>
GPTKERN_HD void speculate_row(Team& team, const SampleArguments& a, int64_t row_index, const Buffers& buffers) {
    const RowCounter& counter = a.counters[row_index];  // not a copy, as a row's parameters are none
    const int64_t length = a.draft_lengths != nullptr ? a.draft_lengths[row_index] : a.positions - 1;
    const int drafted = static_cast<int>(length);
    int64_t* tokens = a.tokens + row_index * a.positions;
    Status status = check_params(a.params[row_index], a.vocab, -1, a.counts != nullptr);
    if (status == kOk) status = check_draft(a, row_index, length);
    if (team.leads()) {
        for (int i = 0; i < a.positions; ++i) tokens[i] = -1;
    }
    int emitted = 0;
    for (int position = 0;; ++position) {
        const Row row = row_of(a, row_index, position);
        if (status == kOk && a.draft_probs != nullptr && position < drafted) {
            status = check_draft_probs(team, row.vocab, a.draft_probs + (row_index * (a.positions - 1) + position) * a.vocab);
        }
        Loaded loaded{};
        if (status == kOk) {
            loaded = load_row(team, row, buffers, false);
            status = loaded.status;
        }
        const Distribution d = distribution(team, row, loaded, status, nullptr);
        const float* const values = d.values;
        status = d.status;
        if (status != kOk) break;
        const Uniforms u = uniforms(counter.seed, counter.request, counter.step + position);
        uint32_t token = 0;
        bool accepted = false;
        const bool has_draft = position < drafted;
        Draft draft{};
        if (has_draft) {
            const int64_t at = row_index * (a.positions - 1) + position;
            draft = {a.draft_tokens[at], a.draft_probs ? a.draft_probs + at * a.vocab : nullptr};
            token = static_cast<uint32_t>(draft.token);
            const uint64_t w = d.filter.weight(values[token]);
            const bool passes = d.filter.passes(token, values[token], w);
            const double p = passes ? static_cast<double>(w) / static_cast<double>(d.total) : 0.0;
            accepted = accepts(p, draft.probability(token), u.accept);
        }
        if (!accepted) token = draw(team, row.vocab, d, draft, has_draft, u.token);
        if (team.leads()) {
            tokens[position] = token;
            count(a, row_index, token, 1);
        }
        team.sync();  // the next position's penalties count this token
        ++emitted;
        if (!accepted) break;  // as after the last draft
    }
    if (!team.leads()) return;
    for (int i = 0; i < emitted; ++i) count(a, row_index, tokens[i], -1);
    if (status != kOk) {
        for (int i = 0; i < a.positions; ++i) tokens[i] = i == 0 ? 0 : -1;
    }
    a.accepted[row_index] = status == kOk ? emitted - 1 : 0;
    a.status[row_index] = status;
    if (a.commit == Commit::kYes && status == kOk) commit_row(a, row_index);
}

}  // namespace GPTKERN_ISA
}  // namespace gptkern
