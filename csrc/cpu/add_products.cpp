// add_products: W' = W + sum over pairs of s L R, rounded once; W [n, m] lies in memory or in a file, W' too.
//
// A thread takes a tile of rows: all their columns, so that a tile is one stretch of the file. It is read into memory
// of the thread's own, changed there while it is in the L2 cache, and written from there. Of the factors, s L of the
// tile and R of a block of columns are converted once, side by side for all pairs, and stay in the caches; sums of 8
// rows and 3 vectors are formed in registers, from zero on, and W is added to them as they are rounded. A sum runs over
// the columns of L in their order, so its bits depend neither on tiles nor on threads.
//
// Floor: bytes of W read and of W' written once (by the system: copied between its pages and the tile), r fused
// multiply-adds an element. For bfloat16 and r = 16 that is 8 cycles a vector of 16 where two start in a cycle, and
// about 4 more for loading, adding, rounding and storing it: the system takes as long.
#include "combine_results.h"
#include "fastlora/files.h"
#include "parallel.h"
#include "table.h"
#include "tile.h"

namespace fastlora::FASTLORA_ISA {
namespace {

constexpr int kGroup = 8;                   // rows whose sums are formed at once
constexpr int64_t kTileBytes = 512 << 10;   // of W and W' together with what follows in the L2 cache
constexpr int64_t kBlockBytes = 512 << 10;  // of R that is gone through for each group of rows
constexpr int64_t kRowsInMemory = 128;      // of a tile that needs no reading
template <class T>
constexpr int kPanel = 3 * kLanes<T>;

// to = from + sums, rounded; without sums the conversion alone.
template <class From, class To, class T, bool kSums>
void finish_as(int rows, int columns, const T* sums, const void* w, int64_t w_stride, void* out, int64_t out_stride,
               Peak<T>& peak) {
    constexpr int lanes = kLanes<T>;
    const auto* from = static_cast<const typename From::Stored*>(w);
    auto* to = static_cast<typename To::Stored*>(out);
    for (int i = 0; i < rows; ++i, sums += kPanel<T>, from += w_stride, to += out_stride) {
        int j = 0;
        for (; j + lanes <= columns; j += lanes) {
            Vec<T> x = From::template load_vector<T>(from + j);
            if constexpr (kSums) x += load<T>(sums + j);
            peak.note(x);
            To::template store_vector<T>(to + j, x);
        }
        for (; j < columns; ++j) {
            T x = From::template load_one<T>(from + j);
            if constexpr (kSums) x += sums[j];
            peak.note(x);
            To::template store_one<T>(to + j, x);
        }
    }
}

template <class T>
class Adder {
  public:
    explicit Adder(const AddArgs& args) : args_(args), tall_(rows_of_tile(args)) {}

    static int64_t rows_of_tile(const AddArgs& args) {
        if (args.from_file < 0) return kRowsInMemory;
        const int64_t row = max_<int64_t>(1, args.from->cols * (element_size(*args.from) + element_size(*args.to)) / 2);
        return max_<int64_t>(1, kTileBytes / row / kGroup) * kGroup;
    }

    bool reserve() {
        Arena measure(nullptr);
        lay_out(measure);
        if (!memory_.reserve(measure.used())) return false;
        Arena arena(memory_.data());
        lay_out(arena);
        for (int64_t s = 0; s < args_.n_segments; ++s) pack_right(args_.segments[s], right_ + start_of(s));
        return true;
    }

    // Rows [row, row + rows).
    AddProblem run(int64_t row, int64_t rows) {
        Matrix from = *args_.from, to = *args_.to;
        const int64_t from_row = from.stride * element_size(from), to_row = to.stride * element_size(to);
        if (args_.from_file >= 0) {
            from.data = int64_t(from_tile_), to.data = int64_t(to_tile_);
            const int error =
                read_all(int(args_.from_file), from_tile_, rows * from_row, args_.from_offset + row * from_row);
            if (error) return {error == kEndOfFile ? kShortSource : kSourceError, error};
        } else {
            from.data += row * from_row, to.data += row * to_row;
        }
        Peak<T> peak;
        for (int64_t s = 0; s < args_.n_segments; ++s) run_segment(s, row, int(rows), from, to, peak);
        if (!peak.fits(to)) {
            Matrix written = to;
            written.rows = rows;
            if (!finite(written)) return {kResultNotFinite, 0};
        }
        if (args_.to_file < 0) return {kAdded, 0};
        const int error = write_all(args_.to_file, to_tile_, rows * to_row, args_.to_offset + row * to_row);
        return {error ? kTargetError : kAdded, error};
    }

  private:
    int64_t depth(const AddSegment& s) const {
        int64_t sum = 0;
        for (int64_t p = s.first_pair; p < s.first_pair + s.pairs; ++p) sum += args_.factors[2 * p].cols;
        return sum;
    }
    static int64_t panels(const AddSegment& s) { return (s.width + kPanel<T> - 1) / kPanel<T>; }
    int64_t right_size(const AddSegment& s) const { return panels(s) * depth(s) * kPanel<T>; }
    int64_t start_of(int64_t segment) const {
        int64_t sum = 0;
        for (int64_t s = 0; s < segment; ++s) sum += right_size(args_.segments[s]);
        return sum;
    }

