// The sweep backward over one pair, by its records: the gradient of its cost.
#pragma once

#include <algorithm>
#include <cmath>
#include <functional>

#include "forward.h"

namespace lyra::soft_dtw_cpu {

template <typename S>
struct Backward {
  Pair pair;
  S* grad_cost;  // of cell (0, 0)
  int64_t columns;
  S* grad_drop = nullptr;  // by row
  S grad = 1;
  const uint8_t* records;
  int store = 16;
  bool with_entropy = false;
  int64_t skipped = 0;  // as in Forward
};

// Columns `column` to `column` + kLanes - 1 of row i, of those that there are. alone: no other thread writes to the
// pair.
template <typename S>
LYRA_INLINE void store_row(const Backward<S>& f, int64_t i, int64_t column, int64_t columns, bool alone, Vec<S> out) {
  if (i < 0 || i >= f.pair.n || column <= -kLanes || column >= columns) return;
  S* to = f.grad_cost + i * f.columns + column;
  if (alone && to >= f.grad_cost && to + kLanes <= f.grad_cost + f.pair.n * f.columns) {
    const auto at = convert<IntOf<S>>(kIota) + static_cast<IntOf<S>>(column);
    store(to, (at >= 0) & (at < static_cast<IntOf<S>>(columns)) ? out : load<Vec<S>>(to));
    return;
  }
  for (int k = 0; k < kLanes; ++k) {
    if (column + k >= 0 && column + k < columns) to[k] = out[k];
  }
}

// Lane by lane eight steps of `tile` go to the rows of the output; what is not inside is exactly 0 and goes there, too,
// but for what is behind the rows of a chain.
template <typename S>
LYRA_INLINE void store_tile(const Backward<S>& f, const Stripe& stripe, Stripe::Place place, bool alone,
                            Vec<S> (&tile)[kLanes]) {
  transpose(tile);
  const auto [row, column] = place;
  const int64_t lanes = std::min<int64_t>(kLanes, f.pair.n - row);
  S* to = f.grad_cost + row * f.columns + column;
  // The same tile of the next stripe, which would wait for memory to be read that it only writes. It may lie outside.
  // Not where it is another thread's, which would have to take it back.
  auto next = reinterpret_cast<uintptr_t>(to) - kLanes * f.columns * sizeof(S);
  for (int l = 0; l < kLanes && alone; ++l, next += (f.columns - kSkew) * sizeof(S)) {
    __builtin_prefetch(reinterpret_cast<const void*>(next), 1);
  }
  const bool chain = stripe.period > 0;
  const int64_t columns = chain ? f.pair.m : f.columns;
  if (column >= kReach - 1 && column + kLanes <= columns) {
    for (int l = 0; l < lanes; ++l, to += f.columns - kSkew) store(to, f.grad * tile[l]);
    return;
  }
  if (stripe.among_full_rows(place, f.columns)) {
    const auto lane = convert<IntOf<S>>(kIota);
    for (int l = 0; l < kLanes; ++l, to += f.columns - kSkew) {
      const auto [offset, between, rest] = stripe.turn(place, l, f.columns);
      S *const first = to + offset, *const others = first + between;
      const Vec<S> out = f.grad * tile[l];
      const auto is_first = lane < static_cast<IntOf<S>>(rest);
      store(first, is_first ? out : load<Vec<S>>(first));
      if (rest < kLanes) store(others, is_first ? load<Vec<S>>(others) : out);
    }
    return;
  }
  for (int l = 0; l < kLanes; ++l) {
    int64_t i = row + l, j = column - kSkew * l;
    if (chain && j < 0) i -= kLanes, j += stripe.period;
    const Vec<S> out = f.grad * tile[l];
    store_row(f, i, j, columns, alone, out);
    if (chain) store_row(f, i + kLanes, j - stripe.period, columns, alone, out);
  }
}

// What no tile of the stripe has written in its rows.
template <bool kDropping, typename S>
LYRA_INLINE void finish_rows(const Backward<S>& f, const Stripe& stripe, Vec<S> dropped) {
  if (stripe.period > 0) {
    for (int64_t i = 0; i < f.pair.n; ++i) {
      std::fill(f.grad_cost + i * f.columns + f.pair.m, f.grad_cost + (i + 1) * f.columns, S(0));
    }
    return;
  }
  const int64_t tiles = (stripe.steps() + kLanes - 1) / kLanes;
  for (int l = 0; l < kLanes && stripe.row + l < f.pair.n; ++l) {
    const int64_t row = stripe.row + l, first = std::clamp<int64_t>(stripe.first - kSkew * l, 0, f.columns);
    S* to = f.grad_cost + row * f.columns;
    std::fill(to, to + first, S(0));
    std::fill(to + std::clamp<int64_t>(stripe.first + tiles * kLanes - kSkew * l, first, f.columns), to + f.columns,
              S(0));
    if (kDropping) f.grad_drop[row] = f.grad * dropped[l];
  }
}

LYRA_INLINE double entropy_of(double p) { return p > 0 ? -p * std::log(p) : 0.0; }

// kEntropy: whether the entropy of the paths is summed up, in a loop of its own kind, since the calls of log would put
// what one step hands to the next into memory.
template <bool kDropping, bool kEntropy, typename S>
LYRA_INLINE double backward_stripe(const Backward<S>& f, Stripe stripe, Vec<S>* frontier, const uint8_t* records,
                                   Vec<S> sent_before, Progress* progress) {
  const int64_t tiles = (stripe.steps() + kLanes - 1) / kLanes, bytes = record_bytes(f.store, kDropping);
  const int64_t index = stripe.row / kLanes;
  const bool below = index + 1 < f.pair.stripes();
  const uint8_t* record = records + stripe.steps() * bytes;
  const S unit = f.store == 16 ? S(1) / S(65535) : f.store == 8 ? S(1) / S(255) : S(1);
  double entropy = 0;
  // What the last step sends left, up left and, with what the one before sent up left, up.
  Vec<S> to_left = {}, to_diagonal = {}, sent = {}, dropped = {};
  int64_t seen = 0;  // how far the neighbour was when last looked at
  auto place = stripe.place(stripe.first + (tiles - 1) * kLanes);
  for (int64_t t = tiles - 1; t >= 0; --t, place = stripe.moved(place, -kLanes)) {
    const int64_t start = stripe.first + t * kLanes, stop = std::min(start + kLanes - 1, stripe.last);
    const Vec<S>* const below_tile = frontier + stripe.below(start);
    Vec<S>* const send = frontier + stripe.sends(start);
    // Ticks count downwards: `ticks` is minus the lowest entry that the stripe below has left.
    if (progress != nullptr && below && seen < kAllDone / 2 - stripe.below(start)) {
      seen = progress->wait(index + 1, kAllDone / 2 - stripe.below(std::max(start - kAhead, stripe.first)));
    }
    Vec<S> tile[kLanes];
    for (int k = kLanes - 1; k > stop - start; --k) tile[k] = Vec<S>{};
    for (int64_t step = stop; step >= start; --step) {
      record -= bytes;
      const Step<S> share = get<kDropping, S>(record, f.store);
      const Vec<S> ended = pulled(sent_before, below_tile[step - start]);
      Vec<S> here;
      if constexpr (kDropping) {
        here = ended * share.keep + to_left;
      } else {
        here = ended + to_left;
      }
      tile[step - start] = here;
      const Vec<S> units = here * unit, left = share.left * unit;
      to_left = here * left;  // the dependent chain
      sent_before = sent;
      sent = units * share.up + to_diagonal;
      to_diagonal = units * share.diagonal;
      if constexpr (kDropping) {
        const Vec<S> drop = ended * (1 - share.keep);
        sent += drop;
        dropped += drop;
      }
      send[step - start] = sent;
      if constexpr (kEntropy) {
        for (int l = 0; l < kLanes; ++l) {
          entropy += here[l] * (entropy_of(unit * share.diagonal[l]) + entropy_of(unit * share.up[l]) +
                                entropy_of(unit * share.left[l]));
          if constexpr (kDropping) entropy += ended[l] * (entropy_of(share.keep[l]) + entropy_of(1 - share.keep[l]));
        }
      }
    }
    repeat_front(frontier, send, stripe);
    if (t == 0) frontier[stripe.sends(stripe.first - 1)] = to_diagonal;
    if (progress != nullptr && t > 0) progress->set(index, kAllDone / 2 - stripe.sends(start));
    store_tile(f, stripe, place, progress == nullptr, tile);
  }
  if (progress != nullptr) progress->set(index, kAllDone);
  finish_rows<kDropping>(f, stripe, dropped);
  return entropy;
}

// Lets the last cell, which all comes out of, take 1 from below: out of the frontier or, where a lane is free below its
// own, out of what the last stripe is given, which is returned. mass: of an entry, the vector that takes part.
template <typename Entry, typename Mass>
Entry begin_backward(const Pair& pair, const Plan& plan, Entry* frontier, Mass mass) {
  const auto lane = (pair.n - 1) % kLanes;
  Entry given = {};
  if (lane + 1 < kLanes) {
    std::invoke(mass, given)[lane + 1] = 1;
    return given;
  }
  const Stripe& end = plan.stripes.back();
  std::invoke(mass, frontier[end.below(end.step_of(pair.n - 1, pair.m - 1))])[0] = 1;
  if (end.period > 0) repeat_front(frontier, frontier, end);
  return given;
}

// Stripes `to` - 1 down to `from`, of each its entropy; `progress` as in `forward_stripes`.
template <bool kDropping, bool kEntropy, typename S>
LYRA_INLINE void backward_stripes(const Backward<S>& f, const Plan& plan, int64_t from, int64_t to, Vec<S>* frontier,
                                  Vec<S> origin, double* entropy, Progress* progress) {
  const FlushSubnormals flush;  // far from the paths, products of shares fall below every number
  for (int64_t s = to - 1; s >= from; --s) {
    const Vec<S> sent = s + 1 == plan.count() ? origin : Vec<S>{};
    const uint8_t* const records = f.records + (plan.offset[s] - f.skipped);
    entropy[s] = backward_stripe<kDropping, kEntropy>(f, plan.stripes[s], frontier, records, sent, progress);
  }
}

}  // namespace lyra::soft_dtw_cpu
