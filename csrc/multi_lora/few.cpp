// Adapters chosen per token, on a CPU, for few tokens: forward and backward each in one op, because a library's product
// per adapter costs more in calls and packing than in arithmetic where an adapter has a handful of tokens.
//
// Math, with T tokens, S adapters per token, p = t S + s a pair, e its adapter (ids[p]; -1: none), w its weight:
//   h[p]   = scaling_e A_e x[t]                    y[t] += w_p B_e h[p]
//   g[p]   = scaling_e w_p B_e^T dy[t]             dw_p  = <h[p], B_e^T dy[t]>
//   dA_e   = sum of g[p] x[t]^T                    dB_e  = sum of dy[t] (w_p h[p])^T              dx[t] += A_e^T g[p]
// x, y, A, B are float32 or bfloat16; everything between and dA, dB are float32. Each sum has an order of its own that
// depends on no other token, so a token's h, y and dx have the same bits in any batch.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <optional>
#include <tuple>
#include <vector>

#include "lyra/check.h"
#include "lyra/simd.h"

STABLE_TORCH_LIBRARY_FRAGMENT(lyra, m) {
  m.def(
      "multi_lora_few_(Tensor(a!) y, Tensor x, Tensor[] a, Tensor[] b, float[] scaling, Tensor ids, Tensor? weights)"
      " -> Tensor");
  m.def(
      "multi_lora_few_gradients_(Tensor(a!)? dx, Tensor dy, Tensor x, Tensor h, Tensor[] a, Tensor[] b,"
      " float[] scaling, Tensor ids, Tensor? weights, bool of_a, bool of_b) -> (Tensor[] of_a, Tensor[] of_b,"
      " Tensor of_weights)");
}

