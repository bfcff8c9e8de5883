#include "common/tensor.h"

#include <algorithm>
#include <stdexcept>
#include <utility>

namespace gptkern {
namespace py = pybind11;
namespace {

// DLPack's view of a tensor, and the table of functions that fills one in: version 1 of its C exchange protocol
// (dmlc/dlpack, include/dlpack/dlpack.h), which every torch.Tensor offers.
struct View {
    char* data;
    int32_t device_type, device;
    int32_t dims;
    uint8_t code, bits;
    uint16_t lanes;
    int64_t *shape, *stride;
    uint64_t byte_offset;
};
struct Exchange {
    uint32_t major, minor;
    const void* older;
    const void *allocate, *export_owned, *import_owned;
    int (*view)(void* object, View* out);
};
constexpr int32_t kOnCpu = 1, kOnCuda = 2;

// A Kind's name, and DLPack's code and width for it.
struct KindInfo {
    const char* name;
    uint8_t code, bits;
    int bytes() const { return bits / 8; }
};
constexpr KindInfo kKinds[] = {{"float32", 2, 32}, {"float16", 2, 16}, {"bfloat16", 4, 16}, {"float64", 2, 64},
                                {"int64", 0, 64},   {"int32", 0, 32},   {"int8", 0, 8},      {"uint8", 1, 8}};
constexpr int kKindCount = static_cast<int>(Kind::kOther);

// The Python objects that every call needs, made once and never freed: the interpreter may end first.
struct Torch {
    py::object tensor_type, parameter_type;
    const Exchange* exchange;
    py::str dtype{"dtype"}, untyped_storage{"untyped_storage"}, nbytes{"nbytes"}, storage_offset{"storage_offset"},
        detach{"detach"}, is_neg{"is_neg"};

    Torch() {
        tensor_type = py::module_::import("torch").attr("Tensor");
        parameter_type = py::module_::import("torch.nn").attr("Parameter");
        exchange = tensor_type.attr("__dlpack_c_exchange_api__").cast<py::capsule>().get_pointer<const Exchange>();
        if (exchange->major != 1 || exchange->view == nullptr) {
            throw std::runtime_error("gptkern._C: this PyTorch has another DLPack exchange than version 1");
        }
        for (py::str* name : {&dtype, &untyped_storage, &nbytes, &storage_offset, &detach, &is_neg}) {
            PyUnicode_InternInPlace(&name->ptr());
        }
    }

