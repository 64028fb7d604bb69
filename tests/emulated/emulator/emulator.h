// CUDA kernels on the CPU, for tests: the same source, compiled by a C++ compiler with this header for CUDA's own.
//   fiber.h       a stack for every thread of a block
//   block.h       schedules and the block barrier
//   warp.h        shuffles, votes and the warp barrier; divergence is an error
//   races.h       accesses that no barrier orders are an error
//   shared.h      poisoned and guarded shared memory
//   launch.h      a grid, block after block; a deadlock is an error
//   intrinsics.h  CUDA's names for all this
//   runtime.h     CUDA's runtime functions
// It lacks tensor cores, asynchronous copies and cooperative groups, and it runs one block at a time.
#pragma once
#include "intrinsics.h"
#include "runtime.h"

template <class T>
using Traced = emulator::Traced<T>;

using emulator::dynamic_shared;

#define FASTLORA_SHARED(T, name, count)                           \
    const Traced<T> name = emulator::static_shared<T>(count, [] { \
        static char tag;                                          \
        return &tag;                                              \
    }())

using emulator::start_kernel;
