// Token scores: the CPU implementation.
//
//     score_k = sum_h w_h mean_q softmax_k(scale Q_q^h . K_k^(h / G)),   G = Hq / Hkv query heads per key head
//
// Two passes over the keys, neither of which keeps more than a block of logits: the first finds each row's largest
// logit and its sum of powers, the second adds up the shares of each key. With `lse` there is only the second. Logits
// are in units of log 2, so that powers are powers of two. Rows that count and keys that are real are brought together
// first, so padding costs nothing and moves no block boundary; blocks and splits have constant sizes. So a sample gets
// the same bits in any batch and with any number of threads.
//
// Memory: a row takes 4 D bytes and 8 per split of kSplit keys, a key 4 bytes and its 4-byte result, a thread one block
// of keys and one strip of logits.
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
#include <vector>

#include "lyra/check.h"
#include "lyra/simd.h"

namespace lyra::token_select {
namespace {

constexpr int kLanes = 16;  // keys side by side in a vector
constexpr int kPair = 2 * kLanes;
constexpr int kRows = 8;      // query rows of a strip: kRows x kPair sums stay in registers
constexpr int kKeys = 256;    // keys of a block
constexpr int kSplit = 2048;  // keys of a task of the first pass
constexpr float kNone = -std::numeric_limits<float>::infinity();

typedef float Vec __attribute__((vector_size(kLanes * sizeof(float))));
typedef int32_t Ints __attribute__((vector_size(kLanes * sizeof(int32_t))));

template <typename V>
class Buffer {  // not std::vector, whose allocator sees the element's type without its alignment
 public:
  explicit Buffer(int64_t size) : data_(new (std::align_val_t{64}) V[size]) {}
  ~Buffer() { ::operator delete[](data_, std::align_val_t{64}); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  V* data() { return data_; }

 private:
  V* data_;
};

// 2^x; 0 below the normal numbers, NaN for NaN.
LYRA_INLINE Vec exp2(Vec x) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, which its low bits show
  x = x > 128.0f ? Vec{} + 128.0f : x;
  const Vec rounded = x + kRound;
  const Ints integer = std::bit_cast<Ints>(rounded) - std::bit_cast<int32_t>(kRound);
  const Vec y = (x - (rounded - kRound)) * 0.6931471805599453f;
  Vec series = Vec{} + 1.0f;
  for (int n = 7; n > 0; --n) series = 1.0f + series * y * (1.0f / static_cast<float>(n));
  const Vec power = series * std::bit_cast<Vec>((integer + 127) << 23);
  return x < -126.0f ? Vec{} : power;
}

// One sample, as both passes see it.
struct Sample {
  const void *query, *key;
  int64_t query_strides[3], key_strides[3];  // head, row, channel
  int64_t heads, kv_heads, dim;
  std::vector<int32_t> rows, row_place;  // rows that count, and the last key that each of them sees
  std::vector<int32_t> keys;             // keys that are real, increasing
  int64_t group_rows = 0;                // heads / kv_heads * rows, filled up to strips
};

// The rows of a key head: row r of its g-th query head is number g * rows + r.
struct Group {
  const float* query;     // (group_rows, dim), times scale log2(e)
  const int32_t* places;  // (group_rows,), -1 for what fills the last strip
};

template <typename S>
LYRA_INLINE void load_keys(const Sample& s, int64_t head, int64_t first, int64_t count, float* to, int32_t* places) {
  // (pair of vectors, channel, key of the pair)
  const int64_t row = s.key_strides[1], step = s.key_strides[2];
  const S* base = static_cast<const S*>(s.key) + head * s.key_strides[0];
  const int64_t filled = (count + kPair - 1) / kPair * kPair;
  for (int64_t k = 0; k < filled; ++k) {
    float* column = to + k / kPair * kPair * s.dim + k % kPair;
    places[k] = k < count ? s.keys[first + k] : std::numeric_limits<int32_t>::max();
    if (k >= count) {
      for (int64_t d = 0; d < s.dim; ++d) column[d * kPair] = 0;
      continue;
    }
    const S* from = base + places[k] * row;
    for (int64_t d = 0; d < s.dim; ++d) column[d * kPair] = static_cast<float>(from[d * step]);
  }
}

void load_keys(ScalarType type, const Sample& s, int64_t head, int64_t first, int64_t count, float* to,
               int32_t* places) {
  if (type == ScalarType::Float) return load_keys<float>(s, head, first, count, to, places);
  if (type == ScalarType::Half) return load_keys<torch::headeronly::Half>(s, head, first, count, to, places);
  load_keys<torch::headeronly::BFloat16>(s, head, first, count, to, places);
}

template <typename S>
void load_rows(const Sample& s, int64_t head, double scale, float* to, int32_t* places) {
  const int64_t group = s.heads / s.kv_heads, n = static_cast<int64_t>(s.rows.size());
  std::fill(to, to + s.group_rows * s.dim, 0.0f);
  std::fill(places, places + s.group_rows, -1);
  for (int64_t g = 0; g < group; ++g) {
    const S* base = static_cast<const S*>(s.query) + (head * group + g) * s.query_strides[0];
    for (int64_t r = 0; r < n; ++r) {
      const S* from = base + s.rows[r] * s.query_strides[1];
      float* row = to + (g * n + r) * s.dim;
      for (int64_t d = 0; d < s.dim; ++d) {
        row[d] = static_cast<float>(static_cast<float>(from[d * s.query_strides[2]]) * scale);
      }
      places[g * n + r] = s.row_place[r];
    }
  }
}

// Logits of kRows rows against the keys of a block, -inf where a row does not see a key.
LYRA_INLINE void strip(const float* query, const int32_t* row_places, const float* keys, const int32_t* key_places,
                       int64_t vectors, int64_t dim, Vec (*logits)[kKeys / kLanes]) {
  for (int64_t v = 0; v < vectors; v += 2) {
    const float* panel = keys + v * kLanes * dim;
    Vec sums[kRows][2] = {};
    for (int64_t d = 0; d < dim; ++d) {
      Vec a, b;
      std::memcpy(&a, panel + d * kPair, sizeof(Vec));
      std::memcpy(&b, panel + d * kPair + kLanes, sizeof(Vec));
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const float q = query[r * dim + d];
        sums[r][0] += a * q;
        sums[r][1] += b * q;
      }
    }
    Ints place[2];
    std::memcpy(place, key_places + v * kLanes, sizeof(place));
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      logits[r][v] = place[0] > row_places[r] ? Vec{} + kNone : sums[r][0];
      logits[r][v + 1] = place[1] > row_places[r] ? Vec{} + kNone : sums[r][1];
    }
  }
}

