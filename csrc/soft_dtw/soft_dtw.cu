// Soft-DTW on a GPU: checks, allocation and registration. The schemas stand in soft_dtw.cpp and features.cpp, the
// kernels in soft_dtw.cuh and features.cuh.
#include "soft_dtw.cuh"

#include "features.cuh"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <optional>
#include <string>
#include <tuple>

#include "lyra/check.h"
#include "lyra/stream.h"

namespace lyra {
namespace {

namespace kernels = lyra::soft_dtw;
using Maybe = std::optional<Tensor>;

void check_on(const char* name, const Tensor& t, std::initializer_list<int64_t> shape, ScalarType dtype,
              const Tensor& as) {
  check_shape(name, t, shape);
  check_dtype(name, t, dtype);
  check_contiguous(name, t);
  check_same_device(name, t, as);
}

void check_float(const char* name, const Tensor& t) {
  check(t.scalar_type() == ScalarType::Float || t.scalar_type() == ScalarType::Double, name, ": got dtype ",
        torch::headeronly::toString(t.scalar_type()), ", expected float32 or float64");
}

kernels::Problem checked_problem(const Tensor& as, int64_t batch, int64_t rows, int64_t columns,
                                 const Tensor& x_lengths, const Tensor& y_lengths, int64_t band, const Maybe& low,
                                 const Maybe& high, bool dropping) {
  check_on("x_lengths", x_lengths, {batch}, ScalarType::Long, as);
  check_on("y_lengths", y_lengths, {batch}, ScalarType::Long, as);
  check(band >= -1, "band: got ", band, ", expected -1 (none) or more");
  check(low.has_value() == high.has_value(), "low, high: got one without the other");
  check(band < 0 || !low, "band: got ", band, " beside low and high, expected -1");
  if (low) check_on("low", *low, {batch, rows}, ScalarType::Long, as);
  if (high) check_on("high", *high, {batch, rows}, ScalarType::Long, as);
  const kernels::Problem problem{batch,
                                 rows,
                                 columns,
                                 x_lengths.const_data_ptr<int64_t>(),
                                 y_lengths.const_data_ptr<int64_t>(),
                                 band,
                                 low ? low->const_data_ptr<int64_t>() : nullptr,
                                 high ? high->const_data_ptr<int64_t>() : nullptr,
                                 dropping};
  check(kernels::fits(problem), "cost: got ", batch, " pairs of ", rows, " x ", columns, " cells, expected at most ",
        kernels::kMaxSize, " each way and ", INT32_MAX, " strips of ", kernels::kLanes, " columns");
  return problem;
}

// gamma of all pairs, or, where there are, the tensor's.
kernels::Gamma checked_gamma(const char* name, double gamma, const Maybe& gammas, const Tensor& as) {
  check(gammas || (gamma >= 0 && std::isfinite(gamma) && (gamma == 0 || std::isfinite(1.5 / gamma))), name, ": got ",
        gamma, ", expected a number >= 0");
  if (!gammas) return {gamma, nullptr, nullptr};
  check_float(name, *gammas);
  check_on(name, *gammas, {as.size(0)}, gammas->scalar_type(), as);
  if (gammas->scalar_type() == ScalarType::Float) return {gamma, gammas->const_data_ptr<float>(), nullptr};
  return {gamma, nullptr, gammas->const_data_ptr<double>()};
}

template <class T>
const T* checked_rows(const char* name, const Maybe& given, const kernels::Problem& problem, const Tensor& as) {
  if (!given) return nullptr;
  check_on(name, *given, {problem.batch, problem.rows}, as.scalar_type(), as);
  return given->const_data_ptr<T>();
}

Tensor with_columns_adjacent(const Tensor& t) { return t.stride(2) == 1 ? t : torch::stable::contiguous(t); }

// Back with torch's allocator when the caller returns, for later work of the same stream.
Tensor new_bytes(int64_t bytes, const Tensor& as) { return torch::stable::new_empty(as, {bytes}, ScalarType::Byte); }

// Calls go(Format) for the format of `store`: 16, 8 or 64 bits a share.
template <class Go>
void with_format(int64_t store, const Go& go) {
  store == 64 ? go(kernels::Exact{}) : store == 8 ? go(kernels::Bits8{}) : go(kernels::Bits16{});
}

std::tuple<Tensor, Tensor> forward(const Tensor& given, const Tensor& x_lengths, const Tensor& y_lengths, double gamma,
                                   const Maybe& gammas, int64_t band, const Maybe& low, const Maybe& high,
                                   const Maybe& drop, int64_t store) {
  check_shape("cost", given, {kAny, kAny, kAny});
  check_float("cost", given);
  const bool is_double = given.scalar_type() == ScalarType::Double;
  check(store == 0 || (is_double ? store == 64 : store == 16 || store == 8), "store: got ", store,
        ", expected 0, or 64 for float64 and 16 or 8 for float32");
  const StreamGuard guard(given);
  const Tensor cost = with_columns_adjacent(given);
  const kernels::Problem problem = checked_problem(cost, cost.size(0), cost.size(1), cost.size(2), x_lengths, y_lengths,
                                                   band, low, high, drop.has_value());
  const kernels::Gamma own_gamma = checked_gamma("gamma", gamma, gammas, cost);
  Tensor value = torch::stable::new_empty(cost, {problem.batch});
  Tensor probs = value;
  Tensor memory = new_bytes(kernels::workspace_bytes(problem, kernels::forward_words(problem)), cost);
  with_format(is_double ? 64 : store, [&]<class Format>(Format) {
    using T = typename Format::Real;
    const int64_t bytes = store == 0 ? 0 : kernels::probs_bytes<Format>(problem);
    probs = torch::stable::new_empty(cost, {problem.batch, bytes}, ScalarType::Byte);
    const kernels::Cost<T> cells{cost.const_data_ptr<T>(), cost.stride(0), cost.stride(1)};
    check_cuda(kernels::forward<Format>(
                   problem, own_gamma, cells, checked_rows<T>("drop", drop, problem, cost), value.mutable_data_ptr<T>(),
                   bytes ? probs.mutable_data_ptr<uint8_t>() : nullptr, memory.mutable_data_ptr(), guard.stream()),
               "soft_dtw_forward");
  });
  return {value, probs};
}

// Which format `probs` (B, bytes) of forward has.
int64_t store_of(const Tensor& probs, const Tensor& value, const kernels::Problem& problem) {
  check(probs.dim() == 2 && probs.size(0) == problem.batch, "probs: got shape ", shape_string(probs), ", expected (",
        problem.batch, ", bytes)");
  check_on("probs", probs, {kAny, kAny}, ScalarType::Byte, value);
  const int64_t bytes = probs.size(1);
  if (value.scalar_type() == ScalarType::Double) {
    check(bytes == kernels::probs_bytes<kernels::Exact>(problem), "probs: got ", bytes, " bytes per pair, expected ",
          kernels::probs_bytes<kernels::Exact>(problem));
    return 64;
  }
  const int64_t wide = kernels::probs_bytes<kernels::Bits16>(problem);
  const int64_t narrow = kernels::probs_bytes<kernels::Bits8>(problem);
  check(bytes == wide || bytes == narrow, "probs: got ", bytes, " bytes per pair, expected ", wide, " or ", narrow);
  return bytes == wide ? 16 : 8;
}

void check_values(const Tensor& grad_value, const Tensor& value, int64_t batch) {
  check_float("value", value);
  check_on("value", value, {batch}, value.scalar_type(), value);
  check_shape("grad_value", grad_value, {batch});
  check_dtype("grad_value", grad_value, value.scalar_type());
  check_same_device("grad_value", grad_value, value);
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad_value, const Tensor& value, const Tensor& probs,
                                            const Tensor& x_lengths, const Tensor& y_lengths, int64_t rows,
                                            int64_t columns, int64_t band, const Maybe& low, const Maybe& high,
                                            bool dropping, bool, bool with_entropy) {
  check_shape("value", value, {kAny});
  check(rows >= 0 && columns >= 0, "rows, columns: got ", rows, ", ", columns, ", expected >= 0");
  const int64_t batch = value.size(0);
  check_values(grad_value, value, batch);
  const StreamGuard guard(value);
  const kernels::Problem problem =
      checked_problem(value, batch, rows, columns, x_lengths, y_lengths, band, low, high, dropping);
  Tensor grad_cost = torch::stable::new_empty(value, {batch, rows, columns});
  Tensor grad_drop = dropping ? torch::stable::new_empty(value, {batch, rows}) : torch::stable::new_empty(value, {0});
  Tensor entropy = torch::stable::new_empty(value, {with_entropy ? batch : 0});
  Tensor memory = new_bytes(kernels::workspace_bytes(problem, kernels::kBackwardWords), value);
  with_format(store_of(probs, value, problem), [&]<class Format>(Format) {
    using T = typename Format::Real;
    const kernels::Gradients<T> gradients{{grad_cost.mutable_data_ptr<T>(), rows * columns, columns},
                                          dropping ? grad_drop.mutable_data_ptr<T>() : nullptr,
                                          with_entropy ? entropy.mutable_data_ptr<T>() : nullptr};
    check_cuda(kernels::backward<Format>(problem, grad_value.const_data_ptr<T>(), grad_value.stride(0),
                                         value.const_data_ptr<T>(), probs.const_data_ptr<uint8_t>(), gradients,
                                         memory.mutable_data_ptr(), guard.stream()),
               "soft_dtw_backward");
  });
  return {grad_cost, grad_drop, entropy};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> curvature(const Tensor& grad_value, const Tensor& value, const Tensor& probs,
                                                     const Tensor& x_lengths, const Tensor& y_lengths, double gamma,
                                                     const Maybe& gammas, int64_t band, const Maybe& low,
                                                     const Maybe& high, bool dropping, const Tensor& given,
                                                     const Maybe& given_drop, const Maybe& given_gamma) {
  check_shape("value", value, {kAny});
  check_shape("along", given, {value.size(0), kAny, kAny});
  check_dtype("along", given, value.scalar_type());
  check_same_device("along", given, value);
  check(dropping || !given_drop, "along_drop: got a tensor, expected none without dropping");
  const int64_t batch = value.size(0), rows = given.size(1), columns = given.size(2);
  check_values(grad_value, value, batch);
  const StreamGuard guard(value);
  const Tensor along = with_columns_adjacent(given);  // gradients often come expanded
  const Maybe along_drop = given_drop ? Maybe(torch::stable::contiguous(*given_drop)) : Maybe();
  const Maybe along_gamma = given_gamma ? Maybe(torch::stable::contiguous(*given_gamma)) : Maybe();
  const kernels::Problem problem =
      checked_problem(value, batch, rows, columns, x_lengths, y_lengths, band, low, high, dropping);
  const kernels::Gamma own_gamma = checked_gamma("gamma", gamma, gammas, value);
  const kernels::Gamma own_along_gamma = checked_gamma("along_gamma", 0, along_gamma, value);
  Tensor slope = torch::stable::new_empty(value, {batch});
  Tensor grad_cost = torch::stable::new_empty(value, {batch, rows, columns});
  Tensor grad_drop = dropping ? torch::stable::new_empty(value, {batch, rows}) : torch::stable::new_empty(value, {0});
  Tensor grad_gamma = torch::stable::new_empty(value, {batch});
  Tensor memory = new_bytes(kernels::workspace_bytes(problem, kernels::kCurvatureWords), value);
  with_format(store_of(probs, value, problem), [&]<class Format>(Format) {
    using T = typename Format::Real;
    Tensor turns = new_bytes(kernels::turns_bytes<T>(problem), value);
    const kernels::Direction<T> direction{{along.const_data_ptr<T>(), along.stride(0), along.stride(1)},
                                          checked_rows<T>("along_drop", along_drop, problem, value),
                                          own_along_gamma};
    const kernels::Gradients<T> gradients{{grad_cost.mutable_data_ptr<T>(), rows * columns, columns},
                                          dropping ? grad_drop.mutable_data_ptr<T>() : nullptr,
                                          grad_gamma.mutable_data_ptr<T>()};
    check_cuda(kernels::curvature<Format>(problem, own_gamma, direction, grad_value.const_data_ptr<T>(),
                                          grad_value.stride(0), value.const_data_ptr<T>(),
                                          probs.const_data_ptr<uint8_t>(), slope.mutable_data_ptr<T>(), gradients,
                                          turns.mutable_data_ptr(), memory.mutable_data_ptr(), guard.stream()),
               "soft_dtw_curvature");
  });
  return {slope, grad_cost, grad_drop, grad_gamma};
}

// --- from features

template <class T>
kernels::Tokens<T> tokens_of(const Tensor& t) {
  return {static_cast<const T*>(t.const_data_ptr()), t.stride(0), t.stride(1)};
}

void check_tokens(const Tensor& x, const Tensor& y) {
  check_shape("x", x, {kAny, kAny, kAny});
  check_shape("y", y, {x.size(0), kAny, x.size(2)});
  check_dtype("y", y, x.scalar_type());
  check_same_device("y", y, x);
}

// Calls go(T, Kind) for the tokens' type and the cost.
template <class Go>
void with_kind(const Tensor& x, const std::string& cost, const Go& go) {
  const auto with = [&](auto element) {
    if (cost == "sqeuclidean") return go(element, kernels::Squared());
    if (cost == "cosine") return go(element, kernels::Cosine());
    if (cost == "contrastive") return go(element, kernels::Contrastive());
    fail("cost: got ", cost, ", expected sqeuclidean, cosine or contrastive");
  };
  if (x.scalar_type() == ScalarType::Float) return with(float{});
  if (x.scalar_type() == ScalarType::BFloat16) return with(Bf16{});
  if (x.scalar_type() == ScalarType::Half) return with(Half{});
  fail("x: got dtype ", torch::headeronly::toString(x.scalar_type()), ", expected float32, bfloat16 or float16");
}

Tensor new_floats(std::initializer_list<int64_t> shape, const Tensor& as) {
  return torch::stable::new_empty(as, shape, ScalarType::Float);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> features_forward(const Tensor& given_x, const Tensor& given_y,
                                                            const Tensor& x_lengths, const Tensor& y_lengths,
                                                            const std::string& cost, double temperature, double gamma,
                                                            const Maybe& gammas, int64_t band, const Maybe& low,
                                                            const Maybe& high, const Maybe& drop, int64_t store) {
  check_tokens(given_x, given_y);
  check(store == 0 || store == 16 || store == 8, "store: got ", store, ", expected 0, 8 or 16");
  const StreamGuard guard(given_x);
  const Tensor x = with_columns_adjacent(given_x), y = with_columns_adjacent(given_y);
  const int64_t batch = x.size(0), rows = x.size(1), columns = y.size(1);
  const kernels::Problem problem =
      checked_problem(x, batch, rows, columns, x_lengths, y_lengths, band, low, high, drop.has_value());
  const kernels::Gamma own_gamma = checked_gamma("gamma", gamma, gammas, x);
  Tensor value = new_floats({batch}, x), costs = value, norms = value;
  Tensor probs = value;
  Tensor memory = new_bytes(kernels::workspace_bytes(problem, kernels::forward_words(problem)), x);
  with_kind(x, cost, [&]<class T, class Kind>(T, Kind) {
    constexpr bool is_cosine = kernels::is<Kind, kernels::Cosine>;
    costs = new_floats({batch, kernels::cells_per_pair<Kind>(problem)}, x);
    norms = new_floats({batch, is_cosine ? rows + columns : 0}, x);
    check_cuda(kernels::pair_cost<T, Kind>(problem, tokens_of<T>(x), tokens_of<T>(y), x.size(2),
                                           static_cast<float>(1 / temperature), costs.mutable_data_ptr<float>(),
                                           norms.mutable_data_ptr<float>(), guard.stream()),
               "soft_dtw_features_forward");
    with_format(store, [&]<class Format>(Format) {
      if constexpr (sizeof(typename Format::Real) == 4) {
        const int64_t bytes = store == 0 ? 0 : kernels::probs_bytes<Format>(problem);
        probs = torch::stable::new_empty(x, {batch, bytes}, ScalarType::Byte);
        check_cuda(kernels::forward<Format>(
                       problem, own_gamma, kernels::cells_of<Kind>(problem, costs.const_data_ptr<float>()),
                       checked_rows<float>("drop", drop, problem, value), value.mutable_data_ptr<float>(),
                       bytes ? probs.mutable_data_ptr<uint8_t>() : nullptr, memory.mutable_data_ptr(), guard.stream()),
                   "soft_dtw_features_forward");
      }
    });
    // Work that is under way still has the memory: the allocator gives it to later work of this stream alone.
    if (store == 0 || kernels::is<Kind, kernels::Squared>) costs = new_floats({batch, 0}, x);
  });
  return {value, probs, costs, norms};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> features_backward(
    const Tensor& grad_value, const Tensor& value, const Tensor& probs, const Tensor& costs, const Tensor& norms,
    const Tensor& given_x, const Tensor& given_y, const Tensor& x_lengths, const Tensor& y_lengths,
    const std::string& cost, double temperature, int64_t band, const Maybe& low, const Maybe& high, bool dropping,
    bool with_entropy, bool of_x, bool of_y) {
  check_tokens(given_x, given_y);
  const StreamGuard guard(given_x);
  const Tensor x = with_columns_adjacent(given_x), y = with_columns_adjacent(given_y);
  const int64_t batch = x.size(0), rows = x.size(1), columns = y.size(1), size = x.size(2);
  check_dtype("value", value, ScalarType::Float);
  check_same_device("value", value, x);
  check_values(grad_value, value, batch);
  const kernels::Problem problem =
      checked_problem(x, batch, rows, columns, x_lengths, y_lengths, band, low, high, dropping);
  Tensor grad_x = torch::stable::new_empty(x, {of_x ? batch : 0, rows, size});
  Tensor grad_y = torch::stable::new_empty(y, {of_y ? batch : 0, columns, size});
  Tensor grad_drop = dropping ? new_floats({batch, rows}, x) : new_floats({0}, x);
  Tensor entropy = new_floats({with_entropy ? batch : 0}, x);
  Tensor memory = new_bytes(kernels::workspace_bytes(problem, kernels::kBackwardWords), x);
  with_kind(x, cost, [&]<class T, class Kind>(T, Kind) {
    constexpr bool is_cosine = kernels::is<Kind, kernels::Cosine>;
    const int64_t per_pair = kernels::cells_per_pair<Kind>(problem);
    check_on("costs", costs, {batch, kernels::is<Kind, kernels::Squared> ? 0 : per_pair}, ScalarType::Float, x);
    check_on("norms", norms, {batch, is_cosine ? rows + columns : 0}, ScalarType::Float, x);
    Tensor cells = new_floats({batch, per_pair}, x);
    Tensor self = new_floats({batch, kernels::is<Kind, kernels::Contrastive> ? 0 : rows + columns}, x);
    // The expected alignment itself: in parts of 16 bits its size must not hang on that of grad_value.
    with_format(store_of(probs, value, problem), [&]<class Format>(Format) {
      if constexpr (sizeof(typename Format::Real) == 4) {
        const kernels::Gradients<float> gradients{kernels::cells_of<Kind>(problem, cells.mutable_data_ptr<float>()),
                                                  dropping ? grad_drop.mutable_data_ptr<float>() : nullptr,
                                                  with_entropy ? entropy.mutable_data_ptr<float>() : nullptr};
        check_cuda(kernels::backward<Format>(problem, nullptr, 0, value.const_data_ptr<float>(),
                                             probs.const_data_ptr<uint8_t>(), gradients, memory.mutable_data_ptr(),
                                             guard.stream()),
                   "soft_dtw_features_backward");
      }
    });
    if (!of_x && !of_y) return;
    check_cuda(kernels::tokens_gradient<T, Kind>(
                   problem, tokens_of<T>(x), tokens_of<T>(y), size, static_cast<float>(1 / temperature),
                   costs.const_data_ptr<float>(), norms.const_data_ptr<float>(), value.const_data_ptr<float>(),
                   grad_value.const_data_ptr<float>(), grad_value.stride(0), cells.mutable_data_ptr<float>(),
                   self.mutable_data_ptr<float>(), of_x ? static_cast<T*>(grad_x.mutable_data_ptr()) : nullptr,
                   of_y ? static_cast<T*>(grad_y.mutable_data_ptr()) : nullptr, guard.stream()),
               "soft_dtw_features_backward");
  });
  return {grad_x, grad_y, grad_drop, entropy};
}

}  // namespace
}  // namespace lyra

STABLE_TORCH_LIBRARY_IMPL(lyra, CUDA, m) {
  m.impl("soft_dtw_forward", TORCH_BOX(&lyra::forward));
  m.impl("soft_dtw_backward", TORCH_BOX(&lyra::backward));
  m.impl("soft_dtw_curvature", TORCH_BOX(&lyra::curvature));
  m.impl("soft_dtw_features_forward", TORCH_BOX(&lyra::features_forward));
  m.impl("soft_dtw_features_backward", TORCH_BOX(&lyra::features_backward));
}
