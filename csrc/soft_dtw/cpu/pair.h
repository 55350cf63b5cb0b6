// One pair, forward, backward and both at once: the sweeps over some stripes compiled for several CPUs and for each
// kind of cell; and the order in which the stripes of a pair come, in one thread or in all.
#pragma once

#include <atomic>
#include <cmath>
#include <numeric>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/ops.h>
#ifdef __linux__
#include <sys/mman.h>
#endif

#include "backward.h"
#include "curvature.h"
#include "forward.h"

namespace lyra::soft_dtw_cpu {
namespace {

// --- some stripes, for each kind of cell, compiled for several CPUs -------------------------------------------------
//
// More than one at a time, since it takes as long as thirty steps until all constants are in registers.

#define LYRA_FORWARD(S, Cell)                                                                              \
  LYRA_SIMD void forward_some(const Forward<S>& f, Cell& cell, const Plan& plan, int64_t from, int64_t to, \
                              Cell::State* frontier, Progress* progress) {                                 \
    f.pair.dropping ? forward_stripes<true>(f, cell, plan, from, to, frontier, progress)                   \
                    : forward_stripes<false>(f, cell, plan, from, to, frontier, progress);                 \
  }
using Narrow = Soft<float, float>;
using Wide = Soft<float, double>;
using Double = Soft<double, double>;
LYRA_FORWARD(float, Narrow)
LYRA_FORWARD(float, Wide)
LYRA_FORWARD(double, Double)
LYRA_FORWARD(float, Hard<float>)
LYRA_FORWARD(double, Hard<double>)
#undef LYRA_FORWARD

#define LYRA_BACKWARD(S)                                                                                           \
  LYRA_SIMD void backward_some(const Backward<S>& f, const Plan& plan, int64_t from, int64_t to, Vec<S>* frontier, \
                               const Vec<S>& origin, double* entropy, Progress* progress) {                        \
    const auto run = [&]<bool kDropping, bool kEntropy>() __attribute__((always_inline)) {                         \
      backward_stripes<kDropping, kEntropy>(f, plan, from, to, frontier, origin, entropy, progress);               \
    };                                                                                                             \
    if (f.pair.dropping) {                                                                                         \
      f.with_entropy ? run.template operator()<true, true>() : run.template operator()<true, false>();             \
    } else {                                                                                                       \
      f.with_entropy ? run.template operator()<false, true>() : run.template operator()<false, false>();           \
    }                                                                                                              \
  }
LYRA_BACKWARD(float)
LYRA_BACKWARD(double)
#undef LYRA_BACKWARD

#define LYRA_CURVATURE(S)                                                                                      \
  LYRA_SIMD void tangent(const Curvature<S>& f, const Stripe& s, Vec<double>* frontier, const uint8_t* from,   \
                         Vec<S>* rates) {                                                                      \
    f.out.pair.dropping ? tangent_stripe<true>(f, s, frontier, from, rates)                                    \
                        : tangent_stripe<false>(f, s, frontier, from, rates);                                  \
  }                                                                                                            \
  LYRA_SIMD double curvature_some(const Curvature<S>& f, const Stripe& s, Flow* frontier, const uint8_t* from, \
                                  const Vec<S>* rates, const Flow& sent) {                                     \
    return f.out.pair.dropping ? curvature_stripe<true>(f, s, frontier, from, rates, sent)                     \
                               : curvature_stripe<false>(f, s, frontier, from, rates, sent);                   \
  }
LYRA_CURVATURE(float)
LYRA_CURVATURE(double)
#undef LYRA_CURVATURE

// --- one pair ------------------------------------------------------------------------------------------------------

// Large pages for memory that is about to be written for the first time: fewer faults, which cost more than the
// recursion does.
void prefer_large_pages(void* data, int64_t bytes) {
#ifdef __linux__
  constexpr uintptr_t kPage = uintptr_t{1} << 21;
  const auto first = reinterpret_cast<uintptr_t>(data);
  const auto begin = (first + kPage - 1) / kPage * kPage, end = (first + bytes) / kPage * kPage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

// Memory of one thread, which it uses again for each of its pairs, so that it stays in the cache.
class Workspace {
 public:
  Workspace() = default;
  ~Workspace() { ::operator delete(data_, kLine); }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  uint8_t* bytes(int64_t size) {
    if (size > size_) {
      ::operator delete(data_, kLine);
      data_ = nullptr;
      data_ = static_cast<uint8_t*>(::operator new(size, kLine));
      size_ = size;
      prefer_large_pages(data_, size);
    }
    return data_;
  }

 private:
  static constexpr std::align_val_t kLine{64};
  uint8_t* data_ = nullptr;
  int64_t size_ = 0;
};

// Calls body(k, workspace) for k = 0 .. count - 1, each begun after the ones before it, in as many threads as there
// are.
template <typename Body>
void in_parallel(int64_t count, const Body& body) {
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, count, 1, [&](int64_t, int64_t) {
    Workspace workspace;
    for (int64_t k; (k = next.fetch_add(1)) < count;) body(k, workspace);
  });
}

// Makes entries `first` to `last` empty that the neighbouring stripe, written from `begin` to `end`, has not written.
template <typename State>
void clear_around(State* frontier, int64_t first, int64_t last, int64_t begin, int64_t end, const State& empty) {
  for (int64_t k = first; k <= last; ++k) {
    if (k < begin || k > end) frontier[k] = empty;
  }
}

// The sweep forward, some stripes at a time; together: all threads work on it.
template <typename Cell, typename S>
class ForwardSweep {
 public:
  using Border = Cell::Border;

