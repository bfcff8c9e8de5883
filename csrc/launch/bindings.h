// Launching machine code that was compiled ahead of time, for gptkern.ops.pack: gptkern._C.PackedKernel and Launcher.
#pragma once

#include <pybind11/pybind11.h>

namespace gptkern {

void bind_launcher(pybind11::module_& module);

}  // namespace gptkern
