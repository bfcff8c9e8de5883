// From a row's logits to the distribution that its token is drawn from, and to the token. The order is that of
// transformers 5: the edits (edits.h); then temperature, where 0 takes the most likely token; then top-k, top-p, min-p,
// typical, epsilon and eta.
#pragma once

#include <cmath>
#include <type_traits>
#include <utility>

#include "sampling/edits.h"
#include "sampling/philox.h"
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

// The bits of an id that do not fit the number of a bin, for bins of neighbouring ids.
GPTKERN_HD int id_shift(uint32_t vocab) {
    int shift = 0;
    while ((vocab - 1) >> shift >= static_cast<uint32_t>(kCoarseBins)) ++shift;
    return shift;
}

enum class Stage : int { kTopK, kTopP, kMinP, kTypical, kEpsilon, kEta, kDraw };
constexpr int kStages = static_cast<int>(Stage::kDraw) + 1;

// The stages after temperature, each over what the one before has left, renormalised, and the draw. A stage's domain
// is the whole row, or the team's list once that holds every token that passes.
//
// A stage is a number at run time on a GPU, where every loop over the row exists once: machine code is read from
// memory, too. On a CPU it is a type, as its loops vectorise only if they know what they compute.
template <class Team>
struct FilterStages {
    Team& team;
    const float* values;
    uint32_t vocab;
    const RowParams& params;
    float bottom;
    const RowCounter* counter;  // null: nothing is drawn
    Distribution d;

    GPTKERN_HD void run() {
        if constexpr (Team::kTiles) {
            run_each(std::make_integer_sequence<int, kStages>{});
        } else {
            GPTKERN_ROLLED
            for (int stage = 0; stage < kStages; ++stage) run(static_cast<Stage>(stage));
        }
    }

private:
    template <int... stages>
    GPTKERN_HD void run_each(std::integer_sequence<int, stages...>) {
        (run(std::integral_constant<Stage, static_cast<Stage>(stages)>{}), ...);
    }

    GPTKERN_HD bool wants(Stage stage) const {
        switch (stage) {
            case Stage::kTopK: return params.top_k > 0 && params.top_k < vocab;
            case Stage::kTopP: return params.top_p < 1;
            case Stage::kMinP: return params.min_p > 0;
            case Stage::kTypical: return params.typical_p < 1;
            case Stage::kEpsilon: return params.epsilon_cutoff > 0;
            case Stage::kEta: return params.eta_cutoff > 0;
            default: return true;
        }
    }

    template <class S>
    GPTKERN_HD void run(S constant_or_not) {
        const Stage stage = constant_or_not;
        if (!wants(stage)) return;
        if (stage == Stage::kMinP) return drop_below(params.min_p * static_cast<double>(kMaxWeight));
        double centre = 0;
        if (stage != Stage::kTopK) centre = measure(constant_or_not);
        if (stage == Stage::kEpsilon) return drop_below(params.epsilon_cutoff * static_cast<double>(d.total));
        if (stage == Stage::kEta) return drop_below(eta(centre) * static_cast<double>(d.total));
        if (stage == Stage::kDraw && counter == nullptr) return;
        const Selected last = select(constant_or_not, target_of(stage), centre);
        if (!last.found) return;
        if (stage == Stage::kDraw) {
            d.token = last.id;
        } else if (stage == Stage::kTypical) {
            d.filter.centre = centre;
            d.filter.typical = true;
            d.filter.cut_distance = distance(last.id, centre);
            d.filter.cut_distance_id = last.id;
        } else {
            d.filter.cut_id = last.id;
            d.filter.cut_key = order_key(values[last.id]);
        }
    }

    GPTKERN_HD uint64_t target_of(Stage stage) const {
        switch (stage) {
            case Stage::kTopK: return static_cast<uint64_t>(params.top_k) - 1;
            case Stage::kTopP: return mass_target(params.top_p, d.total);
            case Stage::kTypical: return mass_target(params.typical_p, d.total);
            default: break;
        }
        if (counter == nullptr) return 0;
        return multiply_high(uniforms(counter->seed, counter->request, counter->step).token, d.total);
    }

    // f(id, value) over the domain.
    template <class F>
    GPTKERN_HD void over_domain(F f) {
        if (d.listed) {
            team.for_each(team.list_length(), [&](uint32_t i) { f(team.list()[i], values[team.list()[i]]); });
        } else {
            team.over_values(values, vocab, f);
        }
    }

    // The sum of the weights that pass, and what a stage needs beside it: the mean, over the distribution, of the tokens'
    // halvings, which it returns; and the most likely tokens, which then pass whatever the cut-off.
    template <class S>
    GPTKERN_HD double measure(S constant_or_not) {
        const Stage stage = constant_or_not;
        const bool has_mean = stage == Stage::kTypical || stage == Stage::kEta;
        const bool spares = stage == Stage::kEpsilon || stage == Stage::kEta;
        Measured own{};
        const TokenFilter filter = d.filter;
        over_domain([&](uint32_t id, float v) {
            const uint64_t w = filter.weight_if_passing(id, v);
            own.total += w;
            if (has_mean && w != 0) {
                const double x = halvings(filter.v_max, v, filter.per_unit);
                own.moment += static_cast<uint64_t>(static_cast<double>(w) * x + 0.5);
            }
            if (spares) {
                const uint32_t key = order_key(v);
                own.best = w != 0 && key > own.best ? key : own.best;
            }
        });
        const Measured all = team.combined(own, has_mean, spares);
        d.total = all.total;
        if (spares) d.filter.spared_key = all.best;
        return has_mean ? static_cast<double>(all.moment) / static_cast<double>(d.total) : 0.0;
    }

