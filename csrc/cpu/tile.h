// Tiles of stored matrices in float64, and the one small matrix product that all passes are made of.
#pragma once
#include "simd.h"

namespace fastlora::FASTLORA_ISA {

// Loads and stores through these may be misaligned: tensors lie at any address of a file.
struct __attribute__((packed)) F32 {
    float value;
};
struct __attribute__((packed)) F64 {
    double value;
};
struct __attribute__((packed)) U16 {
    uint16_t value;
};

inline float from_bf16(uint16_t bits) { return __builtin_bit_cast(float, uint32_t(bits) << 16); }

// Exact; the exponent is rebased by a multiplication, which also handles subnormal halves.
inline float from_f16(uint16_t bits) {
    const uint32_t sign = uint32_t(bits & 0x8000u) << 16, rest = bits & 0x7fffu;
    const float magnitude = __builtin_bit_cast(float, rest << 13) * 0x1p112f;
    const float special = __builtin_bit_cast(float, (rest << 13) | 0x7f800000u);  // infinity or NaN
    const float unsigned_value = rest >= 0x7c00u ? special : magnitude;
    return __builtin_bit_cast(float, __builtin_bit_cast(uint32_t, unsigned_value) | sign);
}

// Rounds to nearest, ties to even.
inline uint16_t to_bf16(float x) {
    const uint32_t bits = __builtin_bit_cast(uint32_t, x);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const uint32_t nan = (bits >> 16) | 0x40u;
    return uint16_t((bits & 0x7fffffffu) > 0x7f800000u ? nan : rounded);
}

inline uint16_t to_f16(float x) {
    const uint32_t bits = __builtin_bit_cast(uint32_t, x), sign = (bits >> 16) & 0x8000u, size = bits & 0x7fffffffu;
    if (size > 0x7f800000u) return uint16_t(sign | 0x7e00u);
    if (size >= 0x477ff000u) return uint16_t(sign | 0x7c00u);  // 65520 and above round to infinity
    if (size < 0x38800000u) {  // below 2^-14: a multiple of 2^-24; adding 0.5 rounds it in the float's own last bit
        const float shifted = __builtin_bit_cast(float, size) + 0.5f;
        return uint16_t(sign | (__builtin_bit_cast(uint32_t, shifted) - 0x3f000000u));
    }
    return uint16_t(sign | ((size + 0xfffu + ((size >> 13) & 1u) - 0x38000000u) >> 13));
}

// Whether the values of a dtype and their products are exact in float32.
inline bool is_half(const Matrix& m) { return m.dtype == int64_t(DType::f16) || m.dtype == int64_t(DType::bf16); }

inline int64_t element_size(const Matrix& m) {
    constexpr int64_t sizes[] = {4, 8, 2, 2, 1};  // by DType
    return sizes[m.dtype];
}

// Vectors of as many half-precision bit patterns, or 32-bit ones, as there are lanes of T.
template <class T>
struct Bits {
    typedef uint16_t Half __attribute__((vector_size(2 * kLanes<T>)));
    typedef uint32_t Word __attribute__((vector_size(4 * kLanes<T>)));
    typedef float Float __attribute__((vector_size(4 * kLanes<T>)));
    typedef double Double __attribute__((vector_size(8 * kLanes<T>)));
};

// The compiler splits these conversions where one instruction or two do them. (Masked forms: the plain ones warn.)
template <class T>
inline typename Bits<T>::Word widen(typename Bits<T>::Half bits) {
#if defined(__AVX512F__)
    if constexpr (sizeof(T) == 4) return (typename Bits<T>::Word)_mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)bits);
#endif
#if defined(__AVX2__)
    if constexpr (kLanes<T> == 8) return (typename Bits<T>::Word)_mm256_cvtepu16_epi32((__m128i)bits);
    if constexpr (kLanes<T> == 4)
        return (typename Bits<T>::Word)_mm_cvtepu16_epi32(_mm_cvtsi64_si128(__builtin_bit_cast(int64_t, bits)));
#endif
    return __builtin_convertvector(bits, typename Bits<T>::Word);
}

