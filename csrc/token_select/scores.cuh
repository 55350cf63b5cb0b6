// How much attention each key gets from the counted query rows, without any Lq x L matrix. Raw pointers, no torch.
//
// Math. With s_rk = scale q_r . k + bias_k over the keys k that row r sees, and G = Hq / Hkv query heads per key head:
//   score_k = sum_h w_h mean_r exp(s_rk - lse_r),   lse_r = log sum_k exp(s_rk),   w_h = 1 / Hq or given
// Two passes: the first finds lse, the second adds up the shares of each key; with lse given there is only the second.
// All in units of log 2, so that powers are powers of two.
//
// Shapes. query (B,Hq,Lq,D), key (B,Hkv,L,D), any strides; packed, query (1,Hq,Tq,D), key (1,Hkv,Tk,D) and cu_seqlens.
// query_mask, key_limits (B,Lq); key_mask, key_bias (B,L); head_weights (B,Hq); lse (B,Hq,Lq) double or float. planes
// (B,P,L): the scores per key head, P = Hkv, or per query head; `sum_planes` adds up the former. A row counts if its
// mask says so and it sees a real key; a key is real if its mask says so and its bias is not -inf. A row sees the real
// keys before its limit, and, causal, up to its own place.
//
// Plan. `survey_kernel` (not where nothing is masked) lists the rows that count and the keys that are real. All later
// work is cut in that order, into blocks whose size the sample's own numbers say, and sums run in fixed orders without
// atomics: a sample gets the same bits alone and in any batch, wherever its padding stands. The G query heads of a key
// head are packed into one list of rows. Both passes hold 128 rows of one operand in registers (64 where a row is
// longer than 256 bytes) and stream the other through shared memory in tiles of 64, the next of which is copied
// (cp.async) while one is used, 4 warps, m16n8k16 products with float32 sums:
//   norms_kernel   holds query rows, streams a split of the keys; per row the largest logit and the sum of powers
//   merge_kernel   those of all splits to lse, and weight / (rows sum); clears the planes where keys may be masked
//   shares_kernel  holds keys, streams all rows; each lane adds up its keys' shares over the rows
// Short samples (kShortKeys) take two launches: the blocks of norms_kernel survey for themselves and clear the planes,
// those of shares_kernel merge the few splits of each row as they load it. With more splits, each block would read more
// for it than a launch costs.
// 16-bit inputs go to the tensor cores; float32 keeps its precision in fused multiply-adds, on values that the lanes
// hand each other (about five times slower than those could go).
//
// FLOPs: 4 Lq Hq L D, half of it with lse; bytes: K read twice, 2 L Hkv D 2, parts and planes about 60 Hkv L / 4.
// Floor, H100 (3.0 TB/s, 800 TFLOP/s), 28/4 heads, D = 128, Lq = 64, L = 131072: 2 x 75 us by products, 2 x 63 us by
// exp2 (16 per clock and SM), 2 x 45 us by K. This path cannot reach it: mma.sync gives about 60 % of that rate.
// Instructions of the loops over 16 streamed rows (sm_90a, cuobjdump): norms_kernel 200, shares_kernel 166, of which 32
// products, 20 and 16 powers, 8 ldmatrix, for 512 scores. At one per clock and scheduler (1.755 GHz) that is 99 and 82
// us; around them each tile of 64 costs its block the addresses of the next. Estimated, not yet timed: 280 us, 130 us
// with lse; L = 576 10 us. Launches: 2 if short; else 3, 2 with lse, and one to survey. `sum_planes` is one more.
//
// Registers per thread, at most, spills none (tests/test_compile_budget.py reads these lines):
//   budget sm_80: norms_kernel<lyra::Bf16, 32> 128, shares_kernel<lyra::Bf16, 32> 128
//   budget sm_80: norms_kernel<lyra::Bf16, 64> 168, shares_kernel<lyra::Bf16, 64> 168
//   budget sm_80: norms_kernel<lyra::Bf16, 128> 168, shares_kernel<lyra::Bf16, 128> 168
//   budget sm_80: norms_kernel<lyra::Half, 64> 168, shares_kernel<lyra::Half, 64> 168
//   budget sm_80: norms_kernel<float, 64> 255, shares_kernel<float, 64> 255
//   budget sm_80: norms_kernel<float, 128> 168, shares_kernel<float, 128> 168
//   budget sm_80: survey_kernel 64, merge_kernel 64, sum_kernel 32
//   budget sm_90a: norms_kernel<lyra::Bf16, 32> 128, shares_kernel<lyra::Bf16, 32> 128
//   budget sm_90a: norms_kernel<lyra::Bf16, 64> 168, shares_kernel<lyra::Bf16, 64> 168
//   budget sm_90a: norms_kernel<lyra::Bf16, 128> 168, shares_kernel<lyra::Bf16, 128> 168
//   budget sm_90a: norms_kernel<lyra::Half, 64> 168, shares_kernel<lyra::Half, 64> 168
//   budget sm_90a: norms_kernel<float, 64> 255, shares_kernel<float, 64> 255
//   budget sm_90a: norms_kernel<float, 128> 168, shares_kernel<float, 128> 168
//   budget sm_90a: survey_kernel 64, merge_kernel 64, sum_kernel 32
#pragma once

