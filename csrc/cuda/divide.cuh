// Divide and conquer: solved neighbours T1, T2 with coupling b are diag(T1, T2) + |b| u u', so in the basis of their
// vectors D + rho z z' (secular.cuh). Entries of z that are negligible, and pairs of equal d, deflate: their vectors
// stay as they are. The others are combined by a matrix product, a row of the vectors a thread; half of each row is
// zero before, so what there is of it fits the registers.
// All blocks of a level are joined side by side: thread t has row t of the vectors, pole and root t of its block.
// Algorithm: Cuppen 1981, LAPACK stedc / laed2.   Floor: without deflation 4/3 n^3 flops, and about 10 n^2 quotients.
#pragma once
#include "leaves.cuh"
#include "secular.cuh"

namespace fastlora::cuda {

constexpr int kDivideLargest = 128;
constexpr int kTileColumns = 4;  // of the matrix that combines vectors, formed at once

// Whether a matrix is divided: it has more than a leaf, and half of a row fits the registers.
__host__ __device__ inline bool divides(int n) { return n > kLeaf && n <= kDivideLargest; }

template <class T>
struct Divide {
    int n;
    Traced<T> vectors;  // [n, ld]: column c is a vector, of the block that its row belongs to
    int ld;
    Traced<T> values, off;    // [n]: the diagonal, then the eigenvalues; the couplings
    Traced<T> z, poles;       // [n]: of the columns, then of what is kept of a block from its first place on
    Traced<T> fitted;         // [n]: z of what is kept, then one over the lengths of the new vectors
    Traced<T> origin, shift;  // [n]: of the roots; cosines and sines of the deflation before
    Traced<T> tile;           // [2][vector_step(n), kTileColumns]; before, [n]: the ColumnPart of each column
    Traced<int> kept;         // [n]: columns that do not deflate, and get the new vectors; before, those of a block by
                              // ascending d
    Traced<int> lists;        // [n]: places among the kept that have a top part, and from the middle on a bottom part
    Traced<int> pairs;        // [n]: columns that are rotated, first + kDivideLargest · second
    Traced<int> counts;       // [n]: from a block's first place on, a BlockCount each
};

enum ColumnPart : int { kTop = 1, kBottom = 2, kBoth = 3 };  // where a column is not zero
enum BlockCount : int { kKept, kTops, kBottoms, kTurns };

// The block [low, high) of a thread's row at a level, joined of [low, middle) and [middle, high).
struct Joint {
    int low, middle, high, own;  // own: the thread's place in it
    bool joins;