// Takes a block of keys into the largest logit and the sum of powers of each row, lane by lane.
LYRA_SIMD void add_norms(const Sample& s, const Group& group, const float* keys, const int32_t* places, int64_t vectors,
                         Vec* largest, Vec* sum) {
  Vec logits[kRows][kKeys / kLanes];
  for (int64_t i = 0; i < s.group_rows; i += kRows) {
    if (std::all_of(group.places + i, group.places + i + kRows, [&](int32_t p) { return p < places[0]; })) continue;
    strip(group.query + i * s.dim, group.places + i, keys, places, vectors, s.dim, logits);
    for (int r = 0; r < kRows; ++r) {
      Vec top = largest[i + r];
      for (int64_t v = 0; v < vectors; ++v) top = logits[r][v] > top ? logits[r][v] : top;
      const Vec base = top == kNone ? Vec{} : top;
      Vec total = sum[i + r] * exp2(largest[i + r] - base);
      for (int64_t v = 0; v < vectors; ++v) total += exp2(logits[r][v] - base);
      largest[i + r] = top;
      sum[i + r] = total;
    }
  }
}

// Adds the shares 2^(logit - base) factor of all rows to the keys of a block.
LYRA_SIMD void add_shares(const Sample& s, const Group& group, const float* base, const float* factor,
                          const float* keys, const int32_t* places, int64_t vectors, Vec* totals) {
  Vec logits[kRows][kKeys / kLanes];
  for (int64_t i = 0; i < s.group_rows; i += kRows) {
    if (std::all_of(group.places + i, group.places + i + kRows, [&](int32_t p) { return p < places[0]; })) continue;
    strip(group.query + i * s.dim, group.places + i, keys, places, vectors, s.dim, logits);
    for (int64_t v = 0; v < vectors; ++v) {
      Vec total = {};
      for (int r = 0; r < kRows; ++r) total += exp2(logits[r][v] - base[i + r]) * factor[i + r];
      totals[v] += total;
    }
  }
}

struct Norm {
  float largest = kNone, sum = 0;
};

// 2^(largest - base) sum, added in the order of the lanes or splits.
Norm merge(const float* largest, const float* sum, int64_t count, int64_t stride) {
  Norm norm;
  for (int64_t i = 0; i < count; ++i) norm.largest = std::max(norm.largest, largest[i * stride]);
  const float base = norm.largest == kNone ? 0 : norm.largest;
  double total = 0;
  for (int64_t i = 0; i < count; ++i) {
    total += std::exp2(static_cast<double>(largest[i * stride]) - base) * sum[i * stride];
  }
  norm.sum = static_cast<float>(total);
  return norm;
}

