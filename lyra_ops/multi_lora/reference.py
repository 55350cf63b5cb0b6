"""Routed LoRA in plain torch: the oracle of the kernels, and the path that runs everywhere.

Arguments have been checked by the public functions of this package. T tokens, K inputs, N outputs, S adapters per
token, R the sum of ranks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lyra_ops.multi_lora.bank import Rows
from lyra_ops.multi_lora.dropout import dropped_product, scale


def add_adapters(
    y: Tensor, x: Tensor, rows: Rows, adapter_ids: Tensor, weights: Tensor | None, seed: Tensor | None, drop: int
) -> Tensor:
    """y (T, N), the base layer's result for x (T, K), plus the adapters', in place.

    All adapters see all tokens in one product, then each token keeps the rows of its own. That costs the sum of the
    ranks instead of one rank, 2 R (K + N) FLOPs per token beside the layer's 2 K N, but it moves no token, reads
    nothing back from the device, adds in one fixed order, and absent adapters get their zero gradients by themselves.
    (It follows that an infinite B of one adapter turns all tokens into NaN.)
    """
    # y's dtype may be autocast's choice. Master adapters in float32 come down to it: activations are never widened.
    shrunk = dropped_product(x.to(y.dtype), rows.a, seed, drop)
    factor = rows.scaling * scale(drop)
    if weights is None:
        shrunk = torch.where(adapter_ids == rows.owner, shrunk * factor, 0)  # ids (T, 1)
    else:
        # Zero where an adapter is not the token's: what a token has no part in must not reach it, not even as NaN.
        shares = [torch.where(ids[:, None] == rows.owner, w[:, None], 0) for ids, w in zip(adapter_ids.T, weights.T)]
        share = torch.stack(shares).sum(0)
        mine = (adapter_ids[:, :, None] == rows.owner).any(1)
        shrunk = torch.where(mine, shrunk * factor * share, 0)
    return y.addmm_(shrunk.to(y.dtype), rows.b)  # scaled in float32 and rounded once