#include <cstdint>

#include "lyra/launch.h"
#include "score_operands.h"
#include "score_problem.h"
#include "warp.h"

namespace lyra::token_select {

constexpr int kMaxRowBlocks = 8;  // blocks that share the rows of one key head
constexpr int kSurveyThreads = 512;
constexpr int kSurveyTokens = 16;  // side by side, per thread
constexpr int kMaxWords = 128;     // of 32 bits, in a row of an operand

// 2^x. On a GPU one instruction, 2 ulp, and 0 below the normal numbers.
__device__ __forceinline__ float power_of_two(float x) {
#ifdef LYRA_HOST_CUDA
  return exp2f(x);
#else
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
  return power;
#endif
}

// --- which rows count, which keys are real -----------------------------------------------------------------------

// By a block: writes the i < size for which is(i) to `list`, in order, and returns how many there are. `totals`: a
// number per warp in shared memory.
template <class Is>
__device__ int32_t list_where(int32_t size, const Is& is, int32_t* list, int32_t* totals) {
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes, warps = blockDim.x / kLanes;
  int32_t done = 0;
  for (int64_t base = 0; base < size; base += blockDim.x * kSurveyTokens) {
    const int32_t first = static_cast<int32_t>(base) + threadIdx.x * kSurveyTokens;
    unsigned bits = 0;
#pragma unroll
    for (int k = 0; k < kSurveyTokens; ++k) bits |= (first + k < size && is(first + k) ? 1u : 0u) << k;
    const int32_t mine = __popc(bits), so_far = running_sum(mine);
    if (lane == kLanes - 1) exchange_store(totals + warp, so_far);
    __syncthreads();
    const int32_t of_warps = running_sum(lane < warps ? exchange_load(totals + lane) : 0);
    const int32_t before = warp == 0 ? 0 : __shfl_sync(kAllLanes, of_warps, warp - 1);
    int32_t place = done + before + so_far - mine;
    for (int k = 0; k < kSurveyTokens; ++k) {
      if (bits >> k & 1) list[place++] = first + k;
    }
    done += __shfl_sync(kAllLanes, of_warps, kLanes - 1);
    __syncthreads();
  }
  return done;
}

// By a block: lists the sample's real keys and the rows that count, and notes how many there are.
__device__ void survey(const Problem& p, Sample& s, int32_t* key_list, int32_t* row_list, int32_t* totals) {
  const auto real = [&](int32_t k) {
    const int64_t at = s.first_key + k;
    return (!p.key_mask || p.key_mask[at]) && !(p.key_bias && p.key_bias[at] == -INFINITY);
  };
  s.keys = list_where(s.own_keys, real, key_list, totals);
  const int32_t first = s.keys > 0 ? key_list[0] : s.own_keys;
  const auto counts = [&](int32_t r) {
    return (!p.query_mask || p.query_mask[s.first_row + r]) && s.limit(p, r) > first;
  };
  s.rows = list_where(s.own_rows, counts, row_list, totals);
}

// What counted row i of the sample's heads weighs in the scores, over the sum of its powers.
__device__ __forceinline__ float factor_of(const Problem& p, const Sample& s, int64_t i, double sum) {
  const bool weighted = !p.per_head && p.head_weights;
  const double weight = weighted ? p.head_weights[s.b * p.heads + i / s.rows] : 1.0;
  const double among = weighted || p.per_head ? s.rows : static_cast<double>(p.heads) * s.rows;
  return static_cast<float>(weight / (among * sum));
}

// Of counted row i of the sample's heads, from the lse that was given.
__device__ Norm given_norm(const Problem& p, const Sample& s, const Workspace& w, int64_t i) {
  const int64_t head = i / s.rows, r = i % s.rows, row = w.row_list ? w.row_list[s.first_row + r] : r;
  const int64_t at = p.cu_q ? head * p.rows + s.first_row + row : (s.b * p.heads + head) * p.rows + row;
  const double lse = p.lse ? p.lse[at] : static_cast<double>(p.lse_single[at]);
  const float base = static_cast<float>(kLog2e * lse);
  return {base, factor_of(p, s, i, exp2(fma(kLog2e, lse, -static_cast<double>(base))))};
}

// A block per sample.
__global__ void __launch_bounds__(kSurveyThreads) survey_kernel(Problem p, Workspace w) {
  Sample s(p, nullptr, blockIdx.x);
  if (p.surveyed()) {
    survey(p, s, w.key_list + s.first_key, w.row_list + s.first_row, reinterpret_cast<int32_t*>(dynamic_shared()));
    if (threadIdx.x == 0) {
      w.counts[2 * s.b] = s.rows;
      w.counts[2 * s.b + 1] = s.keys;
    }
  }
  if (!p.is_short()) return;
  // With lse given this is the first of two launches.
  for (int64_t i = threadIdx.x; i < s.rows * p.heads; i += blockDim.x) {
    w.norms[s.head_rows(p) + i] = given_norm(p, s, w, i);
  }
  for (int64_t i = threadIdx.x; i < p.n_planes() * p.keys; i += blockDim.x) {
    p.planes[s.b * p.n_planes() * p.keys + i] = 0;
  }
}

// --- first pass ----------------------------------------------------------------------------------------------------

__device__ __forceinline__ Part join(const Part& a, const Part& b) {
  const float largest = a.largest > b.largest ? a.largest : b.largest;
  const float base = largest == -INFINITY ? 0.0f : largest;
  return {largest, fmaf(a.sum, power_of_two(a.largest - base), b.sum * power_of_two(b.largest - base))};
}

__device__ __forceinline__ Part from_other_lane(const Part& mine, int bits) {
  return {__shfl_xor_sync(kAllLanes, mine.largest, bits), __shfl_xor_sync(kAllLanes, mine.sum, bits)};
}

// Few splits of a row, `stride` apart: one joined to the other, all loads under way together.
__device__ __forceinline__ Part merged(const Part* parts, int64_t stride, int64_t splits) {
  Part part[kFewSplits];
#pragma unroll
  for (int k = 0; k < kFewSplits; ++k) part[k] = k < splits ? parts[k * stride] : Part{-INFINITY, 0};
#pragma unroll
  for (int k = 1; k < kFewSplits; ++k) part[0] = join(part[0], part[k]);
  return part[0];
}

// Bytes of shared memory in which a block of norms_kernel makes the lists of a short sample.
inline size_t survey_bytes(const Problem& p) {
  return p.is_short() && p.surveyed() ? static_cast<size_t>(p.keys + p.rows + kLanes) * sizeof(int32_t) : 0;
}

template <class T, int kWords>
__global__ void __launch_bounds__(kThreads) norms_kernel(Problem p, Workspace w, int64_t row_blocks) {
  uint32_t* const buffers = reinterpret_cast<uint32_t*>(dynamic_shared());
  const int64_t kv_head = blockIdx.x / row_blocks % p.kv_heads, split = blockIdx.x / row_blocks / p.kv_heads;
  KeyBlock block;
  if (!block.find(p, w.counts, split, p.splits_each(), Problem::splits_of)) return;
  const bool alone = p.is_short();  // no other kernel has run before
  Sample s(p, alone ? nullptr : w.counts, block.b);
  const int32_t* key_list = w.key_list ? w.key_list + s.first_key : nullptr;
  const int32_t* row_list = w.row_list ? w.row_list + s.first_row : nullptr;
  if (alone && p.surveyed()) {
    int32_t *const keys = reinterpret_cast<int32_t*>(buffers + 2 * kBufferWords<kWords>), *const rows = keys + p.keys;
    survey(p, s, keys, rows, rows + p.rows);
    if (kv_head == 0 && block.at == 0 && blockIdx.x % row_blocks == 0) {
      for (int k = threadIdx.x; k < s.keys; k += kThreads) w.key_list[s.first_key + k] = keys[k];
      for (int r = threadIdx.x; r < s.rows; r += kThreads) w.row_list[s.first_row + r] = rows[r];
      if (threadIdx.x == 0) {
        w.counts[2 * s.b] = s.rows;
        w.counts[2 * s.b + 1] = s.keys;
      }
    }
    key_list = keys;
    row_list = rows;
  }
  if (alone && blockIdx.x % row_blocks == 0) {
    const int64_t planes = p.n_planes() / p.kv_heads, size = Problem::split_size(p.keys);  // of this key head
    for (int64_t k = threadIdx.x; k < size; k += kThreads) {
      const int64_t place = block.at * size + k;
      for (int64_t plane = kv_head * planes; place < p.keys && plane < (kv_head + 1) * planes; ++plane) {
        p.planes[(s.b * p.n_planes() + plane) * p.keys + place] = 0;
      }
    }
  }
  const Keys<T> keys(p, s, key_list, kv_head);
  const QueryRows<T> rows(p, s, row_list, kv_head);
  const int32_t size = static_cast<int32_t>(Problem::split_size(s.keys));
  const int32_t begin = static_cast<int32_t>(block.at) * size;
  const int32_t end = s.keys - begin > size ? begin + size : s.keys;
  if (begin >= end) return;
  Part* parts = w.parts + split * p.heads * p.rows + kv_head * rows.all;
  const float scale = p.scale * static_cast<float>(kLog2e);
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;

  for (int64_t first = blockIdx.x % row_blocks * Held<kWords>::kAll; first < rows.all;
       first += row_blocks * Held<kWords>::kAll) {
    Held<kWords> held;
    const int32_t base_row = static_cast<int32_t>(first);
    held.template load<T>(p.query, p.dim, [&](int i) { return rows.row(base_row + i); }, buffers);
    // This lane's rows: 16 m + 8 h + lane / 4 of the warp's.
    int32_t limits[Held<kWords>::kBlocks][2];
    Part mine[Held<kWords>::kBlocks][2];
    const auto number = [&](int m, int h) { return base_row + warp * Held<kWords>::kRows + m * 16 + h * 8 + lane / 4; };
    for (int m = 0; m < Held<kWords>::kBlocks; ++m) {
      for (int h = 0; h < 2; ++h) {
        limits[m][h] = number(m, h) < rows.all ? rows.limit(number(m, h)) : 0;
        mine[m][h] = {-INFINITY, 0};
      }
    }

    const auto fetch = [&](uint32_t* tile, int32_t at) {
      fetch_rows<T, kWords, kTile>(
          p.key, p.dim, [&](int i) { return at + i < end ? keys.row(at + i) : nullptr; }, tile);
      if (threadIdx.x >= kTile) return;
      const bool exists = at + static_cast<int>(threadIdx.x) < end;
      const int32_t place = exists ? keys.place(at + threadIdx.x) : INT32_MAX;
      exchange_store(places_in<kWords>(tile) + threadIdx.x, place);
      exchange_store(biases_in<kWords>(tile) + threadIdx.x, exists ? keys.bias(place) : 0.0f);
    };
    stream<kWords>(buffers, begin, end, fetch, [&](uint32_t* tile) {
      const int32_t* const places = places_in<kWords>(tile);
      const float* const biases = biases_in<kWords>(tile);
#pragma unroll 1
      for (int column = 0; column < kTile; column += 16) {
        float sums[Held<kWords>::kBlocks][2][4] = {};
        held.template against<T>(tile, column, sums);
        int32_t place[4];
        float bias[4];
        for (int e = 0; e < 4; ++e) {
          const int c = column + e / 2 * 8 + lane % 4 * 2 + e % 2;
          place[e] = exchange_load(places + c);
          bias[e] = exchange_load(biases + c);
        }
#pragma unroll
        for (int m = 0; m < Held<kWords>::kBlocks; ++m) {
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            Part& part = mine[m][h];
            float logits[4], largest = part.largest;
#pragma unroll
            for (int e = 0; e < 4; ++e) {
              const float logit = fmaf(sums[m][e / 2][2 * h + e % 2], scale, bias[e]);
              logits[e] = place[e] < limits[m][h] ? logit : -INFINITY;
              largest = logits[e] > largest ? logits[e] : largest;
            }
            const float base = largest == -INFINITY ? 0.0f : largest;
            float sum = part.sum * power_of_two(part.largest - base);
#pragma unroll
            for (int e = 0; e < 4; ++e) sum += power_of_two(logits[e] - base);
            part = {largest, sum};
          }
        }
      }
    });

    for (int m = 0; m < Held<kWords>::kBlocks; ++m) {
      for (int h = 0; h < 2; ++h) {
        Part part = mine[m][h];
        part = join(part, from_other_lane(part, 1));
        part = join(part, from_other_lane(part, 2));
        if (lane % 4 == 0 && number(m, h) < rows.all) parts[number(m, h)] = part;
      }
    }
  }
}

