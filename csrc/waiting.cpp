// How OpenMP's threads wait for each other, changed while the process runs.
#include <condition_variable>
#include <mutex>
#include <thread>

#include "icl.h"
#include "native.h"

namespace icl {

namespace {

struct Crowd {
    std::mutex mutex;
    std::condition_variable changed;
    bool is_wanted = false;
};

}  // namespace

// libgomp lets a waiting thread spin 300,000 turns (GOMP_SPINCOUNT), but only some hundred when it manages more threads
// than there are processors. So that many are made, which sleep: one region of a thread of its own, whose team stays
// until that thread ends.
void sleep_at_barriers(bool sleep) {
#ifdef _OPENMP
    static Crowd& crowd = *new Crowd;  // for good: at exit the thread may still wait
    std::lock_guard<std::mutex> lock(crowd.mutex);
    if (crowd.is_wanted == sleep) return;
    crowd.is_wanted = sleep;
    crowd.changed.notify_all();
    if (!sleep) return;
    std::thread([] {
        omp_set_dynamic(0);
        int size = 0;
#pragma omp parallel num_threads(omp_get_num_procs() + 1) reduction(+ : size)
        size += 1;
        std::unique_lock<std::mutex> until(crowd.mutex);
        crowd.changed.wait(until, [] { return !crowd.is_wanted; });
    }).detach();
#else
    (void)sleep;  // there are no threads
#endif
}

}  // namespace icl
