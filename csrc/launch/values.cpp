#include "launch/values.h"

#include <cstring>
#include <stdexcept>
#include <unordered_map>

#include "common/tensor.h"

namespace py = pybind11;

namespace gptkern {
namespace {

constexpr int kMostDims = MapSource::kMostDims;
// Maps that one machine code's launches leave: those of a model's weights and of activations where they lie in turn.
constexpr size_t kMostMaps = 1024;

template <class Number>
void append_bytes(std::string& key, Number number) {
    key.append(reinterpret_cast<const char*>(&number), sizeof number);
}

py::object attribute(PyObject* object, const char* name) {
    return py::reinterpret_steal<py::object>(PyObject_GetAttrString(object, name));
}

// A name that is interned once: looking it up costs no new string.
PyObject* interned(const char* name) { return PyUnicode_InternFromString(name); }

py::object attribute(PyObject* object, PyObject* name) {
    PyObject* const found = PyObject_GetAttr(object, name);
    if (found == nullptr) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(found);
}

[[noreturn]] void refuse(PyObject* value, const char* part) {
    throw py::type_error(std::string("a kernel cannot be given a ") + Py_TYPE(value)->tp_name + " as " + part);
}

// What a pointer's type and address mean, of a tensor with memory or one that only has a dtype and an address.
Glance look_at(PyObject* value) {
    Glance seen{};
    if (glance(value, seen)) return seen;
    const py::object dtype = attribute(value, "dtype"), address = attribute(value, "data_ptr");
    if (!dtype || !address) {
        PyErr_Clear();
        refuse(value, "an argument");
    }
    seen = glance_of_dtype(py::str(dtype));
    seen.data = reinterpret_cast<char*>(address().cast<uintptr_t>());
    return seen;
}

void append_pointer(std::string& key, char letter, const Glance& seen, bool specialise) {
    key += letter;
    key += static_cast<char>(seen.code);
    key += static_cast<char>(seen.bits);
    key += specialise && reinterpret_cast<uintptr_t>(seen.data) % 16 == 0 ? '+' : '-';
}

void append_integer(std::string& key, PyObject* value, bool specialise) {
    int beyond = 0;
    const long long number = PyLong_AsLongLongAndOverflow(value, &beyond);
    uint64_t bits = static_cast<uint64_t>(number);
    char width = number >= INT32_MIN && number <= INT32_MAX ? 'i' : 'l';
    if (beyond != 0) {
        bits = PyLong_AsUnsignedLongLong(value);
        if (PyErr_Occurred()) throw py::error_already_set();
        width = 'u';
    }
    key += width;
    key += !specialise ? '-' : number == 1 && beyond == 0 ? '1' : bits % 16 == 0 ? '+' : '-';
}

struct Names {
    PyObject* base = interned("base");
    PyObject* shape = interned("shape");
    PyObject* strides = interned("strides");
    PyObject* block = interned("block_shape");
    PyObject* padding = interned("padding");
    PyObject* rounded = interned("round_f32_to_tf32");
};

const Names& names() {
    static const Names instance;
    return instance;
}

void append_descriptor(std::string& key, PyObject* value) {
    const py::object block = attribute(value, names().block);
    append_pointer(key, 'D', look_at(attribute(value, names().base).ptr()), true);
    append_constant(key, py::tuple(block).ptr());
    append_constant(key, attribute(value, names().padding).ptr());
    append_constant(key, attribute(value, names().rounded).ptr());
}

bool is_descriptor(PyObject* value) {
    const int has = PyObject_HasAttr(value, names().block);
    return has == 1;
}

int64_t integer(PyObject* value) {
    const long long number = PyLong_AsLongLong(value);
    if (number != -1 || !PyErr_Occurred()) return number;
    PyErr_Clear();
    const unsigned long long bits = PyLong_AsUnsignedLongLong(value);
    if (PyErr_Occurred()) throw py::error_already_set();
    return static_cast<int64_t>(bits);
}

// The integers of a short list, in reverse: CUDA has the innermost dimension first.
int reversed(const py::object& list, int64_t (&numbers)[kMostDims]) {
    const auto items = py::reinterpret_steal<py::object>(PySequence_Fast(list.ptr(), "a list of sizes is needed"));
    if (!items) throw py::error_already_set();
    const int count = static_cast<int>(PySequence_Fast_GET_SIZE(items.ptr()));
    if (count == 0 || count > kMostDims) throw py::value_error("a descriptor has one to five dimensions");
    for (int i = 0; i < count; ++i) numbers[count - 1 - i] = integer(PySequence_Fast_GET_ITEM(items.ptr(), i));
    return count;
}

cuda::TensorMap encode(const MapLayout& layout, const MapSource& source) {
    uint64_t sizes[kMostDims], strides[kMostDims] = {};
    uint32_t box[kMostDims], unit[kMostDims];
    for (int i = 0; i < source.rank; ++i) {
        sizes[i] = static_cast<uint64_t>(source.shape[i]);
        if (i > 0) strides[i - 1] = static_cast<uint64_t>(source.steps[i]) * layout.element_bytes;
        box[i] = layout.box[source.rank - 1 - i];
        unit[i] = 1;
    }
    constexpr int kNotInterleaved = 0, kPromote128 = 2, kFillZeros = 0;
    const cuda::Driver& driver = cuda::driver();
    cuda::TensorMap map;
    const cuda::Result result =
        driver.encode(&map, layout.element_type, static_cast<uint32_t>(source.rank), source.address, sizes, strides,
                      box, unit, kNotInterleaved, layout.swizzle, kPromote128, kFillZeros);
    if (result != 0) driver.check(result, "cuTensorMapEncodeTiled");  // a launch makes no text that nobody reads
    return map;
}

}  // namespace

void append_constant(std::string& key, PyObject* value) {
    if (value == Py_None) {
        key += 'N';
    } else if (PyBool_Check(value)) {
        key += value == Py_True ? 'T' : 'F';
    } else if (PyLong_Check(value)) {
        key += 'i';
        append_bytes(key, integer(value));
    } else if (PyFloat_Check(value)) {
        key += 'f';
        append_bytes(key, PyFloat_AS_DOUBLE(value));
    } else if (PyUnicode_Check(value)) {
        Py_ssize_t length = 0;
        const char* const text = PyUnicode_AsUTF8AndSize(value, &length);
        if (text == nullptr) throw py::error_already_set();
        key += 's';
        append_bytes(key, static_cast<uint32_t>(length));
        key.append(text, length);
    } else if (PyTuple_Check(value)) {
        key += '(';
        for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(value); ++i) append_constant(key, PyTuple_GET_ITEM(value, i));
        key += ')';
    } else {
        // A dtype of Triton's language. Its name is looked up once; the reference keeps the address its own.
        static auto* const dtypes = new std::unordered_map<PyObject*, std::string>;
        auto found = dtypes->find(value);
        if (found == dtypes->end()) {
            if (!attribute(value, "primitive_bitwidth")) {
                PyErr_Clear();
                refuse(value, "a compile-time value");
            }
            Py_INCREF(value);
            found = dtypes->emplace(value, std::string(py::str(py::handle(value)))).first;
        }
        key += 'd';
        append_bytes(key, static_cast<uint32_t>(found->second.size()));
        key += found->second;
    }
}

