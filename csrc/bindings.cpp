// gptkern._C: tensors in, checked here (tensor.h), so that no call from Python reads or writes outside of one.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <climits>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "common/tensor.h"
#include "constants.h"
#include "decode/decoder.h"
#include "sampling/cpu_path.h"
#include "sampling/cuda_path.h"

namespace py = pybind11;

namespace gptkern {
namespace {

const CpuPath& best_cpu_path() {
#ifdef GPTKERN_X86
    static const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (has_avx2) return avx2::cpu_path();
#endif
    return portable::cpu_path();
}

const CpuPath* cpu = &best_cpu_path();

// Chooses the CPU path by name; tests compare them.
void use_cpu_path(const std::string& name) {
    if (name == portable::cpu_path().name) {
        cpu = &portable::cpu_path();
    } else if (name == best_cpu_path().name) {
        cpu = &best_cpu_path();
    } else {
        throw py::value_error("use_cpu_path: " + name + " is not available here");
    }
}

using Maybe = py::object;  // a tensor or None

constexpr int kMostThreads = 1024;
static_assert(sizeof(RowParams) == 12 * sizeof(double) && sizeof(RowCounter) == 3 * sizeof(int64_t));

DType logits_type(const Checker& check, const char* name, const Tensor& logits) {
    if (logits.kind > Kind::kBFloat16) {
        throw py::type_error(std::string(name) + " are of another dtype; float32, float16 and bfloat16 are accepted");
    }
    const int last = logits.dims - 1;
    if (logits.shape[last] > 1 && logits.stride[last] != 1) check.refuse(name, logits, "a contiguous last dimension");
    static_assert(static_cast<int>(Kind::kBFloat16) == static_cast<int>(DType::kBFloat16));
    return static_cast<DType>(logits.kind);
}

// (batch, n) ids, padded with -1.
IdLists id_lists(Checker& check, const char* name, const Maybe& object, int batch) {
    if (object.is_none()) return {};
    const Tensor ids = check.dense(name, object, Kind::kInt32, {batch, kAny});
    return {reinterpret_cast<const int32_t*>(ids.data), check.number(name, ids.shape[1], 0, INT_MAX)};
}

std::uintptr_t workspace_of(Checker& check, const Maybe& workspace, int64_t rows, int64_t vocab) {
    if (!check.on_cuda()) return 0;
    const Tensor memory = check.dense("workspace", workspace, Kind::kUInt8, {kAny});
    if (memory.shape[0] < static_cast<int64_t>(cuda_workspace_bytes(rows, vocab))) {
        check.refuse("workspace", memory, "one of workspace_bytes(rows, vocab)");
    }
    return reinterpret_cast<std::uintptr_t>(memory.data);
}

int first_bad(const int32_t* status, int rows) {
    for (int row = 0; row < rows; ++row) {
        if (status[row] != kOk) return row;
    }
    return -1;
}

// Samples, verifies drafts (where there is ``accepted``) or writes distributions (where there is ``probs``).
// Returns the first row that could not be sampled, or -1; on CUDA the statuses are on the device, and
// nothing is waited for.
int sample(const py::object& logits, const py::object& values, const Maybe& bias_ids, const Maybe& bias_values,
           const Maybe& banned_ids, const Maybe& eos_ids, const Maybe& bitmask, const py::object& counters,
           const Maybe& counts, const py::object& status, const Maybe& tokens, const py::object& width,
           const Maybe& logprobs,
           const Maybe& top_tokens, const Maybe& top_logprobs, const Maybe& probs, const Maybe& draft_tokens,
           const Maybe& draft_probs, const Maybe& accepted, const py::object& commit, const py::object& threads,
           const py::object& stream, const Maybe& workspace) {
    Checker check("sample");
    SampleArguments a{};
    const bool speculates = !accepted.is_none(), writes_probs = !probs.is_none();
    const Tensor rows = check.tensor("logits", logits, speculates ? 3 : 2);
    a.dtype = logits_type(check, "logits", rows);
    a.logits = rows.data;
    a.row_stride = rows.stride[0];
    a.position_stride = speculates ? rows.stride[1] : 0;
    a.batch = check.number("the batch", rows.shape[0], 0, INT_MAX);
    a.positions = speculates ? check.number("the positions", rows.shape[1], 1, INT_MAX) : 1;
    a.vocab = check.number("the vocabulary", rows.shape[rows.dims - 1], 1, kMaxVocab);
    const int64_t batch = a.batch;
    a.params = reinterpret_cast<const RowParams*>(check.dense<double>("values", values, {batch, 12}));
    a.counters = reinterpret_cast<RowCounter*>(check.dense<int64_t>("counters", counters, {batch, 3}));
    a.counts = check.dense_or_none<int32_t>("counts", counts, {batch, a.vocab});
    a.bias = id_lists(check, "bias_ids", bias_ids, a.batch);
    if (bias_ids.is_none() != bias_values.is_none()) check.refuse("bias_ids and bias_values must be given together");
    a.bias_values = check.dense_or_none<float>("bias_values", bias_values, {batch, a.bias.width});
    a.banned = id_lists(check, "banned_ids", banned_ids, a.batch);
    a.eos = id_lists(check, "eos_ids", eos_ids, a.batch);
    if (!bitmask.is_none()) {
        const Tensor mask = check.dense("bitmask", bitmask, Kind::kInt32, {batch, kAny});
        if (mask.shape[1] < (a.vocab + 31) / 32) check.refuse("bitmask", mask, "a bit of each token");
        a.bitmask = reinterpret_cast<const int32_t*>(mask.data);
        a.bitmask_words = mask.shape[1];
    }
    a.status = check.dense<int32_t>("status", status, {batch});
    a.logprobs = -1;
    if (writes_probs) {
        a.probs = check.dense<float>("probs", probs, {batch, a.vocab});
        if (speculates) check.refuse("probs and accepted are not to be had together");
    } else {
        a.tokens = speculates ? check.dense<int64_t>("tokens", tokens, {batch, a.positions})
                              : check.dense<int64_t>("tokens", tokens, {batch});
    }
    const int asked = check.number("width", width, INT_MIN, INT_MAX);  // below 0: no log-probabilities
    if (!writes_probs && !speculates && asked >= 0) {
        a.logprobs = asked;
        a.token_logprobs = check.dense<float>("logprobs", logprobs, {batch});
        a.top_tokens = check.dense<int64_t>("top_tokens", top_tokens, {batch, asked});
        a.top_logprobs = check.dense<float>("top_logprobs", top_logprobs, {batch, asked});
    }
    const int most_commit = static_cast<int>(check.on_cuda() ? Commit::kOnly : Commit::kYes);
    a.commit = static_cast<Commit>(check.number("commit", commit, 0, most_commit));
    if (speculates) {
        a.accepted = check.dense<int64_t>("accepted", accepted, {batch});
        if (a.commit != Commit::kOnly) {
            a.draft_tokens = check.dense<int64_t>("draft_tokens", draft_tokens, {batch, a.positions - 1});
            a.draft_probs = check.dense_or_none<float>("draft_probs", draft_probs, {batch, a.positions - 1, a.vocab});
        }
    }
    const std::uintptr_t memory = workspace_of(check, workspace, a.batch, a.vocab);
    const int members = check.number("threads", threads, 1, kMostThreads);
    const auto queue = check.as<std::uintptr_t>("stream", stream);
    if (a.batch == 0) return -1;
    const py::gil_scoped_release others_run;
    if (check.on_cuda()) {
        cuda_sample(a, memory, queue);
        return -1;
    }
    cpu->sample(a, members);
    return first_bad(a.status, a.batch);
}

int top_k(const py::object& logits, const py::object& k, const py::object& tokens, const py::object& logprobs,
          const py::object& status, const py::object& threads, const py::object& stream, const Maybe& workspace) {
    Checker check("top_k");
    TopKArguments a{};
    const Tensor rows = check.tensor("logits", logits, 2);
    a.dtype = logits_type(check, "logits", rows);
    a.logits = rows.data;
    a.row_stride = rows.stride[0];
    a.rows = check.number("the rows", rows.shape[0], 0, INT_MAX);
    a.vocab = check.number("the vocabulary", rows.shape[1], 1, kMaxVocabTopK);
    a.k = check.number("k", k, 0, a.vocab);
    a.tokens = check.dense<int64_t>("tokens", tokens, {a.rows, a.k});
    a.logprobs = check.dense<float>("logprobs", logprobs, {a.rows, a.k});
    a.status = check.dense<int32_t>("status", status, {a.rows});
    const std::uintptr_t memory = workspace_of(check, workspace, a.rows, a.vocab);
    const int members = check.number("threads", threads, 1, kMostThreads);
    const auto queue = check.as<std::uintptr_t>("stream", stream);
    if (a.rows == 0) return -1;
    const py::gil_scoped_release others_run;
    if (check.on_cuda()) {
        cuda_top_k(a, memory, queue);
        return -1;
    }
    cpu->top_k(a, members);
    return first_bad(a.status, a.rows);
}

// A model's tensors on their way to a Decoder: each checked, and kept.
class Weights {
public:
    using Norm = std::tuple<py::object, Maybe>;           // weight, bias
    using Linear = std::tuple<py::object, Maybe, Maybe>;  // weight, bias, scales of int8 weights
    using Block = std::tuple<Norm, Norm, Linear, Linear, Linear, Linear>;

