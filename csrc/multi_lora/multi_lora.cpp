// The raw ops of multi_lora. Forward, backward and groups of layers are made of them by lyra_ops/multi_lora; what they
// compute stands in routing.h, what the plan holds in plan.cuh. On a CPU torch's matrix products serve, and few.cpp
// where an adapter has few tokens.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY_FRAGMENT(lyra, m) {
  m.def(
      "multi_lora_plan(Tensor ids, int adapters) -> (Tensor ids, Tensor starts, Tensor pairs, Tensor chunks,"
      " Tensor present)");
  m.def(
      "multi_lora_shrink_(Tensor(a!) h, Tensor x, Tensor bank, Tensor table, Tensor ids, Tensor starts, Tensor pairs,"
      " Tensor chunks, Tensor present, Tensor? seed, int drop) -> ()");
  m.def(
      "multi_lora_expand_(Tensor(a!) y, Tensor h, Tensor bank, Tensor table, Tensor scaling, Tensor ids,"
      " Tensor? weights, Tensor present, Tensor? seed, int drop) -> ()");
  m.def(
      "multi_lora_outer(Tensor h, Tensor z, Tensor table, Tensor scaling, Tensor? weights, Tensor starts, Tensor pairs,"
      " Tensor chunks, Tensor? seed, int drop, int rows) -> Tensor");
  m.def(
      "multi_lora_add_outer_(Tensor(a!) out, Tensor h, Tensor z, Tensor table, Tensor scaling, Tensor? weights,"
      " Tensor starts, Tensor pairs, Tensor chunks, Tensor? seed, int drop) -> ()");
  m.def(
      "multi_lora_decode(Tensor x, Tensor weight, Tensor? bias, Tensor a, Tensor b, Tensor table, Tensor scaling,"
      " Tensor ids, Tensor? weights, Tensor present, Tensor(a!) counters, int rank) -> Tensor");
}
