// What one cell does in each of the sweeps.
#pragma once

#include <cstdint>

#include "lyra/launch.h"
#include "numbers.h"
#include "pairs.h"
#include "sweep.h"

namespace lyra::soft_dtw {

struct Nothing {};

template <class T>
using Cost = Cells<const T>;

// What forward keeps of a pair, each in the order of steps: a word for how a path comes into a cell, and, if rows may
// be dropped, the share of the paths in row i that match it at j.
template <class Format, bool kDrop>
struct Kept {
  typename Format::Word* words;  // null: nothing is kept
  typename Format::Keep* keeps;

  static __host__ __device__ int64_t bytes(int64_t steps) {
    return steps * kLanes * static_cast<int64_t>(sizeof(*words) + (kDrop ? sizeof(*keeps) : 0));
  }
  __device__ Kept(unsigned char* probs, int64_t pair, int64_t steps)
      : words(reinterpret_cast<typename Format::Word*>(probs ? probs + pair * bytes(steps) : nullptr)),
        keeps(reinterpret_cast<typename Format::Keep*>(words ? words + steps * kLanes : nullptr)) {}
  // Of sweeps that read alone.
  __device__ Kept(const unsigned char* probs, int64_t pair, int64_t steps)
      : Kept(const_cast<unsigned char*>(probs), pair, steps) {}
};

// --- forward ---------------------------------------------------------------------------------------------------------

// Z = 2^(-R log2(e) / gamma) of the package's docstring.
template <class T, class E>
struct Soft {
  using Number = Scaled<T, E>;
  using Factor = Scaled<T, E>;
  Weigher<T, E> weigh;

  // Z_ij = 2^(s C_ij) (diag + up + left); the shares of the three.
  template <class Format>
  __device__ __forceinline__ Number enter(T cost, const Number& diag, const Number& up, const Number& left,
                                          unsigned seed, typename Format::Word* word) const {
    const Factor w = weigh(cost);
    const E top = larger(larger(diag.exponent, up.exponent), left.exponent);
    const T d = aligned(diag.mantissa, diag.exponent, top), u = aligned(up.mantissa, up.exponent, top);
    const T sum = (d + u) + aligned(left.mantissa, left.exponent, top);
    *word = Format::shares(d, u, sum, seed);
    return normalised(sum * w.mantissa, top + w.exponent);
  }

  __device__ __forceinline__ Factor price(T cost) const { return weigh(cost); }
  static __device__ __forceinline__ Factor no_price() { return Factor::zero(); }

  // match + price above.
  template <class Format>
  __device__ __forceinline__ Number stay(const Number& match, const Number& above, const Factor& price, unsigned seed,
                                         typename Format::Keep* keep) const {
    const E dropped = larger<E>(above.exponent + price.exponent, Number::kZero), top = larger(match.exponent, dropped);
    const T kept = aligned(match.mantissa, match.exponent, top);
    const T sum = kept + aligned(above.mantissa * price.mantissa, dropped, top);
    *keep = Format::share(kept, sum, seed);
    return normalised(sum, top);
  }

  __device__ T value(const Number& end) const {
    if (end.exponent < Number::kZero / 2) return static_cast<T>(INFINITY);
    return static_cast<T>((log2(static_cast<double>(end.mantissa)) + static_cast<double>(end.exponent)) / weigh.scale);
  }
};

// gamma = 0, R itself, in double whatever the cost is. Of equals the first of diagonal, above, left; and match before
// drop.
template <class T>
struct Hard {
  struct Number {
    double total;
    static constexpr int kWords = 1;
    static __device__ __forceinline__ Number zero() { return {static_cast<double>(INFINITY)}; }
    static __device__ __forceinline__ Number one() { return {0}; }
    template <class F>
    __device__ __forceinline__ Number each(F f) const {
      return {f(total)};
    }
    __device__ __forceinline__ void pack(uint64_t* word) const { word[0] = word_of(total); }
    static __device__ __forceinline__ Number unpack(const uint64_t* word) { return {double_of(word[0])}; }
  };
  using Factor = double;

