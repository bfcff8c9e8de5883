// Compiled once for every instruction set that is worth it. Of the standard library it uses only what
// leaves no shared inline code behind.
#include <sched.h>

#include <atomic>
#include <cmath>

#include "row_product.h"  // first: its inline namespace is the one that decode_cpu.h names
#include "decode_cpu.h"
#include "threads.h"

namespace gptkern {
inline namespace GPTKERN_ISA {
namespace {

constexpr float kRootTwoOverPi = 0.7978845608028654f, kRootHalf = 0.7071067811865476f;

struct alignas(64) Barrier {
    std::atomic<int> arrived{0}, phase{0};
    int threads = 1;

    void wait() {
        if (threads == 1) return;
        const int now = phase.load(std::memory_order_relaxed);
        if (arrived.fetch_add(1, std::memory_order_acq_rel) == threads - 1) {
            arrived.store(0, std::memory_order_relaxed);
            phase.store(now + 1, std::memory_order_release);
            return;
        }
        for (int spin = 0; phase.load(std::memory_order_acquire) == now; ++spin) {
            if (spin > 1000) sched_yield();  // there may be fewer cores than threads
        }
    }
};

int64_t padded(int64_t n) { return (n + kStep - 1) / kStep * kStep; }

// Where everything lies in a call's memory, in floats. What one thread alone writes is kept per thread.
struct Places {
    int64_t x, qkv, attended, inner;           // rows of their width: shared; all but qkv in ``place`` order
    int64_t input, raw, scores, sums, shared;  // per thread, from the end of the shared part
    int64_t per_thread;

    Places(const CpuModel& m, int rows, int longest, int threads) {
        int64_t end = 0;
        const auto take = [&end](int64_t floats) {
            const int64_t at = end;
            end += padded(floats);
            return at;
        };
        x = take(static_cast<int64_t>(rows) * m.width);
        qkv = take(3LL * rows * m.width);
        attended = take(rows * padded(m.width));
        inner = take(rows * padded(m.inner));
        shared = end;
        end = 0;
        input = take(rows * padded(m.width));
        raw = take(rows * padded(m.inner));
        scores = take(static_cast<int64_t>(m.heads) * (longest + 2 * m.head_dim));
        int outs = 3 * m.width > m.inner ? 3 * m.width : m.inner;
        if (m.head.turned && m.vocab > outs) outs = m.vocab;
        sums = take(2LL * rows * padded(outs / threads + 2 * kStep) + rows * kTurnedRows);
        per_thread = end;
    }

    size_t floats(int threads) const { return static_cast<size_t>(shared + threads * per_thread); }
};

Vec activated(Vec x, Activation activation) {
    if (activation == Activation::kRelu) return larger(zeros(), x);
    if (activation == Activation::kSilu) return div(x, add(all(1.0f), exponential(sub(zeros(), x))));
    // x times the logistic function of 2u is x / 2 (1 + tanh u), without cancellation.
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
    Member(const CpuDecode& call, const Places& places, Barrier& barrier, int rank)
        : call_(call), m_(*call.model), places_(places), barrier_(barrier), rank_(rank), threads_(barrier.threads),
          x_(call.memory + places.x), own_(call.memory + places.shared + rank * places.per_thread) {}

    void run() {
        embed();
        for (int b = 0; b < m_.blocks; ++b) {
            const CpuBlock& block = m_.block[b];
            const bool first = b == 0;
            take_input(m_.post_norm ? (first ? CpuNorm{} : m_.block[b - 1].norm2) : block.norm1);
            linear(block.qkv, input(), [&](int r, int out, float value) { qkv(r)[out] = value; });
            barrier_.wait();
            for_units([&](int row, int head, int heads) { keep(b, row, head, heads); });
            // Rows may be of one sequence, each attending to what those before it keep.
            barrier_.wait();
            for_units([&](int row, int head, int heads) { attend(block, b, row, head, heads); });
            barrier_.wait();
            branch(block.projection, attended());
            take_input(m_.post_norm ? block.norm1 : block.norm2);
            expand(block.fc);
            barrier_.wait();
            branch(block.out, inner());
        }
        take_input(m_.post_norm ? m_.block[m_.blocks - 1].norm2 : m_.final_norm);
        auto* const logits = static_cast<Storage*>(call_.logits);
        linear(m_.head, input(), [&](int r, int out, float value) {
            logits[static_cast<int64_t>(r) * m_.vocab + out] = Kind::store(value);
        });
    }

private:
    const CpuDecode& call_;
    const CpuModel& m_;
    const Places& places_;
    Barrier& barrier_;
    const int rank_, threads_;
    float *const x_, *const own_;

    float* x(int row) { return x_ + static_cast<int64_t>(row) * m_.width; }
    float* qkv(int row) { return call_.memory + places_.qkv + 3LL * row * m_.width; }
    Rows input() { return {own_ + places_.input, call_.rows}; }
    Rows attended() { return {call_.memory + places_.attended, call_.rows}; }
    Rows inner() { return {call_.memory + places_.inner, call_.rows}; }

    // This thread's share of n things, in whole units.
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

    // norm(x) of all rows, by every thread for itself: it costs less than waiting for each other.
    void take_input(const CpuNorm& norm) {
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

    // Of all values, then of their distances from the mean.
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

    // give(row, out, value) of this thread's outputs of a layer.
    template <class Give>
    void linear(const CpuLinear& layer, const Rows& from, const Give& give) {
        const int first = share(layer.outs, kStep, rank_), last = share(layer.outs, kStep, rank_ + 1);
        const auto* const bias = static_cast<const Storage*>(layer.bias);
        const auto biased = [&](int r, int out, float value) {
            give(r, out, bias == nullptr ? value : value + Kind::load(bias[out]));
        };
        if (layer.scales != nullptr) {
            const Weights<Int8<Kind>> bytes{static_cast<const int8_t*>(layer.weight), layer.stride, layer.in};
            product(bytes, from, first, last,
                    [&](int r, int out, float value) { biased(r, out, value * layer.scales[out]); });
            return;
        }
        const Weights<Kind> weights{static_cast<const Storage*>(layer.weight), layer.stride, layer.in};
        if (layer.turned) {
            turned_product(weights, from, first, last, own_ + places_.sums, biased);
        } else {
            product(weights, from, first, last, biased);
        }
    }

    // The end of a branch: its output added to what it began from.
    void branch(const CpuLinear& layer, const Rows& from) {
        linear(layer, from, [&](int r, int out, float value) {
            const int at = Kind::place(out, m_.width);
            x(r)[at] = (m_.post_norm ? input().value(r, at) : x(r)[at]) + value;
        });
        barrier_.wait();
    }

    void expand(const CpuLinear& fc) {
        const int first = share(fc.outs, kStep, rank_), last = share(fc.outs, kStep, rank_ + 1);
        const int64_t stride = padded(last - first);
        float* const raw = own_ + places_.raw;
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

    // use(row, head, heads) of this thread's heads: a contiguous run of (row, head) pairs, a row at a time.
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

    int64_t slot(int row, int token) const {
        const CpuCache& cache = call_.cache;
        const int page = cache.table[row * cache.table_stride + token / cache.page_size];
        return page * cache.page_stride + token % cache.page_size * cache.slot_stride;
    }

    // use(token, where its keys and values lie) of a row's tokens.
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

    void keep(int layer, int row, int head, int heads) {
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
        float *const scores = own_ + places_.scores, *const queries = scores + static_cast<int64_t>(heads) * length;
        float* const sums = queries + heads * dim;
        for (int i = 0; i < heads * dim; ++i) {
            queries[i / dim * dim + Kind::place(i % dim, dim)] = qkv(row)[offset + i] * block.scale;
            sums[i] = 0.0f;
        }
        for_tokens(row, length, [&](int t, int64_t at) {
            for (int h = 0; h < heads; ++h) scores[h * length + t] = dot(keys + at + h * dim, queries + h * dim);
        });
        for (int h = 0; h < heads; ++h) soften(scores + static_cast<int64_t>(h) * length, length);
        for_tokens(row, length, [&](int t, int64_t at) {
            for (int h = 0; h < heads; ++h) add_times(values + at + h * dim, scores[h * length + t], sums + h * dim);
        });
        for (int i = 0; i < heads * dim; ++i) {
            const float value = sums[i / dim * dim + Kind::place(i % dim, dim)];
            attended().value(row, Kind::place(offset + i, m_.width)) = value;
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
    static void soften(float* scores, int n) {
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
    const Places* places;
    Barrier barrier;
};

template <class Kind>
void work(void* context, int rank) noexcept {
    Team& team = *static_cast<Team*>(context);
    Member<Kind>(*team.call, *team.places, team.barrier, rank).run();
}

size_t floats(const CpuModel& model, int rows, int longest, int threads) {
    return Places(model, rows, longest, threads).floats(threads);
}

void run(const CpuDecode& call, int threads) {
    const Places places(*call.model, call.rows, call.longest, threads);
    Team team{&call, &places, {}};
    team.barrier.threads = threads;
    run_together(threads, call.model->dtype == DType::kFloat32 ? work<Fp32> : work<Bf16>, &team);
}

#define GPTKERN_NAME_(isa) #isa
#define GPTKERN_NAME(isa) GPTKERN_NAME_(isa)
constexpr CpuDecodePath kPath{GPTKERN_NAME(GPTKERN_ISA), floats, run};

}  // namespace

const CpuDecodePath& decode_path() { return kPath; }

}  // namespace GPTKERN_ISA
}  // namespace gptkern
