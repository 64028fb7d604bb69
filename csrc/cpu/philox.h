// Philox 4 x 32-10 (Salmon et al. 2011): a word for each element, from its number, a key and a module.
#pragma once
#include "simd.h"

namespace fastlora::FASTLORA_ISA {

constexpr int kPhiloxBlocks = 16;  // that are computed side by side

// The words of the elements 4 * first to 4 * (first + 16) - 1.
inline void philox_blocks(uint64_t first, uint64_t key, uint64_t module, uint32_t* out) {
    uint32_t c0[kPhiloxBlocks], c1[kPhiloxBlocks], c2[kPhiloxBlocks], c3[kPhiloxBlocks];
    for (int i = 0; i < kPhiloxBlocks; ++i) {
        c0[i] = uint32_t(first + uint64_t(i));
        c1[i] = uint32_t((first + uint64_t(i)) >> 32);
        c2[i] = uint32_t(module);
        c3[i] = uint32_t(module >> 32);
    }
    uint32_t k0 = uint32_t(key), k1 = uint32_t(key >> 32);
    for (int round = 0; round < 10; ++round, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u)
        for (int i = 0; i < kPhiloxBlocks; ++i) {
            const uint64_t even = uint64_t(0xD2511F53u) * c0[i], odd = uint64_t(0xCD9E8D57u) * c2[i];
            c0[i] = uint32_t(odd >> 32) ^ c1[i] ^ k0;
            c1[i] = uint32_t(odd);
            c2[i] = uint32_t(even >> 32) ^ c3[i] ^ k1;
            c3[i] = uint32_t(even);
        }
    for (int i = 0; i < kPhiloxBlocks; ++i) {
        out[4 * i] = c0[i];
        out[4 * i + 1] = c1[i];
        out[4 * i + 2] = c2[i];
        out[4 * i + 3] = c3[i];
    }
}

// The words of `count` elements from number `element` on; f(first, words, count) gets them in pieces.
template <class F>
inline void for_words(uint64_t element, int64_t count, uint64_t key, uint64_t module, const F& f) {
    uint32_t words[4 * kPhiloxBlocks];
    int64_t done = 0;
    while (done < count) {
        const uint64_t at = element + uint64_t(done);
        philox_blocks(at / 4, key, module, words);
        const int skip = int(at % 4);
        const int64_t now = min_<int64_t>(count - done, 4 * kPhiloxBlocks - skip);
        f(done, words + skip, int(now));
        done += now;
    }
}

}  // namespace fastlora::FASTLORA_ISA
