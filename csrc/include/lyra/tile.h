// Tiles of matrices on their way through shared memory, and the products of a warp on them: tensor cores for 16-bit
// elements, fused multiply-adds for float32, the same fragments (lyra/mma.h) for both.
#pragma once

#include <cstdint>

#include "lyra/launch.h"
#include "lyra/mma.h"

namespace lyra {

constexpr int kPiece = 8;  // elements that move together

template <class T>
__host__ __device__ constexpr T smaller(T a, T b) {
  return a < b ? a : b;
}
__host__ __device__ constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// --- pieces of eight elements ------------------------------------------------------------------------------------

template <class T>
struct alignas(16) Piece {
  static constexpr int kWords = kPiece * sizeof(T) / 4;
  uint32_t word[kWords] = {};

  __device__ __forceinline__ float get(int i) const {
    if constexpr (sizeof(T) == 4) {
      return __int_as_float(static_cast<int>(word[i]));
    } else {
      return to_float(T{static_cast<uint16_t>(word[i / 2] >> 16 * (i % 2))});
    }
  }
  __device__ __forceinline__ void keep(int i, bool kept) {
    if (kept) return;
    if constexpr (sizeof(T) == 4) {
      word[i] = 0;
    } else {
      word[i / 2] &= i % 2 ? 0x0000ffffu : 0xffff0000u;
    }
  }
};

template <class T>
__device__ __forceinline__ Piece<T> rounded(const float (&values)[kPiece]) {
  Piece<T> piece;
#pragma unroll
  for (int w = 0; w < Piece<T>::kWords; ++w) {
    if constexpr (sizeof(T) == 4) {
      piece.word[w] = static_cast<uint32_t>(__float_as_int(values[w]));
    } else {
      piece.word[w] = pack<T>(values[2 * w], values[2 * w + 1]);
    }
  }
  return piece;
}

template <class T>
__device__ __forceinline__ bool aligned(const T* at) {
  return reinterpret_cast<uintptr_t>(at) % 16 == 0;
}

// Elements [column, column + 8) of a row, zeros from `end` on.
template <class T>
__device__ __forceinline__ Piece<T> load_piece(const T* row, int64_t column, int64_t end) {
  const T* at = row + column;
  if (column + kPiece <= end && aligned(at)) return *reinterpret_cast<const Piece<T>*>(at);
  Piece<T> piece;
#pragma unroll
  for (int i = 0; i < kPiece; ++i) {
    if (column + i >= end) continue;
    if constexpr (sizeof(T) == 4) {
      piece.word[i] = static_cast<uint32_t>(__float_as_int(at[i]));
    } else {
      piece.word[i / 2] |= static_cast<uint32_t>(at[i].bits) << 16 * (i % 2);
    }
  }
  return piece;
}

template <class T>
__device__ __forceinline__ void store_piece(T* row, int64_t column, int64_t end, const Piece<T>& piece) {
  T* at = row + column;
  if (column + kPiece <= end && aligned(at)) {
    *reinterpret_cast<Piece<T>*>(at) = piece;
    return;
  }
#pragma unroll
  for (int i = 0; i < kPiece; ++i) {
    if (column + i < end) at[i] = from_float<T>(piece.get(i));
  }
}

// --- tiles in shared memory --------------------------------------------------------------------------------------

// Words from one row of a tile to the next. Four more than a row has, so that the eight rows that ldmatrix reads
// together lie in different banks.
template <class T>
constexpr int pitch(int columns) {
  return columns * static_cast<int>(sizeof(T)) / 4 + 4;
}

template <class T>
__device__ __forceinline__ void to_shared(uint32_t* tile, int pitch, int row, int piece, const Piece<T>& value) {
#pragma unroll
  for (int w = 0; w < Piece<T>::kWords; w += 4) {
    const Words4 words{{value.word[w], value.word[w + 1], value.word[w + 2], value.word[w + 3]}};
    shared_store16(tile + row * pitch + piece * Piece<T>::kWords + w, words);
  }
}

// Whether a tile's rows run along the summed index k or across it.
enum Layout { kAlong, kAcross };

// What float32 does with one element of each.
struct Product {
  __device__ __forceinline__ float operator()(float a, float b, float sum) const { return fmaf(a, b, sum); }
};

// acc += A B by one warp, for kBlocks times 16 rows from m on and `pairs` times 16 columns from n on, `step` apart, and
// k < 16 * depth. acc[r][2p] and acc[r][2p + 1] are the two halves of columns n + p * step of the r-th rows, in the
// layout of lyra/mma.h. 16-bit T by tensor cores, float32 by `term`, in the order of k.
template <class T, Layout kA, Layout kB, int kBlocks, int kHalves, class Term = Product>
__device__ __forceinline__ void multiply(float (&acc)[kBlocks][kHalves][4], const uint32_t* a, int a_pitch, int m,
                                         const uint32_t* b, int b_pitch, int n, int step, int pairs, int depth,
                                         const Term& term = {}) {
  const int lane = threadIdx.x % 32;
  if constexpr (sizeof(T) == 2) {
    const int low = lane % 8, mid = lane / 8 % 2 * 8, high = lane / 16 * 8;
    const uint32_t* const a_row = kA == kAlong ? a + (m + mid + low) * a_pitch + high / 2  //
                                               : a + (high + low) * a_pitch + (m + mid) / 2;
    const uint32_t* const b_row = kB == kAlong ? b + (n + high + low) * b_pitch + mid / 2  //
                                               : b + (mid + low) * b_pitch + (n + high) / 2;
    for (int k = 0; k < depth; ++k) {
      uint32_t left[kBlocks][4], right[4];
#pragma unroll
      for (int r = 0; r < kBlocks; ++r) {
        if constexpr (kA == kAlong) {
          ldmatrix_x4(left[r], a_row + k * 8 + r * 16 * a_pitch);
        } else {
          ldmatrix_x4_trans(left[r], a_row + k * 16 * a_pitch + r * 8);
        }
      }
#pragma unroll
      for (int p = 0; p < kHalves / 2; ++p) {
        if (p >= pairs) break;
        if constexpr (kB == kAlong) {
          ldmatrix_x4(right, b_row + k * 8 + p * step * b_pitch);
        } else {
          ldmatrix_x4_trans(right, b_row + k * 16 * b_pitch + p * step / 2);
        }
#pragma unroll
        for (int r = 0; r < kBlocks; ++r) {
          mma_m16n8k16<T>(acc[r][2 * p], left[r], right[0], right[1]);
          mma_m16n8k16<T>(acc[r][2 * p + 1], left[r], right[2], right[3]);
        }
      }
    }
  } else {
    const int g = lane / 4, t = lane % 4;
    const auto at = [](const uint32_t* word) { return __int_as_float(static_cast<int>(exchange_load(word))); };
    const auto of_a = [&](int row, int k) { return at(kA == kAlong ? a + row * a_pitch + k : a + k * a_pitch + row); };
    const auto of_b = [&](int k, int column) {
      return at(kB == kAlong ? b + column * b_pitch + k : b + k * b_pitch + column);
    };
#pragma unroll 4
    for (int k = 0; k < 16 * depth; ++k) {
      float upper[kBlocks], lower[kBlocks];
#pragma unroll
      for (int r = 0; r < kBlocks; ++r) {
        upper[r] = of_a(m + r * 16 + g, k);
        lower[r] = of_a(m + r * 16 + g + 8, k);
      }
#pragma unroll
      for (int half = 0; half < kHalves; ++half) {
        if (half / 2 >= pairs) break;
        const int column = n + half / 2 * step + half % 2 * 8 + 2 * t;
        const float first = of_b(k, column), second = of_b(k, column + 1);
#pragma unroll
        for (int r = 0; r < kBlocks; ++r) {
          float (&sums)[4] = acc[r][half];
          sums[0] = term(upper[r], first, sums[0]);
          sums[1] = term(upper[r], second, sums[1]);
          sums[2] = term(lower[r], first, sums[2]);
          sums[3] = term(lower[r], second, sums[3]);
        }
      }
    }
  }
}

}  // namespace lyra