  ForwardSweep(const Forward<S>& f, const Plan& plan, bool together)
      : f_(f), plan_(plan), together_(together), cell_(f.gamma, f.pair), frontier_(plan.frontier, Cell::zero()) {
    frontier_.data()[plan.stripes.front().above(-1)] = Cell::origin();
  }
  bool serves() const { return cell_.serves(); }

  // Stripes `from` to `to` - 1, which are next; records: room for theirs alone, or null.
  void run(int64_t from, int64_t to, uint8_t* records) {
    Forward<S> f = f_;
    f.records = records;
    f.skipped = plan_.offset[from];
    auto* frontier = frontier_.data();
    const auto some = [&](int64_t first, int64_t end, Progress* progress) {
      Cell cell = cell_;
      forward_some(f, cell, plan_, first, end, frontier, progress);
      for (int l = 0; l < kLanes; ++l) {
        if (cell.flagged[l]) flagged_ = true;
      }
    };
    if (f.pair.low != nullptr) {
      for (int64_t s = from; s < to; ++s) {
        if (s > 0) {  // windows need not follow each other
          const Stripe &now = plan_.stripes[s], &before = plan_.stripes[s - 1];
          clear_around(frontier, now.above(now.first - 1), now.above(now.last), before.leaves(before.first),
                       before.leaves(before.last), Cell::zero());
        }
        some(s, s + 1, nullptr);
      }
    } else if (together_) {
      Progress progress(plan_.count());
      if (from > 0) progress.set(from - 1, kAllDone);
      in_parallel(to - from, [&](int64_t k, Workspace&) { some(from + k, from + k + 1, &progress); });
    } else {
      some(from, to, nullptr);
    }
  }
  // What the stripes so far have left for the next one: all that it takes to go on from there.
  void keep(Border* to) {
    for (int64_t k = 0; k < plan_.frontier; ++k) to[k] = Cell::border(frontier_.data()[k]);
  }
  void go_back(const Border* from) {
    for (int64_t k = 0; k < plan_.frontier; ++k) frontier_.data()[k] = Cell::behind(from[k]);
  }

  // After the last stripe. Whether the cell type could serve the pair; if so, the pair's value.
  bool served() const { return !flagged_ || sizeof(typename Cell::Type) != 4; }
  S value() {
    const Stripe& end = plan_.stripes.back();
    const auto& reached = frontier_.data()[end.leaves(end.step_of(f_.pair.n - 1, f_.pair.m - 1))];
    if (flagged_) return std::numeric_limits<S>::quiet_NaN();
    return static_cast<S>(cell_.value(reached, (f_.pair.n - 1) % kLanes));
  }