// A warp per counted row of a query head: blocks of kThreads / kLanes rows.
__global__ void __launch_bounds__(kThreads) merge_kernel(Problem p, Workspace w) {
  const int lane = threadIdx.x % kLanes;
  const int64_t number = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kLanes;
  if (p.surveyed()) {  // the next launch writes the real keys alone
    const int64_t size = Workspace::all_keys(p) * p.n_planes();
    for (int64_t k = number * kLanes + lane; k < size; k += int64_t{gridDim.x} * kThreads) p.planes[k] = 0;
  }
  int64_t b = 0, i = number;  // the sample, and the row among those of its heads
  if (p.cu_q) {
    for (; b < p.batch; ++b) {
      const int64_t mine = Sample(p, w.counts, b).rows * p.heads;
      if (i < mine) break;
      i -= mine;
    }
    if (b == p.batch) return;
  } else {
    b = number / (p.rows * p.heads);
    i = number % (p.rows * p.heads);
    if (b >= p.batch) return;
  }
  const Sample s(p, w.counts, b);
  if (i >= s.rows * p.heads || s.keys == 0) return;

  Norm norm;
  if (p.has_lse()) {
    norm = given_norm(p, s, w, i);
  } else {
    int64_t split = b * p.splits_each();  // the sample's first
    if (p.cu_k) {
      split = 0;
      for (int64_t other = 0; other < b; ++other) split += Problem::splits_of(Sample(p, w.counts, other).keys);
    }
    const int64_t splits = Problem::splits_of(s.keys), stride = p.heads * p.rows;
    const Part* parts = w.parts + split * stride + i;
    Part part{-INFINITY, 0};
    if (splits <= kFewSplits) {
      part = merged(parts, stride, splits);
    } else {
      for (int64_t k = lane; k < splits; k += kLanes) part = join(part, parts[k * stride]);
      for (int bits = 1; bits < kLanes; bits *= 2) part = join(part, from_other_lane(part, bits));
    }
    norm = {part.largest, factor_of(p, s, i, part.sum)};
  }
  if (lane == 0) w.norms[s.head_rows(p) + i] = norm;
}

