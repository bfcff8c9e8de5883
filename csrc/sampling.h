// One row's way from logits to a token; the CPU and the CUDA path both instantiate it.
//
// Order (that of transformers 5): bias; repetition, frequency and presence penalty; bans (list, EOS
// before the minimum length, bitmask); then, unless greedy, temperature, top-k, top-p, min-p, typical,
// epsilon and eta, each on what the one before has left, renormalised; then the draw.
#pragma once


#include <cmath>

#include "philox.h"
#include "select.h"

namespace gptkern {
inline namespace GPTKERN_ISA {

// Which tokens are left, as conditions on each token alone.
struct Kept {
    float v_max;
    double per_unit;       // halvings per unit of logit: log2(e) / T
    uint32_t cut_key;      // of top-k and top-p: the last token kept, in (value down, id up)
    uint32_t cut_id;
    uint64_t min_weight;   // of min-p, epsilon, eta
    uint32_t spared_key;   // tokens of this value are kept whatever their weight
    bool typical;
    double centre;         // of typical: mean halvings, and the last token kept by distance from it
    uint64_t cut_distance;
    uint32_t cut_distance_id;

    GPTKERN_HD uint64_t weight(float v) const { return weight_of(halvings(v_max, v, per_unit)); }

    // Distance from the centre as an ordered key; what has no weight is infinitely far.
    GPTKERN_HD uint64_t distance(float v, uint64_t w) const {
        const double d = halvings(v_max, v, per_unit) - centre;
        return w == 0 ? 0x7FF0000000000000ull : bit_cast<uint64_t>(d < 0 ? -d : d + 0.0);
    }

    // Without branches: the loops over a row must vectorise.
    GPTKERN_HD bool operator()(uint32_t id, float v, uint64_t w) const {
        const uint32_t key = order_key(v);
        const bool above = (key > cut_key) | ((key == cut_key) & (id <= cut_id));
        return above & ((w >= min_weight) | (key == spared_key)) & (!typical || near(id, v, w));
    }

    GPTKERN_HD bool near(uint32_t id, float v, uint64_t w) const {
        const uint64_t d = distance(v, w);
        return (d < cut_distance) | ((d == cut_distance) & (id <= cut_distance_id));
    }
};

// What is left of a row: the same in every thread of the team.
struct Distribution {
    Status status;
    bool greedy;
    bool listed;       // the team's list holds every kept token, and maybe others
    uint32_t best;     // greedy: the token
    uint64_t total;    // sum of the kept weights
    Kept kept;
    const float* values;  // the row with its biases, penalties and bans
};

GPTKERN_HD bool whole_between(double x, double low, double high) {
    return x >= low && x <= high && x == static_cast<double>(static_cast<int64_t>(x));
}

GPTKERN_HD bool finite(double x) { return x - x == 0; }

GPTKERN_HD bool has_penalties(const RowParams& p) {
    return p.repetition_penalty != 1 || p.presence_penalty != 0 || p.frequency_penalty != 0;
}

GPTKERN_HD Status check_params(const RowParams& p, int vocab, int logprobs, bool has_counts) {
    if (!(p.temperature >= 0) || !finite(p.temperature)) return kBadTemperature;
    if (!whole_between(p.top_k, 0, vocab)) return kBadTopK;
    if (!(p.top_p > 0 && p.top_p <= 1)) return kBadTopP;
    if (!(p.min_p >= 0 && p.min_p <= 1)) return kBadMinP;
    if (!(p.typical_p > 0 && p.typical_p <= 1)) return kBadTypicalP;
    if (!(p.epsilon_cutoff >= 0 && p.epsilon_cutoff < 1)) return kBadEpsilonCutoff;
    if (!(p.eta_cutoff >= 0 && p.eta_cutoff < 1)) return kBadEtaCutoff;
    if (!(p.repetition_penalty > 0) || !finite(p.repetition_penalty)) return kBadRepetitionPenalty;
    if (!finite(p.presence_penalty)) return kBadPresencePenalty;
    if (!finite(p.frequency_penalty)) return kBadFrequencyPenalty;
    if (!whole_between(p.min_new_tokens, 0, 2147483647.0)) return kBadMinNewTokens;
    if (logprobs >= 0 && !whole_between(p.n_logprobs, 0, logprobs)) return kBadLogprobs;
    if (has_penalties(p) && !has_counts) return kNeedsCounts;
    return kOk;
}

// A row of the batch as the algorithm sees it.
struct Row {
    const float* raw;
    uint32_t vocab;
    RowParams params;
    int64_t step;
    const int32_t* counts;
    const int32_t *bias_ids, *banned_ids, *eos_ids;
    const float* bias_values;
    uint32_t n_bias, n_banned, n_eos;
    const int32_t* bitmask;
};

// A team's buffers, of vocab floats each.
struct Buffers {
    float *values, *widened;
};

template <DType kType, class Team>
GPTKERN_HD void widen(Team& team, const void* logits, int64_t offset, uint32_t n, float* out) {
    const auto* from = static_cast<const typename Stored<kType>::Type*>(logits) + offset;
    team.for_each(n, [=](uint32_t i) { out[i] = Stored<kType>::widen(from[i]); });
    team.sync();
}

// The row in fp32: where it is, or widened into the buffer.
template <class Team>
GPTKERN_HD const float* widened(Team& team, const void* logits, DType dtype, int64_t offset, uint32_t n, float* out) {
    if (dtype == DType::kFloat32) return static_cast<const float*>(logits) + offset;
    if (dtype == DType::kFloat16) {
        widen<DType::kFloat16>(team, logits, offset, n, out);
    } else {
        widen<DType::kBFloat16>(team, logits, offset, n, out);
    }
    return out;
}

template <class Team>
GPTKERN_HD Row row_of(Team& team, const SampleArguments& a, int64_t row, int position, const Buffers& buffers) {
    const auto ids = [row](const IdLists& lists) { return lists.ids ? lists.ids + row * lists.width : nullptr; };
    const auto width = [](const IdLists& lists) { return static_cast<uint32_t>(lists.ids ? lists.width : 0); };
    const uint32_t vocab = static_cast<uint32_t>(a.vocab);
    const int64_t offset = row * a.row_stride + position * a.position_stride;
    return {widened(team, a.logits, a.dtype, offset, vocab, buffers.widened),
            vocab,
            a.params[row],
            a.counters[row].step + position,
            a.counts ? a.counts + row * a.vocab : nullptr,
            ids(a.bias), ids(a.banned), ids(a.eos),
            a.bias_values ? a.bias_values + row * a.bias.width : nullptr,
            width(a.bias), width(a.banned), width(a.eos),
            a.bitmask ? a.bitmask + row * a.bitmask_words : nullptr};
}

// Sets values[id] = change(values[id], index) for every id of a padded list; false for a foreign id.
template <class Team, class Change>
GPTKERN_HD bool edit(Team& team, const int32_t* ids, uint32_t n, uint32_t vocab, float* values, Change change) {
    uint32_t foreign = 0;
    team.for_each(n, [&](uint32_t i) {
        const int32_t id = ids[i];
        if (id == -1) return;
        if (id < 0 || static_cast<uint32_t>(id) >= vocab) {
            foreign = 1;
        } else {
            values[id] = change(values[id], i);
        }
    });
    return team.max(foreign) == 0;
}

GPTKERN_HD float penalised(float v, int32_t count, float repetition, float presence, float frequency) {
    if (count == 0) return v;
    const float repeated = v < 0 ? v * repetition : v / repetition;
    const int32_t generated = count & ~kInPrompt;
    if (generated == 0) return repeated;
    return (repeated - frequency * static_cast<float>(generated)) - presence;
}

// Whether anything comes before temperature; a row that is left alone is not copied.
GPTKERN_HD bool is_edited(const Row& row) {
    const bool early = row.n_eos > 0 && static_cast<double>(row.step) < row.params.min_new_tokens;
    return has_penalties(row.params) || early || row.n_bias > 0 || row.n_banned > 0 || row.bitmask != nullptr;
}

// Copies the row to values with biases, penalties and bans applied.
template <class Team>
GPTKERN_HD Status process(Team& team, const Row& row, float* values) {
    constexpr float kBanned = -INFINITY;
    const RowParams& p = row.params;
    const float* raw = row.raw;
    team.for_each(row.vocab, [=](uint32_t i) { values[i] = raw[i]; });
    bool known = true;
    team.sync();
    if (row.n_bias > 0) {
        known &= edit(team, row.bias_ids, row.n_bias, row.vocab, values,
                      [&](float v, uint32_t i) { return v + row.bias_values[i]; });
    }
    if (has_penalties(p)) {
        const float repetition = static_cast<float>(p.repetition_penalty);
        const float presence = static_cast<float>(p.presence_penalty);
        const float frequency = static_cast<float>(p.frequency_penalty);
        team.for_each(row.vocab, [&](uint32_t i) {
            values[i] = penalised(values[i], row.counts[i], repetition, presence, frequency);
        });
        team.sync();
    }
    const auto ban = [](float, uint32_t) { return kBanned; };
    if (row.n_banned > 0) known &= edit(team, row.banned_ids, row.n_banned, row.vocab, values, ban);
    if (row.n_eos > 0 && static_cast<double>(row.step) < p.min_new_tokens) {
        known &= edit(team, row.eos_ids, row.n_eos, row.vocab, values, ban);
    }
    if (row.bitmask != nullptr) {
        team.for_each(row.vocab, [&](uint32_t i) {
            const bool allowed = static_cast<uint32_t>(row.bitmask[i / 32]) >> (i % 32) & 1u;
            values[i] = allowed ? values[i] : kBanned;
        });
        team.sync();
    }
    return known ? kOk : kBadTokenId;
}

struct Extremes {
    uint32_t max_key, min_key;  // min over the tokens above -inf
};

template <class Team>
GPTKERN_HD Extremes extremes(Team& team, uint32_t n, const float* values) {
    uint32_t high = 0, inverted_low = 0;
    team.for_each(n, [&](uint32_t i) {
        const uint32_t key = order_key(values[i]);
        high = key > high ? key : high;
        const uint32_t inverted = key == kKeyOfMinusInfinity ? 0u : ~key;
        inverted_low = inverted > inverted_low ? inverted : inverted_low;
    });
    high = team.max(high);
    return {high, ~team.max(inverted_low)};
}

GPTKERN_HD Status check_extremes(const Extremes& e) {
    if (e.max_key > kKeyOfInfinity) return kNaN;
    if (e.max_key == kKeyOfInfinity) return kInfinite;
    if (e.max_key <= kKeyOfMinusInfinity) return kNothingAllowed;
    return kOk;
}

// The lowest id whose value has this key.
template <class Team>
GPTKERN_HD uint32_t first_with_key(Team& team, uint32_t n, const float* values, uint32_t key) {
    uint32_t inverted = 0;
    team.for_each(n, [&](uint32_t i) {
        const uint32_t candidate = order_key(values[i]) == key ? ~i : 0u;
        inverted = candidate > inverted ? candidate : inverted;
    });
    return ~team.max(inverted);
}

// The stages after temperature, over a domain: the whole row, or the team's list.
template <class Team>
struct Filter {
    Team& team;
    const float* values;
    uint32_t vocab;
    const RowParams& params;
    float bottom;
    Distribution d;

    // f(id, value) over the domain.
    template <class F>
    GPTKERN_HD void for_each_left(F f) {
        if (d.listed) {
            team.for_each(team.list_length(), [&](uint32_t i) { f(team.list()[i], values[team.list()[i]]); });
        } else {
            team.for_each(vocab, [&](uint32_t i) { f(i, values[i]); });
        }
    }

    GPTKERN_HD uint64_t kept_weight(uint32_t id) const {
        const float v = values[id];
        const uint64_t w = d.kept.weight(v);
        return d.kept(id, v, w) ? w : 0;
    }

    GPTKERN_HD void sum() {
        uint64_t total = 0;
        const Kept kept = d.kept;
        for_each_left([&](uint32_t id, float v) {
            const uint64_t w = kept.weight(v);
            total += kept(id, v, w) ? w : 0;
        });
        d.total = team.sum(total);
    }

    // The kept element at which the sum passes target, by descending value.
    template <class Weight>
    GPTKERN_HD Found by_value(Weight weight, uint64_t target) {
        return team.inner([&](auto& inner) {
            const auto key = [&](uint32_t id) { return static_cast<uint64_t>(~order_key(values[id])); };
            return select_in_list(inner, team.list(), team.list_length(), 32, key, weight, target);
        });
    }

    GPTKERN_HD void cut_at(uint32_t id) {
        d.kept.cut_id = id;
        d.kept.cut_key = order_key(values[id]);
    }

    GPTKERN_HD void top_k() {
        const DownwardBins bins = downward_bins(d.kept.v_max, bottom, 64.0);
        const auto bin = [&](uint32_t i) { return bins(values[i]); };
        const auto one = [&](uint32_t i) { return static_cast<uint64_t>(values[i] > -INFINITY); };
        const uint64_t target = static_cast<uint64_t>(params.top_k) - 1;
        const CoarseCrossing crossing = select_bin(team, vocab, bin, one, target, true);
        if (crossing.bin < 0) return;  // fewer than k tokens are allowed at all
        cut_at(by_value(one, target).id);
        d.listed = true;
    }

    // Kept are the tokens ahead of which lies less than p of the mass.
    GPTKERN_HD uint64_t mass_target(double p) const {
        const double mass = p * static_cast<double>(d.total);
        const uint64_t floored = static_cast<uint64_t>(mass);
        const uint64_t target = static_cast<double>(floored) < mass ? floored : floored - (floored > 0);
        return target < d.total ? target : d.total - 1;
    }

    GPTKERN_HD void top_p() {
        sum();
        const uint64_t target = mass_target(params.top_p);
        const auto weight = [&](uint32_t id) { return kept_weight(id); };
        if (d.listed) {
            cut_at(by_value(weight, target).id);
            return;
        }
        const DownwardBins bins = downward_bins(d.kept.v_max, bottom, (kWeightBits + 2) / d.kept.per_unit);
        const auto bin = [&](uint32_t i) { return bins(values[i]); };
        const CoarseCrossing crossing = select_bin(team, vocab, bin, weight, target, false);
        cut_at(by_value(weight, target - crossing.before).id);
    }

    GPTKERN_HD void typical() {
        sum();
        uint64_t moment = 0;
        for_each_left([&](uint32_t id, float v) {
            const uint64_t w = d.kept.weight(v);
            if (w == 0 || !d.kept(id, v, w)) return;
            moment += static_cast<uint64_t>(static_cast<double>(w) * halvings(d.kept.v_max, v, d.kept.per_unit) + 0.5);
        });
        const double centre = static_cast<double>(team.sum(moment)) / static_cast<double>(d.total);
        Kept measured = d.kept;
        measured.centre = centre;
        const uint64_t target = mass_target(params.typical_p);
        const auto weight = [&](uint32_t id) { return kept_weight(id); };
        const auto key = [&](uint32_t id) { return measured.distance(values[id], measured.weight(values[id])); };
        uint64_t before = 0;
        if (!d.listed) {
            const auto bin = [&](uint32_t i) {
                const double b = bit_cast<double>(key(i)) * (kCoarseBins / 46.0);
                return static_cast<int>(b < kCoarseBins - 1 ? b : kCoarseBins - 1.0);
            };
            before = select_bin(team, vocab, bin, weight, target, false).before;
        }
        const Found last = team.inner([&](auto& inner) {
            return select_in_list(inner, team.list(), team.list_length(), 64, key, weight, target - before);
        });
        d.kept.centre = centre;
        d.kept.typical = true;
        d.kept.cut_distance = key(last.id);
        d.kept.cut_distance_id = last.id;
    }

    GPTKERN_HD void drop_below(double min_weight) {
        const uint64_t floored = static_cast<uint64_t>(min_weight);
        const uint64_t least = floored + (static_cast<double>(floored) < min_weight);
        d.kept.min_weight = least > d.kept.min_weight ? least : d.kept.min_weight;
    }

    GPTKERN_HD void spare_most_likely() {
        uint32_t best = 0;
        for_each_left([&](uint32_t id, float v) {
            const uint32_t key = order_key(v);
            if (key > best && d.kept(id, v, d.kept.weight(v))) best = key;
        });
        d.kept.spared_key = team.max(best);
    }

    // exp(-entropy) of what is left: entropy = ln(total) - mean of ln(weight).
    GPTKERN_HD double inverse_perplexity() {
        uint64_t moment = 0;
        for_each_left([&](uint32_t id, float v) {
            const uint64_t w = d.kept.weight(v);
            if (w == 0 || !d.kept(id, v, w)) return;
            moment += static_cast<uint64_t>(static_cast<double>(w) * halvings(d.kept.v_max, v, d.kept.per_unit) + 0.5);
        });
        const double total = static_cast<double>(d.total);
        const double mean = static_cast<double>(team.sum(moment)) / total;
        return std::exp2(-mean) * static_cast<double>(kMaxWeight) / total;
    }

    GPTKERN_HD void run() {
        if (params.top_k > 0 && params.top_k < vocab) top_k();
        if (params.top_p < 1) top_p();
        if (params.min_p > 0) drop_below(params.min_p * static_cast<double>(kMaxWeight));
        if (params.typical_p < 1) typical();
        if (params.epsilon_cutoff > 0) {
            sum();
            spare_most_likely();
            drop_below(params.epsilon_cutoff * static_cast<double>(d.total));
        }
        if (params.eta_cutoff > 0) {
            sum();
            spare_most_likely();
            const double flat = std::sqrt(params.eta_cutoff) * inverse_perplexity();
            const double cutoff = flat < params.eta_cutoff ? flat : params.eta_cutoff;
            drop_below(cutoff * static_cast<double>(d.total));
        }
        sum();
    }
};

// From logits to what is left of them. The buffer takes the row where it is edited.
template <class Team>
GPTKERN_HD Distribution distribution(Team& team, const Row& row, float* buffer, Status checked) {
    Distribution d{};
    d.status = checked;
    d.values = row.raw;
    if (d.status != kOk) return d;
    if (is_edited(row)) {
        d.status = process(team, row, buffer);
        d.values = buffer;
    }
    if (d.status != kOk) return d;
    const float* const values = d.values;
    const Extremes e = extremes(team, row.vocab, values);
    d.status = check_extremes(e);
    if (d.status != kOk) return d;
    const float v_max = from_order_key(e.max_key);
    d.kept = {v_max, log2e_over(row.params.temperature), 0, 0xFFFFFFFFu, 0, e.max_key, false, 0, 0, 0};
    d.kept.cut_key = kKeyOfMinusInfinity + 1;  // a banned token is never kept
    if (row.params.temperature == 0) {
        d.greedy = true;
        d.best = first_with_key(team, row.vocab, values, e.max_key);
        d.kept.cut_key = e.max_key;
        d.kept.cut_id = d.best;
        d.kept.per_unit = 0;
        d.total = kMaxWeight;
        return d;
    }
    Filter<Team> filter{team, values, row.vocab, row.params, from_order_key(e.min_key), d};
    filter.run();
    return filter.d;
}

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
    const Found found = team.inner([&](auto& inner) {
        const auto no_key = [](uint32_t) { return uint64_t{0}; };
        return select_in_list(inner, team.list(), team.list_length(), 0, no_key, weight, target - before);
    });
    return found.id;
}

template <class Team>
GPTKERN_HD uint32_t draw(Team& team, uint32_t vocab, const Distribution& d, const float* values, uint64_t uniform) {
    if (d.greedy) return d.best;
    const Kept kept = d.kept;
    const auto weight = [&](uint32_t id) {
        const float v = values[id];
        const uint64_t w = kept.weight(v);
        return kept(id, v, w) ? w : 0;
    };
    return select_by_id(team, vocab, d.listed, weight, multiply_high(uniform, d.total));
}

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
    // In halves: their sums fit where that of more than kMaxVocab weights would not.
    uint64_t high = 0, low = 0;
    team.for_each(vocab, [&](uint32_t i) {
        const uint64_t weight = weight_of(halvings(v_max, raw[i], kLog2E));
        high += weight >> 32;
        low += weight & 0xFFFFFFFFu;
    });
    high = team.sum(high);
    low = team.sum(low);
    const double total = static_cast<double>(high) * 0x1p32 + static_cast<double>(low);
    return {v_max, std::log(total / static_cast<double>(kMaxWeight))};
}

