// The recursion in one cell of each lane, soft or hard.
#pragma once

#include <cmath>
#include <limits>

#include "lanes.h"
#include "stripe.h"

namespace lyra::soft_dtw_cpu {

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

  struct Border {  // what the stripe below needs of a state
    T mantissa;
    Int exponent;
  };
  static Border border(const State& of) { return {of.mantissa[kLanes - 1], of.exponent[kLanes - 1]}; }
  static State behind(Border of) { return {Vec<T>{} + of.mantissa, Vec<Int>{} + of.exponent}; }

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
  static LYRA_INLINE State match(const State& w, const State& diagonal, const State& up, const State& left,
                                 Shares<T>& shares) {
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

  using Border = double;
  static Border border(const State& of) { return of.sum[kLanes - 1]; }
  static State behind(Border of) { return {Vec<double>{} + of}; }

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
  static LYRA_INLINE State match(const State& w, const State& diagonal, const State& up, const State& left,
                                 Shares<double>& shares) {
    const Vec<double> none = {}, all = none + 1.0;
    const auto from_diagonal = (diagonal.sum <= up.sum) & (diagonal.sum <= left.sum);
    const auto from_up = ~from_diagonal & (up.sum <= left.sum);
    shares = {from_diagonal ? all : none, from_up ? all : none, from_diagonal | from_up ? all : none, all};
    return {w.sum + least(diagonal.sum, least(up.sum, left.sum))};
  }
  static LYRA_INLINE State merged(const State& matched, const State& up, const State& drop, Part<double>& keep) {
    const auto dropped = up.sum + drop.sum;
    keep = {matched.sum <= dropped ? Vec<double>{} + 1.0 : Vec<double>{}, Vec<double>{} + 1.0};
    return {least(matched.sum, dropped)};
  }
  double value(const State& state, int lane) const { return state.sum[lane]; }
};

}  // namespace lyra::soft_dtw_cpu
