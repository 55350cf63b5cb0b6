// How the kernels of scores.cuh read queries and keys: a block's rows of one operand in registers, the other streamed
// through shared memory, and products of both.
#pragma once

#include <cstdint>

#include "lyra/async_copy.h"
#include "lyra/launch.h"
#include "lyra/mma.h"
#include "score_problem.h"
#include "warp.h"

namespace lyra::token_select {

constexpr int kWarps = 4;
constexpr int kThreads = kWarps * kLanes;
constexpr int kTile = 64;  // streamed rows at a time

// --- tiles of an operand -----------------------------------------------------------------------------------------

template <class T>
constexpr int kPerWord = 4 / static_cast<int>(sizeof(T));

__device__ __forceinline__ uint32_t word_of(float x) { return static_cast<uint32_t>(__float_as_int(x)); }
__device__ __forceinline__ uint32_t word_of(Bf16 x) { return x.bits; }
__device__ __forceinline__ uint32_t word_of(Half x) { return x.bits; }

// Words from..from+3 of a row, zeros behind its end, element by element. `row` null: all zeros.
template <class T>
__device__ __forceinline__ Words4 read_words(const Operand& operand, const T* row, int64_t dim, int from) {
  Words4 words{};
  if (!row) return words;
  constexpr int kPer = kPerWord<T>;
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    for (int half = 0; half < kPer; ++half) {
      const int64_t d = (from + w) * kPer + half;
      if (d < dim) words.word[w] |= word_of(row[d * operand.channel]) << (16 * half);
    }
  }
  return words;
}

// Rows in shared memory are four words longer than they need be, so that ldmatrix meets no bank twice.
template <int kWords>
constexpr int kPitch = kWords + 4;

// By a block: asks for kRows rows in shared memory; row(i) is the address of the i-th, or null. Who needs them waits
// for the copies, and then for a barrier. What cannot be read 16 bytes at a time is there already.
template <class T, int kWords, int kRows, class Row>
__device__ __forceinline__ void fetch_rows(const Operand& operand, int64_t dim, const Row& row, uint32_t* to) {
  constexpr int kChunks = kWords / 4, kRowsAtOnce = kThreads / kChunks;
  const int chunk = threadIdx.x % kChunks;
#pragma unroll 8
  for (int pass = 0; pass < kRows / kRowsAtOnce; ++pass) {
    const int i = pass * kRowsAtOnce + threadIdx.x / kChunks;
    uint32_t* const place = to + i * kPitch<kWords> + chunk * 4;
    const T* const from = row(i);
    if (operand.vectors) {
      const bool exists = from && chunk * 4 * kPerWord<T> < dim;
      copy16_async(place, exists ? static_cast<const void*>(from + chunk * 4 * kPerWord<T>) : operand.data, exists);
    } else {
      shared_store16(place, read_words<T>(operand, from, dim, chunk * 4));
    }
  }
}

// What stands behind the rows of a buffer.
template <int kWords>
__device__ __forceinline__ int32_t* places_in(uint32_t* buffer) {
  return reinterpret_cast<int32_t*>(buffer + kTile * kPitch<kWords>);
}
template <int kWords>
__device__ __forceinline__ float* biases_in(uint32_t* buffer) {
  return reinterpret_cast<float*>(buffer + kTile * (kPitch<kWords> + 1));
}

// Two of these take turns: one is read while the other is filled. Three words for each of its rows, besides.
template <int kWords>
constexpr int kBufferWords = kTile * (kPitch<kWords> + 3);
template <int kWords>
constexpr int kBufferBytes = 2 * kBufferWords<kWords> * 4;

// By a block: use(buffer) for each tile of [begin, end), once fetch(buffer, at) has filled the buffer, which goes
// on during the use of the tile before. Whatever the block wrote to the buffers before must lie behind a barrier.
template <int kWords, class Fetch, class Use>
__device__ __forceinline__ void stream(uint32_t* buffers, int32_t begin, int32_t end, const Fetch& fetch,
                                       const Use& use) {
  uint32_t *now = buffers, *next = buffers + kBufferWords<kWords>;
  fetch(now, begin);
  commit_copies();
  for (int32_t at = begin; at < end; at += kTile) {
    wait_for_copies<0>();
    __syncthreads();
    if (end - at > kTile) fetch(next, at + kTile);
    commit_copies();
    use(now);
    uint32_t* const used = now;
    now = next;
    next = used;
  }
  __syncthreads();
}

// The keys of a sample, by their number among the real ones.
template <class T>
struct Keys {
  const Problem& p;
  const Sample& s;
  const int32_t* list;
  const T* head;

  // `list`: the real keys of the sample, or null if all are.
  __device__ Keys(const Problem& p, const Sample& s, const int32_t* list, int64_t kv_head)
      : p(p),
        s(s),
        list(list),
        head(static_cast<const T*>(p.key.data) + kv_head * p.key.head +
             (p.cu_k ? s.first_key * p.key.row : s.b * p.key.batch)) {}
  __device__ int32_t place(int32_t k) const { return list ? list[k] : k; }
  __device__ const T* row(int32_t k) const { return k < s.keys ? head + place(k) * p.key.row : nullptr; }
  // Added to its logits.
  __device__ float bias(int32_t place) const {
    return p.key_bias ? p.key_bias[s.first_key + place] * static_cast<float>(kLog2e) : 0.0f;
  }
};

