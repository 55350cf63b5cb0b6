// Token selection on a GPU: checks, allocation and registration. The schemas stand in token_select.cpp, the kernels in
// the headers beside this file.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "extract.cuh"
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

// What the arguments of a call come to, and the tensors that it points into.
struct Scoring {
  kernels::Problem problem;
  ScalarType type;
  Tensor planes;
  std::vector<Tensor> held;

  template <class T>
  const T* hold(const std::optional<Tensor>& t) {
    if (t) held.push_back(*t);
    return pointer<T>(t);
  }
  // go(T{}) for the type of query and key.
  template <class Go>
  void with_type(const Go& go) const {
    type == ScalarType::Float ? go(float{}) : type == ScalarType::Half ? go(Half{}) : go(Bf16{});
  }
};

Scoring scoring(const Tensor& query, const Tensor& key, const std::optional<Tensor>& query_mask,
                const std::optional<Tensor>& key_mask, const std::optional<Tensor>& key_limits,
                const std::optional<Tensor>& key_bias, const std::optional<Tensor>& head_weights, double scale,
                bool causal, const std::optional<Tensor>& lse, bool per_head, const std::optional<Tensor>& cu_seqlens_q,
                const std::optional<Tensor>& cu_seqlens_k) {
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
  const auto cu_q = checked("cu_seqlens_q", cu_seqlens_q, {kAny}, ScalarType::Int, query);
  const auto cu_k = checked("cu_seqlens_k", cu_seqlens_k, {kAny}, ScalarType::Int, query);
  check(cu_q.has_value() == cu_k.has_value(), "cu_seqlens_q, cu_seqlens_k: expected both or neither");
  check(!cu_q || (out_batch == 1 && cu_q->size(0) >= 1 && cu_q->size(0) == cu_k->size(0)),
        "cu_seqlens_q, cu_seqlens_k: got ", out_batch, " rows, expected one, and two lists of one length");
  const int64_t batch = cu_q ? cu_q->size(0) - 1 : out_batch;
  const bool single = lse && lse->scalar_type() == ScalarType::Float;
  const auto given_lse =
      checked("lse", lse, {out_batch, heads, rows}, single ? ScalarType::Float : ScalarType::Double, query);

  Scoring s{{}, type, {}, {query, key}};
  s.problem = {batch,
               heads,
               kv_heads,
               rows,
               length,
               dim,
               operand(query),
               operand(key),
               s.hold<int32_t>(cu_q),
               s.hold<int32_t>(cu_k),
               s.hold<bool>(checked("query_mask", query_mask, {out_batch, rows}, ScalarType::Bool, query)),
               s.hold<bool>(checked("key_mask", key_mask, {out_batch, length}, ScalarType::Bool, query)),
               s.hold<int32_t>(checked("key_limits", key_limits, {out_batch, rows}, ScalarType::Int, query)),
               s.hold<float>(checked("key_bias", key_bias, {out_batch, length}, ScalarType::Float, query)),
               s.hold<float>(checked("head_weights", head_weights, {batch, heads}, ScalarType::Float, query)),
               single ? nullptr : s.hold<double>(given_lse),
               single ? s.hold<float>(given_lse) : nullptr,
               static_cast<float>(scale),
               causal,
               per_head,
               nullptr};
  const std::vector<int64_t> shape{out_batch, s.problem.n_planes(), length};
  s.planes = s.problem.is_short() ? torch::stable::new_empty(query, shape, ScalarType::Float)
                                  : torch::stable::new_zeros(query, shape, ScalarType::Float);
  s.problem.planes = s.planes.mutable_data_ptr<float>();
  return s;
}

Tensor token_scores(const Tensor& query, const Tensor& key, const std::optional<Tensor>& query_mask,
                    const std::optional<Tensor>& key_mask, const std::optional<Tensor>& key_limits,
                    const std::optional<Tensor>& key_bias, const std::optional<Tensor>& head_weights, double scale,
                    bool causal, const std::optional<Tensor>& lse, bool per_head,
                    const std::optional<Tensor>& cu_seqlens_q, const std::optional<Tensor>& cu_seqlens_k) {
  const StreamGuard guard(query);
  const Scoring s = scoring(query, key, query_mask, key_mask, key_limits, key_bias, head_weights, scale, causal, lse,
                            per_head, cu_seqlens_q, cu_seqlens_k);
  Tensor workspace = new_workspace(kernels::Workspace().place(s.problem, nullptr), query);
  s.with_type([&]<typename T>(T) {
    check_cuda(kernels::score_planes<T>(s.problem, workspace.mutable_data_ptr(), guard.stream()),
               "token_select_scores");
  });
  if (per_head) return s.planes;
  Tensor scores = torch::stable::new_empty(s.planes, {query.size(0), key.size(2)});
  check_cuda(kernels::sum_planes(s.problem.planes, s.problem.n_planes(), key.size(2), scores.numel(),
                                 scores.mutable_data_ptr<float>(), guard.stream()),
             "token_select_scores");
  return scores;
}