// The n most likely tokens of the raw row, most likely first, ties by lower id; padded with -1.
template <class Team>
GPTKERN_HD void top_logprobs(Team& team, uint32_t vocab, const Extremes& e, const float* raw,
                             const LogSoftmax& logprob, uint32_t n, uint32_t width, int64_t* tokens, float* logprobs) {
    team.for_each(width, [&](uint32_t i) {
        tokens[i] = -1;
        logprobs[i] = -INFINITY;
    });
    team.sync();
    if (n == 0) return;
    const DownwardBins bins = downward_bins(logprob.v_max, from_order_key(e.min_key), 64.0);
    const auto one = [&](uint32_t i) { return static_cast<uint64_t>(raw[i] > -INFINITY); };
    const auto bin = [&](uint32_t i) { return bins(raw[i]); };
    uint64_t target = n - 1;
    if (select_bin(team, vocab, bin, one, target, true).bin < 0) {  // fewer than n tokens are above -inf
        target = 0;
        team.clear_list();
        team.for_each(vocab, [&](uint32_t i) {
            if (one(i) != 0) team.push(i);
        });
        team.close_list();
        target = team.list_length() - 1;
    }
    const auto key = [&](uint32_t id) { return static_cast<uint64_t>(~order_key(raw[id])); };
    const Found last = team.inner([&](auto& inner) {
        return select_in_list(inner, team.list(), team.list_length(), 32, key, one, target);
    });
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

template <class Team>
GPTKERN_HD void write_probs(Team& team, uint32_t vocab, const Distribution& d, const float* values, float* probs) {
    const Kept kept = d.kept;
    const double scale = d.status == kOk ? 1.0 / static_cast<double>(d.total) : 0.0;
    team.for_each(vocab, [&](uint32_t i) {
        const uint64_t w = kept.weight(values[i]);
        const bool left = scale > 0 && kept(i, values[i], w);
        probs[i] = left ? static_cast<float>(static_cast<double>(w) * scale) : 0.0f;
    });
}

GPTKERN_HD void count(const SampleArguments& a, int64_t row, int64_t token, int32_t change) {
    if (a.counts != nullptr) a.counts[row * a.vocab + token] += change;
}

// Advances the row's state by the tokens it was given; where they were given by a caller they may be anything.
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
    const Row row = row_of(team, a, row_index, 0, buffers);
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
