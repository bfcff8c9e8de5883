// The floating-point types of logits and of weights; the numbers are those that Python passes.
#pragma once

namespace gptkern {

enum class DType : int { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

}  // namespace gptkern
