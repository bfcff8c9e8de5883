// The CPU's decoder: a model's description, checked, with the memory that its passes need.
#pragma once

#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

#include "decode/model.h"

namespace gptkern {

// Elements of a row of a buffer.
int64_t width_of(const CpuModel& model, Buffer buffer);

// Outputs of a stage's product.
int64_t outs_of(const CpuModel& model, StageKind kind, Buffer write, bool activated);

class Decoder {
public:
    // Sets model.layer, model.layers, model.stage and model.stages. Throws std::invalid_argument for sizes that no model
    // has, and for stages that do not follow one another.
    Decoder(const CpuModel& model, std::vector<CpuLayer> layers, std::vector<CpuStage> stages);
    Decoder(const Decoder&) = delete;
    Decoder& operator=(const Decoder&) = delete;

    const CpuModel& model() const { return model_; }

    // One more token of every row, and the logits of the wanted rows. Throws std::invalid_argument, having written
    // nothing, for a token outside the vocabulary, for a sequence beyond the context, its page table or the cache's pages,
    // and for a wanted row that there is not.
    void step(const CpuCache& cache, const int64_t* tokens, int rows, const int32_t* wanted, int wanted_rows, void* logits,
              int threads);

    // Bytes of packed copies of all matrices that a path reads packed.
    size_t packed_bytes() const;
    // Whether passes read such copies, which the next one then makes. Logits are the same, to the bit.
    void read_packed(bool packed);
    bool reads_packed() const { return packs_; }
    // The copies are made anew by the next pass. Without this it sees writes that change one of a few weights of a matrix.
    void weights_written() { stale_ = true; }

private:
    // The pass's tokens, lengths and pages, checked. They are copies, as their owner may change them meanwhile.
    CpuCache copied(const CpuCache& cache, const int64_t* tokens, int rows);

    std::vector<CpuLayer> layers_;
    std::vector<CpuStage> stages_;
    CpuModel model_;
    std::vector<int64_t> tokens_;
    std::vector<int32_t> lengths_, table_, wanted_;
    // Makes the packed copies, unless they are there and as the weights are.
    void pack(const CpuDecodePath& path, int threads);
    std::vector<uint32_t> samples() const;

    struct Free {
        void operator()(float* memory) const { std::free(memory); }
    };
    std::unique_ptr<float, Free> memory_;
    size_t floats_ = 0;
    std::unique_ptr<float, Free> packed_;
    const CpuDecodePath* packed_for_ = nullptr;  // null: there are no copies
    std::vector<uint32_t> samples_;              // some weights of each matrix, as they were when it was packed
    bool packs_ = false, stale_ = false;
};

// The best path of this processor, or null; or the one that use_cpu_decode_path chose by name, which throws if
// there is none of that name.
const CpuDecodePath* cpu_decode_path();
void use_cpu_decode_path(const std::string& name);
bool decoder_supported();

}  // namespace gptkern
