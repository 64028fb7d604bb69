// Launches of eigh.cuh: the form that fits n and the device.
#include "eigh.cuh"
#include "fastlora/cuda.h"
#include "launch.h"

namespace fastlora::cuda {

namespace {

template <class T>
int launch_eigh(const T* a, T* values, T* vectors, int32_t* info, int64_t batch, int n, void* stream) {
    int largest = 0;
    if (const int error = largest_shared(&largest)) return error;
    if (n <= kWarpEighLargest) {
        // As many as leave shared memory for a second block.
        const int64_t share = eigh_share<T>(n) * sizeof(T), fit = (largest / 2 - int64_t(kStaticShared)) / share;
        const int64_t matrices = fit < 1 ? 1 : fit < kMatricesPerBlock<T> ? fit : kMatricesPerBlock<T>;
        return launch_kernel(eigh_warp_kernel<T>, (batch + matrices - 1) / matrices, int(matrices + 1) * kWarpSize,
                             matrices * share, stream, a, values, vectors, info, batch, n);
    }
    const int threads = BlockGroup<T>::threads(n);
    const size_t bytes = eigh_shared_bytes<T>(n, true);
    if (bytes + kStaticShared <= size_t(largest)) {
        constexpr int kFew = 2 * kLeaf, kMany = 4 * kLeaf;
        return launch_kernel(!divides(n)     ? eigh_block_kernel<T, false>
                             : n <= 2 * kFew ? eigh_divide_kernel<T, kFew>
                                             : eigh_divide_kernel<T, kMany>,
                             batch, threads, bytes, stream, a, values, vectors, info, n);
    }
    return launch_kernel(eigh_block_kernel<T, true>, batch, threads, eigh_shared_bytes<T>(n, false), stream, a, values,
                         vectors, info, n);
}

}  // namespace

int eigh(const void* a, void* values, void* vectors, int32_t* info, int64_t batch, int n, bool is_double,
         void* stream) {
    if (batch == 0 || n == 0) return cudaSuccess;
    if (n < 0 || n > kEighLargest || batch < 0) return cudaErrorInvalidValue;
    return is_double ? launch_eigh(static_cast<const double*>(a), static_cast<double*>(values),
                                   static_cast<double*>(vectors), info, batch, n, stream)
                     : launch_eigh(static_cast<const float*>(a), static_cast<float*>(values),
                                   static_cast<float*>(vectors), info, batch, n, stream);
}

}  // namespace fastlora::cuda
