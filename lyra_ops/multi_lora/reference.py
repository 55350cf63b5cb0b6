"""Routed LoRA in plain torch: the oracle of the kernels, and the path that runs everywhere.

Arguments have been checked by the public functions of this package. T tokens, K inputs, N outputs, R the sum of ranks.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def add_adapters(
    y: Tensor,
    x: Tensor,
    a: Tensor,
    b: Tensor,
    owner: Tensor,
    scaling: Tensor,
    adapter_ids: Tensor,
    dropout_p: float,
) -> Tensor:
    """y (T, N), the base layer's result for x (T, K), plus the adapters', in place.

    a (R, K) and b (R, N) hold row after row of all adapters, owner (R,) says whose each is.

    All adapters see all tokens in one product, then each token keeps the rows of its own. That costs the sum of the
    ranks instead of one rank, 2 R (K + N) FLOPs per token beside the layer's 2 K N, but it moves no token, reads
    nothing back from the device, adds in one fixed order, and absent adapters get their zero gradients by themselves.
    (It follows that an infinite B of one adapter turns all tokens into NaN.)
    """
    if dropout_p:
        x = F.dropout(x, dropout_p)
    # y's dtype may be autocast's choice. Master adapters in float32 come down to it: activations are never widened.
    shrunk = x.to(y.dtype) @ a.to(y.dtype).T
    mine = adapter_ids[:, None] == owner
    shrunk = torch.where(mine, shrunk * scaling, 0).to(y.dtype)  # scaled in float32 and rounded once
    return y.addmm_(shrunk, b.to(y.dtype))
