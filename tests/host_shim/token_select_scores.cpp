// The scoring kernels of csrc/token_select/scores.cuh, run on the CPU by lyra/host_cuda.h, as a Python module.
#include <array>
#include <vector>

#include "token_select/scores.cuh"
#include "token_select_module.h"

using namespace lyra::token_select;

namespace {

using Strides = std::array<int64_t, 4>;

// query and key by address, sizes (B, Hq, Hkv, Lq, L, D) and strides in elements. Returns the planes (B, P, L) and
// their sum.
py::tuple run(const std::string& dtype, std::array<int64_t, 6> sizes, int64_t query, Strides q, int64_t key, Strides k,
              bool vectors, Maybe<bool> query_mask, Maybe<bool> key_mask, Maybe<int32_t> key_limits,
              Maybe<float> key_bias, Maybe<float> head_weights, Maybe<double> lse, float scale, bool causal,
              bool per_head, Maybe<int32_t> cu_q, Maybe<int32_t> cu_k) {
  const auto [batch, heads, kv_heads, rows, keys, dim] = sizes;
  const int64_t out_batch = cu_q ? 1 : batch;
  const bool single = lse && batch % 2 == 1;  // given in either precision
  std::vector<float> lse_single;
  if (single) lse_single.assign(lse->data(), lse->data() + lse->size());
  Problem p{batch,
            heads,
            kv_heads,
            rows,
            keys,
            dim,
            {reinterpret_cast<const void*>(query), q[0], q[1], q[2], q[3], vectors},
            {reinterpret_cast<const void*>(key), k[0], k[1], k[2], k[3], vectors},
            pointer(cu_q),
            pointer(cu_k),
            pointer(query_mask),
            pointer(key_mask),
            pointer(key_limits),
            pointer(key_bias),
            pointer(head_weights),
            single ? nullptr : pointer(lse),
            single ? lse_single.data() : nullptr,
            scale,
            causal,
            per_head,
            nullptr};

  py::array_t<float> planes({out_batch, p.n_planes(), keys}), scores({out_batch, keys});
  std::fill_n(planes.mutable_data(), planes.size(), NAN);
  std::fill_n(scores.mutable_data(), scores.size(), NAN);
  p.planes = planes.mutable_data();
  Memory workspace(Workspace().place(p, nullptr));
  check(dtype == "float32"    ? score_planes<float>(p, workspace.at(), nullptr)
        : dtype == "bfloat16" ? score_planes<lyra::Bf16>(p, workspace.at(), nullptr)
                              : score_planes<lyra::Half>(p, workspace.at(), nullptr));
  check(sum_planes(p.planes, p.n_planes(), keys, scores.size(), scores.mutable_data(), nullptr));
  return py::make_tuple(planes, scores);
}

}  // namespace

PYBIND11_MODULE(LYRA_MODULE, m) {
  m.def("run", &run);
  m.def("configure", &configure);
}
