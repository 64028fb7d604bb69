// Numbers and rows that Python shares with the kernels: their home is kernels.h and cuda.h.
#include <cstddef>
#include <initializer_list>
#include <type_traits>
#include <utility>

#include "bind.h"
#include "fastlora/cuda.h"
#include "fastlora/kernels.h"

namespace py = pybind11;

namespace fastlora {
namespace {

py::dict numbers(std::initializer_list<std::pair<const char*, int64_t>> entries) {
    py::dict all;
    for (const auto& [name, number] : entries) all[name] = number;
    return all;
}

struct Field {
    const char* name;
    size_t offset;
    bool is_real;
};

#define FASTLORA_FIELD(Row, name) \
    Field { #name, offsetof(Row, name), std::is_same_v<decltype(Row::name), double> }

// The fields of a row in their order, none left out: name, and the code that Python's `struct` has for 8 bytes of it.
template <class Row>
py::tuple fields(std::initializer_list<Field> all) {
    py::list row;
    for (const Field& field : all) {
        if (field.offset != 8 * row.size()) throw py::import_error(field.name);
        row.append(py::make_tuple(field.name, field.is_real ? "d" : "q"));
    }
    if (sizeof(Row) != 8 * row.size()) throw py::import_error("fields are missing");
    return py::tuple(row);
}

py::tuple chain_fields() {
    using Row = ChainArgs;
    return fields<Row>({FASTLORA_FIELD(Row, left), FASTLORA_FIELD(Row, right), FASTLORA_FIELD(Row, floor),
                        FASTLORA_FIELD(Row, basis), FASTLORA_FIELD(Row, values), FASTLORA_FIELD(Row, shared),
                        FASTLORA_FIELD(Row, kept), FASTLORA_FIELD(Row, sigma), FASTLORA_FIELD(Row, info),
                        FASTLORA_FIELD(Row, groups), FASTLORA_FIELD(Row, k), FASTLORA_FIELD(Row, r),
                        FASTLORA_FIELD(Row, width), FASTLORA_FIELD(Row, kind), FASTLORA_FIELD(Row, threshold),
                        FASTLORA_FIELD(Row, rtol), FASTLORA_FIELD(Row, rank), FASTLORA_FIELD(Row, energy),
                        FASTLORA_FIELD(Row, threads)});
}

py::tuple coefficient_fields() {
    using Row = cuda::CoefficientArgs;
    return fields<Row>({FASTLORA_FIELD(Row, projected), FASTLORA_FIELD(Row, other), FASTLORA_FIELD(Row, basis),
                        FASTLORA_FIELD(Row, scaling), FASTLORA_FIELD(Row, strength), FASTLORA_FIELD(Row, H),
                        FASTLORA_FIELD(Row, norms), FASTLORA_FIELD(Row, shared), FASTLORA_FIELD(Row, removal),
                        FASTLORA_FIELD(Row, mixing), FASTLORA_FIELD(Row, groups), FASTLORA_FIELD(Row, k),
                        FASTLORA_FIELD(Row, r), FASTLORA_FIELD(Row, w), FASTLORA_FIELD(Row, movers),
                        FASTLORA_FIELD(Row, removal_row), FASTLORA_FIELD(Row, removal_column),
                        FASTLORA_FIELD(Row, mixing_row), FASTLORA_FIELD(Row, mixing_column)});
}

py::tuple merge_fields() {
    using Row = MergeArgs;
    return fields<Row>(
        {FASTLORA_FIELD(Row, factors),    FASTLORA_FIELD(Row, scales),    FASTLORA_FIELD(Row, k),
         FASTLORA_FIELD(Row, n),          FASTLORA_FIELD(Row, m),         FASTLORA_FIELD(Row, is_double),
         FASTLORA_FIELD(Row, threads),    FASTLORA_FIELD(Row, trim),      FASTLORA_FIELD(Row, low),
         FASTLORA_FIELD(Row, low_order),  FASTLORA_FIELD(Row, high),      FASTLORA_FIELD(Row, high_order),
         FASTLORA_FIELD(Row, keep),       FASTLORA_FIELD(Row, keys),      FASTLORA_FIELD(Row, module_key),
         FASTLORA_FIELD(Row, bits),       FASTLORA_FIELD(Row, row_least), FASTLORA_FIELD(Row, row_span),
         FASTLORA_FIELD(Row, elect),      FASTLORA_FIELD(Row, votes),     FASTLORA_FIELD(Row, gains),
         FASTLORA_FIELD(Row, shares),     FASTLORA_FIELD(Row, least),     FASTLORA_FIELD(Row, instead),
         FASTLORA_FIELD(Row, scale),      FASTLORA_FIELD(Row, zero),      FASTLORA_FIELD(Row, out),
         FASTLORA_FIELD(Row, add),        FASTLORA_FIELD(Row, thin),      FASTLORA_FIELD(Row, width),
         FASTLORA_FIELD(Row, transposed), FASTLORA_FIELD(Row, product),   FASTLORA_FIELD(Row, square),
         FASTLORA_FIELD(Row, counts),     FASTLORA_FIELD(Row, sums),      FASTLORA_FIELD(Row, queries),
         FASTLORA_FIELD(Row, n_queries),  FASTLORA_FIELD(Row, variance)});
}

py::tuple similarity_fields() {
    using Row = SimilarityArgs;
    return fields<Row>({FASTLORA_FIELD(Row, left), FASTLORA_FIELD(Row, right), FASTLORA_FIELD(Row, starts),
                        FASTLORA_FIELD(Row, kept), FASTLORA_FIELD(Row, inner), FASTLORA_FIELD(Row, shared),
                        FASTLORA_FIELD(Row, n), FASTLORA_FIELD(Row, m), FASTLORA_FIELD(Row, width),
                        FASTLORA_FIELD(Row, k), FASTLORA_FIELD(Row, split), FASTLORA_FIELD(Row, threads)});
}

py::tuple add_fields() {
    using Row = AddArgs;
    return fields<Row>({FASTLORA_FIELD(Row, factors), FASTLORA_FIELD(Row, scales), FASTLORA_FIELD(Row, segments),
                        FASTLORA_FIELD(Row, n_segments), FASTLORA_FIELD(Row, from), FASTLORA_FIELD(Row, to),
                        FASTLORA_FIELD(Row, from_file), FASTLORA_FIELD(Row, from_offset), FASTLORA_FIELD(Row, to_file),
                        FASTLORA_FIELD(Row, to_offset), FASTLORA_FIELD(Row, is_double), FASTLORA_FIELD(Row, threads)});
}

py::tuple tucker_fields() {
    using Row = TuckerArgs;
    return fields<Row>({FASTLORA_FIELD(Row, left), FASTLORA_FIELD(Row, right), FASTLORA_FIELD(Row, u),
                        FASTLORA_FIELD(Row, v), FASTLORA_FIELD(Row, u_end), FASTLORA_FIELD(Row, v_end),
                        FASTLORA_FIELD(Row, steps), FASTLORA_FIELD(Row, modules), FASTLORA_FIELD(Row, k),
                        FASTLORA_FIELD(Row, r), FASTLORA_FIELD(Row, n), FASTLORA_FIELD(Row, m), FASTLORA_FIELD(Row, c),
                        FASTLORA_FIELD(Row, iterations), FASTLORA_FIELD(Row, tolerance), FASTLORA_FIELD(Row, threads)});
}

py::tuple difference_fields() {
    using Row = DifferenceArgs;
    return fields<Row>({FASTLORA_FIELD(Row, old), FASTLORA_FIELD(Row, current), FASTLORA_FIELD(Row, right),
                        FASTLORA_FIELD(Row, left), FASTLORA_FIELD(Row, images), FASTLORA_FIELD(Row, preimages),
                        FASTLORA_FIELD(Row, square), FASTLORA_FIELD(Row, n), FASTLORA_FIELD(Row, m),
                        FASTLORA_FIELD(Row, width), FASTLORA_FIELD(Row, precision), FASTLORA_FIELD(Row, threads)});
}

}  // namespace

void bind_constants(py::module_& m) {
    m.attr("DTYPES") = numbers({{"float32", int64_t(DType::f32)},
                                {"float64", int64_t(DType::f64)},
                                {"float16", int64_t(DType::f16)},
                                {"bfloat16", int64_t(DType::bf16)},
                                {"uint8", int64_t(DType::bytes)}});
    m.attr("CHAIN_KINDS") = numbers({{"product", kProduct}, {"palindrome", kPalindrome}, {"mean", kMean}});
    m.attr("INFO") = numbers({{"done", kOk}, {"not finite", kNonFinite}, {"not converged", kNotConverged}});
    m.attr("SYSTEM_ERROR") = int(kSystemError);
    m.attr("LEAST_MEAN") = kLeastMean;
    m.attr("CUDA_LARGEST_EIGH") = cuda::kEighLargest;
    m.attr("CUDA_LARGEST_SVD") = cuda::kSvdLargest;
    m.attr("CUDA_LONGEST_SVD") = cuda::kSvdLongest;
    m.attr("CUDA_LARGEST_RANK") = cuda::kChainLargestRank;
    m.attr("CUDA_LARGEST_MEAN") = cuda::kChainLargestMean;
    m.attr("CHAIN_FIELDS") = chain_fields();
    m.attr("COEFFICIENT_FIELDS") = coefficient_fields();
    m.attr("MERGE_FIELDS") = merge_fields();
    m.attr("SIMILARITY_FIELDS") = similarity_fields();
    m.attr("ADD_FIELDS") = add_fields();
    m.attr("TUCKER_FIELDS") = tucker_fields();
    m.attr("DIFFERENCE_FIELDS") = difference_fields();
    m.attr("PRECISIONS") = numbers({{"coarse", kCoarse}, {"float32", kPlain}, {"float64", kWide}});
    m.attr("ADD_PROBLEMS") = numbers(
        {{"not finite", kResultNotFinite}, {"read", kSourceError}, {"short", kShortSource}, {"write", kTargetError}});
    m.attr("TRIM_KINDS") = numbers(
        {{"none", kKeepAll}, {"magnitude", kMagnitude}, {"random", kRandom}, {"bits", kBits}, {"variance", kVariance}});
    m.attr("ELECT_KINDS") = numbers({{"none", kElectNone}, {"total", kElectTotal}, {"frequency", kElectFrequency}});
}

}  // namespace fastlora