    Checker check{"Decoder"};
    Kind kind = Kind::kOther;
    std::vector<HeldTensor> held;

    // A matrix with dense rows, of embeddings.
    Tensor rows(const char* name, const py::object& object) {
        const Tensor matrix = check.tensor(name, object, 2);
        if (matrix.shape[1] > 1 && matrix.stride[1] != 1) check.refuse(name, matrix, "a matrix of contiguous rows");
        keep(name, matrix);
        return matrix;
    }

    CpuNorm norm(const Norm& given, int64_t width, float eps) {
        const auto& [weight, bias] = given;
        return {vector("the weight of a norm", weight, width), vector("the bias of a norm", bias, width), eps};
    }

    CpuLinear linear(const Linear& given, int64_t outs, int64_t in) {
        const auto& [weight, bias, scales] = given;
        const bool packed = !scales.is_none();
        const Tensor w = check.tensor("a weight", weight, 2);
        const bool by_outs = in == 1 || w.stride[1] == 1, by_ins = outs == 1 || w.stride[0] == 1;
        if (w.shape[0] != outs || w.shape[1] != in || !(by_outs || (by_ins && !packed))) {
            const int64_t needed[] = {outs, in};
            check.refuse("a weight", w, "shape " + shape_of(needed, 2) + " with one dimension contiguous");
        }
        if (packed && w.kind != Kind::kInt8) check.refuse("a weight", w, "int8, as it has scales,");
        packed ? hold(w) : keep("a weight", w);
        CpuLinear layer{};
        layer.weight = w.data;
        layer.bias = vector("a bias", bias, outs);
        layer.outs = static_cast<int>(outs);
        layer.in = static_cast<int>(in);
        layer.stride = w.stride[by_outs ? 0 : 1];
        layer.transposed = !by_outs;
        if (packed) {
            layer.scales = check.dense<float>("the scales of a weight", scales, {outs});
            held.emplace_back(scales);
        }
        return layer;
    }

private:
    void hold(const Tensor& tensor) { held.emplace_back(tensor.object); }