// The rows of a key head: number g n + r is the r-th counted row of its g-th query head.
template <class T>
struct QueryRows {
  const Problem& p;
  const Sample& s;
  const int32_t* list;
  const T* group;
  int32_t all;

  // `list`: the rows of the sample that count, or null if all do.
  __device__ QueryRows(const Problem& p, const Sample& s, const int32_t* list, int64_t kv_head)
      : p(p),
        s(s),
        list(list),
        group(static_cast<const T*>(p.query.data) + kv_head * (p.heads / p.kv_heads) * p.query.head +
              (p.cu_q ? s.first_row * p.query.row : s.b * p.query.batch)),
        all(static_cast<int32_t>(p.heads / p.kv_heads) * s.rows) {}
  // Which row of the sample i is; `head` becomes the number of its query head in the group.
  __device__ int32_t place(int32_t i, uint32_t* head) const {
    const uint32_t number = static_cast<uint32_t>(i), n = static_cast<uint32_t>(s.rows);
    *head = number / n;
    const uint32_t r = number - *head * n;
    return list ? list[r] : static_cast<int32_t>(r);
  }
  __device__ int32_t limit(int32_t i) const {
    uint32_t head;
    return s.limit(p, place(i, &head));
  }
  __device__ const T* row(int32_t i) const {
    if (i >= all) return nullptr;
    uint32_t head;
    const int32_t r = place(i, &head);
    return group + head * p.query.head + r * p.query.row;
  }
};

// --- products ------------------------------------------------------------------------------------------------------

// d += a b for 16 rows of A, 8 columns of B and 8 words of both. Lane l, g = l / 4, t = l % 4, holds the words A(g, t),
// A(g + 8, t), A(g, t + 4), A(g + 8, t + 4), B(t, g), B(t + 4, g), and D as in lyra/mma.h.
template <class T>
__device__ __forceinline__ void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (kPerWord<T> == 2) {
    mma_m16n8k16<T>(d, a, b0, b1);
  } else {
    const int g = threadIdx.x % kLanes / 4, t = threadIdx.x % 4;
    const auto from = [](uint32_t word, int lane) {
      return __int_as_float(static_cast<int>(__shfl_sync(kAllLanes, word, lane)));
    };
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const int left = 4 * g + k, column = 8 * t + k;
      const float a0 = from(a[0], left), a1 = from(a[1], left), a2 = from(a[2], left), a3 = from(a[3], left);
      const float b00 = from(b0, column), b01 = from(b0, column + 4);
      const float b10 = from(b1, column), b11 = from(b1, column + 4);
      d[0] = fmaf(a2, b10, fmaf(a0, b00, d[0]));
      d[1] = fmaf(a2, b11, fmaf(a0, b01, d[1]));
      d[2] = fmaf(a3, b10, fmaf(a1, b00, d[2]));
      d[3] = fmaf(a3, b11, fmaf(a1, b01, d[3]));
    }
  }
}

// A warp's rows of one operand, in registers: kBlocks blocks of 16.
template <int kWords>
struct Held {
  static constexpr int kBlocks = kWords <= 64 ? 2 : 1;
  static constexpr int kRows = kBlocks * 16;   // of a warp
  static constexpr int kAll = kRows * kWarps;  // of a block
  uint32_t words[kBlocks][kWords / 8][4];

  // By a block, through the memory of both buffers; a barrier follows.
  template <class T, class Row>
  __device__ void load(const Operand& operand, int64_t dim, const Row& row, uint32_t* buffers) {
    static_assert(kAll * kPitch<kWords> <= 2 * kBufferWords<kWords>);
    const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
    fetch_rows<T, kWords, kAll>(operand, dim, row, buffers);
    commit_copies();
    wait_for_copies<0>();
    __syncthreads();
    const uint32_t* mine = buffers + warp * kRows * kPitch<kWords>;
#pragma unroll
    for (int m = 0; m < kBlocks; ++m) {
#pragma unroll
      for (int k = 0; k < kWords / 8; ++k) {
        ldmatrix_x4(words[m][k], mine + (m * 16 + lane % 16) * kPitch<kWords> + k * 8 + lane / 16 * 4);
      }
    }
    __syncthreads();
  }

  // Against 16 rows of a tile, from `first` on. sums[m][n]: 16 held rows against 8 of the tile.
  template <class T>
  __device__ __forceinline__ void against(const uint32_t* tile, int first, float (&sums)[kBlocks][2][4]) const {
    const int lane = threadIdx.x % kLanes;
    const uint32_t* row = tile + (first + lane % 8 + lane / 16 * 8) * kPitch<kWords> + lane / 8 % 2 * 4;
#pragma unroll
    for (int k = 0; k < kWords / 8; ++k) {
      uint32_t b[4];
      ldmatrix_x4(b, row + k * 8);
#pragma unroll
      for (int m = 0; m < kBlocks; ++m) {
        multiply<T>(sums[m][0], words[m][k], b[0], b[1]);
        multiply<T>(sums[m][1], words[m][k], b[2], b[3]);
      }
    }
  }
};

}  // namespace lyra::token_select
