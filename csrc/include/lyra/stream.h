// torch's current CUDA stream, from a library that must also load where torch has no CUDA.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>

#include "lyra/check.h"

// Exported by libtorch_cuda.so alone, and declared by torch's header only under USE_CUDA. A strong reference would keep
// the library from loading on a CPU torch; a weak one is null there.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);

namespace lyra {

// Makes the tensor's device current for as long as it lives, and holds torch's current stream there.
class StreamGuard {
 public:
  explicit StreamGuard(const Tensor& t) : device_(t.get_device_index()) {
    check(aoti_torch_get_current_cuda_stream != nullptr,
          "torch's CUDA stream function was not found: this torch was built without CUDA");
    void* stream = nullptr;
    check(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream) == 0, "torch gave no current CUDA stream");
    stream_ = static_cast<cudaStream_t>(stream);
  }
  cudaStream_t stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard device_;
  cudaStream_t stream_ = nullptr;
};

// torch's own check macros refer to a symbol of libtorch_cuda.so, so the error is looked at here.
inline void check_cuda(cudaError_t error, const char* what) {
  check(error == cudaSuccess, what, ": CUDA error ", cudaGetErrorName(error), ", ", cudaGetErrorString(error));
}

}  // namespace lyra
