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
    // ``blocks`` are the model's; its own pointer to them, and what follows from the rest, need not be set. Throws
    // std::invalid_argument for sizes that are not a model's.
    Decoder(const CpuModel& model, std::vector<CpuBlock> blocks);
    Decoder(const Decoder&) = delete;
    Decoder& operator=(const Decoder&) = delete;

    const CpuModel& model() const { return model_; }

    // Throws std::invalid_argument, having written nothing, for a token that the vocabulary lacks, and for a
    // sequence that is longer than the context or whose pages the cache lacks.
    void step(const CpuCache& cache, const int64_t* tokens, int rows, void* logits, int threads);

private:
    // The call's tokens, lengths and pages, checked. Copied, as whoever owns them may change them meanwhile.
    CpuCache copied(const CpuCache& cache, const int64_t* tokens, int rows);

    std::vector<CpuBlock> blocks_;
    CpuModel model_;
    std::vector<int64_t> tokens_;
    std::vector<int32_t> lengths_, table_;
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
