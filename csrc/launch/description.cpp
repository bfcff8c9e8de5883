#include "launch/description.h"

#include "common/tensor.h"

namespace gptkern {
namespace {

PyObject* describe(PyObject*, PyObject* const* values, Py_ssize_t count) {
    char text[1024];
    char* end = text;
    for (Py_ssize_t i = 0; i < count; ++i) {
        const size_t room = text + sizeof text - end;
        if (values[i] != Py_None) {
            end = describe_tensor(values[i], end, room);
            if (end == nullptr) Py_RETURN_NONE;
        } else if (room == 0) {
            Py_RETURN_NONE;
        } else {
            *end++ = 'N';
        }
    }
    return PyBytes_FromStringAndSize(text, end - text);
}

// Without pybind11's conversions, which take longer than all else.
PyMethodDef methods[] = {{"describe", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(describe)),
                          METH_FASTCALL, "Bytes that say all of a call's tensors but their addresses and numbers."},
                         {nullptr, nullptr, 0, nullptr}};

}  // namespace

void bind_description(pybind11::module_& module) {
    if (PyModule_AddFunctions(module.ptr(), methods) != 0) throw pybind11::error_already_set();
}

}  // namespace gptkern
