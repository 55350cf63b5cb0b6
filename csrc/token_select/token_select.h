// What the CPU implementations of the raw ops of token_select share; schemas and meaning: token_select.cpp.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>
#include <vector>

#include "arguments.h"

namespace lyra::token_select {

// Where each sample begins, and the end: one row of a padded batch each, or as cu_seqlens say.
inline std::vector<int64_t> sample_starts(const char* name, const std::optional<Tensor>& cu_seqlens, int64_t batch,
                                          int64_t length) {
  std::vector<int64_t> starts;
  if (!cu_seqlens) {
    for (int64_t b = 0; b <= batch; ++b) starts.push_back(b * length);
    return starts;
  }
  const int32_t* places = cu_seqlens->const_data_ptr<int32_t>();
  starts.assign(places, places + cu_seqlens->numel());
  check(starts[0] >= 0 && starts.back() <= length && std::is_sorted(starts.begin(), starts.end()), name,
        ": expected increasing places from 0 to ", length);
  return starts;
}

// (B, L), or (B, Hq, L) per head.
Tensor token_scores(const ScoreArguments& arguments);

}  // namespace lyra::token_select