void score_sample(const Sample& s, ScalarType type, const float* head_weights, double scale, const double* lse,
                  int64_t lse_rows, float* scores) {
  constexpr double kLog2e = 1.4426950408889634;
  const int64_t n_keys = static_cast<int64_t>(s.keys.size()), n_rows = static_cast<int64_t>(s.rows.size());
  const int64_t total_rows = s.kv_heads * s.group_rows, per_head = s.heads / s.kv_heads * n_rows;
  Buffer<float> query(total_rows * s.dim), base(total_rows), factor(total_rows);
  Buffer<int32_t> row_places(total_rows);
  const auto group = [&](int64_t head) {
    return Group{query.data() + head * s.group_rows * s.dim, row_places.data() + head * s.group_rows};
  };
  for (int64_t head = 0; head < s.kv_heads; ++head) {
    float* to = query.data() + head * s.group_rows * s.dim;
    int32_t* places = row_places.data() + head * s.group_rows;
    if (type == ScalarType::Float)
      load_rows<float>(s, head, scale * kLog2e, to, places);
    else if (type == ScalarType::Half)
      load_rows<torch::headeronly::Half>(s, head, scale * kLog2e, to, places);
    else
      load_rows<torch::headeronly::BFloat16>(s, head, scale * kLog2e, to, places);
  }

  const int64_t splits = lse ? 0 : (n_keys + kSplit - 1) / kSplit;
  Buffer<float> split_largest(splits * total_rows), split_sum(splits * total_rows);
  torch::stable::parallel_for(0, splits * s.kv_heads, 1, [&](int64_t begin, int64_t end) {
    Buffer<float> keys(kKeys * s.dim);
    Buffer<int32_t> places(kKeys);
    Buffer<Vec> largest(s.group_rows), sum(s.group_rows);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t split = task / s.kv_heads, head = task % s.kv_heads;
      std::fill(largest.data(), largest.data() + s.group_rows, Vec{} + kNone);
      std::fill(sum.data(), sum.data() + s.group_rows, Vec{});
      for (int64_t j = split * kSplit; j < std::min<int64_t>(n_keys, (split + 1) * kSplit); j += kKeys) {
        const int64_t count = std::min<int64_t>(kKeys, n_keys - j);
        load_keys(type, s, head, j, count, keys.data(), places.data());
        add_norms(s, group(head), keys.data(), places.data(), (count + kPair - 1) / kPair * 2, largest.data(),
                  sum.data());
      }
      for (int64_t i = 0; i < s.group_rows; ++i) {
        const Norm norm =
            merge(reinterpret_cast<float*>(largest.data() + i), reinterpret_cast<float*>(sum.data() + i), kLanes, 1);
        split_largest.data()[split * total_rows + head * s.group_rows + i] = norm.largest;
        split_sum.data()[split * total_rows + head * s.group_rows + i] = norm.sum;
      }
    }
  });

  for (int64_t i = 0; i < total_rows; ++i) {
    const int64_t head = i / s.group_rows, in_head = i % s.group_rows;
    base.data()[i] = factor.data()[i] = 0;
    if (in_head >= per_head) continue;
    const int64_t query_head = head * (s.heads / s.kv_heads) + in_head / n_rows;
    const double share = static_cast<double>(head_weights[query_head]) / static_cast<double>(n_rows);
    if (lse) {
      const double norm = lse[query_head * lse_rows + s.rows[in_head % n_rows]] * kLog2e;
      base.data()[i] = static_cast<float>(norm);
      factor.data()[i] = static_cast<float>(share * std::exp2(base.data()[i] - norm));
    } else {
      const Norm norm = merge(split_largest.data() + i, split_sum.data() + i, splits, total_rows);
      base.data()[i] = norm.largest;
      factor.data()[i] = static_cast<float>(share / norm.sum);
    }
  }

  torch::stable::parallel_for(0, (n_keys + kKeys - 1) / kKeys, 1, [&](int64_t begin, int64_t end) {
    Buffer<float> keys(kKeys * s.dim);
    Buffer<int32_t> places(kKeys);
    Vec totals[kKeys / kLanes];
    for (int64_t block = begin; block < end; ++block) {
      const int64_t j = block * kKeys, count = std::min<int64_t>(kKeys, n_keys - j);
      std::fill(totals, totals + kKeys / kLanes, Vec{});
      for (int64_t head = 0; head < s.kv_heads; ++head) {
        load_keys(type, s, head, j, count, keys.data(), places.data());
        add_shares(s, group(head), base.data() + head * s.group_rows, factor.data() + head * s.group_rows, keys.data(),
                   places.data(), (count + kPair - 1) / kPair * 2, totals);
      }
      for (int64_t k = 0; k < count; ++k) scores[s.keys[j + k]] = totals[k / kLanes][k % kLanes];
    }
  });
}

}  // namespace

