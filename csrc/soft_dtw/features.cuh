// Costs of soft-DTW from features, and the gradients of the features, on tensor cores. Raw pointers, no torch.
//
// Math. Tokens x_i (n of D numbers) and y_j (m) of one pair:
//   squared      C_ij = |x_i - y_j|^2       16-bit tokens: |x_i|^2 + |y_j|^2 - 2 x_i . y_j, at least 0
//   cosine       C_ij = 1 - x_i . y_j / (|x_i| |y_j|), norms at least 1e-12
//   contrastive  C_ij = log sum_k exp(x_i . y_k / tau) - x_i . y_j / tau, k over all m tokens, inside the band or not
// With E = d value / d C, zero outside of the band, and g = d loss / d value of the pair:
//   squared      G = E,                      dX_i = g (-2 sum_j G_ij y_j + 2 (sum_j G_ij) x_i)
//   cosine       G = E / (|x_i| |y_j|),      dX_i = g (-sum_j G_ij y_j + (sum_j E_ij (1 - C_ij)) / |x_i|^2 x_i)
//   contrastive  G = exp(-C) sum_k E_ik - E, dX_i = g / tau sum_j G_ij y_j
// and dY likewise with i and j, x and y exchanged.
//
// Shapes. x (B,N,D), y (B,M,D), float32, bfloat16 or float16, D adjacent, any other strides, any D; norms 1 / |token|
// and `self`, the factors of x_i and y_j above, float32 (B, N + M). C, E and G in strips of 32 columns (Cells in
// pairs.h), so that every row of 32 is 128 aligned bytes whatever M is; squared and cosine with an int band keep the
// band alone. G takes E's place: in float32, or, for 16-bit tokens, as the 32 upper and the 32 lower parts of G, in the
// tokens' type: one part alone would be off by 2^-9 of what cancels in sums like sum_j G_ij y_j.
//
// Plan. Three products of 64 rows by 64, 128 or 256 columns per block of 8 warps, operands by cp.async through 2 to 4
// slabs of shared memory, one barrier per slab; 16 bytes at a time where rows are aligned to that, else element by
// element. 16-bit tokens by tensor cores (mma.sync, float32 sums). float32 tokens by fused multiply-adds: three
// products of bfloat16 parts would give 16 bits, not 24, and the six that give 24 are no faster than multiply-adds;
// with these, squared distances are sums of (x - y)^2, in which nothing cancels.
// * cost_kernel. Tiles outside of lengths, band or windows are left out. Squares of tokens are summed on the way, by
//   the thread that brought them. Contrastive: a block has all columns of its 64 rows; the log-sum-exp of each strip,
//   then of the strips in order. Up to 256 columns stay in registers; more are written as logits first, and read once
//   more (L2).
// * columns_kernel. Sums over rows, for squared and cosine.
// * turn_kernel. E to G, a warp per row, and sums over columns.
// * tokens_kernel. dX, then dY: a block owns 64 tokens by 128 of D and goes over the other side's tokens in the band.
// Every sum has one fixed order that depends on D and on places in the pair alone: the same bits each time, alone or in
// any batch, whatever the padding. No atomics, no host sync, grids of fixed size.
//
// Floor, H100 at 3.0 TB/s and 800 TFLOP/s, bfloat16, D = 3584, cost / gradients: B=32 300x64 28 / 56 us (bytes); B=32
// 1500x200 130 / 260 us (bytes); B=8 8192^2 with band 512 580 / 1170 us (products). Estimated, not timed on any GPU,
// with mma.sync at 60 % of that rate and products of G in two parts twice: 40 / 70 us, 190 / 570 us, 1.1 / 3.9 ms.
// Launches: cost 1; gradients 3 (contrastive) or 4. Shared memory per block: cost 74 to 98 KB, gradients 72 KB (float32
// 105 KB).
//
// Registers per thread, at most, spills none (tests/test_compile_budget.py reads these lines):
//   budget sm_80: cost_kernel<lyra::Bf16, lyra::soft_dtw::Contrastive, 2> 96
//   budget sm_80: cost_kernel<lyra::Bf16, lyra::soft_dtw::Contrastive, 8> 128
//   budget sm_80: cost_kernel<lyra::Bf16, lyra::soft_dtw::Squared, 4> 104
//   budget sm_80: cost_kernel<lyra::Half, lyra::soft_dtw::Cosine, 4> 104
//   budget sm_80: cost_kernel<float, lyra::soft_dtw::Contrastive, 8> 152
//   budget sm_80: cost_kernel<float, lyra::soft_dtw::Squared, 4> 128
//   budget sm_80: columns_kernel<lyra::Bf16, lyra::soft_dtw::Squared> 48
//   budget sm_80: columns_kernel<float, lyra::soft_dtw::Cosine> 48
//   budget sm_80: turn_kernel<lyra::Bf16, lyra::soft_dtw::Contrastive> 64
//   budget sm_80: turn_kernel<lyra::Bf16, lyra::soft_dtw::Cosine> 64
//   budget sm_80: tokens_kernel<lyra::Bf16, true, true> 120, tokens_kernel<lyra::Bf16, true, false> 128
//   budget sm_80: tokens_kernel<float, true, true> 136, tokens_kernel<float, true, false> 152
//   budget sm_90a: cost_kernel<lyra::Bf16, lyra::soft_dtw::Contrastive, 2> 104
//   budget sm_90a: cost_kernel<lyra::Bf16, lyra::soft_dtw::Contrastive, 8> 128
//   budget sm_90a: cost_kernel<lyra::Bf16, lyra::soft_dtw::Squared, 4> 112
//   budget sm_90a: cost_kernel<lyra::Half, lyra::soft_dtw::Cosine, 4> 112
//   budget sm_90a: cost_kernel<float, lyra::soft_dtw::Contrastive, 8> 248
//   budget sm_90a: cost_kernel<float, lyra::soft_dtw::Squared, 4> 128
//   budget sm_90a: columns_kernel<lyra::Bf16, lyra::soft_dtw::Squared> 48
//   budget sm_90a: columns_kernel<float, lyra::soft_dtw::Cosine> 48
//   budget sm_90a: turn_kernel<lyra::Bf16, lyra::soft_dtw::Contrastive> 64
//   budget sm_90a: turn_kernel<lyra::Bf16, lyra::soft_dtw::Cosine> 64
//   budget sm_90a: tokens_kernel<lyra::Bf16, true, true> 120, tokens_kernel<lyra::Bf16, true, false> 128
//   budget sm_90a: tokens_kernel<float, true, true> 136, tokens_kernel<float, true, false> 152
#pragma once

