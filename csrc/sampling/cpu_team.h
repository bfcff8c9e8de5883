// The CPU's team: threads that share one row, each with a contiguous part of the vocabulary.
#pragma once

#include <atomic>

#include "common/spin_barrier.h"
#include "sampling/edits.h"
#include "sampling/select.h"

namespace gptkern {
inline namespace GPTKERN_ISA {

constexpr int kMaxTeam = 64;
constexpr uint32_t kTile = 64;  // neighbouring tokens that are looked at together

// The memory that a team's threads share. It outlives a call, for the next one to use.
struct TeamMemory {
    struct alignas(64) Slot {
        uint64_t value;
    };

    SpinBarrier barrier;
    Slot slots[kMaxTeam];
    uint64_t* bin_weights;  // (threads, kCoarseBins)
    float *values, *widened;  // (vocab)
    uint32_t* list;         // (vocab)
    uint32_t* tops;         // (vocab / kTile, rounded up): the largest key of each tile
    std::atomic<uint32_t> list_length;
    uint64_t digit_weights[kDigits];
    uint32_t digit_counts[kDigits];
    CoarseCrossing bin;
    Selection selection;
};

// The thread that finishes a list, alone.
class CpuInner {
public:
    explicit CpuInner(TeamMemory& memory) : memory_(memory) {}

    template <class F>
    GPTKERN_HD void for_each(uint32_t n, F f) {
        for (uint32_t i = 0; i < n; ++i) f(i);
    }

    GPTKERN_HD void clear_digits() {
        memset(memory_.digit_weights, 0, sizeof(memory_.digit_weights));
        memset(memory_.digit_counts, 0, sizeof(memory_.digit_counts));
    }

    GPTKERN_HD void add_digit(int digit, uint64_t weight) {
        memory_.digit_weights[digit] += weight;
        memory_.digit_counts[digit] += 1;
    }

    GPTKERN_HD DigitCrossing find_digit(uint64_t target) {
        uint64_t before = 0;
        int i = 0;
        while (i < kDigits - 1 && target >= before + memory_.digit_weights[i]) before += memory_.digit_weights[i++];
        return {i, before, memory_.digit_counts[i]};
    }

    GPTKERN_HD void publish(uint32_t id) { published_ = id; }
    GPTKERN_HD uint32_t published() const { return published_; }

private:
    TeamMemory& memory_;
    uint32_t published_ = 0;
};

class CpuTeam {
public:
    static constexpr bool kTiles = true;  // the largest of every tile finds a row's largest sooner than histograms do
    static constexpr bool kRewriteSees = false;  // what a row's extremes are is another loop, which vectorises
    CpuTeam(TeamMemory& memory, int rank) : memory_(memory), rank_(rank), threads_(memory.barrier.threads) {}

    GPTKERN_HD bool leads() const { return rank_ == 0; }

    template <class F>
    GPTKERN_HD void for_each(uint32_t n, F f) {
        const uint32_t end = part(n, rank_ + 1);
        for (uint32_t i = part(n, rank_); i < end; ++i) f(i);
    }

    // f(i, values[i]) for this thread's part.
    template <class F>
    GPTKERN_HD void over_values(const float* values, uint32_t n, F f) {
        for_each(n, [&](uint32_t i) { f(i, values[i]); });
    }

    // Every thread reads lists of ids whole.
    template <class F>
    GPTKERN_HD void for_each_here(uint32_t n, F f) {
        for (uint32_t i = 0; i < n; ++i) f(i);
    }
    bool owns(uint32_t id, uint32_t n) const { return part(n, rank_) <= id && id < part(n, rank_ + 1); }
    void sync_here() {}
    bool any_here(bool value) const { return value; }

    void begin_row(const Logits&, uint32_t) {}
    float* placed(float* buffer, const Logits&) const { return buffer; }

    // Writes this thread's part of a row in fp32 to ``raw`` and, edited, to ``values``; null: not asked for.
    KeyRange rewrite(const Logits& logits, uint32_t n, const DenseEdits& edits, float* raw, float* values) {
        float* const first = raw != nullptr ? raw : values;
        if (logits.dtype == DType::kFloat32) {
            copy(static_cast<const float*>(logits.at), n, first);
        } else if (logits.dtype == DType::kFloat16) {
            widen<DType::kFloat16>(logits, n, first);
        } else {
            widen<DType::kBFloat16>(logits, n, first);
        }
        if (values == nullptr) return {};
        if (values != first) copy(first, n, values);
        if (edits.counts != nullptr) {
            for_each(n, [&](uint32_t i) { values[i] = edits.penalise(values[i], edits.counts[i]); });
        }
        if (edits.bitmask != nullptr) {
            for_each(n, [&](uint32_t i) { values[i] = edits.allows(i) ? values[i] : -INFINITY; });
        }
        return {};
    }

    // Adds every weight(i, values[i]) to bin(i, values[i]). The loop goes tile by tile, so that all but the additions
    // vectorises.
    template <class Bin, class Weight>
    GPTKERN_HD void add_to_bins(const float* values, uint32_t n, Bin bin, Weight weight) {
        constexpr uint32_t kLong = 4 * kTile;
        uint64_t tile[kLong];
        int bins[kLong];
        uint64_t* const sums = weights(rank_);
        const uint32_t end = part(n, rank_ + 1);
        for (uint32_t start = part(n, rank_); start < end; start += kLong) {
            const uint32_t length = end - start < kLong ? end - start : kLong;
            for (uint32_t j = 0; j < length; ++j) tile[j] = weight(start + j, values[start + j]);
            for (uint32_t j = 0; j < length; ++j) bins[j] = bin(start + j, values[start + j]);
            for (uint32_t j = 0; j < length; ++j) sums[bins[j]] += tile[j];
        }
    }

    // Lists every i whose bin is between low and high; most tiles have none.
    template <class Bin>
    GPTKERN_HD void list_bins(const float* values, uint32_t n, Bin bin, int low, int high) {
        int bins[kTile];
        const uint32_t end = part(n, rank_ + 1);
        for (uint32_t start = part(n, rank_); start < end; start += kTile) {
            const uint32_t length = end - start < kTile ? end - start : kTile;
            int any = 0;
            for (uint32_t j = 0; j < length; ++j) {
                bins[j] = bin(start + j, values[start + j]);
                any |= (bins[j] >= low) & (bins[j] <= high);
            }
            if (any == 0) continue;
            for (uint32_t j = 0; j < length; ++j) {
                if (bins[j] >= low && bins[j] <= high) push(start + j);
            }
        }
    }

    void sync() { memory_.barrier.wait(); }
    // for_each and what goes by tiles share ids out in different ways.
    void sync_after_rewrite() { sync(); }

    uint64_t sum(uint64_t value) {
        return reduce(value, [](uint64_t a, uint64_t b) { return a + b; });
    }

    uint32_t max(uint32_t value) {
        return static_cast<uint32_t>(reduce(value, [](uint64_t a, uint64_t b) { return a > b ? a : b; }));
    }
    Extremes combined(const KeyRange& seen) { return {max(seen.high), ~max(seen.inverted_low), 0}; }

    Measured combined(const Measured& own, bool has_mean, bool spares) {
        return {sum(own.total), has_mean ? sum(own.moment) : 0, spares ? max(own.best) : 0};
    }

    void clear_bins() {
        memset(weights(rank_), 0, kCoarseBins * sizeof(uint64_t));
        clear_list();
    }

    CoarseCrossing find_bin(uint64_t target) {
        sync();
        if (rank_ == 0) {
            for (int other = 1; other < threads_; ++other) {
                for (int i = 0; i < kCoarseBins; ++i) weights(0)[i] += weights(other)[i];
            }
            uint64_t before = 0;
            int i = 0;
            while (i < kCoarseBins && target >= before + weights(0)[i]) before += weights(0)[i++];
            memory_.bin = {i < kCoarseBins ? i : -1, before};
        }
        sync();
        return memory_.bin;
    }

    void clear_list() {
        sync();
        if (rank_ == 0) memory_.list_length.store(0, std::memory_order_relaxed);
        sync();
    }

    GPTKERN_HD void push(uint32_t id) {
        memory_.list[memory_.list_length.fetch_add(1, std::memory_order_relaxed)] = id;
    }

    void close_list() { sync(); }
    const uint32_t* list() const { return memory_.list; }
    uint32_t list_length() const { return memory_.list_length.load(std::memory_order_relaxed); }

    // The row's largest key and the lowest id that has it.
    Largest largest(uint32_t n, const float* values) {
        uint32_t best = 0, tile = tiles(n);
        for_each_tile(n, values, [&](uint32_t t, uint32_t key) {
            tile = key > best ? t : tile;
            best = key > best ? key : best;
        });
        uint32_t id = tile * kTile;
        while (id < n && order_key(values[id]) != best) ++id;
        const uint64_t found = reduce(static_cast<uint64_t>(best) << 32 | static_cast<uint32_t>(~id),
                                      [](uint64_t a, uint64_t b) { return a > b ? a : b; });
        return {static_cast<uint32_t>(found >> 32), ~static_cast<uint32_t>(found)};
    }

    // Lists every value from the k-th largest of the tiles' largest on: so many are at least that large. False if the
    // tiles are too few for it to leave most of them out, or too few of them have a token that is allowed.
    bool list_largest(const float* values, uint32_t n, uint32_t k) {
        if (k > tiles(n) / 4) return false;
        for_each_tile(n, values, [&](uint32_t t, uint32_t key) {
            memory_.tops[t] = key;
            memory_.list[t] = t;
        });
        const auto key = [this](uint32_t t) { return static_cast<uint64_t>(~memory_.tops[t]); };
        const auto one = [](uint32_t) { return uint64_t{1}; };
        const Selection last = inner([&](CpuInner& alone) {
            return select_in_list(alone, memory_.list, tiles(n), 32, key, one, k - 1);
        });
        const uint32_t least = memory_.tops[last.id];
        if (least <= kKeyOfMinusInfinity) return false;
        clear_list();
        const uint32_t end = part(tiles(n), rank_ + 1);
        for (uint32_t t = part(tiles(n), rank_); t < end; ++t) {
            if (memory_.tops[t] < least) continue;
            for (uint32_t i = t * kTile; i < end_of_tile(t, n); ++i) {
                if (order_key(values[i]) >= least) push(i);
            }
        }
        close_list();
        return true;
    }

    template <class F>
    Selection inner(F f) {
        sync();
        if (rank_ == 0) {
            CpuInner inner(memory_);
            memory_.selection = f(inner);
        }
        sync();
        return memory_.selection;
    }

private:
    template <DType kType>
    void widen(const Logits& logits, uint32_t n, float* out) {
        const auto* const from = static_cast<const typename Stored<kType>::Type*>(logits.at);
        for_each(n, [=](uint32_t i) { out[i] = Stored<kType>::widen(from[i]); });
    }

    void copy(const float* from, uint32_t n, float* out) {
        for_each(n, [=](uint32_t i) { out[i] = from[i]; });
    }

    uint32_t part(uint32_t n, int rank) const {
        return static_cast<uint32_t>(static_cast<uint64_t>(n) * static_cast<uint64_t>(rank) / threads_);
    }

    static uint32_t tiles(uint32_t n) { return (n + kTile - 1) / kTile; }
    static uint32_t end_of_tile(uint32_t t, uint32_t n) { return n - t * kTile < kTile ? n : (t + 1) * kTile; }

    // f(t, the largest key of tile t) for this thread's tiles.
    template <class F>
    void for_each_tile(uint32_t n, const float* values, F f) {
        const uint32_t end = part(tiles(n), rank_ + 1);
        for (uint32_t t = part(tiles(n), rank_); t < end; ++t) {
            const float* const from = values + t * kTile;
            // A loop whose length the compiler knows is a few vectors.
            f(t, t < n / kTile ? largest_key(from, kTile) : largest_key(from, n % kTile));
        }
    }

    static GPTKERN_HD uint32_t largest_key(const float* from, uint32_t count) {
        uint32_t high = 0;
        for (uint32_t i = 0; i < count; ++i) {
            const uint32_t key = order_key(from[i]);
            high = key > high ? key : high;
        }
        return high;
    }

    uint64_t* weights(int rank) { return memory_.bin_weights + rank * kCoarseBins; }

    template <class Combine>
    uint64_t reduce(uint64_t value, Combine combine) {
        if (threads_ == 1) return value;
        memory_.slots[rank_].value = value;
        sync();
        uint64_t result = memory_.slots[0].value;
        for (int other = 1; other < threads_; ++other) result = combine(result, memory_.slots[other].value);
        sync();  // before the slots are written again
        return result;
    }

    TeamMemory& memory_;
    int rank_;
    int threads_;
};

}  // namespace GPTKERN_ISA
}  // namespace gptkern
