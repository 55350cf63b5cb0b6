// Token scores: the CPU implementation.
//
//     score_k = sum_h w_h mean_q softmax_k(scale Q_q^h . K_k^(h / G) + bias_k),   G = Hq / Hkv query heads per key head
//
// Two passes over the keys, neither of which keeps more than a tile of logits: the first finds each row's largest logit
// and its sum of powers, the second adds up the shares of each key. With `lse` there is only the second. Logits are in
// units of log 2, so that powers are powers of two.
//
// Query rows lie side by side in the lanes of a vector and keys come one number at a time: so keys are read where they
// stand, whatever their stride from token to token, and what is done per row needs no sum across lanes. A tile is V
// vectors of rows by N keys, its logits stay in registers. bfloat16 multiplies in pairs where the CPU can (products
// exact, sums float32); otherwise, and for float16 or keys with strided channels, a block of keys becomes float32
// first.
//
// Rows that count and keys that are real are brought together first, so padding costs nothing and moves no boundary;
// chunks, blocks and splits have constant sizes. So a sample gets the same bits in any batch and with any number of
// threads, on CPUs with the same vector instructions.
//
// Memory: a key takes 4 bytes beside its result, and 8 kChunk / kSplit for the norms; a chunk of kChunk rows
// 4 D bytes per row; a thread one block of sums, and one of keys where they are converted.
#include "token_select.h"

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <new>
#include <optional>
#include <type_traits>
#include <vector>

#include "lyra/check.h"
#include "lyra/simd.h"

namespace lyra::token_select {
namespace {

constexpr int kLanes = 16;   // rows in a vector
constexpr int kChunk = 128;  // rows that go through both passes together
constexpr int kVectors = kChunk / kLanes;
constexpr int kKeys = 96;          // keys of a block: a multiple of every tile's N
constexpr int kSplit = 5 * kKeys;  // keys of a task of the first pass
constexpr float kNone = -std::numeric_limits<float>::infinity();
constexpr double kLog2e = 1.4426950408889634;

typedef float Vec __attribute__((vector_size(kLanes * sizeof(float))));
typedef int32_t Ints __attribute__((vector_size(kLanes * sizeof(int32_t))));
using BFloat16 = torch::headeronly::BFloat16;
using Half = torch::headeronly::Half;

template <typename T>
class Buffer {  // aligned for vectors, which std::vector's allocator does not see
 public:
  explicit Buffer(int64_t size) : data_(new (std::align_val_t{64}) T[size]) {}
  ~Buffer() { ::operator delete[](data_, std::align_val_t{64}); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  T* data() const { return data_; }
  T& operator[](int64_t i) const { return data_[i]; }

 private:
  T* data_;
};

template <typename V>
LYRA_INLINE V load(const void* from) {
  V v;
  std::memcpy(&v, from, sizeof(V));
  return v;
}

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

// Up to kChunk query rows of one key head, as both passes see them.
template <typename E>
struct Chunk {
  int64_t dim, vectors = 0;
  float scale;                              // of a logit, in units of log 2
  Buffer<E> query;                          // panels of V vectors: (dim, V kLanes); pairs: (dim / 2, V kLanes, 2)
  Buffer<int32_t> limits;                   // a row sees the keys before this place; 0 for what fills the last vector
  int32_t least[kVectors], most[kVectors];  // of the limits of each vector
  Buffer<float> base, factor;               // the share of a key in a row is 2^(logit - base) factor

