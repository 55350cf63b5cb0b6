// A layer and its adapters for at most 16 tokens, in one launch, for 16-bit floats. Raw pointers, no torch.
//
// Math, with the names of routing.h: y[t,n] = sum_k x[t,k] weight[n,k] + bias[n] + sum_e sum_j c_e[t,j]
// b[first_e+j,n], c_e of h[t,col] = sum_k x[t,k] a[first_e+j,k]; sums in float32, c_e and y rounded once.
//
// Why one launch, and the layer's product in it. With so few tokens a layer takes as long as its weights take to be
// read: K = N = 3584 in bfloat16, 25.7 MB, 8.6 us of an H100 at 3.0 TB/s; an adapter of rank 64 has 0.92 MB, 0.3 us
// (3.6 %), four have 3.7 MB, 1.2 us (14 %). Estimates, since nothing has been timed on a GPU yet: a kernel that waits
// for the one before it costs about 1 us between the two in a graph, and two to three dependent trips to memory at 0.6
// to 1 us. So the library's product followed by shrink, its sum and expand is some 8 us slower than the layer, about 2
// times the layer, and even one kernel behind the product that needs no shrink would cost 2 us, 1.25 times. Only what
// runs beside the product is free. Here that is the way from x to the adapters' part, about 7 us of dependent trips
// (ticket 1, adapter 1, its piece of A 3, count 1, parts and product 1 to 2), while the weights stream for 8.6. What is
// left is the bytes: 1.04 times the layer at M = 1 with one adapter, 1.15 at M = 16 with four, if this product streams
// as fast as the library's. It may be half as fast and the launch still takes less than the library and three kernels.
//
// Plan. A block owns kColumns outputs of all tokens. Eight warps stream its rows of `weight`, each every eighth slab of
// 32 columns, three slabs under way, through places of shared memory that are a lane's own: no barrier until the sums
// of the warps are added up in order. Two more warps see to the adapters: they draw pieces of the shrink (32 ranks by
// one part of K) until none is left, wait for those that other warps have drawn, and expand into the block's outputs, 8
// tokens each, adding up the parts of h in order.
// No deadlock, whatever blocks run: a piece is waited for only after it has been drawn by a warp, which then runs and
// waits for nobody. The counters are zero before and after a launch: the last warp that has drawn and waited sees to
// it. Deterministic; a token's bits do not depend on the other tokens. A batch without adapters draws and waits for
// nothing.
//
// Cost: 2 M N K FLOPs (32 N K done), reads weight once, A and B of the present adapters once, x once per block (M = 16,
// N = 3584: 12.8 MB, from L2). Parts of h: 4 M rank K / 256 bytes. Shared memory 90 KB.
//
//   budget sm_80: decode::decode_kernel<lyra::Bf16> 96, decode::decode_kernel<lyra::Half> 96
//   budget sm_90a: decode::decode_kernel<lyra::Bf16> 96, decode::decode_kernel<lyra::Half> 96
#pragma once

#include "lyra/async_copy.h"
#include "routing.h"

namespace lyra::multi_lora::decode {

constexpr int kTokens = 16, kColumns = 32;  // of a block
constexpr int kRanks = 32;                  // that a warp sees to at once
constexpr int kSlab = 32;                   // columns of K in one step of a warp
constexpr int kStages = 3;                  // steps under way
constexpr int kBaseWarps = 8, kAdapterWarps = 2, kThreads = 32 * (kBaseWarps + kAdapterWarps);
constexpr int kPieces = 6;                         // a lane's in a step: four of the rows, two of x
constexpr int kRing = kStages * kPieces * 32 * 4;  // words of a warp
constexpr int kSums = kColumns + 1;                // words from one token's sums to the next
constexpr int kOwn = kTokens / kAdapterWarps;      // tokens of an adapter warp
constexpr int kBankTile = kRanks * kColumns / 2;   // words
constexpr int64_t kPart = 256;                     // least number of columns in a part of K
constexpr int kMaxParts = 16;
static_assert(kBankTile + kOwn * kSums <= kRing && kTokens * kSums <= kRing && kTokens <= kTile);

// Zero before and after a launch.
struct Counters {
  unsigned drawn, done, left;
};

template <class T>
struct Decode {
  Plan plan;
  Adapters adapters;        // of a and of b; no columns
  Rows<const T> x;          // (T, K)
  Rows<const T> weight;     // (N, K)
  const T* bias;            // or null
  const T *a, *b;           // (rows, K), (rows, N)
  int64_t inputs, outputs;  // K, N
  int slots, width;         // greatest number of present adapters, greatest rank rounded up to kRanks
  int parts, part;          // part: columns of a part of K
  Counters* counters;
  float* partial;  // (parts, slots, kTokens, width): h
  T* y;            // (T, N)

