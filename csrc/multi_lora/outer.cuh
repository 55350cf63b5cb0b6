// outer: the gradients of A and B (the math stands in routing.h).
//
// `workers` take equal shares of the chunks. Adapters inside one share are written at once, those that span several
// leave at most two partial products per worker, added up in order by `sum_workers_kernel`, which also writes the zeros
// of absent adapters. Or all of it is added to what `out` holds, which accumulates gradients in float32 however many
// batches they come from.
// M tokens of rank r: 2 M r D FLOPs; M D numbers read. Shared memory 26 KB (float32 50).
//
//   budget sm_80: outer_kernel<float> 184, outer_kernel<lyra::Bf16> 128, outer_kernel<lyra::Half> 128
//   budget sm_80: sum_workers_kernel 56
//   budget sm_90a: outer_kernel<float> 184, outer_kernel<lyra::Bf16> 128, outer_kernel<lyra::Half> 128
//   budget sm_90a: sum_workers_kernel 48
#pragma once

#include <cstdint>
#include "dropout.h"
#include "routing.h"

namespace lyra::multi_lora {

template <class T>
struct Outer {
  Plan plan;
  Adapters adapters;
  Mask mask;
  const float* h;   // (T, S, G)
  int64_t width;    // G
  Rows<const T> z;  // (T, D)
  int64_t size;     // D
  int rank_tiles, column_tiles, workers;
  bool adds;       // to out
  float* out;      // (rows, D)
  float* partial;  // (workers, 2, G, D)
};

// First row of the chunks whose adapter is e or more; the number of used rows if there is none. A whole warp together.
__device__ __forceinline__ int64_t first_chunk(const Plan& plan, int64_t e) {
  const int lane = threadIdx.x % 32;
  int64_t low = 0, high = plan.chunk_rows;
  while (low < high) {
    const int64_t step = (high - low + 31) / 32, probe = low + lane * step;
    // -1, which marks the unused, is the largest unsigned number.
    const bool before = probe < high && static_cast<unsigned>(plan.chunks[2 * probe]) < static_cast<uint64_t>(e);
    const int count = __popc(__ballot_sync(kAllLanes, before));
    if (count == 0) break;
    high = smaller(high, low + count * step);
    low += (count - 1) * step + 1;
  }
  return low;
}

// Which chunks a worker has, and where it leaves the product of an adapter.
struct Shares {
  int64_t used, each;

  __device__ Shares(const Plan& plan, int workers)
      : used(first_chunk(plan, plan.adapters)), each((used + workers - 1) / workers) {}

