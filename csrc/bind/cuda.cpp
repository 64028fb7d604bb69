// CUDA kernels for Python, or their absence.
#include "bind.h"
#ifdef FASTLORA_HAS_CUDA
#include "fastlora/cuda.h"
#endif

namespace py = pybind11;

namespace fastlora {

void bind_cuda(py::module_& m) {
#ifdef FASTLORA_HAS_CUDA
    m.attr("has_cuda") = true;
    m.attr("cuda_archs") = FASTLORA_CUDA_ARCHS;
    m.def(
        "cuda_device_count",
        [] {
            int count = 0;
            const int error = cuda::device_count(&count);
            return py::make_tuple(count, error == 0 ? "" : cuda::error_message(error));
        },
        "(number of devices, reason when there is none)");
    m.def(
        "cuda_self_test",
        [](uintptr_t out, int count, uintptr_t stream) {
            return cuda::self_test(reinterpret_cast<int*>(out), count, reinterpret_cast<void*>(stream));
        },
        py::arg("out"), py::arg("count"), py::arg("stream"));
#else
    m.attr("has_cuda") = false;
    m.attr("cuda_archs") = "";
#endif
}

}  // namespace fastlora