    // Tokens of a smaller weight no longer pass.
    GPTKERN_HD void drop_below(double min_weight) {
        const uint64_t whole = rounded_up(min_weight);
        d.filter.min_weight = whole > d.filter.min_weight ? whole : d.filter.min_weight;
    }

    // Eta's cut-off from exp(-entropy) of the distribution: entropy = ln(total) - mean of ln(weight).
    GPTKERN_HD double eta(double mean_halvings) const {
        const double inverse_perplexity =
            std::exp2(-mean_halvings) * static_cast<double>(kMaxWeight) / static_cast<double>(d.total);
        const double flat = std::sqrt(params.eta_cutoff) * inverse_perplexity;
        return flat < params.eta_cutoff ? flat : params.eta_cutoff;
    }

    // Locally typical sampling: tokens in the order of the distance of their surprise from the entropy.
    GPTKERN_HD uint64_t distance(uint32_t id, double centre) const {
        TokenFilter measured = d.filter;
        measured.centre = centre;
        return measured.distance(values[id], measured.weight(values[id]));
    }

    struct Selected {
        uint32_t id;
        bool found;
    };

    // The element at which the sum of the weights passes the target, in the order of the stage: by value, by distance
    // from the centre, or by id. There is none if fewer than k tokens are allowed at all.
    template <class S>
    GPTKERN_HD Selected select(S constant_or_not, uint64_t target, double centre) {
        const Stage stage = constant_or_not;
        const TokenFilter filter = d.filter;
        const auto weight_of_value = [&](uint32_t id, float v) -> uint64_t {
            if (stage == Stage::kTopK) return v > -INFINITY;
            return filter.weight_if_passing(id, v);
        };
        const auto weight = [&](uint32_t id) { return weight_of_value(id, values[id]); };
        const auto key = [&](uint32_t id) -> uint64_t {
            if (stage == Stage::kDraw) return 0;
            return stage == Stage::kTypical ? distance(id, centre) : static_cast<uint64_t>(~order_key(values[id]));
        };
        const int key_bits = stage == Stage::kTypical ? 64 : stage == Stage::kDraw ? 0 : 32;
        if (stage == Stage::kTopK && list_top_k()) {
            d.listed = true;
        } else if (!d.listed) {
            const double reach = stage == Stage::kTopK ? 64.0 : (kWeightBits + 2) / d.filter.per_unit;
            const DownwardBins bins = downward_bins(d.filter.v_max, bottom, reach);
            const int shift = id_shift(vocab);
            const auto bin = [&](uint32_t id, float v) {
                if (stage == Stage::kDraw) return static_cast<int>(id >> shift);
                if (stage != Stage::kTypical) return bins(v);
                const double b = bit_cast<double>(distance(id, centre)) * (kCoarseBins / 46.0);
                return static_cast<int>(b < kCoarseBins - 1 ? b : kCoarseBins - 1.0);
            };
            const bool with_better = stage == Stage::kTopK;
            const CoarseCrossing crossing = select_bin(team, values, vocab, bin, weight_of_value, target, with_better);
            if (crossing.bin < 0) return {0, false};
            if (with_better) {
                d.listed = true;
            } else {
                target -= crossing.before;
            }
        }
        const Selection last = team.inner([&](auto& inner) {
            return select_in_list(inner, team.list(), team.list_length(), key_bits, key, weight, target);
        });
        return {last.id, true};
    }

    // Lists the tokens that top-k may leave by the largest of every tile; false if it does not pay.
    GPTKERN_HD bool list_top_k() {
        if constexpr (Team::kTiles) {
            return team.list_largest(values, vocab, static_cast<uint32_t>(params.top_k));
        }
        return false;
    }
};

// The one token that is left at temperature 0.
GPTKERN_HD void choose(Distribution& d, const Largest& best) {
    d.filter = {from_order_key(best.key), 0, best.key, best.id, 0, best.key, false, 0, 0, 0};
    d.greedy = true;
    d.token = best.id;
    d.total = kMaxWeight;
}

// The distribution of a row that could be loaded, and a token drawn from it unless the counter is null.
template <class Team>
GPTKERN_HD Distribution distribution(Team& team, const Row& row, const Loaded& loaded, Status status,
                                     const RowCounter* counter) {
    Distribution d{};
    d.status = status;
    d.values = loaded.values;
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
    const Extremes e = loaded.has_extremes ? loaded.extremes : extremes(team, row.vocab, values);
    d.status = check_extremes(e);
    if (d.status != kOk) return d;
    if (row.params.temperature == 0) {
        choose(d, {e.max_key, e.id});
        return d;
    }
    const float v_max = from_order_key(e.max_key);
    d.filter = {v_max, log2e_over(row.params.temperature), 0, 0xFFFFFFFFu, 0, e.max_key, false, 0, 0, 0};
    d.filter.cut_key = kKeyOfMinusInfinity + 1;  // a banned token never passes
    FilterStages<Team> stages{team, values, row.vocab, row.params, from_order_key(e.min_key), counter, d};
    stages.run();
    return stages.d;
}

}  // namespace GPTKERN_ISA
}  // namespace gptkern