// Of words below 2^16.
template <class T>
inline typename Bits<T>::Half narrow(typename Bits<T>::Word words) {
    using Half = typename Bits<T>::Half;
#if defined(__AVX512F__)
    if constexpr (sizeof(T) == 4) return (Half)_mm512_maskz_cvtepi32_epi16(0xffff, (__m512i)words);
#endif
#if defined(__AVX2__)
    if constexpr (kLanes<T> == 8) {
        const __m256i low = _mm256_packus_epi32((__m256i)words, (__m256i)words);  // of either half twice
        return (Half)_mm256_castsi256_si128(_mm256_permute4x64_epi64(low, 0x08));
    }
    if constexpr (kLanes<T> == 4)
        return __builtin_bit_cast(Half, _mm_cvtsi128_si64(_mm_packus_epi32((__m128i)words, (__m128i)words)));
#endif
    return __builtin_convertvector(words, Half);
}

// float32 to T and back.
template <class T>
inline Vec<T> from_float(typename Bits<T>::Float x) {
#if defined(__AVX512F__)
    if constexpr (sizeof(T) == 8) return (Vec<T>)_mm512_maskz_cvtps_pd(0xff, (__m256)x);
#elif defined(__AVX2__)
    if constexpr (sizeof(T) == 8) return (Vec<T>)_mm256_cvtps_pd((__m128)x);
#endif
    return __builtin_convertvector(x, Vec<T>);
}

template <class T>
inline typename Bits<T>::Float to_float(Vec<T> x) {
#if defined(__AVX512F__)
    if constexpr (sizeof(T) == 8) return (typename Bits<T>::Float)_mm512_maskz_cvtpd_ps(0xff, (__m512d)x);
#elif defined(__AVX2__)
    if constexpr (sizeof(T) == 8) return (typename Bits<T>::Float)_mm256_cvtpd_ps((__m256d)x);
#endif
    return __builtin_convertvector(x, typename Bits<T>::Float);
}

#if defined(__F16C__)
// float16 to float32 and back, to the nearest, even: 16, 8 or 4 at once.
template <class Float, class Half>
inline Float from_halves(Half bits) {
#if defined(__AVX512F__)
    if constexpr (sizeof(Float) == 64) return (Float)_mm512_maskz_cvtph_ps(0xffff, (__m256i)bits);
#endif
    if constexpr (sizeof(Float) == 32) return (Float)_mm256_cvtph_ps((__m128i)bits);
    if constexpr (sizeof(Float) == 16) {
        __m128i low = _mm_setzero_si128();
        __builtin_memcpy(&low, &bits, sizeof bits);
        return (Float)_mm_cvtph_ps(low);
    }
}

template <class Float>
inline auto to_halves(Float x) {
    constexpr int nearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
#if defined(__AVX512F__)
    if constexpr (sizeof(Float) == 64) return _mm512_maskz_cvtps_ph(0xffff, (__m512)x, nearest);
#endif
    if constexpr (sizeof(Float) == 32) return _mm256_cvtps_ph((__m256)x, nearest);
    if constexpr (sizeof(Float) == 16) return _mm_cvtps_ph((__m128)x, nearest);
}
#elif defined(__aarch64__)
// float16 to float32 and back, to the nearest, even: 4 or 2 at once.
template <class Float, class Half>
inline Float from_halves(Half bits) {
    uint16x4_t four = vdup_n_u16(0);
    __builtin_memcpy(&four, &bits, sizeof bits);
    const float32x4_t floats = vcvt_f32_f16(vreinterpret_f16_u16(four));
    Float x;
    __builtin_memcpy(&x, &floats, sizeof x);
    return x;
}

template <class Float>
inline uint16x4_t to_halves(Float x) {
    float32x4_t four = vdupq_n_f32(0);
    __builtin_memcpy(&four, &x, sizeof x);
    return vreinterpret_u16_f16(vcvt_f16_f32(four));
}
#endif

template <class T>
inline T same(T x) {
    return x;
}

// Element types of a file: a value, and kLanes<T> values at once, to T and back. kDecode and kEncode are those of a
// value.
template <class S, auto kDecode, auto kEncode>
struct Element {
    using Stored = S;
    template <class T>
    static T load_one(const S* p) {
        return T(kDecode(p->value));
    }
    template <class T>
    static void store_one(S* p, T x) {
        p->value = kEncode(x);
    }
};

