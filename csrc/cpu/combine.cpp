// combine: factors that are linear combinations of stored ones (MATH section 1, "apply").
//   B side: out[:, at:at+q] += scale * X [n, r] * C [r, q]
//   A side: out[at:at+q, :] += scale * C [q, r] * X [r, n]
// All outputs of a task share the tiles of its factors, so a factor is read once however many results it goes into. On
// the A side a tile of the results is wide, stays in L2, and takes the factors one after the other: each is read as
// rows of a page or so, not as pieces of all rows of all factors in turn. The coefficients of one factor are gathered
// into a strip, one product with all results it goes into; strips that go into the same results are one deeper product.
// Identity terms are added without one, as the result is rounded. Half-precision outputs of half-precision factors are
// summed in float32 where no coefficient is extreme, everything else in float64; a result is rounded once more, to the
// output's dtype. A result's row (B) or column (A) is computed by one thread from its own inputs, so bits do not depend
// on threads or chunking. Outputs with a file are computed in memory of the thread's own, one task after the other, and
// written from there while they are in cache: what is saved needs no memory and is not read back. Large results in
// memory go past the caches (combine_results.h). Floor: reads each factor once and writes each output once; 2 * n * r *
// q operations a term.
#include "ahead.h"
#include "combine_amx.h"
#include "combine_files.h"
#include "combine_results.h"
#include "combine_strips.h"
#include "parallel.h"
#include "table.h"
#include "tile.h"

