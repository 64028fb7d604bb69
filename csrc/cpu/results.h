// Results of a combine pass: rounded to their dtype, and how large they are, which tells for free what need not be
// searched for NaN and infinity.
#pragma once
#include "tile.h"

namespace fastlora::FASTLORA_ISA {

// The largest magnitude of some numbers, as bits: these order as the numbers do, with infinity and NaN above all.
template <class T>
class Peak {
    using Word = typename IntegerOf<T>::type;
    static constexpr Word kMagnitude = sizeof(T) == 4 ? Word(0x7fffffff) : Word(0x7fffffffffffffff);

  public:
    void note(Vec<T> x) {
        const Mask<T> size = (Mask<T>)x & kMagnitude;
#if defined(__AVX512F__)
        if constexpr (sizeof(T) == 4)
            most_ = (Mask<T>)_mm512_maskz_max_epi32(0xffff, (__m512i)most_, (__m512i)size);
        else
            most_ = (Mask<T>)_mm512_maskz_max_epi64(0xff, (__m512i)most_, (__m512i)size);
#else
        most_ = size > most_ ? size : most_;
#endif
    }
    void note(T x) {
        const Word size = __builtin_bit_cast(Word, x) & kMagnitude;
        if (size > most_[0]) most_[0] = size;
    }
    // Whether all of them are far from what overflows when it is rounded to the dtype of a matrix.
    bool fits(const Matrix& m) const {
        const T limit = m.dtype == int64_t(DType::f16)   ? T(3e4)
                        : m.dtype == int64_t(DType::f64) ? T(sizeof(T) == 8 ? 1e308 : 1e38)
                                                         : T(1e38);
        const Word most = __builtin_bit_cast(Word, limit);
        for (int i = 0; i < kLanes<T>; ++i)
            if (most_[i] >= most) return false;
        return true;
    }

  private:
    Mask<T> most_{};
};

// Rows that are kVectors whole vectors, as those of most B sides.
template <class E, class T, int kVectors>
inline void write_whole(typename E::Stored* __restrict p, int64_t to, int rows, const T* __restrict in, int64_t stride,
                        Peak<T>& peak) {
    for (int i = 0; i < rows; ++i, p += to, in += stride)
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) {
            const Vec<T> value = load<T>(in + v * kLanes<T>);
            peak.note(value);
            E::template store_vector<T>(p + v * kLanes<T>, value);
        }
}

template <class E, class T>
__attribute__((noinline)) void write_as(const Matrix& m, int64_t row, int64_t column, int rows, int columns,
                                        const T* __restrict in, int64_t stride, Peak<T>& peak) {
    constexpr int lanes = kLanes<T>;
    using Stored = typename E::Stored;
    const int64_t to = m.stride;
    Stored* __restrict p = reinterpret_cast<Stored*>(m.data) + row * to + column;
    Peak<T> own = peak;
    if (columns == lanes) {
        write_whole<E, T, 1>(p, to, rows, in, stride, own);
    } else if (columns == 2 * lanes) {
        write_whole<E, T, 2>(p, to, rows, in, stride, own);
    } else if (columns == 4 * lanes) {
        write_whole<E, T, 4>(p, to, rows, in, stride, own);
    } else {
        for (int i = 0; i < rows; ++i, p += to, in += stride) {
            int j = 0;
            for (; j + lanes <= columns; j += lanes) {
                const Vec<T> value = load<T>(in + j);
                own.note(value);
                E::template store_vector<T>(p + j, value);
            }
            for (; j < columns; ++j) {
                own.note(in[j]);
                E::template store_one<T>(p + j, in[j]);
            }
        }
    }
    peak = own;
}

// The block [row, row + rows) x [column, column + columns) of a result.
template <class T>
inline void write_block(const Matrix& m, int64_t row, int64_t column, int rows, int columns, const T* in,
                        int64_t stride, Peak<T>& peak) {
    with_type(m, [&](auto e) { write_as<decltype(e), T>(m, row, column, rows, columns, in, stride, peak); });
}

// The block of out = scale * the block of x, + sums [rows, stride] if there are any.
template <class E, class T, bool kSums>
__attribute__((noinline)) void write_sum_as(const Matrix& out, const Matrix& x, int64_t row, int64_t column, int rows,
                                            int columns, T scale, const T* __restrict sums, int64_t stride,
                                            Peak<T>& peak) {
    constexpr int lanes = kLanes<T>;
    using Stored = typename E::Stored;
    const Stored* __restrict from = reinterpret_cast<const Stored*>(x.data) + row * x.stride + column;
    Stored* __restrict to = reinterpret_cast<Stored*>(out.data) + row * out.stride + column;
    const Vec<T> factor = splat<T>(scale);
    Peak<T> own = peak;
    for (int i = 0; i < rows; ++i, from += x.stride, to += out.stride, sums += kSums ? stride : 0) {
        int j = 0;
        for (; j + lanes <= columns; j += lanes) {
            Vec<T> value = factor * E::template load_vector<T>(from + j);
            if constexpr (kSums) value += load<T>(sums + j);
            own.note(value);
            E::template store_vector<T>(to + j, value);
        }
        for (; j < columns; ++j) {
            T value = scale * E::template load_one<T>(from + j);
            if constexpr (kSums) value += sums[j];
            own.note(value);
            E::template store_one<T>(to + j, value);
        }
    }
    peak = own;
}

template <class E, class T>
void write_sum(const Matrix& out, const Matrix& x, int64_t row, int64_t column, int rows, int columns, T scale,
               const T* sums, int64_t stride, Peak<T>& peak) {
    if (sums)
        write_sum_as<E, T, true>(out, x, row, column, rows, columns, scale, sums, stride, peak);
    else
        write_sum_as<E, T, false>(out, x, row, column, rows, columns, scale, sums, stride, peak);
}

}  // namespace fastlora::FASTLORA_ISA
