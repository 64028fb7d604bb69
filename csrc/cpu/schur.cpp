// Real invariant subspace of one nonsymmetric matrix: A = Q T Q', eigenvalues above a threshold first.
//   h [n, n] row-major: the matrix, then Hessenberg, then quasi-triangular T: its diagonal blocks are 1x1, or
//   2x2 with equal diagonal entries and off-diagonal entries of opposite sign (a conjugate pair)
//   z [n, n] row-major: Q', so that every update of it runs along rows
// Householder reduction to Hessenberg form, Francis double-shift QR, then each block above the threshold is
// moved up by swapping neighbours: an orthogonal basis of the lower block's invariant subspace is rotated to
// the front. Algorithm: LAPACK gehrd, lahqr, lanv2, trexc/laexc (Bai and Demmel's direct swap).
// Floor: about 25 n^3 flops. Scalar: it serves chains that are not symmetric, one matrix at a time.
#include "../common/small_blocks.h"
#include "table.h"

namespace fastlora::FASTLORA_ISA {
namespace {

struct Schur {
    double* h;
    double* z;
    int n;
    double* row(int i) const { return h + size_t(i) * n; }
    double* basis(int i) const { return z + size_t(i) * n; }
    double& at(int i, int j) const { return h[size_t(i) * n + j]; }
};

// I - tau v v' with v[0] = 1, which maps the vector it was made from to beta e_0.
struct Reflector {
    double v[4];
    double tau, beta;
};

// v[0 .. count) becomes the reflector's vector. A tail near the underflow threshold counts as zero: the
// matrix is scaled to size one, and denormal entries would spoil the reflector's orthogonality.
void reflect_to_axis(double* v, int count, double& tau, double& beta) {
    double largest = 0;
    for (int i = 1; i < count; ++i) largest = max_(largest, abs_(v[i]));
    const double head = v[0];
    v[0] = 1;
    tau = 0;
    beta = head;
    if (largest < 1e-280) return;
    largest = max_(largest, abs_(head));
    double square = head / largest * (head / largest);
    for (int i = 1; i < count; ++i) square += v[i] / largest * (v[i] / largest);
    beta = head > 0 ? -largest * sqrt_(square) : largest * sqrt_(square);
    tau = (beta - head) / beta;
    for (int i = 1; i < count; ++i) v[i] /= head - beta;
}

Reflector reflector_of(const double* x, int count) {
    Reflector r;
    for (int i = 0; i < count; ++i) r.v[i] = x[i];
    reflect_to_axis(r.v, count, r.tau, r.beta);
    return r;
}

// Rows first .. first+count-1 of m, columns from .. n-1.
void reflect_rows(double* m, int n, const Reflector& r, int first, int count, int from) {
    for (int j = from; j < n; ++j) {
        double* column = m + size_t(first) * n + j;
        double sum = 0;
        for (int i = 0; i < count; ++i) sum += r.v[i] * column[size_t(i) * n];
        sum *= r.tau;
        for (int i = 0; i < count; ++i) column[size_t(i) * n] -= sum * r.v[i];
    }
}

// Columns first .. first+count-1 of m, rows 0 .. rows-1.
void reflect_columns(double* m, int n, const Reflector& r, int first, int count, int rows) {
    for (int i = 0; i < rows; ++i) {
        double* row = m + size_t(i) * n + first;
        double sum = 0;
        for (int j = 0; j < count; ++j) sum += r.v[j] * row[j];
        sum *= r.tau;
        for (int j = 0; j < count; ++j) row[j] -= sum * r.v[j];
    }
}

// Applies a turn to rows and columns (k, k+1); the 2x2 block itself becomes turn.block.
void rotate(const Schur& s, int k, const Turn& turn) {
    const double c = turn.cosine, sn = turn.sine;
    s.at(k, k) = turn.block.a;
    s.at(k, k + 1) = turn.block.b;
    s.at(k + 1, k) = turn.block.c;
    s.at(k + 1, k + 1) = turn.block.d;
    double *top = s.row(k), *bottom = s.row(k + 1);
    for (int j = k + 2; j < s.n; ++j) {
        const double x = top[j], y = bottom[j];
        top[j] = c * x + sn * y;
        bottom[j] = c * y - sn * x;
    }
    for (int i = 0; i < k; ++i) {
        double* row = s.row(i);
        const double x = row[k], y = row[k + 1];
        row[k] = c * x + sn * y;
        row[k + 1] = c * y - sn * x;
    }
    double *first = s.basis(k), *second = s.basis(k + 1);
    for (int j = 0; j < s.n; ++j) {
        const double x = first[j], y = second[j];
        first[j] = c * x + sn * y;
        second[j] = c * y - sn * x;
    }
}

// v and w: scratch [n].
void reduce_to_hessenberg(Schur s, double* v, double* w) {
    const int n = s.n;
    for (int k = 0; k + 2 < n; ++k) {
        const int first = k + 1;
        double tau, beta;
        for (int i = first; i < n; ++i) v[i] = s.at(i, k);
        reflect_to_axis(v + first, n - first, tau, beta);
        s.at(first, k) = beta;
        for (int i = first + 1; i < n; ++i) s.at(i, k) = 0;
        if (tau == 0) continue;
        for (int side = 0; side < 2; ++side) {  // rows of h, then rows of z
            const int from = side == 0 ? first : 0;
            for (int j = from; j < n; ++j) w[j] = 0;
            for (int i = first; i < n; ++i) {
                const double* row = side == 0 ? s.row(i) : s.basis(i);
                for (int j = from; j < n; ++j) w[j] += v[i] * row[j];
            }
            for (int i = first; i < n; ++i) {
                double* row = side == 0 ? s.row(i) : s.basis(i);
                for (int j = from; j < n; ++j) row[j] -= tau * v[i] * w[j];
            }
        }
        for (int i = 0; i < n; ++i) {
            double* row = s.row(i);
            double sum = 0;
            for (int j = first; j < n; ++j) sum += row[j] * v[j];
            for (int j = first; j < n; ++j) row[j] -= tau * sum * v[j];
        }
    }
}

// Shifts of a block of any size: it is scaled to size one, and they are scaled back.
struct ScaledShifts {
    double re1, re2, im;
};

ScaledShifts choose_shifts(Block m) {
    const double scale = abs_(m.a) + abs_(m.b) + abs_(m.c) + abs_(m.d);
    if (scale == 0) return {0, 0, 0};
    const Shifts shift = shifts_of({m.a / scale, m.b / scale, m.c / scale, m.d / scale});
    return {shift.re1 * scale, shift.re2 * scale, sqrt_(shift.im_square) * scale};
}

// First column of (H - s1)(H - s2) for the block that starts at m, up to scale.
void bulge_column(Schur s, int m, const ScaledShifts& shift, double* v) {
    const double h11 = s.at(m, m), h22 = s.at(m + 1, m + 1);
    const double scale = abs_(h11 - shift.re2) + abs_(shift.im) + abs_(s.at(m + 1, m));
    const double h21 = s.at(m + 1, m) / scale;
    v[0] = h21 * s.at(m, m + 1) + (h11 - shift.re1) * ((h11 - shift.re2) / scale) + shift.im * (shift.im / scale);
    v[1] = h21 * (h11 + h22 - shift.re1 - shift.re2);
    v[2] = h21 * s.at(m + 2, m + 1);
    const double size = abs_(v[0]) + abs_(v[1]) + abs_(v[2]);
    for (int i = 0; size > 0 && i < 3; ++i) v[i] /= size;
}

// One double-shift QR step on rows and columns low .. high.
void francis_step(Schur s, int low, int high, const ScaledShifts& shift) {
    const int n = s.n;
    double v[3];
    int start = high - 2;
    for (;; --start) {
        bulge_column(s, start, shift, v);
        if (start == low) break;
        // Two consecutive small subdiagonals: the step may start here.
        const double around =
            abs_(s.at(start - 1, start - 1)) + abs_(s.at(start, start)) + abs_(s.at(start + 1, start + 1));
        const double spill = abs_(s.at(start, start - 1)) * (abs_(v[1]) + abs_(v[2]));
        if (spill <= kEpsilon<double> * abs_(v[0]) * around) break;
    }
    for (int k = start; k < high; ++k) {
        const int count = min_(3, high - k + 1);
        if (k > start)
            for (int i = 0; i < count; ++i) v[i] = s.at(k + i, k - 1);
        const Reflector r = reflector_of(v, count);
        if (k > start) {
            s.at(k, k - 1) = r.beta;
            for (int i = 1; i < count; ++i) s.at(k + i, k - 1) = 0;
        } else if (start > low) {
            s.at(k, k - 1) *= 1 - r.tau;
        }
        reflect_rows(s.h, n, r, k, count, k);
        reflect_columns(s.h, n, r, k, count, min_(k + 3, high) + 1);
        reflect_rows(s.z, n, r, k, count, 0);
    }
}

// Hessenberg to quasi-triangular; `norm` is the largest magnitude of the matrix.
bool reduce_to_schur(Schur s, double norm) {
    const double negligible = kEpsilon<double> * kEpsilon<double> * norm;
    int64_t steps_left = int64_t(kStepsPerValue) * max_(10, s.n);
    int high = s.n - 1, tries = 0;
    while (high > 0) {
        int low = high;
        for (; low > 0; --low) {
            const double below = abs_(s.at(low, low - 1));
            double around = abs_(s.at(low - 1, low - 1)) + abs_(s.at(low, low));
            if (around == 0) around = norm;
            if (below > kEpsilon<double> * around && below > negligible) continue;
            s.at(low, low - 1) = 0;
            break;
        }
        if (low >= high - 1) {
            if (low == high - 1) standardise(s, low);
            high = low - 1;
            tries = 0;
            continue;
        }
        if (--steps_left < 0) return false;
        ++tries;
        const ScaledShifts shift = choose_shifts(shift_block(s, low, high, tries));
        francis_step(s, low, high, shift);
    }
    return true;
}

int block_size(Schur s, int k) { return k + 1 < s.n && s.at(k + 1, k) != 0 ? 2 : 1; }

// Swaps the neighbouring blocks of sizes n1 at k and n2 at k + n1.
void swap_blocks(Schur s, int k, int n1, int n2) {
    const int n = s.n, size = n1 + n2;
    if (size == 2) return rotate(s, k, exchanging(block_at(s, k)));
    double scratch[kSwapScratch];
    double* subspace = scratch + kSubspaceWork;
    lower_subspace(s, k, n1, n2, subspace, scratch);
    for (int j = 0; j < n2; ++j) {
        const Reflector r = reflector_of(subspace + 4 * j + j, size - j);
        for (int l = j + 1; l < n2; ++l) {
            double* other = subspace + 4 * l + j;
            double sum = 0;
            for (int i = 0; i < size - j; ++i) sum += r.v[i] * other[i];
            for (int i = 0; i < size - j; ++i) other[i] -= r.tau * sum * r.v[i];
        }
        reflect_rows(s.h, n, r, k + j, size - j, k);
        reflect_columns(s.h, n, r, k + j, size - j, k + size);
        reflect_rows(s.z, n, r, k + j, size - j, 0);
    }
    for (int i = n2; i < size; ++i)
        for (int j = 0; j < n2; ++j) s.at(k + i, k + j) = 0;
    if (n2 == 2) standardise(s, k);
    if (n1 == 2) standardise(s, k + n2);
}

void read_eigenvalues(Schur s, double* re, double* im) {
    for (int k = 0, size; k < s.n; k += size) {
        size = block_size(s, k);
        re[k] = s.at(k, k);
        im[k] = 0;
        if (size == 1) continue;
        re[k + 1] = re[k];
        im[k] = sqrt_(abs_(s.at(k, k + 1))) * sqrt_(abs_(s.at(k + 1, k)));
        im[k + 1] = -im[k];
    }
}

// The values [k, k + n1) and [k + n1, k + n1 + n2) change places.
void swap_values(double* values, int k, int n1, int n2) {
    double old[4];
    for (int i = 0; i < n1 + n2; ++i) old[i] = values[k + i];
    for (int i = 0; i < n1 + n2; ++i) values[k + i] = old[(i + n1) % (n1 + n2)];
}

// Moves every block above the threshold before the others. The eigenvalues travel with their blocks, so that
// rounding in the swaps cannot change which side of the threshold one is on, nor what is a pair.
int move_up(Schur s, double* re, double* im, double threshold) {
    int leading = 0;
    for (int k = 0, size; k < s.n; k += size) {
        size = im[k] != 0 ? 2 : 1;
        if (!(re[k] > threshold)) continue;
        for (int at = k; at > leading;) {
            const int above = im[at - 1] != 0 ? 2 : 1;
            at -= above;
            swap_blocks(s, at, above, size);
            swap_values(re, at, above, size);
            swap_values(im, at, above, size);
        }
        leading += size;
    }
    return leading;
}

// Stable, so that the two halves of a pair, equal in real part, stay neighbours.
void sort_descending(double* re, double* im, int n) {
    for (int i = 1; i < n; ++i) {
        const double x = re[i], y = im[i];
        int j = i;
        for (; j > 0 && re[j - 1] < x; --j) re[j] = re[j - 1], im[j] = im[j - 1];
        re[j] = x, im[j] = y;
    }
}

}  // namespace

int32_t ordered_schur(double* a, double* q, double* re, double* im, int n, double threshold, int* count) {
    *count = 0;
    const size_t size = size_t(n) * n;
    double largest = 0;
    bool finite = true;
    for (size_t i = 0; i < size; ++i) {
        finite &= finite_(a[i]);
        largest = max_(largest, abs_(a[i]));
        q[i] = 0;
    }
    if (!finite) return kNonFinite;
    int power = 0;
    if (largest > 0) __builtin_frexp(largest, &power);
    const double half = __builtin_ldexp(1.0, -(power / 2)), rest = __builtin_ldexp(1.0, power / 2 - power);
    for (size_t i = 0; i < size; ++i) a[i] = a[i] * half * rest;

    const Schur s{a, q, n};
    for (int i = 0; i < n; ++i) s.basis(i)[i] = 1;
    reduce_to_hessenberg(s, re, im);
    if (!reduce_to_schur(s, largest * half * rest)) return kNotConverged;
    read_eigenvalues(s, re, im);
    *count = move_up(s, re, im, threshold * half * rest);
    sort_descending(re, im, n);
    for (int i = 0; i < n; ++i) {
        re[i] = re[i] / half / rest;
        im[i] = im[i] / half / rest;
        for (int j = 0; j < i; ++j) {
            const double t = s.basis(i)[j];
            s.basis(i)[j] = s.basis(j)[i];
            s.basis(j)[i] = t;
        }
    }
    return kOk;
}

}  // namespace fastlora::FASTLORA_ISA
