// Vectors of one register, and the few operations on them that the language has no operator for.
// Every file of csrc/cpu that includes this is compiled once per instruction set, in a namespace of its own;
// such files use no std:: templates, whose weak symbols could leak one set's instructions into another's code.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#ifndef FASTLORA_ISA
#error "compile with -DFASTLORA_ISA=<name>"
#endif

#include "../common/numbers.h"
#include "fastlora/kernels.h"

namespace fastlora::FASTLORA_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <class T>
struct IntegerOf;
template <>
struct IntegerOf<float> {
    using type = int32_t;
};
template <>
struct IntegerOf<double> {
    using type = int64_t;
};

template <class T>
struct Simd {
    typedef T Vec __attribute__((vector_size(kVectorBytes)));
    typedef typename IntegerOf<T>::type Mask __attribute__((vector_size(kVectorBytes)));  // lanes 0 or -1
    static constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(T));
};
template <class T>
using Vec = typename Simd<T>::Vec;
template <class T>
using Mask = typename Simd<T>::Mask;
template <class T>
constexpr int kLanes = Simd<T>::kLanes;

inline float abs_(float x) { return __builtin_fabsf(x); }
inline double abs_(double x) { return __builtin_fabs(x); }
inline float sqrt_(float x) { return __builtin_sqrtf(x); }
inline double sqrt_(double x) { return __builtin_sqrt(x); }
inline double hypot_(double x, double y) { return __builtin_hypot(x, y); }
inline double sum_of_products(double a, double b, double c, double d) { return a * b + c * d; }
template <class T>
inline T max_(T a, T b) {
    return a > b ? a : b;
}
template <class T>
inline T min_(T a, T b) {
    return a < b ? a : b;
}
template <class T>
inline bool finite_(T x) {
    return x - x == T(0);
}

// Every lane x. (Vec<T>{} + x would spend an addition on it, and lose the sign of -0.)
template <class T>
inline Vec<T> splat(T x) {
#if defined(__AVX512F__)
    if constexpr (sizeof(T) == 4)
        return (Vec<T>)_mm512_set1_ps(x);
    else
        return (Vec<T>)_mm512_set1_pd(x);
#elif defined(__AVX2__)
    if constexpr (sizeof(T) == 4)
        return (Vec<T>)_mm256_set1_ps(x);
    else
        return (Vec<T>)_mm256_set1_pd(x);
#else
    Vec<T> v;
    for (int i = 0; i < kLanes<T>; ++i) v[i] = x;
    return v;
#endif
}

inline Vec<float> sqrt(Vec<float> x) {
#if defined(__AVX512F__)
    return (Vec<float>)_mm512_maskz_sqrt_ps(0xffff, (__m512)x);  // unmasked: a false gcc 12 warning
#elif defined(__AVX2__)
    return (Vec<float>)_mm256_sqrt_ps((__m256)x);
#elif defined(__SSE2__)
    return (Vec<float>)_mm_sqrt_ps((__m128)x);
#elif defined(__aarch64__)
    return (Vec<float>)vsqrtq_f32((float32x4_t)x);
#else
    for (int i = 0; i < kLanes<float>; ++i) x[i] = sqrt_(x[i]);
    return x;
#endif
}
inline Vec<double> sqrt(Vec<double> x) {
#if defined(__AVX512F__)
    return (Vec<double>)_mm512_maskz_sqrt_pd(0xff, (__m512d)x);
#elif defined(__AVX2__)
    return (Vec<double>)_mm256_sqrt_pd((__m256d)x);
#elif defined(__SSE2__)
    return (Vec<double>)_mm_sqrt_pd((__m128d)x);
#elif defined(__aarch64__)
    return (Vec<double>)vsqrtq_f64((float64x2_t)x);
#else
    for (int i = 0; i < kLanes<double>; ++i) x[i] = sqrt_(x[i]);
    return x;
#endif
}

