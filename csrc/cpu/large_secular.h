// Eigensystem of D + rho z z', D diagonal and ascending with distinct entries, rho > 0 and no entry of z zero.
//   eigenvalues: the roots of 1/rho + sum_j z_j^2 / (d_j - x) = 0, one between each two poles d_j and one above
//   vectors: column k is z^_j / (d_j - x_k), normalised, where z^ is the vector for which the computed roots are
//   exact (Loewner's formula): so the vectors are orthogonal however close the roots
// One root per lane: Newton-like steps on the two nearest poles ("the middle way"), kept inside a bracket.
// Algorithm: Gu & Eisenstat 1994, Li 1993 (LAPACK laed3, laed4).   Floor: about 6 n^2 quotients.
#pragma once
#include "lanes_interleave.h"

namespace fastlora::FASTLORA_ISA {

constexpr int kMaxRootSteps = 100;
template <class T>
constexpr T kSmallStep = sizeof(T) == 4 ? T(0x1p-14) : T(0x1p-29);

template <class T>
struct SecularProblem {
    int count;
    T inverse_rho;
    T* poles;             // [count + 1]: d, then a bound above every root
    T* z;                 // [count]
    T* weights;           // [count + 1]: z^2, then zero
    const int* position;  // [count]: the row of `vectors` of pole j
    T* roots;             // [count, rounded up to lanes]
    T* vectors;           // [count, ld]: row position[j], column k
    size_t ld;
};

// The sums over the poles left (psi) and right (phi) of the root, and their derivatives.
template <class T>
struct SecularSums {
    Vec<T> psi{}, phi{}, psi_slope{}, phi_slope{};
};

// At x = origin + shift; `index` is the pole left of each lane's root, first .. first + lanes - 1.
template <class T>
inline SecularSums<T> secular_sums(const SecularProblem<T>& p, Vec<T> origin, Vec<T> shift, int first, Mask<T> index) {
    SecularSums<T> s;
    int j = 0;
    for (; j < first; ++j) {
        const Vec<T> inverse = reciprocal<T>((p.poles[j] - origin) - shift), term = p.weights[j] * inverse;
        s.psi += term;
        s.psi_slope += term * inverse;
    }
    for (const int end = min_(first + kLanes<T>, p.count); j < end; ++j) {
        const Vec<T> inverse = reciprocal<T>((p.poles[j] - origin) - shift), term = p.weights[j] * inverse;
        const Mask<T> left = (Mask<T>)(index >= j);
        s.psi += left ? term : Vec<T>{};
        s.phi += left ? Vec<T>{} : term;
        s.psi_slope += left ? term * inverse : Vec<T>{};
        s.phi_slope += left ? Vec<T>{} : term * inverse;
    }
    for (; j < p.count; ++j) {
        const Vec<T> inverse = reciprocal<T>((p.poles[j] - origin) - shift), term = p.weights[j] * inverse;
        s.phi += term;
        s.phi_slope += term * inverse;
    }
    return s;
}

// The root of a x^2 - b x + c = 0 inside (low, high), or the middle where there is none.
template <class T>
inline Vec<T> quadratic_root(Vec<T> a, Vec<T> b, Vec<T> c, Vec<T> low, Vec<T> high) {
    const Vec<T> zero{}, one = splat<T>(1);
    const Vec<T> square = b * b - a * c * T(4), root = sqrt(square > zero ? square : zero);
    const Vec<T> q = (b >= zero ? b + root : b - root) * T(0.5);
    const Vec<T> x1 = q / (a == zero ? one : a), x2 = c / (q == zero ? one : q);
    const Mask<T> first = (Mask<T>)(x1 > low) & (Mask<T>)(x1 < high) & (Mask<T>)(a != zero);
    const Mask<T> second = (Mask<T>)(x2 > low) & (Mask<T>)(x2 < high) & (Mask<T>)(q != zero);
    return second ? x2 : (first ? x1 : (low + high) * T(0.5));
}

// Roots first .. first + lanes - 1, and their distances from the poles, d_j - x_k, in `vectors`.
template <class T>
bool find_roots(const SecularProblem<T>& p, int first) {
    const Vec<T> zero{}, epsilon = splat<T>(kEpsilon<T>);
    Vec<T> left, right, left_weight, right_weight;
    Mask<T> index;
    for (int b = 0; b < kLanes<T>; ++b) {  // lanes behind the last root repeat it
        const int k = min_(first + b, p.count - 1);
        index[b] = k;
        left[b] = p.poles[k], right[b] = p.poles[k + 1];
        left_weight[b] = p.weights[k], right_weight[b] = p.weights[k + 1];
    }
    const Mask<T> last = (Mask<T>)(index == p.count - 1);
    const Vec<T> gap = right - left, half = gap * T(0.5);

    // Distances are measured from the nearer pole, so that they lose no digits.
    SecularSums<T> s = secular_sums<T>(p, left, half, first, index);
    Vec<T> f = p.inverse_rho + s.psi + s.phi;
    const Mask<T> from_left = (Mask<T>)(f >= zero) | last;
    const Vec<T> origin = from_left ? left : right, to_left = left - origin, to_right = right - origin;
    Vec<T> low = from_left ? zero : -half, high = from_left ? half : zero;
    low = last & (Mask<T>)(f < zero) ? half : low;
    high = last & (Mask<T>)(f < zero) ? gap : high;

    // First guess: all but the two nearest poles as at the middle.
    const Vec<T> rest = f + (left_weight - right_weight) / half;
    Vec<T> shift =
        quadratic_root<T>(rest, rest * (to_left + to_right) + left_weight + right_weight,
                          rest * to_left * to_right + left_weight * to_right + right_weight * to_left, low, high);
    Mask<T> done{};
    for (int step = 0; step < kMaxRootSteps && any_mask(~done); ++step) {
        s = secular_sums<T>(p, origin, shift, first, index);
        f = p.inverse_rho + s.psi + s.phi;
        const Vec<T> slope = s.psi_slope + s.phi_slope;
        const Vec<T> error = (p.inverse_rho + s.phi - s.psi) * T(8) + abs<T>(shift) * slope;
        done |= (Mask<T>)(abs<T>(f) <= error * epsilon);
        high = ~done & (Mask<T>)(f > zero) ? shift : high;
        low = ~done & (Mask<T>)(f < zero) ? shift : low;
        done |= (Mask<T>)(high - low <= abs<T>(shift) * epsilon * T(2));
        if (!any_mask(~done)) break;
        const Vec<T> a = to_left - shift, b = to_right - shift, product = a * b;
        const Vec<T> next = quadratic_root<T>(f - a * s.psi_slope - b * s.phi_slope, (a + b) * f - product * slope,
                                              product * f, low - shift, high - shift);
        shift = done ? shift : shift + next;
        // The steps converge quadratically on the scale of the nearest pole, so the error left is below a rounding.
        done |= (Mask<T>)(abs<T>(next) <= abs<T>(shift) * kSmallStep<T>);
    }
    store(p.roots + first, origin + shift);
    for (int j = 0; j < p.count; ++j) store(p.vectors + p.position[j] * p.ld + first, (p.poles[j] - origin) - shift);
    return !any_mask(~done);
}

// z^_j^2 = prod_k (x_k - d_j) / prod_(k != j) (d_k - d_j), with the signs of z.
template <class T>
void refit_z(const SecularProblem<T>& p) {
    const Mask<T> lane = lane_numbers<T>();
    const Vec<T> one = splat<T>(1);
    for (int j = 0; j < p.count; ++j) {
        const T* distances = p.vectors + p.position[j] * p.ld;
        Vec<T> ratio = one;
        for (int k = 0; k < p.count; k += kLanes<T>) {
            if (k + kLanes<T> <= j || (k > j && k + kLanes<T> <= p.count)) {
                ratio *= load(distances + k) * reciprocal<T>(load(p.poles + k) - p.poles[j]);
                continue;
            }
            const Mask<T> index = lane + k, own = (Mask<T>)(index == j), inside = (Mask<T>)(index < p.count);
            const Vec<T> gap = own | ~inside ? one : load(p.poles + k) - p.poles[j];
            ratio *= inside ? load(distances + k) * reciprocal<T>(gap) : one;
        }
        T parts[kLanes<T>], square = 1;
        store(parts, ratio);
        for (int b = 0; b < kLanes<T>; ++b) square *= parts[b];
        p.z[j] = p.z[j] < 0 ? -sqrt_(abs_(square)) : sqrt_(abs_(square));
    }
}

// Returns whether every root was found.
template <class T>
bool solve_secular(const SecularProblem<T>& p) {
    bool found = true;
    for (int k = 0; k < p.count; k += kLanes<T>) found &= find_roots<T>(p, k);
    refit_z<T>(p);
    for (int k = 0; k < p.count; k += kLanes<T>) {
        Vec<T> square{};
        for (int j = 0; j < p.count; ++j) {
            T* at = p.vectors + p.position[j] * p.ld + k;
            const Vec<T> x = p.z[j] * reciprocal<T>(load(at));
            square += x * x;
            store(at, x);
        }
        const Vec<T> inverse = splat<T>(1) / sqrt(square);
        for (int j = 0; j < p.count; ++j) {
            T* at = p.vectors + p.position[j] * p.ld + k;
            store(at, load(at) * inverse);
        }
    }
    return found;
}

}  // namespace fastlora::FASTLORA_ISA
