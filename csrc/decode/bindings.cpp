#include "decode/bindings.h"

#include <pybind11/stl.h>

#include <climits>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "common/tensor.h"
#include "decode/decoder.h"

namespace py = pybind11;

namespace gptkern {
namespace {

constexpr int kMostThreads = 1024;

// Reads the tensors of a gptkern.engine.executors.cpu_model.CpuModel, checks each, and holds it for the decoder.
class Weights {
public:
    Checker check{"Decoder"};
    Kind kind = Kind::kOther;
    std::vector<HeldTensor> held;

    // Embeddings: a matrix with contiguous rows.
    Tensor rows(const char* name, py::handle object) {
        const Tensor matrix = check.tensor(name, object, 2);
        if (matrix.shape[1] > 1 && matrix.stride[1] != 1) check.refuse(name, matrix, "a matrix of contiguous rows");
        hold_floats(name, matrix);
        return matrix;
    }

    CpuNorm norm(py::handle object, int64_t width, float eps) {
        const Group norm(check, "a norm", object);
        return {vector("the weight of a norm", norm.get("weight"), width),
                vector("the bias of a norm", norm.get("bias"), width), eps};
    }

    CpuLinear linear(py::handle object, int64_t outs, int64_t in) {
        const Group linear(check, "a linear layer", object);
        const py::handle scales = linear.get("scales");
        const bool packed = !scales.is_none();
        const Tensor w = check.tensor("a weight", linear.get("weight"), 2);
        const bool by_outs = in == 1 || w.stride[1] == 1, by_ins = outs == 1 || w.stride[0] == 1;
        if (w.shape[0] != outs || w.shape[1] != in || !(by_outs || (by_ins && !packed))) {
            const int64_t needed[] = {outs, in};
            check.refuse("a weight", w, "shape " + shape_of(needed, 2) + " with one dimension contiguous");
        }
        if (packed && w.kind != Kind::kInt8) check.refuse("a weight", w, "int8, as it has scales,");
        packed ? hold(w) : hold_floats("a weight", w);
        CpuLinear layer{};
        layer.weight = w.data;
        layer.bias = vector("a bias", linear.get("bias"), outs);
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

    // Holds a tensor of the model's dtype, which is that of the first one.
    void hold_floats(const char* name, const Tensor& tensor) {
        if (tensor.kind != Kind::kFloat32 && tensor.kind != Kind::kBFloat16) {
            check.refuse(name, tensor, "float32 or bfloat16");
        }
        if (kind == Kind::kOther) kind = tensor.kind;
        if (tensor.kind != kind) check.refuse(name, tensor, std::string(name_of(kind)) + ", as are the embeddings,");
        if (check.on_cuda()) check.refuse(name, tensor, "a tensor on the CPU");
        hold(tensor);
    }

    const void* vector(const char* name, py::handle object, int64_t length) {
        if (object.is_none()) return nullptr;
        const Tensor values = check.dense(name, object, kind, {length});
        hold_floats(name, values);
        return values.data;
    }
};

// A Decoder, the tensors whose memory it reads, and the entries of modules that they came from.
class HoldingDecoder {
public:
    HoldingDecoder(const py::object& model, const py::object& owners) {
        Weights weights;
        build(weights, Group(weights.check, "model", model));
        held_ = std::move(weights.held);
        using Owners = std::vector<std::pair<py::dict, py::str>>;
        for (const auto& [dictionary, key] : weights.check.as<Owners>("owners", owners)) {
            entries_.emplace_back(dictionary, key);
        }
    }

    // One token of every row. False, with nothing done, if weights have moved or been replaced.
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
        const Tensor cache = check.tensor(name, object, 5);
        const bool dense = (m.head_dim == 1 || cache.stride[4] == 1) && (m.heads == 1 || cache.stride[3] == m.head_dim);
        if (check.on_cuda() || cache.kind != kind || cache.shape[0] != m.blocks || cache.shape[3] != m.heads ||
            cache.shape[4] != m.head_dim || !dense) {
            const int64_t needed[] = {m.blocks, kAny, kAny, m.heads, m.head_dim};
            check.refuse(name, cache, std::string(name_of(kind)) + " of shape " + shape_of(needed, 5) +
                                         " on the CPU, its last two dimensions contiguous,");
        }
        return cache;
    }