    bool is_tensor(py::handle object) const {
        return PyObject_TypeCheck(object.ptr(), reinterpret_cast<PyTypeObject*>(tensor_type.ptr()));
    }
};

const Torch& torch() {
    static Torch* instance = nullptr;  // the caller holds the interpreter's lock
    if (instance == nullptr) instance = new Torch;
    return *instance;
}

View view_of(py::handle tensor) {
    View view;
    if (torch().exchange->view(tensor.ptr(), &view) != 0) throw py::error_already_set();
    return view;
}

py::object call(py::handle object, const py::str& name) {
    PyObject* const value = PyObject_CallMethodNoArgs(object.ptr(), name.ptr());
    if (value == nullptr) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(value);
}

// True of a view with the negative bit, as z.conj().imag: its memory has the elements' opposites, and DLPack does not
// tell.
bool negated(py::handle tensor) { return call(tensor, torch().is_neg).ptr() == Py_True; }

int64_t integer(py::handle number) {
    const long long value = PyLong_AsLongLong(number.ptr());
    if (value == -1 && PyErr_Occurred()) throw py::error_already_set();
    return value;
}

std::string description(const Tensor& t) {
    std::string text = t.kind == Kind::kOther ? std::string(py::str(t.object.attr(torch().dtype))) : name_of(t.kind);
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

bool glance(py::handle object, Glance& seen) {
    if (!torch().is_tensor(object)) return false;
    View view;
    if (torch().exchange->view(object.ptr(), &view) != 0) {
        PyErr_Clear();
        return false;
    }
    if (negated(object)) {
        throw py::value_error(
            "a kernel is given a tensor with the negative bit, whose memory has the opposites of its elements: call its "
            "resolve_neg()");
    }
    seen = {view.data + view.byte_offset, view.code, view.bits, view.device_type == kOnCuda ? view.device : -1};
    return true;
}

char* describe_tensor(PyObject* object, char* out, size_t room) {
    const Torch& t = torch();
    const auto* const type = reinterpret_cast<PyObject*>(Py_TYPE(object));
    if (type != t.tensor_type.ptr() && type != t.parameter_type.ptr()) return nullptr;
    View view;
    if (t.exchange->view(object, &view) != 0) {
        PyErr_Clear();
        return nullptr;
    }
    if (negated(object)) return nullptr;
    const auto address = reinterpret_cast<uintptr_t>(view.data + view.byte_offset);
    const int32_t head[] = {view.code << 8 | view.bits, view.device_type, view.device, view.dims, address % 16 == 0};
    const size_t size = sizeof(int64_t) * view.dims;
    if (room < sizeof head + 2 * size) return nullptr;
    out = std::copy_n(reinterpret_cast<const char*>(head), sizeof head, out);
    out = std::copy_n(reinterpret_cast<const char*>(view.shape), size, out);
    return std::copy_n(reinterpret_cast<const char*>(view.stride), size, out);
}

Glance glance_of_dtype(const std::string& dtype) {
    static constexpr KindInfo kOthers[] = {
        {"bool", 6, 8}, {"int16", 0, 16}, {"float8_e4m3fn", 10, 8}, {"float8_e5m2", 12, 8}};
    const std::string name = dtype.substr(dtype.rfind('.') + 1);
    for (const KindInfo& info : kKinds) {
        if (name == info.name) return {nullptr, info.code, info.bits, -1};
    }
    for (const KindInfo& info : kOthers) {
        if (name == info.name) return {nullptr, info.code, info.bits, -1};
    }
    throw py::type_error("a kernel takes no tensor of dtype " + name);
}

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

bool Tensor::fits_storage() const {
    if (empty(*this)) return true;
    __int128 last = 0;
    for (int i = 0; i < dims; ++i) last += static_cast<__int128>(shape[i] - 1) * stride[i];
    return data != nullptr && kind != Kind::kOther && (last + 1) * kKinds[static_cast<int>(kind)].bytes() <= bytes;
}

Tensor Checker::read(const char* name, py::handle object) const {
    const Torch& t = torch();
    if (!t.is_tensor(object)) {
        throw py::type_error(std::string(call_) + ": " + name + " is " + Py_TYPE(object.ptr())->tp_name +
                             "; a torch.Tensor is needed");
    }
    Tensor tensor{};
    tensor.object = object;
    bool opposite = false;
    try {
        const View view = view_of(object);
        opposite = negated(object);
        if (view.dims > Tensor::kMostDims) {
            refuse(std::string(name) + " has " + std::to_string(view.dims) + " dimensions");
        }
        tensor.dims = view.dims;
        std::copy(view.shape, view.shape + view.dims, tensor.shape);
        std::copy(view.stride, view.stride + view.dims, tensor.stride);
        int kind = 0;
        while (kind < kKindCount && (view.code != kKinds[kind].code || view.bits != kKinds[kind].bits)) ++kind;
        tensor.kind = static_cast<Kind>(kind);
        if (view.device_type != kOnCpu && view.device_type != kOnCuda) {
            refuse(std::string(name) + " is on neither a CPU nor a CUDA device");
        }
        tensor.device = view.device_type == kOnCpu ? -1 : view.device;
        tensor.data = view.data + view.byte_offset;
        const int64_t offset = integer(call(object, t.storage_offset)) * (view.bits / 8);
        tensor.bytes = integer(call(call(object, t.untyped_storage), t.nbytes)) - offset;
    } catch (const py::error_already_set& error) {
        // A sparse tensor, or one that a function transform has wrapped.
        throw py::type_error(std::string(call_) + ": " + name + " has no memory of its own to read: " + error.what());
    }
    if (opposite) {
        refuse(std::string(name) + " has the negative bit, so that its memory has the opposites of its elements: call " +
               name + ".resolve_neg()");
    }
    return tensor;
}

Tensor Checker::tensor(const char* name, py::handle object, int dims) {
    const Tensor tensor = read(name, object);
    if (tensor.dims != dims) refuse(name, tensor, "a tensor of " + std::to_string(dims) + " dimensions");
    if (device_ == kNoDevice) device_ = tensor.device;
    if (device_ != tensor.device) {
        refuse(std::string(name) + " is on " + device_name(tensor.device) + ", and the tensors before it on " +
               device_name(device_) + "; one device is needed");
    }
    if (tensor.kind != Kind::kOther && !tensor.fits_storage()) {
        refuse(name, tensor, "a storage that holds all of it, which has " + std::to_string(tensor.bytes) + " bytes,");
    }
    return tensor;
}

Tensor Checker::dense(const char* name, py::handle object, Kind kind, std::initializer_list<int64_t> shape) {
    const Tensor result = tensor(name, object, static_cast<int>(shape.size()));
    bool fits = true;
    int i = 0;
    for (const int64_t size : shape) {
        fits &= size == kAny || result.shape[i] == size;
        ++i;
    }
    if (fits && result.kind == kind && result.contiguous()) return result;
    const std::string needed = std::string(name_of(kind)) + " of shape " + shape_of(shape.begin(), result.dims);
    if (result.kind == kind) refuse(name, result, needed + ", contiguous,");
    throw py::type_error(std::string(call_) + ": " + name + " is " + description(result) + "; " + needed +
                         " is needed");
}

int Checker::number(const char* name, int64_t value, int64_t low, int64_t high) const {
    if (value < low || value > high) {
        refuse(std::string(name) + " is " + std::to_string(value) + "; " + std::to_string(low) + " to " +
               std::to_string(high) + " are accepted");
    }
    return static_cast<int>(value);
}

int Checker::number(const char* name, py::handle value, int64_t low, int64_t high) const {
    const py::object index = py::reinterpret_steal<py::object>(PyNumber_Index(value.ptr()));
    if (!index) {
        PyErr_Clear();
        refuse_type(name, value);
    }
    int beyond = 0;
    const long long converted = PyLong_AsLongLongAndOverflow(index.ptr(), &beyond);
    if (beyond != 0) {
        refuse(std::string(name) + " is beyond 64 bits; " + std::to_string(low) + " to " + std::to_string(high) +
               " are accepted");
    }
    return number(name, static_cast<int64_t>(converted), low, high);
}

void Checker::refuse_type(const char* name, py::handle value) const {
    throw py::type_error(std::string(call_) + ": " + name + " is of type " + Py_TYPE(value.ptr())->tp_name +
                         ", or holds what is not accepted");
}

void Checker::refuse_missing(const char* name, py::handle value, const char* attribute) const {
    throw py::type_error(std::string(call_) + ": " + name + " is of type " + Py_TYPE(value.ptr())->tp_name +
                         ", which has no attribute " + attribute);
}

void Checker::refuse(const char* name, const Tensor& tensor, const std::string& needed) const {
    refuse(std::string(name) + " is " + description(tensor) + "; " + needed + " is needed");
}

void Checker::refuse(const std::string& why) const { throw py::value_error(std::string(call_) + ": " + why); }

py::handle Group::get(const char* attribute) const {
    PyObject* const value = PyObject_GetAttrString(object_.ptr(), attribute);
    if (value == nullptr) {
        PyErr_Clear();
        check_.refuse_missing(name_, object_, attribute);
    }
    return check_.hold(py::reinterpret_steal<py::object>(value));
}

HeldTensor::HeldTensor(py::handle tensor)
    : tensor_(py::reinterpret_borrow<py::object>(tensor)), alias_(call(tensor, torch().detach)), dims_(0) {
    const View view = view_of(tensor);
    data_ = view.data;
    record_ = reinterpret_cast<const char*>(view.shape);
    storage_ = reinterpret_cast<const char*>(integer(call(tensor, torch().untyped_storage).attr("_cdata")));
    code_ = view.code;
    dims_ = std::min(view.dims, static_cast<int32_t>(kMostDims));
    std::copy(view.shape, view.shape + dims_, shape_);
    std::copy(view.stride, view.stride + dims_, stride_);
}

void HeldTensor::prefetch() const {
    __builtin_prefetch(tensor_.ptr());
    for (const int line : {-64, 0, 64, 128}) __builtin_prefetch(record_ + line);
    for (const int line : {0, 64}) __builtin_prefetch(storage_ + line);
}

bool HeldTensor::moved() const {
    const View view = view_of(tensor_);
    return view.data != data_ || view.code != code_ || view.dims != dims_ ||
           !std::equal(shape_, shape_ + dims_, view.shape) || !std::equal(stride_, stride_ + dims_, view.stride);
}

int64_t HeldTensor::version() const {
    static PyObject* const name = PyUnicode_InternFromString("_version");
    PyObject* const version = PyObject_GetAttr(tensor_.ptr(), name);
    if (version == nullptr) {
        PyErr_Clear();
        return -1;
    }
    const int64_t count = PyLong_AsLongLong(version);
    Py_DECREF(version);
    return count;
}

HeldDict::HeldDict(py::dict dictionary) : dictionary_(std::move(dictionary)) {
    for (const auto& [key, value] : dictionary_) values_.push_back(py::reinterpret_borrow<py::object>(value));
}

void HeldDict::prefetch() const {
    const auto* const entries = reinterpret_cast<const char*>(reinterpret_cast<PyDictObject*>(dictionary_.ptr())->ma_keys);
    for (const int line : {0, 64, 128}) __builtin_prefetch(entries + line);
}

bool HeldDict::changed() const {
    if (PyDict_GET_SIZE(dictionary_.ptr()) != static_cast<Py_ssize_t>(values_.size())) return true;
    Py_ssize_t next = 0;
    PyObject* value = nullptr;
    for (const py::object& before : values_) {
        if (!PyDict_Next(dictionary_.ptr(), &next, nullptr, &value) || value != before.ptr()) return true;
    }
    return false;
}

}  // namespace gptkern
