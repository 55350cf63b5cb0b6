// Token scores: the CPU implementation.
//
//     score_k = sum_h w_h mean_q softmax_k(scale Q_q^h . K_k^(h / G) + bias_k),   G = Hq / Hkv query heads per key head
//
// Panels of 32 query rows meet blocks of 96 keys (score_tiles.h). The first pass takes of each row and block the
// largest logit, the powers relative to it and their sum; then it is known what each block of a row is worth, and the
// second pass adds up the shares of each key. Where the powers of one panel and all keys fit into kKept bytes (up to
// some 16,000 keys), they are kept and each logit is made once. With more keys the second pass makes them again, and
// many panels go together, so that keys are fetched from memory less often. With `lse` there is only the second pass.
//
// Rows that count and keys that are real are brought together first, so padding costs nothing and moves no boundary;
// panels, blocks and rounds depend on the sample alone. So a sample gets the same bits in any batch and with any number
// of threads, on CPUs with the same vector instructions.
//
// Memory beside the result: 4 bytes per key, and at most kKept; or, with more keys than fit, 8 kTogether kRows for
// every kPart kKeys of them (7.5 bytes per key) and 4 D kTogether kRows. A thread has a block of powers, one of sums
// and one of keys.
#include "token_select.h"

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <new>
#include <optional>
#include <type_traits>
#include <vector>

#include "score_tiles.h"

namespace lyra::token_select {
namespace {

constexpr int64_t kKept = 2 << 20;                                 // bytes
constexpr int64_t kTogether = 14;                                  // panels where powers are not kept
constexpr int64_t kPart = 5;                                       // blocks of which one norm is taken there
constexpr int64_t kPowers = kRows * kKeys;                         // of a panel and a block
constexpr int32_t kNowhere = std::numeric_limits<int32_t>::max();  // place of a key that nobody sees
constexpr double kLog2e = 1.4426950408889634;

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

// A tensor of one sample (heads, tokens, channels).
struct Source {
  const char* data;
  ScalarType type;
  int64_t item, strides[3];  // in elements

  const char* at(int64_t head, int64_t token) const { return data + (head * strides[0] + token * strides[1]) * item; }
};

template <typename T, typename E>
void copy(const char* from, int64_t step, int64_t count, E* to) {
  const T* source = reinterpret_cast<const T*>(from);
  if (step == 1)
    for (int64_t i = 0; i < count; ++i) to[i] = static_cast<E>(source[i]);
  else
    for (int64_t i = 0; i < count; ++i) to[i] = static_cast<E>(source[i * step]);
}

// The channels of a token, side by side: as floats, or the bits of bfloat16.
template <typename E>
void channels(const Source& s, int64_t head, int64_t token, int64_t count, E* to) {
  const char* from = s.at(head, token);
  if constexpr (std::is_same_v<E, uint16_t>)
    copy<uint16_t>(from, s.strides[2], count, to);
  else if (s.type == ScalarType::Float)
    copy<float>(from, s.strides[2], count, to);
  else if (s.type == ScalarType::Half)
    copy<Half>(from, s.strides[2], count, to);
  else
    copy<BFloat16>(from, s.strides[2], count, to);
}

struct Sample {
  Source query, key;
  int64_t heads, kv_heads, dim;
  double scale;                       // of a logit, in units of log 2
  std::vector<int32_t> rows, limits;  // the rows that count, and the keys before which place they see
  std::vector<int32_t> keys;          // the keys that are real, increasing; kNowhere fills the last block
  int64_t n_keys;
  const float* key_bias;      // of all places, or null
  const float* head_weights;  // (heads,), or null
  const float* lse_float;     // (heads, lse_stride), or null; either of both
  const double* lse_double;
  int64_t lse_stride;
};

// Blocks of a head's keys, one at a time, copied: what lies far apart in memory meets in few places of a cache.
template <typename E>
class Keys {
 public:
  explicit Keys(const Sample& s) : s_(s), keys_(kKeys * s.dim) {
    block_.keys = keys_.data();
    std::fill(block_.bias, block_.bias + kKeys, 0.0f);
    std::fill(keys_.data(), keys_.data() + kKeys * s.dim, E(0));
  }

  const Block<E>& at(int64_t head, int64_t block) {
    const int32_t* places = s_.keys.data() + block * kKeys;
    if (head == head_ && places == block_.places) return block_;
    head_ = head;
    block_.places = places;
    for (int64_t k = 0; k < std::min<int64_t>(kKeys, s_.n_keys - block * kKeys); ++k) {
      channels<E>(s_.key, head, places[k], s_.dim, keys_.data() + k * s_.dim);
      if (s_.key_bias) block_.bias[k] = static_cast<float>(s_.key_bias[places[k]] * kLog2e);
    }
    return block_;
  }