  Chunk(int64_t dim, float scale)
      : dim(dim), scale(scale), query(kChunk * dim), limits(kChunk), base(kChunk), factor(kChunk) {}
};

// Up to kKeys keys, filled up to whole tiles with keys that nobody sees.
template <typename E>
struct Block {
  const E* keys[kKeys];
  int32_t places[kKeys];
  float bias[kKeys];  // in units of log 2
  int64_t filled = 0;
};

template <int V, int N>
LYRA_INLINE void multiply(const float* panel, const float* const* keys, int64_t dim, Vec (&sums)[N][V]) {
  for (int64_t d = 0; d < dim; ++d) {
    Vec q[V];
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) q[v] = load<Vec>(panel + (d * V + v) * kLanes);
#pragma GCC unroll 12
    for (int n = 0; n < N; ++n) {
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) sums[n][v] += q[v] * keys[n][d];
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
LYRA_INLINE void multiply(const uint16_t* panel, const uint16_t* const* keys, int64_t dim, Vec (&sums)[N][V]) {
  for (int64_t d = 0; d < dim; d += 2) {
    Ints q[V];
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) q[v] = load<Ints>(panel + (d * V + 2 * v) * kLanes);
#pragma GCC unroll 12
    for (int n = 0; n < N; ++n) {
      const Ints k = Ints{} + load<int32_t>(keys[n] + d);
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) sums[n][v] = add_pairs(sums[n][v], q[v], k);
    }
  }
}

// V vectors of rows of a chunk.
template <int V, typename E>
struct Panel {
  const E* query;
  const int32_t* limits;
  int64_t dim;
  float scale;
  int32_t least, most;

  LYRA_INLINE Panel(const Chunk<E>& c, int64_t first)
      : query(c.query.data() + first * kLanes * c.dim),
        limits(c.limits.data() + first * kLanes),
        dim(c.dim),
        scale(c.scale),
        least(c.least[first]),
        most(c.most[first]) {
    if (V == 2) {
      least = std::min(least, c.least[first + 1]);
      most = std::max(most, c.most[first + 1]);
    }
  }
};

// Logits of a panel and keys j .. j + N - 1 of a block; -inf where the row does not see the key.
template <int V, int N, typename E>
LYRA_INLINE void tile(const Panel<V, E>& panel, const Block<E>& block, int64_t j, Vec (&logits)[N][V]) {
  Vec sums[N][V] = {};
  multiply<V, N>(panel.query, block.keys + j, panel.dim, sums);
  const bool all_seen = block.places[j + N - 1] < panel.least;
#pragma GCC unroll 12
  for (int n = 0; n < N; ++n) {
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) {
      logits[n][v] = sums[n][v] * panel.scale + block.bias[j + n];
      if (all_seen) continue;
      logits[n][v] = block.places[j + n] < load<Ints>(panel.limits + v * kLanes) ? logits[n][v] : Vec{} + kNone;
    }
  }
}

// Takes a block of keys into the largest logit and the sum of powers of each row of a panel.
template <int V, int N, typename E>
LYRA_INLINE void add_norms(const Panel<V, E>& panel, const Block<E>& block, Vec* largest, Vec* sum) {
  for (int64_t j = 0; j < block.filled && block.places[j] < panel.most; j += N) {
    Vec logits[N][V];
    tile(panel, block, j, logits);
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) {
      Vec top = largest[v];
#pragma GCC unroll 12
      for (int n = 0; n < N; ++n) top = logits[n][v] > top ? logits[n][v] : top;
      const Vec base = top == kNone ? Vec{} : top;
      Vec total = {};
#pragma GCC unroll 12
      for (int n = 0; n < N; ++n) total += exp2(logits[n][v] - base);
      sum[v] = sum[v] * exp2(largest[v] - base) + total;
      largest[v] = top;
    }
  }
}

// Adds the shares of the rows of a panel to the keys of a block.
template <int V, int N, typename E>
LYRA_INLINE void add_shares(const Panel<V, E>& panel, const Block<E>& block, const float* base, const float* factor,
                            Vec* totals) {
  for (int64_t j = 0; j < block.filled && block.places[j] < panel.most; j += N) {
    Vec logits[N][V];
    tile(panel, block, j, logits);
#pragma GCC unroll 12
    for (int n = 0; n < N; ++n) {
      Vec total = {};
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) {
        total += exp2(logits[n][v] - load<Vec>(base + v * kLanes)) * load<Vec>(factor + v * kLanes);
      }
      totals[j + n] += total;
    }
  }
}

