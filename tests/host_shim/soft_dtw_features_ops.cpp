// The ops of csrc/soft_dtw/soft_dtw.cu from features, registered for CPU tensors, their kernels run by the host shim.
#include <torch/csrc/stable/library.h>

// What the file itself registers, for CUDA, has no place here.
#undef STABLE_TORCH_LIBRARY_IMPL
#define STABLE_TORCH_LIBRARY_IMPL(ns, key, m) \
  [[maybe_unused]] static void left_out(torch::stable::detail::StableLibrary& m)
#include "soft_dtw/soft_dtw.cu"

_STABLE_TORCH_LIBRARY_IMPL(lyra, CPU, m, C10_UID) {
  m.impl("soft_dtw_features_forward", TORCH_BOX(&lyra::features_forward));
  m.impl("soft_dtw_features_backward", TORCH_BOX(&lyra::features_backward));
}