  __device__ int64_t begin(int64_t worker) const { return smaller(worker * each, used); }
  // 0: its first adapter, or the one that it has alone; 1: its last one.
  __device__ int64_t slot(int64_t worker, int64_t first_chunk_of_adapter) const {
    return worker * 2 + (first_chunk_of_adapter > begin(worker));
  }
};

template <class T>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 2 ? 2 : 1) outer_kernel(Outer<T> s) {
  constexpr int kNarrow = pitch<T>(kRanks), kWide = pitch<T>(kColumns);
  constexpr int kZPasses = kTile * kColumns / kPiece / kThreads, kHPasses = kTile * kRanks / kPiece / kThreads;
  const int64_t first_column = static_cast<int64_t>(blockIdx.x % s.column_tiles) * kColumns;
  const int first_rank = blockIdx.x / s.column_tiles % s.rank_tiles * kRanks;
  const int64_t worker = blockIdx.x / s.column_tiles / s.rank_tiles;
  const Shares shares(s.plan, s.workers);
  const int64_t begin = shares.begin(worker), end = shares.begin(worker + 1);

  uint32_t* const h_tile = reinterpret_cast<uint32_t*>(dynamic_shared());
  uint32_t* const z_tile = h_tile + kTile * kNarrow;
  const int warp = threadIdx.x / 32, m = warp % kWarpRows * 16, n = warp / kWarpRows * (kColumns / 2);
  float acc[1][8][4] = {};

  Piece<float> h_next[kHPasses];
  Piece<T> z_next[kZPasses];
  float factor[kHPasses];
  int token[kZPasses];
  const auto fetch = [&](int64_t chunk) {
    const int e = s.plan.chunks[2 * chunk];
    const Adapter adapter(s.adapters, e);
    const int* const pairs = s.plan.pairs + s.plan.chunks[2 * chunk + 1];
    const int count =
        first_rank < adapter.rank ? smaller<int64_t>(s.plan.pairs + s.plan.starts[e + 1] - pairs, kTile) : 0;
#pragma unroll
    for (int i = 0; i < kHPasses; ++i) {
      const int at = threadIdx.x + i * kThreads, row = at / (kRanks / kPiece);
      const int rank = first_rank + at % (kRanks / kPiece) * kPiece;
      const bool real = row < count && rank < adapter.rank;
      const int64_t pair = real ? pairs[row] : 0;
      factor[i] = real ? s.plan.weight(pair) * s.adapters.scaling[e] : 0.0f;
      h_next[i] = real ? load_piece(s.h + pair * s.width, adapter.column + rank, adapter.column + adapter.rank)
                       : Piece<float>();
    }
#pragma unroll
    for (int i = 0; i < kZPasses; ++i) {
      const int at = threadIdx.x + i * kThreads, row = at / (kColumns / kPiece);
      const int64_t column = first_column + at % (kColumns / kPiece) * kPiece;
      token[i] = row < count ? pairs[row] / static_cast<int>(s.plan.per_token) : -1;
      z_next[i] = token[i] >= 0 ? load_piece(s.z.data + token[i] * s.z.stride, column, s.size) : Piece<T>();
    }
  };
  // What was fetched is scaled and masked on its way to shared memory and not before, which would wait for it.
  const auto store = [&] {
#pragma unroll
    for (int i = 0; i < kHPasses; ++i) {
      const int at = threadIdx.x + i * kThreads;
      float values[kPiece];
#pragma unroll
      for (int j = 0; j < kPiece; ++j) values[j] = factor[i] * h_next[i].get(j);
      to_shared(h_tile, kNarrow, at / (kRanks / kPiece), at % (kRanks / kPiece), rounded<T>(values));
    }
#pragma unroll
    for (int i = 0; i < kZPasses; ++i) {
      const int at = threadIdx.x + i * kThreads, piece = at % (kColumns / kPiece);
      if (s.mask.seed && token[i] >= 0) drop_elements(z_next[i], s.mask, token[i], first_column + piece * kPiece);
      to_shared(z_tile, kWide, at / (kColumns / kPiece), piece, z_next[i]);
    }
  };

  // Leaves acc where it belongs and empties it.
  const auto flush = [&](int e, int64_t last) {
    const Adapter adapter(s.adapters, e);
    const int64_t first = first_chunk(s.plan, e);
    const bool whole = first >= begin && (last + 1 < end || first_chunk(s.plan, e + 1) <= end);
    float* const to = whole ? s.out + adapter.row * s.size : s.partial + shares.slot(worker, first) * s.width * s.size;
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int half = 0; half < 8; ++half) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int64_t rank = first_rank + m + g + i / 2 * 8, column = first_column + n + half * 8 + 2 * t + i % 2;
        float* const at = to + rank * s.size + column;
        if (rank < adapter.rank && column < s.size) *at = whole && s.adds ? *at + acc[0][half][i] : acc[0][half][i];
        acc[0][half][i] = 0;
      }
    }
  };

  if (begin < end) fetch(begin);
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    const int e = s.plan.chunks[2 * chunk];
    __syncthreads();  // the last tiles are read
    store();
    __syncthreads();  // these are written
    if (chunk + 1 < end) fetch(chunk + 1);
    multiply<T, kAcross, kAcross>(acc, h_tile, kNarrow, m, z_tile, kWide, n, 16, 4, kTile / 16);
    if (chunk + 1 == end || s.plan.chunks[2 * chunk + 2] != e) flush(e, chunk);
  }
}

