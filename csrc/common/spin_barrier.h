// A barrier between threads that all run. A thread polls first, as a phase of the work is mostly shorter than a sleep.
// It sleeps if another one is late: that one may be waiting for this very core, and a yield would give the core to any
// other process for a whole slice of its time.
#pragma once

#include <atomic>

#include "common/platform.h"
#include "common/threads.h"

namespace gptkern {
inline namespace GPTKERN_ISA {

struct alignas(64) SpinBarrier {
    std::atomic<int> arrived{0}, phase{0}, asleep{0};
    int threads = 1;

    GPTKERN_HD void wait() {
        if (threads == 1) return;
        const int now = phase.load(std::memory_order_relaxed);
        if (arrived.fetch_add(1, std::memory_order_acq_rel) == threads - 1) {
            arrived.store(0, std::memory_order_relaxed);
            // In one order with what a sleeper does: either it sees the new phase, or it is seen.
            phase.store(now + 1, std::memory_order_seq_cst);
            if (asleep.load(std::memory_order_seq_cst) > 0) wake_all(phase);
            return;
        }
        for (int polls = 0; phase.load(std::memory_order_acquire) == now; ++polls) {
            if (polls < kPolls) {
                relax();
            } else {
                asleep.fetch_add(1, std::memory_order_seq_cst);
                sleep_while(phase, now);
                asleep.fetch_sub(1, std::memory_order_seq_cst);
            }
        }
    }
};

}  // namespace GPTKERN_ISA
}  // namespace gptkern
