// Eigenvectors of large matrices, one at a time: Householder reduction (large_householder.h), divide and conquer
// (large_divide.h), product with Q. The lanes hold entries of the one matrix, so a matrix costs nearly the same alone
// and in a batch.
#pragma once
#include "large_divide.h"
#include "large_householder.h"
#include "table.h"

namespace fastlora::FASTLORA_ISA {

// As many matrices as share a group of leaves.
template <class T>
constexpr int kLargeGroup = kLanes<T>;
template <class T>
inline int large_group(int n) {
    return max_(1, kLanes<T> / leaves(n));
}

template <class T>
struct LargeEighWork {
    int group;  // matrices that fit
    size_t ld;
    Reduced<T> reduced[kLargeGroup<T>];
    Spectrum<T> spectra[kLargeGroup<T>];
    HouseholderWork<T> reduction;
    DivideWork<T> division;

    void carve(Arena& arena, int n, int matrices) {
        group = matrices;
        ld = padded_row<T>(n);
        for (int m = 0; m < group; ++m) {
            reduced[m].carve(arena, n, ld);
            spectra[m] = {reduced[m].diagonal, reduced[m].off, arena.take<T>(n * ld), arena.take<int>(n), true};
        }
        reduction.carve(arena, n, ld);
        division.carve(arena, n, ld);
    }
};

// Copies the lower triangle of a to `to` [n, ld], the rest zero. Returns the largest magnitude, or NaN when there is
// a NaN or an infinity.
template <class T>
T copy_lower(const T* a, size_t a_ld, int n, T* to, size_t ld) {
    constexpr int lanes = kLanes<T>;
    Vec<T> largest{}, defects{};
    for (int i = 0; i < n; ++i) {
        T* row = to + i * ld;
        for (int j = 0; j < int(ld); j += lanes) {
            const Vec<T> x = j <= i ? load_first(a + i * a_ld + j, min_(lanes, i + 1 - j)) : Vec<T>{};
            largest = max<T>(abs<T>(x), largest);
            defects += x - x;
            store(row + j, x);
        }
    }
    return max_lane<T>(largest) + sum_lanes<T>(defects);
}

// The power of two that brings `largest` into [1/2, 1), as a product: it may overflow itself.
template <class T>
inline void choose_scale(T largest, T* scale, T* unscale) {
    int power = 0;
    if (largest > 0) __builtin_frexp(double(largest), &power);
    const int half = power / 2;
    scale[0] = T(__builtin_ldexp(1.0, -half)), unscale[0] = T(__builtin_ldexp(1.0, half));
    scale[1] = T(__builtin_ldexp(1.0, half - power)), unscale[1] = T(__builtin_ldexp(1.0, power - half));
}

// Whether the entry of largest magnitude (the first of equals) of a row is negative; zeros behind the n entries.
template <class T>
inline bool largest_is_negative(const T* row, int n) {
    Vec<T> largest{};
    for (int i = 0; i < n; i += kLanes<T>) largest = max<T>(largest, abs<T>(load(row + i)));
    const T top = max_lane<T>(largest);
    for (int i = 0; i < n; i += kLanes<T>) {
        const Vec<T> x = load(row + i);
        if (!any_mask((Mask<T>)(abs<T>(x) == top))) continue;
        for (int b = 0; b < kLanes<T>; ++b)
            if (abs_(x[b]) == top) return x[b] < 0;
    }
    return false;
}

// `count` matrices a [n, a_ld], at most as many as `w` has room for; the rest as in eigh.cpp.
template <class T>
void eigh_large(const T* a, size_t a_ld, T* values, T* vectors, int32_t* info, int count, int n, LargeEighWork<T>& w) {
    constexpr int lanes = kLanes<T>;
    T unscale[kLargeGroup<T>][2];
    int source[kLargeGroup<T>], finite = 0;
    for (int b = 0; b < count; ++b) {
        Reduced<T>& r = w.reduced[finite];
        const T largest = copy_lower(a + b * n * a_ld, a_ld, n, r.a, w.ld);
        if (!finite_(largest)) {
            fill_nan(values + size_t(b) * n, n);
            fill_nan(vectors + size_t(b) * n * n, size_t(n) * n);
            info[b] = kNonFinite;
            continue;
        }
        T scale[2];
        choose_scale(largest, scale, unscale[finite]);
        for (size_t i = 0; i < n * w.ld; i += lanes) store(r.a + i, load(r.a + i) * scale[0] * scale[1]);
        tridiagonalise<T>(r, n, w.ld, w.reduction);
        source[finite++] = b;
    }
    divide_and_conquer<T>(w.spectra, finite, n, w.ld, w.division);

    for (int m = 0; m < finite; ++m) {
        const Spectrum<T>& s = w.spectra[m];
        T* to = vectors + size_t(source[m]) * n * n;
        apply_q<T>(w.reduced[m], n, w.ld, w.reduction, s.vectors);
        for (int j = 0; j < n; ++j, to += n) {
            const int at = s.order[j];
            const T* from = s.vectors + at * w.ld;
            const Vec<T> sign = splat(largest_is_negative(from, n) ? T(-1) : T(1));
            values[size_t(source[m]) * n + j] = s.values[at] * unscale[m][0] * unscale[m][1] + T(0);
            for (int i = 0; i < n; i += lanes)
                store_first(to + i, load(from + i) * sign + Vec<T>{}, min_(lanes, n - i));
        }
        info[source[m]] = s.converged ? kOk : kNotConverged;
    }
}

}  // namespace fastlora::FASTLORA_ISA