  __device__ __forceinline__ float* part_of(int64_t part, int slot, int token) const {
    return partial + ((part * slots + slot) * kTokens + token) * width;
  }
};

// The next adapter of the batch, -1 behind the last.
__device__ __forceinline__ int next_present(const Plan& plan, int e) {
  int64_t word = (e + 1) / 32;
  if (word >= plan.words()) return -1;
  uint32_t bits = plan.present[word] & ~0u << (e + 1) % 32;
  while (!bits && ++word < plan.words()) bits = plan.present[word];
  return bits ? static_cast<int>(word) * 32 + __ffs(static_cast<int>(bits)) - 1 : -1;
}

// Goes through the ranks of the batch's adapters, kRanks at a time.
struct Cursor {
  int slot = 0, e, rank = 0;
  Adapter adapter;

  __device__ explicit Cursor(const Plan& plan, const Adapters& all)
      : e(next_present(plan, -1)), adapter(all, e < 0 ? 0 : e) {}
  __device__ bool valid() const { return e >= 0; }
  __device__ void advance(const Plan& plan, const Adapters& all) {
    rank += kRanks;
    if (rank < adapter.rank) return;
    e = next_present(plan, e);
    ++slot;
    rank = 0;
    if (e >= 0) adapter = Adapter(all, e);
  }
};

// acc[r][h] += 16 rows (r) by 8 tokens (h) of the product of up to 32 rows and x, columns [k, end) in steps of
// `stride`. The order of k within a slab is that in which lanes hold it, the same on both sides: lane (g, t) has 8
// adjacent columns.
template <class T>
__device__ __forceinline__ void stream(float (&acc)[2][2][4], uint32_t* ring, const T* left, int64_t left_stride,
                                       int64_t rows, const Decode<T>& s, int64_t k, int64_t end, int64_t stride) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  uint32_t* const own = ring + lane * 4;
  const auto fetch = [&](int stage, int64_t at) {
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      const int row = g + 8 * (i < 4 ? i : i - 4);
      const bool exists = row < (i < 4 ? rows : s.plan.tokens) && at + t * kPiece < end;
      const T* const line = i < 4 ? left + row * left_stride : s.x.data + row * s.x.stride;
      copy16_async(own + (stage * kPieces + i) * 128, exists ? line + at + t * kPiece : left, exists);
    }
  };
#pragma unroll
  for (int stage = 0; stage < kStages; ++stage) {
    if (k + stage * stride < end) fetch(stage, k + stage * stride);
    commit_copies();
  }
  for (int stage = 0; k < end; k += stride) {
    wait_for_copies<kStages - 1>();
    Words4 piece[kPieces];
#pragma unroll
    for (int i = 0; i < kPieces; ++i) piece[i] = shared_load16(own + (stage * kPieces + i) * 128);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const Words4 &upper = piece[2 * r], &lower = piece[2 * r + 1];
        const uint32_t rows_of_16[4] = {upper.word[2 * half], lower.word[2 * half], upper.word[2 * half + 1],
                                        lower.word[2 * half + 1]};
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          mma_m16n8k16<T>(acc[r][h], rows_of_16, piece[4 + h].word[2 * half], piece[4 + h].word[2 * half + 1]);
        }
      }
    }
    if (k + kStages * stride < end) fetch(stage, k + kStages * stride);
    commit_copies();
    stage = stage + 1 == kStages ? 0 : stage + 1;
  }
}

// Calls f(row, token, value) for what this lane has of a product of 32 rows by 16 tokens.
template <int kHalves, class F>
__device__ __forceinline__ void for_each_sum(const float (&acc)[2][kHalves][4], F f) {
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
#pragma unroll
    for (int h = 0; h < kHalves; ++h) {
#pragma unroll
      for (int i = 0; i < 4; ++i) f(16 * r + g + i / 2 * 8, 8 * h + 2 * t + i % 2, acc[r][h][i]);
    }
  }
}

