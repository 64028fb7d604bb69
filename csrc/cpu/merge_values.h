// Order statistics of magnitudes: those in memory, and those that stream past a bracket.
#pragma once
#include "simd.h"

namespace fastlora::FASTLORA_ISA {

constexpr int kBins = 1 << 12;

// Magnitudes that were collected; grows by doubling up to a bound. Zeros are an empty one.
template <class T>
struct Collected {
    T* data;
    int64_t count, size;

    // Room for `more` and a vector behind them, at first for `expected`; false beyond `most` or without memory.
    bool reserve(int64_t more, int64_t most, int64_t expected) {
        const int64_t needed = count + more + kLanes<T>;
        if (needed <= size) return true;
        if (count + more > most) return false;
        int64_t larger = size ? size : max_<int64_t>(expected, 4096);
        while (larger < needed) larger *= 2;
        T* grown = static_cast<T*>(realloc(data, size_t(larger) * sizeof(T)));
        if (!grown) return false;
        data = grown;
        size = larger;
        return true;
    }
};

// How magnitudes of a sample are distributed: bins of 1/256 of an octave from the largest down, the last for the rest.
template <class T>
class Distribution {
  public:
    using I = typename IntegerOf<T>::type;

    Distribution(const T* values, int64_t count, int32_t* bins) : bins_(bins) {
        I most = 0;
        for (int64_t j = 0; j < count; ++j) most = max_(most, __builtin_bit_cast(I, values[j]));
        base_ = max_<I>(most - (I(kCount - 1) << kShift), 0);
        for (int b = 0; b < kCount; ++b) bins_[b] = 0;
        for (int64_t j = 0; j < count; ++j) ++bins_[max_<I>(__builtin_bit_cast(I, values[j]) - base_, 0) >> kShift];
    }

    // The least magnitude of the bin of the rank-th largest, 0 of the last one; with `beyond` of the bin above.
    T edge(int64_t rank, bool beyond) const {
        int bin = kCount - 1;
        while (bin > 0 && rank > bins_[bin]) rank -= bins_[bin--];
        if (!bin && !beyond) return T(0);
        return __builtin_bit_cast(T, I(base_ + (I(bin + beyond) << kShift)));
    }

    static constexpr int kCount = 1 << 16;

  private:
    static constexpr int kShift = sizeof(T) == 4 ? 23 - 8 : 52 - 8;
    int32_t* bins_;
    I base_;
};

// Counts of magnitudes beyond a bracket, lane by lane.
template <class T>
struct Above {
    Mask<T> lanes{};

