// Runs the source of a CUDA kernel on the CPU, for tests: g++ -DLYRA_HOST_CUDA, included by lyra/launch.h.
//
// The threads of a block are fibers on one CPU thread; blocks run one after the other. A fiber runs until it has to
// wait for others (barrier, shuffle, vote, spin), then `host::settings().order` says which of those that can run goes
// on, so a kernel that relies on an accident of timing shows it in one order or the other:
//   kForward / kReverse   always the lowest / highest thread that can run: one warp gets as far ahead as it may
//   kShuffled             any of them, drawn from `seed`
//   kLazy                 as kForward, but who has posted a word goes on only when nobody else can, the last block
//                         first: others see the word long before what comes after it
// With `resident` > 0 that many blocks run at once, as on a GPU that has room for no more, and `order` also says which
// block begins next: so blocks that wait for each other show it where they rely on who begins first, or on company.
// Shared memory starts as NaN. `exchange_load` and `exchange_store` are checked for races, in whatever order the fibers
// happened to run: two accesses to a place by different threads, one of them a write, need a barrier between them
// (__syncthreads, or __syncwarp within a warp; a shuffle or vote orders no memory). A launch that met a race, a
// deadlock, or threads of a block at different barriers throws. What is handed over under a flag that the reader waits
// for with `spin_wait` or `warp_await`, by `post` and `peek`, or by atomics, is not checked for races; the orders alone
// judge it.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <bit>
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

enum Order { kForward, kReverse, kShuffled, kLazy };

struct Settings {
  Order order = kForward;
  unsigned seed = 0;
  size_t shared_bytes = 227 * 1024;
  int resident = 0;  // blocks that run at once; 0: one after the other, the first first
};

inline int launches = 0;  // so far

inline Settings& settings() {
  static Settings s;
  return s;
}

constexpr int kWarp = 32;
constexpr size_t kStackBytes = 128 * 1024;

enum State { kReady, kAtBlockBarrier, kAtWarpOp, kSpinning, kResting, kDone };

// Sixteen bytes that a thread has asked for, and that are there once it has waited for them (lyra/async_copy.h).
struct PendingCopy {
  uint32_t* to;
  const void* from;  // null: zeros
  int64_t group;     // of those that the thread has committed
};

struct Fiber {
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  ucontext_t entry;
  jmp_buf resume_at;
  bool started = false;
  State state = kReady;
  const char* waits_at = nullptr;  // name of the barrier or warp operation
  uint64_t value = 0;              // offered to the others there
  uint64_t offered = 0;            // what they get, until the next operation
  unsigned mask = 0;
  std::vector<PendingCopy> copies;
  int64_t groups = 0;  // committed so far
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

// A place for a block to run in.
struct Residence {
  int block = -1;  // none
  int left = 0;    // threads that are not through
  int64_t block_barriers = 0;
  uint64_t block_result = 0;
  std::vector<uint64_t> shared;
  std::vector<int64_t> warp_barriers;
  std::unordered_map<const void*, History> touched;  // in `shared`
};

class Device {
 public:
  void run(std::function<void()> kernel, int blocks, int threads, size_t shared_bytes) {
    kernel_ = std::move(kernel);
    const int places = settings().resident > 0 ? std::min(settings().resident, blocks) : std::min(1, blocks);
    while (static_cast<int>(fibers_.size()) < places * threads) fibers_.emplace_back();
    threads_ = threads;
    places_.assign(places, {});
    ready_.assign((places * threads + 63) / 64, 0);
    random_.seed(settings().seed);
    touched_.clear();
    error_.clear();
    idle_rounds_ = 0;
    blockDim = {static_cast<unsigned>(threads), 1, 1};
    gridDim = {static_cast<unsigned>(blocks), 1, 1};
    waiting_.resize(blocks);
    for (int k = 0; k < blocks; ++k) waiting_[k] = blocks - 1 - k;  // the back begins first
    if (settings().resident > 0 && settings().order == kReverse) std::reverse(waiting_.begin(), waiting_.end());
    if (settings().resident > 0 && settings().order == kShuffled)
      std::shuffle(waiting_.begin(), waiting_.end(), random_);
    for (Residence& place : places_) begin_block(place, shared_bytes);
    while (error_.empty() && run_some()) {
      for (Residence& place : places_) {
        if (place.block >= 0 && place.left == 0) begin_block(place, shared_bytes);
      }
    }
    if (error_.empty()) return;
    for (Fiber& fiber : fibers_) fiber.started = false;  // they stand in the middle of the kernel
    throw std::runtime_error(error_);
  }

  char* shared() {  // 16-byte aligned
    const auto at = reinterpret_cast<uintptr_t>(place().shared.data());
    return reinterpret_cast<char*>((at + 15) & ~uintptr_t{15});
  }

  // --- called by the running fiber

  uint64_t wait_for_block(const char* where, uint64_t value) {
    self().value = value;
    wait(kAtBlockBarrier, where);
    return place().block_result;
  }

