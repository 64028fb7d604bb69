// What a tensor is to the kernels: a row of the Matrix table.
#pragma once
#include "bind.h"
#include "fastlora/kernels.h"

namespace fastlora {

struct DlExchange;

// A tensor as it lies.
struct Described {
    Matrix matrix;  // of more dimensions than two: its address and dtype alone
    int64_t dimensions;
    bool has_rows;  // whether the elements of a row are neighbours
    bool on_cpu;
};

// Describes tensors through DLPack's C interface, which torch gives with its type: taking addresses, shapes and strides
// out of a tensor in Python takes ten times as long. A type without that interface is asked for its attributes.
class Describer {
  public:
    explicit Describer(const pybind11::type& type);

    // Raises TypeError for what is no tensor, ValueError for a dtype that kernels do not read.
    Described operator()(pybind11::handle object) const;

  private:
    pybind11::type type_;
    const DlExchange* exchange_;
};

}  // namespace fastlora