Tensor token_scores(const Tensor& query, const Tensor& key, const std::optional<Tensor>& query_mask,
                    const std::optional<Tensor>& key_mask, const std::optional<Tensor>& key_limits,
                    const std::optional<Tensor>& key_bias, const std::optional<Tensor>& head_weights, double scale,
                    bool causal, const std::optional<Tensor>& lse, bool per_head,
                    const std::optional<Tensor>& cu_seqlens_q, const std::optional<Tensor>& cu_seqlens_k) {
  check(!key_limits && !key_bias && head_weights && !per_head && !cu_seqlens_q && !cu_seqlens_k, "not yet");
  check_shape("query", query, {kAny, kAny, kAny, kAny});
  const int64_t batch = query.size(0), heads = query.size(1), rows = query.size(2), dim = query.size(3);
  check_shape("key", key, {batch, kAny, kAny, dim});
  const int64_t kv_heads = key.size(1), length = key.size(2);
  const ScalarType type = query.scalar_type();
  check(type == ScalarType::Float || type == ScalarType::Half || type == ScalarType::BFloat16, "query: got dtype ",
        torch::headeronly::toString(type), ", expected float32, float16 or bfloat16");
  check_dtype("key", key, type);
  check(kv_heads > 0 && heads > 0 && heads % kv_heads == 0, "query: got ", heads, " heads for ", kv_heads, " of key");
  check(length < std::numeric_limits<int32_t>::max(), "key: got ", length, " keys, expected fewer than 2^31 - 1");
  check(!causal || rows <= length, "causal: got ", rows, " rows and ", length, " keys");
  check_shape("head_weights", *head_weights, {batch, heads});
  check_dtype("head_weights", *head_weights, ScalarType::Float);
  const Tensor weights = torch::stable::contiguous(*head_weights);
  std::optional<Tensor> masks[2], norms;
  if (query_mask) {
    check_shape("query_mask", *query_mask, {batch, rows});
    check_dtype("query_mask", *query_mask, ScalarType::Bool);
    masks[0] = torch::stable::contiguous(*query_mask);
  }
  if (key_mask) {
    check_shape("key_mask", *key_mask, {batch, length});
    check_dtype("key_mask", *key_mask, ScalarType::Bool);
    masks[1] = torch::stable::contiguous(*key_mask);
  }
  if (lse) {
    check_shape("lse", *lse, {batch, heads, rows});
    check_dtype("lse", *lse, ScalarType::Double);
    norms = torch::stable::contiguous(*lse);
  }
  Tensor scores = torch::stable::new_zeros(weights, {batch, length});
  const bool* counted = masks[0] ? masks[0]->const_data_ptr<bool>() : nullptr;
  const bool* real = masks[1] ? masks[1]->const_data_ptr<bool>() : nullptr;
  const int64_t item = type == ScalarType::Float ? 4 : 2;
  for (int64_t b = 0; b < batch; ++b) {
    Sample s{static_cast<const char*>(query.const_data_ptr()) + b * query.stride(0) * item,
             static_cast<const char*>(key.const_data_ptr()) + b * key.stride(0) * item,
             {query.stride(1), query.stride(2), query.stride(3)},
             {key.stride(1), key.stride(2), key.stride(3)},
             heads,
             kv_heads,
             dim,
             {},
             {},
             {}};
    for (int64_t k = 0; k < length; ++k) {
      if (!real || real[b * length + k]) s.keys.push_back(static_cast<int32_t>(k));
    }
    if (s.keys.empty()) continue;
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t place = causal ? length - rows + r : length - 1;
      if ((counted && !counted[b * rows + r]) || place < s.keys[0]) continue;
      s.rows.push_back(static_cast<int32_t>(r));
      s.row_place.push_back(static_cast<int32_t>(place));
    }
    if (s.rows.empty()) continue;
    s.group_rows = (heads / kv_heads * static_cast<int64_t>(s.rows.size()) + kRows - 1) / kRows * kRows;
    score_sample(s, type, weights.const_data_ptr<float>() + b * heads, scale,
                 norms ? norms->const_data_ptr<double>() + b * heads * rows : nullptr, rows,
                 scores.mutable_data_ptr<float>() + b * length);
  }
  return scores;
}

}  // namespace lyra::token_select
