// The batched small solvers of one instruction set, for the table and for the kernels built on them.
#pragma once
#include "simd.h"

namespace fastlora::FASTLORA_ISA {

template <class T>
int eigh(const T* a, T* values, T* vectors, int32_t* info, int64_t batch, int n, int threads);

template <class T>
int svd(const T* a, T* ut, T* s, T* vt, int32_t* info, int64_t batch, int p, int q, int threads);

// Real invariant subspace of one nonsymmetric matrix a [n, n] row-major (destroyed).
//   re, im [n]: eigenvalues, descending by real part, a conjugate pair together, positive imaginary part first.
//   q [n, n] row-major: orthonormal; its first `count` columns span the invariant subspace of the
//   eigenvalues with real part > threshold, where count (the return value in *count) keeps pairs together.
// Returns an Info.
int32_t ordered_schur(double* a, double* q, double* re, double* im, int n, double threshold, int* count);

}  // namespace fastlora::FASTLORA_ISA