#include <cstdint>
#include <type_traits>

#include "lyra/async_copy.h"
#include "lyra/launch.h"
#include "lyra/mma.h"
#include "lyra/tile.h"
#include "pairs.h"

namespace lyra::soft_dtw {

struct Squared {};
struct Cosine {};
struct Contrastive {};

template <class Kind, class Other>
constexpr bool is = std::is_same_v<Kind, Other>;

// An int band limits what is in memory, but the contrastive cost and its gradient need all columns.
template <class Kind>
constexpr bool kBandAlone = !is<Kind, Contrastive>;

template <class T>
struct Tokens {
  const T* data;
  int64_t batch, row;  // strides in elements; D is adjacent
};

constexpr int kProductThreads = 256;
constexpr int kTileRows = 64;
constexpr int kSlabWords = 32;               // of a row in shared memory, at a time
constexpr int kSlabPitch = kSlabWords + 4;   // see lyra::pitch
constexpr int kSlabChunks = kSlabWords / 4;  // of 16 bytes
constexpr float kLargestInverse = 1e12f;     // norms are at least 1e-12

template <class T>
constexpr int kPerChunk = 16 / static_cast<int>(sizeof(T));

// 16 bytes of a row on their way to shared memory, zeros from `end` on, and where no row is. They are there once their
// thread has waited for its copies.
template <class T>
__device__ __forceinline__ void bring(uint32_t* to, const T* row, int64_t column, int64_t end, bool exists) {
  const T* const at = row + column;
  exists = exists && column < end;
  if (!exists || (column + kPerChunk<T> <= end && lyra::aligned(at))) {
    copy16_async(to, exists ? at : nullptr, exists);
    return;
  }
  Words4 words{};
#pragma unroll
  for (int i = 0; i < kPerChunk<T>; ++i) {
    if (column + i >= end) continue;
    if constexpr (sizeof(T) == 4) {
      words.word[i] = static_cast<uint32_t>(__float_as_int(at[i]));
    } else {
      words.word[i / 2] |= static_cast<uint32_t>(at[i].bits) << 16 * (i % 2);
    }
  }
  shared_store16(to, words);
}

template <class T>
__device__ __forceinline__ float sum_of_squares(const uint32_t* chunk) {
  float sum = 0;
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    const uint32_t word = exchange_load(chunk + w);
    if constexpr (sizeof(T) == 4) {
      const float value = __int_as_float(static_cast<int>(word));
      sum = fmaf(value, value, sum);
    } else {
      const float low = to_float(T{static_cast<uint16_t>(word)}), high = to_float(T{static_cast<uint16_t>(word >> 16)});
      sum = fmaf(high, high, fmaf(low, low, sum));
    }
  }
  return sum;
}

struct alignas(8) TwoFloats {
  float first, second;
};

// --- cost ------------------------------------------------------------------------------------------------------------

struct SquaredDifference {
  __device__ __forceinline__ float operator()(float a, float b, float sum) const { return fmaf(a - b, a - b, sum); }
};

// log sum exp so far: largest + log(sum).
struct LogSum {
  float largest, sum;
};

__device__ __forceinline__ LogSum join(const LogSum& a, const LogSum& b) {
  const float largest = larger(a.largest, b.largest), base = largest == -INFINITY ? 0.0f : largest;
  return {largest, a.sum * expf(a.largest - base) + b.sum * expf(b.largest - base)};
}

// How a block of kStrips strips of columns is shared among its 8 warps, and what lies in shared memory.
template <int kStrips>
struct CostTile {
  static constexpr int kColumns = kStrips * kLanes;
  static constexpr int kWarpsAcross = kStrips == 2 ? 2 : 4;
  static constexpr int kBlocks = kTileRows * kWarpsAcross / 8 / 16;       // of 16 rows, per warp
  static constexpr int kHalves = kColumns / kWarpsAcross / 8;             // of 16 columns
  static constexpr int kOwnStrips = kHalves / 4;                          // per warp
  static constexpr int kSlabs = kStrips == 2 ? 4 : kStrips == 4 ? 3 : 2;  // at once
  static constexpr int kRows = kTileRows + kColumns;                      // of both operands
  static constexpr int kPasses = kRows * kSlabChunks / kProductThreads;   // chunks per thread and slab
  static constexpr int kStage = kRows * kSlabPitch;                       // words
  static constexpr size_t kBytes = 4 * (kSlabs * kStage + kRows) + sizeof(LogSum) * kTileRows * (kStrips + 1);
};

