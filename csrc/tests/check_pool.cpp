// The thread pool: each index once, from several callers at a time, within a job, and in a child process.
#include <sys/wait.h>

#include <atomic>
#include <chrono>
#include <thread>
#include <vector>

#include "../pool.h"
#include "check.h"

namespace linocut {
namespace {

// Sums what a job was given, and says whether seats and indices were right. With `slow`, the pool's own threads are
// slower than the caller, who has to wait for them.
bool run_job(std::size_t threads, std::size_t count, bool slow = false) {
    std::vector<std::atomic<int>> seen(count);
    std::vector<std::size_t> by_seat(threads);  // not atomic: a seat belongs to one thread at a time
    std::atomic<bool> seats_right{true};
    parallel(threads, count, [&](std::size_t i, std::size_t seat) {
        if (slow && seat != 0) std::this_thread::sleep_for(std::chrono::microseconds(300));
        ++seen[i];
        if (seat < threads) ++by_seat[seat];
        else seats_right = false;
    });
    std::size_t total = 0;
    for (std::size_t each : by_seat) total += each;
    bool once = true;
    for (auto& each : seen) once = once && each == 1;
    return once && seats_right && total == count;
}

}  // namespace

void check_pool(const Plan& plan) {
    for (int round = 0; round < 200; ++round) {
        for (std::size_t threads : {1, 2, 4}) {
            if (!run_job(threads, std::size_t(round) % 37, round % 10 == 0)) {
                fail("the pool, %zu threads, job %d", threads, round);
            }
        }
    }
    std::atomic<int> wrong{0};
    std::vector<std::thread> callers;
    for (int caller = 0; caller < 3; ++caller) {
        callers.emplace_back([&] {
            for (int round = 0; round < 100; ++round) wrong += !run_job(3, 20);
        });
    }
    for (auto& each : callers) each.join();
    parallel(3, 8, [&](std::size_t, std::size_t) { wrong += !run_job(3, 10); });
    if (wrong != 0) fail("the pool gave %d wrong jobs to callers at once or within a job", wrong.load());
    if (plan.fork) {
        const pid_t child = fork();
        if (child == 0) _exit(run_job(3, 50) ? 0 : 1);
        int status = -1;
        if (child < 0 || waitpid(child, &status, 0) != child || status != 0) {
            fail("the pool in a child process: %d", status);
        }
    }
    std::printf("pool: every index once%s\n", plan.fork ? ", in a child process too" : "");
}

}  // namespace linocut
