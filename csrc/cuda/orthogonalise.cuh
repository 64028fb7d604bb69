// One-sided Jacobi: rotates the columns of X [rows, n] until they are orthogonal, X Q = V Σ.
//   Column c at x + c·ld. On return the columns are V Σ in no order, the squares [n] their squared norms.
// The left singular vectors are the columns themselves, so no rotation is accumulated: a whitening, the singular
// values and left vectors of C, and the eigenvectors of a factored Gram matrix all end here.
// A tournament (jacobi.cuh) whose pairs are each shared by a few neighbouring lanes. Columns must be scaled to largest
// entries near one. 8 rows + 16 rows/turn operations a pair, n²/2 pairs a sweep, 5 to 8 sweeps.
// Algorithm: Hestenes; Brent and Luk's ordering; stop test of LAPACK gesvj.
#pragma once
#include "groups.cuh"
#include "jacobi.cuh"
#include "scalar.cuh"

namespace fastlora::cuda {

// Squares below it count as zero: columns 1e-70 times the largest are no directions.
constexpr double kLeastProduct = 1e-290;

// Lanes that share a pair: as many as keep the crew busy with all pairs at once, a power of two.
__device__ __host__ inline int lanes_of_pair(int n, int members) {
    int lanes = 32;
    while (lanes > 4 && lanes * ((n + 1) / 2) > members) lanes /= 2;
    if (members == 32)
        while (lanes > 1 && lanes * ((n + 1) / 2) > members) lanes /= 2;
    return lanes;
}

struct Rotation {
    double cosine, sine;
};

// Makes columns of squared norms a, b and product d orthogonal by the smaller angle. The tangent needs no more than
// rough quotients: what it misses, the next sweep finds. Cosine and sine agree to full precision.
__device__ __forceinline__ Rotation orthogonalising(double a, double b, double d) {
    const double half = 0.5 * (b - a), square = fma(half, half, d * d);
    const double root = square * rough_inverse_root(square);
    const double tangent = d * rough_reciprocal(half + copy_sign(root, half));
    const double cosine = quick_inverse_root(fma(tangent, tangent, 1.0));
    return {cosine, tangent * cosine};
}

__device__ __forceinline__ double sum_over(double x, int lanes) {
    for (int offset = lanes / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(kAllLanes, x, offset);
    return x;
}

// The two columns of one pair, by `lanes` lanes that each take every lanes-th row. kHeld rows are kept in registers
// between the products and the rotation; kHeld = 0 reads them again. Lanes without a pair pass rows = 0.
template <int kHeld>
__device__ __forceinline__ bool orthogonalise_pair(Doubles x, Doubles y, int rows, int lane, int lanes,
                                                   double tolerance) {
    double held_x[kHeld > 0 ? kHeld : 1], held_y[kHeld > 0 ? kHeld : 1];
    double a = 0, b = 0, d = 0;
    if constexpr (kHeld > 0) {
#pragma unroll
        for (int m = 0; m < kHeld; ++m) {
            const int i = lane + m * lanes;
            held_x[m] = i < rows ? double(x[i]) : 0.0;
            held_y[m] = i < rows ? double(y[i]) : 0.0;
            a = fma(held_x[m], held_x[m], a);
            b = fma(held_y[m], held_y[m], b);
            d = fma(held_x[m], held_y[m], d);
        }
    } else {
        for (int i = lane; i < rows; i += lanes) {
            const double p = x[i], q = y[i];
            a = fma(p, p, a);
            b = fma(q, q, b);
            d = fma(p, q, d);
        }
    }
    a = sum_over(a, lanes);
    b = sum_over(b, lanes);
    d = sum_over(d, lanes);
    const bool turns = d * d > fmax(tolerance * a * b, kLeastProduct);
    if (!__any_sync(kAllLanes, turns)) return false;
    const Rotation r = orthogonalising(turns ? a : 1.0, turns ? b : 1.0, turns ? d : 1.0);
    if (!turns) return false;
    if constexpr (kHeld > 0) {
#pragma unroll
        for (int m = 0; m < kHeld; ++m) {
            const int i = lane + m * lanes;
            if (i >= rows) continue;
            x[i] = r.cosine * held_x[m] - r.sine * held_y[m];
            y[i] = r.sine * held_x[m] + r.cosine * held_y[m];
        }
    } else {
        for (int i = lane; i < rows; i += lanes) {
            const double p = x[i], q = y[i];
            x[i] = r.cosine * p - r.sine * q;
            y[i] = r.sine * p + r.cosine * q;
        }
    }
    return true;
}

template <int kHeld>
__device__ __forceinline__ bool sweep(Crew crew, Doubles x, int rows, int n, int ld, int lanes) {
    const int lane = crew.rank % lanes;
    const double tolerance = orthogonality_tolerance<double>(rows);
    return tournament_sweep(crew, n, lanes, [=](int first, int second, bool is_pair) {
        return orthogonalise_pair<kHeld>(x + (is_pair ? first : 0) * ld, x + (is_pair ? second : 0) * ld,
                                         is_pair ? rows : 0, lane, lanes, tolerance);
    });
}

// Begins with a barrier. False if the columns are not orthogonal after kMaxJacobiSweeps.
__device__ __forceinline__ bool orthogonalise(Crew crew, Doubles x, int rows, int n, int ld, Doubles squares) {
    const int lanes = lanes_of_pair(n, crew.size);
    bool turned = true;
    for (int count = 0; turned && count < kMaxJacobiSweeps; ++count)
        turned = rows <= 4 * lanes ? sweep<4>(crew, x, rows, n, ld, lanes) : sweep<0>(crew, x, rows, n, ld, lanes);
    crew.sync();
#pragma unroll 1
    for (int j = crew.rank; j < n; j += crew.size) {
        double sum = 0;
        for (int i = 0; i < rows; ++i) {
            const double entry = x[j * ld + i];
            sum = fma(entry, entry, sum);
        }
        squares[j] = sum;
    }
    crew.sync();
    return !turned;
}

}  // namespace fastlora::cuda