template <class T>
struct CostArguments {
  Problem problem;
  Tokens<T> x, y;
  int64_t size;  // D
  float scale;   // 1 / tau
  Cells<float> cost;
  float* norms;
  int row_tiles, column_tiles;  // of a pair
};

template <class T, class Kind, int kStrips>
__global__ void __launch_bounds__(kProductThreads, sizeof(T) == 2 || kStrips == 2 ? 2 : 1)
    cost_kernel(CostArguments<T> s) {
  using Tile = CostTile<kStrips>;
  constexpr int kSlab = kSlabWords * 4 / sizeof(T);  // elements
  constexpr bool kNorms = is<Kind, Cosine> || (is<Kind, Squared> && sizeof(T) == 2);
  const int64_t pair_index = blockIdx.x / (s.row_tiles * s.column_tiles);
  const int first_row = static_cast<int>(blockIdx.x / s.column_tiles % s.row_tiles) * kTileRows;
  int first = static_cast<int>(blockIdx.x % s.column_tiles) * Tile::kColumns;
  if (!lengths_in_range(s.problem, pair_index)) return;
  const Pair pair(s.problem, pair_index, nullptr);
  if (first_row >= pair.n || first >= pair.m) return;
  if constexpr (!is<Kind, Contrastive>) {
    const int last_row = smaller(first_row + kTileRows, pair.n) - 1;
    if (pair.columns_of_row(first_row).begin >= first + Tile::kColumns || pair.columns_of_row(last_row).end <= first)
      return;
    if (pair.has_windows()) {
      const int64_t i = first_row + static_cast<int>(threadIdx.x), at = pair_index * s.problem.rows + i;
      const bool sees = i <= last_row && s.problem.low[at] < first + Tile::kColumns && s.problem.high[at] >= first;
      if (!__syncthreads_or(sees)) return;
    }
  }

  uint32_t* const slabs = reinterpret_cast<uint32_t*>(dynamic_shared());
  LogSum* const parts = reinterpret_cast<LogSum*>(slabs + Tile::kSlabs * Tile::kStage);  // (rows, strips)
  LogSum* const totals = parts + kTileRows * kStrips;
  float* const squares = reinterpret_cast<float*>(totals + kTileRows);  // of rows, then of columns
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes, g = lane / 4, t = lane % 4;
  const int m = warp / Tile::kWarpsAcross * Tile::kBlocks * 16, n = warp % Tile::kWarpsAcross * Tile::kHalves * 8;
  const int chunk = threadIdx.x % kSlabChunks, chunk_row = threadIdx.x / kSlabChunks;
  constexpr int kRowsAtOnce = kProductThreads / kSlabChunks;
  const T* const x = s.x.data + pair_index * s.x.batch + first_row * s.x.row;
  const T* const y = s.y.data + pair_index * s.y.batch;
  const int64_t count = larger<int64_t>(divide_up(s.size, kSlab), 1);

  float acc[Tile::kBlocks][Tile::kHalves][4];
  // Calls f(place in memory, row of the tile, the two sums) for what this thread has of the tile from column `from` on.
  const auto visit = [&](int from, const auto& f) {
#pragma unroll
    for (int w = 0; w < Tile::kOwnStrips; ++w) {
      const int strip = (from + n) / kLanes + w;
      if (strip >= pair.strips) continue;
      const Range rows = s.cost.order == Order::kBand ? pair.rows_of_strip(strip) : Range{0, pair.n};
      float* const column = s.cost.column(s.problem, pair, pair_index, strip, 2 * t);
#pragma unroll
      for (int r = 0; r < 2 * Tile::kBlocks; ++r) {
        const int row = m + r * 8 + g;
        if (!rows.holds(first_row + row)) continue;
#pragma unroll
        for (int half = 0; half < 4; ++half) {
          float* const to = column + (first_row + row) * s.cost.row + half * 8;
          f(reinterpret_cast<TwoFloats*>(to), row, from + n + w * kLanes + half * 8 + 2 * t,
            &acc[r / 2][w * 4 + half][r % 2 * 2]);
        }
      }
    }
  };

  LogSum total{-INFINITY, 0};  // of the row that this thread adds up
  for (;; first += Tile::kColumns) {
    const auto fetch = [&](int64_t k) {
      uint32_t* const stage = slabs + k % Tile::kSlabs * Tile::kStage;
#pragma unroll
      for (int pass = 0; pass < Tile::kPasses; ++pass) {
        const int row = pass * kRowsAtOnce + chunk_row, column = first + row - kTileRows;
        const bool is_x = pass * kRowsAtOnce < kTileRows;
        const T* const from = is_x ? x + row * s.x.row : y + column * s.y.row;
        bring(stage + row * kSlabPitch + chunk * 4, from, k * kSlab + chunk * kPerChunk<T>, s.size,
              is_x ? first_row + row < pair.n : column < pair.m);
      }
    };
    const int left = pair.m - first - n;  // columns from this warp's first on
    const int real = left <= 0 ? 0 : smaller((left + 15) / 16, Tile::kHalves / 2);
    float own_squares[kNorms ? Tile::kPasses : 1] = {};
#pragma unroll
    for (int i = 0; i < Tile::kBlocks * Tile::kHalves * 4; ++i) (&acc[0][0][0])[i] = 0;
#pragma unroll
    for (int k = 0; k < Tile::kSlabs - 1; ++k) {
      if (k < count) fetch(k);
      commit_copies();
    }
    for (int64_t k = 0; k < count; ++k) {
      wait_for_copies<Tile::kSlabs - 2>();
      __syncthreads();  // slab k is there, and slab k - 1 has been read
      if (k + Tile::kSlabs - 1 < count) fetch(k + Tile::kSlabs - 1);
      commit_copies();
      const uint32_t* const stage = slabs + k % Tile::kSlabs * Tile::kStage;
      if constexpr (kNorms) {
#pragma unroll
        for (int pass = 0; pass < Tile::kPasses; ++pass) {
          own_squares[pass] += sum_of_squares<T>(stage + (pass * kRowsAtOnce + chunk_row) * kSlabPitch + chunk * 4);
        }
      }
      const uint32_t* const columns = stage + kTileRows * kSlabPitch;
      if constexpr (is<Kind, Squared> && sizeof(T) == 4) {
        multiply<T, kAlong, kAlong>(acc, stage, kSlabPitch, m, columns, kSlabPitch, n, 16, real, kSlab / 16,
                                    SquaredDifference());
      } else {
        multiply<T, kAlong, kAlong>(acc, stage, kSlabPitch, m, columns, kSlabPitch, n, 16, real, kSlab / 16);
      }
    }

    if constexpr (kNorms) {
#pragma unroll
      for (int pass = 0; pass < Tile::kPasses; ++pass) {
        float sum = own_squares[pass];
        for (int bits = 1; bits < kSlabChunks; bits *= 2) sum += __shfl_xor_sync(kAllLanes, sum, bits);
        if (chunk == 0) exchange_store(squares + pass * kRowsAtOnce + chunk_row, sum);
      }
      __syncthreads();
    }
    const auto square = [&](int row) { return exchange_load(squares + row); };
    if constexpr (is<Kind, Squared>) {
      visit(first, [&](TwoFloats* to, int row, int column, const float* sums) {
        TwoFloats cost{sums[0], sums[1]};
        if constexpr (kNorms) {
          const int at = kTileRows + column - first;
          cost = {square(row) + square(at) - 2 * cost.first, square(row) + square(at + 1) - 2 * cost.second};
          cost = {cost.first < 0 ? 0 : cost.first, cost.second < 0 ? 0 : cost.second};
        }
        *to = cost;
      });
      return;
    }
    if constexpr (is<Kind, Cosine>) {
      const auto inverse = [&](int row) {
        const float norm = sqrtf(square(row));
        return norm > 1 / kLargestInverse || norm != norm ? 1 / norm : kLargestInverse;
      };
      visit(first, [&](TwoFloats* to, int row, int column, const float* sums) {
        const float own = inverse(row);
        const int at = kTileRows + column - first;
        *to = {1 - sums[0] * own * inverse(at), 1 - sums[1] * own * inverse(at + 1)};
      });
      // By every block that has them, and the same each time.
      float* const norms = s.norms + pair_index * (s.problem.rows + s.problem.columns);
      for (int i = threadIdx.x; i < Tile::kRows; i += kProductThreads) {
        const int row = first_row + i, column = first + i - kTileRows;
        if (i < kTileRows && row < pair.n) norms[row] = inverse(i);
        if (i >= kTileRows && column < pair.m) norms[s.problem.rows + column] = inverse(i);
      }
      return;
    }
    if constexpr (is<Kind, Contrastive>) {
#pragma unroll
      for (int r = 0; r < 2 * Tile::kBlocks; ++r) {
#pragma unroll
        for (int w = 0; w < Tile::kOwnStrips; ++w) {
          float logits[8];
          LogSum part{-INFINITY, 0};
#pragma unroll
          for (int i = 0; i < 8; ++i) {
            float& sum = acc[r / 2][w * 4 + i / 2][r % 2 * 2 + i % 2];
            sum *= s.scale;
            logits[i] = first + n + w * kLanes + i / 2 * 8 + 2 * t + i % 2 < pair.m ? sum : -INFINITY;
            part.largest = larger(part.largest, logits[i]);
          }
          for (int bits = 1; bits < 4; bits *= 2)
            part.largest = larger(part.largest, __shfl_xor_sync(kAllLanes, part.largest, bits));
          const float base = part.largest == -INFINITY ? 0.0f : part.largest;
#pragma unroll
          for (int i = 0; i < 8; ++i) part.sum += expf(logits[i] - base);
          for (int bits = 1; bits < 4; bits *= 2) part.sum += __shfl_xor_sync(kAllLanes, part.sum, bits);
          LogSum* const to = parts + (m + r * 8 + g) * kStrips + n / kLanes + w;
          if (t == 0) {
            exchange_store(&to->largest, part.largest);
            exchange_store(&to->sum, part.sum);
          }
        }
      }
      __syncthreads();
      if (threadIdx.x < kTileRows) {
        for (int k = 0; k < kStrips; ++k) {
          const LogSum* const from = parts + threadIdx.x * kStrips + k;
          total = join(total, {exchange_load(&from->largest), exchange_load(&from->sum)});
        }
      }
      if (first + Tile::kColumns >= pair.m) break;
      visit(first, [](TwoFloats* to, int, int, const float* sums) { *to = {sums[0], sums[1]}; });
    }
  }
  if constexpr (is<Kind, Contrastive>) {
    if (threadIdx.x < kTileRows) {
      exchange_store(&totals[threadIdx.x].largest, total.largest);
      exchange_store(&totals[threadIdx.x].sum, logf(total.sum));
    }
    __syncthreads();
    const auto cost_of = [&](int row, float logit) {
      return exchange_load(&totals[row].largest) - logit + exchange_load(&totals[row].sum);
    };
    visit(first, [&](TwoFloats* to, int row, int, const float* sums) {
      *to = {cost_of(row, sums[0]), cost_of(row, sums[1])};
    });
    for (int before = 0; before < first; before += Tile::kColumns) {
      visit(before, [&](TwoFloats* to, int row, int, const float*) {
        *to = {cost_of(row, to->first), cost_of(row, to->second)};
      });
    }
  }
}

