// What the raw ops are given, checked: the same for CPU and CUDA. Shapes and meaning: token_select.cpp.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <limits>
#include <optional>
#include <vector>

#include "lyra/check.h"

namespace lyra::token_select {

// The optional tensor, contiguous, if it has this shape, one of these types and the device of `as`.
inline std::optional<Tensor> checked(const char* name, const std::optional<Tensor>& t,
                                     std::initializer_list<int64_t> shape, std::initializer_list<ScalarType> types,
                                     const Tensor& as) {
  if (!t) return std::nullopt;
  check_shape(name, *t, shape);
  check(std::find(types.begin(), types.end(), t->scalar_type()) != types.end(), name, ": got dtype ",
        torch::headeronly::toString(t->scalar_type()), ", expected ", torch::headeronly::toString(*types.begin()));
  check_same_device(name, *t, as);
  return torch::stable::contiguous(*t);
}

// Null if there is none, or none of this type.
template <class T>
const T* pointer(const std::optional<Tensor>& t, ScalarType type) {
  return t && t->scalar_type() == type ? t->const_data_ptr<T>() : nullptr;
}
template <class T>
const T* pointer(const std::optional<Tensor>& t) {
  return t ? t->const_data_ptr<T>() : nullptr;
}

struct ScoreArguments {
  Tensor query, key;
  int64_t batch, heads, rows, dim, kv_heads, length;  // of query and key; packed, a batch of one
  int64_t samples;
  ScalarType type;
  std::optional<Tensor> cu_q, cu_k, query_mask, key_mask, key_limits, key_bias, head_weights, lse;
  double scale;
  bool causal, per_head;

  ScoreArguments(const Tensor& query, const Tensor& key, const std::optional<Tensor>& given_query_mask,
                 const std::optional<Tensor>& given_key_mask, const std::optional<Tensor>& given_key_limits,
                 const std::optional<Tensor>& given_key_bias, const std::optional<Tensor>& given_head_weights,
                 double scale, bool causal, const std::optional<Tensor>& given_lse, bool per_head,
                 const std::optional<Tensor>& cu_seqlens_q, const std::optional<Tensor>& cu_seqlens_k)
      : query(query), key(key), type(query.scalar_type()), scale(scale), causal(causal), per_head(per_head) {
    check_shape("query", query, {kAny, kAny, kAny, kAny});
    batch = query.size(0), heads = query.size(1), rows = query.size(2), dim = query.size(3);
    check_shape("key", key, {batch, kAny, kAny, dim});
    check_same_device("key", key, query);
    kv_heads = key.size(1), length = key.size(2);
    check(type == ScalarType::Float || type == ScalarType::Half || type == ScalarType::BFloat16, "query: got dtype ",
          torch::headeronly::toString(type), ", expected float32, float16 or bfloat16");
    check_dtype("key", key, type);
    check(dim > 0, "query: got head dimension 0, expected at least 1");
    check(kv_heads > 0 && heads > 0 && heads % kv_heads == 0, "query: got ", heads, " heads for ", kv_heads, " of key");
    check(rows < std::numeric_limits<int32_t>::max() && length < std::numeric_limits<int32_t>::max(),
          "query, key: got ", rows, " rows and ", length, " keys, expected fewer than 2^31 - 1 each");
    cu_q = checked("cu_seqlens_q", cu_seqlens_q, {kAny}, {ScalarType::Int}, query);
    cu_k = checked("cu_seqlens_k", cu_seqlens_k, {kAny}, {ScalarType::Int}, query);
    check(cu_q.has_value() == cu_k.has_value(), "cu_seqlens_q, cu_seqlens_k: expected both or neither");
    check(!cu_q || (batch == 1 && cu_q->size(0) >= 1 && cu_q->size(0) == cu_k->size(0)),
          "cu_seqlens_q, cu_seqlens_k: got ", batch, " rows, expected one, and two lists of one length");
    samples = cu_q ? cu_q->size(0) - 1 : batch;
    query_mask = checked("query_mask", given_query_mask, {batch, rows}, {ScalarType::Bool}, query);
    key_mask = checked("key_mask", given_key_mask, {batch, length}, {ScalarType::Bool}, query);
    key_limits = checked("key_limits", given_key_limits, {batch, rows}, {ScalarType::Int}, query);
    key_bias = checked("key_bias", given_key_bias, {batch, length}, {ScalarType::Float}, query);
    head_weights = checked("head_weights", given_head_weights, {samples, heads}, {ScalarType::Float}, query);
    lse = checked("lse", given_lse, {batch, heads, rows}, {ScalarType::Float, ScalarType::Double}, query);
  }
};

struct SelectArguments {
  int64_t rows, length;  // of the tensors; packed in, one row
  int64_t samples, segments;
  std::optional<Tensor> candidates, key_mask, segment, keep, cu_seqlens;
  std::optional<double> share;
  std::optional<int64_t> count;
  int64_t min_keep, capacity, layout;

