// A sample of 1/64 of the elements of an update, and the bracket of a rank that it gives.
// Its elements are spread over many rows and columns, a few of each: there are 32 groups, group g has every 32nd of the
// even rows, from row 2 g on, and every 32nd column, from column g on. How far the share above a threshold varies
// between rows and between columns says how wide the bracket must be.
#pragma once
#include "merge_former.h"
#include "merge_values.h"

namespace fastlora::FASTLORA_ISA {

constexpr int kGroups = 32;
constexpr int kOneOf = 64;
constexpr double kDeviations = 3;  // standard deviations of the sample on either side

// low <= the magnitude of the rank < high, it is hoped; `expected` elements are inside.
template <class T>
struct Bracket {
    T low, high;
    int64_t expected;
};

// The place of one thread. `args`: of whose updates (of all for variances) magnitudes are sampled.
template <class T>
class Sample {
  public:
    explicit Sample(const MergeArgs& args) : args_(args) {
        row_step_ = args.n >= 2 * kGroups ? 2 : 1;
        groups_ = min_<int64_t>(kGroups, min_(args.n / row_step_, args.m));
        column_step_ = max_<int64_t>(min_(kOneOf / (row_step_ * groups_), args.m / groups_), 1);
        rows_ = args.n / (row_step_ * groups_);
        columns_ = args.m / (column_step_ * groups_);
    }

    bool reserve() {
        int64_t ranks = 0;
        for (int64_t i = 0; i < args_.k; ++i) ranks = max_(ranks, args_.factors[2 * i].cols);
        const int64_t adapters = args_.variance ? args_.k : 1;
        Arena measure(nullptr);
        lay_out(measure, adapters, ranks);
        if (!memory_.reserve(measure.used())) return false;
        Arena arena(memory_.data());
        lay_out(arena, adapters, ranks);
        return true;
    }

    // False where there is no memory.
    bool find(const CutQuery& query, Bracket<T>& bracket) {
        CutQuery own = query;
        own.adapter = 0;
        MergeArgs part = args_;
        part.k = args_.variance ? args_.k : 1;
        part.n = rows_, part.m = columns_;
        part.factors = factors_;
        const int64_t first = args_.variance ? 0 : query.adapter;
        part.scales = args_.scales + first;
        part.queries = &own, part.n_queries = 1;
        const Pieces pieces{rows_, columns_, kPieceColumns};
        const bool wanted = true;
        Former<T> former(part);
        for (int64_t g = 0; g < groups_; ++g) {
            for (int64_t i = 0; i < part.k; ++i) choose(args_.factors + 2 * (first + i), i, g);
            if (!g && !former.reserve()) return false;  // as large for all groups
            T* to = values_ + g * rows_ * columns_;
            for (int64_t p = 0; p < pieces.count(); ++p)
                former.for_piece(pieces, p, &wanted, [&](int64_t, const T* x, const Place& place) {
                    for (int a = 0; a < place.rows; ++a)
                        for (int b = 0; b < place.columns; ++b) to[place.number(a, b)] = abs_(x[a * kPanel + b]);
                });
        }
        set(double(query.rank) / (double(args_.n) * double(args_.m)), bracket);
        return true;
    }

  private:
    void lay_out(Arena& arena, int64_t adapters, int64_t ranks) {
        values_ = arena.take<T>(size_t(count()));
        right_ = arena.take<T>(size_t(adapters * ranks * columns_));
        factors_ = arena.take<Matrix>(size_t(2 * adapters));
        bins_ = arena.take<int32_t>(Distribution<T>::kCount);
        by_column_ = arena.take<int32_t>(size_t(groups_ * columns_));
        room_ = ranks * columns_;
    }

    int64_t count() const { return groups_ * rows_ * columns_; }

    // The factors of a group: rows of B where they lie, columns of A in a place of their own.
    void choose(const Matrix* pair, int64_t i, int64_t group) {
        Matrix &B = factors_[2 * i], &A = factors_[2 * i + 1];
        B = pair[0];
        B.data += row_step_ * group * B.stride * element_size(B);
        B.rows = rows_;
        B.stride *= row_step_ * groups_;
        T* out = right_ + i * room_;
        A = {int64_t(out), pair[1].rows, columns_, columns_, int64_t(sizeof(T) == 8 ? DType::f64 : DType::f32)};
        with_type(pair[1], [&](auto e) {
            using E = decltype(e);
            const auto* from = reinterpret_cast<const typename E::Stored*>(pair[1].data) + column_step_ * group;
            for (int64_t p = 0; p < A.rows; ++p)
                for (int64_t c = 0; c < columns_; ++c)
                    *out++ = E::template load_one<T>(from + p * pair[1].stride + c * column_step_ * groups_);
        });
    }

    void set(double share, Bracket<T>& bracket) {
        const Distribution<T> distribution(values_, count(), bins_);
        const auto edge = [&](double at, bool beyond) {
            return distribution.edge(max_<int64_t>(min_(int64_t(at * double(count())), count()), 1), beyond);
        };
        const double off = kDeviations * deviation(share, edge(share, false));
        bracket.high = share - off > 0 ? edge(share - off, true) : T(__builtin_inf());
        bracket.low = share + off < 1 ? edge(share + off, false) : T(0);
        int64_t inside = 0;
        for (int64_t j = 0; j < count(); ++j) inside += (values_[j] >= bracket.low) & (values_[j] < bracket.high);
        bracket.expected = int64_t(double(inside) / double(count()) * double(args_.n) * double(args_.m));
    }

    // The standard deviation of the sampled share of values at or above a threshold.
    double deviation(double share, T threshold) {
        const int64_t rows = groups_ * rows_, columns = groups_ * columns_;
        for (int64_t c = 0; c < columns; ++c) by_column_[c] = 0;
        double squares = 0, sum = 0, of_columns = 0;
        const T* value = values_;
        for (int64_t r = 0; r < rows; ++r) {
            int32_t* own = by_column_ + r / rows_ * columns_;
            int32_t in_row = 0;
            for (int64_t c = 0; c < columns_; ++c) {
                const int32_t in = *value++ >= threshold;
                in_row += in;
                own[c] += in;
            }
            sum += in_row;
            squares += double(in_row) * in_row;
        }
        for (int64_t c = 0; c < columns; ++c) of_columns += double(by_column_[c]) * by_column_[c];
        const double mean = sum / double(count()), each = 1 / double(count());
        const double by_row = squares / double(columns_) / double(columns_) / double(rows) - mean * mean;
        const double by_column = of_columns / double(rows_) / double(rows_) / double(columns) - mean * mean;
        return sqrt_(max_(by_row, 0.0) / double(rows) + max_(by_column, 0.0) / double(columns) +
                     (share * (1 - share) + each) * each);
    }

    const MergeArgs& args_;
    int64_t row_step_, groups_, column_step_, rows_, columns_;
    int64_t room_ = 0;
    Workspace memory_;
    T *values_ = nullptr, *right_ = nullptr;
    Matrix* factors_ = nullptr;
    int32_t *bins_ = nullptr, *by_column_ = nullptr;
};

}  // namespace fastlora::FASTLORA_ISA
