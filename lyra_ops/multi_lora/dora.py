"""Routed DoRA (Liu et al. 2024, arXiv 2402.09353), in plain torch around `add_adapters`.

    y_t = c_a (W x_t + s_a B_a A_a x_t) + bias,    c_a = m_a / |W + s_a B_a A_a|, by output,    a = adapter_ids[t]

    = W x_t + (c_a - 1) W x_t + s_a (c_a B_a) A_a x_t + bias

so the columns of an adapter go into its B, and what is left to do per token is to scale the base layer's result. As in
peft, and as the paper suggests, no gradient goes through the norm. With several weighted adapters per token each adds
its own part to W x_t, times its weight.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lyra_ops.multi_lora import LoraBank, LoraRouting, add_adapters
from lyra_ops.multi_lora.bank import keep


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    bank: LoraBank,
    magnitudes: Sequence[Tensor | None],
    routing: LoraRouting,
) -> Tensor:
    """y (.., N) of x (.., K), which fit together. ``magnitudes``: m (N,) of each adapter; None: it is plain LoRA.

    Norms cost a product of N K r per adapter. They are made anew in each call where the adapters are trained.
    """
    sources = [weight, *(m for m in magnitudes if m is not None)]
    scaled, gains = keep("dora", weight.dtype, [bank], lambda: _scaled(weight, bank, magnitudes), sources)
    tokens = x.flatten(0, -2)
    y = F.linear(tokens, weight, bias)
    mine = routing.pairs[:, :, None] == torch.arange(len(bank.names), device=x.device)  # (T, S, E)
    weights = 1 if routing.weights is None else routing.weights.flatten(0, -2)[:, :, None]
    # A product, for its gradient adds up tokens in float32. (An infinite c of one adapter turns all tokens into NaN.)
    gain = (mine * weights).sum(1).to(y.dtype) @ gains.to(y.dtype)
    y = torch.addcmul(y, y if bias is None else y - bias.to(y.dtype), gain)
    return add_adapters(y, tokens, scaled, routing).view(*x.shape[:-1], -1)


def _scaled(weight: Tensor, bank: LoraBank, magnitudes: Sequence[Tensor | None]) -> tuple[LoraBank, Tensor]:
    """The bank with c B for B, and the rows c - 1 (E, N)."""
    wide = torch.promote_types(weight.dtype, bank.wide)
    adapters, gains = [], []
    for (a, b), scaling, magnitude in zip(bank.adapters, bank.scalings, magnitudes):
        if magnitude is None:
            adapters.append((a, b))
            gains.append(weight.new_zeros(len(weight), dtype=wide))
            continue
        with torch.no_grad():
            merged = torch.addmm(weight.to(wide), b.to(wide), a.to(wide), alpha=scaling)
            norm = torch.linalg.vector_norm(merged, dim=1)
        c = magnitude.to(wide) / norm
        adapters.append((a, (b * c[:, None]).to(b.dtype)))
        gains.append(c - 1)
    return bank.with_adapters(adapters), torch.stack(gains)