  void wait_for_warp(const char* where, unsigned mask, uint64_t value) {
    self().value = value;
    self().mask = mask;
    wait(kAtWarpOp, where);
  }

  // What a lane of the running fiber's warp offered to the operation just passed; its own if there is no such lane.
  uint64_t offered_by(int lane) const {
    const int thread = thread_ / kWarp * kWarp + lane, first = current_ - thread_;
    const bool exists = lane >= 0 && lane < kWarp && thread < threads_ && (fibers_[current_].mask >> lane & 1);
    return fibers_[exists ? first + thread : current_].offered;
  }

  void spin() { wait(kSpinning, "spin"); }
  int lane() const { return thread_ % kWarp; }
  void warp_barrier_passed() { ++place().warp_barriers[thread_]; }
  void posted() {
    idle_rounds_ = 0;
    if (settings().order == kLazy) wait(kResting, "post");
  }

  // Of the running fiber, and so of the launch.
  void fail(const char* what) {
    if (error_.empty()) error_ = what;
    wait(kDone, "failure");
  }

  void begin_copy(uint32_t* to, const void* from) {
    for (int i = 0; i < 4; ++i) {
      touch(to + i, true);
      to[i] = ~0u;  // NaN in any float type, for whoever does not wait
    }
    self().copies.push_back({to, from, self().groups});
  }
  void commit_copies() { ++self().groups; }
  void finish_copies(int pending) {
    Fiber& fiber = self();
    const auto landed = [&](const PendingCopy& copy) { return copy.group < fiber.groups - pending; };
    for (const PendingCopy& copy : fiber.copies) {
      if (!landed(copy)) continue;
      for (int i = 0; i < 4; ++i) touch(copy.to + i, true);
      copy.from ? std::memcpy(copy.to, copy.from, 16) : std::memset(copy.to, 0, 16);
    }
    std::erase_if(fiber.copies, landed);
  }

