// What scores.cuh is asked for, and how its work is cut: samples, blocks of keys, and the memory that lies between the
// launches. Meaning and shapes: scores.cuh.
#pragma once

#include <cstdint>

#include "lyra/launch.h"

namespace lyra::token_select {

constexpr double kLog2e = 1.4426950408889634;
constexpr int kFewSplits = 8;         // merged one after the other
constexpr int kSplitKeys = 512;       // keys of a block of the first pass,
constexpr int kSmallSplitKeys = 256;  // so that few are on more SMs, where there are few splits of them
constexpr int kShortKeys = kFewSplits * kSplitKeys;
constexpr int kShortRows = 2048;

struct Operand {
  const void* data;
  int64_t batch, head, row, channel;  // strides in elements
  bool vectors;                       // rows can be read 16 bytes at a time
};

struct Problem {
  int64_t batch, heads, kv_heads, rows, keys, dim;  // B, Hq, Hkv, Lq or Tq, L or Tk, D
  Operand query, key;
  const int32_t *cu_q, *cu_k;  // (B + 1), or both null: padded
  // Each of these may be null.
  const bool *query_mask, *key_mask;
  const int32_t* key_limits;
  const float *key_bias, *head_weights;
  const double* lse;
  const float* lse_single;  // instead
  float scale;
  bool causal, per_head;
  float* planes;

  __host__ __device__ bool surveyed() const {
    return query_mask || key_mask || key_limits || key_bias || cu_q || (causal && rows > keys);
  }
  __host__ __device__ int64_t n_planes() const { return per_head ? heads : kv_heads; }
  __host__ __device__ bool has_lse() const { return lse || lse_single; }
  __host__ __device__ bool is_empty() const { return batch == 0 || rows == 0 || keys == 0; }
  // All samples are short, and two launches do.
  __host__ __device__ bool is_short() const { return !cu_q && !is_empty() && keys <= kShortKeys && rows <= kShortRows; }
  // Blocks of `size` keys, of a sample and of all of them; some have none.
  __host__ __device__ int64_t key_blocks_each(int64_t size) const { return (keys + size - 1) / size; }
  __host__ __device__ int64_t key_blocks(int64_t size) const {
    return cu_k ? keys / size + batch : batch * key_blocks_each(size);
  }
  // Splits of a sample with so many real keys; for how many there must be room, in a padded sample and in all.
  static __host__ __device__ int64_t splits_of(int64_t real) {
    const int64_t size = split_size(real);
    return (real + size - 1) / size;
  }
  static __host__ __device__ int64_t split_size(int64_t real) {
    return real <= kFewSplits * kSmallSplitKeys ? kSmallSplitKeys : kSplitKeys;
  }
  __host__ __device__ int64_t splits_each() const {
    const bool small = split_size(keys) == kSmallSplitKeys;  // then those of fewer keys are no more
    return small || splits_of(keys) > kFewSplits ? splits_of(keys) : kFewSplits;
  }
  __host__ __device__ int64_t splits() const {
    if (!cu_k) return batch * splits_each();
    const int64_t if_small = keys / kSmallSplitKeys + batch, if_mixed = keys / kSplitKeys + 6 * batch;
    return if_small < if_mixed ? if_small : if_mixed;
  }
};

struct Part {
  float largest, sum;  // of a row, over some keys; in units of log 2, and relative to the largest
};

struct Norm {
  float base, factor;  // a share is 2^(logit - base) factor
};

// What lies between the launches.
struct Workspace {
  int32_t *row_list, *key_list, *counts;  // (rows), (keys), (B, 2): numbers of both
  Norm* norms;                            // (Hq rows): sample, key head, packed row
  Part* parts;                            // (splits, Hq rows of a sample)

  static int64_t aligned(int64_t bytes) { return (bytes + 15) / 16 * 16; }
  static __host__ __device__ int64_t all_rows(const Problem& p) { return p.cu_q ? p.rows : p.batch * p.rows; }
  static __host__ __device__ int64_t all_keys(const Problem& p) { return p.cu_k ? p.keys : p.batch * p.keys; }
  // Returns the bytes that it takes from `at` on.
  int64_t place(const Problem& p, char* at) {
    int64_t bytes = 0;
    const auto take = [&](int64_t size) {
      char* mine = at + bytes;
      bytes += aligned(size);
      return mine;
    };
    norms = reinterpret_cast<Norm*>(take(all_rows(p) * p.heads * static_cast<int64_t>(sizeof(Norm))));
    parts = reinterpret_cast<Part*>(
        take(p.has_lse() ? 0 : p.splits() * p.heads * p.rows * static_cast<int64_t>(sizeof(Part))));
    row_list = key_list = counts = nullptr;
    if (p.surveyed()) {
      row_list = reinterpret_cast<int32_t*>(take(all_rows(p) * 4));
      key_list = reinterpret_cast<int32_t*>(take(all_keys(p) * 4));
      counts = reinterpret_cast<int32_t*>(take(p.batch * 8));
    }
    return bytes;
  }
};

// One sample: where its rows and keys begin among those of all, how many it has, and how many of them matter.
struct Sample {
  int64_t b, first_row, first_key;
  int32_t own_rows, own_keys;
  int32_t rows, keys;

  // Inside, whatever cu_seqlens holds.
  static __device__ int64_t clamp(int64_t at, int64_t size) { return at < 0 ? 0 : at > size ? size : at; }

  __device__ Sample(const Problem& p, const int32_t* counts, int64_t b)
      : b(b),
        first_row(b * p.rows),
        first_key(b * p.keys),
        own_rows(static_cast<int32_t>(p.rows)),
        own_keys(static_cast<int32_t>(p.keys)) {
    if (p.cu_q) {
      first_row = clamp(p.cu_q[b], p.rows);
      first_key = clamp(p.cu_k[b], p.keys);
      own_rows = static_cast<int32_t>(clamp(p.cu_q[b + 1] - first_row, p.rows - first_row));
      own_keys = static_cast<int32_t>(clamp(p.cu_k[b + 1] - first_key, p.keys - first_key));
    }
    rows = counts ? counts[2 * b] : own_rows;
    keys = counts ? counts[2 * b + 1] : own_keys;
  }

  // Row r, of its own, sees the keys before this one.
  __device__ int32_t limit(const Problem& p, int32_t r) const {
    int32_t end = own_keys;
    if (p.causal && own_keys - own_rows + r + 1 < end) end = own_keys - own_rows + r + 1;
    if (p.key_limits && p.key_limits[first_row + r] < end) end = p.key_limits[first_row + r];
    return end;
  }

  // Where this sample's part of a list of all rows of all heads begins.
  __device__ int64_t head_rows(const Problem& p) const { return first_row * p.heads; }
};

// The block's sample, and which of its blocks it is, where a padded sample has `each` of them and one with n real keys
// needs blocks_of(n); false if there is none for it.
struct KeyBlock {
  int64_t b = 0, at = 0;

  template <class BlocksOf>
  __device__ bool find(const Problem& p, const int32_t* counts, int64_t block, int64_t each,
                       const BlocksOf& blocks_of) {
    if (!p.cu_k) {
      b = block / each;
      at = block % each;
      return true;
    }
    for (b = 0, at = block; b < p.batch; ++b) {
      const int64_t mine = blocks_of(Sample(p, counts, b).keys);
      if (at < mine) return true;
      at -= mine;
    }
    return false;
  }
};

}  // namespace lyra::token_select
