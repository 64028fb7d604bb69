// The elements of updates group by group, as often as a pass asks for them.
#pragma once
#include "merge_elements.h"
#include "merge_trim.h"

namespace fastlora::FASTLORA_ISA {

constexpr int64_t kPieceColumns = 1024;

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

}  // namespace fastlora::FASTLORA_ISA
