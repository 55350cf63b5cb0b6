// Runs the source of a CUDA kernel on the CPU, for tests: g++ -DLYRA_HOST_CUDA, included by lyra/launch.h.
//
// The threads of a block are fibers on one CPU thread; blocks run one after the other. A fiber runs until it has to
// wait for others (barrier, shuffle, vote, spin), then `host::settings().order` says which of those that can run goes
// on, so a kernel that relies on an accident of timing shows it in one order or the other:
//   kForward / kReverse   always the lowest / highest thread that can run: one warp gets as far ahead as it may
//   kShuffled             any of them, drawn from `seed`
// Shared memory starts as NaN. `exchange_load` and `exchange_store` are checked for races, in whatever order the fibers
// happened to run: two accesses to a place by different threads, one of them a write, need a barrier between them
// (__syncthreads, or __syncwarp within a warp; a shuffle or vote orders no memory). A launch that met a race, a
// deadlock, or threads of a block at different barriers throws. What is handed over under a flag that the reader waits
// for with `spin_wait`, or by atomics, is not checked for races; the orders alone judge it.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <sstream>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
using cudaStream_t = void*;

struct uint3 {
  unsigned x = 0, y = 0, z = 0;
};
inline uint3 threadIdx, blockIdx, blockDim, gridDim;

namespace lyra {
namespace host {

enum Order { kForward, kReverse, kShuffled };

struct Settings {
  Order order = kForward;
  unsigned seed = 0;
  size_t shared_bytes = 227 * 1024;
};

inline Settings& settings() {
  static Settings s;
  return s;
}

constexpr int kWarp = 32;
constexpr size_t kStackBytes = 128 * 1024;

enum State { kReady, kAtBlockBarrier, kAtWarpOp, kSpinning, kDone };

struct Fiber {
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  ucontext_t entry;
  jmp_buf resume_at;
  bool started = false;
  State state = kReady;
  const char* waits_at = nullptr;  // name of the barrier or warp operation
  uint64_t value = 0;              // offered to the others there
  unsigned mask = 0;
};

// Who touched a place, and how many barriers it had passed.
struct Access {
  int block, thread;
  int64_t block_barriers, warp_barriers;
};

struct History {
  bool written = false;
  Access write;
  std::vector<Access> reads;  // since that write
};

class Device {
 public:
  void run(std::function<void()> kernel, int blocks, int threads, size_t shared_bytes) {
    kernel_ = std::move(kernel);
    while (static_cast<int>(fibers_.size()) < threads) fibers_.emplace_back();
    threads_ = threads;
    random_.seed(settings().seed);
    touched_.clear();
    error_.clear();
    idle_rounds_ = 0;
    blockDim = {static_cast<unsigned>(threads), 1, 1};
    gridDim = {static_cast<unsigned>(blocks), 1, 1};
    for (int b = 0; b < blocks && error_.empty(); ++b) {
      blockIdx = {static_cast<unsigned>(b), 0, 0};
      shared_.assign(shared_bytes / sizeof(uint64_t) + 2, ~uint64_t{0});  // NaN in any float type
      std::erase_if(touched_, [this](const auto& place) {
        return place.first >= shared_.data() && place.first < shared_.data() + shared_.size();
      });
      run_block();
    }
    if (!error_.empty()) throw std::runtime_error(error_);
  }

  char* shared() {  // 16-byte aligned
    const auto at = reinterpret_cast<uintptr_t>(shared_.data());
    return reinterpret_cast<char*>((at + 15) & ~uintptr_t{15});
  }

  // --- called by the running fiber

  uint64_t wait_for_block(const char* where, uint64_t value) {
    self().value = value;
    wait(kAtBlockBarrier, where);
    return block_result_;
  }

  void wait_for_warp(const char* where, unsigned mask, uint64_t value) {
    self().value = value;
    self().mask = mask;
    wait(kAtWarpOp, where);
  }

  // What a lane of the running fiber's warp offered to the operation just passed; its own if there is no such lane.
  uint64_t offered_by(int lane) const {
    const int thread = current_ / kWarp * kWarp + lane;
    const bool exists = lane >= 0 && lane < kWarp && thread < threads_ && (fibers_[current_].mask >> lane & 1);
    return offered_[exists ? thread : current_];
  }

  void spin() { wait(kSpinning, "spin"); }
  int lane() const { return current_ % kWarp; }
  void warp_barrier_passed() { ++warp_barriers_[current_]; }

