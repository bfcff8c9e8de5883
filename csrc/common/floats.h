// fp16 and bf16 as 16-bit patterns: widening to fp32, which is exact, and rounding back.
#pragma once

#include "common/platform.h"

namespace gptkern {
inline namespace GPTKERN_ISA {

GPTKERN_HD float widen_bf16(uint16_t bits) { return bit_cast<float>(static_cast<uint32_t>(bits) << 16); }

GPTKERN_HD float widen_fp16(uint16_t bits) {
    const uint32_t magnitude = bits & 0x7FFFu;
    // A product moves the exponent's bias: it is exact, and it normalises subnormals.
    const uint32_t scaled = bit_cast<uint32_t>(bit_cast<float>(magnitude << 13) * 0x1p112f);
    const uint32_t special = magnitude >= 0x7C00u ? 0x7F800000u : 0u;
    return bit_cast<float>(scaled | special | static_cast<uint32_t>(bits & 0x8000u) << 16);
}

// The nearest bf16, ties to even; a NaN stays a NaN.
GPTKERN_HD uint16_t round_to_bf16(float value) {
    const uint32_t bits = bit_cast<uint32_t>(value);
    if (value != value) return static_cast<uint16_t>(bits >> 16 | 0x40);
    return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

}  // namespace GPTKERN_ISA
}  // namespace gptkern
