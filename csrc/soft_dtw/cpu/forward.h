// The sweep forward over one pair: its value, and the records of its shares.
#pragma once

#include <atomic>
#include <limits>
#include <thread>

#include "records.h"
#include "recursion.h"
#include "stripe.h"

namespace lyra::soft_dtw_cpu {

// How far the threads that share one pair are: each stripe is a thread's, and follows the one before it.
class Progress {
 public:
  explicit Progress(int64_t stripes) : done_(new Ticks[stripes]) {}
  ~Progress() { delete[] done_; }
  Progress(const Progress&) = delete;
  Progress& operator=(const Progress&) = delete;
  // Returns how far the stripe is, once it is as far as `ticks`.
  int64_t wait(int64_t stripe, int64_t ticks) const {
    for (int spins = 0;; ++spins) {
      const int64_t now = done_[stripe].count.load(std::memory_order_acquire);
      if (now >= ticks) return now;
#ifdef __x86_64__
      __builtin_ia32_pause();
#endif
      if (spins >= kSpins) std::this_thread::yield();  // who is waited for may need this very core
    }
  }
  void set(int64_t stripe, int64_t ticks) { done_[stripe].count.store(ticks, std::memory_order_release); }

 private:
  static constexpr int kSpins = 1000;  // some tiles, which is all that a neighbour with a core of its own is late
  struct alignas(64) Ticks {           // a line of the cache each
    std::atomic<int64_t> count{0};
  };
  Ticks* done_;
};
constexpr int64_t kAllDone = std::numeric_limits<int64_t>::max();
// Steps that a thread lets its neighbour get ahead once it has caught up with it, since each look at how far that is
// fetches a line of the cache from another core.
constexpr int64_t kAhead = 4 * kLanes;

// A matrix of a pair, with what of the memory around it may be read.
template <typename S>
struct Cells {
  const S* data;  // of cell (0, 0)
  int64_t row;    // stride
  const S *begin, *end;
};

template <typename S>
struct Forward {
  Pair pair;
  Cells<S> cost;
  const S* drop = nullptr;  // by row
  uint8_t* records;         // null: none are kept
  int store = 0;
  double gamma = 1;
  int64_t skipped = 0;  // bytes of records of stripes before those that `records` has room for
};

// Columns `column` to `column` + kLanes - 1 of a row, which begins at `row`; `outside` for those that are not inside.
template <typename S>
LYRA_INLINE Vec<S> load_row(const Cells<S>& cells, const S* row, int64_t column, Window inside, S outside) {
  const auto [low, high] = inside;
  const S* from = row + column;
  if (column >= low && column + kLanes - 1 <= high) return load<Vec<S>>(from);
  if (column > high || column + kLanes - 1 < low) return Vec<S>{} + outside;
  if (from >= cells.begin && from + kLanes <= cells.end) {
    const auto lane = convert<IntOf<S>>(kIota);
    const auto first = static_cast<IntOf<S>>(std::max<int64_t>(low - column, 0));
    const auto last = static_cast<IntOf<S>>(std::min<int64_t>(high - column, kLanes));
    return (lane >= first) & (lane <= last) ? load<Vec<S>>(from) : Vec<S>{} + outside;
  }
  Vec<S> found;
  for (int k = 0; k < kLanes; ++k) found[k] = column + k >= low && column + k <= high ? from[k] : outside;
  return found;
}

// tile[k]: the lanes' cells k steps after `place`, `outside` for those that are not inside.
template <typename S>
LYRA_INLINE void load_tile(const Cells<S>& cells, const Stripe& stripe, Stripe::Place place, S outside,
                           Vec<S> (&tile)[kLanes]) {
  const auto [row, column] = place;
  const S* from = cells.data + row * cells.row + column;
  // The same tile of the next stripe, since what a CPU fetches ahead by itself ends with every page. It may lie
  // outside.
  auto next = reinterpret_cast<uintptr_t>(from) + kLanes * cells.row * sizeof(S);
  for (int l = 0; l < kLanes; ++l, next += (cells.row - kSkew) * sizeof(S)) {
    __builtin_prefetch(reinterpret_cast<const void*>(next));
  }
  if (column >= stripe.inner.low && column + kLanes - 1 <= stripe.inner.high && row + kLanes <= stripe.rows) {
    for (int l = 0; l < kLanes; ++l, from += cells.row - kSkew) tile[l] = load<Vec<S>>(from);
    return transpose(tile);
  }
  if (stripe.among_full_rows(place, cells.row)) {
    const auto lane = convert<IntOf<S>>(kIota);
    for (int l = 0; l < kLanes; ++l, from += cells.row - kSkew) {
      const auto [offset, between, rest] = stripe.turn(place, l, cells.row);
      const auto first = load<Vec<S>>(from + offset), others = load<Vec<S>>(from + offset + between);
      tile[l] = lane < static_cast<IntOf<S>>(rest) ? first : others;
    }
    return transpose(tile);
  }
  for (int l = 0; l < kLanes; ++l) {
    int64_t i = row + l, j = column - kSkew * l;
    if (j < 0 && stripe.period > 0) i -= kLanes, j += stripe.period;
    const S* own = cells.data + i * cells.row;
    tile[l] = load_row(cells, own, j, stripe.inside(i, l), outside);
    if (const int64_t rest = stripe.period - j; stripe.period > 0 && rest < kLanes) {
      const auto more = load_row(cells, own + kLanes * cells.row, -rest, stripe.inside(i + kLanes, l), outside);
      tile[l] = convert<IntOf<S>>(kIota) < static_cast<IntOf<S>>(rest) ? tile[l] : more;
    }
  }
  transpose(tile);
}

// The first tile of a ring also stands behind its end, for tiles that are read from entries on both sides of it.
template <typename State>
LYRA_INLINE void repeat_front(State* frontier, const State* tile, const Stripe& stripe) {
  if (tile == frontier) std::copy_n(frontier, kLanes, frontier + stripe.mask + 1);
}

template <bool kDropping, typename Cell, typename S>
LYRA_INLINE void forward_stripe(const Forward<S>& f, Cell& cell, Stripe stripe, typename Cell::State* frontier,
                                uint8_t* record, int store_as, Progress* progress) {
  using State = typename Cell::State;
  using T = typename Cell::Type;
  const int64_t index = stripe.row / kLanes;
  State drop = Cell::zero();
  if constexpr (kDropping) {
    Vec<S> prices = Vec<S>{} + std::numeric_limits<S>::infinity();
    for (int l = 0; l < kLanes && stripe.row + l < f.pair.n; ++l) prices[l] = f.drop[stripe.row + l];
    drop = cell.template weight<false>(prices);
  }
  Dither dither(stripe.row, stripe.first, store_as), keep_dither(stripe.row + 1, stripe.first + 1, store_as);
  State left = Cell::zero(), ended = Cell::zero(), ended_before = Cell::zero(), diagonal = Cell::zero();
  // Of a tile's steps. Each, once used, gives way to that of the next tile, which a CPU works out while the recursion
  // waits for itself.
  State weights[kLanes];
  auto place = stripe.place(stripe.first);
  Vec<S> tile[kLanes];
  if (stripe.first <= stripe.last) {
    load_tile(f.cost, stripe, place, std::numeric_limits<S>::infinity(), tile);
#pragma GCC unroll 1
    for (int k = 0; k < kLanes; ++k) weights[k] = cell.template weight<false>(tile[k]);
    if (progress != nullptr && index > 0) progress->wait(index - 1, stripe.above(stripe.first - 1));
    diagonal = Cell::pushed(Cell::zero(), frontier[stripe.above(stripe.first - 1)]);
  }
  bool open = false;
  int64_t seen = 0;  // how far the neighbour was when last looked at
  for (int64_t start = stripe.first; start <= stripe.last; start += kLanes) {
    const int64_t stop = std::min(start + kLanes - 1, stripe.last);
    const State* const above = frontier + stripe.above(start);
    State* const leave = frontier + stripe.leaves(start);
    const bool turns = !kDropping && stripe.turns(place);
    const auto column = static_cast<int32_t>(place.column);
    place = stripe.moved(place, kLanes);
    if (stop < stripe.last) {
      load_tile(f.cost, stripe, place, std::numeric_limits<S>::infinity(), tile);
      open = cell.all_open(tile);
    }
    if (progress != nullptr && index > 0 && seen < stripe.above(stop)) {
      seen = progress->wait(index - 1, stripe.above(std::min(stop + kAhead, stripe.last)));
    }
    const auto steps = [&]<bool kOpen, bool kTurns>() __attribute__((always_inline)) {
      for (int k = 0; k <= stop - start; ++k) {
        if constexpr (kTurns) {  // from a row's end on to the beginning of another
          const auto now = column + k, period = static_cast<int32_t>(stripe.period);
          const Vec<int32_t> lanes = kSkew * kIota == (now < period ? now : now - period);
          dither.next_row(lanes, stripe.period);
          left = Cell::chosen(lanes, Cell::zero(), left);
          diagonal = Cell::chosen(lanes, Cell::zero(), diagonal);
        }
        Shares<T> shares;
        const State up = Cell::pushed(ended_before, above[k]);
        left = Cell::match(weights[k], diagonal, up, left, shares);
        weights[k] = cell.template weight<kOpen>(tile[k]);
        diagonal = up;
        ended_before = ended;
        if (store_as != 0) put(record, store_as, shares, dither);
        if constexpr (kDropping) {
          Part<T> keep;
          ended = Cell::merged(Cell::normalised(left), up, drop, keep);
          if (store_as != 0) put_keep(record, store_as, keep, keep_dither);
        } else {
          ended = Cell::normalised(left);
        }
        leave[k] = ended;
      }
      left = Cell::normalised(left);
    };
    if (turns) {
      open ? steps.template operator()<true, true>() : steps.template operator()<false, true>();
    } else {
      open ? steps.template operator()<true, false>() : steps.template operator()<false, false>();
    }
    repeat_front(frontier, leave, stripe);
    if (progress != nullptr)
      progress->set(index, stripe.leaves(stop));  // up to that entry the frontier is this stripe's
  }
  if (progress != nullptr) progress->set(index, kAllDone);
}

// Stripes `from` to `to` - 1; `progress`: null, or they are one alone.
template <bool kDropping, typename Cell, typename S>
LYRA_INLINE void forward_stripes(const Forward<S>& f, Cell& given, const Plan& plan, int64_t from, int64_t to,
                                 typename Cell::State* frontier, Progress* progress) {
  Cell cell = given;  // where no store to memory can change it
  const auto run = [&](int store_as) __attribute__((always_inline)) {
    for (int64_t s = from; s < to; ++s) {
      uint8_t* records = store_as == 0 ? nullptr : f.records + (plan.offset[s] - f.skipped);
      forward_stripe<kDropping>(f, cell, plan.stripes[s], frontier, records, store_as, progress);
    }
  };
  const int store_as = f.records == nullptr ? 0 : f.store;
  // The usual case as a constant: no branches and fewer constants in the step.
  std::is_same_v<typename Cell::Type, float>&& store_as == 16 ? run(16) : run(store_as);
  given.flagged |= cell.flagged;
}

}  // namespace lyra::soft_dtw_cpu
