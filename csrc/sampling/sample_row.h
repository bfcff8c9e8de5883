// One row's way from logits to a token and its log-probabilities. The CPU and the CUDA path both instantiate it.
#pragma once

#include "sampling/draw.h"
#include "sampling/logprobs.h"
#include "sampling/philox.h"

namespace gptkern {
inline namespace GPTKERN_ISA {

// Writes the distribution; a row that cannot be sampled is all 0.
template <class Team>
GPTKERN_HD void write_probs(Team& team, uint32_t vocab, const Distribution& d, const float* values, float* probs) {
    const TokenFilter filter = d.filter;
    const double scale = d.status == kOk ? 1.0 / static_cast<double>(d.total) : 0.0;
    team.for_each(vocab, [&](uint32_t i) {
        const uint64_t w = filter.weight(values[i]);
        const bool passes = scale > 0 && filter.passes(i, values[i], w);
        probs[i] = passes ? static_cast<float>(static_cast<double>(w) * scale) : 0.0f;
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

// Samples one row. A row that cannot be sampled gets token 0 and its status.
template <class Team>
GPTKERN_HD void sample_row(Team& team, const SampleArguments& a, int64_t row_index, const Buffers& buffers) {
    const uint32_t vocab = static_cast<uint32_t>(a.vocab);
    const float* const raw = in_fp32(team, a.logits, a.dtype, row_index * a.row_stride, vocab, buffers.widened);
    const Row row = row_of(a, row_index, 0, raw);
    const RowCounter counter = a.counters[row_index];
    Status status = check_params(row.params, a.vocab, a.logprobs, a.counts != nullptr);
    Extremes raw_extremes{};
    if (status == kOk && a.logprobs >= 0) {
        raw_extremes = extremes(team, row.vocab, row.raw);
        status = check_extremes(raw_extremes);
    }
    const Distribution d = distribution(team, row, buffers.values, status);
    if (a.probs != nullptr) {
        write_probs(team, row.vocab, d, d.values, a.probs + row_index * a.vocab);
        if (team.leads()) a.status[row_index] = d.status;
        return;
    }
    uint32_t token = 0;
    if (d.status == kOk) {
        const uint64_t uniform = uniforms(counter.seed, counter.request, counter.step).token;
        token = draw(team, row.vocab, d, d.values, uniform);
    }
    if (a.logprobs >= 0) {
        LogSoftmax logprob{0, INFINITY};
        if (d.status == kOk) logprob = log_softmax(team, row.vocab, raw_extremes, row.raw);
        if (team.leads()) a.token_logprobs[row_index] = d.status == kOk ? logprob(row.raw[token]) : -INFINITY;
        const uint32_t n = d.status == kOk ? static_cast<uint32_t>(row.params.n_logprobs) : 0u;
        top_logprobs(team, row.vocab, raw_extremes, row.raw, logprob, n, static_cast<uint32_t>(a.logprobs),
                     a.top_tokens + row_index * a.logprobs, a.top_logprobs + row_index * a.logprobs);
    }
    if (team.leads()) {
        a.tokens[row_index] = token;
        a.status[row_index] = d.status;
        if (a.commit == Commit::kYes && d.status == kOk) commit_row(a, row_index);
    }
}

}  // namespace GPTKERN_ISA
}  // namespace gptkern
