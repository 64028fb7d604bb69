// merge_select: the exact cuts that keep the q largest magnitudes of an update (or variances of places) of [n, m].
//
//   1. A sample of 1/64 of the elements, at regular rows and columns, brackets the q-th magnitude. How far the share
//      above a threshold varies between rows and between columns of the sample says how wide the bracket must be.
//   2. One pass counts the elements above the bracket and collects those inside. If the rank lies there, so does the
//      threshold, which a few rounds of counting find.
//   3. Where the sample misled, or too many are equal to be collected, the bits of magnitudes are counted 16 at a time:
//      floats that are not negative order as integers do. Two passes in float32, four in float64, always exact.
//   4. Only if some elements that are equal to the threshold are kept and some are not: one more pass counts them by
//      row, and one row is formed again.
//
// Nothing depends on the sample but the time. Floor: forming the elements once, r fused multiply-adds each, and
// 6 operations beside: size, two compares, two counts, a store.
#include "merge_elements.h"
#include "merge_trim.h"
#include "merge_values.h"
#include "table.h"

namespace fastlora::FASTLORA_ISA {
namespace {

constexpr int64_t kSmall = 1 << 14;  // elements of which no sample is taken: all are collected
constexpr int64_t kMost = 1 << 23;   // that a thread collects for a query
constexpr int kSampled = 8;          // every eighth row and column
constexpr double kDeviations = 3;    // standard deviations of the sample on either side
constexpr int kDigit = 16;           // bits of a pass of step 3
constexpr int64_t kPieceColumns = 1024;

template <class T>
struct Search {
    CutQuery* query;
    T low, high;    // bracket
    int64_t above;  // elements at least `high`
    bool found, overflowed;
    T value;
    int64_t left, equal;  // of those equal to value, `left` are kept
};

// What passes over the elements of queries share: one thread's place to form them.
template <class T>
class Former {
  public:
    explicit Former(const MergeArgs& args) : args_(args), elements_(args) {}
    bool reserve() { return elements_.reserve(memory_) && (!args_.variance || own_.reserve(kBytes)); }

    // f(query, magnitudes [rows, panel], place) for every query and group of a piece; columns beyond the last are NaN.
    template <class F>
    void for_piece(const Pieces& pieces, int64_t p, const bool* wanted, const F& f) {
        const int64_t row = pieces.row(p);
        elements_.set_rows(row, pieces.rows(p));
        for_groups(elements_, pieces.column(p), pieces.columns(p), pieces.rows(p), [&](int g, int rows) {
            const Place place{row + g, elements_.column(), args_.m, rows, elements_.columns(), kPanel};
            int64_t formed = -1;
            T* values = nullptr;
            for (int64_t q = 0; q < args_.n_queries; ++q) {
                if (!wanted[q]) continue;
                const int64_t adapter = args_.variance ? 0 : args_.queries[q].adapter;
                if (formed != adapter) {
                    values = form(adapter, g, rows);
                    pad(place, values);
                    formed = adapter;
                }
                f(q, values, place);
            }
        });
    }

  private:
    static constexpr size_t kBytes = size_t(kGroup) * kPanel * sizeof(T);

    T* form(int64_t adapter, int g, int rows) {
        if (!args_.variance) return elements_.form(adapter, g, rows, 0);
        for (int64_t i = 0; i < args_.k; ++i) elements_.form(i, g, rows);
        T* out = reinterpret_cast<T*>(own_.data());
        variances(elements_, args_.k, rows, out);
        return out;
    }

    static void pad(const Place& place, T* values) {
        for (int a = 0; place.columns < kPanel && a < place.rows; ++a)
            for (int b = place.columns; b < kPanel; ++b) values[a * kPanel + b] = T(__builtin_nan(""));
    }

