// Soft-DTW: the schema of the raw ops, and their CPU implementation.
//
// Forward.  With Z = exp(-R / gamma) the recursion R_ij = C_ij + softmin_gamma(R of the three predecessors) is linear:
//     Z_ij = W_ij (Z_{i-1,j-1} + Z_{i-1,j} + Z_{i,j-1}),   W = exp(-C / gamma),   value = -gamma log Z_{n-1,m-1}.
// Z leaves any float's range within a few cells, so it is kept as mantissa in [1, 2) times 2^exponent, the exponent an
// integer of its own. No exp or log stands on the dependent chain, and the error does not grow with R / gamma, as it
// does when differences of a stored R are taken.
//
// Probs.  probs[b,i,j] = (Z_{i-1,j-1}, Z_{i-1,j}) / their sum with Z_{i,j-1}: how the path came into the cell. The
// third share is (1 - first) - second in the arithmetic of the dtype; forward stores a second share that makes it >= 0,
// and 0 where nothing came from the left: so no weight ever leaks into a cell without a path. Everything outside the
// pair or the band is 0. The pair's last cell, (n-1, m-1), also carries the verdict on the pair:
//     (1, 1): there is no path, value +inf, gradient 0;      NaN: NaN or -inf among its costs, value and gradient NaN.
//
// Backward.  E_ij = share of E from the three successors, E_{n-1,m-1} = 1; grad_cost = grad_value E. A pure sum of
// products of numbers >= 0. Gradients outside the pair and the band are exactly 0.
//
// band: -1, or w >= 0 with the cells 2 |j (n-1) - i (m-1)| <= max(2 w (n-1), n + m - 2).
// A length outside 1..N or 1..M gives NaN as value and in all of grad_cost of its pair alone.
// Costs above min(2^50, 2^60 / (n + m)) gamma ln 2 count as infinite, below minus that as -inf.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <new>
#include <tuple>

#include "lyra/check.h"
#include "lyra/simd.h"

STABLE_TORCH_LIBRARY_FRAGMENT(lyra, m) {
  m.def(
      "soft_dtw_forward(Tensor cost, Tensor x_lengths, Tensor y_lengths, float gamma, Tensor? gammas, int band,"
      " Tensor? low, Tensor? high, Tensor? drop, int store) -> (Tensor value, Tensor probs)");
  m.def(
      "soft_dtw_backward(Tensor grad_value, Tensor value, Tensor probs, Tensor x_lengths, Tensor y_lengths, int rows,"
      " int columns, int band, Tensor? low, Tensor? high, bool dropping, bool hard, bool with_entropy)"
      " -> (Tensor grad_cost, Tensor grad_drop, Tensor entropy)");
  m.def(
      "soft_dtw_curvature(Tensor grad_value, Tensor value, Tensor probs, Tensor x_lengths, Tensor y_lengths,"
      " float gamma, Tensor? gammas, int band, Tensor? low, Tensor? high, bool dropping, Tensor along,"
      " Tensor? along_drop, Tensor? along_gamma)"
      " -> (Tensor slope, Tensor grad_cost, Tensor grad_drop, Tensor grad_gamma)");
}

