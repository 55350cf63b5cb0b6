// One warp runs through one strip of 32 columns of a pair, down or up, beside the warps of the other strips.
#pragma once

#include <cstdint>

#include "lyra/launch.h"
#include "numbers.h"
#include "pairs.h"

namespace lyra::soft_dtw {

// Strips in the order in which they depend on each other, whatever block comes first: a strip is begun only after the
// strip that it waits for, and that one waits for none begun later, so somebody can always go on, however few blocks
// the device holds at once.
__device__ __forceinline__ int64_t next_ticket(int* tickets) {
  int ticket = 0;
  if (threadIdx.x == 0) ticket = atomicAdd(tickets, 1);
  return __shfl_sync(kAllLanes, ticket, 0);
}

struct Strip {
  int index;
  int column;               // of this lane
  int last;                 // the last lane that has a column of the pair
  Range rows, left, right;  // its own, and its neighbours'; none where there is no neighbour
  int steps;                // lane l is in row rows.begin + u - kSkew l in step u
  int64_t first_place;      // of this lane among all that the pair's strips keep, 32 lanes side by side

  __device__ Strip(const Pair& pair, int s)
      : index(s),
        column(s * kLanes + static_cast<int>(threadIdx.x)),
        last(smaller(kLanes, pair.m - s * kLanes) - 1),
        rows(pair.rows_of_strip(s)),
        left(s > 0 ? pair.rows_of_strip(s - 1) : Range{0, 0}),
        right(s + 1 < pair.strips ? pair.rows_of_strip(s + 1) : Range{0, 0}),
        steps(rows.end > rows.begin ? rows.end - rows.begin + kSkew * last : 0),
        first_place(s * pair.pitch() * kLanes + threadIdx.x) {}

  __device__ __forceinline__ int64_t place(int step) const { return first_place + int64_t{step} * kLanes; }
};

// The words of one row on their way from strip to strip.
template <class Message>
struct Letter {
  uint64_t word[Message::kWords];

  __device__ static Letter read(const uint64_t* slots, Range rows, int row) {
    Letter letter;
    if (rows.holds(row)) {
      for (int k = 0; k < Message::kWords; ++k) {
        letter.word[k] = peek(slots + static_cast<int64_t>(row - rows.begin) * Message::kWords + k);
      }
    } else {
      Message::closed().pack(letter.word);
    }
    return letter;
  }

