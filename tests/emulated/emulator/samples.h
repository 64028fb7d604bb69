// Small kernels that test the emulator itself.
#pragma once
#include <string>

namespace emulator {

// Runs the sample of that name; returns what the emulator found, or nothing.
std::string run_sample(const std::string& name);

}  // namespace emulator
