// gram: blocks G_ij = X_i' X_j of the tall factors of one module, [r_i, r_j], returned in float64.
//   B side: X_i is B_i [n, r_i].   A side: X_i is A_i', stored as A_i [r_i, n].
// A task walks the long dimension in short tiles that stay in L1. Every factor is read and converted once a tile;
// then every block that was asked for takes the tile's contribution.
//   B side: outer products; the blocks (i, j), (i, j + 1), ... of one left factor are one product with the
//           concatenated columns of the right factors.
//   A side: dot products of rows, 4 with 4 at a time (2 or 3 where there are 16 registers), one sum a lane.
// Of blocks on the diagonal only what holds the upper triangle is summed.
// Everything is float64, whatever is stored: decompositions take square roots of these blocks and divide by small ones,
// so an error of a Gram matrix comes back with the square of the condition number. (Half-precision factors summed in
// float32 were off by 1e-7, which is 1e-3 of a direction at a hundredth of the largest.) Sums run over the long
// dimension in order and in one thread: bits depend on the two factors of a block alone. Floor: reads each factor once,
// n * sum(r_i) values; 2 * n * r_i * r_j operations a block.
#include "ahead.h"
#include "parallel.h"
#include "table.h"
#include "tile.h"

namespace fastlora::FASTLORA_ISA {
namespace {

using T = double;

constexpr int kTileB = 32;   // rows of a tile on the B side
constexpr int kTileA = 192;  // columns of a tile on the A side
constexpr int kStrideA = kTileA + kLanes<T>;
constexpr int kTilesInSum = 64;
constexpr bool kManyRegisters = kVectorBytes == 64;
constexpr int64_t kGroup = kManyRegisters ? 8 : 4;  // rows of the sums of outer products that are added to at a time
constexpr int kRows = 4;                            // of dot products that are summed at a time,
constexpr int kColumns = kManyRegisters ? 4 : 3;    // and columns

int64_t rank(const Matrix& m, bool rows) { return rows ? m.rows : m.cols; }
int64_t length(const Matrix& m, bool rows) { return rows ? m.cols : m.rows; }

// Blocks of one left factor whose right factors follow one another: one product.
struct Run {
    int64_t left, first_right;  // factors
    int64_t first_block, blocks;
    int64_t width;  // columns of all right factors
    double* sums;   // [rank(left), width]
    void* part;  // sums of the last tiles: B side T [rank(left), part_stride], A side Vec<T> [groups, columns, kRows]
};

struct Work {
    T* tile;          // B side [kTileB, stride]; A side [sum of ranks, kStrideA]
    int64_t* offset;  // first column (B) or row (A) of each factor in the tile
    Run* runs;
    int64_t n_runs, stride;
    int64_t products;  // a tile, about
};

int64_t part_stride(int64_t width) { return padded<T>(width) + 2 * kLanes<T>; }

int64_t groups(int64_t n) { return (n + kRows - 1) / kRows; }

// Columns of `left` more that are summed at a time.
int columns_now(int64_t left) {
    if (kManyRegisters) return kColumns;
    return left == 4 || left < 3 ? 2 : 3;
}

// Of all columns, the last ones repeated: those of kColumns at a time.
int64_t summed(int64_t columns) {
    int64_t n = 0;
    while (n < columns) n += columns_now(columns - n);
    return n;
}

// Products of a group of rows on the A side.
int64_t patches(int64_t columns) {
    int64_t n = 0;
    for (int64_t j = 0; j < columns; ++n) j += columns_now(columns - j);
    return n;
}

// Elements of T of a run's sums of the last tiles.
size_t part_size(const GramTask& task, int64_t m, int64_t width) {
    if (!task.rows) return size_t(m * part_stride(width));
    return size_t(groups(m) * summed(width) * kRows * kLanes<T>);
}

size_t lay_out(char* base, const GramTask& task, const Matrix* factors, const GramBlock* blocks, Work& w) {
    Arena arena(base);
    w.offset = arena.take<int64_t>(task.factors + 1);
    w.runs = arena.take<Run>(task.blocks);
    int64_t total = 0;
    for (int64_t f = 0; f < task.factors; ++f) {
        if (base) w.offset[f] = total;
        total += rank(factors[f], task.rows);
    }
    w.stride = padded<T>(total) + 3 * kLanes<T>;  // vectors of the last run may reach past the last column
    const size_t tile = task.rows ? size_t(total) * kStrideA : size_t(w.stride) * kTileB;
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
        T* part = arena.take<T>(part_size(task, m, width));
        if (base) {
            w.runs[w.n_runs] = {blocks[b].left, blocks[b].right, b, end - b, width, sums, part};
            __builtin_memset(sums, 0, sizeof(double) * m * width);
            __builtin_memset(static_cast<void*>(part), 0, sizeof(T) * part_size(task, m, width));
        }
        ++w.n_runs;
        const bool on_diagonal = blocks[b].left == blocks[b].right;
        if (task.rows)
            for (int64_t i = 0; i < m; i += kRows) w.products += patches(width - (on_diagonal ? i : 0));
        else
            w.products += (m + kGroup - 1) / kGroup;
        b = end;
    }
    return arena.used();
}

void read_tile(const GramTask& task, const Matrix* factors, const Work& w, int64_t first, int count) {
    for (int64_t f = 0; f < task.factors; ++f) {
        const Matrix& x = factors[f];
        if (!task.rows) {
            read_block<T>(x, first, 0, count, int(x.cols), w.tile + w.offset[f], w.stride);
            continue;
        }
        T* rows = w.tile + w.offset[f] * kStrideA;
        read_block<T>(x, 0, first, int(x.rows), count, rows, kStrideA);
        for (int64_t i = 0; i < x.rows; ++i)
            for (int p = count; p < padded<T>(count); ++p) rows[i * kStrideA + p] = T(0);
    }
}

// Of a run on the diagonal the columns from the one on that a group of rows has in the upper triangle.
void add_outer_products(const Work& w, const Run& run, int64_t m, int count, bool ends, Ahead& ahead) {
    const int64_t stride = part_stride(run.width);
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
inline Vec<T> sums_of_lanes(Vec<T>* r) {
    transpose<T>(r);
    for (int half = kLanes<T> / 2; half > 0; half /= 2)
        for (int i = 0; i < half; ++i) r[i] += r[i + half];
    return r[0];
}

// sums [kN, kRows] += the products of kRows rows with kN rows, lane by lane. The sums stay in registers.
template <int kN>
__attribute__((noinline)) void add_patch(const T* const* left, const T* const* right, int vectors, Vec<T>* sums) {
    Vec<T> sum[kN][kRows];
#pragma GCC unroll 4
    for (int j = 0; j < kN; ++j)
#pragma GCC unroll 4
        for (int i = 0; i < kRows; ++i) sum[j][i] = sums[j * kRows + i];
    const T* const l[kRows] = {left[0], left[1], left[2], left[3]};
    const T* r[kN];
#pragma GCC unroll 4
    for (int j = 0; j < kN; ++j) r[j] = right[j];
    for (int at = 0; at < vectors * kLanes<T>; at += kLanes<T>) {
        Vec<T> y[kN];
#pragma GCC unroll 4
        for (int j = 0; j < kN; ++j) y[j] = load<T>(r[j] + at);
#pragma GCC unroll 4
        for (int i = 0; i < kRows; ++i) {
            const Vec<T> x = load<T>(l[i] + at);
#pragma GCC unroll 4
            for (int j = 0; j < kN; ++j) sum[j][i] += x * y[j];
        }
    }
#pragma GCC unroll 4
    for (int j = 0; j < kN; ++j)
#pragma GCC unroll 4
        for (int i = 0; i < kRows; ++i) sums[j * kRows + i] = sum[j][i];
}

// Rows [first, first + kRows) of a tile; the last one stands for those that are not there.
void rows_of(const T* tile, int64_t first, int64_t n, const T** rows) {
    for (int64_t i = 0; i < kRows; ++i) rows[i] = tile + min_(first + i, n - 1) * kStrideA;
}

// sums [m, n] += what `summed` columns of a group summed up in their lanes, which then start again
void take_sums(Vec<T>* part, int64_t m, int64_t n, int64_t summed, double* sums, int64_t width) {
    for (int64_t at = 0; at < summed * kRows; at += kLanes<T>) {
        T flat[kLanes<T>];
        store<T>(flat, sums_of_lanes(part + at));
        for (int64_t s = at; s < at + kLanes<T>; ++s)
            if (s % kRows < m && s / kRows < n) sums[s % kRows * width + s / kRows] += double(flat[s - at]);
    }
    __builtin_memset(static_cast<void*>(part), 0, sizeof(Vec<T>) * summed * kRows);
}

// Of a run on the diagonal the columns from the first row of a group on.
void add_dot_products(const Work& w, const Run& run, int64_t m, int count, bool ends, Ahead& ahead) {
    const T *left = w.tile + w.offset[run.left] * kStrideA, *right = w.tile + w.offset[run.first_right] * kStrideA;
    const bool on_diagonal = run.left == run.first_right;
    const int vectors = padded<T>(count) / kLanes<T>;
    Vec<T>* part = static_cast<Vec<T>*>(run.part);
    for (int64_t i = 0; i < m; i += kRows) {
        const T *x[kRows], *y[kRows];
        rows_of(left, i, m, x);
        const int64_t first = on_diagonal ? i : 0, width = run.width - first;
        Vec<T>* sums = part;
        for (int64_t j = 0, now = 0; j < width; j += now, ahead.step(), part += now * kRows) {
            now = columns_now(width - j);
            rows_of(right, first + j, run.width, y);
            if (now == kColumns)
                add_patch<kColumns>(x, y, vectors, part);
            else
                add_patch<2>(x, y, vectors, part);
        }
        if (ends)
            take_sums(sums, min_<int64_t>(kRows, m - i), width, summed(width), run.sums + i * run.width + first,
                      run.width);
    }
}

void sum_task(const GramTask& task, const Matrix* factors, const Work& w) {
    const int64_t n = task.factors ? length(factors[0], task.rows) : 0;
    const int64_t step = task.rows ? kTileA : kTileB;
    int64_t tile = 0;
    for (int64_t first = 0; first < n; first += step, ++tile) {
        const int count = int(min_(step, n - first));
        const bool ends = tile % kTilesInSum == kTilesInSum - 1 || first + step >= n;
        read_tile(task, factors, w, first, count);
        Ahead ahead(factors, task.factors, task.rows, first + step, min_(step, n - first - step), w.products);
        for (int64_t r = 0; r < w.n_runs; ++r) {
            const int64_t m = rank(factors[w.runs[r].left], task.rows);
            if (task.rows)
                add_dot_products(w, w.runs[r], m, count, ends, ahead);
            else
                add_outer_products(w, w.runs[r], m, count, ends, ahead);
        }
    }
}

void write_sums(const GramBlock& block, int64_t m, int64_t n, const double* sums, int64_t stride) {
    double *out = reinterpret_cast<double*>(block.out), *mirror = reinterpret_cast<double*>(block.mirror);
    const bool symmetric = block.left == block.right;
    for (int64_t i = 0; i < m; ++i)
        for (int64_t j = 0; j < n; ++j) {
            const double sum = block.scale * (symmetric && j < i ? sums[j * stride + i] : sums[i * stride + j]);
            out[i * block.stride + j] = sum;
            if (mirror) mirror[j * block.stride + i] = sum;
        }
}

void write_blocks(const GramTask& task, const Matrix* factors, const GramBlock* blocks, const Work& w) {
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

bool run_task(const GramTask& task, const Matrix* factors, const GramBlock* blocks, Workspace& workspace) {
    Work w{};
    if (!workspace.reserve(lay_out(nullptr, task, factors, blocks, w))) return false;
    lay_out(workspace.data(), task, factors, blocks, w);
    sum_task(task, factors, w);
    write_blocks(task, factors, blocks, w);
    return true;
}

// One block on its own.
bool run_block(const GramTask& task, const Matrix* factors, const GramBlock& block, Workspace& workspace) {
    const Matrix own[2] = {factors[block.left], factors[block.right]};
    const bool symmetric = block.left == block.right;
    const GramBlock alone = {0, symmetric ? 0 : 1, block.out, block.stride, block.mirror, block.scale};
    const GramTask single = {0, symmetric ? 1 : 2, 0, 1, task.rows};
    return run_task(single, own, &alone, workspace);
}

// Diagonal blocks on their own read one factor after the other: fewer streams of memory at a time.
bool run_blocks(const GramTask& task, const Matrix* factors, const GramBlock* blocks, Workspace& workspace) {
    bool only_diagonal = task.factors > 1;
    for (int64_t b = 0; b < task.blocks; ++b) only_diagonal &= blocks[b].left == blocks[b].right;
    if (!only_diagonal) return run_task(task, factors, blocks, workspace);
    for (int64_t b = 0; b < task.blocks; ++b)
        if (!run_block(task, factors, blocks[b], workspace)) return false;
    return true;
}

}  // namespace

int gram(const Matrix* factors, const GramTask* tasks, const GramBlock* blocks, int64_t n_tasks, int threads) {
    int status = kDone;
    Queue queue(n_tasks);
    on_team(int(min_<int64_t>(threads, n_tasks)), [&](int, int) {
        Workspace workspace;
        queue.take([&](int64_t t) {
            const GramTask& task = tasks[t];
            if (!run_blocks(task, factors + task.first_factor, blocks + task.first_block, workspace))
                set_shared<int>(status, kOutOfMemory);
        });
    });
    return status;
}

}  // namespace fastlora::FASTLORA_ISA
