// Philox 4 x 32-10 (Salmon et al. 2011): a word for each element, from its number, a key and a module.
#pragma once
#include "simd.h"

namespace fastlora::FASTLORA_ISA {

constexpr int kPhiloxBlocks = 16;  // of a run
constexpr int kPhiloxWords = 4 * kPhiloxBlocks;
// Runs that are computed side by side, so that one's operations fill the time that another's take.
constexpr int kPhiloxRuns = kVectorBytes == 64 ? 4 : 1;

// Lanes of 64 bits. Only the lower half of a lane counts; what is above it may be anything.
typedef uint64_t Wide __attribute__((vector_size(kVectorBytes)));
constexpr int kWide = kVectorBytes / 8;

// Products of the lower halves.
inline Wide product_of_words(Wide a, Wide b) {
#if defined(__AVX512F__)
    return (Wide)_mm512_maskz_mul_epu32(0xff, (__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
    return (Wide)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
    return (Wide)_mm_mul_epu32((__m128i)a, (__m128i)b);
#else
    return (a & 0xffffffffu) * (b & 0xffffffffu);
#endif
}

inline Wide words_of(uint32_t word) { return Wide{} + word; }

// The words of the elements 4 * first to 4 * (first + 16) - 1, for each first of a run.
template <int kRuns>
inline void philox_runs(const uint64_t* first, uint64_t key, uint64_t module, uint32_t* out) {
    constexpr int each = kPhiloxBlocks / kWide, n = kRuns * each;
    Wide c0[n], c1[n], c2[n], c3[n];
    for (int v = 0; v < n; ++v) {
        for (int i = 0; i < kWide; ++i) c0[v][i] = first[v / each] + uint64_t(v % each * kWide + i);
        c1[v] = c0[v] >> 32;
        c2[v] = words_of(uint32_t(module));
        c3[v] = words_of(uint32_t(module >> 32));
    }
    const Wide even_factor = words_of(0xD2511F53u), odd_factor = words_of(0xCD9E8D57u);
    uint32_t k0 = uint32_t(key), k1 = uint32_t(key >> 32);
    for (int round = 0; round < 10; ++round, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
        const Wide first_key = words_of(k0), second_key = words_of(k1);
#pragma GCC unroll 8
        for (int v = 0; v < n; ++v) {
            const Wide even = product_of_words(c0[v], even_factor), odd = product_of_words(c2[v], odd_factor);
            c0[v] = (odd >> 32) ^ c1[v] ^ first_key;
            c1[v] = odd;
            c2[v] = (even >> 32) ^ c3[v] ^ second_key;
            c3[v] = even;
        }
    }
    using Lanes = MakeIndices<kWide>::type;
    for (int v = 0; v < n; ++v, out += 4 * kWide) {  // a block's words one after the other
        const Vec<double> low = (Vec<double>)((c0[v] & 0xffffffffu) | (c1[v] << 32));
        const Vec<double> high = (Vec<double>)((c2[v] & 0xffffffffu) | (c3[v] << 32));
        const Vec<double> blocks[2] = {zip_low<double>(low, high, Lanes{}), zip_high<double>(low, high, Lanes{})};
        __builtin_memcpy(out, blocks, sizeof blocks);
    }
}

// The words of `count` elements from number `element` on; f(first, words, count) gets them in pieces.
template <class F>
inline void for_words(uint64_t element, int64_t count, uint64_t key, uint64_t module, const F& f) {
    uint32_t words[kPhiloxRuns * kPhiloxWords];
    int64_t done = 0;
    while (done < count) {
        const uint64_t at = element + uint64_t(done);
        uint64_t firsts[kPhiloxRuns];
        for (int i = 0; i < kPhiloxRuns; ++i) firsts[i] = at / 4 + uint64_t(i * kPhiloxBlocks);
        const int skip = int(at % 4), runs = skip + count - done <= kPhiloxWords ? 1 : kPhiloxRuns;
        if (runs == 1)
            philox_runs<1>(firsts, key, module, words);
        else
            philox_runs<kPhiloxRuns>(firsts, key, module, words);
        const int64_t now = min_<int64_t>(count - done, runs * kPhiloxWords - skip);
        f(done, words + skip, int(now));
        done += now;
    }
}

}  // namespace fastlora::FASTLORA_ISA
