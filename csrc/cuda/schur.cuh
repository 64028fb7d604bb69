// Real invariant subspace of one nonsymmetric matrix by one crew: A = Q T Qᵀ, eigenvalues above a threshold first.
//   h [n, n], element (i, j) at i·ld + j: the matrix, scaled to size one; then Hessenberg, then quasi-triangular T: its
//   diagonal blocks are 1x1, or 2x2 with equal diagonal entries and off-diagonal entries of opposite sign (a pair)
//   z [n, n], as h: Qᵀ, so that every update of it runs along rows
// Householder reduction to Hessenberg form, Francis double-shift QR, then each block above the threshold is moved up by
// swapping neighbours. Algorithm: LAPACK gehrd, lahqr, lanv2, trexc/laexc (Bai and Demmel's direct swap).
// Every member computes the scalars, from what all have read before the first of them writes; updates of rows give each
// member a column of h and a column of z, updates of columns a row of h. Odd ld keeps both off the same banks.
// 25 n³ operations, but what counts is the chain of about 2 n steps of n/2 reflections, two barriers each.
#pragma once
#include "groups.cuh"
#include "scalar.cuh"
#include "schur_blocks.cuh"

namespace fastlora::cuda {

// v: scratch [n].
__device__ __forceinline__ void reduce_to_hessenberg(const Schur& s, Doubles v) {
    const Crew crew = s.crew;
    const int n = s.n;
#pragma unroll 1
    for (int k = 0; k + 2 < n; ++k) {
        const int first = k + 1;
        const double head = s.at(first, k);
        double tail = 0;
        for (int i = first + 1; i < n; ++i) {
            const double entry = s.at(i, k);
            tail = fma(entry, entry, tail);
        }
        crew.sync();
        const bool turns = tail > kLeastSquare;
        const double square = fma(head, head, tail), beta = turns ? -copy_sign(sqrt(square), head) : head;
        for (int i = first + crew.rank; i < n; i += crew.size) {
            v[i] = i == first ? head - beta : s.at(i, k);
            s.set(i, k, i == first ? beta : 0.0);
        }
        crew.sync();
        if (!turns) continue;
        const double scale = quick_reciprocal(beta * (beta - head));
#pragma unroll 1
        for (int e = crew.rank; e < 2 * n; e += crew.size) {
            const Doubles m = e < n ? s.h + e : s.z + (e - n);
            if (e < first) continue;
            double sum = 0;
            for (int i = first; i < n; ++i) sum = fma(v[i], m[i * s.ld], sum);
            sum *= scale;
            for (int i = first; i < n; ++i) m[i * s.ld] -= sum * v[i];
        }
        crew.sync();
#pragma unroll 1
        for (int i = crew.rank; i < n; i += crew.size) {
            double sum = 0;
            for (int j = first; j < n; ++j) sum = fma(s.at(i, j), v[j], sum);
            sum *= scale;
            for (int j = first; j < n; ++j) s.set(i, j, s.at(i, j) - sum * v[j]);
        }
        crew.sync();
    }
}

// First column of (H - s1)(H - s2) for the block that starts at `at`.
__device__ __forceinline__ void bulge_column(const Schur& s, int at, const Shifts& shift, double (&v)[3]) {
    const double h11 = s.at(at, at), h12 = s.at(at, at + 1), h21 = s.at(at + 1, at), h22 = s.at(at + 1, at + 1);
    v[0] = fma(h12, h21, fma(h11 - shift.re1, h11 - shift.re2, shift.im_square));
    v[1] = h21 * ((h11 - shift.re1) + (h22 - shift.re2));
    v[2] = h21 * s.at(at + 2, at + 1);
}

// Where the step may start: the last place with two consecutive small subdiagonals, or `low`. Every lane tries another.
__device__ __forceinline__ int bulge_start(const Schur& s, int low, int high, const Shifts& shift) {
    const int lane = threadIdx.x & 31;
    for (int from = high - 2;; from -= 32) {
        const int at = from - lane;
        bool starts = at <= low;
        if (at > low) {
            double v[3];
            bulge_column(s, at, shift, v);
            const double around = fabs(s.at(at - 1, at - 1)) + fabs(s.at(at, at)) + fabs(s.at(at + 1, at + 1));
            const double spill = fabs(s.at(at, at - 1)) * (fabs(v[1]) + fabs(v[2]));
            starts = spill <= kEpsilon<double> * fabs(v[0]) * around;
        }
        const unsigned found = __ballot_sync(kAllLanes, starts);
        if (found != 0) {
            const int at_last = from - (__ffs(static_cast<int>(found)) - 1);
            return at_last > low ? at_last : low;
        }
    }
}

// One double-shift QR step on rows and columns low .. high.
__device__ __forceinline__ void francis_step(const Schur& s, int low, int high, const Shifts& shift) {
    const int start = bulge_start(s, low, high, shift);
    for (int k = start; k < high; ++k) {
        const int count = high - k + 1 < 3 ? 2 : 3;
        double v[3];
        if (k > start) {
            for (int i = 0; i < 3; ++i) v[i] = i < count ? s.at(k + i, k - 1) : 0.0;
        } else {
            bulge_column(s, k, shift, v);
            s.crew.sync();
        }
        const SmallReflector<3> r = reflector_of(v);
        reflect_rows(s, r, k, count, k);
        s.crew.sync();
        reflect_columns(s, r, k, count, k + 3 < high ? k + 4 : high + 1);
        if (s.crew.rank == 0) {
            if (k > start) {
                s.set(k, k - 1, r.beta);
                s.set(k + 1, k - 1, 0.0);
                if (count > 2) s.set(k + 2, k - 1, 0.0);
            } else if (start > low) {
                s.set(k, k - 1, s.at(k, k - 1) * (1 - r.scale * r.v[0] * r.v[0]));
            }
        }
        s.crew.sync();
    }
}

// The first row of the unreduced block that ends at `high`: its subdiagonal entry is negligible. Every lane tries
// another.
__device__ __forceinline__ int block_start(const Schur& s, int high) {
    const int lane = threadIdx.x & 31;
    const double negligible = kEpsilon<double> * kEpsilon<double>;
    for (int from = high;; from -= 32) {
        const int at = from - lane;
        bool ends = at <= 0;
        if (at > 0) {
            const double below = fabs(s.at(at, at - 1)), around = fabs(s.at(at - 1, at - 1)) + fabs(s.at(at, at));
            ends = below <= kEpsilon<double> * (around == 0 ? 1.0 : around) || below <= negligible;
        }
        const unsigned found = __ballot_sync(kAllLanes, ends);
        if (found != 0) {
            const int at_last = from - (__ffs(static_cast<int>(found)) - 1);
            return at_last > 0 ? at_last : 0;
        }
    }
}

// Hessenberg to quasi-triangular, for a matrix of size one.
__device__ __forceinline__ bool reduce_to_schur(const Schur& s) {
    int steps_left = kStepsPerValue * (s.n < 10 ? 10 : s.n);
    int high = s.n - 1, tries = 0;
    while (high > 0) {
        const int low = block_start(s, high);
        s.crew.sync();
        if (low > 0 && s.crew.rank == 0) s.set(low, low - 1, 0.0);  // which is not read before the end
        if (low >= high - 1) {
            if (low == high - 1) standardise(s, low);
            high = low - 1;
            tries = 0;
            continue;
        }
        if (--steps_left < 0) return false;
        ++tries;
        const Shifts shift = shifts_of(shift_block(s, low, high, tries));
        francis_step(s, low, high, shift);
    }
    s.crew.sync();
    return true;
}

// T has no zero below the diagonal but in its pairs.
__device__ __forceinline__ void read_eigenvalues(const Schur& s, Doubles re, Doubles im) {
#pragma unroll 1
    for (int k = s.crew.rank; k < s.n; k += s.crew.size) {
        const bool head = k + 1 < s.n && s.at(k + 1, k) != 0, tail = k > 0 && s.at(k, k - 1) != 0;
        re[k] = s.at(k, k);
        im[k] = 0;
        if (head) im[k] = sqrt(fabs(s.at(k, k + 1))) * sqrt(fabs(s.at(k + 1, k)));
        if (tail) {
            re[k] = s.at(k - 1, k - 1);
            im[k] = -sqrt(fabs(s.at(k - 1, k))) * sqrt(fabs(s.at(k, k - 1)));
        }
    }
    s.crew.sync();
}

// Moves every block above the threshold before the others. The eigenvalues travel with their blocks, so that rounding
// in the swaps cannot change which side of the threshold one is on, nor what is a pair. scratch: kSwapScratch.
__device__ __forceinline__ int move_up(const Schur& s, Doubles re, Doubles im, double threshold, Doubles scratch) {
    int leading = 0;
#pragma unroll 1
    for (int k = 0, size; k < s.n; k += size) {
        size = im[k] != 0 ? 2 : 1;
        if (!(re[k] > threshold)) continue;
#pragma unroll 1
        for (int at = k; at > leading;) {
            const int above = im[at - 1] != 0 ? 2 : 1;
            at -= above;
            swap_blocks(s, at, above, size, scratch);
        }
        const double own_re = re[k], own_im = im[k];
        s.crew.sync();
        if (s.crew.rank == 0 && k > leading) {
            for (int i = k - 1; i >= leading; --i) {
                re[i + size] = re[i];
                im[i + size] = im[i];
            }
            re[leading] = own_re;
            im[leading] = own_im;
            if (size == 2) {
                re[leading + 1] = own_re;
                im[leading + 1] = -own_im;
            }
        }
        s.crew.sync();
        leading += size;
    }
    return leading;
}

struct SchurScratch {
    Doubles re, im, v, swap;  // [n] three times, [kSwapScratch]
};

// h holds the matrix times 2^-power, with entries up to one. The first *count rows of z span the invariant subspace of
// the eigenvalues with real part > threshold; re, im in the order of T. False: not converged.
__device__ __forceinline__ bool ordered_schur(const Schur& s, double scaled_threshold, const SchurScratch& w,
                                              int* count) {
    for_entries(s.crew, s.n, s.n, [&](int j, int i) { s.z[i * s.ld + j] = i == j ? 1.0 : 0.0; });
    s.crew.sync();
    reduce_to_hessenberg(s, w.v);
    if (!reduce_to_schur(s)) return false;
    read_eigenvalues(s, w.re, w.im);
    *count = move_up(s, w.re, w.im, scaled_threshold, w.swap);
    return true;
}

}  // namespace fastlora::cuda
