// The sampler for Python: gptkern._C.sample and top_k.
#pragma once

#include <pybind11/pybind11.h>

namespace gptkern {

void bind_sampler(pybind11::module_& module);

}  // namespace gptkern
