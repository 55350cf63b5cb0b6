// Vectors of eight lanes, and memory for them.
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>
#include <new>
#include <type_traits>

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

}  // namespace lyra::soft_dtw_cpu
