// gram: blocks G_ij = X_i' X_j of the tall factors of one module, [r_i, r_j], returned in float64.
//   B side: X_i is B_i [n, r_i].   A side: X_i is A_i', stored as A_i [r_i, n].
// A task walks the long dimension in short tiles that stay in L1. Every factor is read and converted once a tile;
// then every block that was asked for takes the tile's contribution.
//   B side: outer products; the blocks (i, j), (i, j + 1), ... of one left factor are one product with the
//           concatenated columns of the right factors.
//   A side: dot products of rows, 4 x 4 at a time, one sum a lane.
// Of blocks on the diagonal only what holds the upper triangle is summed.
// The sums of a few tiles are added to float64 ones. Half-precision factors: their products are exact in float32, so
// those few tiles are summed in float32; short sums keep the error near 1e-8 of the diagonal. Where float32 could
// overflow or underflow (a squared column norm outside [kSmallest, kLargest]), or the long dimension is too short for
// rounding to average out, the factor's blocks are summed in float64 throughout, as those of float32 and float64
// factors are. Sums run over the long dimension in order and in one thread: bits depend on the two factors of a block
// alone. Floor: reads each factor once, n * sum(r_i) values; 2 * n * r_i * r_j operations a block.
#include "ahead.h"
#include "gram_amx.h"
#include "parallel.h"
#include "table.h"
#include "tile.h"

