// gram: blocks G_ij = X_iᵀ X_j of the tall factors of one module, [r_i, r_j], in float64.
//   B side: X_i is B_i [n, r_i].   A side: X_i is A_iᵀ, stored as A_i [r_i, n].
// A task walks the long dimension in tiles; every factor is read and converted once per tile, then every block that
// was asked for takes the tile's contribution from cache. Sums run over n in order, in one thread: the bits do not
// depend on threads, batch or the other blocks.
// Floor: reads each factor once, n·Σr_i values; 2·n·r_i·r_j operations a block, half of that for diagonal blocks.
#include "passes.h"
#include "tile.h"

namespace fastlora::FASTLORA_ISA {
namespace {

constexpr int kTileRows = 128;
constexpr int64_t kTileValues = 64 * 1024;  // of all factors together: half a megabyte, inside L2

// Depends on the module alone, never on the batch: tiles decide the order of the sums' memory traffic, not their bits.
int tile_rows(int64_t total_rank) {
    int rows = kTileRows;
    while (rows > 16 && rows * total_rank > kTileValues) rows /= 2;
    return rows;
}

struct Layout {
    double** tiles;   // per factor [rows, padded(r)]
    double** sums;    // per block [r_left, padded(r_right)]
    double* scratch;  // for the transposition
    int rows;
};

int64_t rank(const Matrix& m, bool rows) { return rows ? m.rows : m.cols; }
int64_t length(const Matrix& m, bool rows) { return rows ? m.cols : m.rows; }

size_t lay_out(char* base, const GramTask& task, const Matrix* factors, const GramBlock* blocks, Layout& layout) {
    Arena arena(base);
    int64_t total = 0;
    for (int64_t f = 0; f < task.factors; ++f) total += padded(rank(factors[f], task.rows));
    layout.rows = tile_rows(total);
    layout.tiles = arena.take<double*>(task.factors);
    layout.sums = arena.take<double*>(task.blocks);
    layout.scratch = arena.take<double>(size_t(kLanes<double>) * padded(layout.rows));
    for (int64_t f = 0; f < task.factors; ++f) {
        double* tile = arena.take<double>(size_t(layout.rows) * padded(rank(factors[f], task.rows)));
        if (base) layout.tiles[f] = tile;
    }
    for (int64_t b = 0; b < task.blocks; ++b) {
        const Matrix &left = factors[blocks[b].left], &right = factors[blocks[b].right];
        double* sum = arena.take<double>(size_t(rank(left, task.rows)) * padded(rank(right, task.rows)));
        if (base) layout.sums[b] = sum;
    }
    return arena.used();
}

// The block's share of one tile. Of a symmetric block only columns from the diagonal on are summed.
void add_tile(const GramBlock& block, int r_left, int stride_left, int stride_right, const Layout& layout, int count,
              double* sum) {
    const double *left = layout.tiles[block.left], *right = layout.tiles[block.right];
    if (block.left != block.right) {
        product(r_left, stride_right, count, left, stride_left, 1, right, stride_right, sum, stride_right);
        return;
    }
    constexpr int lanes = kLanes<double>;
    for (int i = 0; i < r_left; i += lanes)
        product(min_(lanes, r_left - i), stride_right - i, count, left + i, stride_left, 1, right + i, stride_right,
                sum + int64_t(i) * stride_right + i, stride_right);
}

void write_block(const GramBlock& block, int r_left, int r_right, int stride, const double* sum) {
    double* out = reinterpret_cast<double*>(block.out);
    const bool symmetric = block.left == block.right;
    for (int i = 0; i < r_left; ++i)
        for (int j = 0; j < r_right; ++j)
            out[i * block.stride + j] =
                symmetric && j < i ? sum[int64_t(j) * stride + i] : sum[int64_t(i) * stride + j];
}

void run_task(const GramTask& task, const Matrix* factors, const GramBlock* blocks, const Layout& layout) {
    for (int64_t b = 0; b < task.blocks; ++b) {
        const Matrix &left = factors[blocks[b].left], &right = factors[blocks[b].right];
        __builtin_memset(layout.sums[b], 0,
                         size_t(rank(left, task.rows)) * padded(rank(right, task.rows)) * sizeof(double));
    }
    const int64_t n = task.factors ? length(factors[0], task.rows) : 0;
    for (int64_t first = 0; first < n; first += layout.rows) {
        const int count = int(min_<int64_t>(layout.rows, n - first));
        for (int64_t f = 0; f < task.factors; ++f) {
            const int stride = padded(rank(factors[f], task.rows));
            if (task.rows)
                read_tile_transposed(factors[f], first, count, layout.tiles[f], stride, layout.scratch);
            else
                read_tile(factors[f], first, count, layout.tiles[f], stride);
        }
        for (int64_t b = 0; b < task.blocks; ++b) {
            const Matrix &left = factors[blocks[b].left], &right = factors[blocks[b].right];
            add_tile(blocks[b], int(rank(left, task.rows)), padded(rank(left, task.rows)),
                     padded(rank(right, task.rows)), layout, count, layout.sums[b]);
        }
    }
    for (int64_t b = 0; b < task.blocks; ++b) {
        const Matrix &left = factors[blocks[b].left], &right = factors[blocks[b].right];
        write_block(blocks[b], int(rank(left, task.rows)), int(rank(right, task.rows)), padded(rank(right, task.rows)),
                    layout.sums[b]);
    }
}

}  // namespace

int gram(const Matrix* factors, const GramTask* tasks, const GramBlock* blocks, int64_t n_tasks, int threads) {
    int status = kDone;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        Workspace workspace;
#pragma omp for schedule(dynamic, 1)
        for (int64_t t = 0; t < n_tasks; ++t) {
            const GramTask& task = tasks[t];
            const Matrix* own_factors = factors + task.first_factor;
            const GramBlock* own_blocks = blocks + task.first_block;
            Layout layout{};
            if (!workspace.reserve(lay_out(nullptr, task, own_factors, own_blocks, layout))) {
#pragma omp atomic write
                status = kOutOfMemory;
                continue;
            }
            lay_out(workspace.data(), task, own_factors, own_blocks, layout);
            run_task(task, own_factors, own_blocks, layout);
        }
    }
    return status;
}

}  // namespace fastlora::FASTLORA_ISA
