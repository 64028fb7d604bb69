// Groups of small matrices, interleaved: one matrix per lane, so that vector (i, j) holds element (i, j) of
// kLanes matrices. Every lane runs the same arithmetic whatever the other lanes hold; loops may run longer
// for a slow neighbour, but then with rotations that are exactly the identity.
#pragma once
#include "simd.h"

namespace fastlora::FASTLORA_ISA {

// What is known of a group once it is packed.
template <class T>
struct Group {
    int count = 0;         // matrices in the group; the lanes above are zero
    Vec<T> largest{};      // largest magnitude per matrix
    Mask<T> non_finite{};  // lanes that hold a NaN or an infinity
    Vec<T> unscale[2];     // 2^k as a product, since 2^k itself may overflow
};

// out[i * row_step + j * col_step] = element (i, j) of matrices a [count][rows, cols]. With `lower`, only
// j <= i is stored, and the rest neither scales nor spoils a matrix.
template <class T>
inline Group<T> interleave(const T* a, int count, int rows, int cols, bool lower, Vec<T>* out, size_t row_step,
                           size_t col_step) {
    constexpr int kWidth = kLanes<T>;
    const size_t size = size_t(rows) * cols;
    Group<T> group;
    group.count = count;
    for (int i = 0; i < rows; ++i) {
        const int end = lower ? i + 1 : cols;
        for (int j0 = 0; j0 < end; j0 += kWidth) {
            const int width = min_(kWidth, end - j0);
            Vec<T> block[kWidth];
            for (int b = 0; b < kWidth; ++b)
                block[b] = b < count ? load_first(a + b * size + size_t(i) * cols + j0, width) : Vec<T>{};
            transpose<T>(block);
            Vec<T>* to = out + i * row_step + j0 * col_step;
            for (int j = 0; j < width; ++j) {
                group.largest = max<T>(group.largest, abs<T>(block[j]));
                group.non_finite |= (Mask<T>)(block[j] - block[j] != Vec<T>{});
                to[j * col_step] = block[j];
            }
        }
    }
    return group;
}

// Chooses per lane the power of two that brings the largest magnitude into [2^(e-1), 2^e), e = `exponent`.
// scale[0] * scale[1] applies it, group.unscale undoes it.
template <class T>
inline void choose_scale(Group<T>& group, int exponent, Vec<T>* scale) {
    scale[0] = scale[1] = group.unscale[0] = group.unscale[1] = splat<T>(1);
    for (int b = 0; b < group.count; ++b) {
        if (group.non_finite[b] || group.largest[b] == 0) continue;
        int power;
        __builtin_frexp(double(group.largest[b]), &power);
        const int shift = exponent - power, half = shift / 2;
        scale[0][b] = T(__builtin_ldexp(1.0, half));
        scale[1][b] = T(__builtin_ldexp(1.0, shift - half));
        group.unscale[0][b] = T(__builtin_ldexp(1.0, -half));
        group.unscale[1][b] = T(__builtin_ldexp(1.0, half - shift));
    }
}

template <class T>
inline Vec<T> scaled(Vec<T> x, const Vec<T>* scale, Mask<T> zeroed) {
    return zeroed ? Vec<T>{} : x * scale[0] * scale[1];
}

// rank[j] = position of keys[j] in ascending order (equal keys keep theirs), counted in every lane at once.
template <class T>
inline void rank_ascending(const Vec<T>* keys, Mask<T>* rank, int n) {
    for (int j = 0; j < n; ++j) rank[j] = Mask<T>{};
    for (int j = 1; j < n; ++j) {
        const Vec<T> key = keys[j];
        Mask<T> position = Mask<T>{} + j;
        for (int i = 0; i < j; ++i) {
            const Mask<T> before = (Mask<T>)(key < keys[i]);
            rank[i] -= before;
            position += before;
        }
        rank[j] = position;
    }
}

// Row rank[j] of out [count][vectors, length] = x[j * vector_step + k * step] * factor[j], k = 0 .. length-1.
// Adding zero turns -0 into +0: which of the two a lane holds may depend on its neighbours.
template <class T>
inline void deinterleave(const Vec<T>* x, size_t vector_step, size_t step, const Vec<T>* factor, const Mask<T>* rank,
                         int count, int vectors, int length, T* out) {
    constexpr int kWidth = kLanes<T>;
    const size_t size = size_t(vectors) * length;
    for (int k0 = 0; k0 < length; k0 += kWidth) {
        const int width = min_(kWidth, length - k0);
        for (int j = 0; j < vectors; ++j) {
            const Vec<T>* from = x + j * vector_step + k0 * step;
            Vec<T> block[kWidth];
            for (int k = 0; k < kWidth; ++k) block[k] = k < width ? from[k * step] * factor[j] + Vec<T>{} : Vec<T>{};
            transpose<T>(block);
            for (int b = 0; b < count; ++b)
                store_first(out + b * size + size_t(rank[j][b]) * length + k0, block[b], width);
        }
    }
}

// Entry rank[j] of out [count][n] = x[j] * 2^k.
template <class T>
inline void deinterleave_values(const Vec<T>* x, const Group<T>& group, const Mask<T>* rank, int n, T* out) {
    for (int j = 0; j < n; ++j) {
        const Vec<T> value = x[j] * group.unscale[0] * group.unscale[1] + Vec<T>{};
        for (int b = 0; b < group.count; ++b) out[size_t(b) * n + rank[j][b]] = value[b];
    }
}

template <class T>
inline void fill_nan(T* out, size_t count) {
    for (size_t i = 0; i < count; ++i) out[i] = T(__builtin_nan(""));
}

}  // namespace fastlora::FASTLORA_ISA
