// Token selection: the schemas of the raw ops, and the CPU implementation of select and gather (scores:
// token_scores.cpp).
//
// token_select_select.  Floats become integers of the same order (-0 is 0, NaN below all), the k-th largest of which is
// found by radix, eight bits at a time over what is left. Then one scan in the order of the tokens decides (above the
// k-th, or equal to it while places last, so that the lower index wins), counts and writes both maps.
//   keep      (B,) or with segments (B, S), int64 counts or float64 shares; or share, or count: one of the three
//   layout    0, 1: index (B, capacity) holds places in the sample, with -1 behind or in front; inverse (B, L) columns
//             2: index (1, capacity) holds b L + place, sample after sample, -1 behind the last
//   capacity  what does not fit is left out, and lengths tell
//   cu_seqlens  int32 (B + 1,): tensors (1, T) hold the samples one after the other; layout 2, index places in T
//
// token_select_gather.  Copies the rows of (B, L, ...), or (P, B, L, ...) where planes says so, that index (Bo, K)
// names:
//   out[b, k] = in[b, index[b, k]], or with flat in[v / L, v % L], v = index[b, k]; fill where index is -1.
// Its backward is itself, by the inverse map: no two tokens share a place.
//
// token_select_extract.  The three, one after the other; `bias` (B, L) float32 is added to the scores. Packed in, the
// candidates have the places of cu_seqlens_k. On a GPU a sample that needs more than capacity fails a device-side
// assertion.
#include "token_select.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <optional>
#include <tuple>
#include <type_traits>
#include <vector>

STABLE_TORCH_LIBRARY_FRAGMENT(lyra, m) {
  m.def(
      "token_select_scores(Tensor query, Tensor key, Tensor? query_mask, Tensor? key_mask, Tensor? key_limits,"
      " Tensor? key_bias, Tensor? head_weights, float scale, bool causal, Tensor? lse, bool per_head,"
      " Tensor? cu_seqlens_q, Tensor? cu_seqlens_k) -> Tensor");
  m.def(
      "token_select_select(Tensor scores, Tensor candidates, Tensor? key_mask, Tensor? segments, Tensor? keep, float? "
      "share,"
      " SymInt? count, SymInt min_keep, SymInt capacity, int layout, Tensor? cu_seqlens)"
      " -> (Tensor index, Tensor lengths, Tensor inverse)");
  m.def("token_select_gather(Tensor[] tensors, Tensor index, bool[] planes, float[] fill, bool flat) -> Tensor[]");
  m.def(
      "token_select_extract(Tensor query, Tensor key, Tensor candidates, Tensor[] tensors, Tensor? query_mask,"
      " Tensor? key_mask, Tensor? key_limits, Tensor? key_bias, Tensor? head_weights, float scale, bool causal,"
      " Tensor? lse, Tensor? bias, Tensor? segments, Tensor? keep, float? share, SymInt? count, SymInt min_keep,"
      " SymInt capacity, int layout, bool[] planes, float[] fill, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k)"
      " -> (Tensor index, Tensor lengths, Tensor inverse, Tensor[] outputs)");
}

