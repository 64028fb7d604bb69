// chain: from the Gram blocks of one group of modules to the shared directions of every module, MATH (1)-(6), (10).
//   balance    B' = B D, A' = D⁻¹A with powers of two              rows of A within 2^8 of the longest: lengths of its
//                                                                  rows may as well be in the columns of B
//   whitening  Gᴬ = L Lᵀ,  Lᵀ Gᴮ L = V Σ² Vᵀ,  T = L V Σ⁻¹         MATH (3): U = B T is orthonormal, σ are those of BA
//   product    M = (U₁ᵀU₂)…(U_{k-1}ᵀU_k)(U_kᵀU₁)                    MATH (5), real Schur form
//   palindrome M = C Cᵀ, C = (U₁ᵀU₂)…(U_{k-1}ᵀU_k)                  from the SVD of C; also product for k = 2
//   mean       M = (1/k) [U_iᵀU_j]                                   symmetric, order k·r
// One adapter (k = 1) is the whitening alone: basis = T, all its eigenvalues 1.
// Everything is float64: the Gram matrix has the square of its factors' condition number, and nothing here is large.
// Floor: about 9·k·r³ (two eigendecompositions a whitening) + 2·k·r³ (blocks) + 10·r³ operations a module; the
// blocks, k²·r² values, are read once.
#include "parallel.h"
#include "table.h"
#include "tile.h"

