// gptkern._C: raw pointers, sizes and a stream handle, no torch. gptkern.ops.sample checks what it passes.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <utility>

#include "cuda_path.h"
#include "decoder.h"
#include "isa.h"

namespace py = pybind11;

namespace gptkern {
namespace {

template <class T>
T* at(std::uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

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

using Address = std::uintptr_t;

// Returns the first row that could not be sampled, or -1; on CUDA the statuses are on the device, and
// nothing is waited for.
int sample(bool on_cuda, Address stream, Address workspace, int threads, int commit, int dtype, int batch,
           int positions, int vocab, int64_t row_stride, int64_t position_stride, int logprobs, Address logits,
           Address params, Address counters, Address counts, Address bias_ids, Address bias_values, int n_bias,
           Address banned_ids, int n_banned, Address eos_ids, int n_eos, Address bitmask, int64_t bitmask_words,
           Address tokens, Address token_logprobs, Address top_tokens, Address top_logprobs, Address status,
           Address probs, Address draft_tokens, Address draft_probs, Address accepted) {
    SampleArguments a{};
    a.logits = at<const void>(logits);
    a.row_stride = row_stride;
    a.position_stride = position_stride;
    a.dtype = static_cast<DType>(dtype);
    a.batch = batch;
    a.positions = positions;
    a.vocab = vocab;
    a.params = at<const RowParams>(params);
    a.counters = at<RowCounter>(counters);
    a.counts = at<int32_t>(counts);
    a.bias = {at<const int32_t>(bias_ids), n_bias};
    a.banned = {at<const int32_t>(banned_ids), n_banned};
    a.eos = {at<const int32_t>(eos_ids), n_eos};
    a.bias_values = at<const float>(bias_values);
    a.bitmask = at<const int32_t>(bitmask);
    a.bitmask_words = bitmask_words;
    a.logprobs = logprobs;
    a.tokens = at<int64_t>(tokens);
    a.token_logprobs = at<float>(token_logprobs);
    a.top_tokens = at<int64_t>(top_tokens);
    a.top_logprobs = at<float>(top_logprobs);
    a.status = at<int32_t>(status);
    a.probs = at<float>(probs);
    a.draft_tokens = at<const int64_t>(draft_tokens);
    a.draft_probs = at<const float>(draft_probs);
    a.accepted = at<int64_t>(accepted);
    a.commit = static_cast<Commit>(commit);
    if (batch == 0) return -1;
    if (on_cuda) {
        cuda_sample(a, workspace, stream);
        return -1;
    }
    cpu->sample(a, threads);
    for (int row = 0; row < batch; ++row) {
        if (a.status[row] != kOk) return row;
    }
    return -1;
}

int top_k(bool on_cuda, Address stream, Address workspace, int threads, int dtype, int rows, int vocab,
          int64_t row_stride, int k, Address logits, Address tokens, Address logprobs, Address status) {
    const TopKArguments a{at<const void>(logits), row_stride, static_cast<DType>(dtype), rows, vocab, k,
                          at<int64_t>(tokens), at<float>(logprobs), at<int32_t>(status)};
    if (rows == 0) return -1;
    if (on_cuda) {
        cuda_top_k(a, workspace, stream);
        return -1;
    }
    cpu->top_k(a, threads);
    for (int row = 0; row < rows; ++row) {
        if (a.status[row] != kOk) return row;
    }
    return -1;
}

void decode(Decoder& decoder, Address k, Address v, int64_t block_stride, int64_t page_stride, int64_t slot_stride,
            int page_size, Address table, int64_t table_stride, Address lengths, Address tokens, int rows,
            Address logits, int threads) {
    const CpuCache cache{at<void>(k),  at<void>(v), block_stride, page_stride, slot_stride, page_size,
                         at<const int32_t>(table), table_stride, at<const int32_t>(lengths)};
    decoder.step(cache, at<const int64_t>(tokens), rows, at<void>(logits), threads);
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
    const auto free_threads = py::call_guard<py::gil_scoped_release>();
    module.doc() = "gptkern's sampler (gptkern.ops.sample) and the CPU's decode step (gptkern.generate.cpu_step).";
    module.attr("has_cuda") = kHasCuda;
    module.attr("cuda_archs") = kCudaArchs;
    module.attr("max_vocab") = kMaxVocab;
    module.def("sample", &sample, free_threads);
    module.def("top_k", &top_k, free_threads);
    module.def("workspace_bytes", &cuda_workspace_bytes, "Bytes that the CUDA path needs for (rows, vocab).");
    module.attr("has_decoder") = decoder_supported();
    py::class_<Decoder>(module, "Decoder", "A model for the CPU's decode step: csrc/decoder.h.")
        .def(py::init<int, int, int, int, int, int, bool, float, const std::vector<std::vector<int64_t>>&,
                      const std::vector<float>&, const std::vector<int64_t>&, const std::vector<int64_t>&,
                      const std::vector<int64_t>&>())
        .def("step", &decode, free_threads, "One token of every sequence: csrc/decode_cpu.h.");
    module.def("decode_path", [] { return cpu_decode_path()->name; });
    module.def("use_decode_path", &use_cpu_decode_path, "Chooses it by name, for tests that compare them.");
    module.def("uniforms", &uniforms, "The two 64-bit uniforms of (seed, request, step).");
    module.def("weight", [](double halvings) { return cpu->weight(halvings); });
    module.def("cpu_path", [] { return cpu->name; });
    module.def("use_cpu_path", &use_cpu_path);
}
