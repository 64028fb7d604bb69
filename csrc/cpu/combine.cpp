// combine: factors that are linear combinations of stored ones (MATH section 1, "apply").
//   B side: out[:, at:at+q] += scale * X [n, r] * C [r, q]
//   A side: out[at:at+q, :] += scale * C [q, r] * X [r, n]
// All outputs of a task share the tiles of its factors, so a factor is read once however many results it goes into.
// Terms are gathered into strips, each one product: all coefficients of one factor (it goes into many outputs, as the
// first adapter of a decomposition does), or all coefficients of one output (it comes from many factors, as a sum
// does), whichever makes fewer products. Identity terms are added without a product.
// Half-precision outputs of half-precision factors are summed in float32 where no coefficient is extreme, everything
// else in float64; a result is rounded once more, to the output's dtype. A result's row (B) or column (A) is computed
// by one thread from its own inputs, so bits do not depend on threads or chunking.
// Floor: reads each factor once and writes each output once; 2 * n * r * q operations a term.
#include "passes.h"
#include "tile.h"

namespace fastlora::FASTLORA_ISA {
namespace {

constexpr int64_t kChunk = 512;  // positions along the long dimension given to one thread at a time
constexpr double kSmallest = 1e-20, kLargest = 1e20;  // coefficients that float32 sums are trusted with

template <class T>
constexpr int kTileB = 32;  // rows of a tile on the B side
template <class T>
constexpr int kTileA = 2048 / int(sizeof(T));  // columns of a tile on the A side: whole stretches of memory
template <class T>
constexpr int kStrideA = kTileA<T> + kLanes<T>;  // a power of two would put all its rows into a few cache sets

int64_t rank(const Matrix& m, bool rows) { return rows ? m.rows : m.cols; }
int64_t length(const Matrix& m, bool rows) { return rows ? m.cols : m.rows; }

struct Job {
    const CombineTask* task;
    const Matrix* factors;
    const CombineOutput* outputs;
    const Matrix* matrices;
    const Term* terms;
};

// out columns [out, out + width) (B side; rows on the A side) += source columns [source, source + depth) times
// values [depth, stride]
template <class T>
struct Strip {
    int64_t source, depth, out, width, stride;
    T* values;
};

template <class T>
struct Identity {
    int64_t source, depth, out;
    T scale;
};

template <class T>
struct Work {
    int64_t* source;  // first column (B) or row (A) of each factor in the factor tile
    int64_t* out;     // the same of each output in the result tile
    Strip<T>* strips;
    Identity<T>* identities;
    int64_t n_strips, n_identities;
    T* factor_tile;  // B side [kTileB, source_stride]; A side [sum of ranks, kTileA]
    T* result_tile;  // B side [kTileB, out_stride]; A side [sum of output ranks, kTileA]
    int64_t source_stride, out_stride, outs;
};

int64_t count_terms(const Job& job) {
    int64_t count = 0;
    for (int64_t o = 0; o < job.task->outputs; ++o) count += job.outputs[o].terms;
    return count;
}

// Strips by factor or by output: how many products each way takes.
bool strips_by_factor(const Job& job) {
    int64_t by_factor = 0, by_output = 0;
    for (int64_t f = 0; f < job.task->factors; ++f) {
        bool used = false;
        for (int64_t o = 0; o < job.task->outputs; ++o)
            for (int64_t t = 0; t < job.outputs[o].terms; ++t) {
                const Term& term = job.terms[job.outputs[o].first_term + t];
                used |= term.coefficient != 0 && term.factor == f;
            }
        by_factor += used;
    }
    for (int64_t o = 0; o < job.task->outputs; ++o) {
        bool used = false;
        for (int64_t t = 0; t < job.outputs[o].terms; ++t)
            used |= job.terms[job.outputs[o].first_term + t].coefficient != 0;
        by_output += used;
    }
    return by_factor <= by_output;
}

struct Span {
    int64_t first, last;
    void cover(int64_t from, int64_t to) {
        first = first < 0 ? from : min_(first, from);
        last = max_(last, to);
    }
};

// Writes scale * C, transposed to [source, out] on the A side, into a strip.
template <class T>
void add_coefficients(const Job& job, const Work<T>& w, const Term& term, int64_t output, const Strip<T>& strip) {
    const double* c = reinterpret_cast<const double*>(term.coefficient);
    const int64_t r = rank(job.factors[term.factor], job.task->rows);
    T* to = strip.values + (w.source[term.factor] - strip.source) * strip.stride + w.out[output] + term.at - strip.out;
    for (int64_t p = 0; p < r; ++p)
        for (int64_t q = 0; q < term.columns; ++q) {
            const double value = job.task->rows ? c[q * term.stride + p] : c[p * term.stride + q];
            to[p * strip.stride + q] += T(term.scale * value);
        }
}

// The strip of one factor (or one output): its place, and room for its values.
template <class T>
void make_strip(Arena& arena, char* base, const Job& job, Work<T>& w, bool by_factor, int64_t index) {
    Span source{-1, 0}, out{-1, 0};
    for (int pass = 0; pass < 2; ++pass) {
        Strip<T> strip{};
        if (pass == 1) {
            if (source.first < 0) return;
            strip = {source.first, source.last - source.first, out.first, out.last - out.first, 0, nullptr};
            strip.stride = padded<T>(strip.width) + 2 * kLanes<T>;
            strip.values = arena.take<T>(size_t(strip.depth) * strip.stride);
            ++w.n_strips;
            if (!base) return;
            __builtin_memset(strip.values, 0, sizeof(T) * strip.depth * strip.stride);
            w.strips[w.n_strips - 1] = strip;
        }
        for (int64_t o = by_factor ? 0 : index; o < (by_factor ? job.task->outputs : index + 1); ++o)
            for (int64_t t = 0; t < job.outputs[o].terms; ++t) {
                const Term& term = job.terms[job.outputs[o].first_term + t];
                if (!term.coefficient || (by_factor && term.factor != index)) continue;
                if (pass == 1) {
                    add_coefficients<T>(job, w, term, o, strip);
                    continue;
                }
                const int64_t s = w.source[term.factor], at = w.out[o] + term.at;
                source.cover(s, s + rank(job.factors[term.factor], job.task->rows));
                out.cover(at, at + term.columns);
            }
    }
}

template <class T>
size_t lay_out(char* base, const Job& job, int64_t* places, Work<T>& w) {
    Arena arena(base);
    const bool rows = job.task->rows;
    w.source = places;
    w.out = places + job.task->factors;
    int64_t sources = 0, outs = 0;
    for (int64_t f = 0; f < job.task->factors; ++f) {
        w.source[f] = sources;
        sources += rank(job.factors[f], rows);
    }
    for (int64_t o = 0; o < job.task->outputs; ++o) {
        w.out[o] = outs;
        outs += rank(job.matrices[job.outputs[o].matrix], rows);
    }
    w.outs = outs;
    w.source_stride = sources;
    w.out_stride = padded<T>(outs) + 3 * kLanes<T>;  // vectors of the last strip may reach past the last column
    w.strips = arena.take<Strip<T>>(max_(job.task->factors, job.task->outputs));
    w.identities = arena.take<Identity<T>>(count_terms(job));
    w.factor_tile = arena.take<T>(size_t(sources) * (rows ? kStrideA<T> : kTileB<T>));
    w.result_tile = arena.take<T>(rows ? size_t(outs) * kStrideA<T> : size_t(w.out_stride) * kTileB<T>);
    w.n_strips = w.n_identities = 0;
    const bool by_factor = strips_by_factor(job);
    for (int64_t i = 0; i < (by_factor ? job.task->factors : job.task->outputs); ++i)
        make_strip<T>(arena, base, job, w, by_factor, i);
    for (int64_t o = 0; o < job.task->outputs; ++o)
        for (int64_t t = 0; t < job.outputs[o].terms; ++t) {
            const Term& term = job.terms[job.outputs[o].first_term + t];
            if (term.coefficient) continue;
            if (base)
                w.identities[w.n_identities] = {w.source[term.factor], rank(job.factors[term.factor], rows),
                                                w.out[o] + term.at, T(term.scale)};
            ++w.n_identities;
        }
    return arena.used();
}

template <class T>
void read_factors(const Job& job, const Work<T>& w, int64_t first, int count) {
    for (int64_t f = 0; f < job.task->factors; ++f) {
        const Matrix& x = job.factors[f];
        if (!job.task->rows) {
            read_block<T>(x, first, 0, count, int(x.cols), w.factor_tile + w.source[f], w.source_stride);
            continue;
        }
        T* rows = w.factor_tile + w.source[f] * kStrideA<T>;
        read_block<T>(x, 0, first, int(x.rows), count, rows, kStrideA<T>);
        for (int64_t i = 0; i < x.rows && count < kTileA<T>; ++i)
            for (int p = count; p < kTileA<T>; ++p) rows[i * kStrideA<T> + p] = T(0);
    }
}

// to [rows, width] += scale * from [rows, width]
template <class T>
__attribute__((noinline)) void add_scaled(int rows, int64_t width, const T* __restrict from, int64_t from_stride,
                                          T* __restrict to, int64_t to_stride, T scale) {
    for (int p = 0; p < rows; ++p, from += from_stride, to += to_stride)
        for (int64_t j = 0; j < width; ++j) to[j] += scale * from[j];
}

template <class T>
void add_identities(const Work<T>& w, bool rows, int count) {
    for (int64_t i = 0; i < w.n_identities; ++i) {
        const Identity<T>& term = w.identities[i];
        if (rows)
            add_scaled<T>(int(term.depth), kTileA<T>, w.factor_tile + term.source * kStrideA<T>, kStrideA<T>,
                          w.result_tile + term.out * kStrideA<T>, kStrideA<T>, term.scale);
        else
            add_scaled<T>(count, term.depth, w.factor_tile + term.source, w.source_stride, w.result_tile + term.out,
                          w.out_stride, term.scale);
    }
}

template <class T>
void write_outputs(const Job& job, const Work<T>& w, int64_t first, int count) {
    for (int64_t o = 0; o < job.task->outputs; ++o) {
        const Matrix& out = job.matrices[job.outputs[o].matrix];
        if (job.task->rows)
            write_block<T>(out, 0, first, int(out.rows), count, w.result_tile + w.out[o] * kStrideA<T>, kStrideA<T>);
        else
            write_block<T>(out, first, 0, count, int(out.cols), w.result_tile + w.out[o], w.out_stride);
    }
}

template <class T>
void run_chunk(const Job& job, const Work<T>& w, int64_t begin, int64_t end) {
    const bool rows = job.task->rows;
    const int64_t step = rows ? kTileA<T> : kTileB<T>;
    for (int64_t first = begin; first < end; first += step) {
        const int count = int(min_(step, end - first));
        read_factors<T>(job, w, first, count);
        __builtin_memset(w.result_tile, 0, sizeof(T) * (rows ? w.outs * kStrideA<T> : w.out_stride * count));
        for (int64_t s = 0; s < w.n_strips; ++s) {
            const Strip<T>& strip = w.strips[s];
            if (rows)
                product<T, false>(int(strip.width), kTileA<T>, int(strip.depth), strip.values, strip.stride, 1,
                                  w.factor_tile + strip.source * kStrideA<T>, kStrideA<T>,
                                  w.result_tile + strip.out * kStrideA<T>, kStrideA<T>);
            else
                product<T, false>(count, int(strip.width), int(strip.depth), w.factor_tile + strip.source, 1,
                                  w.source_stride, strip.values, strip.stride, w.result_tile + strip.out, w.out_stride);
        }
        add_identities<T>(w, rows, count);
        write_outputs<T>(job, w, first, count);
    }
}

// Whether float32 sums are as good as the output's dtype: see the head of this file.
bool float_is_enough(const Job& job) {
    for (int64_t f = 0; f < job.task->factors; ++f)
        if (!is_half(job.factors[f])) return false;
    for (int64_t o = 0; o < job.task->outputs; ++o) {
        if (!is_half(job.matrices[job.outputs[o].matrix])) return false;
        for (int64_t t = 0; t < job.outputs[o].terms; ++t) {
            const Term& term = job.terms[job.outputs[o].first_term + t];
            const int64_t r = rank(job.factors[term.factor], job.task->rows);
            const int64_t lines = !term.coefficient ? 0 : job.task->rows ? term.columns : r;
            const int64_t used = job.task->rows ? r : term.columns;
            double largest = term.coefficient ? 0.0 : abs_(term.scale);
            for (int64_t i = 0; i < lines; ++i)
                for (int64_t j = 0; j < used; ++j) {
                    const double* c = reinterpret_cast<const double*>(term.coefficient);
                    largest = max_(largest, abs_(term.scale * c[i * term.stride + j]));
                }
            if (largest != 0.0 && !(largest >= kSmallest && largest <= kLargest)) return false;
        }
    }
    return true;
}

// One thread's work on one task: laid out when the task is new to the thread.
struct Prepared {
    Workspace workspace, places;
    int64_t task = -1;
    bool is_float = false;
    Work<float> f32{};
    Work<double> f64{};

