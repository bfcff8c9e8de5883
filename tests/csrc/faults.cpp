// Fails the n-th allocation, and the n-th start of a thread, of a call in turn: the call throws, nothing of it
// stays behind, and the next call's result is right.
#include <dlfcn.h>
#include <pthread.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <new>
#include <system_error>
#include <vector>

#include "sampling/cpu_path.h"

namespace {

// Calls of each kind that are still to succeed; negative: all of them.
int starts_left = -1, allocations_left = -1;

bool fails(int& left) {
    if (left < 0) return false;
    return left-- == 0;
}

template <class Function>
Function* next(const char* name) {
    return reinterpret_cast<Function*>(dlsym(RTLD_NEXT, name));
}

}  // namespace

extern "C" int pthread_create(pthread_t* thread, const pthread_attr_t* attributes, void* (*start)(void*), void* argument) {
    if (fails(starts_left)) return EAGAIN;
    return next<decltype(pthread_create)>("pthread_create")(thread, attributes, start, argument);
}

extern "C" void* aligned_alloc(size_t alignment, size_t bytes) {
    if (fails(allocations_left)) return nullptr;
    return next<decltype(aligned_alloc)>("aligned_alloc")(alignment, bytes);
}

void* operator new(size_t bytes) {
    if (fails(allocations_left)) throw std::bad_alloc();
    void* const memory = std::malloc(bytes);
    if (memory == nullptr) throw std::bad_alloc();
    return memory;
}
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, size_t) noexcept { std::free(memory); }

namespace gptkern {
namespace {

[[noreturn]] void fail(const char* what, int n) {
    std::printf("fault %d: %s\n", n, what);
    std::exit(1);
}

// Greedy; the most likely token is 100.
int64_t sampled(int vocab, int threads) {
    std::vector<float> logits(vocab);
    for (int i = 0; i < vocab; ++i) logits[i] = static_cast<float>(i % 101);
    const RowParams params{0, 0, 1, 0, 1, 0, 0, 1, 0, 0, 0, 0};
    RowCounter counter{5, 6, 7};
    int64_t token = -1;
    int32_t status = -1;
    SampleArguments a{};
    a.logits = logits.data();
    a.batch = a.positions = 1;
    a.vocab = vocab;
    a.params = &params;
    a.counters = &counter;
    a.logprobs = -1;
    a.tokens = &token;
    a.status = &status;
    portable::cpu_path().sample(a, threads);
    return token;
}

// Every call needs more memory and more threads than all before it; true: it threw.
bool faulty_call(int& left, int n) {
    static int vocab = 300000, threads = 1;
    vocab += 1000;
    threads += n + 2;
    bool threw = false;
    left = n;
    try {
        if (sampled(vocab, threads) != 100) fail("a wrong token", n);
    } catch (const std::bad_alloc&) {
        threw = true;
    } catch (const std::system_error&) {
        threw = true;
    }
    const bool reached = left < 0;
    left = -1;
    if (reached != threw) fail(reached ? "not reported" : "reported, but there was none", n);
    if (sampled(vocab, threads) != 100) fail("a wrong token from the call after it", n);
    return threw;
}

}  // namespace
}  // namespace gptkern

int main() {
    alarm(60);  // a call that waits for ever
    for (int n = 0; n < 3; ++n) {
        if (!gptkern::faulty_call(starts_left, n)) gptkern::fail("no thread was started", n);
    }
    for (int n = 0; n < 3; ++n) {
        if (!gptkern::faulty_call(allocations_left, n)) gptkern::fail("nothing was allocated", n);
    }
    std::printf("survived\n");
    return 0;
}