// The passes over a block, for the rows of vectors first .. first + 1 of a chunk.
template <int V, int N, typename E>
LYRA_INLINE void norms_of(const Chunk<E>& c, const Block<E>& block, int64_t first, Vec* largest, Vec* sum) {
  if (V == 2 && first + 1 < c.vectors)
    add_norms<V, N>(Panel<V, E>(c, first), block, largest, sum);
  else
    for (int64_t i = first; i < std::min<int64_t>(first + 2, c.vectors); ++i)
      add_norms<1, N>(Panel<1, E>(c, i), block, largest + i - first, sum + i - first);
}

template <int V, int N, typename E>
LYRA_INLINE void shares_of(const Chunk<E>& c, const Block<E>& block, Vec* totals) {
  int64_t i = 0;
  for (; V == 2 && i + 1 < c.vectors; i += 2) {
    add_shares<V, N>(Panel<V, E>(c, i), block, c.base.data() + i * kLanes, c.factor.data() + i * kLanes, totals);
  }
  for (; i < c.vectors; ++i) {
    add_shares<1, N>(Panel<1, E>(c, i), block, c.base.data() + i * kLanes, c.factor.data() + i * kLanes, totals);
  }
}

// Each pass compiled for the CPUs that there are: tiles of 2 x 12 need the 32 wide registers of x86-64-v4.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define LYRA_WIDE __attribute__((target("arch=x86-64-v4")))
bool cpu_is_wide() { return __builtin_cpu_supports("x86-64-v4"); }
bool cpu_has_pairs() { return cpu_is_wide() && __builtin_cpu_supports("avx512bf16"); }
#else
#define LYRA_WIDE
bool cpu_is_wide() { return false; }
bool cpu_has_pairs() { return false; }
#endif

LYRA_WIDE void norms_wide(const Chunk<float>& c, const Block<float>& block, int64_t first, Vec* largest, Vec* sum) {
  norms_of<2, 12>(c, block, first, largest, sum);
}
LYRA_WIDE void norms_wide(const Chunk<uint16_t>& c, const Block<uint16_t>& block, int64_t first, Vec* largest,
                          Vec* sum) {
  norms_of<2, 12>(c, block, first, largest, sum);
}
LYRA_SIMD void norms_narrow(const Chunk<float>& c, const Block<float>& block, int64_t first, Vec* largest, Vec* sum) {
  norms_of<1, 6>(c, block, first, largest, sum);
}
LYRA_WIDE void shares_wide(const Chunk<float>& c, const Block<float>& block, Vec* totals) {
  shares_of<2, 12>(c, block, totals);
}
LYRA_WIDE void shares_wide(const Chunk<uint16_t>& c, const Block<uint16_t>& block, Vec* totals) {
  shares_of<2, 12>(c, block, totals);
}
LYRA_SIMD void shares_narrow(const Chunk<float>& c, const Block<float>& block, Vec* totals) {
  shares_of<1, 6>(c, block, totals);
}

template <typename E>
void norms(bool wide, const Chunk<E>& c, const Block<E>& block, int64_t first, Vec* largest, Vec* sum) {
  if constexpr (std::is_same_v<E, float>) {
    if (!wide) return norms_narrow(c, block, first, largest, sum);
  }
  norms_wide(c, block, first, largest, sum);
}

template <typename E>
void shares(bool wide, const Chunk<E>& c, const Block<E>& block, Vec* totals) {
  if constexpr (std::is_same_v<E, float>) {
    if (!wide) return shares_narrow(c, block, totals);
  }
  shares_wide(c, block, totals);
}

// A tensor of one sample (heads, tokens, channels).
struct Source {
  const char* data;
  ScalarType type;
  int64_t item, strides[3];  // in elements

  const char* at(int64_t head, int64_t token) const { return data + (head * strides[0] + token * strides[1]) * item; }
};

template <typename T>
void as_floats(const char* from, int64_t step, int64_t count, float* to, int64_t to_step) {
  const T* source = reinterpret_cast<const T*>(from);
  for (int64_t i = 0; i < count; ++i) to[i * to_step] = static_cast<float>(source[i * step]);
}