    void build(Weights& weights, const Group& group) {
        Checker& check = weights.check;
        CpuModel model{};
        model.post_norm = check.as<bool>("post_norm", group.get("post_norm"));
        model.activation = static_cast<Activation>(check.number("activation", group.get("activation"), 0, 3));
        const float eps = check.as<float>("eps", group.get("eps"));
        const Tensor wte = weights.rows("the token embeddings", group.get("tokens"));
        const Tensor wpe = weights.rows("the positions", group.get("positions"));
        const int64_t width = wte.shape[1], vocab = wte.shape[0];
        if (wpe.shape[1] != width) check.refuse("the positions", wpe, "a matrix as wide as the token embeddings");
        const py::handle final_norm = group.get("final_norm");
        if (model.post_norm != final_norm.is_none()) check.refuse("either final_norm or post_norm is needed");
        model.dtype = weights.kind == Kind::kFloat32 ? DType::kFloat32 : DType::kBFloat16;
        model.width = check.number("the width", width, 1, INT_MAX / 4);
        model.vocab = check.number("the vocabulary", vocab, 1, INT_MAX / 4);
        model.n_positions = check.number("the context", wpe.shape[0], 1, INT_MAX / 4);
        model.heads = check.number("heads", group.get("heads"), 1, width);
        model.tokens = wte.data;
        model.token_stride = wte.stride[0];
        model.positions = wpe.data;
        model.position_stride = wpe.stride[0];
        std::vector<CpuBlock> blocks;
        for (const py::object& object : check.as<std::vector<py::object>>("blocks", group.get("blocks"))) {
            blocks.push_back(block(weights, Group(check, "a block", object), model, eps));
        }
        if (!final_norm.is_none()) model.final_norm = weights.norm(final_norm, width, eps);
        model.head = weights.linear(group.get("head"), vocab, width);
        decoder_ = std::make_unique<Decoder>(model, std::move(blocks));
    }

    // The first block sets the model's inner width.
    static CpuBlock block(Weights& weights, const Group& group, CpuModel& model, float eps) {
        Checker& check = weights.check;
        const int64_t width = model.width;
        const py::handle fc = group.get("fc");
        if (model.inner == 0) {
            const Tensor weight = check.tensor("a weight", Group(check, "a linear layer", fc).get("weight"), 2);
            model.inner = check.number("the inner width", weight.shape[0], 1, INT_MAX / 4);
        }
        return {weights.norm(group.get("norm1"), width, eps),
                weights.norm(group.get("norm2"), width, eps),
                weights.linear(group.get("qkv"), 3 * width, width),
                weights.linear(group.get("projection"), width, width),
                weights.linear(fc, model.inner, width),
                weights.linear(group.get("out"), width, model.inner),
                check.as<float>("the scale of a block", group.get("scale"))};
    }

    std::vector<HeldEntry> entries_;
    std::vector<HeldTensor> held_;
    std::unique_ptr<Decoder> decoder_;
};

}  // namespace

void bind_decoder(py::module_& module) {
    module.attr("has_decoder") = decoder_supported();
    py::class_<HoldingDecoder>(module, "Decoder", "A model for the CPU's decode step: csrc/decode/decoder.h.")
        .def(py::init<const py::object&, const py::object&>(), py::arg("model"), py::arg("owners") = py::tuple())
        .def("step", &HoldingDecoder::step, py::arg("k"), py::arg("v"), py::arg("page_table"), py::arg("lengths"),
             py::arg("tokens"), py::arg("logits"), py::arg("threads"),
             "One token of every row; False, with nothing done, if weights have moved.");
    module.def("decode_path", [] { return cpu_decode_path()->name; });
    module.def("use_decode_path", &use_cpu_decode_path, "Chooses the path by name, for tests that compare them.");
}

}  // namespace gptkern
