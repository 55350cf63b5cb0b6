// The sweeps of soft_dtw.cpp over one pair, eight rows at a time. No torch.
//
// A stripe is kLanes rows; lane l does row `row + l` and in step t column t - kSkew l. So a step needs of the rows
// above what lane l - 1 had kSkew and kSkew + 1 steps ago: with 2, moving it between lanes is off the dependent chain.
// What the last lane leaves is all that the next stripe needs: it stands, with the other lanes, in `frontier`, one
// vector per step. A band shortens the stripe to the steps in which some lane is inside; lanes outside have infinite
// cost.
//
// In a chain, one stripe that is a whole pair, no lane waits until the others are done: after the last cell of its row
// it goes on to the row kLanes below, which it reaches every `period` steps.
//
// The shares that backward needs are kept in records, one per step, in the order of the steps: no transposing either
// way. A record holds, for all lanes,
//   store 16: 32 bit (diagonal, diagonal + up << 16) in units of 1 / 65535;   8: 16 bit likewise, units of 1 / 255;
//   store 64: the doubles diagonal, then up;   and with dropping then `keep` of 16 bit, 8 bit or double.
// The left share is what is missing to 1, so the three are 1 in sum; each is exactly 0 where nothing comes from there,
// so that no weight leaks into a cell without a path. Rounding is dithered by the cell's place, because equal shares
// (ties) rounded the same way everywhere would pull the path to one side.
#pragma once

#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <new>
#include <thread>
#include <type_traits>
#include <vector>

#include "lyra/simd.h"

namespace lyra::soft_dtw_cpu {

constexpr int kLanes = 8, kSkew = 2;
constexpr int kReach = kSkew * (kLanes - 1) + 1;
template <typename T>
struct LanesOf {
  typedef T Type __attribute__((vector_size(kLanes * sizeof(T))));
};
template <typename T>
using Vec = typename LanesOf<T>::Type;

template <typename T>
struct Format;  // of an IEEE number
template <>
struct Format<float> {
  using Int = int32_t;
  static constexpr Int bits = 23, bias = 127;
};
template <>
struct Format<double> {
  using Int = int64_t;
  static constexpr Int bits = 52, bias = 1023;
};
template <typename T>
using IntOf = typename Format<T>::Int;

constexpr Vec<int32_t> kIota = {0, 1, 2, 3, 4, 5, 6, 7};

template <typename T, typename V>
LYRA_INLINE Vec<T> convert(V v) {
  return __builtin_convertvector(v, Vec<T>);
}

template <typename V>
LYRA_INLINE V load(const void* from) {
  V v;
  std::memcpy(&v, from, sizeof(v));
  return v;
}

template <typename V>
LYRA_INLINE void store(void* to, V v) {
  std::memcpy(to, &v, sizeof(v));
}

template <typename V>
LYRA_INLINE V least(V a, V b) {
  return a < b ? a : b;
}

template <typename V>
LYRA_INLINE V most(V a, V b) {
  return a > b ? a : b;
}

// a b + c, rounded once on every CPU; where there is no such instruction, slowly. A loop that stays one until gcc looks
// for loops to vectorise: of eight calls side by side it makes one instruction in some places and eight in others.
LYRA_INLINE Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) {
  alignas(sizeof(Vec<float>)) float x[kLanes], y[kLanes], z[kLanes];
  store(x, a);
  store(y, b);
  store(z, c);
#pragma GCC unroll 1
  for (int l = 0; l < kLanes; ++l) z[l] = __builtin_fmaf(x[l], y[l], z[l]);
  return load<Vec<float>>(z);
}
LYRA_INLINE Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) { return a * b + c; }

// Lane l gets what lane l - 1 has, lane 0 what the last lane of `before` has.
template <typename V>
LYRA_INLINE V pushed(V lanes, V before) {
  return __builtin_shufflevector(before, lanes, 7, 8, 9, 10, 11, 12, 13, 14);
}

// Lane l gets what lane l + 1 has, the last lane what lane 0 of `after` has.
template <typename V>
LYRA_INLINE V pulled(V lanes, V after) {
  return __builtin_shufflevector(lanes, after, 1, 2, 3, 4, 5, 6, 7, 8);
}

template <typename V>
LYRA_INLINE void transpose(V (&r)[kLanes]) {
  V a[kLanes], b[kLanes];
  for (int k = 0; k < kLanes; k += 2) {
    a[k] = __builtin_shufflevector(r[k], r[k + 1], 0, 8, 1, 9, 4, 12, 5, 13);
    a[k + 1] = __builtin_shufflevector(r[k], r[k + 1], 2, 10, 3, 11, 6, 14, 7, 15);
  }
  for (int k = 0; k < kLanes; k += 4) {
    for (int h = 0; h < 2; ++h) {
      b[k + 2 * h] = __builtin_shufflevector(a[k + h], a[k + h + 2], 0, 1, 8, 9, 4, 5, 12, 13);
      b[k + 2 * h + 1] = __builtin_shufflevector(a[k + h], a[k + h + 2], 2, 3, 10, 11, 6, 7, 14, 15);
    }
  }
  for (int k = 0; k < 4; ++k) {
    r[k] = __builtin_shufflevector(b[k], b[k + 4], 0, 1, 2, 3, 8, 9, 10, 11);
    r[k + 4] = __builtin_shufflevector(b[k], b[k + 4], 4, 5, 6, 7, 12, 13, 14, 15);
  }
}

// Not std::vector, whose allocator sees a vector's type without its alignment.
template <typename V>
class Buffer {
 public:
  Buffer(int64_t size, V value) : data_(static_cast<V*>(::operator new(size * sizeof(V), std::align_val_t{64}))) {
    for (int64_t i = 0; i < size; ++i) data_[i] = value;
  }
  ~Buffer() { ::operator delete(data_, std::align_val_t{64}); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  V* data() { return data_; }

 private:
  V* data_;
};

// --- the shape of a pair -----------------------------------------------------------------------------------------

struct Window {
  int64_t low, high;  // first and last column; none where high < low
};

struct Pair {
  int64_t n = 0, m = 0;
  int64_t band = -1;                              // half-width, -1: none
  const int64_t *low = nullptr, *high = nullptr;  // by row, or null
  bool dropping = false;

  LYRA_INLINE Window window(int64_t i) const {
    if (i >= n) return {0, -1};
    const int64_t rise = n - 1, run = m - 1;
    if (low != nullptr) return {std::max<int64_t>(low[i], 0), std::min(high[i], run)};
    if (band < 0 || rise == 0) return {0, run};
    const int64_t width = std::max(2 * std::min(band, m) * rise, rise + run) / 2;  // cells with |j rise - i run| <= it
    return {std::max<int64_t>(0, (i * run - width + rise - 1) / rise), std::min(run, (i * run + width) / rise)};
  }
  int64_t stripes() const { return (n + kLanes - 1) / kLanes; }
  // Whether it can be a chain, without more steps than `most_steps`, and gains by it: a long row's stripe has few steps
  // in which lanes wait.
  bool chains() const { return band < 0 && low == nullptr && !dropping && n > kLanes && m >= kLanes && m <= 256; }
};

struct Stripe {
  int64_t row, first = 0, last = -1;  // steps
  Window lane[kLanes];
  Window inner;                   // steps in which all lanes are inside
  int64_t rows;                   // of the pair
  int64_t period = 0, mask = -1;  // of a chain, whose frontier is a ring of mask + 1 entries