  void touch(const void* place, bool write) {
    const Access now{static_cast<int>(blockIdx.x), current_, block_barriers_, warp_barriers_[current_]};
    History& history = touched_[place];
    if (history.written && !ordered(history.write, now))
      report_race(write ? "write" : "read", now, "write", history.write);
    if (write) {
      for (const Access& read : history.reads) {
        if (!ordered(read, now)) report_race("write", now, "read", read);
      }
      history.reads.clear();
      history.write = now;
      history.written = true;
    } else {
      history.reads.push_back(now);
    }
  }

 private:
  Fiber& self() { return fibers_[current_]; }

  static bool ordered(const Access& a, const Access& b) {
    if (a.block != b.block) return false;
    return a.thread == b.thread || a.block_barriers != b.block_barriers ||
           (a.thread / kWarp == b.thread / kWarp && a.warp_barriers != b.warp_barriers);
  }

  void report_race(const char* what, const Access& now, const char* before, const Access& then) {
    if (!error_.empty()) return;
    std::ostringstream message;
    message << "race: block " << now.block << " thread " << now.thread << " has a " << what << " after a " << before
            << " of block " << then.block << " thread " << then.thread << " without a barrier between them";
    error_ = message.str();
    wait(kDone, "race");  // what it has read is wrong, so it may not go on
  }

  void run_block() {
    block_barriers_ = 0;
    warp_barriers_.assign(threads_, 0);
    offered_.assign(threads_, 0);
    for (int t = 0; t < threads_; ++t) {
      fibers_[t].started = false;
      fibers_[t].state = kReady;
    }
    int left = threads_;
    while (left > 0) {
      const int next = pick();
      if (next < 0) {
        if (release_block() || release_spinning()) continue;
        return report_deadlock();
      }
      resume(next);
      if (!error_.empty()) return;
      if (fibers_[next].state == kDone) --left;
      if (fibers_[next].state == kAtWarpOp) release_warp(next);
    }
  }

  int pick() {
    const int offset = settings().order == kShuffled ? static_cast<int>(random_() % threads_) : 0;
    for (int k = 0; k < threads_; ++k) {
      int t = (k + offset) % threads_;
      if (settings().order == kReverse) t = threads_ - 1 - t;
      if (fibers_[t].state == kReady) return t;
    }
    return -1;
  }

  void release_warp(int thread) {
    const int first = thread / kWarp * kWarp;
    const Fiber& one = fibers_[thread];
    for (int lane = 0; lane < kWarp && first + lane < threads_; ++lane) {
      const Fiber& f = fibers_[first + lane];
      if ((one.mask >> lane & 1) && (f.state != kAtWarpOp || f.mask != one.mask || f.waits_at != one.waits_at)) return;
    }
    for (int lane = 0; lane < kWarp && first + lane < threads_; ++lane) {
      if (!(one.mask >> lane & 1)) continue;
      offered_[first + lane] = fibers_[first + lane].value;
      fibers_[first + lane].state = kReady;
    }
  }

  bool release_block() {
    const char* where = nullptr;
    uint64_t any = 0;
    for (int t = 0; t < threads_; ++t) {
      const Fiber& f = fibers_[t];
      if (f.state == kDone) continue;
      if (f.state != kAtBlockBarrier || (where && f.waits_at != where)) return false;
      where = f.waits_at;
      any |= f.value;
    }
    block_result_ = any;
    ++block_barriers_;
    for (int t = 0; t < threads_; ++t) {
      if (fibers_[t].state == kAtBlockBarrier) fibers_[t].state = kReady;
    }
    return true;
  }

  bool release_spinning() {
    bool some = false;
    for (int t = 0; t < threads_; ++t) {
      if (fibers_[t].state != kSpinning) continue;
      fibers_[t].state = kReady;
      some = true;
    }
    return some && ++idle_rounds_ < 10000;
  }

  void report_deadlock() {
    std::ostringstream message;
    message << "deadlock in block " << blockIdx.x << ":";
    for (int t = 0; t < threads_; ++t) {
      if (fibers_[t].state != kDone && message.tellp() < 300)
        message << " thread " << t << " at " << fibers_[t].waits_at << ";";
    }
    if (error_.empty()) error_ = message.str();
  }

  // makecontext starts a fiber; from then on setjmp and longjmp switch, which unlike swapcontext cost no system call.
  void resume(int thread) {
    current_ = thread;
    threadIdx = {static_cast<unsigned>(thread), 0, 0};
    Fiber& fiber = fibers_[thread];
    if (_setjmp(scheduler_)) return;
    if (fiber.started) _longjmp(fiber.resume_at, 1);
    fiber.started = true;
    getcontext(&fiber.entry);
    fiber.entry.uc_stack.ss_sp = fiber.stack.get();
    fiber.entry.uc_stack.ss_size = kStackBytes;
    fiber.entry.uc_link = nullptr;
    makecontext(&fiber.entry, &Device::fiber_main, 0);
    setcontext(&fiber.entry);
  }

