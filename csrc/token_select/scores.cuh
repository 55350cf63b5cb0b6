// How much attention each key gets from the counted query rows, without any Lq x L matrix. Raw pointers, no torch.
//
// Math. With s_rk = scale q_r . k + bias_k over the keys k that row r sees, and G = Hq / Hkv query heads per key head:
//   score_k = sum_h w_h mean_r exp(s_rk - lse_r),   lse_r = log sum_k exp(s_rk),   w_h = 1 / Hq or given
// Two passes: the first finds lse, the second adds up the shares of each key; with lse given there is only the second.
// All in units of log 2, so that powers are powers of two.
//
// Shapes. query (B,Hq,Lq,D), key (B,Hkv,L,D), any strides; packed, query (1,Hq,Tq,D), key (1,Hkv,Tk,D) and cu_seqlens.
// query_mask, key_limits (B,Lq); key_mask, key_bias (B,L); head_weights (B,Hq); lse (B,Hq,Lq) double. planes (B,P,L),
// which must hold zeros: the scores per key head, P = Hkv, or per query head; `sum_planes` adds up the former. A row
// counts if its mask says so and it sees a real key; a key is real if its mask says so and its bias is not -inf. A row
// sees the real keys before its limit, and, causal, up to its own place.
//
// Plan. `survey_kernel` (not where nothing is masked) lists the rows that count and the keys that are real. All later
// work is cut in that order, into blocks of constant sizes, and sums run in fixed orders without atomics: a sample gets
// the same bits alone and in any batch, wherever its padding stands. The G query heads of a key head are packed into
// one list of rows. Both passes hold 128 rows of one operand in registers (64 where a row is longer than 256 bytes) and
// stream the other through shared memory in tiles of 64, 4 warps, m16n8k16 products with float32 sums:
//   norms_kernel   holds query rows, streams kSplitKeys keys; per row the largest logit and the sum of powers so far
//   merge_kernel   those of all splits to lse, and weight / (rows sum)
//   shares_kernel  holds keys, streams all rows; each lane adds up its keys' shares over the rows
// 16-bit inputs go to the tensor cores; float32 keeps its precision in fused multiply-adds, on values that the lanes
// hand each other (about five times slower than those could go).
//
// FLOPs: 4 Lq Hq L D, half of it with lse; bytes: K read twice, 2 L Hkv D 2, parts and planes about 60 Hkv L / 4.
// Floor, H100 (3.0 TB/s, 800 TFLOP/s), 28/4 heads, D = 128, Lq = 64, L = 131072: 2 x 75 us by products, 2 x 63 us by
// exp2 (16 per clock and SM), 2 x 45 us by K. This path cannot reach it: mma.sync gives about 60 % of that rate and
// loads do not overlap products within a block;
// the loop over 16 streamed rows takes 169 instructions (sm_90a) for 32 products and 512 scores. Estimated, not yet
// timed: 350 us, 175 us with lse; L = 576 15 us. Launches: 4, 3 with lse, one more to survey, one to add up the planes.
//
// Registers per thread, at most, spills none (tests/test_compile_budget.py reads these lines):
//   budget sm_80: norms_kernel<lyra::Bf16, 32> 128, shares_kernel<lyra::Bf16, 32> 128
//   budget sm_80: norms_kernel<lyra::Bf16, 64> 168, shares_kernel<lyra::Bf16, 64> 168
//   budget sm_80: norms_kernel<lyra::Bf16, 128> 128, shares_kernel<lyra::Bf16, 128> 128
//   budget sm_80: norms_kernel<lyra::Half, 64> 168, shares_kernel<lyra::Half, 64> 168
//   budget sm_80: norms_kernel<float, 64> 248, shares_kernel<float, 64> 248
//   budget sm_80: norms_kernel<float, 128> 168, shares_kernel<float, 128> 168
//   budget sm_80: survey_kernel 64, merge_kernel 64, sum_kernel 32
//   budget sm_90a: norms_kernel<lyra::Bf16, 32> 128, shares_kernel<lyra::Bf16, 32> 128
//   budget sm_90a: norms_kernel<lyra::Bf16, 64> 168, shares_kernel<lyra::Bf16, 64> 168
//   budget sm_90a: norms_kernel<lyra::Bf16, 128> 128, shares_kernel<lyra::Bf16, 128> 128
//   budget sm_90a: norms_kernel<lyra::Half, 64> 168, shares_kernel<lyra::Half, 64> 168
//   budget sm_90a: norms_kernel<float, 64> 248, shares_kernel<float, 64> 248
//   budget sm_90a: norms_kernel<float, 128> 168, shares_kernel<float, 128> 168
//   budget sm_90a: survey_kernel 64, merge_kernel 64, sum_kernel 32
#pragma once