// --- from E to G -----------------------------------------------------------------------------------------------------

// Where the strips lie that a warp goes through from left to right: a lane for each of the next 32.
template <class T>
class StripsAhead {
 public:
  __device__ StripsAhead(const Problem& problem, const Pair& pair, int64_t pair_index, const Cells<T>& cells)
      : problem_(problem), pair_(pair), pair_index_(pair_index), cells_(cells) {}

  // By a whole warp. Where row 0 of the strip is; `rows`: those that its part of the band may touch.
  __device__ __forceinline__ int64_t find(int strip, Range* rows) {
    if (strip < first_ || strip >= first_ + kLanes) {
      first_ = strip;
      const int own = smaller(strip + static_cast<int>(threadIdx.x % kLanes), pair_.strips - 1);
      place_ = cells_.place(problem_, pair_, pair_index_, own);
      rows_ = {0, pair_.n};
      if (cells_.order == Order::kBand) {
        rows_.begin = pair_.rows_of_column(own * kLanes).begin;
        rows_.end = pair_.rows_of_column(smaller(own * kLanes + kLanes, pair_.m) - 1).end;
      }
    }
    const int lane = strip - first_;
    *rows = {__shfl_sync(kAllLanes, rows_.begin, lane), __shfl_sync(kAllLanes, rows_.end, lane)};
    return __shfl_sync(kAllLanes, place_, lane);
  }

