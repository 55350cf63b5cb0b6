// The kernels of csrc/soft_dtw/features.cuh beside the sweeps, run on the CPU by lyra/host_cuda.h, as a Python module.
// 16-bit floats come and go as the uint16 that hold their bits.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <string>
#include <vector>

#include "soft_dtw/features.cuh"
#include "soft_dtw/soft_dtw.cuh"

namespace py = pybind11;
using namespace lyra::soft_dtw;

namespace {

template <class T>
using Array = py::array_t<T, py::array::c_style>;
using Lengths = Array<int64_t>;
using Probs = Array<unsigned char>;
template <class T>
using Maybe = std::optional<Array<T>>;

void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error("launch failed");
}

// Every bit set: NaN in floats.
template <class T>
Array<T> fresh(std::vector<int64_t> shape) {
  Array<T> array(shape);
  std::fill_n(reinterpret_cast<unsigned char*>(array.mutable_data()), array.nbytes(), 0xff);
  return array;
}

py::array fresh_as(const py::array& like, std::vector<int64_t> shape) {
  return like.itemsize() == 4 ? py::array(fresh<float>(shape)) : py::array(fresh<uint16_t>(shape));
}

// 16-byte aligned, as device memory is.
struct Memory {
  std::vector<lyra::Words4> data;
  explicit Memory(int64_t bytes) : data(bytes / 16 + 1) {
    std::fill_n(reinterpret_cast<unsigned char*>(data.data()), data.size() * 16, 0xff);
  }
  template <class T>
  T* as() {
    return reinterpret_cast<T*>(data.data());
  }
};

template <class T>
const T* data(const Maybe<T>& array) {
  return array ? array->data() : nullptr;
}

struct Arguments {
  std::string kind;
  float tau;
  Lengths x_lengths, y_lengths;
  int64_t band;
  Maybe<int64_t> low, high;
};

template <class T>
struct Given {
  Problem problem;
  Tokens<T> x, y;
  int64_t size;
  float scale;

  static Tokens<T> tokens(const py::array& a) {
    constexpr auto bytes = static_cast<py::ssize_t>(sizeof(T));
    return {static_cast<const T*>(a.data()), a.strides(0) / bytes, a.strides(1) / bytes};
  }
  Given(const Arguments& a, const py::array& x, const py::array& y, bool dropping)
      : problem{x.shape(0),  x.shape(1),   y.shape(1), a.x_lengths.data(), a.y_lengths.data(), a.band,
                data(a.low), data(a.high), dropping},
        x(tokens(x)),
        y(tokens(y)),
        size(x.shape(2)),
        scale(1 / a.tau) {}
};

// Calls f(T, Kind) for what the names stand for.
template <class F>
void with_types(const std::string& type, const std::string& kind, const F& f) {
  const auto with = [&](auto element) {
    if (kind == "sqeuclidean") return f(element, Squared());
    if (kind == "cosine") return f(element, Cosine());
    if (kind == "contrastive") return f(element, Contrastive());
    throw std::runtime_error("kind");
  };
  if (type == "float32") return with(float{});
  if (type == "bfloat16") return with(lyra::Bf16{});
  if (type == "float16") return with(lyra::Half{});
  throw std::runtime_error("type");
}

// The cost as a matrix (B, N, M): NaN where nothing is stored.
Array<float> run_cost_on_cpu(const std::string& type, const Arguments& a, py::array x, py::array y) {
  auto matrix = fresh<float>({x.shape(0), x.shape(1), y.shape(1)});
  with_types(type, a.kind, [&]<class T, class Kind>(T, Kind) {
    const Given<T> given(a, x, y, false);
    const Problem& p = given.problem;
    Memory cost(4 * p.batch * cells_per_pair<Kind>(p)), norms(4 * p.batch * (p.rows + p.columns));
    check(
        pair_cost<T, Kind>(p, given.x, given.y, given.size, given.scale, cost.as<float>(), norms.as<float>(), nullptr));
    const auto cells = cells_of<Kind>(p, cost.as<float>());
    for (int64_t b = 0; b < p.batch; ++b) {
      if (!lengths_in_range(p, b)) continue;
      const Pair pair(p, b, nullptr);
      for (int j = 0; j < pair.m; ++j) {
        const float* const column = cells.column(p, pair, b, j / kLanes, j % kLanes);
        const Range rows = cells.order == Order::kBand ? pair.rows_of_strip(j / kLanes) : Range{0, pair.n};
        for (int i = rows.begin; i < rows.end; ++i)
          matrix.mutable_at(b, i, j) = column[static_cast<int64_t>(i) * cells.row];
      }
    }
  });
  return matrix;
}

