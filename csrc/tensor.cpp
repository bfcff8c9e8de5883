#include "tensor.h"

#include <utility>

namespace gptkern {
namespace py = pybind11;
namespace {

struct Described {
    const char* name;
    int bytes;
};
constexpr Described kKinds[] = {{"float32", 4}, {"float16", 2}, {"bfloat16", 2}, {"float64", 8},
                                {"int64", 8},   {"int32", 4},   {"int8", 1},     {"uint8", 1}};

// What is asked of a tensor at every call, made once and never freed: the interpreter may end first.
struct Torch {
    py::object tensor_type, dtypes[static_cast<int>(Kind::kOther)];
    py::str data_ptr{"data_ptr"}, shape{"shape"}, stride{"stride"}, dtype{"dtype"}, is_cpu{"is_cpu"},
        is_cuda{"is_cuda"}, get_device{"get_device"}, untyped_storage{"untyped_storage"}, nbytes{"nbytes"},
        storage_offset{"storage_offset"}, detach{"detach"};

    Torch() {
        const py::module_ torch = py::module_::import("torch");
        tensor_type = torch.attr("Tensor");
        for (int i = 0; i < static_cast<int>(Kind::kOther); ++i) dtypes[i] = torch.attr(kKinds[i].name);
        for (py::str* name : {&data_ptr, &shape, &stride, &dtype, &is_cpu, &is_cuda, &get_device, &untyped_storage,
                              &nbytes, &storage_offset, &detach}) {
            PyUnicode_InternInPlace(&name->ptr());
        }
    }

