// The rule on one group of trimmed elements: votes, elected signs, the sum of those that agree, its divisor.
// Several vectors of a row go through all adapters at once, so that the numbers of an adapter are spread over lanes
// once for them.
#pragma once
#include "merge_elements.h"

namespace fastlora::FASTLORA_ISA {

struct Tally {
    int64_t undecided = 0, majority = 0;
};

// A tally of one group, lane by lane.
template <class T>
struct TallyLanes {
    Mask<T> undecided{}, majority{};

    void add_to(Tally& tally) const {
        for (int i = 0; i < kLanes<T>; ++i) tally.undecided += undecided[i], tally.majority += majority[i];
    }
};

// The numbers of a rule in T; kept is what is above bounds [k] of the present group, in magnitude.
template <class T>
struct RuleNumbers {
    const T *bounds, *votes, *gains, *shares;
    T least, instead, scale;
    bool zero_is_minus;
    int64_t k;
};

constexpr int kAcross = kVectorBytes == 64 ? 4 : 2;  // vectors

template <class T>
inline Vec<T> sign_bits() {
    return splat<T>(T(-0.0));
}

template <class T>
inline Vec<T> xor_bits(Vec<T> a, Vec<T> b) {
    return (Vec<T>)((Mask<T>)a ^ (Mask<T>)b);
}

// Above it is what is at least `limit`, but never a zero: those agree with nobody.
template <class T>
inline T bound_below(T limit) {
    using I = typename IntegerOf<T>::type;
    return limit > T(0) ? __builtin_bit_cast(T, I(__builtin_bit_cast(I, limit) - 1)) : T(0);
}

// out[0 .. kAcross vectors) of one row; x + i * step are the elements of adapter i.
template <class T, ElectKind kElect, bool kShares, bool kTally>
inline void merge_vectors(const RuleNumbers<T>& rule, const T* x, int64_t step, T* out, TallyLanes<T>& tally) {
    constexpr int lanes = kLanes<T>;
    Vec<T> flip[kAcross];  // the sign bit where the elected sign is minus
    [[maybe_unused]] Mask<T> tied[kAcross];
    [[maybe_unused]] Vec<T> largest[kAcross]{};
    if constexpr (kElect != kElectNone) {
        Vec<T> sum[kAcross]{};
        for (int64_t i = 0; i < rule.k; ++i)
#pragma GCC unroll 4
            for (int v = 0; v < kAcross; ++v) {
                const Vec<T> value = load<T>(x + i * step + v * lanes);
                const Vec<T> kept = abs<T>(value) > rule.bounds[i] ? value : Vec<T>{};
                if constexpr (kElect == kElectTotal) {
                    sum[v] += kept * rule.votes[i];
                } else {
                    const Vec<T> vote = kept * rule.votes[i], one = splat<T>(1);
                    sum[v] += (vote > T(0) ? one : Vec<T>{}) - (vote < T(0) ? one : Vec<T>{});
                }
                if constexpr (kTally) largest[v] = max<T>(largest[v], abs<T>(kept * rule.votes[i]));
            }
#pragma GCC unroll 4
        for (int v = 0; v < kAcross; ++v) {
            const Mask<T> minus = rule.zero_is_minus ? Mask<T>(sum[v] <= T(0)) : Mask<T>(sum[v] < T(0));
            flip[v] = minus ? sign_bits<T>() : Vec<T>{};
            if constexpr (kTally) {
                tied[v] = Mask<T>(sum[v] == T(0));
                tally.majority += Mask<T>(sum[v] < T(0)) - Mask<T>(sum[v] > T(0));
            }
        }
    }
    Vec<T> total[kAcross]{}, divisor[kAcross]{};
    for (int64_t i = 0; i < rule.k; ++i) {
        const T bound = kElect != kElectNone && rule.votes[i] == T(0) ? T(__builtin_nan("")) : rule.bounds[i];
        const Vec<T> against = kElect != kElectNone && rule.votes[i] < T(0) ? sign_bits<T>() : Vec<T>{};
#pragma GCC unroll 4
        for (int v = 0; v < kAcross; ++v) {
            const Vec<T> value = load<T>(x + i * step + v * lanes);
            // Kept, and of the elected sign: one comparison where the sign is turned to plus.
            const Vec<T> size =
                kElect == kElectNone ? abs<T>(value) : xor_bits<T>(value, xor_bits<T>(flip[v], against));
            const Mask<T> agrees = (Mask<T>)(size > bound);
            total[v] += agrees ? value * rule.gains[i] : Vec<T>{};
            if constexpr (kElect != kElectNone && kShares) divisor[v] += agrees ? splat<T>(rule.shares[i]) : Vec<T>{};
        }
    }
#pragma GCC unroll 4
    for (int v = 0; v < kAcross; ++v) {
        if constexpr (kTally) tally.undecided -= tied[v] & Mask<T>(largest[v] > T(0));
        if constexpr (kShares)
            total[v] = total[v] / (abs<T>(divisor[v]) < rule.least ? splat<T>(rule.instead) : divisor[v]);
        store<T>(out + v * lanes, total[v] * rule.scale);
    }
}

// A divisor without an election is the same everywhere: the caller has it in `scale`.
template <class T, ElectKind kElect, bool kShares, bool kTally>
__attribute__((noinline)) void merge_group(const RuleNumbers<T>& rule, const T* x, int panel, int rows, T* out,
                                           Tally& tally) {
    const int64_t step = int64_t(kGroup) * panel;
    TallyLanes<T> lanes;
    for (int at = 0; at < rows * panel; at += kAcross * kLanes<T>)
        merge_vectors<T, kElect, kShares, kTally>(rule, x + at, step, out + at, lanes);
    if constexpr (kTally) lanes.add_to(tally);
}

template <class T>
using MergeGroup = void (*)(const RuleNumbers<T>&, const T*, int, int, T*, Tally&);

template <class T, ElectKind kElect>
inline MergeGroup<T> chosen_merge(bool shares, bool tally) {
    if (shares) return tally ? merge_group<T, kElect, true, true> : merge_group<T, kElect, true, false>;
    return tally ? merge_group<T, kElect, false, true> : merge_group<T, kElect, false, false>;
}

template <class T>
inline MergeGroup<T> chosen_merge(int64_t elect, bool shares, bool tally) {
    if (elect == kElectTotal) return chosen_merge<T, kElectTotal>(shares, tally);
    if (elect == kElectFrequency) return chosen_merge<T, kElectFrequency>(shares, tally);
    return merge_group<T, kElectNone, false, false>;
}

}  // namespace fastlora::FASTLORA_ISA
