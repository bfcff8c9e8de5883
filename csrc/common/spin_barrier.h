// A barrier between threads that all run: they poll, as a phase of the work is shorter than a sleep.
#pragma once

#include <sched.h>

#include <atomic>

#include "common/platform.h"

namespace gptkern {
inline namespace GPTKERN_ISA {

struct alignas(64) SpinBarrier {
    std::atomic<int> arrived{0}, phase{0};
    int threads = 1;

    GPTKERN_HD void wait() {
        if (threads == 1) return;
        const int now = phase.load(std::memory_order_relaxed);
        if (arrived.fetch_add(1, std::memory_order_acq_rel) == threads - 1) {
            arrived.store(0, std::memory_order_relaxed);
            phase.store(now + 1, std::memory_order_release);
            return;
        }
        for (int spin = 0; phase.load(std::memory_order_acquire) == now; ++spin) {
            if (spin > 1000) sched_yield();  // there may be fewer cores than threads
        }
    }
};

}  // namespace GPTKERN_ISA
}  // namespace gptkern
