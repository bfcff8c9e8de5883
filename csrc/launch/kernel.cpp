#include "launch/kernel.h"

#include <algorithm>
#include <stdexcept>
#include <utility>

#include "launch/values.h"

namespace py = pybind11;

namespace gptkern {
namespace {

// A string with the memory of this thread's launch before: a launch allocates nothing. It is taken, not shared, as
// reading an argument may run Python, and with it another launch of the same thread, which then has its own.
struct Borrowed {
    Borrowed() : text(std::move(spare())) { text.clear(); }
    ~Borrowed() { spare() = std::move(text); }
    Borrowed(const Borrowed&) = delete;
    Borrowed& operator=(const Borrowed&) = delete;

    std::string text;

private:
    static std::string& spare() {
        thread_local std::string kept;
        return kept;
    }
};

}  // namespace

PackedKernel::PackedKernel(std::string name, std::vector<Parameter> parameters)
    : name_(std::move(name)), parameters_(std::move(parameters)) {
    if (parameters_.size() > kMost) throw py::value_error(name_ + " has too many parameters");
    for (size_t i = 0; i < parameters_.size(); ++i) {
        slots_[PyUnicode_InternFromString(parameters_[i].name.c_str())] = static_cast<int>(i);
    }
}

int PackedKernel::slot_of(PyObject* name) const {
    const auto found = slots_.find(name);
    if (found != slots_.end()) return found->second;
    const std::string text = py::str(py::handle(name));  // the same name in another object, or an unknown one
    for (size_t i = 0; i < parameters_.size(); ++i) {
        if (parameters_[i].name == text) return static_cast<int>(i);
    }
    throw py::type_error(name_ + " has no parameter " + text);
}

void PackedKernel::gather(Values& values, const py::tuple& args, const py::dict& kwargs) const {
    const size_t given = args.size();
    if (given > parameters_.size()) throw py::type_error(name_ + ": too many arguments");
    std::fill(values, values + parameters_.size(), nullptr);
    for (size_t i = 0; i < given; ++i) values[i] = PyTuple_GET_ITEM(args.ptr(), i);
    PyObject *name = nullptr, *value = nullptr;
    for (Py_ssize_t position = 0; PyDict_Next(kwargs.ptr(), &position, &name, &value);) {
        PyObject*& place = values[slot_of(name)];
        if (place != nullptr) throw py::type_error(name_ + ": given twice: " + std::string(py::str(py::handle(name))));
        place = value;
    }
    for (size_t i = 0; i < parameters_.size(); ++i) {
        if (values[i] == nullptr) values[i] = parameters_[i].otherwise.ptr();
        if (values[i] == nullptr) throw py::type_error(name_ + ": missing: " + parameters_[i].name);
    }
}

void PackedKernel::describe(const Values& values, std::string& key) const {
    for (size_t i = 0; i < parameters_.size(); ++i) {
        const Role role = parameters_[i].role;
        if (role == Role::kConstant) {
            append_constant(key, values[i]);
        } else {
            append_argument(key, values[i], role == Role::kSpecialised);
        }
    }
}

std::string PackedKernel::key(const py::tuple& args, const py::dict& kwargs) const {
    Values values;
    gather(values, args, kwargs);
    std::string key;
    describe(values, key);
    return key;
}

// The kernel's handle, and its attributes on this device.
void PackedKernel::prepare(Code& code, int device) const {
    const cuda::Driver& driver = cuda::driver();
    const std::string subject = name_ + " (" + code.needs + "): ";
    if (code.kernel == nullptr) {
        cuda::Library library = nullptr;
        const char* const image = PyBytes_AS_STRING(code.image.ptr());
        driver.check(driver.load(&library, image, nullptr, nullptr, 0, nullptr, nullptr, 0),
                     subject + "cuLibraryLoadData");
        driver.check(driver.find(&code.kernel, library, code.entry.c_str()), subject + "cuLibraryGetKernel");
    }
    constexpr unsigned kStaticShared = 48 << 10, kPortableCluster = 8;
    if (code.shared > kStaticShared) {
        driver.check(driver.set_attribute(cuda::kMaxDynamicShared, static_cast<int>(code.shared), code.kernel, device),
                     subject + "cuKernelSetAttribute");
    }
    if (code.blocks_per_cluster > kPortableCluster) {
        driver.check(driver.set_attribute(cuda::kNonPortableCluster, 1, code.kernel, device),
                     subject + "cuKernelSetAttribute");
    }
    code.prepared |= uint64_t{1} << device;
}

bool PackedKernel::launch(const unsigned (&grid)[3], const py::tuple& args, const py::dict& kwargs, int device,
                          cuda::Stream stream) {
    Values values;
    gather(values, args, kwargs);
    Borrowed key;
    describe(values, key.text);
    const auto found = codes_.find(key.text);
    if (found == codes_.end()) return false;
    Code& code = found->second;
    if (device < 0 || device >= 64) throw py::value_error(name_ + ": no GPU has the number " + std::to_string(device));
    if ((code.prepared >> device & 1) == 0) prepare(code, device);
    Arguments arguments;
    for (const Passed& passed : code.passed) arguments.push(passed, code, values[passed.slot]);
    for (int i = 0; i < code.scratch; ++i) arguments.push_null();

    cuda::Attribute attributes[4];
    unsigned count = 0;
    const auto attribute = [&](cuda::Attribute::Id id) -> auto& {
        attributes[count] = {};
        attributes[count].id = id;
        return attributes[count++].value;
    };
    if (code.dependent) attribute(cuda::Attribute::kDependent).number = 1;
    if (code.cooperative) attribute(cuda::Attribute::kCooperative).number = 1;
    if (code.blocks_per_cluster > 1) {
        auto& cluster = attribute(cuda::Attribute::kCluster).cluster;
        cluster[0] = code.blocks_per_cluster;
        cluster[1] = cluster[2] = 1;
        attribute(cuda::Attribute::kClusterPolicy).number = cuda::kSpread;
    }
    const cuda::Config config = {{grid[0] * code.blocks_per_cluster, grid[1], grid[2]},
                                 {code.threads, 1, 1},
                                 code.shared,
                                 stream,
                                 attributes,
                                 count};
    const cuda::Kernel kernel = code.kernel;
    const cuda::Driver& driver = cuda::driver();
    cuda::Result result = 0;
    {
        const py::gil_scoped_release released;  // a full queue makes the driver wait
        result = driver.launch(&config, kernel, arguments.starts(), nullptr);
    }
    if (result != 0) driver.check(result, name_ + ": cuLaunchKernelEx");
    return true;
}

}  // namespace gptkern