  template <class Format>
  __device__ __forceinline__ Number enter(T cost, const Number& diag, const Number& up, const Number& left, unsigned,
                                          typename Format::Word* word) const {
    const double sides = smaller(up.total, left.total);
    const bool is_diag = diag.total <= sides, is_up = up.total <= left.total;
    *word = Format::one_way(is_diag, !is_diag && is_up);
    return {static_cast<double>(cost) + (is_diag ? diag.total : sides)};
  }

  __device__ __forceinline__ Factor price(T cost) const { return cost; }
  static __device__ __forceinline__ Factor no_price() { return static_cast<double>(INFINITY); }

  template <class Format>
  __device__ __forceinline__ Number stay(const Number& match, const Number& above, Factor price, unsigned,
                                         typename Format::Keep* keep) const {
    const double dropped = above.total + price;
    const bool kept = match.total <= dropped;
    *keep = Format::all_or_none(kept);
    return {kept ? match.total : dropped};
  }

  __device__ T value(const Number& end) const { return static_cast<T>(end.total); }
};

// What a cell hands to its right neighbour: the paths that end in this match, and all that are through with row i.
template <class Number, bool kDrop>
struct Arrival;

template <class Number>
struct Arrival<Number, false> {
  Number any;
  static constexpr int kWords = Number::kWords;
  __device__ __forceinline__ const Number& match() const { return any; }
  static __device__ __forceinline__ Arrival closed() { return {Number::zero()}; }
  template <class F>
  __device__ __forceinline__ Arrival each(F f) const {
    return {any.each(f)};
  }
  __device__ __forceinline__ void pack(uint64_t* word) const { any.pack(word); }
  static __device__ __forceinline__ Arrival unpack(const uint64_t* word) { return {Number::unpack(word)}; }
};

template <class Number>
struct Arrival<Number, true> {
  Number any, matched;
  static constexpr int kWords = 2 * Number::kWords;
  __device__ __forceinline__ const Number& match() const { return matched; }
  static __device__ __forceinline__ Arrival closed() { return {Number::zero(), Number::zero()}; }
  template <class F>
  __device__ __forceinline__ Arrival each(F f) const {
    return {any.each(f), matched.each(f)};
  }
  __device__ __forceinline__ void pack(uint64_t* word) const {
    any.pack(word);
    matched.pack(word + Number::kWords);
  }
  static __device__ __forceinline__ Arrival unpack(const uint64_t* word) {
    return {Number::unpack(word), Number::unpack(word + Number::kWords)};
  }
};

// With rows that may be dropped, A for "through with row i" and M for "row i matched at j":
//   M_ij = C_ij + softmin(A_{i-1,j-1}, A_{i-1,j}, M_{i,j-1}),  A_ij = softmin(M_ij, A_{i-1,j} + drop_i),
//   A_{i,-1} = drop_0 + .. + drop_i; without, A = M.
template <class Format, class Algebra, bool kDrop>
struct Forward {
  using T = typename Format::Real;
  using Number = typename Algebra::Number;
  using In = T;
  using Message = Arrival<Number, kDrop>;
  using Price = std::conditional_t<kDrop, typename Algebra::Factor, Nothing>;
  using Stored = Nothing;
  static constexpr bool kPrices = kDrop;
  static constexpr int kBlock = kSteps * sizeof(float) / sizeof(T);

  Algebra algebra;
  const T* cells;
  int64_t row;
  const T* drop;
  Kept<Format, kDrop> kept;
  int column;

  static __device__ __forceinline__ T outside() { return static_cast<T>(INFINITY); }
  static __device__ __forceinline__ Message origin() {
    Message message = Message::closed();
    message.any = Number::one();
    return message;
  }
  static __device__ __forceinline__ Price no_price() {
    if constexpr (kDrop) return Algebra::no_price();
    return {};
  }
  __device__ __forceinline__ Price price(int i) const {
    if constexpr (kDrop) return algebra.price(drop[i]);
    return {};
  }
  __device__ __forceinline__ Stored fetch(int64_t) const { return {}; }

  __device__ __forceinline__ Message edge(Message message, const Price& price) const {
    typename Format::Keep unused;
    message.any = algebra.template stay<Format>(Number::zero(), message.any, price, 0u, &unused);
    return message;
  }