 private:
  const Problem& problem_;
  const Pair& pair_;
  int64_t pair_index_;
  const Cells<T>& cells_;
  int first_ = INT32_MAX / 2;
  int64_t place_ = 0;
  Range rows_{0, 0};
};

struct TurnArguments {
  Problem problem;
  Cells<float> cells;  // E, then G
  const float* cost;   // of cosine and contrastive, in the places of `cells`
  const float* norms;  // of cosine
  const float* value;  // (B)
  float* self;         // (B, N + M), of squared and cosine
};

// Pairs that have gradients other than zero and NaN.
__device__ __forceinline__ bool has_gradient(const Problem& problem, int64_t pair_index, const float* value) {
  return lengths_in_range(problem, pair_index) && fabsf(value[pair_index]) < INFINITY;
}

// What is left of g in the type T, and what in two parts of it.
template <class T>
__device__ __forceinline__ float in_parts(float g) {
  if constexpr (sizeof(T) == 4) {
    return g;
  } else {
    const float upper = to_float(from_float<T>(g));
    return upper + to_float(from_float<T>(g - upper));
  }
}

constexpr int kTurnWarps = 8;

// A block for each strip of each pair: the factor of each y_j.
template <class T, class Kind>
__global__ void __launch_bounds__(kTurnWarps* kLanes) columns_kernel(TurnArguments s) {
  const unsigned strips = static_cast<unsigned>(s.problem.strips());
  const int64_t pair_index = blockIdx.x / strips;
  const int strip = static_cast<int>(blockIdx.x % strips);
  if (!has_gradient(s.problem, pair_index, s.value)) return;
  const Pair pair(s.problem, pair_index, nullptr);
  if (strip >= pair.strips) return;
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes, column = strip * kLanes + lane;
  const Range rows = pair.rows_of_column(column);
  const int64_t place = s.cells.place(s.problem, pair, pair_index, strip) + lane;
  float sum = 0;
  // In steps that depend on the place alone: row i is always its warp's (i / kTurnWarps)-th.
  for (int i = rows.begin / kTurnWarps * kTurnWarps + warp; i < rows.end; i += kTurnWarps) {
    if (!rows.holds(i) || !pair.in_window(i, column)) continue;
    const int64_t at = place + i * s.cells.row;
    const float e = s.cells.data[at];
    sum += is<Kind, Cosine> ? e * (1 - s.cost[at]) : in_parts<T>(e);
  }
  float* const sums = reinterpret_cast<float*>(dynamic_shared());
  exchange_store(sums + threadIdx.x, sum);
  __syncthreads();
  if (warp > 0 || column >= pair.m) return;
  for (int k = 1; k < kTurnWarps; ++k) sum += exchange_load(sums + k * kLanes + lane);
  const int64_t at = pair_index * (s.problem.rows + s.problem.columns) + s.problem.rows + column;
  if constexpr (is<Kind, Cosine>) {
    s.self[at] = sum == 0 || s.norms[at] >= kLargestInverse ? 0.0f : sum * s.norms[at] * s.norms[at];
  } else {
    s.self[at] = 2 * sum;
  }
}

