// Streams as queues of work that is done when somebody waits for it, in the order of each stream and of its events.
// REHEARSAL_AT_ONCE=default does the default stream's work at once, before that of other streams; =others theirs.
#pragma once
#include <dlfcn.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <deque>
#include <functional>
#include <map>
#include <mutex>
#include <string_view>
#include <utility>

struct CUstream_st;
using Stream = CUstream_st*;

// A place in a stream; the place 0 is before all work.
struct Event {
    Stream stream = nullptr;
    long place = 0;
    std::chrono::steady_clock::time_point at;
};

namespace queues {

struct Queue {
    std::deque<std::function<void()>> work;
    long added = 0, done = 0;
};

inline std::recursive_mutex lock;
inline std::map<Stream, Queue> all;

inline bool is_at_once(Stream stream) {
    static const char* const named = std::getenv("REHEARSAL_AT_ONCE");
    return named && std::string_view(named) == (stream == nullptr ? "default" : "others");
}

// Holds the lock, and never waits for it while holding Python's own: work may be a call of Python.
class Holding {
  public:
    Holding() {
        if (lock.try_lock()) return;
        static const auto has = reinterpret_cast<int (*)()>(dlsym(RTLD_DEFAULT, "PyGILState_Check"));
        static const auto leave = reinterpret_cast<void* (*)()>(dlsym(RTLD_DEFAULT, "PyEval_SaveThread"));
        static const auto enter = reinterpret_cast<void (*)(void*)>(dlsym(RTLD_DEFAULT, "PyEval_RestoreThread"));
        void* const thread = has && has() ? leave() : nullptr;
        lock.lock();
        if (thread) enter(thread);
    }
    ~Holding() { lock.unlock(); }
    Holding(const Holding&) = delete;
};

inline void do_until(Stream stream, long place) {
    Queue& own = all[stream];
    while (own.done < place && !own.work.empty()) {
        const auto next = std::move(own.work.front());
        own.work.pop_front();
        next();
        own.done++;
    }
}

inline void add(Stream stream, std::function<void()> work) {
    all[stream].work.push_back(std::move(work));
    all[stream].added++;
    if (is_at_once(stream)) do_until(stream, all[stream].added);
}

}  // namespace queues

inline void enqueue(Stream stream, std::function<void()> work) {
    queues::Holding holding;
    queues::add(stream, std::move(work));
}

inline void do_all_of(Stream stream) {
    queues::Holding holding;
    queues::do_until(stream, queues::all[stream].added);
}

inline void do_everything() {
    queues::Holding holding;
    for (auto& [stream, own] : queues::all) queues::do_until(stream, own.added);
}

inline void record(Event& event, Stream stream) {
    queues::Holding holding;
    event.stream = stream;
    event.place = queues::all[stream].added + 1;
    queues::add(stream, [&event] { event.at = std::chrono::steady_clock::now(); });
}

inline void wait_for(Stream stream, const Event& event) {
    queues::Holding holding;
    queues::add(stream, [from = event.stream, place = event.place] { queues::do_until(from, place); });
}

inline void do_until(const Event& event) {
    queues::Holding holding;
    queues::do_until(event.stream, event.place);
}

inline bool is_done(Stream stream) {
    queues::Holding holding;
    return queues::all[stream].work.empty();
}

inline bool is_done(const Event& event) {
    queues::Holding holding;
    return queues::all[event.stream].done >= event.place;
}
