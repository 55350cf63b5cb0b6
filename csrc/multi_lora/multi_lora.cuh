// Low-rank adapters chosen per token: shrink, expand and outer, of which forward and backward are made. Raw pointers,
// no torch.
//
// Math. Token t goes through S adapters e = ids[t,s], each with a weight; -1 is none. Adapter e owns rank_e rows of a
// bank (rows, D) from first_e on, and the columns [col_e, col_e + rank_e) of h (T, S, G); the table (E, 3) says which.
//   shrink   h[t,s,col_e+j]  = sum_k m(t,k) x[t,k] bank[first_e+j,k]
//   expand   y[t,n]         += m(t,n) sum_e sum_j c_e[t,j] bank[first_e+j,n]
//   outer    out[first_e+j,d] = sum over the (t,s) of e of c[t,s,j] m(t,d) z[t,d]
//   c_e[t,j] = sum over the s of e of weight[t,s] scaling[e] h[t,s,col_e+j], rounded once to the type T of x, bank, y,
//   z
// m is a dropout mask of zeros and ones, made from a seed where it is needed; its 1/(1-p) is part of scaling.
// forward   h = shrink(x, A);  expand(y, h, B).        y: what the base layer gave
// backward  dh = shrink(dy, B);  dB = outer(h, dy);  expand(dx, dh, A);  dA = outer(dh, x).
//
// Plan of the routing (built once per step, `plan_kernel` or plain torch; sizes depend on T, S, E alone):
//   ids (T, S)            out of range is -1
//   pairs (T S)           flat (t, s) sorted by adapter, then as they are; adapter e has starts[e] to starts[e+1]
//   chunks (chunk_rows, 2) adapter and first place in pairs of runs of at most kTile pairs; unused rows: -1, 0
//   present (T / kTile, words)  bit e of tile i: one of its tokens has adapter e
//
// Plan of the kernels. One product of 64 x 64 or 64 x 128 per block of 4 x 2 warps, by tensor cores (bfloat16, float16)
// or FMA (float32); global memory -> registers (where masks act) -> shared memory, the next slab under way meanwhile.
//   shrink: a block has a chunk, 64 ranks and all of D, or one part of D where chunks are too few to fill the GPU
//     (`sum_parts_kernel` adds these up). Either way D is cut in the same parts, summed one by one in the same order,
//     so a token's bits depend on D alone.
//   expand: a block owns 64 tokens by 128 columns of y, goes over the adapters that are present and rounds once. A tile
//     without adapters costs one load per block.
//   outer: `workers` take equal shares of the chunks. Adapters inside one share are written at once, those that span
//     several leave at most two partial products per worker, added up in order by `sum_workers_kernel`, which also
//     writes the zeros of absent adapters. Or all of it is added to what `out` holds, which accumulates gradients in
//     float32 however many batches they come from.
// No atomics on floats, no host sync, grids of fixed size.
//
// Cost for M routed tokens of one adapter of rank r and 16-bit T: each of the three 2 M r D FLOPs; shrink reads M D,
// expand reads and writes M D, outer reads M D numbers. Floor, H100 at 3.0 TB/s, M = 8192, D = 3584, r = 64 (3.8
// GFLOP, 4.7 us at 800 TFLOP/s): shrink 20 us, expand 39 us, outer 20 us; M = 1: 0.46 MB of bank, 0.15 us each. None of
// it has been timed on a GPU yet. Launches: plan 1, shrink 1 or 2, expand 1, outer 2. Shared memory per block: shrink
// 34 KB, expand 33 KB (float32 50), outer 26 (50).
//
// Registers per thread, at most, spills none (tests/test_compile_budget.py reads these lines):
//   budget sm_80: shrink_kernel<float> 112, shrink_kernel<lyra::Bf16> 120, shrink_kernel<lyra::Half> 120,
//   budget sm_80: expand_kernel<float> 96, expand_kernel<lyra::Bf16> 104, expand_kernel<lyra::Half> 104,
//   budget sm_80: outer_kernel<float> 184, outer_kernel<lyra::Bf16> 128, outer_kernel<lyra::Half> 128,
//   budget sm_80: sum_parts_kernel 32, sum_workers_kernel 56,
//   budget sm_80: plan_kernel<int> 80, plan_kernel<long> 80
//   budget sm_90a: shrink_kernel<float> 112, shrink_kernel<lyra::Bf16> 120, shrink_kernel<lyra::Half> 120,
//   budget sm_90a: expand_kernel<float> 96, expand_kernel<lyra::Bf16> 104, expand_kernel<lyra::Half> 104,
//   budget sm_90a: outer_kernel<float> 184, outer_kernel<lyra::Bf16> 128, outer_kernel<lyra::Half> 128,
//   budget sm_90a: sum_parts_kernel 32, sum_workers_kernel 48,
//   budget sm_90a: plan_kernel<int> 80, plan_kernel<long> 80
#pragma once

#include <cstdint>