// A warp per row.
template <class T, class Kind>
__global__ void __launch_bounds__(kTurnWarps* kLanes) turn_kernel(TurnArguments s) {
  const int64_t number = static_cast<int64_t>(blockIdx.x) * kTurnWarps + threadIdx.x / kLanes;
  const int64_t pair_index = number / s.problem.rows;
  const int i = static_cast<int>(number % s.problem.rows), lane = threadIdx.x % kLanes;
  if (pair_index >= s.problem.batch || !has_gradient(s.problem, pair_index, s.value)) return;
  const Pair pair(s.problem, pair_index, nullptr);
  if (i >= pair.n) return;
  const Range band = pair.columns_of_row(i);
  // Zeros are written wherever tokens_kernel looks: outside of the band that is, unless memory holds the band alone.
  const Range columns = s.cells.order == Order::kBand ? band : Range{0, pair.m};
  StripsAhead<float> ahead(s.problem, pair, pair_index, s.cells);
  Range rows;
  const auto expected = [&](int64_t at, int column) {
    return band.holds(column) && pair.in_window(i, column) ? s.cells.data[at] : 0.0f;
  };
  const auto sum_of_lanes = [&](float sum) {
    for (int bits = 1; bits < kLanes; bits *= 2) sum += __shfl_xor_sync(kAllLanes, sum, bits);
    return sum;
  };
  float total = 0;
  if constexpr (is<Kind, Contrastive>) {
    for (int strip = band.begin / kLanes; strip * kLanes < band.end; ++strip)
      total += expected(ahead.find(strip, &rows) + i * s.cells.row + lane, strip * kLanes + lane);
    total = sum_of_lanes(total);
  }
  const float* const norms = s.norms + pair_index * (s.problem.rows + s.problem.columns);
  float self = 0;
  for (int strip = columns.begin / kLanes; strip * kLanes < columns.end; ++strip) {
    const int column = strip * kLanes + lane;
    const int64_t at = ahead.find(strip, &rows) + i * s.cells.row + lane;
    const float e = expected(at, column);
    float g = e;
    if constexpr (is<Kind, Contrastive>) {
      if (column < pair.m) g = expf(-s.cost[at]) * total - e;
    }
    if constexpr (is<Kind, Squared>) self += in_parts<T>(e);
    if constexpr (is<Kind, Cosine>) {
      if (e != 0) {
        g = e * norms[i] * norms[s.problem.rows + column];
        self += e * (1 - s.cost[at]);
      }
    }
    if constexpr (sizeof(T) == 4) {
      s.cells.data[at] = g;
    } else {
      // Two columns to a word; lanes 0-15 write the upper parts, the others what these leave.
      const float first = __shfl_sync(kAllLanes, g, lane % 16 * 2),
                  second = __shfl_sync(kAllLanes, g, lane % 16 * 2 + 1);
      uint32_t word = pack<T>(first, second);
      if (lane >= 16) {
        const float upper = to_float(T{static_cast<uint16_t>(word)});
        word = pack<T>(first - upper, second - to_float(T{static_cast<uint16_t>(word >> 16)}));
      }
      s.cells.data[at] = __int_as_float(static_cast<int>(word));
    }
  }
  if constexpr (!is<Kind, Contrastive>) {
    self = sum_of_lanes(self);
    if (is<Kind, Cosine>) self = self == 0 || norms[i] >= kLargestInverse ? 0.0f : self * norms[i] * norms[i];
    if (is<Kind, Squared>) self *= 2;
    if (lane == 0) s.self[pair_index * (s.problem.rows + s.problem.columns) + i] = self;
  }
}

// --- gradients of the tokens -----------------------------------------------------------------------------------------

constexpr int kTileSize = 128;  // of D

template <class T>
struct TokensTile {
  static constexpr int kStrip = kTileRows * kSlabPitch;  // words of 64 rows of a strip of G
  static constexpr int kPitch = pitch<T>(kTileSize);
  static constexpr int kStage = 2 * kStrip + kTileRows * kPitch;
  static constexpr int kSumsPitch = kTileSize + 4;
  static constexpr size_t kBytes = 2 * kStage * 4;
  static_assert(kTileRows * kSumsPitch <= 2 * kStage);
};

template <class T>
struct TokensArguments {
  Problem problem;
  Cells<const float> cells;  // G
  Tokens<T> own, other;
  int64_t size;  // D
  float scale;
  const float* self;  // (B, N + M) or null
  const float* value;
  const float* grad;  // (B), `grad_stride` apart
  int64_t grad_stride;
  T* out;                 // (B, N, D) or (B, M, D)
  int tiles, size_tiles;  // of own tokens, of D
};

