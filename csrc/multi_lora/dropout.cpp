// Dropout on a CPU with the regenerated mask of lyra_ops/multi_lora/dropout.py, which defines it: an element is kept if
// its 16 bits of Philox4x32-10 are, taken with their sign, at least drop - 2^15. No mask is read or written: one pass
// over x.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>

#include "lyra/check.h"
#include "lyra/simd.h"

STABLE_TORCH_LIBRARY_FRAGMENT(lyra, m) { m.def("multi_lora_dropout(Tensor x, Tensor seed, int drop) -> Tensor"); }

namespace lyra {
namespace {

constexpr int kCounters = 16;  // side by side in a vector; each gives eight elements
constexpr int kAll = 1 << 16;

// Element is the unsigned integer of the element's size.
template <class Element>
LYRA_INLINE void drop_row(const Element* from, Element* to, int64_t columns, int64_t row, uint64_t seed,
                          int threshold) {
  for (int64_t first = 0; first < columns; first += 8 * kCounters) {
    uint32_t c0[kCounters], c1[kCounters], c2[kCounters], c3[kCounters];
    for (int i = 0; i < kCounters; ++i) {
      c0[i] = static_cast<uint32_t>(first / 8 + i);
      c1[i] = static_cast<uint32_t>(row);
      c2[i] = c3[i] = 0;
    }
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < 10; ++round, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
      for (int i = 0; i < kCounters; ++i) {
        const uint64_t p0 = uint64_t{0xD2511F53} * c0[i], p1 = uint64_t{0xCD9E8D57} * c2[i];
        c0[i] = static_cast<uint32_t>(p1 >> 32) ^ c1[i] ^ k0;
        c1[i] = static_cast<uint32_t>(p1);
        c2[i] = static_cast<uint32_t>(p0 >> 32) ^ c3[i] ^ k1;
        c3[i] = static_cast<uint32_t>(p0);
      }
    }
    int16_t lanes[8 * kCounters];
    for (int i = 0; i < kCounters; ++i) {
      const uint32_t words[4] = {c0[i], c1[i], c2[i], c3[i]};
      for (int j = 0; j < 8; ++j) lanes[8 * i + j] = static_cast<int16_t>(words[j / 2] >> (16 * (j % 2)));
    }
    const int64_t count = std::min<int64_t>(8 * kCounters, columns - first);
    for (int64_t k = 0; k < count; ++k) to[first + k] = lanes[k] >= threshold ? from[first + k] : Element{0};
  }
}

LYRA_SIMD void drop_rows(const char* x, char* out, int64_t element, int64_t columns, int64_t begin, int64_t end,
                         uint64_t seed, int threshold) {
  for (int64_t row = begin; row < end; ++row) {
    const char* from = x + row * columns * element;
    char* to = out + row * columns * element;
    if (element == 2) {
      drop_row(reinterpret_cast<const uint16_t*>(from), reinterpret_cast<uint16_t*>(to), columns, row, seed, threshold);
    } else if (element == 4) {
      drop_row(reinterpret_cast<const uint32_t*>(from), reinterpret_cast<uint32_t*>(to), columns, row, seed, threshold);
    } else {
      drop_row(reinterpret_cast<const uint64_t*>(from), reinterpret_cast<uint64_t*>(to), columns, row, seed, threshold);
    }
  }
}

Tensor multi_lora_dropout_cpu(const Tensor& x, const Tensor& seed, int64_t drop) {
  check_shape("x", x, {kAny, kAny});
  check_shape("seed", seed, {1});
  check_dtype("seed", seed, ScalarType::Long);
  check(drop >= 0 && drop <= kAll, "drop: got ", drop, ", expected 0 to ", kAll);
  const Tensor from = torch::stable::contiguous(x);
  Tensor out = torch::stable::empty_like(from);
  const int64_t element = from.element_size(), rows = from.size(0), columns = from.size(1);
  check(element == 2 || element == 4 || element == 8, "x: got elements of ", element, " bytes, expected 2, 4 or 8");
  const uint64_t key = static_cast<uint64_t>(*static_cast<const int64_t*>(seed.data_ptr()));
  const auto* source = static_cast<const char*>(from.data_ptr());
  auto* target = static_cast<char*>(out.data_ptr());
  const int64_t grain = std::max<int64_t>(1, 32768 / std::max<int64_t>(1, columns));
  torch::stable::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
    drop_rows(source, target, element, columns, begin, end, key, static_cast<int>(drop) - kAll / 2);
  });
  return out;
}

}  // namespace
}  // namespace lyra

STABLE_TORCH_LIBRARY_IMPL(lyra, CPU, m) { m.impl("multi_lora_dropout", TORCH_BOX(&lyra::multi_lora_dropout_cpu)); }
