// Score, select and gather of short samples in three launches: what a layer that drops tokens adds to an image or seven
// minutes of speech (4096 tokens). Raw pointers, no torch.
//
// Math and shapes: scores.cuh, select.cuh, gather.cuh, of whose code this is made, so that its results are theirs to
// the last bit. No index is read back, and nothing waits for another block.
//
// Plan. norms_kernel and shares_kernel leave the planes; then `select_gather_kernel`, many blocks per sample, each of
// which finds out for itself which tokens stay, on scores that it has added up in shared memory, and moves its part of
// the tensors. That costs every block the same few microseconds at the same time; a block alone would spend them, too,
// and then a launch would follow. Beyond short samples the blocks would read more scores than that saves: 264 x 16384 x
// 18 bytes are 78 MB, some 14 us of the second-level cache. There select and gather are launches of their own. The
// first block of each sample writes index, lengths and inverse.
//
// Bytes: each block reads 4 P + 2 per token from the second-level cache; the tensors as in gather.cuh. Floor, H100 (3.0
// TB/s), 576 tokens of 3584 bf16, half kept: 1.4 us for 4.1 MB; latency rules instead. Estimated, not yet timed: 6 us
// of which 4 us are the selection, and 16 us for the whole call in a graph.
//
// Registers per thread, at most, spills none (tests/test_compile_budget.py reads these lines):
//   budget sm_80: select_gather_kernel 80
//   budget sm_90a: select_gather_kernel 80
#pragma once

#include <cstdint>

#include "gather.cuh"
#include "lyra/launch.h"
#include "scores.cuh"
#include "select.cuh"

namespace lyra::token_select {

constexpr int64_t kExtractBlocks = 264;  // two for each SM of an H100

// Samples that one block can select by itself in no time.
inline bool selects_while_gathering(const Problem& scored, const Selection& p) {
  return scored.is_short() && few_segments(p) && p.layout != kPacked;
}

// `blocks` per sample, which share `table_blocks` of the table's work.
__global__ void __launch_bounds__(kGatherThreads)
    select_gather_kernel(const __grid_constant__ Selection p, const __grid_constant__ Table table, int64_t blocks,
                         int64_t table_blocks) {
  const int64_t b = blockIdx.x / blocks, block = blockIdx.x % blocks;
  const int64_t warp = threadIdx.x / kLanes, warps = kGatherThreads / kLanes;
  Segment* segments = reinterpret_cast<Segment*>(dynamic_shared());
  int32_t* counters = reinterpret_cast<int32_t*>(segments + p.segments);
  int32_t* counts = counters + p.segments * Digits(p).bins();
  int32_t* places = counts + kLanes;  // which token each column holds
  float* scores = reinterpret_cast<float*>(places + p.capacity);
  bool *candidates = reinterpret_cast<bool*>(scores + p.length), *real = candidates + p.length;

  const Tokens far(p, b);
  for (int64_t i = threadIdx.x; i < p.length; i += kGatherThreads) {
    scores[i] = far.score(i);
    candidates[i] = p.candidates[far.start + i];
    real[i] = far.real(i);
  }
  for (int64_t k = threadIdx.x; k < p.capacity; k += kGatherThreads) exchange_store(places + k, -1);
  Selection near = p;
  near.planes = 1;
  near.scores = scores;
  near.bias = nullptr;
  near.candidates = candidates;
  near.key_mask = real;
  near.segment = p.segment ? p.segment + far.start : nullptr;
  const Tokens tokens(near, b, p.length);

  find_thresholds(tokens, segments, counters);
  const int32_t kept = count_kept(tokens, warp, warps, segments);
  if (threadIdx.x % kLanes == 0) exchange_store(counts + warp, kept);
  __syncthreads();
  const auto count = [&](int64_t w) { return exchange_load(counts + w); };
  const int64_t before = sum_of(warp, count), all = sum_of(warps, count);
  const int64_t column = p.layout == kLeft ? p.capacity - all : 0, size = range_size(tokens, warps);
  walk(tokens, warp * size, size, segments, [&](int64_t i, bool stays, int64_t place) {
    place += column + before;
    const bool fits = stays && place >= 0 && place < p.capacity;
    if (fits) exchange_store(places + place, static_cast<int32_t>(i));
    if (block == 0) p.inverse[far.start + i] = fits ? place : -1;
  });
  __syncthreads();

  if (block == 0) {
    for (int64_t k = threadIdx.x; k < p.capacity; k += kGatherThreads) {
      p.index[b * p.capacity + k] = exchange_load(places + k);
    }
    if (threadIdx.x == 0) {
      p.lengths[b] = all;
      check_room(p, all);
    }
  }
  const Columns mine{static_cast<uint32_t>(b * p.capacity), static_cast<uint32_t>(p.capacity)};
  for (int64_t at = block; at < table_blocks; at += blocks) {
    move(table, at, mine, [&](uint32_t k) { return int64_t{exchange_load(places + k)}; });
  }
}

// `table`: of the same samples, padded, with out_length = capacity; its index is not looked at.
inline cudaError_t select_gather(const Selection& p, Table table, cudaStream_t stream) {
  const int64_t table_blocks = cut(table, p.batch);
  if (table_blocks < 0) return cudaErrorInvalidValue;
  const int64_t most = (kExtractBlocks + p.batch - 1) / p.batch, wanted = table_blocks < most ? table_blocks : most;
  const int64_t blocks = wanted < 1 ? 1 : wanted;
  const size_t bytes = search_bytes(p) + (kLanes + static_cast<size_t>(p.capacity)) * sizeof(int32_t) +
                       static_cast<size_t>(p.length) * (sizeof(float) + 2);
  return launch(select_gather_kernel, p.batch * blocks, kGatherThreads, bytes, stream, p, table, blocks, table_blocks);
}

// What select may need of device memory besides.
inline int64_t extract_workspace_bytes(const Problem& scored, const Selection& p) {
  return selects_while_gathering(scored, p) ? 0 : select_workspace_bytes(p, select_plan(p));
}

// p.scores: scored.planes. `table`: as the layout and p.index ask for. Workspaces as score_planes and select want them.
template <class T>
cudaError_t extract(const Problem& scored, const Selection& p, const Table& table, void* workspace,
                    void* select_workspace, cudaStream_t stream) {
  cudaError_t error = score_planes<T>(scored, workspace, stream);
  if (error != cudaSuccess) return error;
  if (selects_while_gathering(scored, p)) return select_gather(p, table, stream);
  error = select(p, select_plan(p), select_workspace, stream);
  return error == cudaSuccess ? gather(table, stream) : error;
}

}  // namespace lyra::token_select
