// Soft-DTW of a padded batch, forward and backward, for any N and M. Raw pointers, no torch.
//
// Math. With cost C (n rows, m columns) of one pair and s = -log2(e) / gamma, Z_ij = 2^(s R_ij) obeys
//   Z_ij = 2^(s C_ij) (Z_{i-1,j-1} + Z_{i-1,j} + Z_{i,j-1}),   value = log2(Z_nm) / s,
// and the three terms of the sum over the sum are the probabilities p of the diagonal, up and left step into (i,j).
//   E_ij = p_diag E_{i+1,j+1} + p_up E_{i+1,j} + p_left E_{i,j+1},  each p at the cell that E comes from, E_nm = grad.
// Z is kept as mantissa in [1, 2) and integer exponent: no exp or log on the dependent chain, and an error that does
// not grow with R. Backward is linear in the stored p; it never takes differences of R.
//
// Shapes. cost, grad_cost (B,N,M); value, grad_value (B); lengths int64 (B); probs (B,N,M,2) = (p_diag, p_up), and
// p_left = (1 - p_diag) - p_up, which forward makes >= 0 always and exactly 0 where nothing comes from the left.
// Cells outside the lengths and the band get probs and grad_cost zero, whatever cost holds there.
// Marks on the pair's last cell tell backward: (NaN, NaN) a pair with NaN or -inf; (1, 1) a pair without any path.
// A length out of range gives NaN as value and in all of the sample's grad_cost.
// Range: a cost above 2^60 gamma ln(2) / (n + m) counts as +inf, below minus that as -inf.
//
// Plan. One block per pair; a warp owns strips of 32 columns, lane = column, and runs down the rows skewed: lane l does
// row t - l in step t, and gets its left neighbour by shuffle. Work goes in blocks of kSteps steps, one per phase, with
// one block barrier between phases. Strip s follows strip s - 1 by kLag phases and takes over its last column through
// `carry`, one column in global memory (L2) that all strips of the pair read and then overwrite in turn; warp w takes
// strips w, w + warps, and so on. A band shortens each strip to the rows that it meets. Between memory and the skewed
// lanes stand two delay lines in shared memory, so that global accesses are whole rows of a strip; every lane uses its
// own column of them alone. Backward is the same sweep from the other corner.
//
// Cost per cell inside the band: forward 25 flops, reads 4 bytes and writes 8 (float32), backward 6 flops, reads 8,
// writes 4. Floor, H100 at 3.0 TB/s, each way: B=32 300x64 2.5 us, B=32 1500x200 38 us. Two other limits stand above
// it, both estimated from the code and not yet timed on a GPU (1.9 GHz):
//   the chain: n + kSteps kLag (strips - 1) + 31 steps of about 62 / 34 dependent cycles (forward / backward);
//   the issue of about 70 / 30 instructions per warp and step by the SM's 4 schedulers, once there are more warps.
// 300x64: 395 steps, 2 warps, 14 / 7 us by the chain. 1500x200: 1915 steps, 7 warps, 123 us by issue / 53 us.
// Launches: 1 each way. Shared memory per warp: kRing * 32 * 12 bytes (float32), twice that for float64.
//
// Registers per thread, at most, spills none (tests/test_compile_budget.py reads these lines):
//   budget sm_80: forward_kernel<float> 128, forward_kernel<double> 128, backward_kernel<float> 104,
//   budget sm_80: backward_kernel<double> 128
//   budget sm_90a: forward_kernel<float> 128, forward_kernel<double> 128, backward_kernel<float> 128,
//   budget sm_90a: backward_kernel<double> 184
#pragma once

#include <cstdint>

#include "lyra/launch.h"

