// gram: blocks G_ij = X_i' X_j of the tall factors of one module, [r_i, r_j], returned in float64.
//   B side: X_i is B_i [n, r_i].   A side: X_i is A_i', stored as A_i [r_i, n].
// A task walks the long dimension in short tiles that stay in L1. Every factor is read and converted once a tile;
// then every block that was asked for takes the tile's contribution.
//   B side: outer products; the blocks (i, j), (i, j + 1), ... of one left factor are one product with the
//           concatenated columns of the right factors.
//   A side: dot products of rows, 4 x 4 at a time, summed over lanes at the end of a tile.
// Half-precision factors: their products are exact in float32, so a tile is summed in float32 and added to float64
// sums; short sums keep the error near 1e-8 of the diagonal. Where float32 could overflow or underflow (a squared
// column norm outside [kSmallest, kLargest]), or the long dimension is too short for rounding to average out, the
// factor's blocks are summed in float64 throughout, as those of float32 and float64 factors are.
// Sums run over the long dimension in order and in one thread: bits depend on the two factors of a block alone.
// Floor: reads each factor once, n * sum(r_i) values; 2 * n * r_i * r_j operations a block.
#include "gram_tiles.h"
#include "passes.h"
#include "tile.h"

namespace fastlora::FASTLORA_ISA {
namespace {

constexpr int kTileB = 32;           // rows of a tile on the B side
constexpr int kTilesInSum = 2;       // tiles of a float32 sum on the B side
constexpr int kTileA = 512;          // columns of a tile on the A side: kTileA / kLanes terms in a float32 sum
constexpr int64_t kShortest = 1024;  // long dimensions below this are summed in float64
constexpr double kSmallest = 1e-20, kLargest = 1e30;

int64_t rank(const Matrix& m, bool rows) { return rows ? m.rows : m.cols; }
int64_t length(const Matrix& m, bool rows) { return rows ? m.cols : m.rows; }

// Blocks of one left factor whose right factors follow one another: one product.
struct Run {
    int64_t left, first_right;  // factors
    int64_t first_block, blocks;
    int64_t width;  // columns of all right factors
    double* sums;   // [rank(left), width]
    void* part;     // B side: T [rank(left), part_stride], the sums of the last tiles
};

template <class T>
struct Work {
    T* tile;          // B side [kTileB, stride]; A side [sum of ranks, kTileA]
    int64_t* offset;  // first column (B) or row (A) of each factor in the tile
    Run* runs;
    int64_t n_runs, stride;
};

template <class T>
int64_t part_stride(int64_t width) {
    return padded<T>(width) + 2 * kLanes<T>;
}

template <class T>
size_t lay_out(char* base, const GramTask& task, const Matrix* factors, const GramBlock* blocks, Work<T>& w) {
    Arena arena(base);
    w.offset = arena.take<int64_t>(task.factors + 1);
    w.runs = arena.take<Run>(task.blocks);
    int64_t total = 0;
    for (int64_t f = 0; f < task.factors; ++f) {
        if (base) w.offset[f] = total;
        total += rank(factors[f], task.rows);
    }
    w.stride = padded<T>(total) + 3 * kLanes<T>;  // vectors of the last run may reach past the last column
    w.tile = arena.take<T>(task.rows ? size_t(total) * kTileA : size_t(w.stride) * kTileB);
    if (base) __builtin_memset(w.tile, 0, sizeof(T) * (task.rows ? size_t(total) * kTileA : size_t(w.stride) * kTileB));
    w.n_runs = 0;
    for (int64_t b = 0; b < task.blocks;) {
        int64_t end = b + 1;
        int64_t width = rank(factors[blocks[b].right], task.rows);
        while (end < task.blocks && blocks[end].left == blocks[b].left &&
               blocks[end].right == blocks[end - 1].right + 1)
            width += rank(factors[blocks[end++].right], task.rows);
        const int64_t m = rank(factors[blocks[b].left], task.rows);
        double* sums = arena.take<double>(size_t(m) * width);
        T* part = arena.take<T>(task.rows ? 0 : size_t(m) * part_stride<T>(width));
        if (base) {
            w.runs[w.n_runs] = {blocks[b].left, blocks[b].right, b, end - b, width, sums, part};
            __builtin_memset(sums, 0, sizeof(double) * m * width);
        }
        ++w.n_runs;
        b = end;
    }
    return arena.used();
}

template <class T>
void read_tile(const GramTask& task, const Matrix* factors, const Work<T>& w, int64_t first, int count) {
    for (int64_t f = 0; f < task.factors; ++f) {
        const Matrix& x = factors[f];
        if (!task.rows) {
            read_block<T>(x, first, 0, count, int(x.cols), w.tile + w.offset[f], w.stride);
            continue;
        }
        T* rows = w.tile + w.offset[f] * kTileA;
        read_block<T>(x, 0, first, int(x.rows), count, rows, kTileA);
        for (int64_t i = 0; i < x.rows; ++i)
            for (int p = count; p < padded<T>(count); ++p) rows[i * kTileA + p] = T(0);
    }
}

// The run's sums of kTilesInSum tiles, then to float64.
template <class T>
void add_outer_products(const Work<T>& w, const Run& run, int64_t m, int count, bool first, bool last) {
    const int64_t stride = part_stride<T>(run.width);
    const T *left = w.tile + w.offset[run.left], *right = w.tile + w.offset[run.first_right];
    T* part = static_cast<T*>(run.part);
    if (first)
        product<T, true>(int(m), int(run.width), count, left, w.stride, 1, right, w.stride, part, stride);
    else
        product<T, false>(int(m), int(run.width), count, left, w.stride, 1, right, w.stride, part, stride);
    if (!last) return;
    for (int64_t i = 0; i < m; ++i)
        for (int64_t j = 0; j < run.width; ++j) run.sums[i * run.width + j] += double(part[i * stride + j]);
}

// In the order of sums_of_lanes, so that a value does not depend on how its block was cut into squares.
template <class T>
inline T sum_of_lanes(Vec<T> x) {
    T lane[kLanes<T>];
    store<T>(lane, x);
    for (int half = kLanes<T> / 2; half > 0; half /= 2)
        for (int i = 0; i < half; ++i) lane[i] += lane[i + half];
    return lane[0];
}

// Lane sums of kLanes vectors at once: out[i] = sum of lanes of r[i] (r is destroyed).
template <class T>
inline Vec<T> sums_of_lanes(Vec<T>* r) {
    transpose<T>(r);
    for (int half = kLanes<T> / 2; half > 0; half /= 2)
        for (int i = 0; i < half; ++i) r[i] += r[i + half];
    return r[0];
}

template <class T, int kRows, int kColumns>
__attribute__((noinline)) void dot_block(const T* left, const T* right, int vectors, double* sums, int64_t width) {
    constexpr int lanes = kLanes<T>, count = kRows * kColumns;
    constexpr int groups = (count + lanes - 1) / lanes;
    Vec<T> sum[groups * lanes] = {};
    for (int v = 0; v < vectors; ++v) {
        Vec<T> x[kRows];
#pragma GCC unroll 4
        for (int i = 0; i < kRows; ++i) x[i] = load<T>(left + int64_t(i) * kTileA + v * lanes);
#pragma GCC unroll 4
        for (int j = 0; j < kColumns; ++j) {
            const Vec<T> y = load<T>(right + int64_t(j) * kTileA + v * lanes);
#pragma GCC unroll 4
            for (int i = 0; i < kRows; ++i) sum[i * kColumns + j] += x[i] * y;
        }
    }
    if constexpr (count % lanes == 0) {
        T flat[count];
        for (int g = 0; g < groups; ++g) store<T>(flat + g * lanes, sums_of_lanes<T>(sum + g * lanes));
        for (int i = 0; i < kRows; ++i)
            for (int j = 0; j < kColumns; ++j) sums[i * width + j] += double(flat[i * kColumns + j]);
    } else {
        for (int i = 0; i < kRows; ++i)
            for (int j = 0; j < kColumns; ++j) sums[i * width + j] += double(sum_of_lanes<T>(sum[i * kColumns + j]));
    }
}

// Of a symmetric block only the 4 x 4 squares on and above the diagonal are summed.
template <class T>
void add_dot_products(const Work<T>& w, const Run& run, int64_t m, int count) {
    const int vectors = padded<T>(count) / kLanes<T>;
    const T *left = w.tile + w.offset[run.left] * kTileA, *right = w.tile + w.offset[run.first_right] * kTileA;
    const bool starts_on_diagonal = run.left == run.first_right;
    for (int64_t i = 0; i < m; i += 4) {
        const int64_t rows = min_<int64_t>(4, m - i);
        for (int64_t j = starts_on_diagonal ? i : 0; j < run.width; j += 4) {
            const T *x = left + i * kTileA, *y = right + j * kTileA;
            double* sums = run.sums + i * run.width + j;
            if (rows == 4 && run.width - j >= 4) {
                dot_block<T, 4, 4>(x, y, vectors, sums, run.width);
                continue;
            }
            for (int64_t a = 0; a < rows; ++a)
                for (int64_t b = 0; b < min_<int64_t>(4, run.width - j); ++b)
                    dot_block<T, 1, 1>(x + a * kTileA, y + b * kTileA, vectors, sums + a * run.width + b, run.width);
        }
    }
}

template <class T>
void sum_task(const GramTask& task, const Matrix* factors, const Work<T>& w) {
    const int64_t n = task.factors ? length(factors[0], task.rows) : 0;
    const int64_t step = task.rows ? kTileA : kTileB;
    int64_t tile = 0;
    for (int64_t first = 0; first < n; first += step, ++tile) {
        const int count = int(min_(step, n - first));
        const bool starts = tile % kTilesInSum == 0, ends = tile % kTilesInSum == kTilesInSum - 1 || first + step >= n;
        read_tile<T>(task, factors, w, first, count);
        for (int64_t r = 0; r < w.n_runs; ++r) {
            const int64_t m = rank(factors[w.runs[r].left], task.rows);
            if (task.rows)
                add_dot_products<T>(w, w.runs[r], m, count);
            else
                add_outer_products<T>(w, w.runs[r], m, count, starts, ends);
        }
    }
}

void write_sums(const GramBlock& block, int64_t m, int64_t n, const double* sums, int64_t stride) {
    double* out = reinterpret_cast<double*>(block.out);
    const bool symmetric = block.left == block.right;
    for (int64_t i = 0; i < m; ++i)
        for (int64_t j = 0; j < n; ++j)
            out[i * block.stride + j] = symmetric && j < i ? sums[j * stride + i] : sums[i * stride + j];
}

template <class T>
void write_blocks(const GramTask& task, const Matrix* factors, const GramBlock* blocks, const Work<T>& w) {
    for (int64_t r = 0; r < w.n_runs; ++r) {
        const Run& run = w.runs[r];
        int64_t column = 0;
        for (int64_t b = run.first_block; b < run.first_block + run.blocks; ++b) {
            const int64_t n = rank(factors[blocks[b].right], task.rows);
            write_sums(blocks[b], rank(factors[run.left], task.rows), n, run.sums + column, run.width);
            column += n;
        }
    }
}

template <class T>
bool run_task(const GramTask& task, const Matrix* factors, const GramBlock* blocks, Workspace& workspace) {
#if defined(__AMX_BF16__)
    if constexpr (sizeof(T) == 4)
        if (GramTiles::takes(task, factors)) return GramTiles(task, factors, blocks).run(workspace);
#endif
    Work<T> w{};
    if (!workspace.reserve(lay_out<T>(nullptr, task, factors, blocks, w))) return false;
    lay_out<T>(workspace.data(), task, factors, blocks, w);
    sum_task<T>(task, factors, w);
    write_blocks<T>(task, factors, blocks, w);
    return true;
}

// One block on its own.
template <class T>
bool run_block(const GramTask& task, const Matrix* factors, const GramBlock& block, Workspace& workspace) {
    const Matrix own[2] = {factors[block.left], factors[block.right]};
    const bool symmetric = block.left == block.right;
    const GramBlock alone = {0, symmetric ? 0 : 1, block.out, block.stride};
    const GramTask single = {0, symmetric ? 1 : 2, 0, 1, task.rows};
    return run_task<T>(single, own, &alone, workspace);
}

// Diagonal blocks on their own read one factor after the other: fewer streams of memory at a time.
bool run_blocks(const GramTask& task, const Matrix* factors, const GramBlock* blocks, Workspace& workspace) {
    bool only_diagonal = task.factors > 1;
    for (int64_t b = 0; b < task.blocks; ++b) only_diagonal &= blocks[b].left == blocks[b].right;
    if (!only_diagonal) return run_task<float>(task, factors, blocks, workspace);
    for (int64_t b = 0; b < task.blocks; ++b)
        if (!run_block<float>(task, factors, blocks[b], workspace)) return false;
    return true;
}

bool exact_in_float(const GramTask& task, const Matrix* factors) {
    for (int64_t f = 0; f < task.factors; ++f)
        if (!is_half(factors[f]) || length(factors[f], task.rows) < kShortest) return false;
    return true;
}

// Whether float32 sums of a factor's squares stayed in range; null when its diagonal block was not asked for.
bool in_range(const Matrix& factor, const GramBlock* diagonal, bool rows) {
    if (!diagonal) return false;
    const double* g = reinterpret_cast<const double*>(diagonal->out);
    for (int64_t i = 0; i < rank(factor, rows); ++i) {
        const double square = g[i * diagonal->stride + i];
        if (!(square >= kSmallest && square <= kLargest)) return false;
    }
    return true;
}

// Half-precision factors in float32, then again in float64 whatever has a factor that float32 cannot hold.
bool run_half_task(const GramTask& task, const Matrix* factors, const GramBlock* blocks, Workspace& workspace,
                   Workspace& flags_memory) {
    if (!run_blocks(task, factors, blocks, workspace)) return false;
    if (!flags_memory.reserve(size_t(task.factors))) return false;
    bool* good = reinterpret_cast<bool*>(flags_memory.data());
    for (int64_t f = 0; f < task.factors; ++f) {
        const GramBlock* diagonal = nullptr;
        for (int64_t b = 0; b < task.blocks; ++b)
            if (blocks[b].left == f && blocks[b].right == f) diagonal = blocks + b;
        good[f] = in_range(factors[f], diagonal, task.rows);
    }
    for (int64_t b = 0; b < task.blocks; ++b)
        if (!(good[blocks[b].left] && good[blocks[b].right]) && !run_block<double>(task, factors, blocks[b], workspace))
            return false;
    return true;
}

}  // namespace

int gram(const Matrix* factors, const GramTask* tasks, const GramBlock* blocks, int64_t n_tasks, int threads) {
    int status = kDone;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        Workspace workspace, flags;
#pragma omp for schedule(dynamic, 1)
        for (int64_t t = 0; t < n_tasks; ++t) {
            const GramTask& task = tasks[t];
            const Matrix* own_factors = factors + task.first_factor;
            const GramBlock* own_blocks = blocks + task.first_block;
            const bool done = exact_in_float(task, own_factors)
                                  ? run_half_task(task, own_factors, own_blocks, workspace, flags)
                                  : run_task<double>(task, own_factors, own_blocks, workspace);
            if (!done) {
#pragma omp atomic write
                status = kOutOfMemory;
            }
        }
    }
    return status;
}

}  // namespace fastlora::FASTLORA_ISA
