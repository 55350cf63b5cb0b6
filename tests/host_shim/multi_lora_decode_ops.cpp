// The op of csrc/multi_lora/decode.cu, registered for CPU tensors, its kernel run by the host shim.
#include <torch/csrc/stable/library.h>

// What the file itself registers, for CUDA, has no place here.
#undef STABLE_TORCH_LIBRARY_IMPL
#define STABLE_TORCH_LIBRARY_IMPL(ns, key, m) \
  [[maybe_unused]] static void left_out(torch::stable::detail::StableLibrary& m)
#include "multi_lora/decode.cu"

_STABLE_TORCH_LIBRARY_IMPL(lyra, CPU, m, C10_UID) { m.impl("multi_lora_decode", TORCH_BOX(&lyra::multi_lora_decode)); }