// As lyra::soft_dtw_features_forward, with shares of 16 bits: value, probs, costs, norms.
py::tuple run_forward_on_cpu(const std::string& type, const Arguments& a, py::array x, py::array y, double gamma,
                             Maybe<double> gammas, Maybe<float> drop) {
  const int64_t batch = x.shape(0), tokens = x.shape(1) + y.shape(1);
  auto value = fresh<float>({batch}), costs = value, norms = fresh<float>({batch, a.kind == "cosine" ? tokens : 0});
  auto probs = fresh<unsigned char>({0});
  with_types(type, a.kind, [&]<class T, class Kind>(T, Kind) {
    const Given<T> given(a, x, y, drop.has_value());
    const Problem& p = given.problem;
    costs = fresh<float>({batch, cells_per_pair<Kind>(p)});
    probs = fresh<unsigned char>({batch, probs_bytes<Bits16>(p)});
    Memory memory(workspace_bytes(p, forward_words(p)));
    check(pair_cost<T, Kind>(p, given.x, given.y, given.size, given.scale, costs.mutable_data(), norms.mutable_data(),
                             nullptr));
    check(forward<Bits16>(p, {gamma, nullptr, data(gammas)}, cells_of<Kind>(p, costs.data()), data(drop),
                          value.mutable_data(), probs.mutable_data(), memory.as<char>(), nullptr));
  });
  return py::make_tuple(value, probs, costs, norms);
}

// As lyra::soft_dtw_features_backward: grad_x, grad_y, grad_drop, entropy.
py::tuple run_backward_on_cpu(const std::string& type, const Arguments& a, Array<float> grad, Array<float> value,
                              Probs probs, Array<float> costs, Array<float> norms, py::array x, py::array y,
                              bool dropping, bool with_entropy, bool of_x, bool of_y) {
  const int64_t batch = x.shape(0), rows = x.shape(1), columns = y.shape(1), size = x.shape(2);
  auto grad_drop = fresh<float>({batch, dropping ? rows : 0}), entropy = fresh<float>({with_entropy ? batch : 0});
  py::array grad_x = fresh_as(x, {of_x ? batch : 0, rows, size});
  py::array grad_y = fresh_as(y, {of_y ? batch : 0, columns, size});
  with_types(type, a.kind, [&]<class T, class Kind>(T, Kind) {
    const Given<T> given(a, x, y, dropping);
    const Problem& p = given.problem;
    auto cells = fresh<float>({batch, cells_per_pair<Kind>(p)}), self = fresh<float>({batch, rows + columns});
    Memory memory(workspace_bytes(p, kBackwardWords));
    check(backward<Bits16>(p, nullptr, 0, value.data(), probs.data(),
                           {cells_of<Kind>(p, cells.mutable_data()), dropping ? grad_drop.mutable_data() : nullptr,
                            with_entropy ? entropy.mutable_data() : nullptr},
                           memory.as<char>(), nullptr));
    check(tokens_gradient<T, Kind>(p, given.x, given.y, given.size, given.scale, costs.data(), norms.data(),
                                   value.data(), grad.data(), 1, cells.mutable_data(), self.mutable_data(),
                                   of_x ? static_cast<T*>(grad_x.mutable_data()) : nullptr,
                                   of_y ? static_cast<T*>(grad_y.mutable_data()) : nullptr, nullptr));
  });
  return py::make_tuple(grad_x, grad_y, grad_drop, entropy);
}

}  // namespace

PYBIND11_MODULE(LYRA_MODULE, m) {
  py::class_<Arguments>(m, "Arguments")
      .def(py::init<std::string, float, Lengths, Lengths, int64_t, Maybe<int64_t>, Maybe<int64_t>>());
  m.def("cost", &run_cost_on_cpu);
  m.def("forward", &run_forward_on_cpu);
  m.def("backward", &run_backward_on_cpu);
  m.def("configure", [](const std::string& order, unsigned seed, int resident) {
    auto& settings = lyra::host::settings();
    settings.order = order == "forward"   ? lyra::host::kForward
                     : order == "reverse" ? lyra::host::kReverse
                                          : lyra::host::kShuffled;
    settings.seed = seed;
    settings.resident = resident;
  });
}