    int64_t sum() const {
        int64_t total = 0;
        for (int i = 0; i < kLanes<T>; ++i) total += int64_t(lanes[i]);
        return total;
    }
};

#if defined(__AVX2__) && !defined(__AVX512F__)
// For every set of lanes of 32 bits the order that brings them to the front.
struct ToFront {
    alignas(64) uint8_t order[256][8];
};
constexpr ToFront to_front() {
    ToFront table{};
    for (int set = 0; set < 256; ++set)
        for (int lane = 0, at = 0; lane < 8; ++lane)
            if (set >> lane & 1) table.order[set][at++] = uint8_t(lane);
    return table;
}
inline constexpr ToFront kToFront = to_front();
#endif

// Magnitudes of at least `high` are counted; those in [low, high) are put to `out`, which has room for a whole vector.
// Returns their number.
template <class T>
inline int bracket(Vec<T> size, T low, T high, T* out, Above<T>& above) {
#if defined(__AVX512F__)
    if constexpr (sizeof(T) == 4) {
        const __mmask16 beyond = _mm512_cmp_ps_mask((__m512)size, _mm512_set1_ps(high), _CMP_GE_OQ);
        const __mmask16 all = _mm512_cmp_ps_mask((__m512)size, _mm512_set1_ps(low), _CMP_GE_OQ);
        const unsigned within = unsigned(all) & ~unsigned(beyond);
        above.lanes =
            (Mask<T>)_mm512_mask_add_epi32((__m512i)above.lanes, beyond, (__m512i)above.lanes, _mm512_set1_epi32(1));
        _mm512_storeu_ps(out, _mm512_maskz_compress_ps(__mmask16(within), (__m512)size));
        return __builtin_popcount(within);
    } else {
        const __mmask8 beyond = _mm512_cmp_pd_mask((__m512d)size, _mm512_set1_pd(high), _CMP_GE_OQ);
        const __mmask8 all = _mm512_cmp_pd_mask((__m512d)size, _mm512_set1_pd(low), _CMP_GE_OQ);
        const unsigned within = unsigned(all) & ~unsigned(beyond);
        above.lanes =
            (Mask<T>)_mm512_mask_add_epi64((__m512i)above.lanes, beyond, (__m512i)above.lanes, _mm512_set1_epi64(1));
        _mm512_storeu_pd(out, _mm512_maskz_compress_pd(__mmask8(within), (__m512d)size));
        return __builtin_popcount(within);
    }
#else
    const Mask<T> beyond = (Mask<T>)(size >= high), inside = (Mask<T>)(size >= low) & ~beyond;
    above.lanes -= beyond;
#if defined(__AVX2__)
    if constexpr (sizeof(T) == 4) {
        const unsigned within = unsigned(_mm256_movemask_ps((__m256)inside));
        const __m128i order = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(kToFront.order[within]));
        _mm256_storeu_ps(out, _mm256_permutevar8x32_ps((__m256)size, _mm256_cvtepu8_epi32(order)));
        return __builtin_popcount(within);
    }
#endif
    int at = 0;
    for (int i = 0; i < kLanes<T>; ++i) {
        out[at] = size[i];
        at -= int(inside[i]);
    }
    return at;
#endif
}

// The rank-th largest (from 1 on) of magnitudes in some pieces, `left` of it among its equals, and how many these are.
template <class T>
struct Ranked {
    T value;
    int64_t left, equal;
};

// Each round counts values by where they lie in [low, high), and goes on with the bin of the rank. Values are moved to
// the front of their piece; 0 < rank <= their number.
template <class T>
inline Ranked<T> ranked(Collected<T>* pieces, int n, int64_t step, T low, T high, int64_t rank) {
    using I = typename IntegerOf<T>::type;
    I least = __builtin_bit_cast(I, low), most = __builtin_bit_cast(I, high) - 1;
    for (;;) {
        int shift = 0;
        while (((most - least) >> shift) >= kBins) ++shift;
        int32_t bins[kBins] = {};
        for (int p = 0; p < n; ++p) {
            const Collected<T>& piece = pieces[p * step];
            for (int64_t j = 0; j < piece.count; ++j) ++bins[(__builtin_bit_cast(I, piece.data[j]) - least) >> shift];
        }
        int bin = kBins - 1;
        while (rank > bins[bin]) rank -= bins[bin--];
        const I first = least + (I(bin) << shift);
        if (!shift) return {__builtin_bit_cast(T, first), rank, bins[bin]};
        const I last = min_<I>(most, first + ((I(1) << shift) - 1));
        const T from = __builtin_bit_cast(T, first), to = __builtin_bit_cast(T, I(last + 1));
        for (int p = 0; p < n; ++p) {
            Collected<T>& piece = pieces[p * step];
            if (!piece.count) continue;
            for (int b = 0; b < kLanes<T>; ++b) piece.data[piece.count + b] = T(-1);  // in no bin
            T* out = piece.data;
            Above<T> above;
            for (int64_t j = 0; j < piece.count; j += kLanes<T>)
                out += bracket<T>(load<T>(piece.data + j), from, to, out, above);
            piece.count = out - piece.data;
        }
        least = first;
        most = last;
    }
}

}  // namespace fastlora::FASTLORA_ISA