  LYRA_INLINE Stripe(const Pair& pair, int64_t row) : row(row), rows(pair.n) {
    bool any = false;
    inner = {std::numeric_limits<int64_t>::min(), std::numeric_limits<int64_t>::max()};
    for (int l = 0; l < kLanes; ++l) {
      lane[l] = pair.window(row + l);
      inner = {std::max(inner.low, lane[l].low + kSkew * l), std::min(inner.high, lane[l].high + kSkew * l)};
      if (lane[l].low > lane[l].high) continue;
      const int64_t begin = lane[l].low + kSkew * l, end = lane[l].high + kSkew * l;
      first = any ? std::min(first, begin) : begin;
      last = any ? std::max(last, end) : end;
      any = true;
    }
    if (!pair.dropping) return;
    // A dropped row matches nothing, so it needs no window: any column with windows, with a band the one before the
    // window (both ends only grow), which for the first columns is the edge: all rows dropped so far.
    if (pair.low == nullptr) {
      first -= 1;
    } else {
      first = -1;
      last = pair.m - 1 + kSkew * (std::min<int64_t>(kLanes, pair.n - row) - 1);
    }
  }
  static Stripe chain(const Pair& pair) {
    Stripe all(pair, 0);
    all.period = std::max<int64_t>(pair.m, kReach + kLanes);
    all.mask = static_cast<int64_t>(std::bit_ceil(static_cast<uint64_t>(all.period))) - 1;
    all.last = all.step_of(pair.n - 1, pair.m - 1);
    return all;
  }
  LYRA_INLINE int64_t steps() const { return last - first + 1; }
  int64_t step_of(int64_t i, int64_t j) const { return j + (i - row) / kLanes * period + (i - row) % kLanes * kSkew; }
  // Lane 0's row in a step, and its column; lane l is in column `column` - kSkew l of the row l below or, if that is
  // negative, of a chain's row before.
  struct Place {
    int64_t row, column;
  };
  LYRA_INLINE Place place(int64_t step) const {
    return period > 0 ? Place{step / period * kLanes, step % period} : Place{row, step};
  }
  LYRA_INLINE Place moved(Place from, int64_t steps) const {
    Place to = {from.row, from.column + steps};
    if (period > 0 && to.column >= period) to = {to.row + kLanes, to.column - period};
    if (period > 0 && to.column < 0) to = {to.row - kLanes, to.column + period};
    return to;
  }
  // Whether some lane goes on to its next row after one of the tile's steps.
  LYRA_INLINE bool turns(Place tile) const {
    return period > 0 && ((tile.row > 0 && tile.column + 1 < kReach) || tile.column + kLanes >= period);
  }
  // The columns of row i that lane l passes through.
  LYRA_INLINE Window inside(int64_t i, int l) const { return 0 <= i && i < rows ? lane[l] : Window{0, -1}; }

  // Entries of the frontier for a tile's first step, which those for the other steps follow. Forward: what step t
  // leaves, and what it finds above the first lane.
  LYRA_INLINE int64_t leaves(int64_t t) const { return (t + kLanes) & mask; }
  LYRA_INLINE int64_t above(int64_t t) const { return (t + kReach - 1 + kLanes - period) & mask; }
  // Backward: what step t sends up, and what it finds below the last lane.
  LYRA_INLINE int64_t sends(int64_t t) const { return (t + kReach + 1) & mask; }
  LYRA_INLINE int64_t below(int64_t t) const { return (t + kSkew + period) & mask; }
};

// At least as many steps as the stripes of any pair with n <= rows, m <= columns have together. With a band a stripe
// has at most 2 band + 2 + 8 slope columns, and the slopes of all stripes sum up to at most 2 columns.
inline int64_t most_steps(int64_t rows, int64_t columns, int64_t band) {
  const int64_t stripes = (rows + kLanes - 1) / kLanes, whole = stripes * (columns + kReach);
  return band < 0 ? whole : std::min(whole, stripes * (2 * std::min(band, columns) + 2 + kReach) + 2 * columns);
}

inline int64_t record_bytes(int store, bool dropping) {
  const int64_t share = store == 64 ? 8 : store / 8;
  return kLanes * share * (dropping ? 3 : 2);
}

// The stripes of a pair and where the records of each begin.
struct Plan {
  std::vector<Stripe> stripes;
  std::vector<int64_t> offset;
  int64_t bytes = 0;  // of all records
  int64_t frontier;   // entries

  Plan(const Pair& pair, int64_t record, bool chained) : frontier(pair.m + 2 * kReach + kLanes) {
    if (chained && pair.chains()) {
      stripes.push_back(Stripe::chain(pair));
      offset.push_back(0);
      bytes = stripes.back().steps() * record;
      frontier = stripes.back().mask + 1 + kLanes;
      return;
    }
    stripes.reserve(pair.stripes());
    offset.reserve(pair.stripes());
    for (int64_t row = 0; row < pair.n; row += kLanes) {
      stripes.emplace_back(pair, row);
      offset.push_back(bytes);
      bytes += stripes.back().steps() * record;
    }
  }
  int64_t count() const { return static_cast<int64_t>(stripes.size()); }
};

// --- the recursion in one cell of each lane -----------------------------------------------------------------------

template <typename T>
struct Shares {
  Vec<T> diagonal, up, both, sum;  // both = diagonal + up, equal to the sum where nothing is left of it
};

template <typename T>
struct Part {
  Vec<T> part, sum;
};

// Z = exp(-R / gamma) as mantissa in [1, 2) times 2^exponent; zero is any number with an exponent below kZero / 2.
// Bringing a mantissa back to [1, 2) takes it through several instructions, so the left neighbour, the one that a step
// has to wait for, is taken as it comes: within the kLanes steps of a tile its mantissa stays between 2^-5 and 2^9.
// S: the cost's type. T: what it is computed in; float with 32-bit exponents is tried first, see `flagged`.
template <typename S, typename T>
struct Soft {
  using Type = T;
  using Int = IntOf<T>;
  static constexpr bool kNarrow = sizeof(T) == 4;
  static constexpr Int kZero = -(Int{1} << (8 * sizeof(Int) - 3)), kBias = Format<T>::bias, kBits = Format<T>::bits;
  struct State {
    Vec<T> mantissa;
    Vec<Int> exponent;
  };

