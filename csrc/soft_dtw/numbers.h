// The numbers of the recursion: mantissas with exponents of their own, and shares in fixed point.
#pragma once

#include <cstdint>
#include <type_traits>

#include "lyra/launch.h"
#include "pairs.h"

namespace lyra::soft_dtw {

// Device words are 64 bits; this one says "not yet".
constexpr uint64_t kAbsent = ~uint64_t{0};

template <int kCount>
struct Words {
  uint64_t word[kCount];
};

__device__ __forceinline__ uint64_t word_of(float low, float high) {
  return static_cast<uint32_t>(__float_as_int(low)) | static_cast<uint64_t>(__float_as_int(high)) << 32;
}
__device__ __forceinline__ uint64_t word_of(double x) { return static_cast<uint64_t>(__double_as_longlong(x)); }
__device__ __forceinline__ float low_of(uint64_t word) { return __int_as_float(static_cast<int>(word)); }
__device__ __forceinline__ float high_of(uint64_t word) { return __int_as_float(static_cast<int>(word >> 32)); }
__device__ __forceinline__ double double_of(uint64_t word) {
  return __longlong_as_double(static_cast<long long>(word));
}

// A NaN of the user's might have every bit set.
__device__ __forceinline__ uint64_t present(uint64_t word) { return word == kAbsent ? word - 1 : word; }

#ifdef LYRA_HOST_CUDA
inline float power_of_two(float x) { return exp2f(x); }
inline float reciprocal(float x) { return 1.0f / x; }
#else
__device__ __forceinline__ float power_of_two(float x) {  // |x| <= 1; the library's exp2f also serves denormal results
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
#endif

// --- mantissa 2^exponent ---------------------------------------------------------------------------------------------

// The mantissa in [1, 2). An exponent below kZero / 2 is the number zero, whatever the mantissa: the limits on costs
// keep the exponents of all other numbers, and what zero can drift by, within kZero / 4.
template <class T, class E>
struct Scaled {
  T mantissa;
  E exponent;

  static constexpr E kZero = -(E{1} << (sizeof(E) * 8 - 2));
  static constexpr int kWords = sizeof(E) / 4;
  static __device__ __forceinline__ Scaled zero() { return {T(1), kZero}; }
  static __device__ __forceinline__ Scaled one() { return {T(1), 0}; }

  template <class F>
  __device__ __forceinline__ Scaled each(F f) const {
    return {f(mantissa), f(exponent)};
  }

  // Never kAbsent: no mantissa has all bits set, and no exponent is the largest.
  __device__ __forceinline__ void pack(uint64_t* word) const {
    if constexpr (sizeof(E) == 4) {
      word[0] = word_of(mantissa, __int_as_float(exponent));
    } else {
      word[0] = word_of(static_cast<double>(mantissa));
      word[1] = static_cast<uint64_t>(exponent) ^ uint64_t { 1 } << 63;
    }
  }
  static __device__ __forceinline__ Scaled unpack(const uint64_t* word) {
    if constexpr (sizeof(E) == 4) {
      return {low_of(word[0]), __float_as_int(high_of(word[0]))};
    } else {
      return {static_cast<T>(double_of(word[0])), static_cast<E>(word[1] ^ uint64_t{1} << 63)};
    }
  }
};

// x 2^(exponent - top) for a normal x in (0.5, 4) and exponent <= top. What is below 2^-120 of the top comes out as
// something below 2^-118: too small to change a sum with it, or a share of it.
template <class E>
__device__ __forceinline__ float aligned(float x, E exponent, E top) {
  const int shift = static_cast<int>(larger<E>(exponent - top, -120));
  return __int_as_float(__float_as_int(x) + (shift << 23));
}
template <class E>
__device__ __forceinline__ double aligned(double x, E exponent, E top) {
  const long long shift = larger<E>(exponent - top, -1000);
  return shift == -1000 ? 0.0 : __longlong_as_double(__double_as_longlong(x) + (shift << 52));
}

// A normal x > 0 times 2^exponent.
template <class E>
__device__ __forceinline__ Scaled<float, E> normalised(float x, E exponent) {
  const int bits = __float_as_int(x);
  return {__int_as_float((bits & 0x7fffff) | 0x3f800000),
          larger<E>(exponent + ((bits >> 23) - 127), Scaled<float, E>::kZero)};
}
template <class E>
__device__ __forceinline__ Scaled<double, E> normalised(double x, E exponent) {
  const long long bits = __double_as_longlong(x);
  return {__longlong_as_double((bits & 0xfffffffffffff) | 0x3ff0000000000000),
          larger<E>(exponent + ((bits >> 52) - 1023), Scaled<double, E>::kZero)};
}

// 2^(scale cost), with the mantissa in (0.7, 1.42); zero for a cost of +inf. Narrow exponents: |scale cost| <= 2^21.
template <class T, class E>
struct Weigher {
  double scale;  // -log2(e) / gamma
  double limit;  // of |scale cost|; a cost beyond it counts as infinite

  __device__ Weigher(double scale, const Pair& pair) : scale(scale) {
    // A path has fewer than n + m factors. The rest leaves room for what sums and rounding add to an exponent.
    limit = static_cast<double>(-Scaled<T, E>::kZero / 4) / (static_cast<double>(pair.n) + pair.m) - 64;
    if (sizeof(E) == 4) limit = smaller(limit, 2097152.0);
  }

  __device__ __forceinline__ Scaled<T, E> operator()(T cost) const {
    const bool open = cost != static_cast<T>(INFINITY);
    if constexpr (sizeof(E) == 4) {
      // Adding 1.5 2^23 rounds to a whole number and leaves it in the low bits. `scale` is taken as the sum of two
      // floats.
      const float high = static_cast<float>(scale), low = static_cast<float>(scale - high), magic = 12582912.0f;
      const float rounded = fmaf(cost, high, magic);
      const float fraction = fmaf(cost, low, fmaf(cost, high, magic - rounded));
      const int shift = __float_as_int(rounded) - __float_as_int(magic);
      return {open ? power_of_two(fraction) : 1.0f, open ? shift : Scaled<T, E>::kZero};
    } else {
      const double power = cost * scale;
      if (!(fabs(power) <= limit)) return Scaled<T, E>::zero();
      const double whole = rint(power), fraction = fma(static_cast<double>(cost), scale, -whole);
      return {exp2(static_cast<T>(fraction)), static_cast<E>(whole)};
    }
  }
};

// --- shares ----------------------------------------------------------------------------------------------------------

// How a path comes into a cell, diagonally, from above or from the left, in units of kUnit: the three always add up to
// one exactly, and the share of a neighbour that has none is exactly zero, so no mass is lost and none leaks.
template <class T>
struct Shares {
  T diag, up, left;
};

// A different rounding for every cell, that its place in the pair alone decides: shares that do not change from cell to
// cell would all be rounded the same way, and the path would drift.
__device__ __forceinline__ unsigned dither(int i, int j) {
  return static_cast<unsigned>(i) * 20251u + static_cast<unsigned>(j) * 24737u;
}

// kBits unsigned bits per share, unit 1 / (2^kBits - 1). A word holds (diag, diag + up).
template <int kBits>
struct Fixed {
  using Real = float;
  using Word = std::conditional_t<kBits == 16, uint32_t, uint16_t>;
  using Keep = std::conditional_t<kBits == 16, uint16_t, uint8_t>;
  static constexpr unsigned kOne = (1u << kBits) - 1;
  static constexpr int kFraction = 23 - kBits;
  static constexpr float kUnit = 1.0f / kOne;

  // floor(x scale + u), scale = kOne / the whole, 0 < u < 1: a number in [2^kBits, 2^(kBits+1)) has its whole part in
  // the upper bits of the mantissa. u stays off 0 and 1 by more than what x scale can be off a whole number, so that
  // all of the whole gives kOne, whatever u.
  static __device__ __forceinline__ unsigned part(float x, float scale, unsigned seed) {
    constexpr unsigned kBase = static_cast<unsigned>(127 + kBits) << 23 | 4u;
    const unsigned u = (seed & ((1u << kFraction) - 8)) | kBase;
    const unsigned sum = static_cast<unsigned>(__float_as_int(fmaf(x, scale, __int_as_float(static_cast<int>(u)))));
    return sum << 9 >> (32 - kBits);  // without sign and exponent
  }

  static __device__ __forceinline__ Word shares(float diag, float up, float sum, unsigned seed) {
    const float scale = reciprocal(sum) * kOne;
    return static_cast<Word>(part(diag, scale, seed) | part(diag + up, scale, seed) << kBits);
  }
  static __device__ __forceinline__ Word one_way(bool diag, bool up) {
    return static_cast<Word>((diag ? kOne : 0u) | (diag || up ? kOne << kBits : 0u));
  }
  static __device__ __forceinline__ Keep share(float x, float sum, unsigned seed) {
    return static_cast<Keep>(part(x, reciprocal(sum) * kOne, seed));
  }
  static __device__ __forceinline__ Keep all_or_none(bool all) { return static_cast<Keep>(all ? kOne : 0u); }

  static __device__ __forceinline__ Shares<float> steps(Word word) {
    constexpr int kMagic = 0x4b000000;  // 2^23
    const float one = 8388608.0f;
    const float diag = __int_as_float(static_cast<int>(word & kOne) | kMagic);
    const float both = __int_as_float(static_cast<int>(word >> kBits) | kMagic);
    return {diag - one, both - diag, (one + kOne) - both};
  }
  static __device__ __forceinline__ float kept(Keep keep) {
    return __int_as_float(static_cast<int>(keep) | 0x4b000000) - 8388608.0f;
  }
};

struct Bits16 : Fixed<16> {};
struct Bits8 : Fixed<8> {};

struct Exact {
  using Real = double;
  struct Word {
    double diag, up;
  };
  using Keep = double;
  static constexpr double kOne = 1.0, kUnit = 1.0;

  static __device__ __forceinline__ Word shares(double diag, double up, double sum, unsigned) {
    const double first = sum == diag ? 1.0 : smaller(diag / sum, 1.0), rest = 1.0 - first;
    return {first, sum == diag + up ? rest : smaller(up / sum, rest)};
  }
  static __device__ __forceinline__ Word one_way(bool diag, bool up) { return {diag ? 1.0 : 0.0, up ? 1.0 : 0.0}; }
  static __device__ __forceinline__ Keep share(double x, double sum, unsigned) { return smaller(x / sum, 1.0); }
  static __device__ __forceinline__ Keep all_or_none(bool all) { return all ? 1.0 : 0.0; }
  static __device__ __forceinline__ Shares<double> steps(const Word& word) {
    return {word.diag, word.up, (1.0 - word.diag) - word.up};
  }
  static __device__ __forceinline__ double kept(Keep keep) { return keep; }
};

}  // namespace lyra::soft_dtw
