// Real invariant subspace of one nonsymmetric matrix: A = Q T Q', eigenvalues above a threshold first.
//   h [n, n] row-major: the matrix, then Hessenberg, then quasi-triangular T: its diagonal blocks are 1x1, or
//   2x2 with equal diagonal entries and off-diagonal entries of opposite sign (a conjugate pair)
//   z [n, n] row-major: Q', so that every update of it runs along rows
// Householder reduction to Hessenberg form, Francis double-shift QR, then each block above the threshold is
// moved up by swapping neighbours: an orthogonal basis of the lower block's invariant subspace is rotated to
// the front. Algorithm: LAPACK gehrd, lahqr, lanv2, trexc/laexc (Bai and Demmel's direct swap).
// Floor: about 25 n^3 flops. Scalar: it serves chains that are not symmetric, one matrix at a time.
#include "solvers.h"

namespace fastlora::FASTLORA_ISA {
namespace {

constexpr int kStepsPerValue = 30;

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

// Applies [c s; -s c] as a similarity of rows and columns (k, k+1) outside the 2x2 block itself.
void rotate_outside(Schur s, int k, double c, double sn) {
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

double sign_of(double x) { return x < 0 ? -1 : 1; }

// Makes the 2x2 block at k, whose eigenvalues are real, upper triangular: the first column of the rotation
// is the eigenvector (z, c) of the eigenvalue d + z.
void split_real_pair(Schur s, int k) {
    double &a = s.at(k, k), &b = s.at(k, k + 1), &c = s.at(k + 1, k), &d = s.at(k + 1, k + 1);
    const double half = 0.5 * (a - d);
    const double z = half + sign_of(half) * sqrt_(max_(0.0, half * half + b * c));
    const double length = __builtin_hypot(z, c), cosine = z / length, sine = c / length;
    const double product = b * c;
    a = d + z;
    d = z != 0 ? d - product / z : d;
    b = b - c;
    c = 0;
    rotate_outside(s, k, cosine, sine);
}

// Gives the 2x2 block at k equal diagonal entries, or splits it if its eigenvalues are real.
void standardise(Schur s, int k) {
    double &a = s.at(k, k), &b = s.at(k, k + 1), &c = s.at(k + 1, k), &d = s.at(k + 1, k + 1);
    if (c == 0) return;
    const double difference = a - d;
    if (0.25 * difference * difference + b * c >= 0) return split_real_pair(s, k);
    if (difference == 0) return;
    const double sum = b + c, length = __builtin_hypot(sum, difference);
    const double cosine = sqrt_(0.5 * (1 + abs_(sum) / length));
    const double sine = -difference / (2 * length * cosine) * sign_of(sum);
    const double aa = a * cosine + b * sine, bb = b * cosine - a * sine;
    const double cc = c * cosine + d * sine, dd = d * cosine - c * sine;
    b = bb * cosine + dd * sine;
    c = cc * cosine - aa * sine;
    a = d = 0.5 * (a + d);
    rotate_outside(s, k, cosine, sine);
    // Rounding may have turned a nearly equal pair real.
    if (c != 0 && b * c >= 0) split_real_pair(s, k);
}

struct Shifts {
    double re1, im1, re2, im2;
};

// Eigenvalues of the trailing 2x2 block; two real ones are both replaced by the one nearer to the corner.
Shifts choose_shifts(double a, double b, double c, double d) {
    const double scale = abs_(a) + abs_(b) + abs_(c) + abs_(d);
    if (scale == 0) return {0, 0, 0, 0};
    a /= scale, b /= scale, c /= scale, d /= scale;
    const double mean = 0.5 * (a + d), half = 0.5 * (a - d), square = half * half + b * c;
    const double root = sqrt_(abs_(square));
    if (square < 0) return {mean * scale, root * scale, mean * scale, -root * scale};
    const double upper = mean + root, lower = mean - root;
    const double nearest = (abs_(upper - d) < abs_(lower - d) ? upper : lower) * scale;
    return {nearest, 0, nearest, 0};
}

// First column of (H - s1)(H - s2) for the block that starts at m, up to scale.
void bulge_column(Schur s, int m, const Shifts& shift, double* v) {
    const double h11 = s.at(m, m), h22 = s.at(m + 1, m + 1);
    const double scale = abs_(h11 - shift.re2) + abs_(shift.im2) + abs_(s.at(m + 1, m));
    const double h21 = s.at(m + 1, m) / scale;
    v[0] = h21 * s.at(m, m + 1) + (h11 - shift.re1) * ((h11 - shift.re2) / scale) - shift.im1 * (shift.im2 / scale);
    v[1] = h21 * (h11 + h22 - shift.re1 - shift.re2);
    v[2] = h21 * s.at(m + 2, m + 1);
    const double size = abs_(v[0]) + abs_(v[1]) + abs_(v[2]);
    for (int i = 0; size > 0 && i < 3; ++i) v[i] /= size;
}

// One double-shift QR step on rows and columns low .. high.
void francis_step(Schur s, int low, int high, const Shifts& shift) {
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
        const int last = high - 1;
        Shifts shift = choose_shifts(s.at(last, last), s.at(last, high), s.at(high, last), s.at(high, high));
        if (tries % 10 == 0) {  // the usual shifts cycle: try an unrelated pair, from the two ends in turn
            const bool top = tries % 20 == 10;
            const int at = top ? low : high;
            const double off = top ? abs_(s.at(low + 1, low)) + abs_(s.at(low + 2, low + 1))
                                   : abs_(s.at(high, high - 1)) + abs_(s.at(high - 1, high - 2));
            shift = choose_shifts(0.75 * off + s.at(at, at), -0.4375 * off, off, 0.75 * off + s.at(at, at));
        }
        francis_step(s, low, high, shift);
    }
    return true;
}

int block_size(Schur s, int k) { return k + 1 < s.n && s.at(k + 1, k) != 0 ? 2 : 1; }

// Solves m x = b, order <= 4, by elimination with complete pivoting; pivots below `floor` are raised to it.
void solve_small(double m[4][4], double* b, double* x, int order, double floor) {
    int column_of[4] = {0, 1, 2, 3};
    for (int k = 0; k < order; ++k) {
        int row = k, column = k;
        for (int i = k; i < order; ++i)
            for (int j = k; j < order; ++j)
                if (abs_(m[i][j]) > abs_(m[row][column])) row = i, column = j;
        for (int j = 0; j < order; ++j) {
            const double t = m[k][j];
            m[k][j] = m[row][j], m[row][j] = t;
        }
        const double t = b[k];
        b[k] = b[row], b[row] = t;
        for (int i = 0; i < order; ++i) {
            const double u = m[i][k];
            m[i][k] = m[i][column], m[i][column] = u;
        }
        const int c = column_of[k];
        column_of[k] = column_of[column], column_of[column] = c;
        if (abs_(m[k][k]) < floor) m[k][k] = floor;
        for (int i = k + 1; i < order; ++i) {
            const double factor = m[i][k] / m[k][k];
            for (int j = k; j < order; ++j) m[i][j] -= factor * m[k][j];
            b[i] -= factor * b[k];
        }
    }
    for (int k = order - 1; k >= 0; --k) {
        for (int j = k + 1; j < order; ++j) b[k] -= m[k][j] * b[j];
        b[k] /= m[k][k];
    }
    for (int k = 0; k < order; ++k) x[column_of[k]] = b[k];
}

// Columns [-X; I] with T11 X - X T22 = T12 span the invariant subspace of the lower block T22.
void lower_subspace(Schur s, int k, int n1, int n2, double subspace[2][4]) {
    const int order = n1 * n2, k2 = k + n1;
    double m[4][4] = {}, b[4], x[4], largest = 0;
    for (int i = 0; i < n1 + n2; ++i)
        for (int j = 0; j < n1 + n2; ++j) largest = max_(largest, abs_(s.at(k + i, k + j)));
    for (int i = 0; i < n1; ++i) {
        for (int j = 0; j < n2; ++j) {
            const int at = i * n2 + j;
            b[at] = s.at(k + i, k2 + j);
            for (int l = 0; l < n1; ++l) m[at][l * n2 + j] += s.at(k + i, k + l);
            for (int l = 0; l < n2; ++l) m[at][i * n2 + l] -= s.at(k2 + l, k2 + j);
        }
    }
    solve_small(m, b, x, order, max_(kEpsilon<double> * largest, 1e-290));
    for (int j = 0; j < n2; ++j) {
        for (int i = 0; i < n1; ++i) subspace[j][i] = -x[i * n2 + j];
        for (int i = 0; i < n2; ++i) subspace[j][n1 + i] = i == j;
    }
}

// Swaps the neighbouring blocks of sizes n1 at k and n2 at k + n1.
void swap_blocks(Schur s, int k, int n1, int n2) {
    const int n = s.n, size = n1 + n2;
    if (size == 2) {
        const double a = s.at(k, k), d = s.at(k + 1, k + 1), x = s.at(k, k + 1), y = d - a;
        const double length = __builtin_hypot(x, y);
        s.at(k, k) = d;
        s.at(k + 1, k + 1) = a;
        return rotate_outside(s, k, length > 0 ? x / length : 0, length > 0 ? y / length : 1);
    }
    double subspace[2][4];
    lower_subspace(s, k, n1, n2, subspace);
    for (int j = 0; j < n2; ++j) {
        const Reflector r = reflector_of(subspace[j] + j, size - j);
        for (int l = j + 1; l < n2; ++l) {
            double sum = 0;
            for (int i = 0; i < size - j; ++i) sum += r.v[i] * subspace[l][j + i];
            for (int i = 0; i < size - j; ++i) subspace[l][j + i] -= r.tau * sum * r.v[i];
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
