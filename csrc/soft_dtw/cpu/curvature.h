// The second derivative.
//
// Along a direction (along, along_drop, along_gamma) of cost, drop and gamma: V, the derivative of M and A, in one
// sweep forward; with it the rates of the shares,
//     rate_l = share_l (sum_k share_k V_k - V_l + along_gamma (-log share_l - H)) / gamma,   H = -sum share log share,
// and in one sweep backward those of E. In double, because the V of a cell's predecessors are large and nearly equal.
#pragma once

#include "backward.h"

namespace lyra::soft_dtw_cpu {

template <typename S>
struct Curvature {
  Backward<S> out;  // grad times the rates of E and of the drops
  Cells<S> along;
  const S* along_drop;  // by row, or null
  double along_gamma;
  bool of_gamma;  // whether the entropies are needed at all
  double rate;    // 1 / gamma, 0 for hard DTW
};

// Shares of one choice with their logarithms (0 for a share of 0) and entropy, where these are needed.
struct Choice {
  Vec<double> share[3], log[3], entropy;
  int count = 0;

  LYRA_INLINE void weigh() {
    entropy = Vec<double>{};
    for (int k = 0; k < count; ++k) {
      for (int l = 0; l < kLanes; ++l) log[k][l] = share[k][l] > 0 ? std::log(share[k][l]) : 0.0;
      entropy -= share[k] * log[k];
    }
  }
};

template <bool kDropping>
LYRA_INLINE void choices(const uint8_t* record, int store_as, bool weighed, Choice& into, Choice& out_of) {
  const double unit = store_as == 16 ? 1.0 / 65535 : store_as == 8 ? 1.0 / 255 : 1.0;
  const auto step = get<kDropping, double>(record, store_as);
  into = Choice{{unit * step.diagonal, unit * step.up, unit * step.left}, {}, {}, 3};
  if (weighed) into.weigh();
  if constexpr (kDropping) {
    out_of = Choice{{step.keep, 1 - step.keep}, {}, {}, 2};
    if (weighed) out_of.weigh();
  }
}

// rates: per step those of diagonal, up and (dropping) keep. Frontier entries as in forward_stripe.
template <bool kDropping, typename S>
LYRA_INLINE void tangent_stripe(const Curvature<S>& f, const Stripe& stripe, Vec<double>* frontier,
                                const uint8_t* record, Vec<S>* rates) {
  const int64_t bytes = record_bytes(f.out.store, kDropping);
  Vec<double> left = {}, ended = {}, ended_before = {}, drop = {};
  for (int l = 0; l < kLanes && stripe.row + l < f.out.pair.n && f.along_drop != nullptr; ++l) {
    drop[l] = f.along_drop[stripe.row + l];
  }
  if (stripe.first > stripe.last) return;
  Vec<double> diagonal = pushed(Vec<double>{}, frontier[stripe.above(stripe.first - 1)]);
  for (int64_t start = stripe.first; start <= stripe.last; start += kLanes) {
    Vec<S> tile[kLanes];
    load_tile(f.along, stripe, stripe.place(start), S(0), tile);
    for (int64_t step = start; step <= std::min(start + kLanes - 1, stripe.last); ++step, record += bytes) {
      Choice into, out_of;
      choices<kDropping>(record, f.out.store, f.of_gamma, into, out_of);
      const Vec<double> up = pushed(ended_before, frontier[stripe.above(step)]), from[3] = {diagonal, up, left};
      const Vec<double> mean = into.share[0] * diagonal + into.share[1] * up + into.share[2] * left;
      for (int k = 0; k < 2; ++k) {
        const Vec<double> change = (mean - from[k]) - f.along_gamma * (into.log[k] + into.entropy);
        *rates++ = convert<S>(f.rate * into.share[k] * change);
      }
      left = mean + convert<double>(tile[step - start]) - f.along_gamma * into.entropy;
      diagonal = up;
      ended_before = ended;
      ended = left;
      if constexpr (kDropping) {
        ended = out_of.share[0] * left + out_of.share[1] * (up + drop);
        const Vec<double> change = (ended - left) - f.along_gamma * (out_of.log[0] + out_of.entropy);
        *rates++ = convert<S>(f.rate * out_of.share[0] * change);
        ended -= f.along_gamma * out_of.entropy;
      }
      frontier[stripe.leaves(step)] = ended;
    }
  }
}

// What flows backward, and its rate.
struct Flow {
  Vec<double> mass = {}, rate = {};
};

// Returns minus the derivative of `slope` in gamma. Frontier entries as in backward_stripe.
template <bool kDropping, typename S>
LYRA_INLINE double curvature_stripe(const Curvature<S>& f, const Stripe& stripe, Flow* frontier, const uint8_t* records,
                                    const Vec<S>* rates, Flow sent_before) {
  const int64_t tiles = (stripe.steps() + kLanes - 1) / kLanes, bytes = record_bytes(f.out.store, kDropping);
  const uint8_t* record = records + stripe.steps() * bytes;
  rates += stripe.steps() * (kDropping ? 3 : 2);
  Vec<double> entropy = {}, dropped = {};
  Flow to_left, to_diagonal, sent;
  for (int64_t t = tiles - 1; t >= 0; --t) {
    const int64_t start = stripe.first + t * kLanes, stop = std::min(start + kLanes - 1, stripe.last);
    Vec<S> tile[kLanes] = {};
    for (int64_t step = stop; step >= start; --step) {
      record -= bytes;
      rates -= kDropping ? 3 : 2;
      Choice into, out_of;
      choices<kDropping>(record, f.out.store, f.of_gamma, into, out_of);
      const Flow& after = frontier[stripe.below(step)];
      const Flow ended = {pulled(sent_before.mass, after.mass), pulled(sent_before.rate, after.rate)};
      Flow here = ended;
      Flow drop;
      if constexpr (kDropping) {
        const Vec<double> keep = out_of.share[0], rate = convert<double>(rates[2]);
        here = {ended.mass * keep, ended.rate * keep + ended.mass * rate};
        drop = {ended.mass - here.mass, ended.rate - here.rate};
        dropped += drop.rate;
        entropy += ended.rate * out_of.entropy + ended.mass * rate * (out_of.log[1] - out_of.log[0]);
      }
      here = {here.mass + to_left.mass, here.rate + to_left.rate};
      tile[step - start] = convert<S>(here.rate);
      const Vec<double> rate[2] = {convert<double>(rates[0]), convert<double>(rates[1])};
      const Vec<double> rest = -(rate[0] + rate[1]);
      entropy +=
          here.rate * into.entropy - here.mass * (rate[0] * into.log[0] + rate[1] * into.log[1] + rest * into.log[2]);
      to_left = {here.mass * into.share[2], here.rate * into.share[2] + here.mass * rest};
      sent_before = sent;
      sent = {here.mass * into.share[1] + to_diagonal.mass + drop.mass,
              here.rate * into.share[1] + here.mass * rate[1] + to_diagonal.rate + drop.rate};
      to_diagonal = {here.mass * into.share[0], here.rate * into.share[0] + here.mass * rate[0]};
      frontier[stripe.sends(step)] = sent;
    }
    if (t == 0) frontier[stripe.sends(stripe.first - 1)] = to_diagonal;
    store_tile(f.out, stripe, stripe.place(start), true, tile);
  }
  finish_rows<kDropping>(f.out, stripe, convert<S>(dropped));
  double sum = 0;
  for (int l = 0; l < kLanes; ++l) sum += entropy[l];
  return sum;
}

}  // namespace lyra::soft_dtw_cpu
