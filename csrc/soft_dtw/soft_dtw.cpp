// Soft-DTW: the schema of the raw ops, and their CPU implementation; the sweeps themselves are in cpu/.
//
// Forward.  M_ij = C_ij + softmin_gamma(A_{i-1,j-1}, A_{i-1,j}, M_{i,j-1}), A_ij = M_ij or, with prices for dropped
// rows, softmin_gamma(M_ij, A_{i-1,j} + drop_i), A_{-1,-1} = 0, A_{i,-1} = drop_0 + .. + drop_i, value = A_{n-1,m-1}.
// With Z = exp(-R / gamma) the recursion is linear,
//     Z_ij = W_ij (Z_{i-1,j-1} + Z_{i-1,j} + Z_{i,j-1}),   W = exp(-C / gamma),   value = -gamma log Z_{n-1,m-1}.
// Z leaves any float's range within a few cells, so it is kept as mantissa in [1, 2) times 2^exponent, the exponent an
// integer of its own. No exp or log stands on the dependent chain, and the error does not grow with R / gamma, as it
// does when differences of a stored R are taken. gamma = 0 (hard DTW) sums costs in double instead.
//
// probs.  How the path came into each cell: the shares of (diagonal, up), and with dropping of matching, in fixed point
// (store 16 or 8 bits; 64: doubles, for float64 costs). Opaque bytes (B, S), S following from rows, columns, band,
// store and dropping alone, since another device cannot read the lengths; a band bounds it by about 8 N (w + 5) + 64 M
// bytes. What no pair needs is not written.
//
// Gradient.  Forward and, pair by pair, at once backward for grad_value = 1, so that the shares never leave the cache
// and take no memory but a thread's own: faster than the two, for who wants the gradient anyhow.
//
// Backward.  E_ij = share of E from the three successors, E_{n-1,m-1} = 1; grad_cost = grad_value E. A pure sum of
// products of numbers >= 0; on x86, results below the normal numbers are 0. Gradients outside the pair and the band are
// exactly 0. Without a path (value +inf) all are 0; value NaN makes those inside the pair and the band NaN.
//
// gamma: one for all; gammas (B): one per pair, > 0, else NaN for the pair. band: -1, or w >= 0 with the cells
// 2 |j (n-1) - i (m-1)| <= max(2 w (n-1), n + m - 2). low, high (B,N): first and last column that each row may match.
// A length outside 1..N or 1..M gives NaN as value and in all gradients of its pair alone, as does NaN or -inf among
// the pair's costs. Costs above min(2^50, 2^59 / (2n + m)) gamma ln 2 count as infinite, below minus that as -inf.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <numeric>
#include <optional>
#include <tuple>
#include <vector>

#include "cpu/pair.h"
#include "lyra/check.h"

STABLE_TORCH_LIBRARY_FRAGMENT(lyra, m) {
  m.def(
      "soft_dtw_forward(Tensor cost, Tensor x_lengths, Tensor y_lengths, float gamma, Tensor? gammas, int band,"
      " Tensor? low, Tensor? high, Tensor? drop, int store) -> (Tensor value, Tensor probs)");
  m.def(
      "soft_dtw_backward(Tensor grad_value, Tensor value, Tensor probs, Tensor x_lengths, Tensor y_lengths,"
      " SymInt rows, SymInt columns, int band, Tensor? low, Tensor? high, bool dropping, bool hard, bool with_entropy)"
      " -> (Tensor grad_cost, Tensor grad_drop, Tensor entropy)");
  m.def(
      "soft_dtw_gradient(Tensor cost, Tensor x_lengths, Tensor y_lengths, float gamma, Tensor? gammas, int band,"
      " Tensor? low, Tensor? high, Tensor? drop, int store, bool with_entropy)"
      " -> (Tensor value, Tensor grad_cost, Tensor grad_drop, Tensor entropy)");
  m.def(
      "soft_dtw_curvature(Tensor grad_value, Tensor value, Tensor probs, Tensor x_lengths, Tensor y_lengths,"
      " float gamma, Tensor? gammas, int band, Tensor? low, Tensor? high, bool dropping, Tensor along,"
      " Tensor? along_drop, Tensor? along_gamma)"
      " -> (Tensor slope, Tensor grad_cost, Tensor grad_drop, Tensor grad_gamma)");
}

