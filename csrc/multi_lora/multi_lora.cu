// Adapters chosen per token, on a GPU: checks, allocation and registration. The schemas stand in multi_lora.cpp.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

#include "checks.h"
#include "expand.cuh"
#include "lyra/stream.h"
#include "outer.cuh"
#include "plan.cuh"
#include "shrink.cuh"

namespace lyra {
namespace {

namespace kernels = lyra::multi_lora;
using kernels::check_rows, kernels::checked_floats, kernels::checked_ints, kernels::data;

int multiprocessors(const Tensor& t) {
  int count = 0;
  check_cuda(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, t.get_device_index()), "multi_lora");
  return count;
}

const float* checked_h(const Tensor& h, int64_t tokens) {
  check_shape("h", h, {tokens, kAny, kAny});
  check(tokens * h.size(1) <= INT32_MAX, "h: got ", tokens * h.size(1), " pairs, expected at most ", INT32_MAX);
  check(h.size(2) <= INT32_MAX, "h: got ", h.size(2), " columns, expected at most ", INT32_MAX);
  return checked_floats("h", h, {kAny, kAny, kAny}, h);
}

// Of the plan's tensors an op takes those that its kernels look at; the others stay null.
kernels::Plan sizes_of(const Tensor& h, const Tensor& table) {
  check_shape("table", table, {kAny, 3});
  kernels::Plan plan{};
  plan.tokens = h.size(0);
  plan.per_token = h.size(1);
  plan.adapters = table.size(0);
  check(plan.adapters <= INT32_MAX, "table: got ", plan.adapters, " adapters, expected at most ", INT32_MAX);
  return plan;
}

void add_pairs(kernels::Plan& plan, const Tensor& starts, const Tensor& pairs, const Tensor& chunks, const Tensor& as) {
  const int64_t all = plan.tokens * plan.per_token;
  plan.starts = checked_ints("starts", starts, {plan.adapters + 1}, as);
  plan.pairs = checked_ints("pairs", pairs, {all}, as);
  plan.chunk_rows = divide_up(all, kernels::kTile) + plan.adapters;
  plan.chunks = checked_ints("chunks", chunks, {plan.chunk_rows, 2}, as);
}

kernels::Mask checked_mask(const std::optional<Tensor>& seed, int64_t drop, const Tensor& as) {
  check(drop >= 0 && drop <= 65536, "drop: got ", drop, ", expected 0 to 65536");
  if (!seed) return {nullptr, 0};
  check_shape("seed", *seed, {1});
  check_dtype("seed", *seed, ScalarType::Long);
  check_same_device("seed", *seed, as);
  return {seed->const_data_ptr<int64_t>(), static_cast<int>(drop)};
}

// Calls f with a value of the kernels' type for the tensor's.
template <class F>
void with_type(const char* name, const Tensor& t, F f) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return f(float{});
    case ScalarType::BFloat16:
      return f(Bf16{});
    case ScalarType::Half:
      return f(Half{});
    default:
      fail(name, ": got dtype ", torch::headeronly::toString(t.scalar_type()),
           ", expected float32, bfloat16 or float16");
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> plan(const Tensor& ids, int64_t adapters) {
  check_shape("ids", ids, {kAny, kAny});
  check(ids.scalar_type() == ScalarType::Int || ids.scalar_type() == ScalarType::Long, "ids: got dtype ",
        torch::headeronly::toString(ids.scalar_type()), ", expected int32 or int64");
  check_contiguous("ids", ids);
  const int64_t tokens = ids.size(0), per_token = ids.size(1), pairs = tokens * per_token;
  check(pairs <= INT32_MAX, "ids: got ", pairs, ", expected at most ", INT32_MAX);
  check(adapters >= 1 && adapters <= kernels::kMaxPlanAdapters, "adapters: got ", adapters, ", expected 1 to ",
        kernels::kMaxPlanAdapters);
  const StreamGuard guard(ids);
  const auto ints = [&](std::initializer_list<int64_t> shape) {
    return torch::stable::new_empty(ids, shape, ScalarType::Int);
  };
  const int64_t chunk_rows = divide_up(pairs, kernels::kTile) + adapters;
  Tensor clean = ints({tokens, per_token}), starts = ints({adapters + 1}), list = ints({pairs});
  Tensor chunks = ints({chunk_rows, 2});
  Tensor present = ints({divide_up(tokens, kernels::kTile), divide_up(adapters, 32)});
  const auto go = [&]<class Id>(Id) {
    check_cuda(kernels::make_plan<Id>(
                   {ids.const_data_ptr<Id>(), tokens, per_token, adapters, clean.mutable_data_ptr<int>(),
                    starts.mutable_data_ptr<int>(), list.mutable_data_ptr<int>(), chunks.mutable_data_ptr<int>(),
                    chunk_rows, reinterpret_cast<uint32_t*>(present.mutable_data_ptr<int>())},
                   guard.stream()),
               "multi_lora_plan");
  };
  ids.scalar_type() == ScalarType::Int ? go(int{}) : go(int64_t{});
  return {clean, starts, list, chunks, present};
}

void shrink(Tensor h, const Tensor& x, const Tensor& bank, const Tensor& table, const Tensor& ids, const Tensor& starts,
            const Tensor& pairs, const Tensor& chunks, const Tensor&, const std::optional<Tensor>& seed, int64_t drop) {
  check_rows("x", x, h);
  checked_h(h, x.size(0));
  const StreamGuard guard(h);
  kernels::Plan plan = sizes_of(h, table);
  plan.ids = checked_ints("ids", ids, {plan.tokens, plan.per_token}, h);
  add_pairs(plan, starts, pairs, chunks, h);
  check_shape("bank", bank, {kAny, x.size(1)});
  check_dtype("bank", bank, x.scalar_type());
  check_contiguous("bank", bank);
  check_same_device("bank", bank, h);
  const kernels::Adapters adapters{checked_ints("table", table, {kAny, 3}, h), nullptr};
  const kernels::Mask mask = checked_mask(seed, drop, h);
  const int64_t size = x.size(1), width = h.size(2);
  const int count = multiprocessors(h);
  Tensor workspace = torch::stable::new_empty(h, {kernels::shrink_workspace(plan, size, width, count)});
  with_type("x", x, [&]<class T>(T) {
    check_cuda(
        kernels::shrink<T>(plan, adapters, mask, {data<T>(x), x.stride(0)}, data<T>(bank), size, width,
                           h.mutable_data_ptr<float>(), workspace.mutable_data_ptr<float>(), count, guard.stream()),
        "multi_lora_shrink_");
  });
}

void expand(Tensor y, const Tensor& h, const Tensor& bank, const Tensor& table, const Tensor& scaling,
            const Tensor& ids, const std::optional<Tensor>& weights, const Tensor& present,
            const std::optional<Tensor>& seed, int64_t drop) {
  check_rows("y", y, h);
  check_contiguous("y", y);
  const float* const shrunk = checked_h(h, y.size(0));
  const StreamGuard guard(y);
  kernels::Plan plan = sizes_of(h, table);
  plan.ids = checked_ints("ids", ids, {plan.tokens, plan.per_token}, y);
  plan.present = reinterpret_cast<const uint32_t*>(checked_ints("present", present, {plan.tiles(), plan.words()}, y));
  if (weights) plan.weights = checked_floats("weights", *weights, {plan.tokens, plan.per_token}, y);
  check_shape("bank", bank, {kAny, y.size(1)});
  check_dtype("bank", bank, y.scalar_type());
  check_contiguous("bank", bank);
  check_same_device("bank", bank, y);
  const kernels::Adapters adapters{checked_ints("table", table, {kAny, 3}, y),
                                   checked_floats("scaling", scaling, {plan.adapters}, y)};
  const kernels::Mask mask = checked_mask(seed, drop, y);
  with_type("y", y, [&]<class T>(T) {
    check_cuda(kernels::expand<T>(plan, adapters, mask, shrunk, h.size(2), data<T>(bank), y.size(1),
                                  static_cast<T*>(y.mutable_data_ptr()), guard.stream()),
               "multi_lora_expand_");
  });
}

// Into `out`, or a new tensor of so many rows.
Tensor outer_into(std::optional<Tensor> out, int64_t rows, const Tensor& h, const Tensor& z, const Tensor& table,
                  const Tensor& scaling, const std::optional<Tensor>& weights, const Tensor& starts,
                  const Tensor& pairs, const Tensor& chunks, const std::optional<Tensor>& seed, int64_t drop) {
  check_rows("z", z, h);
  const float* const shrunk = checked_h(h, z.size(0));
  check(rows >= 0, "rows: got ", rows, ", expected 0 or more");
  const StreamGuard guard(h);
  kernels::Plan plan = sizes_of(h, table);
  add_pairs(plan, starts, pairs, chunks, h);
  if (weights) plan.weights = checked_floats("weights", *weights, {plan.tokens, plan.per_token}, h);
  const kernels::Adapters adapters{checked_ints("table", table, {kAny, 3}, h),
                                   checked_floats("scaling", scaling, {plan.adapters}, h)};
  const kernels::Mask mask = checked_mask(seed, drop, h);
  const int64_t size = z.size(1), width = h.size(2);
  const int count = multiprocessors(h);
  const bool adds = out.has_value();
  if (adds) checked_floats("out", *out, {rows, size}, h);
  Tensor result = adds ? *out : torch::stable::new_empty(h, {rows, size});
  Tensor workspace = torch::stable::new_empty(h, {kernels::outer_workspace(plan, size, width, count)});
  with_type("z", z, [&]<class T>(T) {
    check_cuda(
        kernels::outer<T>(plan, adapters, mask, shrunk, width, {data<T>(z), z.stride(0)}, size, adds,
                          result.mutable_data_ptr<float>(), workspace.mutable_data_ptr<float>(), count, guard.stream()),
        "multi_lora_outer");
  });
  return result;
}

Tensor outer(const Tensor& h, const Tensor& z, const Tensor& table, const Tensor& scaling,
             const std::optional<Tensor>& weights, const Tensor& starts, const Tensor& pairs, const Tensor& chunks,
             const std::optional<Tensor>& seed, int64_t drop, int64_t rows) {
  return outer_into(std::nullopt, rows, h, z, table, scaling, weights, starts, pairs, chunks, seed, drop);
}

void add_outer(Tensor out, const Tensor& h, const Tensor& z, const Tensor& table, const Tensor& scaling,
               const std::optional<Tensor>& weights, const Tensor& starts, const Tensor& pairs, const Tensor& chunks,
               const std::optional<Tensor>& seed, int64_t drop) {
  check_shape("out", out, {kAny, kAny});
  outer_into(out, out.size(0), h, z, table, scaling, weights, starts, pairs, chunks, seed, drop);
}

}  // namespace
}  // namespace lyra

STABLE_TORCH_LIBRARY_IMPL(lyra, CUDA, m) {
  m.impl("multi_lora_plan", TORCH_BOX(&lyra::plan));
  m.impl("multi_lora_shrink_", TORCH_BOX(&lyra::shrink));
  m.impl("multi_lora_expand_", TORCH_BOX(&lyra::expand));
  m.impl("multi_lora_outer", TORCH_BOX(&lyra::outer));
  m.impl("multi_lora_add_outer_", TORCH_BOX(&lyra::add_outer));
}
