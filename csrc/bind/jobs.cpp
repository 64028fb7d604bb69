// Jobs of the engine's passes (fastlora/ops/passes.py) as the tables of kernels.h. Their attributes are read here: in
// Python the tables would take longer than the kernels, for small adapters.
#include "jobs.h"

#include <new>
#include <utility>
#include <vector>

namespace py = pybind11;

namespace fastlora {
namespace {

// Jobs of a gram pass.
class GramJobs {
  public:
    GramJobs(const py::sequence& jobs, const py::type& type) {
        const Describer describe(type);
        const Names& name = names();
        const Elements all(jobs);
        tasks_.reserve(size_t(all.size()));
        py::object asked, out;  // what the job before had
        std::vector<GramBlock> places;
        int64_t first = 0;
        for (int64_t i = 0; i < all.size(); ++i) {
            const py::handle job = all[i];
            const Elements factors(name.factors.of(job));
            GramTask task{};
            task.first_factor = int64_t(factors_.table.size());
            task.factors = factors.size();
            for (int64_t f = 0; f < factors.size(); ++f) factors_.add(describe, factors[f]);
            py::object blocks = name.blocks.of(job);
            if (!blocks.is(asked)) {
                places = read_blocks(blocks);
                asked = std::move(blocks);
            }
            py::object target = name.out.of(job);
            if (!target.is(out)) {
                const Described found = describe(target);
                if (!found.on_cpu || found.matrix.dtype != int64_t(DType::f64))
                    throw py::value_error("blocks are float64, in the memory of the processor");
                first = found.matrix.data;
                out = std::move(target);
                alive_.push_back(out);
            }
            const int64_t start = first + 8 * number(name.start.of(job)), stride = number(name.stride.of(job));
            task.first_block = int64_t(blocks_.size());
            task.blocks = int64_t(places.size());
            task.rows = number(name.rows.of(job));
            for (const GramBlock& place : places)
                blocks_.push_back({place.left, place.right, start + 8 * place.out, stride, 0, 1.0});
            tasks_.push_back(task);
        }
    }

    void run(int threads) const {
        py::gil_scoped_release release;
        if (kernels().gram(factors_.table.data(), tasks_.data(), blocks_.data(), int64_t(tasks_.size()), threads) !=
            kDone)
            throw std::bad_alloc();
    }

  private:
    Factors factors_;
    std::vector<GramTask> tasks_;
    std::vector<GramBlock> blocks_;
    std::vector<py::object> alive_;
};

// Jobs of a combine pass. They may run many times; see PreparedCombine in fastlora/backends/cpu.py.
class CombineJobs {
  public:
    // dtypes: the number of every torch dtype.
    CombineJobs(const py::sequence& jobs, const py::type& type, const py::dict& dtypes) {
        const Describer describe(type);
        const Elements all(jobs);
        tasks_.reserve(size_t(all.size()));
        for (int64_t i = 0; i < all.size(); ++i) {
            const py::handle job = all[i];
            const Elements factors(names().factors.of(job)), outputs(names().outputs.of(job));
            tasks_.push_back({int64_t(factors_.table.size()), factors.size(), int64_t(outputs_.size()), outputs.size(),
                              number(names().rows.of(job))});
            for (int64_t f = 0; f < factors.size(); ++f) factors_.add(describe, factors[f]);
            for (int64_t o = 0; o < outputs.size(); ++o) add(describe, outputs[o], tasks_.back().rows != 0, dtypes);
        }
    }

    // Takes the scales of terms and the places in files anew.
    void renew() {
        size_t term = 0;
        for (size_t o = 0; o < outputs_.size(); ++o) {
            outputs_[o].offset = number(names().offset.of(results_[o]));
            const Elements terms(names().terms.of(results_[o]));
            for (int64_t t = 0; t < outputs_[o].terms; ++t, ++term) {
                if (places_[term] >= terms.size()) throw py::value_error("an output has lost terms");
                terms_[term].scale = real(Elements(terms[places_[term]])[3]);
            }
        }
    }