    void keep(const char* name, const Tensor& tensor) {
        if (tensor.kind != Kind::kFloat32 && tensor.kind != Kind::kBFloat16) {
            check.refuse(name, tensor, "float32 or bfloat16");
        }
        if (kind == Kind::kOther) kind = tensor.kind;
        if (tensor.kind != kind) check.refuse(name, tensor, std::string(name_of(kind)) + ", as are the embeddings,");
        if (check.on_cuda()) check.refuse(name, tensor, "a tensor on the CPU");
        hold(tensor);
    }

    const void* vector(const char* name, const Maybe& object, int64_t length) {
        if (object.is_none()) return nullptr;
        const Tensor found = check.dense(name, object, kind, {length});
        keep(name, found);
        return found.data;
    }
};

// A Decoder with the tensors that it points at, and the places in modules from which they were taken.
class HoldingDecoder {
public:
    HoldingDecoder(const py::object& heads, const py::object& activation, const py::object& post_norm,
                   const py::object& eps, const py::object& tokens, const py::object& positions,
                   const py::object& blocks, const py::object& scales, const py::object& final_norm,
                   const py::object& head, const py::object& owners) {
        Weights weights;
        const Checker& check = weights.check;
        CpuModel model{};
        model.post_norm = check.as<bool>("post_norm", post_norm);
        model.activation = static_cast<Activation>(check.number("activation", activation, 0, 3));
        build(weights, model, heads, check.as<float>("eps", eps), tokens, positions,
              check.as<std::vector<Weights::Block>>("blocks", blocks), check.as<std::vector<float>>("scales", scales),
              check.as<std::optional<Weights::Norm>>("final_norm", final_norm), check.as<Weights::Linear>("head", head));
        held_ = std::move(weights.held);
        using Owners = std::vector<std::pair<py::dict, py::str>>;
        for (const auto& [dictionary, key] : check.as<Owners>("owners", owners)) entries_.emplace_back(dictionary, key);
    }

