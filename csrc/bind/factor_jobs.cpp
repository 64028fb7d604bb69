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

// Gram blocks of factors that are stored matrices side by side, each times its scale: with what is in memory, the jobs
// that fastlora/engine/gram.py makes of them.
class GramFactors {
  public:
    // asked: (modules, out, r, blocks); a module is a list of factors, and out, whose memory holds nothing yet, has a
    // part for each.
    GramFactors(const py::sequence& asked, const py::type& type) : describe_(type) {
        const Elements all(asked);
        for (int64_t i = 0; i < all.size() && fits_; ++i) fits_ = add(Elements(all[i]));
    }

    // Whether the blocks were computed; if not, some factors are other sums or do not belong together.
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
            const int64_t first_factor = int64_t(factors_.table.size()), first_block = int64_t(blocks_.size());
            tasks_.push_back({first_factor, 0, first_block, 0, 0});
            if (factors.size() != k || !add(factors, r, tasks_.back().rows)) return false;
            for (const GramBlock& place : places) add(place, start + 8 * place.out, r);
            tasks_.back().factors = int64_t(factors_.table.size()) - first_factor;
            tasks_.back().blocks = int64_t(blocks_.size()) - first_block;
        }
        rooms_.emplace_back(out.matrix.data, 8 * size * modules.size());
        return true;
    }

    // The stored matrices of the factors of a module; `rows` becomes that of its task.
    bool add(const Elements& factors, int64_t r, int64_t& rows) {
        const Names& name = names();
        int64_t length = -1;
        pieces_.clear();
        first_piece_.clear();
        for (int64_t f = 0; f < factors.size(); ++f) {
            const py::handle factor = factors[f];
            const bool own_rows = is_a(name.side.of(factor));
            const int64_t own = number(name.length.of(factor));
            if (f == 0) {
                rows = own_rows;
                length = own;
            }
            if (own != length || own_rows != bool(rows)) return false;
            first_piece_.push_back(int64_t(pieces_.size()));
            const py::object stored = name.stored.of(factor);
            int64_t width = 0;
            if (!stored.is_none()) {
                if (!add(stored, 1.0, length, rows, width)) return false;
            } else {
                const py::object terms = name.terms.of(factor);
                const Elements all(terms);
                for (int64_t t = 0; t < all.size(); ++t)
                    if (!name.coefficient.of(all[t]).is_none() || number(name.at.of(all[t])) != width ||
                        !add(name.source.of(all[t]), real(name.scale.of(all[t])), length, rows, width))
                        return false;
                if (width != number(name.rank.of(factor))) return false;
            }
            if (width > r) return false;
        }
        first_piece_.push_back(int64_t(pieces_.size()));
        return true;
    }

    // A stored matrix, from `width` on in its factor, which grows by it.
    bool add(const py::object& source, double scale, int64_t length, bool rows, int64_t& width) {
        factors_.add(describe_, source);
        const Matrix& x = factors_.table.back();
        if ((rows ? x.cols : x.rows) != length) return false;
        pieces_.push_back({width, scale});
        width += rows ? x.rows : x.cols;
        return true;
    }

    // The block of two factors, at `out` in rows of r: those of their pieces, of one on the diagonal the upper ones,
    // which are put below it, too.
    void add(const GramBlock& place, int64_t out, int64_t r) {
        const bool symmetric = place.left == place.right;
        for (int64_t a = first_piece_[size_t(place.left)]; a < first_piece_[size_t(place.left) + 1]; ++a)
            for (int64_t b = symmetric ? a : first_piece_[size_t(place.right)];
                 b < first_piece_[size_t(place.right) + 1]; ++b) {
                const Piece &left = pieces_[size_t(a)], &right = pieces_[size_t(b)];
                const int64_t mirror = symmetric && a < b ? out + 8 * (right.at * r + left.at) : 0;
                blocks_.push_back({a, b, out + 8 * (left.at * r + right.at), r, mirror, left.scale * right.scale});
            }
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
    struct Piece {
        int64_t at;  // first column or row in its factor
        double scale;
    };
    std::vector<Piece> pieces_;                       // of the factors of a module: its stored matrices
    std::vector<int64_t> first_piece_;                // of every factor
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
