// Work on several threads. Results never depend on how many there are.
#pragma once
#include "fastlora/threads.h"
#include "simd.h"

namespace fastlora::FASTLORA_ISA {

// f(thread, threads) on every thread of a team of at most `threads`; a call may get fewer, and knows how many.
template <class F>
void on_team(int threads, const F& f) {
    if (threads < 2) return f(0, 1);
    run_team(
        threads, [](void* context, int thread, int n) { (*static_cast<const F*>(context))(thread, n); },
        const_cast<F*>(&f));
}

// The items [0, n), handed out in pieces to whichever thread asks first.
class Queue {
  public:
    explicit Queue(int64_t n, int64_t piece = 1) : n_(n), piece_(piece) {}

    // f(item) for as long as there are some.
    template <class F>
    void take(const F& f) {
        for (;;) {
            const int64_t first = __atomic_fetch_add(&next_, piece_, __ATOMIC_RELAXED);
            if (first >= n_) return;
            for (int64_t i = first; i < min_(first + piece_, n_); ++i) f(i);
        }
    }

  private:
    int64_t n_, piece_, next_ = 0;
};

// f(item) for the items [0, n), a stretch of them a thread.
template <class F>
void for_stretches(int threads, int64_t n, const F& f) {
    on_team(int(min_<int64_t>(threads, n)), [&](int thread, int of) {
        for (int64_t i = n * thread / of; i < n * (thread + 1) / of; ++i) f(i);
    });
}

// What several threads may set, and one reads when they are done.
template <class T>
void set_shared(T& shared, T value) {
    __atomic_store_n(&shared, value, __ATOMIC_RELAXED);
}

}  // namespace fastlora::FASTLORA_ISA