namespace lyra {
namespace {

// Pairs that go through the recursion side by side. What one gets does not depend on the others.
constexpr int kLanes = 8;
template <typename T>
struct Lanes {
  typedef T Type __attribute__((vector_size(kLanes * sizeof(T))));
};
template <typename T>
using Vec = typename Lanes<T>::Type;

template <typename T>
struct Format;  // of an IEEE number, and how many terms of exp's series it needs on [-ln2/2, ln2/2]
template <>
struct Format<float> {
  using Int = int32_t;
  static constexpr Int bits = 23, bias = 127;
  static constexpr int terms = 7;
};
template <>
struct Format<double> {
  using Int = int64_t;
  static constexpr Int bits = 52, bias = 1023;
  static constexpr int terms = 13;
};

// Vectors in a row. Not std::vector, whose allocator sees the element's type without its alignment.
template <typename V>
class Buffer {
 public:
  LYRA_INLINE explicit Buffer(int64_t size, V value = V{}) : data_(new (std::align_val_t{64}) V[size]) {
    fill(0, size - 1, value);
  }
  ~Buffer() { ::operator delete[](data_, std::align_val_t{64}); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  LYRA_INLINE V& operator[](int64_t i) { return data_[i]; }
  LYRA_INLINE auto* at(int64_t i, int lane) { return &data_[i][0] + lane; }
  LYRA_INLINE void fill(int64_t first, int64_t last, V value) {
    for (int64_t i = first; i <= last; ++i) data_[i] = value;
  }

 private:
  V* data_;
};

// kLanes numbers mantissa * 2^exponent, the mantissa in [1, 2), or 0 with an exponent below all others.
template <typename T>
struct Scaled {
  using Int = typename Format<T>::Int;
  static constexpr Int kNone = -(Int{1} << (8 * sizeof(Int) - 2));  // differences of exponents must not overflow
  Vec<T> mantissa = {};
  Vec<Int> exponent = Vec<Int>{} + kNone;
};

template <typename T>
LYRA_INLINE Vec<T> from_bits(Vec<typename Format<T>::Int> bits) {
  return std::bit_cast<Vec<T>>(bits);
}

// number * 2^(exponent - top), for top >= exponent; what is smaller than any normal number becomes 0.
template <typename T>
LYRA_INLINE Vec<T> shifted(const Scaled<T>& number, Vec<typename Format<T>::Int> top) {
  using F = Format<T>;
  const auto shift = number.exponent - top + F::bias;
  return number.mantissa * from_bits<T>((shift > 0 ? shift : Vec<typename F::Int>{}) << F::bits);
}

// exp(-cost / gamma), scale = -log2(e) / gamma; 0 where cost scale < -limit, limit <= 2^50.
template <typename T, typename S>
LYRA_INLINE Scaled<T> weight(Vec<S> cost, double scale, Vec<double> limit) {
  using Int = typename Format<T>::Int;
  constexpr double kRound = 6755399441055744.0;  // 1.5 * 2^52: adding it rounds to an integer, which its low bits show
  Vec<double> power = __builtin_convertvector(cost, Vec<double>) * scale;
  const Vec<int64_t> infinite = power < -limit;
  power = infinite ? Vec<double>{} : power;
  const Vec<double> rounded = power + kRound;
  const Vec<int64_t> integer = std::bit_cast<Vec<int64_t>>(rounded) - std::bit_cast<int64_t>(kRound);
  const Vec<T> x = __builtin_convertvector((power - (rounded - kRound)) * 0.6931471805599453, Vec<T>);
  constexpr int kTerms = Format<T>::terms;
  double last = 1;  // 1 / terms!, from which the other coefficients follow
  for (int n = 2; n <= kTerms; ++n) last /= n;
  Vec<T> series = Vec<T>{} + static_cast<T>(last);
  for (int n = kTerms; n > 0; --n) series = static_cast<T>(last *= n) + series * x;
  const auto none = __builtin_convertvector(infinite, Vec<Int>);
  return {none ? Vec<T>{} : series, __builtin_convertvector(integer, Vec<Int>)};
}

// Memory holds a row of one pair after the other, the recursion a column of all pairs side by side. Four columns of
// four pairs turn in registers; vectors of four exist on every machine, so no clone falls back to single numbers for
// floats.
constexpr int kTile = 4;
static_assert(kLanes % kTile == 0);
template <typename S>
struct TileOf {
  typedef S Type __attribute__((vector_size(kTile * sizeof(S))));
};
template <typename S>
using Quad = typename TileOf<S>::Type;

template <typename S>
LYRA_INLINE Quad<S> load(const S* from) {
  Quad<S> quad;
  std::memcpy(&quad, from, sizeof(quad));
  return quad;
}

template <typename S>
LYRA_INLINE void store(S* to, Quad<S> quad) {
  std::memcpy(to, &quad, sizeof(quad));
}

template <typename Q>
LYRA_INLINE Q low_pairs(Q a, Q b) {
  return __builtin_shufflevector(a, b, 0, 4, 1, 5);
}

template <typename Q>
LYRA_INLINE Q high_pairs(Q a, Q b) {
  return __builtin_shufflevector(a, b, 2, 6, 3, 7);
}

template <typename Q>
LYRA_INLINE void transpose(Q (&q)[kTile]) {
  const Q a = low_pairs(q[0], q[2]), b = low_pairs(q[1], q[3]);
  const Q c = high_pairs(q[0], q[2]), d = high_pairs(q[1], q[3]);
  q[0] = low_pairs(a, b);
  q[1] = high_pairs(a, b);
  q[2] = low_pairs(c, d);
  q[3] = high_pairs(c, d);
}

// One pair of the batch, as both directions see it.
struct Pair {
  int64_t index = 0, n = 0, m = 0;  // n = 0: an empty lane
  int64_t band = -1;