#include "lyra/launch.h"
#include "lyra/mma.h"
#include "lyra/tile.h"

namespace lyra::multi_lora {

constexpr int kTile = 64;      // tokens of a tile, pairs of a chunk
constexpr int kRanks = 64;     // ranks of a block
constexpr int kColumns = 128;  // columns of y or out of a block
constexpr int kThreads = 256;
constexpr int kWarpRows = 4;  // the 8 warps stand in 4 rows of 16 by 2 columns
constexpr int kMaxParts = 16;
constexpr int kPart = 128;  // least number of columns in a part of D
constexpr unsigned kAllLanes = 0xffffffffu;

struct Plan {
  int64_t tokens, per_token, adapters;  // T, S, E
  const int* ids;
  const float* weights;  // or null: all one
  const int* starts;
  const int* pairs;
  const int* chunks;
  int64_t chunk_rows;
  const uint32_t* present;

  __host__ __device__ int64_t tiles() const { return (tokens + kTile - 1) / kTile; }
  __host__ __device__ int64_t words() const { return (adapters + 31) / 32; }
  __device__ __forceinline__ float weight(int64_t pair) const { return weights ? weights[pair] : 1.0f; }
};

// What of bank and h is whose, and the scaling.
struct Adapters {
  const int* table;      // (E, 3): first row of the bank, rank, first column of h
  const float* scaling;  // (E), not needed by shrink
};

struct Adapter {
  int row, rank, column;
  __device__ Adapter(const Adapters& all, int e)
      : row(all.table[3 * e]), rank(all.table[3 * e + 1]), column(all.table[3 * e + 2]) {}
};

template <class T>
struct Rows {
  T* data;
  int64_t stride;
};

struct Mask {
  const int64_t* seed;  // null: keep all
  int drop;             // of 65536
};

// --- plan --------------------------------------------------------------------------------------------------------

constexpr int kPlanThreads = 512, kPlanWarps = kPlanThreads / 32;
constexpr int64_t kMaxPlanAdapters = 1024;

template <class Id>
struct NewPlan {
  const Id* given;                      // (T, S), may hold anything
  int64_t tokens, per_token, adapters;  // T, S, E
  int *ids, *starts, *pairs, *chunks;
  int64_t chunk_rows;
  uint32_t* present;
};

// The lanes whose e is that of this lane; not of use to a lane whose e is negative.
__device__ __forceinline__ unsigned lanes_with_same(int e, int bits) {
  unsigned same = __ballot_sync(kAllLanes, e >= 0);
  for (int b = 0; b < bits; ++b) {
    const unsigned set = __ballot_sync(kAllLanes, e >> b & 1);
    same &= e >> b & 1 ? set : ~set;
  }
  return same;
}

// Sum of `value` over the threads before this one, and over all.
__device__ __forceinline__ unsigned long long scan(unsigned long long value, unsigned long long* sums,
                                                   unsigned long long* all) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  unsigned long long through = value;
  for (int by = 1; by < 32; by *= 2) {
    const unsigned long long before = __shfl_up_sync(kAllLanes, through, by);
    if (lane >= by) through += before;
  }
  if (lane == 31) exchange_store(sums + warp, through);
  __syncthreads();
  unsigned long long base = 0;
  *all = 0;
  for (int w = 0; w < kPlanWarps; ++w) {
    const unsigned long long sum = exchange_load(sums + w);
    if (w < warp) base += sum;
    *all += sum;
  }
  return base + through - value;
}

