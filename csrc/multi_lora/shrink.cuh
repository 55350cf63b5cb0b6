// shrink: what A makes of each token's x (the math stands in routing.h).
//
// A block has a chunk, 64 ranks and all of D, or one part of D where chunks are too few to fill the GPU
// (`sum_parts_kernel` adds these up). Either way D is cut in the same parts, summed one by one in the same order, so a
// token's bits depend on D alone.
// M tokens of rank r: 2 M r D FLOPs; M D numbers read. Shared memory 34 KB.
//
//   budget sm_80: shrink_kernel<float> 112, shrink_kernel<lyra::Bf16> 120, shrink_kernel<lyra::Half> 120
//   budget sm_80: sum_parts_kernel 32
//   budget sm_90a: shrink_kernel<float> 112, shrink_kernel<lyra::Bf16> 120, shrink_kernel<lyra::Half> 120
//   budget sm_90a: sum_parts_kernel 32
#pragma once

#include <cstdint>
#include "dropout.h"
#include "routing.h"

namespace lyra::multi_lora {

constexpr int kMaxParts = 16;
constexpr int kPart = 128;  // least number of columns in a part of D

template <class T>
struct Shrink {
  Plan plan;
  Adapters adapters;
  Mask mask;
  Rows<const T> x;  // (T, D)
  const T* bank;
  int64_t size;                 // D
  int64_t width;                // G
  int rank_tiles, parts, part;  // part: columns of a part of D
  bool split;                   // each part has a block of its own
  float* out;                   // h, or (parts, T, S, G) if split
};

template <class T>
__global__ void __launch_bounds__(kThreads) shrink_kernel(Shrink<T> s) {
  constexpr int kSlab = 256 / sizeof(T), kPieces = kSlab / kPiece;  // columns of a slab: 256 bytes
  constexpr int kPasses = kTile * kPieces / kThreads, kPitch = pitch<T>(kSlab);
  static_assert(kPart % kSlab == 0 && kTile == kRanks);
  const int rank_tile = blockIdx.x % s.rank_tiles, splits = s.split ? s.parts : 1;
  const int64_t chunk = blockIdx.x / s.rank_tiles / splits, only = blockIdx.x / s.rank_tiles % splits;
  const int e = s.plan.chunks[2 * chunk], first_rank = rank_tile * kRanks;
  if (e < 0) return;
  const Adapter adapter(s.adapters, e);
  const int ranks = smaller(adapter.rank - first_rank, kRanks);
  if (ranks <= 0) return;
  const int* const pairs = s.plan.pairs + s.plan.chunks[2 * chunk + 1];
  const int count = smaller<int64_t>(s.plan.pairs + s.plan.starts[e + 1] - pairs, kTile);

  uint32_t* const x_tile = reinterpret_cast<uint32_t*>(dynamic_shared());
  uint32_t* const bank_tile = x_tile + kTile * kPitch;
  const int row = threadIdx.x / kPieces, piece = threadIdx.x % kPieces;
  int token[kPasses];
#pragma unroll
  for (int i = 0; i < kPasses; ++i) {
    const int place = row + i * (kTile / kPasses);
    token[i] = place < count ? pairs[place] / static_cast<int>(s.plan.per_token) : -1;
  }
  const T* const bank = s.bank + (adapter.row + first_rank) * s.size;

  Piece<T> x_next[kPasses], bank_next[kPasses];
  const auto fetch = [&](int64_t k) {
#pragma unroll
    for (int i = 0; i < kPasses; ++i) {
      const int64_t column = k + piece * kPiece;
      const int rank = row + i * (kTile / kPasses);
      x_next[i] = token[i] >= 0 ? load_piece(s.x.data + token[i] * s.x.stride, column, s.size) : Piece<T>();
      bank_next[i] = rank < ranks ? load_piece(bank + rank * s.size, column, s.size) : Piece<T>();
    }
  };

  const int warp = threadIdx.x / 32, m = warp % kWarpRows * 16, n = warp / kWarpRows * 16;
  const int columns = ranks - n;  // every other 16 ranks are this warp's
  const int mine = columns > 32 ? 2 : columns > 0 ? 1 : 0;
  float part[1][4][4] = {}, total[4][4] = {};
  const int64_t begin = only * s.part, end = s.split ? smaller(begin + s.part, s.size) : s.size;
  fetch(begin);
  for (int64_t k = begin; k < end; k += kSlab) {
    __syncthreads();  // the last slab is read
#pragma unroll
    for (int i = 0; i < kPasses; ++i) {
      // Not when it was fetched: that would have waited for memory.
      if (s.mask.seed && token[i] >= 0) drop_elements(x_next[i], s.mask, token[i], k + piece * kPiece);
      to_shared(x_tile, kPitch, row + i * (kTile / kPasses), piece, x_next[i]);
      to_shared(bank_tile, kPitch, row + i * (kTile / kPasses), piece, bank_next[i]);
    }
    __syncthreads();  // this one is written
    if (k + kSlab < end) fetch(k + kSlab);
    multiply<T, kAlong, kAlong>(part, x_tile, kPitch, m, bank_tile, kPitch, n, 32, mine, kSlab / 16);
    if ((k + kSlab) % s.part == 0 || k + kSlab >= end) {
#pragma unroll
      for (int i = 0; i < 16; ++i) {
        total[i / 4][i % 4] += part[0][i / 4][i % 4];
        part[0][i / 4][i % 4] = 0;
      }
    }
  }

  float* const out = s.out + only * s.plan.tokens * s.plan.per_token * s.width + adapter.column + first_rank;
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
  for (int half = 0; half < 4; ++half) {
    const int rank = n + half / 2 * 32 + half % 2 * 8 + 2 * t;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int place = m + g + i / 2 * 8;
      if (place < count && rank + i % 2 < ranks) out[pairs[place] * s.width + rank + i % 2] = total[half][i];
    }
  }
}

