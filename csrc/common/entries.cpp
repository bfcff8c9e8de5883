#include "common/entries.h"

namespace py = pybind11;

namespace gptkern {
namespace {

// Whether each dictionary has its number of entries, and the ``owners`` hold these very values, one after another.
// A model has hundreds of them, which a pass drives out of the caches: lengths are read without a branch between
// them, so that the processor waits for many at once.
bool same_entries(const py::list& dicts, const py::list& sizes, const py::list& owners, const py::list& values) {
    const Py_ssize_t count = PyList_GET_SIZE(dicts.ptr());
    if (PyList_GET_SIZE(sizes.ptr()) != count) throw py::value_error("same_entries: one size for each dictionary is needed");
    Py_ssize_t other = 0;
    for (Py_ssize_t i = 0; i < count; ++i) {
        PyObject* const dict = PyList_GET_ITEM(dicts.ptr(), i);
        if (!PyDict_Check(dict)) throw py::type_error("same_entries: dictionaries are needed");
        other |= PyDict_GET_SIZE(dict) ^ PyLong_AsSsize_t(PyList_GET_ITEM(sizes.ptr(), i));
    }
    if (PyErr_Occurred()) throw py::error_already_set();
    if (other != 0) return false;
    Py_ssize_t place = 0;
    for (const py::handle owner : owners) {
        if (!PyDict_Check(owner.ptr())) throw py::type_error("same_entries: dictionaries are needed");
        Py_ssize_t next = 0;
        PyObject* value = nullptr;
        while (PyDict_Next(owner.ptr(), &next, nullptr, &value)) {
            if (place == PyList_GET_SIZE(values.ptr()) || value != PyList_GET_ITEM(values.ptr(), place++)) return false;
        }
    }
    return place == PyList_GET_SIZE(values.ptr());
}

}  // namespace

void bind_entries(py::module_& module) {
    module.def("same_entries", &same_entries, py::arg("dicts"), py::arg("sizes"), py::arg("owners"), py::arg("values"),
               "Whether each dictionary has its number of entries, and the owners hold these very values, in order.");
}

}  // namespace gptkern
