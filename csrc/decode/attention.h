// Attention over the paged cache, and what is written to it. A row's result depends on no other row.
#pragma once

#include "decode/pass.h"

namespace gptkern {
inline namespace GPTKERN_ISA {

template <class Kind>
class Attention {
    using Storage = typename Kind::Storage;

public:
    explicit Attention(const Pass& pass)
        : p_(pass), m_(pass.m), cache_(pass.call.cache), width_(padded(pass.m.head_dim)) {}

    // Writes a row's keys and values of some heads to the cache.
    void store_kv(int at, int row, int head, int heads) const {
        const CpuLayer& layer = m_.layer[at];
        const int dim = m_.head_dim, position = length(row);
        const int64_t newest = slot(row, position);
        const float *const keys = p_.row(Buffer::kQ, row) + m_.q_width(), *const values = keys + m_.kv_width();
        const float rstd = whole_rstd(layer.k_norm, keys, m_.kv_width());
        float* const turned = p_.own + p_.layout.turned;
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

    // The attention of some heads of ``rows`` rows, which are consecutive tokens of one sequence: a row's is the same in
    // any company. ``rows * heads`` is at most ``most_queries``.
    void attend(int at, int row, int rows, int head, int heads) const {
        const CpuLayer& layer = m_.layer[at];
        const int end = length(row + rows - 1) + 1, start = seen_from(layer, row), queries = rows * heads;
        const int64_t room = padded(end - start);
        float *const scores = p_.own + p_.layout.scores, *const turned = scores + queries * room;
        float *const sums = turned + queries * width_, *const block = sums + queries * width_;
        for (int r = 0; r < rows; ++r) turn_queries(layer, row + r, head, heads, turned + r * width_, rows * width_);
        for (int64_t i = 0; i < queries * width_; ++i) sums[i] = 0.0f;
        // Scores, weights, weighted sum of the values.
        for_blocks(row + rows - 1, start, end, [&](int t, int count, const int64_t* slots) {
            for_heads(head, heads, [&](int h, int64_t offset) {
                const Keys keys(*this, cached(cache_.k, at, 0) + offset, slots, count, rows, block);
                for (int r = 0; r < rows; ++r) {
                    if (t > length(row + r)) continue;
                    float* const to = scores + (h * rows + r) * room + t - start;
                    store(to, capped(keys.dots(turned + (h * rows + r) * width_), m_.attention_softcap));
                }
            });
        });
        for (int i = 0; i < queries; ++i) {
            const int r = row + i % rows, first = seen_from(layer, r);
            softmax(scores + i * room + first - start, length(r) + 1 - first);
        }
        for_blocks(row + rows - 1, start, end, [&](int t, int count, const int64_t* slots) {
            for_heads(head, heads, [&](int h, int64_t offset) {
                const Values values(*this, cached(cache_.v, at, 0) + offset, slots, count, rows, block);
                for (int r = 0; r < rows; ++r) {
                    const int first = larger(seen_from(layer, row + r) - t, 0);
                    const int last = smaller(length(row + r) + 1 - t, count), i = h * rows + r;
                    values.add(first, last, scores + i * room + t - start, sums + i * width_);
                }
            });
        });
        for (int r = 0; r < rows; ++r) {
            float* const attended = p_.row(Buffer::kAttended, row + r) + head * m_.head_dim;
            for (int h = 0; h < heads; ++h) {
                const float* const from = sums + (h * rows + r) * width_;
                for (int i = 0; i < m_.head_dim; ++i) attended[h * m_.head_dim + i] = from[Kind::place(i, m_.head_dim)];
            }
        }
    }

    // How many rows from ``row`` on are consecutive tokens of one sequence, ``most`` or fewer.
    int consecutive(int row, int most) const {
        int rows = 1;
        while (rows < most && row + rows < p_.count && follows(row + rows)) ++rows;
        return rows;
    }

private:
    const Pass& p_;
    const CpuModel& m_;
    const CpuCache& cache_;
    const int64_t width_;  // of a head's row in memory

    // Tokens in the cache before a row's own.
    int length(int row) const { return cache_.lengths[p_.place(row)]; }

    const int32_t* pages(int row) const { return cache_.table + p_.place(row) * cache_.table_stride; }

    // Whether a row is the token after that of the row before it.
    bool follows(int row) const {
        if (length(row) != length(row - 1) + 1) return false;
        for (int i = 0; i <= length(row - 1) / cache_.page_size; ++i) {
            if (pages(row)[i] != pages(row - 1)[i]) return false;
        }
        return true;
    }

    // The first token that a row attends to.
    int seen_from(const CpuLayer& layer, int row) const {
        return layer.window > 0 && layer.window <= length(row) ? length(row) + 1 - layer.window : 0;
    }

    static int larger(int a, int b) { return a > b ? a : b; }
    static int smaller(int a, int b) { return a < b ? a : b; }

    // A row's queries of some heads, ``stride`` floats apart, scaled, as ``Keys`` takes them.
    void turn_queries(const CpuLayer& layer, int row, int head, int heads, float* to, int64_t stride) const {
        const int dim = m_.head_dim;
        const float* const q = p_.row(Buffer::kQ, row);
        const float rstd = whole_rstd(layer.q_norm, q, m_.q_width());
        float* const turned = p_.own + p_.layout.turned;
        for (int h = 0; h < heads; ++h) {
            turn(layer, layer.q_norm, rstd, head + h, length(row), q + (head + h) * dim, turned);
            for (int i = 0; i < dim; ++i) turned[i] *= layer.scale;
            Keys::take(turned, dim, to + h * stride);
        }
    }

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
        return pages(row)[token / cache_.page_size] * cache_.page_stride + token % cache_.page_size * cache_.slot_stride;
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

    // A head's stored vectors of up to kLanes tokens. Where several rows read them, they are widened once.
    struct Block {
        const Storage* at[kLanes];
        const float* wide;  // null: not widened
        int dim, count;
        int64_t width;

        Block(const Attention& owner, const Storage* from, const int64_t* slots, int tokens, bool widen, float* memory)
            : wide(widen ? memory : nullptr), dim(owner.m_.head_dim), count(tokens), width(owner.width_) {
            for (int t = 0; t < kLanes; ++t) at[t] = from + slots[t < count ? t : count - 1];
            if (!widen) return;
            for (int t = 0; t < kLanes; ++t) {
                const int whole = dim / kStep * kStep;
                float* const to = memory + t * width;
                for (int i = 0; i < whole; i += kStep) {
                    Vec a, b;
                    Kind::pair(at[t] + i, a, b);
                    store(to + i, a);
                    store(to + i + kLanes, b);
                }
                for (int i = whole; i < dim; ++i) to[i] = Kind::load(at[t][i]);
            }
        }

        // kStep elements of a token from ``i`` on, in ``Kind::place`` order.
        void pair(int t, int i, Vec& a, Vec& b) const {
            if (wide == nullptr) return Kind::pair(at[t] + i, a, b);
            a = load(wide + t * width + i);
            b = load(wide + t * width + i + kLanes);
        }
    };

    struct Keys : Block {
        Keys(const Attention& owner, const Storage* from, const int64_t* slots, int tokens, int rows, float* memory)
            : Block(owner, from, slots, tokens, rows > 1 && !kPairs, memory) {}

#ifdef __AVX512BF16__
        static constexpr bool kPairs = Kind::kEvenFirst;
#else
        static constexpr bool kPairs = false;
#endif

        // A query, as ``dots`` takes it.
        static void take(const float* query, int dim, float* to) {
            if (kPairs) {
                auto* const pairs = reinterpret_cast<uint16_t*>(to);
                for (int i = 0; i < padded(dim); i += kLanes) store(pairs + i, load_some(query + i, larger(dim - i, 0)));
            } else {
                for (int i = 0; i < dim; ++i) to[Kind::place(i, dim)] = query[i];
            }
        }

        // Products of kLanes keys with a query; those past the last are of no meaning.
        Vec dots(const float* query) const {
            Vec total[kLanes];
#ifdef __AVX512BF16__
            if constexpr (kPairs) {
                const auto* const pairs = reinterpret_cast<const uint16_t*>(query);
                const int whole = this->dim / kStep * kStep, rest = this->dim - whole;
#pragma GCC unroll 16
                for (int t = 0; t < kLanes; ++t) {
                    total[t] = zeros();
                    for (int i = 0; i < whole; i += kStep) {
                        total[t] = _mm512_dpbf16_ps(total[t], load_pairs(this->at[t] + i), load_pairs(pairs + i));
                    }
                    if (rest == 0) continue;
                    total[t] = _mm512_dpbf16_ps(total[t], load_pairs(this->at[t] + whole, rest), load_pairs(pairs + whole));
                }
                return sums_of(total);
            }
#endif
            const int whole = this->dim / kStep * kStep;
#pragma GCC unroll 16
            for (int t = 0; t < kLanes; ++t) {
                total[t] = zeros();
                for (int i = 0; i < whole; i += kStep) {
                    Vec a, b;
                    this->pair(t, i, a, b);
                    total[t] = fma(b, load(query + i + kLanes), fma(a, load(query + i), total[t]));
                }
            }
            const Vec value = sums_of(total);
            return whole == this->dim ? value : with_rest(query, whole, value);
        }

        Vec with_rest(const float* query, int whole, Vec value) const {
            float sums[kLanes];
            store(sums, value);
            for (int t = 0; t < kLanes; ++t) {
                for (int i = whole; i < this->dim; ++i) {
                    sums[t] = __builtin_fmaf(Kind::load(this->at[t][i]), query[i], sums[t]);
                }
            }
            return load(sums);
        }
    };

    struct Values : Block {
        Values(const Attention& owner, const Storage* from, const int64_t* slots, int tokens, int rows, float* memory)
            : Block(owner, from, slots, tokens, rows > 1, memory) {}

        // sums += the values of the tokens [first, last), each by its weight, in the tokens' order.
        void add(int first, int last, const float* weights, float* sums) const {
            const int whole = this->dim / kStep * kStep;
            for (int i = 0; i < whole; i += kStep) {
                Vec low = load(sums + i), high = load(sums + i + kLanes);
                for (int t = first; t < last; ++t) {
                    Vec a, b;
                    this->pair(t, i, a, b);
                    const Vec weight = all(weights[t]);
                    low = fma(a, weight, low);
                    high = fma(b, weight, high);
                }
                store(sums + i, low);
                store(sums + i + kLanes, high);
            }
            for (int i = whole; i < this->dim; ++i) {
                for (int t = first; t < last; ++t) {
                    sums[i] = __builtin_fmaf(Kind::load(this->at[t][i]), weights[t], sums[i]);
                }
            }
        }
    };

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
