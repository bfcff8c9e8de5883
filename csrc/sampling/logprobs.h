// Log-probabilities of the raw row, and its most likely tokens.
#pragma once

#include <cmath>

#include "sampling/edits.h"
#include "sampling/select.h"
#include "sampling/token_filter.h"

namespace gptkern {
inline namespace GPTKERN_ISA {

// log-softmax of the raw row: v - max - ln(sum).
struct LogSoftmax {
    float v_max;
    double log_total;

    GPTKERN_HD float operator()(float v) const {
        const double below = static_cast<double>(v) - static_cast<double>(v_max);
        return static_cast<float>(below - log_total);
    }
};

template <class Team>
GPTKERN_HD LogSoftmax log_softmax(Team& team, uint32_t vocab, const Extremes& e, const float* raw) {
    const float v_max = from_order_key(e.max_key);
    // Summed in two halves: with more than kMaxVocab tokens the sum of whole weights would overflow.
    uint64_t high = 0, low = 0;
    team.over_values(raw, vocab, [&](uint32_t, float v) {
        const uint64_t weight = weight_of(halvings(v_max, v, kLog2E));
        high += weight >> 32;
        low += weight & 0xFFFFFFFFu;
    });
    high = team.sum(high);
    low = team.sum(low);
    const double total = static_cast<double>(high) * 0x1p32 + static_cast<double>(low);
    return {v_max, std::log(total / static_cast<double>(kMaxWeight))};
}

// The n most likely tokens of the raw row, most likely first, ties by the lower id, padded with -1 up to width.
template <class Team>
GPTKERN_HD void top_logprobs(Team& team, uint32_t vocab, const Extremes& e, const float* raw,
                             const LogSoftmax& logprob, uint32_t n, uint32_t width, int64_t* tokens, float* logprobs) {
    team.for_each(width, [&](uint32_t i) {
        tokens[i] = -1;
        logprobs[i] = -INFINITY;
    });
    team.sync();
    if (n == 0) return;
    // List the bins that hold the n most likely, and find the last of these.
    const DownwardBins bins = downward_bins(logprob.v_max, from_order_key(e.min_key), 64.0);
    const auto one = [&](uint32_t i) { return raw[i] > -INFINITY; };
    const auto one_of_value = [&](uint32_t, float v) { return v > -INFINITY; };
    const auto bin = [&](uint32_t, float v) { return bins(v); };
    uint64_t target = n - 1;
    if (select_bin(team, raw, vocab, bin, one_of_value, target, true).bin < 0) {  // fewer than n are above -inf
        team.clear_list();
        team.over_values(raw, vocab, [&](uint32_t i, float v) {
            if (v > -INFINITY) team.push(i);
        });
        team.close_list();
        target = team.list_length() - 1;
    }
    const auto key = [&](uint32_t id) { return static_cast<uint64_t>(~order_key(raw[id])); };
    const Selection last = team.inner([&](auto& inner) {
        return select_in_list(inner, team.list(), team.list_length(), 32, key, one, target);
    });
    // The rank of a token is the number of listed tokens ahead of it.
    const auto ahead = [&](uint32_t a, uint32_t b) { return key(a) < key(b) || (key(a) == key(b) && a < b); };
    const uint32_t length = team.list_length();
    const uint32_t* list = team.list();
    team.for_each(length, [&](uint32_t i) {
        const uint32_t id = list[i];
        if (ahead(last.id, id) || one(id) == 0) return;
        uint32_t rank = 0;
        for (uint32_t j = 0; j < length; ++j) rank += one(list[j]) != 0 && ahead(list[j], id);
        tokens[rank] = id;
        logprobs[rank] = logprob(raw[id]);
    });
    team.sync();
}

// The k most likely tokens of a row and their log-softmax: one row of the top-k call.
template <class Team>
GPTKERN_HD void top_k_row(Team& team, const TopKArguments& a, int64_t row, const Buffers& buffers) {
    const uint32_t vocab = static_cast<uint32_t>(a.vocab);
    const Logits logits = logits_at(a.logits, a.dtype, row * a.row_stride);
    const float* const raw = in_fp32(team, logits, vocab, buffers.widened);
    const Extremes e = extremes(team, vocab, raw);
    const Status status = check_extremes(e);
    LogSoftmax logprob{0, INFINITY};
    if (status == kOk) logprob = log_softmax(team, vocab, e, raw);
    top_logprobs(team, vocab, e, raw, logprob, status == kOk ? static_cast<uint32_t>(a.k) : 0u,
                 static_cast<uint32_t>(a.k), a.tokens + row * a.k, a.logprobs + row * a.k);
    if (team.leads()) a.status[row] = status;
}

}  // namespace GPTKERN_ISA
}  // namespace gptkern
