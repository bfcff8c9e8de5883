// The extension module gptkern._C. It takes tensors and checks them (common/tensor.h), so that no call from Python
// reads or writes outside of one.
#include <pybind11/pybind11.h>

#include "common/entries.h"
#include "constants.h"
#include "decode/bindings.h"
#include "launch/bindings.h"
#include "launch/description.h"
#include "sampling/bindings.h"

PYBIND11_MODULE(_C, module) {
    module.doc() = "gptkern's sampler (gptkern.ops.sample), its decoder for the CPU, and its launcher of machine code.";
    gptkern::export_constants(module);
    gptkern::bind_sampler(module);
    gptkern::bind_decoder(module);
    gptkern::bind_launcher(module);
    gptkern::bind_description(module);
    gptkern::bind_entries(module);
}