    // False, with nothing done, where weights have moved or been replaced since this was made.
    bool step(const py::object& k, const py::object& v, const py::object& page_table, const py::object& lengths,
              const py::object& tokens, const py::object& logits, const py::object& threads) {
        for (const HeldEntry& entry : entries_) {
            if (entry.replaced()) return false;
        }
        for (const HeldTensor& tensor : held_) {
            if (tensor.moved()) return false;
        }
        Checker check("GPT");
        const CpuModel& m = decoder_->model();
        const Kind kind = m.dtype == DType::kFloat32 ? Kind::kFloat32 : Kind::kBFloat16;
        const Tensor keys = cached(check, "the cache's k", k, kind), values = cached(check, "the cache's v", v, kind);
        for (int i = 0; i < keys.dims; ++i) {
            if (keys.stride[i] != values.stride[i] || keys.shape[i] != values.shape[i]) {
                check.refuse("the cache's v", values, "the shape and the strides of its k");
            }
        }
        const int64_t rows = check.tensor("tokens", tokens, 1).shape[0];
        const Tensor table = check.tensor("page_table", page_table, 2), held = check.tensor("lengths", lengths, 1);
        if (table.kind != Kind::kInt32 || table.shape[0] < rows || (table.shape[1] > 1 && table.stride[1] != 1)) {
            check.refuse("page_table", table, "int32, a contiguous row of each token,");
        }
        if (held.kind != Kind::kInt32 || held.shape[0] < rows || !held.contiguous()) {
            check.refuse("lengths", held, "int32, one of each token, contiguous,");
        }
        const CpuCache cache{keys.data, values.data, keys.stride[0], keys.stride[1], keys.stride[2], keys.shape[1],
                             check.number("the page size", keys.shape[2], 1, INT_MAX),
                             reinterpret_cast<const int32_t*>(table.data), table.shape[1], table.stride[0],
                             reinterpret_cast<const int32_t*>(held.data)};
        const auto* const ids = check.dense<int64_t>("tokens", tokens, {rows});
        char* const out = check.dense("logits", logits, kind, {rows, m.vocab}).data;
        const int count = check.number("the rows", rows, 0, 1 << 16);
        const int members = check.number("threads", threads, 1, kMostThreads);
        const py::gil_scoped_release others_run;
        decoder_->step(cache, ids, count, out, members);
        return true;
    }

private:
    Tensor cached(Checker& check, const char* name, const py::object& object, Kind kind) const {
        const CpuModel& m = decoder_->model();
        const Tensor found = check.tensor(name, object, 5);
        const bool dense = (m.head_dim == 1 || found.stride[4] == 1) && (m.heads == 1 || found.stride[3] == m.head_dim);
        if (check.on_cuda() || found.kind != kind || found.shape[0] != m.blocks || found.shape[3] != m.heads ||
            found.shape[4] != m.head_dim || !dense) {
            const int64_t needed[] = {m.blocks, kAny, kAny, m.heads, m.head_dim};
            check.refuse(name, found, std::string(name_of(kind)) + " of shape " + shape_of(needed, 5) +
                                         " on the CPU, its last two dimensions contiguous,");
        }
        return found;
    }

    void build(Weights& weights, CpuModel& model, const py::object& heads, float eps, const py::object& tokens,
               const py::object& positions, const std::vector<Weights::Block>& blocks, const std::vector<float>& scales,
               const std::optional<Weights::Norm>& final_norm, const Weights::Linear& head) {
        Checker& check = weights.check;
        const Tensor wte = weights.rows("the token embeddings", tokens), wpe = weights.rows("the positions", positions);
        const int64_t width = wte.shape[1], vocab = wte.shape[0];
        if (wpe.shape[1] != width) check.refuse("the positions", wpe, "a matrix as wide as the token embeddings");
        if (scales.size() != blocks.size()) check.refuse("scales must be one of each block");
        if (model.post_norm == final_norm.has_value()) check.refuse("either final_norm or post_norm is needed");
        model.dtype = weights.kind == Kind::kFloat32 ? DType::kFloat32 : DType::kBFloat16;
        model.width = check.number("the width", width, 1, INT_MAX / 4);
        model.vocab = check.number("the vocabulary", vocab, 1, INT_MAX / 4);
        model.n_positions = check.number("the context", wpe.shape[0], 1, INT_MAX / 4);
        model.heads = check.number("heads", heads, 1, width);
        model.tokens = wte.data;
        model.token_stride = wte.stride[0];
        model.positions = wpe.data;
        model.position_stride = wpe.stride[0];
        std::vector<CpuBlock> made;
        for (size_t i = 0; i < blocks.size(); ++i) {
            const auto& [norm1, norm2, qkv, projection, fc, out] = blocks[i];
            const int64_t inner = check.tensor("a weight", std::get<0>(fc), 2).shape[0];
            if (i == 0) model.inner = check.number("the inner width", inner, 1, INT_MAX / 4);
            made.push_back({weights.norm(norm1, width, eps), weights.norm(norm2, width, eps),
                            weights.linear(qkv, 3 * width, width), weights.linear(projection, width, width),
                            weights.linear(fc, model.inner, width), weights.linear(out, width, model.inner),
                            scales[i]});
        }
        if (final_norm.has_value()) model.final_norm = weights.norm(*final_norm, width, eps);
        model.head = weights.linear(head, vocab, width);
        decoder_ = std::make_unique<Decoder>(model, std::move(made));
    }

