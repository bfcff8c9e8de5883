// A model as the CPU's decode step takes it, with the memory that its calls need.
#pragma once

#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

#include "decode_cpu.h"

namespace gptkern {

class Decoder {
public:
    // Each of ``blocks``: weight and bias of norm1 and of norm2, then of qkv, projection, fc and out
    // seven numbers as in CpuLinear. ``embeddings``: tokens, their stride, positions, their stride.
    Decoder(int dtype, int width, int heads, int inner, int vocab, int activation, bool post_norm, float eps,
            const std::vector<std::vector<int64_t>>& blocks, const std::vector<float>& scales,
            const std::vector<int64_t>& embeddings, const std::vector<int64_t>& final_norm,
            const std::vector<int64_t>& head);
    Decoder(const Decoder&) = delete;
    Decoder& operator=(const Decoder&) = delete;

    void step(const CpuCache& cache, const int64_t* tokens, int rows, void* logits, int threads);

private:
    std::vector<CpuBlock> blocks_;
    CpuModel model_;
    struct Free {
        void operator()(float* memory) const { std::free(memory); }
    };
    std::unique_ptr<float, Free> memory_;
    size_t floats_ = 0;
};

// The best path of this processor, or null; another one after use_cpu_decode_path, which throws where there
// is none of that name.
const CpuDecodePath* cpu_decode_path();
void use_cpu_decode_path(const std::string& name);
bool decoder_supported();

}  // namespace gptkern
