// The CPU's decoder for Python: gptkern._C.Decoder.
#pragma once

#include <pybind11/pybind11.h>

namespace gptkern {

void bind_decoder(pybind11::module_& module);

}  // namespace gptkern
