// The decode pass on the CPU. Every thread runs all of it on its share of outputs and heads, and meets the others
// at a barrier where it needs their results.
//
// It is compiled once for each instruction set. From the standard library it uses only what leaves no shared inline
// code behind.
#include <cmath>

#include "common/spin_barrier.h"
#include "common/threads.h"
#include "decode/model.h"
#include "decode/row_product.h"

namespace gptkern {
inline namespace GPTKERN_ISA {
namespace {

constexpr float kRootTwoOverPi = 0.7978845608028654f, kRootHalf = 0.7071067811865476f;

int64_t padded(int64_t n) { return (n + kStep - 1) / kStep * kStep; }

// The layout of a pass's memory: offsets in floats. Buffers that one thread alone writes exist once a thread.
struct Layout {
    int64_t x, qkv, attention, inner;  // shared: a row of its width each; all but qkv in ``place`` order
    int64_t input, raw, scores, sums;  // per thread, counted from the end of the shared part
    int64_t shared, per_thread;        // sizes of the two parts

    Layout(const CpuModel& m, int rows, int longest, int threads) {
        int64_t end = 0;
        const auto take = [&end](int64_t floats) {
            const int64_t at = end;
            end += padded(floats);
            return at;
        };
        x = take(static_cast<int64_t>(rows) * m.width);
        qkv = take(3LL * rows * m.width);
        attention = take(rows * padded(m.width));
        inner = take(rows * padded(m.inner));
        shared = end;
        end = 0;
        input = take(rows * padded(m.width));
        raw = take(rows * padded(m.inner));
        scores = take(static_cast<int64_t>(m.heads) * (longest + 2 * m.head_dim));
        int outs = 3 * m.width > m.inner ? 3 * m.width : m.inner;
        if (m.head.transposed && m.vocab > outs) outs = m.vocab;
        sums = take(2LL * rows * padded(outs / threads + 2 * kStep) + rows * kTransposedRows);
        per_thread = end;
    }

    size_t floats(int threads) const { return static_cast<size_t>(shared + threads * per_thread); }
};

Vec activated(Vec x, Activation activation) {
    if (activation == Activation::kRelu) return larger(zeros(), x);
    if (activation == Activation::kSilu) return div(x, add(all(1.0f), exponential(sub(zeros(), x))));
    // GELU by tanh: x / 2 (1 + tanh u) is x times the logistic function of 2u, which does not cancel.
    const Vec u = mul(all(kRootTwoOverPi), fma(mul(mul(x, x), x), all(0.044715f), x));
    return div(x, add(all(1.0f), exponential(mul(all(-2.0f), u))));
}

void activate(float* values, int64_t n, Activation activation) {
    if (activation == Activation::kGelu) {
        for (int64_t i = 0; i < n; ++i) values[i] = 0.5f * values[i] * (1.0f + erff(values[i] * kRootHalf));
        return;
    }
    for (int64_t i = 0; i < n; i += kLanes) store(values + i, activated(load(values + i), activation));
}

template <class Kind>
class Member {
    using Storage = typename Kind::Storage;

public:
    Member(const CpuDecode& call, const Layout& layout, SpinBarrier& barrier, int rank)
        : call_(call), m_(*call.model), layout_(layout), barrier_(barrier), rank_(rank), threads_(barrier.threads),
          x_(call.memory + layout.x), own_(call.memory + layout.shared + rank * layout.per_thread) {}

    void run() {
        embed();
        for (int b = 0; b < m_.blocks; ++b) {
            const CpuBlock& block = m_.block[b];
            const bool first = b == 0;
            // Query, key and value of the normalised residual stream.
            normalise_input(m_.post_norm ? (first ? CpuNorm{} : m_.block[b - 1].norm2) : block.norm1);
            linear(block.qkv, input(), [&](int r, int out, float value) { qkv(r)[out] = value; });
            barrier_.wait();
            for_units([&](int row, int head, int heads) { store_kv(b, row, head, heads); });
            // Attention. Rows may belong to one sequence: each attends to the keys that those before it stored.
            barrier_.wait();
            for_units([&](int row, int head, int heads) { attend(block, b, row, head, heads); });
            barrier_.wait();
            add_branch(block.projection, attention());
            // MLP.
            normalise_input(m_.post_norm ? block.norm1 : block.norm2);
            expand(block.fc);
            barrier_.wait();
            add_branch(block.out, inner());
        }
        // Logits.
        normalise_input(m_.post_norm ? m_.block[m_.blocks - 1].norm2 : m_.final_norm);
        auto* const logits = static_cast<Storage*>(call_.logits);
        linear(m_.head, input(), [&](int r, int out, float value) {
            logits[static_cast<int64_t>(r) * m_.vocab + out] = Kind::store(value);
        });
    }

private:
    const CpuDecode& call_;
    const CpuModel& m_;
    const Layout& layout_;
    SpinBarrier& barrier_;
    const int rank_, threads_;
    float *const x_, *const own_;

    float* x(int row) { return x_ + static_cast<int64_t>(row) * m_.width; }
    float* qkv(int row) { return call_.memory + layout_.qkv + 3LL * row * m_.width; }
    Rows input() { return {own_ + layout_.input, call_.rows}; }
    Rows attention() { return {call_.memory + layout_.attention, call_.rows}; }
    Rows inner() { return {call_.memory + layout_.inner, call_.rows}; }

    // The start of a thread's share of n elements, a multiple of ``unit``.
    int share(int n, int unit, int rank) const {
        const int units = (n + unit - 1) / unit;
        const int at = static_cast<int>(static_cast<int64_t>(units) * rank / threads_) * unit;
        return at < n ? at : n;
    }

    void embed() {
        for (int r = rank_; r < call_.rows; r += threads_) {
            const Storage* token = static_cast<const Storage*>(m_.tokens) + call_.tokens[r] * m_.token_stride;
            const Storage* place =
                static_cast<const Storage*>(m_.positions) + call_.cache.lengths[r] * m_.position_stride;
            for (int i = 0; i < m_.width; ++i) {
                x(r)[Kind::place(i, m_.width)] = Kind::load(token[i]) + Kind::load(place[i]);
            }
        }
        barrier_.wait();
    }

    // input = norm(x) of all rows. Every thread computes it for itself: that costs less than a barrier.
    void normalise_input(const CpuNorm& norm) {
        for (int r = 0; r < call_.rows; ++r) {
            float mean = 0.0f, rstd = 1.0f;
            if (norm.weight != nullptr) moments(x(r), norm.eps, mean, rstd);
            const int whole = m_.width / kStep * kStep;
            for (int i = 0; i < whole; i += kStep) {
                Vec a = load(x(r) + i), b = load(x(r) + i + kLanes), c, d;
                if (norm.weight != nullptr) {
                    Kind::pair(static_cast<const Storage*>(norm.weight) + i, c, d);
                    a = mul(mul(sub(a, all(mean)), all(rstd)), c);
                    b = mul(mul(sub(b, all(mean)), all(rstd)), d);
                }
                if (norm.bias != nullptr) {
                    Kind::pair(static_cast<const Storage*>(norm.bias) + i, c, d);
                    a = add(a, c);
                    b = add(b, d);
                }
                store(&input().value(r, i), a);
                store(&input().value(r, i + kLanes), b);
            }
            for (int i = whole; i < m_.width; ++i) {
                float value = x(r)[i];
                if (norm.weight != nullptr) value = (value - mean) * rstd * element(norm.weight, i);
                if (norm.bias != nullptr) value += element(norm.bias, i);
                input().value(r, i) = value;
            }
        }
    }

    static float element(const void* of, int i) { return Kind::load(static_cast<const Storage*>(of)[i]); }

    // Mean and reciprocal standard deviation, in two passes: the mean, then the squared distances from it.
    void moments(const float* values, float eps, float& mean, float& rstd) const {
        const int n = m_.width, whole = n / kLanes * kLanes;
        Vec total = zeros(), squares = zeros();
        for (int i = 0; i < whole; i += kLanes) total = add(total, load(values + i));
        float rest = 0.0f, rest_squares = 0.0f;
        for (int i = whole; i < n; ++i) rest += values[i];
        mean = (sum(total) + rest) / static_cast<float>(n);
        for (int i = 0; i < whole; i += kLanes) {
            const Vec centred = sub(load(values + i), all(mean));
            squares = fma(centred, centred, squares);
        }
        for (int i = whole; i < n; ++i) rest_squares += (values[i] - mean) * (values[i] - mean);
        rstd = 1.0f / std::sqrt((sum(squares) + rest_squares) / static_cast<float>(n) + eps);
    }

    // emit(row, out, value) for this thread's outputs of a layer.
    template <class Emit>
    void linear(const CpuLinear& layer, const Rows& from, const Emit& emit) {
        const int first = share(layer.outs, kStep, rank_), last = share(layer.outs, kStep, rank_ + 1);
        const auto* const bias = static_cast<const Storage*>(layer.bias);
        const auto biased = [&](int r, int out, float value) {
            emit(r, out, bias == nullptr ? value : value + Kind::load(bias[out]));
        };
        if (layer.scales != nullptr) {
            const Weights<Int8<Kind>> bytes{static_cast<const int8_t*>(layer.weight), layer.stride, layer.in};
            product(bytes, from, first, last,
                    [&](int r, int out, float value) { biased(r, out, value * layer.scales[out]); });
            return;
        }
        const Weights<Kind> weights{static_cast<const Storage*>(layer.weight), layer.stride, layer.in};
        if (layer.transposed) {
            transposed_product(weights, from, first, last, own_ + layout_.sums, biased);
        } else {
            product(weights, from, first, last, biased);
        }
    }

    // The end of a branch: its last layer, added to the residual (post-norm: to the normalised input).
    void add_branch(const CpuLinear& layer, const Rows& from) {
        linear(layer, from, [&](int r, int out, float value) {
            const int at = Kind::place(out, m_.width);
            x(r)[at] = (m_.post_norm ? input().value(r, at) : x(r)[at]) + value;
        });
        barrier_.wait();
    }

    // The MLP's first layer and its activation.
    void expand(const CpuLinear& fc) {
        const int first = share(fc.outs, kStep, rank_), last = share(fc.outs, kStep, rank_ + 1);
        const int64_t stride = padded(last - first);
        float* const raw = own_ + layout_.raw;
        linear(fc, input(), [&](int r, int out, float value) { raw[r * stride + out - first] = value; });
        for (int r = 0; r < call_.rows; ++r) {
            float* const values = raw + r * stride;
            for (int64_t i = last - first; i < stride; ++i) values[i] = 0.0f;
            activate(values, stride, m_.activation);
            for (int out = first; out < last; ++out) {
                inner().value(r, Kind::place(out, m_.inner)) = values[out - first];
            }
        }
    }

    // use(row, head, heads) for this thread's heads: a contiguous run of (row, head) pairs, one row at a time.
    template <class Use>
    void for_units(const Use& use) const {
        const int units = call_.rows * m_.heads, last = share(units, 1, rank_ + 1);
        for (int unit = share(units, 1, rank_); unit < last;) {
            const int head = unit % m_.heads;
            const int heads = last - unit < m_.heads - head ? last - unit : m_.heads - head;
            use(unit / m_.heads, head, heads);
            unit += heads;
        }
    }

    // The offset of a token's keys and values in the cache, by the page table.
    int64_t slot(int row, int token) const {
        const CpuCache& cache = call_.cache;
        const int page = cache.table[row * cache.table_stride + token / cache.page_size];
        return page * cache.page_stride + token % cache.page_size * cache.slot_stride;
    }

    // use(token, offset of its keys and values) for a row's tokens.
    template <class Use>
    void for_tokens(int row, int length, const Use& use) const {
        const CpuCache& cache = call_.cache;
        for (int t = 0; t < length;) {
            int64_t at = slot(row, t);
            const int end = length - t < cache.page_size ? length : t + cache.page_size;
            for (; t < end; ++t, at += cache.slot_stride) use(t, at);
        }
    }

    Storage* cached(void* cache, int layer, int head) const {
        return static_cast<Storage*>(cache) + layer * call_.cache.block_stride + head * m_.head_dim;
    }

    void store_kv(int layer, int row, int head, int heads) {
        const int offset = head * m_.head_dim;
        const int64_t newest = slot(row, call_.cache.lengths[row]);
        Storage* const key = cached(call_.cache.k, layer, head) + newest;
        Storage* const value = cached(call_.cache.v, layer, head) + newest;
        for (int i = 0; i < heads * m_.head_dim; ++i) {
            key[i] = Kind::store(qkv(row)[m_.width + offset + i]);
            value[i] = Kind::store(qkv(row)[2 * m_.width + offset + i]);
        }
    }

    void attend(const CpuBlock& block, int layer, int row, int head, int heads) {
        const int dim = m_.head_dim, length = call_.cache.lengths[row] + 1, offset = head * dim;
        const Storage* const keys = cached(call_.cache.k, layer, head);
        const Storage* const values = cached(call_.cache.v, layer, head);
        float *const scores = own_ + layout_.scores, *const queries = scores + static_cast<int64_t>(heads) * length;
        float* const sums = queries + heads * dim;
        for (int i = 0; i < heads * dim; ++i) {
            queries[i / dim * dim + Kind::place(i % dim, dim)] = qkv(row)[offset + i] * block.scale;
            sums[i] = 0.0f;
        }
        // Scores, weights, weighted sum of the values.
        for_tokens(row, length, [&](int t, int64_t at) {
            for (int h = 0; h < heads; ++h) scores[h * length + t] = dot(keys + at + h * dim, queries + h * dim);
        });
        for (int h = 0; h < heads; ++h) softmax(scores + static_cast<int64_t>(h) * length, length);
        for_tokens(row, length, [&](int t, int64_t at) {
            for (int h = 0; h < heads; ++h) add_times(values + at + h * dim, scores[h * length + t], sums + h * dim);
        });
        for (int i = 0; i < heads * dim; ++i) {
            const float value = sums[i / dim * dim + Kind::place(i % dim, dim)];
            attention().value(row, Kind::place(offset + i, m_.width)) = value;
        }
    }

    float dot(const Storage* key, const float* query) const {
        const int dim = m_.head_dim, whole = dim / kStep * kStep;
        Vec total = zeros();
        for (int i = 0; i < whole; i += kStep) {
            Vec a, b;
            Kind::pair(key + i, a, b);
            total = fma(b, load(query + i + kLanes), fma(a, load(query + i), total));
        }
        float value = sum(total);
        for (int i = whole; i < dim; ++i) value = __builtin_fmaf(Kind::load(key[i]), query[i], value);
        return value;
    }

    void add_times(const Storage* value, float weight, float* sums) const {
        const int dim = m_.head_dim, whole = dim / kStep * kStep;
        const Vec all_weight = all(weight);
        for (int i = 0; i < whole; i += kStep) {
            Vec a, b;
            Kind::pair(value + i, a, b);
            store(sums + i, fma(a, all_weight, load(sums + i)));
            store(sums + i + kLanes, fma(b, all_weight, load(sums + i + kLanes)));
        }
        for (int i = whole; i < dim; ++i) sums[i] = __builtin_fmaf(Kind::load(value[i]), weight, sums[i]);
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

struct Team {
    const CpuDecode* call;
    const Layout* layout;
    SpinBarrier barrier;
};

template <class Kind>
void work(void* context, int rank) noexcept {
    Team& team = *static_cast<Team*>(context);
    Member<Kind>(*team.call, *team.layout, team.barrier, rank).run();
}

size_t floats(const CpuModel& model, int rows, int longest, int threads) {
    return Layout(model, rows, longest, threads).floats(threads);
}

void run(const CpuDecode& call, int threads) {
    const Layout layout(*call.model, call.rows, call.longest, threads);
    Team team{&call, &layout, {}};
    team.barrier.threads = threads;
    run_together(threads, call.model->dtype == DType::kFloat32 ? work<Fp32> : work<Bf16>, &team);
}

constexpr CpuDecodePath kPath{GPTKERN_ISA_NAME, floats, run};

}  // namespace

const CpuDecodePath& decode_path() { return kPath; }

}  // namespace GPTKERN_ISA
}  // namespace gptkern
