// Checks at the border between torch and the kernels: what is wrong, what was got, what is expected.
// The public Python functions validate first and name the user's argument; these guard the raw ops, which must
// never crash nor read out of bounds whoever calls them. Failures reach Python as RuntimeError.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <initializer_list>
#include <sstream>
#include <stdexcept>
#include <string>

namespace lyra {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename... Args>
[[noreturn]] void fail(const Args&... args) {
  std::ostringstream message;
  (message << ... << args);
  throw std::runtime_error(message.str());
}

// A function, not a macro's `if`, so that it can stand anywhere an expression can.
template <typename... Args>
inline void check(bool ok, const Args&... args) {
  if (!ok) fail(args...);
}

inline std::string shape_string(const Tensor& t) {
  std::string s = "(";
  for (int64_t d = 0; d < t.dim(); ++d) s += (d ? ", " : "") + std::to_string(t.size(d));
  return s + ")";
}

constexpr int64_t kAny = -1;

// check_shape("cost", cost, {batch, kAny, cols})
inline void check_shape(const char* name, const Tensor& t, std::initializer_list<int64_t> want) {
  bool fits = t.dim() == static_cast<int64_t>(want.size());
  int64_t d = 0;
  for (auto size = want.begin(); fits && size != want.end(); ++size, ++d) fits = *size == kAny || *size == t.size(d);
  if (fits) return;
  std::string expected;
  for (int64_t size : want) {
    expected += (expected.empty() ? "" : ", ") + (size == kAny ? std::string("any") : std::to_string(size));
  }
  fail(name, ": got shape ", shape_string(t), ", expected (", expected, ")");
}

inline void check_dtype(const char* name, const Tensor& t, ScalarType want) {
  check(t.scalar_type() == want, name, ": got dtype ", torch::headeronly::toString(t.scalar_type()), ", expected ",
        torch::headeronly::toString(want));
}

inline void check_contiguous(const char* name, const Tensor& t) {
  check(t.is_contiguous(), name, ": got strided memory, expected a contiguous tensor");
}

inline void check_same_device(const char* name, const Tensor& t, const Tensor& as) {
  check(t.device() == as.device(), name, ": got a tensor on another device than the first argument's");
}

}  // namespace lyra
