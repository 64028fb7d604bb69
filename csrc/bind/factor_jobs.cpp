// Factors (fastlora/core/factors.py) as the tables of kernels.h, without jobs in between.
#include <cstring>
#include <new>
#include <unordered_map>
#include <vector>

#include "jobs.h"

namespace py = pybind11;

namespace fastlora {
namespace {

// Factors (fastlora/core/factors.py) that are computed in memory, as the job that combine_jobs.py makes of each list.
class FactorJobs {
  public:
    // sides: (factors, results); the factors of a side are of one module.
    FactorJobs(const py::sequence& sides, const py::type& type) : describe_(type) {
        const Elements all(sides);
        for (int64_t i = 0; i < all.size() && misfit_ < 0; ++i) {
            const Elements side(all[i]);
            if (!add(Elements(side[0]), Elements(side[1]))) misfit_ = i;
        }
    }

    // The first side whose factors are not of one module, or -1; without one all were computed.
    int64_t run(int threads) const {
        if (misfit_ >= 0) return misfit_;
        const CombineTables tables{
            factors_.table.data(),  tasks_.data(), outputs_.data(), matrices_.data(), terms_.data(),
            int64_t(tasks_.size()), false};
        CombineProblem problem;
        {
            py::gil_scoped_release release;
            problem = kernels().combine(tables, threads);
        }
        if (problem.kind == kNoMemory) throw std::bad_alloc();
        return -1;
    }

  private:
    bool add(const Elements& factors, const Elements& results) {
        if (factors.size() != results.size()) throw py::value_error("every factor has a result");
        const int64_t first_factor = int64_t(factors_.table.size()), first_output = int64_t(outputs_.size());
        index_.clear();
        const Names& name = names();
        int64_t length = -1;
        bool rows = false;
        for (int64_t f = 0; f < factors.size(); ++f) {
            const py::handle factor = factors[f];
            const int64_t own = number(name.length.of(factor)), rank = number(name.rank.of(factor));
            if (f == 0) {
                length = own;
                rows = is_a(name.side.of(factor));
            }
            if (own != length || is_a(name.side.of(factor)) != rows) return false;
            const py::object terms = name.terms.of(factor);
            const Elements all(terms);
            const int64_t first_term = int64_t(terms_.size());
            for (int64_t t = 0; t < all.size(); ++t)
                if (!add_term(all[t], first_factor, length, rank, rows)) return false;
            const Described out = describe_(results[f]);
            const Matrix& m = out.matrix;
            const bool fits = rows ? m.rows == rank && m.cols == length : m.rows == length && m.cols == rank;
            if (out.dimensions != 2 || !out.on_cpu || !out.has_rows || !fits)
                throw py::value_error("a result is a matrix in memory, of the shape of its factor");
            alive_.push_back(py::reinterpret_borrow<py::object>(results[f]));
            matrices_.push_back(m);
            outputs_.push_back({int64_t(outputs_.size()), first_term, int64_t(terms_.size()) - first_term, -1, 0, 0});
        }
        tasks_.push_back({first_factor, int64_t(factors_.table.size()) - first_factor, first_output,
                          int64_t(outputs_.size()) - first_output, rows});
        return true;
    }

    // Whether the term is of this side, and fits into its factor.
    bool add_term(py::handle term, int64_t first_factor, int64_t length, int64_t rank, bool rows) {
        const Names& name = names();
        const py::object source = name.source.of(term), coefficient = name.coefficient.of(term);
        const int64_t index = index_of(source, first_factor);
        const Matrix& x = factors_.table[size_t(first_factor + index)];
        int64_t width = rows ? x.rows : x.cols;
        Term row{index, 0, 0, 0, number(name.at.of(term)), real(name.scale.of(term))};
        if ((rows ? x.cols : x.rows) != length) return false;
        bool is_empty = false;
        if (!coefficient.is_none()) {
            const Described found = describe_(coefficient);
            const Matrix& c = found.matrix;
            if (found.dimensions != 2 || (rows ? c.cols : c.rows) != width) return false;
            width = rows ? c.rows : c.cols;
            is_empty = !c.rows || !c.cols;  // it has no address, which in the table is the identity
            if (!is_empty) row = coefficient_row(row, found, coefficient, rows);
            alive_.push_back(coefficient);
        }
        if (row.at < 0 || row.at > rank - width) return false;
        if (!is_empty) terms_.push_back(row);
        return true;
    }

    // Of a stored matrix among those of its side; two views of one piece of memory are one.
    int64_t index_of(const py::object& source, int64_t first) {
        const auto [place, is_new] = index_.try_emplace(source.ptr(), -1);
        if (!is_new) return place->second;
        factors_.add(describe_, source);
        const size_t last = factors_.table.size() - 1;
        for (size_t i = size_t(first); i < last && place->second < 0; ++i)
            if (std::memcmp(&factors_.table[i], &factors_.table[last], sizeof(Matrix)) == 0) {
                factors_.table.pop_back();
                return place->second = int64_t(i) - first;
            }
        return place->second = int64_t(last) - first;
    }

    static bool is_a(py::handle side) { return PyUnicode_CompareWithASCIIString(side.ptr(), "A") == 0; }

    Describer describe_;
    Factors factors_;
    std::vector<CombineTask> tasks_;
    std::vector<CombineOutput> outputs_;
    std::vector<Matrix> matrices_;
    std::vector<Term> terms_;
    std::unordered_map<PyObject*, int64_t> index_;  // of the stored matrices of a side
    std::vector<py::object> alive_;
    int64_t misfit_ = -1;
};

}  // namespace

void bind_factor_jobs(py::module_& m) {
    py::class_<FactorJobs>(m, "FactorJobs")
        .def(py::init<const py::sequence&, const py::type&>(), py::arg("sides"), py::arg("tensor"))
        .def("run", &FactorJobs::run, py::arg("threads"));
}

}  // namespace fastlora