    const MergeArgs& args_;
    Elements<T> elements_;
    Workspace memory_, own_;
};

// f(thread, former, piece) for all pieces; false where there is no memory.
template <class T, class F>
bool for_pieces(const MergeArgs& args, const Pieces& pieces, const F& f) {
    int status = kDone;
    Queue queue(pieces.count());
    on_team(int(min_<int64_t>(args.threads, pieces.count())), [&](int thread, int) {
        Former<T> former(args);
        if (!former.reserve()) return set_shared<int>(status, kOutOfMemory);
        queue.take([&](int64_t p) { f(thread, former, p); });
    });
    return status == kDone;
}

// ---- 1: the sample

// A module of every eighth row and column; `memory` holds its A.
template <class T>
bool sampled(const MergeArgs& args, MergeArgs& sample, Matrix* factors, Workspace& memory) {
    const int64_t step_n = max_<int64_t>(min_<int64_t>(kSampled, args.n / 64), 1);
    const int64_t step_m = max_<int64_t>(min_<int64_t>(kSampled * kSampled / step_n, args.m / 64), 1);
    sample = args;
    sample.n = args.n / step_n;
    sample.m = args.m / step_m;
    sample.factors = factors;
    int64_t ranks = 0;
    for (int64_t i = 0; i < args.k; ++i) ranks += args.factors[2 * i].cols;
    if (!memory.reserve(size_t(ranks * sample.m) * sizeof(T) + 1)) return false;
    T* out = reinterpret_cast<T*>(memory.data());
    for (int64_t i = 0; i < args.k; ++i) {
        factors[2 * i] = args.factors[2 * i];
        factors[2 * i].data += step_n / 2 * factors[2 * i].stride * element_size(factors[2 * i]);
        factors[2 * i].rows = sample.n;
        factors[2 * i].stride *= step_n;
        const Matrix& A = args.factors[2 * i + 1];
        factors[2 * i + 1] = {int64_t(out), A.rows, sample.m, sample.m,
                              int64_t(sizeof(T) == 8 ? DType::f64 : DType::f32)};
        with_type(A, [&](auto e) {
            using E = decltype(e);
            const auto* from = reinterpret_cast<const typename E::Stored*>(A.data) + step_m / 2;
            for (int64_t p = 0; p < A.rows; ++p)
                for (int64_t c = 0; c < sample.m; ++c)
                    *out++ = E::template load_one<T>(from + p * A.stride + c * step_m);
        });
    }
    return true;
}

// The standard deviation of the share of values [n, m] at or above a threshold that a sample of such rows and columns
// gives, from how the share varies between them.
template <class T>
double deviation(const T* values, int64_t n, int64_t m, T threshold, int32_t* columns) {
    for (int64_t c = 0; c < m; ++c) columns[c] = 0;
    double sum = 0, squares = 0;
    for (int64_t r = 0; r < n; ++r) {
        int32_t row = 0;
        for (int64_t c = 0; c < m; ++c) {
            const int32_t in = values[r * m + c] >= threshold;
            row += in;
            columns[c] += in;
        }
        const double share = double(row) / double(m);
        sum += share;
        squares += share * share;
    }
    const double mean = sum / double(n);
    double by_column = 0;
    for (int64_t c = 0; c < m; ++c) {
        const double off = double(columns[c]) / double(n) - mean;
        by_column += off * off;
    }
    const double by_row = max_(squares / double(n) - mean * mean, 0.0);
    return sqrt_(by_row / double(n) + by_column / double(m) / double(m)) + 1 / sqrt_(double(n) * double(m));
}

// The bracket of one query from the sampled magnitudes.
template <class T>
void set_bracket(const MergeArgs& args, const MergeArgs& sample, Search<T>& search, const T* values, int32_t* counts) {
    const int64_t count = sample.n * sample.m;
    const Distribution<T> distribution(values, count, counts);
    const double share = double(search.query->rank) / (double(args.n) * double(args.m));
    const auto edge = [&](double at, bool beyond) {
        return distribution.edge(max_<int64_t>(min_(int64_t(at * double(count)), count), 1), beyond);
    };
    int32_t* columns = counts + Distribution<T>::kCount;
    const double off = kDeviations * deviation(values, sample.n, sample.m, edge(share, false), columns);
    search.high = share - off > 0 ? edge(share - off, true) : T(__builtin_inf());
    search.low = share + off < 1 ? edge(share + off, false) : T(0);
}

template <class T>
bool set_brackets(const MergeArgs& args, Search<T>* searches) {
    MergeArgs sample;
    Workspace factors, stored, memory;
    if (!factors.reserve(size_t(2 * args.k) * sizeof(Matrix)) ||
        !sampled<T>(args, sample, reinterpret_cast<Matrix*>(factors.data()), stored))
        return false;
    const int64_t count = sample.n * sample.m, queries = args.n_queries;
    const int64_t counters = Distribution<T>::kCount + sample.m;
    if (!memory.reserve(size_t(queries) * (size_t(count) * sizeof(T) + size_t(counters) * sizeof(int32_t) + 1)))
        return false;
    T* values = reinterpret_cast<T*>(memory.data());
    int32_t* counts = reinterpret_cast<int32_t*>(values + count * queries);
    bool* wanted = reinterpret_cast<bool*>(counts + counters * queries);
    for (int64_t q = 0; q < queries; ++q) wanted[q] = searches[q].query->rank > 0;
    const Pieces pieces{sample.n, sample.m, kPieceColumns};
    const bool done = for_pieces<T>(sample, pieces, [&](int, Former<T>& former, int64_t p) {
        former.for_piece(pieces, p, wanted, [&](int64_t q, const T* x, const Place& place) {
            T* to = values + q * count;
            for (int a = 0; a < place.rows; ++a)
                for (int b = 0; b < place.columns; ++b) to[place.number(a, b)] = abs_(x[a * kPanel + b]);
        });
    });
    if (!done) return false;
    for_stretches(int(args.threads), queries, [&](int64_t q) {
        if (wanted[q]) set_bracket(args, sample, searches[q], values + q * count, counts + q * counters);
    });
    return true;
}

// ---- 2: one pass that counts and collects

// What the threads have collected for every query: [threads, queries].
template <class T>
struct Collections {
    Collected<T>* all;
    int64_t* above;
    int64_t threads, queries;

