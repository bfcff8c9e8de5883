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
    int64_t x, middle, branch, qkv, attended, inner;  // shared: a row of its width each; all but qkv in ``place`` order
    int64_t input, raw, natural, scores, sums;        // per thread, counted from the end of the shared part
    int64_t shared, per_thread;                       // sizes of the two parts

    Layout(const CpuModel& m, int rows, int longest, int threads) {
        int64_t end = 0;
        const auto take = [&end](int64_t floats) {
            const int64_t at = end;
            end += padded(floats);
            return at;
        };
        x = take(static_cast<int64_t>(rows) * m.width);
        middle = take(static_cast<int64_t>(rows) * m.width);
        branch = take(static_cast<int64_t>(rows) * m.width);
        qkv = take(static_cast<int64_t>(rows) * m.qkv_width());
        attended = take(rows * padded(m.q_width()));
        inner = take(rows * padded(m.inner));
        shared = end;
        end = 0;
        input = take(rows * padded(m.width));
        raw = take((m.gated ? 2 : 1) * rows * padded(m.inner));
        natural = take(static_cast<int64_t>(rows) * most_int4_inputs(m));
        scores = take(static_cast<int64_t>(m.heads) * (longest + 2 * m.head_dim) + m.head_dim);
        sums = take(2LL * rows * padded(most_outs(m) / threads + 2 * kStep) + rows * kTransposedRows);
        per_thread = end;
    }

    // Inputs of the widest int4 product.
    static int most_int4_inputs(const CpuModel& m) {
        int most = 0;
        for (int i = 0; i < m.stages; ++i) {
            const CpuLinear& linear = m.stage[i].linear;
            if (linear.format == Format::kInt4 && linear.in > most) most = linear.in;
        }
        return most;
    }

    // Outputs of the widest product that may read a transposed matrix.
    static int most_outs(const CpuModel& m) {
        int most = m.inner;
        for (int i = 0; i < m.stages; ++i) {
            const CpuStage& stage = m.stage[i];
            if (!stage.activated && stage.linear.transposed && stage.linear.outs > most) most = stage.linear.outs;
        }
        return most;
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
          own_(call.memory + layout.shared + rank * layout.per_thread), count_(call.rows) {}

    void run() {
        const int narrow = narrow_stage();
        for (int i = 0; i < m_.stages; ++i) {
            if (i > 0) barrier_.wait();
            if (i == narrow) {
                wanted_ = call_.wanted;
                count_ = call_.wanted_rows;
            }
            run(m_.stage[i]);
        }
    }

private:
    const CpuDecode& call_;
    const CpuModel& m_;
    const Layout& layout_;
    SpinBarrier& barrier_;
    const int rank_, threads_;
    float* const own_;
    const int32_t* wanted_ = nullptr;  // the rows of the pass that are computed; null: all
    int count_;                        // how many these are

    // The first stage of wanted rows alone: the last layer's attention; or the head, where what an earlier norm saved of
    // all rows is still read.
    int narrow_stage() const {
        int stage = m_.stages - 1;
        for (int i = stage; i > 0; --i) {
            if (m_.stage[i].residual == Buffer::kNormedX) return stage;
            if (m_.stage[i].kind == StageKind::kAttention) return i;
        }
        return stage;
    }

    // A computed row's place among the pass's rows.
    int place(int row) const { return wanted_ == nullptr ? row : wanted_[row]; }

    float* shared(int64_t at, int64_t stride, int row) const { return call_.memory + at + stride * place(row); }
    float* qkv(int row) const { return shared(layout_.qkv, m_.qkv_width(), row); }
    Rows input() const { return {own_ + layout_.input, count_}; }
    Rows attended() const { return {call_.memory + layout_.attended, count_}; }
    Rows inner() const { return {call_.memory + layout_.inner, count_}; }

    // A row of the model's width.
    float* row(Buffer buffer, int row) const {
        const bool x = buffer == Buffer::kX, middle = buffer == Buffer::kMiddle;
        return shared(x ? layout_.x : middle ? layout_.middle : layout_.branch, m_.width, row);
    }

    void run(const CpuStage& stage) {
        switch (stage.kind) {
            case StageKind::kEmbed: return embed();
            case StageKind::kQkv: return project(stage);
            case StageKind::kAttention: return attend(stage.layer);
            case StageKind::kLinear: return multiply(stage);
            case StageKind::kAddNorm: return add_norm(stage);
        }
    }

    // The start of a thread's share of n elements, a multiple of ``unit``.
    int share(int n, int unit, int rank) const {
        const int units = (n + unit - 1) / unit;
        const int at = static_cast<int>(static_cast<int64_t>(units) * rank / threads_) * unit;
        return at < n ? at : n;
    }

    void embed() {
        for (int r = rank_; r < call_.rows; r += threads_) {
            const Storage* token = static_cast<const Storage*>(m_.tokens) + call_.tokens[r] * m_.token_stride;
            const auto* const places = static_cast<const Storage*>(m_.positions);
            float* const x = row(Buffer::kX, r);
            for (int i = 0; i < m_.width; ++i) {
                x[Kind::place(i, m_.width)] = Kind::load(token[i]) * m_.embedding_scale;
            }
            if (places == nullptr) continue;
            const Storage* place = places + call_.cache.lengths[r] * m_.position_stride;
            for (int i = 0; i < m_.width; ++i) x[Kind::place(i, m_.width)] += Kind::load(place[i]);
        }
    }

    // What a product reads. Every thread computes a norm for itself: that costs less than a barrier.
    Rows operand(const CpuStage& stage) {
        if (stage.read == Buffer::kAttended) return attended();
        if (stage.read == Buffer::kInner) return inner();
        for (int r = 0; r < count_; ++r) normalise(stage.norm, row(stage.read, r), r);
        return input();
    }

    // A row of input = norm(x).
    void normalise(const CpuNorm& norm, const float* x, int r) {
        float mean = 0.0f, rstd = 1.0f;
        if (norm.weight != nullptr) moments(x, m_.width, m_.rms, mean, rstd);
        const Vec offset = all(m_.unit_offset ? 1.0f : 0.0f);
        const int whole = m_.width / kStep * kStep;
        for (int i = 0; i < whole; i += kStep) {
            Vec a = load(x + i), b = load(x + i + kLanes), c, d;
            if (norm.weight != nullptr) {
                Kind::pair(static_cast<const Storage*>(norm.weight) + i, c, d);
                a = mul(mul(sub(a, all(mean)), all(rstd)), add(c, offset));
                b = mul(mul(sub(b, all(mean)), all(rstd)), add(d, offset));
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
            float value = x[i];
            if (norm.weight != nullptr) value = (value - mean) * rstd * factor(norm.weight, i);
            if (norm.bias != nullptr) value += element(norm.bias, i);
            input().value(r, i) = value;
        }
    }

    static float element(const void* of, int i) { return Kind::load(static_cast<const Storage*>(of)[i]); }

    // What a norm multiplies element i by.
    float factor(const void* weight, int i) const {
        return m_.unit_offset ? 1.0f + element(weight, i) : element(weight, i);
    }

    // Mean and reciprocal standard deviation, in two passes: the mean, then the squared distances from it. An RMS norm's
    // are the distances from 0.
    void moments(const float* values, int n, bool rms, float& mean, float& rstd) const {
        const int whole = n / kLanes * kLanes;
        Vec total = zeros(), squares = zeros();
        float rest = 0.0f, rest_squares = 0.0f;
        mean = 0.0f;
        if (!rms) {
            for (int i = 0; i < whole; i += kLanes) total = add(total, load(values + i));
            for (int i = whole; i < n; ++i) rest += values[i];
            mean = (sum(total) + rest) / static_cast<float>(n);
        }
        for (int i = 0; i < whole; i += kLanes) {
            const Vec centred = sub(load(values + i), all(mean));
            squares = fma(centred, centred, squares);
        }
        for (int i = whole; i < n; ++i) rest_squares += (values[i] - mean) * (values[i] - mean);
        rstd = 1.0f / std::sqrt((sum(squares) + rest_squares) / static_cast<float>(n) + m_.eps);
    }

    // emit(row, out, value) for this thread's outputs of a layer.
    template <class Emit>
    void linear(const CpuLinear& layer, const Rows& from, const Emit& emit) {
        outputs(layer, from, share(layer.outs, kStep, rank_), share(layer.outs, kStep, rank_ + 1), emit);
    }

    // emit(row, out, value) for the outputs [first, last) of a layer.
    template <class Emit>
    void outputs(const CpuLinear& layer, const Rows& from, int first, int last, const Emit& emit) {
        const auto* const bias = static_cast<const Storage*>(layer.bias);
        const auto biased = [&](int r, int out, float value) {
            emit(r, out, bias == nullptr ? value : value + Kind::load(bias[out]));
        };
        const auto scaled = [&](int r, int out, float value) { biased(r, out, value * layer.scales[out]); };
        if (layer.format == Format::kInt8) {
            const Weights<Int8<Kind>> bytes{static_cast<const int8_t*>(layer.weight), layer.stride, layer.in};
            return product(bytes, from, first, last, scaled);
        }
        const auto* const packed = static_cast<const uint8_t*>(layer.weight);
        if (layer.format == Format::kFp8) {
            return product(Weights<Fp8<Kind>>{packed, layer.stride, layer.in}, from, first, last,
                           [&](int r, int out, float value) { scaled(r, out, value * kFp8Unit); });
        }
        if (layer.format == Format::kInt4) {
            const Int4 codes{packed, layer.scales, layer.zeros, layer.stride, layer.in, layer.group};
            float* const natural = own_ + layout_.natural;
            unplace<Kind>(from, layer.in, natural);
            if (layer.zeros == nullptr) return product<false>(codes, natural, from.count, first, last, biased);
            return product<true>(codes, natural, from.count, first, last, biased);
        }
        const Weights<Kind> weights{static_cast<const Storage*>(layer.weight), layer.stride, layer.in};
        if (layer.transposed) {
            transposed_product(weights, from, first, last, own_ + layout_.sums, biased);
        } else {
            product(weights, from, first, last, biased);
        }
    }

    // A product, with what follows it.
    void multiply(const CpuStage& stage) {
        const Rows from = operand(stage);
        if (stage.activated) return expand(stage.linear, from);
        if (stage.write == Buffer::kLogits) return score(stage.linear, from);
        const bool normed = stage.residual == Buffer::kNormedX || stage.residual == Buffer::kNormedMiddle;
        const bool alone = stage.residual == Buffer::kNone;
        const float scale = m_.residual_scale;
        linear(stage.linear, from, [&](int r, int out, float value) {
            const int at = Kind::place(out, m_.width);
            float* const to = row(stage.write, r) + at;
            if (alone) {
                *to = value;
            } else {
                *to = (normed ? input().value(r, at) : row(stage.residual, r)[at]) + value * scale;
            }
        });
    }

    // write = residual + norm(read): a whole row is one thread's.
    void add_norm(const CpuStage& stage) {
        for (int r = rank_; r < count_; r += threads_) {
            normalise(stage.norm, row(stage.read, r), r);
            const float* const residual = row(stage.residual, r);
            float* const to = row(stage.write, r);
            for (int i = 0; i < m_.width; ++i) to[i] = residual[i] + input().value(r, i) * m_.residual_scale;
        }
    }

    // The MLP's first layer and its activation.
    void expand(const CpuLinear& fc, const Rows& from) {
        const int first = share(m_.inner, kStep, rank_), last = share(m_.inner, kStep, rank_ + 1);
        const int64_t stride = padded(last - first);
        float *const raw = own_ + layout_.raw, *const ups = raw + count_ * padded(m_.inner);
        outputs(fc, from, first, last, [&](int r, int out, float value) { raw[r * stride + out - first] = value; });
        if (m_.gated) {
            const int up = m_.inner + first;
            outputs(fc, from, up, m_.inner + last,
                    [&](int r, int out, float value) { ups[r * stride + out - up] = value; });
        }
        for (int r = 0; r < count_; ++r) {
            float* const values = raw + r * stride;
            for (int64_t i = last - first; i < stride; ++i) values[i] = 0.0f;
            activate(values, stride, m_.activation);
            for (int out = first; out < last; ++out) {
                const float value = values[out - first];
                inner().value(r, Kind::place(out, m_.inner)) = m_.gated ? value * ups[r * stride + out - first] : value;
            }
        }
    }

    void score(const CpuLinear& head, const Rows& from) {
        auto* const logits = static_cast<Storage*>(call_.logits);
        linear(head, from, [&](int r, int out, float value) {
            value = capped(value * m_.logits_scale, m_.logits_softcap);
            logits[static_cast<int64_t>(r) * m_.vocab + out] = Kind::store(value);
        });
    }

    static float capped(float value, float cap) { return cap > 0.0f ? cap * tanhf(value / cap) : value; }

    // Queries, keys and values of all rows; keys and values go to the cache. Rows may belong to one sequence: after the
    // stage each attends to the keys that those before it stored.
    void project(const CpuStage& stage) {
        linear(stage.linear, operand(stage), [&](int r, int out, float value) { qkv(r)[out] = value; });
        barrier_.wait();
        for_units(m_.kv_heads, [&](int row, int head, int heads) { store_kv(stage.layer, row, head, heads); });
    }

    void attend(int layer) {
        for_units(m_.heads, [&](int row, int head, int heads) { attend(layer, row, head, heads); });
    }

    // use(row, head, heads) for this thread's heads: a contiguous run of (row, head) pairs, one row at a time.
    template <class Use>
    void for_units(int of_row, const Use& use) const {
        const int units = count_ * of_row, last = share(units, 1, rank_ + 1);
        for (int unit = share(units, 1, rank_); unit < last;) {
            const int head = unit % of_row;
            const int heads = last - unit < of_row - head ? last - unit : of_row - head;
            use(unit / of_row, head, heads);
            unit += heads;
        }
    }

    // The reciprocal root mean square of all heads of queries or keys, where their norm is of all together; else 0.
    float whole_rstd(const void* norm, const float* heads, int width) const {
        float mean, rstd = 0.0f;
        if (norm != nullptr && m_.whole_qk_norm) moments(heads, width, true, mean, rstd);
        return rstd;
    }

    // One head of queries or keys, normed and rotated where the layer does. ``rstd`` is ``whole_rstd``.
    void turn(const CpuLayer& layer, const void* norm, float rstd, int head, int position, const float* from,
              float* to) const {
        const int dim = m_.head_dim, half = layer.rotary / 2, start = m_.whole_qk_norm ? head * dim : 0;
        float mean;
        if (norm != nullptr && !m_.whole_qk_norm) moments(from, dim, true, mean, rstd);
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
        const CpuCache& cache = call_.cache;
        const int page = cache.table[place(row) * cache.table_stride + token / cache.page_size];
        return page * cache.page_stride + token % cache.page_size * cache.slot_stride;
    }

    // use(token, offset of its keys and values) for a row's tokens from ``first`` on.
    template <class Use>
    void for_tokens(int row, int first, int length, const Use& use) const {
        const CpuCache& cache = call_.cache;
        for (int t = first; t < length;) {
            int64_t at = slot(row, t);
            const int left = cache.page_size - t % cache.page_size;
            const int end = length - t < left ? length : t + left;
            for (; t < end; ++t, at += cache.slot_stride) use(t, at);
        }
    }

    Storage* cached(void* cache, int layer, int kv_head) const {
        return static_cast<Storage*>(cache) + layer * call_.cache.layer_stride + kv_head * m_.head_dim;
    }

    void store_kv(int at, int row, int head, int heads) {
        const CpuLayer& layer = m_.layer[at];
        const int dim = m_.head_dim, position = call_.cache.lengths[place(row)];
        const int64_t newest = slot(row, position);
        const float *const keys = qkv(row) + m_.q_width(), *const values = keys + m_.kv_width();
        const float rstd = whole_rstd(layer.k_norm, keys, m_.kv_width());
        float* const turned = own_ + layout_.scores;
        for (int h = head; h < head + heads; ++h) {
            Storage* const key = cached(call_.cache.k, at, h) + newest;
            Storage* const value = cached(call_.cache.v, at, h) + newest;
            turn(layer, layer.k_norm, rstd, h, position, keys + h * dim, turned);
            for (int i = 0; i < dim; ++i) {
                key[i] = Kind::store(turned[i]);
                value[i] = Kind::store(values[h * dim + i]);
            }
        }
    }

    // use(h, offset of the keys and values that query head ``head`` + h reads).
    template <class Use>
    void for_heads(int head, int heads, const Use& use) const {
        const int group = m_.heads / m_.kv_heads;
        int offset = head / group * m_.head_dim, of_group = head % group;
        for (int h = 0; h < heads; ++h) {
            use(h, offset);
            if (++of_group < group) continue;
            of_group = 0;
            offset += m_.head_dim;
        }
    }

    void attend(int at, int row, int head, int heads) {
        const CpuLayer& layer = m_.layer[at];
        const int dim = m_.head_dim, length = call_.cache.lengths[place(row)] + 1;
        const int first = layer.window > 0 && layer.window < length ? length - layer.window : 0, seen = length - first;
        const Storage* const keys = cached(call_.cache.k, at, 0);
        const Storage* const values = cached(call_.cache.v, at, 0);
        float *const scores = own_ + layout_.scores, *const queries = scores + static_cast<int64_t>(heads) * seen;
        float *const sums = queries + heads * dim, *const turned = sums + heads * dim;
        const float rstd = whole_rstd(layer.q_norm, qkv(row), m_.q_width());
        for (int h = 0; h < heads; ++h) {
            turn(layer, layer.q_norm, rstd, head + h, length - 1, qkv(row) + (head + h) * dim, turned);
            for (int i = 0; i < dim; ++i) queries[h * dim + Kind::place(i, dim)] = turned[i] * layer.scale;
        }
        for (int i = 0; i < heads * dim; ++i) sums[i] = 0.0f;
        // Scores, weights, weighted sum of the values.
        for_tokens(row, first, length, [&](int t, int64_t from) {
            for_heads(head, heads, [&](int h, int offset) {
                const float score = dot(keys + from + offset, queries + h * dim);
                scores[static_cast<int64_t>(h) * seen + t - first] = capped(score, m_.attention_softcap);
            });
        });
        for (int h = 0; h < heads; ++h) softmax(scores + static_cast<int64_t>(h) * seen, seen);
        for_tokens(row, first, length, [&](int t, int64_t from) {
            for_heads(head, heads, [&](int h, int offset) {
                const float weight = scores[static_cast<int64_t>(h) * seen + t - first];
                add_times(values + from + offset, weight, sums + h * dim);
            });
        });
        for (int i = 0; i < heads * dim; ++i) {
            const float value = sums[i / dim * dim + Kind::place(i % dim, dim)];
            attended().value(row, Kind::place(head * dim + i, m_.q_width())) = value;
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
