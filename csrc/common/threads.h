// The CPU part's threads: one pool for the process, started on first use.
#pragma once

namespace gptkern {

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
