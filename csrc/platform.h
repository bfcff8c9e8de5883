// One source for host and device: the qualifiers, and the few operations that are spelled differently.
//
// Sources are compiled without contraction of a * b + c (-ffp-contract=off, -fmad=false): host and
// device must round alike, so fused operations are written where they are wanted.
#pragma once

#include <cstdint>
#include <cstring>

// Each instruction set the CPU part is compiled for has its own copy of every inline function: were
// they to share names, the linker could keep the AVX-512 one for all.
#ifndef GPTKERN_ISA
#define GPTKERN_ISA portable
#endif

#ifdef __CUDACC__
#define GPTKERN_HD __host__ __device__ __forceinline__
#else
#define GPTKERN_HD inline __attribute__((always_inline))
#endif

namespace gptkern {
inline namespace GPTKERN_ISA {

template <class To, class From>
GPTKERN_HD To bit_cast(From from) {
    static_assert(sizeof(To) == sizeof(From), "a bit cast keeps the size");
    To to;
    memcpy(&to, &from, sizeof(to));
    return to;
}

GPTKERN_HD uint64_t multiply_high(uint64_t a, uint64_t b) {
#ifdef __CUDA_ARCH__
    return __umul64hi(a, b);
#else
    return static_cast<uint64_t>(static_cast<unsigned __int128>(a) * b >> 64);
#endif
}

GPTKERN_HD double fused(double a, double b, double c) {
#ifdef __CUDA_ARCH__
    return __fma_rn(a, b, c);
#else
    return __builtin_fma(a, b, c);
#endif
}

}  // namespace GPTKERN_ISA
}  // namespace gptkern
