// What a kernel source needs to be compiled by nvcc for a GPU, or by g++ for the CPU (LYRA_HOST_CUDA, for tests alone).
//
// A .cuh that keeps to this runs on both: launch with `lyra::launch`, take dynamic shared memory from
// `lyra::dynamic_shared`, hand values from thread to thread through memory with `exchange_load` / `exchange_store`
// alone, which are plain accesses on a GPU and race-checked ones on the CPU, and call `spin_wait` while waiting for a
// flag. `post` and `peek` hand a 64-bit word from any thread of the launch to any other: whole, at once, and without
// ordering anything else, so the word itself must say that it is there. `warp_arrive` and `warp_await` hand over all
// that a warp has written.
#pragma once

#ifdef LYRA_HOST_CUDA
#include "lyra/host_cuda.h"
#else

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

namespace lyra {

template <class T>
__device__ __forceinline__ T exchange_load(const T* from) {
  return *from;
}

template <class T>
__device__ __forceinline__ void exchange_store(T* to, T value) {
  *to = value;
}

__device__ __forceinline__ uint64_t peek(const uint64_t* from) {
  uint64_t word;
  asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(word) : "l"(from));
  return word;
}

// Where `wanted`, without a branch.
__device__ __forceinline__ void post(uint64_t* to, uint64_t word, bool wanted = true) {
  asm volatile("{ .reg .pred p; setp.ne.u32 p, %2, 0; @p st.relaxed.gpu.global.u64 [%0], %1; }" ::"l"(to), "l"(word),
               "r"(static_cast<unsigned>(wanted)));
}

__device__ __forceinline__ void spin_wait() { __nanosleep(32); }

// Counts one more. The whole warp; what its lanes have written to global memory is there for who awaits the count.
__device__ __forceinline__ void warp_arrive(unsigned* count) {
  __syncwarp();
  if (threadIdx.x % 32 == 0) asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(count) : "memory");
}

// Until `wanted` have arrived; the whole warp. Only for what running warps will do: others might wait for this one.
__device__ __forceinline__ void warp_await(const unsigned* count, unsigned wanted) {
  if (threadIdx.x % 32 == 0) {
    for (;;) {
      unsigned arrived;
      asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(arrived) : "l"(count) : "memory");
      if (arrived >= wanted) break;
      spin_wait();
    }
  }
  __syncwarp();
}

__device__ __forceinline__ char* dynamic_shared() {
  extern __shared__ __align__(16) char lyra_dynamic_shared[];
  return lyra_dynamic_shared;
}

// Returns what the launch itself reports; never waits.
template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), int64_t blocks, int threads, size_t shared_bytes, cudaStream_t stream,
                   Arguments... arguments) {
  // More than 48 KB of shared memory is granted only on request, per kernel and device.
  if (shared_bytes > 48 * 1024) {
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
    if (error != cudaSuccess) return error;
  }
  kernel<<<static_cast<unsigned>(blocks), threads, shared_bytes, stream>>>(arguments...);
  return cudaGetLastError();
}

inline cudaError_t shared_bytes_per_block(size_t* bytes) {
  int device = 0, value = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&value, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  *bytes = static_cast<size_t>(value);
  return error;
}

}  // namespace lyra

#endif
