// The check that dictionaries are as they were.
#pragma once

#include <pybind11/pybind11.h>

namespace gptkern {

void bind_entries(pybind11::module_& module);

}  // namespace gptkern
