// One row of the batch: its parameters, checked, its stored logits, and its lists of token ids.
#pragma once

#include <cmath>

#include "sampling/token_weight.h"

namespace gptkern {
inline namespace GPTKERN_ISA {

GPTKERN_HD bool is_integer_between(double x, double low, double high) {
    return x >= low && x <= high && x == static_cast<double>(static_cast<int64_t>(x));
}

GPTKERN_HD bool is_finite(double x) { return x - x == 0; }

GPTKERN_HD bool has_penalties(const RowParams& p) {
    return p.repetition_penalty != 1 || p.presence_penalty != 0 || p.frequency_penalty != 0;
}

// ``logprobs`` is the width of the output for log-probabilities, below 0 if there is none.
GPTKERN_HD Status check_params(const RowParams& p, int vocab, int logprobs, bool has_counts) {
    if (!(p.temperature >= 0) || !is_finite(p.temperature)) return kBadTemperature;
    if (!is_integer_between(p.top_k, 0, vocab)) return kBadTopK;
    if (!(p.top_p > 0 && p.top_p <= 1)) return kBadTopP;
    if (!(p.min_p >= 0 && p.min_p <= 1)) return kBadMinP;
    if (!(p.typical_p > 0 && p.typical_p <= 1)) return kBadTypicalP;
    if (!(p.epsilon_cutoff >= 0 && p.epsilon_cutoff < 1)) return kBadEpsilonCutoff;
    if (!(p.eta_cutoff >= 0 && p.eta_cutoff < 1)) return kBadEtaCutoff;
    if (!(p.repetition_penalty > 0) || !is_finite(p.repetition_penalty)) return kBadRepetitionPenalty;
    if (!is_finite(p.presence_penalty)) return kBadPresencePenalty;
    if (!is_finite(p.frequency_penalty)) return kBadFrequencyPenalty;
    if (!is_integer_between(p.min_new_tokens, 0, 2147483647.0)) return kBadMinNewTokens;
    if (logprobs >= 0 && !is_integer_between(p.n_logprobs, 0, logprobs)) return kBadLogprobs;
    if (has_penalties(p) && !has_counts) return kNeedsCounts;
    return kOk;
}

struct Row {
    Logits logits;
    uint32_t vocab;
    const RowParams& params;  // not a copy: a GPU's thread has no registers for so many numbers
    int64_t step;
    const int32_t* counts;
    const int32_t *bias_ids, *banned_ids, *eos_ids;
    const float* bias_values;
    uint32_t n_bias, n_banned, n_eos;
    const int32_t* bitmask;
};

GPTKERN_HD Row row_of(const SampleArguments& a, int64_t row, int position) {
    const auto ids = [row](const IdLists& lists) { return lists.ids ? lists.ids + row * lists.width : nullptr; };
    const auto width = [](const IdLists& lists) { return static_cast<uint32_t>(lists.ids ? lists.width : 0); };
    return {logits_at(a.logits, a.dtype, row * a.row_stride + position * a.position_stride),
            static_cast<uint32_t>(a.vocab),
            a.params[row],
            a.counters[row].step + position,
            a.counts ? a.counts + row * a.vocab : nullptr,
            ids(a.bias), ids(a.banned), ids(a.eos),
            a.bias_values ? a.bias_values + row * a.bias.width : nullptr,
            width(a.bias), width(a.banned), width(a.eos),
            a.bitmask ? a.bitmask + row * a.bitmask_words : nullptr};
}

}  // namespace GPTKERN_ISA
}  // namespace gptkern
