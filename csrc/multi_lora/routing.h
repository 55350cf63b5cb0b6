// Low-rank adapters chosen per token: what the kernels of multi_lora have in common. Raw pointers, no torch.
//
// Math. Token t goes through S adapters e = ids[t,s], each with a weight; -1 is none. Adapter e owns rank_e rows of a
// bank (rows, D) from first_e on, and the columns [col_e, col_e + rank_e) of h (T, S, G); the table (E, 3) says which.
//   shrink   h[t,s,col_e+j]  = sum_k m(t,k) x[t,k] bank[first_e+j,k]                                  shrink.cuh
//   expand   y[t,n]         += m(t,n) sum_e sum_j c_e[t,j] bank[first_e+j,n]                          expand.cuh
//   outer    out[first_e+j,d] = sum over the (t,s) of e of c[t,s,j] m(t,d) z[t,d]                     outer.cuh
//   c_e[t,j] = sum over the s of e of weight[t,s] scaling[e] h[t,s,col_e+j], rounded once to the type T of x, bank, y,
//   z
// m is a dropout mask of zeros and ones, made from a seed where it is needed; its 1/(1-p) is part of scaling.
// forward   h = shrink(x, A);  expand(y, h, B).        y: what the base layer gave. Few tokens: decode.cuh
// backward  dh = shrink(dy, B);  dB = outer(h, dy);  expand(dx, dh, A);  dA = outer(dh, x).
//
// Plan of the kernels. One product of 64 x 64 or 64 x 128 per block of 4 x 2 warps, by tensor cores (bfloat16, float16)
// or FMA (float32); global memory -> registers (where masks act) -> shared memory, the next slab under way meanwhile.
// No atomics on floats, no host sync, grids of fixed size.
//
// Floors, H100 at 3.0 TB/s and 800 TFLOP/s, M = 8192 tokens of one adapter of rank 64, D = 3584, 16-bit T: 3.8 GFLOP,
// 4.7 us each; shrink reads M D numbers, 20 us, expand reads and writes them, 39 us, outer reads them, 20 us. M = 1:
// 0.46 MB of bank, 0.15 us each. None of it has been timed on a GPU yet. Launches: plan 1 per step; shrink 1 or 2,
// expand 1, outer 2.
#pragma once

#include <cstdint>
#include "lyra/launch.h"
#include "lyra/tile.h"

namespace lyra::multi_lora {

constexpr int kTile = 64;      // tokens of a tile, pairs of a chunk
constexpr int kRanks = 64;     // ranks of a block
constexpr int kColumns = 128;  // columns of y or out of a block
constexpr int kThreads = 256;
constexpr int kWarpRows = 4;  // the 8 warps stand in 4 rows of 16 by 2 columns
constexpr unsigned kAllLanes = 0xffffffffu;

// Which tokens go to which adapter (plan.cuh makes it).
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

}  // namespace lyra::multi_lora