namespace lyra::soft_dtw {

constexpr int kLanes = 32;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kMaxWarps = 8;
constexpr int kSteps = 16;
// Blocks after which the last lane, kLanes - 1 rows behind the first, is through with a block of rows.
constexpr int kDelay = (kLanes - 1 + kSteps - 1) / kSteps;
// One more because a barrier must lie between, one more because `carry` is read a phase ahead of its use.
constexpr int kLag = kDelay + 2;
constexpr int kRing = 64;  // rows of a delay line; a power of two, so that finding a row's slot costs no division
static_assert(kSteps <= kLanes, "one lane fetches one row of the carry column");
static_assert(kRing >= (kDelay + 1) * kSteps, "kDelay + 1 blocks of rows are under way in a lane");

constexpr int64_t kCarryBytes = 16;  // per row of a pair; the largest message below
constexpr int64_t kMaxSize = int64_t{1} << 30;

struct Problem {
  int64_t batch, rows, columns;  // B, N, M
  const int64_t* x_lengths;
  const int64_t* y_lengths;
  int64_t band;  // half-width, or -1 for none
};

template <class T>
struct Cost {
  const T* data;
  int64_t batch, row;  // strides in elements; columns are adjacent
};

inline int64_t workspace_bytes(const Problem& problem) { return problem.batch * problem.rows * kCarryBytes; }

template <class T>
__device__ __forceinline__ T larger(T a, T b) {
  return a > b ? a : b;
}

template <class T>
__device__ __forceinline__ T smaller(T a, T b) {
  return a < b ? a : b;
}

struct Range {
  int begin, end;
};

// The cells of a pair that may be aligned: 2 |j (n-1) - i (m-1)| <= max(2 width (n-1), n + m - 2), whole numbers.
// It looks the same from the other corner, (i, j) -> (n-1-i, m-1-j), so backward uses it unchanged.
struct Band {
  int n, m;
  int64_t down, across, reach;
  bool all;

  __device__ Band(int n, int m, int64_t width)
      : n(n), m(m), down(n - 1), across(m - 1), all(width < 0 || n == 1 || m == 1) {
    const int64_t enough = larger(down, across);
    reach = all ? INT64_MAX : larger(2 * smaller(width, enough) * down, down + across);
  }

  __device__ __forceinline__ bool inside(int i, int j) const {
    const int64_t off = 2 * (j * down - i * across);
    return i >= 0 && i < n && j >= 0 && j < m && off <= reach && -off <= reach;
  }

  __device__ Range columns_of_row(int i) const { return i < n ? window(i * across, down, m) : Range{0, 0}; }
  __device__ Range rows_of_column(int j) const { return window(j * down, across, n); }

 private:
  // The x in [0, size) with |2 at - 2 step x| <= reach.
  __device__ Range window(int64_t at, int64_t step, int size) const {
    if (all) return {0, size};
    const int64_t low = 2 * at - reach, high = 2 * at + reach;
    const int64_t begin = low <= 0 ? 0 : (low + 2 * step - 1) / (2 * step);
    return {static_cast<int>(begin), static_cast<int>(smaller<int64_t>(high / (2 * step) + 1, size))};
  }
};

// Which strip does which block of rows in which phase: block + 1 + strip * kLag + (strip / warps) * gap.
struct Schedule {
  int strips, warps, gap = 0, phases;

  struct Strip {
    int column, last_column;
    int first, end;  // blocks of rows that are computed; first - 1 loads the first, end stores the last
    int offset;      // phase of block 0
  };

  __device__ Schedule(const Band& band, int warps, int lane) : strips((band.m + kLanes - 1) / kLanes), warps(warps) {
    // A warp has to be through with one strip before it begins its next.
    for (int s = warps + lane; s < strips; s += kLanes) {
      gap = larger(gap, strip(band, s - warps).end - strip(band, s).first + 2 - warps * kLag);
    }
    for (int other = kLanes / 2; other > 0; other /= 2) gap = larger(gap, __shfl_xor_sync(kAllLanes, gap, other));
    const Strip last = strip(band, strips - 1);
    phases = last.offset + last.end + 1;
  }

