// CUDA kernels for Python, or their absence. The test's emulator binds them a second time.
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
        "cuda_device_code",
        [] {
            int architecture = 0;
            const int error = cuda::device_code(&architecture);
            return py::make_tuple(error, architecture);
        },
        "(CUDA error number: 0 where this build has code for the current device, its architecture such as 90)");
    m.def("cuda_error_message", &cuda::error_message, py::arg("error"));
    m.def(
        "cuda_eigh",
        [](uintptr_t a, uintptr_t values, uintptr_t vectors, uintptr_t info, int64_t batch, int n, bool is_double,
           uintptr_t stream) {
            py::gil_scoped_release release;
            return cuda::eigh(at(a), at(values), at(vectors), at<int32_t>(info), batch, n, is_double, at(stream));
        },
        py::arg("a"), py::arg("values"), py::arg("vectors"), py::arg("info"), py::arg("batch"), py::arg("n"),
        py::arg("is_double"), py::arg("stream"));
    m.def(
        "cuda_svd",
        [](uintptr_t a, uintptr_t ut, uintptr_t s, uintptr_t vt, uintptr_t info, int64_t batch, int p, int q,
           bool is_double, uintptr_t stream) {
            py::gil_scoped_release release;
            return cuda::svd(at(a), at(ut), at(s), at(vt), at<int32_t>(info), batch, p, q, is_double, at(stream));
        },
        py::arg("a"), py::arg("ut"), py::arg("s"), py::arg("vt"), py::arg("info"), py::arg("batch"), py::arg("p"),
        py::arg("q"), py::arg("is_double"), py::arg("stream"));
    m.def(
        "cuda_chain_workspace",
        [](int64_t groups, int64_t k, int64_t r, int64_t width, int64_t kind) {
            ChainArgs args{};
            args.groups = groups, args.k = k, args.r = r, args.width = width, args.kind = kind;
            int64_t bytes = 0;
            const int error = cuda::chain_workspace(args, &bytes);
            return py::make_tuple(error, bytes);
        },
        py::arg("groups"), py::arg("k"), py::arg("r"), py::arg("width"), py::arg("kind"),
        "(CUDA error number, bytes of device memory that cuda_chain needs)");
    m.def(
        "cuda_chain",
        [](const py::bytes& row, uintptr_t workspace, uintptr_t stream) {
            const auto args = read_row<ChainArgs>(row);
            py::gil_scoped_release release;
            return cuda::chain(args, at(workspace), at(stream));
        },
        py::arg("row"), py::arg("workspace"), py::arg("stream"), "row: CHAIN_FIELDS");
    m.def(
        "cuda_coefficients",
        [](const py::bytes& row, uintptr_t stream) {
            const auto args = read_row<cuda::CoefficientArgs>(row);
            py::gil_scoped_release release;
            return cuda::coefficients(args, at(stream));
        },
        py::arg("row"), py::arg("stream"), "row: COEFFICIENT_FIELDS");
#else
    m.attr("has_cuda") = false;
    m.attr("cuda_archs") = "";
#endif
}

}  // namespace fastlora
