// The arithmetic of token_scores on a CPU: a panel of query rows against a block of keys.
//
// Query rows lie side by side in the lanes of a vector and keys come one number at a time, so what is done per row
// needs no sum across lanes. A tile is V vectors of rows by N keys; its logits stay in registers until they are whole.
// bfloat16 multiplies in pairs where the CPU can (products exact, sums float32).
//
// Logits are in units of log 2, so that powers are powers of two.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "lyra/simd.h"

namespace lyra::token_select {

constexpr int kLanes = 16;         // rows in a vector
constexpr int kRows = 2 * kLanes;  // of a panel
constexpr int kKeys = 96;          // of a block: a multiple of every tile's N
constexpr float kNone = -std::numeric_limits<float>::infinity();

typedef float Vec __attribute__((vector_size(kLanes * sizeof(float))));
typedef int32_t Ints __attribute__((vector_size(kLanes * sizeof(int32_t))));
typedef double Doubles __attribute__((vector_size(kLanes * sizeof(double))));

template <typename V>
LYRA_INLINE V load(const void* from) {
  V v;
  std::memcpy(&v, from, sizeof(V));
  return v;
}

LYRA_INLINE void store(Vec v, float* to) { std::memcpy(to, &v, sizeof(v)); }

// 2^x, 0 below the normal numbers, infinity above them, NaN for NaN. The polynomial is fitted to 2^y, |y| <= 1/2, with
// a relative error of 2e-9.
LYRA_INLINE Vec exp2(Vec x) {
  constexpr float kRound = 12582912.0f + 127;  // 1.5 2^23: the sum's low bits are the rounded x, plus exponent bias
  x = x < -127.0f ? Vec{} - 127.0f : x;
  x = x > 128.0f ? Vec{} + 128.0f : x;
  const Vec rounded = x + kRound;
  const Vec y = x - (rounded - kRound);
  Vec power = y * 1.53707048e-4f + 1.33998483e-3f;
  power = power * y + 9.61837325e-3f;
  power = power * y + 5.55032904e-2f;
  power = power * y + 2.40226485e-1f;
  power = power * y + 6.93147206e-1f;
  power = power * y + 1.0f;
  return power * std::bit_cast<Vec>(std::bit_cast<Ints>(rounded) << 23);
}

// Of the 16 lanes, as halves of halves.
LYRA_INLINE float sum_of_lanes(Vec v) {
  typedef float Half __attribute__((vector_size(sizeof(Vec) / 2)));
  typedef float Quarter __attribute__((vector_size(sizeof(Vec) / 4)));
  struct {
    Half low, high;
  } halves = std::bit_cast<decltype(halves)>(v);
  const Half half = halves.low + halves.high;
  struct {
    Quarter low, high;
  } quarters = std::bit_cast<decltype(quarters)>(half);
  const Quarter quarter = quarters.low + quarters.high;
  return (quarter[0] + quarter[2]) + (quarter[1] + quarter[3]);
}

// Up to kRows query rows of one key head; E is float, or uint16_t for the bits of a bfloat16.
template <typename E>
struct Panel {
  int64_t dim, vectors;       // 1 or 2 of them hold rows
  bool paired;                // both in one tile: query is (dim, 2 kLanes), pairs (dim / 2, 2 kLanes, 2)
  float scale;                // of a logit, in units of log 2
  E* query;                   // otherwise vector after vector: (dim, kLanes), pairs (dim / 2, kLanes, 2)
  int32_t limits[kRows];      // a row sees the keys before this place; 0 for what fills the last vector
  int32_t least[2], most[2];  // of the limits of each vector
};

// kKeys keys, the last block filled up with keys that nobody sees.
template <typename E>
struct Block {
  const E* keys;  // (kKeys, dim)
  const int32_t* places;
  float bias[kKeys];  // in units of log 2
};

template <int V, int N>
LYRA_INLINE void multiply(const float* panel, const float* keys, int64_t dim, Vec (&sums)[N][V]) {
  for (int64_t d = 0; d < dim; ++d) {
    Vec q[V];
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) q[v] = load<Vec>(panel + (d * V + v) * kLanes);
#pragma GCC unroll 12
    for (int n = 0; n < N; ++n) {
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) sums[n][v] += q[v] * keys[n * dim + d];
    }
  }
}

// sum += q[2 i] k[2 i] + q[2 i + 1] k[2 i + 1]. The instruction itself, because the intrinsic could only be called from
// functions that are compiled for such a CPU, and these are inlined into one that is.
LYRA_INLINE Vec add_pairs(Vec sum, Ints q, Ints k) {
#ifdef __x86_64__
  asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(q), "v"(k));
#endif
  return sum;
}

