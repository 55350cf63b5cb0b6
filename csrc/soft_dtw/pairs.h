// Where the cells of a pair lie: its band or windows, its strips of columns, and how much memory they take.
#pragma once

#include <cstdint>

#include "lyra/launch.h"

namespace lyra::soft_dtw {

constexpr int kLanes = 32;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kSkew = 2;                     // steps that a lane is behind its left neighbour
constexpr int kTail = kSkew * (kLanes - 1);  // and the last lane behind the first
constexpr int kSteps = 16;                   // that go together, at most
constexpr int kRing = 128;                   // rows of a delay line; a power of two
static_assert(kRing >= kTail + 2 * kSteps, "rows on their way through the lanes, and the block before or after");
static_assert(kSteps <= kLanes, "one lane fetches one row that is handed over");

constexpr int64_t kMaxSize = int64_t{1} << 30;

struct Problem {
  int64_t batch, rows, columns;  // B, N, M
  const int64_t* x_lengths;
  const int64_t* y_lengths;
  int64_t band;        // half-width, or -1 for none
  const int64_t* low;  // (B,N) or null: the first and last column that each row may match
  const int64_t* high;
  bool dropping;

  __host__ __device__ int64_t strips() const { return columns > 0 ? (columns + kLanes - 1) / kLanes : 1; }
};

template <class T>
__host__ __device__ __forceinline__ T larger(T a, T b) {
  return a > b ? a : b;
}

template <class T>
__host__ __device__ __forceinline__ T smaller(T a, T b) {
  return a < b ? a : b;
}

__host__ __device__ __forceinline__ int64_t whole_blocks(int64_t steps) {
  return (steps + kSteps - 1) / kSteps * kSteps;
}

// At least as many as all strips of any pair have in an int band, see Pair::row_pitch: each has at most
// (reach + 32 down) / across + 4 rows, and at most n; there are across / 32 + 1 strips.
inline int64_t band_rows_per_pair(const Problem& p) {
  const int64_t width = 2 * smaller(p.band, p.columns) * p.rows;
  return larger(width, p.rows + p.columns) / kLanes + 2 * p.rows + p.columns / 8 + 1;
}

// At least as many as the steps of all strips of any pair, see Pair::pitch.
inline int64_t steps_per_pair(const Problem& p) {
  const int64_t dense = p.strips() * whole_blocks(p.rows + kTail);
  return p.band < 0 ? dense : smaller(dense, band_rows_per_pair(p) + p.strips() * (kTail + kSteps - 1));
}

struct Range {
  int begin, end;  // begin <= end
  __device__ __forceinline__ bool holds(int i) const {
    return static_cast<unsigned>(i) - static_cast<unsigned>(begin) < static_cast<unsigned>(end - begin);
  }
};

// What a block of the first kernel finds out about a strip.
struct Survey {
  Range rows;     // with windows: those that it may match
  int bad, wide;  // NaN or -inf among its costs or prices; costs that need wide exponents
};

// The cells of a pair that may be aligned. Of an int band 2 |j (n-1) - i (m-1)| <= max(2 width (n-1), n + m - 2), whole
// numbers; all of them with n = 1 or m = 1; with windows low_i <= j <= high_i.
class Pair {
 public:
  int n, m, strips;
  bool dropping;

  __device__ Pair(const Problem& p, int64_t index, const Survey* surveys)
      : n(static_cast<int>(p.x_lengths[index])),
        m(static_cast<int>(p.y_lengths[index])),
        strips((m + kLanes - 1) / kLanes),
        dropping(p.dropping),
        low_(p.low ? p.low + index * p.rows : nullptr),
        high_(p.low ? p.high + index * p.rows : nullptr),
        surveys_(surveys),
        down_(n - 1),
        across_(m - 1),
        all_(p.band < 0 || n == 1 || m == 1) {
    reach_ = all_ ? 0 : larger(2 * smaller(p.band, larger(down_, across_)) * down_, down_ + across_);
  }

  // Rows of a column that the int band holds, all of them without one.
  __device__ Range rows_of_column(int j) const {
    if (j >= m) return {0, 0};
    if (all_) return {0, n};
    const int64_t at = 2 * j * down_, low = at - reach_, step = 2 * across_;
    const int64_t begin = low <= 0 ? 0 : (low + step - 1) / step;
    return {static_cast<int>(begin), static_cast<int>(smaller<int64_t>((at + reach_) / step + 1, n))};
  }

  // Columns of a row, likewise.
  __device__ Range columns_of_row(int i) const {
    if (i >= n) return {0, 0};
    if (all_) return {0, m};
    const int64_t at = 2 * i * across_, low = at - reach_, step = 2 * down_;
    const int64_t begin = low <= 0 ? 0 : (low + step - 1) / step;
    return {static_cast<int>(begin), static_cast<int>(smaller<int64_t>((at + reach_) / step + 1, m))};
  }