 private:
  const Sample& s_;
  Buffer<E> keys_;
  int64_t head_ = -1;
  Block<E> block_{};
};

// The panels of a sample, a few at a time, through both passes.
template <typename E>
class Scoring {
 public:
  Scoring(const Sample& s, bool wide, bool per_head, int64_t head_stride, float* scores)
      : s_(s),
        wide_(wide),
        given_(s.lse_float || s.lse_double),
        weighted_(!per_head),
        together_(per_head ? 1 : s.heads / s.kv_heads),
        n_rows_(static_cast<int64_t>(s.rows.size())),
        head_panels_((together_ * n_rows_ + kRows - 1) / kRows),
        total_(s.heads / together_ * head_panels_),
        blocks_((s.n_keys + kKeys - 1) / kKeys),
        fitting_(kKept / panel_bytes()),
        kept_(!given_ && fitting_ > 0),
        part_(kept_ ? 1 : kPart),
        parts_(given_ ? 1 : (blocks_ + part_ - 1) / part_),
        most_(evenly(kept_ ? fitting_ : kTogether)),
        query_(most_ * kRows * s.dim),
        powers_(kept_ ? most_ * blocks_ * kPowers : 0),
        base_(most_ * parts_ * kRows),
        weight_(most_ * parts_ * kRows),
        panels_(most_),
        scores_(scores),
        scores_stride_(per_head ? head_stride : 0) {}

  void run() {
    for (int64_t first = 0; first < total_; first += most_) {
      const int64_t count = std::min(most_, total_ - first);
      for (int64_t p = 0; p < count; ++p) fill(first + p, p);
      if (!given_) find_norms(first, count);
      add_shares(first, count);
    }
  }

 private:
  // Of a panel: its rows, and the norms and powers that are kept.
  int64_t panel_bytes() const {
    return kRows * s_.dim * sizeof(E) + blocks_ * (kPowers + 2 * kRows) * static_cast<int64_t>(sizeof(float));
  }
  // Of at most so many panels at a time, about as many in each round.
  int64_t evenly(int64_t most) const {
    const int64_t rounds = (total_ + most - 1) / most;
    return (total_ + rounds - 1) / rounds;
  }

  int64_t query_head(int64_t panel) const { return panel / head_panels_ * together_; }
  int64_t key_head(int64_t panel) const { return query_head(panel) / (s_.heads / s_.kv_heads); }
  float* scores_of(int64_t panel) const { return scores_ + query_head(panel) * scores_stride_; }

  // Of the rows that share a key head, i is row i % n of the (i / n)-th query head.
  void fill(int64_t panel, int64_t slot) {
    const int64_t first = panel % head_panels_ * kRows, count = std::min<int64_t>(kRows, together_ * n_rows_ - first);
    Panel<E>& to = panels_[slot];
    to = {s_.dim,
          (count + kLanes - 1) / kLanes,
          wide_ && count > kLanes,
          static_cast<float>(s_.scale),
          query_.data() + slot * kRows * s_.dim,
          {},
          {},
          {}};
    std::fill(to.query, to.query + kRows * s_.dim, E(0));
    std::vector<E> token(s_.dim);
    constexpr int64_t kSide = std::is_same_v<E, float> ? 1 : 2;  // channels of a row that lie side by side
    const int64_t step = (to.paired ? 2 : 1) * kSide * kLanes;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t head = query_head(panel) + (first + i) / n_rows_, row = (first + i) % n_rows_;
      const int64_t vector = i / kLanes, lane = i % kLanes;
      E* own = to.query + vector * (to.paired ? kSide : s_.dim) * kLanes + kSide * lane;
      channels<E>(s_.query, head, s_.rows[row], s_.dim, token.data());
      for (int64_t d = 0; d < s_.dim; ++d) own[d / kSide * step + d % kSide] = token[d];
      to.limits[i] = s_.limits[row];
    }
    for (int v = 0; v < 2; ++v) {
      const auto [least, most] = std::minmax_element(to.limits + v * kLanes, to.limits + (v + 1) * kLanes);
      to.least[v] = *least;
      to.most[v] = *most;
    }
    if (given_) take_norms(panel, slot, first, count);
  }

  double share(int64_t head) const {
    const double weight = !weighted_ ? 1.0 : s_.head_weights ? s_.head_weights[head] : 1.0 / s_.heads;
    return weight / static_cast<double>(n_rows_);
  }