namespace lyra::token_select {
namespace {

enum Layout : int64_t { kRight = 0, kLeft = 1, kPacked = 2 };

// Integers in the order of the floats.
template <typename S>
auto ordered(S value) {
  using Int = std::conditional_t<sizeof(S) == 4, uint32_t, uint64_t>;
  constexpr Int kSign = Int(1) << (8 * sizeof(S) - 1);
  if (value != value) return Int(0);
  const Int bits = std::bit_cast<Int>(value == 0 ? S(0) : value);
  return bits & kSign ? ~bits : bits | kSign;
}

// The budget of one segment of one sample. Of the tokens whose number equals `last`, the first `equal` stay.
template <typename Int>
struct Budget {
  int64_t candidates = 0, kept = 0, equal = 0;
  Int last = 0;
};

// The k-th largest of the keys, 1 <= k <= n, and how many of those equal to it are among the first k. Reorders the
// keys.
template <typename Int>
void find_last(Int* keys, int64_t n, Budget<Int>& budget) {
  int64_t k = budget.kept;
  for (int shift = 8 * sizeof(Int) - 8; n > k && shift >= 0; shift -= 8) {
    std::array<int32_t, 256> counts{};
    for (int64_t i = 0; i < n; ++i) ++counts[keys[i] >> shift & 255];
    Int digit = 255;
    while (counts[digit] < k) k -= counts[digit--];
    int64_t left = 0;
    for (int64_t i = 0; i < n; ++i) {
      keys[left] = keys[i];
      left += (keys[i] >> shift & 255) == digit;
    }
    n = left;
  }
  budget.last = *std::min_element(keys, keys + n);
  budget.equal = n > k ? k : std::count(keys, keys + n, budget.last);
}

int64_t budget_of(const SelectArguments& a, int64_t sample, int64_t segment, int64_t candidates) {
  int64_t k = a.count.value_or(0);
  std::optional<double> part = a.share;
  const int64_t at = a.per_segment() ? sample * a.segments + segment : sample;
  if (const double* shares = pointer<double>(a.keep, ScalarType::Double)) part = shares[at];
  if (const int64_t* counts = pointer<int64_t>(a.keep, ScalarType::Long)) k = counts[at];
  if (part) {
    const double exact = std::floor(*part * static_cast<double>(candidates));
    k = !(exact > 0) ? 0 : static_cast<int64_t>(std::min(exact, static_cast<double>(candidates)));
  }
  return std::min(candidates, std::max(a.min_keep, k));
}

// One sample: tokens first .. first + length - 1 of the flat batch.
template <typename S>
struct Sample {
  using Int = decltype(ordered(S()));
  const S* scores;
  const bool *candidates, *real;
  const int64_t* segment_of;
  int64_t segments, first, length;
  std::vector<Budget<Int>> budgets;
  int64_t kept = 0;

  bool is_real(int64_t i) const { return !real || real[first + i]; }
  // -1: not a candidate
  int64_t segment(int64_t i) const {
    if (!candidates[first + i]) return -1;
    const int64_t segment = segment_of ? segment_of[first + i] : 0;
    return segment < segments ? std::max<int64_t>(segment, -1) : -1;
  }

  void decide(int64_t sample, const SelectArguments& a) {
    for (int64_t i = 0; i < length; ++i) {
      if (!is_real(i)) continue;
      const int64_t s = segment(i);
      if (s >= static_cast<int64_t>(budgets.size())) budgets.resize(s + 1);
      s < 0 ? ++kept : ++budgets[s].candidates;
    }
    std::vector<int64_t> ends;
    int64_t total = 0;
    for (Budget<Int>& budget : budgets) {
      budget.kept = budget_of(a, sample, static_cast<int64_t>(ends.size()), budget.candidates);
      kept += budget.kept;
      ends.push_back(total);
      total += budget.candidates;
    }
    std::vector<Int> keys(total);
    for (int64_t i = 0; i < length; ++i) {
      const int64_t s = is_real(i) ? segment(i) : -1;
      if (s >= 0) keys[ends[s]++] = ordered(scores[first + i]);
    }
    Int* of_segment = keys.data();
    for (Budget<Int>& budget : budgets) {
      if (budget.kept > 0) find_last(of_segment, budget.candidates, budget);
      of_segment += budget.candidates;
    }
  }

