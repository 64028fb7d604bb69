// Sorting of rows where they lie, by threads that each move one column.
#pragma once
#include "groups.cuh"

namespace fastlora::cuda {

// Entry r of the column becomes entry order[r], times sign[order[r]]; adding zero turns -0 into +0. It moves along the
// cycles of the permutation, each of which starts at its smallest row.
template <class T>
__device__ void permute_rows(Traced<T> column, int64_t step, int n, Traced<int> order, Traced<T> sign) {
    for (int start = 0; start < n; ++start) {
        int from = order[start];
        while (from > start) from = order[from];
        if (from < start) continue;
        const T first = column[start * step];
        int to = start;
        for (from = order[start]; from != start; from = order[to]) {
            column[to * step] = column[from * step] * sign[from] + T(0);
            to = from;
        }
        column[to * step] = first * sign[start] + T(0);
    }
}

}  // namespace fastlora::cuda