// One piece of the shrink.
template <class T>
__device__ void shrink_piece(const Decode<T>& s, const Cursor& at, int part, uint32_t* ring) {
  float acc[2][2][4] = {};
  const int64_t begin = static_cast<int64_t>(part) * s.part, end = smaller(begin + s.part, s.inputs);
  stream(acc, ring, s.a + (at.adapter.row + at.rank) * s.inputs, s.inputs, at.adapter.rank - at.rank, s, begin, end,
         kSlab);
  for_each_sum(acc, [&](int rank, int token, float sum) {
    if (token < s.plan.tokens) s.part_of(part, at.slot, token)[at.rank + rank] = sum;
  });
}

// Draws pieces of the shrink until none is left, and waits for those of others.
template <class T>
__device__ void shrink_together(const Decode<T>& s, uint32_t* ring) {
  unsigned pieces = 0;
  for (Cursor at(s.plan, s.adapters); at.valid(); at.advance(s.plan, s.adapters)) pieces += s.parts;
  for (;;) {
    unsigned piece = 0;
    if (threadIdx.x % 32 == 0) piece = atomicAdd(&s.counters->drawn, 1u);
    piece = __shfl_sync(kAllLanes, piece, 0);
    if (piece >= pieces) break;
    Cursor at(s.plan, s.adapters);
    for (unsigned before = piece / s.parts; before > 0; --before) at.advance(s.plan, s.adapters);
    shrink_piece(s, at, piece % s.parts, ring);
    warp_arrive(&s.counters->done);
  }
  warp_await(&s.counters->done, pieces);
  if (threadIdx.x % 32 == 0 && atomicAdd(&s.counters->left, 1u) + 1 == kAdapterWarps * gridDim.x) {
    *s.counters = Counters{0, 0, 0};
  }
}

// What the adapters add to 8 tokens of a block's outputs, left in `sums`.
template <class T>
__device__ void expand_own(const Decode<T>& s, int64_t first_column, int first_token, uint32_t* bank_tile,
                           uint32_t* sums) {
  constexpr int kPasses = kRanks / 8;
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int64_t token = first_token + g;
  // Where a piece of a row stands in the tile: no two rows that are read together have theirs in the same bank.
  const auto place = [](int row, int piece) { return piece ^ row / 4 % 4; };
  Piece<T> next[kPasses];
  const auto fetch = [&](const Cursor& at) {
#pragma unroll
    for (int i = 0; i < kPasses; ++i) {
      const int rank = at.rank + g + 8 * i;
      const T* const row = s.b + (at.adapter.row + rank) * s.outputs;
      next[i] = rank < at.adapter.rank ? load_piece(row, first_column + t * kPiece, s.outputs) : Piece<T>();
    }
  };

  float acc[2][1][4] = {};
  Cursor at(s.plan, s.adapters);
  fetch(at);
  shrink_together(s, bank_tile);
  while (at.valid()) {
    __syncwarp();  // the last tile is read
#pragma unroll
    for (int i = 0; i < kPasses; ++i) {
      to_shared(bank_tile, kColumns / 2, g + 8 * i, place(g + 8 * i, t), next[i]);
    }
    __syncwarp();  // this one is written
    const Cursor now = at;
    at.advance(s.plan, s.adapters);
    if (at.valid()) fetch(at);

    float factor = 0;
    bool has = false;
    for (int64_t c = 0; token < s.plan.tokens && c < s.plan.per_token; ++c) {
      const int64_t pair = token * s.plan.per_token + c;
      if (s.plan.ids[pair] != now.e) continue;
      has = true;
      factor += s.plan.weight(pair) * s.adapters.scaling[now.e];
    }
    // Lane (g, t) has ranks 4 t to 4 t + 3 of 16 of its token.
    float h[kRanks / 16][4] = {};
#pragma unroll 4
    for (int part = 0; part < (has ? s.parts : 0); ++part) {
      const float* const from = s.part_of(part, now.slot, token) + now.rank + 4 * t;
#pragma unroll
      for (int step = 0; step < kRanks / 16; ++step) {
        const Words4 four = *reinterpret_cast<const Words4*>(from + 16 * step);
#pragma unroll
        for (int i = 0; i < 4; ++i) h[step][i] += __int_as_float(static_cast<int>(four.word[i]));
      }
    }
#pragma unroll
    for (int step = 0; step < kRanks / 16; ++step) {
      const int left = now.adapter.rank - now.rank - 16 * step;
      if (left <= 0) break;
#pragma unroll
      for (int i = 0; i < 4; ++i) h[step][i] = has && 4 * t + i < left ? factor * h[step][i] : 0.0f;
      const uint32_t c[2] = {pack<T>(h[step][0], h[step][1]), pack<T>(h[step][2], h[step][3])};
      const int row = 16 * step + lane % 8 / 2 * 4 + lane / 16 * 2 + lane % 2;
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        uint32_t columns[4];
        ldmatrix_x4_trans(columns, bank_tile + row * (kColumns / 2) + place(row, 2 * r + lane / 8 % 2) * 4);
        mma_m16n8k16<T>(acc[r][0], columns, c[0], c[1]);
      }
    }
  }
  for_each_sum(acc, [&](int column, int mine, float sum) {
    exchange_store(sums + mine * kSums + column, static_cast<uint32_t>(__float_as_int(sum)));
  });
}

