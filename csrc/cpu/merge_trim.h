// What is trimmed from a group of elements: x is set to 0 where it is not kept.
// Magnitudes are mostly left to the rule, which compares as it reads: kept is |x| >= limit. Of a cut (magnitude, order)
// the limit of a whole group is the magnitude, or the next larger number behind the last of equals that is kept. Only
// in the one row where these end, they are told apart here, one by one.
#pragma once
#include "merge_elements.h"
#include "philox.h"

namespace fastlora::FASTLORA_ISA {

// A group of rows within a panel.
struct Place {
    int64_t row, column, m;
    int rows, columns, panel;
    int64_t number(int a, int b) const { return (row + a) * m + column + b; }
};

// The limit of a cut for a group of rows; `ends`: some equals in it are kept and some are not, by their number.
template <class T>
inline T limit_of(const Place& place, T magnitude, int64_t order, bool& ends) {
    ends = order > place.row * place.m && order < (place.row + place.rows) * place.m;
    return order > place.row * place.m ? magnitude : next_above(magnitude);
}

// Kept is what the cut holds of magnitudes `of`; true where all that is left is to compare with the limit.
template <class T>
inline T trim_low(const Place& place, T magnitude, int64_t order, const T* of, T* x) {
    bool ends;
    const T limit = limit_of(place, magnitude, order, ends);
    if (ends)
        for (int a = 0; a < place.rows; ++a)
            for (int b = 0; b < place.columns; ++b)
                if (place.number(a, b) >= order && abs_(of[a * place.panel + b]) == magnitude)
                    x[a * place.panel + b] = 0;
    return limit;
}

// Kept is what the cut does not hold.
template <class T>
inline void trim_high(const Place& place, T magnitude, int64_t order, T* x) {
    bool ends;
    const T limit = limit_of(place, magnitude, order, ends);
    for (int a = 0; a < place.rows; ++a) {
        T* row = x + a * place.panel;
        for (int b = 0; b < place.panel; b += kLanes<T>) {
            const Vec<T> value = load<T>(row + b);
            if (!ends) {
                store<T>(row + b, abs<T>(value) >= limit ? Vec<T>{} : value);
                continue;
            }
            for (int j = b; j < min_(b + kLanes<T>, place.columns); ++j)
                if (abs_(row[j]) > magnitude || (abs_(row[j]) == magnitude && place.number(a, j) < order)) row[j] = 0;
        }
    }
}

template <class T>
inline void trim_random(const Place& place, uint64_t keep, uint64_t key, uint64_t module, T* x) {
    if (keep >> 32) return;
    const uint32_t bound = uint32_t(keep);
    const auto drop = [bound](T* row, const uint32_t* words, int count) {
        for (int j = 0; j < count; ++j) row[j] = words[j] < bound ? row[j] : T(0);
    };
    int a = 0;
    if (place.number(0, 0) % 4 == 0 && place.m % 4 == 0 && place.columns <= kPhiloxWords)
        for (; a + kPhiloxRuns <= place.rows; a += kPhiloxRuns) {  // a row is a run
            uint64_t firsts[kPhiloxRuns];
            uint32_t words[kPhiloxRuns * kPhiloxWords];
            for (int i = 0; i < kPhiloxRuns; ++i) firsts[i] = uint64_t(place.number(a + i, 0)) / 4;
            philox_runs<kPhiloxRuns>(firsts, key, module, words);
            for (int i = 0; i < kPhiloxRuns; ++i)
                drop(x + (a + i) * place.panel, words + i * kPhiloxWords, place.columns);
        }
    for (; a < place.rows; ++a)
        for_words(
            uint64_t(place.number(a, 0)), place.columns, key, module,
            [&](int64_t first, const uint32_t* words, int count) { drop(x + a * place.panel + first, words, count); });
}

// The lanes of x whose bit is set, the others zero.
template <class T>
inline Vec<T> keep_lanes(Vec<T> x, uint64_t bits) {
#if defined(__AVX512F__)
    if constexpr (sizeof(T) == 4)
        return (Vec<T>)_mm512_maskz_mov_ps(__mmask16(bits), (__m512)x);
    else
        return (Vec<T>)_mm512_maskz_mov_pd(__mmask8(bits), (__m512d)x);
#else
    using I = typename IntegerOf<T>::type;
    Mask<T> own;
    for (int b = 0; b < kLanes<T>; ++b) own[b] = I(1) << b;
    return ((Mask<T>{} + I(bits)) & own) == own ? x : Vec<T>{};
#endif
}

// `bits`: of the adapter, [n, ceil(m / 64)]. Panels are as wide as a word.
template <class T>
inline void trim_bits(const Place& place, const uint64_t* bits, T* x) {
    const int64_t stride = (place.m + 63) / 64;
    for (int a = 0; a < place.rows; ++a, x += place.panel) {
        uint64_t word = bits[(place.row + a) * stride + place.column / 64];
        for (int b = 0; b < place.panel; b += kLanes<T>, word >>= kLanes<T>)
            store<T>(x + b, keep_lanes<T>(load<T>(x + b), word));
    }
}
static_assert(kPanel == 64);

// Sum over adapters of (x - mean)^2 / k, into out.
template <class T>
inline void variances(const Elements<T>& elements, int64_t k, int rows, T* out) {
    const int panel = elements.panel();
    const T share = T(1) / T(k);
    for (int at = 0; at < rows * panel; at += kLanes<T>) {
        Vec<T> sum{}, squares{};
        for (int64_t i = 0; i < k; ++i) sum += load<T>(elements.x(i) + at);
        const Vec<T> mean = sum * share;
        for (int64_t i = 0; i < k; ++i) {
            const Vec<T> off = load<T>(elements.x(i) + at) - mean;
            squares += off * off;
        }
        store<T>(out + at, squares * share);
    }
}

}  // namespace fastlora::FASTLORA_ISA
