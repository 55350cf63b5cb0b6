// The plan of a routing: which tokens go to which adapter, made once per step for all layers, on the device.
//
// Sizes depend on T, S, E alone:
//   ids (T, S)            out of range is -1
//   pairs (T S)           flat (t, s) sorted by adapter, then as they are; adapter e has starts[e] to starts[e+1]
//   chunks (chunk_rows, 2) adapter and first place in pairs of runs of at most kTile pairs; unused rows: -1, 0
//   present (T / kTile, words)  bit e of tile i: one of its tokens has adapter e
// One block; it reads ids twice (8192: 64 KB each) and writes about three times that: a few microseconds, most of them
// the trips between its barriers.
//
//   budget sm_80: plan_kernel<int> 80, plan_kernel<long> 80
//   budget sm_90a: plan_kernel<int> 80, plan_kernel<long> 80
#pragma once

#include <cstdint>
#include "routing.h"

namespace lyra::multi_lora {

constexpr int kPlanThreads = 512, kPlanWarps = kPlanThreads / 32;
constexpr int64_t kMaxPlanAdapters = 1024;

template <class Id>
struct NewPlan {
  const Id* given;                      // (T, S), may hold anything
  int64_t tokens, per_token, adapters;  // T, S, E
  int *ids, *starts, *pairs, *chunks;
  int64_t chunk_rows;
  uint32_t* present;
};

// The lanes whose e is that of this lane; not of use to a lane whose e is negative.
__device__ __forceinline__ unsigned lanes_with_same(int e, int bits) {
  unsigned same = __ballot_sync(kAllLanes, e >= 0);
  for (int b = 0; b < bits; ++b) {
    const unsigned set = __ballot_sync(kAllLanes, e >> b & 1);
    same &= e >> b & 1 ? set : ~set;
  }
  return same;
}

// Sum of `value` over the threads before this one, and over all.
__device__ __forceinline__ unsigned long long scan(unsigned long long value, unsigned long long* sums,
                                                   unsigned long long* all) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  unsigned long long through = value;
  for (int by = 1; by < 32; by *= 2) {
    const unsigned long long before = __shfl_up_sync(kAllLanes, through, by);
    if (lane >= by) through += before;
  }
  if (lane == 31) exchange_store(sums + warp, through);
  __syncthreads();
  unsigned long long base = 0;
  *all = 0;
  for (int w = 0; w < kPlanWarps; ++w) {
    const unsigned long long sum = exchange_load(sums + w);
    if (w < warp) base += sum;
    *all += sum;
  }
  return base + through - value;
}