struct BF16 : Element<U16, from_bf16, to_bf16> {
    template <class T>
    static Vec<T> load_vector(const U16* p) {
        typename Bits<T>::Half bits;
        __builtin_memcpy(&bits, p, sizeof bits);
        const auto wide = widen<T>(bits) << 16;
        return from_float<T>((typename Bits<T>::Float)wide);
    }
    template <class T>
    static void store_vector(U16* p, Vec<T> x) {
        using Word = typename Bits<T>::Word;
#if defined(__AVX512BF16__)
        // One instruction, which takes subnormal numbers for zero.
        if constexpr (sizeof(T) == 4) {
            constexpr int kSubnormal = 0x20;
            if (_mm512_fpclass_ps_mask((__m512)x, kSubnormal) == 0) {
                const __m256bh half = _mm512_cvtneps_pbh((__m512)x);
                __builtin_memcpy(p, &half, sizeof half);
                return;
            }
        }
#endif
        const Word bits = (Word)to_float<T>(x);
        Word rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
        // There is hardly ever a NaN.
        if (any_mask<Mask<T>>((Mask<T>)(x != x))) {
            const Word nan = (bits >> 16) | 0x40u;
            rounded = (bits & 0x7fffffffu) > 0x7f800000u ? nan : rounded;
        }
        const auto half = narrow<T>(rounded);
        __builtin_memcpy(p, &half, sizeof half);
    }
};

struct F16 : Element<U16, from_f16, to_f16> {
    template <class T>
    static Vec<T> load_vector(const U16* p) {
        using Float = typename Bits<T>::Float;
        typename Bits<T>::Half half;
        __builtin_memcpy(&half, p, sizeof half);
#if defined(__F16C__) || defined(__aarch64__)
        return from_float<T>(from_halves<Float>(half));
#else
        using Word = typename Bits<T>::Word;
        const Word bits = widen<T>(half), sign = (bits & 0x8000u) << 16, rest = bits & 0x7fffu;
        const Word magnitude = (Word)((Float)(rest << 13) * 0x1p112f), special = (rest << 13) | 0x7f800000u;
        const Word size = rest >= 0x7c00u ? special : magnitude;
        return from_float<T>((Float)(size | sign));
#endif
    }
    template <class T>
    static void store_vector(U16* p, Vec<T> x) {
#if defined(__F16C__) || defined(__aarch64__)
        const auto halves = to_halves(to_float<T>(x));
        __builtin_memcpy(p, &halves, sizeof(U16) * kLanes<T>);
#else
        for (int i = 0; i < kLanes<T>; ++i) p[i].value = to_f16(float(x[i]));
#endif
    }
};

struct Single : Element<F32, same<float>, same<float>> {
    template <class T>
    static Vec<T> load_vector(const F32* p) {
        typename Bits<T>::Float x;
        __builtin_memcpy(&x, p, sizeof x);
        return from_float<T>(x);
    }
    template <class T>
    static void store_vector(F32* p, Vec<T> x) {
        const auto single = to_float<T>(x);
        __builtin_memcpy(p, &single, sizeof single);
    }
};

struct Double : Element<F64, same<double>, same<double>> {
    template <class T>
    static Vec<T> load_vector(const F64* p) {
        typename Bits<T>::Double x;
        __builtin_memcpy(&x, p, sizeof x);
        return __builtin_convertvector(x, Vec<T>);
    }
    template <class T>
    static void store_vector(F64* p, Vec<T> x) {
        const auto wide = __builtin_convertvector(x, typename Bits<T>::Double);
        __builtin_memcpy(p, &wide, sizeof wide);
    }
};

// Rows that are kVectors whole vectors, as those of most B sides.
template <class E, class T, int kVectors>
inline void read_whole(const typename E::Stored* __restrict p, int64_t from, int rows, T* __restrict out,
                       int64_t stride) {
    for (int i = 0; i < rows; ++i, p += from, out += stride)
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) store<T>(out + v * kLanes<T>, E::template load_vector<T>(p + v * kLanes<T>));
}

// Not inlined: tiles are short and wide loops around them would keep their counters in memory.
template <class E, class T>
__attribute__((noinline)) void read_as(const Matrix& m, int64_t row, int64_t column, int rows, int columns,
                                       T* __restrict out, int64_t stride) {
    constexpr int lanes = kLanes<T>;
    using Stored = typename E::Stored;
    const int64_t from = m.stride;
    const Stored* __restrict p = reinterpret_cast<const Stored*>(m.data) + row * from + column;
    if (columns == lanes) return read_whole<E, T, 1>(p, from, rows, out, stride);
    if (columns == 2 * lanes) return read_whole<E, T, 2>(p, from, rows, out, stride);
    if (columns == 4 * lanes) return read_whole<E, T, 4>(p, from, rows, out, stride);
    for (int i = 0; i < rows; ++i, p += from, out += stride) {
        int j = 0;
        for (; j + lanes <= columns; j += lanes) store<T>(out + j, E::template load_vector<T>(p + j));
        for (; j < columns; ++j) out[j] = E::template load_one<T>(p + j);
    }
}