// kOfX: dX = G y, else dY = G^T x.
template <class T, bool kBandAlone, bool kOfX>
__global__ void __launch_bounds__(kProductThreads, sizeof(T) == 2 ? 2 : 1) tokens_kernel(TokensArguments<T> s) {
  using Tile = TokensTile<T>;
  constexpr int kParts = sizeof(T) == 2 ? 2 : 1;
  const int first = static_cast<int>(blockIdx.x % s.tiles) * kTileRows;
  const int64_t column = blockIdx.x / s.tiles % s.size_tiles * kTileSize;
  const int64_t pair_index = blockIdx.x / s.tiles / s.size_tiles;
  const int64_t padded = kOfX ? s.problem.rows : s.problem.columns;
  T* const out = s.out + (pair_index * padded + first) * s.size;
  const bool possible = lengths_in_range(s.problem, pair_index);
  const int64_t length = !possible ? padded : kOfX ? s.problem.x_lengths[pair_index] : s.problem.y_lengths[pair_index];
  constexpr int kPieces = kTileSize / kPiece;
  // Writes this thread's pieces: of real tokens what values_of(row, first column of the tile, the eight) fills in.
  const auto write = [&](const auto& values_of) {
    for (int at = threadIdx.x; at < kTileRows * kPieces; at += kProductThreads) {
      const int row = at / kPieces, piece = at % kPieces * kPiece;
      if (first + row >= padded || column + piece >= s.size) continue;
      float values[kPiece] = {};
      if (first + row < length) values_of(row, piece, values);
      store_piece(out + row * s.size, column + piece, s.size, rounded<T>(values));
    }
  };
  if (!possible || !(fabsf(s.value[pair_index]) < INFINITY) || first >= length) {
    const float fill = possible && s.value[pair_index] == INFINITY ? 0.0f : NAN;
    write([&](int, int, float (&values)[kPiece]) {
      for (float& value : values) value = fill;
    });
    return;
  }

  const Pair pair(s.problem, pair_index, nullptr);
  const int last = smaller<int>(first + kTileRows, static_cast<int>(length)) - 1;
  Range range{0, kOfX ? pair.m : pair.n};  // of the other side's tokens
  if (kBandAlone && !pair.has_windows()) {
    range = kOfX ? Range{pair.columns_of_row(first).begin, pair.columns_of_row(last).end}
                 : Range{pair.rows_of_column(first).begin, pair.rows_of_column(last).end};
  }
  uint32_t* const stages = reinterpret_cast<uint32_t*>(dynamic_shared());
  const T* const other = s.other.data + pair_index * s.other.batch;
  StripsAhead<const float> ahead(s.problem, pair, pair_index, s.cells);
  // Tokens at .. at + 63 of the other side; with them 64 x 64 of G, a strip after the other, 64 rows of 128 bytes each.
  const auto fetch = [&](int at) {
    uint32_t* const stage = stages + at / kTileRows % 2 * Tile::kStage;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int strip = (kOfX ? at : first) / kLanes + h, first_row = kOfX ? first : at;
      Range rows;
      const float* const from = s.cells.data + ahead.find(smaller(strip, pair.strips - 1), &rows);
      for (int k = threadIdx.x; k < kTileRows * kSlabChunks; k += kProductThreads) {
        const int row = k / kSlabChunks, chunk = k % kSlabChunks;
        bring(stage + h * Tile::kStrip + row * kSlabPitch + chunk * 4, from + (first_row + row) * s.cells.row,
              chunk * 4, kLanes, strip < pair.strips && rows.holds(first_row + row));
      }
    }
    constexpr int kChunks = kTileSize / kPerChunk<T>;
    for (int k = threadIdx.x; k < kTileRows * kChunks; k += kProductThreads) {
      const int row = k / kChunks, chunk = k % kChunks;
      bring(stage + 2 * Tile::kStrip + row * Tile::kPitch + chunk * 4, other + (at + row) * s.other.row,
            column + chunk * kPerChunk<T>, s.size, at + row < (kOfX ? pair.m : pair.n));
    }
  };

  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
  const int half = warp / 4, n = warp % 4 * (kTileSize / 4);  // 32 rows and 32 of D per warp
  float acc[2][4][4] = {};
  const int begin = range.begin / kTileRows * kTileRows;
  fetch(begin);
  commit_copies();
  for (int at = begin; at < range.end; at += kTileRows) {
    wait_for_copies<0>();
    __syncthreads();  // these are there, and those before have been read
    if (at + kTileRows < range.end) fetch(at + kTileRows);
    commit_copies();
    const uint32_t* const stage = stages + at / kTileRows % 2 * Tile::kStage;
    const uint32_t* const tokens = stage + 2 * Tile::kStrip;
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      const uint32_t* const cells = stage + part * (kSlabWords / 2);
      if constexpr (kOfX) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          multiply<T, kAlong, kAcross>(acc, cells + h * Tile::kStrip, kSlabPitch, half * 32,
                                       tokens + h * kLanes * Tile::kPitch, Tile::kPitch, n, 16, 2, kLanes / 16);
        }
      } else {
        multiply<T, kAcross, kAcross>(acc, cells + half * Tile::kStrip, kSlabPitch, 0, tokens, Tile::kPitch, n, 16, 2,
                                      kTileRows / 16);
      }
    }
  }

  // Through shared memory, so that whole rows are written.
  __syncthreads();  // the last tiles are read
  float* const sums = reinterpret_cast<float*>(stages);