// A counting sort by one block: each warp has one run of the pairs, counts its adapters and, when all have been added
// up, puts its pairs in their places.
template <class Id>
__global__ void __launch_bounds__(kPlanThreads, 1) plan_kernel(NewPlan<Id> plan) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, adapters = static_cast<int>(plan.adapters);
  const int64_t pairs = plan.tokens * plan.per_token, words = divide_up(adapters, 32);
  const int64_t run = divide_up(divide_up(pairs, kPlanWarps), 32) * 32;
  const int64_t begin = smaller(warp * run, pairs), end = smaller(begin + run, pairs);
  int bits = 0;
  while ((adapters - 1) >> bits) ++bits;

  unsigned long long* const sums = reinterpret_cast<unsigned long long*>(dynamic_shared());
  int* const counts = reinterpret_cast<int*>(sums + kPlanWarps);  // (warps, E): pairs, then the next place of each
  int* const mine = counts + warp * adapters;
  int* const first_chunks = counts + kPlanWarps * adapters;  // (E + 1)

  for (int e = lane; e < adapters; e += 32) exchange_store(mine + e, 0);
  for (int64_t i = threadIdx.x; i < divide_up(plan.tokens, kTile) * words; i += kPlanThreads) plan.present[i] = 0;
  __syncthreads();
  for (int64_t at = begin; at < end; at += 32) {
    const int64_t pair = at + lane, tile = pair / plan.per_token / kTile;
    const Id given = pair < end ? plan.given[pair] : static_cast<Id>(-1);
    const int e = given >= 0 && given < plan.adapters ? static_cast<int>(given) : -1;
    if (pair < end) exchange_store(plan.ids + pair, e);
    const unsigned same = lanes_with_same(e, bits), before = same & ((1u << lane) - 1);
    if (e >= 0) {
      const int last = before ? 31 - __clz(before) : -1;  // says the same of its tile, if that is ours
      if (last < 0 || (at + last) / plan.per_token / kTile != tile) {
        atomicOr(plan.present + tile * words + e / 32, 1u << e % 32);
      }
      if (!before) exchange_store(mine + e, exchange_load(mine + e) + __popc(same));
    }
    __syncwarp();
  }
  __syncthreads();

  const int each = static_cast<int>(divide_up(adapters, kPlanThreads));
  const int own = smaller<int>(threadIdx.x * each, adapters), own_end = smaller(own + each, adapters);
  const auto total = [&](int e) {
    int sum = 0;
    for (int w = 0; w < kPlanWarps; ++w) sum += exchange_load(counts + w * adapters + e);
    return sum;
  };
  // Pairs in the lower half, chunks in the upper half.
  const auto size = [&](int e) {
    const unsigned long long count = total(e);
    return count | (count + kTile - 1) / kTile << 32;
  };
  unsigned long long all = 0, sum = 0;
  for (int e = own; e < own_end; ++e) sum += size(e);
  unsigned long long place = scan(sum, sums, &all);
  for (int e = own; e < own_end; ++e) {
    const unsigned long long next = place + size(e);
    exchange_store(plan.starts + e, static_cast<int>(place));
    exchange_store(first_chunks + e, static_cast<int>(place >> 32));
    int to = static_cast<int>(place);
    for (int w = 0; w < kPlanWarps; ++w) {
      int* const count = counts + w * adapters + e;
      const int found = exchange_load(count);
      exchange_store(count, to);
      to += found;
    }
    place = next;
  }
  const int routed = static_cast<int>(all), used_chunks = static_cast<int>(all >> 32);
  if (threadIdx.x == 0) plan.starts[adapters] = routed;
  __syncthreads();

  for (int64_t at = begin; at < end; at += 32) {
    const int e = at + lane < end ? exchange_load(plan.ids + at + lane) : -1;
    const unsigned same = lanes_with_same(e, bits), before = same & ((1u << lane) - 1);
    const int to = e >= 0 ? exchange_load(mine + e) + __popc(before) : 0;
    if (e >= 0) plan.pairs[to] = static_cast<int>(at) + lane;
    __syncwarp();
    if (e >= 0 && !before) exchange_store(mine + e, to + __popc(same));
    __syncwarp();
  }
  for (int64_t i = routed + threadIdx.x; i < pairs; i += kPlanThreads) plan.pairs[i] = -1;
  for (int64_t chunk = threadIdx.x; chunk < plan.chunk_rows; chunk += kPlanThreads) {
    int e = -1, at = 0;
    if (chunk < used_chunks) {
      int low = 0, high = adapters;  // the first adapter that begins behind this chunk
      while (low < high) {
        const int middle = (low + high) / 2;
        if (exchange_load(first_chunks + middle) <= chunk) {
          low = middle + 1;
        } else {
          high = middle;
        }
      }
      e = low - 1;
      at = exchange_load(plan.starts + e) + static_cast<int>(chunk - exchange_load(first_chunks + e)) * kTile;
    }
    plan.chunks[2 * chunk] = e;
    plan.chunks[2 * chunk + 1] = at;
  }
}

// --- dropout -----------------------------------------------------------------------------------------------------

// Philox4x32 with 10 rounds (Salmon et al., 2011), which torch and Triton use as well.
struct Philox {
  uint32_t key[2];

  __device__ explicit Philox(int64_t seed)
      : key{static_cast<uint32_t>(seed), static_cast<uint32_t>(static_cast<uint64_t>(seed) >> 32)} {}

  __device__ __forceinline__ Words4 operator()(uint32_t c0, uint32_t c1) const {
    uint32_t c2 = 0, c3 = 0, k0 = key[0], k1 = key[1];
#pragma unroll
    for (int round = 0; round < 10; ++round) {
      const uint64_t p0 = uint64_t{0xD2511F53} * c0, p1 = uint64_t{0xCD9E8D57} * c2;
      c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
      c1 = static_cast<uint32_t>(p1);
      c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
      c3 = static_cast<uint32_t>(p0);
      k0 += 0x9E3779B9;
      k1 += 0xBB67AE85;
    }
    return {{c0, c1, c2, c3}};
  }
};

// Zeroes what the mask drops of a piece whose first column is a multiple of 8.
template <class T>
__device__ __forceinline__ void drop_elements(Piece<T>& piece, const Mask& mask, int64_t token, int64_t column) {
  const Words4 random = Philox(*mask.seed)(static_cast<uint32_t>(column / kPiece), static_cast<uint32_t>(token));
#pragma unroll
  for (int i = 0; i < kPiece; ++i) {
    const int value = static_cast<int16_t>(random.word[i / 2] >> 16 * (i % 2));
    piece.keep(i, value >= mask.drop - 32768);
  }
}

