// A layer and its adapters for few tokens, on a GPU: checks, allocation and registration.
#include "decode.cuh"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "checks.h"
#include "lyra/stream.h"

namespace lyra {
namespace {

namespace kernels = lyra::multi_lora;

// Rows that are read in pieces of 16 bytes.
void check_pieces(const char* name, const Tensor& t, const Tensor& as) {
  kernels::check_rows(name, t, as);
  check_dtype(name, t, as.scalar_type());
  check(
      t.size(1) % kPiece == 0 && t.stride(0) % kPiece == 0 && reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0,
      name, ": got ", t.size(1), " columns, ", t.stride(0),
      " from row to row, expected multiples of 8, and memory aligned to 16 bytes");
}

Tensor multi_lora_decode(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& a,
                         const Tensor& b, const Tensor& table, const Tensor& scaling, const Tensor& ids,
                         const std::optional<Tensor>& weights, const Tensor& present, Tensor counters, int64_t rank) {
  check_shape("x", x, {kAny, kAny});
  const int64_t inputs = x.size(1);
  check(x.size(0) <= kernels::decode::kTokens, "x: got ", x.size(0), " tokens, expected at most ",
        kernels::decode::kTokens);
  check_shape("weight", weight, {kAny, inputs});
  const int64_t outputs = weight.size(0);
  check_shape("a", a, {kAny, inputs});
  check_shape("b", b, {a.size(0), outputs});
  check_pieces("x", x, x);
  check_pieces("weight", weight, x);
  check_pieces("a", a, x);
  check_contiguous("a", a);
  check_dtype("b", b, x.scalar_type());
  check_contiguous("b", b);
  check_same_device("b", b, x);
  if (bias) {
    check_shape("bias", *bias, {outputs});
    check_dtype("bias", *bias, x.scalar_type());
    check_contiguous("bias", *bias);
    check_same_device("bias", *bias, x);
  }
  check_shape("table", table, {kAny, 3});
  check_shape("ids", ids, {x.size(0), kAny});
  check(rank >= 1 && rank <= a.size(0), "rank: got ", rank, ", expected 1 to ", a.size(0));
  const StreamGuard guard(x);
  kernels::Plan plan{};
  plan.tokens = x.size(0);
  plan.per_token = ids.size(1);
  plan.adapters = table.size(0);
  plan.ids = kernels::checked_ints("ids", ids, {plan.tokens, plan.per_token}, x);
  if (weights) plan.weights = kernels::checked_floats("weights", *weights, {plan.tokens, plan.per_token}, x);
  plan.present =
      reinterpret_cast<const uint32_t*>(kernels::checked_ints("present", present, {plan.tiles(), plan.words()}, x));
  const kernels::Adapters adapters{kernels::checked_ints("table", table, {kAny, 3}, x),
                                   kernels::checked_floats("scaling", scaling, {plan.adapters}, x)};
  kernels::checked_ints("counters", counters, {3}, x);
  auto* const counts = reinterpret_cast<kernels::decode::Counters*>(counters.mutable_data_ptr<int>());

  Tensor y = torch::stable::new_empty(x, {plan.tokens, outputs});
  Tensor partial = torch::stable::new_empty(x, {kernels::decode::workspace(plan, inputs, rank)}, ScalarType::Float);
  const auto go = [&]<class T>(T) {
    check_cuda(
        kernels::decode::run<T>(
            plan, adapters, {kernels::data<T>(x), x.stride(0)}, {kernels::data<T>(weight), weight.stride(0)},
            bias ? kernels::data<T>(*bias) : nullptr, kernels::data<T>(a), kernels::data<T>(b), inputs, outputs, rank,
            counts, partial.mutable_data_ptr<float>(), static_cast<T*>(y.mutable_data_ptr()), guard.stream()),
        "multi_lora_decode");
  };
  check(x.scalar_type() == ScalarType::BFloat16 || x.scalar_type() == ScalarType::Half, "x: got dtype ",
        torch::headeronly::toString(x.scalar_type()), ", expected bfloat16 or float16");
  x.scalar_type() == ScalarType::BFloat16 ? go(Bf16{}) : go(Half{});
  return y;
}

}  // namespace
}  // namespace lyra

STABLE_TORCH_LIBRARY_IMPL(lyra, CUDA, m) { m.impl("multi_lora_decode", TORCH_BOX(&lyra::multi_lora_decode)); }
