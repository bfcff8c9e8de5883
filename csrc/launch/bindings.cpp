#include "launch/bindings.h"

#include <pybind11/stl.h>

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "launch/kernel.h"
#include "launch/values.h"

namespace py = pybind11;

namespace gptkern {
namespace {

// Python's table of Form's names, as in a pack.
constexpr std::pair<const char*, Form> kForms[] = {{"pointer", Form::kPointer}, {"i8", Form::kInt8},
                                                   {"i32", Form::kInt32},       {"i64", Form::kInt64},
                                                   {"f32", Form::kFloat32},     {"map", Form::kTensorMap}};

Form form_of(const std::string& name) {
    for (const auto& [known, form] : kForms) {
        if (name == known) return form;
    }
    throw py::value_error("a pack passes an argument as " + name + ", which this version does not know");
}

Code code_of(const py::bytes& image, const py::dict& facts) {
    Code code{};
    code.image = image;
    code.entry = facts["entry"].cast<std::string>();
    code.needs = facts["needs"].cast<std::string>();
    for (const py::handle map : facts["maps"]) {
        code.maps.push_back({map["swizzle"].cast<int>(), map["element_bytes"].cast<int>(),
                             map["element_type"].cast<int>(), map["box"].cast<std::vector<uint32_t>>()});
    }
    int maps = 0;
    for (const py::handle item : facts["passed"]) {
        const auto [slot, name] = item.cast<std::pair<int, std::string>>();
        const Form form = form_of(name);
        code.passed.push_back({slot, form, form == Form::kTensorMap ? maps++ : 0});
    }
    if (maps != static_cast<int>(code.maps.size())) throw py::value_error("a pack's kernel has maps that none takes");
    code.threads = facts["threads"].cast<unsigned>();
    code.shared = facts["shared"].cast<unsigned>();
    code.blocks_per_cluster = facts["blocks_per_cluster"].cast<unsigned>();
    code.dependent = facts["dependent"].cast<bool>();
    code.cooperative = facts["cooperative"].cast<bool>();
    code.scratch = facts["scratch"].cast<int>();
    return code;
}

std::vector<Parameter> parameters_of(const py::list& described) {
    std::vector<Parameter> parameters;
    for (const py::handle item : described) {
        const py::tuple fields = py::reinterpret_borrow<py::tuple>(item);
        py::object otherwise = fields.size() > 2 ? py::object(fields[2]) : py::object();
        parameters.push_back({fields[0].cast<std::string>(), static_cast<Role>(fields[1].cast<int>()), otherwise});
    }
    return parameters;
}

// Finds the machine code of a call by its kernel and GPU.
class Launcher {
public:
    Launcher(py::object resolve, py::object current_stream)
        : resolve_(std::move(resolve)), current_stream_(std::move(current_stream)) {}

    bool launch(py::object kernel, const py::tuple& grid, const py::tuple& args, const py::dict& kwargs) {
        const int device = device_of(args);
        if (device < 0) return false;
        PackedKernel* const found = find(kernel, device);
        if (found == nullptr) return false;
        const auto stream = current_stream_(device).cast<uintptr_t>();
        return launch_on(*found, grid, args, kwargs, device, stream);
    }

    static bool launch_on(PackedKernel& kernel, const py::tuple& grid, const py::tuple& args, const py::dict& kwargs,
                          int device, uintptr_t stream) {
        unsigned sizes[3] = {1, 1, 1};
        if (grid.size() > 3) throw py::value_error("a grid has at most three dimensions");
        for (size_t i = 0; i < grid.size(); ++i) sizes[i] = grid[i].cast<unsigned>();
        return kernel.launch(sizes, args, kwargs, device, reinterpret_cast<cuda::Stream>(stream));
    }

private:
    PackedKernel* find(const py::object& kernel, int device) {
        const auto place = std::make_pair(kernel.ptr(), device);
        auto found = kernels_.find(place);
        if (found == kernels_.end()) {
            py::object resolved = resolve_(kernel, device);
            kernels_held_.push_back(kernel);  // its address stays its own
            found = kernels_.emplace(place, std::move(resolved)).first;
        }
        return found->second.is_none() ? nullptr : found->second.cast<PackedKernel*>();
    }

    py::object resolve_, current_stream_;
    std::map<std::pair<PyObject*, int>, py::object> kernels_;
    std::vector<py::object> kernels_held_;
};

}  // namespace

void bind_launcher(py::module_& module) {
    py::class_<PackedKernel>(module, "PackedKernel")
        .def(py::init([](const std::string& name, const py::list& parameters) {
            return std::make_unique<PackedKernel>(name, parameters_of(parameters));
        }))
        .def("key", [](const PackedKernel& kernel, const py::tuple& args,
                       const py::dict& kwargs) { return py::bytes(kernel.key(args, kwargs)); })
        .def("add", [](PackedKernel& kernel, const std::string& key, const py::bytes& image,
                       const py::dict& facts) { kernel.add(key, code_of(image, facts)); })
        .def("launch", &Launcher::launch_on);
    py::class_<Launcher>(module, "Launcher").def(py::init<py::object, py::object>()).def("launch", &Launcher::launch);
}

}  // namespace gptkern
