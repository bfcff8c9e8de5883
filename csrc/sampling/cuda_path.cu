// The CUDA path: one cluster a row, on the caller's stream, in the caller's workspace. Nothing here allocates or
// waits, so that calls can be captured in a graph.
//
// The number of blocks that share a row follows from the number of rows; results do not depend on it.
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>

#include "sampling/cuda_path.h"
#include "sampling/cuda_team.cuh"
#include "sampling/few_tokens.cuh"
#include "sampling/speculation.h"

namespace gptkern {

const bool kHasCuda = true;
const char* const kCudaArchs = GPTKERN_CUDA_ARCHS;

namespace {

// The largest number of clusters. More rows than this share their workspace, one after another.
constexpr int64_t kMaxClusters = 256;

struct RowMemory {
    float *values, *widened;
    uint32_t* list;
};

// A row of the vocabulary in the workspace: it begins at a multiple of 16 bytes, or up to three floats after one.
__host__ __device__ int64_t row_floats(int64_t vocab) { return (vocab + 3) / 4 * 4 + 4; }

__device__ RowMemory row_memory(std::uintptr_t workspace, int64_t slot, int64_t vocab) {
    const int64_t row = row_floats(vocab);
    float* const values = reinterpret_cast<float*>(workspace) + slot * 3 * row;
    return {values, values + row, reinterpret_cast<uint32_t*>(values + 2 * row)};
}

// Calls row_work(team, row, buffers) for every row of this cluster.
template <class RowWork>
__device__ __forceinline__ void over_rows(BlockMemory& memory, int64_t rows, int64_t vocab, std::uintptr_t workspace,
                                          RowWork row_work) {
    const int64_t cluster = blockIdx.x / cluster_size();
    const int64_t clusters = gridDim.x / cluster_size();
    const RowMemory slot = row_memory(workspace, cluster, vocab);
    ClusterTeam team(memory, slot.list);
    for (int64_t row = cluster; row < rows; row += clusters) {
        row_work(team, row, Buffers{slot.values, slot.widened});
        team.sync();  // before the next row; and no block may end while another reads its shared memory
    }
}

// Calls f(field, empty) for every field that asks for more than a draw: a row that is edited, counted, scored or written.
template <class F>
GPTKERN_HD void for_each_extra(SampleArguments& a, F f) {
    f(a.counts, nullptr);
    f(a.bias.ids, nullptr);
    f(a.banned.ids, nullptr);
    f(a.eos.ids, nullptr);
    f(a.bitmask, nullptr);
    f(a.logprobs, -1);
    f(a.probs, nullptr);
    f(a.accepted, nullptr);
}

GPTKERN_HD bool draws_only(SampleArguments a) {
    bool only = true;
    for_each_extra(a, [&](const auto& field, auto empty) { only &= field == empty; });
    return only;
}

GPTKERN_HD void leave_out_extras(SampleArguments& a) {
    for_each_extra(a, [](auto& field, auto empty) { field = empty; });
}

// Samples all rows. Those that take few tokens come first, so that nothing of theirs lives in registers while the others
// are sampled.
template <bool kEdits>
__device__ __forceinline__ void sample_rows(BlockMemory& memory, const SampleArguments& a, std::uintptr_t workspace) {
    bool others = false;
    const int64_t cluster = blockIdx.x / cluster_size();
    for (int64_t row = cluster; row < a.batch; row += gridDim.x / cluster_size()) {
        if (wants_few(a, a.params[row])) {
            FewTokens<kEdits>(memory, a, row, row_memory(workspace, cluster, a.vocab).values).sample();
        } else {
            others = true;
        }
    }
    if (!others) return;
    cluster_sync();
    over_rows(memory, a.batch, a.vocab, workspace, [&](ClusterTeam& team, int64_t row, const Buffers& buffers) {
        if (!wants_few(a, a.params[row])) sample_row(team, a, row, buffers);
    });
}

__global__ void __launch_bounds__(kThreads, 1) sample_kernel(SampleArguments a, std::uintptr_t workspace) {
    __shared__ BlockMemory memory;
    wait_for_launches_before();
    sample_rows<true>(memory, a, workspace);
}

// The kernel of calls that draw and no more, which lacks the code of all others.
__global__ void __launch_bounds__(kThreads, 1) draw_kernel(SampleArguments a, std::uintptr_t workspace) {
    __shared__ BlockMemory memory;
    wait_for_launches_before();
    leave_out_extras(a);
    sample_rows<false>(memory, a, workspace);
}

__global__ void __launch_bounds__(kThreads, 1) speculate_kernel(SampleArguments a, std::uintptr_t workspace) {
    __shared__ BlockMemory memory;
    wait_for_launches_before();
    over_rows(memory, a.batch, a.vocab, workspace,
              [&](ClusterTeam& team, int64_t row, const Buffers& buffers) { speculate_row(team, a, row, buffers); });
}

__global__ void __launch_bounds__(kThreads, 1) top_k_kernel(TopKArguments a, std::uintptr_t workspace) {
    __shared__ BlockMemory memory;
    wait_for_launches_before();
    over_rows(memory, a.rows, a.vocab, workspace,
              [&](ClusterTeam& team, int64_t row, const Buffers& buffers) { top_k_row(team, a, row, buffers); });
}

__global__ void commit_kernel(SampleArguments a) {
    const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (row < a.batch && a.status[row] == kOk) commit_row(a, row);
}

void check(cudaError_t error) {
    if (error != cudaSuccess) throw std::runtime_error(std::string("gptkern._C: ") + cudaGetErrorString(error));
}

// Code compiled for sm_90 and newer uses clusters and dependent launches; code for an older GPU does not, even on a
// newer one.
bool has_clusters(const void* kernel) {
    // Cached by kernel and device: the driver takes a microsecond to answer, a tenth of a draw.
    static std::mutex mutex;
    static std::map<std::pair<const void*, int>, bool> known;
    int device;
    check(cudaGetDevice(&device));
    const std::lock_guard lock(mutex);
    const auto [place, fresh] = known.try_emplace({kernel, device}, false);
    if (fresh) {
        cudaFuncAttributes attributes;
        const cudaError_t error = cudaFuncGetAttributes(&attributes, kernel);
        if (error != cudaSuccess) known.erase(place);
        check(error);
        place->second = attributes.ptxVersion >= 90;
    }
    return place->second;
}

// The blocks of a row: many if there are few rows, fewer if the rows alone fill the GPU.
int cluster_for(int64_t rows) {
    if (rows <= 16) return kMaxCluster;
    if (rows <= 32) return 4;
    return rows <= 64 ? 2 : 1;
}

template <class Arguments>
void launch(void (*kernel)(Arguments, std::uintptr_t), const Arguments& arguments, int64_t rows,
            std::uintptr_t workspace, std::uintptr_t stream) {
    const bool is_new = has_clusters(reinterpret_cast<const void*>(kernel));
    const int blocks = is_new ? cluster_for(rows) : 1;
    const int64_t clusters = rows < kMaxClusters ? rows : kMaxClusters;
    cudaLaunchAttribute attributes[2]{};
    attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;  // see wait_for_launches_before
    attributes[0].val.programmaticStreamSerializationAllowed = 1;
    attributes[1].id = cudaLaunchAttributeClusterDimension;
    attributes[1].val.clusterDim.x = static_cast<unsigned>(blocks);
    attributes[1].val.clusterDim.y = 1;
    attributes[1].val.clusterDim.z = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(clusters * blocks));
    config.blockDim = dim3(kThreads);
    config.stream = reinterpret_cast<cudaStream_t>(stream);
    config.attrs = attributes;
    config.numAttrs = !is_new ? 0 : blocks > 1 ? 2 : 1;
    check(cudaLaunchKernelEx(&config, kernel, arguments, workspace));
}

}  // namespace

size_t cuda_workspace_bytes(int64_t rows, int64_t vocab) {
    const int64_t clusters = rows < kMaxClusters ? rows : kMaxClusters;
    return static_cast<size_t>(clusters * 3 * row_floats(vocab)) * sizeof(float);
}

void cuda_sample(const SampleArguments& a, std::uintptr_t workspace, std::uintptr_t stream) {
    if (a.commit == Commit::kOnly) {
        constexpr int kRowsPerBlock = 128;
        const unsigned blocks = static_cast<unsigned>((a.batch + kRowsPerBlock - 1) / kRowsPerBlock);
        commit_kernel<<<blocks, kRowsPerBlock, 0, reinterpret_cast<cudaStream_t>(stream)>>>(a);
        check(cudaGetLastError());
        return;
    }
    const auto kernel = draws_only(a) ? draw_kernel : a.accepted != nullptr ? speculate_kernel : sample_kernel;
    launch(kernel, a, a.batch, workspace, stream);
}

void cuda_top_k(const TopKArguments& a, std::uintptr_t workspace, std::uintptr_t stream) {
    launch(top_k_kernel, a, a.rows, workspace, stream);
}

}  // namespace gptkern
