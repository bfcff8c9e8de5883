// A block's part of a row, and how its threads read and rewrite it: 16 bytes a thread at once.
#pragma once

#include "sampling/edits.h"

namespace gptkern {
inline namespace GPTKERN_ISA {

constexpr int kThreads = 512;

// The number of logits before this row, counted from address 0.
__device__ __forceinline__ uint32_t element_of(const Logits& logits) {
    return static_cast<uint32_t>(reinterpret_cast<std::uintptr_t>(logits.at) >> (logits.dtype == DType::kFloat32 ? 2 : 1));
}

// The ids of a block's part. Borders between blocks lie at multiples of 16 bytes of the stored logits; so do they in a
// row of fp32 that lies as placed() says.
struct RowPart {
    uint32_t begin, end;
    uint32_t aligned;  // an id at a multiple of 16 bytes: of the first block's part maybe not the first one

    RowPart() = default;
    __device__ RowPart(const Logits& logits, uint32_t n, uint32_t rank, uint32_t blocks) {
        const uint32_t each = logits.dtype == DType::kFloat32 ? 4 : 8;
        const uint32_t head = (0u - element_of(logits)) % each;
        const uint32_t vectors = n > head ? (n - head) / each : 0, part = (vectors + blocks - 1) / blocks;
        const auto border = [&](uint32_t i) { return head + (i * part < vectors ? i * part : vectors) * each; };
        const auto within = [&](uint32_t id) { return id < n ? id : n; };
        aligned = border(rank);
        begin = rank == 0 ? 0 : within(aligned);
        end = rank == blocks - 1 ? n : within(border(rank + 1));
    }

    __device__ __forceinline__ uint32_t length() const { return end - begin; }
    __device__ __forceinline__ bool has(uint32_t id) const { return id - begin < length(); }
    // The ids from which on there are whole groups of so many, and the number of such groups.
    __device__ __forceinline__ uint32_t first() const { return aligned < end ? aligned : end; }
    template <int kEach>
    __device__ __forceinline__ uint32_t groups() const { return (end - first()) / kEach; }
};

// Where a row of fp32 lies in a buffer, so that what is at a multiple of 16 bytes in the stored logits is so there.
__device__ __forceinline__ float* placed(float* buffer, const Logits& logits) {
    return buffer + element_of(logits) % 4;
}

__device__ __forceinline__ uint32_t word_of(const uint4& q, int i) {
    return i == 0 ? q.x : i == 1 ? q.y : i == 2 ? q.z : q.w;
}

// 16 bytes of stored logits, as numbers.
template <DType kType>
struct Group;

template <>
struct Group<DType::kFloat32> {
    static constexpr int kEach = 4;
    static __device__ __forceinline__ float value(const uint4& q, int i) { return bit_cast<float>(word_of(q, i)); }
};

template <DType kType>
struct Group {
    static constexpr int kEach = 8;
    static __device__ __forceinline__ float value(const uint4& q, int i) {
        return Stored<kType>::widen(static_cast<uint16_t>(word_of(q, i / 2) >> 16 * (i % 2)));
    }
};

// f(id, values) for all of a part, over the block's threads: neighbours from id on, as an array of floats. A thread asks
// for kAsked groups before it looks at any.
template <DType kType, int kAsked, class F>
__device__ __forceinline__ void walk(const void* logits, const RowPart& part, F f) {
    constexpr int kEach = Group<kType>::kEach;
    const uint32_t first = part.first(), groups = part.groups<kEach>();
    const auto* const from = reinterpret_cast<const uint4*>(static_cast<const char*>(logits) +
                                                             static_cast<size_t>(first) * (16 / kEach));
#pragma unroll 1
    for (uint32_t at = threadIdx.x; at < groups; at += kAsked * kThreads) {
        uint4 asked[kAsked];
#pragma unroll
        for (int j = 0; j < kAsked; ++j) {
            if (at + j * kThreads < groups) asked[j] = from[at + j * kThreads];
        }
#pragma unroll
        for (int j = 0; j < kAsked; ++j) {
            if (at + j * kThreads >= groups) break;
            float values[kEach];
#pragma unroll
            for (int i = 0; i < kEach; ++i) values[i] = Group<kType>::value(asked[j], i);
            f(first + (at + j * kThreads) * kEach, values);
        }
    }
    // The values before the first group and after the last: fewer than 16.
    const uint32_t head = first - part.begin, tail = first + groups * kEach;
    if (threadIdx.x >= head + (part.end - tail)) return;
    const uint32_t id = threadIdx.x < head ? part.begin + threadIdx.x : tail + (threadIdx.x - head);
    const float value[1] = {Logits{logits, kType}[id]};
    f(id, value);
}

template <int kAsked, class F>
__device__ __forceinline__ void walk(const Logits& logits, const RowPart& part, F f) {
    if (logits.dtype == DType::kFloat32) {
        walk<DType::kFloat32, kAsked>(logits.at, part, f);
    } else if (logits.dtype == DType::kFloat16) {
        walk<DType::kFloat16, kAsked>(logits.at, part, f);
    } else {
        walk<DType::kBFloat16, kAsked>(logits.at, part, f);
    }
}

// Stores neighbours from id on.
template <int kEach>
__device__ __forceinline__ void store(float* row, uint32_t id, const float (&values)[kEach]) {
    if (row == nullptr) return;
    if constexpr (kEach == 1) {
        row[id] = values[0];
    } else {
#pragma unroll
        for (int i = 0; i < kEach; i += 4) {
            *reinterpret_cast<float4*>(row + id + i) = {values[i], values[i + 1], values[i + 2], values[i + 3]};
        }
    }
}

// The counts of neighbours from id on; 16 bytes at once where their row lies as the logits do.
template <int kEach>
__device__ __forceinline__ void load_counts(const int32_t* row, uint32_t id, int32_t (&counts)[kEach]) {
    if (kEach > 1 && reinterpret_cast<std::uintptr_t>(row + id) % 16 == 0) {
#pragma unroll
        for (int i = 0; i + 3 < kEach; i += 4) {
            const int4 four = *reinterpret_cast<const int4*>(row + id + i);
            counts[i] = four.x;
            counts[i + 1] = four.y;
            counts[i + 2] = four.z;
            counts[i + 3] = four.w;
        }
    } else {
#pragma unroll
        for (int i = 0; i < kEach; ++i) counts[i] = row[id + i];
    }
}

// The bitmask's bits of neighbours from id on, the first one lowest.
template <int kEach>
__device__ __forceinline__ uint32_t load_bits(const int32_t* bitmask, uint32_t id) {
    const uint64_t low = static_cast<uint32_t>(bitmask[id / 32]);
    const uint64_t high = static_cast<uint32_t>(bitmask[(id + kEach - 1) / 32]);
    return static_cast<uint32_t>((high << 32 | low) >> id % 32);
}

// Writes a part of a row in fp32 to ``raw`` and, edited, to ``values``; null: not asked for. seen(id, values) for the
// edited ones.
template <class Seen>
__device__ __forceinline__ void rewrite_part(const Logits& logits, const RowPart& part, const DenseEdits& edits,
                                             float* raw, float* values, Seen seen) {
    walk<1>(logits, part, [&](uint32_t id, const auto& stored) {
        constexpr int kEach = sizeof(stored) / sizeof(float);
        store(raw, id, stored);
        if (values == nullptr) return;
        float edited[kEach];
        int32_t counts[kEach] = {};
        if (edits.counts != nullptr) load_counts(edits.counts, id, counts);
        const uint32_t bits = edits.bitmask != nullptr ? load_bits<kEach>(edits.bitmask, id) : ~0u;
#pragma unroll
        for (int i = 0; i < kEach; ++i) {
            edited[i] = bits >> i & 1u ? edits.penalise(stored[i], counts[i]) : -INFINITY;
        }
        store(values, id, edited);
        seen(id, edited);
    });
}

}  // namespace GPTKERN_ISA
}  // namespace gptkern
