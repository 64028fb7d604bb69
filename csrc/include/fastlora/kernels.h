// The CPU kernels as plain functions on raw pointers: no torch, no Python, no exceptions.
// One table per instruction set; dispatch.cpp chooses the table once per process.
#pragma once
#include <cstdint>

namespace fastlora {

enum class DType : int64_t { f32 = 0, f64 = 1, f16 = 2, bf16 = 3, bytes = 4 };  // bytes are only copied

// What a batched solver reports for each matrix.
enum Info : int32_t { kOk = 0, kNonFinite = 1, kNotConverged = 2 };

// Which operator a chain is made of: P_1 … P_k, C Cᵀ with C = P_1 … P_k, or (1/k) Σ P_i.
enum ChainKind : int64_t { kProduct = 0, kPalindrome = 1, kMean = 2 };

// z = Σ_i U_i y_i / √(kλ) is the unit eigenvector of (1/k) Σ P_i for M y = λ y. Where λ is at the rounding level, z is
// the difference of nearly equal vectors and no direction, whatever the threshold.
constexpr double kLeastMean = 1e-10;

// What a kernel call returns.
enum Status : int { kDone = 0, kOutOfMemory = 1 };

// A stored matrix, row-major, at any address (files place tensors at odd offsets).
struct Matrix {
    int64_t data;  // address of element (0, 0)
    int64_t rows;
    int64_t cols;
    int64_t stride;  // elements between rows
    int64_t dtype;   // DType
};

// One Gram block: out[a, b] = scale * the sum over the long dimension of left[:, a] * right[:, b].
struct GramBlock {
    int64_t left;    // index of a factor of the task
    int64_t right;   // index of a factor of the task
    int64_t out;     // address of a double [rank_left, rank_right]
    int64_t stride;  // elements between rows of out
    int64_t mirror;  // address of its transpose, of the same stride, or 0
    double scale;
};

// All blocks of one module and side: every factor is read once.
struct GramTask {
    int64_t first_factor, factors;  // range in the factor table
    int64_t first_block, blocks;    // range in the block table
    int64_t rows;                   // 0: factors are [n, r] (a B side); 1: [r, n] (an A side)
};

// out[:, at : at + q] += scale * X @ C   (B side: X [n, r], C [r, q])
// out[at : at + q, :] += scale * C @ X   (A side: X [r, n], C [q, r])
struct Term {
    int64_t factor;       // index of a factor of the task
    int64_t coefficient;  // address of a double C, or 0 for the identity
    int64_t stride;       // elements between rows of C
    int64_t columns;      // q
    int64_t at;           // first column (B side) or row (A side) of the output
    double scale;
};

struct CombineOutput {
    int64_t matrix;             // index in the output table; without an address there if it only goes to a file
    int64_t first_term, terms;  // range in the term table
    int64_t file;               // descriptor of an open file that it is written to, or -1
    int64_t offset;             // where in that file
    int64_t check;              // 1: NaN and infinity are not written
};

struct CombineTask {
    int64_t first_factor, factors;
    int64_t first_output, outputs;
    int64_t rows;  // as in GramTask
};

struct CombineTables {
    const Matrix* factors;
    const CombineTask* tasks;
    const CombineOutput* outputs;
    const Matrix* matrices;
    const Term* terms;
    int64_t n_tasks;
    bool to_files;  // some output has a file; those with an address and a file are written as they are
};

enum ProblemKind : int { kNoProblem = 0, kNoMemory = 1, kNotFinite = 2, kSystemError = 3 };

struct CombineProblem {
    ProblemKind kind;
    int64_t output;  // index in the output table, of the last two
    int error;       // errno of a system error
};

// Arguments of the chain kernel, a row of 8-byte fields: see csrc/cpu/chain.cpp.
struct ChainArgs {
    const double* left;   // [g, k, k, r, r]: Gram blocks of the projected side, zero-padded
    const double* right;  // [g, k, r, r]: Gram blocks of the other side
    const double* floor;  // [g, k]: singular values at or below this are cut
    double* basis;        // [g, k, r, width]: Z = sum_i U-side factor_i @ basis_i
    double* values;       // [g, width, 2]: eigenvalues (re, im), descending by real part
    int64_t* shared;      // [g]: eigenvalues above the threshold
    int64_t* kept;        // [g, k]: directions kept per adapter
    double* sigma;        // [g, k, r]: singular values of the unscaled products, descending
    int32_t* info;        // [g]: Info
    int64_t groups, k, r, width;
    int64_t kind;  // ChainKind
    double threshold, rtol;
    int64_t rank;   // keep at most this many directions per adapter; 0: no cut
    double energy;  // keep this share of the energy per adapter; >= 1: no cut
    int64_t threads;
};

// The updates s_i B_i A_i of one module [n, m] whose elements are merged, and what becomes of them. A row of 8-byte
// fields: see csrc/cpu/merge_tiles.cpp. All passes of merge_tiles take it; each reads what it needs.
enum TrimKind : int64_t { kKeepAll = 0, kMagnitude = 1, kRandom = 2, kBits = 3, kVariance = 4 };
enum ElectKind : int64_t { kElectNone = 0, kElectTotal = 1, kElectFrequency = 2 };

struct CutQuery;

struct MergeArgs {
    const Matrix* factors;  // [2k]: B_i [n, r_i], A_i [r_i, m]; of rank 0 for an update of zero
    const double* scales;   // [k]: s_i
    int64_t k, n, m;
    int64_t is_double;  // elements are float64, else float32
    int64_t threads;
    int64_t trim;       // TrimKind
    const double* low;  // [k]: magnitudes of what is kept ([1] for kVariance), and the elements of that magnitude,
    const int64_t* low_order;  // of which the first are kept
    const double* high;        // [k] or null: of what is not kept above that
    const int64_t* high_order;
    const uint64_t* keep;     // [k]: words below are kept
    const uint64_t* keys;     // [k]: of Philox
    uint64_t module_key;      // upper half of its counter
    uint64_t* bits;           // [k, n, ceil(m / 64)]: masks; the result of merge_row_masks
    const double* row_least;  // [k]: of merge_row_masks, probability of the least element of a row
    const double* row_span;   // [k]: and what the largest has more
    int64_t elect;            // ElectKind
    const double* votes;      // [k]
    const double* gains;      // [k]
    const double* shares;     // [k], or null: no divisor
    double least, instead;    // a divisor below `least` is `instead`
    double scale;
    int64_t zero;        // the sign of a vote that is 0: 1 or -1
    const Matrix* out;   // [1] or null: the merged matrix
    int64_t add;         // 1: is added to what out holds
    const double* thin;  // [m, width] or [n, width], width a multiple of 8, or null
    int64_t width;
    int64_t transposed;  // 1: product = M' thin [m, width], else M thin [n, width]
    double* product;
    double* square;     // [1]: sum of squares of the merged matrix
    int64_t* counts;    // [2]: undecided places, majority; null: not counted
    double* sums;       // [k, 3]: sums of |x|, |v|, v^2; null: not summed
    CutQuery* queries;  // of merge_select
    int64_t n_queries;
    int64_t variance;  // 1: queries are of the variances of places
};

// The cut that keeps the `rank` largest magnitudes; rank -1: `order` is the number of those above
// `magnitude`.
struct CutQuery {
    int64_t adapter, rank;
    double magnitude;
    int64_t order;
};

// All updates U_i R_i of one module side by side, each U_i with orthonormal columns. A row of 8-byte fields: see
// csrc/cpu/similarity.cpp.
struct SimilarityArgs {
    const float* left;      // [n, width]: the U_i
    const float* right;     // [m, width]: the R_i'
    const int64_t* starts;  // [k + 1]: first column of each
    const int64_t* kept;    // [k]: columns of U_i that count in `shared`, at most its width
    double* inner;          // [k, k]: <U_i R_i, U_j R_j>
    double* shared;         // [k, k]: |U_i' U_j|^2 of what is kept
    int64_t n, m, width, k;
    int64_t split;  // 0: all pairs; s: those of i < s with j >= s, the rest is not written
    int64_t threads;
};

// Two small sides of the matrices of many modules, and where their subspaces start and end. A row of 8-byte fields: see
// csrc/cpu/tucker.cpp.
struct TuckerArgs {
    const double* left;   // [modules, k, r, n]: the L_i'
    const double* right;  // [modules, k, r, m]: the R_i'
    const double* u;      // [modules, n, c]
    const double* v;      // [modules, m, c]
    double* u_end;        // as u
    double* v_end;        // as v
    int64_t* steps;       // [modules]
    int64_t modules, k, r, n, m, c;
    int64_t iterations;
    double tolerance;
    int64_t threads;
};

// In what the products of a difference are computed: bfloat16 where the instruction set multiplies it, else float32; as
// float32; float64.
enum Precision : int64_t { kCoarse = 0, kPlain = 1, kWide = 2 };

// The difference of two stored matrices of one shape, and what it is multiplied by. A row of 8-byte fields: see
// csrc/cpu/difference_products.cpp.
struct DifferenceArgs {
    const Matrix* old;      // [1] or null: zero
    const Matrix* current;  // [1]
    const double* right;    // [m, width] or null
    const double* left;     // [n, width], or null where there is a right
    double* images;         // [n, width] or null
    double* preimages;      // [m, width] or null
    double* square;         // [1] or null
    int64_t n, m, width;
    int64_t precision;  // Precision
    int64_t threads;
};

// Columns of a matrix, and the pairs that are added to them; none: they are only converted.
struct AddSegment {
    int64_t first_pair, pairs;  // range in the tables of factors and scales
    int64_t left, width;
};

// W' = W + the products of its segments: see csrc/cpu/add_products.cpp. A row of 8-byte fields.
struct AddArgs {
    const Matrix* factors;       // [2 a pair]: L [rows, r], R [r, width]
    const double* scales;        // [1 a pair]
    const AddSegment* segments;  // of all columns, in their order
    int64_t n_segments;
    const Matrix* from;  // [1]: W; without an address where it is in a file, as rows that follow one another
    const Matrix* to;    // [1]: W', which may be W
    int64_t from_file, from_offset;  // an open file and where W starts in it, or -1: of both or of none
    int64_t to_file, to_offset;
    int64_t is_double;  // sums are float64, else float32
    int64_t threads;
};

enum AddProblemKind : int {
    kAdded = 0,
    kNoRoom = 1,
    kResultNotFinite = 2,
    kSourceError = 3,
    kShortSource = 4,
    kTargetError = 5
};

struct AddProblem {
    AddProblemKind kind;
    int error;  // errno of an error of the source or the target
};

struct Kernels {
    const char* name;
    int (*gram)(const Matrix* factors, const GramTask* tasks, const GramBlock* blocks, int64_t n_tasks, int threads);
    CombineProblem (*combine)(const CombineTables& tables, int threads);
    int (*chain)(const ChainArgs& args);
    int (*merge_select)(const MergeArgs& args);
    int (*merge_row_masks)(const MergeArgs& args);
    int (*merge_tiles)(const MergeArgs& args);
    int (*similarity)(const SimilarityArgs& args);
    AddProblem (*add_products)(const AddArgs& args);
    int (*tucker)(const TuckerArgs& args);
    int (*difference_products)(const DifferenceArgs& args);
    bool (*finite)(const Matrix& matrix);  // neither NaN nor infinity
    // a [batch, n, n] row-major; values [batch, n] ascending; vectors [batch, n, n]: row j is eigenvector j.
    int (*eigh_f32)(const float* a, float* values, float* vectors, int32_t* info, int64_t batch, int n, int threads);
    int (*eigh_f64)(const double* a, double* values, double* vectors, int32_t* info, int64_t batch, int n, int threads);
    // a [batch, p, q] row-major, m = min(p, q); ut [batch, m, p]: row j is left vector j; s [batch, m]
    // descending; vt [batch, m, q].
    int (*svd_f32)(const float* a, float* ut, float* s, float* vt, int32_t* info, int64_t batch, int p, int q,
                   int threads);
    int (*svd_f64)(const double* a, double* ut, double* s, double* vt, int32_t* info, int64_t batch, int p, int q,
                   int threads);
};

// The table in use: the best that this processor runs, or the one named by FASTLORA_ISA.
const Kernels& kernels();

}  // namespace fastlora