  double gamma, scale;      // scale = -log2(e) / gamma
  T scale_high, scale_low;  // its parts
  S limit;                  // of |cost|, so that a path's exponents stay within kZero / 4
  S far;                    // from which on a cost counts as infinite, the same for narrow and wide
  Vec<Int> flagged = {};    // narrow: a cost needs wider exponents or is no number; else: it is NaN or -inf

  Soft(double gamma, const Pair& pair)
      : gamma(gamma),
        scale(-1.4426950408889634 / gamma),
        scale_high(static_cast<T>(scale)),
        scale_low(static_cast<T>(scale - scale_high)) {
    const auto cells = static_cast<double>(2 * pair.n + pair.m), most = double{std::numeric_limits<S>::max()};
    const double wide = std::min(0x1p59 / cells - 64, 0x1p50), narrow = std::min(0x1p27 / cells - 64, 0x1p21);
    limit = static_cast<S>(std::min((kNarrow ? narrow : wide) / -scale, most));
    far = static_cast<S>(std::min(wide / -scale, most));
  }
  // Whether the products of `weight` are safe from underflow and overflow.
  bool serves() const { return !kNarrow || (limit > 0 && -scale > 1e-25 && -scale < 1e25); }

  static LYRA_INLINE State zero() { return {Vec<T>{} + T(1), Vec<Int>{} + kZero}; }
  static State origin() { return {Vec<T>{} + T(1), Vec<Int>{}}; }
  static LYRA_INLINE State chosen(Vec<int32_t> where, const State& a, const State& b) {
    const auto lanes = convert<Int>(where) != 0;
    return {lanes ? a.mantissa : b.mantissa, lanes ? a.exponent : b.exponent};
  }
  static LYRA_INLINE State pushed(const State& lanes, const State& before) {
    return {soft_dtw_cpu::pushed(lanes.mantissa, before.mantissa),
            soft_dtw_cpu::pushed(lanes.exponent, before.exponent)};
  }
  static LYRA_INLINE Vec<T> from_bits(Vec<Int> bits) { return std::bit_cast<Vec<T>>(bits); }

  // number / 2^top, for top >= its exponent. What is less than 2^-kFar of the top comes out as 0 or, if narrow, as
  // about that, too little to change a sum with the top's number or to be a unit of it.
  static LYRA_INLINE Vec<T> aligned(const State& number, Vec<Int> top) {
    constexpr Int kFar = kNarrow ? 120 : 1000;
    const auto shift = most(number.exponent - top, Vec<Int>{} - kFar);
    const auto to = from_bits(std::bit_cast<Vec<Int>>(number.mantissa) + (shift << kBits));
    if constexpr (kNarrow) return to;
    return shift == -kFar ? Vec<T>{} : to;
  }

  // Whether all costs of a tile are within the limit.
  LYRA_INLINE bool all_open(const Vec<S> (&tile)[kLanes]) const {
    if constexpr (!kNarrow) {
      return false;
    } else {
      Vec<int32_t> largest = {};
      for (int k = 0; k < kLanes; ++k) largest = most(largest, std::bit_cast<Vec<int32_t>>(tile[k]) & 0x7fffffff);
      largest = most(largest, __builtin_shufflevector(largest, largest, 4, 5, 6, 7, 0, 1, 2, 3));
      largest = most(largest, __builtin_shufflevector(largest, largest, 2, 3, 0, 1, 6, 7, 4, 5));
      return std::max(largest[0], largest[1]) <= std::bit_cast<int32_t>(limit);
    }
  }

  // exp(-cost / gamma); zero for infinite costs. kOpen: all are known to be within the limit.
  template <bool kOpen>
  LYRA_INLINE State weight(Vec<S> cost) {
    Vec<IntOf<S>> open = {};
    if constexpr (!kOpen) {
      open = (cost <= limit) & (cost >= -limit);
      flagged |= convert<Int>(~open & ~(cost > far));
      cost = open ? cost : Vec<S>{};
    }
    State w;
    if constexpr (kNarrow) {
      constexpr float kRound =
          12582912.0f;  // 1.5 * 2^23: adding it rounds, and leaves the whole number in the low bits
      const Vec<float> high = Vec<float>{} + scale_high, rounded = fma(cost, high, Vec<float>{} + kRound);
      const Vec<float> x = fma(cost, Vec<float>{} + scale_low, fma(cost, high, kRound - rounded));
      // 2^x on [-1/2, 1/2], relative error 2e-8
      Vec<float> series = Vec<float>{} + 0x1.41fb74p-13f;
      series = fma(series, x, Vec<float>{} + 0x1.5f3ec2p-10f);
      series = fma(series, x, Vec<float>{} + 0x1.3b2d4ep-7f);
      series = fma(series, x, Vec<float>{} + 0x1.c6aee8p-5f);
      series = fma(series, x, Vec<float>{} + 0x1.ebfbdcp-3f);
      series = fma(series, x, Vec<float>{} + 0x1.62e43p-1f);
      series = fma(series, x, Vec<float>{} + 1.0f);
      w = {series, std::bit_cast<Vec<int32_t>>(rounded) - std::bit_cast<int32_t>(kRound)};
    } else {
      constexpr double kRound = 6755399441055744.0;  // 1.5 * 2^52
      constexpr int kTerms = sizeof(S) == 4 ? 9 : 13;
      const Vec<double> power = convert<double>(cost) * scale, rounded = power + kRound;
      const Vec<double> x = (power - (rounded - kRound)) * 0.6931471805599453;
      double last = 1;  // 1 / terms!, from which the other coefficients of exp's series follow
      for (int n = 2; n <= kTerms; ++n) last /= n;
      Vec<double> series = Vec<double>{} + last;
      for (int n = kTerms; n > 0; --n) series = (last *= n) + series * x;
      w = {series, std::bit_cast<Vec<int64_t>>(rounded) - std::bit_cast<int64_t>(kRound)};
    }
    if constexpr (!kOpen) w.exponent = convert<Int>(open) != 0 ? w.exponent : Vec<Int>{} + kZero;
    return w;
  }

  static LYRA_INLINE State normalised(const State& number) {
    constexpr Int kOne = kBias << kBits, kFraction = (Int{1} << kBits) - 1;
    const auto bits = std::bit_cast<Vec<Int>>(number.mantissa);
    const auto exponent = (number.exponent - kBias) + (bits >> kBits);
    return {from_bits((bits & kFraction) | kOne), most(exponent, Vec<Int>{} + kZero)};
  }

  // Not normalised; nor need `left` be.
  template <bool kOpen>
  LYRA_INLINE State match(Vec<S> cost, const State& diagonal, const State& up, const State& left, Shares<T>& shares) {
    const State w = weight<kOpen>(cost);
    const auto top = most(left.exponent, most(diagonal.exponent, up.exponent));
    const auto a = aligned(diagonal, top), b = aligned(up, top), c = aligned(left, top);
    const auto sum = a + (b + c);  // the same transposed
    shares = {a, b, a + b, sum};
    return {sum * w.mantissa, top + w.exponent};
  }