    __device__ Joint(int n, int width, int t) {
        low = t < 0 ? 0 : t / (2 * width) * (2 * width);
        middle = low + width;
        high = low + 2 * width < n ? low + 2 * width : n;
        own = t - low;
        joins = t >= 0 && t < n && middle < n;
    }
};

// Rows t of the leaves' vectors: those of the identity. The cut couplings leave the diagonal.
template <class T>
__device__ void tear(const Divide<T>& m, int t) {
    if (t < 0 || t >= m.n) return;
    for (int c = 0; c < m.n; ++c) m.vectors[t * m.ld + c] = T(c == t);
    const int from = t % kLeaf == 0 ? t - 1 : t;  // the coupling beside this row, if one is cut
    const bool cuts = (t % kLeaf == 0 || t % kLeaf == kLeaf - 1) && from >= 0 && from + 1 < m.n;
    if (cuts) m.values[t] = m.values[t] - fabs(T(m.off[from]));
}

// By one thread: what of a block deflates, and the rotations that make it so. Its columns are in `kept`, of which the
// first are those kept in the end: never more than have been looked at.
template <class T>
__device__ void deflate(const Divide<T>& m, const Joint& joint, T rho) {
    const int low = joint.low;
    T largest = 0;
    for (int c = low; c < joint.high; ++c) largest = fmax(largest, fmax(fabs(T(m.values[c])), fabs(T(m.z[c]))));
    const T tolerance = 8 * kEpsilon<T> * largest;
    int count = 0, turns = 0, last = -1;
    for (int i = low; i < joint.high; ++i) {
        const int column = m.kept[i];
        const T own = m.z[column];
        if (rho * fabs(own) <= tolerance) continue;
        if (last >= 0) {
            const T other = m.z[last], above = m.values[column], below = m.values[last];
            const T norm = sqrt(own * own + other * other), c = own / norm, s = other / norm;
            if (fabs((above - below) * c * s) <= tolerance) {
                m.pairs[low + turns] = last + kDivideLargest * column;
                m.origin[low + turns] = c;
                m.shift[low + turns] = s;
                ++turns;
                m.values[last] = below * c * c + above * s * s;
                m.values[column] = below * s * s + above * c * c;
                m.z[column] = norm;
                if (T(m.tile[column]) != T(m.tile[last])) m.tile[column] = T(kBoth);
            } else {
                m.kept[low + count++] = last;
            }
        }
        last = column;
    }
    if (last >= 0) m.kept[low + count++] = last;
    int tops = 0, bottoms = 0;
    T square = 0;
    for (int j = 0; j < count; ++j) {
        const int column = m.kept[low + j], parts = int(m.tile[column]);
        const T own = m.z[column];
        m.poles[low + j] = m.values[column];
        m.fitted[low + j] = own;
        square += own * own;
        if (parts & kTop) m.lists[low + tops++] = j;
        if (parts & kBottom) m.lists[joint.middle + bottoms++] = j;
    }
    for (int j = tops; j % 4 != 0; ++j) m.lists[low + j] = 0;  // they are read by fours
    for (int j = bottoms; j % 4 != 0; ++j) m.lists[joint.middle + j] = 0;
    m.counts[low + kKept] = count;
    m.counts[low + kTops] = tops;
    m.counts[low + kBottoms] = bottoms;
    m.counts[low + kTurns] = turns;
    m.z[low] = square;  // which nobody needs by column any more
}

// Joins the blocks of `width` rows by twos. kHalf >= width. Returns whether this thread's root was found.
template <int kHalf, class T, class Group>
__device__ bool join_blocks(const Divide<T>& m, int width, Group& group) {
    const int t = group.index();
    const Joint joint(m.n, width, t);
    const int low = joint.low, middle = joint.middle, own = joint.own;
    const Traced<T> row = m.vectors + (t < 0 ? 0 : t) * m.ld;
    T rho = 0;
    if (joint.joins) {
        const T coupling = m.off[middle - 1], half = T(0.70710678118654752440);
        rho = 2 * fabs(coupling);
        const bool is_top = t < middle;
        m.z[t] = is_top ? half * m.vectors[(middle - 1) * m.ld + t]
                        : (coupling < 0 ? -half : half) * m.vectors[middle * m.ld + t];
        m.tile[t] = T(is_top ? kTop : kBottom);
        const T key = m.values[t];
        int rank = 0;
        for (int c = low; c < joint.high; ++c) {
            const T other = m.values[c];
            rank += other < key || (other == key && c < t);
        }
        m.kept[low + rank] = t;
    }
    group.sync();
    if (joint.joins && own == 0) deflate(m, joint, rho);
    group.sync();

    const int count = joint.joins ? int(m.counts[low + kKept]) : 0;
    const bool has_root = own < count && joint.joins;
    const Secular<T> secular{count, 1 / rho, m.poles + low, m.fitted + low,
                             count > 0 ? m.poles[low + count - 1] + 2 * rho * m.z[low] : T(0)};
    Root<T> root{0, 0, true};
    if (joint.joins) {
        const int turns = m.counts[low + kTurns];
        for (int i = 0; i < turns; ++i) {
            const int pair = m.pairs[low + i], first = pair % kDivideLargest, second = pair / kDivideLargest;
            const T c = m.origin[low + i], s = m.shift[low + i], x = row[first], y = row[second];
            row[first] = c * x - s * y;
            row[second] = c * y + s * x;
        }
        if (has_root) root = find_root(secular, own);
    }
    group.sync();  // the rotations have been read
    if (has_root) {
        m.origin[t] = root.origin;
        m.shift[t] = root.shift;
    }
    group.sync();
    if (has_root) m.z[t] = refitted(secular, own, m.origin + low, m.shift + low);
    group.sync();
    T weight = 0;
    if (has_root) {
        weight = m.z[t];
        m.fitted[t] = inverse_length(secular, m.z + low, root.origin, root.shift);
        m.values[m.kept[t]] = root.origin + root.shift;
    }

    // Row t of the old vectors, without the zeros of the other half.
    const bool is_top = t < middle;
    const Traced<int> list = m.lists + (is_top ? low : middle);
    const int parts = joint.joins ? int(m.counts[low + (is_top ? kTops : kBottoms)]) : 0;
    T old[kHalf];
#pragma unroll
    for (int j = 0; j < kHalf; ++j) old[j] = j < parts ? T(row[m.kept[low + list[j]]]) : T(0);
    int widest = 0;
    for (int c = 0; c + width < m.n; c += 2 * width) {
        const int of_block = m.counts[c + kKept];
        widest = of_block > widest ? of_block : widest;
    }
    if (widest > 0) group.sync();  // the lengths
    for (int k = 0; k < widest; k += kTileColumns) {
        const Traced<T> tile = m.tile + (k / kTileColumns % 2 * vector_step(m.n) + low) * kTileColumns;
        if (has_root) {
            T entries[kTileColumns] = {};
#pragma unroll
            for (int c = 0; c < kTileColumns; ++c) {
                if (k + c >= count) break;
                const T distance = (m.poles[t] - m.origin[low + k + c]) - m.shift[low + k + c];
                entries[c] = weight * quotient_of_one(distance) * m.fitted[low + k + c];
            }
            store_four(tile + own * kTileColumns, entries);
        }
        group.sync();
        T sums[kTileColumns] = {};
#pragma unroll
        for (int j = 0; j < kHalf; j += 4) {
            if (j >= parts) break;
            int places[4];
            load_four(list + j, places);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                T from[kTileColumns];
                load_four(tile + places[i] * kTileColumns, from);
#pragma unroll
                for (int c = 0; c < kTileColumns; ++c) sums[c] += old[j + i] * from[c];
            }
        }
#pragma unroll
        for (int c = 0; c < kTileColumns; ++c)
            if (k + c < count) row[m.kept[low + k + c]] = sums[c];
    }
    return root.found;
}

// From solved leaves to the eigensystem of the whole matrix; values and vectors as they come. Every thread of the
// group. kWidest: of the blocks that are joined last, at least half of n.
template <int kWidest, class T, class Group>
__device__ bool join_leaves(const Divide<T>& m, Group& group) {
    bool found = join_blocks<kLeaf>(m, kLeaf, group);
    if constexpr (kWidest >= 2 * kLeaf) {
        if (m.n > 2 * kLeaf) {
            group.sync();  // rows of other threads are read
            found &= join_blocks<2 * kLeaf>(m, 2 * kLeaf, group);
        }
    }
    if constexpr (kWidest >= 4 * kLeaf) {
        if (m.n > 4 * kLeaf) {
            group.sync();
            found &= join_blocks<4 * kLeaf>(m, 4 * kLeaf, group);
        }
    }
    return group.max(found ? T(0) : T(1)) == 0;
}

static_assert(kDivideLargest == 8 * kLeaf, "three levels join the leaves of the largest matrix that is divided");

}  // namespace fastlora::cuda
