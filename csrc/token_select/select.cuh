// Which tokens of a padded batch stay: the best candidates of each sample or segment, and all that are no candidates,
// in their original order. Raw pointers, no torch.
//
// Math. A candidate i with score v has the rank (ordered(v), -i), a number of 32 + ceil(log2 L) bits: ordered() puts
// the bits of a float in order, NaN lowest, -inf next, -0 as 0. No two tokens share a rank, so that the k best are
// those whose rank is at least some threshold, ties and all. A radix search finds it from the highest digit down: count
// the candidates per digit among those that agree with the threshold so far, take the digit in which the k-th falls. It
// ends as soon as all that agree are kept, so the digits of the index are looked at only where ties cut across the
// budget. Kept tokens are then counted per range, and each range writes from its own place on: order without a sort.
//
// Shapes. scores (B,P,L) float: added up over the planes, in order, then bias (B,L); candidates, key_mask (B,L) bool;
// segment (B,L); index (B,K): kept places, increasing, -1 behind them (or in front, kLeft); lengths (B); inverse (B,L):
// column in index or -1. kPacked: index (K), sample after sample, entries sample * L + place. Packed in (cu_seqlens):
// one row of L tokens, entries are places in it. What finds no room in index is left out, and lengths tell, or, if
// wanted, the kernel fails. The budget is read on the device; nothing waits, for the host or for another block. All
// sums are of whole numbers: the plan moves no bit.
//
// Plan. `select_kernel`: one block per sample, any number of segments (digits of 11, 8 or 4 bits, so that the counters
// of few segments stay in shared memory). Long samples of few segments take one launch per digit instead,
// `count_digits_kernel`, each block of which first draws the conclusion from the counts of the launch before, then
// `count_kept_kernel` and `write_kernel`. Packed out, the one block also leaves the writing to `write_kernel`.
//
// Bytes per token: 4 P + 1 to 10 read per digit, 8 + 8 rho written. FLOPs none. Floor, H100 at 3.0 TB/s, L = 131072,
// one sample: 0.2 us per digit read from HBM and 0.6 us for the writes; latency rules instead. Estimated, not yet
// timed: 8 launches of about 1.3 us in a graph, 11 us; L = 576 in one launch, 5 us.
//
// Registers per thread, at most, spills none (tests/test_compile_budget.py reads these lines):
//   budget sm_80: select_kernel 80, count_digits_kernel 72, count_kept_kernel 64, write_kernel 64, clear_kernel 24
//   budget sm_90a: select_kernel 80, count_digits_kernel 72, count_kept_kernel 64, write_kernel 64, clear_kernel 24
#pragma once

#include <cstdint>

#include "lyra/device_assert.h"
#include "lyra/launch.h"
#include "warp.h"

namespace lyra::token_select {

constexpr int kSelectThreads = 512;
constexpr int kSharedCounters = 8192;  // 32 KB of shared memory
constexpr int kSplitThreads = 256;     // of a block, where a sample takes several
constexpr int kSplitTokens = 2048;     // tokens of such a block

// How many candidates stay, of n in segment s of sample b: `counts`, else `shares`, else `share` where it is not
// negative, else `count`.
struct Budget {
  const int64_t* counts;
  const double* shares;
  int64_t sample_stride, segment_stride;  // of either
  double share;
  int64_t count, min_keep;

  __device__ int32_t of(int64_t sample, int64_t s, int32_t n) const {
    const int64_t at = sample * sample_stride + s * segment_stride;
    int64_t k = counts ? counts[at] : count;
    if (!counts && (shares || share >= 0)) {
      const double exact = floor(n * (shares ? shares[at] : share));
      k = exact > 0 ? exact < n ? static_cast<int64_t>(exact) : n : 0;  // NaN is 0
    }
    if (k < min_keep) k = min_keep;
    return static_cast<int32_t>(k < n ? k : n);
  }
};

enum Layout { kRight, kLeft, kPacked };  // where padding goes, or none

struct Selection {
  int64_t batch, planes, length, capacity, segments;  // B, P, L, K, S
  const float* scores;
  const float* bias;  // or null
  const bool* candidates;
  const bool* key_mask;       // or null: all tokens are real
  const int64_t* segment;     // or null: all are in segment 0
  const int32_t* cu_seqlens;  // (B + 1), or null: padded in
  Budget budget;
  Layout layout;
  bool complete;  // what finds no room in index ends the kernel
  int64_t *index, *lengths, *inverse;
};

// The digits of a rank, the highest first.
struct Digits {
  int bits, total;

