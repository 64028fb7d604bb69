// tucker: the way up from U, V on f(U, V) = sum_i |U' M_i V|^2, M_i = L_i R_i', by conjugate gradients on two Grassmann
// manifolds: fastlora/reference/tucker.py has the formulas. One thread does all of a module; its matrices stay in the
// second-level cache. With N = k r, a step has four products of [N, n] with c columns, and small ones: about
// 8 N (n + m) c + 10 N c^2 operations. Floor: those at the peak of float64.
#include "parallel.h"
#include "table.h"
#include "tile.h"

namespace fastlora::FASTLORA_ISA {
namespace {

using T = double;

constexpr T kRounding = 1e-16;  // what a step may gain, relative to all, below which it is rounding
constexpr T kLongest = 4;       // the longest step, as a tangent
constexpr T kShorter = 0.25;    // of a step that made it worse
constexpr int kTries = 12;

T dot(const T* a, const T* b, int64_t count) {  // count: a multiple of the lanes
    Vec<T> sum[2] = {};
    int64_t i = 0;
    for (; i + 2 * kLanes<T> <= count; i += 2 * kLanes<T>) {
        sum[0] += load<T>(a + i) * load<T>(b + i);
        sum[1] += load<T>(a + i + kLanes<T>) * load<T>(b + i + kLanes<T>);
    }
    for (; i < count; i += kLanes<T>) sum[0] += load<T>(a + i) * load<T>(b + i);
    return sum_lanes<T>(sum[0] + sum[1]);
}

// out = x + t y
void line(const T* x, T t, const T* y, T* out, int64_t count) {
    for (int64_t i = 0; i < count; i += kLanes<T>) store<T>(out + i, load<T>(x + i) + splat(t) * load<T>(y + i));
}

void scale(T* x, T t, int64_t count) {
    for (int64_t i = 0; i < count; i += kLanes<T>) store<T>(x + i, splat(t) * load<T>(x + i));
}

// out [c, stride] = C^-T of the Cholesky factor g = C C' of a positive g [c, stride], which is destroyed.
void inverse_root(T* g, T* out, int c, int stride) {
    for (int j = 0; j < c; ++j) {
        T* row = g + j * stride;
        for (int i = 0; i <= j; ++i) {
            const T* other = g + i * stride;
            T sum = row[i];
            for (int p = 0; p < i; ++p) sum -= row[p] * other[p];
            row[i] = i < j ? sum / other[i] : sqrt_(sum);
        }
    }
    for (int j = 0; j < c; ++j) {  // column j of C^-1 is row j of the result
        T* row = out + j * stride;
        for (int i = 0; i < stride; ++i) row[i] = 0;
        row[j] = 1 / g[j * stride + j];
        for (int i = j + 1; i < c; ++i) {
            T sum = 0;
            for (int p = j; p < i; ++p) sum -= g[i * stride + p] * row[p];
            row[i] = sum / g[i * stride + i];
        }
    }
}

// One of both sides at a point. All matrices have rows of `stride`, zero beyond c.
struct Side {
    const T* rows;  // [N, n]: the L_i'
    int n;
    T *base, *next, *moved;                   // [n]: U, that after a step, what is made orthonormal
    T *inside, *inside_next, *inside_moved;   // [N]: L_i' times those
    T *gradient, *before, *way, *inside_way;  // [n], [n], [n], [N]
    T *along, *square, *small, *root;         // [c]

    void carve(Arena& arena, int length, int64_t N, int64_t c, int64_t stride) {
        n = length;
        T** tall[] = {&base, &next, &moved, &gradient, &before, &way};
        T** stacked[] = {&inside, &inside_next, &inside_moved, &inside_way};
        T** square_ones[] = {&along, &square, &small, &root};
        for (T** x : tall) *x = arena.take<T>(size_t(n * stride));
        for (T** x : stacked) *x = arena.take<T>(size_t(N * stride));
        for (T** x : square_ones) *x = arena.take<T>(size_t(c * stride));
    }
};

struct Climb {
    Side left, right;
    T *inner, *turned;          // [k, c]: S_i = U' M_i V, and transposed
    T *next, *changed, *twice;  // [k, c]: S_i after a step, and its first and second order
    T* across;                  // [N]
    int64_t k, r, N, c, stride;