  struct Window {
    int64_t low, high;  // first and last column; none where high < low
  };
  Window window(int64_t i) const {
    if (i >= n) return {std::numeric_limits<int64_t>::max(), -1};
    const int64_t rise = n - 1, run = m - 1;
    if (band < 0 || rise == 0) return {0, run};
    const int64_t width = std::max(2 * band * rise, rise + run) / 2;  // the cells with |j rise - i run| <= width
    return {std::max<int64_t>(0, (i * run - width + rise - 1) / rise), std::min(run, (i * run + width) / rise)};
  }
};

// The windows of row i of all lanes, and the columns that hold them all. Both ends of it only grow with i as long as
// no lane ends, which is what lets one row buffer serve all rows.
struct Row {
  Pair::Window lane[kLanes];
  Pair::Window all = {std::numeric_limits<int64_t>::max(), -1};

  Row(const Pair* pairs, int64_t i) {
    for (int l = 0; l < kLanes; ++l) {
      lane[l] = pairs[l].window(i);
      all = {std::min(all.low, lane[l].low), std::max(all.high, lane[l].high)};
    }
  }
};

// Calls tile(first lane, first column) for whole tiles of cells that are in the windows of all their lanes, and
// cell(lane, column) for the cells in windows that no tile holds.
template <typename Tile, typename Cell>
LYRA_INLINE void for_windows(const Row& row, const Tile& tile, const Cell& cell) {
  for (int first = 0; first < kLanes; first += kTile) {
    int64_t low = 0, high = std::numeric_limits<int64_t>::max();  // the columns that all four have
    for (int l = first; l < first + kTile; ++l) {
      low = std::max(low, row.lane[l].low);
      high = std::min(high, row.lane[l].high);
    }
    const int64_t tiled = low <= high ? low + (high - low + 1) / kTile * kTile : low;  // no tile where low == tiled
    for (int64_t j = low; j < tiled; j += kTile) tile(first, j);
    for (int l = first; l < first + kTile; ++l) {
      const auto [begin, end] = row.lane[l];
      for (int64_t j = begin; j <= std::min(end, low - 1); ++j) cell(l, j);
      for (int64_t j = std::max(begin, tiled); j <= end; ++j) cell(l, j);
    }
  }
}

int64_t most_rows(const Pair* pairs) {
  int64_t rows = 0;
  for (int l = 0; l < kLanes; ++l) rows = std::max(rows, pairs[l].n);
  return rows;
}

template <typename S>
struct Forward {
  const S* cost;
  int64_t cost_batch, cost_row;  // strides
  S *value, *probs;
  int64_t rows, columns;  // N, M
  double gamma, scale;

