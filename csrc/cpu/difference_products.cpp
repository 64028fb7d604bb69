// difference_products: of D = new - old [n, m], in one reading of both,
//     images    = D right - left      [n, width], or `left` itself where there is no right,
//     preimages = D' images           [m, width],
//     square    = |D|^2.
// D is formed in panels of 32 rows that stay in the cache, and both products are taken of each. Rows are cut into 8
// stretches, whatever the threads; a stretch sums its preimages for itself, and these sums are added in the order of
// the stretches. Floor: the bytes of both matrices, or 4 n m width operations.
#include <sched.h>

#include "difference_amx.h"
#include "difference_panel.h"
#include "parallel.h"
#include "table.h"
#include "tile.h"

namespace fastlora::FASTLORA_ISA {
namespace {

constexpr int kStretches = 8;

int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

// `Engine` is one arithmetic: it lays out its room, packs `right`, takes a panel, adds a thread's sums to those of all,
// and writes the preimages.
template <class Engine>
int run(const DifferenceArgs& args) {
    const int64_t length = round_up((args.n + kStretches - 1) / kStretches, kPanel);
    const int64_t stretches = length ? (args.n + length - 1) / length : 0;
    const int threads = int(min_<int64_t>(args.threads, max_<int64_t>(stretches, 1)));
    Engine shared(args);
    Workspace room;
    if (!room.reserve(shared.lay_out_shared(nullptr))) return kOutOfMemory;
    shared.lay_out_shared(room.data());
    for_stretches(threads, shared.packs(), [&](int64_t i) { shared.pack(i); });
    if (args.preimages) __builtin_memset(shared.total, 0, sizeof(double) * size_t(shared.sums()));
    double squares[kStretches] = {};
    int64_t added = 0;
    int status = kDone;
    Queue queue(stretches);
    on_team(threads, [&](int, int) {
        Engine engine = shared;
        Workspace own;
        bool has_room = own.reserve(engine.lay_out_own(nullptr));
        if (has_room)
            engine.lay_out_own(own.data());
        else
            set_shared<int>(status, kOutOfMemory);
        [[maybe_unused]] const typename Engine::Unit unit;
        queue.take([&](int64_t stretch) {
            if (has_room) {
                const int64_t end = min_((stretch + 1) * length, args.n);
                engine.start();
                for (int64_t row = stretch * length; row < end; row += kPanel)
                    engine.take({row, int(min_<int64_t>(kPanel, end - row))}, squares[stretch]);
            }
            if (!args.preimages) return;
            while (__atomic_load_n(&added, __ATOMIC_ACQUIRE) != stretch) sched_yield();
            if (has_room) engine.add();
            __atomic_store_n(&added, stretch + 1, __ATOMIC_RELEASE);
        });
    });
    if (status != kDone) return status;
    if (args.preimages) for_stretches(threads, shared.columns(), [&](int64_t i) { shared.write(i); });
    if (args.square) {
        *args.square = 0;
        for (double square : squares) *args.square += square;
    }
    return kDone;
}

// In T, with sums of D' images in T too, or of float32 panels in float64.
template <class T, class Sum>
struct Plain {
    struct Unit {
        ~Unit() {}
    };
    static constexpr int kChunk = 1024;  // columns that are read at once
    static constexpr int kBlock = 256;   // of D in a product

    const DifferenceArgs& args;
    int64_t stride, width;
    double* total;  // [m, width]
    T* right;       // [m, width]
    T *d, *old, *images, *block;
    Sum* part;  // [m, width]

    explicit Plain(const DifferenceArgs& a) : args(a), stride(padded<T>(a.m) + kLanes<T>), width(padded<T>(a.width)) {}

    size_t lay_out_shared(char* base) {
        Arena arena(base);
        total = args.preimages ? arena.take<double>(size_t(sums())) : nullptr;
        right = args.right ? arena.take<T>(size_t(args.m * width)) : nullptr;
        return arena.used();
    }
    size_t lay_out_own(char* base) {
        Arena arena(base);
        d = arena.take<T>(size_t(kPanel * stride));
        old = arena.take<T>(kChunk);
        images = arena.take<T>(size_t(kPanel * width));
        block = arena.take<T>(size_t(kBlock * width));
        part = args.preimages ? arena.take<Sum>(size_t(sums())) : nullptr;
        return arena.used();
    }

