// The CPU implementations of the raw ops of token_select, for each other; schemas and meaning: token_select.cpp.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

namespace lyra::token_select {

using torch::stable::Tensor;

Tensor token_scores(const Tensor& query, const Tensor& key, const std::optional<Tensor>& query_mask,
                    const std::optional<Tensor>& key_mask, const std::optional<Tensor>& key_limits,
                    const std::optional<Tensor>& key_bias, const std::optional<Tensor>& head_weights, double scale,
                    bool causal, const std::optional<Tensor>& lse, bool per_head,
                    const std::optional<Tensor>& cu_seqlens_q, const std::optional<Tensor>& cu_seqlens_k);

}  // namespace lyra::token_select