  bool stays(int64_t i) {
    if (!is_real(i)) return false;
    const int64_t s = segment(i);
    if (s < 0) return true;
    Budget<Int>& budget = budgets[s];
    const Int value = ordered(scores[first + i]);
    return budget.kept > 0 && (value > budget.last || (value == budget.last && budget.equal-- > 0));
  }
};

std::tuple<Tensor, Tensor, Tensor> select_tokens(const Tensor& given_scores, const SelectArguments& a) {
  const Tensor scores = torch::stable::contiguous(given_scores);
  const ScalarType type = scores.scalar_type();
  check(type == ScalarType::Float || type == ScalarType::Double, "scores: got dtype ",
        torch::headeronly::toString(type), ", expected float32 or float64");
  const std::vector<int64_t> starts = sample_starts("cu_seqlens", a.cu_seqlens, a.rows, a.length);
  const int64_t batch = a.samples, capacity = a.capacity, layout = a.layout;

  Tensor index = torch::stable::new_empty(scores, {layout == kPacked ? 1 : batch, capacity}, ScalarType::Long);
  Tensor lengths = torch::stable::new_empty(scores, {batch}, ScalarType::Long);
  Tensor inverse = torch::stable::new_empty(scores, {a.rows, a.length}, ScalarType::Long);
  int64_t *to = index.mutable_data_ptr<int64_t>(), *place_of = inverse.mutable_data_ptr<int64_t>();
  std::fill(to, to + index.numel(), -1);
  std::fill(place_of, place_of + inverse.numel(), -1);

  const auto go = [&]<typename S>(S) {
    std::vector<Sample<S>> samples;
    for (int64_t b = 0; b < batch; ++b) {
      samples.push_back({scores.const_data_ptr<S>(),
                         pointer<bool>(a.candidates),
                         pointer<bool>(a.key_mask),
                         pointer<int64_t>(a.segment),
                         a.segments,
                         starts[b],
                         starts[b + 1] - starts[b],
                         {}});
    }
    torch::stable::parallel_for(0, batch, 1, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) samples[b].decide(b, a);
    });
    std::vector<int64_t> columns(batch);  // of each sample's first token
    int64_t total = 0;
    for (int64_t b = 0; b < batch; ++b) {
      const int64_t kept = samples[b].kept;
      lengths.mutable_data_ptr<int64_t>()[b] = kept;
      columns[b] = layout == kRight ? 0 : layout == kLeft ? capacity - kept : total;
      total += kept;
    }
    torch::stable::parallel_for(0, batch, 1, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) {
        Sample<S>& sample = samples[b];
        int64_t column = columns[b];
        int64_t* row = layout == kPacked ? to : to + b * capacity;
        const int64_t origin = layout == kPacked ? sample.first : 0;
        for (int64_t i = 0; i < sample.length; ++i) {
          if (!sample.stays(i)) continue;
          if (column >= 0 && column < capacity) {
            row[column] = origin + i;
            place_of[sample.first + i] = column;
          }
          ++column;
        }
      }
    });
  };
  type == ScalarType::Float ? go(float{}) : go(double{});
  return {index, lengths, inverse};
}

// How the bytes of one token lie: runs of `run` bytes at every combination of the outer dimensions.
struct Token {
  struct Dim {
    int64_t size, stride;  // in bytes
  };
  std::vector<Dim> dims;
  int64_t run, bytes;

  Token(const Tensor& t, int64_t from) : run(static_cast<int64_t>(t.element_size())), bytes(run) {
    for (int64_t d = t.dim() - 1; d >= from; --d) {
      const int64_t size = t.size(d), stride = t.stride(d) * static_cast<int64_t>(t.element_size());
      bytes *= size;
      if (size == 1) continue;
      if (dims.empty() && stride == run)
        run *= size;
      else
        dims.push_back({size, stride});
    }
  }

  void copy(const char* from, char* to) const { copy(from, to, static_cast<int64_t>(dims.size()) - 1); }

 private:
  char* copy(const char* from, char* to, int64_t d) const {
    if (d < 0) {
      std::memcpy(to, from, run);
      return to + run;
    }
    for (int64_t i = 0; i < dims[d].size; ++i) to = copy(from + i * dims[d].stride, to, d - 1);
    return to;
  }
};

Tensor gather(const Tensor& tensor, const Tensor& index, bool planes, double fill, bool flat) {
  const int64_t n_planes = planes ? tensor.size(0) : 1, length = tensor.size(1 + planes), batch = tensor.size(planes);
  const int64_t rows = index.size(0), columns = index.size(1), places = flat ? batch * length : length;
  const int64_t* from_place = index.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < rows * columns; ++i) {
    check(from_place[i] >= -1 && from_place[i] < places, "index: got ", from_place[i], ", expected -1 to ", places - 1);
  }

  Tensor result = torch::stable::new_empty(tensor, gathered_shape(tensor, index, planes));
  const Token token(tensor, 2 + planes);
  if (token.bytes == 0) return result;
  const int64_t item = static_cast<int64_t>(tensor.element_size());
  const Tensor one = torch::stable::full({1}, fill, tensor.scalar_type());
  const char *base = static_cast<const char*>(tensor.const_data_ptr()),
             *nothing = static_cast<const char*>(one.const_data_ptr());
  char* to = static_cast<char*>(result.mutable_data_ptr());
  const int64_t plane_stride = planes ? tensor.stride(0) * item : 0;
  const int64_t row_stride = tensor.stride(planes) * item, place_stride = tensor.stride(1 + planes) * item;

  const int64_t grain = 1 + (1 << 16) / token.bytes;
  torch::stable::parallel_for(0, n_planes * rows * columns, grain, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      const int64_t at = n % (rows * columns), place = from_place[at];
      char* out = to + n * token.bytes;
      if (place < 0) {
        for (int64_t byte = 0; byte < token.bytes; byte += item) std::memcpy(out + byte, nothing, item);
        continue;
      }
      const int64_t row = flat ? place / length : at / columns;
      token.copy(base + n / (rows * columns) * plane_stride + row * row_stride +
                     (flat ? place % length : place) * place_stride,
                 out);
    }
  });
  return result;
}

