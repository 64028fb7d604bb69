// merge_tiles: a rule on the elements of k updates of one module [n, m], tile by tile.
//
// A thread takes a band of 128 rows (of products M' thin: a panel of 64 columns) and goes through it in groups of 8
// rows and 64 columns: their elements of all adapters are formed (merge_elements.h), trimmed (merge_trim.h) and merged
// (merge_rule.h) in the L1 cache. The merged tile goes to `out`, or is multiplied by a thin matrix in float64. Nothing
// of the size of the module is kept.
//
// Sums over places (squares, counts, products) are taken in the order of rows and columns, in pieces whose size is
// fixed, and pieces are added in their order: neither threads nor the order in which they take pieces matter.
//
// Floor of a pass, per element and adapter: r fused multiply-adds, and for the rule about 12 operations: load, size,
// compare, select, twice, since signs are elected first; vote, flip, compare and two sums. Bytes: factors once, which
// stay in the L2 cache, and `out` once (twice with `add`). With r = 16 and vectors of 16 lanes that is 16 + 6 cycles a
// vector where an fma takes one cycle and other operations half of one: arithmetic is the limit, not memory.
// Measured (docs/benchmarks.md), times forming alone at the rate of a large product: a sum 2.5, TIES 3.2, DARE 5.3.
#include "merge_rule.h"
#include "merge_trim.h"
#include "table.h"

namespace fastlora::FASTLORA_ISA {
namespace {

constexpr int kSums = 3;  // |x|, |v|, v^2

// What a piece adds to sums over all places.
struct PieceSums {
    double square;
    Tally tally;
};

template <class T>
class Pass {
  public:
    explicit Pass(const MergeArgs& args) : args_(args), elements_(args) {}

    bool reserve() {
        if (!elements_.reserve(elements_memory_)) return false;
        Arena measure(nullptr);
        lay_out(measure);
        if (!memory_.reserve(measure.used())) return false;
        Arena arena(memory_.data());
        lay_out(arena);
        for (int64_t i = 0; i < args_.k; ++i) {
            votes_[i] = args_.votes ? T(args_.votes[i]) : T(1);
            gains_[i] = T(args_.gains[i]);
            shares_[i] = args_.shares ? T(args_.shares[i]) : T(0);
            limits_[i] = bounds_[i] = T(0);
        }
        rule_ = {bounds_,          votes_,         gains_,         shares_, T(args_.least),
                 T(args_.instead), T(args_.scale), args_.zero < 0, args_.k};
        const bool shares = args_.shares != nullptr, tally = args_.counts != nullptr;
        merge_ = chosen_merge<T>(args_.elect, shares, tally);
        return true;
    }

    // A band of rows, from one column to another.
    void run(int64_t row, int rows, int64_t column, int64_t columns, PieceSums& found, double* sums) {
        elements_.set_rows(row, rows);
        if (args_.thin && !args_.transposed) zero(product_, int64_t(rows) * args_.width);
        for_panels(column, columns, rows, found, sums, [&](int64_t c, int count) {
            if (args_.thin)  // of the band: += M [rows, count] thin [count, width]
                product<double, false>(rows, int(args_.width), count, wide_, 1, kPanel, args_.thin + c * args_.width,
                                       args_.width, product_, args_.width);
        });
        if (args_.thin)
            __builtin_memcpy(args_.product + row * args_.width, product_, size_t(rows * args_.width) * sizeof(double));
    }

    // A panel of columns, all bands: += M' [columns, rows] thin [rows, width], in the order of rows.
    void run_transposed(int64_t column, int columns, PieceSums& found, double* sums) {
        zero(product_, int64_t(kPanel) * args_.width);
        for (int64_t row = 0; row < args_.n; row += kBand) {
            const int rows = int(min_<int64_t>(kBand, args_.n - row));
            elements_.set_rows(row, rows);
            for_panels(column, columns, rows, found, sums, [&](int64_t, int) {
                product<double, false>(columns, int(args_.width), rows, wide_, kPanel, 1,
                                       args_.thin + row * args_.width, args_.width, product_, args_.width);
            });
        }
        __builtin_memcpy(args_.product + column * args_.width, product_,
                         size_t(columns * args_.width) * sizeof(double));
    }

