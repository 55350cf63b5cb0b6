// Soft-DTW of a padded batch: value, gradients and second derivatives, for any N and M. Raw pointers, no torch.
//
// Math. With cost C (n rows, m columns) of one pair and s = -log2(e) / gamma, Z_ij = 2^(s R_ij) obeys
//   Z_ij = 2^(s C_ij) (Z_{i-1,j-1} + Z_{i-1,j} + Z_{i,j-1}),   value = log2(Z_nm) / s,
// and the three terms of the sum over the sum are the probabilities p of the diagonal, up and left step into (i,j).
//   E_ij = p_diag E_{i+1,j+1} + p_up E_{i+1,j} + p_left E_{i,j+1},  each p at the cell that E comes from, E_nm = 1.
// Z is kept as mantissa in [1, 2) and integer exponent: no exp or log on the dependent chain, and an error that does
// not grow with R. Backward is linear in the stored p; it never takes differences of R. Rows that may be dropped and
// second derivatives: cells.h, which has the formulas of each sweep. gamma = 0 is hard DTW: p is 0 or 1.
//
// Shapes. cost, grad_cost (B,N,M); value, grad_value, entropy (B); drop, grad_drop (B,N); lengths int64 (B); low, high
// int64 (B,N). probs (B, bytes) is nobody's business but these kernels': per cell a word of two shares of 16 or 8 bits
// (float32) or two doubles (float64), the third derived, and one share more with drop; in the order in which a warp
// goes through the cells, for the cells of its strip alone: an int band keeps what is in the band, not N x M.
// NaN or -inf in a cell or price of the pair, a length out of range, a gamma that is no number > 0: NaN for that pair,
// and in its gradients. No path: +inf, gradients 0. What lies outside gets gradient 0, whatever cost holds there.
// Range: a cost above 2^60 gamma ln(2) / (n + m) counts as +inf, below minus that as -inf.
//
// Plan. One launch makes the workspace ready and surveys the costs (sweeps then need neither vote nor check), one
// launch sweeps: a warp per strip of 32 columns, a block per warp, so a pair may be on as many SMs as it has strips.
// Lane = column; lane l is two rows behind lane l - 1, so what a lane hands to its right neighbour by shuffle has a
// step's time to get there. The last lane hands its column to the next strip in words in global memory (L2), one letter
// per row, which say themselves that they are there: no flag, no fence, no block barrier. Strips are taken by ticket
// in the order in which they depend on each other, so there is no deadlock however few blocks the device can hold. A
// strip follows its left neighbour by kTail + kBlock steps and the time of a letter. Backward is the same in reverse.
//
// Cost per cell in the band: forward 25 flops, reads 8 bytes (survey and sweep; the second from L2 if 40 MB hold the
// batch's costs) and writes 4; backward 9 flops, reads 4, writes 4. Floor, H100 at 3.0 TB/s, forward / backward: B=32
// 300x64 2.5 / 1.7 us; B=32 1500x200 38 / 26 us; B=8 8192^2 with band 512 (65 M cells, 260 MB of them) 260 / 174 us,
// and 0.6 ms for the zeros of a dense gradient outside the band. Two other limits stand above it, both estimated, not
// timed on any GPU (1.9 GHz):
//   the chain: n + (strips - 1) (kTail + kBlock) + kTail steps of about 38 / 20 dependent cycles, forward / backward;
//   the issue, one instruction per cycle and warp, is longer: of the code of sm_90a about 77 / 59 instructions per
//   step, all told (design: 18.5 / 16 for the recursion alone), and with windows, as counted by the same test:
//   loop sm_80: forward_kernel<lyra::soft_dtw::Bits16,false,false> 86 instructions
//   loop sm_80: backward_kernel<lyra::soft_dtw::Bits16,false,false> 68 instructions
//   loop sm_90a: forward_kernel<lyra::soft_dtw::Bits16,false,false> 91 instructions
//   loop sm_90a: backward_kernel<lyra::soft_dtw::Bits16,false,false> 71 instructions
// 300x64: 440 steps, 18 / 14 us. 1500x200: 2030 steps, 82 / 63 us. 8192^2 with band 512: 21040 steps, 850 / 650 us.
// Launches: 2 each way, 4 for second derivatives. Shared memory per block: kRing * 32 * 4 bytes (float32).
// Triton would not do: it has no shuffles.
//
// Registers per thread, at most, spills none (tests/test_compile_budget.py reads these lines; of formats and options
// the largest; the others were looked at once, all without spills):
//   budget sm_80: prepare_kernel<float> 48
//   budget sm_80: forward_kernel<lyra::soft_dtw::Bits16, false, false> 104
//   budget sm_80: forward_kernel<lyra::soft_dtw::Bits16, false, true> 128
//   budget sm_80: forward_kernel<lyra::soft_dtw::Bits16, true, false> 96
//   budget sm_80: backward_kernel<lyra::soft_dtw::Bits16, false, false> 104
//   budget sm_80: backward_kernel<lyra::soft_dtw::Bits16, false, true> 112
//   budget sm_80: backward_kernel<lyra::soft_dtw::Bits16, true, false> 144
//   budget sm_80: forward_kernel<lyra::soft_dtw::Exact, false, true> 160
//   budget sm_80: backward_kernel<lyra::soft_dtw::Exact, true, true> 200
//   budget sm_80: tangent_kernel<lyra::soft_dtw::Exact, true> 216
//   budget sm_80: curvature_kernel<lyra::soft_dtw::Bits16, true> 144
//   budget sm_80: curvature_kernel<lyra::soft_dtw::Exact, true> 232
//   budget sm_90a: prepare_kernel<float> 48
//   budget sm_90a: forward_kernel<lyra::soft_dtw::Bits16, false, false> 120
//   budget sm_90a: forward_kernel<lyra::soft_dtw::Bits16, false, true> 136
//   budget sm_90a: forward_kernel<lyra::soft_dtw::Bits16, true, false> 112
//   budget sm_90a: backward_kernel<lyra::soft_dtw::Bits16, false, false> 112
//   budget sm_90a: backward_kernel<lyra::soft_dtw::Bits16, false, true> 112
//   budget sm_90a: backward_kernel<lyra::soft_dtw::Bits16, true, false> 160
//   budget sm_90a: forward_kernel<lyra::soft_dtw::Exact, false, true> 160
//   budget sm_90a: backward_kernel<lyra::soft_dtw::Exact, true, true> 208
//   budget sm_90a: tangent_kernel<lyra::soft_dtw::Exact, true> 224
//   budget sm_90a: curvature_kernel<lyra::soft_dtw::Bits16, true> 152
//   budget sm_90a: curvature_kernel<lyra::soft_dtw::Exact, true> 232
#pragma once