namespace fastlora::FASTLORA_ISA {
namespace {

// c [m, n] = op(a) · b with row-major operands; a is [m, k], or [k, m] when transposed.
void multiply(int m, int n, int k, const double* a, int64_t a_stride, bool a_transposed, const double* b,
              int64_t b_stride, double* c, int64_t c_stride) {
    const int64_t a_p = a_transposed ? a_stride : 1, a_i = a_transposed ? 1 : a_stride;
    if (n % kLanes<double> == 0) {
        product<double, true>(m, n, k, a, a_p, a_i, b, b_stride, c, c_stride);
        return;
    }
    for (int i = 0; i < m; ++i) {
        double* row = c + i * c_stride;
        for (int j = 0; j < n; ++j) row[j] = 0.0;
        for (int p = 0; p < k; ++p) {
            const double left = a[p * a_p + i * a_i];
            const double* right = b + p * b_stride;
            for (int j = 0; j < n; ++j) row[j] += left * right[j];
        }
    }
}

struct Buffers {
    double *values, *vectors;                 // [N, r], [N, r, r] of the eigendecompositions; N = groups · k
    double *root, *core;                      // L and LᵀGᴮL, then T in `root`: [N, r, r]
    double *powers, *floor;                   // [N, r] of the balance, [N] below which σ is noise
    double *chain, *left, *singular, *right;  // [groups, ·]: chain matrix, its left vectors, values, right vectors
    int32_t *info_a, *info_b;                 // [N]
    int32_t* info_chain;                      // [groups]
};

size_t lay_out(char* base, const ChainArgs& a, Buffers& b) {
    Arena arena(base);
    const size_t n = size_t(a.groups * a.k), r = size_t(a.r), w = size_t(a.width), g = size_t(a.groups);
    b.values = arena.take<double>(n * r);
    b.vectors = arena.take<double>(n * r * r);
    b.root = arena.take<double>(n * r * r);
    b.core = arena.take<double>(n * r * r);
    b.powers = arena.take<double>(n * r);
    b.floor = arena.take<double>(n);
    b.chain = arena.take<double>(g * w * w);
    b.left = arena.take<double>(g * w * w);
    b.singular = arena.take<double>(g * w);
    b.right = arena.take<double>(a.kind == kMean ? 0 : g * w * w);
    b.info_a = arena.take<int32_t>(n);
    b.info_b = arena.take<int32_t>(n);
    b.info_chain = arena.take<int32_t>(g);
    return arena.used();
}

// G_ij [r, r] of the projected side; only blocks i <= j are filled in.
const double* block(const ChainArgs& a, int64_t group, int64_t i, int64_t j) {
    return a.left + ((group * a.k + i) * a.k + j) * a.r * a.r;
}

// D and D⁻¹ Gᴬ D⁻¹ of one adapter. Rows that are not far shorter than the longest keep their bits.
void balance(const double* gram, int r, double* powers, double* balanced) {
    double longest = 0.0, greatest = 1.0;
    for (int j = 0; j < r; ++j) longest = max_(longest, gram[j * r + j]);
    for (int j = 0; j < r; ++j) {
        double square = gram[j * r + j], power = 1.0;
        while (square > 0.0 && square < kUnbalanced * longest && power > kLeastPower)
            square /= kUnbalanced, power *= kPower;
        powers[j] = power;
        greatest = max_(greatest, 1.0 / power);
    }
    if (greatest == 1.0) {
        __builtin_memcpy(balanced, gram, sizeof(double) * r * r);
        return;
    }
    for (int i = 0; i < r; ++i)
        for (int j = 0; j < r; ++j) balanced[i * r + j] = gram[i * r + j] / powers[i] / powers[j];
}

// What the arithmetic leaves of a σ that is zero: kArithmetic √(r ε) ‖B'‖ ‖A'‖, where A' has rows of length one. The
// squares of these norms are bounded by sums of rows of the Gram matrices.
double arithmetic_noise(const double* left, const double* right, int r, double* lengths, double* inverse) {
    double widest_left = 0.0, widest_right = 0.0;
    int rank = 0;
    for (int i = 0; i < r; ++i) {
        lengths[i] = sqrt_(max_(right[i * r + i], 0.0));
        inverse[i] = lengths[i] > 0.0 ? 1.0 / lengths[i] : 0.0;
        rank += lengths[i] > 0.0;
    }
    for (int i = 0; i < r; ++i) {
        double of_left = 0.0, of_right = 0.0;
        for (int j = 0; j < r; ++j) {
            of_left += abs_(left[i * r + j]) * lengths[j];
            of_right += abs_(right[i * r + j]) * inverse[j];
        }
        widest_left = max_(widest_left, of_left * lengths[i]);
        widest_right = max_(widest_right, of_right * inverse[i]);
    }
    return kArithmetic * sqrt_(rank * 2 * kEpsilon<double>) * sqrt_(widest_left) * sqrt_(widest_right);
}

// Columns of L: eigenvectors of the balanced Gᴬ times the root of their eigenvalue, their rows times D; directions at
// the rounding level are dropped.
void take_root(const double* values, const double* vectors, const double* powers, int r, double* root) {
    const double least = values[r - 1] * r * 4 * kEpsilon<double>;
    for (int j = 0; j < r; ++j) {
        const double scale = values[j] > least && values[j] > 0.0 ? sqrt_(values[j]) : 0.0;
        for (int i = 0; i < r; ++i) root[i * r + j] = scale == 0.0 ? 0.0 : vectors[j * r + i] * scale * powers[i];
    }
}

// How many of the descending singular values stay: noise floor, then rank, then share of the energy.
int64_t directions_kept(const double* sigma, const ChainArgs& a, double floor) {
    const double least = max_(a.rtol * sigma[0], floor);
    int64_t count = 0;
    double total = 0.0, kept = 0.0;
    while (count < a.r && sigma[count] > least && sigma[count] > 0.0) total += sigma[count] * sigma[count], ++count;
    if (a.rank > 0) count = min_(count, a.rank);
    if (a.energy < 1.0) {
        int64_t enough = 0;
        while (enough < count && kept < a.energy * total) kept += sigma[enough] * sigma[enough], ++enough;
        count = enough;
    }
    return count;
}

// T = L V Σ⁻¹ over the kept directions, in place of L; the other columns are zero.
void whiten(const ChainArgs& a, int64_t index, const Buffers& b, double* scratch) {
    const int r = int(a.r);
    const double* values = b.values + index * r;
    double* vectors = b.vectors + index * r * r;  // no longer needed once they are in `scratch`
    double *root = b.root + index * r * r, *sigma = a.sigma + index * r;
    for (int j = 0; j < r; ++j) sigma[j] = sqrt_(max_(values[r - 1 - j], 0.0));
    const int64_t kept = directions_kept(sigma, a, max_(a.floor[index], b.floor[index]));
    a.kept[index] = kept;
    for (int p = 0; p < r; ++p)
        for (int j = 0; j < r; ++j) scratch[p * r + j] = j < kept ? vectors[(r - 1 - j) * r + p] : 0.0;
    multiply(r, r, r, root, r, false, scratch, r, vectors, r);
    for (int i = 0; i < r; ++i)
        for (int j = 0; j < r; ++j) root[i * r + j] = j < kept ? vectors[i * r + j] / sigma[j] : 0.0;
}

// U_iᵀU_j = T_iᵀ G_ij T_j, i < j, MATH (2).
void overlap(const ChainArgs& a, const Buffers& b, int64_t group, int64_t i, int64_t j, double* out, int64_t out_stride,
             double* scratch) {
    const int r = int(a.r);
    const double *ti = b.root + (group * a.k + i) * r * r, *tj = b.root + (group * a.k + j) * r * r;
    multiply(r, r, r, block(a, group, i, j), r, false, tj, r, scratch, r);
    multiply(r, r, r, ti, r, true, scratch, r, out, out_stride);
}

// C = (U₁ᵀU₂)…(U_{k-1}ᵀU_k) in b.chain.
void multiply_chain(const ChainArgs& a, const Buffers& b, int64_t group, double* scratch) {
    const int r = int(a.r);
    double *chain = b.chain + group * r * r, *next = scratch + r * r, *product = scratch + 2 * r * r;
    for (int64_t i = 0; i + 1 < a.k; ++i) {
        double* out = i == 0 ? chain : next;
        overlap(a, b, group, i, i + 1, out, r, scratch);
        if (i == 0) continue;
        multiply(r, r, r, chain, r, false, next, r, product, r);
        __builtin_memcpy(chain, product, sizeof(double) * r * r);
    }
}

// basis_1 = T₁ Y for the first `count` columns of Y = y[row, column]; the rest of basis stays zero.
void write_basis(const ChainArgs& a, const Buffers& b, int64_t group, int64_t count, const double* y, int64_t row,
                 int64_t column) {
    const int r = int(a.r);
    const double* t = b.root + group * a.k * r * r;
    double* out = a.basis + group * a.k * r * a.width;
    for (int i = 0; i < r; ++i)
        for (int64_t j = 0; j < count; ++j) {
            double sum = 0.0;
            for (int p = 0; p < r; ++p) sum += t[i * r + p] * y[p * row + j * column];
            out[i * a.width + j] = sum;
        }
}

void set_value(const ChainArgs& a, int64_t group, int64_t j, double re, double im) {
    double* value = a.values + (group * a.width + j) * 2;
    value[0] = re + 0.0;
    value[1] = im + 0.0;
}

// k = 1: the whitening alone, every eigenvalue 1.
void finish_alone(const ChainArgs& a, const Buffers& b, int64_t group) {
    const int r = int(a.r);
    const int64_t count = a.kept[group];
    for (int64_t j = 0; j < r; ++j) set_value(a, group, j, j < count ? 1.0 : 0.0, 0.0);
    a.shared[group] = count;
    const double* t = b.root + group * r * r;
    double* out = a.basis + group * r * a.width;
    for (int i = 0; i < r; ++i)
        for (int64_t j = 0; j < count; ++j) out[i * a.width + j] = t[i * r + j];
}

// Squared singular values of C; left singular vectors are the eigenvectors.
void finish_symmetric(const ChainArgs& a, const Buffers& b, int64_t group) {
    const int64_t r = a.r, first_kept = a.kept[group * a.k];
    int64_t count = 0;
    for (int64_t j = 0; j < r; ++j) {
        const double s = j < first_kept ? b.singular[group * r + j] : 0.0;
        set_value(a, group, j, s * s, 0.0);
        if (j < first_kept && s * s > a.threshold) count = j + 1;
    }
    a.shared[group] = count;
    write_basis(a, b, group, count, b.left + group * r * r, 1, r);
}

// M = C · (U_kᵀU₁), its invariant subspace from the ordered real Schur form of the kept corner.
void finish_product(const ChainArgs& a, const Buffers& b, int64_t group, double* scratch) {
    const int r = int(a.r), n = int(a.kept[group * a.k]);
    double *closing = scratch + r * r, *m = scratch + 2 * r * r, *q = scratch + 3 * r * r, *re = scratch + 4 * r * r,
           *im = re + r;
    overlap(a, b, group, 0, a.k - 1, closing, r, scratch);
    for (int i = 0; i < r; ++i)
        for (int j = 0; j < r; ++j) scratch[j * r + i] = closing[i * r + j];
    multiply(n, n, r, b.chain + int64_t(group) * r * r, r, false, scratch, r, m, n);
    int count = 0;
    if (n > 0) b.info_chain[group] = ordered_schur(m, q, re, im, n, a.threshold, &count);
    for (int j = 0; j < r; ++j) set_value(a, group, j, j < n ? re[j] : 0.0, j < n ? im[j] : 0.0);
    a.shared[group] = count;
    const double* t = b.root + group * a.k * r * r;
    double* out = a.basis + group * a.k * r * a.width;
    multiply(r, count, n, t, r, false, q, n, out, a.width);
}

// M = (1/k)[U_iᵀU_j] of order k·r.
void fill_mean(const ChainArgs& a, const Buffers& b, int64_t group, double* scratch) {
    const int64_t r = a.r, w = a.width;
    double* m = b.chain + group * w * w;
    for (int64_t i = 0; i < w * w; ++i) m[i] = 0.0;
    for (int64_t i = 0; i < a.k; ++i) {
        for (int64_t d = 0; d < a.kept[group * a.k + i]; ++d) m[(i * r + d) * w + i * r + d] = 1.0 / double(a.k);
        for (int64_t j = i + 1; j < a.k; ++j) {
            double* out = scratch + r * r;
            overlap(a, b, group, i, j, out, r, scratch);
            for (int64_t p = 0; p < r; ++p)
                for (int64_t q = 0; q < r; ++q) m[(j * r + q) * w + i * r + p] = out[p * r + q] / double(a.k);
        }
    }
}

void finish_mean(const ChainArgs& a, const Buffers& b, int64_t group) {
    const int64_t r = a.r, w = a.width;
    const double *values = b.singular + group * w, *vectors = b.left + group * w * w;
    int64_t count = 0;
    for (int64_t j = 0; j < w; ++j) {
        set_value(a, group, j, values[w - 1 - j], 0.0);
        if (values[w - 1 - j] > max_(a.threshold, kLeastMean)) count = j + 1;
    }
    a.shared[group] = count;
    for (int64_t adapter = 0; adapter < a.k; ++adapter) {
        const double* t = b.root + (group * a.k + adapter) * r * r;
        double* out = a.basis + (group * a.k + adapter) * r * w;
        for (int64_t i = 0; i < r; ++i)
            for (int64_t j = 0; j < count; ++j) {
                const double* y = vectors + (w - 1 - j) * w + adapter * r;
                double sum = 0.0;
                for (int64_t p = 0; p < r; ++p) sum += t[i * r + p] * y[p];
                out[i * w + j] = sum / sqrt_(double(a.k) * values[w - 1 - j]);
            }
    }
}

int whiten_all(const ChainArgs& a, const Buffers& b) {
    const int64_t n = a.groups * a.k;
    const int r = int(a.r);
    for_stretches(int(a.threads), n, [&](int64_t i) {
        const double *gram = block(a, i / a.k, i % a.k, i % a.k), *other = a.right + i * r * r;
        b.floor[i] = arithmetic_noise(gram, other, r, b.values + i * r, b.powers + i * r);
        balance(other, r, b.powers + i * r, b.core + i * r * r);
    });
    int status = eigh<double>(b.core, b.values, b.vectors, b.info_a, n, r, int(a.threads));
    if (status != kDone) return status;
    for_stretches(int(a.threads), n, [&](int64_t i) {
        const double* gram = block(a, i / a.k, i % a.k, i % a.k);
        double *root = b.root + i * r * r, *core = b.core + i * r * r, *scratch = b.vectors + i * r * r;
        take_root(b.values + i * r, scratch, b.powers + i * r, r, root);
        multiply(r, r, r, gram, r, false, root, r, scratch, r);
        multiply(r, r, r, root, r, true, scratch, r, core, r);
    });
    status = eigh<double>(b.core, b.values, b.vectors, b.info_b, n, r, int(a.threads));
    if (status != kDone) return status;
    for_stretches(int(a.threads), n, [&](int64_t i) { whiten(a, i, b, b.core + i * r * r); });
    return kDone;
}

// Whether none is NaN or infinite: what is finite is zero times zero.
bool all_finite(const double* values, int64_t n) {
    constexpr int lanes = kLanes<double>;
    Vec<double> sum{};
    int64_t i = 0;
    for (; i + lanes <= n; i += lanes) sum += load<double>(values + i) * Vec<double>{};
    for (; i < n; ++i)
        if (!finite_(values[i])) return false;
    for (int lane = 0; lane < lanes; ++lane)
        if (sum[lane] != 0.0) return false;
    return true;
}

// A module with a bad block reports it and shares nothing.
bool report(const ChainArgs& a, const Buffers& b, int64_t group) {
    int32_t worst = b.info_chain[group];
    for (int64_t i = 0; i < a.k; ++i) {
        worst = max_(worst, max_(b.info_a[group * a.k + i], b.info_b[group * a.k + i]));
        for (int64_t j = i + 1; j < a.k; ++j)
            if (!all_finite(block(a, group, i, j), a.r * a.r)) worst = max_(worst, int32_t(kNonFinite));
    }
    a.info[group] = worst;
    return worst == kOk;
}

void clear(const ChainArgs& a, int64_t group) {
    a.shared[group] = 0;
    for (int64_t j = 0; j < a.width; ++j) set_value(a, group, j, 0.0, 0.0);
    double* basis = a.basis + group * a.k * a.r * a.width;
    for (int64_t i = 0; i < a.k * a.r * a.width; ++i) basis[i] = 0.0;
}

}  // namespace

int chain(const ChainArgs& a) {
    if (a.groups == 0 || a.k == 0) return kDone;
    Workspace memory, scratch_memory;
    Buffers b{};
    const size_t scratch_values = size_t(4 * a.r * a.r + 2 * a.r);
    if (!memory.reserve(lay_out(nullptr, a, b)) ||
        !scratch_memory.reserve(sizeof(double) * scratch_values * size_t(max_<int64_t>(a.threads, 1))))
        return kOutOfMemory;
    lay_out(memory.data(), a, b);
    int status = whiten_all(a, b);
    if (status != kDone) return status;
    const bool alone = a.kind != kMean && a.k == 1;
    const bool symmetric = a.kind == kPalindrome || (a.kind == kProduct && a.k == 2);

    // Every slice of the groups works in its own slice of the scratch memory.
    const int slices = int(max_<int64_t>(a.threads, 1));
    double* scratch_base = reinterpret_cast<double*>(scratch_memory.data());
    for_stretches(slices, slices, [&](int64_t slice) {
        for (int64_t g = slice; g < a.groups; g += slices) {
            double* scratch = scratch_base + size_t(slice) * scratch_values;
            b.info_chain[g] = kOk;
            clear(a, g);
            if (a.kind == kMean)
                fill_mean(a, b, g, scratch);
            else if (!alone)
                multiply_chain(a, b, g, scratch);
            if (!report(a, b, g)) {
                for (int64_t i = 0; i < a.width * a.width; ++i) b.chain[g * a.width * a.width + i] = 0.0;
                continue;
            }
            if (alone) {
                finish_alone(a, b, g);
            } else if (a.kind == kProduct && !symmetric) {
                finish_product(a, b, g, scratch);
                if (b.info_chain[g] != kOk) {
                    a.info[g] = b.info_chain[g];
                    clear(a, g);
                }
            }
        }
    });
    if (alone) return kDone;
    if (a.kind == kMean)
        status = eigh<double>(b.chain, b.singular, b.left, b.info_chain, a.groups, int(a.width), int(a.threads));
    else if (symmetric)
        status = svd<double>(b.chain, b.left, b.singular, b.right, b.info_chain, a.groups, int(a.r), int(a.r),
                             int(a.threads));
    if (status != kDone || (a.kind == kProduct && !symmetric)) return status;

    for_stretches(int(a.threads), a.groups, [&](int64_t g) {
        if (a.info[g] == kOk) a.info[g] = b.info_chain[g];
        if (a.info[g] != kOk) return;
        if (a.kind == kMean)
            finish_mean(a, b, g);
        else
            finish_symmetric(a, b, g);
    });
    return kDone;
}

}  // namespace fastlora::FASTLORA_ISA
