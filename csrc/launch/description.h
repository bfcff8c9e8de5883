// What decides on a call of an op but the addresses and numbers in its tensors.
#pragma once

#include <pybind11/pybind11.h>

namespace gptkern {

// gptkern._C.describe: bytes that are the same for two calls exactly if each tensor has the same dtype, device, sizes,
// strides, and alignment to 16 bytes; None in place of a tensor is described, too. Returns None for anything but plain
// tensors and parameters with memory, which a call checks and treats each time.
void bind_description(pybind11::module_& module);

}  // namespace gptkern