  __device__ __forceinline__ void step(int64_t place, int i, T c, const Stored&, const Price& price,
                                       const Message& left, const Message& diag, Message& mine) const {
    const unsigned seed = dither(i, column);
    typename Format::Word word;
    const Number match = algebra.template enter<Format>(c, diag.any, mine.any, left.match(), seed, &word);
    if (kept.words) kept.words[place] = word;
    if constexpr (kDrop) {
      typename Format::Keep keep;
      mine.any = algebra.template stay<Format>(match, mine.any, price, ~seed, &keep);
      mine.matched = match;
      if (kept.words) kept.keeps[place] = keep;
    } else {
      mine.any = match;
    }
  }
};

// --- backward --------------------------------------------------------------------------------------------------------

// Shares in units of one, and what -log of them and their entropy is.
template <class T>
struct Surprise {
  T diag, up, left, mean;
};

__device__ __forceinline__ float minus_log(float p) { return p > 0 ? -logf(p) : 0.0f; }
__device__ __forceinline__ double minus_log(double p) { return p > 0 ? -log(p) : 0.0; }

template <class T>
__device__ __forceinline__ Surprise<T> surprise(const Shares<T>& p) {
  const T diag = minus_log(p.diag), up = minus_log(p.up), left = minus_log(p.left);
  return {diag, up, left, p.diag * diag + (p.up * up + p.left * left)};
}

template <class Format, bool kDrop>
struct StoredShares {
  typename Format::Word word;
};
template <class Format>
struct StoredShares<Format, true> {
  typename Format::Word word;
  typename Format::Keep keep;
};

template <class Format, bool kDrop>
__device__ __forceinline__ StoredShares<Format, kDrop> fetch_shares(const Kept<Format, kDrop>& kept, int64_t place) {
  if constexpr (kDrop)
    return {kept.words[place], kept.keeps[place]};
  else
    return {kept.words[place]};
}

template <int kCount>
__device__ __forceinline__ void pack_all(const float (&x)[kCount], uint64_t* word) {
  for (int k = 0; k < kCount; k += 2) word[k / 2] = present(word_of(x[k], k + 1 < kCount ? x[k + 1] : 0.0f));
}
template <int kCount>
__device__ __forceinline__ void pack_all(const double (&x)[kCount], uint64_t* word) {
  for (int k = 0; k < kCount; ++k) word[k] = present(word_of(x[k]));
}
__device__ __forceinline__ float part_of(const uint64_t* word, int k, float) {
  return k % 2 ? high_of(word[k / 2]) : low_of(word[k / 2]);
}
__device__ __forceinline__ double part_of(const uint64_t* word, int k, double) { return double_of(word[k]); }

// kCount numbers that travel together.
template <class T, int kCount>
struct Parcel {
  T x[kCount];
  static constexpr int kWords = sizeof(T) == 4 ? (kCount + 1) / 2 : kCount;
  static __device__ __forceinline__ Parcel closed() { return {}; }
  template <class F>
  __device__ __forceinline__ Parcel each(F f) const {
    Parcel to;
#pragma unroll
    for (int k = 0; k < kCount; ++k) to.x[k] = f(x[k]);
    return to;
  }
  __device__ __forceinline__ void pack(uint64_t* word) const { pack_all(x, word); }
  static __device__ __forceinline__ Parcel unpack(const uint64_t* word) {
    Parcel to;
#pragma unroll
    for (int k = 0; k < kCount; ++k) to.x[k] = part_of(word, k, T());
    return to;
  }
};

// Expectation EM of each match and EA of being through with row i at j, EA_{n-1,m-1} = 1:
//   EM_ij = EA_ij keep_ij + EM_{i,j+1} left,  EA_ij = EA_{i+1,j} (1 - keep) + EM_{i+1,j+1} diag + EM_{i+1,j} up.
// Sums of products of numbers >= 0. A parcel is (EM left, EM diag, what was dropped of row i from here to the right).
template <class Format, bool kDrop, bool kEntropy>
struct Backward {
  using T = typename Format::Real;
  using Out = T;
  using Message = Parcel<T, kDrop ? 3 : 2>;
  using Stored = StoredShares<Format, kDrop>;
  static constexpr T kUnit = Format::kUnit, kOne = Format::kOne;
  static constexpr int kBlock = kSteps * sizeof(float) / sizeof(T);