namespace lyra {
namespace {

using namespace soft_dtw_cpu;
using OptionalTensor = std::optional<Tensor>;

void check_float(const char* name, const Tensor& t) {
  check(t.scalar_type() == ScalarType::Float || t.scalar_type() == ScalarType::Double, name, ": got dtype ",
        torch::headeronly::toString(t.scalar_type()), ", expected float32 or float64");
}

void prefer_large_pages(const Tensor& t) {
  soft_dtw_cpu::prefer_large_pages(t.data_ptr(), t.numel() * t.element_size());
}

// The arguments that say which cells there are, checked.
struct Batch {
  int64_t size, rows, columns, band;
  const int64_t *x_lengths, *y_lengths, *low = nullptr, *high = nullptr;
  bool dropping;

  Batch(int64_t size, int64_t rows, int64_t columns, const Tensor& x, const Tensor& y, int64_t band,
        const OptionalTensor& low_bound, const OptionalTensor& high_bound, bool dropping)
      : size(size), rows(rows), columns(columns), band(band), dropping(dropping) {
    check(rows >= 0 && columns >= 0, "rows, columns: got ", rows, ", ", columns, ", expected numbers >= 0");
    x_lengths = checked("x_lengths", x, {size});
    y_lengths = checked("y_lengths", y, {size});
    check(band >= -1, "band: got ", band, ", expected -1 (none) or more");
    check(low_bound.has_value() == high_bound.has_value(), "low, high: got one of them, expected both or none");
    if (!low_bound) return;
    check(band == -1, "band: got ", band, " with low and high, expected -1");
    low = checked("low", *low_bound, {size, rows});
    high = checked("high", *high_bound, {size, rows});
  }

  static const int64_t* checked(const char* name, const Tensor& t, std::initializer_list<int64_t> shape) {
    check_shape(name, t, shape);
    check_dtype(name, t, ScalarType::Long);
    check_contiguous(name, t);
    return t.const_data_ptr<int64_t>();
  }
  bool fits(int64_t b) const {
    return x_lengths[b] >= 1 && x_lengths[b] <= rows && y_lengths[b] >= 1 && y_lengths[b] <= columns;
  }
  Pair pair(int64_t b) const {
    const int64_t at = b * rows;
    return {x_lengths[b], y_lengths[b], band, low ? low + at : nullptr, high ? high + at : nullptr, dropping};
  }
  // Without stripes where a length is bad.
  Plan plan(int64_t b, int store) const {
    return Plan(fits(b) ? pair(b) : Pair{}, record_bytes(store, dropping), chained());
  }
  // Whether pairs are chains. What is kept must not depend on the number of threads, which may change before backward;
  // and a chain is one thread's, so threads want many pairs.
  bool chained() const { return size >= 16 && Pair{rows, columns, band, low, high, dropping}.chains(); }
  int64_t probs_bytes(int store) const { return most_steps(rows, columns, band) * record_bytes(store, dropping); }

  // Calls body(pair's index, together, workspace), for long pairs first: in parallel, or, if there are fewer than
  // threads and they can be shared at a gain, one after the other, all threads together.
  template <typename Body>
  void for_pairs(const Body& body) const {
    // What one core leaves to another has to be fetched from it, which may take longer than a smaller pair.
    constexpr int64_t kManyCells = int64_t{1} << 20;
    const bool shared = low == nullptr && !chained() && most_steps(rows, columns, band) * kLanes >= kManyCells;
    if (shared && size < torch::stable::get_num_threads()) {
      Workspace workspace;
      for (int64_t b = 0; b < size; ++b) body(b, true, workspace);
      return;
    }
    std::vector<int64_t> order(size);
    std::iota(order.begin(), order.end(), 0);
    const auto cells = [&](int64_t b) { return fits(b) ? x_lengths[b] * y_lengths[b] : 0; };
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return cells(a) > cells(b); });
    in_parallel(size, [&](int64_t k, Workspace& workspace) { body(order[k], false, workspace); });
  }
};

