// The kernels of csrc/token_select/, run on the CPU by lyra/host_cuda.h, as a Python module.
#include <vector>

#include "token_select/gather.cuh"
#include "token_select/select.cuh"
#include "token_select_module.h"

using namespace lyra::token_select;

namespace {

// scores (B, P, L), or (1, P, T) with cu_seqlens.
py::tuple run_select(Array<float> scores, Array<bool> candidates, Maybe<bool> key_mask, Maybe<int64_t> segment,
                     int64_t segments, Maybe<int64_t> counts, Maybe<double> shares, double share, int64_t count,
                     int64_t min_keep, int64_t capacity, int layout, Maybe<int32_t> cu_seqlens, bool split,
                     bool complete) {
  const int64_t rows = scores.shape(0), length = scores.shape(2);
  const int64_t batch = cu_seqlens ? cu_seqlens->size() - 1 : rows;
  const bool per_segment = (counts && counts->ndim() == 2) || (shares && shares->ndim() == 2);
  auto index = poisoned({layout == kPacked ? 1 : batch, capacity}), lengths = poisoned({batch});
  auto inverse = poisoned({rows, length});
  const Selection p{
      batch,
      scores.shape(1),
      length,
      capacity,
      segments,
      scores.data(),
      nullptr,
      candidates.data(),
      pointer(key_mask),
      pointer(segment),
      pointer(cu_seqlens),
      {pointer(counts), pointer(shares), per_segment ? segments : 1, per_segment ? 1 : 0, share, count, min_keep},
      static_cast<Layout>(layout),
      complete,
      index.mutable_data(),
      lengths.mutable_data(),
      inverse.mutable_data()};
  const Plan plan = split ? kSplitBlocks : kOneBlock;
  Memory notes(select_workspace_bytes(p, plan));
  check(select(p, plan, notes.at(), nullptr));
  return py::make_tuple(index, lengths, inverse);
}

// tensors: (from, to, planes, heads, row_bytes, plane_stride, sample_stride, token_stride, head_stride, fill), the
// first two addresses, the strides in bytes, the fill 16 bytes. Returns the widths of the vectors.
std::vector<int64_t> run_gather(const std::vector<py::tuple>& tensors, Array<int64_t> index, int64_t batch,
                                int64_t length, bool flat) {
  Table table{batch, length, index.shape(0), index.shape(1), index.data(), flat, 0, {}};
  std::vector<int64_t> widths;
  for (const py::tuple& t : tensors) {
    const auto number = [&](int i) { return t[i].cast<int64_t>(); };
    Rows rows{reinterpret_cast<const char*>(number(0)),
              reinterpret_cast<char*>(number(1)),
              number(2),
              number(3),
              number(4),
              number(5),
              number(6),
              number(7),
              number(8),
              {},
              0,
              0,
              0};
    const auto fill = t[9].cast<std::string>();
    std::memcpy(rows.fill, fill.data(), sizeof(rows.fill));
    widths.push_back(vector_width(rows));
    table.tensors[table.count++] = rows;
  }
  check(gather(table, nullptr));
  return widths;
}

}  // namespace

PYBIND11_MODULE(LYRA_MODULE, m) {
  using namespace py::literals;
  m.def("select", &run_select, "scores"_a, "candidates"_a, "key_mask"_a, "segment"_a, "segments"_a, "counts"_a,
        "shares"_a, "share"_a, "count"_a, "min_keep"_a, "capacity"_a, "layout"_a, "cu_seqlens"_a, "split"_a,
        "complete"_a = false);
  m.def("gather", &run_gather);
  m.def("configure", &configure);
}
