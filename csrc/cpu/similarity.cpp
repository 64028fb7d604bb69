// similarity: of every two updates ΔW_i = U_i R_i of one module, U_i with orthonormal columns,
//     inner[i, j]  = sum over a, b of (U_i' U_j)[a, b] * (R_i R_j')[a, b] = <ΔW_i, ΔW_j>,
//     shared[i, j] = the squared norm of the first kept_i rows and kept_j columns of U_i' U_j.
// All U_i stand side by side in left [n, width], all R_i' in right [m, width]. Adapters are taken in bands of about 192
// columns; both products of two bands, and their sums, stay in the cache. Products are float32, in blocks of rows whose
// sums are then added: unit columns give them errors of about 1e-7. What is summed over blocks of r x r is float64.
// Pairs i <= j are computed and mirrored; one thread does all of a pair, in an order that depends on the two ranks and
// the lengths alone. Floor: (n + m) * width^2 operations (half of two products of whole stacks).
#include "parallel.h"
#include "similarity_amx.h"
#include "similarity_bands.h"
#include "table.h"
#include "tile.h"

namespace fastlora::FASTLORA_ISA {
namespace {

using T = float;

constexpr int64_t kBand = 192;  // columns of a band, but for an adapter that has more

// Products in vectors.
class VectorProducts {
  public:
    struct Unit {};

    // Memory for bands of up to `widest` columns; the size of it.
    size_t lay_out(char* base, int64_t widest) {
        Arena arena(base);
        left_ = arena.take<T>(size_t(kDepth * stride_of(widest)));
        right_ = arena.take<T>(size_t(kDepth * stride_of(widest)));
        block_ = arena.take<T>(size_t(rows_of(widest) * stride_of(widest)));
        return arena.used();
    }

    // Of results.
    static int64_t stride_of(int64_t width) { return padded<T>(width) + 3 * kLanes<T>; }
    static int64_t rows_of(int64_t width) { return width; }

    // out [a.width, b.stride] = the columns of a, transposed, times those of b
    void operator()(int, const Stack& stack, const Band& a, const Band& b, T* out) {
        for (int64_t row = 0; row < stack.length || row == 0; row += kDepth) {
            const int64_t depth = min_(kDepth, stack.length - row);
            pack(stack, a, row, depth, left_);
            pack(stack, b, row, depth, right_);
            T* const to = row ? block_ : out;
            product<T, true>(int(a.width), int(b.width), int(depth), left_, a.stride, 1, right_, b.stride, to,
                             b.stride);
            if (!row) continue;
            for (int64_t i = 0; i < a.width; ++i)
                for (int64_t j = 0; j < b.width; ++j) out[i * b.stride + j] += to[i * b.stride + j];
        }
    }

  private:
    static constexpr int64_t kDepth = 256;  // rows in a block of a product

    // Rows [row, row + depth) of a band's columns, zero up to the stride.
    static void pack(const Stack& stack, const Band& band, int64_t row, int64_t depth, T* out) {
        const T* p = stack.data + row * stack.width + band.column;
        for (int64_t i = 0; i < depth; ++i, p += stack.width, out += band.stride) {
            __builtin_memcpy(out, p, sizeof(T) * size_t(band.width));
            __builtin_memset(out + band.width, 0, sizeof(T) * size_t(band.stride - band.width));
        }
    }

    T *left_, *right_;  // [kDepth, stride]
    T* block_;          // as results
};

#if defined(__AMX_BF16__)
using Products = TileProducts;
#else
using Products = VectorProducts;
#endif

// All adapters in bands, to `band` if it is there; their number. No band reaches across the split.
int64_t divide(const SimilarityArgs& args, Band* band) {
    int64_t count = 0;
    for (int64_t first = 0, end; first < args.k; first = end, ++count) {
        const int64_t stop = first < args.split ? args.split : args.k;
        for (end = first + 1; end < stop && args.starts[end + 1] - args.starts[first] <= kBand;) ++end;
        const int64_t width = args.starts[end] - args.starts[first];
        if (band) band[count] = {first, end, args.starts[first], width, Products::stride_of(width)};
    }
    return count;
}

struct Room {
    Products products;
    T *u, *r;           // [rows of a, stride of b]
    T *inner, *shared;  // [stride of b]
};

size_t lay_out(char* base, int64_t widest, Room& room) {
    Arena arena(base);
    const size_t stride = size_t(Products::stride_of(widest)), rows = size_t(Products::rows_of(widest));
    room.u = arena.take<T>(rows * stride);
    room.r = arena.take<T>(rows * stride);
    room.inner = arena.take<T>(stride);
    room.shared = arena.take<T>(stride);
    const size_t own = arena.used();
    return own + room.products.lay_out(base ? base + own : nullptr, widest);
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

void compare(const SimilarityArgs& args, const Band& a, const Band& b, Room& room) {
    room.products(0, {args.left, args.n, args.width}, a, b, room.u);
    room.products(1, {args.right, args.m, args.width}, a, b, room.r);
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
    const int64_t count = divide(args, nullptr);
    int64_t widest = kBand;
    for (int64_t i = 0; i < args.k; ++i) widest = max_(widest, args.starts[i + 1] - args.starts[i]);
    Workspace list;
    if (!list.reserve(size_t(count) * sizeof(Band))) return kOutOfMemory;
    Band* band = reinterpret_cast<Band*>(list.data());
    divide(args, band);
    int status = kDone;
    Queue queue(count * count);
    on_team(int(min_<int64_t>(args.threads, count * (count + 1) / 2)), [&](int, int) {
        Room room{};
        Workspace memory;
        if (!memory.reserve(lay_out(nullptr, widest, room))) return set_shared<int>(status, kOutOfMemory);
        lay_out(memory.data(), widest, room);
        [[maybe_unused]] const Products::Unit unit{};
        queue.take([&](int64_t pair) {
            const Band &a = band[pair / count], &b = band[pair % count];
            // With a split, pairs of the two sides alone.
            if (pair / count <= pair % count && (!args.split || (a.first < args.split && b.first >= args.split)))
                compare(args, a, b, room);
        });
    });
    return status;
}

}  // namespace fastlora::FASTLORA_ISA
