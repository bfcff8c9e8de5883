#include "decode/bindings.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <climits>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "common/tensor.h"
#include "common/threads.h"
#include "decode/decoder.h"

namespace py = pybind11;

namespace gptkern {
namespace {

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

    // None: no norm.
    CpuNorm norm(py::handle object, int64_t width) {
        if (object.is_none()) return {};
        const Group norm(check, "a norm", object);
        const void* const weight = vector("the weight of a norm", norm.get("weight"), width);
        if (weight == nullptr) check.refuse("a norm has no weight");
        return {weight, vector("the bias of a norm", norm.get("bias"), width)};
    }

    // A table of every position's rotation; null for None.
    const float* rotations(const char* name, py::handle object, int64_t positions, int64_t pairs) {
        const auto* const table = check.dense_or_none<float>(name, object, {positions, pairs});
        if (check.on_cuda()) check.refuse(std::string(name) + " is on a GPU; a tensor on the CPU is needed");
        if (table != nullptr) held.emplace_back(object);
        return table;
    }

    CpuLinear linear(py::handle object, int64_t outs, int64_t in) {
        const Group linear(check, "a linear layer", object);
        const py::handle scales = linear.get("scales"), minimums = linear.get("minimums");
        const Tensor w = check.tensor("a weight", linear.get("weight"), 2);
        CpuLinear layer{};
        layer.outs = static_cast<int>(outs);
        layer.in = static_cast<int>(in);
        if (!scales.is_none()) {
            pack(layer, w, scales, minimums);
        } else {
            if (!minimums.is_none()) check.refuse("a weight has minimums, and no scales");
            shape(layer, w, in, true);
            hold_floats("a weight", w);
        }
        layer.bias = vector("a bias", linear.get("bias"), outs);
        return layer;
    }

    const void* vector(const char* name, py::handle object, int64_t length) {
        if (object.is_none()) return nullptr;
        const Tensor values = check.dense(name, object, kind, {length});
        hold_floats(name, values);
        return values.data;
    }

private:
    // The layout of a weight of ``columns`` columns.
    void shape(CpuLinear& layer, const Tensor& w, int64_t columns, bool may_transpose) {
        const bool by_outs = columns == 1 || w.stride[1] == 1, by_ins = layer.outs == 1 || w.stride[0] == 1;
        if (w.shape[0] != layer.outs || w.shape[1] != columns || !(by_outs || (by_ins && may_transpose))) {
            const int64_t needed[] = {layer.outs, columns};
            check.refuse("a weight", w, "shape " + shape_of(needed, 2) + " with one dimension contiguous");
        }
        layer.weight = w.data;
        layer.stride = w.stride[by_outs ? 0 : 1];
        layer.transposed = !by_outs;
    }

    // A packed weight: int8, or of bytes with a scale for each output (fp8) or for each group of inputs (int4).
    void pack(CpuLinear& layer, const Tensor& w, py::handle scales, py::handle minimums) {
        if (w.kind != Kind::kInt8 && w.kind != Kind::kUInt8) {
            check.refuse("a weight", w, "int8 or uint8, as it has scales,");
        }
        const bool by_group = w.kind == Kind::kUInt8 && py::hasattr(scales, "ndim") &&
                              check.as<int>("the scales of a weight", scales.attr("ndim")) == 2;
        if (!by_group) {
            if (!minimums.is_none()) check.refuse("a weight has minimums, and is not int4");
            layer.format = w.kind == Kind::kInt8 ? Format::kInt8 : Format::kFp8;
            shape(layer, w, layer.in, false);
            layer.scales = check.dense<float>("the scales of a weight", scales, {layer.outs});
        } else {
            const int64_t groups = check.tensor("the scales of a weight", scales, 2).shape[1];
            if (groups < 1 || layer.in % groups != 0 || layer.in / groups % kLeastGroup != 0) {
                check.refuse("an int4 weight of " + std::to_string(layer.in) + " inputs has " + std::to_string(groups) +
                             " groups; groups of a multiple of " + std::to_string(kLeastGroup) + " are accepted");
            }
            layer.format = Format::kInt4;
            layer.group = static_cast<int>(layer.in / groups);
            shape(layer, w, layer.in / 2, false);
            const auto halves = [&](const char* name, py::handle object) {
                return reinterpret_cast<const uint16_t*>(
                    check.dense(name, object, Kind::kFloat16, {layer.outs, groups}).data);
            };
            layer.group_scales = halves("the scales of an int4 weight", scales);
            if (!minimums.is_none()) layer.minimums = halves("the minimums of a weight", minimums);
        }
        hold(w);
        held.emplace_back(scales);
        if (!minimums.is_none()) held.emplace_back(minimums);
    }

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
};

// A Decoder, the tensors whose memory it reads, and the modules' dictionaries that they came from.
class HoldingDecoder {
public:
    HoldingDecoder(const py::object& model, const py::object& owners) {
        Weights weights;
        build(weights, Group(weights.check, "model", model));
        held_ = std::move(weights.held);
        for (const py::dict& owner : weights.check.as<std::vector<py::dict>>("owners", owners)) {
            owners_.emplace_back(owner);
        }
    }

