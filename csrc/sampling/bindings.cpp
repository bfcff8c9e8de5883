#include "sampling/bindings.h"

#include <pybind11/stl.h>

#include <climits>
#include <string>
#include <utility>

#include "common/tensor.h"
#include "common/threads.h"
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

// Chooses the CPU path by name, for tests that compare them.
void use_cpu_path(const std::string& name) {
    if (name == portable::cpu_path().name) {
        cpu = &portable::cpu_path();
    } else if (name == best_cpu_path().name) {
        cpu = &best_cpu_path();
    } else {
        throw py::value_error("use_cpu_path: " + name + " is not available here");
    }
}

static_assert(sizeof(RowParams) == 12 * sizeof(double) && sizeof(RowCounter) == 3 * sizeof(int64_t));

DType logits_type(const Checker& check, const Tensor& logits) {
    if (logits.kind > Kind::kBFloat16) {
        throw py::type_error("logits are of another dtype; float32, float16 and bfloat16 are accepted");
    }
    const int last = logits.dims - 1;
    if (logits.shape[last] > 1 && logits.stride[last] != 1) {
        check.refuse("logits", logits, "a contiguous last dimension");
    }
    static_assert(static_cast<int>(Kind::kBFloat16) == static_cast<int>(DType::kBFloat16));
    return static_cast<DType>(logits.kind);
}

// (batch, n) ids, padded with -1; None: no list.
IdLists id_lists(Checker& check, const char* name, py::handle object, int batch) {
    if (object.is_none()) return {};
    const Tensor ids = check.dense(name, object, Kind::kInt32, {batch, kAny});
    return {reinterpret_cast<const int32_t*>(ids.data), check.number(name, ids.shape[1], 0, INT_MAX)};
}

// Where a call runs: gptkern.ops.sample.launch.Machine.
struct Machine {
    int threads;
    std::uintptr_t stream, workspace;

    Machine(Checker& check, py::handle object, int64_t rows, int64_t vocab) {
        const Group machine(check, "machine", object);
        threads = check.number("machine.threads", machine.get("threads"), 1, kMostThreads);
        stream = check.as<std::uintptr_t>("machine.stream", machine.get("stream"));
        workspace = 0;
        if (!check.on_cuda()) return;
        const Tensor memory = check.dense("machine.workspace", machine.get("workspace"), Kind::kUInt8, {kAny});
        if (memory.shape[0] < static_cast<int64_t>(cuda_workspace_bytes(rows, vocab))) {
            check.refuse("machine.workspace", memory, "one of workspace_bytes(rows, vocab)");
        }
        workspace = reinterpret_cast<std::uintptr_t>(memory.data);
    }
};

int first_bad(const int32_t* status, int rows) {
    for (int row = 0; row < rows; ++row) {
        if (status[row] != kOk) return row;
    }
    return -1;
}

// gptkern.ops.SamplingParams.
void read_params(Checker& check, SampleArguments& a, const Group& params) {
    const int64_t batch = a.batch;
    const py::handle bias_ids = params.get("bias_ids"), bias_values = params.get("bias_values");
    const py::handle bitmask = params.get("bitmask");
    const double* const values = check.dense<double>("params.values", params.get("values"), {batch, 12});
    a.params = reinterpret_cast<const RowParams*>(values);
    a.bias = id_lists(check, "params.bias_ids", bias_ids, a.batch);
    if (bias_ids.is_none() != bias_values.is_none()) {
        check.refuse("params has only one of bias_ids and bias_values; both or neither are needed");
    }
    a.bias_values = check.dense_or_none<float>("params.bias_values", bias_values, {batch, a.bias.width});
    a.banned = id_lists(check, "params.banned_ids", params.get("banned_ids"), a.batch);
    a.eos = id_lists(check, "params.eos_ids", params.get("eos_ids"), a.batch);
    if (bitmask.is_none()) return;
    const Tensor mask = check.dense("params.bitmask", bitmask, Kind::kInt32, {batch, kAny});
    if (mask.shape[1] < (a.vocab + 31) / 32) check.refuse("params.bitmask", mask, "a bit for each token");
    a.bitmask = reinterpret_cast<const int32_t*>(mask.data);
    a.bitmask_words = mask.shape[1];
}

// gptkern.ops.SamplerState.
void read_state(Checker& check, SampleArguments& a, const Group& state) {
    const int64_t batch = a.batch;
    int64_t* const counters = check.dense<int64_t>("state.counters", state.get("counters"), {batch, 3});
    a.counters = reinterpret_cast<RowCounter*>(counters);
    a.counts = check.dense_or_none<int32_t>("state.counts", state.get("counts"), {batch, a.vocab});
}

// gptkern.ops.sample.launch.Outputs; ``width`` is the number of top tokens, below 0 for no log-probabilities.
void read_outputs(Checker& check, SampleArguments& a, const Group& outputs, bool verifies, int width) {
    const int64_t batch = a.batch;
    const py::handle probs = outputs.get("probs"), tokens = outputs.get("tokens");
    a.status = check.dense<int32_t>("outputs.status", outputs.get("status"), {batch});
    a.logprobs = -1;
    if (!probs.is_none()) {
        if (verifies) check.refuse("outputs has both probs and accepted; one call writes one of them");
        a.probs = check.dense<float>("outputs.probs", probs, {batch, a.vocab});
        return;
    }
    if (verifies) {
        a.tokens = check.dense<int64_t>("outputs.tokens", tokens, {batch, a.positions});
        a.accepted = check.dense<int64_t>("outputs.accepted", outputs.get("accepted"), {batch});
        return;
    }
    a.tokens = check.dense<int64_t>("outputs.tokens", tokens, {batch});
    if (width < 0) return;
    a.logprobs = width;
    a.token_logprobs = check.dense<float>("outputs.logprobs", outputs.get("logprobs"), {batch});
    a.top_tokens = check.dense<int64_t>("outputs.top_tokens", outputs.get("top_tokens"), {batch, width});
    a.top_logprobs = check.dense<float>("outputs.top_logprobs", outputs.get("top_logprobs"), {batch, width});
}

