// The numbers that Python and C++ agree on, as attributes of gptkern._C: Python reads them in gptkern/_native.py.
#pragma once

#include <pybind11/pybind11.h>

namespace gptkern {

// What Python passes: functions, arguments, and the fields that are read of them. One more with every change of these;
// gptkern/_native.py has the same number.
constexpr int kInterface = 10;

void export_constants(pybind11::module_& module);

}  // namespace gptkern
