// The CPU part's threads: one pool for the process, started on first use.
#pragma once

namespace gptkern {

// Held during a call, which has the pool and the working memory to itself; other callers wait.
class Call {
public:
    Call();
    ~Call();
    Call(const Call&) = delete;
    Call& operator=(const Call&) = delete;
};

// What a thread does: it throws nothing, as nobody could catch it while the others go on.
using Work = void(void* context, int index) noexcept;

// Runs work(context, 0) .. work(context, n - 1) at once on n threads, the caller's included, and waits
// for them. All n run together, so that they may wait for each other. A Call must be held.
// Throws std::system_error or std::bad_alloc, having run nothing, where a thread cannot be started.
void run_together(int n, Work* work, void* context);

}  // namespace gptkern
