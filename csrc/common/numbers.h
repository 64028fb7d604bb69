// Numbers that the solvers of the CPU and those of the GPU share. The CPU compiles this once per instruction set, each
// in the namespace of that set, so that no code of one set is taken for that of another; the GPU once, in its own.
#pragma once
#include <cstdint>

#if defined(FASTLORA_ISA)
#define FASTLORA_ROOM FASTLORA_ISA
#define FASTLORA_INLINE inline
#else
#include "../cuda/platform.h"
#define FASTLORA_ROOM cuda
#define FASTLORA_INLINE __device__ __forceinline__
#endif

namespace fastlora::FASTLORA_ROOM {

// Half the distance from 1 to the next number of T, and what is small beside everything that a solver scales.
template <class T>
constexpr T kEpsilon = sizeof(T) == 4 ? T(5.9604644775390625e-8) : T(1.1102230246251565e-16);
template <class T>
constexpr T kTiny = sizeof(T) == 4 ? T(1e-30) : T(1e-280);

// `size`, negated where `sign` is negative (-0 is not).
FASTLORA_INLINE double copy_sign(double size, double sign) { return sign < 0 ? -size : size; }

// Balance of two factors in a chain: a row whose squared length is below kUnbalanced of the longest's is divided by
// kPower = √kUnbalanced until it is not, at most down to kLeastPower. Noise of its arithmetic: kArithmetic √(r ε)
// ‖B‖‖A‖.
constexpr double kUnbalanced = 0x1p-16, kPower = 0x1p-8, kLeastPower = 0x1p-400;
constexpr double kArithmetic = 0.5;  // four times the most that was seen

// One-sided Jacobi. Columns with squared norms at or below kSmallSquare are left alone; kBoost lifts them to measure
// them. Entries are scaled to below 2^largest_exponent, so that products of two squared norms neither overflow (squares
// of singular values stay below 2^62 in float32) nor, above kSmallSquare, underflow.
constexpr int kMaxJacobiSweeps = 40;
template <class T>
constexpr T kSmallSquare = sizeof(T) == 4 ? T(0x1p-40) : T(0x1p-400);
template <class T>
constexpr T kBoost = sizeof(T) == 4 ? T(0x1p80) : T(0x1p600);

template <class T>
FASTLORA_INLINE int largest_exponent(int64_t entries) {
    if (sizeof(T) == 8) return 0;
    int bits = 0;
    while (entries > int64_t(1) << bits) ++bits;
    return (62 - bits) / 2;
}

}  // namespace fastlora::FASTLORA_ROOM