  __host__ __device__ explicit Digits(const Selection& p) : total(32) {
    bits = p.segments * 2048 <= kSharedCounters ? 11 : p.segments * 256 <= kSharedCounters ? 8 : 4;
    while (p.length > int64_t{1} << (total - 32)) ++total;
  }
  __host__ __device__ int bins() const { return 1 << bits; }
  __host__ __device__ int passes() const { return (total + bits - 1) / bits; }
  __device__ int high(int pass) const { return total - bits * pass; }
  __device__ int low(int pass) const { return high(pass) > bits ? high(pass) - bits : 0; }
  __device__ int of(uint64_t rank, int pass) const {
    return static_cast<int>((rank >> low(pass)) & ((uint64_t{1} << (high(pass) - low(pass))) - 1));
  }
};

// What is known of a segment after some digits: ranks that agree with them are from `threshold` on, and `need` of those
// stay. Closed once all of them stay.
struct Segment {
  uint64_t threshold;
  int32_t need, open;
};

__device__ __forceinline__ uint32_t ordered(float v) {
  if (v != v) return 0;
  const uint32_t bits = static_cast<uint32_t>(__float_as_int(v == 0 ? 0.0f : v));
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

// One sample: `length` tokens from `start` on.
struct Tokens {
  const Selection& p;
  int64_t sample, start, length;
  Digits digits;

  __device__ Tokens(const Selection& p, int64_t sample)
      : p(p), sample(sample), start(first(sample)), length(last(sample) - start), digits(p) {}
  // The pointers of p are to this sample's own tokens.
  __device__ Tokens(const Selection& p, int64_t sample, int64_t length)
      : p(p), sample(sample), start(0), length(length), digits(p) {}

  // Inside the row, and never negative in length, whatever cu_seqlens holds.
  __device__ int64_t place(int64_t at) const { return at < 0 ? 0 : at > p.length ? p.length : at; }
  __device__ int64_t first(int64_t b) const { return p.cu_seqlens ? place(p.cu_seqlens[b]) : b * p.length; }
  __device__ int64_t last(int64_t b) const {
    if (!p.cu_seqlens) return (b + 1) * p.length;
    const int64_t end = place(p.cu_seqlens[b + 1]);
    return end > first(b) ? end : first(b);
  }

  __device__ bool real(int64_t i) const { return !p.key_mask || p.key_mask[start + i]; }

  // The segment in which a real token competes; -1 if it stays whatever its score.
  __device__ int64_t segment(int64_t i) const {
    if (!p.candidates[start + i]) return -1;
    if (!p.segment) return 0;
    const int64_t s = p.segment[start + i];
    return s >= 0 && s < p.segments ? s : -1;
  }

  __device__ float score(int64_t i) const {
    const float* at = p.scores + (p.cu_seqlens ? start : start * p.planes) + i;
    float sum = *at;
    for (int64_t plane = 1; plane < p.planes; ++plane) sum += at[plane * p.length];
    return p.bias ? sum + p.bias[start + i] : sum;
  }
  __device__ uint64_t rank(int64_t i) const {
    return static_cast<uint64_t>(ordered(score(i))) << (digits.total - 32) | static_cast<uint64_t>(p.length - 1 - i);
  }

  __device__ bool kept(int64_t i, const Segment* segments) const {
    if (!real(i)) return false;
    const int64_t s = segment(i);
    return s < 0 || rank(i) >= exchange_load(segments + s).threshold;
  }
};

// --- the search for the threshold --------------------------------------------------------------------------------

// Counts the tokens [begin, end) that may still be either kept or dropped, by segment and digit.
__device__ void count_digits(const Tokens& tokens, int pass, int64_t begin, int64_t end, const Segment* segments,
                             int32_t* counters) {
  const Digits& digits = tokens.digits;
  for (int64_t i = begin + threadIdx.x; i < end; i += blockDim.x) {
    if (!tokens.real(i)) continue;
    const int64_t s = tokens.segment(i);
    if (s < 0) continue;
    const uint64_t rank = tokens.rank(i);
    if (pass > 0) {
      const Segment known = exchange_load(segments + s);
      if (!known.open || (rank ^ known.threshold) >> digits.high(pass)) continue;
    }
    atomicAdd(counters + s * digits.bins() + digits.of(rank, pass), 1);
  }
}

__device__ __forceinline__ Segment from_leader(const Segment& mine) {
  return {__shfl_sync(kAllLanes, mine.threshold, 0), __shfl_sync(kAllLanes, mine.need, 0),
          __shfl_sync(kAllLanes, mine.open, 0)};
}

// By a warp: what the counts of digit `pass` say of segment s, of which `known` was known.
__device__ Segment conclude(const Tokens& tokens, int pass, int64_t s, Segment known, const int32_t* counters) {
  const Digits& digits = tokens.digits;
  const int lane = threadIdx.x % kLanes, bins = digits.bins();
  counters += s * bins;
  // Lane 0 adds up the highest bins. Each lane starts elsewhere in its own, for the sake of the banks.
  const int width = bins < kLanes ? 1 : bins / kLanes, first = bins - (lane + 1) * width;
  int32_t mine = 0;
  for (int k = 0; first >= 0 && k < width; ++k) mine += counters[first + (k + lane) % width];
  const int32_t so_far = running_sum(mine), all = __shfl_sync(kAllLanes, so_far, kLanes - 1);
  if (pass == 0) {
    known = {0, tokens.p.budget.of(tokens.sample, s, all), 1};
    if (known.need == 0) known = {~uint64_t{0}, 0, 0};
    if (known.need == all) known.open = 0;
  }
  if (!known.open) return known;

  const int owner = __ffs(static_cast<int>(__ballot_sync(kAllLanes, so_far >= known.need))) - 1;
  int32_t above = __shfl_sync(kAllLanes, so_far - mine, owner);
  for (int top = bins - owner * width - 1; top >= 0; top -= kLanes) {
    const bool own = top - lane >= bins - (owner + 1) * width;
    const int32_t count = own ? counters[top - lane] : 0, sum = above + running_sum(count);
    const unsigned found = __ballot_sync(kAllLanes, own && sum >= known.need);
    above = __shfl_sync(kAllLanes, sum, kLanes - 1);
    if (!found) continue;
    const int where = __ffs(static_cast<int>(found)) - 1;
    const int32_t equal = __shfl_sync(kAllLanes, count, where);
    known.threshold |= static_cast<uint64_t>(top - where) << digits.low(pass);
    known.need -= __shfl_sync(kAllLanes, sum, where) - equal;
    known.open = equal != known.need;
    break;
  }
  return known;
}

// --- the kept tokens, in order -----------------------------------------------------------------------------------

// By a warp: calls what(i, kept, how many of the range before i are kept); returns how many are.
template <class What>
__device__ int32_t walk(const Tokens& tokens, int64_t begin, int64_t size, const Segment* segments, const What& what) {
  const int lane = threadIdx.x % kLanes;
  const int64_t end = begin + size < tokens.length ? begin + size : tokens.length;
  int32_t before = 0;
  for (int64_t at = begin; at < end; at += kLanes) {
    const int64_t i = at + lane;
    const bool kept = i < end && tokens.kept(i, segments);
    const unsigned all = __ballot_sync(kAllLanes, kept);
    if (i < end) what(i, kept, before + __popc(all & ((1u << lane) - 1)));
    before += __popc(all);
  }
  return before;
}

// Warp w of the `warps` of a sample looks after the tokens [w size, (w + 1) size).
__device__ __forceinline__ int64_t range_size(const Tokens& tokens, int64_t warps) {
  return ((tokens.p.length + warps - 1) / warps + kLanes - 1) / kLanes * kLanes;
}

__device__ int32_t count_kept(const Tokens& tokens, int64_t warp, int64_t warps, const Segment* segments) {
  const int64_t size = range_size(tokens, warps);
  return walk(tokens, warp * size, size, segments, [](int64_t, bool, int32_t) {});
}

// By a warp: load(0) + .. + load(size - 1).
template <class Load>
__device__ int64_t sum_of(int64_t size, const Load& load) {
  int32_t sum = 0;
  for (int64_t k = threadIdx.x % kLanes; k < size; k += kLanes) sum += load(k);
  return __shfl_sync(kAllLanes, running_sum(sum), kLanes - 1);
}

__device__ __forceinline__ void check_room(const Selection& p, int64_t columns) {
  device_assert(!p.complete || columns <= p.capacity, "capacity: a sample keeps more tokens than that");
}

// `before`: kept tokens of the sample in front of this warp's range; `offset`: of the samples in front; `all`: of this.
__device__ void write_kept(const Tokens& tokens, int64_t warp, int64_t warps, const Segment* segments, int64_t before,
                           int64_t offset, int64_t all) {
  const Selection& p = tokens.p;
  const int lane = threadIdx.x % kLanes;
  const int64_t b = tokens.sample, size = range_size(tokens, warps);
  // Column of the sample's first kept token, and what stands in index for its token 0.
  const int64_t column = p.layout == kPacked ? offset : p.layout == kLeft ? p.capacity - all : 0;
  const int64_t zero = p.layout == kPacked ? tokens.start : 0;
  int64_t *index = p.index + (p.layout == kPacked ? 0 : b * p.capacity), *inverse = p.inverse + tokens.start;
  walk(tokens, warp * size, size, segments, [&](int64_t i, bool kept, int64_t place) {
    place += column + before;
    const bool fits = kept && place >= 0 && place < p.capacity;
    inverse[i] = fits ? place : -1;
    if (fits) index[place] = zero + i;
  });

  const auto fill = [&](int64_t* to, int64_t begin, int64_t end) {
    for (int64_t k = begin + warp * kLanes + lane; k < end; k += warps * kLanes) to[k] = -1;
  };
  const bool is_last = b + 1 == p.batch;
  if (p.layout == kLeft) fill(index, 0, column);
  if (p.layout == kRight || (p.layout == kPacked && is_last)) fill(index, column + all, p.capacity);
  if (p.cu_seqlens) {  // tokens outside of every sample
    if (b == 0) fill(p.inverse, 0, tokens.start);
    fill(p.inverse, tokens.start + tokens.length, is_last ? p.length : tokens.first(b + 1));
  }
  if (warp == 0 && lane == 0) {
    p.lengths[b] = all;
    check_room(p, p.layout == kPacked ? column + all : all);
  }
}

// --- kernels -----------------------------------------------------------------------------------------------------

enum Plan { kOneBlock, kSplitBlocks };  // per sample

// Few segments have their state and counters in shared memory while a block works on them.
__host__ __device__ inline bool few_segments(const Selection& p) { return p.segments * 256 <= kSharedCounters; }

// What one launch leaves to the next, in the workspace, sample after sample: conclusions and counters per digit and
// segment, then kept tokens per warp and in all.
struct Notes {
  char* at;
  int64_t blocks, warps, digits;  // of a sample; digits that have counters of their own
  int64_t segments, bins;

  __host__ __device__ Notes(const Selection& p, Plan plan, char* at) : at(at), segments(p.segments) {
    const Digits d(p);
    bins = d.bins();
    blocks = plan == kOneBlock ? 1 : (p.length + kSplitTokens - 1) / kSplitTokens;
    warps = blocks * (kSplitThreads / kLanes);
    digits = plan == kOneBlock ? 1 : d.passes();
  }
  __host__ __device__ int64_t counters() const { return digits * segments * bins; }
  __host__ __device__ int64_t bytes() const {
    return digits * segments * static_cast<int64_t>(sizeof(Segment)) + (counters() + warps + 1 + 3) / 4 * 16;
  }
  __device__ Segment* segments_of(int64_t b, int64_t digit) const {
    return reinterpret_cast<Segment*>(at + b * bytes()) + digit * segments;
  }
  __device__ int32_t* counters_of(int64_t b, int64_t digit) const {
    return reinterpret_cast<int32_t*>(segments_of(b, digits)) + digit * segments * bins;
  }
  __device__ int32_t* kept_of(int64_t b) const { return counters_of(b, digits); }
};

__device__ __forceinline__ void clear(int32_t* counters, int64_t size) {
  for (int64_t k = threadIdx.x; k < size; k += blockDim.x) counters[k] = 0;
}

// By a block: what is known of each segment at the end. `counters`: one per digit and segment; both may be in shared
// memory. No barrier need precede it, if each thread wrote what it knows of the tokens it begins at (threadIdx.x, and
// from there on in steps of blockDim.x); one follows.
__device__ void find_thresholds(const Tokens& tokens, Segment* segments, int32_t* counters) {
  const int64_t warp = threadIdx.x / kLanes, warps = blockDim.x / kLanes, n = tokens.p.segments;
  const bool leader = threadIdx.x % kLanes == 0;
  bool open = tokens.length > 0;
  for (int pass = 0; open && pass < tokens.digits.passes(); ++pass) {
    clear(counters, n * tokens.digits.bins());
    __syncthreads();
    count_digits(tokens, pass, 0, tokens.length, segments, counters);
    __syncthreads();
    open = false;
    for (int64_t s = warp; s < n; s += warps) {
      const Segment known = pass > 0 && leader ? exchange_load(segments + s) : Segment{};
      const Segment now = conclude(tokens, pass, s, from_leader(known), counters);
      if (leader) exchange_store(segments + s, now);
      if (now.open) open = true;
    }
    open = __syncthreads_or(open);
  }
}

__global__ void __launch_bounds__(kSelectThreads) select_kernel(Selection p, char* workspace) {
  const Notes notes(p, kOneBlock, workspace);
  const Tokens tokens(p, blockIdx.x);
  const int64_t warp = threadIdx.x / kLanes, warps = blockDim.x / kLanes;
  const bool leader = threadIdx.x % kLanes == 0;
  int32_t* counts = reinterpret_cast<int32_t*>(dynamic_shared());
  Segment* segments = notes.segments_of(tokens.sample, 0);
  int32_t* counters = notes.counters_of(tokens.sample, 0);
  if (few_segments(p)) {
    segments = reinterpret_cast<Segment*>(counts + kLanes);
    counters = reinterpret_cast<int32_t*>(segments + p.segments);
  }

  find_thresholds(tokens, segments, counters);
  const int32_t kept = count_kept(tokens, warp, warps, segments);
  if (leader) exchange_store(counts + warp, kept);
  __syncthreads();
  const auto count = [&](int64_t w) { return exchange_load(counts + w); };
  const int64_t before = sum_of(warp, count), all = sum_of(warps, count);
  if (p.layout != kPacked) return write_kept(tokens, warp, warps, segments, before, 0, all);

  if (few_segments(p)) {
    Segment* noted = notes.segments_of(tokens.sample, 0);
    for (int64_t s = threadIdx.x; s < p.segments; s += blockDim.x) noted[s] = exchange_load(segments + s);
  }
  if (leader) notes.kept_of(tokens.sample)[warp] = kept;
  if (threadIdx.x == 0) notes.kept_of(tokens.sample)[warps] = static_cast<int32_t>(all);
}

__global__ void __launch_bounds__(kSplitThreads) clear_kernel(Selection p, char* workspace) {
  const Notes notes(p, kSplitBlocks, workspace);
  clear(notes.counters_of(blockIdx.x, 0), notes.counters() + notes.warps + 1);
}

// The conclusions from a digit, in shared memory; the first block of the sample also notes them for the next launch.
__device__ void conclude_all(const Tokens& tokens, const Notes& notes, int pass, Segment* segments) {
  for (int64_t s = threadIdx.x / kLanes; s < notes.segments; s += blockDim.x / kLanes) {
    const Segment known = pass == 0 ? Segment{} : notes.segments_of(tokens.sample, pass - 1)[s];
    const Segment now = conclude(tokens, pass, s, known, notes.counters_of(tokens.sample, pass));
    if (threadIdx.x % kLanes != 0) continue;
    exchange_store(segments + s, now);
    if (blockIdx.x % notes.blocks == 0) notes.segments_of(tokens.sample, pass)[s] = now;
  }
}

__global__ void __launch_bounds__(kSplitThreads) count_digits_kernel(Selection p, int pass, char* workspace) {
  const Notes notes(p, kSplitBlocks, workspace);
  const Tokens tokens(p, blockIdx.x / notes.blocks);
  Segment* segments = reinterpret_cast<Segment*>(dynamic_shared());
  int32_t* counters = reinterpret_cast<int32_t*>(segments + p.segments);
  const int64_t size = p.segments * notes.bins, begin = blockIdx.x % notes.blocks * kSplitTokens;
  if (pass > 0) conclude_all(tokens, notes, pass - 1, segments);
  clear(counters, size);
  __syncthreads();
  count_digits(tokens, pass, begin, begin + kSplitTokens < tokens.length ? begin + kSplitTokens : tokens.length,
               segments, counters);
  __syncthreads();
  int32_t* sums = notes.counters_of(tokens.sample, pass);
  for (int64_t k = threadIdx.x; k < size; k += blockDim.x) {
    if (counters[k]) atomicAdd(sums + k, counters[k]);
  }
}

__device__ __forceinline__ int64_t warp_of_sample(const Notes& notes) {
  return blockIdx.x % notes.blocks * (kSplitThreads / kLanes) + threadIdx.x / kLanes;
}

__global__ void __launch_bounds__(kSplitThreads) count_kept_kernel(Selection p, char* workspace) {
  const Notes notes(p, kSplitBlocks, workspace);
  const Tokens tokens(p, blockIdx.x / notes.blocks);
  Segment* segments = reinterpret_cast<Segment*>(dynamic_shared());
  conclude_all(tokens, notes, tokens.digits.passes() - 1, segments);
  __syncthreads();
  const int64_t warp = warp_of_sample(notes);
  const int32_t count = count_kept(tokens, warp, notes.warps, segments);
  if (threadIdx.x % kLanes != 0) return;
  notes.kept_of(tokens.sample)[warp] = count;
  atomicAdd(notes.kept_of(tokens.sample) + notes.warps, count);
}

__global__ void __launch_bounds__(kSplitThreads) write_kernel(Selection p, Plan plan, char* workspace) {
  const Notes notes(p, plan, workspace);
  const Tokens tokens(p, blockIdx.x / notes.blocks);
  const Segment* segments = notes.segments_of(tokens.sample, notes.digits - 1);
  const int64_t warp = warp_of_sample(notes);
  const int32_t* kept = notes.kept_of(tokens.sample);
  const int64_t before = sum_of(warp, [&](int64_t w) { return kept[w]; });
  int64_t offset = 0;
  if (p.layout == kPacked) offset = sum_of(tokens.sample, [&](int64_t b) { return notes.kept_of(b)[notes.warps]; });
  write_kept(tokens, warp, notes.warps, segments, before, offset, kept[notes.warps]);
}

// --- launcher ----------------------------------------------------------------------------------------------------

// Of what is known of the segments, and of their counters.
inline size_t search_bytes(const Selection& p) {
  return static_cast<size_t>(p.segments) * (sizeof(Segment) + static_cast<size_t>(Digits(p).bins()) * sizeof(int32_t));
}

// One block reads some 100 GB/s; from here on it takes longer than the launches of the other plan.
inline Plan select_plan(const Selection& p) {
  return p.length > 16384 && few_segments(p) && p.batch < 64 ? kSplitBlocks : kOneBlock;
}

inline int64_t select_workspace_bytes(const Selection& p, Plan plan) {
  const bool notes = plan == kSplitBlocks || p.layout == kPacked || !few_segments(p);
  return notes ? p.batch * Notes(p, plan, nullptr).bytes() : 0;
}

// `workspace`: select_workspace_bytes(p, plan) bytes of device memory, 16-byte aligned, that may hold anything.
// kSplitBlocks needs few segments. An empty batch writes nothing.
inline cudaError_t select(const Selection& p, Plan plan, void* given, cudaStream_t stream) {
  if (p.batch == 0) return cudaSuccess;
  char* workspace = static_cast<char*>(given);
  const Notes notes(p, plan, workspace);
  const size_t shared_bytes = few_segments(p) ? search_bytes(p) : 0;
  cudaError_t error = cudaSuccess;
  if (plan == kOneBlock) {
    int64_t threads = (p.length + kLanes - 1) / kLanes * kLanes;
    threads = threads < kLanes ? kLanes : threads > kSelectThreads ? kSelectThreads : threads;
    if (p.layout == kPacked) threads = kSplitThreads;  // the ranges are then those of write_kernel
    error = launch(select_kernel, p.batch, static_cast<int>(threads), shared_bytes + kLanes * sizeof(int32_t), stream,
                   p, workspace);
    if (p.layout != kPacked) return error;
  } else {
    if (p.length == 0 || !few_segments(p)) return cudaErrorInvalidValue;
    error = launch(clear_kernel, p.batch, kSplitThreads, 0, stream, p, workspace);
    for (int pass = 0; pass < Digits(p).passes() && error == cudaSuccess; ++pass) {
      error =
          launch(count_digits_kernel, p.batch * notes.blocks, kSplitThreads, shared_bytes, stream, p, pass, workspace);
    }
    if (error != cudaSuccess) return error;
    error = launch(count_kept_kernel, p.batch * notes.blocks, kSplitThreads, shared_bytes, stream, p, workspace);
  }
  if (error != cudaSuccess) return error;
  return launch(write_kernel, p.batch * notes.blocks, kSplitThreads, 0, stream, p, plan, workspace);
}

}  // namespace lyra::token_select
