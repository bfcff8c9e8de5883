// The CUDA part's entry points; without_cuda.cpp has them where there is no nvcc.
#pragma once

#include <cstddef>
#include <cstdint>

#include "arguments.h"

namespace gptkern {

extern const bool kHasCuda;
extern const char* const kCudaArchs;

// Device memory that a call over so many rows needs, in bytes; the caller owns it and may reuse it.
size_t cuda_workspace_bytes(int64_t rows, int64_t vocab);

// Enqueue on the stream and return; nothing is allocated or waited for.
void cuda_sample(const SampleArguments& arguments, std::uintptr_t workspace, std::uintptr_t stream);
void cuda_top_k(const TopKArguments& arguments, std::uintptr_t workspace, std::uintptr_t stream);

}  // namespace gptkern