 private:
  const Forward<S>& f_;
  const Plan& plan_;
  const bool together_;
  const Cell cell_;
  Buffer<typename Cell::State> frontier_;
  std::atomic<bool> flagged_{false};
};

// The sweep backward, likewise.
template <typename S>
class BackwardSweep {
 public:
  BackwardSweep(const Backward<S>& f, const Plan& plan, bool together)
      : f_(f),
        plan_(plan),
        together_(together),
        frontier_(plan.frontier, Vec<S>{}),
        origin_(begin_backward(f.pair, plan, frontier_.data(), std::identity{})),
        entropy_(plan.count()) {}

  // Stripes `to` - 1 down to `from`, which are next, by records that begin with those of `from`.
  void run(int64_t from, int64_t to, const uint8_t* records) {
    Backward<S> f = f_;
    f.records = records;
    f.skipped = plan_.offset[from];
    auto* frontier = frontier_.data();
    const auto some = [&](int64_t first, int64_t end, Progress* progress) {
      backward_some(f, plan_, first, end, frontier, origin_, entropy_.data(), progress);
    };
    if (f.pair.low != nullptr) {
      for (int64_t s = to - 1; s >= from; --s) {
        if (s + 1 < plan_.count()) {
          const Stripe &now = plan_.stripes[s], &after = plan_.stripes[s + 1];
          clear_around(frontier, now.below(now.first), now.below(now.last), after.sends(after.first - 1),
                       after.sends(after.last), Vec<S>{});
        }
        some(s, s + 1, nullptr);
      }
    } else if (together_) {
      Progress progress(plan_.count());
      if (to < plan_.count()) progress.set(to, kAllDone);
      in_parallel(to - from, [&](int64_t k, Workspace&) { some(to - 1 - k, to - k, &progress); });
    } else {
      some(from, to, nullptr);
    }
  }
  // Of the paths, if asked for.
  double entropy() const { return std::accumulate(entropy_.begin(), entropy_.end(), 0.0); }

