"""Routed LoRA on a CPU: the tokens of each adapter are brought together once, then each adapter multiplies its own.

Ordinary torch operations, so differentiable as often as one likes; the matrix products are torch's own. Arguments have
been checked by the public functions of this package.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lyra_ops.multi_lora import reference

# Below so many tokens of several adapters, one product with all of them takes less time than sorting tokens does
# (`python -m bench multi_lora` shows both).
FEW_TOKENS = 32


class Plan:
    """Which tokens go to which adapter, read off the ids once for all layers of a step.

    present  the adapters that have tokens, in order
    counts   how many each of them has
    order    their tokens, adapter after adapter and in increasing order; None if that is 0, 1, .., T - 1
    """

    def __init__(self, adapter_ids: Tensor, adapters: int) -> None:
        ids = adapter_ids.flatten().long()
        counts = torch.bincount(ids + 1, minlength=adapters + 1).tolist()
        self.present = [e for e in range(adapters) if counts[e + 1]]
        self.counts = [counts[e + 1] for e in self.present]
        routed, self.order = sum(self.counts), None
        if routed < len(ids) or (len(self.present) > 1 and bool((ids.diff() < 0).any())):
            self.order = ids.argsort(stable=True)[len(ids) - routed :]


def add_adapters(
    y: Tensor,
    x: Tensor,
    a: Tensor,
    b: Tensor,
    owner: Tensor,
    scaling: Tensor,
    ranks: tuple[int, ...],
    scalings: tuple[float, ...],
    adapter_ids: Tensor,
    plan: Plan,
    dropout_p: float,
) -> Tensor:
    """As `reference.add_adapters`; ranks, scalings and plan are what it would have to read off the tensors."""
    if not plan.present:
        return _WithZeroGradients.apply(y, a, b)
    if len(plan.present) > 1 and len(x) <= FEW_TOKENS:
        return reference.add_adapters(y, x, a, b, owner, scaling, adapter_ids, dropout_p)
    if dropout_p:
        x = F.dropout(x, dropout_p)
    x = x.to(y.dtype)  # y's dtype may be autocast's choice
    rows = y
    if plan.order is not None:
        x, rows = x.index_select(0, plan.order), y.index_select(0, plan.order)
    # split, and not slices: its backward puts the gradients of all adapters together in one pass.
    a_of, b_of, merged = a.split(ranks), b.split(ranks), []
    for e, mine, base in zip(plan.present, x.split(plan.counts), rows.split(plan.counts)):
        shrunk = mine @ a_of[e].to(y.dtype).T  # unscaled: alpha acts in the accumulator, before anything is rounded
        if len(mine) == len(y):
            return y.addmm_(shrunk, b_of[e].to(y.dtype), alpha=scalings[e])
        merged.append(torch.addmm(base, shrunk, b_of[e].to(y.dtype), alpha=scalings[e]))
    return torch.cat(merged) if plan.order is None else y.index_copy_(0, plan.order, torch.cat(merged))


class _WithZeroGradients(torch.autograd.Function):
    """y, for which all of the adapters have the gradient zero instead of none."""

    @staticmethod
    def forward(ctx, y: Tensor, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        return y.view_as(y)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        a, b = ctx.saved_tensors
        return grad, torch.zeros_like(a), torch.zeros_like(b)
