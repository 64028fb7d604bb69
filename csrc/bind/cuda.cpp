// CUDA kernels for Python, or their absence. The test's emulator binds them a second time.
#include "bind.h"
#ifdef FASTLORA_HAS_CUDA
#include "fastlora/cuda.h"
#endif

namespace py = pybind11;

namespace fastlora {

#ifdef FASTLORA_HAS_CUDA
namespace {

template <class T = void>
T* at(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

}  // namespace
#endif

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
    m.def("cuda_error_message", &cuda::error_message, py::arg("error"));
    m.def(
        "cuda_self_test",
        [](uintptr_t out, int count, uintptr_t stream) { return cuda::self_test(at<int>(out), count, at(stream)); },
        py::arg("out"), py::arg("count"), py::arg("stream"));
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
        [](uintptr_t left, uintptr_t right, uintptr_t floor, uintptr_t basis, uintptr_t values, uintptr_t shared,
           uintptr_t kept, uintptr_t sigma, uintptr_t info, int64_t groups, int64_t k, int64_t r, int64_t width,
           int64_t kind, double threshold, double rtol, int64_t rank, double energy, uintptr_t workspace,
           uintptr_t stream) {
            const ChainArgs args{at<const double>(left),
                                 at<const double>(right),
                                 at<const double>(floor),
                                 at<double>(basis),
                                 at<double>(values),
                                 at<int64_t>(shared),
                                 at<int64_t>(kept),
                                 at<double>(sigma),
                                 at<int32_t>(info),
                                 groups,
                                 k,
                                 r,
                                 width,
                                 kind,
                                 threshold,
                                 rtol,
                                 rank,
                                 energy,
                                 0};
            py::gil_scoped_release release;
            return cuda::chain(args, at(workspace), at(stream));
        },
        py::arg("left"), py::arg("right"), py::arg("floor"), py::arg("basis"), py::arg("values"), py::arg("shared"),
        py::arg("kept"), py::arg("sigma"), py::arg("info"), py::arg("groups"), py::arg("k"), py::arg("r"),
        py::arg("width"), py::arg("kind"), py::arg("threshold"), py::arg("rtol"), py::arg("rank"), py::arg("energy"),
        py::arg("workspace"), py::arg("stream"));
    m.def(
        "cuda_coefficients",
        [](uintptr_t projected, uintptr_t other, uintptr_t basis, uintptr_t scaling, uintptr_t strength, uintptr_t H,
           uintptr_t norms, uintptr_t shared, uintptr_t removal, uintptr_t mixing, int64_t groups, int64_t k, int64_t r,
           int64_t w, int64_t movers, int64_t removal_row, int64_t removal_column, int64_t mixing_row,
           int64_t mixing_column, uintptr_t stream) {
            const cuda::CoefficientArgs args{at<const double>(projected),
                                             at<const double>(other),
                                             at<const double>(basis),
                                             at<const double>(scaling),
                                             at<const double>(strength),
                                             at<double>(H),
                                             at<double>(norms),
                                             at<double>(shared),
                                             at<double>(removal),
                                             at<double>(mixing),
                                             groups,
                                             k,
                                             r,
                                             w,
                                             movers,
                                             removal_row,
                                             removal_column,
                                             mixing_row,
                                             mixing_column};
            py::gil_scoped_release release;
            return cuda::coefficients(args, at(stream));
        },
        py::arg("projected"), py::arg("other"), py::arg("basis"), py::arg("scaling"), py::arg("strength"), py::arg("H"),
        py::arg("norms"), py::arg("shared"), py::arg("removal"), py::arg("mixing"), py::arg("groups"), py::arg("k"),
        py::arg("r"), py::arg("w"), py::arg("movers"), py::arg("removal_row"), py::arg("removal_column"),
        py::arg("mixing_row"), py::arg("mixing_column"), py::arg("stream"));
#else
    m.attr("has_cuda") = false;
    m.attr("cuda_archs") = "";
#endif
}

}  // namespace fastlora
