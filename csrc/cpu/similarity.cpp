// similarity: of every two updates ΔW_i = U_i R_i of one module, U_i with orthonormal columns,
//     inner[i, j]  = sum over a, b of (U_i' U_j)[a, b] * (R_i R_j')[a, b] = <ΔW_i, ΔW_j>,
//     shared[i, j] = the squared norm of the first kept_i rows and kept_j columns of U_i' U_j.
// All U_i stand side by side in left [n, width], all R_i' in right [m, width]. Adapters are taken in tiles of about 192
// columns; both products of two tiles, and their sums, stay in the cache. Products are float32, in blocks of 256 rows
// whose sums are then added: unit columns give them errors of about 1e-7. What is summed over blocks of r x r is
// float64. Pairs i <= j are computed and mirrored; one thread does all of a pair, in an order that depends on the two
// ranks and the lengths alone. Floor: (n + m) * width^2 operations (half of two products of whole stacks).
#include "parallel.h"
#include "table.h"
#include "tile.h"

namespace fastlora::FASTLORA_ISA {
namespace {

using T = float;

constexpr int64_t kTile = 192;   // columns of a tile, but for an adapter that has more
constexpr int64_t kDepth = 256;  // rows in a block of a product

// Adapters [first, end) and their columns.
struct Tile {
    int64_t first, end, column, width, stride;
};

class Tiles {
  public:
    explicit Tiles(const SimilarityArgs& args) : args_(args) {}

    // The tile that starts at an adapter; it does not reach across the split.
    Tile at(int64_t first) const {
        const int64_t stop = first < args_.split ? args_.split : args_.k;
        int64_t end = first + 1;
        while (end < stop && args_.starts[end + 1] - args_.starts[first] <= kTile) ++end;
        const int64_t width = args_.starts[end] - args_.starts[first];
        return {first, end, args_.starts[first], width, int64_t(padded<T>(width)) + 3 * kLanes<T>};
    }

    int64_t count() const {
        int64_t n = 0;
        for (int64_t i = 0; i < args_.k; i = at(i).end) ++n;
        return n;
    }

  private:
    const SimilarityArgs& args_;
};

// Rows [row, row + depth) of a tile's columns, zero up to the stride.
void pack(const T* stack, int64_t stack_width, const Tile& tile, int64_t row, int64_t depth, T* out) {
    const T* p = stack + row * stack_width + tile.column;
    for (int64_t i = 0; i < depth; ++i, p += stack_width, out += tile.stride) {
        __builtin_memcpy(out, p, sizeof(T) * size_t(tile.width));
        __builtin_memset(out + tile.width, 0, sizeof(T) * size_t(tile.stride - tile.width));
    }
}

struct Room {
    T *left, *right;    // [kDepth, stride]
    T *u, *r, *block;   // [columns of a, stride of b]
    T *inner, *shared;  // [stride of b]
};

size_t lay_out(char* base, int64_t widest, Room& room) {
    Arena arena(base);
    const size_t stride = size_t(padded<T>(widest)) + 3 * kLanes<T>;
    room.left = arena.take<T>(kDepth * stride);
    room.right = arena.take<T>(kDepth * stride);
    room.u = arena.take<T>(stride * stride);
    room.r = arena.take<T>(stride * stride);
    room.block = arena.take<T>(stride * stride);
    room.inner = arena.take<T>(stride);
    room.shared = arena.take<T>(stride);
    return arena.used();
}

// out [a.width, b.stride] = the columns of a, transposed, times those of b
void products(const T* stack, int64_t length, int64_t stack_width, const Tile& a, const Tile& b, Room& room, T* out) {
    for (int64_t row = 0; row < length || row == 0; row += kDepth) {
        const int64_t depth = min_(kDepth, length - row);
        pack(stack, stack_width, a, row, depth, room.left);
        pack(stack, stack_width, b, row, depth, room.right);
        T* to = row ? room.block : out;
        product<T, true>(int(a.width), int(b.width), int(depth), room.left, a.stride, 1, room.right, b.stride, to,
                         b.stride);
        if (!row) continue;
        for (int64_t i = 0; i < a.width; ++i)
            for (int64_t j = 0; j < b.width; ++j) out[i * b.stride + j] += to[i * b.stride + j];
    }
}

// Sums of u * r and, of the first `kept` rows, of u^2, column by column: rows of one adapter.
void sum_rows(const T* u, const T* r, int64_t rows, int64_t kept, int64_t stride, int64_t width, Room& room) {
    for (int64_t at = 0; at < width; at += kLanes<T>) {
        Vec<T> inner{}, shared{};
        for (int64_t i = 0; i < rows; ++i) {
            const Vec<T> x = load<T>(u + i * stride + at);
            inner += x * load<T>(r + i * stride + at);
            if (i < kept) shared += x * x;
        }
        store<T>(room.inner + at, inner);
        store<T>(room.shared + at, shared);
    }
}

void compare(const SimilarityArgs& args, const Tile& a, const Tile& b, Room& room) {
    products(args.left, args.n, args.width, a, b, room, room.u);
    products(args.right, args.m, args.width, a, b, room, room.r);
    for (int64_t i = a.first; i < a.end; ++i) {
        const int64_t row = args.starts[i] - a.column, rows = args.starts[i + 1] - args.starts[i];
        sum_rows(room.u + row * b.stride, room.r + row * b.stride, rows, args.kept[i], b.stride, b.width, room);
        for (int64_t j = max_(i, b.first); j < b.end; ++j) {
            const int64_t first = args.starts[j] - b.column, last = args.starts[j + 1] - b.column;
            double inner = 0, shared = 0;
            for (int64_t c = first; c < last; ++c) inner += double(room.inner[c]);
            for (int64_t c = first; c < first + args.kept[j]; ++c) shared += double(room.shared[c]);
            args.inner[i * args.k + j] = args.inner[j * args.k + i] = inner;
            args.shared[i * args.k + j] = args.shared[j * args.k + i] = shared;
        }
    }
}

}  // namespace

int similarity(const SimilarityArgs& args) {
    if (!args.k) return kDone;
    const Tiles tiles(args);
    const int64_t count = tiles.count();
    int64_t widest = kTile;
    for (int64_t i = 0; i < args.k; ++i) widest = max_(widest, args.starts[i + 1] - args.starts[i]);
    Workspace list;
    if (!list.reserve(size_t(count) * sizeof(Tile))) return kOutOfMemory;
    Tile* tile = reinterpret_cast<Tile*>(list.data());
    for (int64_t i = 0, t = 0; i < args.k; i = tile[t++].end) tile[t] = tiles.at(i);
    int status = kDone;
    Queue queue(count * count);
    on_team(int(min_<int64_t>(args.threads, count * (count + 1) / 2)), [&](int, int) {
        Room room{};
        Workspace memory;
        if (!memory.reserve(lay_out(nullptr, widest, room))) return set_shared<int>(status, kOutOfMemory);
        lay_out(memory.data(), widest, room);
        queue.take([&](int64_t pair) {
            const Tile &a = tile[pair / count], &b = tile[pair % count];
            // With a split, pairs of the two sides alone.
            if (pair / count <= pair % count && (!args.split || (a.first < args.split && b.first >= args.split)))
                compare(args, a, b, room);
        });
    });
    return status;
}

}  // namespace fastlora::FASTLORA_ISA
