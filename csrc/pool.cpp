// One pool per process. A job is announced under a mutex; a worker that comes takes a seat, and one that comes after
// the last index was handed out finds the job closed: nobody waits for a thread that is slow to wake.
#include "pool.h"

#include <pthread.h>

#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <memory>
#include <mutex>

#if defined(__GLIBC__) && defined(__x86_64__)
// glibc 2.34 gave this function a new version when it moved between libraries. It did not change, so the module asks
// for the old one and loads on older systems too.
__asm__(".symver pthread_create, pthread_create@GLIBC_2.2.5");
#elif defined(__GLIBC__) && defined(__aarch64__)
__asm__(".symver pthread_create, pthread_create@GLIBC_2.17");
#endif

namespace linocut {
namespace {

using std::size_t;

constexpr int kSpins = 2000;  // some 20-50 microseconds: kernels of one network follow each other faster than that

inline void relax() {
#if defined(__x86_64__) || defined(_M_X64)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

thread_local bool inside = false;  // a call from within a job runs alone: the pool is busy with that job

class Pool {
public:
    void run(size_t threads, size_t count, Work work, void* context) {
        const std::lock_guard<std::mutex> one_job_at_a_time(serving_);
        start(threads - 1);
        {
            const std::lock_guard<std::mutex> lock(mutex_);
            work_ = work, context_ = context, count_ = count, seats_ = threads, taken_ = 1;
            next_.store(0, std::memory_order_relaxed);
            open_ = true;
            announced_.fetch_add(1, std::memory_order_release);
        }
        wake_.notify_all();
        take(work, context, count, 0);
        std::unique_lock<std::mutex> lock(mutex_);
        open_ = false;
        if (busy_ == 0) return;
        lock.unlock();
        for (int spin = 0; spin < kSpins && busy_hint_.load(std::memory_order_acquire) != 0; ++spin) relax();
        lock.lock();
        done_.wait(lock, [this] { return busy_ == 0; });
    }

private:
    void take(Work work, void* context, size_t count, size_t seat) {
        inside = true;
        for (size_t i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < count;) work(context, i, seat);
        inside = false;
    }

    void serve() {
        size_t seen = 0;
        for (;;) {
            for (int spin = 0; spin < kSpins && announced_.load(std::memory_order_acquire) == seen; ++spin) relax();
            std::unique_lock<std::mutex> lock(mutex_);
            wake_.wait(lock, [&] { return announced_.load(std::memory_order_relaxed) != seen; });
            seen = announced_.load(std::memory_order_relaxed);
            if (!open_ || taken_ == seats_) continue;
            const size_t seat = taken_++;
            const Work work = work_;
            void* const context = context_;
            const size_t count = count_;
            busy_hint_.store(++busy_, std::memory_order_relaxed);
            lock.unlock();
            take(work, context, count, seat);
            lock.lock();
            busy_hint_.store(--busy_, std::memory_order_release);
            if (busy_ == 0) done_.notify_one();
        }
    }

    // Makes sure of `wanted` workers. A system that refuses a thread gets the work done with fewer.
    void start(size_t wanted) {
        pthread_attr_t detached;
        if (started_ >= wanted || pthread_attr_init(&detached) != 0) return;
        pthread_attr_setdetachstate(&detached, PTHREAD_CREATE_DETACHED);
        for (; started_ < wanted; ++started_) {
            pthread_t thread;
            const auto body = [](void* pool) -> void* { static_cast<Pool*>(pool)->serve(); return nullptr; };
            if (pthread_create(&thread, &detached, body, this) != 0) break;
        }
        pthread_attr_destroy(&detached);
    }

    std::mutex serving_, mutex_;
    std::condition_variable wake_, done_;
    size_t started_ = 0;
    std::atomic<size_t> announced_{0}, next_{0}, busy_hint_{0};
    // Guarded by mutex_: the job, and who is at it.
    Work work_ = nullptr;
    void* context_ = nullptr;
    size_t count_ = 0, seats_ = 0, taken_ = 0, busy_ = 0;
    bool open_ = false;
};

// Never destroyed: at exit its threads may still sleep on it. After a fork the child's copy has no threads and its
// mutexes may be held by nobody, so the child gets a new one.
Pool* pool = nullptr;

Pool& the_pool() {
    static const bool made = [] {
        pool = new Pool;
        pthread_atfork(nullptr, nullptr, [] { pool = new Pool; inside = false; });
        return true;
    }();
    (void)made;
    return *pool;
}

}  // namespace

void parallel(std::size_t threads, std::size_t count, Work work, void* context) {
    if (threads > count) threads = count;
    if (threads <= 1 || inside) {
        for (std::size_t i = 0; i < count; ++i) work(context, i, 0);
        return;
    }
    the_pool().run(threads, count, work, context);
}

void* scratch(std::size_t bytes) {
    struct Free {
        void operator()(void* memory) const { std::free(memory); }
    };
    thread_local std::unique_ptr<void, Free> memory;
    thread_local std::size_t size = 0;
    if (size < bytes) {
        const std::size_t rounded = (bytes + 4095) / 4096 * 4096;
        memory.reset(std::aligned_alloc(64, rounded));
        size = memory == nullptr ? 0 : rounded;
        if (size == 0) std::abort();  // a megabyte or two; there is nothing left to report with
    }
    return memory.get();
}

}  // namespace linocut