    size_t carve(char* base, const TuckerArgs& args) {
        Arena arena(base);
        k = args.k, r = args.r, N = k * r, c = args.c, stride = padded<T>(int(c));
        left.carve(arena, int(args.n), N, c, stride);
        right.carve(arena, int(args.m), N, c, stride);
        T** squares[] = {&inner, &turned, &next, &changed, &twice};
        for (T** x : squares) *x = arena.take<T>(size_t(k * c * stride));
        across = arena.take<T>(size_t(N * stride));
        return arena.used();
    }

    T* block(T* stacked, int64_t i) const { return stacked + i * r * stride; }
    T* square(T* stacked, int64_t i) const { return stacked + i * c * stride; }

    // out_i [c, c] (+)= a_i' b_i
    template <bool kFresh>
    void pairs(T* a, T* b, T* out) const {
        for (int64_t i = 0; i < k; ++i)
            product<T, kFresh>(int(c), int(c), int(r), block(a, i), stride, 1, block(b, i), stride, square(out, i),
                               stride);
    }

    // across_i [r, c] = a_i s_i
    void turn_blocks(T* a, T* s) const {
        for (int64_t i = 0; i < k; ++i)
            product<T, true>(int(r), int(c), int(c), block(a, i), 1, stride, square(s, i), stride, block(across, i),
                             stride);
    }

    void into(const Side& side, const T* x, T* out) const {  // out [N, c] = rows x
        product<T, true>(int(N), int(c), side.n, side.rows, 1, side.n, x, stride, out, stride);
    }
    void gram(const Side& side, const T* x, const T* y, T* out) const {  // out [c, c] = x' y
        product<T, true>(int(c), int(c), side.n, x, stride, 1, y, stride, out, stride);
    }
    void add_base(const Side& side, const T* s, T* out) const {  // out [n, c] += base s
        product<T, false>(side.n, int(c), int(c), side.base, 1, stride, s, stride, out, stride);
    }

    // The gradient is what of G = sum of L_i across_i is orthogonal to U; along = U' G.
    void look(Side& side) {
        T* last = side.before;
        side.before = side.gradient;
        side.gradient = last;
        product<T, true>(side.n, int(c), int(N), side.rows, side.n, 1, across, stride, side.gradient, stride);
        gram(side, side.base, side.gradient, side.along);
        for (int64_t i = 0; i < c * stride; i += kLanes<T>) store<T>(side.small + i, -load<T>(side.along + i));
        add_base(side, side.small, side.gradient);
    }

    // way = gradient + beta (way - U U' way)
    void turn(Side& side, T beta) {
        gram(side, side.base, side.way, side.small);
        scale(side.small, -beta, c * stride);
        line(side.gradient, beta, side.way, side.way, side.n * stride);
        add_base(side, side.small, side.way);
        into(side, side.way, side.inside_way);
        gram(side, side.way, side.way, side.square);
    }

    // U + t way, made orthonormal, and L_i' times that.
    void move(Side& side, T t) {
        line(side.base, t, side.way, side.moved, side.n * stride);
        line(side.inside, t, side.inside_way, side.inside_moved, N * stride);
        gram(side, side.moved, side.moved, side.small);
        inverse_root(side.small, side.root, int(c), int(stride));
        product<T, true>(side.n, int(c), int(c), side.moved, 1, stride, side.root, stride, side.next, stride);
        product<T, true>(int(N), int(c), int(c), side.inside_moved, 1, stride, side.root, stride, side.inside_next,
                         stride);
    }

    static void accept(Side& side) {
        T* x = side.base;
        side.base = side.next;
        side.next = x;
        x = side.inside;
        side.inside = side.inside_next;
        side.inside_next = x;
    }

    T trace(const T* x) const {
        T sum = 0;
        for (int64_t i = 0; i < c; ++i) sum += x[i * stride + i];
        return sum;
    }

