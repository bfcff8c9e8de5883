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
constexpr int kWarps = kThreads / 32;
constexpr int kMaxCluster = 8;
constexpr int kFew = 128;  // the most tokens of a row that few_tokens.cuh serves

using Count = unsigned long long;  // the 64-bit type that atomicAdd takes
using Reduce = cub::BlockReduce<Count, kThreads>;
using Scan = cub::BlockScan<Count, kThreads>;

// What rows that are drawn from few tokens need of it. Tokens are few_tokens.cuh's entries.
struct FewMemory {
    uint64_t runs[kMaxCluster][kFew];  // the first block's: every block's tokens, sorted
    uint64_t sorted[kFew], weights[kFew];
    uint64_t found[kFew], best[kWarps];
    uint32_t inverted_low[kWarps], sums[kWarps];
    uint32_t lengths[kMaxCluster];
    uint32_t length;
    int last;
};

// One block's shared memory.
struct BlockMemory {
    alignas(16) Count bins[kCoarseBins];
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
    uint32_t* list;
    FewMemory few;
};

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
__device__ __forceinline__ void cluster_sync() { cooperative_groups::this_cluster().sync(); }
__device__ __forceinline__ void cluster_arrive() { cooperative_groups::this_cluster().barrier_arrive(); }
__device__ __forceinline__ void cluster_wait() { cooperative_groups::this_cluster().barrier_wait(); }
// The kernel may begin while those before it in the stream still run, and reads nothing until they have ended. The
// next one may begin then; whatever it reads it waits for in the same way.
__device__ __forceinline__ void wait_for_launches_before() {
    cudaGridDependencySynchronize();
    cudaTriggerProgrammaticLaunchCompletion();
}
__device__ __forceinline__ uint32_t cluster_rank() { return cooperative_groups::this_cluster().block_rank(); }
__device__ __forceinline__ uint32_t cluster_size() { return cooperative_groups::this_cluster().num_blocks(); }
__device__ __forceinline__ BlockMemory& memory_of(BlockMemory& own, uint32_t rank) {
    return *cooperative_groups::this_cluster().map_shared_rank(&own, rank);
}
#else
__device__ __forceinline__ void cluster_sync() { __syncthreads(); }
__device__ __forceinline__ void cluster_arrive() {}
__device__ __forceinline__ void cluster_wait() { __syncthreads(); }
__device__ __forceinline__ void wait_for_launches_before() {}
__device__ __forceinline__ uint32_t cluster_rank() { return 0; }
__device__ __forceinline__ uint32_t cluster_size() { return 1; }
__device__ __forceinline__ BlockMemory& memory_of(BlockMemory& own, uint32_t) { return own; }
#endif

// Adds to a sum in shared memory by two additions of 32 bits: one of 64 would be a loop of compare and swap.
__device__ __forceinline__ void add_shared(Count* sum, uint64_t value) {
    auto* const halves = reinterpret_cast<uint32_t*>(sum);  // the lower one first
    const uint32_t low = static_cast<uint32_t>(value);
    const uint32_t carry = low != 0 && atomicAdd(&halves[0], low) > ~low;
    const uint32_t high = static_cast<uint32_t>(value >> 32) + carry;
    if (high != 0) atomicAdd(&halves[1], high);
}

// A count needs the lower half alone.
__device__ __forceinline__ void add_shared(Count* sum, bool counts) {
    if (counts) atomicAdd(reinterpret_cast<uint32_t*>(sum), 1u);
}

// The cluster's first block, which finishes a list.
class BlockInner {
public:
    __device__ explicit BlockInner(BlockMemory& memory) : memory_(memory) {}

    template <class F>
    __device__ __forceinline__ void for_each(uint32_t n, F f) {
#pragma unroll 1
        for (uint32_t i = threadIdx.x; i < n; i += kThreads) f(i);
    }

    __device__ __forceinline__ void clear_digits() {
        for (int i = threadIdx.x; i < kDigits; i += kThreads) {
            memory_.digit_weights[i] = 0;
            memory_.digit_counts[i] = 0;
        }
        __syncthreads();
    }