namespace fastlora::FASTLORA_ISA {
namespace {

constexpr int64_t kChunk = 2048;          // positions along the long dimension that are given to one thread, at least
constexpr int64_t kMostChunks = 8;        // at most that many together
constexpr int64_t kTurns = 32;            // times that a thread asks for some, about, where there are many
constexpr int64_t kStreamed = 4 << 20;    // bytes of results in memory that no cache of a core holds
constexpr int64_t kResultsA = 256 << 10;  // bytes of results of a tile on the A side that L2 holds beside factors
constexpr int kGroup = 8;                 // rows of results that one product computes
template <class T>
constexpr int kSpan = 6 * kLanes<T>;                  // and, on the A side, columns
constexpr int64_t kDepthOfTile = 16;                  // of all factors, for each tile of columns that results are wide
constexpr double kSmallest = 1e-20, kLargest = 1e20;  // coefficients that float32 sums are trusted with

// What is written of an output besides its strips: nothing, one whole factor, or terms that have to be added first.
enum class Rest { none, factor, terms };

template <class T>
struct Output {
    int64_t first;  // column (B) or row (A) in the result tile
    bool in_strip;
    Rest rest;
    int64_t factor;  // of Rest::factor
    T scale;
    Peak<T> peak;  // of what was written since the present piece was begun
};

template <class T>
struct Work {
    Strips<T> strips;
    Output<T>* outputs;
    T* factor_tile;  // B side [kTileB<T>, factor_stride]; A side [factor_stride, kStrideA]
    T* result_tile;  // B side [kTileB<T>, out_stride]; A side [outs + kTileSide, out_stride]
    int64_t outs, out_stride, factor_stride;
    int64_t step;     // rows (B) or columns (A) of the results that are computed together
    bool is_covered;  // the first strip reaches every column (B) or row (A) of the results that is read
    CombineTiles tiles;
    bool on_tiles;
};

template <class T>
size_t lay_out(char* base, const CombineJob& job, Work<T>& w) {
    Arena arena(base);
    const bool rows = job.task->rows;
    w.outputs = arena.take<Output<T>>(job.task->outputs);
    w.outs = 0;
    w.factor_stride = kDeepest;
    int64_t depth = 0;
    for (int64_t f = 0; f < job.task->factors; ++f) {
        w.factor_stride = max_(w.factor_stride, job.rank(f));
        depth += job.rank(f);
    }
    for (int64_t o = 0; o < job.task->outputs; ++o) {
        if (base) w.outputs[o].first = w.outs;
        w.outs += job.width(o);
    }
    if (rows) {
        // With few factors there is little to do while more is asked for.
        const int64_t room = kResultsA / int64_t(sizeof(T)) / max_<int64_t>(w.outs, 1) / kTileA<T>;
        w.step = min_<int64_t>(kWideA<T>,
                               kTileA<T> * max_<int64_t>(1, min_(room, depth > kDeepest ? depth / kDepthOfTile : 1)));
        w.out_stride = w.step + kLanes<T>;
    } else {
        w.step = kTileB<T>;
        w.out_stride = padded<T>(w.outs) + 3 * kLanes<T>;  // vectors of the last strip may reach past the last column
    }
    lay_out_strips<T>(arena, base != nullptr, job, w.strips);
    w.factor_tile = arena.take<T>(size_t(w.factor_stride) * (rows ? kStrideA<T> : kTileB<T>));
    w.result_tile = arena.take<T>(size_t(rows ? w.outs + kResultMargin : kTileB<T>) * w.out_stride);
    w.on_tiles = false;
    if constexpr (sizeof(T) == 4) w.on_tiles = CombineTiles::takes(job) && w.tiles.lay_out(arena, base, job, w.strips);
    if (!base) return arena.used();
    for (int64_t o = 0; o < job.task->outputs; ++o) {
        Output<T>& out = w.outputs[o];
        const CombineOutput& wanted = job.outputs[o];
        int64_t identities = 0;
        out.in_strip = false;
        out.rest = Rest::none;
        for (int64_t t = 0; t < wanted.terms; ++t) {
            const Term& term = job.terms[wanted.first_term + t];
            if (term.coefficient) {
                out.in_strip = true;
                continue;
            }
            const bool whole = term.at == 0 && job.rank(term.factor) == job.width(o) &&
                               job.factors[term.factor].dtype == job.matrix(o).dtype;
            out.rest = ++identities == 1 && whole ? Rest::factor : Rest::terms;
            out.factor = term.factor;
            out.scale = T(term.scale);
        }
        // A result that is neither a product nor one whole factor starts as zeros in the result tile.
        out.in_strip |= out.rest != Rest::factor;
    }
    w.is_covered = w.strips.count > 0;
    for (int64_t o = 0; o < job.task->outputs && w.is_covered; ++o) {
        if (!w.outputs[o].in_strip || job.is_stored(o)) continue;
        const int64_t first = w.outputs[o].first, last = first + job.width(o);
        const Strip<T>& strip = w.strips.strip[0];
        w.is_covered = strip.out <= first && last <= strip.out + strip.width;
    }
    return arena.used();
}

// to [rows, width] += scale * the block of a stored matrix
template <class E, class T>
__attribute__((noinline)) void add_as(const Matrix& m, int64_t row, int64_t column, int rows, int columns, T scale,
                                      T* __restrict to, int64_t stride) {
    constexpr int lanes = kLanes<T>;
    using Stored = typename E::Stored;
    const Stored* __restrict p = reinterpret_cast<const Stored*>(m.data) + row * m.stride + column;
    const Vec<T> factor = splat<T>(scale);
    for (int i = 0; i < rows; ++i, p += m.stride, to += stride) {
        int j = 0;
        for (; j + lanes <= columns; j += lanes)
            store<T>(to + j, load<T>(to + j) + factor * E::template load_vector<T>(p + j));
        for (; j < columns; ++j) to[j] += scale * E::template load_one<T>(p + j);
    }
}

// The results of one tile: what the strips gave, the identity terms, rounded.
template <class T>
void write_outputs(const CombineJob& job, const Work<T>& w, const Matrix* outs, int64_t first, int count,
                   bool streams) {
    const bool rows = job.task->rows;
    const int64_t stride = w.out_stride, step = rows ? stride : 1;
    for (int64_t o = 0; o < job.task->outputs; ++o) {
        if (job.is_stored(o)) continue;
        Output<T>& output = w.outputs[o];
        const Matrix& out = outs[o];
        T* sums = w.result_tile + output.first * step;
        const int64_t row = rows ? 0 : first, column = rows ? first : 0;
        const int height = rows ? int(out.rows) : count, width = rows ? count : int(out.cols);
        if (output.rest == Rest::factor) {
            const Matrix& x = job.factors[output.factor];
            write_scaled<T>(out, x, row, column, height, width, output.scale, output.in_strip ? sums : nullptr, stride,
                            streams, output.peak);
            continue;
        }
        if (output.rest == Rest::terms)
            for (int64_t t = 0; t < job.outputs[o].terms; ++t) {
                const Term& term = job.terms[job.outputs[o].first_term + t];
                if (term.coefficient) continue;
                const Matrix& x = job.factors[term.factor];
                T* to = sums + term.at * step;
                with_type(x, [&](auto e) {
                    add_as<decltype(e), T>(x, row, column, rows ? int(x.rows) : count, rows ? count : int(x.cols),
                                           T(term.scale), to, stride);
                });
            }
        write_sums<T>(out, row, column, height, width, sums, stride, streams, output.peak);
    }
}

// Of the factors of some strips, side by side.
template <class T>
int read_factors(const CombineJob& job, const Work<T>& w, const Strip<T>* strips, int64_t n, int64_t first, int count) {
    int depth = 0;
    for (int64_t s = 0; s < n; ++s) {
        const Matrix& x = job.factors[strips[s].factor];
        if (job.task->rows)
            read_block<T>(x, 0, first, int(x.rows), count, w.factor_tile + depth * kStrideA<T>, kStrideA<T>);
        else
            read_block<T>(x, first, 0, count, int(x.cols), w.factor_tile + depth, w.factor_stride);
        depth += int(strips[s].depth);
    }
    for (int i = 0; job.task->rows && count < kTileA<T> && i < depth; ++i)
        for (int p = count; p < kTileA<T>; ++p) w.factor_tile[i * kStrideA<T> + p] = T(0);
    return depth;
}

// kFresh: they are the first to go into the results. On the A side their factors are gone through in tiles of columns.
template <class T, bool kFresh, class Ahead>
void add_strips(const CombineJob& job, const Work<T>& w, const Strip<T>* strips, int64_t n, int64_t first, int count,
                Ahead& ahead) {
    const Strip<T>& strip = *strips;
    const int width = int(strip.width);
    if (!job.task->rows) {
        const int depth = read_factors<T>(job, w, strips, n, first, count);
        for (int i = 0; i < count; i += kGroup, ahead.step())
            product<T, kFresh>(min_(kGroup, count - i), width, depth, w.factor_tile + i * w.factor_stride, 1,
                               w.factor_stride, strip.values, strip.stride,
                               w.result_tile + i * w.out_stride + strip.out, w.out_stride);
        return;
    }
    for (int from = 0; from < count; from += kTileA<T>) {
        const int depth = read_factors<T>(job, w, strips, n, first + from, min_(kTileA<T>, count - from));
        T* const results = w.result_tile + strip.out * w.out_stride + from;
        for (int at = 0; at < kTileA<T>; at += kSpan<T>)
            for (int i = 0; i < width; i += kGroup, ahead.step())
                product<T, kFresh>(min_(kGroup, width - i), min_(kSpan<T>, kTileA<T> - at), depth, strip.values + i,
                                   strip.stride, 1, w.factor_tile + at, kStrideA<T>, results + i * w.out_stride + at,
                                   w.out_stride);
    }
}

// What the strips give to one tile of the results.
template <class T, class Ahead>
void add_products(const CombineJob& job, const Work<T>& w, int64_t first, int count, Ahead& ahead) {
    for (int64_t s = 0, n = 0; s < w.strips.count; s += n) {
        n = strips_at_once(w.strips, s);
        if (w.is_covered && s == 0)
            add_strips<T, true>(job, w, w.strips.strip + s, n, first, count, ahead);
        else
            add_strips<T, false>(job, w, w.strips.strip + s, n, first, count, ahead);
    }
}

// How many products a tile takes.
template <class T>
int64_t products(const CombineJob& job, const Work<T>& w) {
    const auto parts = [](int64_t n, int64_t size) { return (n + size - 1) / size; };
    const int64_t a_tiles = w.step / kTileA<T> * parts(kTileA<T>, kSpan<T>);
    int64_t sum = 0;
    for (int64_t s = 0; s < w.strips.count; s += strips_at_once(w.strips, s))
        sum += job.task->rows ? parts(w.strips.strip[s].width, kGroup) * a_tiles : parts(kTileB<T>, kGroup);
    return sum;
}

template <class T>
void run_chunk(const CombineJob& job, Work<T>& w, const Matrix* outs, int64_t begin, int64_t end, bool streams) {
    const bool rows = job.task->rows;
    const int64_t n = job.length(), steps = products(job, w);
    for (int64_t o = 0; o < job.task->outputs; ++o) w.outputs[o].peak = {};
    const TileUnit unit(w.on_tiles);
    const bool by_rows = rows && !w.on_tiles && w.step > kTileA<T> && w.strips.count;
    const int64_t lead = by_rows ? w.strips.strip[strips_at_once(w.strips, 0) - 1].factor + 1 : 0;
    AheadByRows ahead_by_rows(job.factors, by_rows ? job.task->factors : 0, lead, begin, end, w.step, steps);
    for (int64_t first = begin; first < end; first += w.step) {
        const int count = int(min_(w.step, end - first));
        if (!w.is_covered) __builtin_memset(w.result_tile, 0, sizeof(T) * (rows ? w.outs : kTileB<T>)*w.out_stride);
        if constexpr (sizeof(T) == 4) {
            if (w.on_tiles) w.tiles.add_strips(job, w.strips, first, count, w.result_tile, w.out_stride, w.is_covered);
        }
        if (by_rows) {
            add_products<T>(job, w, first, count, ahead_by_rows);
        } else if (!w.on_tiles) {
            // What only goes into results on the B side is asked for as they are written.
            const bool reads_all = rows || w.strips.count == job.task->factors;
            Ahead ahead(job.factors, reads_all ? job.task->factors : 0, rows, first + w.step,
                        min_(w.step, n - first - w.step), steps);
            add_products<T>(job, w, first, count, ahead);
        }
        write_outputs<T>(job, w, outs, first, count, streams);
    }
}

// Whether float32 sums are as good as the output's dtype: see the head of this file.
bool float_is_enough(const CombineJob& job) {
    for (int64_t f = 0; f < job.task->factors; ++f)
        if (!is_half(job.factors[f])) return false;
    for (int64_t o = 0; o < job.task->outputs; ++o) {
        if (job.is_stored(o)) continue;
        if (!is_half(job.matrix(o))) return false;
        for (int64_t t = 0; t < job.outputs[o].terms; ++t) {
            const Term& term = job.terms[job.outputs[o].first_term + t];
            const double largest = term.coefficient ? largest_coefficient(job, term) : abs_(term.scale);
            if (largest != 0.0 && !(largest >= kSmallest && largest <= kLargest)) return false;
        }
    }
    return true;
}

// One thread's work on one task: laid out when the task is new to the thread.
class Prepared {
  public:
    bool prepare(const CombineJob& job, int64_t index) {
        if (task_ == index) return true;
        task_ = -1;
        is_float_ = float_is_enough(job);
        return (is_float_ ? lay_out_as<float>(job, f32_) : lay_out_as<double>(job, f64_)) && (task_ = index, true);
    }

