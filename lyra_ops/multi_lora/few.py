"""Routed LoRA on a CPU where an adapter has a handful of tokens: one compiled op forward, one backward.

There a product of torch's per adapter costs more in calls and packing than in arithmetic. Sums are float32, each in an
order of its own, so what the adapters add to a token does not depend on the rest of the batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lyra_ops._backend import missing_kernel, register_fake
from lyra_ops.multi_lora import cpu, dropout
from lyra_ops.multi_lora.function import Gradients

# Up to so many tokens per present adapter on average these ops serve. There they are 1.2 to 1.6 times as fast as `cpu`
# on a core of an AMD EPYC (K = N = 576, rank 64, 4 adapters); at 16 tokens both are as fast.
TOKENS = 8
DTYPES = (torch.float32, torch.bfloat16)


def fits(pairs: Tensor, blocks: list[cpu.Block]) -> bool:
    """Whether a routing of ids (T, S) is one for these ops."""
    present = {e for block in blocks for e, _ in block.runs}
    return pairs.numel() <= TOKENS * len(present) and missing_kernel("multi_lora_few_", "cpu") is None


def takes(routing, dtype: torch.dtype) -> bool:
    """Whether these ops take a call. For one adapter torch is as fast, unless in bfloat16 without a graph."""
    alone = cpu.is_uniform(routing) and (dtype == torch.float32 or torch.is_grad_enabled())
    return routing.few and dtype in DTYPES and not alone


def prepare(banks, routing) -> Tensor:
    return routing.pairs.long()


def add(ys, x, banks, ids, weights, seed, drop) -> list[Tensor]:
    """As `cpu.add`; returns A x times scaling of each bank."""
    x = _rows(cpu.drop_out(x, seed, drop))
    return [
        torch.ops.lyra.multi_lora_few_(y, x, *_adapters(bank, y.dtype, drop), ids, weights)
        for y, bank in zip(ys, banks)
    ]


def gradients(dys, dx, x, banks, ids, weights, seed, drop, kept, wanted: Gradients) -> Gradients:
    """As `cpu.gradients`."""
    x = _rows(cpu.drop_out(x, seed, drop))
    # With dropout the mask goes over what the adapters add alone.
    into = dx if dx is None or (seed is None and dx.is_contiguous()) else dx.new_zeros(dx.shape)
    of_a, of_b, of_weights = [], [], torch.zeros_like(weights) if wanted.weights else None
    for j, (dy, bank) in enumerate(zip(dys, banks)):
        found_a, found_b, found_weights = torch.ops.lyra.multi_lora_few_gradients_(
            into, dy, x, kept[j], *_adapters(bank, dy.dtype, drop), ids, weights, any(wanted.a[j]), any(wanted.b[j])
        )
        of_a.append(_in_dtypes(found_a, wanted.a[j], bank.gradient_dtypes))
        of_b.append(_in_dtypes(found_b, wanted.b[j], bank.gradient_dtypes))
        if of_weights is not None:
            of_weights += found_weights
    if into is not dx:
        dx += cpu.drop_out(into, seed, drop)
    return Gradients(of_a, of_b, of_weights)


def _adapters(bank, dtype: torch.dtype, drop: int) -> tuple[list[Tensor], list[Tensor], list[float]]:
    a, b = ([cpu.in_dtype(t, dtype).contiguous() for t in matrices] for matrices in zip(*bank.adapters))
    return a, b, [scaling * dropout.scale(drop) for scaling in bank.scalings]


def _in_dtypes(found: list[Tensor], wanted: list[bool], dtypes: list[torch.dtype]) -> list[Tensor | None]:
    if not any(wanted):
        return [None] * len(wanted)
    return [cpu.in_dtype(g, dtype) if want else None for g, want, dtype in zip(found, wanted, dtypes)]


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


@register_fake("multi_lora_few_")
def _fake(y, x, a, b, scaling, ids, weights) -> Tensor:
    return x.new_empty(ids.numel(), max(t.shape[0] for t in a), dtype=torch.float32)


@register_fake("multi_lora_few_gradients_")
def _gradients_fake(dx, dy, x, h, a, b, scaling, ids, weights, of_a, of_b) -> tuple[list[Tensor], list[Tensor], Tensor]:
    return (
        [h.new_empty(t.shape) for t in a if of_a],
        [h.new_empty(t.shape) for t in b if of_b],
        h.new_empty((0,) if weights is None else weights.shape),
    )
