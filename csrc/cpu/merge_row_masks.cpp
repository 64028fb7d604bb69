// merge_row_masks: masks whose probabilities follow the rank of an element in its row (DELLA), as bits.
// Rows are formed whole, 8 at a time and one adapter after the other. An element stays where its word is below the
// bound of its rank, and few need their rank for that:
//
//   1. The word is below the least bound of a row, or not below the largest: most elements.
//   2. Magnitudes are counted in bins of 1/128 of an octave, so that a bin is a range of ranks. The word asks whether
//      the rank is above a number, which is seldom inside the range.
//   3. What is left is ranked exactly, by a comparison with the whole row. Rows of many equals, where much would be
//      left, are sorted by digits of 11 bits: 3 passes in float32, 6 in float64.
//
// Floor, per element: forming it, a word of Philox (about 3 operations), and a count in a bin. Measured: 18 times
// forming alone, of which words take a quarter and bins a fifth.
#include "merge_elements.h"
#include "philox.h"
#include "table.h"

namespace fastlora::FASTLORA_ISA {
namespace {

constexpr int kDigit = 11;
constexpr int kDigits = 1 << kDigit;

template <class T>
struct Entry {
    typename IntegerOf<T>::type key;
    int32_t column;
};

// Entries by key, of equals the first first. Returns where the sorted ones are: `a` or `b`.
template <class T>
Entry<T>* sorted(Entry<T>* a, Entry<T>* b, int64_t count) {
    constexpr int bits = 8 * int(sizeof(T)) - 1;
    for (int shift = 0; shift < bits; shift += kDigit) {
        int32_t starts[kDigits + 1] = {};
        for (int64_t i = 0; i < count; ++i) ++starts[((a[i].key >> shift) & (kDigits - 1)) + 1];
        for (int d = 0; d < kDigits; ++d) starts[d + 1] += starts[d];
        for (int64_t i = 0; i < count; ++i) b[starts[(a[i].key >> shift) & (kDigits - 1)]++] = a[i];
        Entry<T>* swap = a;
        a = b;
        b = swap;
    }
    return a;
}

constexpr int kBins = 1024;
constexpr int kRanked = 64;          // of a row that are ranked one by one
constexpr double kLeastSpan = 1e-6;  // of probabilities, below which ranks from words are not sure

// The bound of an element of a rank, of 2^32: its word stays below.
struct Bounds {
    double least, span, most;
    double of(int64_t rank) const { return __builtin_floor((least + span * double(rank) / most) * 0x1p32); }
};

template <class T>
struct RowWork {
    Entry<T>*first, *second;    // [m]
    double* bounds;             // [m]
    uint32_t* words;            // [m + 64]
    int32_t *bins, *undecided;  // [m + 64]: of every element; columns
    int32_t starts[kBins + 1];  // ranks of the first of a bin

