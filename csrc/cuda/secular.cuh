// Eigensystem of D + rho z z', D diagonal and ascending with distinct entries, rho > 0 and no entry of z zero; a thread
// a root.
//   eigenvalues: the roots of 1/rho + sum_j z_j^2 / (d_j - x) = 0, one between each two poles d_j and one above
//   vectors: column k is z^_j / (d_j - x_k), normalised, where z^ is the vector for which the computed roots are
//   exact (Loewner's formula): so the vectors are orthogonal however close the roots
// Newton-like steps on the two nearest poles ("the middle way"), kept inside a bracket; distances are measured from the
// nearer pole, so that they lose no digits. Nothing is shared out: a root has the same bits wherever it is found.
// Algorithm: Gu & Eisenstat 1994, Li 1993 (LAPACK laed3, laed4).   Floor: some seven steps of n quotients a root.
#pragma once
#include <math.h>

#include "scalar.cuh"

namespace fastlora::cuda {

constexpr int kMaxRootSteps = 100;
template <class T>
constexpr T kSmallStep = sizeof(T) == 4 ? T(0x1p-14) : T(0x1p-29);

// 1 / x to a unit or two in the last place, for x and 1 / x well inside the normal range.
__device__ __forceinline__ float quotient_of_one(float x) {
#if defined(__CUDA_ARCH__)
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return fmaf(y, fmaf(-x, y, 1.0f), y);
#else
    return 1.0f / x;
#endif
}
__device__ __forceinline__ double quotient_of_one(double x) { return quick_reciprocal(x); }

template <class T>
struct Secular {
    int count;
    T inverse_rho;
    Traced<T> poles, z;  // [count]
    T bound;             // above every root
};

// A root as a pole and the distance from it.
template <class T>
struct Root {
    T origin, shift;
    bool found;
};

// The sums over the poles left (psi) and right (phi) of the root behind pole k, and their derivatives.
template <class T>
struct SecularSums {
    T psi = 0, phi = 0, psi_slope = 0, phi_slope = 0;

    __device__ SecularSums(const Secular<T>& s, int k, T origin, T shift) {
        for (int j = 0; j < s.count; ++j) {
            const T inverse = quotient_of_one((s.poles[j] - origin) - shift), z = s.z[j];
            const T term = z * z * inverse, slope = term * inverse;
            psi += j <= k ? term : T(0);
            psi_slope += j <= k ? slope : T(0);
            phi += j <= k ? T(0) : term;
            phi_slope += j <= k ? T(0) : slope;
        }
    }
};

// The root of a x^2 - b x + c = 0 inside (low, high), or the middle where there is none.
template <class T>
__device__ T quadratic_root(T a, T b, T c, T low, T high) {
    const T square = b * b - a * c * T(4), root = sqrt(square > 0 ? square : T(0));
    const T q = (b >= 0 ? b + root : b - root) * T(0.5);
    const T x1 = q / (a == 0 ? T(1) : a), x2 = c / (q == 0 ? T(1) : q);
    if (x2 > low && x2 < high && q != 0) return x2;
    return x1 > low && x1 < high && a != 0 ? x1 : (low + high) * T(0.5);
}

template <class T>
__device__ Root<T> find_root(const Secular<T>& s, int k) {
    const bool is_last = k == s.count - 1;
    const T left = s.poles[k], right = is_last ? s.bound : T(s.poles[k + 1]);
    const T left_z = s.z[k], right_z = is_last ? T(0) : T(s.z[k + 1]);
    const T left_weight = left_z * left_z, right_weight = right_z * right_z;
    const T gap = right - left, half = gap * T(0.5);

    const SecularSums<T> middle(s, k, left, half);
    T f = s.inverse_rho + middle.psi + middle.phi;
    const bool from_left = f >= 0 || is_last;
    const T origin = from_left ? left : right, to_left = left - origin, to_right = right - origin;
    T low = from_left ? T(0) : -half, high = from_left ? half : T(0);
    if (is_last && f < 0) low = half, high = gap;

    // First guess: all but the two nearest poles as at the middle.
    const T rest = f + (left_weight - right_weight) / half;
    T shift = quadratic_root(rest, rest * (to_left + to_right) + left_weight + right_weight,
                             rest * to_left * to_right + left_weight * to_right + right_weight * to_left, low, high);
    for (int step = 0; step < kMaxRootSteps; ++step) {
        const SecularSums<T> sums(s, k, origin, shift);
        f = s.inverse_rho + sums.psi + sums.phi;
        const T slope = sums.psi_slope + sums.phi_slope;
        const T error = (s.inverse_rho + sums.phi - sums.psi) * T(8) + fabs(shift) * slope;
        if (fabs(f) <= error * kEpsilon<T>) return {origin, shift, true};
        high = f > 0 ? shift : high;
        low = f < 0 ? shift : low;
        if (high - low <= fabs(shift) * kEpsilon<T> * T(2)) return {origin, shift, true};
        const T a = to_left - shift, b = to_right - shift, product = a * b;
        const T next = quadratic_root(f - a * sums.psi_slope - b * sums.phi_slope, (a + b) * f - product * slope,
                                      product * f, low - shift, high - shift);
        shift += next;
        // The steps converge quadratically on the scale of the nearest pole, so the error left is below a rounding.
        if (fabs(next) <= fabs(shift) * kSmallStep<T>) return {origin, shift, true};
    }
    return {origin, shift, false};
}

// z^_j, from z^_j^2 = prod_k (x_k - d_j) / prod_(k != j) (d_k - d_j), with the sign of z_j.
template <class T>
__device__ T refitted(const Secular<T>& s, int j, Traced<T> origin, Traced<T> shift) {
    const T pole = s.poles[j];
    T square = 1;
    for (int k = 0; k < s.count; ++k) {
        const T distance = (pole - origin[k]) - shift[k];
        square *= k == j ? distance : distance * quotient_of_one(T(s.poles[k]) - pole);
    }
    const T size = sqrt(fabs(square));
    return s.z[j] < 0 ? -size : size;
}

// 1 over the length of column k of the vectors, from z^.
template <class T>
__device__ T inverse_length(const Secular<T>& s, Traced<T> fitted, T origin, T shift) {
    T square = 0;
    for (int j = 0; j < s.count; ++j) {
        const T x = fitted[j] * quotient_of_one((s.poles[j] - origin) - shift);
        square += x * x;
    }
    return T(1) / sqrt(square);
}

}  // namespace fastlora::cuda
