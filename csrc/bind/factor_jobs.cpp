// Factors (fastlora/core/factors.py) as the tables of kernels.h, without jobs in between.
#include <cstring>
#include <new>
#include <unordered_map>
#include <vector>

#include "fastlora/threads.h"
#include "jobs.h"

namespace py = pybind11;

namespace fastlora {
namespace {

bool is_a(py::handle side) { return PyUnicode_CompareWithASCIIString(side.ptr(), "A") == 0; }

// Gram blocks of factors that are stored matrices, as the jobs that fastlora/engine/gram.py makes of them.
class GramFactors {
  public:
    // asked: (modules, out, r, blocks); a module is a list of factors, and out, whose memory holds nothing yet, has a
    // part for each.
    GramFactors(const py::sequence& asked, const py::type& type) : describe_(type) {
        const Elements all(asked);
        for (int64_t i = 0; i < all.size() && fits_; ++i) fits_ = add(Elements(all[i]));
    }

    // Whether the blocks were computed; if not, some factors are no stored matrices or do not belong together.
    bool run(int threads) {
        if (!fits_) return false;
        py::gil_scoped_release release;
        run_team(
            threads, [](void* self, int thread, int of) { static_cast<GramFactors*>(self)->clear(thread, of); }, this);
        if (kernels().gram(factors_.table.data(), tasks_.data(), blocks_.data(), int64_t(tasks_.size()), threads) !=
            kDone)
            throw std::bad_alloc();
        return true;
    }

  private:
    bool add(const Elements& asked) {
        const Elements modules(asked[0]);
        const Described out = describe_(asked[1]);
        if (!out.on_cpu || out.matrix.dtype != int64_t(DType::f64)) return false;
        alive_.push_back(py::reinterpret_borrow<py::object>(asked[1]));
        const int64_t r = number(asked[2]), k = modules.size() ? Elements(modules[0]).size() : 0;
        const int64_t size = number(names().numel.of(asked[1])()) / (modules.size() ? modules.size() : 1);
        const std::vector<GramBlock> places = read_blocks(asked[3]);
        for (const GramBlock& place : places)
            if (place.left < 0 || place.left >= k || place.right < 0 || place.right >= k || place.out < 0 ||
                place.out > size - r * r)
                return false;
        for (int64_t m = 0; m < modules.size(); ++m) {
            const Elements factors(modules[m]);
            const int64_t start = out.matrix.data + 8 * m * size;
            tasks_.push_back({int64_t(factors_.table.size()), k, int64_t(blocks_.size()), int64_t(places.size()), 0});
            if (factors.size() != k || !add(factors, r, tasks_.back())) return false;
            for (const GramBlock& place : places)
                blocks_.push_back({place.left, place.right, start + 8 * place.out, r});
        }
        rooms_.emplace_back(out.matrix.data, 8 * size * modules.size());
        return true;
    }

    bool add(const Elements& factors, int64_t r, GramTask& task) {
        int64_t length = -1;
        for (int64_t f = 0; f < factors.size(); ++f) {
            const py::object stored = names().stored.of(factors[f]);
            if (stored.is_none()) return false;
            const bool rows = is_a(names().side.of(factors[f]));
            const int64_t own = number(names().length.of(factors[f]));
            factors_.add(describe_, stored);
            const Matrix& x = factors_.table.back();
            if (f == 0) {
                task.rows = rows;
                length = own;
            }
            if (own != length || rows != bool(task.rows) || (rows ? x.cols : x.rows) != length ||
                (rows ? x.rows : x.cols) > r)
                return false;
        }
        return true;
    }

    // A thread's share of the memory.
    void clear(int thread, int of) {
        for (const auto& [data, bytes] : rooms_) {
            const int64_t first = bytes / 8 * thread / of * 8, last = bytes / 8 * (thread + 1) / of * 8;
            std::memset(at<void>(uintptr_t(data + first)), 0, size_t(last - first));
        }
    }

    Describer describe_;
    Factors factors_;
    std::vector<GramTask> tasks_;
    std::vector<GramBlock> blocks_;
    std::vector<std::pair<int64_t, int64_t>> rooms_;  // address and bytes
    std::vector<py::object> alive_;
    bool fits_ = true;
};

// Factors (fastlora/core/factors.py) that are computed in memory, as the job that combine_jobs.py makes of each list.
class FactorJobs {
  public:
    // sides: (factors, results); the factors of a side are of one module.
    FactorJobs(const py::sequence& sides, const py::type& type) : describe_(type) {
        const Elements all(sides);
        for (int64_t i = 0; i < all.size() && fits_; ++i) {
            const Elements side(all[i]);
            fits_ = add(Elements(side[0]), Elements(side[1]));
        }
    }

    // Whether all were computed; if not, factors of some side are not of one module.
    bool run(int threads) const {
        if (!fits_) return false;
        const CombineTables tables{
            factors_.table.data(),  tasks_.data(), outputs_.data(), matrices_.data(), terms_.data(),
            int64_t(tasks_.size()), false};
        CombineProblem problem;
        {
            py::gil_scoped_release release;
            problem = kernels().combine(tables, threads);
        }
        if (problem.kind == kNoMemory) throw std::bad_alloc();
        return true;
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

    Describer describe_;
    Factors factors_;
    std::vector<CombineTask> tasks_;
    std::vector<CombineOutput> outputs_;
    std::vector<Matrix> matrices_;
    std::vector<Term> terms_;
    std::unordered_map<PyObject*, int64_t> index_;  // of the stored matrices of a side
    std::vector<py::object> alive_;
    bool fits_ = true;
};

}  // namespace

void bind_factor_jobs(py::module_& m) {
    py::class_<GramFactors>(m, "GramFactors")
        .def(py::init<const py::sequence&, const py::type&>(), py::arg("asked"), py::arg("tensor"))
        .def("run", &GramFactors::run, py::arg("threads"));
    py::class_<FactorJobs>(m, "FactorJobs")
        .def(py::init<const py::sequence&, const py::type&>(), py::arg("sides"), py::arg("tensor"))
        .def("run", &FactorJobs::run, py::arg("threads"));
}

}  // namespace fastlora