  __device__ Strip strip(const Band& band, int s) const {
    const int column = s * kLanes, last = smaller(column + kLanes, band.m) - 1;
    const int top = band.rows_of_column(column).begin, bottom = band.rows_of_column(last).end - 1;
    // From a row earlier on: its left neighbour is the diagonal predecessor of the first row.
    return {column, last, larger(top - 1, 0) / kSteps, bottom / kSteps + kDelay + 1, 1 + s * kLag + s / warps * gap};
  }
};

// Runs `cell` over the pair, from (0, 0) to (n-1, m-1). What a cell type holds:
//   In, Out          what a cell is loaded from and stores, `outside()` standing for an In that is not inside the band
//   Message          what a cell hands to its right and lower right neighbours; `closed()` is "nothing"
//   load, store      global memory at (i, j);  begin: a lane starts on a new column;  origin: what enters at (0, 0)
//   step             one cell, from its In, the left and the upper left neighbour's message and its own last message
// The last column's messages are left in `carry`.
template <class Cell>
__device__ void sweep(Cell& cell, const Band& band, typename Cell::Message* carry) {
  using In = typename Cell::In;
  using Out = typename Cell::Out;
  using Message = typename Cell::Message;
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes, warps = blockDim.x / kLanes;
  const Schedule schedule(band, warps, lane);

  // Delay lines of this lane: row i stands in slot i modulo kRing.
  In* const all_ins = reinterpret_cast<In*>(dynamic_shared());
  Out* const all_outs = reinterpret_cast<Out*>(all_ins + warps * kRing * kLanes);
  In* const ins = all_ins + warp * kRing * kLanes + lane;
  Out* const outs = all_outs + warp * kRing * kLanes + lane;
  const auto slot = [](int row) { return static_cast<unsigned>(row + kRing) % kRing * kLanes; };

  Message mine = Cell::closed(), diag = Cell::closed(), carried = Cell::closed();
  int s = warp;
  typename Schedule::Strip strip = schedule.strip(band, s < schedule.strips ? s : 0);

  for (int phase = 0; phase < schedule.phases; ++phase) {
    const int block = phase - strip.offset;
    if (s < schedule.strips && block >= strip.first - 1) {
      const int column = strip.column + lane, next_row = (block + 1) * kSteps;
      if (block == strip.first - 1) {
        mine = Cell::closed();
        diag = s == 0 && lane == 0 ? cell.origin() : Cell::closed();
        cell.begin();
        // The rows above the strip's first, which the lanes pass while they wait for their turn.
        for (int row = next_row - kLanes; row < next_row; ++row) ins[slot(row)] = Cell::outside();
      }

      // Loads for the next phase come first, to be under way during the steps of this one.
      In next[kSteps];
#pragma unroll
      for (int k = 0; k < kSteps; ++k) {
        next[k] = band.inside(next_row + k, column) ? cell.load(next_row + k, column) : Cell::outside();
      }
      Message next_carried = Cell::closed();
      if (lane < kSteps && band.inside(next_row + lane, strip.column - 1)) {
        next_carried = exchange_load(carry + next_row + lane);
      }

      const int done_row = (block - kDelay - 1) * kSteps;
      for (int row = done_row; row < done_row + kSteps; ++row) {
        if (band.inside(row, column)) cell.store(row, column, outs[slot(row)]);
      }

      if (block >= strip.first && block < strip.end) {
#pragma unroll
        for (int k = 0; k < kSteps; ++k) {
          const int row = block * kSteps + k - lane;
          Message left = mine.each([](auto v) { return __shfl_up_sync(kAllLanes, v, 1); });
          const Message edge = carried.each([k](auto v) { return __shfl_sync(kAllLanes, v, k); });
          if (lane == 0) left = edge;
          outs[slot(row)] = cell.step(ins[slot(row)], left, diag, mine);
          diag = left;
          if (column == strip.last_column && row >= 0 && row < band.n) exchange_store(carry + row, mine);
        }
      }

#pragma unroll
      for (int k = 0; k < kSteps; ++k) ins[slot(next_row + k)] = next[k];
      carried = next_carried;
      if (block == strip.end) {
        s += warps;
        if (s < schedule.strips) strip = schedule.strip(band, s);
      }
    }
    __syncthreads();
  }
}

// --- forward -----------------------------------------------------------------------------------------------------

template <class T>
struct Probs {
  T diag, up;
};

__device__ __forceinline__ float reciprocal(float x) { return __fdividef(1.0f, x); }
__device__ __forceinline__ double reciprocal(double x) { return 1.0 / x; }

// 2^e for e <= 0; zero where that is below the normal numbers.
template <class T, class Exponent>
__device__ __forceinline__ T power(Exponent e) {
  if constexpr (sizeof(T) == 4) {
    return __int_as_float((static_cast<int>(larger<Exponent>(e, -127)) + 127) << 23);
  } else {
    return __longlong_as_double((static_cast<long long>(larger<Exponent>(e, -1023)) + 1023) << 52);
  }
}

// x = mantissa 2^result, mantissa in [1, 2), for a normal x > 0.
__device__ __forceinline__ int split(float x, float* mantissa) {
  const int bits = __float_as_int(x), e = (bits >> 23) - 127;
  *mantissa = __int_as_float(bits - (e << 23));
  return e;
}

__device__ __forceinline__ int split(double x, double* mantissa) {
  const long long bits = __double_as_longlong(x), e = (bits >> 52) - 1023;
  *mantissa = __longlong_as_double(bits - (e << 52));
  return static_cast<int>(e);
}

// mantissa 2^exponent, mantissa in [1, 2). An exponent below kZero / 2 is the number zero, whatever the mantissa:
// `Forward::limit` keeps the exponents of all other numbers, and what zero can drift by, within kZero / 4.
template <class T, class Exponent>
struct Scaled {
  T mantissa;
  Exponent exponent;