// --- shrink ------------------------------------------------------------------------------------------------------

template <class T>
struct Shrink {
  Plan plan;
  Adapters adapters;
  Mask mask;
  Rows<const T> x;  // (T, D)
  const T* bank;
  int64_t size;                 // D
  int64_t width;                // G
  int rank_tiles, parts, part;  // part: columns of a part of D
  bool split;                   // each part has a block of its own
  float* out;                   // h, or (parts, T, S, G) if split
};

template <class T>
__global__ void __launch_bounds__(kThreads) shrink_kernel(Shrink<T> s) {
  constexpr int kSlab = 256 / sizeof(T), kPieces = kSlab / kPiece;  // columns of a slab: 256 bytes
  constexpr int kPasses = kTile * kPieces / kThreads, kPitch = pitch<T>(kSlab);
  static_assert(kPart % kSlab == 0 && kTile == kRanks);
  const int rank_tile = blockIdx.x % s.rank_tiles, splits = s.split ? s.parts : 1;
  const int64_t chunk = blockIdx.x / s.rank_tiles / splits, only = blockIdx.x / s.rank_tiles % splits;
  const int e = s.plan.chunks[2 * chunk], first_rank = rank_tile * kRanks;
  if (e < 0) return;
  const Adapter adapter(s.adapters, e);
  const int ranks = smaller(adapter.rank - first_rank, kRanks);
  if (ranks <= 0) return;
  const int* const pairs = s.plan.pairs + s.plan.chunks[2 * chunk + 1];
  const int count = smaller<int64_t>(s.plan.pairs + s.plan.starts[e + 1] - pairs, kTile);

  uint32_t* const x_tile = reinterpret_cast<uint32_t*>(dynamic_shared());
  uint32_t* const bank_tile = x_tile + kTile * kPitch;
  const int row = threadIdx.x / kPieces, piece = threadIdx.x % kPieces;
  int token[kPasses];
#pragma unroll
  for (int i = 0; i < kPasses; ++i) {
    const int place = row + i * (kTile / kPasses);
    token[i] = place < count ? pairs[place] / static_cast<int>(s.plan.per_token) : -1;
  }
  const T* const bank = s.bank + (adapter.row + first_rank) * s.size;

  Piece<T> x_next[kPasses], bank_next[kPasses];
  const auto fetch = [&](int64_t k) {
#pragma unroll
    for (int i = 0; i < kPasses; ++i) {
      const int64_t column = k + piece * kPiece;
      const int rank = row + i * (kTile / kPasses);
      x_next[i] = token[i] >= 0 ? load_piece(s.x.data + token[i] * s.x.stride, column, s.size) : Piece<T>();
      bank_next[i] = rank < ranks ? load_piece(bank + rank * s.size, column, s.size) : Piece<T>();
    }
  };

  const int warp = threadIdx.x / 32, m = warp % kWarpRows * 16, n = warp / kWarpRows * 16;
  const int columns = ranks - n;  // every other 16 ranks are this warp's
  const int mine = columns > 32 ? 2 : columns > 0 ? 1 : 0;
  float part[1][4][4] = {}, total[4][4] = {};
  const int64_t begin = only * s.part, end = s.split ? smaller(begin + s.part, s.size) : s.size;
  fetch(begin);
  for (int64_t k = begin; k < end; k += kSlab) {
    __syncthreads();  // the last slab is read
#pragma unroll
    for (int i = 0; i < kPasses; ++i) {
      // Not when it was fetched: that would have waited for memory.
      if (s.mask.seed && token[i] >= 0) drop_elements(x_next[i], s.mask, token[i], k + piece * kPiece);
      to_shared(x_tile, kPitch, row + i * (kTile / kPasses), piece, x_next[i]);
      to_shared(bank_tile, kPitch, row + i * (kTile / kPasses), piece, bank_next[i]);
    }
    __syncthreads();  // this one is written
    if (k + kSlab < end) fetch(k + kSlab);
    multiply<T, kAlong, kAlong>(part, x_tile, kPitch, m, bank_tile, kPitch, n, 32, mine, kSlab / 16);
    if ((k + kSlab) % s.part == 0 || k + kSlab >= end) {
#pragma unroll
      for (int i = 0; i < 16; ++i) {
        total[i / 4][i % 4] += part[0][i / 4][i % 4];
        part[0][i / 4][i % 4] = 0;
      }
    }
  }

  float* const out = s.out + only * s.plan.tokens * s.plan.per_token * s.width + adapter.column + first_rank;
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
  for (int half = 0; half < 4; ++half) {
    const int rank = n + half / 2 * 32 + half % 2 * 8 + 2 * t;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int place = m + g + i / 2 * 8;
      if (place < count && rank + i % 2 < ranks) out[pairs[place] * s.width + rank + i % 2] = total[half][i];
    }
  }
}