#include <cstdint>

#include "lyra/launch.h"
#include "lyra/mma.h"
#include "warp.h"

namespace lyra::token_select {

constexpr int kWarps = 4;
constexpr int kThreads = kWarps * kLanes;
constexpr int kTile = 64;         // streamed rows at a time
constexpr int kSplitKeys = 512;   // keys of a block of the first pass
constexpr int kMaxRowBlocks = 8;  // blocks that share the rows of one key head
constexpr int kSurveyThreads = 512;
constexpr int kSurveyTokens = 16;  // side by side, per thread
constexpr int kMaxWords = 128;     // of 32 bits, in a row of an operand
constexpr double kLog2e = 1.4426950408889634;

// 2^x. On a GPU one instruction, 2 ulp, and 0 below the normal numbers.
__device__ __forceinline__ float power_of_two(float x) {
#ifdef LYRA_HOST_CUDA
  return exp2f(x);
#else
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
  return power;
#endif
}

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
  float scale;
  bool causal, per_head;
  float* planes;

  __host__ __device__ bool surveyed() const {
    return query_mask || key_mask || key_limits || key_bias || cu_q || (causal && rows > keys);
  }
  __host__ __device__ int64_t n_planes() const { return per_head ? heads : kv_heads; }
  // Blocks of `size` keys, of all samples; some have none.
  __host__ __device__ int64_t key_blocks(int64_t size) const {
    return cu_k ? keys / size + batch : batch * ((keys + size - 1) / size);
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
  static int64_t all_rows(const Problem& p) { return p.cu_q ? p.rows : p.batch * p.rows; }
  static int64_t all_keys(const Problem& p) { return p.cu_k ? p.keys : p.batch * p.keys; }
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
        take(p.lse ? 0 : p.key_blocks(kSplitKeys) * p.heads * p.rows * static_cast<int64_t>(sizeof(Part))));
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

// The block's sample, and which of its blocks of `size` keys it is; false if there is none for it.
struct KeyBlock {
  int64_t b = 0, at = 0;

