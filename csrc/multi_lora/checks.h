// What the ops of multi_lora on a GPU check, and how they come from tensors to pointers.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <initializer_list>

#include "lyra/check.h"

namespace lyra::multi_lora {

inline const int* checked_ints(const char* name, const Tensor& t, std::initializer_list<int64_t> shape,
                               const Tensor& as) {
  check_shape(name, t, shape);
  check_dtype(name, t, ScalarType::Int);
  check_contiguous(name, t);
  check_same_device(name, t, as);
  return t.const_data_ptr<int>();
}

inline const float* checked_floats(const char* name, const Tensor& t, std::initializer_list<int64_t> shape,
                                   const Tensor& as) {
  check_shape(name, t, shape);
  check_dtype(name, t, ScalarType::Float);
  check_contiguous(name, t);
  check_same_device(name, t, as);
  return t.const_data_ptr<float>();
}

inline void check_rows(const char* name, const Tensor& t, const Tensor& as) {
  check(t.dim() == 2 && (t.size(1) <= 1 || t.stride(1) == 1), name, ": got shape ", shape_string(t),
        " or a stride between columns, expected a matrix with adjacent columns");
  check_same_device(name, t, as);
}

template <class T>
const T* data(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}

}  // namespace lyra::multi_lora