  // What is left where row and column end in either way: matched, or dropped after `up`. keep: share of the first.
  static LYRA_INLINE State merged(const State& matched, const State& up, const State& drop, Part<T>& keep) {
    const State dropped = {up.mantissa * drop.mantissa, most(up.exponent + drop.exponent, Vec<Int>{} + kZero)};
    const auto top = most(matched.exponent, dropped.exponent);
    keep.part = aligned(matched, top);
    keep.sum = keep.part + aligned(dropped, top);
    return normalised({keep.sum, top});
  }

  double value(const State& state, int lane) const {
    if (state.exponent[lane] < kZero / 2) return std::numeric_limits<double>::infinity();
    const double bits =
        std::log2(static_cast<double>(state.mantissa[lane])) + static_cast<double>(state.exponent[lane]);
    return -gamma * 0.6931471805599453 * bits;
  }
};

// gamma = 0: R itself, and of equal predecessors the first of diagonal, up, left; matched rather than dropped.
template <typename S>
struct Hard {
  using Type = double;
  struct State {
    Vec<double> sum;
  };
  Vec<int64_t> flagged = {};  // NaN or -inf

  Hard(double, const Pair&) {}
  bool serves() const { return true; }
  static LYRA_INLINE State zero() { return {Vec<double>{} + std::numeric_limits<double>::infinity()}; }
  static State origin() { return {Vec<double>{}}; }
  static LYRA_INLINE State chosen(Vec<int32_t> where, const State& a, const State& b) {
    return {convert<int64_t>(where) != 0 ? a.sum : b.sum};
  }
  static LYRA_INLINE State normalised(const State& number) { return number; }
  static LYRA_INLINE State pushed(const State& lanes, const State& before) {
    return {soft_dtw_cpu::pushed(lanes.sum, before.sum)};
  }
  LYRA_INLINE bool all_open(const Vec<S> (&)[kLanes]) const { return false; }
  template <bool>
  LYRA_INLINE State weight(Vec<S> cost) {
    const Vec<double> sum = convert<double>(cost);
    flagged |= ~(sum > -std::numeric_limits<double>::infinity());
    return {sum};
  }
  template <bool kOpen>
  LYRA_INLINE State match(Vec<S> cost, const State& diagonal, const State& up, const State& left,
                          Shares<double>& shares) {
    const Vec<double> none = {}, all = none + 1.0;
    const auto from_diagonal = (diagonal.sum <= up.sum) & (diagonal.sum <= left.sum);
    const auto from_up = ~from_diagonal & (up.sum <= left.sum);
    shares = {from_diagonal ? all : none, from_up ? all : none, from_diagonal | from_up ? all : none, all};
    return {weight<kOpen>(cost).sum + least(diagonal.sum, least(up.sum, left.sum))};
  }
  static LYRA_INLINE State merged(const State& matched, const State& up, const State& drop, Part<double>& keep) {
    const auto dropped = up.sum + drop.sum;
    keep = {matched.sum <= dropped ? Vec<double>{} + 1.0 : Vec<double>{}, Vec<double>{} + 1.0};
    return {least(matched.sum, dropped)};
  }
  double value(const State& state, int lane) const { return state.sum[lane]; }
};

// --- shares in memory ---------------------------------------------------------------------------------------------

// (i, j) -> 2^bits + u with 0 < u < 1 spread evenly over any part of the plane; added to a share in units, it leaves
// the share rounded in the upper bits of the mantissa. u keeps from 0 and 1 a distance above the rounding of the sum,
// so that whole numbers of units stay what they are. i down the lanes, j = step - kSkew lane.
struct Dither {
  static constexpr uint32_t kRow = 24801, kColumn = 18633;
  Vec<uint32_t> phase;
  uint32_t mask, base;

  LYRA_INLINE Dither(int64_t row, int64_t step, int store_as)
      : phase((static_cast<uint32_t>(row) + convert<uint32_t>(kIota)) * kRow +
              (static_cast<uint32_t>(step) - kSkew * convert<uint32_t>(kIota)) * kColumn),
        mask(store_as == 16 ? (1u << 7) - 8 : (1u << 15) - 8),
        base(std::bit_cast<uint32_t>(store_as == 16 ? 0x1p16f : 0x1p8f) | 4u) {}
  // Lanes that go on to their next row of a chain.
  LYRA_INLINE void next_row(Vec<int32_t> lanes, int64_t period) {
    phase += std::bit_cast<Vec<uint32_t>>(lanes) & (kLanes * kRow - static_cast<uint32_t>(period) * kColumn);
  }
  LYRA_INLINE Vec<float> next() {
    const auto now = std::bit_cast<Vec<float>>((phase & mask) | base);
    phase += kColumn;
    return now;
  }
};

// The bits of part scale + dither.
LYRA_INLINE Vec<uint32_t> rounded(Vec<float> part, Vec<float> scale, Vec<float> dither) {
  return std::bit_cast<Vec<uint32_t>>(fma(part, scale, dither));
}
LYRA_INLINE Vec<uint32_t> rounded(Vec<double> part, Vec<double> scale, Vec<float> dither) {
  return std::bit_cast<Vec<uint32_t>>(convert<float>(part * scale) + dither);
}

template <typename T>
LYRA_INLINE void put(uint8_t*& record, int store_as, const Shares<T>& shares, Dither& dither) {
  if (store_as == 64) {
    const auto diagonal = shares.diagonal / shares.sum, rest = 1 - diagonal, up = shares.up / shares.sum;
    store(record, convert<double>(diagonal));
    store(record + kLanes * 8, convert<double>((shares.both == shares.sum) | (up > rest) ? rest : up));
    record += kLanes * 16;
    return;
  }
  const Vec<T> scale = (store_as == 16 ? T(65535) : T(255)) / shares.sum;
  const auto spread = dither.next();
  const auto diagonal = rounded(shares.diagonal, scale, spread), both = rounded(shares.both, scale, spread);
  if (store_as == 16) {
    store(record, ((diagonal >> 7) & 0xffffu) | ((both << 9) & 0xffff0000u));
    record += kLanes * 4;
  } else {
    store(record, convert<uint16_t>(((diagonal >> 15) & 0xffu) | ((both >> 7) & 0xff00u)));
    record += kLanes * 2;
  }
}

template <typename T>
LYRA_INLINE void put_keep(uint8_t*& record, int store_as, const Part<T>& keep, Dither& dither) {
  if (store_as == 64) {
    store(record, convert<double>(keep.part / keep.sum));
    record += kLanes * 8;
    return;
  }
  const auto units = rounded(keep.part, (store_as == 16 ? T(65535) : T(255)) / keep.sum, dither.next());
  if (store_as == 16) {
    store(record, convert<uint16_t>(units >> 7));
    record += kLanes * 2;
  } else {
    store(record, convert<uint8_t>(units >> 15));
    record += kLanes;
  }
}

// Shares; `unit` times the first three is 1 in sum.
template <typename S>
struct Step {
  Vec<S> diagonal, up, left, keep;
};

template <bool kDropping, typename S>
LYRA_INLINE Step<S> get(const uint8_t* record, int store_as) {
  Step<S> step;
  if (store_as == 64) {
    step.diagonal = convert<S>(load<Vec<double>>(record));
    step.up = convert<S>(load<Vec<double>>(record + kLanes * 8));
    step.left = (1 - step.diagonal) - step.up;
    if constexpr (kDropping) step.keep = convert<S>(load<Vec<double>>(record + kLanes * 16));
    return step;
  }
  Vec<int32_t> diagonal, both, keep = {};
  const S all = store_as == 16 ? S(65535) : S(255);
  if (store_as == 16) {
    const auto word = load<Vec<uint32_t>>(record);
    diagonal = std::bit_cast<Vec<int32_t>>(word & 65535u);
    both = std::bit_cast<Vec<int32_t>>(word >> 16);
    if constexpr (kDropping) keep = convert<int32_t>(load<Vec<uint16_t>>(record + kLanes * 4));
  } else {
    const auto word = convert<int32_t>(load<Vec<uint16_t>>(record));
    diagonal = word & 255;
    both = word >> 8;
    if constexpr (kDropping) keep = convert<int32_t>(load<Vec<uint8_t>>(record + kLanes * 2));
  }
  step.diagonal = convert<S>(diagonal);
  step.up = convert<S>(both) - step.diagonal;
  step.left = all - convert<S>(both);
  if constexpr (kDropping) step.keep = convert<S>(keep) * (S(1) / all);
  return step;
}

// --- forward ------------------------------------------------------------------------------------------------------

// How far the threads that share one pair are: each stripe is a thread's, and follows the one before it.
class Progress {
 public:
  explicit Progress(int64_t stripes) : done_(new std::atomic<int64_t>[stripes]) {
    for (int64_t s = 0; s < stripes; ++s) done_[s].store(0, std::memory_order_relaxed);
  }
  ~Progress() { delete[] done_; }
  Progress(const Progress&) = delete;
  Progress& operator=(const Progress&) = delete;
  void wait(int64_t stripe, int64_t ticks) const {
    for (int spins = 0; done_[stripe].load(std::memory_order_acquire) < ticks; ++spins) {
#ifdef __x86_64__
      __builtin_ia32_pause();
#endif
      if (spins >= kSpins) std::this_thread::yield();  // who is waited for may need this very core
    }
  }
  void set(int64_t stripe, int64_t ticks) { done_[stripe].store(ticks, std::memory_order_release); }

