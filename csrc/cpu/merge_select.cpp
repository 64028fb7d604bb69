// merge_select: the exact cuts that keep the q largest magnitudes of an update (or variances of places) of [n, m].
//
//   1. A sample of 1/64 of the elements brackets the q-th magnitude (merge_sample.h).
//   2. One pass counts the elements above the bracket and collects those inside. If the rank lies there, so does the
//      threshold, which a few rounds of counting find.
//   3. Where the sample misled, or too many are equal to be collected, the bits of magnitudes are counted 16 at a time:
//      floats that are not negative order as integers do. Two passes in float32, four in float64, always exact.
//   4. Only if some elements that are equal to the threshold are kept and some are not: one more pass counts them by
//      row, and one row is formed again.
//
// Nothing depends on the sample but the time. Floor: forming the elements once, r fused multiply-adds each, and
// 6 operations beside: size, two compares, two counts, a store. Measured: 2.9 times forming alone, half of the updates
// with step 4.
#include "merge_sample.h"
#include "table.h"

namespace fastlora::FASTLORA_ISA {
namespace {

constexpr int64_t kSmall = 1 << 14;  // elements of which no sample is taken: all are collected
constexpr int64_t kMost = 1 << 23;   // that a thread collects for a query
constexpr int kDigit = 16;           // bits of a pass of step 3

template <class T>
struct Search {
    CutQuery* query;
    Bracket<T> bracket;
    int64_t above;  // elements at least its `high`
    bool found, overflowed;
    T value;
    int64_t left, equal;  // of those equal to value, `left` are kept
};

// ---- 1: the sample

template <class T>
bool set_brackets(const MergeArgs& args, Search<T>* searches) {
    int status = kDone;
    Queue queue(args.n_queries);
    on_team(int(min_(args.threads, args.n_queries)), [&](int, int) {
        Sample<T> sample(args);
        if (!sample.reserve()) return set_shared<int>(status, kOutOfMemory);
        queue.take([&](int64_t q) {
            const CutQuery& query = *searches[q].query;
            if (query.rank > 0 && !sample.find(query, searches[q].bracket)) set_shared<int>(status, kOutOfMemory);
        });
    });
    return status == kDone;
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
    const Ranked<T> result = ranked<T>(collections.all + q, int(collections.threads), collections.queries,
                                       search.bracket.low, search.bracket.high, rank);
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
            const int64_t expected = min_<int64_t>(search.bracket.expected / collections.threads * 5 / 4, kMost);
            if (!own.reserve(place.rows * kPanel, kMost, expected)) return set_shared(search.overflowed, true);
            const T low = search.bracket.low, high = search.bracket.high;
            T* out = own.data + own.count;
            Above<T> above;
            for (int at = 0; at < place.rows * kPanel; at += kLanes<T>)
                out += bracket<T>(abs<T>(load<T>(x + at)), low, high, out, above);
            own.count = out - own.data;
            collections.above[thread * queries + q] += above.sum();
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
            for (int a = 0; a < place.rows; ++a) {  // columns behind the last are NaN
                Mask<T> equal{};
                for (int b = 0; b < kPanel; b += kLanes<T>)
                    equal -= (Mask<T>)(abs<T>(load<T>(x + a * kPanel + b)) == search.value);
                for (int b = 0; b < kLanes<T>; ++b) by_row[place.row + a] += int64_t(equal[b]);
            }
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

// The number of magnitudes above one: those that are not below the empty bracket [least, least).
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
        // Without a sample everything is inside. To count what is above a magnitude, nothing is.
        const bool counted = query.rank < 0;
        const T least = counted ? next_above(T(query.magnitude)) : T(0), most = counted ? least : T(__builtin_inf());
        searches[q] = {&query, {least, most, 0}, 0, query.rank == 0, false, T(0), 0, 0};
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
