// The kernels of one instruction set that read or write tall factors, and the small program between them.
#pragma once
#include "simd.h"

namespace fastlora::FASTLORA_ISA {

int gram(const Matrix* factors, const GramTask* tasks, const GramBlock* blocks, int64_t n_tasks, int threads);

CombineProblem combine(const CombineTables& tables, int threads);

int chain(const ChainArgs& args);

bool finite(const Matrix& matrix);

}  // namespace fastlora::FASTLORA_ISA