 private:
  static constexpr int kSpins = 1000;  // some tiles, which is all that a neighbour with a core of its own is late
  std::atomic<int64_t>* done_;
};
constexpr int64_t kAllDone = std::numeric_limits<int64_t>::max();

// A matrix of a pair, with what of the memory around it may be read.
template <typename S>
struct Cells {
  const S* data;  // of cell (0, 0)
  int64_t row;    // stride
  const S *begin, *end;
};

template <typename S>
struct Forward {
  Pair pair;
  Cells<S> cost;
  const S* drop = nullptr;  // by row
  uint8_t* records;         // null: none are kept
  int store = 0;
  double gamma = 1;
};

// Columns `column` to `column` + kLanes - 1 of a row, which begins at `row`; `outside` for those that are not inside.
template <typename S>
LYRA_INLINE Vec<S> load_row(const Cells<S>& cells, const S* row, int64_t column, Window inside, S outside) {
  const auto [low, high] = inside;
  const S* from = row + column;
  if (column >= low && column + kLanes - 1 <= high) return load<Vec<S>>(from);
  if (column > high || column + kLanes - 1 < low) return Vec<S>{} + outside;
  if (from >= cells.begin && from + kLanes <= cells.end) {
    const auto lane = convert<IntOf<S>>(kIota);
    const auto first = static_cast<IntOf<S>>(std::max<int64_t>(low - column, 0));
    const auto last = static_cast<IntOf<S>>(std::min<int64_t>(high - column, kLanes));
    return (lane >= first) & (lane <= last) ? load<Vec<S>>(from) : Vec<S>{} + outside;
  }
  Vec<S> found;
  for (int k = 0; k < kLanes; ++k) found[k] = column + k >= low && column + k <= high ? from[k] : outside;
  return found;
}

// tile[k]: the lanes' cells k steps after `place`, `outside` for those that are not inside.
template <typename S>
LYRA_INLINE void load_tile(const Cells<S>& cells, const Stripe& stripe, Stripe::Place place, S outside,
                           Vec<S> (&tile)[kLanes]) {
  const auto [row, column] = place;
  const S* from = cells.data + row * cells.row + column;
  // The same tile of the next stripe, since what a CPU fetches ahead by itself ends with every page. It may lie
  // outside.
  auto next = reinterpret_cast<uintptr_t>(from) + kLanes * cells.row * sizeof(S);
  for (int l = 0; l < kLanes; ++l, next += (cells.row - kSkew) * sizeof(S)) {
    __builtin_prefetch(reinterpret_cast<const void*>(next));
  }
  if (column >= stripe.inner.low && column + kLanes - 1 <= stripe.inner.high && row + kLanes <= stripe.rows) {
    for (int l = 0; l < kLanes; ++l, from += cells.row - kSkew) tile[l] = load<Vec<S>>(from);
    return transpose(tile);
  }
  for (int l = 0; l < kLanes; ++l) {
    int64_t i = row + l, j = column - kSkew * l;
    if (j < 0 && stripe.period > 0) i -= kLanes, j += stripe.period;
    const S* own = cells.data + i * cells.row;
    tile[l] = load_row(cells, own, j, stripe.inside(i, l), outside);
    if (const int64_t rest = stripe.period - j; stripe.period > 0 && rest < kLanes) {
      const auto more = load_row(cells, own + kLanes * cells.row, -rest, stripe.inside(i + kLanes, l), outside);
      tile[l] = convert<IntOf<S>>(kIota) < static_cast<IntOf<S>>(rest) ? tile[l] : more;
    }
  }
  transpose(tile);
}

// The first tile of a ring also stands behind its end, for tiles that are read from entries on both sides of it.
template <typename State>
LYRA_INLINE void repeat_front(State* frontier, const State* tile, const Stripe& stripe) {
  if (tile == frontier) std::copy_n(frontier, kLanes, frontier + stripe.mask + 1);
}

template <bool kDropping, typename Cell, typename S>
LYRA_INLINE void forward_stripe(const Forward<S>& f, Cell& cell, Stripe stripe, typename Cell::State* frontier,
                                uint8_t* record, int store_as, Progress* progress) {
  using State = typename Cell::State;
  using T = typename Cell::Type;
  const int64_t index = stripe.row / kLanes;
  State drop = Cell::zero();
  if constexpr (kDropping) {
    Vec<S> prices = Vec<S>{} + std::numeric_limits<S>::infinity();
    for (int l = 0; l < kLanes && stripe.row + l < f.pair.n; ++l) prices[l] = f.drop[stripe.row + l];
    drop = cell.template weight<false>(prices);
  }
  Dither dither(stripe.row, stripe.first, store_as), keep_dither(stripe.row + 1, stripe.first + 1, store_as);
  State left = Cell::zero(), ended = Cell::zero(), ended_before = Cell::zero(), diagonal = Cell::zero();
  if (stripe.first <= stripe.last) {
    if (progress != nullptr && index > 0) progress->wait(index - 1, stripe.above(stripe.first - 1));
    diagonal = Cell::pushed(Cell::zero(), frontier[stripe.above(stripe.first - 1)]);
  }
  auto place = stripe.place(stripe.first);
  for (int64_t start = stripe.first; start <= stripe.last; start += kLanes, place = stripe.moved(place, kLanes)) {
    const int64_t stop = std::min(start + kLanes - 1, stripe.last);
    const State* const above = frontier + stripe.above(start);
    State* const leave = frontier + stripe.leaves(start);
    if (progress != nullptr && index > 0) progress->wait(index - 1, stripe.above(stop));
    Vec<S> tile[kLanes];
    load_tile(f.cost, stripe, place, std::numeric_limits<S>::infinity(), tile);
    const auto steps = [&]<bool kOpen, bool kTurns>() __attribute__((always_inline)) {
      for (int64_t step = start; step <= stop; ++step) {
        Shares<T> shares;
        const State up = Cell::pushed(ended_before, above[step - start]);
        left = cell.template match<kOpen>(tile[step - start], diagonal, up, left, shares);
        diagonal = up;
        ended_before = ended;
        if (store_as != 0) put(record, store_as, shares, dither);
        if constexpr (kDropping) {
          Part<T> keep;
          ended = Cell::merged(Cell::normalised(left), up, drop, keep);
          if (store_as != 0) put_keep(record, store_as, keep, keep_dither);
        } else {
          ended = Cell::normalised(left);
        }
        leave[step - start] = ended;
        if constexpr (kTurns) {  // to the right of a row's end there is the beginning of another
          const auto column = static_cast<int32_t>(stripe.moved(place, step - start + 1).column);
          const Vec<int32_t> lanes = kSkew * kIota == column;
          dither.next_row(lanes, stripe.period);
          left = Cell::chosen(lanes, Cell::zero(), left);
          diagonal = Cell::chosen(lanes, Cell::zero(), diagonal);
        }
      }
      left = Cell::normalised(left);
    };
    const bool open = cell.all_open(tile);
    if (!kDropping && stripe.turns(place)) {
      open ? steps.template operator()<true, true>() : steps.template operator()<false, true>();
    } else {
      open ? steps.template operator()<true, false>() : steps.template operator()<false, false>();
    }
    repeat_front(frontier, leave, stripe);
    if (progress != nullptr)
      progress->set(index, stripe.leaves(stop));  // up to that entry the frontier is this stripe's
  }
  if (progress != nullptr) progress->set(index, kAllDone);
}

// Stripes `from` to `to` - 1; `progress`: null, or they are one alone.
template <bool kDropping, typename Cell, typename S>
LYRA_INLINE void forward_stripes(const Forward<S>& f, Cell& given, const Plan& plan, int64_t from, int64_t to,
                                 typename Cell::State* frontier, Progress* progress) {
  Cell cell = given;  // where no store to memory can change it
  const auto run = [&](int store_as) __attribute__((always_inline)) {
    for (int64_t s = from; s < to; ++s) {
      uint8_t* records = store_as == 0 ? nullptr : f.records + plan.offset[s];
      forward_stripe<kDropping>(f, cell, plan.stripes[s], frontier, records, store_as, progress);
    }
  };
  const int store_as = f.records == nullptr ? 0 : f.store;
  // The usual case as a constant: no branches and fewer constants in the step.
  std::is_same_v<typename Cell::Type, float>&& store_as == 16 ? run(16) : run(store_as);
  given.flagged |= cell.flagged;
}

// --- backward -----------------------------------------------------------------------------------------------------

template <typename S>
struct Backward {
  Pair pair;
  S* grad_cost;  // of cell (0, 0)
  int64_t columns;
  S* grad_drop = nullptr;  // by row
  S grad = 1;
  const uint8_t* records;
  int store = 16;
  bool with_entropy = false;
};

// Columns `column` to `column` + kLanes - 1 of row i, of those that there are. alone: no other thread writes to the
// pair.
template <typename S>
LYRA_INLINE void store_row(const Backward<S>& f, int64_t i, int64_t column, int64_t columns, bool alone, Vec<S> out) {
  if (i < 0 || i >= f.pair.n || column <= -kLanes || column >= columns) return;
  S* to = f.grad_cost + i * f.columns + column;
  if (alone && to >= f.grad_cost && to + kLanes <= f.grad_cost + f.pair.n * f.columns) {
    const auto at = convert<IntOf<S>>(kIota) + static_cast<IntOf<S>>(column);
    store(to, (at >= 0) & (at < static_cast<IntOf<S>>(columns)) ? out : load<Vec<S>>(to));
    return;
  }
  for (int k = 0; k < kLanes; ++k) {
    if (column + k >= 0 && column + k < columns) to[k] = out[k];
  }
}

// Lane by lane eight steps of `tile` go to the rows of the output; what is not inside is exactly 0 and goes there, too,
// but for what is behind the rows of a chain.
template <typename S>
LYRA_INLINE void store_tile(const Backward<S>& f, const Stripe& stripe, Stripe::Place place, Vec<S> (&tile)[kLanes]) {
  transpose(tile);
  const auto [row, column] = place;
  const int64_t lanes = std::min<int64_t>(kLanes, f.pair.n - row);
  S* to = f.grad_cost + row * f.columns + column;
  // The same tile of the next stripe, which would wait for memory to be read that it only writes. It may lie outside.
  auto next = reinterpret_cast<uintptr_t>(to) - kLanes * f.columns * sizeof(S);
  for (int l = 0; l < kLanes; ++l, next += (f.columns - kSkew) * sizeof(S)) {
    __builtin_prefetch(reinterpret_cast<const void*>(next), 1);
  }
  const bool chain = stripe.period > 0;
  const int64_t columns = chain ? f.pair.m : f.columns;
  if (column >= kReach - 1 && column + kLanes <= columns) {
    for (int l = 0; l < lanes; ++l, to += f.columns - kSkew) store(to, f.grad * tile[l]);
    return;
  }
  for (int l = 0; l < kLanes; ++l) {
    int64_t i = row + l, j = column - kSkew * l;
    if (chain && j < 0) i -= kLanes, j += stripe.period;
    const Vec<S> out = f.grad * tile[l];
    store_row(f, i, j, columns, chain, out);
    if (chain) store_row(f, i + kLanes, j - stripe.period, columns, chain, out);
  }
}

// What no tile of the stripe has written in its rows.
template <bool kDropping, typename S>
LYRA_INLINE void finish_rows(const Backward<S>& f, const Stripe& stripe, Vec<S> dropped) {
  if (stripe.period > 0) {
    for (int64_t i = 0; i < f.pair.n; ++i) {
      std::fill(f.grad_cost + i * f.columns + f.pair.m, f.grad_cost + (i + 1) * f.columns, S(0));
    }
    return;
  }
  const int64_t tiles = (stripe.steps() + kLanes - 1) / kLanes;
  for (int l = 0; l < kLanes && stripe.row + l < f.pair.n; ++l) {
    const int64_t row = stripe.row + l, first = std::clamp<int64_t>(stripe.first - kSkew * l, 0, f.columns);
    S* to = f.grad_cost + row * f.columns;
    std::fill(to, to + first, S(0));
    std::fill(to + std::clamp<int64_t>(stripe.first + tiles * kLanes - kSkew * l, first, f.columns), to + f.columns,
              S(0));
    if (kDropping) f.grad_drop[row] = f.grad * dropped[l];
  }
}

LYRA_INLINE double entropy_of(double p) { return p > 0 ? -p * std::log(p) : 0.0; }

// kEntropy: whether the entropy of the paths is summed up, in a loop of its own kind, since the calls of log would put
// what one step hands to the next into memory.
template <bool kDropping, bool kEntropy, typename S>
LYRA_INLINE double backward_stripe(const Backward<S>& f, Stripe stripe, Vec<S>* frontier, const uint8_t* records,
                                   Vec<S> sent_before, Progress* progress) {
  const int64_t tiles = (stripe.steps() + kLanes - 1) / kLanes, bytes = record_bytes(f.store, kDropping);
  const int64_t index = stripe.row / kLanes;
  const bool below = index + 1 < f.pair.stripes();
  const uint8_t* record = records + stripe.steps() * bytes;
  const S unit = f.store == 16 ? S(1) / S(65535) : f.store == 8 ? S(1) / S(255) : S(1);
  double entropy = 0;
  // What the last step sends left, up left and, with what the one before sent up left, up.
  Vec<S> to_left = {}, to_diagonal = {}, sent = {}, dropped = {};
  auto place = stripe.place(stripe.first + (tiles - 1) * kLanes);
  for (int64_t t = tiles - 1; t >= 0; --t, place = stripe.moved(place, -kLanes)) {
    const int64_t start = stripe.first + t * kLanes, stop = std::min(start + kLanes - 1, stripe.last);
    const Vec<S>* const below_tile = frontier + stripe.below(start);
    Vec<S>* const send = frontier + stripe.sends(start);
    // Ticks count downwards: `ticks` is minus the lowest entry that the stripe below has left.
    if (progress != nullptr && below) progress->wait(index + 1, kAllDone / 2 - stripe.below(start));
    Vec<S> tile[kLanes];
    for (int k = kLanes - 1; k > stop - start; --k) tile[k] = Vec<S>{};
    for (int64_t step = stop; step >= start; --step) {
      record -= bytes;
      const Step<S> share = get<kDropping, S>(record, f.store);
      const Vec<S> ended = pulled(sent_before, below_tile[step - start]);
      Vec<S> here;
      if constexpr (kDropping) {
        here = ended * share.keep + to_left;
      } else {
        here = ended + to_left;
      }
      tile[step - start] = here;
      const Vec<S> units = here * unit, left = share.left * unit;
      to_left = here * left;  // the dependent chain
      sent_before = sent;
      sent = units * share.up + to_diagonal;
      to_diagonal = units * share.diagonal;
      if constexpr (kDropping) {
        const Vec<S> drop = ended * (1 - share.keep);
        sent += drop;
        dropped += drop;
      }
      send[step - start] = sent;
      if constexpr (kEntropy) {
        for (int l = 0; l < kLanes; ++l) {
          entropy += here[l] * (entropy_of(unit * share.diagonal[l]) + entropy_of(unit * share.up[l]) +
                                entropy_of(unit * share.left[l]));
          if constexpr (kDropping) entropy += ended[l] * (entropy_of(share.keep[l]) + entropy_of(1 - share.keep[l]));
        }
      }
    }
    repeat_front(frontier, send, stripe);
    if (t == 0) frontier[stripe.sends(stripe.first - 1)] = to_diagonal;
    if (progress != nullptr && t > 0) progress->set(index, kAllDone / 2 - stripe.sends(start));
    store_tile(f, stripe, place, tile);
  }
  if (progress != nullptr) progress->set(index, kAllDone);
  finish_rows<kDropping>(f, stripe, dropped);
  return entropy;
}

// Lets the last cell, which all comes out of, take 1 from below: out of the frontier or, where a lane is free below its
// own, out of what the last stripe is given, which is returned.
template <typename S>
Vec<S> begin_backward(const Pair& pair, const Plan& plan, Vec<S>* frontier) {
  const auto lane = (pair.n - 1) % kLanes;
  Vec<S> given = {};
  if (lane + 1 < kLanes) {
    given[lane + 1] = S(1);
    return given;
  }
  const Stripe& end = plan.stripes.back();
  frontier[end.below(end.step_of(pair.n - 1, pair.m - 1))][0] = S(1);
  if (end.period > 0) repeat_front(frontier, frontier, end);
  return given;
}

// Stripes `to` - 1 down to `from`, of each its entropy; `progress` as in `forward_stripes`.
template <bool kDropping, bool kEntropy, typename S>
LYRA_INLINE void backward_stripes(const Backward<S>& f, const Plan& plan, int64_t from, int64_t to, Vec<S>* frontier,
                                  Vec<S> origin, double* entropy, Progress* progress) {
  for (int64_t s = to - 1; s >= from; --s) {
    const Vec<S> sent = s + 1 == plan.count() ? origin : Vec<S>{};
    entropy[s] =
        backward_stripe<kDropping, kEntropy>(f, plan.stripes[s], frontier, f.records + plan.offset[s], sent, progress);
  }
}

// --- the second derivative ------------------------------------------------------------------------------------------
//
// Along a direction (along, along_drop, along_gamma) of cost, drop and gamma: V, the derivative of M and A, in one
// sweep forward; with it the rates of the shares,
//     rate_l = share_l (sum_k share_k V_k - V_l + along_gamma (-log share_l - H)) / gamma,   H = -sum share log share,
// and in one sweep backward those of E. In double, because the V of a cell's predecessors are large and nearly equal.

template <typename S>
struct Curvature {
  Backward<S> out;  // grad times the rates of E and of the drops
  Cells<S> along;
  const S* along_drop;  // by row, or null
  double along_gamma;
  bool of_gamma;  // whether the entropies are needed at all
  double rate;    // 1 / gamma, 0 for hard DTW
};

// Shares of one choice with their logarithms (0 for a share of 0) and entropy, where these are needed.
struct Choice {
  Vec<double> share[3], log[3], entropy;
  int count = 0;

