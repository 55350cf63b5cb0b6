// Score, select and gather in one call, csrc/token_select/extract.cuh, and by the kernels of each step alone, run on
// the CPU by lyra/host_cuda.h, as a Python module.
#include <array>
#include <vector>

#include "token_select/extract.cuh"
#include "token_select_module.h"

using namespace lyra::token_select;

namespace {

// query (B,Hq,Lq,D), key (B,Hkv,L,D) as bits of bfloat16, adjacent; packed, of a batch of one. tensors: (from, to,
// planes, row_bytes, plane_stride, sample_stride, token_stride). Returns index, lengths, inverse and the number of
// launches.
py::tuple run(bool fused, Array<uint16_t> query, Array<uint16_t> key, Maybe<bool> query_mask, Maybe<bool> key_mask,
              Maybe<float> key_bias, Maybe<float> head_weights, Maybe<float> lse, bool causal, Array<bool> candidates,
              Maybe<float> bias, Maybe<int64_t> segment, int64_t segments, Maybe<int64_t> counts, double share,
              int64_t min_keep, int64_t capacity, int layout, bool complete,
              const std::vector<std::array<int64_t, 7>>& tensors, Maybe<int32_t> cu_q, Maybe<int32_t> cu_k) {
  const int64_t out_batch = query.shape(0), batch = cu_k ? cu_k->size() - 1 : out_batch, heads = query.shape(1),
                rows = query.shape(2), dim = query.shape(3);
  const int64_t kv_heads = key.shape(1), length = key.shape(2);
  std::vector<float> planes(static_cast<size_t>(out_batch * kv_heads * length), NAN);
  const Problem scored{batch,
                       heads,
                       kv_heads,
                       rows,
                       length,
                       dim,
                       {query.data(), heads * rows * dim, rows * dim, dim, 1, dim % 8 == 0},
                       {key.data(), kv_heads * length * dim, length * dim, dim, 1, dim % 8 == 0},
                       pointer(cu_q),
                       pointer(cu_k),
                       pointer(query_mask),
                       pointer(key_mask),
                       nullptr,
                       pointer(key_bias),
                       pointer(head_weights),
                       nullptr,
                       pointer(lse),
                       1.0f / static_cast<float>(std::sqrt(dim)),
                       causal,
                       false,
                       planes.data()};
  const bool per_segment = counts && counts->ndim() == 2;
  auto index = poisoned({layout == kPacked ? 1 : batch, capacity}), lengths = poisoned({batch});
  auto inverse = poisoned({out_batch, length});
  Selection p{batch,
              kv_heads,
              length,
              capacity,
              segments,
              planes.data(),
              pointer(bias),
              candidates.data(),
              pointer(key_mask),
              pointer(segment),
              pointer(cu_k),
              {pointer(counts), nullptr, per_segment ? segments : 1, per_segment ? 1 : 0, share, 0, min_keep},
              static_cast<Layout>(layout),
              complete,
              index.mutable_data(),
              lengths.mutable_data(),
              inverse.mutable_data()};
  Table table{out_batch, length, index.shape(0), capacity, index.data(), layout == kPacked && !cu_k, 0, {}};
  for (const auto& [from, to, n_planes, row_bytes, plane_stride, sample_stride, token_stride] : tensors) {
    table.tensors[table.count++] = {reinterpret_cast<const char*>(from),
                                    reinterpret_cast<char*>(to),
                                    n_planes,
                                    1,
                                    row_bytes,
                                    plane_stride,
                                    sample_stride,
                                    token_stride,
                                    0,
                                    {0x0101010101010101, 0x0101010101010101},
                                    0,
                                    0,
                                    0};
  }
  Memory workspace(Workspace().place(scored, nullptr));
  lyra::host::launches = 0;
  if (fused) {
    Memory more(extract_workspace_bytes(scored, p));
    check(extract<lyra::Bf16>(scored, p, table, workspace.at(), more.at(), nullptr));
    return py::make_tuple(index, lengths, inverse, lyra::host::launches);
  }
  check(score_planes<lyra::Bf16>(scored, workspace.at(), nullptr));
  std::vector<float> scores(static_cast<size_t>(out_batch * length), NAN);
  check(sum_planes(planes.data(), kv_heads, length, out_batch * length, scores.data(), nullptr));
  for (size_t i = 0; bias && i < scores.size(); ++i) scores[i] += bias->data()[i];
  p.planes = 1;
  p.scores = scores.data();
  p.bias = nullptr;
  Memory more(select_workspace_bytes(p, select_plan(p)));
  check(select(p, select_plan(p), more.at(), nullptr));
  check(gather(table, nullptr));
  return py::make_tuple(index, lengths, inverse, lyra::host::launches);
}

}  // namespace

PYBIND11_MODULE(LYRA_MODULE, m) {
  m.def("run", &run);
  m.def("configure", &configure);
}
