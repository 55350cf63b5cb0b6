// Wide instructions without compiler flags: a LYRA_SIMD function is compiled for several CPUs, and the one that fits is
// taken when the library is loaded. What it calls must be LYRA_INLINE, or it is compiled for the oldest CPU alone.
#pragma once

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define LYRA_SIMD __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define LYRA_SIMD
#endif
#define LYRA_INLINE __attribute__((always_inline)) inline