#include <cstdint>

#include "cells.h"
#include "lyra/launch.h"
#include "numbers.h"
#include "pairs.h"
#include "sweep.h"

namespace lyra::soft_dtw {

// One number for all pairs, or one for each in float or double.
struct Gamma {
  double value;
  const float* floats;
  const double* doubles;

  // NaN where a pair's own is no number > 0.
  __device__ double of(int64_t pair) const {
    const double own = floats ? floats[pair] : doubles ? doubles[pair] : value;
    const bool one_for_all = !floats && !doubles;
    return one_for_all || (own > 0 && own < static_cast<double>(INFINITY)) ? own : static_cast<double>(NAN);
  }
};

constexpr double kLog2E = 1.4426950408889634;
constexpr int kSurveyWarps = 8;
constexpr int kBlocksPerSM = 8;  // of one warp; leaves each thread all the registers it can name

// --- first launch ----------------------------------------------------------------------------------------------------

__device__ __forceinline__ int reduce(int mine, bool greatest) {
  for (int other = kLanes / 2; other > 0; other /= 2) {
    const int theirs = __shfl_xor_sync(kAllLanes, mine, other);
    mine = greatest ? larger(mine, theirs) : smaller(mine, theirs);
  }
  return mine;
}

// Makes the workspace ready, a block for each strip of each pair: what the windows leave of the strip and, with a cost,
// what its costs and prices are like.
template <class T>
__global__ void __launch_bounds__(kSurveyWarps* kLanes)
    prepare_kernel(Problem problem, Gamma gamma, Cost<T> cost, const T* drop, bool hard, Workspace workspace) {
  const int64_t pair_index = blockIdx.x / workspace.strips;
  const int s = static_cast<int>(blockIdx.x % workspace.strips);
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
  uint64_t* const slots = workspace.slots(pair_index);
  for (int64_t k = s * blockDim.x + threadIdx.x; k < workspace.steps * workspace.words;
       k += workspace.strips * blockDim.x) {
    slots[k] = kAbsent;
  }
  if (threadIdx.x == 0) workspace.sums(pair_index)[s] = kAbsent;
  if (blockIdx.x == 0 && threadIdx.x == 0) *workspace.tickets() = 0;
  if (!lengths_in_range(problem, pair_index)) return;
  const Pair pair(problem, pair_index, nullptr);
  if (s >= pair.strips) return;

  const int column = s * kLanes + lane;
  const Range rows = pair.rows_of_column(column);
  const double scale = -kLog2E / gamma.of(pair_index);
  const double narrow = Weigher<float, int>(scale, pair).limit, wide = Weigher<T, long long>(scale, pair).limit;
  bool bad = false, is_wide = false;
  const auto look_at = [&](T c) {
    const double power = static_cast<double>(c) * scale;
    if (c != c || c == -static_cast<T>(INFINITY) || (!hard && power > wide)) bad = true;
    if (c != static_cast<T>(INFINITY) && fabs(power) > narrow) is_wide = true;
  };
  int first = INT32_MAX, end = 0;
  const T* const own_cost = cost.column(problem, pair, pair_index, s, lane);
  if (problem.low || cost.data) {
#pragma unroll 4
    for (int i = warp; i < pair.n; i += kSurveyWarps) {
      if (!rows.holds(i) || !pair.in_window(i, column)) continue;
      first = smaller(first, i);
      end = larger(end, i + 1);
      if (cost.data) look_at(own_cost[i * cost.row]);
    }
    if (drop && s == 0) {
      for (int i = threadIdx.x; i < pair.n; i += blockDim.x) look_at(drop[pair_index * problem.rows + i]);
    }
  }
  // The first and last rows of each warp, then of all.
  int* const firsts = reinterpret_cast<int*>(dynamic_shared());
  int* const ends = firsts + kSurveyWarps;
  first = reduce(first, false);
  end = reduce(end, true);
  if (lane == 0) {
    exchange_store(firsts + warp, first);
    exchange_store(ends + warp, end);
  }
  const bool any_bad = __syncthreads_or(bad);
  const bool any_wide = __syncthreads_or(is_wide);
  if (threadIdx.x == 0) {
    for (int k = 1; k < kSurveyWarps; ++k) {
      first = smaller(first, exchange_load(firsts + k));
      end = larger(end, exchange_load(ends + k));
    }
    workspace.surveys(pair_index)[s] = {smaller(first, end), end, any_bad, any_wide};
  }
}

// --- second launch ---------------------------------------------------------------------------------------------------

// The strip that a block of one warp is to do: the strips of all pairs side by side, in the order of the sweep.
struct Task {
  int64_t pair;
  int strip;

