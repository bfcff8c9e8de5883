// Rows that are drawn from few tokens (top-k up to kFew, maybe top-p and min-p after it, or the most likely one): two
// meetings of the cluster, the first of which nobody waits for.
//
// Every block edits its part and finds its most likely tokens by itself, sorts them, and writes them into the first
// block's shared memory. That block merges the runs, and one warp of it does the rest. Tokens are those of sample_row: both
// select exactly, by descending value, then ascending id.
#pragma once

#include "sampling/cuda_team.cuh"
#include "sampling/sample_row.h"

namespace gptkern {
inline namespace GPTKERN_ISA {

// Whether a row is one of these. All else, bad parameters too, is sample_row's.
__device__ __forceinline__ bool wants_few(const SampleArguments& a, const RowParams& p) {
    if (a.logprobs >= 0 || a.probs != nullptr) return false;
    if (check_params(p, a.vocab, a.logprobs, a.counts != nullptr) != kOk) return false;
    if (p.temperature == 0) return true;
    const bool cut = p.top_k > 0 && p.top_k <= kFew && p.top_k < a.vocab;
    return cut && p.typical_p == 1 && p.epsilon_cutoff == 0 && p.eta_cutoff == 0;
}

// A token and its value as one number: more likely tokens have a larger one, and of two alike the lower id.
__device__ __forceinline__ uint64_t entry_of(uint32_t id, float v) {
    return static_cast<uint64_t>(order_key(v)) << 32 | static_cast<uint32_t>(~id);
}
__device__ __forceinline__ uint32_t key_of(uint64_t entry) { return static_cast<uint32_t>(entry >> 32); }
__device__ __forceinline__ uint32_t id_of(uint64_t entry) { return ~static_cast<uint32_t>(entry); }

// One warp: the largest of its lanes' numbers.
__device__ __forceinline__ uint64_t warp_max(uint64_t value) {
    const uint32_t high = __reduce_max_sync(~0u, static_cast<uint32_t>(value >> 32));
    const uint32_t low = key_of(value) == high ? static_cast<uint32_t>(value) : 0;
    return static_cast<uint64_t>(high) << 32 | __reduce_max_sync(~0u, low);
}

// kEdits: the row may be edited, in the buffer ``values``.
template <bool kEdits>
class FewTokens {
public:
    __device__ FewTokens(BlockMemory& memory, const SampleArguments& a, int64_t row, float* values)
        : memory_(memory), few_(memory.few), a_(a), row_(row),
          logits_(logits_at(a.logits, a.dtype, row * a.row_stride)), values_(placed(values, logits_)),
          part_(logits_, static_cast<uint32_t>(a.vocab), cluster_rank(), cluster_size()),
          temperature_(a.params[row].temperature), top_p_(a.params[row].top_p), min_p_(a.params[row].min_p),
          wanted_(temperature_ == 0 ? 1 : static_cast<uint32_t>(a.params[row].top_k)) {}

    __device__ __forceinline__ void sample() {
        cluster_arrive();  // this block has begun, and is done with the row before
        const uint32_t rank = cluster_rank();
        const RowCounter counter = a_.counters[row_];
        const uint64_t uniform = uniforms(counter.seed, counter.request, counter.step).token;
        const uint32_t found = find();
        cluster_wait();
        give(found, memory_of(memory_, 0).few, rank);
        cluster_sync();  // who is not the first block has nothing more to do
        if (rank != 0) return;
        const uint32_t count = merge();
        __syncthreads();
        if (threadIdx.x < 32) finish(count, uniform);
    }

private:
    // few_.found takes the most likely tokens of this part, all that may be among the row's ``wanted_``; their number.
    __device__ __forceinline__ uint32_t find() {
        auto* const bins = reinterpret_cast<uint32_t*>(memory_.bins);
        for (int i = threadIdx.x; i < kCoarseBins; i += kThreads) bins[i] = 0;
        if (threadIdx.x == 0) few_.length = 0;
        uint64_t best = 0;
        uint32_t inverted_low = 0;
        see_all([&](uint32_t id, const auto& values) {
            for (const float v : values) {
                const uint64_t entry = entry_of(id++, v);
                best = entry > best ? entry : best;
                const uint32_t inverted = v > -INFINITY ? ~key_of(entry) : 0;
                inverted_low = inverted > inverted_low ? inverted : inverted_low;
            }
        });
        const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
        best = warp_max(best);
        inverted_low = __reduce_max_sync(~0u, inverted_low);
        if (lane == 0) {
            few_.best[warp] = best;
            few_.inverted_low[warp] = inverted_low;
        }
        __syncthreads();
        best = warp_max(few_.best[lane % kWarps]);
        const uint32_t bottom = ~__reduce_max_sync(~0u, few_.inverted_low[lane % kWarps]);
        // Nothing that is allowed; or the one token that is asked for or makes the row a bad one.
        if (key_of(best) <= kKeyOfMinusInfinity) return 0;
        if (wanted_ == 1 || key_of(best) >= kKeyOfInfinity) {
            if (threadIdx.x == 0) few_.found[0] = best;
            __syncthreads();
            return 1;
        }
        const DownwardBins bin = downward_bins(from_order_key(key_of(best)), from_order_key(bottom), 64.0);
        see_again([&](uint32_t, const auto& values) {
            for (const float v : values) {
                if (v > -INFINITY) atomicAdd(&bins[bin(v)], 1u);
            }
        });
        const int last = last_bin(bins);
        const auto is_wanted = [&](float v) { return v > -INFINITY && bin(v) <= last; };
        see_again([&](uint32_t id, const auto& values) {
            float most = values[0];
            for (const float v : values) most = v > most ? v : most;
            if (!is_wanted(most)) return;
            // Few are: what else is read again needs no registers, and little code.
            const uint32_t end = id + sizeof(values) / sizeof(float);
#pragma unroll 1
            for (; id < end; ++id) {
                if (is_wanted(value(id))) list(entry_of(id, value(id)));
            }
        });
        __syncthreads();
        return few_.length <= kFew ? few_.length : find_exactly();
    }

    // f(first, values) for all of the part, as it is drawn from.
    template <class F>
    __device__ __forceinline__ void see_all(F f) {
        if constexpr (!kEdits) {
            walk<4>(logits_, part_, f);
        } else {
            const Row row = row_of(a_, row_, 0);
            const DenseEdits dense = dense_edits(row);
            const bool listed = is_listed(row);
            rewrite_part(logits_, part_, dense, nullptr, values_, [&](uint32_t first, const auto& edited) {
                if (!listed) f(first, edited);
            });
            if (threadIdx.x == 0) memory_.part = part_;
            __syncthreads();
            if (!listed) return;
            Block block(memory_);
            knows_ids_ = edit_listed(block, row, dense, values_) == kOk;
            see_again(f);
        }
    }

    // The same once it is edited, with fewer loads at once.
    template <class F>
    __device__ __forceinline__ void see_again(F f) const {
        if constexpr (kEdits) {
            walk<DType::kFloat32, 1>(values_, part_, f);
        } else {
            walk<1>(logits_, part_, f);
        }
    }

    __device__ __forceinline__ float value(uint32_t id) const {
        if constexpr (kEdits) return values_[id];
        return logits_[id];
    }

    // The bin with this part's last token that is wanted; the last bin if all are.
    __device__ __forceinline__ int last_bin(const uint32_t* bins) {
        constexpr int kBinsEach = kCoarseBins / kThreads;
        static_assert(kBinsEach == 4, "a thread reads its bins as one vector");
        const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
        __syncthreads();
        const uint4 own = reinterpret_cast<const uint4*>(bins)[threadIdx.x];
        const uint32_t sum = own.x + own.y + own.z + own.w, through = warp_sums(sum);
        if (lane == 31) few_.sums[warp] = through;
        __syncthreads();
        const uint32_t other = lane < kWarps ? few_.sums[lane] : 0;
        const uint32_t ahead = __reduce_add_sync(~0u, lane < warp ? other : 0) + through - sum;
        const uint32_t all = __reduce_add_sync(~0u, other);
        if (ahead < wanted_ && wanted_ <= ahead + sum) {
            const int first = static_cast<int>(threadIdx.x) * kBinsEach;
            few_.last = wanted_ <= ahead + own.x ? first
                      : wanted_ <= ahead + own.x + own.y ? first + 1
                      : wanted_ <= ahead + own.x + own.y + own.z ? first + 2 : first + 3;
        }
        if (all < wanted_ && threadIdx.x == 0) few_.last = kCoarseBins - 1;
        __syncthreads();
        return few_.last;
    }

    __device__ __forceinline__ void list(uint64_t entry) {
        const uint32_t place = atomicAdd(&few_.length, 1u);
        if (place < kFew) few_.found[place] = entry;
    }

    // Too many are alike: the last one that is wanted is found by its exact value and id.
    __device__ uint32_t find_exactly() {
        BlockInner inner(memory_);
        const Ids ids{part_.begin};
        const auto key = [&](uint32_t id) { return static_cast<uint64_t>(~order_key(value(id))); };
        const auto one = [&](uint32_t id) { return static_cast<uint64_t>(value(id) > -INFINITY); };
        const uint32_t last = select_in_list(inner, ids, part_.length(), 32, key, one, wanted_ - 1).id;
        const uint64_t least = entry_of(last, value(last));
        if (threadIdx.x == 0) few_.length = 0;
        __syncthreads();
#pragma unroll 1
        for (uint32_t id = part_.begin + threadIdx.x; id < part_.end; id += kThreads) {
            const uint64_t entry = entry_of(id, value(id));
            if (entry >= least) list(entry);
        }
        __syncthreads();
        return few_.length;
    }

    // ids[i] = begin + i: a part's ids as a list.
    struct Ids {
        uint32_t begin;
        __device__ __forceinline__ uint32_t operator[](uint32_t i) const { return begin + i; }
    };

    // Writes this block's tokens to the first block's memory, best first, no more than are wanted; the rest is 0.
    __device__ __forceinline__ void give(uint32_t found, FewMemory& leader, uint32_t rank) {
        static_assert(kThreads == 4 * kFew, "four threads rank a token");
        const uint32_t own = threadIdx.x / 4;
        const uint64_t entry = own < found ? few_.found[own] : 0;
        uint32_t ahead = 0;
        for (uint32_t j = threadIdx.x % 4; j < found; j += 4) ahead += few_.found[j] > entry;
        ahead += __shfl_xor_sync(~0u, ahead, 1);
        ahead += __shfl_xor_sync(~0u, ahead, 2);
        const uint32_t length = found < wanted_ ? found : wanted_;
        if (threadIdx.x % 4 == 0) {
            if (own < found && ahead < wanted_) leader.runs[rank][ahead] = entry;
            if (own >= length) leader.runs[rank][own] = 0;
        }
        if (threadIdx.x == 0) leader.lengths[rank] = length;
    }

    // Merges the runs into few_.sorted, whose rest is 0; the number of tokens in it.
    __device__ __forceinline__ uint32_t merge() {
        const uint32_t blocks = cluster_size();
        uint32_t all = 0;
        for (uint32_t r = 0; r < blocks; ++r) all += few_.lengths[r];
#pragma unroll 1
        for (uint32_t place = threadIdx.x; place < blocks * kFew; place += kThreads) {
            const uint32_t run = place / kFew, at = place % kFew;
            if (at >= few_.lengths[run]) continue;
            const uint64_t entry = few_.runs[run][at];
            // How many of every run are ahead, by bisection; of four runs at once.
            uint32_t rank = 0;
#pragma unroll 4
            for (uint32_t r = 0; r < blocks; ++r) {
                uint32_t ahead = 0;
#pragma unroll
                for (uint32_t step = kFew / 2; step > 0; step /= 2) {
                    ahead += few_.runs[r][ahead + step - 1] > entry ? step : 0;
                }
                rank += ahead + (few_.runs[r][ahead] > entry);
            }
            if (rank < wanted_) few_.sorted[rank] = entry;
        }
        const uint32_t count = all < wanted_ ? all : wanted_;
        if (threadIdx.x >= count && threadIdx.x < kFew) few_.sorted[threadIdx.x] = 0;
        return count;
    }

    // One warp, whose lanes have kEach neighbours of few_.sorted each: the other filters, the draw, the results.
    __device__ __forceinline__ void finish(uint32_t count, uint64_t uniform) {
        const uint32_t lane = threadIdx.x;
        const uint32_t top = count > 0 ? key_of(few_.sorted[0]) : kKeyOfMinusInfinity;
        const Status status = knows_ids_ ? check_largest(top) : kBadTokenId;
        uint32_t token = 0;
        if (status == kOk) token = temperature_ == 0 ? id_of(few_.sorted[0]) : draw(count, top, uniform);
        if (lane != 0) return;
        a_.tokens[row_] = token;
        a_.status[row_] = status;
        if (a_.commit == Commit::kYes && status == kOk) commit_row(a_, row_);
    }

    __device__ __forceinline__ uint32_t draw(uint32_t count, uint32_t top, uint64_t uniform) {
        const uint32_t first = threadIdx.x * kEach;
        const float v_max = from_order_key(top);
        const double per_unit = log2e_over(temperature_);
        uint64_t entries[kEach], weights[kEach], sum = 0;
#pragma unroll
        for (uint32_t i = 0; i < kEach; ++i) {
            const bool there = first + i < count;
            entries[i] = few_.sorted[first + i];
            const float v = from_order_key(there ? key_of(entries[i]) : top);
            weights[i] = there ? weight_of(halvings(v_max, v, per_unit)) : 0;
            sum += weights[i];
        }
        if (top_p_ < 1) {
            const uint64_t through = warp_sums(sum), total = __shfl_sync(~0u, through, 31);
            const uint64_t target = mass_target(top_p_, total);
            uint64_t before = through - sum;
            uint32_t last = 0;
#pragma unroll
            for (uint32_t i = 0; i < kEach; ++i) {
                if (before <= target && target < before + weights[i]) last = first + i + 1;
                before += weights[i];
            }
            count = __reduce_max_sync(~0u, last);
        }
        const uint64_t least = min_p_ > 0 ? rounded_up(min_p_ * static_cast<double>(kMaxWeight)) : 0;
        sum = 0;
#pragma unroll
        for (uint32_t i = 0; i < kEach; ++i) {
            const bool passes = first + i < count && (weights[i] >= least || key_of(entries[i]) == top);
            weights[i] = passes ? weights[i] : 0;
            few_.weights[first + i] = weights[i];
            sum += weights[i];
        }
        const uint64_t total = __shfl_sync(~0u, warp_sums(sum), 31);
        const uint64_t target = multiply_high(uniform, total);
        __syncwarp();
        // The sum of the weights of lower ids, for each of this lane's tokens.
        uint64_t before[kEach] = {};
#pragma unroll 2
        for (uint32_t j = 0; j < count; ++j) {
            const uint64_t weight = few_.weights[j];
            const uint32_t id = id_of(few_.sorted[j]);
#pragma unroll
            for (uint32_t i = 0; i < kEach; ++i) before[i] += id < id_of(entries[i]) ? weight : 0;
        }
        uint32_t token = 0;
#pragma unroll
        for (uint32_t i = 0; i < kEach; ++i) {
            if (before[i] <= target && target < before[i] + weights[i]) token = id_of(entries[i]);
        }
        return __reduce_max_sync(~0u, token);
    }

    static constexpr uint32_t kEach = kFew / 32;

    BlockMemory& memory_;
    FewMemory& few_;
    const SampleArguments& a_;
    const int64_t row_;
    const Logits logits_;
    float* const values_;
    const RowPart part_;
    bool knows_ids_ = true;
    const double temperature_, top_p_, min_p_;  // read once: a meeting empties the L1 cache
    const uint32_t wanted_;
};

}  // namespace GPTKERN_ISA
}  // namespace gptkern
