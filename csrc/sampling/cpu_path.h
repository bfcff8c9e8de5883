// The sampler's entry points on the CPU, one set for each instruction set that it is compiled for.
#pragma once

#include "common/platform.h"  // makes this source's instruction set the inline namespace
#include "sampling/arguments.h"

namespace gptkern {

struct CpuPath {
    const char* name;
    void (*sample)(const SampleArguments&, int threads);
    void (*top_k)(const TopKArguments&, int threads);
    uint64_t (*weight)(double halvings);
    void (*uniforms)(int64_t seed, int64_t request, int64_t step, uint64_t* token, uint64_t* accept);
};

namespace portable {
const CpuPath& cpu_path();
}

#ifdef GPTKERN_X86
namespace avx2 {
const CpuPath& cpu_path();
}
#endif

}  // namespace gptkern
