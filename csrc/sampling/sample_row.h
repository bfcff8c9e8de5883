// One row's way from logits to a token and its log-probabilities. The CPU and the CUDA path both instantiate it.
#pragma once

#include "sampling/distribution.h"
#include "sampling/logprobs.h"

namespace gptkern {
inline namespace GPTKERN_ISA {

// Writes the distribution; a row that cannot be sampled is all 0.
template <class Team>
GPTKERN_HD void write_probs(Team& team, uint32_t vocab, const Distribution& d, float* probs) {
    if (d.status != kOk) return team.for_each(vocab, [&](uint32_t i) { probs[i] = 0.0f; });
    const TokenFilter filter = d.filter;
    const double scale = 1.0 / static_cast<double>(d.total);
    team.over_values(d.values, vocab, [&](uint32_t i, float v) {
        probs[i] = static_cast<float>(static_cast<double>(filter.weight_if_passing(i, v)) * scale);
    });
}

// Changes the row's count of a token.
GPTKERN_HD void count(const SampleArguments& a, int64_t row, int64_t token, int32_t change) {
    if (a.counts != nullptr) a.counts[row * a.vocab + token] += change;
}

// Advances the row's state by its tokens. With Commit::kOnly they come from the caller and may be anything.
GPTKERN_HD void commit_row(const SampleArguments& a, int64_t row) {
    const int64_t drawn = a.accepted != nullptr ? a.accepted[row] + 1 : 1;
    for (int64_t i = 0; i < drawn && i < a.positions; ++i) {
        const int64_t token = a.tokens[row * a.positions + i];
        if (token >= 0 && token < a.vocab) count(a, row, token, 1);
    }
    a.counters[row].step += drawn;
}

// Writes a token's log-probability under the raw row, and the row's most likely tokens.
template <class Team>
GPTKERN_HD void score(Team& team, const SampleArguments& a, int64_t row_index, const Row& row, const float* raw,
                      const Extremes& extremes, const Distribution& d) {
    LogSoftmax logprob{0, INFINITY};
    if (d.status == kOk) logprob = log_softmax(team, row.vocab, extremes, raw);
    if (team.leads()) a.token_logprobs[row_index] = d.status == kOk ? logprob(raw[d.token]) : -INFINITY;
    const uint32_t n = d.status == kOk ? static_cast<uint32_t>(row.params.n_logprobs) : 0u;
    top_logprobs(team, row.vocab, extremes, raw, logprob, n, static_cast<uint32_t>(a.logprobs),
                 a.top_tokens + row_index * a.logprobs, a.top_logprobs + row_index * a.logprobs);
}

// Samples one row. A row that cannot be sampled gets token 0 and its status.
template <class Team>
GPTKERN_HD void sample_row(Team& team, const SampleArguments& a, int64_t row_index, const Buffers& buffers) {
    const Row row = row_of(a, row_index, 0);
    Status status = check_params(row.params, a.vocab, a.logprobs, a.counts != nullptr);
    Loaded loaded{};
    Extremes raw_extremes{};
    if (status == kOk) {
        loaded = load_row(team, row, buffers, a.logprobs >= 0);
        if (a.logprobs >= 0) {
            raw_extremes = extremes(team, row.vocab, loaded.raw);
            status = check_extremes(raw_extremes);
        }
        if (status == kOk) status = loaded.status;
    }
    const RowCounter* const counter = a.probs == nullptr ? a.counters + row_index : nullptr;
    const Distribution d = distribution(team, row, loaded, status, counter);
    if (a.probs != nullptr) {
        write_probs(team, row.vocab, d, a.probs + row_index * a.vocab);
        if (team.leads()) a.status[row_index] = d.status;
        return;
    }
    if (a.logprobs >= 0) score(team, a, row_index, row, loaded.raw, raw_extremes, d);
    if (team.leads()) {
        a.tokens[row_index] = d.token;
        a.status[row_index] = d.status;
        if (a.commit == Commit::kYes && d.status == kOk) commit_row(a, row_index);
    }
}

}  // namespace GPTKERN_ISA
}  // namespace gptkern
