// The mask of a dropout, made from a seed wherever it acts.
#pragma once

#include <cstdint>
#include "lyra/tile.h"

namespace lyra::multi_lora {

struct Mask {
  const int64_t* seed;  // null: keep all
  int drop;             // of 65536
};

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

}  // namespace lyra::multi_lora