// y and t with x^(-1/2) = y + y t for normal x > 0. Multiplied into a factor, f y + (f y) t has less latency than
// f x^(-1/2). In AVX-512 y has 14 bits, and t is one Newton step or, in float64, three terms of (1 - e)^(-1/2) - 1,
// e = 1 - x y^2: less latency than root and quotient.
template <class T>
struct InverseSqrt {
    Vec<T> y, t;
};
inline InverseSqrt<float> inverse_sqrt_parts(Vec<float> x) {
#if defined(__AVX512F__)
    const Vec<float> y = (Vec<float>)_mm512_maskz_rsqrt14_ps(0xffff, (__m512)x), half = x * 0.5f;
    return {y, 0.5f - (half * y) * y};
#else
    return {splat<float>(1) / sqrt(x), Vec<float>{}};
#endif
}
inline InverseSqrt<double> inverse_sqrt_parts(Vec<double> x) {
#if defined(__AVX512F__)
    const Vec<double> y = (Vec<double>)_mm512_maskz_rsqrt14_pd(0xff, (__m512d)x), e = 1.0 - x * (y * y);
    return {y, e * (0.5 + e * (0.375 + 0.3125 * e))};
#else
    return {splat<double>(1) / sqrt(x), Vec<double>{}};
#endif
}
template <class V>
inline V inverse_sqrt(V x) {
    const auto r = inverse_sqrt_parts(x);
    return r.y + r.y * r.t;
}

// 1 / x to within two units in the last place, for finite normal x with a normal reciprocal.
template <class T>
inline Vec<T> reciprocal(Vec<T> x) {
#if defined(__AVX512F__)
    if constexpr (sizeof(T) == 4) {
        const Vec<T> y = (Vec<T>)_mm512_maskz_rcp14_ps(0xffff, (__m512)x);
        return y + y * (T(1) - x * y);
    } else {
        Vec<T> y = (Vec<T>)_mm512_maskz_rcp14_pd(0xff, (__m512d)x);
        y += y * (T(1) - x * y);
        return y + y * (T(1) - x * y);
    }
#else
    return splat<T>(1) / x;
#endif
}

template <class T>
inline Vec<T> abs(Vec<T> x) {
    using I = typename IntegerOf<T>::type;
    const I magnitude = I(~(I(1) << (8 * sizeof(T) - 1)));
    return (Vec<T>)((Mask<T>)x & (Mask<T>{} + magnitude));
}
// x, negated where y < 0 (not where y is -0).
template <class T>
inline Vec<T> negate_where_negative(Vec<T> x, Vec<T> y) {
    using I = typename IntegerOf<T>::type;
    return (Vec<T>)((Mask<T>)x ^ ((Mask<T>)(y < Vec<T>{}) & (Mask<T>{} + (I(1) << (8 * sizeof(T) - 1)))));
}
template <class T>
inline Vec<T> max(Vec<T> a, Vec<T> b) {
    return a > b ? a : b;
}

// 0, 1, 2, ...
template <class T>
inline Mask<T> lane_numbers() {
    Mask<T> m;
    for (int b = 0; b < kLanes<T>; ++b) m[b] = b;
    return m;
}

template <class M>
inline bool any_mask(M m) {
#if defined(__AVX512F__)
    return _mm512_test_epi64_mask((__m512i)m, (__m512i)m) != 0;
#elif defined(__AVX2__)
    return _mm256_testz_si256((__m256i)m, (__m256i)m) == 0;
#elif defined(__SSE2__)
    return _mm_movemask_epi8((__m128i)m) != 0;
#elif defined(__aarch64__)
    return vmaxvq_u32((uint32x4_t)m) != 0;
#else
    int r = 0;
    for (size_t i = 0; i < sizeof(m) / sizeof(m[0]); ++i) r |= m[i] != 0;
    return r != 0;
#endif
}

// Vectors over memory at any address.
template <class T>
inline Vec<T> load(const T* p) {
    Vec<T> v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
}
template <class T>
inline void store(T* p, Vec<T> v) {
    __builtin_memcpy(p, &v, sizeof v);
}

