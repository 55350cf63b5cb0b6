// Copies from global to shared memory that go on while their thread computes (cp.async, sm_80 and later).
//
// A thread asks for copies, closes them into a group, and later waits for its older groups. What has landed is seen by
// the thread that waited; others see it behind a barrier after that. Between the request and the wait the destination
// holds anything.
//
// Under LYRA_HOST_CUDA a copy is NaN bits until its thread waits for it, and counts as a write at the request and at
// the wait: so a missing wait gives wrong numbers, and a missing barrier on either side is a race.
#pragma once

#include <cstdint>

#include "lyra/launch.h"

namespace lyra {

#ifdef LYRA_HOST_CUDA

inline void copy16_async(uint32_t* to, const void* from, bool exists) {
  host::device().begin_copy(to, exists ? from : nullptr);
}
inline void commit_copies() { host::device().commit_copies(); }
template <int kPending>
void wait_for_copies() {
  host::device().finish_copies(kPending);
}

#else

// 16 bytes, both ends aligned to 16, past the first-level cache. Zeros where nothing exists: then nothing is read.
__device__ __forceinline__ void copy16_async(uint32_t* to, const void* from, bool exists) {
  asm volatile(
      "cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(to))),
      "l"(from), "r"(exists ? 16 : 0)
      : "memory");
}
// Closes a group: the copies asked for since the last one.
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until all of this thread's groups but the newest kPending have landed.
template <int kPending>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

#endif

}  // namespace lyra
