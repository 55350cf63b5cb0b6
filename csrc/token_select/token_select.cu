// Token selection on a GPU: checks, allocation and registration. The schemas stand in token_select.cpp, the kernels in
// the headers beside this file.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "gather.cuh"
#include "lyra/check.h"
#include "lyra/stream.h"
#include "scores.cuh"
#include "select.cuh"

namespace lyra {
namespace {

namespace kernels = lyra::token_select;

// The optional tensor, contiguous, if it has this type, shape and device.
std::optional<Tensor> checked(const char* name, const std::optional<Tensor>& t, std::initializer_list<int64_t> shape,
                              ScalarType type, const Tensor& as) {
  if (!t) return std::nullopt;
  check_shape(name, *t, shape);
  check_dtype(name, *t, type);
  check_same_device(name, *t, as);
  return torch::stable::contiguous(*t);
}

template <class T>
const T* pointer(const std::optional<Tensor>& t) {
  return t ? t->const_data_ptr<T>() : nullptr;
}

// Back with torch's allocator when the caller returns, for later work of the same stream.
Tensor new_workspace(int64_t bytes, const Tensor& as) {
  return torch::stable::new_empty(as, {bytes}, ScalarType::Byte);
}

// --- scores --------------------------------------------------------------------------------------------------------

kernels::Operand operand(const Tensor& t) {
  const int64_t item = static_cast<int64_t>(t.element_size());
  // Of what the rows' addresses are made up; a stride of a dimension of one element is in none.
  int64_t bytes = reinterpret_cast<intptr_t>(t.const_data_ptr()) | t.size(3) * item;
  for (int64_t d = 0; d < 3; ++d) bytes |= t.size(d) > 1 ? t.stride(d) * item : 0;
  const bool adjacent = t.size(3) == 1 || t.stride(3) == 1;
  return {t.const_data_ptr(), t.stride(0), t.stride(1), t.stride(2), t.stride(3), adjacent && bytes % 16 == 0};
}

Tensor token_scores(const Tensor& query, const Tensor& key, const std::optional<Tensor>& query_mask,
                    const std::optional<Tensor>& key_mask, const std::optional<Tensor>& key_limits,
                    const std::optional<Tensor>& key_bias, const std::optional<Tensor>& head_weights, double scale,
                    bool causal, const std::optional<Tensor>& given_lse, bool per_head,
                    const std::optional<Tensor>& cu_seqlens_q, const std::optional<Tensor>& cu_seqlens_k) {
  check_shape("query", query, {kAny, kAny, kAny, kAny});
  const int64_t out_batch = query.size(0), heads = query.size(1), rows = query.size(2), dim = query.size(3);
  check_shape("key", key, {out_batch, kAny, kAny, dim});
  check_same_device("key", key, query);
  const int64_t kv_heads = key.size(1), length = key.size(2);
  const ScalarType type = query.scalar_type();
  check(type == ScalarType::Float || type == ScalarType::Half || type == ScalarType::BFloat16, "query: got dtype ",
        torch::headeronly::toString(type), ", expected float32, float16 or bfloat16");
  check_dtype("key", key, type);
  check(kv_heads > 0 && heads > 0 && heads % kv_heads == 0, "query: got ", heads, " heads for ", kv_heads, " of key");
  const int64_t most = kernels::kMaxWords * 4 / static_cast<int64_t>(query.element_size());
  check(dim >= 1 && dim <= most, "query: got head dimension ", dim, ", expected 1 to ", most);
  check(heads * rows < INT32_MAX && length < INT32_MAX, "query, key: got ", heads, " x ", rows, " rows and ", length,
        " keys, expected fewer than 2^31 each");
  const StreamGuard guard(query);
  const auto cu_q = checked("cu_seqlens_q", cu_seqlens_q, {kAny}, ScalarType::Int, query);
  const auto cu_k = checked("cu_seqlens_k", cu_seqlens_k, {kAny}, ScalarType::Int, query);
  check(cu_q.has_value() == cu_k.has_value(), "cu_seqlens_q, cu_seqlens_k: expected both or neither");
  check(!cu_q || (out_batch == 1 && cu_q->size(0) >= 1 && cu_q->size(0) == cu_k->size(0)),
        "cu_seqlens_q, cu_seqlens_k: got ", out_batch, " rows, expected one, and two lists of one length");
  const int64_t batch = cu_q ? cu_q->size(0) - 1 : out_batch;
  const auto counted = checked("query_mask", query_mask, {out_batch, rows}, ScalarType::Bool, query);
  const auto real = checked("key_mask", key_mask, {out_batch, length}, ScalarType::Bool, query);
  const auto limits = checked("key_limits", key_limits, {out_batch, rows}, ScalarType::Int, query);
  const auto bias = checked("key_bias", key_bias, {out_batch, length}, ScalarType::Float, query);
  const auto weights = checked("head_weights", head_weights, {batch, heads}, ScalarType::Float, query);
  std::optional<Tensor> lse;
  if (given_lse) {
    const Tensor exact = torch::stable::to(*given_lse, ScalarType::Double);
    lse = checked("lse", exact, {out_batch, heads, rows}, ScalarType::Double, query);
  }

  kernels::Problem p{batch,
                     heads,
                     kv_heads,
                     rows,
                     length,
                     dim,
                     operand(query),
                     operand(key),
                     pointer<int32_t>(cu_q),
                     pointer<int32_t>(cu_k),
                     pointer<bool>(counted),
                     pointer<bool>(real),
                     pointer<int32_t>(limits),
                     pointer<float>(bias),
                     pointer<float>(weights),
                     pointer<double>(lse),
                     static_cast<float>(scale),
                     causal,
                     per_head,
                     nullptr};
  Tensor planes = torch::stable::new_zeros(query, {out_batch, p.n_planes(), length}, ScalarType::Float);
  p.planes = planes.mutable_data_ptr<float>();
  Tensor workspace = new_workspace(kernels::Workspace().place(p, nullptr), query);
  const auto go = [&]<typename T>(T) {
    check_cuda(kernels::score_planes<T>(p, workspace.mutable_data_ptr(), guard.stream()), "token_select_scores");
  };
  type == ScalarType::Float ? go(float{}) : type == ScalarType::Half ? go(Half{}) : go(Bf16{});
  if (per_head) return planes;
  Tensor scores = torch::stable::new_empty(planes, {out_batch, length});
  check_cuda(kernels::sum_planes(p.planes, p.n_planes(), length, scores.numel(), scores.mutable_data_ptr<float>(),
                                 guard.stream()),
             "token_select_scores");
  return scores;
}

// --- select --------------------------------------------------------------------------------------------------------

std::tuple<Tensor, Tensor, Tensor> select_tokens(const Tensor& given_scores, const Tensor& given_candidates,
                                                 const std::optional<Tensor>& key_mask,
                                                 const std::optional<Tensor>& segments,
                                                 const std::optional<Tensor>& given_keep, std::optional<double> share,
                                                 std::optional<int64_t> count, int64_t min_keep, int64_t capacity,
                                                 int64_t layout, const std::optional<Tensor>& cu_seqlens) {
  check_shape("scores", given_scores, {kAny, kAny});
  check_dtype("scores", given_scores, ScalarType::Float);
  const StreamGuard guard(given_scores);
  const Tensor scores = torch::stable::contiguous(given_scores);
  const int64_t rows = scores.size(0), length = scores.size(1);
  check(rows * length < INT32_MAX, "scores: got shape ", shape_string(scores), ", expected fewer than 2^31 tokens");
  const auto candidates = checked("candidates", given_candidates, {rows, length}, ScalarType::Bool, scores);
  const auto real = checked("key_mask", key_mask, {rows, length}, ScalarType::Bool, scores);
  const auto segment_of = checked("segments", segments, {rows, length}, ScalarType::Long, scores);
  const auto cu = checked("cu_seqlens", cu_seqlens, {kAny}, ScalarType::Int, scores);
  check(layout >= kernels::kRight && layout <= kernels::kPacked, "layout: got ", layout, ", expected 0, 1 or 2");
  check(!cu || (rows == 1 && layout == kernels::kPacked && cu->size(0) >= 1), "cu_seqlens: got ", rows,
        " rows and layout ", layout, ", expected 1 and 2");
  check(min_keep >= 0 && capacity >= 0, "got min_keep ", min_keep, " and capacity ", capacity, ", expected at least 0");
  check(given_keep.has_value() + share.has_value() + count.has_value() == 1,
        "keep, share, count: expected exactly one");
  const int64_t batch = cu ? cu->size(0) - 1 : rows;

  kernels::Budget budget{nullptr, nullptr, 1, 0, share.value_or(-1), count.value_or(0), min_keep};
  int64_t n_segments = segment_of ? length : 1;
  std::optional<Tensor> keep;
  if (given_keep) {
    const ScalarType type = given_keep->scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Long;
    if (given_keep->dim() == 2) {
      check(segment_of.has_value(), "keep: got shape ", shape_string(*given_keep), " without segments");
      n_segments = given_keep->size(1);
      keep = checked("keep", given_keep, {batch, n_segments}, type, scores);
      budget.sample_stride = n_segments;
      budget.segment_stride = 1;
    } else {
      keep = checked("keep", given_keep, {batch}, type, scores);
    }
    (type == ScalarType::Double) ? void(budget.shares = keep->const_data_ptr<double>())
                                 : void(budget.counts = keep->const_data_ptr<int64_t>());
  }

  Tensor index = torch::stable::new_empty(scores, {layout == kernels::kPacked ? 1 : batch, capacity}, ScalarType::Long);
  Tensor lengths = torch::stable::new_empty(scores, {batch}, ScalarType::Long);
  Tensor inverse = torch::stable::new_empty(scores, {rows, length}, ScalarType::Long);
  if (batch == 0) {
    torch::stable::fill_(index, -1);
    torch::stable::fill_(inverse, -1);
    return {index, lengths, inverse};
  }
  const kernels::Selection p{batch,
                             1,
                             length,
                             capacity,
                             n_segments,
                             scores.const_data_ptr<float>(),
                             pointer<bool>(candidates),
                             pointer<bool>(real),
                             pointer<int64_t>(segment_of),
                             pointer<int32_t>(cu),
                             budget,
                             static_cast<kernels::Layout>(layout),
                             index.mutable_data_ptr<int64_t>(),
                             lengths.mutable_data_ptr<int64_t>(),
                             inverse.mutable_data_ptr<int64_t>()};
  const kernels::Plan plan = kernels::select_plan(p);
  Tensor workspace = new_workspace(kernels::select_workspace_bytes(p, plan), scores);
  check_cuda(kernels::select(p, plan, workspace.mutable_data_ptr(), guard.stream()), "token_select_select");
  return {index, lengths, inverse};
}

// --- gather --------------------------------------------------------------------------------------------------------

// The dimensions behind the token's as heads of adjacent rows, if that is how they lie.
bool describe(const Tensor& t, int64_t first, kernels::Rows* rows) {
  const int64_t item = static_cast<int64_t>(t.element_size());
  rows->row_bytes = item;
  rows->heads = 1;
  rows->head_stride = 0;
  for (int64_t d = t.dim() - 1; d >= first; --d) {
    const int64_t size = t.size(d), stride = t.stride(d) * item;
    if (size == 1) continue;
    if (rows->heads == 1 && stride == rows->row_bytes) {
      rows->row_bytes *= size;
    } else if (rows->heads == 1) {
      rows->heads = size;
      rows->head_stride = stride;
    } else if (stride == rows->heads * rows->head_stride) {
      rows->heads *= size;
    } else {
      return false;
    }
  }
  return true;
}

std::vector<Tensor> gather_tokens(const std::vector<Tensor>& tensors, const Tensor& index, std::vector<bool> planes,
                                  std::vector<double> fill, bool flat) {
  check_shape("index", index, {kAny, kAny});
  check_dtype("index", index, ScalarType::Long);
  check(planes.size() == tensors.size() && fill.size() == tensors.size(), "planes, fill: got ", planes.size(), " and ",
        fill.size(), ", expected one for each of ", tensors.size(), " tensors");
  const StreamGuard guard(index);
  const Tensor places = torch::stable::contiguous(index);
  const int64_t columns = index.size(0) * index.size(1);
  check(columns < INT32_MAX, "index: got shape ", shape_string(index), ", expected fewer than 2^31 places");

  std::vector<Tensor> results, copies;
  kernels::Table table{0, 0, index.size(0), index.size(1), places.const_data_ptr<int64_t>(), flat, 0, {}};
  const auto launch = [&] {
    check_cuda(kernels::gather(table, guard.stream()), "token_select_gather");
    table.count = 0;
  };
  for (size_t i = 0; i < tensors.size(); ++i) {
    Tensor t = tensors[i];
    const int64_t first = planes[i] ? 1 : 0;
    check(t.dim() >= 2 + first, "tensors: got shape ", shape_string(t));
    check_same_device("tensors", t, index);
    const int64_t batch = t.size(first), length = t.size(first + 1);
    check(flat || batch == index.size(0), "tensors: got shape ", shape_string(t), " for an index of ", index.size(0),
          " samples");
    check(batch * length < INT32_MAX, "tensors: got shape ", shape_string(t), ", expected fewer than 2^31 tokens");
    std::vector<int64_t> shape;
    if (planes[i]) shape.push_back(t.size(0));
    shape.insert(shape.end(), {index.size(0), index.size(1)});
    for (int64_t d = 2 + first; d < t.dim(); ++d) shape.push_back(t.size(d));
    Tensor result = torch::stable::new_empty(t, shape);
    results.push_back(result);
    if (result.numel() == 0) continue;

    kernels::Rows rows{};
    if (!describe(t, 2 + first, &rows)) {
      t = torch::stable::contiguous(t);
      copies.push_back(t);
      describe(t, 2 + first, &rows);
    }
    const int64_t item = static_cast<int64_t>(t.element_size());
    rows.from = static_cast<const char*>(t.const_data_ptr());
    rows.to = static_cast<char*>(result.mutable_data_ptr());
    rows.planes = planes[i] ? t.size(0) : 1;
    rows.plane_stride = planes[i] ? t.stride(0) * item : 0;
    rows.sample_stride = t.stride(first) * item;
    rows.token_stride = t.stride(first + 1) * item;
    if (fill[i] != 0) {  // its bytes, as torch itself writes them
      const Tensor pattern = torch::stable::full({16 / item}, fill[i], t.scalar_type());
      std::memcpy(rows.fill, pattern.const_data_ptr(), sizeof(rows.fill));
    }
    // A launch serves tensors of one size of batch and as many as its arguments hold.
    if (table.count == kernels::kMaxTensors || (table.count && (table.batch != batch || table.length != length))) {
      launch();
    }
    table.batch = batch;
    table.length = length;
    table.tensors[table.count++] = rows;
  }
  launch();
  return results;
}

}  // namespace
}  // namespace lyra

STABLE_TORCH_LIBRARY_IMPL(lyra, CUDA, m) {
  m.impl("token_select_scores", TORCH_BOX(&lyra::token_scores));
  m.impl("token_select_select", TORCH_BOX(&lyra::select_tokens));
  m.impl("token_select_gather", TORCH_BOX(&lyra::gather_tokens));
}