template <class T>
__global__ void __launch_bounds__(kThreads, 2) decode_kernel(Decode<T> s) {
  const int64_t first_column = static_cast<int64_t>(blockIdx.x) * kColumns;
  const int warp = threadIdx.x / 32;
  uint32_t* const shared = reinterpret_cast<uint32_t*>(dynamic_shared());
  const auto ring = [&](int w) { return shared + w * kRing; };
  const bool routed = next_present(s.plan, -1) >= 0;
  if (warp < kBaseWarps) {
    float acc[2][2][4] = {};
    stream(acc, ring(warp), s.weight.data + first_column * s.weight.stride, s.weight.stride, s.outputs - first_column,
           s, warp * kSlab, s.inputs, kBaseWarps * kSlab);
    __syncwarp();  // the ring is read
    for_each_sum(acc, [&](int column, int token, float sum) {
      exchange_store(ring(warp) + token * kSums + column, static_cast<uint32_t>(__float_as_int(sum)));
    });
  } else if (routed) {
    expand_own(s, first_column, (warp - kBaseWarps) * kOwn, ring(warp), ring(warp) + kBankTile);
  }
  __syncthreads();  // all sums are written
  for (int i = threadIdx.x; i < kTokens * kColumns; i += kThreads) {
    const int token = i / kColumns;
    const int64_t column = first_column + i % kColumns;
    if (token >= s.plan.tokens || column >= s.outputs) continue;
    const auto sum_at = [&](const uint32_t* sums, int row) {
      return __int_as_float(static_cast<int>(exchange_load(sums + row * kSums + i % kColumns)));
    };
    float sum = 0;
    for (int w = 0; w < kBaseWarps; ++w) sum += sum_at(ring(w), token);
    if (s.bias) sum += to_float(s.bias[column]);
    bool has = false;
    for (int64_t c = 0; c < s.plan.per_token; ++c) has |= s.plan.ids[token * s.plan.per_token + c] >= 0;
    if (has) sum += sum_at(ring(kBaseWarps + token / kOwn) + kBankTile, token % kOwn);
    s.y[token * s.outputs + column] = from_float<T>(sum);
  }
}

// Parts that K is cut in; a function of K alone.
inline int part_size(int64_t inputs) {
  return static_cast<int>(divide_up(divide_up(inputs, kPart), kMaxParts) * kPart);
}

inline int slots(const Plan& plan) { return static_cast<int>(smaller(plan.adapters, plan.tokens * plan.per_token)); }

inline int padded(int64_t rank) { return static_cast<int>(divide_up(rank, kRanks)) * kRanks; }

// Floats of workspace.
inline int64_t workspace(const Plan& plan, int64_t inputs, int64_t rank) {
  return divide_up(inputs, part_size(inputs)) * slots(plan) * kTokens * padded(rank);
}

// For at most kTokens tokens, K a multiple of 8, rows of x, weight and a aligned to 16 bytes; `rank` is the greatest.
template <class T>
cudaError_t run(const Plan& plan, const Adapters& adapters, Rows<const T> x, Rows<const T> weight, const T* bias,
                const T* a, const T* b, int64_t inputs, int64_t outputs, int64_t rank, Counters* counters,
                float* partial, T* y, cudaStream_t stream) {
  if (plan.tokens > kTokens || inputs % kPiece != 0) return cudaErrorInvalidValue;
  if (plan.tokens * outputs == 0) return cudaSuccess;
  const int part = part_size(inputs), parts = static_cast<int>(divide_up(inputs, part));
  const Decode<T> s{plan,        adapters,     x,     weight, bias,     a,       b, inputs, outputs,
                    slots(plan), padded(rank), parts, part,   counters, partial, y};
  constexpr size_t shared_bytes = (kBaseWarps + kAdapterWarps) * kRing * sizeof(uint32_t);
  return launch(decode_kernel<T>, divide_up(outputs, kColumns), kThreads, shared_bytes, stream, s);
}

}  // namespace lyra::multi_lora::decode
