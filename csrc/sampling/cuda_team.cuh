// The GPU's team: the blocks of one thread-block cluster share a row (before sm_90, one block has a row).
//
// Every block makes histograms and reductions in its shared memory, and they are combined over distributed shared
// memory. The numbers are integers, so the order of the additions does not matter.
#pragma once

#include <cooperative_groups.h>

#include <cub/block/block_reduce.cuh>
#include <cub/block/block_scan.cuh>

#include "sampling/select.h"

namespace gptkern {
inline namespace GPTKERN_ISA {

constexpr int kThreads = 512;
constexpr int kMaxCluster = 8;

using Count = unsigned long long;  // the 64-bit type that atomicAdd takes
using Reduce = cub::BlockReduce<Count, kThreads>;
using Scan = cub::BlockScan<Count, kThreads>;

// One block's shared memory.
struct BlockMemory {
    Count bins[kCoarseBins];
    Count digit_weights[kDigits];
    uint32_t digit_counts[kDigits];
    union {
        typename Reduce::TempStorage reduce;
        typename Scan::TempStorage scan;
    };
    Count partial[2];
    CoarseCrossing bin;
    DigitCrossing digit;
    Selection selection;
    uint32_t published;
    uint32_t list_length;
};

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
__device__ __forceinline__ void cluster_sync() { cooperative_groups::this_cluster().sync(); }
__device__ __forceinline__ uint32_t cluster_rank() { return cooperative_groups::this_cluster().block_rank(); }
__device__ __forceinline__ uint32_t cluster_size() { return cooperative_groups::this_cluster().num_blocks(); }
__device__ __forceinline__ BlockMemory& memory_of(BlockMemory& own, uint32_t rank) {
    return *cooperative_groups::this_cluster().map_shared_rank(&own, rank);
}
#else
__device__ __forceinline__ void cluster_sync() { __syncthreads(); }
__device__ __forceinline__ uint32_t cluster_rank() { return 0; }
__device__ __forceinline__ uint32_t cluster_size() { return 1; }
__device__ __forceinline__ BlockMemory& memory_of(BlockMemory& own, uint32_t) { return own; }
#endif

// The cluster's first block, which finishes a list.
class BlockInner {
public:
    __device__ explicit BlockInner(BlockMemory& memory) : memory_(memory) {}

    template <class F>
    __device__ __forceinline__ void for_each(uint32_t n, F f) {
        for (uint32_t i = threadIdx.x; i < n; i += kThreads) f(i);
    }

    __device__ __forceinline__ void clear_digits() {
        for (int i = threadIdx.x; i < kDigits; i += kThreads) {
            memory_.digit_weights[i] = 0;
            memory_.digit_counts[i] = 0;
        }
        __syncthreads();
    }

    __device__ __forceinline__ void add_digit(int digit, uint64_t weight) {
        atomicAdd(&memory_.digit_counts[digit], 1u);
        if (weight != 0) atomicAdd(&memory_.digit_weights[digit], static_cast<Count>(weight));
    }

    __device__ DigitCrossing find_digit(uint64_t target) {
        __syncthreads();
        const int i = threadIdx.x;
        const Count weight = i < kDigits ? memory_.digit_weights[i] : 0;
        Count before;
        Scan(memory_.scan).ExclusiveSum(weight, before);
        if (weight != 0 && before <= target && target < before + weight) {
            memory_.digit = {i, before, memory_.digit_counts[i]};
        }
        __syncthreads();
        return memory_.digit;
    }

    __device__ __forceinline__ void publish(uint32_t id) { memory_.published = id; }

    __device__ uint32_t published() const {
        __syncthreads();
        return memory_.published;
    }

private:
    BlockMemory& memory_;
};

class ClusterTeam {
public:
    static constexpr bool kTiles = false;
    __device__ ClusterTeam(BlockMemory& memory, uint32_t* list)
        : memory_(memory), leader_(memory_of(memory, 0)), list_(list), rank_(cluster_rank()), blocks_(cluster_size()) {}

    __device__ __forceinline__ bool leads() const { return rank_ == 0 && threadIdx.x == 0; }
    __device__ __forceinline__ void sync() { cluster_sync(); }

    // Every block has a contiguous part of the row, so that it finds most of its own writes in its L1.
    template <class F>
    __device__ __forceinline__ void for_each(uint32_t n, F f) {
        const uint32_t part = (n + blocks_ - 1) / blocks_;
        const uint32_t start = rank_ * part;
        const uint32_t end = start + part < n ? start + part : n;
        for (uint32_t i = start + threadIdx.x; i < end; i += kThreads) f(i);
    }

    template <class Bin, class Weight>
    __device__ __forceinline__ void add_to_bins(uint32_t n, Bin bin, Weight weight) {
        for_each(n, [&](uint32_t i) {
            const uint64_t w = weight(i);
            if (w != 0) atomicAdd(&memory_.bins[bin(i)], static_cast<Count>(w));
        });
    }

    template <class Bin>
    __device__ __forceinline__ void list_bins(uint32_t n, Bin bin, int low, int high) {
        for_each(n, [&](uint32_t i) {
            const int b = bin(i);
            if (b >= low && b <= high) push(i);
        });
    }

    __device__ uint64_t sum(uint64_t value) {
        return combine(Reduce(memory_.reduce).Sum(value), [](Count a, Count b) { return a + b; });
    }

    __device__ uint32_t max(uint32_t value) {
        const auto larger = [](Count a, Count b) { return a > b ? a : b; };
        return static_cast<uint32_t>(combine(Reduce(memory_.reduce).Reduce(value, larger), larger));
    }

    __device__ void clear_bins() {
        for (int i = threadIdx.x; i < kCoarseBins; i += kThreads) memory_.bins[i] = 0;
        __syncthreads();
    }

    __device__ CoarseCrossing find_bin(uint64_t target) {
        cluster_sync();
        combine_bins();
        cluster_sync();
        if (rank_ == 0) find_own_bin(target);
        cluster_sync();
        return leader_.bin;
    }

    __device__ void clear_list() {
        if (leads()) memory_.list_length = 0;
        cluster_sync();
    }

    __device__ __forceinline__ void push(uint32_t id) { list_[atomicAdd(&leader_.list_length, 1u)] = id; }
    __device__ void close_list() { cluster_sync(); }
    __device__ __forceinline__ const uint32_t* list() const { return list_; }
    __device__ __forceinline__ uint32_t list_length() const { return leader_.list_length; }

    template <class F>
    __device__ __forceinline__ Selection inner(F f) {
        cluster_sync();
        if (rank_ == 0) {
            BlockInner inner(memory_);
            const Selection selection = f(inner);
            if (threadIdx.x == 0) memory_.selection = selection;
        }
        cluster_sync();
        return leader_.selection;
    }

private:
    // Two partials alternate: one is written while others may still read the other.
    template <class Combine>
    __device__ __forceinline__ Count combine(Count block_result, Combine combine) {
        turn_ ^= 1;
        if (threadIdx.x == 0) memory_.partial[turn_] = block_result;
        cluster_sync();
        Count result = memory_of(memory_, 0).partial[turn_];
        for (uint32_t other = 1; other < blocks_; ++other) {
            result = combine(result, memory_of(memory_, other).partial[turn_]);
        }
        return result;
    }

    // The cluster's sums go to the first block. Every block has a slice of the bins, which no other block reads or
    // writes meanwhile, so plain loads and stores over distributed shared memory do: no atomics. The loops stay
    // rolled, as the kernel has no register to spare.
    __device__ void combine_bins() {
        const uint32_t slice = kCoarseBins / blocks_;  // a cluster has 1, 2, 4 or 8 blocks
#pragma unroll 1
        for (uint32_t i = rank_ * slice + threadIdx.x; i < (rank_ + 1) * slice; i += kThreads) {
            Count sum = 0;
#pragma unroll 1
            for (uint32_t other = blocks_; other-- > 0;) sum += memory_of(memory_, other).bins[i];
            leader_.bins[i] = sum;
        }
    }

    __device__ void find_own_bin(uint64_t target) {
        constexpr int kEach = kCoarseBins / kThreads;
        if (threadIdx.x == 0) memory_.bin = {-1, 0};
        Count weights[kEach], before[kEach];
        for (int j = 0; j < kEach; ++j) weights[j] = memory_.bins[threadIdx.x * kEach + j];
        Scan(memory_.scan).ExclusiveSum(weights, before);
        for (int j = 0; j < kEach; ++j) {
            if (weights[j] != 0 && before[j] <= target && target < before[j] + weights[j]) {
                memory_.bin = {static_cast<int>(threadIdx.x) * kEach + j, before[j]};
            }
        }
    }

    BlockMemory& memory_;
    BlockMemory& leader_;
    uint32_t* list_;
    uint32_t rank_, blocks_;
    int turn_ = 0;
};

}  // namespace GPTKERN_ISA
}  // namespace gptkern