    bool is_tensor(py::handle object) const {
        return PyObject_TypeCheck(object.ptr(), reinterpret_cast<PyTypeObject*>(tensor_type.ptr()));
    }
};

const Torch& torch() {
    static Torch* made = nullptr;  // the lock of the interpreter is held
    if (made == nullptr) made = new Torch;
    return *made;
}

py::object get(py::handle object, const py::str& name) {
    PyObject* const value = PyObject_GetAttr(object.ptr(), name.ptr());
    if (value == nullptr) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(value);
}

py::object call(py::handle object, const py::str& name) {
    PyObject* const value = PyObject_CallMethodNoArgs(object.ptr(), name.ptr());
    if (value == nullptr) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(value);
}

int64_t whole(py::handle number) {
    const long long value = PyLong_AsLongLong(number.ptr());
    if (value == -1 && PyErr_Occurred()) throw py::error_already_set();
    return value;
}

// Addresses have the top bit set on no machine, but data_ptr() may say so of tagged ones.
uintptr_t address(py::handle number) {
    const unsigned long long value = PyLong_AsUnsignedLongLong(number.ptr());
    if (value == static_cast<unsigned long long>(-1) && PyErr_Occurred()) throw py::error_already_set();
    return static_cast<uintptr_t>(value);
}

void sizes(const py::object& tuple, int dims, int64_t* out) {
    for (int i = 0; i < dims; ++i) out[i] = whole(PyTuple_GET_ITEM(tuple.ptr(), i));
}

std::string described(const Tensor& t) {
    std::string text = t.kind == Kind::kOther ? std::string(py::str(get(t.object, torch().dtype))) : name_of(t.kind);
    text += " of shape " + shape_of(t.shape, t.dims);
    if (!t.contiguous()) text += ", strides " + shape_of(t.stride, t.dims);
    return text;
}

bool empty(const Tensor& t) {
    for (int i = 0; i < t.dims; ++i) {
        if (t.shape[i] == 0) return true;
    }
    return false;
}

std::string device_name(int device) { return device < 0 ? "the CPU" : "cuda:" + std::to_string(device); }

}  // namespace

const char* name_of(Kind kind) { return kKinds[static_cast<int>(kind)].name; }

std::string shape_of(const int64_t* sizes, int dims) {
    std::string text = "(";
    for (int i = 0; i < dims; ++i) {
        text += (i ? ", " : "") + (sizes[i] == kAny ? std::string("any") : std::to_string(sizes[i]));
    }
    return text + (dims == 1 ? ",)" : ")");
}

bool Tensor::contiguous() const {
    int64_t expected = 1;
    for (int i = dims - 1; i >= 0; --i) {
        if (shape[i] > 1 && stride[i] != expected) return empty(*this);
        expected *= shape[i];
    }
    return true;
}

bool Tensor::within() const {
    if (empty(*this)) return true;
    __int128 last = 0;
    for (int i = 0; i < dims; ++i) last += static_cast<__int128>(shape[i] - 1) * stride[i];
    return data != nullptr && kind != Kind::kOther && (last + 1) * kKinds[static_cast<int>(kind)].bytes <= bytes;
}

Tensor Gate::read(const char* name, py::handle object) const {
    const Torch& t = torch();
    if (!t.is_tensor(object)) {
        throw py::type_error(std::string(call_) + ": " + name + " is " + Py_TYPE(object.ptr())->tp_name +
                             "; a torch.Tensor is needed");
    }
    Tensor tensor{};
    tensor.object = object;
    try {
        const py::object shape = get(object, t.shape), stride = call(object, t.stride);
        const int64_t dims = PyTuple_Check(shape.ptr()) && PyTuple_Check(stride.ptr())
                                 ? static_cast<int64_t>(PyTuple_GET_SIZE(shape.ptr()))
                                 : Tensor::kMostDims + 1;
        if (dims > Tensor::kMostDims || PyTuple_GET_SIZE(stride.ptr()) != dims) refuse("a tensor has too many dimensions");
        tensor.dims = static_cast<int>(dims);
        sizes(shape, tensor.dims, tensor.shape);
        sizes(stride, tensor.dims, tensor.stride);
        const py::object dtype = get(object, t.dtype);
        int kind = 0;
        while (kind < static_cast<int>(Kind::kOther) && !dtype.is(t.dtypes[kind])) ++kind;
        tensor.kind = static_cast<Kind>(kind);
        if (get(object, t.is_cpu).ptr() == Py_True) {
            tensor.device = -1;
        } else if (get(object, t.is_cuda).ptr() == Py_True) {
            tensor.device = static_cast<int>(whole(call(object, t.get_device)));
        } else {
            refuse(std::string(name) + " is on neither a CPU nor a CUDA device");
        }
        tensor.data = reinterpret_cast<char*>(address(call(object, t.data_ptr)));
        const int size = kind < static_cast<int>(Kind::kOther) ? kKinds[kind].bytes : 1;
        tensor.bytes = whole(call(call(object, t.untyped_storage), t.nbytes)) - whole(call(object, t.storage_offset)) * size;
    } catch (const py::error_already_set& error) {
        // A sparse tensor, or one that a transform of functions has wrapped.
        throw py::type_error(std::string(call_) + ": " + name + " has no memory of its own to read: " + error.what());
    }
    return tensor;
}

Tensor Gate::tensor(const char* name, py::handle object, int dims) {
    const Tensor tensor = read(name, object);
    if (tensor.dims != dims) refuse(name, tensor, "a tensor of " + std::to_string(dims) + " dimensions");
    if (device_ == kNoDevice) device_ = tensor.device;
    if (device_ != tensor.device) {
        refuse(std::string(name) + " is on " + device_name(tensor.device) + ", and what came before it on " +
               device_name(device_) + "; one device is needed");
    }
    if (tensor.kind != Kind::kOther && !tensor.within()) {
        refuse(name, tensor, "a storage that holds all of it, which has " + std::to_string(tensor.bytes) + " bytes,");
    }
    return tensor;
}

Tensor Gate::dense(const char* name, py::handle object, Kind kind, std::initializer_list<int64_t> shape) {
    const Tensor found = tensor(name, object, static_cast<int>(shape.size()));
    bool fits = true;
    int i = 0;
    for (const int64_t size : shape) {
        fits &= size == kAny || found.shape[i] == size;
        ++i;
    }
    if (fits && found.kind == kind && found.contiguous()) return found;
    const std::string needed = std::string(name_of(kind)) + " of shape " + shape_of(shape.begin(), found.dims);
    if (found.kind == kind) refuse(name, found, needed + ", contiguous,");
    throw py::type_error(std::string(call_) + ": " + name + " is " + described(found) + "; " + needed + " is needed");
}

int Gate::number(const char* name, int64_t value, int64_t least, int64_t most) const {
    if (value < least || value > most) {
        refuse(std::string(name) + " is " + std::to_string(value) + "; " + std::to_string(least) + " to " +
               std::to_string(most) + " are accepted");
    }
    return static_cast<int>(value);
}

void Gate::refuse(const char* name, const Tensor& tensor, const std::string& needed) const {
    refuse(std::string(name) + " is " + described(tensor) + "; " + needed + " is needed");
}

void Gate::refuse(const std::string& why) const { throw py::value_error(std::string(call_) + ": " + why); }

HeldTensor::HeldTensor(py::handle tensor)
    : tensor_(py::reinterpret_borrow<py::object>(tensor)), alias_(call(tensor, torch().detach)),
      address_(address(call(tensor, torch().data_ptr))) {}

bool HeldTensor::moved() const { return address(call(tensor_, torch().data_ptr)) != address_; }

HeldEntry::HeldEntry(py::dict dictionary, py::str key)
    : dictionary_(std::move(dictionary)), key_(std::move(key)), value_(dictionary_[key_]) {}

bool HeldEntry::replaced() const {
    PyObject* const found = PyDict_GetItemWithError(dictionary_.ptr(), key_.ptr());
    if (found == nullptr && PyErr_Occurred()) throw py::error_already_set();
    return found != value_.ptr();
}

}  // namespace gptkern