  __device__ bool find(const Problem& p, const int32_t* counts, int64_t block, int64_t size) {
    if (!p.cu_k) {
      const int64_t per_sample = (p.keys + size - 1) / size;
      b = block / per_sample;
      at = block % per_sample;
      return true;
    }
    for (b = 0, at = block; b < p.batch; ++b) {
      const int64_t mine = (Sample(p, counts, b).keys + size - 1) / size;
      if (at < mine) return true;
      at -= mine;
    }
    return false;
  }
};

// --- which rows count, which keys are real -----------------------------------------------------------------------

// By a block: writes the i < size for which is(i) to `list`, in order, and returns how many there are. `totals`: a
// number per warp in shared memory.
template <class Is>
__device__ int32_t list_where(int32_t size, const Is& is, int32_t* list, int32_t* totals) {
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes, warps = blockDim.x / kLanes;
  int32_t done = 0;
  for (int64_t base = 0; base < size; base += blockDim.x * kSurveyTokens) {
    const int32_t first = static_cast<int32_t>(base) + threadIdx.x * kSurveyTokens;
    unsigned bits = 0;
#pragma unroll
    for (int k = 0; k < kSurveyTokens; ++k) bits |= (first + k < size && is(first + k) ? 1u : 0u) << k;
    const int32_t mine = __popc(bits), so_far = running_sum(mine);
    if (lane == kLanes - 1) exchange_store(totals + warp, so_far);
    __syncthreads();
    const int32_t of_warps = running_sum(lane < warps ? exchange_load(totals + lane) : 0);
    const int32_t before = warp == 0 ? 0 : __shfl_sync(kAllLanes, of_warps, warp - 1);
    int32_t place = done + before + so_far - mine;
    for (int k = 0; k < kSurveyTokens; ++k) {
      if (bits >> k & 1) list[place++] = first + k;
    }
    done += __shfl_sync(kAllLanes, of_warps, kLanes - 1);
    __syncthreads();
  }
  return done;
}

__global__ void __launch_bounds__(kSurveyThreads) survey_kernel(Problem p, Workspace w) {
  const Sample s(p, nullptr, blockIdx.x);
  int32_t* totals = reinterpret_cast<int32_t*>(dynamic_shared());
  int32_t* first_real = totals + kLanes;
  const auto real = [&](int32_t k) {
    const int64_t at = s.first_key + k;
    return (!p.key_mask || p.key_mask[at]) && !(p.key_bias && p.key_bias[at] == -INFINITY);
  };
  const int32_t keys = list_where(s.own_keys, real, w.key_list + s.first_key, totals);
  if (threadIdx.x == 0) exchange_store(first_real, keys > 0 ? w.key_list[s.first_key] : s.own_keys);
  __syncthreads();
  const int32_t first = exchange_load(first_real);
  const auto counts = [&](int32_t r) {
    return (!p.query_mask || p.query_mask[s.first_row + r]) && s.limit(p, r) > first;
  };
  const int32_t rows = list_where(s.own_rows, counts, w.row_list + s.first_row, totals);
  if (threadIdx.x == 0) {
    w.counts[2 * s.b] = rows;
    w.counts[2 * s.b + 1] = keys;
  }
}

// --- tiles of an operand -----------------------------------------------------------------------------------------

template <class T>
constexpr int kPerWord = 4 / static_cast<int>(sizeof(T));

__device__ __forceinline__ uint32_t word_of(float x) { return static_cast<uint32_t>(__float_as_int(x)); }
__device__ __forceinline__ uint32_t word_of(Bf16 x) { return x.bits; }
__device__ __forceinline__ uint32_t word_of(Half x) { return x.bits; }

// Words from..from+3 of a row, zeros behind its end. `row` null: all zeros.
template <class T>
__device__ __forceinline__ Words4 read_words(const Operand& operand, const T* row, int64_t dim, int from) {
  Words4 words{};
  if (!row) return words;
  constexpr int kPer = kPerWord<T>;
  if (operand.vectors) {
    if (from * kPer < dim) words = *reinterpret_cast<const Words4*>(row + from * kPer);
    return words;
  }
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

// By a block: kTile rows into shared memory; row(i) is the address of the i-th, or null.
template <class T, int kWords, class Row>
__device__ __forceinline__ void load_tile(const Operand& operand, int64_t dim, const Row& row, uint32_t* tile) {
  constexpr int kChunks = kWords / 4, kRowsAtOnce = kThreads / kChunks;
  const int chunk = threadIdx.x % kChunks;
#pragma unroll
  for (int pass = 0; pass < kTile / kRowsAtOnce; ++pass) {
    const int i = pass * kRowsAtOnce + threadIdx.x / kChunks;
    shared_store16(tile + i * kPitch<kWords> + chunk * 4, read_words<T>(operand, row(i), dim, chunk * 4));
  }
}

// The keys of a sample, by their number among the real ones.
template <class T>
struct Keys {
  const Problem& p;
  const Sample& s;
  const int32_t* list;
  const T* head;

  __device__ Keys(const Problem& p, const Sample& s, const Workspace& w, int64_t kv_head)
      : p(p),
        s(s),
        list(w.key_list ? w.key_list + s.first_key : nullptr),
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

  __device__ QueryRows(const Problem& p, const Sample& s, const Workspace& w, int64_t kv_head)
      : p(p),
        s(s),
        list(w.row_list ? w.row_list + s.first_row : nullptr),
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

  // By a block, through the tile's memory.
  template <class T, class Row>
  __device__ void load(const Operand& operand, int64_t dim, const Row& row, uint32_t* tile) {
    const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
    constexpr int kWarpsAtOnce = kTile / kRows;
    for (int first = 0; first < kWarps; first += kWarpsAtOnce) {
      load_tile<T, kWords>(operand, dim, [&](int i) { return row(first * kRows + i); }, tile);
      __syncthreads();
      if (warp / kWarpsAtOnce == first / kWarpsAtOnce) {
        const uint32_t* mine = tile + (warp - first) * kRows * kPitch<kWords>;
#pragma unroll
        for (int m = 0; m < kBlocks; ++m) {
#pragma unroll
          for (int k = 0; k < kWords / 8; ++k) {
            ldmatrix_x4(words[m][k], mine + (m * 16 + lane % 16) * kPitch<kWords> + k * 8 + lane / 16 * 4);
          }
        }
      }
      __syncthreads();
    }
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

// --- first pass ----------------------------------------------------------------------------------------------------

__device__ __forceinline__ Part join(const Part& a, const Part& b) {
  const float largest = a.largest > b.largest ? a.largest : b.largest;
  const float base = largest == -INFINITY ? 0.0f : largest;
  return {largest, a.sum * power_of_two(a.largest - base) + b.sum * power_of_two(b.largest - base)};
}

__device__ __forceinline__ Part from_other_lane(const Part& mine, int bits) {
  return {__shfl_xor_sync(kAllLanes, mine.largest, bits), __shfl_xor_sync(kAllLanes, mine.sum, bits)};
}

template <int kWords>
constexpr int kTileBytes = kTile * kPitch<kWords> * 4;

template <class T, int kWords>
__global__ void __launch_bounds__(kThreads) norms_kernel(Problem p, Workspace w, int64_t row_blocks) {
  uint32_t* tile = reinterpret_cast<uint32_t*>(dynamic_shared());
  int32_t* places = reinterpret_cast<int32_t*>(tile + kTile * kPitch<kWords>);  // of the tile's keys
  float* biases = reinterpret_cast<float*>(places + kTile);
  const int64_t kv_head = blockIdx.x / row_blocks % p.kv_heads;
  KeyBlock block;
  if (!block.find(p, w.counts, blockIdx.x / row_blocks / p.kv_heads, kSplitKeys)) return;
  const Sample s(p, w.counts, block.b);
  const Keys<T> keys(p, s, w, kv_head);
  const QueryRows<T> rows(p, s, w, kv_head);
  const int32_t begin = static_cast<int32_t>(block.at * kSplitKeys);
  const int32_t end = begin + kSplitKeys < s.keys ? begin + kSplitKeys : s.keys;
  if (begin >= end) return;
  const int64_t split = blockIdx.x / row_blocks / p.kv_heads;
  Part* parts = w.parts + split * p.heads * p.rows + kv_head * rows.all;
  const float scale = p.scale * static_cast<float>(kLog2e);
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;

  for (int64_t first = blockIdx.x % row_blocks * Held<kWords>::kAll; first < rows.all;
       first += row_blocks * Held<kWords>::kAll) {
    Held<kWords> held;
    const int32_t base_row = static_cast<int32_t>(first);
    held.template load<T>(p.query, p.dim, [&](int i) { return rows.row(base_row + i); }, tile);
    // This lane's rows: 16 m + 8 h + lane / 4 of the warp's.
    int32_t limits[Held<kWords>::kBlocks][2];
    Part mine[Held<kWords>::kBlocks][2];
    const auto number = [&](int m, int h) { return base_row + warp * Held<kWords>::kRows + m * 16 + h * 8 + lane / 4; };
    for (int m = 0; m < Held<kWords>::kBlocks; ++m) {
      for (int h = 0; h < 2; ++h) {
        limits[m][h] = number(m, h) < rows.all ? rows.limit(number(m, h)) : 0;
        mine[m][h] = {-INFINITY, 0};
      }
    }

    for (int32_t at = begin; at < end; at += kTile) {
      load_tile<T, kWords>(p.key, p.dim, [&](int i) { return at + i < end ? keys.row(at + i) : nullptr; }, tile);
      if (threadIdx.x < kTile) {
        const bool exists = at + static_cast<int>(threadIdx.x) < end;
        const int32_t place = exists ? keys.place(at + threadIdx.x) : INT32_MAX;
        exchange_store(places + threadIdx.x, place);
        exchange_store(biases + threadIdx.x, exists ? keys.bias(place) : 0.0f);
      }
      __syncthreads();
#pragma unroll 1
      for (int column = 0; column < kTile; column += 16) {
        float sums[Held<kWords>::kBlocks][2][4] = {};
        held.template against<T>(tile, column, sums);
        int32_t place[4];
        float bias[4];
        for (int e = 0; e < 4; ++e) {
          const int c = column + e / 2 * 8 + lane % 4 * 2 + e % 2;
          place[e] = exchange_load(places + c);
          bias[e] = exchange_load(biases + c);
        }
#pragma unroll
        for (int m = 0; m < Held<kWords>::kBlocks; ++m) {
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            Part& part = mine[m][h];
            float logits[4], largest = part.largest;
#pragma unroll
            for (int e = 0; e < 4; ++e) {
              const float logit = fmaf(sums[m][e / 2][2 * h + e % 2], scale, bias[e]);
              logits[e] = place[e] < limits[m][h] ? logit : -INFINITY;
              largest = logits[e] > largest ? logits[e] : largest;
            }
            const float base = largest == -INFINITY ? 0.0f : largest;
            float sum = part.sum * power_of_two(part.largest - base);
#pragma unroll
            for (int e = 0; e < 4; ++e) sum += power_of_two(logits[e] - base);
            part = {largest, sum};
          }
        }
      }
      __syncthreads();
    }

    for (int m = 0; m < Held<kWords>::kBlocks; ++m) {
      for (int h = 0; h < 2; ++h) {
        Part part = mine[m][h];
        part = join(part, from_other_lane(part, 1));
        part = join(part, from_other_lane(part, 2));
        if (lane % 4 == 0 && number(m, h) < rows.all) parts[number(m, h)] = part;
      }
    }
  }
}

// A warp per counted row of a query head: blocks of kThreads / kLanes rows.
__global__ void __launch_bounds__(kThreads) merge_kernel(Problem p, Workspace w) {
  const int lane = threadIdx.x % kLanes;
  const int64_t number = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kLanes;
  int64_t b = 0, i = number;  // the sample, and the row among those of its heads
  if (p.cu_q) {
    for (; b < p.batch; ++b) {
      const int64_t mine = Sample(p, w.counts, b).rows * p.heads;
      if (i < mine) break;
      i -= mine;
    }
    if (b == p.batch) return;
  } else {
    b = number / (p.rows * p.heads);
    i = number % (p.rows * p.heads);
    if (b >= p.batch) return;
  }
  const Sample s(p, w.counts, b);
  if (i >= s.rows * p.heads || s.keys == 0) return;

  const int64_t head = i / s.rows, r = i % s.rows;
  const double share = (p.per_head       ? 1.0
                        : p.head_weights ? p.head_weights[b * p.heads + head]
                                         : 1.0 / p.heads) /
                       s.rows;
  Norm norm;
  if (p.lse) {
    const int64_t place = w.row_list ? w.row_list[s.first_row + r] : r;
    const double lse =
        kLog2e * (p.cu_q ? p.lse[head * p.rows + s.first_row + place] : p.lse[(b * p.heads + head) * p.rows + place]);
    norm.base = static_cast<float>(lse);
    norm.factor = static_cast<float>(share * exp2(norm.base - lse));
  } else {
    int64_t split = 0;  // the sample's first
    if (p.cu_k) {
      for (int64_t other = 0; other < b; ++other)
        split += (Sample(p, w.counts, other).keys + kSplitKeys - 1) / kSplitKeys;
    } else {
      split = b * ((p.keys + kSplitKeys - 1) / kSplitKeys);
    }
    const int64_t splits = (s.keys + kSplitKeys - 1) / kSplitKeys;
    const Part* parts = w.parts + split * p.heads * p.rows + i;
    Part part{-INFINITY, 0};
    for (int64_t k = lane; k < splits; k += kLanes) part = join(part, parts[k * p.heads * p.rows]);
    for (int bits = 1; bits < kLanes; bits *= 2) part = join(part, from_other_lane(part, bits));
    norm.base = part.largest;
    norm.factor = static_cast<float>(share / part.sum);
  }
  if (lane == 0) w.norms[s.head_rows(p) + i] = norm;
}

// --- second pass ---------------------------------------------------------------------------------------------------

template <class T, int kWords>
__global__ void __launch_bounds__(kThreads) shares_kernel(Problem p, Workspace w) {
  uint32_t* tile = reinterpret_cast<uint32_t*>(dynamic_shared());
  int32_t* limits = reinterpret_cast<int32_t*>(tile + kTile * kPitch<kWords>);  // of the tile's rows
  float* bases = reinterpret_cast<float*>(limits + kTile);
  float* factors = bases + kTile;
  constexpr int kBlocks = Held<kWords>::kBlocks;
  const int64_t kv_head = blockIdx.x % p.kv_heads;
  KeyBlock block;
  if (!block.find(p, w.counts, blockIdx.x / p.kv_heads, Held<kWords>::kAll)) return;
  const Sample s(p, w.counts, block.b);
  const Keys<T> keys(p, s, w, kv_head);
  const QueryRows<T> rows(p, s, w, kv_head);
  const int32_t begin = static_cast<int32_t>(block.at * Held<kWords>::kAll);
  if (begin >= s.keys || rows.all == 0) return;
  const Norm* norms = w.norms + s.head_rows(p) + kv_head * rows.all;
  const float scale = p.scale * static_cast<float>(kLog2e);
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;

  Held<kWords> held;
  held.template load<T>(p.key, p.dim, [&](int i) { return keys.row(begin + i); }, tile);
  // This lane's keys: 16 m + 8 h + lane / 4 of the warp's.
  int32_t place[kBlocks][2];
  float bias[kBlocks][2];
  for (int m = 0; m < kBlocks; ++m) {
    for (int h = 0; h < 2; ++h) {
      const int32_t k = begin + warp * Held<kWords>::kRows + m * 16 + h * 8 + lane / 4;
      place[m][h] = k < s.keys ? keys.place(k) : INT32_MAX;
      bias[m][h] = k < s.keys ? keys.bias(place[m][h]) : 0.0f;
    }
  }

  // A plane takes the rows of one query head, or those of all that share the key head.
  const int32_t per_plane = p.per_head ? s.rows : rows.all;
  for (int32_t first = 0; first < rows.all; first += per_plane) {
    float totals[kBlocks][2] = {};
    for (int32_t at = first; at < first + per_plane; at += kTile) {
      const int32_t end = first + per_plane;
      load_tile<T, kWords>(p.query, p.dim, [&](int i) { return at + i < end ? rows.row(at + i) : nullptr; }, tile);
      if (threadIdx.x < kTile) {
        const int32_t i = at + static_cast<int32_t>(threadIdx.x);
        const Norm norm = i < end ? norms[i] : Norm{0, 0};
        exchange_store(limits + threadIdx.x, i < end ? rows.limit(i) : 0);
        exchange_store(bases + threadIdx.x, norm.base);
        exchange_store(factors + threadIdx.x, norm.factor);
      }
      __syncthreads();
#pragma unroll 1
      for (int column = 0; column < kTile; column += 16) {
        float sums[kBlocks][2][4] = {};
        held.template against<T>(tile, column, sums);
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int c = column + e / 2 * 8 + lane % 4 * 2 + e % 2;
          const int32_t limit = exchange_load(limits + c);
          const float base = exchange_load(bases + c), factor = exchange_load(factors + c);
#pragma unroll
          for (int m = 0; m < kBlocks; ++m) {
#pragma unroll
            for (int h = 0; h < 2; ++h) {
              const float logit = fmaf(sums[m][e / 2][2 * h + e % 2], scale, bias[m][h]);
              const float share = power_of_two(logit - base) * factor;
              totals[m][h] += place[m][h] < limit ? share : 0.0f;
            }
          }
        }
      }
      __syncthreads();
    }

    const int64_t plane = p.per_head ? kv_head * (p.heads / p.kv_heads) + first / per_plane : kv_head;
    float* to = p.cu_k ? p.planes + plane * p.keys + s.first_key : p.planes + (s.b * p.n_planes() + plane) * p.keys;
    for (int m = 0; m < kBlocks; ++m) {
      for (int h = 0; h < 2; ++h) {
        float total = totals[m][h];
        total += __shfl_xor_sync(kAllLanes, total, 1);
        total += __shfl_xor_sync(kAllLanes, total, 2);
        if (lane % 4 == 0 && place[m][h] != INT32_MAX) to[place[m][h]] = total;
      }
    }
  }
}

// scores (B, L): the sum of the planes (B, P, L), in order.
__global__ void __launch_bounds__(kThreads)
    sum_kernel(const float* planes, int64_t n_planes, int64_t length, int64_t size, float* scores) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= size) return;
  const float* at = planes + i / length * n_planes * length + i % length;
  float sum = *at;
  for (int64_t plane = 1; plane < n_planes; ++plane) sum += at[plane * length];
  scores[i] = sum;
}