// h = the sum of (parts, T, S, G) over the parts, in order; of the ranks that a pair has alone.
__global__ void __launch_bounds__(kThreads)
    sum_parts_kernel(Plan plan, Adapters adapters, const float* parts, int count, int64_t width, float* h) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t pairs = plan.tokens * plan.per_token, pair = at / width;
  if (pair >= pairs || plan.ids[pair] < 0) return;
  const Adapter adapter(adapters, plan.ids[pair]);
  const int64_t rank = at % width - adapter.column;
  if (rank < 0 || rank >= adapter.rank) return;
  float sum = 0;
  for (int i = 0; i < count; ++i) sum += parts[i * pairs * width + at];
  h[at] = sum;
}

// --- expand ------------------------------------------------------------------------------------------------------

template <class T>
struct Expand {
  Plan plan;
  Adapters adapters;
  Mask mask;
  const float* h;  // (T, S, G)
  int64_t width;   // G
  const T* bank;
  int64_t size;  // D
  int column_tiles;
  T* y;  // (T, D)
};

template <class T>
__global__ void __launch_bounds__(kThreads) expand_kernel(Expand<T> s) {
  constexpr int kNarrow = pitch<T>(kRanks), kWide = pitch<T>(kColumns), kSums = kColumns + 4;
  const int64_t tile = blockIdx.x / s.column_tiles, first_token = tile * kTile;
  const int64_t first_column = static_cast<int64_t>(blockIdx.x % s.column_tiles) * kColumns;
  const uint32_t* const present = s.plan.present + tile * s.plan.words();

  uint32_t* const h_tile = reinterpret_cast<uint32_t*>(dynamic_shared());
  uint32_t* const bank_tile = h_tile + kTile * kNarrow;
  const int warp = threadIdx.x / 32, m = warp % kWarpRows * 16, n = warp / kWarpRows * (kColumns / 2);
  float acc[1][8][4] = {};
  bool some = false;
  for (int64_t w = 0; w < s.plan.words(); ++w) {
    for (uint32_t bits = present[w]; bits; bits &= bits - 1) {
      const int e = static_cast<int>(w) * 32 + __ffs(static_cast<int>(bits)) - 1;
      const Adapter adapter(s.adapters, e);
      const float scaling = s.adapters.scaling[e];
      const int end_of_h = adapter.column + adapter.rank;
      some = true;
      for (int first_rank = 0; first_rank < adapter.rank; first_rank += kRanks) {
        const int ranks = smaller(adapter.rank - first_rank, kRanks), depth = (ranks + 15) / 16;
        __syncthreads();  // the last tiles are read
        for (int i = threadIdx.x; i < kTile * kRanks / kPiece; i += kThreads) {
          const int row = i / (kRanks / kPiece), piece = i % (kRanks / kPiece);
          float sum[kPiece] = {};
          if (first_token + row < s.plan.tokens && piece * kPiece < ranks) {
            for (int64_t c = 0; c < s.plan.per_token; ++c) {
              const int64_t pair = (first_token + row) * s.plan.per_token + c;
              if (s.plan.ids[pair] != e) continue;
              const float factor = s.plan.weight(pair) * scaling;
              const Piece<float> values =
                  load_piece(s.h + pair * s.width, adapter.column + first_rank + piece * kPiece, end_of_h);
#pragma unroll
              for (int j = 0; j < kPiece; ++j) sum[j] = fmaf(factor, values.get(j), sum[j]);
            }
          }
          to_shared(h_tile, kNarrow, row, piece, rounded<T>(sum));
        }
        for (int i = threadIdx.x; i < depth * 16 * kColumns / kPiece; i += kThreads) {
          const int row = i / (kColumns / kPiece), piece = i % (kColumns / kPiece);
          const T* const from = s.bank + (adapter.row + first_rank + row) * s.size;
          to_shared(bank_tile, kWide, row, piece,
                    row < ranks ? load_piece(from, first_column + piece * kPiece, s.size) : Piece<T>());
        }
        __syncthreads();  // these are written
        multiply<T, kAlong, kAcross>(acc, h_tile, kNarrow, m, bank_tile, kWide, n, 16, 4, depth);
      }
    }
  }
  if (!some) return;

  // Through shared memory, so that whole rows of y are read and written.
  __syncthreads();  // the last tiles are read
  uint32_t* const sums = h_tile;
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
  for (int half = 0; half < 8; ++half) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      exchange_store(sums + (m + g + i / 2 * 8) * kSums + n + half * 8 + 2 * t + i % 2,
                     static_cast<uint32_t>(__float_as_int(acc[0][half][i])));
    }
  }
  __syncthreads();  // the sums are written
  for (int i = threadIdx.x; i < kTile * kColumns / kPiece; i += kThreads) {
    const int row = i / (kColumns / kPiece), piece = i % (kColumns / kPiece);
    const int64_t token = first_token + row, column = first_column + piece * kPiece;
    if (token >= s.plan.tokens || column >= s.size) continue;
    bool routed = false;
    for (int64_t c = 0; c < s.plan.per_token; ++c) routed |= s.plan.ids[token * s.plan.per_token + c] >= 0;
    if (!routed) continue;
    Piece<float> added;
#pragma unroll
    for (int j = 0; j < kPiece; ++j) added.word[j] = exchange_load(sums + row * kSums + piece * kPiece + j);
    if (s.mask.seed) drop_elements(added, s.mask, token, column);
    T* const y = s.y + token * s.size;
    const Piece<T> base = load_piece<T>(y, column, s.size);
    float values[kPiece];
#pragma unroll
    for (int j = 0; j < kPiece; ++j) values[j] = base.get(j) + added.get(j);
    store_piece(y, column, s.size, rounded<T>(values));
  }
}