// The channels of a token, `to_step` apart.
void as_floats(const Source& s, int64_t head, int64_t token, int64_t count, float* to, int64_t to_step) {
  const char* from = s.at(head, token);
  if (s.type == ScalarType::Float)
    as_floats<float>(from, s.strides[2], count, to, to_step);
  else if (s.type == ScalarType::Half)
    as_floats<Half>(from, s.strides[2], count, to, to_step);
  else
    as_floats<BFloat16>(from, s.strides[2], count, to, to_step);
}

struct Sample {
  Source query, key;
  int64_t heads, kv_heads, dim;
  double scale;                       // of a logit, in units of log 2
  std::vector<int32_t> rows, limits;  // the rows that count, and the keys before which place they see
  std::vector<int32_t> keys;          // the keys that are real, increasing
  const float* key_bias;              // of all places, or null
  const float* head_weights;          // (heads,), or null
  const float* lse_float;             // (heads, lse_stride), or null; either of both
  const double* lse_double;
  int64_t lse_stride;
};

// Row i of the heads first_head .. : row i % n of the (i / n)-th of them, n = rows that count.
template <typename E>
void fill_chunk(const Sample& s, int64_t first_head, int64_t first, int64_t count, bool wide, Chunk<E>& c) {
  const int64_t n = static_cast<int64_t>(s.rows.size());
  c.vectors = (count + kLanes - 1) / kLanes;
  std::fill(c.query.data(), c.query.data() + c.vectors * kLanes * c.dim, E(0));
  std::fill(c.limits.data(), c.limits.data() + kChunk, 0);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t head = first_head + (first + i) / n, row = (first + i) % n;
    const int64_t vector = i / kLanes, lane = i % kLanes;
    const bool paired = wide && (vector | 1) < c.vectors;  // with its neighbour in a panel of two
    const int64_t V = paired ? 2 : 1;
    E* panel = c.query.data() + (paired ? vector & ~1 : vector) * kLanes * c.dim +
               (paired ? vector & 1 : 0) * (std::is_same_v<E, float> ? kLanes : 2 * kLanes);
    if constexpr (std::is_same_v<E, float>) {
      as_floats(s.query, head, s.rows[row], c.dim, panel + lane, V * kLanes);
    } else {
      const E* from = reinterpret_cast<const E*>(s.query.at(head, s.rows[row]));
      for (int64_t d = 0; d < c.dim; ++d) {
        panel[d / 2 * V * 2 * kLanes + 2 * lane + d % 2] = from[d * s.query.strides[2]];
      }
    }
    c.limits[i] = s.limits[row];
  }
  for (int64_t v = 0; v < c.vectors; ++v) {
    const auto [least, most] = std::minmax_element(c.limits.data() + v * kLanes, c.limits.data() + (v + 1) * kLanes);
    c.least[v] = *least;
    c.most[v] = *most;
  }
}

// Keys first .. of the real ones; `converted` holds them where they have to become floats.
template <typename E>
void fill_block(const Sample& s, int64_t head, int64_t first, float* converted, Block<E>& block) {
  const int64_t count = std::min<int64_t>(kKeys, static_cast<int64_t>(s.keys.size()) - first);
  block.filled = (count + 11) / 12 * 12;
  for (int64_t k = 0; k < block.filled; ++k) {
    const int32_t place = s.keys[first + std::min(k, count - 1)];
    block.places[k] = k < count ? place : std::numeric_limits<int32_t>::max();
    block.bias[k] = s.key_bias ? static_cast<float>(s.key_bias[place] * kLog2e) : 0.0f;
    if (converted && k < count) as_floats(s.key, head, place, s.dim, converted + k * s.dim, 1);
    block.keys[k] = converted ? reinterpret_cast<const E*>(converted + std::min(k, count - 1) * s.dim)
                              : reinterpret_cast<const E*>(s.key.at(head, place));
  }
}

