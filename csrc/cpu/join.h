// The end of a parallel region of short work.
#pragma once
#include <omp.h>

#include "simd.h"

namespace fastlora::FASTLORA_ISA {

// Where threads sleep while they wait (OMP_WAIT_POLICY=passive), waking one takes as long as hundreds of small
// matrices. Work is handed out in small pieces, so the others are about to be done: the first thread looks out for them
// for tens of microseconds before it sleeps. Every thread of a team calls leave() once, after its share of a loop
// without barrier.
class Join {
  public:
    void leave() {
        __atomic_add_fetch(&left_, 1, __ATOMIC_RELEASE);
        if (omp_get_thread_num() != 0) return;
        const int threads = omp_get_num_threads();
        for (int i = 0; i < kLooks && __atomic_load_n(&left_, __ATOMIC_ACQUIRE) < threads; ++i) relax();
    }

  private:
    static constexpr int kLooks = 1000;

    static void relax() {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#endif
    }

    int left_ = 0;
};

}  // namespace fastlora::FASTLORA_ISA