// --- select --------------------------------------------------------------------------------------------------------

struct Selecting {
  kernels::Selection selection;  // without scores
  Tensor index, lengths, inverse;
  std::vector<Tensor> held;
};

Selecting selecting(int64_t rows, int64_t length, const Tensor& as, const Tensor& given_candidates,
                    const std::optional<Tensor>& key_mask, const std::optional<Tensor>& segments,
                    const std::optional<Tensor>& given_keep, std::optional<double> share, std::optional<int64_t> count,
                    int64_t min_keep, int64_t capacity, int64_t layout, const std::optional<Tensor>& cu_seqlens) {
  check(rows * length < INT32_MAX, "scores: got ", rows, " x ", length, " tokens, expected fewer than 2^31");
  const auto candidates = checked("candidates", given_candidates, {rows, length}, ScalarType::Bool, as);
  const auto real = checked("key_mask", key_mask, {rows, length}, ScalarType::Bool, as);
  const auto segment_of = checked("segments", segments, {rows, length}, ScalarType::Long, as);
  const auto cu = checked("cu_seqlens", cu_seqlens, {kAny}, ScalarType::Int, as);
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
      keep = checked("keep", given_keep, {batch, n_segments}, type, as);
      budget.sample_stride = n_segments;
      budget.segment_stride = 1;
    } else {
      keep = checked("keep", given_keep, {batch}, type, as);
    }
    (type == ScalarType::Double) ? void(budget.shares = keep->const_data_ptr<double>())
                                 : void(budget.counts = keep->const_data_ptr<int64_t>());
  }

  Selecting s{{},
              torch::stable::new_empty(as, {layout == kernels::kPacked ? 1 : batch, capacity}, ScalarType::Long),
              torch::stable::new_empty(as, {batch}, ScalarType::Long),
              torch::stable::new_empty(as, {rows, length}, ScalarType::Long),
              {}};
  for (const auto& t : {candidates, real, segment_of, cu, keep}) {
    if (t) s.held.push_back(*t);
  }
  s.selection = {batch,
                 1,
                 length,
                 capacity,
                 n_segments,
                 nullptr,
                 nullptr,
                 pointer<bool>(candidates),
                 pointer<bool>(real),
                 pointer<int64_t>(segment_of),
                 pointer<int32_t>(cu),
                 budget,
                 static_cast<kernels::Layout>(layout),
                 false,
                 s.index.mutable_data_ptr<int64_t>(),
                 s.lengths.mutable_data_ptr<int64_t>(),
                 s.inverse.mutable_data_ptr<int64_t>()};
  return s;
}

std::tuple<Tensor, Tensor, Tensor> select_tokens(const Tensor& given_scores, const Tensor& candidates,
                                                 const std::optional<Tensor>& key_mask,
                                                 const std::optional<Tensor>& segments,
                                                 const std::optional<Tensor>& keep, std::optional<double> share,
                                                 std::optional<int64_t> count, int64_t min_keep, int64_t capacity,
                                                 int64_t layout, const std::optional<Tensor>& cu_seqlens) {
  check_shape("scores", given_scores, {kAny, kAny});
  check_dtype("scores", given_scores, ScalarType::Float);
  const StreamGuard guard(given_scores);
  const Tensor scores = torch::stable::contiguous(given_scores);
  Selecting s = selecting(scores.size(0), scores.size(1), scores, candidates, key_mask, segments, keep, share, count,
                          min_keep, capacity, layout, cu_seqlens);
  kernels::Selection& p = s.selection;
  p.scores = scores.const_data_ptr<float>();
  if (p.batch == 0) {
    torch::stable::fill_(s.index, -1);
    torch::stable::fill_(s.inverse, -1);
    return {s.index, s.lengths, s.inverse};
  }
  const kernels::Plan plan = kernels::select_plan(p);
  Tensor workspace = new_workspace(kernels::select_workspace_bytes(p, plan), scores);
  check_cuda(kernels::select(p, plan, workspace.mutable_data_ptr(), guard.stream()), "token_select_select");
  return {s.index, s.lengths, s.inverse};
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

// Results of the right shapes, and how they are filled from the tensors at the places of an index (rows, columns).
struct Gathering {
  std::vector<Tensor> results, held;
  std::vector<kernels::Table> tables;  // a launch each
};

Gathering gathering(const std::vector<Tensor>& tensors, const Tensor& index, const std::vector<bool>& planes,
                    const std::vector<double>& fill, bool flat) {
  check(planes.size() == tensors.size() && fill.size() == tensors.size(), "planes, fill: got ", planes.size(), " and ",
        fill.size(), ", expected one for each of ", tensors.size(), " tensors");
  check(index.size(0) * index.size(1) < INT32_MAX, "index: got shape ", shape_string(index),
        ", expected fewer than 2^31 places");
  Gathering g;
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
    g.results.push_back(result);
    if (result.numel() == 0) continue;

    kernels::Rows rows{};
    if (!describe(t, 2 + first, &rows)) {
      t = torch::stable::contiguous(t);
      describe(t, 2 + first, &rows);
    }
    g.held.push_back(t);
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
    if (g.tables.empty() || g.tables.back().count == kernels::kMaxTensors || g.tables.back().batch != batch ||
        g.tables.back().length != length) {
      g.tables.push_back({batch, length, index.size(0), index.size(1), index.const_data_ptr<int64_t>(), flat, 0, {}});
    }
    kernels::Table& table = g.tables.back();
    table.tensors[table.count++] = rows;
  }
  return g;
}

