// Python values of a launch: what they mean for machine code, and their bytes as it reads them.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>

#include "launch/kernel.h"

namespace gptkern {

// The shape of an argument's description in a key is: a letter, and what follows it.
void append_constant(std::string& key, PyObject* value);
void append_argument(std::string& key, PyObject* value, bool specialise);

// The bytes of arguments, and where each begins: what cuLaunchKernelEx takes.
class Arguments {
public:
    void push(const Passed& passed, Code& code, PyObject* value);
    void push_null() { copy<uint64_t>(0); }
    void** starts() { return starts_; }

private:
    static constexpr int kMostBytes = 2048, kMost = 160;

    template <class Value>
    void copy(Value value) {
        *static_cast<Value*>(reserve(sizeof(Value), alignof(Value))) = value;
    }
    void* reserve(size_t bytes, size_t alignment);
    void push_map(Code& code, int map, PyObject* descriptor);

    alignas(64) char bytes_[kMostBytes];
    void* starts_[kMost];
    size_t used_ = 0;
    int count_ = 0;
};

// The GPU of the first tensor in ``args``, or -1.
int device_of(pybind11::tuple args);

}  // namespace gptkern
