// Warp operations: every lane of the mask brings a value, and the last to come answers for all.
#pragma once
#include <cstring>

#include "block.h"

namespace emulator {

enum Operation { kSync, kShuffle, kBallot };

constexpr uint64_t kUndefined = ~uint64_t(0);  // NaN in every type: what a lane reads from one outside the mask

template <class T>
uint64_t to_bits(T value) {
    static_assert(sizeof(T) <= sizeof(uint64_t));
    uint64_t bits = 0;
    std::memcpy(&bits, &value, sizeof value);
    return bits;
}

template <class T>
T from_bits(uint64_t bits) {
    T value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

inline bool has_lane(uint32_t mask, int lane) { return mask >> lane & 1; }

// `answer` fills warp.taken, for the lanes of the mask, once all have come. Lanes that meet must come from one line.
template <class Answer>
uint64_t meet(uint32_t mask, Operation operation, int line, uint64_t value, int source, Answer answer) {
    Thread* self = block.current;
    Warp& warp = block.warps[self->warp()];
    const int lane = self->lane();
    const int64_t what = int64_t(line) * 4 + operation;
    const auto refuse = [line](const char* reason) { fail(reason + (" (line " + std::to_string(line) + ")")); };
    if (!has_lane(mask, lane)) refuse("a lane is not in the mask of its own warp operation");
    if (mask & ~warp.alive) refuse("a warp operation waits for a lane that has ended or never was");
    Meeting* found = nullptr;
    for (Meeting& meeting : warp.meetings) {
        if (!meeting.arrived) continue;
        if (meeting.mask == mask && meeting.what == what)
            found = &meeting;
        else if (meeting.mask & mask)
            refuse("divergence: lanes of a warp meet in different operations");
    }
    for (Meeting& meeting : warp.meetings)
        if (!found && !meeting.arrived) found = &meeting;
    if (!found) found = &warp.meetings.emplace_back();
    found->mask = mask;
    found->what = what;
    found->arrived |= 1u << lane;
    found->waiting.push_back(self);
    found->given[lane] = value;
    found->source[lane] = source;
    if (found->arrived == mask) {
        answer(warp, *found);
        found->arrived = 0;
        make_ready(found->waiting);
    }
    run_next();
    return warp.taken[lane];
}

template <class T>
T shuffle(uint32_t mask, int line, T value, int source) {
    return from_bits<T>(meet(mask, kShuffle, line, to_bits(value), source, [](Warp& warp, Meeting& meeting) {
        for (int i = 0; i < kWarpSize; ++i) {
            if (!has_lane(meeting.mask, i)) continue;
            const int from = meeting.source[i];
            warp.taken[i] = has_lane(meeting.mask, from) ? meeting.given[from] : kUndefined;
        }
    }));
}

inline unsigned ballot(uint32_t mask, int line, bool vote) {
    return unsigned(meet(mask, kBallot, line, vote, 0, [](Warp& warp, Meeting& meeting) {
        uint64_t votes = 0;
        for (int i = 0; i < kWarpSize; ++i)
            if (has_lane(meeting.mask, i)) votes |= meeting.given[i] << i;
        for (int i = 0; i < kWarpSize; ++i)
            if (has_lane(meeting.mask, i)) warp.taken[i] = votes;
    }));
}

// Memory written by a lane of the mask is seen by the others from here on.
inline void warp_barrier(uint32_t mask, int line) {
    if (block.current->warp_barriers++ == skipped_warp_barrier) return;
    meet(mask, kSync, line, 0, 0, [](Warp& warp, Meeting& meeting) {
        ++warp.barriers;
        if (meeting.mask == warp.alive) {
            warp.whole = warp.barriers;
            return;
        }
        for (int i = 0; i < kWarpSize; ++i)
            for (int j = 0; j < kWarpSize; ++j)
                if (has_lane(meeting.mask, i) && has_lane(meeting.mask, j)) warp.common[i][j] = warp.barriers;
    });
}

}  // namespace emulator
