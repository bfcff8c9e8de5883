// The CPU part's threads: one pool for the process, started on first use.
#pragma once

#include <atomic>

namespace gptkern {

constexpr int kMostThreads = 1024;  // of a team

// Polls within a call before a thread sleeps, some 30 us of them. Who polls uses up its share of a core that others want
// too, and then waits for theirs: with 1.5 ms and a busy neighbour a token took 70 ms, not 4.
constexpr int kPolls = 1'000;

// What a thread does between two polls.
void relax();

// Sleeps until ``wake_all`` is called while ``value`` is another than ``now``; it may wake sooner. A thread of the pool
// that wakes where another of the team runs moves to a core that none has.
void sleep_while(const std::atomic<int>& value, int now);
void wake_all(const std::atomic<int>& value);

// The lock of the pool and of the working memory. A call holds it to its end; other callers wait.
class PoolLock {
public:
    PoolLock();
    ~PoolLock();
    PoolLock(const PoolLock&) = delete;
    PoolLock& operator=(const PoolLock&) = delete;
};

// The work of one thread. It must not throw: nobody could catch the exception while the others go on.
using Work = void(void* context, int index) noexcept;

// Runs work(context, 0) .. work(context, n - 1) at once on n threads, the caller's included, and waits
// for them. All n run together, so they may wait for each other. The caller must hold a PoolLock.
// Throws std::system_error or std::bad_alloc, having run nothing, if a thread cannot be started.
void run_together(int n, Work* work, void* context);

}  // namespace gptkern
