// The shape of a pair, eight rows at a time: how its rows are dealt out to lanes and steps.
//
// A stripe is kLanes rows; lane l does row `row + l` and in step t column t - kSkew l. So a step needs of the rows
// above what lane l - 1 had kSkew and kSkew + 1 steps ago: with 2, moving it between lanes is off the dependent chain.
// What the last lane leaves is all that the next stripe needs: it stands, with the other lanes, in `frontier`, one
// vector per step. A band shortens the stripe to the steps in which some lane is inside; lanes outside have infinite
// cost.
//
// In a chain, one stripe that is a whole pair, no lane waits until the others are done: after the last cell of its row
// it goes on to the row kLanes below, which it reaches every `period` steps.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <limits>
#include <vector>

#include "lanes.h"

namespace lyra::soft_dtw_cpu {

struct Window {
  int64_t low, high;  // first and last column; none where high < low
};

struct Pair {
  int64_t n = 0, m = 0;
  int64_t band = -1;                              // half-width, -1: none
  const int64_t *low = nullptr, *high = nullptr;  // by row, or null
  bool dropping = false;

  LYRA_INLINE Window window(int64_t i) const {
    if (i >= n) return {0, -1};
    const int64_t rise = n - 1, run = m - 1;
    if (low != nullptr) return {std::max<int64_t>(low[i], 0), std::min(high[i], run)};
    if (band < 0 || rise == 0) return {0, run};
    const int64_t width = std::max(2 * std::min(band, m) * rise, rise + run) / 2;  // cells with |j rise - i run| <= it
    return {std::max<int64_t>(0, (i * run - width + rise - 1) / rise), std::min(run, (i * run + width) / rise)};
  }
  int64_t stripes() const { return (n + kLanes - 1) / kLanes; }
  // Whether it can be a chain, without more steps than `most_steps`, and gains by it: a long row's stripe has few steps
  // in which lanes wait.
  bool chains() const { return band < 0 && low == nullptr && !dropping && n > kLanes && m >= kLanes && m <= 256; }
};

struct Stripe {
  int64_t row, first = 0, last = -1;  // steps
  Window lane[kLanes];
  Window inner;                   // steps in which all lanes are inside
  int64_t rows;                   // of the pair
  int64_t period = 0, mask = -1;  // of a chain, whose frontier is a ring of mask + 1 entries

  LYRA_INLINE Stripe(const Pair& pair, int64_t row) : row(row), rows(pair.n) {
    bool any = false;
    inner = {std::numeric_limits<int64_t>::min(), std::numeric_limits<int64_t>::max()};
    for (int l = 0; l < kLanes; ++l) {
      lane[l] = pair.window(row + l);
      inner = {std::max(inner.low, lane[l].low + kSkew * l), std::min(inner.high, lane[l].high + kSkew * l)};
      if (lane[l].low > lane[l].high) continue;
      const int64_t begin = lane[l].low + kSkew * l, end = lane[l].high + kSkew * l;
      first = any ? std::min(first, begin) : begin;
      last = any ? std::max(last, end) : end;
      any = true;
    }
    if (!pair.dropping) return;
    // A dropped row matches nothing, so it needs no window: any column with windows, with a band the one before the
    // window (both ends only grow), which for the first columns is the edge: all rows dropped so far.
    if (pair.low == nullptr) {
      first -= 1;
    } else {
      first = -1;
      last = pair.m - 1 + kSkew * (std::min<int64_t>(kLanes, pair.n - row) - 1);
    }
  }
  static Stripe chain(const Pair& pair) {
    Stripe all(pair, 0);
    all.period = std::max<int64_t>(pair.m, kReach + kLanes);
    all.mask = static_cast<int64_t>(std::bit_ceil(static_cast<uint64_t>(all.period))) - 1;
    all.last = all.step_of(pair.n - 1, pair.m - 1);
    return all;
  }
  LYRA_INLINE int64_t steps() const { return last - first + 1; }
  int64_t step_of(int64_t i, int64_t j) const { return j + (i - row) / kLanes * period + (i - row) % kLanes * kSkew; }
  // Lane 0's row in a step, and its column; lane l is in column `column` - kSkew l of the row l below or, if that is
  // negative, of a chain's row before.
  struct Place {
    int64_t row, column;
  };
  LYRA_INLINE Place place(int64_t step) const {
    return period > 0 ? Place{step / period * kLanes, step % period} : Place{row, step};
  }
  LYRA_INLINE Place moved(Place from, int64_t steps) const {
    Place to = {from.row, from.column + steps};
    if (period > 0 && to.column >= period) to = {to.row + kLanes, to.column - period};
    if (period > 0 && to.column < 0) to = {to.row - kLanes, to.column + period};
    return to;
  }
  // Where the kLanes columns of lane l in a tile of a chain lie, in a matrix whose rows are `stride` apart: `rest` of
  // them at the end of one row, `offset` from column `tile.column` - kSkew l of row `tile.row` + l, and what is more at
  // the beginning of another row, read as if `between` further on.
  struct Turn {
    int64_t offset, between, rest;
  };
  LYRA_INLINE Turn turn(Place tile, int l, int64_t stride) const {
    const int64_t between = kLanes * stride - period, before = kSkew * l - tile.column;
    return before > 0 ? Turn{-between, between, before} : Turn{0, between, period + before};
  }
  // Whether all rows that a tile of a chain may touch are there, and as long as the period.
  LYRA_INLINE bool among_full_rows(Place tile, int64_t stride) const {
    return period > 0 && period == lane[0].high + 1 && period <= stride && tile.row >= kLanes &&
           tile.row + 2 * kLanes <= rows;
  }
  // Whether some lane goes on to its next row in one of the tile's steps.
  LYRA_INLINE bool turns(Place tile) const {
    return period > 0 && ((tile.row > 0 && tile.column < kReach) || tile.column + kLanes > period);
  }
  // The columns of row i that lane l passes through.
  LYRA_INLINE Window inside(int64_t i, int l) const { return 0 <= i && i < rows ? lane[l] : Window{0, -1}; }

