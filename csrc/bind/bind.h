// What each binding file adds to the module, and how rows of arguments are read.
#pragma once
#include <pybind11/pybind11.h>

#include <cstring>
#include <string_view>
#include <type_traits>

namespace fastlora {

void bind_constants(pybind11::module_& m);
void bind_cpu(pybind11::module_& m);
void bind_cuda(pybind11::module_& m);
void bind_factor_jobs(pybind11::module_& m);
void bind_jobs(pybind11::module_& m);
void bind_tensors(pybind11::module_& m);

template <class T = void>
T* at(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

// A struct from the bytes of its fields, each of 8: constants.cpp tells Python which these are.
template <class Row>
Row read_row(const pybind11::bytes& row) {
    static_assert(sizeof(void*) == 8 && std::is_trivially_copyable_v<Row>);
    const std::string_view bytes = row;
    if (bytes.size() != sizeof(Row)) throw pybind11::value_error("a row of arguments has another length");
    Row read;
    std::memcpy(&read, bytes.data(), sizeof read);
    return read;
}

}  // namespace fastlora