// h = the sum of (parts, T, S, G) over the parts, in order; of the ranks that a pair has alone.
__global__ void __launch_bounds__(kThreads)
    sum_parts_kernel(Plan plan, Adapters adapters, const float* parts, int count, int64_t width, float* h) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t pairs = plan.tokens * plan.per_token, pair = at / width;
  if (pair >= pairs || plan.ids[pair] < 0) return;
  const Adapter adapter(adapters, plan.ids[pair]);
  const int64_t rank = at % width - adapter.column;
  if (rank < 0 || rank >= adapter.rank) return;
  float sum = 0;
  for (int i = 0; i < count; ++i) sum += parts[i * pairs * width + at];
  h[at] = sum;
}

// Parts that D is cut in; a function of D alone.
inline int part_size(int64_t size) { return static_cast<int>(divide_up(divide_up(size, kPart), kMaxParts)) * kPart; }

// Whether the parts of D get blocks of their own: only where there are too few others to fill the GPU.
inline bool splits(const Plan& plan, int64_t size, int64_t width, int multiprocessors) {
  const int64_t blocks = divide_up(plan.tokens * plan.per_token, kTile) * divide_up(width, kRanks);
  return size > part_size(size) && blocks < multiprocessors;
}

// Floats of workspace that shrink needs.
inline int64_t shrink_workspace(const Plan& plan, int64_t size, int64_t width, int multiprocessors) {
  const bool split = splits(plan, size, width, multiprocessors);
  return split ? divide_up(size, part_size(size)) * plan.tokens * plan.per_token * width : 0;
}

template <class T>
cudaError_t shrink(const Plan& plan, const Adapters& adapters, const Mask& mask, Rows<const T> x, const T* bank,
                   int64_t size, int64_t width, float* h, float* workspace, int multiprocessors, cudaStream_t stream) {
  if (plan.tokens * plan.per_token * width == 0) return cudaSuccess;
  const int part = part_size(size), parts = static_cast<int>(divide_up(size, part));
  const int rank_tiles = static_cast<int>(divide_up(width, kRanks));
  const bool split = splits(plan, size, width, multiprocessors);
  const Shrink<T> s{plan, adapters, mask, x, bank, size, width, rank_tiles, parts, part, split, split ? workspace : h};
  constexpr size_t shared_bytes = 2 * kTile * pitch<T>(256 / sizeof(T)) * sizeof(uint32_t);
  const cudaError_t error =
      launch(shrink_kernel<T>, plan.chunk_rows * rank_tiles * (split ? parts : 1), kThreads, shared_bytes, stream, s);
  if (error != cudaSuccess || !split) return error;
  return launch(sum_parts_kernel, divide_up(plan.tokens * plan.per_token * width, kThreads), kThreads, 0, stream, plan,
                adapters, static_cast<const float*>(workspace), parts, width, h);
}

}  // namespace lyra::multi_lora