    template <class Weight>
    __device__ __forceinline__ void add_digit(int digit, Weight weight) {
        atomicAdd(&memory_.digit_counts[digit], 1u);
        add_shared(&memory_.digit_weights[digit], weight);
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
    __device__ ClusterTeam(BlockMemory& memory, uint32_t* list) : memory_(memory) {
        if (threadIdx.x == 0) memory.list = list;
    }

    __device__ __forceinline__ bool leads() const { return rank() == 0 && threadIdx.x == 0; }
    __device__ __forceinline__ void sync() { cluster_sync(); }
    // Ids are shared out in one way only.
    __device__ __forceinline__ void sync_before_tiles() {}

    // Every block has a contiguous part of the row, so that it finds most of its own writes in its L1.
    template <class F>
    __device__ __forceinline__ void for_each(uint32_t n, F f) {
        const uint32_t part = (n + blocks() - 1) / blocks();
        const uint32_t start = rank() * part;
        const uint32_t end = start + part < n ? start + part : n;
        for (uint32_t i = start + threadIdx.x; i < end; i += kThreads) f(i);
    }

    template <class Bin, class Weight>
    __device__ __forceinline__ void add_to_bins(uint32_t n, Bin bin, Weight weight) {
        for_each(n, [&](uint32_t i) {
            const auto w = weight(i);
            if (w != 0) add_shared(&memory_.bins[bin(i)], w);
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

    // The largest of either.
    __device__ Maxima max(uint32_t first, uint32_t second) {
        const auto larger = [](Count a, Count b) {
            const Count high = a >> 32 > b >> 32 ? a : b, low = static_cast<uint32_t>(a) > static_cast<uint32_t>(b) ? a : b;
            return (high & ~0xFFFFFFFFull) | (low & 0xFFFFFFFFull);
        };
        const Count both = static_cast<Count>(first) << 32 | second;
        const Count largest = combine(Reduce(memory_.reduce).Reduce(both, larger), larger);
        return {static_cast<uint32_t>(largest >> 32), static_cast<uint32_t>(largest)};
    }

    // Clears the list too: whoever has read it has met the others since.
    __device__ void clear_bins() {
        if (leads()) memory_.list_length = 0;
        for (int i = threadIdx.x; i < kCoarseBins; i += kThreads) memory_.bins[i] = 0;
        __syncthreads();
    }

    __device__ CoarseCrossing find_bin(uint64_t target) {
        cluster_sync();
        if (rank() == 0) find_combined_bin(target);
        cluster_sync();
        return leader().bin;
    }

    __device__ void clear_list() {
        if (leads()) memory_.list_length = 0;
        cluster_sync();
    }

    __device__ __forceinline__ void push(uint32_t id) { memory_.list[atomicAdd(&leader().list_length, 1u)] = id; }
    __device__ void close_list() { cluster_sync(); }
    __device__ __forceinline__ const uint32_t* list() const { return memory_.list; }
    __device__ __forceinline__ uint32_t list_length() const { return leader().list_length; }

    // The list has been closed, so that all have met since they wrote what f reads.
    template <class F>
    __device__ __forceinline__ Selection inner(F f) {
        if (rank() == 0) {
            BlockInner inner(memory_);
            const Selection selection = f(inner);
            if (threadIdx.x == 0) memory_.selection = selection;
        }
        cluster_sync();
        return leader().selection;
    }

private:
    // Two partials alternate: one is written while others may still read the other.
    template <class Combine>
    __device__ __forceinline__ Count combine(Count block_result, Combine combine) {
        turn_ ^= 1;
        if (threadIdx.x == 0) memory_.partial[turn_] = block_result;
        cluster_sync();
        Count result = memory_of(memory_, 0).partial[turn_];
        for (uint32_t other = 1; other < blocks(); ++other) {
            result = combine(result, memory_of(memory_, other).partial[turn_]);
        }
        return result;
    }

    // The first block reads the others' bins, 16 bytes at a time.
    __device__ void find_combined_bin(uint64_t target) {
        constexpr int kEach = kCoarseBins / kThreads;
        static_assert(kEach == 4, "a thread has two pairs of bins");
        if (threadIdx.x == 0) memory_.bin = {-1, 0};
        Count weights[kEach] = {}, before[kEach];
#pragma unroll 1
        for (uint32_t block = 0; block < blocks(); ++block) {
            const auto* const pairs = reinterpret_cast<const ulonglong2*>(memory_of(memory_, block).bins);
            const ulonglong2 first = pairs[2 * threadIdx.x], second = pairs[2 * threadIdx.x + 1];
            weights[0] += first.x;
            weights[1] += first.y;
            weights[2] += second.x;
            weights[3] += second.y;
        }
        Scan(memory_.scan).ExclusiveSum(weights, before);
        for (int j = 0; j < kEach; ++j) {
            if (weights[j] != 0 && before[j] <= target && target < before[j] + weights[j]) {
                memory_.bin = {static_cast<int>(threadIdx.x) * kEach + j, before[j]};
            }
        }
    }

    // Asked for anew wherever they are needed: a thread has no register to spare for them.
    static __device__ __forceinline__ uint32_t rank() { return cluster_rank(); }
    static __device__ __forceinline__ uint32_t blocks() { return cluster_size(); }
    __device__ __forceinline__ BlockMemory& leader() const { return memory_of(memory_, 0); }

    BlockMemory& memory_;
    int turn_ = 0;
};

}  // namespace GPTKERN_ISA
}  // namespace gptkern
