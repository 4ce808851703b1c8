// The thread pool of the kernels. Threads are started when first needed and sleep between jobs (after a short spin).
// It is independent of torch's pool; a kernel call and a torch call never run at once within one thread, so the two do
// not compete except for the microseconds of a spin.
#pragma once

#include <cstddef>

namespace linocut {

using Work = void (*)(void* context, std::size_t index, std::size_t worker);

// Calls work(context, i, w) for every i in [0, count), each exactly once, on at most `threads` threads of which the
// caller is one; returns when all are done. w < threads names the thread, for scratch memory. Which thread takes which
// index is left to chance, so results may not depend on w. Calls from several threads are served one after the other;
// safe after fork (the child starts threads of its own). work must not throw.
void parallel(std::size_t threads, std::size_t count, Work work, void* context);

// The same for a callable f(index, worker).
template <class F>
void parallel(std::size_t threads, std::size_t count, const F& f) {
    const Work work = [](void* context, std::size_t i, std::size_t w) { (*static_cast<const F*>(context))(i, w); };
    parallel(threads, count, work, const_cast<F*>(&f));
}

// Memory of the calling thread, 64-byte aligned, for the task at hand: the next call may give the same bytes. It is
// kept, since fresh pages would cost more than many a task.
void* scratch(std::size_t bytes);

}  // namespace linocut