// --- outer -------------------------------------------------------------------------------------------------------

template <class T>
struct Outer {
  Plan plan;
  Adapters adapters;
  Mask mask;
  const float* h;   // (T, S, G)
  int64_t width;    // G
  Rows<const T> z;  // (T, D)
  int64_t size;     // D
  int rank_tiles, column_tiles, workers;
  bool adds;       // to out
  float* out;      // (rows, D)
  float* partial;  // (workers, 2, G, D)
};

// First row of the chunks whose adapter is e or more; the number of used rows if there is none. A whole warp together.
__device__ __forceinline__ int64_t first_chunk(const Plan& plan, int64_t e) {
  const int lane = threadIdx.x % 32;
  int64_t low = 0, high = plan.chunk_rows;
  while (low < high) {
    const int64_t step = (high - low + 31) / 32, probe = low + lane * step;
    // -1, which marks the unused, is the largest unsigned number.
    const bool before = probe < high && static_cast<unsigned>(plan.chunks[2 * probe]) < static_cast<uint64_t>(e);
    const int count = __popc(__ballot_sync(kAllLanes, before));
    if (count == 0) break;
    high = smaller(high, low + count * step);
    low += (count - 1) * step + 1;
  }
  return low;
}

// Which chunks a worker has, and where it leaves the product of an adapter.
struct Shares {
  int64_t used, each;

  __device__ Shares(const Plan& plan, int workers)
      : used(first_chunk(plan, plan.adapters)), each((used + workers - 1) / workers) {}

  __device__ int64_t begin(int64_t worker) const { return smaller(worker * each, used); }
  // 0: its first adapter, or the one that it has alone; 1: its last one.
  __device__ int64_t slot(int64_t worker, int64_t first_chunk_of_adapter) const {
    return worker * 2 + (first_chunk_of_adapter > begin(worker));
  }
};

