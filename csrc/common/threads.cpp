#include "common/threads.h"

#include <pthread.h>

#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>

namespace gptkern {
namespace {

class Pool {
public:
    void run(int n, Work* work, void* context) {
        while (threads_ < n - 1) {
            // The count grows once the thread exists: the wait below is for every thread in the count.
            std::thread([this, index = threads_ + 1, seen = round_] { serve(index, seen); }).detach();
            ++threads_;
        }
        {
            const std::lock_guard<std::mutex> lock(mutex_);
            work_ = work;
            context_ = context;
            wanted_ = n;
            pending_ = n - 1;
            ++round_;
        }
        start_.notify_all();
        work(context, 0);
        std::unique_lock<std::mutex> lock(mutex_);
        done_.wait(lock, [this] { return pending_ == 0; });
    }

private:
    void serve(int index, uint64_t seen) {
        std::unique_lock<std::mutex> lock(mutex_);
        for (;;) {
            start_.wait(lock, [&] { return round_ != seen; });
            seen = round_;
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
    int threads_ = 0, wanted_ = 0, pending_ = 0;
    uint64_t round_ = 0;
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
