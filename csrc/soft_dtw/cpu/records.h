// The shares of cells in memory.
//
// The shares that backward needs are kept in records, one per step, in the order of the steps: no transposing either
// way. A record holds, for all lanes,
//   store 16: 32 bit (diagonal, diagonal + up << 16) in units of 1 / 65535;   8: 16 bit likewise, units of 1 / 255;
//   store 64: the doubles diagonal, then up;   and with dropping then `keep` of 16 bit, 8 bit or double.
// The left share is what is missing to 1, so the three are 1 in sum; each is exactly 0 where nothing comes from there,
// so that no weight leaks into a cell without a path. Rounding is dithered by the cell's place, because equal shares
// (ties) rounded the same way everywhere would pull the path to one side.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "recursion.h"

namespace lyra::soft_dtw_cpu {

// (i, j) -> 2^bits + u with 0 < u < 1 spread evenly over any part of the plane; added to a share in units, it leaves
// the share rounded in the upper bits of the mantissa. u keeps from 0 and 1 a distance above the rounding of the sum,
// so that whole numbers of units stay what they are. i down the lanes, j = step - kSkew lane.
struct Dither {
  static constexpr uint32_t kRow = 24801, kColumn = 18633;
  Vec<uint32_t> phase;
  uint32_t mask, base;

  LYRA_INLINE Dither(int64_t row, int64_t step, int store_as)
      : phase((static_cast<uint32_t>(row) + convert<uint32_t>(kIota)) * kRow +
              (static_cast<uint32_t>(step) - kSkew * convert<uint32_t>(kIota)) * kColumn),
        mask(store_as == 16 ? (1u << 7) - 8 : (1u << 15) - 8),
        base(std::bit_cast<uint32_t>(store_as == 16 ? 0x1p16f : 0x1p8f) | 4u) {}
  // Lanes that go on to their next row of a chain.
  LYRA_INLINE void next_row(Vec<int32_t> lanes, int64_t period) {
    phase += std::bit_cast<Vec<uint32_t>>(lanes) & (kLanes * kRow - static_cast<uint32_t>(period) * kColumn);
  }
  LYRA_INLINE Vec<float> next() {
    const auto now = std::bit_cast<Vec<float>>((phase & mask) | base);
    phase += kColumn;
    return now;
  }
};

// The bits of part scale + dither.
LYRA_INLINE Vec<uint32_t> rounded(Vec<float> part, Vec<float> scale, Vec<float> dither) {
  return std::bit_cast<Vec<uint32_t>>(fma(part, scale, dither));
}
LYRA_INLINE Vec<uint32_t> rounded(Vec<double> part, Vec<double> scale, Vec<float> dither) {
  return std::bit_cast<Vec<uint32_t>>(convert<float>(part * scale) + dither);
}

template <typename T>
LYRA_INLINE void put(uint8_t*& record, int store_as, const Shares<T>& shares, Dither& dither) {
  if (store_as == 64) {
    const auto diagonal = shares.diagonal / shares.sum, rest = 1 - diagonal, up = shares.up / shares.sum;
    store(record, convert<double>(diagonal));
    store(record + kLanes * 8, convert<double>((shares.both == shares.sum) | (up > rest) ? rest : up));
    record += kLanes * 16;
    return;
  }
  const Vec<T> scale = (store_as == 16 ? T(65535) : T(255)) / shares.sum;
  const auto spread = dither.next();
  const auto diagonal = rounded(shares.diagonal, scale, spread), both = rounded(shares.both, scale, spread);
  if (store_as == 16) {
    store(record, ((diagonal >> 7) & 0xffffu) | ((both << 9) & 0xffff0000u));
    record += kLanes * 4;
  } else {
    store(record, convert<uint16_t>(((diagonal >> 15) & 0xffu) | ((both >> 7) & 0xff00u)));
    record += kLanes * 2;
  }
}

template <typename T>
LYRA_INLINE void put_keep(uint8_t*& record, int store_as, const Part<T>& keep, Dither& dither) {
  if (store_as == 64) {
    store(record, convert<double>(keep.part / keep.sum));
    record += kLanes * 8;
    return;
  }
  const auto units = rounded(keep.part, (store_as == 16 ? T(65535) : T(255)) / keep.sum, dither.next());
  if (store_as == 16) {
    store(record, convert<uint16_t>(units >> 7));
    record += kLanes * 2;
  } else {
    store(record, convert<uint8_t>(units >> 15));
    record += kLanes;
  }
}

// Shares; `unit` times the first three is 1 in sum.
template <typename S>
struct Step {
  Vec<S> diagonal, up, left, keep;
};

template <bool kDropping, typename S>
LYRA_INLINE Step<S> get(const uint8_t* record, int store_as) {
  Step<S> step;
  if (store_as == 64) {
    step.diagonal = convert<S>(load<Vec<double>>(record));
    step.up = convert<S>(load<Vec<double>>(record + kLanes * 8));
    step.left = (1 - step.diagonal) - step.up;
    if constexpr (kDropping) step.keep = convert<S>(load<Vec<double>>(record + kLanes * 16));
    return step;
  }
  Vec<int32_t> diagonal, both, keep = {};
  const S all = store_as == 16 ? S(65535) : S(255);
  if (store_as == 16) {
    const auto word = load<Vec<uint32_t>>(record);
    diagonal = std::bit_cast<Vec<int32_t>>(word & 65535u);
    both = std::bit_cast<Vec<int32_t>>(word >> 16);
    if constexpr (kDropping) keep = convert<int32_t>(load<Vec<uint16_t>>(record + kLanes * 4));
  } else {
    const auto word = convert<int32_t>(load<Vec<uint16_t>>(record));
    diagonal = word & 255;
    both = word >> 8;
    if constexpr (kDropping) keep = convert<int32_t>(load<Vec<uint8_t>>(record + kLanes * 2));
  }
  step.diagonal = convert<S>(diagonal);
  step.up = convert<S>(both) - step.diagonal;
  step.left = all - convert<S>(both);
  if constexpr (kDropping) step.keep = convert<S>(keep) * (S(1) / all);
  return step;
}

}  // namespace lyra::soft_dtw_cpu
