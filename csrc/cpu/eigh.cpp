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

    void carve(Arena& arena, int n) {
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

int64_t groups_of(int64_t batch, int size) { return (batch + size - 1) / size; }

template <class T>
int solve_large(const EighBatch<T>& b, int threads) {
    const int n = b.n, size = large_group<T>(n);
    const int64_t groups = groups_of(b.batch, size);
    int status = kDone;
    Queue queue(groups);
    on_team(int(min_<int64_t>(threads, groups)), [&](int, int) {
        Workspace memory;
        LargeEighWork<T> work;
        Arena needed(nullptr);
        work.carve(needed, n, size);
        if (!memory.reserve(needed.used())) return set_shared<int>(status, kOutOfMemory);
        Arena arena(memory.data());
        work.carve(arena, n, size);
        queue.take([&](int64_t g) {
            const int64_t at = g * size;
            eigh_large<T>(b.a + at * n * n, n, b.values + at * n, b.vectors + at * n * n, b.info + at,
                          int(min_<int64_t>(size, b.batch - at)), n, work);
        });
    });
    return status;
}

// Of matrices that fill a lane each, whatever their batch.
template <class T>
int solve_small(const EighBatch<T>* batches, int count, int threads) {
    const auto groups_in = [=](int i) {
        return batches[i].n > 0 && batches[i].n < kLargeFrom<T> ? groups_of(batches[i].batch, kLanes<T>) : 0;
    };
    int64_t groups = 0;
    for (int i = 0; i < count; ++i) groups += groups_in(i);
    int status = kDone;
    Queue queue(groups);
    on_team(int(min_<int64_t>(threads, groups)), [&](int, int) {
        Workspace memory;
        EighWork<T> work;
        size_t most = 0;
        for (int i = 0; i < count; ++i) {
            Arena needed(nullptr);
            work.carve(needed, batches[i].n);
            if (groups_in(i)) most = max_(most, needed.used());
        }
        if (!memory.reserve(most)) return set_shared<int>(status, kOutOfMemory);
        int carved = 0;
        queue.take([&](int64_t g) {
            int i = 0;
            for (; g >= groups_in(i); ++i) g -= groups_in(i);
            const EighBatch<T>& b = batches[i];
            const int n = b.n;
            if (n != carved) {
                Arena arena(memory.data());
                work.carve(arena, n);
                carved = n;
            }
            const int64_t at = g * kLanes<T>;
            solve_group<T>(b.a + at * n * n, b.values + at * n, b.vectors + at * n * n, b.info + at,
                           int(min_<int64_t>(kLanes<T>, b.batch - at)), n, work);
        });
    });
    return status;
}

}  // namespace

template <class T>
int eigh_of_sizes(const EighBatch<T>* batches, int count, int threads) {
    bool some_small = false;
    for (int i = 0; i < count; ++i) {
        const EighBatch<T>& b = batches[i];
        if (b.batch == 0 || b.n == 0) continue;
        some_small |= b.n < kLargeFrom<T>;
        const int status = b.n < kLargeFrom<T> ? kDone : solve_large<T>(b, threads);
        if (status != kDone) return status;
    }
    return some_small ? solve_small<T>(batches, count, threads) : kDone;
}

template <class T>
int eigh(const T* a, T* values, T* vectors, int32_t* info, int64_t batch, int n, int threads) {
    const EighBatch<T> one{a, values, vectors, info, batch, n};
    return eigh_of_sizes<T>(&one, 1, threads);
}

template int eigh(const float*, float*, float*, int32_t*, int64_t, int, int);
template int eigh(const double*, double*, double*, int32_t*, int64_t, int, int);
template int eigh_of_sizes(const EighBatch<double>*, int, int);

}  // namespace fastlora::FASTLORA_ISA