  void touch(const void* place, bool write) {
    Residence& here = this->place();
    const Access now{here.block, thread_, here.block_barriers, here.warp_barriers[thread_]};
    const auto* shared = reinterpret_cast<const char*>(here.shared.data());
    const size_t offset = static_cast<const char*>(place) - shared;
    History& history = (offset < here.shared.size() * sizeof(uint64_t) ? here.touched : touched_)[place];
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
  Residence& place() { return places_[current_ / threads_]; }
  int first_of(const Residence& place) const { return static_cast<int>(&place - places_.data()) * threads_; }

  void set(int fiber, State state) {
    fibers_[fiber].state = state;
    const uint64_t bit = uint64_t{1} << (fiber % 64);
    state == kReady ? ready_[fiber / 64] |= bit : ready_[fiber / 64] &= ~bit;
  }

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

  void begin_block(Residence& place, size_t shared_bytes) {
    place = {};
    if (waiting_.empty()) return;
    place.block = waiting_.back();
    waiting_.pop_back();
    place.left = threads_;
    place.shared.assign(shared_bytes / sizeof(uint64_t) + 2, ~uint64_t{0});  // NaN in any float type
    place.warp_barriers.assign(threads_, 0);
    for (int t = first_of(place); t < first_of(place) + threads_; ++t) {
      set(t, kReady);
      fibers_[t].copies.clear();
      fibers_[t].groups = 0;
    }
    idle_rounds_ = 0;
  }

  // Until a block is through. Returns false if none is under way, or if none can go on.
  bool run_some() {
    while (std::any_of(places_.begin(), places_.end(), [](const Residence& p) { return p.block >= 0; })) {
      const int next = pick();
      if (next < 0) {
        bool released = false;
        for (Residence& place : places_) released |= place.block >= 0 && release_block(place);
        if (released || release_spinning()) continue;
        report_deadlock();
        return false;
      }
      resume(next);
      if (fibers_[next].state == kDone && --places_[next / threads_].left == 0) return true;
      if (fibers_[next].state == kAtWarpOp) release_warp(next);
      if (!error_.empty()) return false;
    }
    return false;
  }

  int pick() {
    if (settings().order == kReverse) {
      for (size_t w = ready_.size(); w-- > 0;) {
        if (ready_[w]) return static_cast<int>(w) * 64 + 63 - std::countl_zero(ready_[w]);
      }
      return -1;
    }
    const int all = static_cast<int>(places_.size()) * threads_;
    const int from = settings().order == kShuffled ? static_cast<int>(random_() % all) : 0;
    const int next = first_ready(from);
    return next < 0 && from > 0 ? first_ready(0) : next;
  }

  // From that one on; -1 if there is none.
  int first_ready(int from) const {
    uint64_t word = ready_[from / 64] >> (from % 64) << (from % 64);
    for (size_t w = from / 64;; word = ready_[w]) {
      if (word) return static_cast<int>(w) * 64 + std::countr_zero(word);
      if (++w == ready_.size()) return -1;
    }
  }

  void release_warp(int fiber) {
    const int thread = fiber % threads_ / kWarp * kWarp, first = fiber - fiber % threads_ + thread;  // of the warp
    Fiber* const lanes = &fibers_[first];
    const Fiber& one = fibers_[fiber];
    for (int lane = 0; lane < kWarp && thread + lane < threads_; ++lane) {
      const Fiber& f = lanes[lane];
      if ((one.mask >> lane & 1) && (f.state != kAtWarpOp || f.mask != one.mask || f.waits_at != one.waits_at)) return;
    }
    for (int lane = 0; lane < kWarp && thread + lane < threads_; ++lane) {
      if (!(one.mask >> lane & 1)) continue;
      lanes[lane].offered = lanes[lane].value;
      set(first + lane, kReady);
    }
  }

  bool release_block(Residence& place) {
    const int first = first_of(place);
    const char* where = nullptr;
    uint64_t any = 0;
    for (int t = first; t < first + threads_; ++t) {
      const Fiber& f = fibers_[t];
      if (f.state == kDone) continue;
      if (f.state != kAtBlockBarrier || (where && f.waits_at != where)) return false;
      where = f.waits_at;
      any |= f.value;
    }
    place.block_result = any;
    ++place.block_barriers;
    for (int t = first; t < first + threads_; ++t) {
      if (fibers_[t].state == kAtBlockBarrier) set(t, kReady);
    }
    return true;
  }

  bool release_spinning() {
    bool some = false;
    const int all = static_cast<int>(places_.size()) * threads_;
    for (int t = 0; t < all; ++t) {
      if (places_[t / threads_].block < 0 || fibers_[t].state != kSpinning) continue;
      set(t, kReady);
      some = true;
    }
    for (int t = all; t-- > 0;) {
      if (places_[t / threads_].block < 0 || fibers_[t].state != kResting) continue;
      set(t, kReady);
      return true;
    }
    return some && ++idle_rounds_ < 10000;
  }

  void report_deadlock() {
    std::ostringstream message;
    message << "deadlock:";
    for (size_t t = 0; t < places_.size() * threads_; ++t) {
      const int block = places_[t / threads_].block;
      if (block >= 0 && fibers_[t].state != kDone && message.tellp() < 300)
        message << " block " << block << " thread " << t % threads_ << " at " << fibers_[t].waits_at << ";";
    }
    if (error_.empty()) error_ = message.str();
  }

  // makecontext starts a fiber; from then on setjmp and longjmp switch, which unlike swapcontext cost no system call.
  void resume(int index) {
    current_ = index;
    thread_ = index % threads_;
    threadIdx = {static_cast<unsigned>(thread_), 0, 0};
    blockIdx = {static_cast<unsigned>(place().block), 0, 0};
    Fiber& fiber = fibers_[index];
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
    set(current_, state);
    fiber.waits_at = where;
    if (!_setjmp(fiber.resume_at)) _longjmp(scheduler_, 1);
  }

  std::function<void()> kernel_;
  std::vector<Fiber> fibers_;  // threads_ of them for each place
  std::vector<Residence> places_;
  std::vector<uint64_t> ready_;                       // a bit for each fiber
  std::vector<int> waiting_;                          // blocks, the next one last
  std::unordered_map<const void*, History> touched_;  // outside shared memory
  std::minstd_rand random_;
  std::string error_;
  jmp_buf scheduler_;
  int threads_ = 0, current_ = 0, thread_ = 0, idle_rounds_ = 0;
};

inline Device& device() {
  static Device d;
  return d;
}

inline void Device::fiber_main() {
  for (;;) {  // a fiber that is through is there for the next block
    device().kernel_();
    device().wait(kDone, "end");
  }
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

inline uint64_t peek(const uint64_t* from) { return *from; }

inline void post(uint64_t* to, uint64_t word, bool wanted = true) {
  if (!wanted) return;
  *to = word;
  host::device().posted();
}

// In the loop of a thread that waits for another's write: lets the others run.
inline void spin_wait() { host::device().spin(); }

inline char* dynamic_shared() { return host::device().shared(); }

template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), int64_t blocks, int threads, size_t shared_bytes, cudaStream_t,
                   Arguments... arguments) {
  if (threads < 1 || threads > 1024 || shared_bytes > host::settings().shared_bytes) return cudaErrorInvalidValue;
  ++host::launches;
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

namespace lyra {

inline void warp_arrive(unsigned* count) {
  __syncwarp();
  if (host::device().lane() > 0) return;
  ++*count;
  host::device().posted();
}

inline void warp_await(const unsigned* count, unsigned wanted) {
  while (host::device().lane() == 0 && *count < wanted) spin_wait();
  __syncwarp();
}

}  // namespace lyra

template <class T>
T __shfl_sync(unsigned mask, T value, int lane) {
  return lyra::host::shuffle("__shfl_sync", mask, value, lane % lyra::host::kWarp);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, int by) {
  return lyra::host::shuffle("__shfl_up_sync", mask, value, lyra::host::device().lane() - by);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, int by) {
  return lyra::host::shuffle("__shfl_down_sync", mask, value, lyra::host::device().lane() + by);
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