void append_argument(std::string& key, PyObject* value, bool specialise) {
    Glance seen{};
    if (value == Py_None) {
        key += 'N';
    } else if (PyBool_Check(value)) {
        key += 'b';
    } else if (PyLong_Check(value)) {
        append_integer(key, value, specialise);
    } else if (PyFloat_Check(value)) {
        key += 'f';
    } else if (glance(value, seen)) {
        append_pointer(key, 'p', seen, specialise);
    } else if (is_descriptor(value)) {
        append_descriptor(key, value);
    } else {
        append_pointer(key, 'p', look_at(value), specialise);
    }
}

void* Arguments::reserve(size_t bytes, size_t alignment) {
    const size_t start = (used_ + alignment - 1) / alignment * alignment;
    if (start + bytes > kMostBytes || count_ == kMost) throw std::runtime_error("a launch has too many arguments");
    used_ = start + bytes;
    return starts_[count_++] = bytes_ + start;
}

void Arguments::push(const Passed& passed, Code& code, PyObject* value) {
    switch (passed.form) {
        case Form::kPointer:
            return copy(reinterpret_cast<uint64_t>(look_at(value).data));
        case Form::kInt8:
            return copy(static_cast<int8_t>(integer(value)));
        case Form::kInt32:
            return copy(static_cast<int32_t>(integer(value)));
        case Form::kInt64:
            return copy(integer(value));
        case Form::kFloat32:
            return copy(static_cast<float>(PyFloat_AsDouble(value)));
        case Form::kTensorMap:
            return push_map(code, passed.map, value);
    }
}

void Arguments::push_map(Code& code, int map, PyObject* descriptor) {
    MapSource source{};
    source.map = map;
    source.rank = reversed(attribute(descriptor, names().shape), source.shape);
    const int steps = reversed(attribute(descriptor, names().strides), source.steps);
    if (steps != source.rank || source.rank != static_cast<int64_t>(code.maps[map].box.size())) {
        throw py::value_error("a descriptor's shape, strides and block have different numbers of dimensions");
    }
    source.address = look_at(attribute(descriptor, names().base).ptr()).data;
    auto found = code.encoded.find(source);
    if (found == code.encoded.end()) {
        if (code.encoded.size() >= kMostMaps) code.encoded.clear();
        found = code.encoded.emplace(source, encode(code.maps[map], source)).first;
    }
    *static_cast<cuda::TensorMap*>(reserve(sizeof(cuda::TensorMap), alignof(cuda::TensorMap))) = found->second;
    for (int64_t i = source.rank - 1; i >= 0; --i) copy(static_cast<int32_t>(source.shape[i]));
    for (int64_t i = source.rank - 1; i >= 0; --i) copy(source.steps[i]);
}

int device_of(py::tuple args) {
    for (const py::handle value : args) {
        Glance seen{};
        if (glance(value, seen)) return seen.device;
        if (!PyLong_Check(value.ptr()) && !value.is_none() && is_descriptor(value.ptr())) {
            return look_at(attribute(value.ptr(), names().base).ptr()).device;
        }
    }
    return -1;
}

}  // namespace gptkern