// Calls f with the element type of a matrix.
template <class F>
inline void with_type(const Matrix& m, F f) {
    switch (static_cast<DType>(m.dtype)) {
        case DType::f32:
            return f(Single{});
        case DType::f64:
            return f(Double{});
        case DType::bf16:
            return f(BF16{});
        case DType::f16:
            return f(F16{});
        case DType::bytes:
            return;
    }
}

// The block [row, row + rows) x [column, column + columns) as T, to out [rows, stride].
template <class T>
inline void read_block(const Matrix& m, int64_t row, int64_t column, int rows, int columns, T* out, int64_t stride) {
    with_type(m, [&](auto e) { read_as<decltype(e), T>(m, row, column, rows, columns, out, stride); });
}

template <class T>
inline int padded(int64_t n) {
    return int((n + kLanes<T> - 1) / kLanes<T> * kLanes<T>);
}

// The loops are unrolled in full and the function stands alone, or the compiler keeps the sums in memory.
template <class T, int kRows, int kVectors, bool kFresh>
__attribute__((noinline)) void product_block(int k, const T* a, ptrdiff_t a_p, ptrdiff_t a_i, const T* b, ptrdiff_t b_p,
                                             T* c, ptrdiff_t c_i) {
    constexpr int lanes = kLanes<T>;
    Vec<T> sum[kRows][kVectors];
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 3
        for (int v = 0; v < kVectors; ++v) sum[i][v] = kFresh ? Vec<T>{} : load<T>(c + i * c_i + v * lanes);
    for (int p = 0; p < k; ++p) {
        Vec<T> right[kVectors];
#pragma GCC unroll 3
        for (int v = 0; v < kVectors; ++v) right[v] = load<T>(b + p * b_p + v * lanes);
#pragma GCC unroll 8
        for (int i = 0; i < kRows; ++i) {
            const Vec<T> left = splat<T>(a[p * a_p + i * a_i]);
#pragma GCC unroll 3
            for (int v = 0; v < kVectors; ++v) sum[i][v] += left * right[v];
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 3
        for (int v = 0; v < kVectors; ++v) store<T>(c + i * c_i + v * lanes, sum[i][v]);
}

template <class T, int kVectors, bool kFresh>
inline void product_columns(int m, int k, const T* a, ptrdiff_t a_p, ptrdiff_t a_i, const T* b, ptrdiff_t b_p, T* c,
                            ptrdiff_t c_i) {
    constexpr int rows = kVectorBytes == 64 ? 8 : 4;  // the sums stay in 32 or 16 registers
    int i = 0;
    for (; i + rows <= m; i += rows)
        product_block<T, rows, kVectors, kFresh>(k, a + i * a_i, a_p, a_i, b, b_p, c + i * c_i, c_i);
    for (; i + 4 <= m; i += 4)
        product_block<T, 4, kVectors, kFresh>(k, a + i * a_i, a_p, a_i, b, b_p, c + i * c_i, c_i);
    for (; i < m; ++i) product_block<T, 1, kVectors, kFresh>(k, a + i * a_i, a_p, a_i, b, b_p, c + i * c_i, c_i);
}

// c[i, j] (+)= sum_p a[p * a_p + i * a_i] * b[p * b_p + j]   for i < m, j < n rounded up to kLanes;
// kFresh: c is overwritten. Every sum runs over p in order, so a value never depends on how m and n are blocked.
template <class T, bool kFresh>
inline void product(int m, int n, int k, const T* a, ptrdiff_t a_p, ptrdiff_t a_i, const T* b, ptrdiff_t b_p, T* c,
                    ptrdiff_t c_i) {
    constexpr int lanes = kLanes<T>;
    for (int vectors = padded<T>(n) / lanes; vectors > 0;) {
        // Four as two and two: a product of one vector has too few sums to hide the latency of an addition.
        const int now = vectors == 4 ? 2 : min_(vectors, 3);
        if (now == 3)
            product_columns<T, 3, kFresh>(m, k, a, a_p, a_i, b, b_p, c, c_i);
        else if (now == 2)
            product_columns<T, 2, kFresh>(m, k, a, a_p, a_i, b, b_p, c, c_i);
        else
            product_columns<T, 1, kFresh>(m, k, a, a_p, a_i, b, b_p, c, c_i);
        vectors -= now;
        b += now * lanes;
        c += now * lanes;
    }
}

}  // namespace fastlora::FASTLORA_ISA
