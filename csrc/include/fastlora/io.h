// Writing tensors to their places in an open file.
#pragma once
#include <cstdint>

#include "fastlora/kernels.h"

namespace fastlora {

struct Piece {
    Matrix matrix;  // contiguous
    int64_t bytes;
    int64_t offset;  // in the file
    int64_t check;   // 1: refuse NaN and infinity
};

enum WriteProblem : int { kWritten = 0, kNotFinite = 1, kSystemError = 2 };

struct WriteResult {
    WriteProblem problem;
    int64_t piece;  // the one with the problem
    int error;      // errno of a system error
};

// Writes pieces one after the other, checking each right before it is written, while it is in cache.
WriteResult write_pieces(int file, const Piece* pieces, int64_t count);

}  // namespace fastlora
