// Token selection on a GPU: what the arguments come to for the kernels, allocation and registration. The schemas stand
// in token_select.cpp, the kernels and the checks of arguments in the headers beside this file.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "arguments.h"
#include "extract.cuh"
#include "gather.cuh"
#include "lyra/stream.h"
#include "scores.cuh"
#include "select.cuh"

namespace lyra {
namespace {

namespace kernels = lyra::token_select;

using kernels::pointer;
using kernels::ScoreArguments;
using kernels::SelectArguments;

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

struct Scoring {
  kernels::Problem problem;
  Tensor planes;
};

Scoring scoring(const ScoreArguments& a) {
  const int64_t most = kernels::kMaxWords * 4 / static_cast<int64_t>(a.query.element_size());
  check(a.dim <= most, "query: got head dimension ", a.dim, ", expected at most ", most);
  check(a.heads * a.rows < INT32_MAX, "query: got ", a.heads, " x ", a.rows, " rows, expected fewer than 2^31 - 1");
  Scoring s{{a.samples,
             a.heads,
             a.kv_heads,
             a.rows,
             a.length,
             a.dim,
             operand(a.query),
             operand(a.key),
             pointer<int32_t>(a.cu_q),
             pointer<int32_t>(a.cu_k),
             pointer<bool>(a.query_mask),
             pointer<bool>(a.key_mask),
             pointer<int32_t>(a.key_limits),
             pointer<float>(a.key_bias),
             pointer<float>(a.head_weights),
             pointer<double>(a.lse, ScalarType::Double),
             pointer<float>(a.lse, ScalarType::Float),
             static_cast<float>(a.scale),
             a.causal,
             a.per_head,
             nullptr},
            {}};
  const std::vector<int64_t> shape{a.batch, s.problem.n_planes(), a.length};
  s.planes = s.problem.is_empty() ? torch::stable::new_zeros(a.query, shape, ScalarType::Float)
                                  : torch::stable::new_empty(a.query, shape, ScalarType::Float);
  s.problem.planes = s.planes.mutable_data_ptr<float>();
  return s;
}

// go(T{}) for the type of query and key.
template <class Go>
void with_type(ScalarType type, const Go& go) {
  type == ScalarType::Float ? go(float{}) : type == ScalarType::Half ? go(Half{}) : go(Bf16{});
}

Tensor token_scores(const Tensor& query, const Tensor& key, const std::optional<Tensor>& query_mask,
                    const std::optional<Tensor>& key_mask, const std::optional<Tensor>& key_limits,
                    const std::optional<Tensor>& key_bias, const std::optional<Tensor>& head_weights, double scale,
                    bool causal, const std::optional<Tensor>& lse, bool per_head,
                    const std::optional<Tensor>& cu_seqlens_q, const std::optional<Tensor>& cu_seqlens_k) {
  const StreamGuard guard(query);
  const ScoreArguments a(query, key, query_mask, key_mask, key_limits, key_bias, head_weights, scale, causal, lse,
                         per_head, cu_seqlens_q, cu_seqlens_k);
  const Scoring s = scoring(a);
  Tensor workspace = new_workspace(kernels::Workspace().place(s.problem, nullptr), query);
  with_type(a.type, [&]<typename T>(T) {
    check_cuda(kernels::score_planes<T>(s.problem, workspace.mutable_data_ptr(), guard.stream()),
               "token_select_scores");
  });
  if (per_head) return s.planes;
  Tensor scores = torch::stable::new_empty(s.planes, {a.batch, a.length});
  check_cuda(kernels::sum_planes(s.problem.planes, s.problem.n_planes(), a.length, scores.numel(),
                                 scores.mutable_data_ptr<float>(), guard.stream()),
             "token_select_scores");
  return scores;
}

// --- select --------------------------------------------------------------------------------------------------------

struct Selecting {
  kernels::Selection selection;  // without scores
  Tensor index, lengths, inverse;
};

Selecting selecting(const SelectArguments& a, const Tensor& as) {
  check(a.rows * a.length < INT32_MAX, "scores: got ", a.rows, " x ", a.length,
        " tokens, expected fewer than 2^31 - 1");
  Selecting s{
      {},
      torch::stable::new_empty(as, {a.layout == kernels::kPacked ? 1 : a.samples, a.capacity}, ScalarType::Long),
      torch::stable::new_empty(as, {a.samples}, ScalarType::Long),
      torch::stable::new_empty(as, {a.rows, a.length}, ScalarType::Long)};
  s.selection = {a.samples,
                 1,
                 a.length,
                 a.capacity,
                 a.segments,
                 nullptr,
                 nullptr,
                 pointer<bool>(a.candidates),
                 pointer<bool>(a.key_mask),
                 pointer<int64_t>(a.segment),
                 pointer<int32_t>(a.cu_seqlens),
                 {pointer<int64_t>(a.keep, ScalarType::Long), pointer<double>(a.keep, ScalarType::Double),
                  a.per_segment() ? a.segments : 1, a.per_segment() ? 1 : 0, a.share.value_or(-1), a.count.value_or(0),
                  a.min_keep},
                 static_cast<kernels::Layout>(a.layout),
                 false,
                 s.index.mutable_data_ptr<int64_t>(),
                 s.lengths.mutable_data_ptr<int64_t>(),
                 s.inverse.mutable_data_ptr<int64_t>()};
  return s;
}

// Without samples the kernels write nothing.
void nothing_kept(Selecting& s) {
  torch::stable::fill_(s.index, -1);
  torch::stable::fill_(s.inverse, -1);
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
  const SelectArguments a(scores.size(0), scores.size(1), scores, candidates, key_mask, segments, keep, share, count,
                          min_keep, capacity, layout, cu_seqlens);
  Selecting s = selecting(a, scores);
  kernels::Selection& p = s.selection;
  p.scores = scores.const_data_ptr<float>();
  if (p.batch == 0) {
    nothing_kept(s);
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
  kernels::check_gather(tensors, index, planes, fill, flat);
  check(index.size(0) * index.size(1) < INT32_MAX, "index: got shape ", shape_string(index),
        ", expected fewer than 2^31 places");
  Gathering g;
  for (size_t i = 0; i < tensors.size(); ++i) {
    Tensor t = tensors[i];
    const int64_t first = planes[i] ? 1 : 0;
    const int64_t batch = t.size(first), length = t.size(first + 1);
    check(batch * length < INT32_MAX, "tensors: got shape ", shape_string(t), ", expected fewer than 2^31 tokens");
    Tensor result = torch::stable::new_empty(t, kernels::gathered_shape(t, index, planes[i]));
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
    std::vector<bool> planes, std::vector<double> fill, const std::optional<Tensor>& cu_seqlens_q,
    const std::optional<Tensor>& cu_seqlens_k) {
  const StreamGuard guard(query);
  const ScoreArguments a(query, key, query_mask, key_mask, key_limits, key_bias, head_weights, scale, causal, lse,
                         false, cu_seqlens_q, cu_seqlens_k);
  const int64_t batch = a.batch, length = a.length;
  const SelectArguments b(batch, length, query, candidates, key_mask, segments, keep, share, count, min_keep, capacity,
                          layout, cu_seqlens_k);
  const auto bias = kernels::checked("bias", given_bias, {batch, length}, {ScalarType::Float}, query);
  const Scoring scored = scoring(a);
  Selecting selected = selecting(b, query);
  kernels::Selection& p = selected.selection;
  p.planes = scored.problem.n_planes();
  p.scores = scored.problem.planes;
  p.bias = pointer<float>(bias);
  p.complete = true;
  const bool flat = layout == kernels::kPacked && !b.cu_seqlens;
  Gathering g = gathering(tensors, selected.index, planes, fill, flat);
  for (const kernels::Table& table : g.tables) {
    check(table.batch == batch && table.length == length, "tensors: got ", table.batch, " x ", table.length,
          " tokens, expected ", batch, " x ", length);
  }
  size_t done = 0;
  if (p.batch == 0) {
    nothing_kept(selected);
  } else {
    // The first table rides along with the selection, even if it is empty.
    if (g.tables.empty()) {
      g.tables.push_back({batch, length, selected.index.size(0), capacity, p.index, flat, 0, {}});
    }
    Tensor workspace = new_workspace(kernels::Workspace().place(scored.problem, nullptr), query);
    Tensor more = new_workspace(kernels::extract_workspace_bytes(scored.problem, p), query);
    with_type(a.type, [&]<typename T>(T) {
      check_cuda(kernels::extract<T>(scored.problem, p, g.tables[0], workspace.mutable_data_ptr(),
                                     more.mutable_data_ptr(), guard.stream()),
                 "token_select_extract");
    });
    done = 1;
  }
  for (; done < g.tables.size(); ++done) {
    check_cuda(kernels::gather(g.tables[done], guard.stream()), "token_select_extract");
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