  void take_norms(int64_t panel, int64_t slot, int64_t first, int64_t count) {
    for (int64_t i = 0; i < kRows; ++i) {
      float &base = base_[slot * kRows + i], &weight = weight_[slot * kRows + i];
      base = weight = 0;
      if (i >= count) continue;
      const int64_t head = query_head(panel) + (first + i) / n_rows_;
      const int64_t at = head * s_.lse_stride + s_.rows[(first + i) % n_rows_];
      const double norm = (s_.lse_float ? s_.lse_float[at] : s_.lse_double[at]) * kLog2e;
      base = static_cast<float>(norm);
      weight = static_cast<float>(share(head) * std::exp2(base - norm));
    }
  }

  float* powers(int64_t slot, int64_t block) const { return powers_.data() + (slot * blocks_ + block) * kPowers; }

  void find_norms(int64_t first, int64_t count) {
    // Kept powers: each block with each panel. Otherwise parts of several blocks, each with all panels while it is
    // near.
    const int64_t groups = kept_ ? count : 1;
    torch::stable::parallel_for(0, parts_ * groups, 1, [&](int64_t begin, int64_t end) {
      alignas(64) float passing[kPowers], largest[kRows], sum[kRows];
      Keys<E> keys(s_);
      for (int64_t task = begin; task < end; ++task) {
        const int64_t part = task / groups, start = part * part_;
        const int64_t from = kept_ ? task % groups : 0, to = kept_ ? from + 1 : count;
        for (int64_t b = start; b < std::min(blocks_, start + part_); ++b) {
          for (int64_t p = from; p < to; ++p) {
            std::fill(largest, largest + kRows, kNone);
            std::fill(sum, sum + kRows, 0.0f);
            powers_of(panels_[p], keys.at(key_head(first + p), b), kept_ ? powers(p, b) : passing, largest, sum);
            const int64_t at = (p * parts_ + part) * kRows;
            if (b > start) {
              merge(largest, sum, base_.data() + at, weight_.data() + at);
            } else {
              std::copy(largest, largest + kRows, base_.data() + at);
              std::copy(sum, sum + kRows, weight_.data() + at);
            }
          }
        }
      }
    });
    for (int64_t p = 0; p < count; ++p) {
      float shares[kRows] = {};
      const int64_t start = (first + p) % head_panels_ * kRows;
      for (int64_t i = start; i < std::min(start + kRows, together_ * n_rows_); ++i) {
        shares[i - start] = static_cast<float>(share(query_head(first + p) + i / n_rows_));
      }
      norm(parts_, shares, base_.data() + p * parts_ * kRows, weight_.data() + p * parts_ * kRows);
    }
  }

  void add_shares(int64_t first, int64_t count) {
    torch::stable::parallel_for(0, blocks_, 1, [&](int64_t begin, int64_t end) {
      Keys<E> keys(s_);
      Vec totals[kKeys];
      for (int64_t b = begin; b < end; ++b) {
        const int32_t* places = s_.keys.data() + b * kKeys;
        std::fill(totals, totals + kKeys, Vec{});
        for (int64_t p = 0; p < count; ++p) {
          const int64_t at = (p * parts_ + (given_ ? 0 : b / part_)) * kRows;
          if (kept_)
            kept_shares(panels_[p], places, powers(p, b), weight_.data() + at, totals);
          else
            fresh_shares(panels_[p], keys.at(key_head(first + p), b), base_.data() + at, weight_.data() + at, totals);
          if (p + 1 < count && scores_of(first + p + 1) == scores_of(first + p)) continue;
          add_totals(totals, places, std::min<int64_t>(kKeys, s_.n_keys - b * kKeys), scores_of(first + p));
          std::fill(totals, totals + kKeys, Vec{});
        }
      }
    });
  }

  void powers_of(const Panel<E>& panel, const Block<E>& block, float* powers, float* largest, float* sum) const {
    if constexpr (std::is_same_v<E, float>) {
      if (!wide_) return powers_narrow(panel, block, powers, largest, sum);
    }
    powers_wide(panel, block, powers, largest, sum);
  }
  void kept_shares(const Panel<E>& panel, const int32_t* places, const float* powers, const float* weight,
                   Vec* totals) const {
    if constexpr (std::is_same_v<E, float>) {
      if (!wide_) return kept_narrow(panel, places, powers, weight, totals);
    }
    kept_wide(panel, places, powers, weight, totals);
  }
  void fresh_shares(const Panel<E>& panel, const Block<E>& block, const float* base, const float* weight,
                    Vec* totals) const {
    if constexpr (std::is_same_v<E, float>) {
      if (!wide_) return fresh_narrow(panel, block, base, weight, totals);
    }
    fresh_wide(panel, block, base, weight, totals);
  }

