// From a row's logits to the distribution that its token is drawn from. The order is that of transformers 5: the
// edits (edits.h); then temperature, where 0 takes the most likely token; then top-k, top-p, min-p, typical, epsilon
// and eta.
#pragma once

#include <cmath>

#include "sampling/edits.h"
#include "sampling/select.h"
#include "sampling/token_filter.h"

namespace gptkern {
inline namespace GPTKERN_ISA {

// The target of a selection by mass p: tokens pass while less than p of the mass lies ahead of them.
GPTKERN_HD uint64_t mass_target(double p, uint64_t total) {
    const double mass = p * static_cast<double>(total);
    const uint64_t floored = static_cast<uint64_t>(mass);
    const uint64_t target = static_cast<double>(floored) < mass ? floored : floored - (floored > 0);
    return target < total ? target : total - 1;
}

GPTKERN_HD uint64_t rounded_up(double weight) {
    const uint64_t floored = static_cast<uint64_t>(weight);
    return floored + (static_cast<double>(floored) < weight);
}

// The stages of filtering after temperature, each over what the one before has left, renormalised. A stage's domain
// is the whole row, or the team's list once that holds every token that passes.
template <class Team>
struct FilterStages {
    Team& team;
    const float* values;
    uint32_t vocab;
    const RowParams& params;
    float bottom;
    Distribution d;

    // f(id, value) over the domain.
    template <class F>
    GPTKERN_HD void over_domain(F f) {
        if (d.listed) {
            team.for_each(team.list_length(), [&](uint32_t i) { f(team.list()[i], values[team.list()[i]]); });
        } else {
            team.for_each(vocab, [&](uint32_t i) { f(i, values[i]); });
        }
    }

    GPTKERN_HD uint64_t passing_weight(uint32_t id) const { return d.filter.weight_if_passing(id, values[id]); }

    // The sum of the weights that pass.
    GPTKERN_HD void sum() {
        uint64_t total = 0;
        const TokenFilter filter = d.filter;
        over_domain([&](uint32_t id, float v) { total += filter.weight_if_passing(id, v); });
        d.total = team.sum(total);
    }

    // The listed element at which the sum passes target, by descending value.
    template <class Weight>
    GPTKERN_HD Selection select_by_value(Weight weight, uint64_t target) {
        return team.inner([&](auto& inner) {
            const auto key = [&](uint32_t id) { return static_cast<uint64_t>(~order_key(values[id])); };
            return select_in_list(inner, team.list(), team.list_length(), 32, key, weight, target);
        });
    }

    GPTKERN_HD void cut_at(uint32_t id) {
        d.filter.cut_id = id;
        d.filter.cut_key = order_key(values[id]);
    }

    // Top-k from a list that the team makes by its tiles; false if it does not pay.
    bool list_top_k() {
        if (!team.list_largest(values, vocab, static_cast<uint32_t>(params.top_k))) return false;
        const auto one = [&](uint32_t i) { return values[i] > -INFINITY; };
        cut_at(select_by_value(one, static_cast<uint64_t>(params.top_k) - 1).id);
        d.listed = true;
        return true;
    }

    GPTKERN_HD void top_k() {
        if constexpr (Team::kTiles) {
            if (list_top_k()) return;
        }
        const DownwardBins bins = downward_bins(d.filter.v_max, bottom, 64.0);
        const auto bin = [&](uint32_t i) { return bins(values[i]); };
        const auto one = [&](uint32_t i) { return values[i] > -INFINITY; };
        const uint64_t target = static_cast<uint64_t>(params.top_k) - 1;
        const CoarseCrossing crossing = select_bin(team, vocab, bin, one, target, true);
        if (crossing.bin < 0) return;  // fewer than k tokens are allowed at all
        cut_at(select_by_value(one, target).id);
        d.listed = true;
    }

    GPTKERN_HD void top_p() {
        sum();
        const uint64_t target = mass_target(params.top_p, d.total);
        const auto weight = [&](uint32_t id) { return passing_weight(id); };
        if (d.listed) {
            cut_at(select_by_value(weight, target).id);
            return;
        }
        const DownwardBins bins = downward_bins(d.filter.v_max, bottom, (kWeightBits + 2) / d.filter.per_unit);
        const auto bin = [&](uint32_t i) { return bins(values[i]); };
        const CoarseCrossing crossing = select_bin(team, vocab, bin, weight, target, false);
        cut_at(select_by_value(weight, target - crossing.before).id);
    }

    // The mean, over the distribution, of the tokens' halvings; sum() must have been called.
    GPTKERN_HD double mean_halvings() {
        uint64_t moment = 0;
        over_domain([&](uint32_t id, float v) {
            const uint64_t w = d.filter.weight(v);
            if (w == 0 || !d.filter.passes(id, v, w)) return;
            const double x = halvings(d.filter.v_max, v, d.filter.per_unit);
            moment += static_cast<uint64_t>(static_cast<double>(w) * x + 0.5);
        });
        return static_cast<double>(team.sum(moment)) / static_cast<double>(d.total);
    }

    // Locally typical sampling: the tokens whose surprise is nearest to the entropy.
    GPTKERN_HD void typical() {
        sum();
        const double centre = mean_halvings();
        TokenFilter measured = d.filter;
        measured.centre = centre;
        const uint64_t target = mass_target(params.typical_p, d.total);
        const auto weight = [&](uint32_t id) { return passing_weight(id); };
        const auto key = [&](uint32_t id) { return measured.distance(values[id], measured.weight(values[id])); };
        uint64_t before = 0;
        if (!d.listed) {
            const auto bin = [&](uint32_t i) {
                const double b = bit_cast<double>(key(i)) * (kCoarseBins / 46.0);
                return static_cast<int>(b < kCoarseBins - 1 ? b : kCoarseBins - 1.0);
            };
            before = select_bin(team, vocab, bin, weight, target, false).before;
        }
        const Selection last = team.inner([&](auto& inner) {
            return select_in_list(inner, team.list(), team.list_length(), 64, key, weight, target - before);
        });
        d.filter.centre = centre;
        d.filter.typical = true;
        d.filter.cut_distance = key(last.id);
        d.filter.cut_distance_id = last.id;
    }

    // Tokens of a smaller weight no longer pass.
    GPTKERN_HD void drop_below(double min_weight) {
        const uint64_t whole = rounded_up(min_weight);
        d.filter.min_weight = whole > d.filter.min_weight ? whole : d.filter.min_weight;
    }

    // The most likely tokens pass whatever the cut-off.
    GPTKERN_HD void spare_most_likely() {
        uint32_t best = 0;
        over_domain([&](uint32_t id, float v) {
            const uint32_t key = order_key(v);
            if (key > best && d.filter.passes(id, v, d.filter.weight(v))) best = key;
        });
        d.filter.spared_key = team.max(best);
    }

    // exp(-entropy) of the distribution: entropy = ln(total) - mean of ln(weight).
    GPTKERN_HD double inverse_perplexity() {
        return std::exp2(-mean_halvings()) * static_cast<double>(kMaxWeight) / static_cast<double>(d.total);
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

// The one token that is left at temperature 0.
GPTKERN_HD void choose(Distribution& d, const Largest& best) {
    d.filter = {from_order_key(best.key), 0, best.key, best.id, 0, best.key, false, 0, 0, 0};
    d.greedy = true;
    d.best = best.id;
    d.total = kMaxWeight;
}

// The distribution of a row. The buffer takes the row if it is edited.
template <class Team>
GPTKERN_HD Distribution distribution(Team& team, const Row& row, float* buffer, Status params_status) {
    Distribution d{};
    d.status = params_status;
    d.values = row.raw;
    if (d.status != kOk) return d;
    if (is_edited(row)) {
        d.status = edit_row(team, row, buffer);
        d.values = buffer;
    }
    if (d.status != kOk) return d;
    const float* const values = d.values;
    if constexpr (Team::kTiles) {
        if (row.params.temperature == 0) {
            const Largest best = team.largest(row.vocab, values);
            d.status = check_largest(best.key);
            if (d.status == kOk) choose(d, best);
            return d;
        }
    }
    const Extremes e = extremes(team, row.vocab, values);
    d.status = check_extremes(e);
    if (d.status != kOk) return d;
    const float v_max = from_order_key(e.max_key);
    d.filter = {v_max, log2e_over(row.params.temperature), 0, 0xFFFFFFFFu, 0, e.max_key, false, 0, 0, 0};
    d.filter.cut_key = kKeyOfMinusInfinity + 1;  // a banned token never passes
    // Without tiles. Not by choose(): with it ptxas spills in the drafts' kernel.
    if (row.params.temperature == 0) {
        d.greedy = true;
        d.best = first_with_key(team, row.vocab, values, e.max_key);
        d.filter.cut_key = e.max_key;
        d.filter.cut_id = d.best;
        d.filter.per_unit = 0;
        d.total = kMaxWeight;
        return d;
    }
    FilterStages<Team> stages{team, values, row.vocab, row.params, from_order_key(e.min_key), d};
    stages.run();
    return stages.d;
}

}  // namespace GPTKERN_ISA
}  // namespace gptkern
