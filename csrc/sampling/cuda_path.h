// The sampler's entry points on CUDA. In a build without nvcc, without_cuda.cpp defines them.
#pragma once

#include <cstddef>
#include <cstdint>

#include "sampling/arguments.h"

namespace gptkern {

extern const bool kHasCuda;
extern const char* const kCudaArchs;

// The device memory that a call over so many rows needs, in bytes. The caller owns it and may reuse it.
size_t cuda_workspace_bytes(int64_t rows, int64_t vocab);

// These enqueue on the stream and return. They allocate nothing and wait for nothing.
void cuda_sample(const SampleArguments& arguments, std::uintptr_t workspace, std::uintptr_t stream);
void cuda_top_k(const TopKArguments& arguments, std::uintptr_t workspace, std::uintptr_t stream);

}  // namespace gptkern