template <int V, int N>
LYRA_INLINE void multiply(const uint16_t* panel, const uint16_t* keys, int64_t dim, Vec (&sums)[N][V]) {
  for (int64_t d = 0; d < dim; d += 2) {
    Ints q[V];
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) q[v] = load<Ints>(panel + (d * V + 2 * v) * kLanes);
#pragma GCC unroll 12
    for (int n = 0; n < N; ++n) {
      const Ints k = Ints{} + load<int32_t>(keys + n * dim + d);
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) sums[n][v] = add_pairs(sums[n][v], q[v], k);
    }
  }
}

// How many keys of a block V vectors of a panel, from the first-th, look at: whole tiles of N, until nobody sees one.
template <int V, int N, typename E>
LYRA_INLINE int64_t reach(const Panel<E>& panel, int first, const int32_t* places) {
  const int32_t most = V == 2 ? std::max(panel.most[0], panel.most[1]) : panel.most[first];
  int64_t j = 0;
  while (j < kKeys && places[j] < most) j += N;
  return j;
}

// Writes the logits (V, kKeys, kLanes) of these vectors and keys, -inf where a row does not see a key; returns `reach`.
template <int V, int N, typename E>
LYRA_INLINE int64_t logits(const Panel<E>& panel, int first, const Block<E>& block, float* to, Vec (&largest)[V]) {
  const E* query = panel.query + first * kLanes * panel.dim;
  const int32_t* limits = panel.limits + first * kLanes;
  const int32_t least = V == 2 ? std::min(panel.least[0], panel.least[1]) : panel.least[first];
  const int64_t end = reach<V, N>(panel, first, block.places);
  for (int64_t j = 0; j < end; j += N) {
    Vec sums[N][V] = {};
    multiply<V, N>(query, block.keys + j * panel.dim, panel.dim, sums);
    const bool all_seen = block.places[j + N - 1] < least;
#pragma GCC unroll 12
    for (int n = 0; n < N; ++n) {
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) {
        Vec logit = sums[n][v] * panel.scale + block.bias[j + n];
        if (!all_seen) logit = block.places[j + n] < load<Ints>(limits + v * kLanes) ? logit : Vec{} + kNone;
        largest[v] = logit > largest[v] ? logit : largest[v];
        store(logit, to + (v * kKeys + j + n) * kLanes);
      }
    }
  }
  return end;
}

// Of each row: its largest logit in the block, the powers 2^(logit - largest) (2, kKeys, kLanes), and their sum.
template <int V, int N, typename E>
LYRA_INLINE void add_powers(const Panel<E>& panel, int first, const Block<E>& block, float* powers, float* largest,
                            float* sum) {
  Vec top[V];
  for (int v = 0; v < V; ++v) top[v] = Vec{} + kNone;
  float* own = powers + first * kKeys * kLanes;
  const int64_t end = logits<V, N>(panel, first, block, own, top);
  for (int v = 0; v < V; ++v) {
    const Vec base = top[v] == kNone ? Vec{} : top[v];
    Vec total = {};
    for (int64_t k = 0; k < end; ++k) {
      float* at = own + (v * kKeys + k) * kLanes;
      const Vec power = exp2(load<Vec>(at) - base);
      store(power, at);
      total += power;
    }
    store(top[v], largest + (first + v) * kLanes);
    store(total, sum + (first + v) * kLanes);
  }
}

// Adds to each key of a block the powers of each row times its weight.
template <int V, int N, typename E>
LYRA_INLINE void add_kept(const Panel<E>& panel, int first, const int32_t* places, const float* powers,
                          const float* weight, Vec* totals) {
  const int64_t end = reach<V, N>(panel, first, places);
  for (int64_t row = first * kLanes; row < (first + V) * kLanes; row += kLanes) {
    const Vec w = load<Vec>(weight + row);
    for (int64_t k = 0; k < end; ++k) totals[k] += load<Vec>(powers + row * kKeys + k * kLanes) * w;
  }
}

// The same with powers that were not kept: 2^(logit - base).
template <int V, int N, typename E>
LYRA_INLINE void add_fresh(const Panel<E>& panel, int first, const Block<E>& block, const float* base,
                           const float* weight, Vec* totals) {
  alignas(64) float own[V * kKeys * kLanes];
  Vec unused[V] = {};
  const int64_t end = logits<V, N>(panel, first, block, own, unused);
  for (int v = 0; v < V; ++v) {
    const Vec b = load<Vec>(base + (first + v) * kLanes), w = load<Vec>(weight + (first + v) * kLanes);
    for (int64_t k = 0; k < end; ++k) totals[k] += exp2(load<Vec>(own + (v * kKeys + k) * kLanes) - b) * w;
  }
}

template <int V, int N, typename E>
LYRA_INLINE void powers_of(const Panel<E>& panel, const Block<E>& block, float* powers, float* largest, float* sum) {
  if (V == 2 && panel.paired)
    add_powers<V, N>(panel, 0, block, powers, largest, sum);
  else
    for (int v = 0; v < panel.vectors; ++v) add_powers<1, N>(panel, v, block, powers, largest, sum);
}

