// Threads that stay awake for a moment after their work and then sleep. Waking one takes as long as hundreds of small
// matrices, and calls often follow one another closely; but a thread that went on looking out for work would take its
// processor from others. So it looks out for as long as the steps between two kernels of a small decomposition take,
// some times as long as waking it would, and lets others go first meanwhile.
#include "fastlora/threads.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <system_error>
#include <thread>

namespace fastlora {
namespace {

constexpr std::chrono::microseconds kAwake(300);
constexpr int kLooks = 16;  // between two looks at the clock
constexpr int kMost = 1024;

void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

// Whether `ready` came true while looking out for it.
template <class Ready>
bool look_out(Ready ready) {
    const auto end = std::chrono::steady_clock::now() + kAwake;
    do {
        for (int i = 0; i < kLooks; ++i) {
            if (ready()) return true;
            relax();
        }
        sched_yield();
    } while (std::chrono::steady_clock::now() < end);
    return ready();
}

class Team {
  public:
    void run(int threads, void (*work)(void*, int, int), void* context) {
        const std::unique_lock<std::mutex> mine(busy_, std::try_to_lock);
        if (mine) threads = 1 + hire((threads < kMost ? threads : kMost) - 1);
        if (!mine || threads < 2) return work(context, 0, 1);
        work_ = work;
        context_ = context;
        left_.store(threads - 1);
        order_.store(((order_.load() / kOrders) + 1) * kOrders + uint64_t(threads));
        if (asleep_.load() > 0) {
            {
                const std::lock_guard<std::mutex> lock(sleep_);
            }  // none is between looking and sleeping
            wake_.notify_all();
        }
        work(context, 0, threads);
        const auto all_done = [this] { return left_.load() == 0; };
        if (look_out(all_done)) return;
        std::unique_lock<std::mutex> lock(sleep_);
        caller_sleeps_.store(true);
        done_.wait(lock, all_done);
        caller_sleeps_.store(false);
    }

  private:
    static constexpr uint64_t kOrders = 1 << 16;  // an order is its number times this, plus its threads

    // Threads 1 to `wanted` exist, or as many as the system gives.
    int hire(int wanted) {
        try {
            for (; workers_ < wanted; ++workers_) std::thread(&Team::serve, this, workers_ + 1, order_.load()).detach();
        } catch (const std::system_error&) {
        }
        return wanted < workers_ ? wanted : workers_;
    }

    void serve(int thread, uint64_t seen) {
        sigset_t all;
        sigfillset(&all);
        pthread_sigmask(SIG_SETMASK, &all, nullptr);  // signals are for the program's own threads
        for (;;) {
            const auto is_new = [&] { return order_.load() != seen; };
            if (!look_out(is_new)) {
                std::unique_lock<std::mutex> lock(sleep_);
                asleep_.fetch_add(1);
                wake_.wait(lock, is_new);
                asleep_.fetch_sub(1);
            }
            // An order that this thread has a part in waits for it; others may be overtaken.
            seen = order_.load();
            const int threads = int(seen % kOrders);
            if (thread >= threads) continue;
            work_(context_, thread, threads);
            if (left_.fetch_sub(1) == 1 && caller_sleeps_.load()) {
                {
                    const std::lock_guard<std::mutex> lock(sleep_);
                }
                done_.notify_one();
            }
        }
    }

    std::mutex busy_;  // held while there is an order
    int workers_ = 0;
    void (*work_)(void*, int, int) = nullptr;
    void* context_ = nullptr;
    std::atomic<uint64_t> order_{0};
    std::atomic<int> left_{0};    // threads that are not done with the order
    std::atomic<int> asleep_{0};  // threads that wait for one
    std::atomic<bool> caller_sleeps_{false};
    std::mutex sleep_;
    std::condition_variable wake_, done_;
};

std::atomic<Team*> shared{nullptr};

// Never destroyed: its threads may be asleep in it when the process ends.
Team& team() {
    Team* found = shared.load();
    if (!found) {
        Team* made = new Team;
        if (shared.compare_exchange_strong(found, made)) return *made;
        delete made;
    }
    return *found;
}

// A child process has none of its parent's threads.
[[maybe_unused]] const int forgets = pthread_atfork(nullptr, nullptr, [] { shared.store(nullptr); });

}  // namespace

void run_team(int threads, void (*work)(void*, int, int), void* context) {
    if (threads < 2)
        work(context, 0, 1);
    else
        team().run(threads, work, context);
}

}  // namespace fastlora