  Kept<Format, kDrop> kept;
  T* cells;
  T grad;
  T* grad_drop;
  const Strip& strip;
  T up = 0, edge = 0;
  double entropy = 0;

  static __device__ __forceinline__ Message closed() { return {}; }
  static __device__ __forceinline__ Message origin() { return {{T(0), T(1)}}; }
  __device__ __forceinline__ Stored fetch(int64_t place) const { return fetch_shares(kept, place); }

  __device__ __forceinline__ T step(const Stored& stored, const Message& right, const Message& diag, Message& mine) {
    const Shares<T> shares = Format::steps(stored.word);
    const T any = up + diag.x[1];
    T match = any + right.x[0], dropped = 0;
    if constexpr (kDrop) {
      const T keep = Format::kept(stored.keep), part = any * kUnit;
      match = part * keep + right.x[0];
      dropped = part * (kOne - keep);
      mine.x[2] = right.x[2] + dropped;
      if (kEntropy) {
        const T p = keep * kUnit, q = (kOne - keep) * kUnit;
        entropy += any * (p * minus_log(p) + q * minus_log(q));
      }
    }
    if (kEntropy) {
      entropy += match * surprise(Shares<T>{shares.diag * kUnit, shares.up * kUnit, shares.left * kUnit}).mean;
    }
    const T unit = match * kUnit;
    mine.x[0] = unit * shares.left;
    mine.x[1] = unit * shares.diag;
    up = unit * shares.up + dropped;
    return match;
  }

  // The leftmost strip of a row knows how much of it was dropped; in front of the first column, too.
  __device__ __forceinline__ void leave(int row, const Message& mine, bool at) {
    if constexpr (kDrop) {
      if (at && !strip.left.holds(row)) {
        grad_drop[row] = grad * (mine.x[2] + edge);
        if (strip.index == 0) edge += mine.x[1];
      }
    }
  }
};

// --- curvature -------------------------------------------------------------------------------------------------------

// How shares change along a direction.
template <class T, bool kDrop>
struct Turn {
  T diag, up;
};
template <class T>
struct Turn<T, true> {
  T diag, up, keep;
};

// V, the derivative of R along a direction: of costs Z, prices and gamma (by g),
//   V_M = Z + sum_k p_k V_k - g H(p),  V_A likewise,  dp_k = p_k (sum_l p_l V_l - V_k + g (-log p_k - H)) / gamma.
// In double: the differences of V are small beside V.
template <class Format, bool kDrop>
struct Tangent {
  using T = typename Format::Real;
  using In = T;
  using Message = Parcel<double, kDrop ? 2 : 1>;  // V_A, V_M
  using Price = std::conditional_t<kDrop, T, Nothing>;
  using Stored = StoredShares<Format, kDrop>;
  static constexpr bool kPrices = kDrop;
  static constexpr int kBlock = kSteps / 2;

  Kept<Format, kDrop> kept;
  Turn<T, kDrop>* turns;
  const T* cells;
  int64_t row;
  const T* along_drop;
  double along_gamma, one_over_gamma;  // 1 / gamma is 0 for gamma = 0

  static __device__ __forceinline__ T outside() { return 0; }
  static __device__ __forceinline__ Message origin() { return {}; }
  static __device__ __forceinline__ Price no_price() { return {}; }
  __device__ __forceinline__ Price price(int i) const {
    if constexpr (kDrop) return along_drop ? along_drop[i] : T(0);
    return {};
  }
  __device__ __forceinline__ Stored fetch(int64_t place) const { return fetch_shares(kept, place); }
  __device__ __forceinline__ Message edge(Message message, const Price& price) const {
    if constexpr (kDrop) message.x[0] += price;
    return message;
  }

  static __device__ __forceinline__ double times(double p, double v) { return p > 0 ? p * v : 0.0; }

