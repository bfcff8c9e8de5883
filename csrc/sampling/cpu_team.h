// The CPU's team: threads that share one row, each with a contiguous part of the vocabulary.
#pragma once

#include <atomic>

#include "common/spin_barrier.h"
#include "sampling/select.h"

namespace gptkern {
inline namespace GPTKERN_ISA {

constexpr int kMaxTeam = 64;

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
    CpuTeam(TeamMemory& memory, int rank) : memory_(memory), rank_(rank), threads_(memory.barrier.threads) {}

    GPTKERN_HD bool leads() const { return rank_ == 0; }

    template <class F>
    GPTKERN_HD void for_each(uint32_t n, F f) {
        const uint32_t end = part(n, rank_ + 1);
        for (uint32_t i = part(n, rank_); i < end; ++i) f(i);
    }

    // Adds every weight(i) to bin(i). The loop goes tile by tile, so that all but the additions vectorises.
    template <class Bin, class Weight>
    GPTKERN_HD void add_to_bins(uint32_t n, Bin bin, Weight weight) {
        constexpr uint32_t kTile = 256;
        uint64_t tile[kTile];
        int bins[kTile];
        uint64_t* const sums = weights(rank_);
        const uint32_t end = part(n, rank_ + 1);
        for (uint32_t start = part(n, rank_); start < end; start += kTile) {
            const uint32_t length = end - start < kTile ? end - start : kTile;
            for (uint32_t j = 0; j < length; ++j) tile[j] = weight(start + j);
            for (uint32_t j = 0; j < length; ++j) bins[j] = bin(start + j);
            for (uint32_t j = 0; j < length; ++j) sums[bins[j]] += tile[j];
        }
    }

    // Lists every i whose bin is between low and high; most tiles have none.
    template <class Bin>
    GPTKERN_HD void list_bins(uint32_t n, Bin bin, int low, int high) {
        constexpr uint32_t kTile = 64;
        int bins[kTile];
        const uint32_t end = part(n, rank_ + 1);
        for (uint32_t start = part(n, rank_); start < end; start += kTile) {
            const uint32_t length = end - start < kTile ? end - start : kTile;
            int any = 0;
            for (uint32_t j = 0; j < length; ++j) {
                bins[j] = bin(start + j);
                any |= (bins[j] >= low) & (bins[j] <= high);
            }
            if (any == 0) continue;
            for (uint32_t j = 0; j < length; ++j) {
                if (bins[j] >= low && bins[j] <= high) push(start + j);
            }
        }
    }

    void sync() { memory_.barrier.wait(); }

    uint64_t sum(uint64_t value) {
        return reduce(value, [](uint64_t a, uint64_t b) { return a + b; });
    }

    uint32_t max(uint32_t value) {
        return static_cast<uint32_t>(reduce(value, [](uint64_t a, uint64_t b) { return a > b ? a : b; }));
    }

    void clear_bins() { memset(weights(rank_), 0, kCoarseBins * sizeof(uint64_t)); }

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
    uint32_t part(uint32_t n, int rank) const {
        return static_cast<uint32_t>(static_cast<uint64_t>(n) * static_cast<uint64_t>(rank) / threads_);
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