  SelectArguments(int64_t rows, int64_t length, const Tensor& as, const Tensor& given_candidates,
                  const std::optional<Tensor>& given_key_mask, const std::optional<Tensor>& given_segments,
                  const std::optional<Tensor>& given_keep, std::optional<double> share, std::optional<int64_t> count,
                  int64_t min_keep, int64_t capacity, int64_t layout, const std::optional<Tensor>& given_cu_seqlens)
      : rows(rows), length(length), share(share), count(count), min_keep(min_keep), capacity(capacity), layout(layout) {
    candidates = checked("candidates", given_candidates, {rows, length}, {ScalarType::Bool}, as);
    key_mask = checked("key_mask", given_key_mask, {rows, length}, {ScalarType::Bool}, as);
    segment = checked("segments", given_segments, {rows, length}, {ScalarType::Long}, as);
    cu_seqlens = checked("cu_seqlens", given_cu_seqlens, {kAny}, {ScalarType::Int}, as);
    check(layout >= 0 && layout <= 2, "layout: got ", layout, ", expected 0, 1 or 2");
    check(!cu_seqlens || (rows == 1 && layout == 2 && cu_seqlens->size(0) >= 1), "cu_seqlens: got ", rows,
          " rows and layout ", layout, ", expected 1 and 2");
    samples = cu_seqlens ? cu_seqlens->size(0) - 1 : rows;
    check(min_keep >= 0 && capacity >= 0, "got min_keep ", min_keep, " and capacity ", capacity,
          ", expected at least 0");
    check(given_keep.has_value() + share.has_value() + count.has_value() == 1,
          "keep, share, count: expected exactly one");
    segments = segment ? length : 1;
    if (!given_keep) return;
    if (given_keep->dim() == 2) {
      check(segment.has_value(), "keep: got shape ", shape_string(*given_keep), " without segments");
      segments = given_keep->size(1);
      keep = checked("keep", given_keep, {samples, segments}, {ScalarType::Long, ScalarType::Double}, as);
    } else {
      keep = checked("keep", given_keep, {samples}, {ScalarType::Long, ScalarType::Double}, as);
    }
  }

  bool per_segment() const { return keep && keep->dim() == 2; }
};

// Of the tensors that gather moves to the places of an index (rows, columns).
inline void check_gather(const std::vector<Tensor>& tensors, const Tensor& index, const std::vector<bool>& planes,
                         const std::vector<double>& fill, bool flat) {
  check_shape("index", index, {kAny, kAny});
  check_dtype("index", index, ScalarType::Long);
  check(planes.size() == tensors.size() && fill.size() == tensors.size(), "planes, fill: got ", planes.size(), " and ",
        fill.size(), ", expected one for each of ", tensors.size(), " tensors");
  for (size_t i = 0; i < tensors.size(); ++i) {
    const Tensor& t = tensors[i];
    check(t.dim() >= 2 + planes[i], "tensors: got shape ", shape_string(t));
    check_same_device("tensors", t, index);
    check(flat || t.size(planes[i]) == index.size(0), "tensors: got shape ", shape_string(t), " for an index of ",
          index.size(0), " samples");
  }
}

// (rows, columns, ...) or (P, rows, columns, ...).
inline std::vector<int64_t> gathered_shape(const Tensor& t, const Tensor& index, bool planes) {
  std::vector<int64_t> shape;
  if (planes) shape.push_back(t.size(0));
  shape.insert(shape.end(), {index.size(0), index.size(1)});
  for (int64_t d = 2 + planes; d < t.dim(); ++d) shape.push_back(t.size(d));
  return shape;
}

}  // namespace lyra::token_select