  __device__ __forceinline__ void step(int64_t place, int, T z, const Stored& stored, const Price& price,
                                       const Message& left, const Message& diag, Message& mine) const {
    const Shares<T> shares = Format::steps(stored.word);
    const double unit = Format::kUnit, d = shares.diag * unit, u = shares.up * unit, l = shares.left * unit;
    const double from_left = left.x[kDrop ? 1 : 0];
    const double mean = times(d, diag.x[0]) + (times(u, mine.x[0]) + times(l, from_left));
    const Surprise<double> minus_logs = surprise(Shares<double>{d, u, l});
    const double level = mean - along_gamma * minus_logs.mean;
    const double match = z + level;
    Turn<T, kDrop> turn;
    turn.diag = static_cast<T>(times(d, level - diag.x[0] + along_gamma * minus_logs.diag) * one_over_gamma);
    turn.up = static_cast<T>(times(u, level - mine.x[0] + along_gamma * minus_logs.up) * one_over_gamma);
    if constexpr (kDrop) {
      const double p = Format::kept(stored.keep) * unit, q = 1.0 - p, dropped = mine.x[0] + price;
      const double log_p = minus_log(p), entropy = p * log_p + q * minus_log(q);
      const double any = times(p, match) + times(q, dropped) - along_gamma * entropy;
      turn.keep = static_cast<T>(times(p, any - match + along_gamma * log_p) * one_over_gamma);
      mine.x[0] = any;
      mine.x[1] = match;
    } else {
      mine.x[0] = match;
    }
    turns[place] = turn;
  }
};

template <class Format, bool kDrop>
struct StoredTurn {
  StoredShares<Format, kDrop> shares;
  Turn<typename Format::Real, kDrop> turn;
};

// The derivative of Backward's EM and EA along the direction; a parcel is (EM left, EM diag) and the derivatives of
// both, and of what was dropped.
template <class Format, bool kDrop>
struct Curvature {
  using T = typename Format::Real;
  using Out = T;
  using Message = Parcel<T, kDrop ? 5 : 4>;
  using Stored = StoredTurn<Format, kDrop>;
  static constexpr T kUnit = Format::kUnit;
  static constexpr int kBlock = kSteps / 4;

  Kept<Format, kDrop> kept;
  const Turn<T, kDrop>* turns;
  T* cells;
  T grad;
  T* grad_drop;
  const Strip& strip;
  T up = 0, up_turn = 0, edge = 0;
  double entropy = 0;  // the derivative of all of it

  static __device__ __forceinline__ Message origin() { return {{T(0), T(1)}}; }
  __device__ __forceinline__ Stored fetch(int64_t place) const { return {fetch_shares(kept, place), turns[place]}; }

  __device__ __forceinline__ T step(const Stored& stored, const Message& right, const Message& diag, Message& mine) {
    const Shares<T> in_units = Format::steps(stored.shares.word);
    const Shares<T> p{in_units.diag * kUnit, in_units.up * kUnit, in_units.left * kUnit};
    const auto& turn = stored.turn;
    const T left_turn = -(turn.diag + turn.up);
    const T any = up + diag.x[1], any_turn = up_turn + diag.x[3];
    T match = any + right.x[0], match_turn = any_turn + right.x[2], dropped = 0, dropped_turn = 0;
    if constexpr (kDrop) {
      const T keep = Format::kept(stored.shares.keep) * kUnit, drop = T(1) - keep;
      match = any * keep + right.x[0];
      match_turn = any_turn * keep + any * turn.keep + right.x[2];
      dropped = any * drop;
      dropped_turn = any_turn * drop - any * turn.keep;
      mine.x[4] = right.x[4] + dropped_turn;
      const T log_keep = minus_log(keep), log_drop = minus_log(drop);
      entropy += any_turn * (keep * log_keep + drop * log_drop) + any * (turn.keep * (log_keep - log_drop));
    }
    const Surprise<T> logs = surprise(p);
    entropy += match_turn * logs.mean + match * (turn.diag * logs.diag + turn.up * logs.up + left_turn * logs.left);
    mine.x[0] = match * p.left;
    mine.x[1] = match * p.diag;
    mine.x[2] = match_turn * p.left + match * left_turn;
    mine.x[3] = match_turn * p.diag + match * turn.diag;
    up = match * p.up + dropped;
    up_turn = match_turn * p.up + match * turn.up + dropped_turn;
    return match_turn;
  }

  __device__ __forceinline__ void leave(int row, const Message& mine, bool at) {
    if constexpr (kDrop) {
      if (at && !strip.left.holds(row)) {
        grad_drop[row] = grad * (mine.x[4] + edge);
        if (strip.index == 0) edge += mine.x[3];
      }
    }
  }
};

}  // namespace lyra::soft_dtw