  static constexpr Exponent kZero = -(Exponent{1} << (sizeof(Exponent) * 8 - 2));

  template <class F>
  __device__ __forceinline__ Scaled each(F f) const {
    return {f(mantissa), f(exponent)};
  }
};

// float32 first runs with 32-bit exponents; a pair whose costs over gamma are too large for them says so by `wide` and
// is run again with 64 bits, as float64 always is.
template <class T, class Exponent>
struct Forward {
  using In = T;
  using Out = Probs<T>;
  using Message = Scaled<T, Exponent>;
  static constexpr bool kNarrow = sizeof(Exponent) == 4;

  const T* cost;
  int64_t cost_row;  // stride
  Probs<T>* probs;
  int64_t columns;
  double scale;  // -log2(e) / gamma
  double limit;  // of |scale cost|
  bool bad = false, wide = false;

  __device__ Forward(const T* cost, int64_t cost_row, Probs<T>* probs, int64_t columns, double scale, const Band& band)
      : cost(cost), cost_row(cost_row), probs(probs), columns(columns), scale(scale) {
    // A path has fewer than n + m cells. The rest leaves room for what sums and rounding add to an exponent.
    limit = static_cast<double>(-Message::kZero / 4) / (static_cast<double>(band.n) + band.m) - 64;
    if (kNarrow) limit = smaller(limit, 2097152.0);  // 2^21: see weight()
  }

  static __device__ __forceinline__ T outside() { return static_cast<T>(INFINITY); }
  static __device__ __forceinline__ Message closed() { return {T(1), Message::kZero}; }
  static __device__ __forceinline__ Message origin() { return {T(1), 0}; }
  static __device__ __forceinline__ void begin() {}

  __device__ __forceinline__ T load(int i, int j) {
    const T c = cost[i * cost_row + j];
    if (c == outside()) return c;
    if (c != c || c == -outside()) bad = true;
    if (kNarrow) {
      const float t = c * static_cast<float>(scale);
      if (fabsf(t) <= static_cast<float>(limit)) return c;
      wide = true;
    } else {
      const double t = c * scale;
      if (fabs(t) <= limit) return c;
      if (t > 0) bad = true;
    }
    return outside();
  }

  __device__ __forceinline__ void store(int i, int j, const Probs<T>& p) { probs[i * columns + j] = p; }

  // 2^(scale c) = result 2^shift.
  __device__ __forceinline__ T weight(T c, Exponent* shift) const {
    const bool open = c != outside();
    if constexpr (kNarrow) {
      // Adding 1.5 2^23 rounds to a whole number and leaves it in the low bits. `scale` is taken as the sum of two
      // floats.
      const float high = static_cast<float>(scale), low = static_cast<float>(scale - high), magic = 12582912.0f;
      const float rounded = fmaf(c, high, magic);
      const float fraction = fmaf(c, low, fmaf(c, high, magic - rounded));
      *shift = open ? __float_as_int(rounded) - __float_as_int(magic) : Message::kZero;
      return open ? exp2f(fraction) : 1.0f;
    } else {
      const double whole = rint(c * scale), fraction = fma(static_cast<double>(c), scale, -whole);
      *shift = open ? static_cast<Exponent>(whole) : Message::kZero;
      return open ? exp2(static_cast<T>(fraction)) : T(1);
    }
  }

