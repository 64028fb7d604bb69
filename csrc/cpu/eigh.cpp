// Eigenvalues and eigenvectors of a batch of symmetric matrices, A = V diag(w) V'.
//   a [batch, n, n] row-major, lower triangle read     values [batch, n] ascending
//   vectors [batch, n, n]: row j is eigenvector j; its entry of largest magnitude (the first of equals) is
//   positive, so the result is a function of the matrix alone
// Large matrices are solved one at a time (large_eigh.h), small ones kLanes at a time, one per lane: scale by a
// power of two, reduce to tridiagonal form (lanes_tridiagonal.h), diagonalise by implicit QL (lanes_ql.h), rank, and
// unpack. A matrix with a NaN or an infinity becomes zero in its lane and NaN in the output. Floor: small, (8/3 + 10)
// n^3 flops per matrix, n <= 32 bound by the rotation recurrence; large, 14/3 n^3.
#include "lanes_interleave.h"
#include "lanes_ql.h"
#include "lanes_tridiagonal.h"
#include "large_eigh.h"
#include "parallel.h"
#include "table.h"

namespace fastlora::FASTLORA_ISA {
namespace {

// From here one matrix fills the lanes better than many that no longer fit the cache together.
template <class T>
constexpr int kLargeFrom = sizeof(T) == 4 ? 96 : 64;

template <class T>
struct EighWork {
    size_t ld;     // odd: even strides of whole cache lines collide in few cache sets
    Vec<T>* a;     // [n, ld]
    Vec<T>* q;     // [n, ld]
    Vec<T>* work;  // [2 n]
    Tridiagonal<T> tri;
    Mask<T>* rank;    // [n]
    Vec<T>* largest;  // [n]
    Vec<T>* sign;     // [n]
    SweepQueue<T> queue;

    void carve(Arena& arena, int n, int /*matrices*/) {
        ld = size_t(n) | 1;
        a = arena.take<Vec<T>>(n * ld);
        q = arena.take<Vec<T>>(n * ld);
        work = arena.take<Vec<T>>(2 * n);
        tri = {arena.take<Vec<T>>(n), arena.take<Vec<T>>(n), arena.take<Vec<T>>(n)};
        rank = arena.take<Mask<T>>(n);
        largest = arena.take<Vec<T>>(n);
        sign = arena.take<Vec<T>>(n);
        queue.capacity = sweep_capacity(n, kVectorBytes);
        queue.stride = n;
        queue.rotations = arena.take<Rotation<T>>(size_t(queue.capacity) * n);
    }
};

// sign[j] = sign of the entry of largest magnitude of column j of q.
template <class T>
void choose_signs(const Vec<T>* q, size_t ld, int n, Vec<T>* largest, Vec<T>* sign) {
    for (int j = 0; j < n; ++j) largest[j] = Vec<T>{}, sign[j] = splat<T>(1);
    for (int i = 0; i < n; ++i) {
        for (int j = 0; j < n; ++j) {
            const Vec<T> x = q[i * ld + j], size = abs<T>(x);
            const Mask<T> larger = (Mask<T>)(size > largest[j]);
            largest[j] = larger ? size : largest[j];
            sign[j] = larger ? (x < Vec<T>{} ? splat<T>(-1) : splat<T>(1)) : sign[j];
        }
    }
}

template <class T>
void solve_group(const T* a, T* values, T* vectors, int32_t* info, int count, int n, EighWork<T>& w) {
    Group<T> group = interleave<T>(a, count, n, n, true, w.a, 1, w.ld);
    Vec<T> scale[2];
    choose_scale<T>(group, 0, scale);
    for (int c = 0; c < n; ++c)
        for (int i = c; i < n; ++i) w.a[c * w.ld + i] = scaled<T>(w.a[c * w.ld + i], scale, group.non_finite);

    const bool reflects = tridiagonalise<T>(w.a, w.ld, n, w.tri, w.work);
    form_q<T>(w.a, w.ld, w.tri.tau, n, reflects, w.q);
    const Mask<T> failed = diagonalise<T>(w.tri.diagonal, w.tri.off, n, w.q, w.ld, n, w.queue);

    rank_ascending<T>(w.tri.diagonal, w.rank, n);
    choose_signs<T>(w.q, w.ld, n, w.largest, w.sign);
    deinterleave_values<T>(w.tri.diagonal, group, w.rank, n, values);
    deinterleave<T>(w.q, 1, w.ld, w.sign, w.rank, count, n, n, vectors);
    for (int b = 0; b < count; ++b) {
        info[b] = group.non_finite[b] ? kNonFinite : failed[b] ? kNotConverged : kOk;
        if (info[b] != kNonFinite) continue;
        fill_nan(values + size_t(b) * n, n);
        fill_nan(vectors + size_t(b) * n * n, size_t(n) * n);
    }
}

// Runs solve(item, work) for every item, on up to `threads` threads with a Work each.
template <class Work, class Solve>
int for_each(int64_t items, int n, int size, int threads, Solve solve) {
    threads = int(min_<int64_t>(threads, items));
    int status = kDone;
    Queue queue(items);
    on_team(threads, [&](int, int) {
        Workspace memory;
        Work work;
        Arena needed(nullptr);
        work.carve(needed, n, size);
        if (!memory.reserve(needed.used())) return set_shared<int>(status, kOutOfMemory);
        Arena arena(memory.data());
        work.carve(arena, n, size);
        queue.take([&](int64_t i) { solve(i, work); });
    });
    return status;
}

}  // namespace

template <class T>
int eigh(const T* a, T* values, T* vectors, int32_t* info, int64_t batch, int n, int threads) {
    if (batch == 0 || n == 0) return kDone;
    // A group takes whole vectors of lanes: of matrices, or of leaves.
    const bool large = n >= kLargeFrom<T>;
    const int size = large ? large_group<T>(n) : kLanes<T>;
    const int64_t groups = (batch + size - 1) / size;
    const auto range = [=](int64_t g) { return int(min_<int64_t>(size, batch - g * size)); };
    if (large)
        return for_each<LargeEighWork<T>>(groups, n, size, threads, [=](int64_t g, LargeEighWork<T>& work) {
            const int64_t at = g * size;
            eigh_large<T>(a + at * n * n, n, values + at * n, vectors + at * n * n, info + at, range(g), n, work);
        });
    return for_each<EighWork<T>>(groups, n, size, threads, [=](int64_t g, EighWork<T>& work) {
        const int64_t at = g * size;
        solve_group<T>(a + at * n * n, values + at * n, vectors + at * n * n, info + at, range(g), n, work);
    });
}

template int eigh(const float*, float*, float*, int32_t*, int64_t, int, int);
template int eigh(const double*, double*, double*, int32_t*, int64_t, int, int);

}  // namespace fastlora::FASTLORA_ISA