    int64_t sums() const { return args.m * width; }
    int64_t packs() const { return args.right ? args.m : 0; }
    int64_t columns() const { return args.m; }

    void pack(int64_t row) { spread(args.right + row * args.width, right + row * width); }
    void spread(const double* from, T* to) const {
        for (int64_t j = 0; j < args.width; ++j) to[j] = T(from[j]);
        for (int64_t j = args.width; j < width; ++j) to[j] = 0;
    }

    void start() {
        if (part) __builtin_memset(part, 0, sizeof(Sum) * size_t(sums()));
    }

    void form(const Panel& panel, double& square) {
        Vec<double> sum{};
        for (int64_t column = 0; column < args.m; column += kChunk)
            for (int i = 0; i < panel.rows; ++i) {
                const int count = int(min_<int64_t>(kChunk, args.m - column));
                T* out = d + i * stride + column;
                read_block<T>(*args.current, panel.row + i, column, 1, count, out, stride);
                if (args.old) {
                    read_block<T>(*args.old, panel.row + i, column, 1, count, old, stride);
                    int j = 0;
                    for (; j + kLanes<T> <= count; j += kLanes<T>)
                        store<T>(out + j, load<T>(out + j) - load<T>(old + j));
                    for (; j < count; ++j) out[j] -= old[j];
                }
                if (args.square) sum += squares(out, count);
            }
        if (args.square) square += sum_lanes<double>(sum);
    }

    static Vec<double> squares(const T* x, int count) {
        constexpr int lanes = kLanes<double>;
        Vec<double> sum{};
        int j = 0;
        for (; j + lanes <= count; j += lanes) {
            Vec<double> v;
            if constexpr (sizeof(T) == 4)
                v = Single::load_vector<double>(reinterpret_cast<const F32*>(x + j));
            else
                v = load<double>(x + j);
            sum += v * v;
        }
        for (; j < count; ++j) sum[0] += double(x[j]) * double(x[j]);
        return sum;
    }

    void take(const Panel& panel, double& square) {
        form(panel, square);
        const int w = int(args.width);
        for (int64_t k = 0; args.right && k < args.m; k += kBlock) {
            const int depth = int(min_<int64_t>(kBlock, args.m - k));
            if (k)
                product<T, false>(panel.rows, w, depth, d + k, 1, stride, right + k * width, width, images, width);
            else
                product<T, true>(panel.rows, w, depth, d, 1, stride, right, width, images, width);
        }
        for (int i = 0; i < panel.rows; ++i) {
            const int64_t at = (panel.row + i) * args.width;
            T* image = images + i * width;
            if (!args.right)
                spread(args.left + at, image);
            else if (args.left)
                for (int64_t j = 0; j < args.width; ++j) image[j] -= T(args.left[at + j]);
            if (args.images)
                for (int64_t j = 0; j < args.width; ++j) args.images[at + j] = double(image[j]);
        }
        if (!part) return;
        for (int64_t k = 0; k < args.m; k += kBlock) {
            const int columns = int(min_<int64_t>(kBlock, args.m - k));
            Sum* to = part + k * width;
            if constexpr (sizeof(T) == sizeof(Sum)) {
                product<T, false>(columns, w, panel.rows, d + k, stride, 1, images, width, to, width);
            } else {
                product<T, true>(columns, w, panel.rows, d + k, stride, 1, images, width, block, width);
                for (int64_t j = 0; j < columns * width; j += kLanes<double>)
                    store<double>(to + j, load<double>(to + j) + Single::load_vector<double>((const F32*)(block + j)));
            }
        }
    }

    void add() {
        for (int64_t i = 0; i < sums(); ++i) total[i] += double(part[i]);
    }

    void write(int64_t row) {
        __builtin_memcpy(args.preimages + row * args.width, total + row * width, sizeof(double) * size_t(args.width));
    }
};

}  // namespace

int difference_products(const DifferenceArgs& args) {
    if (args.precision == kWide) return run<Plain<double, double>>(args);
#if defined(__AMX_BF16__)
    return args.precision == kCoarse ? run<Tiles<1>>(args) : run<Tiles<2>>(args);
#else
    return args.precision == kCoarse ? run<Plain<float, float>>(args) : run<Plain<float, double>>(args);
#endif
}

}  // namespace fastlora::FASTLORA_ISA