 private:
  const Backward<S>& f_;
  const Plan& plan_;
  const bool together_;
  Buffer<Vec<S>> frontier_;
  const Vec<S> origin_;
  std::vector<double> entropy_;
};

// Calls serve.template operator()<Cell>() with the kinds of cell for S and gamma until one returns true.
template <typename S, typename Serve>
void by_cell(double gamma, const Serve& serve) {
  if (gamma == 0) {
    serve.template operator()<Hard<S>>();
  } else if constexpr (sizeof(S) == 8) {
    serve.template operator()<Double>();
  } else if (!serve.template operator()<Narrow>()) {
    serve.template operator()<Wide>();
  }
}

// The value and, unless f has none, the records.
template <typename S>
S forward_pair(const Forward<S>& f, const Plan& plan, bool together) {
  S value;
  by_cell<S>(f.gamma, [&]<typename Cell>() {
    ForwardSweep<Cell, S> sweep(f, plan, together);
    if (!sweep.serves()) return false;
    sweep.run(0, plan.count(), f.records);
    if (!sweep.served()) return false;
    value = sweep.value();
    return true;
  });
  return value;
}

// Returns the entropy of the paths, if asked for.
template <typename S>
double backward_pair(const Backward<S>& f, const Plan& plan, bool together) {
  BackwardSweep<S> sweep(f, plan, together);
  sweep.run(0, plan.count(), f.records);
  return sweep.entropy();
}

// Bytes of records from which on they are made twice: it takes a fifth longer, so memory must be worth it.
constexpr int64_t kLongPair = int64_t{1} << 26;

// The first stripes of the parts that a pair is swept in, and the end. A long pair has about as many parts as make the
// memory for the records of one and for `border` bytes kept before each least.
std::vector<int64_t> parts_of(const Plan& plan, int64_t border) {
  int64_t most = plan.bytes;
  if (plan.bytes > kLongPair) most = static_cast<int64_t>(std::sqrt(double(plan.bytes) * double(border)));
  std::vector<int64_t> begins = {0};
  for (int64_t s = 1; s < plan.count(); ++s) {
    if (plan.offset_of(s + 1) - plan.offset[begins.back()] > most) begins.push_back(s);
  }
  begins.push_back(plan.count());
  return begins;
}

// Forward and backward at once. Of a long pair forward keeps the borders between parts alone, from which backward has
// each part's records made again when it gets there. wanted(value): whether there is a gradient to be made.
template <typename S, typename Wanted>
void gradient_pair(const Forward<S>& f, const Backward<S>& g, const Plan& plan, bool together, Workspace& workspace,
                   const Wanted& wanted, double* entropy) {
  by_cell<S>(f.gamma, [&]<typename Cell>() {
    using Border = Cell::Border;
    const auto begins = parts_of(plan, plan.frontier * int64_t{sizeof(Border)});
    const auto last = static_cast<int64_t>(begins.size()) - 2;
    int64_t most = 0;
    for (int64_t k = 0; k <= last; ++k) {
      most = std::max(most, plan.offset_of(begins[k + 1]) - plan.offset[begins[k]]);
    }
    uint8_t* const records = workspace.bytes(most);
    std::vector<Border> borders(last * plan.frontier);

    ForwardSweep<Cell, S> forward(f, plan, together);
    if (!forward.serves()) return false;
    for (int64_t k = 0; k <= last; ++k) {
      if (k < last) forward.keep(borders.data() + k * plan.frontier);
      forward.run(begins[k], begins[k + 1], k < last ? nullptr : records);
    }
    if (!forward.served()) return false;
    if (!wanted(forward.value())) return true;

    BackwardSweep<S> backward(g, plan, together);
    for (int64_t k = last; k >= 0; --k) {
      if (k < last) {
        forward.go_back(borders.data() + k * plan.frontier);
        forward.run(begins[k], begins[k + 1], records);
      }
      backward.run(begins[k], begins[k + 1], records);
    }
    *entropy = backward.entropy();
    return true;
  });
}

// Returns (slope, its derivative in gamma): see cpu/curvature.h.
template <typename S>
std::tuple<double, double> curvature_pair(const Curvature<S>& f, const Plan& plan) {
  const Pair& pair = f.out.pair;
  const int64_t bytes = record_bytes(f.out.store, pair.dropping), each = pair.dropping ? 3 : 2;
  const FlushSubnormals flush;
  Buffer<Vec<S>> rates(plan.bytes / bytes * each, Vec<S>{});
  double slope = 0, in_gamma = 0;
  {
    Buffer<Vec<double>> frontier(plan.frontier, Vec<double>{});  // what it holds of closed cells has no share
    for (int64_t s = 0; s < plan.count(); ++s) {
      tangent(f, plan.stripes[s], frontier.data(), f.out.records + plan.offset[s],
              rates.data() + plan.offset[s] / bytes * each);
    }
    const Stripe& end = plan.stripes.back();
    slope = frontier.data()[end.leaves(end.step_of(pair.n - 1, pair.m - 1))][(pair.n - 1) % kLanes];
  }
  Buffer<Flow> frontier(plan.frontier, Flow{});
  const Flow origin = begin_backward(pair, plan, frontier.data(), &Flow::mass);
  for (int64_t s = plan.count() - 1; s >= 0; --s) {
    const Stripe& now = plan.stripes[s];
    if (pair.low != nullptr && s + 1 < plan.count()) {
      const Stripe& after = plan.stripes[s + 1];
      clear_around(frontier.data(), now.below(now.first), now.below(now.last), after.sends(after.first - 1),
                   after.sends(after.last), Flow{});
    }
    in_gamma -= curvature_some(f, now, frontier.data(), f.out.records + plan.offset[s],
                               rates.data() + plan.offset[s] / bytes * each, s + 1 == plan.count() ? origin : Flow{});
  }
  return {slope, in_gamma};
}

}  // namespace
}  // namespace lyra::soft_dtw_cpu
