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

constexpr int kCallPolls = 50'000;  // polls between calls, some 1.5 ms of them: what Python does between two passes

// Where the threads of a team run. Of two that wake each other the system leaves both on one core, where each sleeps
// while the other works: a prompt of 32 took 21 ms, not 12.
class Places {
public:
    // The caller's, and whether all of the team have room for a core each.
    void begin(bool room) {
        room_ = room;
        core_[0] = sched_getcpu();
    }

    // Moves this thread, if one of the ``thread`` before it has its core, to one that none of them has.
    void part(int thread) {
        if (!room_) return;
        core_[thread] = sched_getcpu();
        if (!taken(core_[thread], thread)) return;
        cpu_set_t allowed, one;
        if (pthread_getaffinity_np(pthread_self(), sizeof(allowed), &allowed) != 0) return;
        for (int core = 0; core < CPU_SETSIZE; ++core) {
            if (!CPU_ISSET(core, &allowed) || taken(core, thread)) continue;
            CPU_ZERO(&one);
            CPU_SET(core, &one);
            // It moves at once, and may be moved again.
            if (pthread_setaffinity_np(pthread_self(), sizeof(one), &one) == 0) {
                pthread_setaffinity_np(pthread_self(), sizeof(allowed), &allowed);
            }
            core_[thread] = sched_getcpu();
            return;
        }
    }

private:
    bool taken(int core, int threads) const {
        for (int i = 0; i < threads; ++i) {
            if (core_[i] == core) return true;
        }
        return false;
    }

    std::atomic<int> core_[kMostThreads] = {};
    std::atomic<bool> room_{false};
};

thread_local Places* places = nullptr;  // of the pool whose thread this is
thread_local int place = 0;

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
            const bool room = n <= cores();
            polls_ = room ? kCallPolls : 0;
            places_.begin(room);
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
        places = &places_;
        place = index;
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
            places_.part(index);
            work(context, index);
            lock.lock();
            if (--pending_ == 0) done_.notify_one();
        }
    }

    Places places_;
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

void sleep_while(const std::atomic<int>& value, int now) {
    syscall(SYS_futex, &value, FUTEX_WAIT_PRIVATE, now, nullptr, nullptr, 0);
    if (places != nullptr) places->part(place);
}

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