  // Entries of the frontier for a tile's first step, which those for the other steps follow. Forward: what step t
  // leaves, and what it finds above the first lane.
  LYRA_INLINE int64_t leaves(int64_t t) const { return (t + kLanes) & mask; }
  LYRA_INLINE int64_t above(int64_t t) const { return (t + kReach - 1 + kLanes - period) & mask; }
  // Backward: what step t sends up, and what it finds below the last lane.
  LYRA_INLINE int64_t sends(int64_t t) const { return (t + kReach + 1) & mask; }
  LYRA_INLINE int64_t below(int64_t t) const { return (t + kSkew + period) & mask; }
};

// At least as many steps as the stripes of any pair with n <= rows, m <= columns have together. With a band a stripe
// has at most 2 band + 2 + 8 slope columns, and the slopes of all stripes sum up to at most 2 columns.
inline int64_t most_steps(int64_t rows, int64_t columns, int64_t band) {
  const int64_t stripes = (rows + kLanes - 1) / kLanes, whole = stripes * (columns + kReach);
  return band < 0 ? whole : std::min(whole, stripes * (2 * std::min(band, columns) + 2 + kReach) + 2 * columns);
}

inline int64_t record_bytes(int store, bool dropping) {
  const int64_t share = store == 64 ? 8 : store / 8;
  return kLanes * share * (dropping ? 3 : 2);
}

// The stripes of a pair and where the records of each begin.
struct Plan {
  std::vector<Stripe> stripes;
  std::vector<int64_t> offset;
  int64_t bytes = 0;  // of all records
  int64_t frontier;   // entries

  Plan(const Pair& pair, int64_t record, bool chained) : frontier(pair.m + 2 * kReach + kLanes) {
    if (chained && pair.chains()) {
      stripes.push_back(Stripe::chain(pair));
      offset.push_back(0);
      bytes = stripes.back().steps() * record;
      frontier = stripes.back().mask + 1 + kLanes;
      return;
    }
    stripes.reserve(pair.stripes());
    offset.reserve(pair.stripes());
    for (int64_t row = 0; row < pair.n; row += kLanes) {
      stripes.emplace_back(pair, row);
      offset.push_back(bytes);
      bytes += stripes.back().steps() * record;
    }
  }
  int64_t count() const { return static_cast<int64_t>(stripes.size()); }
  int64_t offset_of(int64_t s) const { return s < count() ? offset[s] : bytes; }
};

}  // namespace lyra::soft_dtw_cpu
