// S = L Lᵀ for positive semidefinite S, in place, one matrix or two of one size side by side.
//   Column c at m + c·ld. The pivot is the largest diagonal entry of what is left; its column of L takes the place of
//   that column of S, so L has the rows of S in their order. What is left below 4·n·u of the largest diagonal entry
//   is rounding: those columns are zero.
// Left-looking: step t costs one dot product of length t per row, and two barriers. n³/3 operations.
// Algorithm: Higham, Accuracy and Stability of Numerical Algorithms, section 10.3.
#pragma once
#include "groups.cuh"
#include "scalar.cuh"

namespace fastlora::cuda {

struct Pivot {
    int column;
    double size;
};

__device__ __forceinline__ Pivot largest_of(Doubles x, int n) {
    Pivot best{0, x[0]};
#pragma unroll 2
    for (int i = 1; i < n; ++i) {
        const double size = x[i];
        if (size > best.size) best = {i, size};
    }
    return best;
}

// count: 2 matrices, or 1 and no second. remaining [2 n], order [2 n]: scratch.
__device__ __forceinline__ void pivoted_cholesky(Crew crew, int count, int n, int ld, Doubles first, Doubles second,
                                                 Doubles remaining, Ints order) {
    const int rows = count * n;
#pragma unroll 1
    for (int e = crew.rank; e < rows; e += crew.size) {
        const int i = e < n ? e : e - n;
        remaining[e] = (e < n ? first : second)[i * ld + i];
        order[e] = -1;
    }
    crew.sync();
    const double relative = 4 * n * kEpsilon<double>;
    const double first_limit = relative * largest_of(remaining, n).size;
    const double second_limit = count > 1 ? relative * largest_of(remaining + n, n).size : 0.0;
    for (int step = 0; step < n; ++step) {
#pragma unroll 1
        for (int e = crew.rank; e < rows; e += crew.size) {
            const bool other = e >= n;
            const Doubles m = other ? second : first;
            const Doubles left = remaining + (other ? n : 0);
            const Ints chosen = order + (other ? n : 0);
            const Pivot pivot = largest_of(left, n);
            if (!(pivot.size > (other ? second_limit : first_limit))) continue;
            const int i = other ? e - n : e, p = pivot.column;
            double value = 0.0;
            if (left[i] >= 0.0) {
                double sum = m[p * ld + i];
                for (int t = 0; t < step; ++t) {
                    const Doubles column = m + chosen[t] * ld;
                    sum -= column[i] * column[p];
                }
                value = i == p ? sqrt(pivot.size) : sum * quick_inverse_root(pivot.size);
            }
            m[p * ld + i] = value;
            if (i == p) chosen[step] = p;
        }
        crew.sync();
        if (order[step] < 0 && (count < 2 || order[n + step] < 0)) break;
#pragma unroll 1
        for (int e = crew.rank; e < rows; e += crew.size) {
            const bool other = e >= n;
            const int i = other ? e - n : e, p = order[(other ? n : 0) + step];
            if (p < 0 || remaining[e] < 0.0) continue;
            const double value = (other ? second : first)[p * ld + i];
            remaining[e] = i == p ? -1.0 : fmax(remaining[e] - value * value, 0.0);
        }
        crew.sync();
    }
    crew.sync();
    for_entries(crew, n, rows, [&](int row, int of_both) {
        const bool other = of_both >= n;
        if (remaining[of_both] >= 0.0) (other ? second : first)[(other ? of_both - n : of_both) * ld + row] = 0.0;
    });
    crew.sync();
}

}  // namespace fastlora::cuda
