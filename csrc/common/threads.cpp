#include "common/threads.h"

#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <climits>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>

namespace gptkern {

void relax() {
#ifdef GPTKERN_X86
    __builtin_ia32_pause();
#endif
}

void sleep_while(const std::atomic<int>& value, int now) {
    syscall(SYS_futex, &value, FUTEX_WAIT_PRIVATE, now, nullptr, nullptr, 0);
}

void wake_all(const std::atomic<int>& value) {
    syscall(SYS_futex, &value, FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
}

namespace {

static_assert(sizeof(std::atomic<int>) == 4);  // what the kernel compares

// The cores that the process may run on, 1 if nobody says.
int cores() {
    cpu_set_t set;
    return sched_getaffinity(0, sizeof(set), &set) == 0 ? CPU_COUNT(&set) : 1;
}

class Pool {
public:
    void run(int n, Work* work, void* context) {
        while (threads_ < n - 1) {
            // The count grows once the thread exists: the wait below is for every thread in the count.
            std::thread([this, index = threads_ + 1, seen = round_.load()] { serve(index, seen); }).detach();
            ++threads_;
        }
        {
            const std::lock_guard<std::mutex> lock(mutex_);
            work_ = work;
            context_ = context;
            wanted_ = n;
            pending_ = n - 1;
            // Who polls has a core that others of the team do not need.
            polls_ = n <= cores() ? kPolls : 0;
            ++round_;
        }
        start_.notify_all();
        work(context, 0);
        if (poll(polls_, [this] { return pending_ == 0; })) return;
        std::unique_lock<std::mutex> lock(mutex_);
        done_.wait(lock, [this] { return pending_ == 0; });
    }

private:
    template <class Ready>
    static bool poll(int polls, Ready ready) {
        for (int i = 0; i < polls; ++i) {
            if (ready()) return true;
            relax();
        }
        return false;
    }

    void serve(int index, uint64_t seen) {
        const auto called = [&] { return round_ != seen; };
        int polls = 0;
        std::unique_lock<std::mutex> lock(mutex_);
        for (;;) {
            lock.unlock();
            poll(polls, called);
            lock.lock();
            start_.wait(lock, called);
            seen = round_;
            polls = index < wanted_ ? polls_ : 0;
            if (index >= wanted_) continue;
            Work* const work = work_;
            void* const context = context_;
            lock.unlock();
            work(context, index);
            lock.lock();
            if (--pending_ == 0) done_.notify_one();
        }
    }

    std::mutex mutex_;
    std::condition_variable start_, done_;
    Work* work_ = nullptr;
    void* context_ = nullptr;
    int threads_ = 0, wanted_ = 0, polls_ = 0;
    std::atomic<int> pending_{0};
    std::atomic<uint64_t> round_{0};
};

// Threads do not survive a fork, so a child process starts its own pool. A pool is never freed: its threads
// may still wait in it while the process ends.
Pool* pool = nullptr;
std::mutex* const pool_mutex = new std::mutex;

[[maybe_unused]] const int registered = pthread_atfork([] { pool_mutex->lock(); }, [] { pool_mutex->unlock(); },
                                                       [] {
                                                           pool = nullptr;
                                                           pool_mutex->unlock();
                                                       });

}  // namespace

PoolLock::PoolLock() { pool_mutex->lock(); }
PoolLock::~PoolLock() { pool_mutex->unlock(); }

void run_together(int n, Work* work, void* context) {
    if (n <= 1) {
        work(context, 0);
        return;
    }
    if (pool == nullptr) pool = new Pool;
    pool->run(n, work, context);
}

}  // namespace gptkern