template <int V, int N, typename E>
LYRA_INLINE void kept_of(const Panel<E>& panel, const int32_t* places, const float* powers, const float* weight,
                         Vec* totals) {
  if (V == 2 && panel.paired)
    add_kept<V, N>(panel, 0, places, powers, weight, totals);
  else
    for (int v = 0; v < panel.vectors; ++v) add_kept<1, N>(panel, v, places, powers, weight, totals);
}

template <int V, int N, typename E>
LYRA_INLINE void fresh_of(const Panel<E>& panel, const Block<E>& block, const float* base, const float* weight,
                          Vec* totals) {
  if (V == 2 && panel.paired)
    add_fresh<V, N>(panel, 0, block, base, weight, totals);
  else
    for (int v = 0; v < panel.vectors; ++v) add_fresh<1, N>(panel, v, block, base, weight, totals);
}

// Each compiled for the CPUs that there are: tiles of 2 x 12 need the 32 wide registers of x86-64-v4.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define LYRA_WIDE __attribute__((target("arch=x86-64-v4")))
inline bool cpu_is_wide() { return __builtin_cpu_supports("x86-64-v4"); }
inline bool cpu_has_pairs() { return cpu_is_wide() && __builtin_cpu_supports("avx512bf16"); }
#else
#define LYRA_WIDE
inline bool cpu_is_wide() { return false; }
inline bool cpu_has_pairs() { return false; }
#endif

template <typename E>
LYRA_WIDE void powers_wide(const Panel<E>& panel, const Block<E>& block, float* powers, float* largest, float* sum) {
  powers_of<2, 12>(panel, block, powers, largest, sum);
}
LYRA_SIMD static void powers_narrow(const Panel<float>& panel, const Block<float>& block, float* powers, float* largest,
                                    float* sum) {
  powers_of<1, 6>(panel, block, powers, largest, sum);
}
template <typename E>
LYRA_WIDE void kept_wide(const Panel<E>& panel, const int32_t* places, const float* powers, const float* weight,
                         Vec* totals) {
  kept_of<2, 12>(panel, places, powers, weight, totals);
}
LYRA_SIMD static void kept_narrow(const Panel<float>& panel, const int32_t* places, const float* powers,
                                  const float* weight, Vec* totals) {
  kept_of<1, 6>(panel, places, powers, weight, totals);
}
template <typename E>
LYRA_WIDE void fresh_wide(const Panel<E>& panel, const Block<E>& block, const float* base, const float* weight,
                          Vec* totals) {
  fresh_of<2, 12>(panel, block, base, weight, totals);
}
LYRA_SIMD static void fresh_narrow(const Panel<float>& panel, const Block<float>& block, const float* base,
                                   const float* weight, Vec* totals) {
  fresh_of<1, 6>(panel, block, base, weight, totals);
}

// Takes the largest logits and the sums of the rows of a panel in more keys into those so far.
LYRA_SIMD static void merge(const float* more_largest, const float* more_sum, float* largest, float* sum) {
  for (int first = 0; first < kRows; first += kLanes) {
    const Vec a = load<Vec>(largest + first), b = load<Vec>(more_largest + first), top = b > a ? b : a;
    const Vec base = top == kNone ? Vec{} : top;
    store(load<Vec>(sum + first) * exp2(a - base) + load<Vec>(more_sum + first) * exp2(b - base), sum + first);
    store(top, largest + first);
  }
}

// From the largest logits and the sums of a row's parts, (parts, kRows) each, its shares of all keys: `largest` becomes
// what to take off the logits of a part, `sum` what to multiply its powers by. A row's shares sum to share[row].
LYRA_SIMD static void norm(int64_t parts, const float* share, float* largest, float* sum) {
  for (int first = 0; first < kRows; first += kLanes) {
    Vec top = Vec{} + kNone;
    for (int64_t i = 0; i < parts; ++i) {
      const Vec own = load<Vec>(largest + i * kRows + first);
      top = own > top ? own : top;
    }
    top = top == kNone ? Vec{} : top;
    Doubles total = {};
    for (int64_t i = 0; i < parts; ++i) {
      const Vec own = load<Vec>(sum + i * kRows + first) * exp2(load<Vec>(largest + i * kRows + first) - top);
      total += __builtin_convertvector(own, Doubles);
    }
    const Vec given = load<Vec>(share + first), none = {};
    const Vec factor = given > none ? given / __builtin_convertvector(total, Vec) : none;  // lanes without a row
    for (int64_t i = 0; i < parts; ++i) {
      const Vec own = load<Vec>(largest + i * kRows + first);
      store(exp2(own - top) * factor, sum + i * kRows + first);
      store(own == kNone ? Vec{} : own, largest + i * kRows + first);
    }
  }
}

LYRA_SIMD static void add_totals(const Vec* totals, const int32_t* places, int64_t count, float* scores) {
  for (int64_t k = 0; k < count; ++k) scores[places[k]] += sum_of_lanes(totals[k]);
}

}  // namespace lyra::token_select