constexpr int kRowsOfSum = 8;

// Adds up what the workers left of adapters that several of them had, and writes the zeros of those that nobody has.
__global__ void __launch_bounds__(kThreads)
    sum_workers_kernel(Plan plan, Adapters adapters, const float* partial, int64_t width, int64_t size, int workers,
                       bool adds, float* out) {
  const int64_t column_blocks = divide_up(size, kThreads), row_blocks = divide_up(width, kRowsOfSum);
  const int64_t column = blockIdx.x % column_blocks * kThreads + threadIdx.x;
  const int64_t first_rank = blockIdx.x / column_blocks % row_blocks * kRowsOfSum;
  const int e = static_cast<int>(blockIdx.x / column_blocks / row_blocks);
  const Adapter adapter(adapters, e);
  const Shares shares(plan, workers);
  const int64_t first = first_chunk(plan, e), end = first_chunk(plan, e + 1);
  const int64_t first_worker = first < end ? first / shares.each : 0;
  const int64_t last_worker = first < end ? (end - 1) / shares.each : -1;
  if (first_worker == last_worker || column >= size) return;
  for (int64_t rank = first_rank; rank < smaller<int64_t>(first_rank + kRowsOfSum, adapter.rank); ++rank) {
    float sum = 0;
    for (int64_t w = first_worker; w <= last_worker; ++w) {
      sum += partial[(shares.slot(w, first) * width + rank) * size + column];
    }
    float* const to = out + (adapter.row + rank) * size + column;
    *to = adds ? *to + sum : sum;
  }
}

// As many blocks as run at once, two to each multiprocessor, since one more would wait for all of them.
inline int outer_workers(const Plan& plan, int64_t size, int64_t width, int multiprocessors) {
  const int64_t blocks = divide_up(size, kColumns) * divide_up(width, kRanks), fit = 2 * multiprocessors / blocks;
  return static_cast<int>(smaller(fit > 1 ? fit : int64_t{1}, plan.chunk_rows));
}

inline int64_t outer_workspace(const Plan& plan, int64_t size, int64_t width, int multiprocessors) {
  return outer_workers(plan, size, width, multiprocessors) * 2 * width * size;
}

// Writes all rows of `out` that belong to an adapter or, if `adds`, adds to them.
template <class T>
cudaError_t outer(const Plan& plan, const Adapters& adapters, const Mask& mask, const float* h, int64_t width,
                  Rows<const T> z, int64_t size, bool adds, float* out, float* workspace, int multiprocessors,
                  cudaStream_t stream) {
  if (width * size * plan.adapters == 0) return cudaSuccess;
  const int column_tiles = static_cast<int>(divide_up(size, kColumns));
  const int rank_tiles = static_cast<int>(divide_up(width, kRanks));
  const int workers = outer_workers(plan, size, width, multiprocessors);
  const Outer<T> s{plan, adapters, mask, h, width, z, size, rank_tiles, column_tiles, workers, adds, out, workspace};
  constexpr size_t shared_bytes = kTile * (pitch<T>(kRanks) + pitch<T>(kColumns)) * sizeof(uint32_t);
  const cudaError_t error = launch(outer_kernel<T>, static_cast<int64_t>(column_tiles) * rank_tiles * workers, kThreads,
                                   shared_bytes, stream, s);
  if (error != cudaSuccess) return error;
  const int64_t blocks = divide_up(size, kThreads) * divide_up(width, kRowsOfSum) * plan.adapters;
  return launch(sum_workers_kernel, blocks, kThreads, 0, stream, plan, adapters, static_cast<const float*>(workspace),
                width, size, workers, adds, out);
}

}  // namespace lyra::multi_lora
