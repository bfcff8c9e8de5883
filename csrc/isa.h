// The CPU part's entry points, one set for each instruction set it is compiled for.
#pragma once

#include "arguments.h"

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