std::vector<Tensor> gather_tokens(const std::vector<Tensor>& tensors, const Tensor& index, std::vector<bool> planes,
                                  std::vector<double> fill, bool flat) {
  check_shape("index", index, {kAny, kAny});
  check_dtype("index", index, ScalarType::Long);
  const StreamGuard guard(index);
  const Tensor places = torch::stable::contiguous(index);
  const Gathering g = gathering(tensors, places, planes, fill, flat);
  for (const kernels::Table& table : g.tables) {
    check_cuda(kernels::gather(table, guard.stream()), "token_select_gather");
  }
  return g.results;
}

// --- all of it -----------------------------------------------------------------------------------------------------

std::tuple<Tensor, Tensor, Tensor, std::vector<Tensor>> extract_tokens(
    const Tensor& query, const Tensor& key, const Tensor& candidates, const std::vector<Tensor>& tensors,
    const std::optional<Tensor>& query_mask, const std::optional<Tensor>& key_mask,
    const std::optional<Tensor>& key_limits, const std::optional<Tensor>& key_bias,
    const std::optional<Tensor>& head_weights, double scale, bool causal, const std::optional<Tensor>& lse,
    const std::optional<Tensor>& given_bias, const std::optional<Tensor>& segments, const std::optional<Tensor>& keep,
    std::optional<double> share, std::optional<int64_t> count, int64_t min_keep, int64_t capacity, int64_t layout,
    std::vector<bool> planes, std::vector<double> fill) {
  const StreamGuard guard(query);
  const Scoring scored = scoring(query, key, query_mask, key_mask, key_limits, key_bias, head_weights, scale, causal,
                                 lse, false, std::nullopt, std::nullopt);
  const int64_t batch = query.size(0), length = key.size(2);
  Selecting selected = selecting(batch, length, scored.planes, candidates, key_mask, segments, keep, share, count,
                                 min_keep, capacity, layout, std::nullopt);
  const auto bias = checked("bias", given_bias, {batch, length}, ScalarType::Float, query);
  kernels::Selection& p = selected.selection;
  p.planes = scored.problem.n_planes();
  p.scores = scored.problem.planes;
  p.bias = pointer<float>(bias);
  p.complete = true;
  Gathering g = gathering(tensors, selected.index, planes, fill, layout == kernels::kPacked);
  for (const kernels::Table& table : g.tables) {
    check(table.batch == batch && table.length == length, "tensors: got ", table.batch, " x ", table.length,
          " tokens, expected ", batch, " x ", length);
  }
  if (batch == 0) {
    torch::stable::fill_(selected.index, -1);
    return {selected.index, selected.lengths, selected.inverse, g.results};
  }
  // The first table rides along with the selection, even if it is empty.
  if (g.tables.empty()) {
    g.tables.push_back({batch, length, selected.index.size(0), capacity, p.index, layout == kernels::kPacked, 0, {}});
  }
  Tensor workspace = new_workspace(kernels::Workspace().place(scored.problem, nullptr), query);
  Tensor more = new_workspace(kernels::extract_workspace_bytes(scored.problem, p), query);
  scored.with_type([&]<typename T>(T) {
    check_cuda(kernels::extract<T>(scored.problem, p, g.tables[0], workspace.mutable_data_ptr(),
                                   more.mutable_data_ptr(), guard.stream()),
               "token_select_extract");
  });
  for (size_t i = 1; i < g.tables.size(); ++i) {
    check_cuda(kernels::gather(g.tables[i], guard.stream()), "token_select_extract");
  }
  return {selected.index, selected.lengths, selected.inverse, g.results};
}

}  // namespace
}  // namespace lyra

STABLE_TORCH_LIBRARY_IMPL(lyra, CUDA, m) {
  m.impl("token_select_scores", TORCH_BOX(&lyra::token_scores));
  m.impl("token_select_select", TORCH_BOX(&lyra::select_tokens));
  m.impl("token_select_gather", TORCH_BOX(&lyra::gather_tokens));
  m.impl("token_select_extract", TORCH_BOX(&lyra::extract_tokens));
}
