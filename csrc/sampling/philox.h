// Philox4x32-10 (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC 2011).
//
// A counter-based generator: a draw's numbers are a function of (seed, request, step) alone, so they are the
// same on every device, in every batch, and whatever was drawn before.
#pragma once

#include "common/platform.h"

namespace gptkern {
inline namespace GPTKERN_ISA {

struct Philox4 {
    uint32_t word[4];
};

GPTKERN_HD Philox4 philox4x32(uint64_t key, uint64_t counter_low, uint64_t counter_high) {
    constexpr uint32_t kMultiplier0 = 0xD2511F53u, kMultiplier1 = 0xCD9E8D57u;
    constexpr uint32_t kWeyl0 = 0x9E3779B9u, kWeyl1 = 0xBB67AE85u;
    uint32_t key0 = static_cast<uint32_t>(key), key1 = static_cast<uint32_t>(key >> 32);
    uint32_t c0 = static_cast<uint32_t>(counter_low), c1 = static_cast<uint32_t>(counter_low >> 32);
    uint32_t c2 = static_cast<uint32_t>(counter_high), c3 = static_cast<uint32_t>(counter_high >> 32);
    for (int round = 0; round < 10; ++round) {
        const uint64_t product0 = static_cast<uint64_t>(kMultiplier0) * c0;
        const uint64_t product1 = static_cast<uint64_t>(kMultiplier1) * c2;
        const uint32_t next0 = static_cast<uint32_t>(product1 >> 32) ^ c1 ^ key0;
        const uint32_t next2 = static_cast<uint32_t>(product0 >> 32) ^ c3 ^ key1;
        c1 = static_cast<uint32_t>(product1);
        c3 = static_cast<uint32_t>(product0);
        c0 = next0;
        c2 = next2;
        key0 += kWeyl0;
        key1 += kWeyl1;
    }
    return {{c0, c1, c2, c3}};
}

// The random numbers of one draw, 64 bits each: for the token, and for accepting a draft's token.
struct Uniforms {
    uint64_t token, accept;
};

GPTKERN_HD Uniforms uniforms(int64_t seed, int64_t request, int64_t step) {
    const Philox4 r = philox4x32(static_cast<uint64_t>(seed), static_cast<uint64_t>(step),
                                 static_cast<uint64_t>(request));
    return {r.word[0] | static_cast<uint64_t>(r.word[1]) << 32, r.word[2] | static_cast<uint64_t>(r.word[3]) << 32};
}

}  // namespace GPTKERN_ISA
}  // namespace gptkern
