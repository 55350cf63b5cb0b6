// Small kernels that are right or wrong on purpose, to test the shim itself.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "lyra/async_copy.h"
#include "lyra/launch.h"
#include "lyra/mma.h"

namespace {

constexpr int kThreads = 96;

// Every thread reads what the next one wrote, and should not before a barrier.
template <class Barrier>
__global__ void rotate(int* slots, int* out, Barrier barrier) {
  const int t = threadIdx.x, n = blockDim.x;
  lyra::exchange_store(slots + t, t);
  barrier();
  out[t] = lyra::exchange_load(slots + (t + 1) % n);
}

// The same within each warp, so that __syncwarp is enough.
template <class Barrier>
__global__ void rotate_in_warp(int* slots, int* out, Barrier barrier) {
  const int t = threadIdx.x, neighbour = t / 32 * 32 + (t + 1) % 32;
  lyra::exchange_store(slots + t, t);
  barrier();
  out[t] = lyra::exchange_load(slots + neighbour);
}

// Overwrites what the neighbour may not have read yet.
__global__ void rotate_in_place(int* slots, int* out) {
  const int t = threadIdx.x, n = blockDim.x;
  lyra::exchange_store(slots + t, t);
  __syncthreads();
  out[t] = lyra::exchange_load(slots + (t + 1) % n);
  lyra::exchange_store(slots + t, -1);
}

__global__ void half_a_barrier(int*, int*) {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads_or(1);
  }
}

__global__ void sum_and_vote(int*, int* out) {
  const int lane = threadIdx.x % 32;
  int sum = lane;
  for (int other = 16; other > 0; other /= 2) sum += __shfl_xor_sync(~0u, sum, other);
  const int left = __shfl_up_sync(~0u, lane, 1), third = __shfl_sync(~0u, lane, 3);
  const unsigned odd = __ballot_sync(~0u, lane % 2);
  const bool votes = odd == 0xaaaaaaaau && __any_sync(~0u, lane == 31) && !__all_sync(~0u, lane == 31);
  const bool block = __syncthreads_or(threadIdx.x == 40) && !__syncthreads_or(0);
  out[threadIdx.x] = sum == 496 && left == (lane ? lane - 1 : 0) && third == 3 && votes && block;
}

// Warp w waits for the mailbox of warp w + 1.
__global__ void mailboxes(int* slots, int* out) {
  const int warp = threadIdx.x / 32, warps = blockDim.x / 32;
  volatile int* boxes = slots;
  if (warp + 1 < warps) {
    while (boxes[warp + 1] == 0) lyra::spin_wait();
  }
  __syncwarp();
  if (threadIdx.x % 32 == 0) boxes[warp] = 1 + (warp + 1 < warps ? boxes[warp + 1] : 0);
  __syncthreads();
  out[threadIdx.x] = boxes[0];
}

// The first thread posts two words; what the others find of the second once they have seen the first.
__global__ void two_words(int*, int* out, uint64_t* words) {
  if (threadIdx.x == 0) {
    lyra::post(words, 1);
    lyra::post(words + 1, 1);
  }
  while (lyra::peek(words) == 0) lyra::spin_wait();
  out[threadIdx.x] = static_cast<int>(lyra::peek(words + 1));
}

__global__ void nobody_writes(int* slots, int*) {
  volatile int* box = slots;
  while (*box == 0) lyra::spin_wait();
}

__global__ void count(int* slots, int* out) {
  atomicAdd(slots, 1);
  __syncthreads();
  out[threadIdx.x] = *slots;
}

__global__ void read_shared(int*, int* out) {
  const float fresh = reinterpret_cast<float*>(lyra::dynamic_shared())[threadIdx.x];
  out[threadIdx.x] = fresh != fresh;
}

