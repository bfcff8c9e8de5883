// The few functions of NVIDIA's driver that launching takes, looked up in libcuda.so.1 at the first launch: the
// extension is built without CUDA's headers and loads where there is no driver. Names and numbers are cuda.h's.
#pragma once

#include <cstdint>
#include <string>

namespace gptkern::cuda {

using Result = int;  // CUresult; 0 is success
using Library = void*;
using Kernel = void*;  // a CUkernel, which launches as a CUfunction does
using Stream = void*;

struct alignas(64) TensorMap {
    char opaque[128];
};

struct Attribute {
    enum Id : uint32_t { kCooperative = 2, kCluster = 4, kClusterPolicy = 5, kDependent = 6 };
    Id id;
    char pad[4];
    union {
        char bytes[64];
        int number;
        unsigned cluster[3];
    } value;
};
static_assert(sizeof(Attribute) == 72);

struct Config {
    unsigned grid[3], block[3], shared;
    Stream stream;
    Attribute* attributes;
    unsigned attribute_count;
};
static_assert(sizeof(Config) == 56);

constexpr int kMaxDynamicShared = 8, kNonPortableCluster = 14;  // CUfunction_attribute
constexpr int kSpread = 1;                                      // CUclusterSchedulingPolicy

struct Driver {
    Result (*version)(int* number);
    Result (*error_name)(Result result, const char** name);
    Result (*load)(Library* library, const void* image, void* options, void* values, unsigned count,
                   void* library_options, void* library_values, unsigned library_count);
    Result (*find)(Kernel* kernel, Library library, const char* name);
    Result (*set_attribute)(int attribute, int value, Kernel kernel, int device);
    Result (*launch)(const Config* config, Kernel kernel, void** parameters, void** extra);
    Result (*encode)(TensorMap* map, int type, uint32_t rank, void* address, const uint64_t* shape,
                     const uint64_t* strides, const uint32_t* box, const uint32_t* steps, int interleave, int swizzle,
                     int promotion, int fill);

    // Raises std::runtime_error unless ``result`` is success: what was tried, the driver's word and its version.
    void check(Result result, const std::string& attempt) const;
};

// Raises std::runtime_error if there is no driver, or one that is too old.
const Driver& driver();

}  // namespace gptkern::cuda
