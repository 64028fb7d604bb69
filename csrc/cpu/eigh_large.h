// Eigenvectors of one matrix at a time: Householder reduction (householder.h), divide and conquer (divide.h),
// product with Q. The lanes hold entries of the one matrix, so a matrix costs the same alone and in a batch.
#pragma once
#include "divide.h"
#include "householder.h"
#include "solvers.h"

namespace fastlora::FASTLORA_ISA {

template <class T>
struct LargeEighWork {
    size_t ld;
    HouseholderWork<T> reduction;
    DivideWork<T> division;

    void carve(Arena& arena, int n) {
        ld = padded_row<T>(n);
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
    T result = 0;
    for (int b = 0; b < lanes; ++b) result = max_(result, largest[b]);
    return result + sum_lanes<T>(defects);
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
    T top = 0;
    for (int b = 0; b < kLanes<T>; ++b) top = max_(top, largest[b]);
    for (int i = 0; i < n; i += kLanes<T>) {
        const Vec<T> x = load(row + i);
        if (!any_mask((Mask<T>)(abs<T>(x) == top))) continue;
        for (int b = 0; b < kLanes<T>; ++b)
            if (abs_(x[b]) == top) return x[b] < 0;
    }
    return false;
}

// a [n, a_ld], the rest as in eigh.cpp. Returns an Info.
template <class T>
int32_t eigh_large(const T* a, size_t a_ld, T* values, T* vectors, int n, LargeEighWork<T>& w) {
    constexpr int lanes = kLanes<T>;
    HouseholderWork<T>& h = w.reduction;
    const T largest = copy_lower(a, a_ld, n, h.a, w.ld);
    if (!finite_(largest)) {
        fill_nan(values, n);
        fill_nan(vectors, size_t(n) * n);
        return kNonFinite;
    }
    T scale[2], unscale[2];
    choose_scale(largest, scale, unscale);
    for (size_t i = 0; i < n * w.ld; i += lanes) store(h.a + i, load(h.a + i) * scale[0] * scale[1]);

    tridiagonalise<T>(n, w.ld, h);
    const bool converged = divide_and_conquer<T>(h.diagonal, h.off, n, w.ld, w.division);
    apply_q<T>(n, w.ld, h, w.division.vectors);

    for (int j = 0; j < n; ++j) {
        const int at = w.division.order[j];
        const T* from = w.division.vectors + at * w.ld;
        T* to = vectors + size_t(j) * n;
        const Vec<T> sign = splat(largest_is_negative(from, n) ? T(-1) : T(1));
        values[j] = h.diagonal[at] * unscale[0] * unscale[1] + T(0);
        for (int i = 0; i < n; i += lanes) store_first(to + i, load(from + i) * sign + Vec<T>{}, min_(lanes, n - i));
    }
    return converged ? kOk : kNotConverged;
}

}  // namespace fastlora::FASTLORA_ISA
