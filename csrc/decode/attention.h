// Attention over the paged cache, and what is written to it. A row's result depends on no other row.
#pragma once

#include "decode/pass.h"

namespace gptkern {
inline namespace GPTKERN_ISA {

template <class Kind>
class Attention {
    using Storage = typename Kind::Storage;

public:
    explicit Attention(const Pass& pass) : p_(pass), m_(pass.m), cache_(pass.call.cache) {}

    // Writes a row's keys and values of some heads to the cache.
    void store_kv(int at, int row, int head, int heads) const {
        const CpuLayer& layer = m_.layer[at];
        const int dim = m_.head_dim, position = length(row);
        const int64_t newest = slot(row, position);
        const float *const keys = p_.row(Buffer::kQ, row) + m_.q_width(), *const values = keys + m_.kv_width();
        const float rstd = whole_rstd(layer.k_norm, keys, m_.kv_width());
        float* const turned = p_.own + p_.layout.scores;
        for (int h = head; h < head + heads; ++h) {
            Storage* const key = cached(cache_.k, at, h) + newest;
            Storage* const value = cached(cache_.v, at, h) + newest;
            turn(layer, layer.k_norm, rstd, h, position, keys + h * dim, turned);
            for (int i = 0; i < dim; ++i) {
                key[i] = Kind::store(turned[i]);
                value[i] = Kind::store(values[h * dim + i]);
            }
        }
    }

    // A row's attention of some heads.
    void attend(int at, int row, int head, int heads) const {
        const CpuLayer& layer = m_.layer[at];
        const int dim = m_.head_dim, last = length(row) + 1, whole_dim = static_cast<int>(padded(dim));
        const int first = layer.window > 0 && layer.window < last ? last - layer.window : 0, seen = last - first;
        const int64_t room = padded(seen);  // of the scores of a head
        float *const scores = p_.own + p_.layout.scores, *const queries = scores + heads * room;
        float *const sums = queries + heads * whole_dim, *const turned = sums + heads * whole_dim;
        const float* const q = p_.row(Buffer::kQ, row);
        const float rstd = whole_rstd(layer.q_norm, q, m_.q_width());
        for (int h = 0; h < heads; ++h) {
            turn(layer, layer.q_norm, rstd, head + h, last - 1, q + (head + h) * dim, turned);
            for (int i = 0; i < dim; ++i) queries[h * whole_dim + Kind::place(i, dim)] = turned[i] * layer.scale;
        }
        for (int i = 0; i < heads * whole_dim; ++i) sums[i] = 0.0f;
        // Scores, weights, weighted sum of the values.
        for_blocks(row, first, last, [&](int t, int count, const int64_t* slots) {
            const Storage* keys[kLanes];
            for_heads(head, heads, [&](int h, int64_t offset) {
                const Storage* const from = cached(cache_.k, at, 0) + offset;
                for (int i = 0; i < kLanes; ++i) keys[i] = from + slots[i < count ? i : count - 1];
                float* const to = scores + h * room + t - first;
                store(to, dots(keys, queries + h * whole_dim));
                if (m_.attention_softcap == 0.0f) return;
                for (int i = 0; i < count; ++i) to[i] = capped(to[i], m_.attention_softcap);
            });
        });
        for (int h = 0; h < heads; ++h) softmax(scores + h * room, seen);
        for_blocks(row, first, last, [&](int t, int count, const int64_t* slots) {
            for_heads(head, heads, [&](int h, int64_t offset) {
                const Storage* const from = cached(cache_.v, at, 0) + offset;
                add_values(from, slots, count, scores + h * room + t - first, sums + h * whole_dim);
            });
        });
        float* const attended = p_.row(Buffer::kAttended, row) + head * dim;
        for (int h = 0; h < heads; ++h) {
            for (int i = 0; i < dim; ++i) attended[h * dim + i] = sums[h * whole_dim + Kind::place(i, dim)];
        }
    }

private:
    const Pass& p_;
    const CpuModel& m_;
    const CpuCache& cache_;

    // Tokens in the cache before a row's own.
    int length(int row) const { return cache_.lengths[p_.place(row)]; }

    // The reciprocal root mean square of all heads of queries or keys, where their norm is of all together; else 0.
    float whole_rstd(const void* norm, const float* heads, int width) const {
        float mean, rstd = 0.0f;
        if (norm != nullptr && m_.whole_qk_norm) moments(heads, width, true, m_.eps, mean, rstd);
        return rstd;
    }

    // What a norm multiplies element i by.
    float factor(const void* weight, int i) const {
        const float value = Kind::load(static_cast<const Storage*>(weight)[i]);
        return m_.unit_offset ? 1.0f + value : value;
    }

    // One head of queries or keys, normed and rotated where the layer does. ``rstd`` is ``whole_rstd``.
    void turn(const CpuLayer& layer, const void* norm, float rstd, int head, int position, const float* from,
              float* to) const {
        const int dim = m_.head_dim, half = layer.rotary / 2, start = m_.whole_qk_norm ? head * dim : 0;
        float mean;
        if (norm != nullptr && !m_.whole_qk_norm) moments(from, dim, true, m_.eps, mean, rstd);
        for (int i = 0; i < dim; ++i) to[i] = norm == nullptr ? from[i] : from[i] * rstd * factor(norm, start + i);
        const int64_t place = static_cast<int64_t>(position) * half;
        const int step = layer.interleaved ? 2 : 1, apart = layer.interleaved ? 1 : half;
        for (int i = 0; i < half; ++i) {
            const float cos = layer.cos[place + i], sin = layer.sin[place + i];
            const float first = to[i * step], second = to[i * step + apart];
            to[i * step] = first * cos - second * sin;
            to[i * step + apart] = second * cos + first * sin;
        }
    }

    // The offset of a token's keys and values in the cache, by the page table.
    int64_t slot(int row, int token) const {
        const int page = cache_.table[p_.place(row) * cache_.table_stride + token / cache_.page_size];
        return page * cache_.page_stride + token % cache_.page_size * cache_.slot_stride;
    }

    // use(token, count, their slots) for a row's tokens from ``first`` to ``last``, kLanes at a time.
    template <class Use>
    void for_blocks(int row, int first, int last, const Use& use) const {
        for (int t = first; t < last; t += kLanes) {
            const int count = last - t < kLanes ? last - t : kLanes;
            int64_t slots[kLanes];
            for (int i = 0; i < count; ++i) slots[i] = slot(row, t + i);
            use(t, count, slots);
        }
    }

    Storage* cached(void* cache, int layer, int kv_head) const {
        return static_cast<Storage*>(cache) + layer * cache_.layer_stride + kv_head * m_.head_dim;
    }

    // use(h, offset of the keys and values that query head ``head`` + h reads).
    template <class Use>
    void for_heads(int head, int heads, const Use& use) const {
        const int group = m_.heads / m_.kv_heads;
        int64_t offset = static_cast<int64_t>(head / group) * m_.head_dim;
        int of_group = head % group;
        for (int h = 0; h < heads; ++h) {
            use(h, offset);
            if (++of_group < group) continue;
            of_group = 0;
            offset += m_.head_dim;
        }
    }

    // Products of kLanes keys with a query.
    Vec dots(const Storage* const* keys, const float* query) const {
        const int dim = m_.head_dim, whole = dim / kStep * kStep;
        Vec total[kLanes];
#pragma GCC unroll 16
        for (int t = 0; t < kLanes; ++t) {
            total[t] = zeros();
            for (int i = 0; i < whole; i += kStep) {
                Vec a, b;
                Kind::pair(keys[t] + i, a, b);
                total[t] = fma(b, load(query + i + kLanes), fma(a, load(query + i), total[t]));
            }
        }
        Vec value = sums_of(total);
        if (whole == dim) return value;
        float rest[kLanes];
        store(rest, value);
        for (int t = 0; t < kLanes; ++t) {
            for (int i = whole; i < dim; ++i) rest[t] = __builtin_fmaf(Kind::load(keys[t][i]), query[i], rest[t]);
        }
        return load(rest);
    }

    // sums += the values of some tokens, each by its weight, in the tokens' order.
    void add_values(const Storage* values, const int64_t* slots, int count, const float* weights, float* sums) const {
        const int dim = m_.head_dim, whole = dim / kStep * kStep;
        for (int i = 0; i < whole; i += kStep) {
            Vec first = load(sums + i), second = load(sums + i + kLanes);
            for (int t = 0; t < count; ++t) {
                Vec a, b;
                Kind::pair(values + slots[t] + i, a, b);
                const Vec weight = all(weights[t]);
                first = fma(a, weight, first);
                second = fma(b, weight, second);
            }
            store(sums + i, first);
            store(sums + i + kLanes, second);
        }
        for (int i = whole; i < dim; ++i) {
            for (int t = 0; t < count; ++t) {
                sums[i] = __builtin_fmaf(Kind::load(values[slots[t] + i]), weights[t], sums[i]);
            }
        }
    }

    // Softmax in place.
    static void softmax(float* scores, int n) {
        float largest = scores[0];
        for (int i = 1; i < n; ++i) largest = scores[i] > largest ? scores[i] : largest;
        const int whole = n / kLanes * kLanes;
        double total = 0.0;
        for (int i = 0; i < whole; i += kLanes) {
            const Vec weights = exponential(sub(load(scores + i), all(largest)));
            store(scores + i, weights);
            total += sum(weights);
        }
        if (whole < n) {
            float rest[kLanes] = {};
            for (int i = whole; i < n; ++i) rest[i - whole] = scores[i] - largest;
            store(rest, exponential(load(rest)));
            for (int i = whole; i < n; ++i) total += scores[i] = rest[i - whole];
        }
        const float inverse = static_cast<float>(1.0 / total);
        for (int i = 0; i < n; ++i) scores[i] *= inverse;
    }
};

}  // namespace GPTKERN_ISA
}  // namespace gptkern
