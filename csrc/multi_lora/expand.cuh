// expand: adds what B makes of the shrunk tokens to y, in place (the math stands in routing.h).
//
// A block owns 64 tokens by 128 columns of y, goes over the adapters that are present and rounds once. A tile without
// adapters costs one load per block.
// M tokens of rank r: 2 M r D FLOPs; M D numbers read and written. Shared memory 33 KB (float32 50).
//
//   budget sm_80: expand_kernel<float> 96, expand_kernel<lyra::Bf16> 104, expand_kernel<lyra::Half> 104
//   budget sm_90a: expand_kernel<float> 96, expand_kernel<lyra::Bf16> 104, expand_kernel<lyra::Half> 104
#pragma once

#include <cstdint>
#include "dropout.h"
#include "routing.h"

namespace lyra::multi_lora {

template <class T>
struct Expand {
  Plan plan;
  Adapters adapters;
  Mask mask;
  const float* h;  // (T, S, G)
  int64_t width;   // G
  const T* bank;
  int64_t size;  // D
  int column_tiles;
  T* y;  // (T, D)
};

template <class T>
__global__ void __launch_bounds__(kThreads) expand_kernel(Expand<T> s) {
  constexpr int kNarrow = pitch<T>(kRanks), kWide = pitch<T>(kColumns), kSums = kColumns + 4;
  const int64_t tile = blockIdx.x / s.column_tiles, first_token = tile * kTile;
  const int64_t first_column = static_cast<int64_t>(blockIdx.x % s.column_tiles) * kColumns;
  const uint32_t* const present = s.plan.present + tile * s.plan.words();

  uint32_t* const h_tile = reinterpret_cast<uint32_t*>(dynamic_shared());
  uint32_t* const bank_tile = h_tile + kTile * kNarrow;
  const int warp = threadIdx.x / 32, m = warp % kWarpRows * 16, n = warp / kWarpRows * (kColumns / 2);
  float acc[1][8][4] = {};
  bool some = false;
  for (int64_t w = 0; w < s.plan.words(); ++w) {
    for (uint32_t bits = present[w]; bits; bits &= bits - 1) {
      const int e = static_cast<int>(w) * 32 + __ffs(static_cast<int>(bits)) - 1;
      const Adapter adapter(s.adapters, e);
      const float scaling = s.adapters.scaling[e];
      const int end_of_h = adapter.column + adapter.rank;
      some = true;
      for (int first_rank = 0; first_rank < adapter.rank; first_rank += kRanks) {
        const int ranks = smaller(adapter.rank - first_rank, kRanks), depth = (ranks + 15) / 16;
        __syncthreads();  // the last tiles are read
        for (int i = threadIdx.x; i < kTile * kRanks / kPiece; i += kThreads) {
          const int row = i / (kRanks / kPiece), piece = i % (kRanks / kPiece);
          float sum[kPiece] = {};
          if (first_token + row < s.plan.tokens && piece * kPiece < ranks) {
            for (int64_t c = 0; c < s.plan.per_token; ++c) {
              const int64_t pair = (first_token + row) * s.plan.per_token + c;
              if (s.plan.ids[pair] != e) continue;
              const float factor = s.plan.weight(pair) * scaling;
              const Piece<float> values =
                  load_piece(s.h + pair * s.width, adapter.column + first_rank + piece * kPiece, end_of_h);
#pragma unroll
              for (int j = 0; j < kPiece; ++j) sum[j] = fmaf(factor, values.get(j), sum[j]);
            }
          }
          to_shared(h_tile, kNarrow, row, piece, rounded<T>(sum));
        }
        for (int i = threadIdx.x; i < depth * 16 * kColumns / kPiece; i += kThreads) {
          const int row = i / (kColumns / kPiece), piece = i % (kColumns / kPiece);
          const T* const from = s.bank + (adapter.row + first_rank + row) * s.size;
          to_shared(bank_tile, kWide, row, piece,
                    row < ranks ? load_piece(from, first_column + piece * kPiece, s.size) : Piece<T>());
        }
        __syncthreads();  // these are written
        multiply<T, kAlong, kAcross>(acc, h_tile, kNarrow, m, bank_tile, kWide, n, 16, 4, depth);
      }
    }
  }
  if (!some) return;

  // Through shared memory, so that whole rows of y are read and written.
  __syncthreads();  // the last tiles are read
  uint32_t* const sums = h_tile;
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
  for (int half = 0; half < 8; ++half) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      exchange_store(sums + (m + g + i / 2 * 8) * kSums + n + half * 8 + 2 * t + i % 2,
                     static_cast<uint32_t>(__float_as_int(acc[0][half][i])));
    }
  }
  __syncthreads();  // the sums are written
  for (int i = threadIdx.x; i < kTile * kColumns / kPiece; i += kThreads) {
    const int row = i / (kColumns / kPiece), piece = i % (kColumns / kPiece);
    const int64_t token = first_token + row, column = first_column + piece * kPiece;
    if (token >= s.plan.tokens || column >= s.size) continue;
    bool routed = false;
    for (int64_t c = 0; c < s.plan.per_token; ++c) routed |= s.plan.ids[token * s.plan.per_token + c] >= 0;
    if (!routed) continue;
    Piece<float> added;
#pragma unroll
    for (int j = 0; j < kPiece; ++j) added.word[j] = exchange_load(sums + row * kSums + piece * kPiece + j);
    if (s.mask.seed) drop_elements(added, s.mask, token, column);
    T* const y = s.y + token * s.size;
    const Piece<T> base = load_piece<T>(y, column, s.size);
    float values[kPiece];
#pragma unroll
    for (int j = 0; j < kPiece; ++j) values[j] = base.get(j) + added.get(j);
    store_piece(y, column, s.size, rounded<T>(values));
  }
}

template <class T>
cudaError_t expand(const Plan& plan, const Adapters& adapters, const Mask& mask, const float* h, int64_t width,
                   const T* bank, int64_t size, T* y, cudaStream_t stream) {
  if (plan.tokens * size == 0) return cudaSuccess;
  const int column_tiles = static_cast<int>(divide_up(size, kColumns));
  const Expand<T> s{plan, adapters, mask, h, width, bank, size, column_tiles, y};
  constexpr size_t tiles = kTile * (pitch<T>(kRanks) + pitch<T>(kColumns)), sums = kTile * (kColumns + 4);
  return launch(expand_kernel<T>, plan.tiles() * column_tiles, kThreads,
                (tiles > sums ? tiles : sums) * sizeof(uint32_t), stream, s);
}

}  // namespace lyra::multi_lora
