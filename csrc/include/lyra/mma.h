// Matrix products of a warp on tensor cores (sm_80 and later), and the 16-bit floats that they take.
//
// Under LYRA_HOST_CUDA each has a scalar twin: the same elements in the same lanes, shared memory race-checked in words
// of 32 bits. So shared memory that goes through here is written with `shared_store16` or with `exchange_store` of
// whole words, never element by element.
//
// Lane l of a warp, g = l / 4, t = l % 4, holds of a 16x16 times 16x8 product D += A B
//   a[0..3]  A(g, 2t), A(g + 8, 2t), A(g, 2t + 8), A(g + 8, 2t + 8), each with its right neighbour in the upper half
//   b[0..1]  B(2t, g), B(2t + 8, g), each with its lower neighbour in the upper half
//   d[0..3]  D(g, 2t), D(g, 2t + 1), D(g + 8, 2t), D(g + 8, 2t + 1), float32
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "lyra/launch.h"

namespace lyra {

// The bits of torch's own bfloat16 and float16.
struct Bf16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

struct alignas(16) Words4 {
  uint32_t word[4];
};

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(Bf16 x) { return __int_as_float(static_cast<int>(x.bits) << 16); }

#ifdef LYRA_HOST_CUDA

inline float to_float(Half x) {
  _Float16 value;
  std::memcpy(&value, &x.bits, sizeof(value));
  return static_cast<float>(value);
}

template <class T>
uint16_t round_bits(float x) {
  if constexpr (std::is_same_v<T, Bf16>) {
    const uint32_t bits = static_cast<uint32_t>(__float_as_int(x));
    return x != x ? 0x7fff : static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
  } else {
    const _Float16 value = static_cast<_Float16>(x);
    uint16_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    return bits;
  }
}

template <class T>
uint32_t pack(float low, float high) {
  return round_bits<T>(low) | static_cast<uint32_t>(round_bits<T>(high)) << 16;
}

inline void shared_store16(uint32_t* to, const Words4& value) {
  for (int i = 0; i < 4; ++i) exchange_store(to + i, value.word[i]);
}

inline Words4 shared_load16(const uint32_t* from) {
  return {{exchange_load(from), exchange_load(from + 1), exchange_load(from + 2), exchange_load(from + 3)}};
}

namespace host {

inline uint16_t half_of(uint32_t word, int upper) { return static_cast<uint16_t>(word >> (16 * upper)); }

// The row that lane 8 m + r points at is row r of matrix m: eight 16-bit elements.
template <bool kTransposed>
void load_matrices(uint32_t (&r)[4], const uint32_t* row) {
  device().wait_for_warp("ldmatrix", ~0u, to_bits(row));
  const int g = device().lane() / 4, t = device().lane() % 4;
  for (int m = 0; m < 4; ++m) {
    const auto word = [m](int row, int column) {
      return exchange_load(from_bits<const uint32_t*>(device().offered_by(8 * m + row)) + column / 2);
    };
    r[m] = kTransposed ? half_of(word(2 * t, g), g % 2) | half_of(word(2 * t + 1, g), g % 2) << 16 : word(g, 2 * t);
  }
}

}  // namespace host

inline void ldmatrix_x4(uint32_t (&r)[4], const uint32_t* row) { host::load_matrices<false>(r, row); }
inline void ldmatrix_x4_trans(uint32_t (&r)[4], const uint32_t* row) { host::load_matrices<true>(r, row); }

template <class T>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  struct Fragments {
    const uint32_t* a;
    uint32_t b[2];
  };
  const Fragments mine{a, {b0, b1}};
  host::device().wait_for_warp("mma", ~0u, host::to_bits(&mine));
  const auto of_lane = [](int lane) { return host::from_bits<const Fragments*>(host::device().offered_by(lane)); };
  const int g = host::device().lane() / 4, t = host::device().lane() % 4;
  for (int e = 0; e < 4; ++e) {
    const int column = 2 * t + e % 2;
    for (int k = 0; k < 16; ++k) {
      const int holder = k % 8 / 2;
      const uint32_t left = of_lane(4 * g + holder)->a[e / 2 + k / 8 * 2];
      const uint32_t right = of_lane(4 * column + holder)->b[k / 8];
      d[e] += to_float(T{host::half_of(left, k % 2)}) * to_float(T{host::half_of(right, k % 2)});
    }
  }
  host::device().wait_for_warp("mma", ~0u, 0);  // the others may still read what is mine
}

#else

__device__ __forceinline__ float to_float(Half x) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(x.bits));
  return value;
}

// Two floats rounded to nearest even, in one word.
template <class T>
__device__ __forceinline__ uint32_t pack(float low, float high) {
  uint32_t word;
  if constexpr (std::is_same_v<T, Bf16>) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  }
  return word;
}

__device__ __forceinline__ void shared_store16(uint32_t* to, const Words4& value) {
  *reinterpret_cast<Words4*>(to) = value;
}

__device__ __forceinline__ Words4 shared_load16(const uint32_t* from) { return *reinterpret_cast<const Words4*>(from); }

// Lane 8 m + r points at row r of matrix m: eight 16-bit elements, 16-byte aligned. All lanes of the warp take part.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const uint32_t* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(row)))
               : "memory");
}
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], const uint32_t* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(row)))
               : "memory");
}

template <class T>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (std::is_same_v<T, Bf16>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

#endif

// One float in the type T.
template <class T>
__device__ __forceinline__ T from_float(float x) {
  if constexpr (std::is_same_v<T, float>) {
    return x;
  } else {
    return T{static_cast<uint16_t>(pack<T>(x, 0.0f))};
  }
}

}  // namespace lyra