  private:
    void lay_out(Arena& arena) {
        limits_ = arena.take<T>(size_t(args_.k));
        bounds_ = arena.take<T>(size_t(args_.k));
        votes_ = arena.take<T>(size_t(args_.k));
        gains_ = arena.take<T>(size_t(args_.k));
        shares_ = arena.take<T>(size_t(args_.k));
        merged_ = arena.take<T>(kGroup * kPanel);
        variance_ = arena.take<T>(kGroup * kPanel);
        wide_ = arena.take<double>(kBand * kPanel);
        product_ = arena.take<double>(args_.thin ? size_t(kBand * args_.width) : 0);
    }

    static void zero(double* p, int64_t count) { __builtin_memset(p, 0, size_t(count) * sizeof(double)); }

    // after(column, columns) sees the merged panel of the band in wide_.
    template <class F>
    void for_panels(int64_t column, int64_t columns, int rows, PieceSums& found, double* sums, const F& after) {
        for (int64_t c = column; c < column + columns; c += kPanel) {
            const int count = int(min_<int64_t>(kPanel, column + columns - c));
            elements_.set_columns(c, count);
            for (int g = 0; g < rows; g += kGroup) {
                const int now = min_(kGroup, rows - g);
                form_and_trim({elements_.row() + g, c, args_.m, now, count, kPanel}, g, sums);
                merge_(rule_, elements_.x(0), kPanel, now, merged_, found.tally);
                found.square += take(g, now, count);
            }
            after(c, count);
        }
    }

    void form_and_trim(const Place& place, int g, double* sums) {
        for (int64_t i = 0; i < args_.k; ++i) {
            T* x = elements_.form(i, g, place.rows);
            if (sums) add_sizes(place, x, sums + kSums * i);
            if (args_.trim == kMagnitude) {
                if (args_.high) trim_high(place, T(args_.high[i]), args_.high_order[i], x);
                limits_[i] = trim_low(place, T(args_.low[i]), args_.low_order[i], x, x);
                bounds_[i] = bound_below(limits_[i]);
            } else if (args_.trim == kRandom) {
                trim_random(place, args_.keep[i], args_.keys[i], args_.module_key, x);
            } else if (args_.trim == kBits) {
                trim_bits(place, args_.bits + i * args_.n * ((args_.m + 63) / 64), x);
            }
        }
        if (args_.trim == kVariance) trim_by_variance(place);
        if (sums)
            for (int64_t i = 0; i < args_.k; ++i) add_kept(place, elements_.x(i), limits_[i], sums + kSums * i);
    }

    void trim_by_variance(const Place& place) {
        variances(elements_, args_.k, place.rows, variance_);
        const T limit = trim_low(place, T(args_.low[0]), args_.low_order[0], variance_, variance_);
        for (int64_t i = 0; i < args_.k; ++i)
            for (int at = 0; at < place.rows * kPanel; at += kLanes<T>) {
                T* x = elements_.x(i) + at;
                store<T>(x, load<T>(variance_ + at) >= limit ? load<T>(x) : Vec<T>{});
            }
    }

    // Lanes of double from x on.
    static Vec<double> wide(const T* x) {
        if constexpr (sizeof(T) == 8) {
            return load<double>(x);
        } else {
            typename Bits<double>::Float narrow;
            __builtin_memcpy(&narrow, x, sizeof narrow);
            return from_float<double>(narrow);
        }
    }

    // Columns beyond the last are zero.
    static void add_sizes(const Place& place, const T* x, double* sums) {
        Vec<double> size{};
        for (int at = 0; at < place.rows * kPanel; at += kLanes<double>) size += abs<double>(wide(x + at));
        sums[0] += sum_lanes<double>(size);
    }

    static void add_kept(const Place& place, const T* x, T limit, double* sums) {
        Vec<double> size{}, square{};
        const double least = double(limit);
        for (int at = 0; at < place.rows * kPanel; at += kLanes<double>) {
            const Vec<double> value = abs<double>(wide(x + at)), kept = value >= least ? value : Vec<double>{};
            size += kept;
            square += kept * kept;
        }
        sums[1] += sum_lanes<double>(size);
        sums[2] += sum_lanes<double>(square);
    }

