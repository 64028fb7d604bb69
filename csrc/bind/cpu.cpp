// CPU kernels for Python. Tables arrive as addresses of int64 rows whose columns are the fields of kernels.h, single
// rows as bytes.
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "bind.h"
#include "fastlora/kernels.h"

namespace py = pybind11;

namespace fastlora {
namespace {

void check(int status) {
    if (status == kOutOfMemory) throw std::bad_alloc();
}

// For an output about to be written for the first time: one page fault per 4 KiB costs as much as a small solve.
void prefer_huge_pages([[maybe_unused]] uintptr_t data, [[maybe_unused]] int64_t bytes) {
#if defined(MADV_HUGEPAGE)
    constexpr uintptr_t page = uintptr_t(1) << 21;
    const uintptr_t first = (data + page - 1) / page * page, last = (data + uintptr_t(bytes)) / page * page;
    if (first < last) madvise(at<void>(first), last - first, MADV_HUGEPAGE);  // advice: a refusal changes nothing
#endif
}

static_assert(sizeof(Matrix) == 5 * 8 && sizeof(CutQuery) == 4 * 8 && sizeof(AddSegment) == 4 * 8);

}  // namespace

void bind_cpu(py::module_& m) {
    m.def("isa", [] { return kernels().name; }, "Name of the instruction set in use.");
    m.def(
        "finite",
        [](uintptr_t data, int64_t rows, int64_t cols, int64_t stride, int64_t dtype) {
            const Matrix matrix{int64_t(data), rows, cols, stride, dtype};
            py::gil_scoped_release release;
            return kernels().finite(matrix);
        },
        py::arg("data"), py::arg("rows"), py::arg("cols"), py::arg("stride"), py::arg("dtype"));
    m.def(
        "chain",
        [](const py::bytes& row) {
            const auto args = read_row<ChainArgs>(row);
            py::gil_scoped_release release;
            check(kernels().chain(args));
        },
        py::arg("row"), "row: CHAIN_FIELDS");
    const auto def_merge = [&m](const char* name, int (*Kernels::*kernel)(const MergeArgs&)) {
        m.def(
            name,
            [kernel](const py::bytes& row) {
                const auto args = read_row<MergeArgs>(row);
                py::gil_scoped_release release;
                check((kernels().*kernel)(args));
            },
            py::arg("row"), "row: MERGE_FIELDS");
    };
    def_merge("merge_select", &Kernels::merge_select);
    def_merge("merge_row_masks", &Kernels::merge_row_masks);
    def_merge("merge_tiles", &Kernels::merge_tiles);
    m.def(
        "similarity",
        [](const py::bytes& row) {
            const auto args = read_row<SimilarityArgs>(row);
            py::gil_scoped_release release;
            check(kernels().similarity(args));
        },
        py::arg("row"), "row: SIMILARITY_FIELDS");
    m.def(
        "add_products",
        [](const py::bytes& row) {
            const auto args = read_row<AddArgs>(row);
            AddProblem problem;
            {
                py::gil_scoped_release release;
                problem = kernels().add_products(args);
            }
            if (problem.kind == kNoRoom) throw std::bad_alloc();
            return py::make_tuple(int(problem.kind), problem.error);
        },
        py::arg("row"), "row: ADD_FIELDS; (kind, errno) of AddProblem");
    m.def(
        "tucker",
        [](const py::bytes& row) {
            const auto args = read_row<TuckerArgs>(row);
            py::gil_scoped_release release;
            check(kernels().tucker(args));
        },
        py::arg("row"), "row: TUCKER_FIELDS");
    m.def(
        "difference_products",
        [](const py::bytes& row) {
            const auto args = read_row<DifferenceArgs>(row);
            py::gil_scoped_release release;
            check(kernels().difference_products(args));
        },
        py::arg("row"), "row: DIFFERENCE_FIELDS");
    m.def(
        "eigh",
        [](uintptr_t a, uintptr_t values, uintptr_t vectors, uintptr_t info, int64_t batch, int n, bool is_double,
           int threads) {
            py::gil_scoped_release release;
            prefer_huge_pages(vectors, batch * n * n * (is_double ? 8 : 4));
            check(is_double ? kernels().eigh_f64(at<const double>(a), at<double>(values), at<double>(vectors),
                                                 at<int32_t>(info), batch, n, threads)
                            : kernels().eigh_f32(at<const float>(a), at<float>(values), at<float>(vectors),
                                                 at<int32_t>(info), batch, n, threads));
        },
        py::arg("a"), py::arg("values"), py::arg("vectors"), py::arg("info"), py::arg("batch"), py::arg("n"),
        py::arg("is_double"), py::arg("threads"));
    m.def(
        "svd",
        [](uintptr_t a, uintptr_t ut, uintptr_t s, uintptr_t vt, uintptr_t info, int64_t batch, int p, int q,
           bool is_double, int threads) {
            py::gil_scoped_release release;
            const int64_t row = batch * (p < q ? p : q) * (is_double ? 8 : 4);
            prefer_huge_pages(ut, row * p);
            prefer_huge_pages(vt, row * q);
            check(is_double ? kernels().svd_f64(at<const double>(a), at<double>(ut), at<double>(s), at<double>(vt),
                                                at<int32_t>(info), batch, p, q, threads)
                            : kernels().svd_f32(at<const float>(a), at<float>(ut), at<float>(s), at<float>(vt),
                                                at<int32_t>(info), batch, p, q, threads));
        },
        py::arg("a"), py::arg("ut"), py::arg("s"), py::arg("vt"), py::arg("info"), py::arg("batch"), py::arg("p"),
        py::arg("q"), py::arg("is_double"), py::arg("threads"));
}

}  // namespace fastlora
