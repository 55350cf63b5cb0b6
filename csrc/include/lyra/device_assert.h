// Ends a kernel with an error, as torch's own device-side assertions do: whatever waits for the stream learns of it.
#pragma once

#include <cassert>

#include "lyra/launch.h"

// <cassert> declares it only where assertions are on; this one always is.
#if !defined(LYRA_HOST_CUDA) && defined(NDEBUG)
extern "C" __host__ __device__ void __assert_fail(const char* assertion, const char* file, unsigned line,
                                                  const char* function) noexcept __attribute__((__noreturn__));
#endif

namespace lyra {

__device__ __forceinline__ void device_assert(bool holds, const char* what) {
  if (holds) return;
#ifdef LYRA_HOST_CUDA
  host::device().fail(what);
#else
  __assert_fail(what, "lyra_ops", 0, "");
#endif
}

}  // namespace lyra
