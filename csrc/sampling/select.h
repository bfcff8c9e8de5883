// Weighted selection: the first element, in an order, at which the running sum of weights passes a target.
// Top-k (all weights 1), top-p and typical sampling (token weights) and the draw itself are all this.
//
// There is no sort. A coarse histogram over the whole row finds the bin in which the sum crosses the target,
// that bin's elements go to a list, and a radix descent over their exact keys, then over their ids, finds the
// one element. So the lower token id breaks a tie.
//
// A Team is the threads that share a row (CPU threads, or a cluster of CUDA blocks). Team::Inner is the part of
// it that finishes a list (one thread, or the cluster's first block). Every member calls every function.
#pragma once

#include "sampling/token_weight.h"

namespace gptkern {
inline namespace GPTKERN_ISA {

constexpr int kCoarseBins = 2048;
constexpr int kDigitBits = 8;
constexpr int kDigits = 1 << kDigitBits;
static_assert(kIdBits % kDigitBits == 0 && kMaxVocab <= 1 << kIdBits, "an id must fit its digits");

// The bin of a coarse histogram in which the running sum passes the target, and the sum before that bin.
struct CoarseCrossing {
    int bin;  // -1: the whole histogram does not reach the target
    uint64_t before;
};

// The same for the 256 bins of one radix digit.
struct DigitCrossing {
    int bin;
    uint64_t before;
    uint32_t count;  // number of elements in the bin
};

// The selected element, and the sum of the weights of the elements ahead of it.
struct Selection {
    uint32_t id;
    uint64_t before;
};

// A row's largest value as a key, and the lowest id that has it.
struct Largest {
    uint32_t key, id;
};

GPTKERN_HD uint64_t shift_right(uint64_t x, int n) { return n >= 64 ? 0 : x >> n; }

// The element of list[0..length), in ascending (key, id), at which the sum passes the target. The sum of all
// must pass it.
template <class Inner, class List, class Key, class Weight>
GPTKERN_HD Selection select_in_list(Inner& inner, List list, uint32_t length, int key_bits, Key key, Weight weight,
                                    uint64_t target) {
    uint64_t key_prefix = 0, before = 0;
    uint32_t id_prefix = 0;
    int key_left = key_bits, id_left = kIdBits;
    const auto inside = [&](uint32_t id, uint64_t k) {
        return shift_right(k, key_left) == key_prefix && id >> id_left == id_prefix;
    };
    for (;;) {
        // Histogram of the next digit over the elements that share the digits so far.
        const bool by_key = key_left > 0;
        inner.clear_digits();
        inner.for_each(length, [&](uint32_t i) {
            const uint32_t id = list[i];
            const uint64_t k = key(id);
            if (!inside(id, k)) return;
            const uint64_t digit = by_key ? k >> (key_left - kDigitBits) : id >> (id_left - kDigitBits);
            inner.add_digit(static_cast<int>(digit & (kDigits - 1)), weight(id));
        });
        // The digit in which the sum crosses the target.
        const DigitCrossing crossing = inner.find_digit(target);
        target -= crossing.before;
        before += crossing.before;
        if (by_key) {
            key_left -= kDigitBits;
            key_prefix = key_prefix << kDigitBits | static_cast<uint64_t>(crossing.bin);
        } else {
            id_left -= kDigitBits;
            id_prefix = id_prefix << kDigitBits | static_cast<uint32_t>(crossing.bin);
        }
        if (crossing.count == 1 || id_left == 0) break;
    }
    // One element is left: whoever owns it tells the others.
    inner.for_each(length, [&](uint32_t i) {
        const uint32_t id = list[i];
        if (inside(id, key(id))) inner.publish(id);
    });
    return {inner.published(), before};
}

// The coarse half: fills the team's list with the elements of the crossing bin and, with_better, of all bins
// ahead of it. bin(i, values[i]) must never decrease along the order of the selection.
template <class Team, class Bin, class Weight>
GPTKERN_HD CoarseCrossing select_bin(Team& team, const float* values, uint32_t n, Bin bin, Weight weight,
                                     uint64_t target, bool with_better) {
    team.clear_bins();  // and the list
    team.add_to_bins(values, n, bin, weight);
    const CoarseCrossing crossing = team.find_bin(target);
    if (crossing.bin < 0) return crossing;
    team.list_bins(values, n, bin, with_better ? 0 : crossing.bin, crossing.bin);
    team.close_list();
    return crossing;
}

// Bins of equal width from the maximum downwards; the last one takes everything below.
struct DownwardBins {
    float top, per_unit;

    GPTKERN_HD int operator()(float v) const {
        const float b = (top - v) * per_unit;
        return static_cast<int>(b < kCoarseBins - 1 ? b : static_cast<float>(kCoarseBins - 1));
    }
};

// Bins from top to bottom, or over ``reach`` of that range if it is wider.
GPTKERN_HD DownwardBins downward_bins(float top, float bottom, double reach) {
    const double range = static_cast<double>(top) - static_cast<double>(bottom);
    const double covered = range < reach ? range : reach;
    const double per_unit = covered > 0 ? kCoarseBins / covered : 0.0;
    return {top, per_unit < 1e30 ? static_cast<float>(per_unit) : 1e30f};
}

}  // namespace GPTKERN_ISA
}  // namespace gptkern
