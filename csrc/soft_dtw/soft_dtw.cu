// Soft-DTW on a GPU: checks, allocation and registration. The schema stands in soft_dtw.cpp, the kernels in
// soft_dtw.cuh.
#include "soft_dtw.cuh"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <optional>
#include <tuple>

#include "lyra/check.h"
#include "lyra/stream.h"

namespace lyra {
namespace {

namespace kernels = lyra::soft_dtw;

void check_float(const char* name, const Tensor& t) {
  check(t.scalar_type() == ScalarType::Float || t.scalar_type() == ScalarType::Double, name, ": got dtype ",
        torch::headeronly::toString(t.scalar_type()), ", expected float32 or float64");
}

void check_lengths(const char* name, const Tensor& lengths, int64_t batch, const Tensor& as) {
  check_shape(name, lengths, {batch});
  check_dtype(name, lengths, ScalarType::Long);
  check_contiguous(name, lengths);
  check_same_device(name, lengths, as);
}

kernels::Problem checked_problem(const Tensor& cells, const Tensor& x_lengths, const Tensor& y_lengths, int64_t band) {
  const int64_t batch = cells.size(0), rows = cells.size(1), columns = cells.size(2);
  check(rows <= kernels::kMaxSize && columns <= kernels::kMaxSize, "cost: got ", rows, " x ", columns,
        " cells per pair, expected at most ", kernels::kMaxSize, " each way");
  check(batch <= INT32_MAX, "cost: got a batch of ", batch, ", expected at most ", INT32_MAX);
  check_lengths("x_lengths", x_lengths, batch, cells);
  check_lengths("y_lengths", y_lengths, batch, cells);
  check(band >= -1, "band: got ", band, ", expected -1 (none) or more");
  return {batch, rows, columns, x_lengths.const_data_ptr<int64_t>(), y_lengths.const_data_ptr<int64_t>(), band};
}

// Back with torch's allocator when the caller returns, for later work of the same stream.
Tensor new_workspace(const kernels::Problem& problem, const Tensor& as) {
  const int64_t element = as.scalar_type() == ScalarType::Float ? sizeof(float) : sizeof(double);
  return torch::stable::new_empty(as, {kernels::workspace_bytes(problem) / element});
}

// What the kernels do not serve yet. The public functions know, and send such calls elsewhere.
void refuse(const char* name, bool given) { check(!given, name, ": the CUDA kernels do not serve it"); }

std::tuple<Tensor, Tensor> forward(const Tensor& given, const Tensor& x_lengths, const Tensor& y_lengths, double gamma,
                                   const std::optional<Tensor>& gammas, int64_t band, const std::optional<Tensor>& low,
                                   const std::optional<Tensor>& high, const std::optional<Tensor>& drop, int64_t) {
  check_shape("cost", given, {kAny, kAny, kAny});
  check_float("cost", given);
  refuse("gammas", gammas.has_value());
  refuse("low, high", low.has_value() || high.has_value());
  refuse("drop", drop.has_value());
  check(gamma > 0 && std::isfinite(gamma) && std::isfinite(1.5 / gamma), "gamma: got ", gamma,
        ", expected a number > 0");
  const StreamGuard guard(given);
  const Tensor cost = given.stride(2) == 1 ? given : torch::stable::contiguous(given);
  const kernels::Problem problem = checked_problem(cost, x_lengths, y_lengths, band);
  Tensor value = torch::stable::new_empty(cost, {problem.batch});
  Tensor probs = torch::stable::new_empty(cost, {problem.batch, problem.rows, problem.columns, 2});
  Tensor workspace = new_workspace(problem, cost);
  const auto go = [&]<typename T>(T) {
    const kernels::Cost<T> cells{cost.const_data_ptr<T>(), cost.stride(0), cost.stride(1)};
    check_cuda(kernels::forward<T>(problem, cells, value.mutable_data_ptr<T>(), probs.mutable_data_ptr<T>(), gamma,
                                   workspace.mutable_data_ptr(), guard.stream()),
               "soft_dtw_forward");
  };
  cost.scalar_type() == ScalarType::Float ? go(float{}) : go(double{});
  return {value, probs};
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad_value, const Tensor& value, const Tensor& probs,
                                            const Tensor& x_lengths, const Tensor& y_lengths, int64_t rows,
                                            int64_t columns, int64_t band, const std::optional<Tensor>& low,
                                            const std::optional<Tensor>& high, bool dropping, bool hard,
                                            bool with_entropy) {
  check_shape("probs", probs, {kAny, rows, columns, 2});
  check_shape("value", value, {probs.size(0)});
  refuse("low, high", low.has_value() || high.has_value());
  refuse("dropping", dropping);
  refuse("hard", hard);
  refuse("with_entropy", with_entropy);
  check_float("probs", probs);
  check_contiguous("probs", probs);
  check_shape("grad_value", grad_value, {probs.size(0)});
  check_dtype("grad_value", grad_value, probs.scalar_type());
  check_same_device("grad_value", grad_value, probs);
  const StreamGuard guard(probs);
  const kernels::Problem problem = checked_problem(probs, x_lengths, y_lengths, band);
  Tensor grad_cost = torch::stable::new_empty(probs, {problem.batch, problem.rows, problem.columns});
  Tensor workspace = new_workspace(problem, probs);
  const auto go = [&]<typename T>(T) {
    check_cuda(
        kernels::backward<T>(problem, grad_value.const_data_ptr<T>(), grad_value.stride(0), probs.const_data_ptr<T>(),
                             grad_cost.mutable_data_ptr<T>(), workspace.mutable_data_ptr(), guard.stream()),
        "soft_dtw_backward");
  };
  probs.scalar_type() == ScalarType::Float ? go(float{}) : go(double{});
  return {grad_cost, torch::stable::new_empty(probs, {0}), torch::stable::new_empty(probs, {0})};
}

}  // namespace
}  // namespace lyra

STABLE_TORCH_LIBRARY_IMPL(lyra, CUDA, m) {
  m.impl("soft_dtw_forward", TORCH_BOX(&lyra::forward));
  m.impl("soft_dtw_backward", TORCH_BOX(&lyra::backward));
}
