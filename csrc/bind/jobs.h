// What tables are made of: attributes of Python's objects, and the matrices behind them.
#pragma once
#include <cstdint>
#include <utility>
#include <vector>

#include "tensors.h"

namespace fastlora {

namespace py = pybind11;

// An attribute by a name that Python has once.
class Name {
  public:
    explicit Name(const char* name) : name_(PyUnicode_InternFromString(name)) {}
    py::object of(py::handle object) const {
        PyObject* found = PyObject_GetAttr(object.ptr(), name_);
        if (found == nullptr) throw py::error_already_set();
        return py::reinterpret_steal<py::object>(found);
    }

  private:
    PyObject* name_;
};

inline int64_t number(py::handle object) {
    const int64_t found = PyLong_AsLongLong(object.ptr());
    if (found == -1 && PyErr_Occurred()) throw py::error_already_set();
    return found;
}

inline double real(py::handle object) {
    const double found = PyFloat_AsDouble(object.ptr());
    if (found == -1.0 && PyErr_Occurred()) throw py::error_already_set();
    return found;
}

// The elements of a list or tuple, or of what can be made one; they live as long as this does.
class Elements {
  public:
    explicit Elements(py::handle sequence)
        : fast_(py::reinterpret_steal<py::object>(PySequence_Fast(sequence.ptr(), "jobs have sequences"))) {
        if (!fast_) throw py::error_already_set();
    }
    int64_t size() const { return PySequence_Fast_GET_SIZE(fast_.ptr()); }
    py::handle operator[](int64_t i) const { return PySequence_Fast_GET_ITEM(fast_.ptr(), Py_ssize_t(i)); }

  private:
    py::object fast_;
};

struct Names {
    Name factors{"factors"}, blocks{"blocks"}, rows{"rows"}, out{"out"}, stride{"stride"}, start{"start"};
    Name numel{"numel"}, stored{"stored"}, side{"side"}, length{"length"}, rank{"rank"}, source{"source"},
        coefficient{"coefficient"}, at{"at"}, scale{"scale"};
    Name outputs{"outputs"}, terms{"terms"}, shape{"shape"}, dtype{"dtype"}, file{"file"}, offset{"offset"},
        check{"check"};
};

// Never freed: it would be after the interpreter.
inline const Names& names() {
    static const Names& all = *new Names;
    return all;
}

// Matrices that are read, and the tensors behind them.
struct Factors {
    std::vector<Matrix> table;
    std::vector<py::object> alive;
    std::vector<std::pair<py::object, py::object>> copies;  // of tensors whose rows are scattered

    void add(const Describer& describe, py::handle tensor) {
        Described found = describe(tensor);
        if (found.dimensions != 2) throw py::value_error("a matrix has two dimensions");
        if (!found.on_cpu) throw py::value_error("a matrix is not in the memory of the processor");
        if (found.has_rows) {
            alive.push_back(py::reinterpret_borrow<py::object>(tensor));
        } else {
            py::object copy = tensor.attr("contiguous")();
            found = describe(copy);
            copies.emplace_back(py::reinterpret_borrow<py::object>(tensor), copy);
            alive.push_back(copy);
        }
        table.push_back(found.matrix);
    }
};

// (i, j, offset): left, right, and in `out` the offset.
inline std::vector<GramBlock> read_blocks(py::handle blocks) {
    const Elements all(blocks);
    std::vector<GramBlock> places;
    places.reserve(size_t(all.size()));
    for (int64_t i = 0; i < all.size(); ++i) {
        const Elements place(all[i]);
        if (place.size() != 3) throw py::value_error("a block is (i, j, offset)");
        places.push_back({number(place[0]), number(place[1]), number(place[2]), 0, 0, 1.0});
    }
    return places;
}

// A term with a coefficient that is not empty.
inline Term coefficient_row(Term row, const Described& found, py::handle coefficient, bool rows) {
    const Matrix& c = found.matrix;
    if (c.dtype != int64_t(DType::f64) || !found.has_rows || !found.on_cpu)
        throw py::value_error(py::str("a coefficient must be float64 with contiguous rows: {} {}")
                                  .format(coefficient.attr("dtype"), coefficient.attr("stride")()));
    row.coefficient = c.data;
    row.stride = c.stride;
    row.columns = rows ? c.rows : c.cols;
    return row;
}

}  // namespace fastlora