// --- second pass ---------------------------------------------------------------------------------------------------

template <class T, int kWords>
__global__ void __launch_bounds__(kThreads) shares_kernel(Problem p, Workspace w) {
  uint32_t* const buffers = reinterpret_cast<uint32_t*>(dynamic_shared());
  constexpr int kBlocks = Held<kWords>::kBlocks;
  const int64_t kv_head = blockIdx.x % p.kv_heads;
  KeyBlock block;
  constexpr int64_t kKeys = Held<kWords>::kAll;
  const auto blocks_of = [](int64_t n) { return (n + kKeys - 1) / kKeys; };
  if (!block.find(p, w.counts, blockIdx.x / p.kv_heads, p.key_blocks_each(kKeys), blocks_of)) return;
  const Sample s(p, w.counts, block.b);
  const Keys<T> keys(p, s, w.key_list ? w.key_list + s.first_key : nullptr, kv_head);
  const QueryRows<T> rows(p, s, w.row_list ? w.row_list + s.first_row : nullptr, kv_head);
  const int32_t begin = static_cast<int32_t>(block.at * Held<kWords>::kAll);
  if (begin >= s.keys || rows.all == 0) return;
  const Norm* norms = w.norms + s.head_rows(p) + kv_head * rows.all;
  const bool merges = p.is_short() && !p.has_lse();
  const Part* parts = w.parts + s.b * p.splits_each() * p.heads * p.rows + kv_head * rows.all;
  const auto norm_of = [&](int32_t i) {
    if (!merges) return norms[i];
    const Part part = merged(parts + i, p.heads * p.rows, Problem::splits_of(s.keys));
    return Norm{part.largest, factor_of(p, s, kv_head * rows.all + i, part.sum)};
  };
  const float scale = p.scale * static_cast<float>(kLog2e);
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;

  Held<kWords> held;
  held.template load<T>(p.key, p.dim, [&](int i) { return keys.row(begin + i); }, buffers);
  // This lane's keys: 16 m + 8 h + lane / 4 of the warp's.
  int32_t place[kBlocks][2];
  float bias[kBlocks][2];
  for (int m = 0; m < kBlocks; ++m) {
    for (int h = 0; h < 2; ++h) {
      const int32_t k = begin + warp * Held<kWords>::kRows + m * 16 + h * 8 + lane / 4;
      place[m][h] = k < s.keys ? keys.place(k) : INT32_MAX;
      bias[m][h] = k < s.keys ? keys.bias(place[m][h]) : 0.0f;
    }
  }

  // A plane takes the rows of one query head, or those of all that share the key head.
  const int32_t per_plane = p.per_head ? s.rows : rows.all;
  for (int32_t first = 0; first < rows.all; first += per_plane) {
    float totals[kBlocks][2] = {};
    const int32_t end = first + per_plane;
    const auto fetch = [&](uint32_t* tile, int32_t at) {
      fetch_rows<T, kWords, kTile>(
          p.query, p.dim, [&](int i) { return at + i < end ? rows.row(at + i) : nullptr; }, tile);
      if (threadIdx.x >= kTile) return;
      const int32_t i = at + static_cast<int32_t>(threadIdx.x);
      const Norm norm = i < end ? norm_of(i) : Norm{0, 0};
      exchange_store(places_in<kWords>(tile) + threadIdx.x, i < end ? rows.limit(i) : 0);
      exchange_store(biases_in<kWords>(tile) + threadIdx.x, norm.base);
      exchange_store(biases_in<kWords>(tile) + kTile + threadIdx.x, norm.factor);
    };
    stream<kWords>(buffers, first, end, fetch, [&](uint32_t* tile) {
      const int32_t* const limits = places_in<kWords>(tile);
      const float *const bases = biases_in<kWords>(tile), *const factors = bases + kTile;
#pragma unroll 1
      for (int column = 0; column < kTile; column += 16) {
        float sums[kBlocks][2][4] = {};
        held.template against<T>(tile, column, sums);
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int c = column + e / 2 * 8 + lane % 4 * 2 + e % 2;
          const int32_t limit = exchange_load(limits + c);
          const float base = exchange_load(bases + c), factor = exchange_load(factors + c);
#pragma unroll
          for (int m = 0; m < kBlocks; ++m) {
#pragma unroll
            for (int h = 0; h < 2; ++h) {
              const float logit = fmaf(sums[m][e / 2][2 * h + e % 2], scale, bias[m][h]);
              const float share = power_of_two(logit - base) * factor;
              totals[m][h] += place[m][h] < limit ? share : 0.0f;
            }
          }
        }
      }
    });

    const int64_t plane = p.per_head ? kv_head * (p.heads / p.kv_heads) + first / per_plane : kv_head;
    float* to = p.cu_k ? p.planes + plane * p.keys + s.first_key : p.planes + (s.b * p.n_planes() + plane) * p.keys;
    for (int m = 0; m < kBlocks; ++m) {
      for (int h = 0; h < 2; ++h) {
        float total = totals[m][h];
        total += __shfl_xor_sync(kAllLanes, total, 1);
        total += __shfl_xor_sync(kAllLanes, total, 2);
        if (lane % 4 == 0 && place[m][h] != INT32_MAX) to[place[m][h]] = total;
      }
    }
  }
}

