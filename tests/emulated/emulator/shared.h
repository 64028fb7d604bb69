// Shared memory of the block in flight: poisoned with NaN before it starts, between guards that must stay as they are.
#pragma once
#include <cstring>
#include <map>

#include "races.h"

namespace emulator {

constexpr unsigned char kPoison = 0xff;  // NaN in float and double, -1 in integers
constexpr size_t kGuardBytes = 256;

// Part of the arena; a guard follows, and the one of the array before, or of the arena's start, precedes.
struct SharedArray {
    unsigned char* data = nullptr;
    size_t bytes = 0;
};

inline SharedArray dynamic_array;
inline std::map<const void*, SharedArray> static_arrays;  // by declaration, of the kernel in flight
inline size_t arena_used = 0;
inline size_t shared_limit = 227 * 1024;  // of one block; tests lower it

inline SharedArray take_shared(size_t bytes) {
    const SharedArray array{arena + arena_used, bytes};
    arena_used += (bytes + kGuardBytes - 1) / kGuardBytes * kGuardBytes + kGuardBytes;
    if (arena_used > kArenaBytes) fail("too much shared memory");
    return array;
}

inline void start_shared(size_t dynamic_bytes) {
    static_arrays.clear();
    arena_used = kGuardBytes;
    dynamic_array = take_shared(dynamic_bytes);
}

template <class T>
Traced<T> static_shared(size_t count, const void* declaration) {
    SharedArray& array = static_arrays[declaration];
    if (!array.data) array = take_shared(count * sizeof(T));
    return reinterpret_cast<T*>(array.data);
}

template <class T>
Traced<T> dynamic_shared() {
    return reinterpret_cast<T*>(dynamic_array.data);
}

inline size_t shared_bytes() {
    size_t bytes = dynamic_array.bytes;
    for (const auto& [declaration, array] : static_arrays) bytes += array.bytes;
    return bytes;
}

inline void poison_shared() { std::memset(arena, kPoison, kArenaBytes); }

inline bool guard_after(const SharedArray& array) {
    const unsigned char* guard = array.data + array.bytes;
    return std::all_of(guard, guard + kGuardBytes, [](unsigned char c) { return c == kPoison; });
}

inline bool shared_guarded() {
    bool intact = guard_after(dynamic_array) && guard_after({arena, 0});
    for (const auto& [declaration, array] : static_arrays) intact &= guard_after(array);
    return intact;
}

}  // namespace emulator