// A counting sort by one block: each warp has one run of the pairs, counts its adapters and, when all have been added
// up, puts its pairs in their places.
template <class Id>
__global__ void __launch_bounds__(kPlanThreads, 1) plan_kernel(NewPlan<Id> plan) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, adapters = static_cast<int>(plan.adapters);
  const int64_t pairs = plan.tokens * plan.per_token, words = divide_up(adapters, 32);
  const int64_t run = divide_up(divide_up(pairs, kPlanWarps), 32) * 32;
  const int64_t begin = smaller(warp * run, pairs), end = smaller(begin + run, pairs);
  int bits = 0;
  while ((adapters - 1) >> bits) ++bits;

  unsigned long long* const sums = reinterpret_cast<unsigned long long*>(dynamic_shared());
  int* const counts = reinterpret_cast<int*>(sums + kPlanWarps);  // (warps, E): pairs, then the next place of each
  int* const mine = counts + warp * adapters;
  int* const first_chunks = counts + kPlanWarps * adapters;  // (E + 1)

  for (int e = lane; e < adapters; e += 32) exchange_store(mine + e, 0);
  for (int64_t i = threadIdx.x; i < divide_up(plan.tokens, kTile) * words; i += kPlanThreads) plan.present[i] = 0;
  __syncthreads();
  for (int64_t at = begin; at < end; at += 32) {
    const int64_t pair = at + lane, tile = pair / plan.per_token / kTile;
    const Id given = pair < end ? plan.given[pair] : static_cast<Id>(-1);
    const int e = given >= 0 && given < plan.adapters ? static_cast<int>(given) : -1;
    if (pair < end) exchange_store(plan.ids + pair, e);
    const unsigned same = lanes_with_same(e, bits), before = same & ((1u << lane) - 1);
    if (e >= 0) {
      const int last = before ? 31 - __clz(before) : -1;  // says the same of its tile, if that is ours
      if (last < 0 || (at + last) / plan.per_token / kTile != tile) {
        atomicOr(plan.present + tile * words + e / 32, 1u << e % 32);
      }
      if (!before) exchange_store(mine + e, exchange_load(mine + e) + __popc(same));
    }
    __syncwarp();
  }
  __syncthreads();

  const int each = static_cast<int>(divide_up(adapters, kPlanThreads));
  const int own = smaller<int>(threadIdx.x * each, adapters), own_end = smaller(own + each, adapters);
  const auto total = [&](int e) {
    int sum = 0;
    for (int w = 0; w < kPlanWarps; ++w) sum += exchange_load(counts + w * adapters + e);
    return sum;
  };
  // Pairs in the lower half, chunks in the upper half.
  const auto size = [&](int e) {
    const unsigned long long count = total(e);
    return count | (count + kTile - 1) / kTile << 32;
  };
  unsigned long long all = 0, sum = 0;
  for (int e = own; e < own_end; ++e) sum += size(e);
  unsigned long long place = scan(sum, sums, &all);
  for (int e = own; e < own_end; ++e) {
    const unsigned long long next = place + size(e);
    exchange_store(plan.starts + e, static_cast<int>(place));
    exchange_store(first_chunks + e, static_cast<int>(place >> 32));
    int to = static_cast<int>(place);
    for (int w = 0; w < kPlanWarps; ++w) {
      int* const count = counts + w * adapters + e;
      const int found = exchange_load(count);
      exchange_store(count, to);
      to += found;
    }
    place = next;
  }
  const int routed = static_cast<int>(all), used_chunks = static_cast<int>(all >> 32);
  if (threadIdx.x == 0) plan.starts[adapters] = routed;
  __syncthreads();

  for (int64_t at = begin; at < end; at += 32) {
    const int e = at + lane < end ? exchange_load(plan.ids + at + lane) : -1;
    const unsigned same = lanes_with_same(e, bits), before = same & ((1u << lane) - 1);
    const int to = e >= 0 ? exchange_load(mine + e) + __popc(before) : 0;
    if (e >= 0) plan.pairs[to] = static_cast<int>(at) + lane;
    __syncwarp();
    if (e >= 0 && !before) exchange_store(mine + e, to + __popc(same));
    __syncwarp();
  }
  for (int64_t i = routed + threadIdx.x; i < pairs; i += kPlanThreads) plan.pairs[i] = -1;
  for (int64_t chunk = threadIdx.x; chunk < plan.chunk_rows; chunk += kPlanThreads) {
    int e = -1, at = 0;
    if (chunk < used_chunks) {
      int low = 0, high = adapters;  // the first adapter that begins behind this chunk
      while (low < high) {
        const int middle = (low + high) / 2;
        if (exchange_load(first_chunks + middle) <= chunk) {
          low = middle + 1;
        } else {
          high = middle;
        }
      }
      e = low - 1;
      at = exchange_load(plan.starts + e) + static_cast<int>(chunk - exchange_load(first_chunks + e)) * kTile;
    }
    plan.chunks[2 * chunk] = e;
    plan.chunks[2 * chunk + 1] = at;
  }
}

// Writes all of ids, starts, pairs, chunks and present.
template <class Id>
cudaError_t make_plan(const NewPlan<Id>& plan, cudaStream_t stream) {
  if (plan.adapters > kMaxPlanAdapters) return cudaErrorInvalidValue;
  const size_t shared_bytes =
      kPlanWarps * sizeof(unsigned long long) + (kPlanWarps * plan.adapters + plan.adapters + 1) * sizeof(int);
  return launch(plan_kernel<Id>, 1, kPlanThreads, shared_bytes, stream, plan);
}

}  // namespace lyra::multi_lora
