// What the kernels of token_select share.
#pragma once

#include <cstdint>

#include "lyra/launch.h"

namespace lyra::token_select {

constexpr int kLanes = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// Sum of `value` over the lanes up to and including this one.
__device__ __forceinline__ int32_t running_sum(int32_t value) {
  const int lane = threadIdx.x % kLanes;
  for (int by = 1; by < kLanes; by *= 2) {
    const int32_t other = __shfl_up_sync(kAllLanes, value, by);
    if (lane >= by) value += other;
  }
  return value;
}

}  // namespace lyra::token_select
