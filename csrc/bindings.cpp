#include <pybind11/pybind11.h>

PYBIND11_MODULE(_C, module) {
    module.doc() = "gptkern's sampler";
    module.attr("has_cuda") = false;
}