std::vector<Tensor> gather_tokens(const std::vector<Tensor>& tensors, const Tensor& index, std::vector<bool> planes,
                                  std::vector<double> fill, bool flat) {
  check_gather(tensors, index, planes, fill, flat);
  const Tensor places = torch::stable::contiguous(index);
  std::vector<Tensor> results;
  for (size_t i = 0; i < tensors.size(); ++i) results.push_back(gather(tensors[i], places, planes[i], fill[i], flat));
  return results;
}

Tensor scores(const Tensor& query, const Tensor& key, const std::optional<Tensor>& query_mask,
              const std::optional<Tensor>& key_mask, const std::optional<Tensor>& key_limits,
              const std::optional<Tensor>& key_bias, const std::optional<Tensor>& head_weights, double scale,
              bool causal, const std::optional<Tensor>& lse, bool per_head, const std::optional<Tensor>& cu_seqlens_q,
              const std::optional<Tensor>& cu_seqlens_k) {
  return token_scores({query, key, query_mask, key_mask, key_limits, key_bias, head_weights, scale, causal, lse,
                       per_head, cu_seqlens_q, cu_seqlens_k});
}

std::tuple<Tensor, Tensor, Tensor> select(const Tensor& scores, const Tensor& candidates,
                                          const std::optional<Tensor>& key_mask, const std::optional<Tensor>& segments,
                                          const std::optional<Tensor>& keep, std::optional<double> share,
                                          std::optional<int64_t> count, int64_t min_keep, int64_t capacity,
                                          int64_t layout, const std::optional<Tensor>& cu_seqlens) {
  check_shape("scores", scores, {kAny, kAny});
  return select_tokens(scores, {scores.size(0), scores.size(1), scores, candidates, key_mask, segments, keep, share,
                                count, min_keep, capacity, layout, cu_seqlens});
}

std::tuple<Tensor, Tensor, Tensor, std::vector<Tensor>> extract(
    const Tensor& query, const Tensor& key, const Tensor& candidates, const std::vector<Tensor>& tensors,
    const std::optional<Tensor>& query_mask, const std::optional<Tensor>& key_mask,
    const std::optional<Tensor>& key_limits, const std::optional<Tensor>& key_bias,
    const std::optional<Tensor>& head_weights, double scale, bool causal, const std::optional<Tensor>& lse,
    const std::optional<Tensor>& given_bias, const std::optional<Tensor>& segments, const std::optional<Tensor>& keep,
    std::optional<double> share, std::optional<int64_t> count, int64_t min_keep, int64_t capacity, int64_t layout,
    std::vector<bool> planes, std::vector<double> fill, const std::optional<Tensor>& cu_seqlens_q,
    const std::optional<Tensor>& cu_seqlens_k) {
  const ScoreArguments scored(query, key, query_mask, key_mask, key_limits, key_bias, head_weights, scale, causal, lse,
                              false, cu_seqlens_q, cu_seqlens_k);
  const SelectArguments selected(scored.batch, scored.length, query, candidates, key_mask, segments, keep, share, count,
                                 min_keep, capacity, layout, cu_seqlens_k);
  const auto bias = checked("bias", given_bias, {scored.batch, scored.length}, {ScalarType::Float}, query);
  Tensor scores = token_scores(scored);
  if (bias) {
    const float* from = pointer<float>(bias);
    float* to = scores.mutable_data_ptr<float>();
    const int64_t size = scores.numel();
    for (int64_t i = 0; i < size; ++i) to[i] += from[i];
  }
  auto [index, lengths, inverse] = select_tokens(scores, selected);
  return {index, lengths, inverse, gather_tokens(tensors, index, planes, fill, layout == kPacked && !cu_seqlens_k)};
}

}  // namespace
}  // namespace lyra::token_select

STABLE_TORCH_LIBRARY_IMPL(lyra, CPU, m) {
  m.impl("token_select_scores", TORCH_BOX(&lyra::token_select::scores));
  m.impl("token_select_select", TORCH_BOX(&lyra::token_select::select));
  m.impl("token_select_gather", TORCH_BOX(&lyra::token_select::gather_tokens));
  m.impl("token_select_extract", TORCH_BOX(&lyra::token_select::extract));
}