// scores (B, L): the sum of the planes (B, P, L), in order.
__global__ void __launch_bounds__(kThreads)
    sum_kernel(const float* planes, int64_t n_planes, int64_t length, int64_t size, float* scores) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= size) return;
  const float* at = planes + i / length * n_planes * length + i % length;
  float sum = *at;
  for (int64_t plane = 1; plane < n_planes; ++plane) sum += at[plane * length];
  scores[i] = sum;
}

// --- launchers -----------------------------------------------------------------------------------------------------

template <class T, int kWords>
cudaError_t run_scores(const Problem& p, const Workspace& w, cudaStream_t stream) {
  const int64_t row_blocks = (p.heads / p.kv_heads * p.rows + Held<kWords>::kAll - 1) / Held<kWords>::kAll;
  const int64_t most = row_blocks < kMaxRowBlocks ? row_blocks : kMaxRowBlocks;
  cudaError_t error = cudaSuccess;
  if (p.is_short() ? p.has_lse() : p.surveyed()) {
    const int threads = p.keys > 16384 ? kSurveyThreads : kThreads;
    error = launch(survey_kernel, p.batch, threads, kLanes * sizeof(int32_t), stream, p, w);
    if (error != cudaSuccess) return error;
  }
  if (!p.has_lse()) {
    error = launch(norms_kernel<T, kWords>, p.splits() * p.kv_heads * most, kThreads,
                   kBufferBytes<kWords> + survey_bytes(p), stream, p, w, most);
    if (error != cudaSuccess) return error;
  }
  if (!p.is_short()) {
    error = launch(merge_kernel, (Workspace::all_rows(p) * p.heads + kWarps - 1) / kWarps, kThreads, 0, stream, p, w);
    if (error != cudaSuccess) return error;
  }
  return launch(shares_kernel<T, kWords>, p.key_blocks(Held<kWords>::kAll) * p.kv_heads, kThreads, kBufferBytes<kWords>,
                stream, p, w);
}

// D as far as kMaxWords reach. Writes all of p.planes, unless p.is_empty(); `workspace`: what Workspace::place says,
// 16-byte aligned. Both may hold anything.
template <class T>
cudaError_t score_planes(const Problem& p, void* workspace, cudaStream_t stream) {
  if (p.is_empty()) return cudaSuccess;
  Workspace w;
  w.place(p, static_cast<char*>(workspace));
  const int64_t words = (p.dim + kPerWord<T> - 1) / kPerWord<T>;
  if constexpr (kPerWord<T> == 2) {
    if (words <= 32) return run_scores<T, 32>(p, w, stream);
  }
  if (words <= 64) return run_scores<T, 64>(p, w, stream);
  if (words <= kMaxWords) return run_scores<T, kMaxWords>(p, w, stream);
  return cudaErrorInvalidValue;
}

inline cudaError_t sum_planes(const float* planes, int64_t n_planes, int64_t length, int64_t size, float* scores,
                              cudaStream_t stream) {
  if (size == 0) return cudaSuccess;
  return launch(sum_kernel, (size + kThreads - 1) / kThreads, kThreads, 0, stream, planes, n_planes, length, size,
                scores);
}

}  // namespace lyra::token_select
