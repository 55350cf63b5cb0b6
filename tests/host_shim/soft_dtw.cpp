// The soft-DTW kernels of csrc/soft_dtw/soft_dtw.cuh, run on the CPU by lyra/host_cuda.h, as a Python module.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include "soft_dtw/soft_dtw.cuh"

namespace py = pybind11;
using namespace lyra::soft_dtw;

namespace {

using Lengths = py::array_t<int64_t, py::array::c_style>;
template <class T>
using Array = py::array_t<T, py::array::c_style>;

void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error("launch failed");
}

template <class T>
void poison(Array<T>& array) {
  std::fill_n(array.mutable_data(), array.size(), static_cast<T>(NAN));
}

// The carry column may hold anything at first: NaN as mantissa, and a large exponent.
std::vector<char> workspace(const Problem& problem) {
  std::vector<char> bytes(workspace_bytes(problem));
  std::fill(bytes.begin(), bytes.end(), static_cast<char>(0x7f));
  return bytes;
}

template <class T>
py::tuple run_forward_on_cpu(Array<T> cost, Lengths x_lengths, Lengths y_lengths, double gamma, int64_t band) {
  const Problem problem{cost.shape(0), cost.shape(1), cost.shape(2), x_lengths.data(), y_lengths.data(), band};
  Array<T> value({problem.batch}), probs({problem.batch, problem.rows, problem.columns, int64_t{2}});
  poison(value);
  poison(probs);
  auto carry = workspace(problem);
  const Cost<T> given{cost.data(), problem.rows * problem.columns, problem.columns};
  check(forward<T>(problem, given, value.mutable_data(), probs.mutable_data(), gamma, carry.data(), nullptr));
  return py::make_tuple(value, probs);
}

template <class T>
Array<T> run_backward_on_cpu(Array<T> grad_value, Array<T> probs, Lengths x_lengths, Lengths y_lengths, int64_t band) {
  const Problem problem{probs.shape(0), probs.shape(1), probs.shape(2), x_lengths.data(), y_lengths.data(), band};
  Array<T> grad_cost({problem.batch, problem.rows, problem.columns});
  poison(grad_cost);
  auto carry = workspace(problem);
  check(backward<T>(problem, grad_value.data(), 1, probs.data(), grad_cost.mutable_data(), carry.data(), nullptr));
  return grad_cost;
}

}  // namespace

PYBIND11_MODULE(LYRA_MODULE, m) {
  m.def("forward", &run_forward_on_cpu<float>);
  m.def("forward", &run_forward_on_cpu<double>);
  m.def("backward", &run_backward_on_cpu<float>);
  m.def("backward", &run_backward_on_cpu<double>);
  m.def("configure", [](const std::string& order, unsigned seed, size_t shared_bytes) {
    auto& settings = lyra::host::settings();
    settings.order = order == "forward"   ? lyra::host::kForward
                     : order == "reverse" ? lyra::host::kReverse
                                          : lyra::host::kShuffled;
    settings.seed = seed;
    settings.shared_bytes = shared_bytes;
  });
  m.attr("LANES") = kLanes;
  m.attr("RING") = kRing;
}
