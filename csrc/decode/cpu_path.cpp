// The decode pass on the CPU. Every thread runs all of it on its share of rows, outputs and heads, and meets the others
// at a barrier where it needs their results.
//
// It is compiled once for each instruction set. From the standard library it uses only what leaves no shared inline
// code behind.
#include "common/threads.h"
#include "decode/attention.h"
#include "decode/pass.h"

namespace gptkern {
inline namespace GPTKERN_ISA {
namespace {

constexpr int kFewQueries = 16;  // fewer do not pay for the keys and values that they take
constexpr float kRootTwoOverPi = 0.7978845608028654f, kRootHalf = 0.7071067811865476f;

Vec activated(Vec x, Activation activation) {
    if (activation == Activation::kGelu) {
        float values[kLanes];
        store(values, x);
        for (float& value : values) value = 0.5f * value * (1.0f + erff(value * kRootHalf));
        return load(values);
    }
    if (activation == Activation::kRelu) return larger(zeros(), x);
    if (activation == Activation::kSilu) return div(x, add(all(1.0f), exponential(sub(zeros(), x))));
    // GELU by tanh: x / 2 (1 + tanh u) is x times the logistic function of 2u, which does not cancel.
    const Vec u = mul(all(kRootTwoOverPi), fma(mul(mul(x, x), x), all(0.044715f), x));
    return div(x, add(all(1.0f), exponential(mul(all(-2.0f), u))));
}

template <class Kind>
class Member {
    using Storage = typename Kind::Storage;

public:
    Member(const CpuDecode& call, const Layout& layout, SpinBarrier& barrier, int rank)
        : p_{call, *call.model, layout, barrier, rank, barrier.threads,
             call.memory + layout.shared + rank * layout.per_thread, nullptr, call.rows},
          m_(*call.model), attention_(p_) {}

    void run() {
        const int narrow = narrow_stage();
        for (int i = 0; i < m_.stages; ++i) {
            if (i > 0) p_.barrier.wait();
            if (i == narrow) {
                p_.wanted = p_.call.wanted;
                p_.count = p_.call.wanted_rows;
            }
            run(m_.stage[i]);
        }
    }

private:
    Pass p_;
    const CpuModel& m_;
    const Attention<Kind> attention_;

    // The first stage of wanted rows alone: the last layer's attention.
    int narrow_stage() const {
        int stage = m_.stages - 1;
        while (stage > 0 && m_.stage[stage].kind != StageKind::kAttention) --stage;
        return stage;
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

    void embed() {
        const CpuDecode& call = p_.call;
        const auto* const places = static_cast<const Storage*>(m_.positions);
        for (int r = p_.rank; r < call.rows; r += p_.threads) {
            const Storage* const token = static_cast<const Storage*>(m_.tokens) + call.tokens[r] * m_.token_stride;
            float* const x = p_.row(Buffer::kX, r);
            for (int i = 0; i < m_.width; i += kLanes) {
                Vec value = mul(load_some(token + i, m_.width - i), all(m_.embedding_scale));
                if (places != nullptr) {
                    const int64_t place = call.cache.lengths[r] * m_.position_stride;
                    value = add(value, load_some(places + place + i, m_.width - i));
                }
                store(x + i, value);
            }
        }
    }

    // to = norm(x)
    void normalise(const CpuNorm& norm, const float* x, float* to) const {
        const auto* const weights = static_cast<const Storage*>(norm.weight);
        const auto* const biases = static_cast<const Storage*>(norm.bias);
        float mean = 0.0f, rstd = 1.0f;
        if (weights != nullptr) moments(x, m_.width, m_.rms, m_.eps, mean, rstd);
        const Vec offset = all(m_.unit_offset ? 1.0f : 0.0f);
        for (int i = 0; i < m_.width; i += kLanes) {
            Vec value = load(x + i);
            if (weights != nullptr) {
                const Vec factor = add(load_some(weights + i, m_.width - i), offset);
                value = mul(mul(sub(value, all(mean)), all(rstd)), factor);
            }
            if (biases != nullptr) value = add(value, load_some(biases + i, m_.width - i));
            store(to + i, value);
        }
    }

    // What a product reads: each thread prepares some rows of it, for all.
    Operand<Kind> operand(const CpuStage& stage) const {
        const Operand<Kind> whole(p_.call.memory + p_.layout.operand, p_.count, stage.linear);
        for (int r = p_.rank; r < p_.count; r += p_.threads) {
            const float* row = p_.row(stage.read, r);
            if (stage.norm.weight != nullptr || stage.save != Buffer::kNone) {
                float* const normed = p_.row(Buffer::kNormedX, r);
                normalise(stage.norm, row, normed);
                row = normed;
            }
            whole.take(r, row);
        }
        p_.barrier.wait();
        return whole;
    }

    // use(row, out, outputs left, kLanes values) for the outputs [first, last) of a layer, bias included.
    template <class Use>
    void outputs(const CpuLinear& layer, const Operand<Kind>& x, int first, int last, const Use& use) const {
        float* const sums = p_.own + p_.layout.sums;
        bands(layer, first, last, [&](int from, int to, int64_t stride) {
            product(layer, x, from, to, sums, stride);
            for (int r = 0; r < x.count(); ++r) {
                for (int out = from; out < to; out += kLanes) {
                    use(r, out, to - out, finished(layer, out, to - out, load(sums + r * stride + out - from)));
                }
            }
        });
    }

    // use(from, to, stride of the sums) for the outputs [first, last), as many at a time as the sums have room for.
    template <class Use>
    void bands(const CpuLinear& layer, int first, int last, const Use& use) const {
        const auto whole = static_cast<int>(padded(last - first));
        const int band = layer.transposed && packing_of<Kind>(layer) == Packing::kPlaced ? whole : kBand;
        for (int from = first; from < last; from += band) use(from, last - from < band ? last : from + band, band);
    }

    // Sums with a layer's scales and bias.
    Vec finished(const CpuLinear& layer, int out, int left, Vec value) const {
        if (layer.format == Format::kFp8) value = mul(value, all(kFp8Unit));
        if (layer.format == Format::kInt8 || layer.format == Format::kFp8) {
            value = mul(value, load_some(layer.scales + out, left));
        }
        if (layer.bias == nullptr) return value;
        return add(value, load_some(static_cast<const Storage*>(layer.bias) + out, left));
    }

    // sums[r * stride + j] = dot(x[r], weights of output first + j), the scales of outputs left out.
    void product(const CpuLinear& layer, const Operand<Kind>& x, int first, int last, float* sums,
                 int64_t stride) const {
        const auto emit = [&](int r, int out, float value) { sums[r * stride + out - first] = value; };
        const auto* const packed = static_cast<const uint8_t*>(layer.weight);
#ifdef __AVX512BF16__
        if (layer.format == Format::kFp8 && x.packing() == Packing::kPairs) {
            return fp8_product<Bf16>(layer, x.pairs(), first, last, sums, stride);
        }
        if (x.packing() == Packing::kPairs) return packed_product<Bf16>(layer, x.pairs(), first, last, sums, stride);
#endif
        if (x.packing() == Packing::kBytes) return byte_product(layer, x.bytes(), first, last, sums, stride);
        if (x.packing() == Packing::kCodes) {
            auto& panel = *reinterpret_cast<CodePanel*>(p_.own + p_.layout.codes);
            return code_product(layer, x.codes(), first, last, sums, stride, panel);
        }
        if constexpr (!Kind::kEvenFirst) {
            if (layer.format == Format::kInt8) {
                const Weights<Int8> bytes{static_cast<const int8_t*>(layer.weight), layer.stride, layer.in};
                return gptkern::product(bytes, x.placed(), first, last, emit);
            }
        }
        if (layer.format == Format::kFp8) return fp8_product<Fp32>(layer, x.natural(), first, last, sums, stride);
        if (layer.format == Format::kInt4) {
            const Int4 codes{packed, layer.group_scales, layer.minimums, layer.stride, layer.in, layer.group};
            if (layer.minimums == nullptr) return gptkern::product<false>(codes, x.natural(), first, last, emit);
            return gptkern::product<true>(codes, x.natural(), first, last, emit);
        }
        if (x.packing() == Packing::kNatural) {
            return packed_product<Fp32>(layer, x.natural(), first, last, sums, stride);
        }
        if constexpr (Kind::kEvenFirst) {  // bf16 that is widened
            const Weights<Kind> weights{static_cast<const Storage*>(layer.weight), layer.stride, layer.in};
            if (layer.transposed) {
                transposed_product(weights, x.placed(), first, last, p_.own + p_.layout.scratch, emit);
            } else {
                gptkern::product(weights, x.placed(), first, last, emit);
            }
        }
    }

    // As ``product``, of fp8 weights.
    template <class Same>
    void fp8_product(const CpuLinear& layer, const RowsOf<typename Same::Storage>& x, int first, int last, float* sums,
                     int64_t stride) const {
        auto* const memory = reinterpret_cast<typename Same::Storage*>(p_.own + p_.layout.widened);
        gptkern::fp8_product<Same>(layer, x, first, last, memory, p_.own + p_.layout.partial, sums, stride);
    }

    // As ``product``, of weights in the rows' own dtype.
    template <class Same>
    void packed_product(const CpuLinear& layer, const RowsOf<typename Same::Storage>& x, int first, int last, float* sums,
                        int64_t stride) const {
        const Lines units{reinterpret_cast<float*>(x.at), x.stride / Units<Same>::kNumbers};
        PackedProduct<Same>(layer, units, x.count, p_.own + p_.layout.part).run(first, last, {sums, stride});
    }

    // use(row, out, outputs left, values) for this thread's outputs of a layer.
    template <class Use>
    void linear(const CpuLinear& layer, const Operand<Kind>& x, const Use& use) const {
        outputs(layer, x, p_.share(layer.outs, kStep, p_.rank), p_.share(layer.outs, kStep, p_.rank + 1), use);
    }

    // A product, with what follows it.
    void multiply(const CpuStage& stage) const {
        const Operand<Kind> x = operand(stage);
        if (stage.activated) return expand(stage.linear, x);
        if (stage.write == Buffer::kLogits) return score(stage.linear, x);
        linear(stage.linear, x, [&](int r, int out, int, Vec value) {
            if (stage.residual != Buffer::kNone) {
                value = add(load(p_.row(stage.residual, r) + out), mul(value, all(m_.residual_scale)));
            }
            store(p_.row(stage.write, r) + out, value);
        });
    }

    // write = residual + norm(read): a whole row is one thread's.
    void add_norm(const CpuStage& stage) const {
        for (int r = p_.rank; r < p_.count; r += p_.threads) {
            float *const normed = p_.row(Buffer::kNormedX, r), *const to = p_.row(stage.write, r);
            normalise(stage.norm, p_.row(stage.read, r), normed);
            const float* const residual = p_.row(stage.residual, r);
            for (int i = 0; i < m_.width; i += kLanes) {
                store(to + i, add(load(residual + i), mul(load(normed + i), all(m_.residual_scale))));
            }
        }
    }

    // The MLP's first layer and its activation.
    void expand(const CpuLinear& fc, const Operand<Kind>& x) const {
        const int first = p_.share(m_.inner, kStep, p_.rank), last = p_.share(m_.inner, kStep, p_.rank + 1);
        if (!m_.gated) {
            return outputs(fc, x, first, last, [&](int r, int out, int, Vec value) {
                store(p_.row(Buffer::kInner, r) + out, activated(value, m_.activation));
            });
        }
        float *const gates = p_.own + p_.layout.sums, *const ups = p_.own + p_.layout.ups;
        bands(fc, first, last, [&](int from, int to, int64_t stride) {
            product(fc, x, from, to, gates, stride);
            product(fc, x, m_.inner + from, m_.inner + to, ups, stride);
            for (int r = 0; r < x.count(); ++r) {
                for (int out = from; out < to; out += kLanes) {
                    const int64_t at = r * stride + out - from;
                    const Vec gate = finished(fc, out, to - out, load(gates + at));
                    const Vec up = finished(fc, m_.inner + out, to - out, load(ups + at));
                    store(p_.row(Buffer::kInner, r) + out, mul(activated(gate, m_.activation), up));
                }
            }
        });
    }

    void score(const CpuLinear& head, const Operand<Kind>& x) const {
        auto* const logits = static_cast<Storage*>(p_.call.logits);
        linear(head, x, [&](int r, int out, int left, Vec value) {
            value = capped(mul(value, all(m_.logits_scale)), m_.logits_softcap);
            store_some(logits + static_cast<int64_t>(r) * m_.vocab + out, left, value);
        });
    }

    // Queries, keys and values of all rows; keys and values go to the cache. Rows may belong to one sequence: after the
    // stage each attends to the keys that those before it stored.
    void project(const CpuStage& stage) const {
        linear(stage.linear, operand(stage),
               [&](int r, int out, int, Vec value) { store(p_.row(Buffer::kQ, r) + out, value); });
        p_.barrier.wait();
        p_.for_units(0, p_.count, m_.kv_heads, [&](int row, int head, int heads) {
            attention_.store_kv(stage.layer, row, head, heads);
        });
    }

    void attend(int layer) const {
        int unit = 0;
        for (int row = 0; row < p_.count;) {
            const int rows = attention_.consecutive(row, p_.count);
            if (rows > 1) attend_together(layer, row, rows, unit);
            row += rows;
        }
        attention_.attend_alone(layer);
    }

    // Rows of one sequence: some of them and the heads of a group at a time, or a head where groups are too few. Later
    // rows see more, so every thread has some of all parts of the rows.
    void attend_together(int layer, int row, int rows, int& unit) const {
        const int group = m_.heads / m_.kv_heads;
        int most = larger(kQueries / group, 1);
        const auto parts = [&] { return (rows + most - 1) / most; };
        while (most > kFewQueries && parts() * m_.kv_heads < 4 * p_.threads) most = (most + 1) / 2;
        const int heads = parts() * m_.kv_heads < p_.threads ? 1 : group;
        for (int part = 0, first = 0; part < parts(); ++part) {
            const int last = rows * (part + 1) / parts();
            for (int head = 0; head < m_.heads; head += heads) {
                if (unit++ % p_.threads == p_.rank) attention_.attend(layer, row + first, last - first, head, heads);
            }
            first = last;
        }
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

size_t floats(const CpuModel& model, int rows, int threads) {
    return Layout(model, rows, threads).floats(threads);
}

void run(const CpuDecode& call, int threads) {
    const Layout layout(*call.model, call.rows, threads);
    Team team{&call, &layout, {}};
    team.barrier.threads = threads;
    run_together(threads, call.model->dtype == DType::kFloat32 ? work<Fp32> : work<Bf16>, &team);
}

template <class Kind>
bool is_packed(const CpuLinear& layer) {
    if (layer.outs == 0 || layer.format != Format::kModel) return false;
    return packing_of<Kind>(layer) == Packing::kNatural || packing_of<Kind>(layer) == Packing::kPairs;
}

size_t packed_floats(const CpuModel& model, const CpuLinear& layer) {
    if (model.dtype == DType::kFloat32) return is_packed<Fp32>(layer) ? PackedOrder<Fp32>(layer).floats() : 0;
    return is_packed<Bf16>(layer) ? PackedOrder<Bf16>(layer).floats() : 0;
}

struct Packers {
    const CpuModel& model;
    int threads;
};

// Every thread packs some strips of each layer.
template <class Kind>
void pack_share(void* context, int rank) noexcept {
    const auto& packers = *static_cast<const Packers*>(context);
    int strip = 0;
    for (int i = 0; i < packers.model.stages; ++i) {
        const CpuLinear& layer = packers.model.stage[i].linear;
        if (layer.packed == nullptr) continue;
        const PackedOrder<Kind> order(layer);
        for (int out = 0; out < layer.outs; out = order.next_strip(out)) {
            if (strip++ % packers.threads == rank) order.take(out, layer.packed);
        }
    }
}

void pack(const CpuModel& model, int threads) {
    Packers packers{model, threads};
    run_together(threads, model.dtype == DType::kFloat32 ? pack_share<Fp32> : pack_share<Bf16>, &packers);
}

constexpr CpuDecodePath kPath{GPTKERN_ISA_NAME, floats, run, packed_floats, pack};

}  // namespace

const CpuDecodePath& decode_path() { return kPath; }

}  // namespace GPTKERN_ISA
}  // namespace gptkern