  __device__ Task(const Problem& problem, const Workspace& workspace, bool downwards) {
    const int64_t ticket = next_ticket(workspace.tickets());
    pair = ticket % problem.batch;
    strip = static_cast<int>(ticket / problem.batch);
    if (!downwards) strip = static_cast<int>(workspace.strips) - 1 - strip;
  }
};

template <class Format, class Algebra, bool kDrop>
__device__ __forceinline__ void run_forward(Forward<Format, Algebra, kDrop> cell, const Pair& pair, const Strip& strip,
                                            uint64_t* slots, typename Format::Real* value) {
  using Message = typename Forward<Format, Algebra, kDrop>::Message;
  const int64_t words = pair.pitch() * Message::kWords;
  const Message end = sweep_down(cell, pair, strip, slots + (strip.index - 1) * words, slots + strip.index * words);
  if (strip.index == pair.strips - 1 && static_cast<int>(threadIdx.x) == strip.last)
    *value = cell.algebra.value(end.any);
}

template <class Format, bool kHard, bool kDrop>
__global__ void __launch_bounds__(kLanes, kBlocksPerSM)
    forward_kernel(Problem problem, Gamma gamma, Cost<typename Format::Real> cost, const typename Format::Real* drop,
                   typename Format::Real* value, unsigned char* probs, Workspace workspace) {
  using T = typename Format::Real;
  const Task task(problem, workspace, true);
  value += task.pair;
  if (!lengths_in_range(problem, task.pair)) {
    if (task.strip == 0 && threadIdx.x == 0) *value = static_cast<T>(NAN);
    return;
  }
  const Pair pair(problem, task.pair, workspace.surveys(task.pair));
  if (task.strip >= pair.strips) return;
  const double own_gamma = gamma.of(task.pair);
  bool bad = own_gamma != own_gamma, wide = sizeof(T) == 8;
  for (int k = threadIdx.x; k < pair.strips; k += kLanes) {
    bad |= workspace.surveys(task.pair)[k].bad != 0;
    wide |= workspace.surveys(task.pair)[k].wide != 0;
  }
  if (__any_sync(kAllLanes, bad)) {
    if (task.strip == 0 && threadIdx.x == 0) *value = static_cast<T>(NAN);
    return;
  }
  wide = __any_sync(kAllLanes, wide);

  const Strip strip(pair, task.strip);
  const Kept<Format, kDrop> kept(probs, task.pair, workspace.steps);
  const T* const own_cost = cost.column(problem, pair, task.pair, strip.index, threadIdx.x);
  const T* const own_drop = kDrop ? drop + task.pair * problem.rows : nullptr;
  uint64_t* const slots = workspace.slots(task.pair);
  if constexpr (kHard) {
    run_forward(Forward<Format, Hard<T>, kDrop>{{}, own_cost, cost.row, own_drop, kept, strip.column}, pair, strip,
                slots, value);
  } else {
    const double scale = -kLog2E / own_gamma;
    if constexpr (sizeof(T) == 4) {
      if (!wide) {
        run_forward(
            Forward<Format, Soft<T, int>, kDrop>{{{scale, pair}}, own_cost, cost.row, own_drop, kept, strip.column},
            pair, strip, slots, value);
        return;
      }
    }
    run_forward(
        Forward<Format, Soft<T, long long>, kDrop>{{{scale, pair}}, own_cost, cost.row, own_drop, kept, strip.column},
        pair, strip, slots, value);
  }
}

// Fills the strip's columns, in a matrix, of a pair that is not swept. In strips, who reads them knows.
template <class T>
__device__ void fill_columns(const Problem& problem, const Pair& pair, int column, const Cells<T>& all,
                             int64_t pair_index, T inside) {
  if (column >= problem.columns || all.order != Order::kMatrix) return;
  T* const cells = all.data + pair_index * all.batch;
  const Range rows = pair.rows_of_column(column);
  for (int i = 0; i < problem.rows; ++i) {
    cells[i * all.row + column] = rows.holds(i) && pair.in_window(i, column) ? inside : T(0);
  }
}

// What the kernels that go up give back of a pair; `entropy` may be null, `grad_drop` is null without dropping.
template <class T>
struct Gradients {
  Cells<T> cost;
  T* drop;
  T* entropy;