  __device__ bool is_here() const {
    bool here = true;
    for (int k = 0; k < Message::kWords; ++k) here &= word[k] != kAbsent;
    return here;
  }
};

// The letter of `row` for each lane that has one; waits until all of them are there.
template <class Message>
__device__ __forceinline__ Message receive(Letter<Message> letter, const uint64_t* slots, Range rows, int row) {
  while (!__all_sync(kAllLanes, letter.is_here())) {
    spin_wait();
    letter = Letter<Message>::read(slots, rows, row);
  }
  return Message::unpack(letter.word);
}

constexpr int kNoRow = INT32_MIN / 2;  // far from all rows, whatever is added to it

// A lane's own place for a row in its column of a delay line.
__device__ __forceinline__ int slot_of(int row) {
  return ((row * kLanes) & ((kRing - 1) * kLanes)) | static_cast<int>(threadIdx.x);
}

// --- down ------------------------------------------------------------------------------------------------------------

// Rows go from top to bottom, lane l kSkew rows behind lane l - 1: so what a lane hands to its right neighbour has a
// step's time to get there. Global memory is read a row of 32 columns at a time; a delay line in shared memory, of
// which every lane uses its own column alone, lies between. What a cell type holds:
//   kBlock                steps that go together, at most kSteps: what they need is in registers before they begin
//   In, cells             in memory, of this lane's column; `row` apart; outside() stands for cells that are not inside
//   Stored, fetch(place)  kept from an earlier sweep, in the order of steps
//   Price, price(i)       of a row, with kPrices
//   Message               to the right neighbour; closed() is "nothing", origin() enters at (0, 0), and with kPrices
//                         edge(message, price) is what stands left of the first column, one row on
//   step                  one cell: keeps what it keeps, turns `mine` from the cell above to this one
// Returns the message of the pair's last cell in the last lane of the last strip.
template <class Cell>
__device__ typename Cell::Message sweep_down(Cell& cell, const Pair& pair, const Strip& strip, const uint64_t* inbox,
                                             uint64_t* outbox) {
  using In = typename Cell::In;
  using Message = typename Cell::Message;
  using Price = typename Cell::Price;
  using Stored = typename Cell::Stored;
  constexpr int kBlock = Cell::kBlock;
  const int lane = threadIdx.x, begin = strip.rows.begin;
  Message* const box = reinterpret_cast<Message*>(dynamic_shared());  // of this block's rows, for the first lane
  Price* const prices = reinterpret_cast<Price*>(box + kBlock);
  In* const line = reinterpret_cast<In*>(prices + (Cell::kPrices ? kRing : 0));
  const Range mine_rows = pair.rows_of_column(strip.column);
  const auto load = [&](int first, In(&ins)[kBlock]) {
    const In* from = cell.cells + first * cell.row;
#pragma unroll
    for (int k = 0; k < kBlock; ++k, from += cell.row) ins[k] = mine_rows.holds(first + k) ? *from : Cell::outside();
    if (!pair.has_windows()) return;
#pragma unroll
    for (int k = 0; k < kBlock; ++k) {
      if (mine_rows.holds(first + k) && !pair.in_window(first + k, strip.column)) ins[k] = Cell::outside();
    }
  };
  const auto fetch = [&](int u) { return u < strip.steps ? cell.fetch(strip.place(u)) : Stored{}; };
  const auto price = [&](int row) { return row < pair.n ? cell.price(row) : Cell::no_price(); };
  if (strip.steps == 0) return Message::closed();

  // The rows above the strip's first, which the lanes pass while they wait for their turn; then the first block.
  for (int row = begin - kTail; row < begin; ++row) line[slot_of(row)] = Cell::outside();
  In ins[kBlock];
  load(begin, ins);
#pragma unroll
  for (int k = 0; k < kBlock; ++k) line[slot_of(begin + k)] = ins[k];
  if constexpr (Cell::kPrices) {
    for (int row = begin - kTail + lane; row < begin + kBlock; row += kLanes) {
      exchange_store(prices + (row & (kRing - 1)), row >= begin ? price(row) : Cell::no_price());
    }
  }
  const int letter_row = lane < kBlock ? lane : kNoRow;
  Letter<Message> letter = Letter<Message>::read(inbox, strip.left, begin + letter_row);
  Message edge = Cell::origin(), mine = Message::closed(), left = Message::closed();
  Message diag = strip.column == 0 ? Cell::origin() : Message::closed();
  Stored stored[kBlock];
#pragma unroll
  for (int k = 0; k < kBlock; ++k) stored[k] = fetch(k);

  for (int u = 0; u < strip.steps; u += kBlock) {
    Message fetched = receive<Message>(letter, inbox, strip.left, begin + u + letter_row);
    if constexpr (Cell::kPrices) {
      __syncwarp();
      if (strip.index == 0) {
        for (int k = 0; k < kBlock; ++k) {
          edge = cell.edge(edge, exchange_load(prices + ((begin + u + k) & (kRing - 1))));
          if (k == lane) fetched = edge;
        }
      }
    }
    if (lane < kBlock) exchange_store(box + lane, fetched);
    __syncwarp();

    // What the next block needs is under way during the steps of this one.
    const int next = begin + u + kBlock;
    letter = Letter<Message>::read(inbox, strip.left, next + letter_row);
    load(next, ins);
    Stored next_stored[kBlock];
#pragma unroll
    for (int k = 0; k < kBlock; ++k) next_stored[k] = fetch(u + kBlock + k);
    Price next_price = Cell::no_price();
    if (Cell::kPrices && lane < kBlock) next_price = price(next + lane);

    const int first_row = begin + u - kSkew * lane;
    const int64_t first_place = strip.place(u);
    uint64_t* const out = outbox + int64_t{first_row - begin} * Message::kWords;
    const Range out_rows = lane == strip.last ? strip.rows : Range{0, 0};
#pragma unroll
    for (int k = 0; k < kBlock; ++k) {
      const int row = first_row + k;
      const Message on_its_way = mine.each([](auto v) { return __shfl_up_sync(kAllLanes, v, 1); });
      const Message from_box = exchange_load(box + k);  // by all lanes: the address is the same for all
      if (lane == 0) left = from_box;
      Price row_price = Cell::no_price();
      if constexpr (Cell::kPrices) row_price = exchange_load(prices + (row & (kRing - 1)));
      cell.step(first_place + k * kLanes, row, line[slot_of(row)], stored[k], row_price, left, diag, mine);
      diag = left;
      left = on_its_way;
      Letter<Message> sent;
      mine.pack(sent.word);
      const bool wanted = out_rows.holds(row);
#pragma unroll
      for (int w = 0; w < Message::kWords; ++w) post(out + k * Message::kWords + w, sent.word[w], wanted);
    }
#pragma unroll
    for (int k = 0; k < kBlock; ++k) {
      line[slot_of(next + k)] = ins[k];
      stored[k] = next_stored[k];
    }
    __syncwarp();
    if (Cell::kPrices && lane < kBlock) exchange_store(prices + ((next + lane) & (kRing - 1)), next_price);
  }
  const bool knows = strip.index == pair.strips - 1 && lane == strip.last;
  return Message::unpack(Letter<Message>::read(outbox, knows ? strip.rows : Range{0, 0}, pair.n - 1).word);
}

template <class Cell>
constexpr size_t shared_bytes_down() {
  return Cell::kBlock * sizeof(typename Cell::Message) + (Cell::kPrices ? kRing * sizeof(typename Cell::Price) : 0) +
         kRing * kLanes * sizeof(typename Cell::In);
}

// --- up --------------------------------------------------------------------------------------------------------------

// The same steps from the last to the first: so a lane is a step's time behind its right neighbour, and all that the
// way down kept lies in memory in the order in which it is needed. What a cell type holds:
//   kBlock                as above
//   Stored, fetch(place)  kept by the sweep down
//   Message               to the left neighbour; closed() is "nothing", origin() enters diagonally at (n-1, m-1)
//   step                  one cell; returns what is stored, times `grad`, in `cells` of this lane's column
//   leave(i, message, at) what leaves the strip to the left, if `at`
// Of a matrix all N rows of the strip's columns are written, else those that the strip runs through.
template <class Cell>
__device__ void sweep_up(Cell& cell, const Pair& pair, const Strip& strip, const Problem& problem,
                         const Cells<typename Cell::Out>& cells, const uint64_t* inbox, uint64_t* outbox) {
  using Out = typename Cell::Out;
  using Message = typename Cell::Message;
  using Stored = typename Cell::Stored;
  constexpr int kBlock = Cell::kBlock;
  const int lane = threadIdx.x, begin = strip.rows.begin;
  Message* const box = reinterpret_cast<Message*>(dynamic_shared());  // of this block's rows, for the last lane
  Out* const line = reinterpret_cast<Out*>(box + kBlock);
  const Range mine_rows = pair.rows_of_column(strip.column);
  const bool exists = strip.column < problem.columns;
  const Range stored_rows = exists ? strip.rows : Range{0, 0};

  const auto fetch = [&](int u) { return u >= 0 ? cell.fetch(strip.place(u)) : Stored{}; };
  const int letter_row = lane < kBlock ? begin - kSkew * strip.last - lane : kNoRow;
  Letter<Message> letter = Letter<Message>::read(inbox, strip.right, strip.steps - 1 + letter_row);
  Message mine = Message::closed(), right = Message::closed();
  Message diag = strip.column == pair.m - 1 ? Cell::origin() : Message::closed();
  Stored stored[kBlock];
#pragma unroll
  for (int k = 0; k < kBlock; ++k) stored[k] = fetch(strip.steps - 1 - k);

  for (int u = strip.steps - 1; u >= 0; u -= kBlock) {
    const Message fetched = receive<Message>(letter, inbox, strip.right, u + letter_row);
    if (lane < kBlock) exchange_store(box + lane, fetched);
    __syncwarp();
    letter = Letter<Message>::read(inbox, strip.right, u - kBlock + letter_row);
    Stored next_stored[kBlock];
#pragma unroll
    for (int k = 0; k < kBlock; ++k) next_stored[k] = fetch(u - kBlock - k);

    const int first_row = begin + u - kSkew * lane;
    uint64_t* const out = outbox + int64_t{first_row - begin} * Message::kWords;
    const Range out_rows = lane == 0 ? strip.rows : Range{0, 0};
#pragma unroll
    for (int k = 0; k < kBlock; ++k) {
      const int row = first_row - k;
      const Message on_its_way = mine.each([](auto v) { return __shfl_down_sync(kAllLanes, v, 1); });
      const Message from_box = exchange_load(box + k);
      if (lane == strip.last) right = from_box;
      line[slot_of(row)] = cell.step(stored[k], right, diag, mine);
      diag = right;
      right = on_its_way;
      const bool wanted = out_rows.holds(row);
      cell.leave(row, mine, wanted);
      Letter<Message> sent;
      mine.pack(sent.word);
#pragma unroll
      for (int w = 0; w < Message::kWords; ++w) post(out - k * Message::kWords + w, sent.word[w], wanted);
    }
    // The first lane, the last to be there, has just been through these rows.
    Out* to = cell.cells + (begin + u) * cells.row;
#pragma unroll
    for (int k = 0; k < kBlock; ++k, to -= cells.row) {
      const int row = begin + u - k;
      bool inside = mine_rows.holds(row);
      if (pair.has_windows() && inside) inside = pair.in_window(row, strip.column);
      if (stored_rows.holds(row)) *to = inside ? cell.grad * line[slot_of(row)] : Out(0);
    }
#pragma unroll
    for (int k = 0; k < kBlock; ++k) stored[k] = next_stored[k];
    __syncwarp();
  }
  if (!exists || cells.order != Order::kMatrix) return;
  const Range done = strip.steps > 0 ? strip.rows : Range{0, 0};
  for (int64_t row = 0; row < done.begin; ++row) cell.cells[row * cells.row] = Out(0);
  for (int64_t row = done.end; row < problem.rows; ++row) cell.cells[row * cells.row] = Out(0);
}

template <class Cell>
constexpr size_t shared_bytes_up() {
  return Cell::kBlock * sizeof(typename Cell::Message) + kRing * kLanes * sizeof(typename Cell::Out);
}

// Adds what the lanes found to what the strips before, in the order of the sweep, found: always in the same order.
// `after`: the word of the strip before, or null. Returns the sum so far.
__device__ __forceinline__ double sum_over_strips(double mine, const uint64_t* before, uint64_t* word) {
  for (int other = kLanes / 2; other > 0; other /= 2) mine += __shfl_xor_sync(kAllLanes, mine, other);
  if (before) {
    uint64_t found = peek(before);
    while (found == kAbsent) {
      spin_wait();
      found = peek(before);
    }
    mine = double_of(found) + mine;
  }
  if (threadIdx.x == 0) post(word, present(word_of(mine)));
  return mine;
}

}  // namespace lyra::soft_dtw
