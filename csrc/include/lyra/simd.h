// Wide instructions without compiler flags: a LYRA_SIMD function is compiled for several CPUs, and the one that fits is
// taken when the library is loaded. What it calls must be LYRA_INLINE, or it is compiled for the oldest CPU alone.
#pragma once

#ifdef __SSE__
#include <xmmintrin.h>
#endif

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define LYRA_SIMD __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define LYRA_SIMD
#endif
#define LYRA_INLINE __attribute__((always_inline)) inline

namespace lyra {

// While it lives, this thread's results below the normal numbers are 0: a CPU takes many times as long for each of
// them.
class FlushSubnormals {
 public:
#ifdef __SSE__
  FlushSubnormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ | _MM_FLUSH_ZERO_ON); }
  ~FlushSubnormals() { _mm_setcsr(before_); }

 private:
  unsigned before_;
#else
  FlushSubnormals() = default;
#endif
  FlushSubnormals(const FlushSubnormals&) = delete;
  FlushSubnormals& operator=(const FlushSubnormals&) = delete;
};

}  // namespace lyra