  __device__ __forceinline__ bool has_windows() const { return low_ != nullptr; }
  __device__ __forceinline__ bool in_window(int i, int j) const { return !low_ || (low_[i] <= j && j <= high_[i]); }

  // Rows that a strip's warp runs through: all that it may match; one above them, whose neighbour to the left is the
  // diagonal predecessor of the first; and one below, whose neighbour to the right is the diagonal successor of the
  // last. What drops rows goes on below the last match of a column, as far as the next column can ask for it.
  __device__ Range rows_of_strip(int s) const {
    const int column = s * kLanes, last = smaller(column + kLanes, m) - 1;
    Range rows;
    if (low_) {
      rows = surveys_[s].rows;
      if (rows.begin < rows.end && dropping) rows.end = n;
    } else {
      rows = {rows_of_column(column).begin, rows_of_column(dropping ? smaller(last + 1, m - 1) : last).end};
    }
    if (rows.begin < rows.end) rows = {larger(rows.begin - 1, 0), smaller(rows.end + 1, n)};
    if (s == 0 && dropping) rows.begin = 0;
    if (s == strips - 1) rows.end = n;  // the result
    return rows;
  }

  // Rows of any strip, at most. `band_rows_per_pair` relies on this.
  __device__ int64_t row_pitch() const {
    return all_ || low_ ? n : smaller<int64_t>(n, (reach_ + kLanes * down_) / across_ + 4);
  }
  // Steps of any strip, at most. `steps_per_pair` relies on this.
  __device__ int64_t pitch() const { return whole_blocks(row_pitch() + kTail); }

 private:
  const int64_t* low_;
  const int64_t* high_;
  const Survey* surveys_;
  int64_t down_, across_, reach_;
  bool all_;
};

__device__ __forceinline__ bool lengths_in_range(const Problem& p, int64_t pair) {
  const int64_t n = p.x_lengths[pair], m = p.y_lengths[pair];
  return n >= 1 && n <= p.rows && m >= 1 && m <= p.columns;
}

// A number for each cell, in memory: in the rows of a matrix (N, M), or strip by strip, 32 columns side by side; of
// each strip all N rows, or those alone that the pair's int band has there.
enum class Order { kMatrix, kStrips, kBand };

template <class T>
struct Cells {
  T* data;
  int64_t batch, row;  // strides in elements; columns are adjacent
  Order order = Order::kMatrix;

  // In strips, of the band alone where there is one.
  static Cells strips(T* data, const Problem& p, bool band_alone) {
    const Order order = band_alone && p.band >= 0 ? Order::kBand : Order::kStrips;
    return {data, kLanes * rows_in_strips(p, order), kLanes, order};
  }
  static int64_t rows_in_strips(const Problem& p, Order order) {
    const int64_t all = p.strips() * p.rows;
    return order == Order::kBand ? smaller(all, band_rows_per_pair(p)) : all;
  }

  // Where row 0 of a strip's first column is; the others follow `row` apart.
  __device__ int64_t place(const Problem& p, const Pair& pair, int64_t index, int s) const {
    const int64_t own = index * batch;
    if (order == Order::kMatrix) return own + s * kLanes;
    if (order == Order::kStrips) return own + s * p.rows * kLanes;
    return own + (s * pair.row_pitch() - pair.rows_of_strip(s).begin) * kLanes;
  }
  // Of a lane's column.
  __device__ T* column(const Problem& p, const Pair& pair, int64_t index, int s, int lane) const {
    return data + place(p, pair, index, s) + lane;
  }
};

// Device memory that a call needs beside its tensors, all of it written by `prepare_kernel` before it is read:
// a counter of tickets; a Survey per strip; a word per strip for sums over the strips; and the hand-over words, one
// slot of `words` words for each row that a strip may hand to its neighbour.
struct Workspace {
  char* data;
  int64_t batch, strips, steps, words;

  __host__ __device__ int64_t surveys_at() const { return 16; }
  __host__ __device__ int64_t sums_at() const { return surveys_at() + batch * strips * int64_t{sizeof(Survey)}; }
  __host__ __device__ int64_t slots_at() const { return sums_at() + batch * strips * 8; }
  __host__ __device__ int64_t bytes() const { return slots_at() + batch * steps * words * 8; }

  __device__ int* tickets() const { return reinterpret_cast<int*>(data); }
  __device__ Survey* surveys(int64_t pair) const {
    return reinterpret_cast<Survey*>(data + surveys_at()) + pair * strips;
  }
  __device__ uint64_t* sums(int64_t pair) const {
    return reinterpret_cast<uint64_t*>(data + sums_at()) + pair * strips;
  }
  __device__ uint64_t* slots(int64_t pair) const {
    return reinterpret_cast<uint64_t*>(data + slots_at()) + pair * steps * words;
  }
};

}  // namespace lyra::soft_dtw
