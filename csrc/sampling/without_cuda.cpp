// The CUDA entry points of a build without nvcc: every call raises.
#include <stdexcept>

#include "sampling/cuda_path.h"

namespace gptkern {

const bool kHasCuda = false;
const char* const kCudaArchs = "";

size_t cuda_workspace_bytes(int64_t, int64_t) { return 0; }

namespace {

[[noreturn]] void refuse() {
    throw std::runtime_error("gptkern._C was built without CUDA; install it again with nvcc on PATH");
}

}  // namespace

void cuda_sample(const SampleArguments&, std::uintptr_t, std::uintptr_t) { refuse(); }
void cuda_top_k(const TopKArguments&, std::uintptr_t, std::uintptr_t) { refuse(); }

}  // namespace gptkern
