// The outputs of combine tasks: where they are computed, and how they get into files.
#pragma once
#include "combine_strips.h"
#include "fastlora/files.h"
#include "table.h"
#include "tile.h"

namespace fastlora::FASTLORA_ISA {

constexpr int64_t kWritten = 4096;  // rows that are computed before they are written

// The matrices of a task's outputs. Those without an address get one in `memory`, for `lines` rows (B side; A sides are
// whole) from row `first` on; returns what that takes when `memory` is null.
inline size_t place_outputs(const CombineJob& job, char* memory, int64_t first, int64_t lines, Matrix* outs) {
    Arena arena(memory);
    for (int64_t o = 0; o < job.task->outputs; ++o) {
        Matrix out = job.matrix(o);
        if (!out.data) {
            const int64_t row = out.stride * element_size(out);
            const int64_t rows = job.task->rows ? out.rows : min_(lines, out.rows);
            out.data = int64_t(arena.take<char>(size_t(rows * row))) - (job.task->rows ? 0 : first * row);
        }
        if (outs) outs[o] = out;
    }
    return arena.used();
}

// What went wrong first, in whichever thread.
class FirstProblem {
  public:
    void note(const CombineProblem& found) {
        if (found.kind != kNoProblem && !__atomic_exchange_n(&is_there_, true, __ATOMIC_RELAXED)) problem_ = found;
    }
    bool is_there() const { return __atomic_load_n(&is_there_, __ATOMIC_RELAXED); }
    const CombineProblem& get() const { return problem_; }

  private:
    bool is_there_ = false;
    CombineProblem problem_{kNoProblem, 0, 0};
};

// Rows [first, last) of an output to its file; those that are not known to be finite are looked at.
inline CombineProblem write_rows(const CombineJob& job, int64_t o, Matrix m, int64_t first, int64_t last,
                                 bool is_finite) {
    const CombineOutput& output = job.outputs[o];
    const int64_t row = m.stride * element_size(m);
    m.data += first * row;
    m.rows = last - first;
    if (output.check && !is_finite && !finite(m)) return {kNotFinite, job.task->first_output + o, 0};
    const char* data = reinterpret_cast<const char*>(m.data);
    const int error = write_all(output.file, data, m.rows * row, output.offset + first * row);
    return {error ? kSystemError : kNoProblem, job.task->first_output + o, error};
}

// A task whose outputs go to files. What is computed is written some rows at a time, while they are in L2. `turn`: how
// far through the outputs, from 0 to 1, writing starts: threads that begin together write to different files.
template <class Prepared>
CombineProblem run_and_write(const CombineJob& job, int64_t index, double turn, Prepared& own, Workspace& results,
                             Workspace& places) {
    const int64_t n = job.length(), step = job.task->rows ? n : kWritten;
    if (!places.reserve(sizeof(Matrix) * job.task->outputs) ||
        !results.reserve(place_outputs(job, nullptr, 0, step, nullptr)) || (n && !own.prepare(job, index)))
        return {kNoMemory, 0, 0};
    Matrix* outs = reinterpret_cast<Matrix*>(places.data());
    const int64_t n_outputs = job.task->outputs, shift = int64_t(double(n_outputs) * turn);
    for (int64_t first = 0; first < n; first += step) {
        const int64_t last = min_(first + step, n);
        place_outputs(job, results.data(), first, step, outs);
        own.run(job, outs, first, last, false);
        for (int64_t i = 0; i < n_outputs; ++i) {
            const int64_t o = (i + shift) % n_outputs;
            if (job.outputs[o].file < 0 || job.is_stored(o)) continue;
            const CombineProblem found = job.task->rows
                                             ? write_rows(job, o, outs[o], 0, outs[o].rows, own.is_finite(job, o))
                                             : write_rows(job, o, outs[o], first, last, own.is_finite(job, o));
            if (found.kind != kNoProblem) return found;
        }
    }
    for (int64_t i = 0; i < n_outputs; ++i) {
        const int64_t o = (i + shift) % n_outputs;
        if (!job.is_stored(o)) continue;
        const CombineProblem found = write_rows(job, o, job.matrix(o), 0, job.matrix(o).rows, false);
        if (found.kind != kNoProblem) return found;
    }
    return {kNoProblem, 0, 0};
}

}  // namespace fastlora::FASTLORA_ISA
