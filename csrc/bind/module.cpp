#include "bind.h"

PYBIND11_MODULE(_core, m, pybind11::mod_gil_not_used()) {
    m.doc() = "fastlora compiled kernels: addresses in, status out. The callers in fastlora/backends check everything.";
    fastlora::bind_constants(m);
    fastlora::bind_cpu(m);
    fastlora::bind_cuda(m);
    fastlora::bind_jobs(m);
    fastlora::bind_factor_jobs(m);
    fastlora::bind_tensors(m);
}