// Adds the shares of heads first_head .. first_head + n_heads - 1, which share a key head, to scores (L,).
template <typename E>
void score_heads(const Sample& s, int64_t first_head, int64_t n_heads, bool wide, bool weighted, Chunk<E>& c,
                 float* scores) {
  const int64_t head = first_head / (s.heads / s.kv_heads), n_keys = static_cast<int64_t>(s.keys.size());
  const int64_t n = static_cast<int64_t>(s.rows.size()), n_rows = n_heads * n;
  const bool convert = std::is_same_v<E, float> && (s.key.type != ScalarType::Float || s.key.strides[2] != 1);
  const bool given = s.lse_float || s.lse_double;
  const int64_t splits = given ? 0 : (n_keys + kSplit - 1) / kSplit;
  Buffer<float> split_largest(splits * kChunk), split_sum(splits * kChunk);
  for (int64_t first = 0; first < n_rows; first += kChunk) {
    const int64_t count = std::min<int64_t>(kChunk, n_rows - first);
    fill_chunk(s, first_head, first, count, wide, c);

    const int64_t panels = (c.vectors + 1) / 2;
    torch::stable::parallel_for(0, splits * panels, 1, [&](int64_t begin, int64_t end) {
      Buffer<float> converted(convert ? kKeys * s.dim : 0);
      Block<E> block;
      for (int64_t task = begin; task < end; ++task) {
        const int64_t split = task / panels, vector = task % panels * 2;
        Vec largest[2] = {Vec{} + kNone, Vec{} + kNone}, sum[2] = {};
        for (int64_t j = split * kSplit; j < std::min<int64_t>(n_keys, (split + 1) * kSplit); j += kKeys) {
          fill_block(s, head, j, convert ? converted.data() : nullptr, block);
          norms(wide, c, block, vector, largest, sum);
        }
        std::memcpy(split_largest.data() + split * kChunk + vector * kLanes, largest, sizeof(largest));
        std::memcpy(split_sum.data() + split * kChunk + vector * kLanes, sum, sizeof(sum));
      }
    });

    for (int64_t i = 0; i < kChunk; ++i) {
      c.base[i] = c.factor[i] = 0;
      if (i >= count) continue;
      const int64_t query_head = first_head + (first + i) / n, row = s.rows[(first + i) % n];
      const double weight = !weighted ? 1.0 : s.head_weights ? s.head_weights[query_head] : 1.0 / s.heads;
      const double share = weight / static_cast<double>(n);
      if (given) {
        const int64_t at = query_head * s.lse_stride + row;
        const double norm = (s.lse_float ? s.lse_float[at] : s.lse_double[at]) * kLog2e;
        c.base[i] = static_cast<float>(norm);
        c.factor[i] = static_cast<float>(share * std::exp2(c.base[i] - norm));
        continue;
      }
      float largest = kNone;
      for (int64_t j = 0; j < splits; ++j) largest = std::max(largest, split_largest[j * kChunk + i]);
      double total = 0;
      for (int64_t j = 0; j < splits; ++j) {
        const float top = split_largest[j * kChunk + i];
        if (top != kNone)
          total += std::exp2(static_cast<double>(top) - largest) * split_sum[j * kChunk + i];
        else if (std::isnan(split_sum[j * kChunk + i]))
          total = std::numeric_limits<double>::quiet_NaN();
      }
      c.base[i] = largest == kNone ? 0 : largest;
      c.factor[i] = static_cast<float>(share / total);
    }

    torch::stable::parallel_for(0, (n_keys + kKeys - 1) / kKeys, 1, [&](int64_t begin, int64_t end) {
      Buffer<float> converted(convert ? kKeys * s.dim : 0);
      Block<E> block;
      Vec totals[kKeys];
      for (int64_t b = begin; b < end; ++b) {
        fill_block(s, head, b * kKeys, convert ? converted.data() : nullptr, block);
        std::fill(totals, totals + kKeys, Vec{});
        shares(wide, c, block, totals);
        for (int64_t k = 0; k < std::min<int64_t>(kKeys, n_keys - b * kKeys); ++k) {
          float total = 0;
          for (int lane = 0; lane < kLanes; ++lane) total += totals[k][lane];
          scores[block.places[k]] += total;
        }
      }
    });
  }
}

template <typename E>
void score_sample(const Sample& s, bool wide, bool per_head, int64_t head_stride, float* scores) {
  Chunk<E> chunk(s.dim, static_cast<float>(s.scale));
  const int64_t group = s.heads / s.kv_heads;
  for (int64_t head = 0; head < s.heads; head += per_head ? 1 : group) {
    score_heads(s, head, per_head ? 1 : group, wide, !per_head, chunk, scores + (per_head ? head * head_stride : 0));
  }
}