// gptkern.ops.sample.launch.Drafts.
void read_drafts(Checker& check, SampleArguments& a, const Group& drafts) {
    const int64_t batch = a.batch, drafted = a.positions - 1;
    a.draft_tokens = check.dense<int64_t>("drafts.tokens", drafts.get("tokens"), {batch, drafted});
    a.draft_probs = check.dense_or_none<float>("drafts.probs", drafts.get("probs"), {batch, drafted, a.vocab});
    a.draft_lengths = check.dense_or_none<int64_t>("drafts.lengths", drafts.get("lengths"), {batch});
}

// Samples; verifies drafts if outputs has ``accepted``; writes distributions if outputs has ``probs``.
// Returns the first row that could not be sampled, or -1. On CUDA it waits for nothing: the statuses are on the
// device.
int sample(const py::object& logits, const py::object& params, const py::object& state, const py::object& outputs,
           const py::object& drafts, const py::object& commit, const py::object& machine) {
    Checker check("sample");
    SampleArguments a{};
    const Group fields(check, "params", params), written(check, "outputs", outputs);
    const bool verifies = !written.get("accepted").is_none();
    const Tensor rows = check.tensor("logits", logits, verifies ? 3 : 2);
    a.dtype = logits_type(check, rows);
    a.logits = rows.data;
    a.row_stride = rows.stride[0];
    a.position_stride = verifies ? rows.stride[1] : 0;
    a.batch = check.number("the batch", rows.shape[0], 0, INT_MAX);
    a.positions = verifies ? check.number("the positions", rows.shape[1], 1, INT_MAX) : 1;
    a.vocab = check.number("the vocabulary", rows.shape[rows.dims - 1], 1, kMaxVocab);
    const py::handle top = fields.get("max_logprobs");
    const int width = top.is_none() ? -1 : check.number("params.max_logprobs", top, 0, INT_MAX);
    read_params(check, a, fields);
    read_state(check, a, Group(check, "state", state));
    read_outputs(check, a, written, verifies, width);
    const int most_commit = static_cast<int>(check.on_cuda() ? Commit::kOnly : Commit::kYes);
    a.commit = static_cast<Commit>(check.number("commit", commit, 0, most_commit));
    if (verifies && a.commit != Commit::kOnly) read_drafts(check, a, Group(check, "drafts", drafts));
    const Machine place(check, machine, a.batch, a.vocab);
    if (a.batch == 0) return -1;
    const py::gil_scoped_release release;
    if (check.on_cuda()) {
        cuda_sample(a, place.workspace, place.stream);
        return -1;
    }
    cpu->sample(a, place.threads);
    return first_bad(a.status, a.batch);
}

// The k most likely tokens of each row; returns as sample.
int top_k(const py::object& logits, const py::object& k, const py::object& outputs, const py::object& machine) {
    Checker check("top_k");
    TopKArguments a{};
    const Group written(check, "outputs", outputs);
    const Tensor rows = check.tensor("logits", logits, 2);
    a.dtype = logits_type(check, rows);
    a.logits = rows.data;
    a.row_stride = rows.stride[0];
    a.rows = check.number("the rows", rows.shape[0], 0, INT_MAX);
    a.vocab = check.number("the vocabulary", rows.shape[1], 1, kMaxVocabTopK);
    a.k = check.number("k", k, 0, a.vocab);
    a.tokens = check.dense<int64_t>("outputs.tokens", written.get("tokens"), {a.rows, a.k});
    a.logprobs = check.dense<float>("outputs.logprobs", written.get("logprobs"), {a.rows, a.k});
    a.status = check.dense<int32_t>("outputs.status", written.get("status"), {a.rows});
    const Machine place(check, machine, a.rows, a.vocab);
    if (a.rows == 0) return -1;
    const py::gil_scoped_release release;
    if (check.on_cuda()) {
        cuda_top_k(a, place.workspace, place.stream);
        return -1;
    }
    cpu->top_k(a, place.threads);
    return first_bad(a.status, a.rows);
}

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

void bind_sampler(py::module_& module) {
    module.attr("has_cuda") = kHasCuda;
    module.attr("cuda_archs") = kCudaArchs;
    const py::kw_only named;
    module.def("sample", &sample, py::arg("logits"), py::arg("params"), py::arg("state"), py::arg("outputs"), named,
               py::arg("drafts") = py::none(), py::arg("commit"), py::arg("machine"));
    module.def("top_k", &top_k, py::arg("logits"), py::arg("k"), py::arg("outputs"), named, py::arg("machine"));
    module.def("workspace_bytes", &workspace_bytes, "The bytes of workspace of a CUDA call over (rows, vocab).");
    module.def("uniforms", &uniforms, "The two 64-bit uniforms of (seed, request, step).");
    module.def("weight", [](double halvings) { return cpu->weight(halvings); });
    module.def("cpu_path", [] { return cpu->name; });
    module.def("use_cpu_path", &use_cpu_path);
}

}  // namespace gptkern
