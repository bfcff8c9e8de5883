// Loaded before the C library: makes the n-th call of one kind fail, once or from then on.
//
// gptkern_fault(kind, n, error, more) arms it: calls of that kind are counted from 0, the n-th fails with
// ``error`` (0: a write of half the bytes), and so do ``more`` of those after it. Of kind 0 it disarms. It
// returns how many calls were counted.
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdarg.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

#include <atomic>
#include <cstddef>

extern "C" void* __libc_malloc(size_t);
extern "C" void* __libc_calloc(size_t, size_t);
extern "C" void* __libc_realloc(void*, size_t);
extern "C" void* __libc_memalign(size_t, size_t);

namespace {

enum Kind { kNone, kWrite, kFlush, kRename, kOpen, kAllocate, kStart };

// Python's own small objects come from pools that it maps; below this size lies the interpreter's noise.
constexpr size_t kLeastBytes = 2048;

std::atomic<int> armed{kNone};
std::atomic<long> counted{0}, first{0}, last{0};
std::atomic<int> error_number{0};

bool fails(Kind kind) {
    if (armed.load(std::memory_order_relaxed) != kind) return false;
    const long number = counted++;
    if (number < first || number > last) return false;
    errno = error_number;
    return true;
}

template <class Function>
Function* next(Function*, const char* name) {
    return reinterpret_cast<Function*>(dlsym(RTLD_NEXT, name));
}

bool is_file(int descriptor) {
    struct stat found;
    return fstat(descriptor, &found) == 0 && S_ISREG(found.st_mode);
}

bool allocation_fails(size_t bytes) { return bytes >= kLeastBytes && fails(kAllocate); }

}  // namespace

#define NEXT(name) next(name, #name)

extern "C" {

long gptkern_fault(int kind, long n, int error, long more) {
    armed = kNone;
    const long before = counted;
    if (kind == kNone) return before;
    counted = 0;
    first = n;
    last = n + more;
    error_number = error;
    armed = kind;
    return before;
}

ssize_t write(int descriptor, const void* data, size_t bytes) {
    if (armed == kWrite && is_file(descriptor) && fails(kWrite)) {
        if (error_number != 0) return -1;
        bytes = bytes > 1 ? bytes / 2 : bytes;
    }
    return NEXT(write)(descriptor, data, bytes);
}

int fsync(int descriptor) { return fails(kFlush) ? -1 : NEXT(fsync)(descriptor); }

int rename(const char* from, const char* to) { return fails(kRename) ? -1 : NEXT(rename)(from, to); }

int mkdir(const char* path, mode_t mode) { return fails(kOpen) ? -1 : NEXT(mkdir)(path, mode); }

int open64(const char* path, int flags, ...) {
    va_list more;
    va_start(more, flags);
    const int mode = va_arg(more, int);
    va_end(more);
    if (fails(kOpen)) return -1;
    return reinterpret_cast<int (*)(const char*, int, int)>(dlsym(RTLD_NEXT, "open64"))(path, flags, mode);
}

int open(const char* path, int flags, ...) {
    va_list more;
    va_start(more, flags);
    const int mode = va_arg(more, int);
    va_end(more);
    if (fails(kOpen)) return -1;
    return reinterpret_cast<int (*)(const char*, int, int)>(dlsym(RTLD_NEXT, "open"))(path, flags, mode);
}

void* malloc(size_t bytes) { return allocation_fails(bytes) ? nullptr : __libc_malloc(bytes); }

void* calloc(size_t count, size_t bytes) {
    return allocation_fails(count * bytes) ? nullptr : __libc_calloc(count, bytes);
}

void* realloc(void* memory, size_t bytes) {
    return allocation_fails(bytes) ? nullptr : __libc_realloc(memory, bytes);
}

void* memalign(size_t alignment, size_t bytes) {
    return allocation_fails(bytes) ? nullptr : __libc_memalign(alignment, bytes);
}

void* aligned_alloc(size_t alignment, size_t bytes) { return memalign(alignment, bytes); }

int posix_memalign(void** memory, size_t alignment, size_t bytes) {
    if (allocation_fails(bytes)) return ENOMEM;
    void* const found = __libc_memalign(alignment, bytes);
    if (found == nullptr) return ENOMEM;
    *memory = found;
    return 0;
}

int pthread_create(pthread_t* thread, const pthread_attr_t* attributes, void* (*begin)(void*), void* argument) {
    if (fails(kStart)) return EAGAIN;
    return NEXT(pthread_create)(thread, attributes, begin, argument);
}

}  // extern "C"
