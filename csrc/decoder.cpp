#include "decoder.h"

#include <algorithm>
#include <new>
#include <stdexcept>

namespace gptkern {
namespace {

constexpr size_t kNorm = 2, kLinear = 7;

CpuNorm norm_of(const int64_t* numbers, float eps) {
    return {reinterpret_cast<const void*>(numbers[0]), reinterpret_cast<const void*>(numbers[1]), eps};
}

CpuLinear linear_of(const int64_t* numbers) {
    return {reinterpret_cast<const void*>(numbers[0]),
            reinterpret_cast<const void*>(numbers[1]),
            static_cast<int>(numbers[2]),
            static_cast<int>(numbers[3]),
            numbers[4],
            numbers[5] != 0,
            reinterpret_cast<const float*>(numbers[6])};
}

const CpuDecodePath* const* paths() {
    static const CpuDecodePath* found[3] = {};
#ifdef GPTKERN_X86
    const CpuDecodePath** next = found;
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
        *next++ = &avx512::decode_path();
    }
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) *next++ = &avx2::decode_path();
#endif
    return found;
}

const CpuDecodePath* chosen = paths()[0];

}  // namespace

const CpuDecodePath* cpu_decode_path() { return chosen; }

void use_cpu_decode_path(const std::string& name) {
    for (const CpuDecodePath* const* path = paths(); *path != nullptr; ++path) {
        if (name == (*path)->name) {
            chosen = *path;
            return;
        }
    }
    throw std::invalid_argument("use_decode_path: " + name + " is not available here");
}

bool decoder_supported() { return cpu_decode_path() != nullptr; }

Decoder::Decoder(int dtype, int width, int heads, int inner, int vocab, int activation, bool post_norm, float eps,
                 const std::vector<std::vector<int64_t>>& blocks, const std::vector<float>& scales,
                 const std::vector<int64_t>& embeddings, const std::vector<int64_t>& final_norm,
                 const std::vector<int64_t>& head)
    : model_{} {
    const auto wrong = [](const std::vector<int64_t>& block) { return block.size() != 2 * kNorm + 4 * kLinear; };
    if (!decoder_supported() || scales.size() != blocks.size() || std::any_of(blocks.begin(), blocks.end(), wrong) ||
        embeddings.size() != 4 || final_norm.size() != kNorm || head.size() != kLinear) {
        throw std::invalid_argument("Decoder: not what csrc/decoder.h describes, or not on this processor");
    }
    for (size_t i = 0; i < blocks.size(); ++i) {
        const int64_t* const at = blocks[i].data();
        const int64_t* const linears = at + 2 * kNorm;
        blocks_.push_back({norm_of(at, eps), norm_of(at + kNorm, eps), linear_of(linears), linear_of(linears + kLinear),
                           linear_of(linears + 2 * kLinear), linear_of(linears + 3 * kLinear), scales[i]});
    }
    model_.dtype = static_cast<DType>(dtype);
    model_.blocks = static_cast<int>(blocks_.size());
    model_.width = width;
    model_.heads = heads;
    model_.head_dim = width / heads;
    model_.inner = inner;
    model_.vocab = vocab;
    model_.activation = static_cast<Activation>(activation);
    model_.post_norm = post_norm;
    model_.block = blocks_.data();
    model_.final_norm = norm_of(final_norm.data(), eps);
    model_.head = linear_of(head.data());
    model_.tokens = reinterpret_cast<const void*>(embeddings[0]);
    model_.token_stride = embeddings[1];
    model_.positions = reinterpret_cast<const void*>(embeddings[2]);
    model_.position_stride = embeddings[3];
}

void Decoder::step(const CpuCache& cache, const int64_t* tokens, int rows, void* logits, int threads) {
    if (rows == 0) return;
    const CpuDecodePath& path = *cpu_decode_path();
    const int longest = *std::max_element(cache.lengths, cache.lengths + rows) + 1;
    const size_t needed = path.floats(model_, rows, longest, threads);
    if (floats_ < needed) {
        // Room for longer sequences too. Aligned, so that no vector crosses a cache line.
        floats_ = (needed + needed / 4 + 15) / 16 * 16;
        memory_.reset(static_cast<float*>(std::aligned_alloc(64, floats_ * sizeof(float))));
        if (memory_ == nullptr) {
            floats_ = 0;
            throw std::bad_alloc();
        }
    }
    path.run({&model_, cache, tokens, rows, longest, logits, memory_.get()}, threads);
}

}  // namespace gptkern
