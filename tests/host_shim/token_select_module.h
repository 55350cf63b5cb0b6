// What the modules of token_select's kernels share: arrays that may be missing, device memory, the order of threads.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "lyra/launch.h"

namespace py = pybind11;

template <class T>
using Array = py::array_t<T, py::array::c_style>;
template <class T>
using Maybe = std::optional<Array<T>>;

template <class T>
const T* pointer(const Maybe<T>& array) {
  return array ? array->data() : nullptr;
}

inline void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error("launch failed");
}

// Device memory that holds anything, 16-byte aligned.
struct Memory {
  std::vector<char> bytes;
  explicit Memory(int64_t size) : bytes(static_cast<size_t>(size) + 16, 0x7f) {}
  void* at() { return reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(bytes.data()) + 15) & ~uintptr_t{15}); }
};

inline Array<int64_t> poisoned(const std::vector<int64_t>& shape) {
  Array<int64_t> array(shape);
  std::fill_n(array.mutable_data(), array.size(), int64_t{-77});
  return array;
}

inline void configure(const std::string& order, unsigned seed) {
  auto& settings = lyra::host::settings();
  settings.order = order == "forward"   ? lyra::host::kForward
                   : order == "reverse" ? lyra::host::kReverse
                                        : lyra::host::kShuffled;
  settings.seed = seed;
}
