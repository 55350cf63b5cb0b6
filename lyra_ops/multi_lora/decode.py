"""Routed LoRA on a GPU for few tokens without a graph: the layer and its adapters in one launch.

There a layer takes as long as its weights take to be read, and each kernel behind its product as long as it takes to
begin and to end. So the product is the launch's own (csrc/multi_lora/decode.cuh, which tells the estimate).
"""

from __future__ import annotations

import torch
from torch import Tensor

from lyra_ops._backend import missing_kernel, register_fake
from lyra_ops.multi_lora import fused

# Up to so many tokens it serves; 16 are its most, 0 gives all to the library's product and `fused`. By estimate: the
# three kernels of `fused` make a layer of 3584 x 3584 in bfloat16 some 2 times slower at 1 to 16 tokens, so the launch
# wins as long as its product is half as fast as the library's. None of it has been timed on a GPU yet.
TOKENS = 16
DTYPES = (torch.bfloat16, torch.float16)


def takes(x: Tensor, bases, seed: Tensor | None) -> bool:
    """Whether the launch takes a call. It keeps nothing for a graph, and wants rows in pieces of 16 bytes."""
    return (
        len(x) <= TOKENS
        and x.dtype in DTYPES
        and not torch.is_grad_enabled()
        and seed is None
        and _in_pieces(x)
        and all(_fits(base, x.dtype) for base in bases)
        and missing_kernel("multi_lora_decode", "cuda") is None
    )


def linears(bases, banks, routing, x: Tensor, weights: Tensor | None) -> list[Tensor]:
    """y (T, N) for each base layer and its bank."""
    plan, counters = routing.plan(), routing.counters()
    ys = []
    for base, bank in zip(bases, banks):
        group, rank = fused.Group.of([bank]), max(bank.ranks)
        layer = (x, base.weight, base.bias, fused.a_of([bank], x.dtype), fused.b_of(bank, x.dtype))
        routed = (group.of_a, group.scaling[0], plan.ids, weights, plan.present, counters, rank)
        ys.append(torch.ops.lyra.multi_lora_decode(*layer, *routed))
    return ys


def _fits(base, dtype: torch.dtype) -> bool:
    weight, bias = base.weight, base.bias
    return (
        weight is not None
        and weight.dtype == dtype
        and _in_pieces(weight)
        and (bias is None or (bias.dtype == dtype and bias.is_contiguous()))
    )


def _in_pieces(t: Tensor) -> bool:
    return t.shape[1] % 8 == 0 and t.stride(1) == 1 and t.stride(0) % 8 == 0 and t.storage_offset() % 8 == 0


@register_fake("multi_lora_decode")
def _fake(x, weight, bias, a, b, table, scaling, ids, weights, present, counters, rank) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])
