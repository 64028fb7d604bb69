// Finds accesses of two threads to one word, at least one of them a write, that no barrier orders: what a removed
// barrier leaves behind, in every schedule. Kernels reach shared memory, and global memory that threads of a launch
// exchange, through Traced pointers, which are plain pointers on a GPU.
#pragma once
#include <cstdio>
#include <unordered_map>

#include "block.h"

namespace emulator {

struct Access {
    int64_t block = -1;
    int thread = -1;
    uint32_t block_barriers = 0, warp_barriers = 0;
};

// Two readers of different threads are enough to find a racing write by a third in most cases, and by either of them
// in all.
struct Word {
    Access write, reads[2];
};

// Shared memory lies in one range, whose words start anew with every block; other words are those of one launch.
constexpr size_t kArenaBytes = 1 << 19;
alignas(256) inline unsigned char arena[kArenaBytes];
inline std::vector<Word> shared_words(kArenaBytes / 4);
inline std::unordered_map<uintptr_t, Word> global_words;

inline bool is_shared(const void* address) {
    const auto* byte = static_cast<const unsigned char*>(address);
    return byte >= arena && byte < arena + kArenaBytes;
}

inline bool ordered(const Access& before, const Access& now, bool shared) {
    if (before.block < 0 || (before.block == now.block && before.thread == now.thread)) return true;
    if (before.block != now.block) return shared;
    if (before.block_barriers != now.block_barriers) return true;
    if (before.thread / kWarpSize != now.thread / kWarpSize) return false;
    const Warp& warp = block.warps[now.thread / kWarpSize];
    const uint32_t common = warp.common[before.thread % kWarpSize][now.thread % kWarpSize];
    return std::max(warp.whole, common) > before.warp_barriers;
}

inline void race(const char* kind, const void* address, const Access& before, const Access& now) {
    char text[160];
    std::snprintf(text, sizeof text, "race: %s of %p by threads %d and %d without a barrier between them", kind,
                  address, before.thread, now.thread);
    fail(text);
}

inline void record(const void* address, bool writes) {
    const Thread* self = block.current;
    if (self == &block.host) return;
    const Access now{block.serial, self->number, block.barriers, block.warps[self->warp()].barriers};
    const bool shared = is_shared(address);
    const auto place = reinterpret_cast<uintptr_t>(address);
    Word& word = shared ? shared_words[(place - reinterpret_cast<uintptr_t>(arena)) / 4] : global_words[place];
    if (!ordered(word.write, now, shared)) race(writes ? "two writes" : "a write and a read", address, word.write, now);
    if (!writes) {
        if (word.reads[0].block != now.block || word.reads[0].thread != now.thread) word.reads[1] = word.reads[0];
        word.reads[0] = now;
        return;
    }
    for (const Access& read : word.reads)
        if (!ordered(read, now, shared)) race("a read and a write", address, read, now);
    word.write = now;
}

// One element behind a Traced pointer.
template <class T>
class Element {
  public:
    explicit Element(T* address) : address_(address) {}
    Element(const Element&) = default;
    operator T() const { return read(); }
    T operator=(T value) const {
        record(address_, true);
        return *address_ = value;
    }
    T operator=(const Element& other) const { return *this = other.read(); }
    T operator+=(T value) const { return *this = read() + value; }
    T operator-=(T value) const { return *this = read() - value; }
    T operator*=(T value) const { return *this = read() * value; }

  private:
    T read() const {
        record(address_, false);
        return *address_;
    }
    T* address_;
};

template <class T>
class Traced {
  public:
    Traced() = default;
    Traced(T* address) : address_(address) {}
    Element<T> operator[](int64_t i) const { return Element<T>(address_ + i); }
    Element<T> operator*() const { return Element<T>(address_); }
    Traced operator+(int64_t i) const { return address_ + i; }
    Traced operator-(int64_t i) const { return address_ - i; }
    T* address() const { return address_; }

  private:
    T* address_ = nullptr;
};

// Four neighbours at once: a GPU refuses other addresses.
template <class T>
void require_aligned(Traced<T> x) {
    if (reinterpret_cast<uintptr_t>(x.address()) % 16 != 0) fail("four values at an address that is not aligned");
}

template <class T>
void load_four(Traced<T> from, T (&to)[4]) {
    require_aligned(from);
    for (int i = 0; i < 4; ++i) to[i] = from[i];
}

template <class T>
void store_four(Traced<T> to, const T (&from)[4]) {
    require_aligned(to);
    for (int i = 0; i < 4; ++i) to[i] = from[i];
}

}  // namespace emulator