    void lay_out(Arena& arena) {
        int64_t deepest = 0;
        for (int64_t s = 0; s < args_.n_segments; ++s) deepest = max_(deepest, depth(args_.segments[s]));
        right_ = arena.take<T>(size_t(start_of(args_.n_segments)));
        left_ = arena.take<T>(size_t(tall_ * deepest));
        sums_ = arena.take<T>(size_t(kGroup * kPanel<T>));
        if (args_.from_file < 0) return;
        from_tile_ = arena.take<char>(size_t(tall_ * args_.from->stride * element_size(*args_.from)));
        const bool same = args_.from->dtype == args_.to->dtype;
        to_tile_ = same ? from_tile_ : arena.take<char>(size_t(tall_ * args_.to->stride * element_size(*args_.to)));
    }

    // Panels of kPanel columns, one after the other; in each the rows of all R. Columns beyond the last are zero.
    void pack_right(const AddSegment& s, T* out) {
        const int64_t k = depth(s);
        for (int64_t panel = 0; panel < panels(s); ++panel) {
            const int columns = int(min_<int64_t>(kPanel<T>, s.width - panel * kPanel<T>));
            for (int64_t p = s.first_pair; p < s.first_pair + s.pairs; ++p) {
                const Matrix& R = args_.factors[2 * p + 1];
                read_block<T>(R, 0, panel * kPanel<T>, int(R.rows), columns, out, kPanel<T>);
                out += R.rows * kPanel<T>;
            }
            for (T* row = out - k * kPanel<T>; columns < kPanel<T> && row < out; row += kPanel<T>)
                for (int j = columns; j < kPanel<T>; ++j) row[j] = T(0);
        }
    }

    // s L of some rows, side by side for all pairs: [rows, k].
    void pack_left(const AddSegment& s, int64_t k, int64_t row, int rows) {
        T* out = left_;
        for (int64_t p = s.first_pair; p < s.first_pair + s.pairs; ++p) {
            const Matrix& L = args_.factors[2 * p];
            const T scale = T(args_.scales[p]);
            read_block<T>(L, row, 0, rows, int(L.cols), out, k);
            for (int i = 0; i < rows; ++i)
                for (int64_t j = 0; j < L.cols; ++j) out[i * k + j] *= scale;
            out += L.cols;
        }
    }

    void run_segment(int64_t index, int64_t row, int rows, const Matrix& from, const Matrix& to, Peak<T>& peak) {
        const AddSegment& s = args_.segments[index];
        const int64_t k = depth(s);
        if (!k && from.data == to.data) return;
        pack_left(s, k, row, rows);
        const T* right = right_ + start_of(index);
        const int64_t block = max_<int64_t>(1, kBlockBytes / int64_t(sizeof(T)) / max_<int64_t>(1, k * kPanel<T>));
        for (int64_t first = 0; first < panels(s); first += block) {
            const int64_t last = min_(first + block, panels(s));
            for (int g = 0; g < rows; g += kGroup) {
                const int now = min_(kGroup, rows - g);
                for (int64_t panel = first; panel < last; ++panel) {
                    const int64_t column = panel * kPanel<T>;
                    const int columns = int(min_<int64_t>(kPanel<T>, s.width - column));
                    if (k)
                        product<T, true>(now, columns, int(k), left_ + g * k, 1, k, right + panel * k * kPanel<T>,
                                         kPanel<T>, sums_, kPanel<T>);
                    finish(now, columns, k > 0, from, to, g, s.left + column, peak);
                }
            }
        }
    }

    void finish(int rows, int columns, bool sums, const Matrix& from, const Matrix& to, int row, int64_t column,
                Peak<T>& peak) {
        const char* w = reinterpret_cast<const char*>(from.data) + (row * from.stride + column) * element_size(from);
        char* out = reinterpret_cast<char*>(to.data) + (row * to.stride + column) * element_size(to);
        with_type(from, [&](auto f) {
            with_type(to, [&](auto t) {
                using From = decltype(f);
                using To = decltype(t);
                if (sums)
                    finish_as<From, To, T, true>(rows, columns, sums_, w, from.stride, out, to.stride, peak);
                else
                    finish_as<From, To, T, false>(rows, columns, sums_, w, from.stride, out, to.stride, peak);
            });
        });
    }

    const AddArgs& args_;
    int64_t tall_;
    Workspace memory_;
    T *right_ = nullptr, *left_ = nullptr, *sums_ = nullptr;
    char *from_tile_ = nullptr, *to_tile_ = nullptr;
};

template <class T>
AddProblem run(const AddArgs& args) {
    const int64_t n = args.from->rows, tall = Adder<T>::rows_of_tile(args), count = (n + tall - 1) / tall;
    AddProblem problem{kAdded, 0};
    bool is_there = false;
    Queue queue(count);
    on_team(int(min_<int64_t>(args.threads, count)), [&](int, int) {
        const auto note = [&](const AddProblem& found) {
            if (found.kind != kAdded && !__atomic_exchange_n(&is_there, true, __ATOMIC_RELAXED)) problem = found;
        };
        Adder<T> adder(args);
        if (!adder.reserve()) return note({kNoRoom, 0});
        queue.take([&](int64_t tile) {
            if (__atomic_load_n(&is_there, __ATOMIC_RELAXED)) return;
            note(adder.run(tile * tall, min_(tall, n - tile * tall)));
        });
    });
    return problem;
}

}  // namespace

AddProblem add_products(const AddArgs& args) { return args.is_double ? run<double>(args) : run<float>(args); }

}  // namespace fastlora::FASTLORA_ISA