  LYRA_INLINE void weigh() {
    entropy = Vec<double>{};
    for (int k = 0; k < count; ++k) {
      for (int l = 0; l < kLanes; ++l) log[k][l] = share[k][l] > 0 ? std::log(share[k][l]) : 0.0;
      entropy -= share[k] * log[k];
    }
  }
};

template <bool kDropping>
LYRA_INLINE void choices(const uint8_t* record, int store_as, bool weighed, Choice& into, Choice& out_of) {
  const double unit = store_as == 16 ? 1.0 / 65535 : store_as == 8 ? 1.0 / 255 : 1.0;
  const auto step = get<kDropping, double>(record, store_as);
  into = Choice{{unit * step.diagonal, unit * step.up, unit * step.left}, {}, {}, 3};
  if (weighed) into.weigh();
  if constexpr (kDropping) {
    out_of = Choice{{step.keep, 1 - step.keep}, {}, {}, 2};
    if (weighed) out_of.weigh();
  }
}

// rates: per step those of diagonal, up and (dropping) keep. Frontier entries as in forward_stripe.
template <bool kDropping, typename S>
LYRA_INLINE void tangent_stripe(const Curvature<S>& f, const Stripe& stripe, Vec<double>* frontier,
                                const uint8_t* record, Vec<S>* rates) {
  const int64_t bytes = record_bytes(f.out.store, kDropping);
  Vec<double> left = {}, ended = {}, ended_before = {}, drop = {};
  for (int l = 0; l < kLanes && stripe.row + l < f.out.pair.n && f.along_drop != nullptr; ++l) {
    drop[l] = f.along_drop[stripe.row + l];
  }
  if (stripe.first > stripe.last) return;
  Vec<double> diagonal = pushed(Vec<double>{}, frontier[stripe.above(stripe.first - 1)]);
  for (int64_t start = stripe.first; start <= stripe.last; start += kLanes) {
    Vec<S> tile[kLanes];
    load_tile(f.along, stripe, stripe.place(start), S(0), tile);
    for (int64_t step = start; step <= std::min(start + kLanes - 1, stripe.last); ++step, record += bytes) {
      Choice into, out_of;
      choices<kDropping>(record, f.out.store, f.of_gamma, into, out_of);
      const Vec<double> up = pushed(ended_before, frontier[stripe.above(step)]), from[3] = {diagonal, up, left};
      const Vec<double> mean = into.share[0] * diagonal + into.share[1] * up + into.share[2] * left;
      for (int k = 0; k < 2; ++k) {
        const Vec<double> change = (mean - from[k]) - f.along_gamma * (into.log[k] + into.entropy);
        *rates++ = convert<S>(f.rate * into.share[k] * change);
      }
      left = mean + convert<double>(tile[step - start]) - f.along_gamma * into.entropy;
      diagonal = up;
      ended_before = ended;
      ended = left;
      if constexpr (kDropping) {
        ended = out_of.share[0] * left + out_of.share[1] * (up + drop);
        const Vec<double> change = (ended - left) - f.along_gamma * (out_of.log[0] + out_of.entropy);
        *rates++ = convert<S>(f.rate * out_of.share[0] * change);
        ended -= f.along_gamma * out_of.entropy;
      }
      frontier[stripe.leaves(step)] = ended;
    }
  }
}

// What flows backward, and its rate.
struct Flow {
  Vec<double> mass = {}, rate = {};
};

// Returns minus the derivative of `slope` in gamma. Frontier entries as in backward_stripe.
template <bool kDropping, typename S>
LYRA_INLINE double curvature_stripe(const Curvature<S>& f, const Stripe& stripe, Flow* frontier, const uint8_t* records,
                                    const Vec<S>* rates, Flow sent_before) {
  const int64_t tiles = (stripe.steps() + kLanes - 1) / kLanes, bytes = record_bytes(f.out.store, kDropping);
  const uint8_t* record = records + stripe.steps() * bytes;
  rates += stripe.steps() * (kDropping ? 3 : 2);
  Vec<double> entropy = {}, dropped = {};
  Flow to_left, to_diagonal, sent;
  for (int64_t t = tiles - 1; t >= 0; --t) {
    const int64_t start = stripe.first + t * kLanes, stop = std::min(start + kLanes - 1, stripe.last);
    Vec<S> tile[kLanes] = {};
    for (int64_t step = stop; step >= start; --step) {
      record -= bytes;
      rates -= kDropping ? 3 : 2;
      Choice into, out_of;
      choices<kDropping>(record, f.out.store, f.of_gamma, into, out_of);
      const Flow& after = frontier[stripe.below(step)];
      const Flow ended = {pulled(sent_before.mass, after.mass), pulled(sent_before.rate, after.rate)};
      Flow here = ended;
      Flow drop;
      if constexpr (kDropping) {
        const Vec<double> keep = out_of.share[0], rate = convert<double>(rates[2]);
        here = {ended.mass * keep, ended.rate * keep + ended.mass * rate};
        drop = {ended.mass - here.mass, ended.rate - here.rate};
        dropped += drop.rate;
        entropy += ended.rate * out_of.entropy + ended.mass * rate * (out_of.log[1] - out_of.log[0]);
      }
      here = {here.mass + to_left.mass, here.rate + to_left.rate};
      tile[step - start] = convert<S>(here.rate);
      const Vec<double> rate[2] = {convert<double>(rates[0]), convert<double>(rates[1])};
      const Vec<double> rest = -(rate[0] + rate[1]);
      entropy +=
          here.rate * into.entropy - here.mass * (rate[0] * into.log[0] + rate[1] * into.log[1] + rest * into.log[2]);
      to_left = {here.mass * into.share[2], here.rate * into.share[2] + here.mass * rest};
      sent_before = sent;
      sent = {here.mass * into.share[1] + to_diagonal.mass + drop.mass,
              here.rate * into.share[1] + here.mass * rate[1] + to_diagonal.rate + drop.rate};
      to_diagonal = {here.mass * into.share[0], here.rate * into.share[0] + here.mass * rate[0]};
      frontier[stripe.sends(step)] = sent;
    }
    if (t == 0) frontier[stripe.sends(stripe.first - 1)] = to_diagonal;
    store_tile(f.out, stripe, stripe.place(start), tile);
  }
  finish_rows<kDropping>(f.out, stripe, convert<S>(dropped));
  double sum = 0;
  for (int l = 0; l < kLanes; ++l) sum += entropy[l];
  return sum;
}

}  // namespace lyra::soft_dtw_cpu
