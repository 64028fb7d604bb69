// What the next tile reads, asked for a few lines at a time while the present one is multiplied: several factors are
// streamed at once, in pieces too short for the processor to foresee, and a burst of requests would stall it.
#pragma once
#include "tile.h"

namespace fastlora::FASTLORA_ISA {

class Ahead {
  public:
    // The tile [first, first + count) of the long dimension of all factors (`rows`: of A sides); step() is called about
    // `steps` times.
    Ahead(const Matrix* factors, int64_t n, bool rows, int64_t first, int64_t count, int64_t steps)
        : factors_(factors), left_(count > 0 ? n : 0), rows_(rows), first_(first), count_(count) {
        int64_t lines = 0;
        for (int64_t f = 0; f < left_; ++f) lines += pieces(factors[f]) * (bytes(factors[f]) / kLine + 1);
        share_ = lines / max_<int64_t>(steps, 1) + 1;
        if (left_) start();
    }

    void step() {
        for (int64_t i = 0; i < share_ && left_;) {
            for (; i < share_ && at_ < end_; ++i, at_ += kLine) __builtin_prefetch(reinterpret_cast<const void*>(at_));
            if (at_ >= end_) next();
        }
    }

  private:
    static constexpr int64_t kLine = 64;

    // A tile is one piece of memory on the B side, one a row on the A side.
    int64_t pieces(const Matrix& m) const { return rows_ ? m.rows : 1; }
    int64_t bytes(const Matrix& m) const { return count_ * (rows_ ? 1 : m.stride) * element_size(m); }

    void start() {
        const Matrix& m = *factors_;
        at_ = m.data + (rows_ ? piece_ * m.stride + first_ : first_ * m.stride) * element_size(m);
        end_ = at_ + (pieces(m) ? bytes(m) : 0);
    }

    void next() {
        if (++piece_ >= pieces(*factors_)) {
            piece_ = 0;
            ++factors_;
            --left_;
        }
        if (left_) start();
    }

    const Matrix* factors_;
    int64_t left_;
    bool rows_;
    int64_t first_, count_, share_ = 0, piece_ = 0, at_ = 0, end_ = 0;
};

// The same for A sides that are read factor by factor, in tiles of as many columns as a page holds or so: what is asked
// for is `lead` factors ahead, row by row and into L2, so that few pages are in use at a time.
class AheadByRows {
  public:
    // Tiles of `wide` of the columns [begin, end) of all factors; step() is called about `steps` times a tile.
    AheadByRows(const Matrix* factors, int64_t n, int64_t lead, int64_t begin, int64_t end, int64_t wide, int64_t steps)
        : factors_(factors), n_(n), first_(begin), end_(end), wide_(wide) {
        if (!n) first_ = end;
        int64_t lines = 0, early = 0;
        for (int64_t f = 0; f < n; ++f) {
            const int64_t own = factors[f].rows * (min_(wide, end - begin) * element_size(factors[f]) / kLine + 1);
            lines += own;
            if (f < lead) early += own;
        }
        share_ = lines / max_<int64_t>(steps, 1) + 1;
        if (first_ < end_) start();
        ask(early);
    }

    void step() { ask(share_); }

  private:
    static constexpr int64_t kLine = 64;

    void ask(int64_t lines) {
        while (lines > 0 && first_ < end_) {
            for (; lines > 0 && at_ < last_; --lines, at_ += kLine)
                __builtin_prefetch(reinterpret_cast<const void*>(at_), 0, 2);
            if (at_ >= last_) next();
        }
    }

    void start() {
        const Matrix& m = factors_[factor_];
        at_ = m.data + (row_ * m.stride + first_) * element_size(m);
        last_ = at_ + (m.rows ? min_(wide_, end_ - first_) * element_size(m) : 0);
    }

    void next() {
        if (++row_ >= factors_[factor_].rows) {
            row_ = 0;
            if (++factor_ == n_) {
                factor_ = 0;
                first_ += wide_;
            }
        }
        if (first_ < end_) start();
    }

    const Matrix* factors_;
    int64_t n_, first_, end_, wide_, share_ = 0, factor_ = 0, row_ = 0, at_ = 0, last_ = 0;
};

}  // namespace fastlora::FASTLORA_ISA
