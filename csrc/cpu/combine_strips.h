// The coefficients of a combine task as strips: all that one factor gives to the results, as one matrix.
#pragma once
#include "table.h"
#include "tile.h"

namespace fastlora::FASTLORA_ISA {

template <class T>
constexpr int kTileB = 64 / int(sizeof(T));  // rows of a tile on the B side: with all its results it stays in L1
template <class T>
constexpr int kTileA = 1024 / int(sizeof(T));  // columns of a tile on the A side: a factor's rows of it stay in L1
template <class T>
constexpr int kStrideA = kTileA<T> + kLanes<T>;  // a power of two would put all its rows into a few cache sets
template <class T>
constexpr int kWideA = 8192 / int(sizeof(T));  // columns of results that are computed together: a page of each row
constexpr int64_t kDeepest = 32;               // of products of several strips at once

// One task with the tables that it indexes.
struct CombineJob {
    const CombineTask* task;
    const Matrix* factors;         // of the task
    const CombineOutput* outputs;  // of the task
    const Matrix* matrices;
    const Term* terms;

    const Matrix& matrix(int64_t output) const { return matrices[outputs[output].matrix]; }
    int64_t rank(int64_t factor) const { return task->rows ? factors[factor].rows : factors[factor].cols; }
    // Columns (B side) or rows (A side) that an output takes of the results; none if it is written as it is stored.
    int64_t width(int64_t output) const {
        if (is_stored(output)) return 0;
        return task->rows ? matrix(output).rows : matrix(output).cols;
    }
    bool is_stored(int64_t output) const { return outputs[output].file >= 0 && matrix(output).data != 0; }
    // Of the long dimension of what has to be computed.
    int64_t length() const {
        for (int64_t o = 0; o < task->outputs; ++o)
            if (!is_stored(o)) return task->rows ? matrix(o).cols : matrix(o).rows;
        return 0;
    }
};

// results [.., out : out + width] += factor [.., depth] * values [depth, stride]   (B side; transposed on the A side)
template <class T>
struct Strip {
    int64_t factor, depth, out, width, stride;
    T* values;
};

template <class T>
struct Strips {
    Strip<T>* strip;
    int64_t count;
};

// scale * C of a term as stored: [r, q] on the B side, [q, r] on the A side.
inline double coefficient(const CombineJob& job, const Term& term, int64_t p, int64_t q) {
    const double* c = reinterpret_cast<const double*>(term.coefficient);
    return term.scale * (job.task->rows ? c[q * term.stride + p] : c[p * term.stride + q]);
}

inline double largest_coefficient(const CombineJob& job, const Term& term) {
    double largest = 0;
    for (int64_t p = 0; p < job.rank(term.factor); ++p)
        for (int64_t q = 0; q < term.columns; ++q) largest = max_(largest, abs_(coefficient(job, term, p, q)));
    return largest;
}

// Visits (term, first column of its output) of every coefficient of a factor.
template <class Visit>
inline void each_term(const CombineJob& job, int64_t factor, Visit visit) {
    int64_t first = 0;
    for (int64_t o = 0; o < job.task->outputs; first += job.width(o++))
        for (int64_t t = 0; t < job.outputs[o].terms; ++t) {
            const Term& term = job.terms[job.outputs[o].first_term + t];
            if (term.coefficient && term.factor == factor) visit(term, first + term.at);
        }
}

// Columns (B side) or rows (A side) of the results that a factor goes into: [first, last), or first = -1 for none.
struct Reach {
    int64_t first = -1, last = 0;
};

inline Reach reach_of(const CombineJob& job, int64_t factor) {
    Reach reach;
    each_term(job, factor, [&](const Term& term, int64_t out) {
        reach.first = reach.first < 0 ? out : min_(reach.first, out);
        reach.last = max_(reach.last, out + term.columns);
    });
    return reach;
}

// Takes memory for the strips and, where there is some, fills them.
template <class T>
void lay_out_strips(Arena& arena, bool fill, const CombineJob& job, Strips<T>& strips) {
    strips.strip = arena.take<Strip<T>>(job.task->factors);
    strips.count = 0;
    for (int64_t f = 0; f < job.task->factors; ++f) {
        const Reach reach = reach_of(job, f);
        if (reach.first < 0) continue;
        Strip<T> strip = {f, job.rank(f), reach.first, reach.last - reach.first, 0, nullptr};
        strip.stride = padded<T>(strip.width) + 2 * kLanes<T>;
        strip.values = arena.take<T>(size_t(strip.depth) * strip.stride);
        ++strips.count;
        if (!fill) continue;
        __builtin_memset(strip.values, 0, sizeof(T) * strip.depth * strip.stride);
        each_term(job, f, [&](const Term& term, int64_t out) {
            for (int64_t p = 0; p < strip.depth; ++p)
                for (int64_t q = 0; q < term.columns; ++q)
                    strip.values[p * strip.stride + out - strip.out + q] += T(coefficient(job, term, p, q));
        });
        strips.strip[strips.count - 1] = strip;
    }
}

// How many strips from s on are one product: they go into the same results, and their values follow one another.
template <class T>
inline int64_t strips_at_once(const Strips<T>& strips, int64_t s) {
    const Strip<T>& first = strips.strip[s];
    int64_t depth = first.depth, end = s + 1;
    for (; end < strips.count; ++end) {
        const Strip<T>& strip = strips.strip[end];
        const bool follows = strip.values == first.values + depth * first.stride;
        depth += strip.depth;
        if (strip.out != first.out || strip.width != first.width || !follows || depth > kDeepest) break;
    }
    return end - s;
}

}  // namespace fastlora::FASTLORA_ISA