    bool prepare(const Job& job, int64_t index) {
        if (task == index) return true;
        task = -1;
        is_float = float_is_enough(job);
        return (is_float ? lay_out_as<float>(job, f32) : lay_out_as<double>(job, f64)) && (task = index, true);
    }

    template <class T>
    bool lay_out_as(const Job& job, Work<T>& w) {
        if (!places.reserve(sizeof(int64_t) * (job.task->factors + job.task->outputs))) return false;
        int64_t* p = reinterpret_cast<int64_t*>(places.data());
        if (!workspace.reserve(lay_out<T>(nullptr, job, p, w))) return false;
        lay_out<T>(workspace.data(), job, p, w);
        return true;
    }
};

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
        Prepared own;
#pragma omp for schedule(dynamic, 4)
        for (int64_t chunk = 0; chunk < starts[n_tasks]; ++chunk) {
            int64_t low = 0, high = n_tasks;  // the task with starts[low] <= chunk < starts[low + 1]
            while (high - low > 1) {
                const int64_t middle = (low + high) / 2;
                (starts[middle] <= chunk ? low : high) = middle;
            }
            const CombineTask& task = tasks[low];
            const Job job{&task, factors + task.first_factor, outputs + task.first_output, matrices, terms};
            if (!own.prepare(job, low)) {
#pragma omp atomic write
                status = kOutOfMemory;
                continue;
            }
            const int64_t n = length(matrices[job.outputs[0].matrix], task.rows);
            const int64_t begin = (chunk - starts[low]) * kChunk, end = min_(begin + kChunk, n);
            if (own.is_float)
                run_chunk<float>(job, own.f32, begin, end);
            else
                run_chunk<double>(job, own.f64, begin, end);
        }
    }
    return status;
}

}  // namespace fastlora::FASTLORA_ISA
