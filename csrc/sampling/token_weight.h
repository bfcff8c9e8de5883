// The numbers of a row: stored logits, their order as integer keys, and token weights.
//
// A token's weight is its probability relative to the row's most likely token, as an integer:
// round(2^44 * exp((v - v_max) / T)). Integers add up to the same sum in any order, so results depend neither
// on threads, blocks or chunks nor on the device; and 2^-44 is far finer than fp32.
#pragma once

#include "common/floats.h"
#include "sampling/arguments.h"

namespace gptkern {
inline namespace GPTKERN_ISA {

constexpr int kWeightBits = 44;
constexpr uint64_t kMaxWeight = 1ull << kWeightBits;
constexpr double kLog2E = 1.4426950408889634;
constexpr double kLn2 = 0.6931471805599453;

// A stored logit's type, and its value in fp32.
template <DType kType>
struct Stored;

template <>
struct Stored<DType::kBFloat16> {
    using Type = uint16_t;
    static GPTKERN_HD float widen(uint16_t bits) { return widen_bf16(bits); }
};

template <>
struct Stored<DType::kFloat16> {
    using Type = uint16_t;
    static GPTKERN_HD float widen(uint16_t bits) { return widen_fp16(bits); }
};

// A row of stored logits.
struct Logits {
    const void* at;
    DType dtype;

    // One value, for whoever reads few.
    GPTKERN_HD float operator[](uint32_t id) const {
        if (dtype == DType::kFloat32) return static_cast<const float*>(at)[id];
        const uint16_t bits = static_cast<const uint16_t*>(at)[id];
        return dtype == DType::kFloat16 ? widen_fp16(bits) : widen_bf16(bits);
    }
};

GPTKERN_HD Logits logits_at(const void* logits, DType dtype, int64_t offset) {
    return {static_cast<const char*>(logits) + offset * (dtype == DType::kFloat32 ? 4 : 2), dtype};
}

// An unsigned key in the order of the floats: -0 equals +0, and a NaN is above all.
GPTKERN_HD uint32_t order_key(float v) {
    const uint32_t bits = bit_cast<uint32_t>(v + 0.0f);
    const uint32_t negative = 0u - (bits >> 31);
    // A choice between two values here would keep the loops over a row from vectorising.
    const uint32_t nan = 0u - static_cast<uint32_t>((bits & 0x7FFFFFFFu) > 0x7F800000u);
    return (bits ^ (negative | 0x80000000u)) | nan;
}

GPTKERN_HD float from_order_key(uint32_t key) {
    return bit_cast<float>(key & 0x80000000u ? key & 0x7FFFFFFFu : ~key);
}

constexpr uint32_t kKeyOfInfinity = 0xFF800000u;
constexpr uint32_t kKeyOfMinusInfinity = 0x007FFFFFu;

// 2^44 * 2^-x for x >= 0, rounded to an integer with an error of at most one.
GPTKERN_HD uint64_t weight_of(double x) {
    constexpr double kRound = 0x1.8p52;  // adding it leaves the nearest integer in the low bits
    const double y = x < 64.0 ? x : 64.0;
    const double shifted = y + kRound;
    const double f = (shifted - kRound) - y;  // in [-1/2, 1/2]
    // Taylor coefficients ln(2)^n / n!: on this interval the remainder is below 2^-47.
    double p = 0x1.e8cac7351bb25p-32;
    p = fused(p, f, 0x1.e4cf5158b8ecap-28);
    p = fused(p, f, 0x1.b5253d395e7c4p-24);
    p = fused(p, f, 0x1.62c0223a5c824p-20);
    p = fused(p, f, 0x1.ffcbfc588b0c7p-17);
    p = fused(p, f, 0x1.430912f86c787p-13);
    p = fused(p, f, 0x1.5d87fe78a6731p-10);
    p = fused(p, f, 0x1.3b2ab6fba4e77p-7);
    p = fused(p, f, 0x1.c6b08d704a0cp-5);
    p = fused(p, f, 0x1.ebfbdff82c58fp-3);
    p = fused(p, f, 0x1.62e42fefa39efp-1);
    p = fused(p, f, 1.0);
    const uint64_t exponent = (1023u + kWeightBits - bit_cast<uint64_t>(shifted)) << 52;
    const double scaled = p * bit_cast<double>(exponent);
    return bit_cast<uint64_t>(scaled + 0x1p52) & 0x000FFFFFFFFFFFFFull;
}

// The distance of a logit below the maximum, in halvings of probability.
GPTKERN_HD double halvings(float v_max, float v, double per_unit) {
    return (static_cast<double>(v_max) - static_cast<double>(v)) * per_unit;
}

GPTKERN_HD double log2e_over(double temperature) {
    const double ratio = kLog2E / temperature;
    return ratio < 1e300 ? ratio : 1e300;  // infinity would turn the maximum's own 0 into 0 * inf
}

}  // namespace GPTKERN_ISA
}  // namespace gptkern
