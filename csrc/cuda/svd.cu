// Launches of the singular value decompositions: the form that fits the sizes and the device.
//   a [batch, p, q] row-major, m = min(p, q)     s [batch, m] descending
//   ut [batch, m, p]: row j is left vector j
//   vt [batch, m, q]: row j is right vector j; its entry of largest magnitude (first of equals) is positive
//   info [batch]: Info; NaN where the matrix is not finite
// One-sided Jacobi rotates the columns of A (of A' when p < q) until they are orthogonal to working precision; their
// norms are s, their directions the vectors of the long side, the accumulated rotations those of the short side.
// Columns that are zero, or too short for their squares, get directions from Gram-Schmidt (complete.cuh).
#include "fastlora/cuda.h"
#include "launch.h"
#include "svd_block.cuh"

namespace fastlora::cuda {

namespace {

template <class T, int kSize>
int launch_warps(const SvdArrays<T>& arrays, void* stream) {
    constexpr int kMatrices = kSvdWarps * kWarpSize / kSize;
    return launch_kernel(svd_warp_kernel<T, kSize>, (arrays.batch + kMatrices - 1) / kMatrices, kSvdWarps * kWarpSize,
                         0, stream, arrays);
}

template <class T>
int launch_svd(const SvdArrays<T>& arrays, void* stream) {
    const int rows = arrays.p > arrays.q ? arrays.p : arrays.q, columns = arrays.p > arrays.q ? arrays.q : arrays.p;
    if (rows <= 16) return launch_warps<T, 16>(arrays, stream);
    if (rows <= 32) return launch_warps<T, 32>(arrays, stream);
    int largest = 0;
    if (const int error = largest_shared(&largest)) return error;
    const int pairs = (columns + 1) / 2, threads = kWarpSize * (pairs < kSvdBlockWarps ? pairs : kSvdBlockWarps);
    const size_t bytes = SvdWork<T>::bytes(rows, columns, true);
    if (bytes + kStaticShared <= size_t(largest))
        return launch_kernel(svd_block_kernel<T, false>, arrays.batch, threads, bytes, stream, arrays);
    return launch_kernel(svd_block_kernel<T, true>, arrays.batch, threads, SvdWork<T>::bytes(rows, columns, false),
                         stream, arrays);
}

template <class T>
SvdArrays<T> typed(const void* a, void* ut, void* s, void* vt, int32_t* info, int64_t batch, int p, int q) {
    return {static_cast<const T*>(a), static_cast<T*>(ut), static_cast<T*>(s), static_cast<T*>(vt), info, batch, p, q};
}

}  // namespace

int svd(const void* a, void* ut, void* s, void* vt, int32_t* info, int64_t batch, int p, int q, bool is_double,
        void* stream) {
    if (batch == 0 || p == 0 || q == 0) return cudaSuccess;
    const int rows = p > q ? p : q, columns = p > q ? q : p;
    if (columns < 0 || columns > kSvdLargest || rows > kSvdLongest || batch < 0) return cudaErrorInvalidValue;
    return is_double ? launch_svd(typed<double>(a, ut, s, vt, info, batch, p, q), stream)
                     : launch_svd(typed<float>(a, ut, s, vt, info, batch, p, q), stream);
}

}  // namespace fastlora::cuda
