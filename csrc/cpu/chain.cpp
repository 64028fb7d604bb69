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
#include "chain_whitening.h"

namespace fastlora::FASTLORA_ISA {
namespace {

int size(const ChainArgs& a, const ChainBuffers& b, int64_t group, int64_t i) {
    return int(b.member[group * a.k + i].n);
}

// U_iᵀU_j = T_iᵀ G_ij T_j, i < j, MATH (2): of their sizes.
void overlap(const ChainArgs& a, const ChainBuffers& b, int64_t group, int64_t i, int64_t j, double* out,
             int64_t out_stride, double* scratch) {
    const int64_t r = a.r;
    const int m = size(a, b, group, i), n = size(a, b, group, j);
    const double *ti = b.root + (group * a.k + i) * r * r, *tj = b.root + (group * a.k + j) * r * r;
    multiply(m, n, n, block(a, group, i, j), r, false, tj, r, scratch, r);
    multiply(m, n, m, ti, r, true, scratch, r, out, out_stride);
}

// C = (U₁ᵀU₂)…(U_{k-1}ᵀU_k) in b.chain.
void multiply_chain(const ChainArgs& a, const ChainBuffers& b, int64_t group, double* scratch) {
    const int64_t r = a.r;
    const int m = size(a, b, group, 0);
    double *chain = b.chain + group * r * r, *next = scratch + r * r, *product = scratch + 2 * r * r;
    int n = m;
    for (int64_t i = 0; i + 1 < a.k; ++i) {
        const int before = n;
        n = size(a, b, group, i + 1);
        overlap(a, b, group, i, i + 1, i == 0 ? chain : next, r, scratch);
        if (i == 0) continue;
        multiply(m, n, before, chain, r, false, next, r, product, r);
        for (int row = 0; row < m; ++row) __builtin_memcpy(chain + row * r, product + row * r, sizeof(double) * n);
    }
    for (int64_t row = 0; row < r; ++row)
        for (int64_t column = row < m ? n : 0; column < r; ++column) chain[row * r + column] = 0.0;
}

// basis_1 = T₁ Y for the first `count` columns of Y = y[row, column]; the rest of basis stays zero.
void write_basis(const ChainArgs& a, const ChainBuffers& b, int64_t group, int64_t count, const double* y, int64_t row,
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
void finish_alone(const ChainArgs& a, const ChainBuffers& b, int64_t group) {
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
void finish_symmetric(const ChainArgs& a, const ChainBuffers& b, int64_t group) {
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
void finish_product(const ChainArgs& a, const ChainBuffers& b, int64_t group, double* scratch) {
    const int r = int(a.r), n = int(a.kept[group * a.k]);
    double *closing = scratch + r * r, *m = scratch + 2 * r * r, *q = scratch + 3 * r * r, *re = scratch + 4 * r * r,
           *im = re + r;
    const int first = size(a, b, group, 0), last = size(a, b, group, a.k - 1);
    overlap(a, b, group, 0, a.k - 1, closing, r, scratch);
    for (int i = 0; i < first; ++i)
        for (int j = 0; j < last; ++j) scratch[j * r + i] = closing[i * r + j];
    multiply(n, n, last, b.chain + int64_t(group) * r * r, r, false, scratch, r, m, n);
    int count = 0;
    if (n > 0) b.info_chain[group] = ordered_schur(m, q, re, im, n, a.threshold, &count);
    for (int j = 0; j < r; ++j) set_value(a, group, j, j < n ? re[j] : 0.0, j < n ? im[j] : 0.0);
    a.shared[group] = count;
    const double* t = b.root + group * a.k * r * r;
    double* out = a.basis + group * a.k * r * a.width;
    multiply(r, count, n, t, r, false, q, n, out, a.width);
}

// M = (1/k)[U_iᵀU_j] of order k·r.
void fill_mean(const ChainArgs& a, const ChainBuffers& b, int64_t group, double* scratch) {
    const int64_t r = a.r, w = a.width;
    double* m = b.chain + group * w * w;
    for (int64_t i = 0; i < w * w; ++i) m[i] = 0.0;
    for (int64_t i = 0; i < a.k; ++i) {
        for (int64_t d = 0; d < a.kept[group * a.k + i]; ++d) m[(i * r + d) * w + i * r + d] = 1.0 / double(a.k);
        for (int64_t j = i + 1; j < a.k; ++j) {
            double* out = scratch + r * r;
            overlap(a, b, group, i, j, out, r, scratch);
            for (int64_t p = 0; p < size(a, b, group, i); ++p)
                for (int64_t q = 0; q < size(a, b, group, j); ++q)
                    m[(j * r + q) * w + i * r + p] = out[p * r + q] / double(a.k);
        }
    }
}

void finish_mean(const ChainArgs& a, const ChainBuffers& b, int64_t group) {
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
bool report(const ChainArgs& a, const ChainBuffers& b, int64_t group) {
    int32_t worst = b.info_chain[group];
    for (int64_t i = 0; i < a.k; ++i) {
        const int64_t place = b.member[group * a.k + i].place;
        worst = max_(worst, max_(b.info_a[place], b.info_b[place]));
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
    ChainBuffers b{};
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