    Collections(int64_t threads, int64_t queries) : threads(threads), queries(queries) {
        all = static_cast<Collected<T>*>(calloc(size_t(threads * queries), sizeof(Collected<T>)));
        above = static_cast<int64_t*>(calloc(size_t(threads * queries), sizeof(int64_t)));
    }
    Collections(const Collections&) = delete;
    Collections& operator=(const Collections&) = delete;
    ~Collections() {
        for (int64_t i = 0; all && i < threads * queries; ++i) free(all[i].data);
        free(all);
        free(above);
    }
};

template <class T>
void search_collected(Collections<T>& collections, int64_t q, Search<T>& search) {
    if (search.found || search.overflowed) return;
    int64_t within = 0;
    for (int64_t t = 0; t < collections.threads; ++t) {
        within += collections.all[t * collections.queries + q].count;
        search.above += collections.above[t * collections.queries + q];
    }
    const int64_t rank = search.query->rank - search.above;
    if (rank < 1 || rank > within) return;
    const Ranked<T> result =
        ranked<T>(collections.all + q, int(collections.threads), collections.queries, search.low, search.high, rank);
    search.value = result.value, search.left = result.left, search.equal = result.equal;
    search.found = true;
}

template <class T>
bool collect(const MergeArgs& args, Search<T>* searches) {
    const int64_t queries = args.n_queries;
    Collections<T> collections(max_<int64_t>(args.threads, 1), queries);
    Workspace flags;
    if (!collections.all || !collections.above || !flags.reserve(size_t(queries))) return false;
    bool* wanted = reinterpret_cast<bool*>(flags.data());
    for (int64_t q = 0; q < queries; ++q) wanted[q] = !searches[q].found;
    const Pieces pieces{args.n, args.m, kPieceColumns};
    const bool done = for_pieces<T>(args, pieces, [&](int thread, Former<T>& former, int64_t p) {
        former.for_piece(pieces, p, wanted, [&](int64_t q, const T* x, const Place& place) {
            Search<T>& search = searches[q];
            Collected<T>& own = collections.all[thread * queries + q];
            if (!own.reserve(place.rows * kPanel, kMost)) return set_shared(search.overflowed, true);
            const T low = search.low, high = search.high;
            T* out = own.data + own.count;
            int64_t found = 0, larger = 0;
            for (int at = 0; at < place.rows * kPanel; at += kLanes<T>)
                larger += bracket<T>(abs<T>(load<T>(x + at)), low, high, out + found, &found);
            own.count += found;
            collections.above[thread * queries + q] += larger;
        });
    });
    if (done)
        for_stretches(int(args.threads), queries, [&](int64_t q) { search_collected(collections, q, searches[q]); });
    return done;
}

// ---- 3: counting by bits

template <class T>
bool count_bits(const MergeArgs& args, Search<T>& search, int64_t q) {
    using I = typename IntegerOf<T>::type;
    const int threads = int(max_<int64_t>(args.threads, 1));
    const size_t bins = size_t(1) << kDigit;
    Workspace memory, flags;
    if (!memory.reserve(size_t(threads) * bins * sizeof(int64_t)) || !flags.reserve(size_t(args.n_queries)))
        return false;
    int64_t* counts = reinterpret_cast<int64_t*>(memory.data());
    bool* wanted = reinterpret_cast<bool*>(flags.data());
    for (int64_t i = 0; i < args.n_queries; ++i) wanted[i] = i == q;
    const Pieces pieces{args.n, args.m, kPieceColumns};
    I upper = 0;
    search.left = search.query->rank;
    for (int shift = 8 * int(sizeof(T)) - kDigit; shift >= 0; shift -= kDigit) {
        __builtin_memset(counts, 0, size_t(threads) * bins * sizeof(int64_t));
        const bool done = for_pieces<T>(args, pieces, [&](int thread, Former<T>& former, int64_t p) {
            int64_t* own = counts + size_t(thread) * bins;
            former.for_piece(pieces, p, wanted, [&](int64_t, const T* x, const Place& place) {
                for (int a = 0; a < place.rows; ++a)
                    for (int b = 0; b < place.columns; ++b) {
                        const I digits = I(__builtin_bit_cast(I, abs_(x[a * kPanel + b])) >> shift);
                        if ((digits >> kDigit) == upper) ++own[size_t(digits) & (bins - 1)];
                    }
            });
        });
        if (!done) return false;
        for (size_t b = 0; b < bins; ++b)
            for (int t = 1; t < threads; ++t) counts[b] += counts[size_t(t) * bins + b];
        size_t bin = bins - 1;
        while (search.left > counts[bin]) search.left -= counts[bin--];
        upper = I((upper << kDigit) | I(bin));
        search.equal = counts[bin];
    }
    search.value = __builtin_bit_cast(T, upper);
    search.found = true;
    return true;
}

// ---- 4: which of the equals

template <class T>
bool order_of_last(const MergeArgs& args, Search<T>& search, int64_t q) {
    Workspace memory, flags;
    if (!memory.reserve(size_t(args.n) * sizeof(int64_t)) || !flags.reserve(size_t(args.n_queries))) return false;
    int64_t* by_row = reinterpret_cast<int64_t*>(memory.data());
    bool* wanted = reinterpret_cast<bool*>(flags.data());
    for (int64_t i = 0; i < args.n_queries; ++i) wanted[i] = i == q;
    for (int64_t r = 0; r < args.n; ++r) by_row[r] = 0;
    const Pieces bands{args.n, args.m, args.m};
    const bool done = for_pieces<T>(args, bands, [&](int, Former<T>& former, int64_t p) {
        former.for_piece(bands, p, wanted, [&](int64_t, const T* x, const Place& place) {
            for (int a = 0; a < place.rows; ++a)
                for (int b = 0; b < place.columns; ++b)
                    by_row[place.row + a] += abs_(x[a * kPanel + b]) == search.value;
        });
    });
    if (!done) return false;
    int64_t row = 0, left = search.left;
    while (left > by_row[row]) left -= by_row[row++];
    Former<T> former(args);
    if (!former.reserve()) return false;
    int64_t order = -1;
    former.for_piece(bands, row / kBand, wanted, [&](int64_t, const T* x, const Place& place) {
        for (int a = 0; a < place.rows; ++a)
            for (int b = 0; place.row + a == row && b < place.columns; ++b)
                if (abs_(x[a * kPanel + b]) == search.value && --left == 0) order = place.number(a, b) + 1;
    });
    search.query->order = order;
    return true;
}

// The number of magnitudes that are not 0: those above the bracket [0, least).
template <class T>
bool answer(const MergeArgs& args, Search<T>& search, int64_t q) {
    if (search.query->rank < 0) {
        search.query->order = search.above;
        return true;
    }
    if (search.query->rank == 0) {
        search.query->magnitude = __builtin_inf();
        search.query->order = 0;
        return true;
    }
    if (!search.found && !count_bits(args, search, q)) return false;
    search.query->magnitude = double(search.value);
    search.query->order = args.n * args.m;
    return search.value == T(0) || search.left == search.equal || order_of_last(args, search, q);
}

template <class T>
int run(const MergeArgs& args) {
    Workspace memory;
    if (!memory.reserve(size_t(args.n_queries) * sizeof(Search<T>))) return kOutOfMemory;
    Search<T>* searches = reinterpret_cast<Search<T>*>(memory.data());
    bool any = false;
    for (int64_t q = 0; q < args.n_queries; ++q) {
        CutQuery& query = args.queries[q];
        // Without a sample everything is inside. To count what is not 0, nothing is.
        const T least = query.rank < 0 ? next_above(T(0)) : T(0), most = query.rank < 0 ? least : T(__builtin_inf());
        searches[q] = {&query, least, most, 0, query.rank == 0, false, T(0), 0, 0};
        any |= query.rank > 0;
    }
    if (any && args.n * args.m > kSmall && !set_brackets(args, searches)) return kOutOfMemory;
    if (!collect(args, searches)) return kOutOfMemory;
    for (int64_t q = 0; q < args.n_queries; ++q)
        if (!answer(args, searches[q], q)) return kOutOfMemory;
    return kDone;
}

}  // namespace

int merge_select(const MergeArgs& args) { return args.is_double ? run<double>(args) : run<float>(args); }

}  // namespace fastlora::FASTLORA_ISA