    std::vector<HeldEntry> entries_;
    std::vector<HeldTensor> held_;
    std::unique_ptr<Decoder> decoder_;
};

size_t workspace_bytes(int64_t rows, int64_t vocab) {
    const Checker check("workspace_bytes");
    return cuda_workspace_bytes(check.number("rows", rows, 0, INT_MAX), check.number("vocab", vocab, 0, kMaxVocabTopK));
}

std::pair<uint64_t, uint64_t> uniforms(int64_t seed, int64_t request, int64_t step) {
    std::pair<uint64_t, uint64_t> u;
    cpu->uniforms(seed, request, step, &u.first, &u.second);
    return u;
}

}  // namespace
}  // namespace gptkern

PYBIND11_MODULE(_C, module) {
    using namespace gptkern;
    module.doc() = "gptkern's sampler (gptkern.ops.sample) and the CPU's decode step (gptkern.generate.cpu_step).";
    module.attr("has_cuda") = kHasCuda;
    module.attr("cuda_archs") = kCudaArchs;
    export_constants(module);
    const py::kw_only named;
    const auto optional = [](const char* name) { return py::arg(name) = py::none(); };
    module.def("sample", &sample, py::arg("logits"), named, py::arg("values"), optional("bias_ids"),
               optional("bias_values"), optional("banned_ids"), optional("eos_ids"), optional("bitmask"),
               py::arg("counters"), optional("counts"), py::arg("status"), optional("tokens"), py::arg("width") = -1,
               optional("logprobs"), optional("top_tokens"), optional("top_logprobs"), optional("probs"),
               optional("draft_tokens"), optional("draft_probs"), optional("accepted"), py::arg("commit"),
               py::arg("threads"), py::arg("stream") = 0, optional("workspace"));
    module.def("top_k", &top_k, py::arg("logits"), py::arg("k"), named, py::arg("tokens"), py::arg("logprobs"),
               py::arg("status"), py::arg("threads"), py::arg("stream") = 0, optional("workspace"));
    module.def("workspace_bytes", &workspace_bytes, "Bytes that the CUDA path needs for (rows, vocab).");
    module.attr("has_decoder") = decoder_supported();
    py::class_<HoldingDecoder>(module, "Decoder", "A model for the CPU's decode step: csrc/decoder.h.")
        .def(py::init<const py::object&, const py::object&, const py::object&, const py::object&, const py::object&,
                      const py::object&, const py::object&, const py::object&, const py::object&, const py::object&,
                      const py::object&>(),
             named, py::arg("heads"), py::arg("activation"), py::arg("post_norm"), py::arg("eps"), py::arg("tokens"),
             py::arg("positions"), py::arg("blocks"), py::arg("scales"), py::arg("final_norm"), py::arg("head"), py::arg("owners") = py::tuple())
        .def("step", &HoldingDecoder::step, py::arg("k"), py::arg("v"), py::arg("page_table"), py::arg("lengths"),
             py::arg("tokens"), py::arg("logits"), py::arg("threads"), "One token of every sequence; false where weights moved.");
    module.def("decode_path", [] { return cpu_decode_path()->name; });
    module.def("use_decode_path", &use_cpu_decode_path, "Chooses it by name, for tests that compare them.");
    module.def("uniforms", &uniforms, "The two 64-bit uniforms of (seed, request, step).");
    module.def("weight", [](double halvings) { return cpu->weight(halvings); });
    module.def("cpu_path", [] { return cpu->name; });
    module.def("use_cpu_path", &use_cpu_path);
}