int checked_store(int64_t store, ScalarType dtype) {
  const bool fits = dtype == ScalarType::Double ? store == 0 || store == 64 : store == 0 || store == 8 || store == 16;
  check(fits, "store: got ", store, ", expected 0, or 16 or 8 for float32 and 64 for float64");
  return static_cast<int>(store);
}

void check_gamma(double gamma, const OptionalTensor& gammas, int64_t batch) {
  check(gamma >= 0 && std::isfinite(gamma) && (gamma == 0 || std::isfinite(1.5 / gamma)), "gamma: got ", gamma,
        ", expected a finite number >= 0");
  if (!gammas) return;
  check_shape("gammas", *gammas, {batch});
  check_float("gammas", *gammas);
  check_contiguous("gammas", *gammas);
}

double gamma_of(double gamma, const OptionalTensor& gammas, int64_t b) {
  if (!gammas) return gamma;
  const double own = gammas->scalar_type() == ScalarType::Float ? gammas->const_data_ptr<float>()[b]
                                                                : gammas->const_data_ptr<double>()[b];
  return own > 0 && std::isfinite(1.5 / own) ? own : std::numeric_limits<double>::quiet_NaN();
}

// End of the memory of a (B, N, M) tensor with adjacent columns.
template <typename S>
const S* end_of(const Tensor& t, const S* first) {
  if (t.numel() == 0) return first;
  return first + (t.size(0) - 1) * t.stride(0) + (t.size(1) - 1) * t.stride(1) + t.size(2);
}

// The arguments of a forward pass, checked.
struct Given {
  Tensor cost;
  Batch batch;
  double gamma;
  const OptionalTensor &gammas, &drop;
  int store;

  Given(const Tensor& given, const Tensor& x_lengths, const Tensor& y_lengths, double gamma,
        const OptionalTensor& gammas, int64_t band, const OptionalTensor& low, const OptionalTensor& high,
        const OptionalTensor& drop, int64_t store_as)
      : cost(checked(given)),
        batch(cost.size(0), cost.size(1), cost.size(2), x_lengths, y_lengths, band, low, high, drop.has_value()),
        gamma(gamma),
        gammas(gammas),
        drop(drop),
        store(checked_store(store_as, cost.scalar_type())) {
    check_gamma(gamma, gammas, batch.size);
    if (!drop) return;
    check_shape("drop", *drop, {batch.size, batch.rows});
    check_dtype("drop", *drop, cost.scalar_type());
    check_contiguous("drop", *drop);
  }

  static Tensor checked(const Tensor& cost) {
    check_shape("cost", cost, {kAny, kAny, kAny});
    check_float("cost", cost);
    return cost.stride(2) == 1 ? cost : torch::stable::contiguous(cost);
  }

  // Whether length and gamma are good; else value and gradients are NaN.
  bool fits(int64_t b) const { return batch.fits(b) && !std::isnan(gamma_of(gamma, gammas, b)); }
  template <typename S>
  Forward<S> pair(int64_t b, uint8_t* records) const {
    const S* first = cost.const_data_ptr<S>();
    return {batch.pair(b),
            {first + b * cost.stride(0), cost.stride(1), first, end_of(cost, first)},
            drop ? drop->const_data_ptr<S>() + b * batch.rows : nullptr,
            records,
            store,
            gamma_of(gamma, gammas, b)};
  }
};