// --- launchers -----------------------------------------------------------------------------------------------------

template <class T, int kWords>
cudaError_t run_scores(const Problem& p, const Workspace& w, cudaStream_t stream) {
  const int64_t row_blocks = (p.heads / p.kv_heads * p.rows + Held<kWords>::kAll - 1) / Held<kWords>::kAll;
  const int64_t most = row_blocks < kMaxRowBlocks ? row_blocks : kMaxRowBlocks;
  cudaError_t error = cudaSuccess;
  if (p.surveyed()) {
    const int threads = p.keys > 16384 ? kSurveyThreads : kThreads;
    error = launch(survey_kernel, p.batch, threads, (kLanes + 1) * sizeof(int32_t), stream, p, w);
    if (error != cudaSuccess) return error;
  }
  if (!p.lse) {
    error = launch(norms_kernel<T, kWords>, p.key_blocks(kSplitKeys) * p.kv_heads * most, kThreads,
                   kTileBytes<kWords> + 2 * kTile * 4, stream, p, w, most);
    if (error != cudaSuccess) return error;
  }
  error = launch(merge_kernel, (Workspace::all_rows(p) * p.heads + kWarps - 1) / kWarps, kThreads, 0, stream, p, w);
  if (error != cudaSuccess) return error;
  return launch(shares_kernel<T, kWords>, p.key_blocks(Held<kWords>::kAll) * p.kv_heads, kThreads,
                kTileBytes<kWords> + 3 * kTile * 4, stream, p, w);
}

// D as far as kMaxWords reach. Writes p.planes, which must hold zeros; `workspace`: what Workspace::place says, 16-byte
// aligned, may hold anything.
template <class T>
cudaError_t score_planes(const Problem& p, void* workspace, cudaStream_t stream) {
  if (p.batch == 0 || p.rows == 0 || p.keys == 0) return cudaSuccess;
  Workspace w;
  w.place(p, static_cast<char*>(workspace));
  const int64_t words = (p.dim + kPerWord<T> - 1) / kPerWord<T>;
  if constexpr (kPerWord<T> == 2) {
    if (words <= 32) return run_scores<T, 32>(p, w, stream);
  }
  if (words <= 64) return run_scores<T, 64>(p, w, stream);
  if (words <= kMaxWords) return run_scores<T, kMaxWords>(p, w, stream);
  return cudaErrorInvalidValue;
}

inline cudaError_t sum_planes(const float* planes, int64_t n_planes, int64_t length, int64_t size, float* scores,
                              cudaStream_t stream) {
  if (size == 0) return cudaSuccess;
  return launch(sum_kernel, (size + kThreads - 1) / kThreads, kThreads, 0, stream, planes, n_planes, length, size,
                scores);
}

}  // namespace lyra::token_select