  __device__ __forceinline__ Probs<T> step(T c, const Message& left, const Message& diag, Message& mine) const {
    Exponent shift;
    const T w = weight(c, &shift);
    const Exponent top = larger(larger(diag.exponent, mine.exponent), left.exponent);
    const T d = diag.mantissa * power<T>(diag.exponent - top);
    const T u = mine.mantissa * power<T>(mine.exponent - top);
    const T l = left.mantissa * power<T>(left.exponent - top);
    const T sum = d + (u + l);
    const int carry = split(sum * w, &mine.mantissa);
    mine.exponent = larger<Exponent>(top + shift + carry, Message::kZero);

    // Rounding may not leave mass for a neighbour that has none: its derived share must come out exactly zero.
    const T one_over = reciprocal(sum);
    const T to_diag = sum == d ? T(1) : smaller(d * one_over, T(1)), rest = 1 - to_diag;
    return {to_diag, l == 0 ? rest : smaller(u * one_over, rest)};
  }
};

// Writes `fill` to the cells of the (rows, columns) array that are not inside the band.
template <class T>
__device__ void fill_outside(T* cells, int64_t rows, int64_t columns, const Band& band, T fill) {
  const int lane = threadIdx.x % kLanes;
  for (int64_t i = threadIdx.x / kLanes; i < rows; i += blockDim.x / kLanes) {
    const Range inside = band.columns_of_row(static_cast<int>(i));
    for (int64_t j = lane; j < inside.begin; j += kLanes) cells[i * columns + j] = fill;
    for (int64_t j = inside.end + lane; j < columns; j += kLanes) cells[i * columns + j] = fill;
  }
}

template <class T>
__device__ void fill_all(T* cells, int64_t size, T fill) {
  for (int64_t k = threadIdx.x; k < size; k += blockDim.x) cells[k] = fill;
}

__device__ __forceinline__ bool lengths_in_range(const Problem& p, int64_t n, int64_t m) {
  return n >= 1 && n <= p.rows && m >= 1 && m <= p.columns;
}

// Returns false, having left only rubbish in probs, if the costs need wider exponents.
template <class T, class Exponent>
__device__ bool run_forward(const T* cost, int64_t cost_row, T* value, Probs<T>* probs, int64_t columns,
                            const Band& band, double scale, char* carry_bytes) {
  using Message = typename Forward<T, Exponent>::Message;
  Message* carry = reinterpret_cast<Message*>(carry_bytes);
  Forward<T, Exponent> cell(cost, cost_row, probs, columns, scale, band);
  sweep(cell, band, carry);
  const bool bad = __syncthreads_or(cell.bad);
  const bool wide = __syncthreads_or(cell.wide);
  if (wide && !bad) return false;
  if (threadIdx.x == 0) {
    const Message end = exchange_load(carry + band.n - 1);
    Probs<T>* mark = probs + (band.n - 1) * columns + band.m - 1;
    if (bad) {
      *value = static_cast<T>(NAN);
      *mark = {*value, *value};
    } else if (end.exponent < Message::kZero / 2) {
      *value = static_cast<T>(INFINITY);
      *mark = {T(1), T(1)};
    } else {
      *value = static_cast<T>((log2(static_cast<double>(end.mantissa)) + end.exponent) / scale);
    }
  }
  return true;
}

template <class T>
__global__ void __launch_bounds__(kMaxWarps* kLanes)
    forward_kernel(Problem problem, Cost<T> cost, T* value, Probs<T>* probs, double scale, char* workspace) {
  const int64_t pair = blockIdx.x, n = problem.x_lengths[pair], m = problem.y_lengths[pair];
  cost.data += pair * cost.batch;
  probs += pair * problem.rows * problem.columns;
  value += pair;
  if (!lengths_in_range(problem, n, m)) {
    fill_all(probs, problem.rows * problem.columns, Probs<T>{0, 0});
    if (threadIdx.x == 0) *value = static_cast<T>(NAN);
    return;
  }
  const Band band(static_cast<int>(n), static_cast<int>(m), problem.band);
  fill_outside(probs, problem.rows, problem.columns, band, Probs<T>{0, 0});
  char* carry = workspace + pair * problem.rows * kCarryBytes;
  if constexpr (sizeof(T) == 4) {
    if (run_forward<T, int>(cost.data, cost.row, value, probs, problem.columns, band, scale, carry)) return;
  }
  run_forward<T, long long>(cost.data, cost.row, value, probs, problem.columns, band, scale, carry);
}

// --- backward ----------------------------------------------------------------------------------------------------

// Expectation on its way to the left and to the upper left neighbour.
template <class T>
struct Flow {
  T left, diag;

  template <class F>
  __device__ __forceinline__ Flow each(F f) const {
    return {f(left), f(diag)};
  }
};

// The sweep's (i, j) is the pair's (n-1-i, m-1-j).
template <class T>
struct Backward {
  using In = Probs<T>;
  using Out = T;
  using Message = Flow<T>;

  const Probs<T>* last_probs;  // of the pair's last cell
  T* last_grad;
  int64_t columns;
  T grad, poison;  // poison: NaN if the pair is to have NaN gradients, else 0
  T up = 0;

  static __device__ __forceinline__ Probs<T> outside() { return {0, 0}; }
  static __device__ __forceinline__ Flow<T> closed() { return {0, 0}; }
  __device__ __forceinline__ Flow<T> origin() const { return {0, grad}; }
  __device__ __forceinline__ void begin() { up = 0; }