  // Of what the sweep does not touch. Returns the pair's task, or false if there is nothing to sweep: for a value that
  // is NaN, infinite, or of a pair with impossible lengths.
  __device__ bool begin(const Problem& problem, const Task& task, T value, const Survey* surveys) {
    const int column = task.strip * kLanes + static_cast<int>(threadIdx.x);
    const bool possible = lengths_in_range(problem, task.pair);
    if (drop) drop += task.pair * problem.rows;
    if (entropy) entropy += task.pair;
    const bool swept = possible && fabs(value) < static_cast<T>(INFINITY);
    const T inside = value == static_cast<T>(INFINITY) ? T(0) : static_cast<T>(NAN);
    const int64_t n = possible ? problem.x_lengths[task.pair] : problem.rows;
    if (task.strip == 0) {
      if (!swept && entropy && threadIdx.x == 0) *entropy = inside;
      for (int64_t i = threadIdx.x; drop && i < problem.rows; i += kLanes) {
        if (!swept || i >= n) drop[i] = i < n ? inside : T(0);
      }
    }
    if (swept) return true;
    if (possible) {
      fill_columns(problem, Pair(problem, task.pair, surveys), column, cost, task.pair, inside);
    } else if (column < problem.columns && cost.order == Order::kMatrix) {
      T* const cells = cost.data + task.pair * cost.batch + column;
      for (int64_t i = 0; i < problem.rows; ++i) cells[i * cost.row] = inside;
    }
    return false;
  }
};

// The strips of a pair that lie in padding alone.
template <class T>
__device__ bool in_padding(const Problem& problem, const Pair& pair, const Task& task, const Cells<T>& cells) {
  if (task.strip < pair.strips) return false;
  fill_columns(problem, pair, task.strip * kLanes + static_cast<int>(threadIdx.x), cells, task.pair, T(0));
  return true;
}

template <class Cell, class T>
__device__ __forceinline__ double run_up(Cell& cell, const Problem& problem, const Pair& pair, const Strip& strip,
                                         const Task& task, const Cells<T>& cells, const Workspace& workspace,
                                         bool summed) {
  const int64_t words = pair.pitch() * Cell::Message::kWords;
  uint64_t* const slots = workspace.slots(task.pair);
  sweep_up(cell, pair, strip, problem, cells, slots + (strip.index + 1) * words, slots + strip.index * words);
  if (!summed) return 0;
  uint64_t* const sums = workspace.sums(task.pair);
  return sum_over_strips(cell.entropy, strip.index + 1 < pair.strips ? sums + strip.index + 1 : nullptr,
                         sums + strip.index);
}

template <class Format, bool kDrop, bool kEntropy>
__global__ void __launch_bounds__(kLanes, kBlocksPerSM)
    backward_kernel(Problem problem, const typename Format::Real* grad_value, int64_t grad_stride,
                    const typename Format::Real* value, const unsigned char* probs,
                    Gradients<typename Format::Real> gradients, Workspace workspace) {
  using T = typename Format::Real;
  const Task task(problem, workspace, false);
  if (!gradients.begin(problem, task, value[task.pair], workspace.surveys(task.pair))) return;
  const Pair pair(problem, task.pair, workspace.surveys(task.pair));
  if (in_padding(problem, pair, task, gradients.cost)) return;
  const Strip strip(pair, task.strip);
  Backward<Format, kDrop, kEntropy> cell{{probs, task.pair, workspace.steps},
                                         gradients.cost.column(problem, pair, task.pair, strip.index, threadIdx.x),
                                         grad_value ? grad_value[task.pair * grad_stride] : T(1),
                                         gradients.drop,
                                         strip};
  const double entropy = run_up(cell, problem, pair, strip, task, gradients.cost, workspace, kEntropy);
  if (kEntropy && strip.index == 0 && threadIdx.x == 0) *gradients.entropy = static_cast<T>(entropy);
}

// A direction: of the costs, and of prices and gamma, for which null is zero.
template <class T>
struct Direction {
  Cost<T> cost;
  const T* drop;
  Gamma gamma;  // with value 0
};

template <class Format, bool kDrop>
__global__ void __launch_bounds__(kLanes, kBlocksPerSM)
    tangent_kernel(Problem problem, Gamma gamma, Direction<typename Format::Real> along,
                   const typename Format::Real* value, const unsigned char* probs, typename Format::Real* slope,
                   Turn<typename Format::Real, kDrop>* turns, Workspace workspace) {
  using T = typename Format::Real;
  const Task task(problem, workspace, true);
  const T own_value = value[task.pair];
  slope += task.pair;
  if (!lengths_in_range(problem, task.pair) || !(fabs(own_value) < static_cast<T>(INFINITY))) {
    const bool no_path = lengths_in_range(problem, task.pair) && own_value == static_cast<T>(INFINITY);
    if (task.strip == 0 && threadIdx.x == 0) *slope = no_path ? T(0) : static_cast<T>(NAN);
    return;
  }
  const Pair pair(problem, task.pair, workspace.surveys(task.pair));
  if (task.strip >= pair.strips) return;
  const Strip strip(pair, task.strip);
  const double own_gamma = gamma.of(task.pair);
  Tangent<Format, kDrop> cell{{probs, task.pair, workspace.steps},
                              turns + task.pair * workspace.steps * kLanes,
                              along.cost.column(problem, pair, task.pair, strip.index, threadIdx.x),
                              along.cost.row,
                              along.drop ? along.drop + task.pair * problem.rows : nullptr,
                              along.gamma.floats    ? along.gamma.floats[task.pair]
                              : along.gamma.doubles ? along.gamma.doubles[task.pair]
                                                    : 0.0,
                              own_gamma > 0 ? 1 / own_gamma : 0.0};
  using Message = typename Tangent<Format, kDrop>::Message;
  const int64_t words = pair.pitch() * Message::kWords;
  uint64_t* const slots = workspace.slots(task.pair);
  const Message end = sweep_down(cell, pair, strip, slots + (strip.index - 1) * words, slots + strip.index * words);
  if (strip.index == pair.strips - 1 && static_cast<int>(threadIdx.x) == strip.last) *slope = static_cast<T>(end.x[0]);
}

// `gradients.entropy` takes d slope / d gamma.
template <class Format, bool kDrop>
__global__ void __launch_bounds__(kLanes, kBlocksPerSM)
    curvature_kernel(Problem problem, const typename Format::Real* grad_value, int64_t grad_stride,
                     const typename Format::Real* value, const unsigned char* probs,
                     const Turn<typename Format::Real, kDrop>* turns, Gradients<typename Format::Real> gradients,
                     Workspace workspace) {
  using T = typename Format::Real;
  const Task task(problem, workspace, false);
  if (!gradients.begin(problem, task, value[task.pair], workspace.surveys(task.pair))) return;
  const Pair pair(problem, task.pair, workspace.surveys(task.pair));
  if (in_padding(problem, pair, task, gradients.cost)) return;
  const Strip strip(pair, task.strip);
  const T grad = grad_value[task.pair * grad_stride];
  Curvature<Format, kDrop> cell{{probs, task.pair, workspace.steps},
                                turns + task.pair * workspace.steps * kLanes,
                                gradients.cost.column(problem, pair, task.pair, strip.index, threadIdx.x),
                                grad,
                                gradients.drop,
                                strip};
  const double entropy = run_up(cell, problem, pair, strip, task, gradients.cost, workspace, true);
  if (strip.index == 0 && threadIdx.x == 0) *gradients.entropy = static_cast<T>(-grad * entropy);
}

// --- launchers -------------------------------------------------------------------------------------------------------

// Bytes of `probs` (B, bytes): what forward keeps for backward.
template <class Format>
int64_t probs_bytes(const Problem& problem) {
  const int64_t steps = steps_per_pair(problem);
  return problem.dropping ? Kept<Format, true>::bytes(steps) : Kept<Format, false>::bytes(steps);
}

// Words of the largest message that a launch hands from strip to strip.
inline int64_t forward_words(const Problem& problem) { return problem.dropping ? 4 : 2; }
constexpr int64_t kBackwardWords = 3, kCurvatureWords = 5;

inline Workspace workspace_of(const Problem& problem, int64_t words, void* memory) {
  return {static_cast<char*>(memory), problem.batch, problem.strips(), steps_per_pair(problem), words};
}

// Of device memory, 16-byte aligned, that may hold anything.
inline int64_t workspace_bytes(const Problem& problem, int64_t words) {
  return workspace_of(problem, words, nullptr).bytes();
}

// Of memory for the tangent's Turns.
template <class T>
int64_t turns_bytes(const Problem& problem) {
  const int64_t turn = problem.dropping ? sizeof(Turn<T, true>) : sizeof(Turn<T, false>);
  return problem.batch * steps_per_pair(problem) * kLanes * turn;
}

inline bool fits(const Problem& problem) {
  return problem.rows <= kMaxSize && problem.columns <= kMaxSize && problem.batch <= INT32_MAX / problem.strips();
}

template <class T>
cudaError_t prepare(const Problem& problem, const Gamma& gamma, const Cost<T>& cost, const T* drop, bool hard,
                    const Workspace& workspace, cudaStream_t stream) {
  return launch(prepare_kernel<T>, problem.batch * problem.strips(), kSurveyWarps * kLanes,
                2 * kSurveyWarps * sizeof(int), stream, problem, gamma, cost, drop, hard, workspace);
}

// Calls go(std::bool_constant) for the value of `flag`.
template <class Go>
cudaError_t with_flag(bool flag, const Go& go) {
  return flag ? go(std::true_type{}) : go(std::false_type{});
}

// gamma.value = 0 is hard DTW. `drop` (B,N) if problem.dropping. `probs`: probs_bytes per pair, or null.
template <class Format>
cudaError_t forward(const Problem& problem, const Gamma& gamma, const Cost<typename Format::Real>& cost,
                    const typename Format::Real* drop, typename Format::Real* value, unsigned char* probs, void* memory,
                    cudaStream_t stream) {
  using T = typename Format::Real;
  if (problem.batch == 0) return cudaSuccess;
  if (!fits(problem)) return cudaErrorInvalidValue;
  const Workspace workspace = workspace_of(problem, forward_words(problem), memory);
  const bool hard = !gamma.floats && !gamma.doubles && gamma.value == 0;
  const cudaError_t error = prepare(problem, gamma, cost, drop, hard, workspace, stream);
  if (error != cudaSuccess) return error;
  return with_flag(hard, [&](auto is_hard) {
    return with_flag(problem.dropping, [&](auto dropping) {
      using Cell = Forward<Format, Soft<T, long long>, dropping>;
      return launch(forward_kernel<Format, is_hard, dropping>, problem.batch * problem.strips(), kLanes,
                    shared_bytes_down<Cell>(), stream, problem, gamma, cost, drop, value, probs, workspace);
    });
  });
}

// `grad_value` (B), or null: ones; `grad_drop` (B,N) if problem.dropping; `entropy` (B) or null.
template <class Format>
cudaError_t backward(const Problem& problem, const typename Format::Real* grad_value, int64_t grad_stride,
                     const typename Format::Real* value, const unsigned char* probs,
                     const Gradients<typename Format::Real>& gradients, void* memory, cudaStream_t stream) {
  using T = typename Format::Real;
  if (problem.batch == 0) return cudaSuccess;
  if (!fits(problem)) return cudaErrorInvalidValue;
  const Workspace workspace = workspace_of(problem, kBackwardWords, memory);
  const cudaError_t error = prepare<T>(problem, {}, {}, nullptr, false, workspace, stream);
  if (error != cudaSuccess) return error;
  return with_flag(problem.dropping, [&](auto dropping) {
    return with_flag(gradients.entropy != nullptr, [&](auto with_entropy) {
      using Cell = Backward<Format, dropping, with_entropy>;
      return launch(backward_kernel<Format, dropping, with_entropy>, problem.batch * problem.strips(), kLanes,
                    shared_bytes_up<Cell>(), stream, problem, grad_value, grad_stride, value, probs, gradients,
                    workspace);
    });
  });
}

// `slope` (B): the derivative of the value along the direction; `gradients`: the derivative of that, times grad_value,
// in the costs, the prices (if problem.dropping) and, as `entropy`, gamma. `turns`: turns_bytes of memory.
template <class Format>
cudaError_t curvature(const Problem& problem, const Gamma& gamma, const Direction<typename Format::Real>& along,
                      const typename Format::Real* grad_value, int64_t grad_stride, const typename Format::Real* value,
                      const unsigned char* probs, typename Format::Real* slope,
                      const Gradients<typename Format::Real>& gradients, void* turns, void* memory,
                      cudaStream_t stream) {
  using T = typename Format::Real;
  if (problem.batch == 0) return cudaSuccess;
  if (!fits(problem)) return cudaErrorInvalidValue;
  const Workspace workspace = workspace_of(problem, kCurvatureWords, memory);
  return with_flag(problem.dropping, [&](auto dropping) {
    auto* const kept_turns = static_cast<Turn<T, dropping>*>(turns);
    const int64_t blocks = problem.batch * problem.strips();
    cudaError_t error = prepare<T>(problem, gamma, {}, nullptr, false, workspace, stream);
    if (error != cudaSuccess) return error;
    error = launch(tangent_kernel<Format, dropping>, blocks, kLanes, shared_bytes_down<Tangent<Format, dropping>>(),
                   stream, problem, gamma, along, value, probs, slope, kept_turns, workspace);
    if (error != cudaSuccess) return error;
    error = prepare<T>(problem, gamma, {}, nullptr, false, workspace, stream);
    if (error != cudaSuccess) return error;
    return launch(curvature_kernel<Format, dropping>, blocks, kLanes, shared_bytes_up<Curvature<Format, dropping>>(),
                  stream, problem, grad_value, grad_stride, value, probs, kept_turns, gradients, workspace);
  });
}

}  // namespace lyra::soft_dtw
