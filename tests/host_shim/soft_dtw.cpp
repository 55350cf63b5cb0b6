// The soft-DTW kernels of csrc/soft_dtw/soft_dtw.cuh, run on the CPU by lyra/host_cuda.h, as a Python module.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <string>
#include <vector>

#include "soft_dtw/soft_dtw.cuh"

namespace py = pybind11;
using namespace lyra::soft_dtw;

namespace {

template <class T>
using Array = py::array_t<T, py::array::c_style>;
using Lengths = Array<int64_t>;
template <class T>
using Maybe = std::optional<Array<T>>;
using Probs = Array<unsigned char>;

void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error("launch failed");
}

// Every bit set: NaN in floats, "not yet" for nobody, since the launches themselves make their words so.
template <class T>
Array<T> fresh(std::vector<int64_t> shape) {
  Array<T> array(shape);
  std::fill_n(reinterpret_cast<unsigned char*>(array.mutable_data()), array.nbytes(), 0xff);
  return array;
}

std::vector<char> memory(int64_t bytes) { return std::vector<char>(bytes, 0x7f); }

template <class T>
const T* data(const Maybe<T>& array) {
  return array ? array->data() : nullptr;
}

struct Arguments {
  int64_t batch, rows, columns;
  Lengths x_lengths, y_lengths;
  int64_t band;
  Maybe<int64_t> low, high;

  Problem problem(bool dropping) const {
    return {batch, rows, columns, x_lengths.data(), y_lengths.data(), band, data(low), data(high), dropping};
  }
};

Gamma gamma_of(double gamma, const Maybe<double>& gammas) { return {gamma, nullptr, data(gammas)}; }

template <class Format>
py::tuple run_forward_on_cpu(const Arguments& a, Array<typename Format::Real> cost, double gamma, Maybe<double> gammas,
                             Maybe<typename Format::Real> drop, bool keep) {
  using T = typename Format::Real;
  const Problem problem = a.problem(drop.has_value());
  auto value = fresh<T>({a.batch});
  auto probs = fresh<unsigned char>({a.batch, keep ? probs_bytes<Format>(problem) : 0});
  auto bytes = memory(workspace_bytes(problem, forward_words(problem)));
  const Cost<T> given{cost.data(), a.rows * a.columns, a.columns};
  check(forward<Format>(problem, gamma_of(gamma, gammas), given, data(drop), value.mutable_data(),
                        keep ? probs.mutable_data() : nullptr, bytes.data(), nullptr));
  return py::make_tuple(value, probs);
}

template <class Format>
py::tuple run_backward_on_cpu(const Arguments& a, Array<typename Format::Real> grad_value,
                              Array<typename Format::Real> value, Probs probs, bool dropping, bool with_entropy) {
  using T = typename Format::Real;
  const Problem problem = a.problem(dropping);
  auto grad_cost = fresh<T>({a.batch, a.rows, a.columns});
  auto grad_drop = fresh<T>({a.batch, dropping ? a.rows : 0});
  auto entropy = fresh<T>({with_entropy ? a.batch : 0});
  auto bytes = memory(workspace_bytes(problem, kBackwardWords));
  check(backward<Format>(problem, grad_value.data(), 1, value.data(), probs.data(),
                         {{grad_cost.mutable_data(), a.rows * a.columns, a.columns},
                          dropping ? grad_drop.mutable_data() : nullptr,
                          with_entropy ? entropy.mutable_data() : nullptr},
                         bytes.data(), nullptr));
  return py::make_tuple(grad_cost, grad_drop, entropy);
}

template <class Format>
py::tuple run_curvature_on_cpu(const Arguments& a, Array<typename Format::Real> grad_value,
                               Array<typename Format::Real> value, Probs probs, double gamma, Maybe<double> gammas,
                               bool dropping, Maybe<typename Format::Real> along,
                               Maybe<typename Format::Real> along_drop, Maybe<double> along_gamma) {
  using T = typename Format::Real;
  const Problem problem = a.problem(dropping);
  auto slope = fresh<T>({a.batch}), grad_cost = fresh<T>({a.batch, a.rows, a.columns});
  auto grad_drop = fresh<T>({a.batch, dropping ? a.rows : 0}), grad_gamma = fresh<T>({a.batch});
  auto bytes = memory(workspace_bytes(problem, kCurvatureWords)), turns = memory(turns_bytes<T>(problem));
  const Direction<T> direction{
      {data(along), a.rows * a.columns, a.columns}, data(along_drop), {0, nullptr, data(along_gamma)}};
  check(curvature<Format>(problem, gamma_of(gamma, gammas), direction, grad_value.data(), 1, value.data(), probs.data(),
                          slope.mutable_data(),
                          {{grad_cost.mutable_data(), a.rows * a.columns, a.columns},
                           dropping ? grad_drop.mutable_data() : nullptr,
                           grad_gamma.mutable_data()},
                          turns.data(), bytes.data(), nullptr));
  return py::make_tuple(slope, grad_cost, grad_drop, grad_gamma);
}

template <class Format>
void define(py::module_& m, const std::string& name) {
  m.def(("forward" + name).c_str(), &run_forward_on_cpu<Format>);
  m.def(("backward" + name).c_str(), &run_backward_on_cpu<Format>);
  m.def(("curvature" + name).c_str(), &run_curvature_on_cpu<Format>);
}

}  // namespace

PYBIND11_MODULE(LYRA_MODULE, m) {
  py::class_<Arguments>(m, "Arguments")
      .def(py::init<int64_t, int64_t, int64_t, Lengths, Lengths, int64_t, Maybe<int64_t>, Maybe<int64_t>>());
  define<Bits16>(m, "16");
  define<Bits8>(m, "8");
  define<Exact>(m, "64");
  m.def("configure", [](const std::string& order, unsigned seed, int resident) {
    auto& settings = lyra::host::settings();
    settings.order = order == "forward"   ? lyra::host::kForward
                     : order == "reverse" ? lyra::host::kReverse
                     : order == "lazy"    ? lyra::host::kLazy
                                          : lyra::host::kShuffled;
    settings.seed = seed;
    settings.resident = resident;
  });
}