#pragma unroll
  for (int r = 0; r < 4; ++r) {
#pragma unroll
    for (int h = 0; h < 4; ++h) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        exchange_store(sums + (half * 32 + r * 8 + lane / 4) * Tile::kSumsPitch + n + h * 8 + lane % 4 * 2 + i,
                       acc[r / 2][h][r % 2 * 2 + i]);
      }
    }
  }
  __syncthreads();  // the sums are written
  const float grad = s.grad[pair_index * s.grad_stride];
  const T* const own = s.own.data + pair_index * s.own.batch + first * s.own.row;
  const float* const selves =
      s.self ? s.self + pair_index * (s.problem.rows + s.problem.columns) + (kOfX ? 0 : s.problem.rows) + first
             : nullptr;
  write([&](int row, int piece, float (&values)[kPiece]) {
    const float self = selves ? selves[row] : 0.0f;
    Piece<T> mine;
    if (self != 0) mine = load_piece(own + row * s.own.row, column + piece, s.size);
#pragma unroll
    for (int j = 0; j < kPiece; ++j) {
      const float sum = s.scale * exchange_load(sums + row * Tile::kSumsPitch + piece + j);
      values[j] = grad * (self != 0 ? fmaf(self, mine.get(j), sum) : sum);
    }
  });
}

// --- launchers -------------------------------------------------------------------------------------------------------

// Floats of memory, per pair, for the costs or for E and G.
template <class Kind>
int64_t cells_per_pair(const Problem& problem) {
  return Cells<float>::strips(nullptr, problem, kBandAlone<Kind>).batch;
}

// What pair_cost leaves for the sweep and for the gradients.
template <class Kind, class T>
Cells<T> cells_of(const Problem& problem, T* data) {
  return Cells<T>::strips(data, problem, kBandAlone<Kind>);
}

// `cost`: cells_per_pair floats per pair; `norms` (B, N + M), of cosine; `scale` = 1 / tau, of contrastive.
template <class T, class Kind>
cudaError_t pair_cost(const Problem& problem, const Tokens<T>& x, const Tokens<T>& y, int64_t size, float scale,
                      float* cost, float* norms, cudaStream_t stream) {
  if (problem.batch * problem.rows * problem.columns == 0) return cudaSuccess;
  const auto run = [&]<int kStrips>(std::integral_constant<int, kStrips>) {
    using Tile = CostTile<kStrips>;
    const int64_t row_tiles = divide_up(problem.rows, kTileRows);
    const int64_t column_tiles = is<Kind, Contrastive> ? 1 : divide_up(problem.columns, Tile::kColumns);
    const int64_t blocks = problem.batch * row_tiles * column_tiles;
    if (blocks > INT32_MAX) return cudaErrorInvalidValue;
    const CostArguments<T> arguments{problem,
                                     x,
                                     y,
                                     size,
                                     scale,
                                     cells_of<Kind>(problem, cost),
                                     norms,
                                     static_cast<int>(row_tiles),
                                     static_cast<int>(column_tiles)};
    return launch(cost_kernel<T, Kind, kStrips>, blocks, kProductThreads, Tile::kBytes, stream, arguments);
  };
  if (problem.columns <= CostTile<2>::kColumns) return run(std::integral_constant<int, 2>());
  return run(std::integral_constant<int, is<Kind, Contrastive> ? 8 : 4>());
}

// From E, in `cells`, which is lost, to the gradients of the tokens times grad (B); either may be null. `cost` and
// `norms`: of pair_cost. `self` (B, N + M): memory, not of contrastive.
template <class T, class Kind>
cudaError_t tokens_gradient(const Problem& problem, const Tokens<T>& x, const Tokens<T>& y, int64_t size, float scale,
                            const float* cost, const float* norms, const float* value, const float* grad,
                            int64_t grad_stride, float* cells, float* self, T* grad_x, T* grad_y, cudaStream_t stream) {
  if (problem.batch * (problem.rows + problem.columns) * size == 0) return cudaSuccess;
  const TurnArguments turn{problem, cells_of<Kind>(problem, cells), cost, norms, value, self};
  constexpr int kThreads = kTurnWarps * kLanes;
  cudaError_t error = cudaSuccess;
  if constexpr (!is<Kind, Contrastive>) {
    if (grad_y) {
      error = launch(columns_kernel<T, Kind>, problem.batch * problem.strips(), kThreads, kThreads * sizeof(float),
                     stream, turn);
      if (error != cudaSuccess) return error;
    }
  }
  error = launch(turn_kernel<T, Kind>, divide_up(problem.batch * problem.rows, kTurnWarps), kThreads, 0, stream, turn);
  const auto run = [&](auto of_x, const Tokens<T>& own, const Tokens<T>& other, int64_t count, T* out) {
    if (error != cudaSuccess || !out) return;
    const int64_t tiles = divide_up(count, kTileRows), size_tiles = divide_up(size, kTileSize);
    const int64_t blocks = problem.batch * tiles * size_tiles;
    if (blocks > INT32_MAX) {
      error = cudaErrorInvalidValue;
      return;
    }
    const float factor = is<Kind, Contrastive> ? scale : is<Kind, Cosine> ? -1.0f : -2.0f;
    const TokensArguments<T> arguments{problem,
                                       cells_of<Kind, const float>(problem, cells),
                                       own,
                                       other,
                                       size,
                                       factor,
                                       is<Kind, Contrastive> ? nullptr : self,
                                       value,
                                       grad,
                                       grad_stride,
                                       out,
                                       static_cast<int>(tiles),
                                       static_cast<int>(size_tiles)};
    error = launch(tokens_kernel<T, kBandAlone<Kind>, of_x>, blocks, kProductThreads, TokensTile<T>::kBytes, stream,
                   arguments);
  };
  run(std::true_type{}, x, y, problem.rows, grad_x);
  run(std::false_type{}, y, x, problem.columns, grad_y);
  return error;
}

}  // namespace lyra::soft_dtw
