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
#if defined(__AVX2__)
        if constexpr (sizeof(T) == 4) {
            most_ = (Mask<T>)_mm256_max_epi32((__m256i)most_, (__m256i)size);
            return;
        }
#endif
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

// How a vector of results gets to its place: through the caches, or past them. Results that do not stay in cache until
// they are used would first be read into it, only to be overwritten.
struct Kept {
    static constexpr bool kNotes = true;  // how large they are
    template <class E, class T>
    static void put(typename E::Stored* p, Vec<T> x) {
        E::template store_vector<T>(p, x);
    }
};

struct Streamed {
    static constexpr bool kNotes = false;  // nobody asks of what is in memory
    template <class T, class Stored>
    static constexpr int kBytes = kLanes<T> * int(sizeof(Stored));

    // p lies at a multiple of the bytes of a vector.
    template <class E, class T>
    static void put(typename E::Stored* p, Vec<T> x) {
        typename E::Stored rounded[kLanes<T>];
        E::template store_vector<T>(rounded, x);
#if defined(__AVX2__)
        constexpr int bytes = kBytes<T, typename E::Stored>;
        void* at = p;
        const void* from = rounded;
#if defined(__AVX512F__)
        if constexpr (bytes == 64) return _mm512_stream_si512(static_cast<__m512i*>(at), _mm512_loadu_si512(from));
#endif
        if constexpr (bytes == 32)
            return _mm256_stream_si256(static_cast<__m256i*>(at),
                                       _mm256_loadu_si256(static_cast<const __m256i*>(from)));
        if constexpr (bytes == 16)
            return _mm_stream_si128(static_cast<__m128i*>(at), _mm_loadu_si128(static_cast<const __m128i*>(from)));
#endif
        __builtin_memcpy(p, rounded, sizeof rounded);
    }

    // What is streamed is there for others after this.
    static void finish() {
#if defined(__AVX2__)
        _mm_sfence();
#endif
    }
};

template <class T, class Stored>
bool is_aligned(const Stored* p, int64_t stride) {
    constexpr int64_t bytes = Streamed::kBytes<T, Stored>;
    return (reinterpret_cast<int64_t>(p) | stride * int64_t(sizeof(Stored))) % bytes == 0;
}

// Where results come from: sums [rows, stride] that are there already,
template <class T>
struct Sums {
    const T* row;
    int64_t stride;

    void ahead() const {}
    void next_row() { row += stride; }
    Vec<T> vector(int j) const { return load<T>(row + j); }
    T one(int j) const { return row[j]; }
};

// or scale times a stored matrix, plus sums if there are any.
template <class E, class T, bool kSums>
struct ScaledPlusSums {
    const typename E::Stored* from;
    int64_t from_stride;
    T scale;
    const T* sums;
    int64_t stride;

    // Asks for rows that come soon, into L2: several factors are read in turn, which the processor does not foresee.
    void ahead() const {
        constexpr int bytes = 512;
        __builtin_prefetch(reinterpret_cast<const char*>(from) + bytes, 0, 2);
    }
    void next_row() {
        from += from_stride;
        if constexpr (kSums) sums += stride;
    }
    Vec<T> vector(int j) const {
        const Vec<T> value = splat<T>(scale) * E::template load_vector<T>(from + j);
        if constexpr (kSums) return value + load<T>(sums + j);
        return value;
    }
    T one(int j) const {
        const T value = scale * E::template load_one<T>(from + j);
        if constexpr (kSums) return value + sums[j];
        return value;
    }
};

// kVectors: whole vectors a row, or 0 where rows are of any length.
template <class Put, class E, class T, int kVectors, class Source>
inline void write_rows_of(Source source, typename E::Stored* __restrict to, int64_t to_stride, int rows, int columns,
                          Peak<T>& peak) {
    constexpr int lanes = kLanes<T>;
    for (int i = 0; i < rows; ++i, to += to_stride, source.next_row()) {
        int j = 0;
        if constexpr (kVectors > 0) {
            source.ahead();
#pragma GCC unroll 4
            for (; j < kVectors * lanes; j += lanes) {
                const Vec<T> value = source.vector(j);
                if constexpr (Put::kNotes) peak.note(value);
                Put::template put<E, T>(to + j, value);
            }
            continue;
        }
        for (; j + lanes <= columns; j += lanes) {
            const Vec<T> value = source.vector(j);
            if constexpr (Put::kNotes) peak.note(value);
            Put::template put<E, T>(to + j, value);
        }
        for (; j < columns; ++j) {
            const T value = source.one(j);
            if constexpr (Put::kNotes) peak.note(value);
            E::template store_one<T>(to + j, value);
        }
    }
}

// Not inlined: as read_as.
template <class Put, class E, class T, class Source>
__attribute__((noinline)) void write_from(Source source, typename E::Stored* to, int64_t to_stride, int rows,
                                          int columns, Peak<T>& peak) {
    constexpr int lanes = kLanes<T>;
    Peak<T> own = peak;
    if (columns == lanes)
        write_rows_of<Put, E, T, 1>(source, to, to_stride, rows, columns, own);
    else if (columns == 2 * lanes)
        write_rows_of<Put, E, T, 2>(source, to, to_stride, rows, columns, own);
    else if (columns == 4 * lanes)
        write_rows_of<Put, E, T, 4>(source, to, to_stride, rows, columns, own);
    else
        write_rows_of<Put, E, T, 0>(source, to, to_stride, rows, columns, own);
    peak = own;
}

// The block [row, row + rows) x [column, column + columns) of a result.
template <class E, class T, class Source>
inline void write_result(Source source, const Matrix& m, int64_t row, int64_t column, int rows, int columns,
                         bool streams, Peak<T>& peak) {
    auto* to = reinterpret_cast<typename E::Stored*>(m.data) + row * m.stride + column;
    if (streams && is_aligned<T>(to, m.stride))
        write_from<Streamed, E, T>(source, to, m.stride, rows, columns, peak);
    else
        write_from<Kept, E, T>(source, to, m.stride, rows, columns, peak);
}

template <class T>
inline void write_sums(const Matrix& m, int64_t row, int64_t column, int rows, int columns, const T* sums,
                       int64_t stride, bool streams, Peak<T>& peak) {
    with_type(m, [&](auto e) {
        write_result<decltype(e), T>(Sums<T>{sums, stride}, m, row, column, rows, columns, streams, peak);
    });
}

// The block of out = scale * that of x, which has the same dtype, + sums [rows, stride] if there are any.
template <class T>
void write_scaled(const Matrix& out, const Matrix& x, int64_t row, int64_t column, int rows, int columns, T scale,
                  const T* sums, int64_t stride, bool streams, Peak<T>& peak) {
    with_type(x, [&](auto e) {
        using E = decltype(e);
        const auto* from = reinterpret_cast<const typename E::Stored*>(x.data) + row * x.stride + column;
        if (sums)
            write_result<E, T>(ScaledPlusSums<E, T, true>{from, x.stride, scale, sums, stride}, out, row, column, rows,
                               columns, streams, peak);
        else
            write_result<E, T>(ScaledPlusSums<E, T, false>{from, x.stride, scale, sums, stride}, out, row, column, rows,
                               columns, streams, peak);
    });
}

}  // namespace fastlora::FASTLORA_ISA
