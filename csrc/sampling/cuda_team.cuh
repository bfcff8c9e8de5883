// The GPU's team: the blocks of one thread-block cluster share a row (before sm_90, one block has a row).
//
// Every block makes histograms and reductions in its shared memory, and they are combined over distributed shared
// memory. The numbers are integers, so the order of the additions does not matter.
#pragma once

#include <cooperative_groups.h>

#include "sampling/row_part.cuh"
#include "sampling/select.h"

namespace gptkern {
inline namespace GPTKERN_ISA {

constexpr int kWarps = kThreads / 32;
constexpr int kMaxCluster = 8;
constexpr int kFew = 128;  // the most tokens of a row that few_tokens.cuh serves

using Count = unsigned long long;
constexpr int kNumbers = 3;  // the most that a team combines at once

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
    Count of_warps[kNumbers][kWarps];
    Count partial[2][kNumbers];
    CoarseCrossing bin;
    DigitCrossing digit;
    Selection selection;
    uint32_t published;
    uint32_t list_length;
    uint32_t* list;
    RowPart part;
    uint32_t outside;
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

// One warp: the sum of the lanes up to and with this one.
template <class T>
__device__ __forceinline__ T warp_sums(T value) {
#pragma unroll 1
    for (int distance = 1; distance < 32; distance *= 2) {
        const T other = __shfl_up_sync(~0u, value, distance);
        if (static_cast<int>(threadIdx.x % 32) >= distance) value += other;
    }
    return value;
}

// The sum of the values of all threads of a block before this one.
__device__ __forceinline__ Count sum_before(BlockMemory& memory, Count value) {
    const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const Count through = warp_sums(value);
    if (lane == 31) memory.of_warps[0][warp] = through;
    __syncthreads();
    const Count warps = warp_sums(lane < warp ? memory.of_warps[0][lane] : 0);
    return __shfl_sync(~0u, warps, 31) + through - value;
}

// Numbers that threads have, and that are combined.
struct Sum {
    Count value;
    __device__ __forceinline__ void add(Count other) { value += other; }
};
struct Max {
    Count value;
    __device__ __forceinline__ void add(Count other) { value = other > value ? other : value; }
};

// Combines the numbers of lanes that are up to ``distance`` apart.
template <class... Numbers>
__device__ __forceinline__ void combine_lanes(int distance, Numbers&... numbers) {
#pragma unroll 1
    for (; distance > 0; distance /= 2) (numbers.add(__shfl_xor_sync(~0u, numbers.value, distance)), ...);
}

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
        const Count before = sum_before(memory_, weight);
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

// A block, which edits its part of a row alone.
class Block {
public:
    __device__ explicit Block(BlockMemory& memory) : memory_(memory) {}

    // Every block reads lists of ids whole.
    template <class F>
    __device__ __forceinline__ void for_each_here(uint32_t n, F f) {
#pragma unroll 1
        for (uint32_t i = threadIdx.x; i < n; i += kThreads) f(i);
    }

    __device__ __forceinline__ bool owns(uint32_t id, uint32_t) const { return memory_.part.has(id); }
    __device__ __forceinline__ void sync_here() { __syncthreads(); }

    __device__ __forceinline__ bool any_here(bool value) {
        if (threadIdx.x == 0) memory_.outside = 0;
        __syncthreads();
        if (value) atomicAdd(&memory_.outside, 1u);
        __syncthreads();
        return memory_.outside != 0;
    }

protected:
    BlockMemory& memory_;
};

class ClusterTeam : public Block {
public:
    static constexpr bool kTiles = false;
    static constexpr bool kRewriteSees = true;
    __device__ ClusterTeam(BlockMemory& memory, uint32_t* list) : Block(memory) {
        if (threadIdx.x == 0) memory.list = list;
    }

    __device__ __forceinline__ bool leads() const { return rank() == 0 && threadIdx.x == 0; }
    __device__ __forceinline__ void sync() { cluster_sync(); }

    // The part lies in shared memory: a thread has no registers to spare for it.
    __device__ __forceinline__ void begin_row(const Logits& logits, uint32_t n) {
        if (threadIdx.x == 0) memory_.part = RowPart(logits, n, rank(), blocks());
        __syncthreads();
    }

    __device__ __forceinline__ float* placed(float* buffer, const Logits& logits) const {
        return gptkern::placed(buffer, logits);
    }

    __device__ __forceinline__ KeyRange rewrite(const Logits& logits, uint32_t, const DenseEdits& edits, float* raw,
                                                float* values) {
        KeyRange seen{};
        rewrite_part(logits, memory_.part, edits, raw, values, [&](uint32_t id, const auto& edited) {
            for (const float v : edited) seen.add(id++, v);
        });
        return seen;
    }

    // Whoever reads a row's values looks at this block's part first.
    __device__ __forceinline__ void sync_after_rewrite() { __syncthreads(); }

    // f(i, values[i]) for this block's part of the row. It stands once in the machine code: what it computes is long,
    // and other warps are there to fill the waits.
    template <class F>
    __device__ __forceinline__ void over_values(const float* values, uint32_t, F f) {
        const RowPart part = memory_.part;
        // Two groups before the first whole one, as up to seven ids may be, and one after the last have some of the part.
        const uint32_t groups = part.groups<4>() + 3;
#pragma unroll 1
        for (uint32_t at = threadIdx.x; at < groups; at += kThreads) {
            const uint32_t first = part.first() + (at - 2) * 4;
            const bool whole = at > 1 && at < groups - 1;
            uint4 four{};
            if (whole) four = *reinterpret_cast<const uint4*>(values + first);
#pragma unroll 1
            for (int i = 0; i < 4; ++i) {
                if (part.has(first + i)) f(first + i, whole ? bit_cast<float>(word_of(four, i)) : values[first + i]);
            }
        }
    }

    // f(i) for this block's share of other things.
    template <class F>
    __device__ __forceinline__ void for_each(uint32_t n, F f) {
        const uint32_t share = (n + blocks() - 1) / blocks();
        const uint32_t start = rank() * share;
        const uint32_t end = start + share < n ? start + share : n;
#pragma unroll 1
        for (uint32_t i = start + threadIdx.x; i < end; i += kThreads) f(i);
    }

    template <class Bin, class Weight>
    __device__ __forceinline__ void add_to_bins(const float* values, uint32_t n, Bin bin, Weight weight) {
        over_values(values, n, [&](uint32_t i, float v) {
            const auto w = weight(i, v);
            if (w != 0) add_shared(&memory_.bins[bin(i, v)], w);
        });
    }

    template <class Bin>
    __device__ __forceinline__ void list_bins(const float* values, uint32_t n, Bin bin, int low, int high) {
        over_values(values, n, [&](uint32_t i, float v) {
            const int b = bin(i, v);
            if (b >= low && b <= high) push(i);
        });
    }

    __device__ __forceinline__ uint64_t sum(uint64_t value) {
        Sum sum{value};
        combine(sum);
        return sum.value;
    }

    __device__ __forceinline__ Extremes combined(const KeyRange& seen) {
        Max best{static_cast<Count>(seen.high) << 32 | static_cast<uint32_t>(~seen.id)}, inverted_low{seen.inverted_low};
        combine(best, inverted_low);
        return {static_cast<uint32_t>(best.value >> 32), ~static_cast<uint32_t>(inverted_low.value),
                ~static_cast<uint32_t>(best.value)};
    }

    // All at once, whatever is asked for.
    __device__ __forceinline__ Measured combined(const Measured& own, bool, bool) {
        Sum total{own.total}, moment{own.moment};
        Max best{own.best};
        combine(total, moment, best);
        return {total.value, moment.value, static_cast<uint32_t>(best.value)};
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
    // Combines the numbers of all threads of the cluster. Two partials alternate: one is written while others may still
    // read the other.
    template <class... Numbers>
    __device__ __forceinline__ void combine(Numbers&... numbers) {
        const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
        combine_lanes(16, numbers...);
        int i = 0;
        if (lane == 0) ((memory_.of_warps[i++][warp] = numbers.value), ...);
        __syncthreads();
        i = 0;
        ((numbers.value = memory_.of_warps[i++][lane % kWarps]), ...);
        combine_lanes(kWarps / 2, numbers...);
        turn_ ^= 1;
        i = 0;
        if (threadIdx.x == 0) ((memory_.partial[turn_][i++] = numbers.value), ...);
        cluster_sync();
        ((numbers.value = 0), ...);
#pragma unroll 1
        for (uint32_t block = 0; block < blocks(); ++block) {
            const Count* const partial = memory_of(memory_, block).partial[turn_];
            i = 0;
            (numbers.add(partial[i++]), ...);
        }
    }

    // The first block reads the others' bins, 16 bytes at a time.
    __device__ void find_combined_bin(uint64_t target) {
        constexpr int kEach = kCoarseBins / kThreads;
        static_assert(kEach == 4, "a thread has two pairs of bins");
        if (threadIdx.x == 0) memory_.bin = {-1, 0};
        Count weights[kEach] = {};
#pragma unroll 1
        for (uint32_t block = 0; block < blocks(); ++block) {
            const auto* const pairs = reinterpret_cast<const ulonglong2*>(memory_of(memory_, block).bins);
            const ulonglong2 first = pairs[2 * threadIdx.x], second = pairs[2 * threadIdx.x + 1];
            weights[0] += first.x;
            weights[1] += first.y;
            weights[2] += second.x;
            weights[3] += second.y;
        }
        Count before = sum_before(memory_, weights[0] + weights[1] + weights[2] + weights[3]);
#pragma unroll
        for (int j = 0; j < kEach; ++j) {
            if (before <= target && target < before + weights[j]) {
                memory_.bin = {static_cast<int>(threadIdx.x) * kEach + j, before};
            }
            before += weights[j];
        }
    }

    // Asked for anew wherever they are needed: a thread has no register to spare for them.
    static __device__ __forceinline__ uint32_t rank() { return cluster_rank(); }
    static __device__ __forceinline__ uint32_t blocks() { return cluster_size(); }
    __device__ __forceinline__ BlockMemory& leader() const { return memory_of(memory_, 0); }

    int turn_ = 0;
};

}  // namespace GPTKERN_ISA
}  // namespace gptkern