    // One token of every row, logits of the wanted ones; ``advance``: the rows' lengths then grow by 1. False, with
    // nothing done, if weights have moved or been replaced.
    bool step(const py::object& k, const py::object& v, const py::object& page_table, const py::object& lengths,
              const py::object& tokens, const py::object& wanted, const py::object& logits, const py::object& threads,
              bool advance) {
        for (const HeldDict& owner : owners_) owner.prefetch();
        for (const HeldTensor& tensor : held_) tensor.prefetch();
        for (const HeldDict& owner : owners_) {
            if (owner.changed()) return false;
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
        const int count = check.number("the rows", rows, 0, 1 << 16);
        const int out_rows = check.number("the wanted rows", check.tensor("wanted", wanted, 1).shape[0], 0, count);
        const auto* const places = check.dense<int32_t>("wanted", wanted, {out_rows});
        char* const out = check.dense("logits", logits, kind, {out_rows, m.vocab}).data;
        const int members = check.number("threads", threads, 1, kMostThreads);
        if (decoder_->reads_packed() && weights_written_since()) decoder_->weights_written();
        const py::gil_scoped_release others_run;
        decoder_->step(cache, ids, count, places, out_rows, out, members);
        if (advance) {
            for (int row = 0; row < count; ++row) ++reinterpret_cast<int32_t*>(held.data)[row];
        }
        return true;
    }

    size_t packed_bytes() const { return decoder_->packed_bytes(); }
    void read_packed(bool packed) {
        const py::gil_scoped_release others_run;
        decoder_->read_packed(packed);
    }
    void weights_written() { decoder_->weights_written(); }

private:
    Tensor cached(Checker& check, const char* name, const py::object& object, Kind kind) const {
        const CpuModel& m = decoder_->model();
        const Tensor cache = check.tensor(name, object, 5);
        const bool dense = (m.head_dim == 1 || cache.stride[4] == 1) && (m.kv_heads == 1 || cache.stride[3] == m.head_dim);
        if (check.on_cuda() || cache.kind != kind || cache.shape[0] != m.layers || cache.shape[3] != m.kv_heads ||
            cache.shape[4] != m.head_dim || !dense) {
            const int64_t needed[] = {m.layers, kAny, kAny, m.kv_heads, m.head_dim};
            check.refuse(name, cache, std::string(name_of(kind)) + " of shape " + shape_of(needed, 5) +
                                         " on the CPU, its last two dimensions contiguous,");
        }
        return cache;
    }

    void build(Weights& weights, const Group& group) {
        Checker& check = weights.check;
        CpuModel model{};
        embeddings(weights, group, model);
        const auto size = [&](const char* name) { return check.number(name, group.get(name), 1, INT_MAX / 4); };
        model.heads = size("heads");
        model.kv_heads = size("kv_heads");
        model.head_dim = size("head_dim");
        model.inner = size("inner");
        if (static_cast<int64_t>(std::max(model.heads, model.kv_heads)) * model.head_dim > INT_MAX / 4) {
            check.refuse("heads * head_dim is beyond what is accepted");
        }
        model.activation = static_cast<Activation>(check.number("activation", group.get("activation"), 0, 3));
        const auto flag = [&](const char* name) { return check.as<bool>(name, group.get(name)); };
        model.gated = flag("gated");
        model.rms = flag("rms");
        model.unit_offset = flag("unit_offset");
        model.whole_qk_norm = flag("whole_qk_norm");
        const auto factor = [&](const char* name) { return check.as<float>(name, group.get(name)); };
        model.eps = factor("eps");
        model.embedding_scale = factor("embedding_scale");
        model.residual_scale = factor("residual_scale");
        model.logits_scale = factor("logits_scale");
        model.attention_softcap = factor("attention_softcap");
        model.logits_softcap = factor("logits_softcap");
        std::vector<CpuLayer> layers;
        for (const py::object& object : check.as<std::vector<py::object>>("layers", group.get("layers"))) {
            layers.push_back(layer(weights, Group(check, "a layer", object), model));
        }
        std::vector<CpuStage> stages;
        for (const py::object& object : check.as<std::vector<py::object>>("stages", group.get("stages"))) {
            stages.push_back(stage(weights, Group(check, "a stage", object), model));
        }
        decoder_ = std::make_unique<Decoder>(model, std::move(layers), std::move(stages));
    }

    static void embeddings(Weights& weights, const Group& group, CpuModel& model) {
        Checker& check = weights.check;
        const Tensor wte = weights.rows("the token embeddings", group.get("tokens"));
        model.dtype = weights.kind == Kind::kFloat32 ? DType::kFloat32 : DType::kBFloat16;
        model.width = check.number("the width", wte.shape[1], 1, INT_MAX / 4);
        model.vocab = check.number("the vocabulary", wte.shape[0], 1, INT_MAX / 4);
        model.n_positions = check.number("context", group.get("context"), 1, INT_MAX / 4);
        model.tokens = wte.data;
        model.token_stride = wte.stride[0];
        const int offset = check.number("position_offset", group.get("position_offset"), 0, INT_MAX / 4);
        const py::handle positions = group.get("positions");
        if (positions.is_none()) return;
        const Tensor wpe = weights.rows("the positions", positions);
        const int64_t needed[] = {model.n_positions + offset, model.width};
        if (wpe.shape[0] != needed[0] || wpe.shape[1] != needed[1]) {
            check.refuse("the positions", wpe, "shape " + shape_of(needed, 2));
        }
        const int64_t bytes = model.dtype == DType::kFloat32 ? 4 : 2;
        model.positions = wpe.data + offset * wpe.stride[0] * bytes;
        model.position_stride = wpe.stride[0];
    }

    static CpuLayer layer(Weights& weights, const Group& group, const CpuModel& model) {
        Checker& check = weights.check;
        CpuLayer layer{};
        layer.scale = check.as<float>("the scale of a layer", group.get("scale"));
        layer.window = check.number("window", group.get("window"), 0, INT_MAX);
        layer.rotary = check.number("rotary", group.get("rotary"), 0, model.head_dim);
        layer.interleaved = check.as<bool>("interleaved", group.get("interleaved"));
        layer.cos = weights.rotations("cos", group.get("cos"), model.n_positions, layer.rotary / 2);
        layer.sin = weights.rotations("sin", group.get("sin"), model.n_positions, layer.rotary / 2);
        if (layer.rotary > 0 && (layer.cos == nullptr || layer.sin == nullptr)) {
            check.refuse("a layer that rotates needs cos and sin");
        }
        const bool whole = model.whole_qk_norm;
        layer.q_norm = weights.vector("q_norm", group.get("q_norm"), whole ? model.q_width() : model.head_dim);
        layer.k_norm = weights.vector("k_norm", group.get("k_norm"), whole ? model.kv_width() : model.head_dim);
        return layer;
    }

    static CpuStage stage(Weights& weights, const Group& group, const CpuModel& model) {
        Checker& check = weights.check;
        const auto buffer = [&](const char* name) {
            return static_cast<Buffer>(check.number(name, group.get(name), 0, kBuffers - 1));
        };
        CpuStage stage{};
        stage.kind = static_cast<StageKind>(check.number("kind", group.get("kind"), 0, 4));
        stage.layer = check.number("layer", group.get("layer"), 0, INT_MAX);
        stage.read = buffer("read");
        stage.write = buffer("write");
        stage.save = buffer("save");
        stage.residual = buffer("residual");
        stage.activated = check.as<bool>("activated", group.get("activated"));
        stage.norm = weights.norm(group.get("norm"), model.width);
        const py::handle linear = group.get("linear");
        const int64_t outs = outs_of(model, stage.kind, stage.write, stage.activated);
        if (linear.is_none() != (outs == 0)) check.refuse("a product has a linear layer, and no other stage");
        if (outs > 0) stage.linear = weights.linear(linear, outs, width_of(model, stage.read));
        return stage;
    }

    // Whether PyTorch has counted writes to a tensor since the last look.
    bool weights_written_since() {
        std::vector<int64_t>& before = versions_;
        bool written = false;
        before.resize(held_.size(), -1);
        for (size_t i = 0; i < held_.size(); ++i) {
            const int64_t version = held_[i].version();
            written |= version != before[i];
            before[i] = version;
        }
        return written;
    }

    std::vector<int64_t> versions_;
    std::vector<HeldDict> owners_;
    std::vector<HeldTensor> held_;
    std::unique_ptr<Decoder> decoder_;
};

}  // namespace

void bind_decoder(py::module_& module) {
    module.attr("has_decoder") = decoder_supported();
    py::class_<HoldingDecoder>(module, "Decoder", "A model for the CPU's decode step: csrc/decode/decoder.h.")
        .def(py::init<const py::object&, const py::object&>(), py::arg("model"), py::arg("owners") = py::tuple())
        .def("step", &HoldingDecoder::step, py::arg("k"), py::arg("v"), py::arg("page_table"), py::arg("lengths"),
             py::arg("tokens"), py::arg("wanted"), py::arg("logits"), py::arg("threads"), py::arg("advance") = false,
             "One token of every row, logits of the wanted ones; False, with nothing done, if weights have moved.")
        .def_property_readonly("packed_bytes", &HoldingDecoder::packed_bytes, "Bytes that packed copies of weights take.")
        .def("read_packed", &HoldingDecoder::read_packed, py::arg("packed"),
             "Whether passes read packed copies of weights, which the next one makes; the logits are the same.")
        .def("weights_written", &HoldingDecoder::weights_written, "The next pass packs the weights anew.");
    module.def("decode_path", [] { return cpu_decode_path()->name; });
    module.def("use_decode_path", &use_cpu_decode_path, "Chooses the path by name, for tests that compare them.");
}

}  // namespace gptkern