    // streams: past the caches.
    void run(const CombineJob& job, const Matrix* outs, int64_t begin, int64_t end, bool streams) {
        if (is_float_)
            run_chunk<float>(job, f32_, outs, begin, end, streams);
        else
            run_chunk<double>(job, f64_, outs, begin, end, streams);
    }

    // Whether what was written of an output by the last run() is surely neither NaN nor infinite.
    bool is_finite(const CombineJob& job, int64_t output) const {
        const Matrix& m = job.matrix(output);
        return is_float_ ? f32_.outputs[output].peak.fits(m) : f64_.outputs[output].peak.fits(m);
    }

  private:
    template <class T>
    bool lay_out_as(const CombineJob& job, Work<T>& w) {
        if (!workspace_.reserve(lay_out<T>(nullptr, job, w))) return false;
        lay_out<T>(workspace_.data(), job, w);
        return true;
    }

    Workspace workspace_;
    int64_t task_ = -1;
    bool is_float_ = false;
    Work<float> f32_{};
    Work<double> f64_{};
};

int64_t result_bytes(const CombineTables& tables) {
    int64_t sum = 0;
    for (int64_t t = 0; t < tables.n_tasks; ++t)
        for (int64_t o = 0; o < tables.tasks[t].outputs; ++o) {
            const Matrix& m = tables.matrices[tables.outputs[tables.tasks[t].first_output + o].matrix];
            sum += m.rows * m.cols * element_size(m);
        }
    return sum;
}

}  // namespace

CombineProblem combine(const CombineTables& tables, int threads) {
    const int64_t n_tasks = tables.n_tasks;
    const auto job_of = [&](int64_t t) {
        const CombineTask& task = tables.tasks[t];
        return CombineJob{&task, tables.factors + task.first_factor, tables.outputs + task.first_output,
                          tables.matrices, tables.terms};
    };
    FirstProblem problem;
    if (tables.to_files) {
        Queue queue(n_tasks);
        on_team(int(min_<int64_t>(threads, n_tasks)), [&](int thread, int of) {
            Prepared own;
            Workspace results, places;
            queue.take([&](int64_t t) {
                if (!problem.is_there())
                    problem.note(run_and_write(job_of(t), t, double(thread) / of, own, results, places));
            });
        });
        return problem.get();
    }
    Workspace starts_memory;  // chunk numbers at which each task begins
    if (!starts_memory.reserve(sizeof(int64_t) * (n_tasks + 1))) return {kNoMemory, 0, 0};
    int64_t* starts = reinterpret_cast<int64_t*>(starts_memory.data());
    starts[0] = 0;
    int64_t positions = 0;
    for (int64_t t = 0; t < n_tasks; ++t) positions += job_of(t).length();
    const int64_t chunks = positions / (kChunk * kTurns * max_(threads, 1));
    const int64_t size = kChunk * max_<int64_t>(1, min_(chunks, kMostChunks));
    for (int64_t t = 0; t < n_tasks; ++t) starts[t + 1] = starts[t] + (job_of(t).length() + size - 1) / size;
    const bool streams = result_bytes(tables) >= kStreamed;
    Queue queue(starts[n_tasks]);
    on_team(int(min_<int64_t>(threads, starts[n_tasks])), [&](int, int) {
        Prepared own;
        Workspace places;
        queue.take([&](int64_t chunk) {
            int64_t low = 0, high = n_tasks;  // the task with starts[low] <= chunk < starts[low + 1]
            while (high - low > 1) {
                const int64_t middle = (low + high) / 2;
                (starts[middle] <= chunk ? low : high) = middle;
            }
            const CombineJob job = job_of(low);
            if (!own.prepare(job, low) || !places.reserve(sizeof(Matrix) * job.task->outputs))
                return problem.note({kNoMemory, 0, 0});
            Matrix* outs = reinterpret_cast<Matrix*>(places.data());
            place_outputs(job, nullptr, 0, 0, outs);
            const int64_t begin = (chunk - starts[low]) * size, end = min_(begin + size, job.length());
            own.run(job, outs, begin, end, streams);
        });
        Streamed::finish();
    });
    return problem.get();
}

}  // namespace fastlora::FASTLORA_ISA