namespace fastlora::FASTLORA_ISA {
namespace {

constexpr int kTileB = 32;  // rows of a tile on the B side
template <class T>
constexpr int kTileA = 24 * kLanes<T>;  // columns of a tile on the A side
template <class T>
constexpr int kStrideA = kTileA<T> + kLanes<T>;
template <class T>
constexpr int kTilesInSum = sizeof(T) == 4 ? 2 : 64;  // of float32: 64 (B side) or 48 (A side) terms
constexpr int64_t kGroup = 8;                         // rows of the sums of outer products that are added to at a time
constexpr int kSquare = 4;                            // rows and columns of a square of dot products
constexpr int64_t kShortest = 1024;                   // long dimensions below this are summed in float64
constexpr double kSmallest = 1e-20, kLargest = 1e30;

int64_t rank(const Matrix& m, bool rows) { return rows ? m.rows : m.cols; }
int64_t length(const Matrix& m, bool rows) { return rows ? m.cols : m.rows; }

// Blocks of one left factor whose right factors follow one another: one product.
struct Run {
    int64_t left, first_right;  // factors
    int64_t first_block, blocks;
    int64_t width;  // columns of all right factors
    double* sums;   // [rank(left), width]
    void* part;     // sums of the last tiles: B side T [rank(left), part_stride], A side Vec<T> [squares, 4, 4]
};

template <class T>
struct Work {
    T* tile;          // B side [kTileB, stride]; A side [sum of ranks, kStrideA]
    int64_t* offset;  // first column (B) or row (A) of each factor in the tile
    Run* runs;
    int64_t n_runs, stride;
    int64_t products;  // a tile, about
};

template <class T>
int64_t part_stride(int64_t width) {
    return padded<T>(width) + 2 * kLanes<T>;
}

int64_t squares(int64_t n) { return (n + kSquare - 1) / kSquare; }

// Elements of T of a run's sums of the last tiles.
template <class T>
size_t part_size(const GramTask& task, int64_t m, int64_t width) {
    if (!task.rows) return size_t(m * part_stride<T>(width));
    return size_t(squares(m) * squares(width) * kSquare * kSquare * kLanes<T>);
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
    const size_t tile = task.rows ? size_t(total) * kStrideA<T> : size_t(w.stride) * kTileB;
    w.tile = arena.take<T>(tile);
    if (base) __builtin_memset(w.tile, 0, sizeof(T) * tile);
    w.n_runs = w.products = 0;
    for (int64_t b = 0; b < task.blocks;) {
        int64_t end = b + 1;
        int64_t width = rank(factors[blocks[b].right], task.rows);
        while (end < task.blocks && blocks[end].left == blocks[b].left &&
               blocks[end].right == blocks[end - 1].right + 1)
            width += rank(factors[blocks[end++].right], task.rows);
        const int64_t m = rank(factors[blocks[b].left], task.rows);
        double* sums = arena.take<double>(size_t(m) * width);
        T* part = arena.take<T>(part_size<T>(task, m, width));
        if (base) {
            w.runs[w.n_runs] = {blocks[b].left, blocks[b].right, b, end - b, width, sums, part};
            __builtin_memset(sums, 0, sizeof(double) * m * width);
            __builtin_memset(static_cast<void*>(part), 0, sizeof(T) * part_size<T>(task, m, width));
        }
        ++w.n_runs;
        w.products += task.rows ? squares(m) * squares(width) : (m + kGroup - 1) / kGroup;
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
        T* rows = w.tile + w.offset[f] * kStrideA<T>;
        read_block<T>(x, 0, first, int(x.rows), count, rows, kStrideA<T>);
        for (int64_t i = 0; i < x.rows; ++i)
            for (int p = count; p < padded<T>(count); ++p) rows[i * kStrideA<T> + p] = T(0);
    }
}

// Of a run on the diagonal the columns from the one on that a group of rows has in the upper triangle.
template <class T>
void add_outer_products(const Work<T>& w, const Run& run, int64_t m, int count, bool ends, Ahead& ahead) {
    const int64_t stride = part_stride<T>(run.width);
    const T *left = w.tile + w.offset[run.left], *right = w.tile + w.offset[run.first_right];
    const bool on_diagonal = run.left == run.first_right;
    for (int64_t i = 0; i < m; i += kGroup) {
        const int64_t rows = min_(kGroup, m - i), first = on_diagonal ? i / kLanes<T> * kLanes<T> : 0;
        T* part = static_cast<T*>(run.part) + i * stride;
        product<T, false>(int(rows), int(run.width - first), count, left + i, w.stride, 1, right + first, w.stride,
                          part + first, stride);
        ahead.step();
        if (!ends) continue;
        for (int64_t a = 0; a < rows; ++a)
            for (int64_t j = first; j < run.width; ++j)
                run.sums[(i + a) * run.width + j] += double(part[a * stride + j]);
        __builtin_memset(part, 0, sizeof(T) * rows * stride);
    }
}

// Lane sums of kLanes vectors at once: out[i] = sum of lanes of r[i] (r is destroyed).
template <class T>
inline Vec<T> sums_of_lanes(Vec<T>* r) {
    transpose<T>(r);
    for (int half = kLanes<T> / 2; half > 0; half /= 2)
        for (int i = 0; i < half; ++i) r[i] += r[i + half];
    return r[0];
}

// sums [4, 4] += the products of 4 rows with 4 rows, lane by lane
template <class T>
__attribute__((noinline)) void add_square(const T* const* left, const T* const* right, int vectors, Vec<T>* sums) {
    Vec<T> sum[kSquare][kSquare];
#pragma GCC unroll 4
    for (int i = 0; i < kSquare; ++i)
#pragma GCC unroll 4
        for (int j = 0; j < kSquare; ++j) sum[i][j] = sums[i * kSquare + j];
    const T* const l[kSquare] = {left[0], left[1], left[2], left[3]};
    const T* const r[kSquare] = {right[0], right[1], right[2], right[3]};
    for (int at = 0; at < vectors * kLanes<T>; at += kLanes<T>) {
        Vec<T> x[kSquare];
#pragma GCC unroll 4
        for (int i = 0; i < kSquare; ++i) x[i] = load<T>(l[i] + at);
#pragma GCC unroll 4
        for (int j = 0; j < kSquare; ++j) {
            const Vec<T> y = load<T>(r[j] + at);
#pragma GCC unroll 4
            for (int i = 0; i < kSquare; ++i) sum[i][j] += x[i] * y;
        }
    }
#pragma GCC unroll 4
    for (int i = 0; i < kSquare; ++i)
#pragma GCC unroll 4
        for (int j = 0; j < kSquare; ++j) sums[i * kSquare + j] = sum[i][j];
}

// Rows [first, first + 4) of a tile; the last one stands for those that are not there.
template <class T>
void rows_of(const T* tile, int64_t first, int64_t n, const T** rows) {
    for (int64_t i = 0; i < kSquare; ++i) rows[i] = tile + min_(first + i, n - 1) * kStrideA<T>;
}

// sums [m, n] += what a square summed up in its lanes, which then starts again
template <class T>
void take_sums(Vec<T>* part, int64_t m, int64_t n, double* sums, int64_t width) {
    constexpr int count = kSquare * kSquare;
    T flat[count];
    for (int i = 0; i < count; i += kLanes<T>) store<T>(flat + i, sums_of_lanes<T>(part + i));
    for (int64_t i = 0; i < m; ++i)
        for (int64_t j = 0; j < n; ++j) sums[i * width + j] += double(flat[i * kSquare + j]);
    __builtin_memset(part, 0, sizeof(Vec<T>) * count);
}

// Of a run on the diagonal the squares on and above it.
template <class T>
void add_dot_products(const Work<T>& w, const Run& run, int64_t m, int count, bool ends, Ahead& ahead) {
    const T *left = w.tile + w.offset[run.left] * kStrideA<T>,
            *right = w.tile + w.offset[run.first_right] * kStrideA<T>;
    const bool on_diagonal = run.left == run.first_right;
    Vec<T>* part = static_cast<Vec<T>*>(run.part);
    for (int64_t i = 0; i < m; i += kSquare)
        for (int64_t j = on_diagonal ? i : 0; j < run.width; j += kSquare, part += kSquare * kSquare) {
            const T *x[kSquare], *y[kSquare];
            rows_of(left, i, m, x);
            rows_of(right, j, run.width, y);
            add_square<T>(x, y, padded<T>(count) / kLanes<T>, part);
            ahead.step();
            if (ends)
                take_sums<T>(part, min_<int64_t>(kSquare, m - i), min_<int64_t>(kSquare, run.width - j),
                             run.sums + i * run.width + j, run.width);
        }
}

template <class T>
void sum_task(const GramTask& task, const Matrix* factors, const Work<T>& w) {
    const int64_t n = task.factors ? length(factors[0], task.rows) : 0;
    const int64_t step = task.rows ? kTileA<T> : kTileB;
    int64_t tile = 0;
    for (int64_t first = 0; first < n; first += step, ++tile) {
        const int count = int(min_(step, n - first));
        const bool ends = tile % kTilesInSum<T> == kTilesInSum<T> - 1 || first + step >= n;
        read_tile<T>(task, factors, w, first, count);
        Ahead ahead(factors, task.factors, task.rows, first + step, min_(step, n - first - step), w.products);
        for (int64_t r = 0; r < w.n_runs; ++r) {
            const int64_t m = rank(factors[w.runs[r].left], task.rows);
            if (task.rows)
                add_dot_products<T>(w, w.runs[r], m, count, ends, ahead);
            else
                add_outer_products<T>(w, w.runs[r], m, count, ends, ahead);
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
template <class T>
bool run_blocks(const GramTask& task, const Matrix* factors, const GramBlock* blocks, Workspace& workspace) {
    bool only_diagonal = task.factors > 1;
    for (int64_t b = 0; b < task.blocks; ++b) only_diagonal &= blocks[b].left == blocks[b].right;
    if (!only_diagonal) return run_task<T>(task, factors, blocks, workspace);
    for (int64_t b = 0; b < task.blocks; ++b)
        if (!run_block<T>(task, factors, blocks[b], workspace)) return false;
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
    if (!run_blocks<float>(task, factors, blocks, workspace)) return false;
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
    Queue queue(n_tasks);
    on_team(int(min_<int64_t>(threads, n_tasks)), [&](int, int) {
        Workspace workspace, flags;
        queue.take([&](int64_t t) {
            const GramTask& task = tasks[t];
            const Matrix* own_factors = factors + task.first_factor;
            const GramBlock* own_blocks = blocks + task.first_block;
            const bool done = exact_in_float(task, own_factors)
                                  ? run_half_task(task, own_factors, own_blocks, workspace, flags)
                                  : run_blocks<double>(task, own_factors, own_blocks, workspace);
            if (!done) set_shared<int>(status, kOutOfMemory);
        });
    });
    return status;
}

}  // namespace fastlora::FASTLORA_ISA