    // Steps up to `most`; returns how many.
    int64_t run(int64_t most, T tolerance) {
        const int64_t all = k * c * stride;
        T before = 0;
        into(left, left.base, left.inside);
        into(right, right.base, right.inside);
        pairs<true>(left.inside, right.inside, inner);
        for (int64_t step = 0; step < most; ++step) {
            pairs<true>(right.inside, left.inside, turned);
            turn_blocks(right.inside, turned);
            look(left);
            turn_blocks(left.inside, inner);
            look(right);
            T steepness = 0, overlap = 0, last = 0;
            const Side* sides[] = {&left, &right};
            for (const Side* side : sides) {
                const int64_t count = side->n * stride;
                steepness += dot(side->gradient, side->gradient, count);
                overlap += dot(side->gradient, side->before, count);
                last += dot(side->gradient, side->way, count);
            }
            T beta = before > 0 ? max_((steepness - overlap) / before, T(0)) : 0;  // Polak and Ribiere
            if (!(steepness + beta * last > 0)) beta = 0;
            const T slope = steepness + beta * last;
            before = steepness;
            turn(left, beta);
            turn(right, beta);
            // f(t) = f + 2 t slope + t^2 bend + ...
            pairs<true>(left.inside_way, right.inside, changed);
            pairs<false>(left.inside, right.inside_way, changed);
            pairs<true>(left.inside_way, right.inside_way, twice);
            const T bend = dot(changed, changed, all) + 2 * dot(inner, twice, all) -
                           dot(left.square, left.along, c * stride) - dot(right.square, right.along, c * stride);
            const T length = sqrt_(max_(trace(left.square), trace(right.square)));
            if (!(length > 0)) return step;
            T t = bend < 0 ? min_(slope / -bend, kLongest / length) : 1 / length;
            if (!(slope * t > kRounding)) return step;
            const T kept = dot(inner, inner, all);
            T found = 0;
            for (int tries = 0;; ++tries, t *= kShorter) {
                if (tries == kTries) return step;
                move(left, t);
                move(right, t);
                pairs<true>(left.inside_next, right.inside_next, next);
                found = dot(next, next, all);
                if (found >= kept) break;
            }
            accept(left);
            accept(right);
            T* x = inner;
            inner = next;
            next = x;
            const T change = sqrt_(max_(1 - kept, T(0))) - sqrt_(max_(1 - found, T(0)));
            if (!(abs_(change) >= tolerance)) return step + 1;
        }
        return most;
    }
};

void spread(const T* from, T* to, int64_t rows, int64_t c, int64_t stride) {
    for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = 0; j < stride; ++j) to[i * stride + j] = j < c ? from[i * c + j] : 0;
}

void gather(const T* from, T* to, int64_t rows, int64_t c, int64_t stride) {
    for (int64_t i = 0; i < rows; ++i) __builtin_memcpy(to + i * c, from + i * stride, sizeof(T) * size_t(c));
}

}  // namespace

int tucker(const TuckerArgs& args) {
    int status = kDone;
    Queue queue(args.modules);
    on_team(int(min_<int64_t>(args.threads, args.modules)), [&](int, int) {
        Workspace memory;
        Climb climb{};
        const size_t needed = climb.carve(nullptr, args);
        if (!memory.reserve(needed)) return set_shared<int>(status, kOutOfMemory);
        queue.take([&](int64_t g) {
            __builtin_memset(memory.data(), 0, needed);
            climb.carve(memory.data(), args);
            climb.left.rows = args.left + g * climb.N * args.n;
            climb.right.rows = args.right + g * climb.N * args.m;
            spread(args.u + g * args.n * args.c, climb.left.base, args.n, args.c, climb.stride);
            spread(args.v + g * args.m * args.c, climb.right.base, args.m, args.c, climb.stride);
            args.steps[g] = climb.run(args.iterations, args.tolerance);
            gather(climb.left.base, args.u_end + g * args.n * args.c, args.n, args.c, climb.stride);
            gather(climb.right.base, args.v_end + g * args.m * args.c, args.m, args.c, climb.stride);
        });
    });
    return status;
}

}  // namespace fastlora::FASTLORA_ISA