std::tuple<Tensor, Tensor> forward(const Tensor& cost, const Tensor& x_lengths, const Tensor& y_lengths, double gamma,
                                   const OptionalTensor& gammas, int64_t band, const OptionalTensor& low,
                                   const OptionalTensor& high, const OptionalTensor& drop, int64_t store_as) {
  const Given given(cost, x_lengths, y_lengths, gamma, gammas, band, low, high, drop, store_as);
  const Batch& batch = given.batch;
  const int store = given.store;
  Tensor value = torch::stable::new_empty(cost, {batch.size});
  Tensor probs = torch::stable::new_empty(cost, {batch.size, batch.probs_bytes(store)}, ScalarType::Byte);
  prefer_large_pages(probs);
  const auto go = [&]<typename S>(S) {
    batch.for_pairs([&](int64_t b, bool together, Workspace&) {
      uint8_t* records = store == 0 ? nullptr : probs.mutable_data_ptr<uint8_t>() + b * probs.size(1);
      value.mutable_data_ptr<S>()[b] = given.fits(b)
                                           ? forward_pair(given.pair<S>(b, records), batch.plan(b, store), together)
                                           : std::numeric_limits<S>::quiet_NaN();
    });
  };
  cost.scalar_type() == ScalarType::Float ? go(float{}) : go(double{});
  return {value, probs};
}

// Returns how the shares are stored, which the size says.
int checked_probs(const Tensor& probs, const Tensor& value, const Batch& batch) {
  check_dtype("probs", probs, ScalarType::Byte);
  check_contiguous("probs", probs);
  check_shape("probs", probs, {batch.size, kAny});
  int store = value.scalar_type() == ScalarType::Double ? 64 : 16;
  if (store == 16 && probs.size(1) == batch.probs_bytes(8)) store = 8;
  check_shape("probs", probs, {batch.size, batch.probs_bytes(store)});
  return store;
}

std::tuple<Tensor, Tensor> new_gradients(const Tensor& as, const Batch& batch) {
  const std::vector<int64_t> by_row = {batch.size, batch.rows}, nothing = {0};
  Tensor cost = torch::stable::new_empty(as, {batch.size, batch.rows, batch.columns});
  prefer_large_pages(cost);
  return {cost, torch::stable::new_empty(as, batch.dropping ? by_row : nothing)};
}

// Of a result that has no finite value: NaN or, where there is no path, 0.
double no_number(double value) { return std::isinf(value) ? 0.0 : std::numeric_limits<double>::quiet_NaN(); }

