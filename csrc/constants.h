// The numbers that Python and C++ agree on, as attributes of gptkern._C: Python reads them in gptkern/_native.py.
#pragma once

#include <pybind11/pybind11.h>

namespace gptkern {

void export_constants(pybind11::module_& module);

}  // namespace gptkern