std::optional<Tensor> checked(const char* name, const std::optional<Tensor>& given,
                              std::initializer_list<int64_t> shape, std::initializer_list<ScalarType> types) {
  if (!given) return std::nullopt;
  check_shape(name, *given, shape);
  check(std::find(types.begin(), types.end(), given->scalar_type()) != types.end(), name, ": got dtype ",
        torch::headeronly::toString(given->scalar_type()));
  return torch::stable::contiguous(*given);
}

template <typename T>
const T* data(const std::optional<Tensor>& t, ScalarType type) {
  return t && t->scalar_type() == type ? t->const_data_ptr<T>() : nullptr;
}

// Where each sample begins, and the end; one row of a padded batch each, or as cu_seqlens say.
std::vector<int64_t> sample_starts(const char* name, const std::optional<Tensor>& cu_seqlens, int64_t batch,
                                   int64_t length) {
  std::vector<int64_t> starts;
  if (!cu_seqlens) {
    for (int64_t b = 0; b <= batch; ++b) starts.push_back(b * length);
    return starts;
  }
  const int32_t* places = cu_seqlens->const_data_ptr<int32_t>();
  starts.assign(places, places + cu_seqlens->numel());
  check(batch == 1 && !starts.empty() && starts[0] >= 0 && starts.back() <= length &&
            std::is_sorted(starts.begin(), starts.end()),
        name, ": expected increasing places from 0 to ", length, " in a batch of 1");
  return starts;
}

}  // namespace

