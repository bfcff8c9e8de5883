// Tensors from Python, and the checks of a call's arguments. Nothing of torch is needed to build this: DLPack's
// protocol tells where a tensor's elements are, and its storage where they must end.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <initializer_list>
#include <string>
#include <utility>
#include <vector>

namespace gptkern {

// The dtypes that calls take; kOther is any other.
enum class Kind : int { kFloat32 = 0, kFloat16, kBFloat16, kFloat64, kInt64, kInt32, kInt8, kUInt8, kOther };

constexpr int64_t kAny = -1;  // in a shape: any size

struct Tensor {
    static constexpr int kMostDims = 5;

    char* data;
    Kind kind;
    int dims;
    int64_t shape[kMostDims], stride[kMostDims];
    int64_t bytes;  // from ``data`` to the end of the storage
    int device;     // the GPU's number, or -1 for the CPU
    pybind11::handle object;

    bool contiguous() const;
    // Whether every element lies in the storage.
    bool fits_storage() const;
};

template <class T>
struct KindOf;
template <>
struct KindOf<float> {
    static constexpr Kind value = Kind::kFloat32;
};
template <>
struct KindOf<double> {
    static constexpr Kind value = Kind::kFloat64;
};
template <>
struct KindOf<int64_t> {
    static constexpr Kind value = Kind::kInt64;
};
template <>
struct KindOf<int32_t> {
    static constexpr Kind value = Kind::kInt32;
};
template <>
struct KindOf<int8_t> {
    static constexpr Kind value = Kind::kInt8;
};
template <>
struct KindOf<uint8_t> {
    static constexpr Kind value = Kind::kUInt8;
};

// A tensor's memory and element type, in DLPack's code and width, with nothing checked.
struct Glance {
    char* data;
    uint8_t code, bits;
    int device;  // the GPU's number, or -1
};

// False if the object is no tensor that has memory. Raises ValueError for one with the negative bit.
bool glance(pybind11::handle object, Glance& seen);

// Writes a plain tensor's or parameter's dtype, device, alignment to 16 bytes, sizes and strides to ``out``; returns the
// end of what it wrote. Null for any other object, for a tensor without memory or with the negative bit, and if ``room``
// bytes do not suffice.
char* describe_tensor(PyObject* object, char* out, size_t room);

// The code and width of a dtype by PyTorch's name, "torch.float32" or "float32". Raises TypeError for any other.
Glance glance_of_dtype(const std::string& dtype);

// Checks the arguments of one call. An argument that does not fit raises TypeError or ValueError, which names the
// call, the argument, what came and what is needed. All tensors of a call must be on one device.
class Checker {
public:
    explicit Checker(const char* call) : call_(call) {}
    Checker(const Checker&) = delete;
    Checker& operator=(const Checker&) = delete;

    bool on_cuda() const { return device_ >= 0; }
    int device() const { return device_; }

    // A tensor of any strides on the call's device, which is that of the first tensor. Its storage holds all of it.
    Tensor tensor(const char* name, pybind11::handle object, int dims);

    // The elements of a contiguous tensor of dtype T and this shape.
    template <class T>
    T* dense(const char* name, pybind11::handle object, std::initializer_list<int64_t> shape) {
        return reinterpret_cast<T*>(dense(name, object, KindOf<T>::value, shape).data);
    }

    // As ``dense``; null for None.
    template <class T>
    T* dense_or_none(const char* name, pybind11::handle object, std::initializer_list<int64_t> shape) {
        return object.is_none() ? nullptr : dense<T>(name, object, shape);
    }

    Tensor dense(const char* name, pybind11::handle object, Kind kind, std::initializer_list<int64_t> shape);

    // An integer from ``low`` to ``high``.
    int number(const char* name, int64_t value, int64_t low, int64_t high) const;
    int number(const char* name, pybind11::handle value, int64_t low, int64_t high) const;

    // A Python object as a C++ value. Functions take objects and convert them here: if pybind11 itself fails to
    // convert an argument, its message prints them all, and PyTorch crashes on printing a tensor without memory.
    template <class T>
    T as(const char* name, pybind11::handle value) const {
        try {
            return value.cast<T>();
        } catch (const pybind11::cast_error&) {
            refuse_type(name, value);
        }
    }

    // Keeps an object alive until the call ends, whatever happens to the argument that it came from.
    pybind11::handle hold(pybind11::object object) {
        held_.push_back(std::move(object));
        return held_.back();
    }

    [[noreturn]] void refuse(const char* name, const Tensor& tensor, const std::string& needed) const;
    [[noreturn]] void refuse(const std::string& why) const;
    [[noreturn]] void refuse_type(const char* name, pybind11::handle value) const;
    [[noreturn]] void refuse_missing(const char* name, pybind11::handle value, const char* attribute) const;

private:
    Tensor read(const char* name, pybind11::handle object) const;

    const char* call_;
    std::vector<pybind11::object> held_;
    int device_ = kNoDevice;
    static constexpr int kNoDevice = -2;
};

// An argument that holds several, as attributes: a dataclass or a named tuple.
class Group {
public:
    Group(Checker& check, const char* name, pybind11::handle object) : check_(check), name_(name), object_(object) {}

    // The attribute, alive until the call ends, or a TypeError that names the argument.
    pybind11::handle get(const char* attribute) const;

private:
    Checker& check_;
    const char* name_;
    pybind11::handle object_;
};

const char* name_of(Kind kind);
std::string shape_of(const int64_t* sizes, int dims);

// A tensor whose memory is read after the call: the tensor, its layout, and an alias that keeps the memory alive if
// the tensor gets another. (Resizing the storage frees the memory all the same, but then the address has changed.)
class HeldTensor {
public:
    explicit HeldTensor(pybind11::handle tensor);

    // Asks for the memory that ``moved`` reads, so that many can be waited for at once.
    void prefetch() const;
    bool moved() const;
    // PyTorch's count of writes in place; of a tensor made in inference mode, which has none, -1.
    int64_t version() const;

private:
    static constexpr int kMostDims = 2;
    pybind11::object tensor_, alias_;
    const void* data_;
    const char *record_, *storage_;  // where PyTorch keeps the sizes, next to them the rest, and the storage's address
    uint8_t code_;
    int32_t dims_;
    int64_t shape_[kMostDims], stride_[kMostDims];
};

// A module's dictionary of parameters, buffers or modules, to see whether entries were replaced.
class HeldDict {
public:
    explicit HeldDict(pybind11::dict dictionary);

    // As ``HeldTensor::prefetch``.
    void prefetch() const;
    bool changed() const;

private:
    pybind11::dict dictionary_;
    std::vector<pybind11::object> values_;
};

}  // namespace gptkern
