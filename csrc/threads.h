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

// Runs work(context, 0) .. work(context, n - 1) at once on n threads, the caller's included, and waits
// for them. All n run together, so that they may wait for each other. A Call must be held.
void run_together(int n, void (*work)(void*, int), void* context);

}  // namespace gptkern