    // (kind, job, output of the job, errno) of CombineProblem.
    py::tuple run(int threads) {
        for (const auto& [given, copy] : factors_.copies) copy.attr("copy_")(given);
        bool to_files = false;
        for (size_t o = 0; o < outputs_.size(); ++o) {
            outputs_[o].file = number(names().file.of(results_[o]));
            to_files |= outputs_[o].file >= 0;
        }
        const CombineTables tables{factors_.table.data(), tasks_.data(),          outputs_.data(), matrices_.data(),
                                   terms_.data(),         int64_t(tasks_.size()), to_files};
        CombineProblem problem;
        {
            py::gil_scoped_release release;
            problem = kernels().combine(tables, threads);
        }
        if (problem.kind == kNoMemory) throw std::bad_alloc();
        size_t job = 0;
        while (job + 1 < tasks_.size() && tasks_[job + 1].first_output <= problem.output) ++job;
        const int64_t first = tasks_.empty() ? 0 : tasks_[job].first_output;
        return py::make_tuple(int(problem.kind), job, problem.output - first, problem.error);
    }

  private:
    void add(const Describer& describe, py::handle output, bool rows, const py::dict& dtypes) {
        const Elements terms(names().terms.of(output));
        const int64_t first = int64_t(terms_.size());
        for (int64_t t = 0; t < terms.size(); ++t) add_term(describe, terms[t], t, rows);
        outputs_.push_back({int64_t(outputs_.size()), first, int64_t(terms_.size()) - first, -1,
                            number(names().offset.of(output)), number(names().check.of(output))});
        results_.push_back(py::reinterpret_borrow<py::object>(output));
        const py::object out = names().out.of(output);
        if (out.is_none()) {
            const Elements shape(names().shape.of(output));
            const int64_t columns = number(shape[1]);
            matrices_.push_back({0, number(shape[0]), columns, columns, number(dtypes[names().dtype.of(output)])});
            return;
        }
        const Described found = describe(out);
        if (found.dimensions != 2 || !found.on_cpu) throw py::value_error("a result is a matrix in memory");
        if (!found.has_rows)
            throw py::value_error(py::str("a factor must have contiguous rows, got strides {} for shape {}")
                                      .format(out.attr("stride")(), py::tuple(py::list(out.attr("shape")))));
        matrices_.push_back(found.matrix);
        alive_.push_back(out);
    }

    // (factor, C, at, scale)
    void add_term(const Describer& describe, py::handle term, int64_t place, bool rows) {
        const Elements parts(term);
        if (parts.size() != 4) throw py::value_error("a term is (factor, coefficient, at, scale)");
        Term row{number(parts[0]), 0, 0, 0, number(parts[2]), real(parts[3])};
        if (!parts[1].is_none()) {
            const Described found = describe(parts[1]);
            const Matrix& c = found.matrix;
            if (found.dimensions != 2) throw py::value_error("a coefficient is a matrix");
            if (!c.rows || !c.cols) return;  // it has no address, which in the table is the identity
            row = coefficient_row(row, found, parts[1], rows);
            alive_.push_back(py::reinterpret_borrow<py::object>(parts[1]));
        }
        terms_.push_back(row);
        places_.push_back(place);
    }

    Factors factors_;
    std::vector<CombineTask> tasks_;
    std::vector<CombineOutput> outputs_;
    std::vector<Matrix> matrices_;
    std::vector<Term> terms_;
    std::vector<int64_t> places_;      // of every term, among those of its output
    std::vector<py::object> results_;  // the outputs of the jobs
    std::vector<py::object> alive_;
};

}  // namespace

void bind_jobs(py::module_& m) {
    py::class_<GramJobs>(m, "GramJobs")
        .def(py::init<const py::sequence&, const py::type&>(), py::arg("jobs"), py::arg("tensor"))
        .def("run", &GramJobs::run, py::arg("threads"));
    py::class_<CombineJobs>(m, "CombineJobs")
        .def(py::init<const py::sequence&, const py::type&, const py::dict&>(), py::arg("jobs"), py::arg("tensor"),
             py::arg("dtypes"))
        .def("renew", &CombineJobs::renew)
        .def("run", &CombineJobs::run, py::arg("threads"));
}

}  // namespace fastlora