  double limit(const Pair& pair) const { return std::min(0x1p50, 0x1p60 / static_cast<double>(pair.n + pair.m)); }
};

// T: what the recursion runs in, S: what it is stored in.
template <typename S, typename T>
LYRA_INLINE void forward_lanes(const Forward<S>& f, const Pair* pairs) {
  using Format = lyra::Format<T>;
  using Int = typename Format::Int;
  Buffer<Vec<T>> mantissas(f.columns + 1);
  Buffer<Vec<Int>> exponents(f.columns + 1, Scaled<T>{}.exponent);
  Buffer<Vec<S>> costs(f.columns), firsts(f.columns), seconds(f.columns);
  // Entry j + 1 of the row buffers is column j of the row above, until this row has passed there. The origin, from
  // which the first cell is reached diagonally, stands before the first column.
  mantissas[0] += T(1);
  exponents[0] = Vec<Int>{};
  Vec<double> limits;
  for (int l = 0; l < kLanes; ++l) limits[l] = f.limit(pairs[l]);

  for (int64_t i = 0, rows = most_rows(pairs); i < rows; ++i) {
    const Row row(pairs, i);
    const S* from[kLanes];
    S* to[kLanes];
    for (int l = 0; l < kLanes; ++l) {
      from[l] = f.cost + pairs[l].index * f.cost_batch + i * f.cost_row;
      to[l] = f.probs + (pairs[l].index * f.rows + i) * f.columns * 2;
    }
    costs.fill(row.all.low, row.all.high, Vec<S>{} + std::numeric_limits<S>::infinity());
    for_windows(
        row,
        [&](int first, int64_t j) {
          Quad<S> quads[kTile];
          for (int k = 0; k < kTile; ++k) quads[k] = load(from[first + k] + j);
          transpose(quads);
          for (int k = 0; k < kTile; ++k) store(costs.at(j + k, first), quads[k]);
        },
        [&](int l, int64_t j) { *costs.at(j, l) = from[l][j]; });

    Scaled<T> diagonal{mantissas[row.all.low], exponents[row.all.low]}, left;
    mantissas[row.all.low] = left.mantissa;
    exponents[row.all.low] = left.exponent;
    for (int64_t j = row.all.low; j <= row.all.high; ++j) {
      const Scaled<T> up{mantissas[j + 1], exponents[j + 1]}, w = weight<T, S>(costs[j], f.scale, limits);
      const auto higher = up.exponent > left.exponent ? up.exponent : left.exponent;
      const auto top = diagonal.exponent > higher ? diagonal.exponent : higher;
      const Vec<T> a = shifted(diagonal, top), b = shifted(up, top), c = shifted(left, top);
      const Vec<T> sum = a + (b + c);

      const auto reached = sum > T(0);
      const Vec<T> total = reached ? sum : Vec<T>{} + T(1);
      const Vec<S> first = __builtin_convertvector(a / total, Vec<S>), rest = S(1) - first;
      const Vec<S> second = __builtin_convertvector(b / total, Vec<S>);
      const auto all_the_rest = __builtin_convertvector(reached & (c == T(0)), Vec<typename lyra::Format<S>::Int>);
      firsts[j] = first;
      seconds[j] = all_the_rest | (second > rest) ? rest : second;

      const auto bits = std::bit_cast<Vec<Int>>(sum * w.mantissa);
      constexpr Int kOne = Format::bias << Format::bits, kFraction = (Int{1} << Format::bits) - 1;
      diagonal = up;
      left.mantissa = bits > 0 ? from_bits<T>((bits & kFraction) | kOne) : Vec<T>{};
      left.exponent = bits > 0 ? top + w.exponent + (bits >> Format::bits) - Format::bias : Scaled<T>{}.exponent;
      mantissas[j + 1] = left.mantissa;
      exponents[j + 1] = left.exponent;
    }

    for_windows(
        row,
        [&](int first, int64_t j) {
          Quad<S> a[kTile], b[kTile];
          for (int k = 0; k < kTile; ++k) {
            a[k] = load(firsts.at(j + k, first));
            b[k] = load(seconds.at(j + k, first));
          }
          transpose(a);
          transpose(b);
          for (int k = 0; k < kTile; ++k) {
            store(to[first + k] + 2 * j, low_pairs(a[k], b[k]));
            store(to[first + k] + 2 * j + kTile, high_pairs(a[k], b[k]));
          }
        },
        [&](int l, int64_t j) {
          to[l][2 * j] = *firsts.at(j, l);
          to[l][2 * j + 1] = *seconds.at(j, l);
        });
    for (int l = 0; l < kLanes; ++l) {
      if (i >= pairs[l].n) continue;
      const auto [low, high] = row.lane[l];
      std::fill(to[l], to[l] + 2 * low, S(0));
      std::fill(to[l] + 2 * (high + 1), to[l] + 2 * f.columns, S(0));
      if (i != pairs[l].n - 1) continue;
      const T mantissa = mantissas[high + 1][l];
      const double bits = std::log2(static_cast<double>(mantissa)) + static_cast<double>(exponents[high + 1][l]);
      f.value[pairs[l].index] =
          mantissa > 0 ? static_cast<S>(-f.gamma * 0.6931471805599453 * bits) : std::numeric_limits<S>::infinity();
      if (!(mantissa > 0)) to[l][2 * high] = to[l][2 * high + 1] = S(1);
    }
  }
}

template <typename S>
struct Backward {
  const S *grad_value, *probs;
  S* grad_cost;
  int64_t rows, columns;
};

template <typename S>
LYRA_INLINE void backward_lanes(const Backward<S>& f, const Pair* pairs) {
  // Entry j + 1 of `row` is what has come to column j of this row from the row below; entry 0 is never used.
  Buffer<Vec<S>> row(f.columns + 1), expected(f.columns), firsts(f.columns), seconds(f.columns);

  for (int64_t i = most_rows(pairs) - 1; i >= 0; --i) {
    const Row windows(pairs, i);
    const int64_t low = windows.all.low, high = windows.all.high;
    const S* from[kLanes];
    S *to[kLanes], grad[kLanes];
    for (int l = 0; l < kLanes; ++l) {
      const int64_t start = (pairs[l].index * f.rows + i) * f.columns;
      from[l] = f.probs + start * 2;
      to[l] = f.grad_cost + start;
      grad[l] = f.grad_value[pairs[l].index];
      if (i == pairs[l].n - 1) row[pairs[l].m][l] = S(1);
    }
    firsts.fill(low, high, Vec<S>{});
    seconds.fill(low, high, Vec<S>{});
    for_windows(
        windows,
        [&](int first, int64_t j) {
          Quad<S> a[kTile], b[kTile];
          for (int k = 0; k < kTile; ++k) {
            const Quad<S> begin = load(from[first + k] + 2 * j), end = load(from[first + k] + 2 * j + kTile);
            a[k] = __builtin_shufflevector(begin, end, 0, 2, 4, 6);
            b[k] = __builtin_shufflevector(begin, end, 1, 3, 5, 7);
          }
          transpose(a);
          transpose(b);
          for (int k = 0; k < kTile; ++k) {
            store(firsts.at(j + k, first), a[k]);
            store(seconds.at(j + k, first), b[k]);
          }
        },
        [&](int l, int64_t j) {
          *firsts.at(j, l) = from[l][2 * j];
          *seconds.at(j, l) = from[l][2 * j + 1];
        });

    Vec<S> left = {}, diagonal = {};  // what this row sends to the cell before in its own row, and in the row above
    for (int64_t j = high; j >= low; --j) {
      const Vec<S> here = row[j + 1] + left;
      expected[j] = here;
      row[j + 1] = here * seconds[j] + diagonal;
      diagonal = here * firsts[j];
      left = here * ((S(1) - firsts[j]) - seconds[j]);
    }
    row[low] = diagonal;

    for_windows(
        windows,
        [&](int first, int64_t j) {
          Quad<S> quads[kTile];
          for (int k = 0; k < kTile; ++k) quads[k] = load(expected.at(j + k, first));
          transpose(quads);
          for (int k = 0; k < kTile; ++k) store(to[first + k] + j, grad[first + k] * quads[k]);
        },
        [&](int l, int64_t j) { to[l][j] = grad[l] * *expected.at(j, l); });
    for (int l = 0; l < kLanes; ++l) {
      if (i >= pairs[l].n) continue;
      const auto [first, last] = windows.lane[l];
      std::fill(to[l], to[l] + first, S(0));
      std::fill(to[l] + last + 1, to[l] + f.columns, S(0));
    }
  }
}

LYRA_SIMD void run(const Forward<float>& f, const Pair* pairs, float) { forward_lanes<float, float>(f, pairs); }
LYRA_SIMD void run(const Forward<float>& f, const Pair* pairs, double) { forward_lanes<float, double>(f, pairs); }
LYRA_SIMD void run(const Forward<double>& f, const Pair* pairs, double) { forward_lanes<double, double>(f, pairs); }
LYRA_SIMD void run(const Backward<float>& f, const Pair* pairs) { backward_lanes(f, pairs); }
LYRA_SIMD void run(const Backward<double>& f, const Pair* pairs) { backward_lanes(f, pairs); }

// What has to be known of a pair's costs before the recursion.
struct Survey {
  bool bad = false;    // NaN or -inf among them
  double largest = 0;  // |cost / gamma| log2(e) of the finite ones
};

template <typename S>
LYRA_INLINE Survey survey_cost(const Forward<S>& f, const Pair& pair) {
  using Int = typename Format<S>::Int;  // ordered like the magnitudes they stand for, and quicker to reduce
  constexpr Int kMagnitude = std::numeric_limits<Int>::max();
  constexpr Int kInfinity = std::bit_cast<Int>(std::numeric_limits<S>::infinity());
  const double finite = std::min<double>(std::numeric_limits<S>::max(), -f.limit(pair) / f.scale);
  const Int limit = std::bit_cast<Int>(static_cast<S>(finite));
  Int bad = 0, largest = 0;
  for (int64_t i = 0; i < pair.n; ++i) {
    const S* cost = f.cost + pair.index * f.cost_batch + i * f.cost_row;
    const auto [low, high] = pair.window(i);
    for (int64_t j = low; j <= high; ++j) {
      const Int bits = std::bit_cast<Int>(cost[j]), magnitude = bits & kMagnitude;
      const Int beyond = magnitude > limit;
      bad |= beyond & (Int{bits < 0} | Int{magnitude > kInfinity});
      largest = std::max(largest, beyond ? Int{0} : magnitude);
    }
  }
  return {bad != 0, static_cast<double>(std::bit_cast<S>(largest)) * -f.scale};
}

LYRA_SIMD Survey survey(const Forward<float>& f, const Pair& pair) { return survey_cost(f, pair); }
LYRA_SIMD Survey survey(const Forward<double>& f, const Pair& pair) { return survey_cost(f, pair); }

template <typename S>
void fill_rows(S* data, int64_t row_size, int64_t from, int64_t to, S value) {
  std::fill(data + from * row_size, data + to * row_size, value);
}

// Calls body(first pair, number of pairs) for groups of kLanes pairs, in parallel.
template <typename Body>
void for_groups(int64_t batch, const Body& body) {
  torch::stable::parallel_for(0, (batch + kLanes - 1) / kLanes, 1, [&](int64_t begin, int64_t end) {
    for (int64_t group = begin; group < end; ++group) {
      body(group * kLanes, std::min<int64_t>(kLanes, batch - group * kLanes));
    }
  });
}

template <typename S>
void forward_batch(const Forward<S>& f, const int64_t* x_lengths, const int64_t* y_lengths, int64_t batch,
                   int64_t band) {
  constexpr S kNaN = std::numeric_limits<S>::quiet_NaN();
  for_groups(batch, [&](int64_t start, int64_t count) {
    Pair narrow[kLanes], wide[kLanes];  // by the range of exponents that they need, their own and nobody else's
    bool any_narrow = false, any_wide = false;
    for (int l = 0; l < count; ++l) {
      const Pair pair{start + l, x_lengths[start + l], y_lengths[start + l], std::min(band, f.columns)};
      S* probs = f.probs + pair.index * f.rows * f.columns * 2;
      const bool fits = pair.n >= 1 && pair.n <= f.rows && pair.m >= 1 && pair.m <= f.columns;
      fill_rows(probs, 2 * f.columns, fits ? pair.n : 0, f.rows, S(0));
      f.value[pair.index] = kNaN;
      if (!fits) continue;
      const Survey found = survey(f, pair);
      if (found.bad) {
        fill_rows(probs, 2 * f.columns, 0, pair.n, S(0));
        S* end = probs + ((pair.n - 1) * f.columns + pair.m - 1) * 2;
        end[0] = end[1] = kNaN;
      } else if (sizeof(S) == 4 && found.largest * static_cast<double>(pair.n + pair.m) < 0x1p29) {
        narrow[l] = pair;
        any_narrow = true;
      } else {
        wide[l] = pair;
        any_wide = true;
      }
    }
    if (any_narrow) run(f, narrow, S{});
    if (any_wide) run(f, wide, double{});
  });
}

template <typename S>
void backward_batch(const Backward<S>& f, const int64_t* x_lengths, const int64_t* y_lengths, int64_t batch,
                    int64_t band) {
  constexpr S kNaN = std::numeric_limits<S>::quiet_NaN();
  for_groups(batch, [&](int64_t start, int64_t count) {
    Pair pairs[kLanes];
    for (int l = 0; l < count; ++l) {
      const Pair pair{start + l, x_lengths[start + l], y_lengths[start + l], std::min(band, f.columns)};
      S* grad = f.grad_cost + pair.index * f.rows * f.columns;
      const bool fits = pair.n >= 1 && pair.n <= f.rows && pair.m >= 1 && pair.m <= f.columns;
      fill_rows(grad, f.columns, fits ? pair.n : 0, f.rows, fits ? S(0) : kNaN);
      if (!fits) continue;
      const S* end = f.probs + ((pair.index * f.rows + pair.n - 1) * f.columns + pair.m - 1) * 2;
      if (end[0] + end[1] <= S(1)) {
        pairs[l] = pair;
        continue;
      }
      fill_rows(grad, f.columns, 0, pair.n, S(0));
      if (!std::isnan(end[0])) continue;
      for (int64_t i = 0; i < pair.n; ++i) {
        const auto [low, high] = pair.window(i);
        std::fill(grad + i * f.columns + low, grad + i * f.columns + high + 1, kNaN);
      }
    }
    run(f, pairs);
  });
}

void check_lengths(const char* name, const Tensor& lengths, int64_t batch) {
  check_shape(name, lengths, {batch});
  check_dtype(name, lengths, ScalarType::Long);
  check_contiguous(name, lengths);
}

void check_float(const char* name, const Tensor& t) {
  check(t.scalar_type() == ScalarType::Float || t.scalar_type() == ScalarType::Double, name, ": got dtype ",
        torch::headeronly::toString(t.scalar_type()), ", expected float32 or float64");
}

std::tuple<Tensor, Tensor> forward(const Tensor& given, const Tensor& x_lengths, const Tensor& y_lengths, double gamma,
                                   int64_t band) {
  check_shape("cost", given, {kAny, kAny, kAny});
  check_float("cost", given);
  const Tensor cost = given.stride(2) == 1 ? given : torch::stable::contiguous(given);
  const int64_t batch = cost.size(0), rows = cost.size(1), columns = cost.size(2);
  check_lengths("x_lengths", x_lengths, batch);
  check_lengths("y_lengths", y_lengths, batch);
  const double scale = -1.4426950408889634 / gamma;
  check(gamma > 0 && std::isfinite(gamma) && std::isfinite(scale), "gamma: got ", gamma, ", expected a number > 0");
  check(band >= -1, "band: got ", band, ", expected -1 (none) or more");
  Tensor value = torch::stable::new_empty(cost, {batch});
  Tensor probs = torch::stable::new_empty(cost, {batch, rows, columns, 2});
  const auto go = [&]<typename S>(S) {
    const Forward<S> f{cost.const_data_ptr<S>(),
                       cost.stride(0),
                       cost.stride(1),
                       value.mutable_data_ptr<S>(),
                       probs.mutable_data_ptr<S>(),
                       rows,
                       columns,
                       gamma,
                       scale};
    forward_batch(f, x_lengths.const_data_ptr<int64_t>(), y_lengths.const_data_ptr<int64_t>(), batch, band);
  };
  cost.scalar_type() == ScalarType::Float ? go(float{}) : go(double{});
  return {value, probs};
}

Tensor backward(const Tensor& grad_value, const Tensor& probs, const Tensor& x_lengths, const Tensor& y_lengths,
                int64_t band) {
  check_shape("probs", probs, {kAny, kAny, kAny, 2});
  check_float("probs", probs);
  check_contiguous("probs", probs);
  const int64_t batch = probs.size(0), rows = probs.size(1), columns = probs.size(2);
  check_shape("grad_value", grad_value, {batch});
  check_dtype("grad_value", grad_value, probs.scalar_type());
  check_lengths("x_lengths", x_lengths, batch);
  check_lengths("y_lengths", y_lengths, batch);
  check(band >= -1, "band: got ", band, ", expected -1 (none) or more");
  const Tensor grad = torch::stable::contiguous(grad_value);  // a summed loss hands down one number with stride 0
  Tensor grad_cost = torch::stable::new_empty(probs, {batch, rows, columns});
  const auto go = [&]<typename S>(S) {
    const Backward<S> f{grad.const_data_ptr<S>(), probs.const_data_ptr<S>(), grad_cost.mutable_data_ptr<S>(), rows,
                        columns};
    backward_batch(f, x_lengths.const_data_ptr<int64_t>(), y_lengths.const_data_ptr<int64_t>(), batch, band);
  };
  probs.scalar_type() == ScalarType::Float ? go(float{}) : go(double{});
  return grad_cost;
}

}  // namespace
}  // namespace lyra

STABLE_TORCH_LIBRARY_IMPL(lyra, CPU, m) {
  m.impl("soft_dtw_forward", TORCH_BOX(&lyra::forward));
  m.impl("soft_dtw_backward", TORCH_BOX(&lyra::backward));
}