// One warp multiplies A (16, 16) by B (16, 8), both row by row, through shared memory.
template <class T>
__global__ void product(const float* a, const float* b, float* d, bool barrier) {
  uint32_t* const a_tile = reinterpret_cast<uint32_t*>(lyra::dynamic_shared());
  uint32_t* const b_tile = a_tile + 16 * 8;
  const int lane = threadIdx.x, g = lane / 4, t = lane % 4;
  for (int i = lane; i < 16 * 8; i += 32) lyra::exchange_store(a_tile + i, lyra::pack<T>(a[2 * i], a[2 * i + 1]));
  for (int i = lane; i < 16 * 4; i += 32) lyra::exchange_store(b_tile + i, lyra::pack<T>(b[2 * i], b[2 * i + 1]));
  if (barrier) __syncwarp();
  uint32_t left[4], right[4];
  lyra::ldmatrix_x4(left, a_tile + lane % 16 * 8 + lane / 16 * 4);
  lyra::ldmatrix_x4_trans(right, b_tile + lane % 16 * 4);
  float sum[4] = {};
  lyra::mma_m16n8k16<T>(sum, left, right[0], right[1]);
  for (int i = 0; i < 4; ++i) d[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = sum[i];
}

template <class T>
std::vector<float> run_product(const std::vector<float>& a, const std::vector<float>& b, bool barrier) {
  std::vector<float> d(16 * 8, NAN);
  if (lyra::launch(product<T>, 1, 32, 16 * 12 * sizeof(uint32_t), nullptr, a.data(), b.data(), d.data(), barrier)) {
    throw std::runtime_error("launch failed");
  }
  return d;
}

// Two buffers in turn: each thread asks for its four numbers of the next tile, then adds up its neighbour's of this
// one.
__global__ void sum_of_tiles(int*, int* out, const int* tiles, int count, bool wait, bool before, bool after) {
  uint32_t* const buffers = reinterpret_cast<uint32_t*>(lyra::dynamic_shared());
  const int t = threadIdx.x, n = blockDim.x, neighbour = (t + 1) % n;
  const auto fetch = [&](int tile) {
    lyra::copy16_async(buffers + (tile % 2 * n + t) * 4, tiles + (tile * n + t) * 4, tile < count);
    lyra::commit_copies();
  };
  int sum = 0;
  fetch(0);
  for (int tile = 0; tile < count; ++tile) {
    fetch(tile + 1);
    if (wait) lyra::wait_for_copies<1>();
    if (after) __syncthreads();
    for (int i = 0; i < 4; ++i) sum += lyra::exchange_load(buffers + (tile % 2 * n + neighbour) * 4 + i);
    if (before) __syncthreads();
  }
  lyra::wait_for_copies<0>();
  out[t] = sum + lyra::exchange_load(buffers + (count % 2 * n + t) * 4);  // of the tile that does not exist: 0
}

template <class... Extra>
pybind11::list run(void (*kernel)(int*, int*, Extra...), Extra... extra) {
  std::vector<int> slots(kThreads), out(kThreads);
  if (lyra::launch(kernel, 1, kThreads, 8 * kThreads * sizeof(float), nullptr, slots.data(), out.data(), extra...)) {
    throw std::runtime_error("launch failed");
  }
  pybind11::list list;
  for (int value : out) list.append(value);
  return list;
}

}  // namespace

PYBIND11_MODULE(LYRA_MODULE, m) {
  m.def("configure", [](int order, unsigned seed) {
    lyra::host::settings().order = static_cast<lyra::host::Order>(order);
    lyra::host::settings().seed = seed;
  });
  m.def("rotate", [](const std::string& barrier) {
    if (barrier == "block") return run(rotate, +[] { __syncthreads(); });
    if (barrier == "warp") return run(rotate, +[] { __syncwarp(); });
    return run(rotate, +[] {});
  });
  m.def("rotate_in_warp", [](const std::string& barrier) {
    if (barrier == "warp") return run(rotate_in_warp, +[] { __syncwarp(); });
    if (barrier == "shuffle") return run(rotate_in_warp, +[] { __shfl_up_sync(~0u, 0, 1); });
    return run(rotate_in_warp, +[] {});
  });
  m.def("rotate_in_place", [] { return run(rotate_in_place); });
  m.def("half_a_barrier", [] { return run(half_a_barrier); });
  m.def("sum_and_vote", [] { return run(sum_and_vote); });
  m.def("mailboxes", [] { return run(mailboxes); });
  m.def("two_words", [] {
    uint64_t words[2] = {};
    return run(two_words, words + 0);
  });
  m.def("nobody_writes", [] { return run(nobody_writes); });
  m.def("count", [] { return run(count); });
  m.def("read_shared", [] { return run(read_shared); });
  m.def("sum_of_tiles", [](const std::vector<int>& tiles, bool wait, bool before, bool after) {
    const int count = static_cast<int>(tiles.size()) / (4 * kThreads);
    return run(sum_of_tiles, tiles.data(), count, wait, before, after);
  });
  m.def("product", [](const std::string& type, const std::vector<float>& a, const std::vector<float>& b, bool barrier) {
    return type == "bfloat16" ? run_product<lyra::Bf16>(a, b, barrier) : run_product<lyra::Half>(a, b, barrier);
  });
}
