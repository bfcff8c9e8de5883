// One source for host and device: function qualifiers, and the few operations that each spells differently.
//
// Sources are compiled without contraction of a * b + c (-ffp-contract=off, -fmad=false), because host and
// device must round alike. Where a fused operation is wanted, the source calls fused().
#pragma once

#include <cstdint>
#include <cstring>

// Every instruction set that the CPU part is compiled for has its own copy of each inline function. If the
// copies shared a name, the linker could keep the AVX-512 one for all.
#ifndef GPTKERN_ISA
#define GPTKERN_ISA portable
#endif

// The name of the instruction set as a string.
#define GPTKERN_STRING_OF(name) #name
#define GPTKERN_STRING(name) GPTKERN_STRING_OF(name)
#define GPTKERN_ISA_NAME GPTKERN_STRING(GPTKERN_ISA)

#ifdef __CUDACC__
#define GPTKERN_HD __host__ __device__ __forceinline__
#else
#define GPTKERN_HD inline __attribute__((always_inline))
#endif

// Before a loop that a GPU's compiler shall not write out several times.
#ifdef __CUDACC__
#define GPTKERN_ROLLED _Pragma("unroll 1")
#else
#define GPTKERN_ROLLED
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

// The upper 64 bits of the 128-bit product.
GPTKERN_HD uint64_t multiply_high(uint64_t a, uint64_t b) {
#ifdef __CUDA_ARCH__
    return __umul64hi(a, b);
#else
    return static_cast<uint64_t>(static_cast<unsigned __int128>(a) * b >> 64);
#endif
}

// a * b + c, rounded once.
GPTKERN_HD double fused(double a, double b, double c) {
#ifdef __CUDA_ARCH__
    return __fma_rn(a, b, c);
#else
    return __builtin_fma(a, b, c);
#endif
}

}  // namespace GPTKERN_ISA
}  // namespace gptkern
