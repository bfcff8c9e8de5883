#include "launch/driver.h"

#include <dlfcn.h>

#include <stdexcept>

namespace gptkern::cuda {
namespace {

constexpr const char* kFile = "libcuda.so.1";
constexpr const char* kNeeded = "kernels from a pack need NVIDIA's driver 525 (CUDA 12.0) or newer";

template <class Function>
void look_up(void* library, const char* name, Function*& function) {
    function = reinterpret_cast<Function*>(dlsym(library, name));
    if (function == nullptr) throw std::runtime_error(std::string(kFile) + " has no " + name + ": " + kNeeded);
}

Driver open() {
    void* const library = dlopen(kFile, RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) throw std::runtime_error(std::string(dlerror()) + ": " + kNeeded);
    Driver found{};
    look_up(library, "cuDriverGetVersion", found.version);
    look_up(library, "cuGetErrorName", found.error_name);
    look_up(library, "cuLibraryLoadData", found.load);
    look_up(library, "cuLibraryGetKernel", found.find);
    look_up(library, "cuKernelSetAttribute", found.set_attribute);
    look_up(library, "cuLaunchKernelEx", found.launch);
    look_up(library, "cuTensorMapEncodeTiled", found.encode);
    return found;
}

}  // namespace

void Driver::check(Result result, const std::string& attempt) const {
    if (result == 0) return;
    const char* name = nullptr;
    if (error_name(result, &name) != 0 || name == nullptr) name = "an unknown error";
    int number = 0;
    version(&number);
    throw std::runtime_error(attempt + ": " + name + " (the driver serves CUDA " + std::to_string(number / 1000) + "." +
                             std::to_string(number % 1000 / 10) + ")");
}

const Driver& driver() {
    static const Driver instance = open();
    return instance;
}

}  // namespace gptkern::cuda
