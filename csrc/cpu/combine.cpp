// combine: factors that are linear combinations of stored ones (MATH section 1, "apply").
//   B side: out[:, at:at+q] += scale · X [n, r] · C [r, q]
//   A side: out[at:at+q, :] += scale · C [q, r] · X [r, n]
// All outputs of a task share the tiles of its factors, so a factor is read once however many results it goes into.
// Sums are in float64 and rounded once, to the output's dtype; a result's row (B) or column (A) is computed by one
// thread from its own inputs, so bits do not depend on threads or chunking.
// Floor: reads each factor once and writes each output once; 2·n·r·q operations a term.
#include "passes.h"
#include "tile.h"

namespace fastlora::FASTLORA_ISA {
namespace {

constexpr int kTile = 64;        // positions along the long dimension held in cache
constexpr int64_t kChunk = 512;  // positions along the long dimension given to one thread at a time

struct Layout {
    double** tiles;         // per factor: B side [kTile, padded(r)], A side [r, kTile]
    double** coefficients;  // per term of the task: B side [r, padded(q)], A side [q, r]; null for the identity
    double* sum;            // B side [kTile, padded(rank) + lanes], A side [rank, kTile]
};

struct Job {
    const CombineTask* task;
    const Matrix* factors;
    const CombineOutput* outputs;
    const Matrix* matrices;
    const Term* terms;
};

int64_t rank(const Matrix& m, bool rows) { return rows ? m.rows : m.cols; }
int64_t length(const Matrix& m, bool rows) { return rows ? m.cols : m.rows; }
int sum_stride(int64_t out_rank) { return padded(out_rank) + kLanes<double>; }

size_t lay_out(char* base, const Job& job, Layout& layout) {
    Arena arena(base);
    const bool rows = job.task->rows;
    int64_t n_terms = 0, widest = 0;
    for (int64_t o = 0; o < job.task->outputs; ++o) {
        n_terms += job.outputs[o].terms;
        widest = max_(widest, rank(job.matrices[job.outputs[o].matrix], rows));
    }
    layout.tiles = arena.take<double*>(job.task->factors);
    layout.coefficients = arena.take<double*>(n_terms);
    for (int64_t f = 0; f < job.task->factors; ++f) {
        const int64_t r = rank(job.factors[f], rows);
        double* tile = arena.take<double>(size_t(kTile) * (rows ? r : padded(r)));
        if (base) layout.tiles[f] = tile;
    }
    int64_t index = 0;
    for (int64_t o = 0; o < job.task->outputs; ++o)
        for (int64_t t = 0; t < job.outputs[o].terms; ++t, ++index) {
            const Term& term = job.terms[job.outputs[o].first_term + t];
            const int64_t r = rank(job.factors[term.factor], rows);
            double* c = term.coefficient ? arena.take<double>(size_t(r) * (rows ? term.columns : padded(term.columns)))
                                         : nullptr;
            if (base) layout.coefficients[index] = c;
        }
    layout.sum = arena.take<double>(size_t(kTile) * (rows ? widest : sum_stride(widest)));
    return arena.used();
}

// Copies the coefficients with their scale, so that the inner loops see dense padded float64.
void read_coefficients(const Job& job, const Layout& layout) {
    int64_t index = 0;
    for (int64_t o = 0; o < job.task->outputs; ++o)
        for (int64_t t = 0; t < job.outputs[o].terms; ++t, ++index) {
            const Term& term = job.terms[job.outputs[o].first_term + t];
            if (!term.coefficient) continue;
            const double* from = reinterpret_cast<const double*>(term.coefficient);
            const int64_t r = rank(job.factors[term.factor], job.task->rows);
            const int64_t lines = job.task->rows ? term.columns : r, used = job.task->rows ? r : term.columns;
            const int64_t stride = job.task->rows ? r : padded(term.columns);
            double* to = layout.coefficients[index];
            for (int64_t i = 0; i < lines; ++i)
                for (int64_t j = 0; j < stride; ++j)
                    to[i * stride + j] = j < used ? term.scale * from[i * term.stride + j] : 0.0;
        }
}

void add_term(const Job& job, const Layout& layout, const Term& term, const double* c, int count, int64_t out_rank) {
    const int r = int(rank(job.factors[term.factor], job.task->rows));
    const double* tile = layout.tiles[term.factor];
    if (job.task->rows) {
        double* sum = layout.sum + term.at * kTile;
        if (c) {
            product(int(term.columns), kTile, r, c, 1, r, tile, kTile, sum, kTile);
        } else {
            for (int i = 0; i < r * kTile; ++i) sum[i] += term.scale * tile[i];
        }
        return;
    }
    const int stride = sum_stride(out_rank), tile_stride = padded(r);
    double* sum = layout.sum + term.at;
    if (c) {
        product(count, padded(term.columns), r, tile, 1, tile_stride, c, padded(term.columns), sum, stride);
    } else {
        for (int p = 0; p < count; ++p)
            for (int j = 0; j < r; ++j) sum[int64_t(p) * stride + j] += term.scale * tile[int64_t(p) * tile_stride + j];
    }
}

void write_output(const Matrix& out, bool rows, const double* sum, int64_t first, int count) {
    if (rows) {
        for (int64_t i = 0; i < out.rows; ++i) write_row(out, i, first, count, sum + i * kTile);
    } else {
        const int stride = sum_stride(out.cols);
        for (int p = 0; p < count; ++p) write_row(out, first + p, 0, int(out.cols), sum + int64_t(p) * stride);
    }
}

void read_factors(const Job& job, const Layout& layout, int64_t first, int count) {
    for (int64_t f = 0; f < job.task->factors; ++f) {
        const Matrix& factor = job.factors[f];
        if (!job.task->rows) {
            read_tile(factor, first, count, layout.tiles[f], padded(factor.cols));
            continue;
        }
        for (int64_t i = 0; i < factor.rows; ++i) {
            double* row = layout.tiles[f] + i * kTile;
            read_row(factor, i, first, count, row);
            for (int p = count; p < kTile; ++p) row[p] = 0.0;
        }
    }
}

void run_chunk(const Job& job, const Layout& layout, int64_t begin, int64_t end) {
    const bool rows = job.task->rows;
    for (int64_t first = begin; first < end; first += kTile) {
        const int count = int(min_<int64_t>(kTile, end - first));
        read_factors(job, layout, first, count);
        int64_t index = 0;
        for (int64_t o = 0; o < job.task->outputs; ++o) {
            const CombineOutput& output = job.outputs[o];
            const Matrix& out = job.matrices[output.matrix];
            const int64_t out_rank = rank(out, rows);
            __builtin_memset(layout.sum, 0, sizeof(double) * kTile * (rows ? out_rank : sum_stride(out_rank)));
            for (int64_t t = 0; t < output.terms; ++t, ++index)
                add_term(job, layout, job.terms[output.first_term + t], layout.coefficients[index], count, out_rank);
            write_output(out, rows, layout.sum, first, count);
        }
    }
}

}  // namespace

int combine(const Matrix* factors, const CombineTask* tasks, const CombineOutput* outputs, const Matrix* matrices,
            const Term* terms, int64_t n_tasks, int threads) {
    Workspace starts_memory;  // chunk numbers at which each task begins
    if (!starts_memory.reserve(sizeof(int64_t) * (n_tasks + 1))) return kOutOfMemory;
    int64_t* starts = reinterpret_cast<int64_t*>(starts_memory.data());
    starts[0] = 0;
    for (int64_t t = 0; t < n_tasks; ++t) {
        const int64_t n = tasks[t].outputs ? length(matrices[outputs[tasks[t].first_output].matrix], tasks[t].rows) : 0;
        starts[t + 1] = starts[t] + (n + kChunk - 1) / kChunk;
    }
    int status = kDone;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        Workspace workspace;
        int64_t prepared = -1;
        Layout layout{};
#pragma omp for schedule(dynamic, 1)
        for (int64_t chunk = 0; chunk < starts[n_tasks]; ++chunk) {
            int64_t low = 0, high = n_tasks;  // the task with starts[low] <= chunk < starts[low + 1]
            while (high - low > 1) {
                const int64_t middle = (low + high) / 2;
                (starts[middle] <= chunk ? low : high) = middle;
            }
            const CombineTask& task = tasks[low];
            const Job job{&task, factors + task.first_factor, outputs + task.first_output, matrices, terms};
            if (prepared != low) {
                if (!workspace.reserve(lay_out(nullptr, job, layout))) {
#pragma omp atomic write
                    status = kOutOfMemory;
                    continue;
                }
                lay_out(workspace.data(), job, layout);
                read_coefficients(job, layout);
                prepared = low;
            }
            const int64_t n = length(matrices[job.outputs[0].matrix], task.rows);
            const int64_t begin = (chunk - starts[low]) * kChunk;
            run_chunk(job, layout, begin, min_(begin + kChunk, n));
        }
    }
    return status;
}

}  // namespace fastlora::FASTLORA_ISA
