// The schemas of soft-DTW from features, which runs on a GPU alone: see features.cuh. On a CPU the face does it.
//
// x (B,N,D), y (B,M,D) of one dtype, float32, bfloat16 or float16; `cost` one of sqeuclidean, cosine, contrastive; the
// rest as in soft_dtw.cpp, in float32. `costs` and `norms` are opaque, like probs: what the backward needs of the
// costs; empty where it needs nothing, or where store is 0.
// Backward: grad_x, grad_y in the dtype of x, empty where not wanted; entropy (B), and grad_drop (B,N) that is not yet
// times grad_value.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY_FRAGMENT(lyra, m) {
  m.def(
      "soft_dtw_features_forward(Tensor x, Tensor y, Tensor x_lengths, Tensor y_lengths, str cost, float temperature,"
      " float gamma, Tensor? gammas, int band, Tensor? low, Tensor? high, Tensor? drop, int store)"
      " -> (Tensor value, Tensor probs, Tensor costs, Tensor norms)");
  m.def(
      "soft_dtw_features_backward(Tensor grad_value, Tensor value, Tensor probs, Tensor costs, Tensor norms, Tensor x,"
      " Tensor y, Tensor x_lengths, Tensor y_lengths, str cost, float temperature, int band, Tensor? low, Tensor? high,"
      " bool dropping, bool with_entropy, bool of_x, bool of_y)"
      " -> (Tensor grad_x, Tensor grad_y, Tensor grad_drop, Tensor entropy)");
}