  __device__ __forceinline__ Probs<T> load(int i, int j) const { return last_probs[-(i * columns + j)]; }
  __device__ __forceinline__ void store(int i, int j, T e) { last_grad[-(i * columns + j)] = e; }

  __device__ __forceinline__ T step(const Probs<T>& p, const Flow<T>& left, const Flow<T>& diag, Flow<T>& mine) {
    const T e = (up + diag.diag) + (left.left + poison);
    mine = {e * ((1 - p.diag) - p.up), e * p.diag};
    up = e * p.up;
    return e;
  }
};

template <class T>
__global__ void __launch_bounds__(kMaxWarps* kLanes)
    backward_kernel(Problem problem, const T* grad_value, int64_t grad_stride, const Probs<T>* probs, T* grad_cost,
                    char* workspace) {
  const int64_t pair = blockIdx.x, n = problem.x_lengths[pair], m = problem.y_lengths[pair];
  const int64_t size = problem.rows * problem.columns;
  probs += pair * size;
  grad_cost += pair * size;
  if (!lengths_in_range(problem, n, m)) {
    fill_all(grad_cost, size, static_cast<T>(NAN));
    return;
  }
  const Band band(static_cast<int>(n), static_cast<int>(m), problem.band);
  fill_outside(grad_cost, problem.rows, problem.columns, band, T(0));
  const int64_t last = (n - 1) * problem.columns + m - 1;
  const Probs<T> mark = probs[last];
  const bool bad = mark.diag != mark.diag, no_path = mark.diag + mark.up > T(1.5);
  Backward<T> cell{probs + last, grad_cost + last, problem.columns, no_path ? T(0) : grad_value[pair * grad_stride],
                   bad ? static_cast<T>(NAN) : T(0)};
  sweep(cell, band, reinterpret_cast<Flow<T>*>(workspace + pair * problem.rows * kCarryBytes));
}

// --- launchers ---------------------------------------------------------------------------------------------------

// As many warps as there are strips, as far as shared memory goes.
template <class T>
cudaError_t block_shape(const Problem& problem, int* threads, size_t* shared_bytes) {
  constexpr size_t per_warp = kRing * kLanes * (sizeof(T) + sizeof(Probs<T>));
  if (problem.batch > INT32_MAX || problem.rows > kMaxSize || problem.columns > kMaxSize) return cudaErrorInvalidValue;
  size_t available = 0;
  if (const cudaError_t error = shared_bytes_per_block(&available); error != cudaSuccess) return error;
  int64_t warps = (problem.columns + kLanes - 1) / kLanes;
  if (warps > kMaxWarps) warps = kMaxWarps;
  if (warps > static_cast<int64_t>(available / per_warp)) warps = static_cast<int64_t>(available / per_warp);
  if (warps < 1) warps = 1;
  *threads = static_cast<int>(warps) * kLanes;
  *shared_bytes = static_cast<size_t>(warps) * per_warp;
  return cudaSuccess;
}

// `workspace`: workspace_bytes(problem) bytes of device memory, 16-byte aligned, that may hold anything. gamma > 0.
template <class T>
cudaError_t forward(const Problem& problem, const Cost<T>& cost, T* value, T* probs, double gamma, void* workspace,
                    cudaStream_t stream) {
  if (problem.batch == 0) return cudaSuccess;
  int threads = 0;
  size_t shared_bytes = 0;
  if (const cudaError_t error = block_shape<T>(problem, &threads, &shared_bytes); error != cudaSuccess) return error;
  return launch(forward_kernel<T>, problem.batch, threads, shared_bytes, stream, problem, cost, value,
                reinterpret_cast<Probs<T>*>(probs), -1.4426950408889634 / gamma, static_cast<char*>(workspace));
}

template <class T>
cudaError_t backward(const Problem& problem, const T* grad_value, int64_t grad_stride, const T* probs, T* grad_cost,
                     void* workspace, cudaStream_t stream) {
  if (problem.batch == 0) return cudaSuccess;
  int threads = 0;
  size_t shared_bytes = 0;
  if (const cudaError_t error = block_shape<T>(problem, &threads, &shared_bytes); error != cudaSuccess) return error;
  return launch(backward_kernel<T>, problem.batch, threads, shared_bytes, stream, problem, grad_value, grad_stride,
                reinterpret_cast<const Probs<T>*>(probs), grad_cost, static_cast<char*>(workspace));
}

}  // namespace lyra::soft_dtw
