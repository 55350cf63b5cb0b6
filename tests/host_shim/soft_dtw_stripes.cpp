// The sweeps of csrc/soft_dtw/cpu over one float32 pair, for ctypes: compiled once for each instruction set.
#include "soft_dtw/cpu/backward.h"

using namespace lyra::soft_dtw_cpu;
using Narrow = Soft<float, float>;

// drop: by row, or null. grad: (n, m).
extern "C" double sweep(const float* cost, int64_t n, int64_t m, double gamma, int64_t band, const float* drop,
                        int store, bool chained, float* grad, float* grad_drop) {
  Pair pair;
  pair.n = n;
  pair.m = m;
  pair.band = band;
  pair.dropping = drop != nullptr;
  const Plan plan(pair, record_bytes(store, pair.dropping), chained);
  std::vector<uint8_t> records(plan.bytes);
  const Forward<float> f{pair, {cost, m, cost, cost + n * m}, drop, records.data(), store, gamma};
  Narrow cell(gamma, pair);
  Buffer<Narrow::State> arrived(plan.frontier, Narrow::zero());
  arrived.data()[plan.stripes.front().above(-1)] = Narrow::origin();
  pair.dropping ? forward_stripes<true>(f, cell, plan, 0, plan.count(), arrived.data(), nullptr)
                : forward_stripes<false>(f, cell, plan, 0, plan.count(), arrived.data(), nullptr);

  Buffer<Vec<float>> sent(plan.frontier, Vec<float>{});
  const Vec<float> origin = begin_backward(pair, plan, sent.data(), std::identity{});
  std::vector<double> entropy(plan.count());
  const Backward<float> b{pair, grad, m, grad_drop, 1, records.data(), store, false};
  pair.dropping
      ? backward_stripes<true, false>(b, plan, 0, plan.count(), sent.data(), origin, entropy.data(), nullptr)
      : backward_stripes<false, false>(b, plan, 0, plan.count(), sent.data(), origin, entropy.data(), nullptr);
  const Stripe& end = plan.stripes.back();
  return cell.value(arrived.data()[end.leaves(end.step_of(n - 1, m - 1))], (n - 1) % kLanes);
}