template <class T>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 2 ? 2 : 1) outer_kernel(Outer<T> s) {
  constexpr int kNarrow = pitch<T>(kRanks), kWide = pitch<T>(kColumns);
  constexpr int kZPasses = kTile * kColumns / kPiece / kThreads, kHPasses = kTile * kRanks / kPiece / kThreads;
  const int64_t first_column = static_cast<int64_t>(blockIdx.x % s.column_tiles) * kColumns;
  const int first_rank = blockIdx.x / s.column_tiles % s.rank_tiles * kRanks;
  const int64_t worker = blockIdx.x / s.column_tiles / s.rank_tiles;
  const Shares shares(s.plan, s.workers);
  const int64_t begin = shares.begin(worker), end = shares.begin(worker + 1);

  uint32_t* const h_tile = reinterpret_cast<uint32_t*>(dynamic_shared());
  uint32_t* const z_tile = h_tile + kTile * kNarrow;
  const int warp = threadIdx.x / 32, m = warp % kWarpRows * 16, n = warp / kWarpRows * (kColumns / 2);
  float acc[1][8][4] = {};

  Piece<float> h_next[kHPasses];
  Piece<T> z_next[kZPasses];
  float factor[kHPasses];
  int token[kZPasses];
  const auto fetch = [&](int64_t chunk) {
    const int e = s.plan.chunks[2 * chunk];
    const Adapter adapter(s.adapters, e);
    const int* const pairs = s.plan.pairs + s.plan.chunks[2 * chunk + 1];
    const int count =
        first_rank < adapter.rank ? smaller<int64_t>(s.plan.pairs + s.plan.starts[e + 1] - pairs, kTile) : 0;
#pragma unroll
    for (int i = 0; i < kHPasses; ++i) {
      const int at = threadIdx.x + i * kThreads, row = at / (kRanks / kPiece);
      const int rank = first_rank + at % (kRanks / kPiece) * kPiece;
      const bool real = row < count && rank < adapter.rank;
      const int64_t pair = real ? pairs[row] : 0;
      factor[i] = real ? s.plan.weight(pair) * s.adapters.scaling[e] : 0.0f;
      h_next[i] = real ? load_piece(s.h + pair * s.width, adapter.column + rank, adapter.column + adapter.rank)
                       : Piece<float>();
    }
#pragma unroll
    for (int i = 0; i < kZPasses; ++i) {
      const int at = threadIdx.x + i * kThreads, row = at / (kColumns / kPiece);
      const int64_t column = first_column + at % (kColumns / kPiece) * kPiece;
      token[i] = row < count ? pairs[row] / static_cast<int>(s.plan.per_token) : -1;
      z_next[i] = token[i] >= 0 ? load_piece(s.z.data + token[i] * s.z.stride, column, s.size) : Piece<T>();
    }
  };
  // What was fetched is scaled and masked on its way to shared memory and not before, which would wait for it.
  const auto store = [&] {
#pragma unroll
    for (int i = 0; i < kHPasses; ++i) {
      const int at = threadIdx.x + i * kThreads;
      float values[kPiece];
#pragma unroll
      for (int j = 0; j < kPiece; ++j) values[j] = factor[i] * h_next[i].get(j);
      to_shared(h_tile, kNarrow, at / (kRanks / kPiece), at % (kRanks / kPiece), rounded<T>(values));
    }
#pragma unroll
    for (int i = 0; i < kZPasses; ++i) {
      const int at = threadIdx.x + i * kThreads, piece = at % (kColumns / kPiece);
      if (s.mask.seed && token[i] >= 0) drop_elements(z_next[i], s.mask, token[i], first_column + piece * kPiece);
      to_shared(z_tile, kWide, at / (kColumns / kPiece), piece, z_next[i]);
    }
  };

  // Leaves acc where it belongs and empties it.
  const auto flush = [&](int e, int64_t last) {
    const Adapter adapter(s.adapters, e);
    const int64_t first = first_chunk(s.plan, e);
    const bool whole = first >= begin && (last + 1 < end || first_chunk(s.plan, e + 1) <= end);
    float* const to = whole ? s.out + adapter.row * s.size : s.partial + shares.slot(worker, first) * s.width * s.size;
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int half = 0; half < 8; ++half) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int64_t rank = first_rank + m + g + i / 2 * 8, column = first_column + n + half * 8 + 2 * t + i % 2;
        float* const at = to + rank * s.size + column;
        if (rank < adapter.rank && column < s.size) *at = whole && s.adds ? *at + acc[0][half][i] : acc[0][half][i];
        acc[0][half][i] = 0;
      }
    }
  };

  if (begin < end) fetch(begin);
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    const int e = s.plan.chunks[2 * chunk];
    __syncthreads();  // the last tiles are read
    store();
    __syncthreads();  // these are written
    if (chunk + 1 < end) fetch(chunk + 1);
    multiply<T, kAcross, kAcross>(acc, h_tile, kNarrow, m, z_tile, kWide, n, 16, 4, kTile / 16);
    if (chunk + 1 == end || s.plan.chunks[2 * chunk + 2] != e) flush(e, chunk);
  }
}

constexpr int kRowsOfSum = 8;

// Adds up what the workers left of adapters that several of them had, and writes the zeros of those that nobody has.
__global__ void __launch_bounds__(kThreads)
    sum_workers_kernel(Plan plan, Adapters adapters, const float* partial, int64_t width, int64_t size, int workers,
                       bool adds, float* out) {
  const int64_t column_blocks = divide_up(size, kThreads), row_blocks = divide_up(width, kRowsOfSum);
  const int64_t column = blockIdx.x % column_blocks * kThreads + threadIdx.x;
  const int64_t first_rank = blockIdx.x / column_blocks % row_blocks * kRowsOfSum;
  const int e = static_cast<int>(blockIdx.x / column_blocks / row_blocks);
  const Adapter adapter(adapters, e);
  const Shares shares(plan, workers);
  const int64_t first = first_chunk(plan, e), end = first_chunk(plan, e + 1);
  const int64_t first_worker = first < end ? first / shares.each : 0;
  const int64_t last_worker = first < end ? (end - 1) / shares.each : -1;
  if (first_worker == last_worker || column >= size) return;
  for (int64_t rank = first_rank; rank < smaller<int64_t>(first_rank + kRowsOfSum, adapter.rank); ++rank) {
    float sum = 0;
    for (int64_t w = first_worker; w <= last_worker; ++w) {
      sum += partial[(shares.slot(w, first) * width + rank) * size + column];
    }
    float* const to = out + (adapter.row + rank) * size + column;
    *to = adds ? *to + sum : sum;
  }
}

// --- launchers ---------------------------------------------------------------------------------------------------

// Writes all of ids, starts, pairs, chunks and present.
template <class Id>
cudaError_t make_plan(const NewPlan<Id>& plan, cudaStream_t stream) {
  if (plan.adapters > kMaxPlanAdapters) return cudaErrorInvalidValue;
  const size_t shared_bytes =
      kPlanWarps * sizeof(unsigned long long) + (kPlanWarps * plan.adapters + plan.adapters + 1) * sizeof(int);
  return launch(plan_kernel<Id>, 1, kPlanThreads, shared_bytes, stream, plan);
}

