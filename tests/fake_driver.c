/* A stand-in for libcuda.so.1: the entry points that gptkern._C takes, each handed to a function that a test sets.
   The structs are opaque here; the test reads them by cuda.h's layout. */
#include <stdint.h>
#include <string.h>

typedef int (*Launch)(const void* config, void* kernel, void** parameters);
typedef int (*Load)(const void* image);
typedef int (*Attribute)(int attribute, int value, void* kernel, int device);

static Launch on_launch;
static Load on_load;
static Attribute on_attribute;
static int version = 13000;
static int encoded;

void fake_set(Launch launch, Load load, Attribute attribute) {
    on_launch = launch;
    on_load = load;
    on_attribute = attribute;
}
void fake_version(int number) { version = number; }
int fake_encoded(void) { return encoded; }

int cuDriverGetVersion(int* number) {
    *number = version;
    return 0;
}
int cuGetErrorName(int result, const char** name) {
    *name = result == 209 ? "CUDA_ERROR_NO_BINARY_FOR_GPU" : "CUDA_ERROR_UNKNOWN";
    return 0;
}
int cuLibraryLoadData(void** library, const void* code, void* a, void* b, unsigned c, void* d, void* e, unsigned f) {
    (void)a, (void)b, (void)c, (void)d, (void)e, (void)f;
    *library = (void*)code;
    return on_load ? on_load(code) : 0;
}
int cuLibraryGetKernel(void** kernel, void* library, const char* name) {
    (void)name;
    *kernel = library; /* one kernel an image: its address says which */
    return 0;
}
int cuKernelSetAttribute(int attribute, int value, void* kernel, int device) {
    return on_attribute ? on_attribute(attribute, value, kernel, device) : 0;
}
int cuLaunchKernelEx(const void* config, void* kernel, void** parameters, void** extra) {
    (void)extra;
    return on_launch ? on_launch(config, kernel, parameters) : 0;
}
int cuTensorMapEncodeTiled(void* map, int type, uint32_t rank, void* address, const uint64_t* shape,
                           const uint64_t* strides, const uint32_t* box, const uint32_t* steps, int interleave,
                           int swizzle, int promotion, int fill) {
    /* What was asked, in the open: a test reads it back from the launch's parameter. */
    struct __attribute__((packed)) {
        uint64_t address, shape[5], strides[4];
        uint32_t box[5];
        uint8_t steps[5], type, rank, interleave, swizzle, promotion, fill;
    } told = {.address = (uint64_t)address, .type = type, .rank = rank, .interleave = interleave,
              .swizzle = swizzle, .promotion = promotion, .fill = fill};
    for (uint32_t i = 0; i < rank; ++i) {
        told.shape[i] = shape[i];
        told.box[i] = box[i];
        told.steps[i] = steps[i];
        if (i + 1 < rank) told.strides[i] = strides[i];
    }
    memcpy(map, &told, sizeof told);
    ++encoded;
    return 0;
}