  const Sample& s_;
  const bool wide_, given_, weighted_;
  const int64_t together_, n_rows_, head_panels_, total_;  // heads that share panels; panels of those heads, of all
  const int64_t blocks_, fitting_;                         // fitting_: panels whose powers kKept holds
  const bool kept_;
  const int64_t part_, parts_, most_;  // blocks that share a norm; norms of a row; panels at a time
  Buffer<E> query_;
  Buffer<float> powers_, base_, weight_;  // per panel: (blocks_, kPowers), (parts_, kRows), (parts_, kRows)
  std::vector<Panel<E>> panels_;
  float* scores_;
  const int64_t scores_stride_;
};

}  // namespace

Tensor token_scores(const ScoreArguments& a) {
  const int64_t batch = a.batch, heads = a.heads, rows = a.rows, length = a.length;
  const std::vector<int64_t> query_starts = sample_starts("cu_seqlens_q", a.cu_q, batch, rows);
  const std::vector<int64_t> key_starts = sample_starts("cu_seqlens_k", a.cu_k, batch, length);

  std::vector<int64_t> shape{batch, length};
  if (a.per_head) shape.insert(shape.begin() + 1, heads);
  Tensor scores = torch::stable::new_empty(a.query, shape, ScalarType::Float);
  float* result = scores.mutable_data_ptr<float>();
  std::fill(result, result + scores.numel(), 0.0f);
  const int64_t item = static_cast<int64_t>(a.query.element_size());
  const bool wide = cpu_is_wide();
  const bool pairs = a.type == ScalarType::BFloat16 && a.dim % 2 == 0 && cpu_has_pairs();

  const auto score = [&](int64_t b) {
    // A padded sample is a row of the batch; packed ones stand in its only row.
    const int64_t row = a.cu_q ? 0 : b;
    const int64_t query_start = query_starts[b] - row * rows, key_start = key_starts[b] - row * length;
    const int64_t n_rows = query_starts[b + 1] - query_starts[b], n_keys = key_starts[b + 1] - key_starts[b];
    const auto source = [&](const Tensor& t, int64_t start) {
      const char* first = static_cast<const char*>(t.const_data_ptr());
      return Source{first + (row * t.stride(0) + start * t.stride(2)) * item,
                    a.type,
                    item,
                    {t.stride(1), t.stride(2), t.stride(3)}};
    };
    const auto of_keys = [&](auto* from) { return from ? from + key_starts[b] : nullptr; };
    const auto of_rows = [&](auto* from) { return from ? from + query_starts[b] : nullptr; };
    const auto of_heads = [&](auto* from) { return from ? from + row * heads * rows + query_start : nullptr; };
    Sample s{source(a.query, query_start),
             source(a.key, key_start),
             heads,
             a.kv_heads,
             a.dim,
             a.scale * kLog2e,
             {},
             {},
             {},
             0,
             of_keys(pointer<float>(a.key_bias)),
             a.head_weights ? pointer<float>(a.head_weights) + b * heads : nullptr,
             of_heads(pointer<float>(a.lse, ScalarType::Float)),
             of_heads(pointer<double>(a.lse, ScalarType::Double)),
             rows};
    const bool* is_real = of_keys(pointer<bool>(a.key_mask));
    const bool* counts = of_rows(pointer<bool>(a.query_mask));
    const int32_t* limit_of = of_rows(pointer<int32_t>(a.key_limits));
    for (int64_t k = 0; k < n_keys; ++k) {
      if ((!is_real || is_real[k]) && (!s.key_bias || s.key_bias[k] != kNone)) {
        s.keys.push_back(static_cast<int32_t>(k));
      }
    }
    if (s.keys.empty()) return;
    s.n_keys = static_cast<int64_t>(s.keys.size());
    s.keys.resize((s.keys.size() + kKeys - 1) / kKeys * kKeys, kNowhere);
    for (int64_t r = 0; r < n_rows; ++r) {
      int64_t limit = a.causal ? n_keys - n_rows + r + 1 : n_keys;
      if (limit_of) limit = std::min<int64_t>(limit, limit_of[r]);
      if ((counts && !counts[r]) || limit <= s.keys[0]) continue;
      s.rows.push_back(static_cast<int32_t>(r));
      s.limits.push_back(static_cast<int32_t>(limit));
    }
    if (s.rows.empty()) return;
    float* to = result + (a.per_head ? row * heads * length : row * length) + key_start;
    pairs ? Scoring<uint16_t>(s, true, a.per_head, length, to).run()
          : Scoring<float>(s, wide, a.per_head, length, to).run();
  };
  // Samples side by side where there are enough of them; else what is inside a sample.
  torch::stable::parallel_for(0, a.samples, a.samples < torch::stable::get_num_threads() ? a.samples : 1,
                              [&](int64_t begin, int64_t end) {
                                for (int64_t b = begin; b < end; ++b) score(b);
                              });
  return scores;
}

}  // namespace lyra::token_select
