// Moves the kept tokens of many tensors at once, whatever their types: rows of bytes. Raw pointers, no torch.
//
// Math. out[p, b, k] = in[p, b, index[b, k]], or `fill` where the index is negative or out of range; p a plane (M-RoPE
// position ids have three). Flat: index holds v = sample * L + place, and out[p, b, k] = in[p, v / L, v % L], which is
// packing, and by the inverse map its reverse. The backward is the same move with the inverse map as index: each
// element is written once, nothing is added up, so there are no atomics and one order.
//
// Shapes. in (P,B,L,H,R bytes) with strides, R adjacent; out (P,Bo,K,H,R) adjacent; index (Bo,K).
//
// Plan. One launch for a table of tensors that travels in the kernel's arguments. Each tensor is cut into vectors of
// the largest size (16 bytes at best) that its addresses, strides and R allow, each block takes kVectors per thread of
// one tensor, side by side, so that both reads and writes are whole lines; all loads of a thread are under way
// together.
//
// Bytes: rows read and written once, 8 per index; FLOPs none. Floor, H100 at 3.0 TB/s: hidden states of 3584 bf16, half
// of 131072 tokens kept, 0.94 GB, 313 us; K and V of a layer (4 heads of 128) 89 us. At 85 % of that, estimated, not
// yet timed: 370 us.
//
// Registers per thread, at most, spills none (tests/test_compile_budget.py reads these lines):
//   budget sm_80: gather_kernel 64
//   budget sm_90a: gather_kernel 64
#pragma once

#include <cstdint>
#include <cstring>

#include "lyra/launch.h"

