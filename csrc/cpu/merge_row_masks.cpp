// merge_row_masks: masks whose probabilities follow the rank of an element in its row (DELLA), as bits.
// Rows are formed whole, 8 at a time and one adapter after the other, and sorted by digits of 11 bits: 3 passes over a
// row in float32, 6 in float64. That is the cost: about ten times that of forming the elements.
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

template <class T>
void mark_row(const MergeArgs& args, int64_t i, int64_t row, const T* x, Entry<T>* first, Entry<T>* second,
              double* bounds, uint64_t* bits) {
    using I = typename IntegerOf<T>::type;
    for (int64_t c = 0; c < args.m; ++c) first[c] = {__builtin_bit_cast(I, abs_(x[c])), int32_t(c)};
    const Entry<T>* in_order = sorted<T>(first, second, args.m);
    const double most = double(max_<int64_t>(args.m - 1, 1));
    for (int64_t rank = 0; rank < args.m; ++rank)
        bounds[in_order[rank].column] = (args.row_least[i] + args.row_span[i] * double(rank) / most) * 0x1p32;
    for (int64_t w = 0; w < (args.m + 63) / 64; ++w) bits[w] = 0;
    for_words(uint64_t(row * args.m), args.m, args.keys[i], args.module_key,
              [&](int64_t start, const uint32_t* words, int count) {
                  for (int j = 0; j < count; ++j) {
                      const int64_t c = start + j;
                      bits[c / 64] |= uint64_t(double(words[j]) < __builtin_floor(bounds[c])) << (c % 64);
                  }
              });
}

template <class T>
int run(const MergeArgs& args) {
    const int panel = int((args.m + kPanel - 1) / kPanel * kPanel);
    const int64_t bands = args.m ? (args.n + kBand - 1) / kBand : 0;
    int status = kDone;
    Queue queue(bands);
    on_team(int(min_<int64_t>(args.threads, bands)), [&](int, int) {
        Elements<T> elements(args, panel, 1);
        Workspace memory, entries;
        const size_t each = size_t(args.m) * sizeof(Entry<T>);
        if (!elements.reserve(memory) || !entries.reserve(2 * each + size_t(args.m) * sizeof(double)))
            return set_shared<int>(status, kOutOfMemory);
        double* bounds = reinterpret_cast<double*>(entries.data());
        Entry<T>* first = reinterpret_cast<Entry<T>*>(bounds + args.m);
        elements.set_columns(0, int(args.m));
        queue.take([&](int64_t band) {
            const int64_t row = band * kBand;
            const int rows = int(min_<int64_t>(kBand, args.n - row));
            elements.set_rows(row, rows);
            for (int g = 0; g < rows; g += kGroup)
                for (int64_t i = 0; i < args.k; ++i) {
                    const int now = min_(kGroup, rows - g);
                    const T* x = elements.form(i, g, now, 0);
                    for (int a = 0; a < now; ++a) {
                        uint64_t* bits = args.bits + (i * args.n + row + g + a) * ((args.m + 63) / 64);
                        mark_row<T>(args, i, row + g + a, x + int64_t(a) * panel, first, first + args.m, bounds, bits);
                    }
                }
        });
    });
    return status;
}

}  // namespace

int merge_row_masks(const MergeArgs& args) { return args.is_double ? run<double>(args) : run<float>(args); }

}  // namespace fastlora::FASTLORA_ISA