  static void fiber_main();

  void wait(State state, const char* where) {
    Fiber& fiber = self();
    fiber.state = state;
    fiber.waits_at = where;
    if (!_setjmp(fiber.resume_at)) _longjmp(scheduler_, 1);
  }

  std::function<void()> kernel_;
  std::vector<Fiber> fibers_;
  std::vector<uint64_t> shared_, offered_;
  std::vector<int64_t> warp_barriers_;
  std::unordered_map<const void*, History> touched_;
  std::minstd_rand random_;
  std::string error_;
  jmp_buf scheduler_;
  int threads_ = 0, current_ = 0, idle_rounds_ = 0;
  int64_t block_barriers_ = 0;
  uint64_t block_result_ = 0;
};

inline Device& device() {
  static Device d;
  return d;
}

inline void Device::fiber_main() {
  device().kernel_();
  device().wait(kDone, "end");
}

template <class T>
uint64_t to_bits(T value) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  return bits;
}

template <class T>
T from_bits(uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

template <class T>
T shuffle(const char* name, unsigned mask, T value, int from) {
  device().wait_for_warp(name, mask, to_bits(value));
  return from_bits<T>(device().offered_by(from));
}

}  // namespace host

template <class T>
T exchange_load(const T* from) {
  host::device().touch(from, false);
  return *from;
}

template <class T>
void exchange_store(T* to, T value) {
  host::device().touch(to, true);
  *to = value;
}

// In the loop of a thread that waits for another's write: lets the others run.
inline void spin_wait() { host::device().spin(); }

inline char* dynamic_shared() { return host::device().shared(); }

template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), int64_t blocks, int threads, size_t shared_bytes, cudaStream_t,
                   Arguments... arguments) {
  if (threads < 1 || threads > 1024 || shared_bytes > host::settings().shared_bytes) return cudaErrorInvalidValue;
  host::device().run([=] { kernel(arguments...); }, static_cast<int>(blocks), threads, shared_bytes);
  return cudaSuccess;
}

inline cudaError_t shared_bytes_per_block(size_t* bytes) {
  *bytes = host::settings().shared_bytes;
  return cudaSuccess;
}

}  // namespace lyra

inline void __syncthreads() { lyra::host::device().wait_for_block("__syncthreads", 0); }
inline int __syncthreads_or(int predicate) {
  return lyra::host::device().wait_for_block("__syncthreads_or", predicate != 0) != 0;
}
inline void __syncwarp(unsigned mask = ~0u) {
  lyra::host::device().wait_for_warp("__syncwarp", mask, 0);
  lyra::host::device().warp_barrier_passed();
}

template <class T>
T __shfl_sync(unsigned mask, T value, int lane) {
  return lyra::host::shuffle("__shfl_sync", mask, value, lane % lyra::host::kWarp);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, int by) {
  return lyra::host::shuffle("__shfl_up_sync", mask, value, lyra::host::device().lane() - by);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits) {
  return lyra::host::shuffle("__shfl_xor_sync", mask, value, lyra::host::device().lane() ^ bits);
}

inline unsigned __ballot_sync(unsigned mask, int predicate) {
  lyra::host::device().wait_for_warp("__ballot_sync", mask, predicate != 0);
  unsigned votes = 0;
  for (int lane = 0; lane < lyra::host::kWarp; ++lane) {
    if (mask >> lane & 1) votes |= static_cast<unsigned>(lyra::host::device().offered_by(lane)) << lane;
  }
  return votes;
}
inline int __ffs(int bits) { return __builtin_ffs(bits); }
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) == mask; }

template <class T>
T atomicAdd(T* to, T value) {
  const T before = *to;
  *to += value;
  return before;
}

template <class T>
T atomicOr(T* to, T value) {
  const T before = *to;
  *to |= value;
  return before;
}

inline int __float_as_int(float x) { return lyra::host::from_bits<int>(lyra::host::to_bits(x)); }
inline float __int_as_float(int x) { return lyra::host::from_bits<float>(lyra::host::to_bits(x)); }
inline long long __double_as_longlong(double x) { return lyra::host::from_bits<long long>(lyra::host::to_bits(x)); }
inline double __longlong_as_double(long long x) { return lyra::host::from_bits<double>(lyra::host::to_bits(x)); }
inline int __clz(unsigned bits) { return bits ? __builtin_clz(bits) : 32; }
inline float __fdividef(float x, float y) { return x / y; }

using std::exp2;
using std::fma;
using std::log2;
using std::rint;