// Parts that D is cut in; a function of D alone.
inline int part_size(int64_t size) { return static_cast<int>(divide_up(divide_up(size, kPart), kMaxParts)) * kPart; }

// Whether the parts of D get blocks of their own: only where there are too few others to fill the GPU.
inline bool splits(const Plan& plan, int64_t size, int64_t width, int multiprocessors) {
  const int64_t blocks = divide_up(plan.tokens * plan.per_token, kTile) * divide_up(width, kRanks);
  return size > part_size(size) && blocks < multiprocessors;
}

// Floats of workspace that shrink needs.
inline int64_t shrink_workspace(const Plan& plan, int64_t size, int64_t width, int multiprocessors) {
  const bool split = splits(plan, size, width, multiprocessors);
  return split ? divide_up(size, part_size(size)) * plan.tokens * plan.per_token * width : 0;
}

template <class T>
cudaError_t shrink(const Plan& plan, const Adapters& adapters, const Mask& mask, Rows<const T> x, const T* bank,
                   int64_t size, int64_t width, float* h, float* workspace, int multiprocessors, cudaStream_t stream) {
  if (plan.tokens * plan.per_token * width == 0) return cudaSuccess;
  const int part = part_size(size), parts = static_cast<int>(divide_up(size, part));
  const int rank_tiles = static_cast<int>(divide_up(width, kRanks));
  const bool split = splits(plan, size, width, multiprocessors);
  const Shrink<T> s{plan, adapters, mask, x, bank, size, width, rank_tiles, parts, part, split, split ? workspace : h};
  constexpr size_t shared_bytes = 2 * kTile * pitch<T>(256 / sizeof(T)) * sizeof(uint32_t);
  const cudaError_t error =
      launch(shrink_kernel<T>, plan.chunk_rows * rank_tiles * (split ? parts : 1), kThreads, shared_bytes, stream, s);
  if (error != cudaSuccess || !split) return error;
  return launch(sum_parts_kernel, divide_up(plan.tokens * plan.per_token * width, kThreads), kThreads, 0, stream, plan,
                adapters, static_cast<const float*>(workspace), parts, width, h);
}

template <class T>
cudaError_t expand(const Plan& plan, const Adapters& adapters, const Mask& mask, const float* h, int64_t width,
                   const T* bank, int64_t size, T* y, cudaStream_t stream) {
  if (plan.tokens * size == 0) return cudaSuccess;
  const int column_tiles = static_cast<int>(divide_up(size, kColumns));
  const Expand<T> s{plan, adapters, mask, h, width, bank, size, column_tiles, y};
  constexpr size_t tiles = kTile * (pitch<T>(kRanks) + pitch<T>(kColumns)), sums = kTile * (kColumns + 4);
  return launch(expand_kernel<T>, plan.tiles() * column_tiles, kThreads,
                (tiles > sums ? tiles : sums) * sizeof(uint32_t), stream, s);
}

// As many blocks as run at once, two to each multiprocessor, since one more would wait for all of them.
inline int outer_workers(const Plan& plan, int64_t size, int64_t width, int multiprocessors) {
  const int64_t blocks = divide_up(size, kColumns) * divide_up(width, kRanks), fit = 2 * multiprocessors / blocks;
  return static_cast<int>(smaller(fit > 1 ? fit : int64_t{1}, plan.chunk_rows));
}

inline int64_t outer_workspace(const Plan& plan, int64_t size, int64_t width, int multiprocessors) {
  return outer_workers(plan, size, width, multiprocessors) * 2 * width * size;
}

// Writes all rows of `out` that belong to an adapter or, if `adds`, adds to them.
template <class T>
cudaError_t outer(const Plan& plan, const Adapters& adapters, const Mask& mask, const float* h, int64_t width,
                  Rows<const T> z, int64_t size, bool adds, float* out, float* workspace, int multiprocessors,
                  cudaStream_t stream) {
  if (width * size * plan.adapters == 0) return cudaSuccess;
  const int column_tiles = static_cast<int>(divide_up(size, kColumns));
  const int rank_tiles = static_cast<int>(divide_up(width, kRanks));
  const int workers = outer_workers(plan, size, width, multiprocessors);
  const Outer<T> s{plan, adapters, mask, h, width, z, size, rank_tiles, column_tiles, workers, adds, out, workspace};
  constexpr size_t shared_bytes = kTile * (pitch<T>(kRanks) + pitch<T>(kColumns)) * sizeof(uint32_t);
  const cudaError_t error = launch(outer_kernel<T>, static_cast<int64_t>(column_tiles) * rank_tiles * workers, kThreads,
                                   shared_bytes, stream, s);
  if (error != cudaSuccess) return error;
  const int64_t blocks = divide_up(size, kThreads) * divide_up(width, kRowsOfSum) * plan.adapters;
  return launch(sum_workers_kernel, blocks, kThreads, 0, stream, plan, adapters, static_cast<const float*>(workspace),
                width, size, workers, adds, out);
}

}  // namespace lyra::multi_lora
