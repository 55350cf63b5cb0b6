// The multi-LoRA kernels of csrc/multi_lora/, run on the CPU by lyra/host_cuda.h, as a Python module.
// 16-bit floats come and go as the uint16 that hold their bits.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include "multi_lora/decode.cuh"
#include "multi_lora/expand.cuh"
#include "multi_lora/outer.cuh"
#include "multi_lora/plan.cuh"
#include "multi_lora/shrink.cuh"

namespace py = pybind11;
using namespace lyra;
using namespace lyra::multi_lora;

namespace {

template <class T>
using Array = py::array_t<T, py::array::c_style>;
using Ints = Array<int>;
using Floats = Array<float>;

void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error("launch failed");
}

Plan plan_of(const py::dict& plan) {
  const auto ints = [&](const char* name) { return plan[name].cast<Ints>(); };
  const py::object weights = plan["weights"];
  return {ints("ids").shape(0),
          ints("ids").shape(1),
          ints("starts").shape(0) - 1,
          ints("ids").data(),
          weights.is_none() ? nullptr : weights.cast<Floats>().data(),
          ints("starts").data(),
          ints("pairs").data(),
          ints("chunks").data(),
          ints("chunks").shape(0),
          reinterpret_cast<const uint32_t*>(ints("present").data())};
}

Mask mask_of(const py::dict& plan) {
  const py::object seed = plan["seed"];
  return {seed.is_none() ? nullptr : seed.cast<Array<int64_t>>().data(), plan["drop"].cast<int>()};
}

Adapters adapters_of(const Ints& table, const Floats& scaling) { return {table.data(), scaling.data()}; }

// Calls f with a value of the type that the array's name stands for.
template <class F>
void with_type(const std::string& type, F f) {
  if (type == "float32") return f(float{});
  if (type == "bfloat16") return f(lyra::Bf16{});
  if (type == "float16") return f(lyra::Half{});
  throw std::runtime_error("type");
}

template <class T>
T* data(const py::array& array) {
  return static_cast<T*>(const_cast<void*>(array.data()));
}

template <class T>
Rows<const T> rows(const py::array& array) {
  return {data<const T>(array), array.strides(0) / static_cast<py::ssize_t>(sizeof(T))};
}

// Workspace may hold anything.
std::vector<float> workspace(int64_t floats) { return std::vector<float>(floats, NAN); }

void run_shrink(const std::string& type, Floats h, py::array x, py::array bank, Ints table, py::dict plan,
                int multiprocessors) {
  const Plan p = plan_of(plan);
  const int64_t size = bank.shape(1), width = h.shape(2);
  auto space = workspace(shrink_workspace(p, size, width, multiprocessors));
  with_type(type, [&]<class T>(T) {
    check(shrink<T>(p, adapters_of(table, Floats()), mask_of(plan), rows<T>(x), data<const T>(bank), size, width,
                    h.mutable_data(), space.data(), multiprocessors, nullptr));
  });
}

void run_expand(const std::string& type, py::array y, Floats h, py::array bank, Ints table, Floats scaling,
                py::dict plan) {
  with_type(type, [&]<class T>(T) {
    check(expand<T>(plan_of(plan), adapters_of(table, scaling), mask_of(plan), h.data(), h.shape(2),
                    data<const T>(bank), bank.shape(1), data<T>(y), nullptr));
  });
}

// Into `out`, or added to it.
void run_outer(Floats out, const std::string& type, Floats h, py::array z, Ints table, Floats scaling, py::dict plan,
               int multiprocessors, bool adds) {
  const Plan p = plan_of(plan);
  const int64_t size = z.shape(1), width = h.shape(2);
  auto space = workspace(outer_workspace(p, size, width, multiprocessors));
  with_type(type, [&]<class T>(T) {
    check(outer<T>(p, adapters_of(table, scaling), mask_of(plan), h.data(), width, rows<T>(z), size, adds,
                   out.mutable_data(), space.data(), multiprocessors, nullptr));
  });
}

void run_decode(const std::string& type, py::array y, py::array x, py::array weight, py::object bias, py::array a,
                py::array b, Ints table, Floats scaling, py::dict plan, Ints counters, int64_t rank) {
  const Plan p = plan_of(plan);
  const int64_t inputs = weight.shape(1), outputs = weight.shape(0);
  auto space = workspace(decode::workspace(p, inputs, rank));
  const auto go = [&]<class T>(T) {
    check(decode::run<T>(p, adapters_of(table, scaling), rows<T>(x), rows<T>(weight),
                         bias.is_none() ? nullptr : data<const T>(bias.cast<py::array>()), data<const T>(a),
                         data<const T>(b), inputs, outputs, rank,
                         reinterpret_cast<decode::Counters*>(counters.mutable_data()), space.data(), data<T>(y),
                         nullptr));
  };
  type == "bfloat16" ? go(lyra::Bf16{}) : go(lyra::Half{});
}

template <class Id>
py::dict run_plan(Array<Id> given, int64_t adapters) {
  const int64_t tokens = given.shape(0), per_token = given.shape(1), pairs = tokens * per_token;
  const int64_t chunk_rows = divide_up(pairs, kTile) + adapters;
  Ints ids({tokens, per_token}), starts({adapters + 1}), list({pairs}), chunks({chunk_rows, int64_t{2}});
  Ints present({divide_up(tokens, kTile), divide_up(adapters, 32)});
  for (Ints* made : {&ids, &starts, &list, &chunks, &present}) std::fill_n(made->mutable_data(), made->size(), -77);
  const NewPlan<Id> plan{given.data(),        tokens,
                         per_token,           adapters,
                         ids.mutable_data(),  starts.mutable_data(),
                         list.mutable_data(), chunks.mutable_data(),
                         chunk_rows,          reinterpret_cast<uint32_t*>(present.mutable_data())};
  check(make_plan(plan, nullptr));
  py::dict result;
  result["ids"] = ids;
  result["starts"] = starts;
  result["pairs"] = list;
  result["chunks"] = chunks;
  result["present"] = present;
  return result;
}

}  // namespace

PYBIND11_MODULE(LYRA_MODULE, m) {
  m.def("shrink", &run_shrink);
  m.def("expand", &run_expand);
  m.def("outer", &run_outer);
  m.def("plan", &run_plan<int>);
  m.def("plan", &run_plan<int64_t>);
  m.def("decode", &run_decode);
  m.def(
      "configure",
      [](const std::string& order, unsigned seed, int resident) {
        auto& settings = lyra::host::settings();
        settings.order = order == "forward"   ? lyra::host::kForward
                         : order == "reverse" ? lyra::host::kReverse
                         : order == "lazy"    ? lyra::host::kLazy
                                              : lyra::host::kShuffled;
        settings.seed = seed;
        settings.resident = resident;
      },
      py::arg("order"), py::arg("seed"), py::arg("resident") = 0);
}