// The first `count` lanes (0 <= count <= lanes); the others are zero, and their memory is not touched.
template <class T>
inline Vec<T> load_first(const T* p, int count) {
    if (count == kLanes<T>) return load<T>(p);
#if defined(__AVX512F__)
    if constexpr (sizeof(T) == 4)
        return (Vec<T>)_mm512_maskz_loadu_ps((__mmask16)((1u << count) - 1), p);
    else
        return (Vec<T>)_mm512_maskz_loadu_pd((__mmask8)((1u << count) - 1), p);
#else
    Vec<T> v{};
    for (int i = 0; i < count; ++i) v[i] = p[i];
    return v;
#endif
}
template <class T>
inline void store_first(T* p, Vec<T> v, int count) {
    if (count == kLanes<T>) return store<T>(p, v);
#if defined(__AVX512F__)
    if constexpr (sizeof(T) == 4)
        _mm512_mask_storeu_ps(p, (__mmask16)((1u << count) - 1), (__m512)v);
    else
        _mm512_mask_storeu_pd(p, (__mmask8)((1u << count) - 1), (__m512d)v);
#else
    for (int i = 0; i < count; ++i) p[i] = v[i];
#endif
}

template <int... I>
struct Indices {};
template <int N, int... I>
struct MakeIndices : MakeIndices<N - 1, N - 1, I...> {};
template <int... I>
struct MakeIndices<0, I...> {
    using type = Indices<I...>;
};

template <class T, int... I>
inline Vec<T> zip_low(Vec<T> a, Vec<T> b, Indices<I...>) {
    return __builtin_shufflevector(a, b, ((I % 2) * int(sizeof...(I)) + I / 2)...);
}
template <class T, int... I>
inline Vec<T> zip_high(Vec<T> a, Vec<T> b, Indices<I...>) {
    constexpr int n = int(sizeof...(I));
    return __builtin_shufflevector(a, b, ((I % 2) * n + n / 2 + I / 2)...);
}

template <class T>
inline T sum_lanes(Vec<T> x) {
    using Lanes = typename MakeIndices<kLanes<T>>::type;
    for (int step = 1; step < kLanes<T>; step *= 2) x = zip_low<T>(x, x, Lanes{}) + zip_high<T>(x, x, Lanes{});
    return x[0];
}
template <class T>
inline T max_lane(Vec<T> x) {
    using Lanes = typename MakeIndices<kLanes<T>>::type;
    for (int step = 1; step < kLanes<T>; step *= 2) x = max<T>(zip_low<T>(x, x, Lanes{}), zip_high<T>(x, x, Lanes{}));
    return x[0];
}

// Transposes a square of kLanes x kLanes values in place: log2(lanes) perfect shuffles.
template <class T>
inline void transpose(Vec<T>* r) {
    constexpr int n = kLanes<T>;
    using Lanes = typename MakeIndices<n>::type;
    Vec<T> t[n];
    for (int step = 1; step < n; step *= 2) {
        for (int i = 0; i < n / 2; ++i) {
            t[2 * i] = zip_low<T>(r[i], r[i + n / 2], Lanes{});
            t[2 * i + 1] = zip_high<T>(r[i], r[i + n / 2], Lanes{});
        }
        for (int i = 0; i < n; ++i) r[i] = t[i];
    }
}

// Memory for one thread's work, aligned for vectors; data() is null when there is none to be had.
class Workspace {
  public:
    Workspace() = default;
    Workspace(const Workspace&) = delete;
    Workspace& operator=(const Workspace&) = delete;
    ~Workspace() { free(data_); }
    bool reserve(size_t bytes) {
        if (bytes <= size_) return true;
        free(data_);
        const size_t rounded = (bytes + 4095) / 4096 * 4096;
        data_ = static_cast<char*>(aligned_alloc(4096, rounded));
        size_ = data_ ? rounded : 0;
        return data_ != nullptr;
    }
    char* data() const { return data_; }

  private:
    char* data_ = nullptr;
    size_t size_ = 0;
};

// Hands out aligned pieces of a Workspace. With base = null it only counts, so that one function can first
// measure and then carve the same pieces.
class Arena {
  public:
    explicit Arena(char* base) : base_(base) {}
    template <class T>
    T* take(size_t count) {
        used_ = (used_ + 63) / 64 * 64;
        T* p = reinterpret_cast<T*>(base_ + used_);
        used_ += count * sizeof(T);
        return p;
    }
    size_t used() const { return used_; }

  private:
    char* base_;
    size_t used_ = 0;
};

}  // namespace fastlora::FASTLORA_ISA
