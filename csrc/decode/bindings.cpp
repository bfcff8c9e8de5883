#include "decode/bindings.h"

#include <pybind11/stl.h>

#include <climits>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "common/tensor.h"
#include "decode/decoder.h"

namespace py = pybind11;

namespace gptkern {
namespace {

using Maybe = py::object;  // a tensor or None

constexpr int kMostThreads = 1024;

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

}  // namespace

void bind_decoder(py::module_& module) {
    const py::kw_only named;
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
}

}  // namespace gptkern
