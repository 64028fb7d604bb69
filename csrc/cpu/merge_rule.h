// The rule on one group of trimmed elements: votes, elected signs, the sum of those that agree, its divisor.
// Several vectors of a row go through all adapters at once, so that the numbers of an adapter are spread over lanes
// once for them.
#pragma once
#include "merge_elements.h"

namespace fastlora::FASTLORA_ISA {

struct Tally {
    int64_t undecided = 0, majority = 0;
};

// The numbers of a rule in T; limits [k] are those of the present group.
template <class T>
struct RuleNumbers {
    const T *limits, *votes, *gains, *shares;
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

template <class T>
inline Vec<T> kept_of(const T* x, T limit) {
    const Vec<T> value = load<T>(x);
    return abs<T>(value) >= limit ? value : Vec<T>{};
}

template <class T>
inline int64_t sum_mask(Mask<T> mask) {
    int64_t sum = 0;
    for (int i = 0; i < kLanes<T>; ++i) sum -= int64_t(mask[i]);
    return sum;
}

// out[0 .. kAcross vectors) of one row; x + i * step are the elements of adapter i.
template <class T, ElectKind kElect, bool kShares, bool kTally>
inline void merge_vectors(const RuleNumbers<T>& rule, const T* x, int64_t step, T* out, Tally& tally) {
    constexpr int lanes = kLanes<T>;
    Vec<T> flip[kAcross];  // the sign bit where the elected sign is minus
    [[maybe_unused]] Mask<T> tied[kAcross];
    if constexpr (kElect != kElectNone) {
        Vec<T> sum[kAcross]{};
        for (int64_t i = 0; i < rule.k; ++i)
#pragma GCC unroll 4
            for (int v = 0; v < kAcross; ++v) {
                const Vec<T> kept = kept_of(x + i * step + v * lanes, rule.limits[i]);
                if constexpr (kElect == kElectTotal) {
                    sum[v] += kept * rule.votes[i];
                } else {
                    const Vec<T> vote = kept * rule.votes[i], one = splat<T>(1);
                    sum[v] += (vote > T(0) ? one : Vec<T>{}) - (vote < T(0) ? one : Vec<T>{});
                }
            }
#pragma GCC unroll 4
        for (int v = 0; v < kAcross; ++v) {
            const Mask<T> minus = rule.zero_is_minus ? Mask<T>(sum[v] <= T(0)) : Mask<T>(sum[v] < T(0));
            flip[v] = minus ? sign_bits<T>() : Vec<T>{};
            if constexpr (kTally) {
                tied[v] = Mask<T>(sum[v] == T(0));
                tally.majority += sum_mask<T>(Mask<T>(sum[v] > T(0))) - sum_mask<T>(Mask<T>(sum[v] < T(0)));
            }
        }
    }
    Vec<T> total[kAcross]{}, divisor[kAcross]{};
    [[maybe_unused]] Vec<T> largest[kAcross]{};
    for (int64_t i = 0; i < rule.k; ++i)
#pragma GCC unroll 4
        for (int v = 0; v < kAcross; ++v) {
            const Vec<T> kept = kept_of(x + i * step + v * lanes, rule.limits[i]);
            if constexpr (kElect == kElectNone) {
                total[v] += kept * rule.gains[i];
            } else {
                const Vec<T> vote = xor_bits<T>(kept * rule.votes[i], flip[v]);
                total[v] += vote > T(0) ? kept * rule.gains[i] : Vec<T>{};
                if constexpr (kShares) divisor[v] += vote > T(0) ? splat<T>(rule.shares[i]) : Vec<T>{};
                if constexpr (kTally) largest[v] = max<T>(largest[v], vote);
            }
        }
#pragma GCC unroll 4
    for (int v = 0; v < kAcross; ++v) {
        if constexpr (kTally) tally.undecided += sum_mask<T>(Mask<T>(tied[v] & Mask<T>(largest[v] > T(0))));
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
    for (int at = 0; at < rows * panel; at += kAcross * kLanes<T>)
        merge_vectors<T, kElect, kShares, kTally>(rule, x + at, step, out + at, tally);
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