namespace lyra {
namespace {

constexpr int kLanes = 16, kRows = 4, kWide = 4;  // a tile of outer products: 4 rows by 4 vectors
typedef float Vec __attribute__((vector_size(kLanes * sizeof(float))));
typedef uint32_t Words __attribute__((vector_size(kLanes * sizeof(uint32_t))));
typedef uint16_t Halves __attribute__((vector_size(kLanes * sizeof(uint16_t))));

LYRA_INLINE Vec load(const float* from) {
  Vec v;
  std::memcpy(&v, from, sizeof(v));
  return v;
}

LYRA_INLINE Vec load(const uint16_t* from) {
  Halves v;
  std::memcpy(&v, from, sizeof(v));
  const Words wide = __builtin_convertvector(v, Words) << 16;
  Vec result;
  std::memcpy(&result, &wide, sizeof(result));
  return result;
}

LYRA_INLINE float load_one(const float* from) { return *from; }
LYRA_INLINE float load_one(const uint16_t* from) {
  const uint32_t wide = static_cast<uint32_t>(*from) << 16;
  float result;
  std::memcpy(&result, &wide, sizeof(result));
  return result;
}

LYRA_INLINE void store_one(float* to, float value) { *to = value; }
LYRA_INLINE void store_one(uint16_t* to, float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  *to = value != value ? 0x7fff : static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// The first `count` of a vector, zeros behind them.
template <class E>
LYRA_INLINE Vec load_part(const E* from, int64_t count) {
  E some[kLanes] = {};
  std::memcpy(some, from, count * sizeof(E));
  return load(some);
}

// The sums of 16 vectors, each in its lane. All are added up in the same order, whichever lane they end in.
LYRA_INLINE Vec sums_of(Vec (&v)[kLanes]) {
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    const Vec a = v[2 * i], b = v[2 * i + 1];
    v[i] = __builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
           __builtin_shufflevector(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const Vec a = v[2 * i], b = v[2 * i + 1];
    v[i] = __builtin_shufflevector(a, b, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
           __builtin_shufflevector(a, b, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    const Vec a = v[2 * i], b = v[2 * i + 1];
    v[i] = __builtin_shufflevector(a, b, 0, 1, 4, 5, 8, 9, 12, 13, 16, 17, 20, 21, 24, 25, 28, 29) +
           __builtin_shufflevector(a, b, 2, 3, 6, 7, 10, 11, 14, 15, 18, 19, 22, 23, 26, 27, 30, 31);
  }
  return __builtin_shufflevector(v[0], v[1], 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30) +
         __builtin_shufflevector(v[0], v[1], 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
}

// So many terms are added up one after the other, then these sums: the error of a sum over N outputs grows with
// sqrt(N) in one chain, and the products of libraries have no such long ones.
constexpr int64_t kChain = 64;

// Lane l * kRight + r: the product of rows left[l] and right[r].
template <int kLeft, int kRight, class L, class R>
LYRA_INLINE Vec dots(const L* const* left, const R* const* right, int64_t length) {
  Vec total = {};
  for (int64_t k = 0; k < length;) {
    Vec sums[kLanes] = {};
    for (const int64_t end = std::min(k + kChain * kLanes, length); k < end; k += kLanes) {
      const int64_t some = std::min<int64_t>(kLanes, end - k);
      Vec from_left[kLeft];
#pragma GCC unroll 4
      for (int l = 0; l < kLeft; ++l) from_left[l] = some == kLanes ? load(left[l] + k) : load_part(left[l] + k, some);
#pragma GCC unroll 16
      for (int r = 0; r < kRight; ++r) {
        const Vec from_right = some == kLanes ? load(right[r] + k) : load_part(right[r] + k, some);
#pragma GCC unroll 4
        for (int l = 0; l < kLeft; ++l) sums[l * kRight + r] += from_left[l] * from_right;
      }
    }
    total += sums_of(sums);
  }
  return total;
}

// The sums over q < count of factors[q, i] rows[q][column ..] for kI rows i and kV vectors of `columns` columns in all.
template <int kI, int kV, class R, class Out>
LYRA_INLINE void outer_tile(const float* factors, const R* const* rows, int64_t count, int64_t column, int64_t columns,
                            const Out& out) {
  Vec totals[kI][kV] = {};
  for (int64_t begin = 0; begin < count; begin += kChain) {
    Vec sums[kI][kV] = {};
    for (int64_t q = begin; q < std::min(begin + kChain, count); ++q) {
      Vec row[kV];
#pragma GCC unroll 4
      for (int v = 0; v < kV; ++v) {
        const R* const from = rows[q] + column + v * kLanes;
        row[v] = columns == kV * kLanes ? load(from) : load_part(from, columns);
      }
#pragma GCC unroll 4
      for (int i = 0; i < kI; ++i) {
#pragma GCC unroll 4
        for (int v = 0; v < kV; ++v) sums[i][v] += factors[q * kI + i] * row[v];
      }
    }
#pragma GCC unroll 4
    for (int i = 0; i < kI; ++i) {
#pragma GCC unroll 4
      for (int v = 0; v < kV; ++v) totals[i][v] += sums[i][v];
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < kI; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < kV; ++v) out(i, column + v * kLanes, totals[i][v], columns - (kV - 1) * kLanes);
  }
}

// The same for all columns from `first` to `end`: out(i, column, sum, number of columns).
template <int kI, class R, class Out>
LYRA_INLINE void outer_sums(const float* factors, const R* const* rows, int64_t count, int64_t first, int64_t end,
                            const Out& out) {
  int64_t column = first;
  for (; column + kWide * kLanes <= end; column += kWide * kLanes) {
    outer_tile<kI, kWide>(factors, rows, count, column, kWide * kLanes, out);
  }
  for (; column < end; column += kLanes) {
    outer_tile<kI, 1>(factors, rows, count, column, std::min<int64_t>(kLanes, end - column), out);
  }
}

struct Adapter {
  int64_t rank;
  float scaling;
  std::vector<int64_t> pairs;
  const void *a, *b;   // (r, K), (N, r)
  float *of_a, *of_b;  // their gradients, or null
};

struct Few {
  int64_t slots, inputs, outputs, width;  // S, K, N, the largest rank
  std::vector<Adapter> adapters;          // those with tokens
  const void *x, *dy;                     // (T, K), (T, N)
  void *y, *dx;                           // (T, N), (T, K); dx may be null
  float *h, *g;                           // (T S, width)
  const float* weights;                   // or null
  float* of_weights;                      // or null
  int64_t x_stride, dy_stride;

  float weight(int64_t pair) const { return weights ? weights[pair] : 1.0f; }
};

constexpr int64_t kBlock = 64;  // columns of y, x, dA; rows of dB
constexpr int64_t kRankBlock = 16;

template <class E>
const E* row(const void* matrix, int64_t stride, int64_t index) {
  return static_cast<const E*>(matrix) + index * stride;
}

// Lanes of `dots` for kLeft rows and rows first .. of right, of which those from `end` on are the last one again.
template <int kLeft, class L, class R>
LYRA_INLINE void dots_of_rows(const L* const* left, const R* right, int64_t first, int64_t end, int64_t length,
                              float (&values)[kLanes]) {
  constexpr int kRight = kLanes / kLeft;
  const R* rows[kRight];
  for (int r = 0; r < kRight; ++r) rows[r] = right + std::min(first + r, end - 1) * length;
  const Vec products = dots<kLeft, kRight>(left, rows, length);
  std::memcpy(values, &products, sizeof(values));
}

// h of kLeft pairs of an adapter, from its place `at` on, for ranks first .. end - 1.
template <class E, int kLeft>
LYRA_INLINE void shrink_some(const Few& f, const Adapter& adapter, int64_t at, int64_t first, int64_t end) {
  constexpr int kRight = kLanes / kLeft;
  const E* left[kLeft];
  for (int l = 0; l < kLeft; ++l) left[l] = row<E>(f.x, f.x_stride, adapter.pairs[at + l] / f.slots);
  for (int64_t rank = first; rank < end; rank += kRight) {
    float values[kLanes];
    dots_of_rows<kLeft>(left, static_cast<const E*>(adapter.a), rank, end, f.inputs, values);
    const int64_t some = std::min<int64_t>(kRight, end - rank);
    for (int l = 0; l < kLeft; ++l) {
      float* const to = f.h + adapter.pairs[at + l] * f.width + rank;
      for (int64_t i = 0; i < some; ++i) to[i] = adapter.scaling * values[l * kRight + i];
    }
  }
}

template <class E>
LYRA_INLINE void shrink(const Few& f, const Adapter& adapter, int64_t first) {
  const int64_t end = std::min(first + kRankBlock, adapter.rank), count = adapter.pairs.size();
  int64_t at = 0;
  for (; at + 4 <= count; at += 4) shrink_some<E, 4>(f, adapter, at, first, end);
  for (; at < count; ++at) shrink_some<E, 1>(f, adapter, at, first, end);
}

template <class E, int kLeft>
LYRA_INLINE void expand_some(const Few& f, const Adapter& adapter, int64_t at, int64_t first, int64_t end) {
  constexpr int kRight = kLanes / kLeft;
  const float* left[kLeft];
  for (int l = 0; l < kLeft; ++l) left[l] = f.h + adapter.pairs[at + l] * f.width;
  for (int64_t column = first; column < end; column += kRight) {
    float values[kLanes];
    dots_of_rows<kLeft>(left, static_cast<const E*>(adapter.b), column, end, adapter.rank, values);
    const int64_t some = std::min<int64_t>(kRight, end - column);
    for (int l = 0; l < kLeft; ++l) {
      const int64_t pair = adapter.pairs[at + l];
      const float weight = f.weight(pair);
      E* const to = static_cast<E*>(f.y) + pair / f.slots * f.outputs + column;
      for (int64_t i = 0; i < some; ++i) store_one(to + i, load_one(to + i) + weight * values[l * kRight + i]);
    }
  }
}

// y in one block of columns.
template <class E>
LYRA_INLINE void expand(const Few& f, int64_t block) {
  const int64_t first = block * kBlock, end = std::min(first + kBlock, f.outputs);
  for (const Adapter& adapter : f.adapters) {
    const int64_t count = adapter.pairs.size();
    int64_t at = 0;
    for (; at + 4 <= count; at += 4) expand_some<E, 4>(f, adapter, at, first, end);
    for (; at < count; ++at) expand_some<E, 1>(f, adapter, at, first, end);
  }
}

// Rows that the sums of a tile are written to or, where kAdds, added to; null: none.
template <class E, bool kAdds>
struct Target {
  E* rows[kRows];

  LYRA_INLINE void operator()(int i, int64_t column, Vec sum, int64_t count) const {
    if (!rows[i]) return;
    E* const to = rows[i] + column;
    if constexpr (kAdds) {
      for (int64_t k = 0; k < count; ++k) store_one(to + k, load_one(to + k) + sum[k]);
    } else {
      if (count == kLanes) {
        std::memcpy(to, &sum, sizeof(sum));
      } else {
        for (int64_t k = 0; k < count; ++k) to[k] = sum[k];
      }
    }
  }
};

// Memory of one thread.
struct Scratch {
  std::vector<float> factors;
  std::vector<const void*> rows;
};

// B^T dy of kI pairs and what follows from it: the gradients of their weights, and g.
template <class E, int kI>
LYRA_INLINE void shrink_back_some(const Few& f, const Adapter& adapter, int64_t at, Scratch& scratch) {
  scratch.factors.resize(f.outputs * kI);
  float* const factors = scratch.factors.data();
  Target<float, false> target{};
  for (int i = 0; i < kI; ++i) {
    const int64_t pair = adapter.pairs[at + i];
    const E* const dy = row<E>(f.dy, f.dy_stride, pair / f.slots);
    for (int64_t n = 0; n < f.outputs; ++n) factors[n * kI + i] = load_one(dy + n);
    target.rows[i] = f.g + pair * f.width;
  }
  outer_sums<kI>(factors, reinterpret_cast<const E* const*>(scratch.rows.data()), f.outputs, 0, adapter.rank, target);
  for (int i = 0; i < kI; ++i) {
    const int64_t pair = adapter.pairs[at + i];
    float *const g = f.g + pair * f.width, *const h = f.h + pair * f.width;
    float product = 0;
    for (int64_t j = 0; j < adapter.rank; ++j) product += h[j] * g[j];
    if (f.of_weights) f.of_weights[pair] = product;
    const float factor = adapter.scaling * f.weight(pair);
    for (int64_t j = 0; j < adapter.rank; ++j) g[j] *= factor;
  }
}

// g of the pairs of an adapter from place `at` on, at most four.
template <class E>
LYRA_INLINE void shrink_back(const Few& f, const Adapter& adapter, int64_t at, Scratch& scratch) {
  const int64_t end = std::min<int64_t>(at + kRows, adapter.pairs.size());
  scratch.rows.resize(f.outputs);
  for (int64_t n = 0; n < f.outputs; ++n) scratch.rows[n] = row<E>(adapter.b, adapter.rank, n);
  if (end == at + kRows) return shrink_back_some<E, kRows>(f, adapter, at, scratch);
  for (; at < end; ++at) shrink_back_some<E, 1>(f, adapter, at, scratch);
}

// dB in one block of its rows.
template <class E>
LYRA_INLINE void outer_b(const Few& f, int64_t block, Scratch& scratch) {
  const int64_t first = block * kBlock, end = std::min(first + kBlock, f.outputs);
  for (const Adapter& adapter : f.adapters) {
    if (!adapter.of_b) continue;
    const int64_t count = adapter.pairs.size();
    scratch.rows.resize(count);
    scratch.factors.resize(count * kRows);
    for (int64_t q = 0; q < count; ++q) scratch.rows[q] = f.h + adapter.pairs[q] * f.width;
    for (int64_t n = first; n < end; n += kRows) {
      Target<float, false> target{};
      for (int i = 0; i < kRows; ++i) target.rows[i] = n + i < end ? adapter.of_b + (n + i) * adapter.rank : nullptr;
      for (int64_t q = 0; q < count; ++q) {
        const int64_t pair = adapter.pairs[q];
        const E* const dy = row<E>(f.dy, f.dy_stride, pair / f.slots);
        const float weight = f.weight(pair);
        for (int i = 0; i < kRows; ++i) {
          scratch.factors[q * kRows + i] = n + i < end ? weight * load_one(dy + n + i) : 0.0f;
        }
      }
      outer_sums<kRows>(scratch.factors.data(), reinterpret_cast<const float* const*>(scratch.rows.data()), count, 0,
                        adapter.rank, target);
    }
  }
}

template <class E, int kI>
LYRA_INLINE void add_dx(const Few& f, const Adapter& adapter, int64_t at, int64_t first, int64_t end,
                        Scratch& scratch) {
  scratch.factors.resize(adapter.rank * kI);
  Target<E, true> target{};
  for (int i = 0; i < kI; ++i) {
    const int64_t pair = adapter.pairs[at + i];
    for (int64_t j = 0; j < adapter.rank; ++j) scratch.factors[j * kI + i] = f.g[pair * f.width + j];
    target.rows[i] = static_cast<E*>(f.dx) + pair / f.slots * f.inputs;
  }
  outer_sums<kI>(scratch.factors.data(), reinterpret_cast<const E* const*>(scratch.rows.data()), adapter.rank, first,
                 end, target);
}

// dA and dx in one block of columns.
template <class E>
LYRA_INLINE void outer_a(const Few& f, int64_t block, Scratch& scratch) {
  const int64_t first = block * kBlock, end = std::min(first + kBlock, f.inputs);
  for (const Adapter& adapter : f.adapters) {
    const int64_t count = adapter.pairs.size();
    if (adapter.of_a) {
      scratch.rows.resize(count);
      scratch.factors.resize(count * kRows);
      for (int64_t q = 0; q < count; ++q) scratch.rows[q] = row<E>(f.x, f.x_stride, adapter.pairs[q] / f.slots);
      for (int64_t j = 0; j < adapter.rank; j += kRows) {
        Target<float, false> target{};
        for (int i = 0; i < kRows; ++i) {
          target.rows[i] = j + i < adapter.rank ? adapter.of_a + (j + i) * f.inputs : nullptr;
        }
        for (int64_t q = 0; q < count; ++q) {
          const float* const g = f.g + adapter.pairs[q] * f.width + j;
          for (int i = 0; i < kRows; ++i) scratch.factors[q * kRows + i] = j + i < adapter.rank ? g[i] : 0.0f;
        }
        outer_sums<kRows>(scratch.factors.data(), reinterpret_cast<const E* const*>(scratch.rows.data()), count, first,
                          end, target);
      }
    }
    if (!f.dx) continue;
    scratch.rows.resize(adapter.rank);
    for (int64_t j = 0; j < adapter.rank; ++j) scratch.rows[j] = row<E>(adapter.a, f.inputs, j);
    int64_t at = 0;
    for (; at + kRows <= count; at += kRows) add_dx<E, kRows>(f, adapter, at, first, end, scratch);
    for (; at < count; ++at) add_dx<E, 1>(f, adapter, at, first, end, scratch);
  }
}

// Which work an item of a stage is: a block of an adapter's ranks or pairs, or a block of columns.
struct Item {
  const Adapter* adapter;
  int64_t first;
};

enum Stage { kShrink, kExpand, kShrinkBack, kOuterB, kOuterA };

// One function per stage and dtype: a compiler takes twice as long over one that holds them all.
template <Stage kStage, class E>
LYRA_SIMD void run(const Few& f, const Item* items, int64_t count) {
  Scratch scratch;
  for (int64_t i = 0; i < count; ++i) {
    const Item item = items[i];
    if constexpr (kStage == kShrink) shrink<E>(f, *item.adapter, item.first);
    if constexpr (kStage == kExpand) expand<E>(f, item.first);
    if constexpr (kStage == kShrinkBack) shrink_back<E>(f, *item.adapter, item.first, scratch);
    if constexpr (kStage == kOuterB) outer_b<E>(f, item.first, scratch);
    if constexpr (kStage == kOuterA) outer_a<E>(f, item.first, scratch);
  }
}

constexpr int64_t kWork = 1 << 18;  // multiplications that are worth a thread

template <Stage kStage>
void run_all(const Few& f, ScalarType dtype, const std::vector<Item>& items) {
  int64_t work = 0;
  for (const Adapter& adapter : f.adapters) {
    work += adapter.rank * static_cast<int64_t>(adapter.pairs.size()) * std::max(f.inputs, f.outputs);
  }
  const int64_t count = items.size(), grain = std::max<int64_t>(1, kWork * count / std::max<int64_t>(work, 1));
  torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
    (dtype == ScalarType::Float ? run<kStage, float> : run<kStage, uint16_t>)(f, items.data() + begin, end - begin);
  });
}

std::vector<Item> blocks_of(int64_t columns) {
  std::vector<Item> items;
  for (int64_t block = 0; block * kBlock < columns; ++block) items.push_back({nullptr, block});
  return items;
}

void check_rows(const char* name, const Tensor& t, int64_t rows, ScalarType dtype) {
  check_shape(name, t, {rows, kAny});
  check_dtype(name, t, dtype);
  check(t.size(1) <= 1 || t.stride(1) == 1, name, ": got columns that are strided, expected adjacent ones");
}

// The sizes and the adapters with their pairs.
Few few_of(const Tensor& x, const Tensor& y, const std::vector<Tensor>& a, const std::vector<Tensor>& b,
           const std::vector<double>& scaling, const Tensor& ids, const std::optional<Tensor>& weights) {
  const int64_t tokens = x.size(0), adapters = a.size();
  const ScalarType dtype = x.scalar_type();
  check(dtype == ScalarType::Float || dtype == ScalarType::BFloat16, "x: got dtype ",
        torch::headeronly::toString(dtype), ", expected float32 or bfloat16");
  check_rows("x", x, kAny, dtype);
  check_rows("y", y, tokens, dtype);
  check_shape("ids", ids, {tokens, kAny});
  check_dtype("ids", ids, ScalarType::Long);
  check(b.size() == a.size() && scaling.size() == a.size(), "b, scaling: got ", b.size(), " and ", scaling.size(),
        ", expected ", adapters);
  if (weights) {
    check_shape("weights", *weights, {tokens, ids.size(1)});
    check_dtype("weights", *weights, ScalarType::Float);
    check_contiguous("weights", *weights);
  }
  Few f{};
  f.slots = ids.size(1), f.inputs = x.size(1), f.outputs = y.size(1);
  f.x = x.const_data_ptr(), f.x_stride = x.stride(0);
  f.weights = weights ? weights->const_data_ptr<float>() : nullptr;
  f.adapters.resize(adapters);
  for (int64_t e = 0; e < adapters; ++e) {
    const int64_t rank = a[e].size(0);
    check_shape("a", a[e], {rank, f.inputs});
    check_shape("b", b[e], {f.outputs, rank});
    for (const Tensor* t : {&a[e], &b[e]}) {
      check_dtype("a, b", *t, dtype);
      check_contiguous("a, b", *t);
    }
    f.width = std::max(f.width, rank);
    f.adapters[e] = {rank, static_cast<float>(scaling[e]), {}, a[e].const_data_ptr(), b[e].const_data_ptr(), {}, {}};
  }
  const auto* const id = ids.const_data_ptr<int64_t>();
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t s = 0; s < f.slots; ++s) {
      const int64_t e = id[t * ids.stride(0) + s * ids.stride(1)];
      check(e >= -1 && e < adapters, "ids: got ", e, ", expected -1 to ", adapters - 1);
      if (e >= 0) f.adapters[e].pairs.push_back(t * f.slots + s);
    }
  }
  return f;
}

void drop_absent(Few& f) {
  std::erase_if(f.adapters, [](const Adapter& adapter) { return adapter.pairs.empty(); });
}

Tensor multi_lora_few(Tensor y, const Tensor& x, const std::vector<Tensor>& a, const std::vector<Tensor>& b,
                      const std::vector<double>& scaling, const Tensor& ids, const std::optional<Tensor>& weights) {
  Few f = few_of(x, y, a, b, scaling, ids, weights);
  check_contiguous("y", y);
  f.y = y.mutable_data_ptr();
  Tensor h = torch::stable::new_empty(x, {x.size(0) * f.slots, f.width}, ScalarType::Float);
  f.h = h.mutable_data_ptr<float>();
  drop_absent(f);
  std::vector<Item> shrinks;
  for (const Adapter& adapter : f.adapters) {
    for (int64_t rank = 0; rank < adapter.rank; rank += kRankBlock) shrinks.push_back({&adapter, rank});
  }
  run_all<kShrink>(f, x.scalar_type(), shrinks);
  run_all<kExpand>(f, x.scalar_type(), blocks_of(f.outputs));
  return h;
}

std::tuple<std::vector<Tensor>, std::vector<Tensor>, Tensor> multi_lora_few_gradients(
    std::optional<Tensor> dx, const Tensor& dy, const Tensor& x, const Tensor& h, const std::vector<Tensor>& a,
    const std::vector<Tensor>& b, const std::vector<double>& scaling, const Tensor& ids,
    const std::optional<Tensor>& weights, bool of_a, bool of_b) {
  Few f = few_of(x, dy, a, b, scaling, ids, weights);
  const int64_t pairs = x.size(0) * f.slots;
  check_shape("h", h, {pairs, f.width});
  check_dtype("h", h, ScalarType::Float);
  check_contiguous("h", h);
  f.dy = dy.const_data_ptr(), f.dy_stride = dy.stride(0);
  f.h = const_cast<float*>(h.const_data_ptr<float>());
  if (dx) {
    check_shape("dx", *dx, {x.size(0), f.inputs});
    check_dtype("dx", *dx, x.scalar_type());
    check_contiguous("dx", *dx);
    f.dx = dx->mutable_data_ptr();
  }
  Tensor g = torch::stable::new_empty(h, {pairs, f.width}), of_weights = torch::stable::new_empty(h, {0});
  f.g = g.mutable_data_ptr<float>();
  if (weights) {
    of_weights = torch::stable::new_zeros(h, {x.size(0), f.slots});
    f.of_weights = of_weights.mutable_data_ptr<float>();
  }
  std::vector<Tensor> das, dbs;
  const auto gradient = [&](const Tensor& like, bool absent) {
    return absent ? torch::stable::new_zeros(h, like.sizes()) : torch::stable::new_empty(h, like.sizes());
  };
  for (size_t e = 0; e < a.size(); ++e) {
    Adapter& adapter = f.adapters[e];
    if (of_a) adapter.of_a = das.emplace_back(gradient(a[e], adapter.pairs.empty())).mutable_data_ptr<float>();
    if (of_b) adapter.of_b = dbs.emplace_back(gradient(b[e], adapter.pairs.empty())).mutable_data_ptr<float>();
  }
  drop_absent(f);
  std::vector<Item> backs;
  for (const Adapter& adapter : f.adapters) {
    for (size_t at = 0; at < adapter.pairs.size(); at += kRows) backs.push_back({&adapter, static_cast<int64_t>(at)});
  }
  run_all<kShrinkBack>(f, x.scalar_type(), backs);
  if (of_b) run_all<kOuterB>(f, x.scalar_type(), blocks_of(f.outputs));
  if (of_a || dx) run_all<kOuterA>(f, x.scalar_type(), blocks_of(f.inputs));
  return {das, dbs, of_weights};
}

}  // namespace
}  // namespace lyra

STABLE_TORCH_LIBRARY_IMPL(lyra, CPU, m) {
  m.impl("multi_lora_few_", TORCH_BOX(&lyra::multi_lora_few));
  m.impl("multi_lora_few_gradients_", TORCH_BOX(&lyra::multi_lora_few_gradients));
}