    void carve(Arena& arena, int64_t m) {
        first = arena.take<Entry<T>>(size_t(m));
        second = arena.take<Entry<T>>(size_t(m));
        bounds = arena.take<double>(size_t(m));
        words = arena.take<uint32_t>(size_t(m) + 64);
        bins = arena.take<int32_t>(size_t(m) + 64);
        undecided = arena.take<int32_t>(size_t(m) + 64);
    }
};

// Which of 64 words are below a bound, of 2^32.
inline uint64_t below(const uint32_t* words, double bound) {
    if (!(bound >= 1)) return 0;
    if (bound >= 0x1p32) return ~uint64_t(0);
    const uint32_t last = uint32_t(bound) - 1;
    uint64_t set = 0;
#if defined(__AVX512F__)
    for (int j = 0; j < 64; j += 16)
        set |= uint64_t(_mm512_cmple_epu32_mask(_mm512_loadu_si512(words + j), _mm512_set1_epi32(int(last)))) << j;
#elif defined(__AVX2__)
    const __m256i limit = _mm256_set1_epi32(int(last));
    for (int j = 0; j < 64; j += 8) {
        const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(words + j));
        const __m256i within = _mm256_cmpeq_epi32(_mm256_max_epu32(x, limit), limit);
        set |= uint64_t(uint32_t(_mm256_movemask_ps(__m256(within)))) << j;
    }
#else
    for (int j = 0; j < 64; ++j) set |= uint64_t(words[j] <= last) << j;
#endif
    return set;
}

template <class T>
void mark_sorted(const T* x, int64_t m, const Bounds& bounds, RowWork<T>& w, uint64_t* bits) {
    using I = typename IntegerOf<T>::type;
    for (int64_t c = 0; c < m; ++c) w.first[c] = {__builtin_bit_cast(I, abs_(x[c])), int32_t(c)};
    const Entry<T>* in_order = sorted<T>(w.first, w.second, m);
    for (int64_t rank = 0; rank < m; ++rank) w.bounds[in_order[rank].column] = bounds.of(rank);
    for (int64_t c = 0; c < m; ++c) bits[c / 64] |= uint64_t(double(w.words[c]) < w.bounds[c]) << (c % 64);
}

// The bins of a row of magnitudes, and the ranks at which they start.
template <class T>
void count_bins(const T* x, int64_t m, RowWork<T>& w) {
    using I = typename IntegerOf<T>::type;
    constexpr int shift = sizeof(T) == 4 ? 23 - 7 : 52 - 7;
    Vec<T> largest{};
    for (int64_t c = 0; c < m; c += kLanes<T>) largest = max<T>(largest, abs<T>(load<T>(x + c)));
    const I base = max_<I>(__builtin_bit_cast(I, max_lane<T>(largest)) - (I(kBins - 1) << shift), 0);
    for (int64_t c = 0; c < m; c += kLanes<T>) {
        const Mask<T> over = (Mask<T>)abs<T>(load<T>(x + c)) - base;
        const Mask<T> bin = (over > 0 ? over : Mask<T>{}) >> shift;
        for (int b = 0; b < kLanes<T>; ++b) w.bins[c + b] = int32_t(bin[b]);
    }
    for (int b = 0; b <= kBins; ++b) w.starts[b] = 0;
    for (int64_t c = 0; c < m; ++c) ++w.starts[w.bins[c] + 1];
    for (int b = 0; b < kBins; ++b) w.starts[b + 1] += w.starts[b];
}

template <class T>
int64_t rank_of(const T* x, int64_t m, int64_t column) {
    const T size = abs_(x[column]);
    Mask<T> less{};
    int64_t rank = 0, c = 0;
    for (; c + kLanes<T> <= m; c += kLanes<T>) {
        const Vec<T> other = abs<T>(load<T>(x + c));
        less -= c + kLanes<T> <= column ? (Mask<T>)(other <= size) : (Mask<T>)(other < size);
    }
    for (int b = 0; b < kLanes<T>; ++b) rank += int64_t(less[b]);
    for (; c < m; ++c) rank += abs_(x[c]) < size;
    // Of equals the first are the lesser; those of whole vectors before the column are counted.
    const int64_t whole = min_(column, m) / kLanes<T> * kLanes<T>;
    for (int64_t i = whole; i < column; ++i) rank += abs_(x[i]) == size;
    return rank;
}

// x [m, rounded up to panels], the columns behind m zero.
template <class T>
void mark_row(const MergeArgs& args, int64_t i, int64_t row, const T* x, RowWork<T>& w, uint64_t* bits) {
    const int64_t m = args.m;
    const Bounds bounds{args.row_least[i], args.row_span[i], double(max_<int64_t>(m - 1, 1))};
    for_words(uint64_t(row * m), m, args.keys[i], args.module_key,
              [&](int64_t start, const uint32_t* words, int count) {
                  __builtin_memcpy(w.words + start, words, size_t(count) * sizeof *words);
              });
    const double first = bounds.of(0), last = bounds.of(m - 1), low = min_(first, last), high = max_(first, last);
    const auto there = [m](int64_t c) { return m - c < 64 ? (uint64_t(1) << (m - c)) - 1 : ~uint64_t(0); };
    if (bounds.span < kLeastSpan) {
        for (int64_t c = 0; c < m; c += 64) bits[c / 64] = below(w.words + c, low) & there(c);
        return low < high ? mark_sorted<T>(x, m, bounds, w, bits) : void();
    }
    count_bins<T>(x, m, w);
    // A word w stays from the rank (w + 1 - 2^32 least) / (2^32 span / most) on, up to rounding. Without branches: what
    // they would ask is random.
    const double step = 0x1p-32 / bounds.span * bounds.most, origin = step - bounds.least / bounds.span * bounds.most;
    constexpr int64_t margin = 2;
    int64_t ranked = 0;
    for (int64_t c = 0; c < m; c += 64) {
        uint64_t kept = below(w.words + c, low);
        for (uint64_t left = below(w.words + c, high) & ~kept & there(c); left; left &= left - 1) {
            const int b = __builtin_ctzll(left), bin = w.bins[c + b];
            const int64_t rank = int64_t(double(w.words[c + b]) * step + origin);
            const bool above = w.starts[bin] >= rank + margin, beneath = w.starts[bin + 1] <= rank - margin;
            kept |= uint64_t(above) << b;
            w.undecided[ranked] = int32_t(c + b);
            ranked += !(above | beneath);
        }
        bits[c / 64] = kept & there(c);
    }
    const auto mark = [bits](int64_t c) { bits[c / 64] |= uint64_t(1) << (c % 64); };
    if (ranked > kRanked) return mark_sorted<T>(x, m, bounds, w, bits);
    for (int64_t u = 0; u < ranked; ++u)
        if (double(w.words[w.undecided[u]]) < bounds.of(rank_of<T>(x, m, w.undecided[u]))) mark(w.undecided[u]);
}

template <class T>
int run(const MergeArgs& args) {
    const int panel = int((args.m + kPanel - 1) / kPanel * kPanel);
    // Groups of rows, as many for every thread, also where there are few.
    const int64_t groups = (args.n + kGroup - 1) / kGroup, team = max_<int64_t>(args.threads, 1);
    const int64_t band_rows = max_<int64_t>(min_<int64_t>(kBand, (groups + team - 1) / team * kGroup), kGroup);
    const int64_t bands = args.m ? (args.n + band_rows - 1) / band_rows : 0;
    int status = kDone;
    Queue queue(bands);
    on_team(int(min_<int64_t>(args.threads, bands)), [&](int, int) {
        Elements<T> elements(args, panel, 1);
        Workspace memory, rows_memory;
        RowWork<T> work;
        Arena measure(nullptr);
        work.carve(measure, args.m);
        if (!elements.reserve(memory) || !rows_memory.reserve(measure.used()))
            return set_shared<int>(status, kOutOfMemory);
        Arena arena(rows_memory.data());
        work.carve(arena, args.m);
        elements.set_columns(0, int(args.m));
        queue.take([&](int64_t band) {
            const int64_t row = band * band_rows;
            const int rows = int(min_<int64_t>(band_rows, args.n - row));
            elements.set_rows(row, rows);
            for (int g = 0; g < rows; g += kGroup)
                for (int64_t i = 0; i < args.k; ++i) {
                    const int now = min_(kGroup, rows - g);
                    const T* x = elements.form(i, g, now, 0);
                    for (int a = 0; a < now; ++a) {
                        uint64_t* bits = args.bits + (i * args.n + row + g + a) * ((args.m + 63) / 64);
                        mark_row<T>(args, i, row + g + a, x + int64_t(a) * panel, work, bits);
                    }
                }
        });
    });
    return status;
}

}  // namespace

int merge_row_masks(const MergeArgs& args) { return args.is_double ? run<double>(args) : run<float>(args); }

}  // namespace fastlora::FASTLORA_ISA