Tensor token_scores(const Tensor& query, const Tensor& key, const std::optional<Tensor>& query_mask,
                    const std::optional<Tensor>& key_mask, const std::optional<Tensor>& key_limits,
                    const std::optional<Tensor>& key_bias, const std::optional<Tensor>& head_weights, double scale,
                    bool causal, const std::optional<Tensor>& lse, bool per_head,
                    const std::optional<Tensor>& cu_seqlens_q, const std::optional<Tensor>& cu_seqlens_k) {
  check_shape("query", query, {kAny, kAny, kAny, kAny});
  const int64_t batch = query.size(0), heads = query.size(1), rows = query.size(2), dim = query.size(3);
  check_shape("key", key, {batch, kAny, kAny, dim});
  const int64_t kv_heads = key.size(1), length = key.size(2);
  const ScalarType type = query.scalar_type();
  check(type == ScalarType::Float || type == ScalarType::Half || type == ScalarType::BFloat16, "query: got dtype ",
        torch::headeronly::toString(type), ", expected float32, float16 or bfloat16");
  check_dtype("key", key, type);
  check(kv_heads > 0 && heads > 0 && heads % kv_heads == 0, "query: got ", heads, " heads for ", kv_heads, " of key");
  check(length < std::numeric_limits<int32_t>::max() && rows < std::numeric_limits<int32_t>::max(), "key: got ", length,
        " keys, expected fewer than 2^31 - 1");
  check(cu_seqlens_q.has_value() == cu_seqlens_k.has_value(), "cu_seqlens: expected both or neither");
  const auto query_cu = checked("cu_seqlens_q", cu_seqlens_q, {kAny}, {ScalarType::Int});
  const auto key_cu = checked("cu_seqlens_k", cu_seqlens_k, {kAny}, {ScalarType::Int});
  const std::vector<int64_t> query_starts = sample_starts("cu_seqlens_q", query_cu, batch, rows);
  const std::vector<int64_t> key_starts = sample_starts("cu_seqlens_k", key_cu, batch, length);
  check(query_starts.size() == key_starts.size(), "cu_seqlens_k: got ", key_starts.size(), " places, expected ",
        query_starts.size());
  const int64_t samples = static_cast<int64_t>(query_starts.size()) - 1;
  const auto weights = checked("head_weights", head_weights, {samples, heads}, {ScalarType::Float});
  const auto counted = checked("query_mask", query_mask, {batch, rows}, {ScalarType::Bool});
  const auto real = checked("key_mask", key_mask, {batch, length}, {ScalarType::Bool});
  const auto limits = checked("key_limits", key_limits, {batch, rows}, {ScalarType::Int});
  const auto bias = checked("key_bias", key_bias, {batch, length}, {ScalarType::Float});
  const auto norms = checked("lse", lse, {batch, heads, rows}, {ScalarType::Float, ScalarType::Double});

  std::vector<int64_t> shape{batch, length};
  if (per_head) shape.insert(shape.begin() + 1, heads);
  Tensor scores = torch::stable::new_empty(query, shape, ScalarType::Float);
  float* result = scores.mutable_data_ptr<float>();
  std::fill(result, result + scores.numel(), 0.0f);
  const int64_t item = static_cast<int64_t>(query.element_size());
  const bool wide = cpu_is_wide();
  const bool pairs = type == ScalarType::BFloat16 && dim % 2 == 0 && key.stride(3) == 1 && cpu_has_pairs();

  const auto score = [&](int64_t b) {
    // A padded sample is a row of the batch; packed ones stand in its only row.
    const int64_t row = query_cu ? 0 : b;
    const int64_t query_start = query_starts[b] - row * rows, key_start = key_starts[b] - row * length;
    const int64_t n_rows = query_starts[b + 1] - query_starts[b], n_keys = key_starts[b + 1] - key_starts[b];
    const auto source = [&](const Tensor& t, int64_t start) {
      const char* first = static_cast<const char*>(t.const_data_ptr());
      return Source{first + (row * t.stride(0) + start * t.stride(2)) * item,
                    type,
                    item,
                    {t.stride(1), t.stride(2), t.stride(3)}};
    };
    const auto of_keys = [&](auto* from) { return from ? from + key_starts[b] : nullptr; };
    const auto of_rows = [&](auto* from) { return from ? from + query_starts[b] : nullptr; };
    const auto of_heads = [&](auto* from) { return from ? from + row * heads * rows + query_start : nullptr; };
    Sample s{source(query, query_start),
             source(key, key_start),
             heads,
             kv_heads,
             dim,
             scale * kLog2e,
             {},
             {},
             {},
             of_keys(data<float>(bias, ScalarType::Float)),
             weights ? weights->const_data_ptr<float>() + b * heads : nullptr,
             of_heads(data<float>(norms, ScalarType::Float)),
             of_heads(data<double>(norms, ScalarType::Double)),
             rows};
    const bool* is_real = of_keys(data<bool>(real, ScalarType::Bool));
    const bool* counts = of_rows(data<bool>(counted, ScalarType::Bool));
    const int32_t* limit_of = of_rows(data<int32_t>(limits, ScalarType::Int));
    for (int64_t k = 0; k < n_keys; ++k) {
      if ((!is_real || is_real[k]) && (!s.key_bias || s.key_bias[k] != kNone)) {
        s.keys.push_back(static_cast<int32_t>(k));
      }
    }
    if (s.keys.empty()) return;
    for (int64_t r = 0; r < n_rows; ++r) {
      int64_t limit = causal ? n_keys - n_rows + r + 1 : n_keys;
      if (limit_of) limit = std::min<int64_t>(limit, limit_of[r]);
      if ((counts && !counts[r]) || limit <= s.keys[0]) continue;
      s.rows.push_back(static_cast<int32_t>(r));
      s.limits.push_back(static_cast<int32_t>(limit));
    }
    if (s.rows.empty()) return;
    float* to = result + (per_head ? row * heads * length : row * length) + key_start;
    pairs ? score_sample<uint16_t>(s, true, per_head, length, to) : score_sample<float>(s, wide, per_head, length, to);
  };
  // Samples side by side where there are enough of them; else what is inside a sample.
  torch::stable::parallel_for(0, samples, samples < torch::stable::get_num_threads() ? samples : 1,
                              [&](int64_t begin, int64_t end) {
                                for (int64_t b = begin; b < end; ++b) score(b);
                              });
  return scores;
}

}  // namespace lyra::token_select