    // The merged group: to `out`, and for a product in float64 to the panel of the band. Returns the sum of its
    // squares.
    double take(int g, int rows, int columns) {
        double* to = wide_ + g * kPanel;
        Vec<double> square{};
        for (int at = 0; at < rows * kPanel; at += kLanes<double>) {
            const Vec<double> value = wide(merged_ + at);
            if (args_.thin) store<double>(to + at, value);
            square += value * value;
        }
        if (args_.out) with_type(*args_.out, [&](auto e) { put<decltype(e)>(g, rows, columns); });
        return sum_lanes<double>(square);
    }

    template <class E>
    void put(int g, int rows, int columns) {
        using Stored = typename E::Stored;
        const Matrix& out = *args_.out;
        for (int a = 0; a < rows; ++a) {
            Stored* to =
                reinterpret_cast<Stored*>(out.data) + (elements_.row() + g + a) * out.stride + elements_.column();
            const T* from = merged_ + a * kPanel;
            int b = 0;
            for (; b + kLanes<T> <= columns; b += kLanes<T>) {
                Vec<T> value = load<T>(from + b);
                if (args_.add) value += E::template load_vector<T>(to + b);
                E::template store_vector<T>(to + b, value);
            }
            for (; b < columns; ++b)
                E::template store_one<T>(to + b, args_.add ? from[b] + E::template load_one<T>(to + b) : from[b]);
        }
    }

    const MergeArgs& args_;
    Elements<T> elements_;
    Workspace elements_memory_, memory_;
    RuleNumbers<T> rule_{};
    MergeGroup<T> merge_ = nullptr;
    T *limits_ = nullptr, *bounds_ = nullptr, *votes_ = nullptr, *gains_ = nullptr, *shares_ = nullptr;
    T *merged_ = nullptr, *variance_ = nullptr;
    double *wide_ = nullptr, *product_ = nullptr;
};

template <class T>
int run(const MergeArgs& args) {
    // A product needs whole rows (or whole columns) in one hand; else a band is cut further.
    const bool transposed = args.thin && args.transposed;
    const Pieces pieces{args.n, args.m, args.thin ? max_<int64_t>(args.m, 1) : 1024};
    const int64_t count = transposed ? (args.m + kPanel - 1) / kPanel : args.m ? pieces.count() : 0;
    const int64_t sums = args.sums ? kSums * args.k : 0;
    Workspace memory;
    if (!memory.reserve(size_t(count) * (sizeof(PieceSums) + size_t(sums) * sizeof(double)) + 1)) return kOutOfMemory;
    PieceSums* found = reinterpret_cast<PieceSums*>(memory.data());
    double* piece_sums = reinterpret_cast<double*>(found + count);
    for (int64_t p = 0; p < count; ++p) found[p] = PieceSums{};
    for (int64_t i = 0; i < count * sums; ++i) piece_sums[i] = 0;
    int status = kDone;
    Queue queue(count);
    on_team(int(min_<int64_t>(args.threads, count)), [&](int, int) {
        Pass<T> pass(args);
        if (!pass.reserve()) return set_shared<int>(status, kOutOfMemory);
        queue.take([&](int64_t p) {
            double* own = sums ? piece_sums + p * sums : nullptr;
            if (transposed)
                pass.run_transposed(p * kPanel, int(min_<int64_t>(kPanel, args.m - p * kPanel)), found[p], own);
            else
                pass.run(pieces.row(p), pieces.rows(p), pieces.column(p), pieces.columns(p), found[p], own);
        });
    });
    *args.square = 0;
    for (int64_t p = 0; p < count; ++p) {
        *args.square += found[p].square;
        if (args.counts) args.counts[0] += found[p].tally.undecided, args.counts[1] += found[p].tally.majority;
        for (int64_t i = 0; i < sums; ++i) args.sums[i] += piece_sums[p * sums + i];
    }
    return status;
}

}  // namespace

int merge_tiles(const MergeArgs& args) { return args.is_double ? run<double>(args) : run<float>(args); }

}  // namespace fastlora::FASTLORA_ISA