// Fills what the sweep will not: the gradients on padding or, for a pair without a finite value, all of them. Returns
// whether there is a sweep to be made.
template <typename S>
bool fill_around(const Backward<S>& f, const Batch& batch, int64_t b, S value) {
  const bool fits = batch.fits(b), finite = fits && std::isfinite(value);
  const int64_t n = fits ? f.pair.n : 0, columns = f.columns;
  const S inside = static_cast<S>(no_number(value)), padding = fits ? S(0) : std::numeric_limits<S>::quiet_NaN();
  std::fill(f.grad_cost + n * columns, f.grad_cost + batch.rows * columns, padding);
  if (f.grad_drop != nullptr) std::fill(f.grad_drop + n, f.grad_drop + batch.rows, padding);
  if (finite) return true;
  std::fill(f.grad_cost, f.grad_cost + n * columns, S(0));
  for (int64_t i = 0; i < n; ++i) {
    const auto [first, last] = f.pair.window(i);
    if (first <= last) std::fill(f.grad_cost + i * columns + first, f.grad_cost + i * columns + last + 1, inside);
  }
  if (f.grad_drop != nullptr) std::fill(f.grad_drop, f.grad_drop + n, inside);
  return false;
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad_value, const Tensor& value, const Tensor& probs,
                                            const Tensor& x_lengths, const Tensor& y_lengths, int64_t rows,
                                            int64_t columns, int64_t band, const OptionalTensor& low,
                                            const OptionalTensor& high, bool dropping, bool, bool with_entropy) {
  check_shape("value", value, {kAny});
  check_float("value", value);
  check_contiguous("value", value);
  const Batch batch(value.size(0), rows, columns, x_lengths, y_lengths, band, low, high, dropping);
  check_shape("grad_value", grad_value, {batch.size});
  check_dtype("grad_value", grad_value, value.scalar_type());
  const int store = checked_probs(probs, value, batch);
  auto [grad_cost, grad_drop] = new_gradients(value, batch);
  Tensor entropy = torch::stable::new_empty(value, {with_entropy ? batch.size : 0});
  const auto go = [&]<typename S>(S) {
    batch.for_pairs([&](int64_t b, bool together, Workspace&) {
      const Backward<S> f{batch.pair(b),
                          grad_cost.mutable_data_ptr<S>() + b * rows * columns,
                          columns,
                          dropping ? grad_drop.mutable_data_ptr<S>() + b * rows : nullptr,
                          grad_value.const_data_ptr<S>()[b * grad_value.stride(0)],
                          probs.const_data_ptr<uint8_t>() + b * probs.size(1),
                          store,
                          with_entropy};
      const S* own = value.const_data_ptr<S>() + b;
      const bool swept = fill_around(f, batch, b, *own);
      const double bits = swept ? backward_pair(f, batch.plan(b, store), together) : no_number(*own);
      if (with_entropy) entropy.mutable_data_ptr<S>()[b] = static_cast<S>(bits);
    });
  };
  value.scalar_type() == ScalarType::Float ? go(float{}) : go(double{});
  return {grad_cost, grad_drop, entropy};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> gradient(const Tensor& cost, const Tensor& x_lengths,
                                                    const Tensor& y_lengths, double gamma, const OptionalTensor& gammas,
                                                    int64_t band, const OptionalTensor& low, const OptionalTensor& high,
                                                    const OptionalTensor& drop, int64_t store_as, bool with_entropy) {
  check(store_as != 0, "store: got 0, expected 16 or 8 for float32 and 64 for float64");
  const Given given(cost, x_lengths, y_lengths, gamma, gammas, band, low, high, drop, store_as);
  const Batch& batch = given.batch;
  const int store = given.store;
  Tensor value = torch::stable::new_empty(cost, {batch.size});
  auto [grad_cost, grad_drop] = new_gradients(cost, batch);
  Tensor entropy = torch::stable::new_empty(cost, {with_entropy ? batch.size : 0});
  const auto go = [&]<typename S>(S) {
    batch.for_pairs([&](int64_t b, bool together, Workspace& workspace) {
      const Backward<S> f{batch.pair(b), grad_cost.mutable_data_ptr<S>() + b * batch.rows * batch.columns,
                          batch.columns, batch.dropping ? grad_drop.mutable_data_ptr<S>() + b * batch.rows : nullptr,
                          S(1),          nullptr,
                          store,         with_entropy};
      double bits = 0;
      const auto wanted = [&](S found) {
        value.mutable_data_ptr<S>()[b] = found;
        const bool sweeps = fill_around(f, batch, b, found);
        if (!sweeps) bits = no_number(found);
        return sweeps;
      };
      if (given.fits(b)) {
        gradient_pair(given.pair<S>(b, nullptr), f, batch.plan(b, store), together, workspace, wanted, &bits);
      } else {
        wanted(std::numeric_limits<S>::quiet_NaN());
      }
      if (with_entropy) entropy.mutable_data_ptr<S>()[b] = static_cast<S>(bits);
    });
  };
  cost.scalar_type() == ScalarType::Float ? go(float{}) : go(double{});
  return {value, grad_cost, grad_drop, entropy};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> curvature(const Tensor& grad_value, const Tensor& value, const Tensor& probs,
                                                     const Tensor& x_lengths, const Tensor& y_lengths, double gamma,
                                                     const OptionalTensor& gammas, int64_t band,
                                                     const OptionalTensor& low, const OptionalTensor& high,
                                                     bool dropping, const Tensor& given,
                                                     const OptionalTensor& along_drop,
                                                     const OptionalTensor& along_gamma) {
  check_shape("along", given, {kAny, kAny, kAny});
  check_float("along", given);
  const Tensor along = given.stride(2) == 1 ? given : torch::stable::contiguous(given);
  const Batch batch(along.size(0), along.size(1), along.size(2), x_lengths, y_lengths, band, low, high, dropping);
  check_gamma(gamma, gammas, batch.size);
  check_shape("value", value, {batch.size});
  check_dtype("value", value, along.scalar_type());
  check_contiguous("value", value);
  check_shape("grad_value", grad_value, {batch.size});
  check_dtype("grad_value", grad_value, value.scalar_type());
  OptionalTensor drops, in_gamma;
  if (along_drop) {
    check(dropping, "along_drop: got a tensor, expected none without dropping");
    check_shape("along_drop", *along_drop, {batch.size, batch.rows});
    check_dtype("along_drop", *along_drop, value.scalar_type());
    drops = torch::stable::contiguous(*along_drop);
  }
  if (along_gamma) {
    check_shape("along_gamma", *along_gamma, {batch.size});
    check_dtype("along_gamma", *along_gamma, value.scalar_type());
    in_gamma = torch::stable::contiguous(*along_gamma);
  }
  const int store = checked_probs(probs, value, batch);
  auto [grad_cost, grad_drop] = new_gradients(value, batch);
  Tensor slope = torch::stable::new_empty(value, {batch.size});
  Tensor grad_gamma = torch::stable::new_empty(value, {batch.size});
  const auto go = [&]<typename S>(S) {
    const S* first = along.const_data_ptr<S>();
    batch.for_pairs([&](int64_t b, bool, Workspace&) {
      const double own = gamma_of(gamma, gammas, b);
      const S grad = grad_value.const_data_ptr<S>()[b * grad_value.stride(0)];
      const Curvature<S> f{{batch.pair(b), grad_cost.mutable_data_ptr<S>() + b * batch.rows * batch.columns,
                            batch.columns, dropping ? grad_drop.mutable_data_ptr<S>() + b * batch.rows : nullptr, grad,
                            probs.const_data_ptr<uint8_t>() + b * probs.size(1), store},
                           {first + b * along.stride(0), along.stride(1), first, end_of(along, first)},
                           drops ? drops->const_data_ptr<S>() + b * batch.rows : nullptr,
                           in_gamma ? static_cast<double>(in_gamma->const_data_ptr<S>()[b]) : 0.0,
                           gammas.has_value(),
                           own == 0 ? 0 : 1 / own};
      const S number = value.const_data_ptr<S>()[b];
      std::tuple<double, double> both{no_number(number), no_number(number)};
      if (fill_around(f.out, batch, b, number)) both = curvature_pair(f, batch.plan(b, store));
      slope.mutable_data_ptr<S>()[b] = static_cast<S>(std::get<0>(both));
      grad_gamma.mutable_data_ptr<S>()[b] = static_cast<S>(grad * std::get<1>(both));
    });
  };
  value.scalar_type() == ScalarType::Float ? go(float{}) : go(double{});
  return {slope, grad_cost, grad_drop, grad_gamma};
}

}  // namespace
}  // namespace lyra

STABLE_TORCH_LIBRARY_IMPL(lyra, CPU, m) {
  m.impl("soft_dtw_forward", TORCH_BOX(&lyra::forward));
  m.impl("soft_dtw_backward", TORCH_BOX(&lyra::backward));
  m.impl("soft_dtw_gradient", TORCH_BOX(&lyra::gradient));
  m.impl("soft_dtw_curvature", TORCH_BOX(&lyra::curvature));
}
