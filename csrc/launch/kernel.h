// One Triton kernel's machine code, by what it was compiled for.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <functional>
#include <string>
#include <string_view>
#include <type_traits>
#include <unordered_map>
#include <vector>

#include "launch/driver.h"

namespace gptkern {

// The way in which a parameter's value decides on the machine code.
enum class Role : int {
    kSpecialised = 0,  // its type; for an integer whether it is 1 or 16 divides it, for a pointer whether 16 does
    kTyped,            // its type alone
    kConstant,         // its value: a tl.constexpr, or an option of the launch
};

struct Parameter {
    std::string name;
    Role role;
    pybind11::object otherwise;  // the value where a call has none; null if it must have one
};

// The form in which a value is passed to the machine code.
enum class Form : int { kPointer = 0, kInt8, kInt32, kInt64, kFloat32, kTensorMap };

// A tensor map: a tile of a matrix, copied by the copy engine. A box's sizes have the innermost dimension last.
struct MapLayout {
    int swizzle, element_bytes, element_type;
    std::vector<uint32_t> box;
};

// All that a tensor map is encoded from but its layout: where the matrix lies, its sizes, its steps in elements.
struct MapSource {
    static constexpr int kMostDims = 5;

    void* address;
    int64_t map, rank;  // the layout's position
    int64_t shape[kMostDims], steps[kMostDims];  // the innermost dimension is first, as in CUDA

    bool operator==(const MapSource& other) const { return bytes() == other.bytes(); }
    std::string_view bytes() const { return {reinterpret_cast<const char*>(this), sizeof *this}; }
};
static_assert(std::has_unique_object_representations_v<MapSource>);

struct MapSourceHash {
    size_t operator()(const MapSource& source) const { return std::hash<std::string_view>{}(source.bytes()); }
};

struct Passed {
    int slot;  // the parameter's position
    Form form;
    int map;  // of kTensorMap: its layout's position
};

struct Code {
    pybind11::bytes image;
    std::string entry, needs;  // what a driver must serve, for people
    std::vector<Passed> passed;
    std::vector<MapLayout> maps;
    unsigned threads, shared, blocks_per_cluster;
    bool dependent, cooperative;
    int scratch;  // pointers to scratch memory after the parameters; all are null

    cuda::Kernel kernel = nullptr;
    uint64_t prepared = 0;  // a bit for each device
    // Maps of the matrices of launches before. They are found by all that is in them, so that none is ever stale.
    std::unordered_map<MapSource, cuda::TensorMap, MapSourceHash> encoded;
};

class PackedKernel {
public:
    PackedKernel(std::string name, std::vector<Parameter> parameters);

    // The bytes that hold everything on which the machine code of this call depends.
    std::string key(const pybind11::tuple& args, const pybind11::dict& kwargs) const;

    void add(std::string key, Code code) { codes_.insert_or_assign(std::move(key), std::move(code)); }

    // False if no machine code has the call's key.
    bool launch(const unsigned (&grid)[3], const pybind11::tuple& args, const pybind11::dict& kwargs, int device,
                cuda::Stream stream);

private:
    static constexpr int kMost = 160;  // parameters and options

    // The values of a call in the order of the parameters. They are the call's own and not the kernel's: reading
    // one may run Python, and with it another thread's launch of the same kernel.
    using Values = PyObject* [kMost];

    void gather(Values& values, const pybind11::tuple& args, const pybind11::dict& kwargs) const;
    int slot_of(PyObject* name) const;
    void prepare(Code& code, int device) const;
    void describe(const Values& values, std::string& key) const;

    std::string name_;
    std::vector<Parameter> parameters_;
    std::unordered_map<PyObject*, int> slots_;  // by interned name
    std::unordered_map<std::string, Code> codes_;
};

}  // namespace gptkern
