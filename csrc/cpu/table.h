// What the files of one instruction set give one another: the kernels that read or write tall factors, the small
// program between them, and the batched small solvers, which are in the table too.
#pragma once
#include "simd.h"

namespace fastlora::FASTLORA_ISA {

int gram(const Matrix* factors, const GramTask* tasks, const GramBlock* blocks, int64_t n_tasks, int threads);

CombineProblem combine(const CombineTables& tables, int threads);

int chain(const ChainArgs& args);

int merge_select(const MergeArgs& args);
int merge_row_masks(const MergeArgs& args);
int merge_tiles(const MergeArgs& args);

int similarity(const SimilarityArgs& args);

AddProblem add_products(const AddArgs& args);

int tucker(const TuckerArgs& args);

int difference_products(const DifferenceArgs& args);

bool finite(const Matrix& matrix);

template <class T>
int eigh(const T* a, T* values, T* vectors, int32_t* info, int64_t batch, int n, int threads);

// Symmetric matrices of one size, and where their decompositions go: the arguments of eigh.
template <class T>
struct EighBatch {
    const T* a;
    T *values, *vectors;
    int32_t* info;
    int64_t batch;
    int n;
};

// eigh of several batches; threads share all of the work on small matrices, in the order of the batches.
template <class T>
int eigh_of_sizes(const EighBatch<T>* batches, int count, int threads);

template <class T>
int svd(const T* a, T* ut, T* s, T* vt, int32_t* info, int64_t batch, int p, int q, int threads);

// Real invariant subspace of one nonsymmetric matrix a [n, n] row-major (destroyed).
//   re, im [n]: eigenvalues, descending by real part, a conjugate pair together, positive imaginary part first.
//   q [n, n] row-major: orthonormal; its first `count` columns span the invariant subspace of the
//   eigenvalues with real part > threshold, where count (the return value in *count) keeps pairs together.
// Returns an Info.
int32_t ordered_schur(double* a, double* q, double* re, double* im, int n, double threshold, int* count);

}  // namespace fastlora::FASTLORA_ISA