namespace lyra::token_select {

constexpr int kGatherThreads = 256;
constexpr int kVectors = 4;
constexpr int kMaxTensors = 16;

// One tensor; strides in bytes.
struct Rows {
  const char* from;
  char* to;
  int64_t planes, heads, row_bytes;  // P, H, R
  int64_t plane_stride, sample_stride, token_stride, head_stride;
  int64_t fill[2];  // the bytes of 16 / element size elements
  // Set by `cut`: bytes of a vector, how many there are in a part, and the first block that is at work here.
  int64_t width, vectors, first_block;
};

struct Table {
  int64_t batch, length;          // B, L of what is read
  int64_t out_batch, out_length;  // Bo, K
  const int64_t* index;
  bool flat;
  int count;
  Rows tensors[kMaxTensors];
};

struct alignas(16) Vector16 {
  int64_t half[2];
};

// Columns of the output, out of the out_batch * out_length.
struct Columns {
  uint32_t first, count;
};

// By a block: its share of a tensor's columns. place(i): what index holds for the i-th of them.
template <class Vector, class Place>
__device__ void move(const Table& table, const Rows& rows, int64_t block, Columns columns, const Place& place) {
  const int64_t all = rows.vectors, begin = block * (kGatherThreads * kVectors);
  const uint32_t per_row = static_cast<uint32_t>(rows.row_bytes / static_cast<int64_t>(sizeof(Vector)));
  const uint32_t heads = static_cast<uint32_t>(rows.heads), length = static_cast<uint32_t>(table.length);
  const uint32_t out_length = static_cast<uint32_t>(table.out_length);
  const uint32_t others = static_cast<uint32_t>(table.out_batch) * out_length - columns.count;
  // Numbers of rows fit 32 bits, numbers of vectors need not.
  const uint32_t first_row = static_cast<uint32_t>(begin / per_row);
  const uint32_t rest = static_cast<uint32_t>(begin - int64_t{first_row} * per_row);
  Vector taken[kVectors];
  Vector* to[kVectors];
#pragma unroll
  for (int k = 0; k < kVectors; ++k) {
    const uint32_t past = rest + k * kGatherThreads + threadIdx.x, down = past / per_row,
                   vector = past - down * per_row;
    const uint32_t row = first_row + down, token = row / heads, head = row - token * heads;
    const uint32_t plane = token / columns.count, column = token - plane * columns.count;
    const int64_t at = begin + k * kGatherThreads + threadIdx.x;
    // Of each plane, other blocks write the columns in front of these and behind.
    to[k] = reinterpret_cast<Vector*>(rows.to) + at + int64_t{plane * others + columns.first} * heads * per_row;
    std::memcpy(&taken[k], rows.fill, sizeof(Vector));
    if (at >= all) {
      to[k] = nullptr;
      continue;
    }
    const int64_t index = place(column);
    const int64_t last = table.flat ? table.batch * table.length : table.length;
    if (index < 0 || index >= last) continue;
    const uint32_t known = static_cast<uint32_t>(index);
    const uint32_t sample = table.flat ? known / length : (columns.first + column) / out_length;
    const uint32_t token_of = table.flat ? known - sample * length : known;
    taken[k] = *reinterpret_cast<const Vector*>(rows.from + plane * rows.plane_stride + sample * rows.sample_stride +
                                                token_of * rows.token_stride + head * rows.head_stride +
                                                vector * static_cast<int64_t>(sizeof(Vector)));
  }
#pragma unroll
  for (int k = 0; k < kVectors; ++k) {
    if (to[k]) *to[k] = taken[k];
  }
}

// Block `block` of those that work on the table.
template <class Place>
__device__ void move(const Table& table, int64_t block, Columns columns, const Place& place) {
  int i = 0;
  while (i + 1 < table.count && table.tensors[i + 1].first_block <= block) ++i;
  const Rows& rows = table.tensors[i];
  block -= rows.first_block;
  switch (rows.width) {
    case 16:
      return move<Vector16>(table, rows, block, columns, place);
    case 8:
      return move<int64_t>(table, rows, block, columns, place);
    case 4:
      return move<int32_t>(table, rows, block, columns, place);
    case 2:
      return move<int16_t>(table, rows, block, columns, place);
    default:
      return move<int8_t>(table, rows, block, columns, place);
  }
}

__global__ void __launch_bounds__(kGatherThreads) gather_kernel(const __grid_constant__ Table table) {
  const Columns all{0, static_cast<uint32_t>(table.out_batch * table.out_length)};
  move(table, blockIdx.x, all, [&](uint32_t column) { return table.index[column]; });
}

// The most bytes that can be moved at once.
inline int64_t vector_width(const Rows& r) {
  const int64_t all = reinterpret_cast<intptr_t>(r.from) | reinterpret_cast<intptr_t>(r.to) | r.row_bytes |
                      r.plane_stride | r.sample_stride | r.token_stride | r.head_stride;
  int64_t width = 16;
  while (all % width) width /= 2;
  return width;
}

// Cuts the tensors of `parts` equal numbers of columns into the work of blocks; how many such blocks a part takes, or
// -1 where numbers do not fit. Tensors without elements must not be in the table.
inline int64_t cut(Table& table, int64_t parts) {
  int64_t blocks = 0;
  for (int i = 0; i < table.count; ++i) {
    Rows& rows = table.tensors[i];
    rows.width = vector_width(rows);
    rows.first_block = blocks;
    const int64_t all_rows = rows.planes * table.out_batch * table.out_length * rows.heads;
    if (all_rows > INT32_MAX || rows.row_bytes > INT32_MAX) return -1;
    rows.vectors = all_rows / parts * (rows.row_bytes / rows.width);
    blocks += (rows.vectors + kGatherThreads * kVectors - 1) / (kGatherThreads * kVectors);
  }
  return blocks > INT32_MAX || table.batch * table.length > INT32_MAX ? -1 : blocks;
}

// Rows, columns and tokens must number less than 2^31 in all.
inline cudaError_t gather(Table table, cudaStream_t stream) {
  const int64_t blocks = cut(table, 1);
  if (blocks < 0) return cudaErrorInvalidValue;
  return blocks == 0 ? cudaSuccess : launch(gather_kernel, blocks, kGatherThreads, 0, stream, table);
}

}  // namespace lyra::token_select
