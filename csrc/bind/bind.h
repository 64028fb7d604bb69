// What each binding file adds to the module.
#pragma once
#include <pybind11/pybind11.h>

namespace fastlora {

void bind_cpu(pybind11::module_& m);
void bind_cuda(pybind11::module_& m);

}  // namespace fastlora
