"""Routed LoRA on a CPU: each adapter multiplies its own tokens, as they lie in memory where they lie in runs.

The matrix products are torch's own, on the adapters' own memory. Which way a call goes is decided in `linears`, by three
numbers that may be set to others. Arguments have been checked by the public functions of this package. T tokens,
S adapters per token.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lyra_ops._backend import missing_kernel
from lyra_ops.multi_lora import dropout, function, reference
from lyra_ops.multi_lora.bank import LoraBank
from lyra_ops.multi_lora.function import Gradients

# Measured by `python -m bench multi_lora` on two cores of an AMD EPYC.
RUN = 16  # an adapter's tokens in runs of at least so many on average are multiplied run by run, shorter ones together
FEW_TOKENS = 32  # up to so many tokens of several frozen adapters: one product with all of them
ONE_NODE = 256  # from so many tokens on one autograd node is faster than one per operation


class Part(NamedTuple):
    """Tokens of one adapter, none of them twice."""

    adapter: int
    slot: int  # which of a token's S adapters this is
    tokens: slice | Tensor | None  # None: all of them

    def of(self, matrix: Tensor) -> Tensor:
        """Their rows: a view, or a copy where they had to be brought together."""
        if self.tokens is None:
            return matrix
        return matrix[self.tokens] if isinstance(self.tokens, slice) else matrix.index_select(0, self.tokens)


def plan(adapter_ids: Tensor) -> list[Part]:
    """What there is to multiply for ids (T, S), slot after slot, adapter after adapter, in the order of tokens."""
    parts: list[Part] = []
    for slot, ids in enumerate(adapter_ids.T):
        if not len(ids):
            continue
        bounds = [0, *(ids.diff().nonzero().flatten() + 1).tolist(), len(ids)]
        runs: dict[int, list[slice]] = {}
        for begin, end, e in zip(bounds, bounds[1:], ids[bounds[:-1]].tolist()):
            runs.setdefault(e, []).append(slice(begin, end))
        for e in sorted(runs.keys() - {-1}):
            mine = runs[e]
            if len(bounds) == 2:
                parts.append(Part(e, slot, None))
            elif len(mine) == 1 or sum(run.stop - run.start for run in mine) >= RUN * len(mine):
                parts += [Part(e, slot, run) for run in mine]
            else:
                parts.append(Part(e, slot, (ids == e).nonzero().flatten()))
    return parts


def linears(call: function.Call, x: Tensor, weights: Tensor | None, bases: list[function.Base]) -> list[Tensor]:
    """y (T, N) for each base layer and its bank, x (T, K) being in the dtype of y."""
    parts, graph = call.routing.parts, torch.is_grad_enabled()
    if weights is None and not (graph and len(x) >= ONE_NODE):
        if len(parts) == 1 and parts[0].tokens is None:
            options = (parts[0].adapter, call.seed, call.drop)
            return [add_one(base(x), x, bank, *options) for base, bank in zip(bases, call.banks)]
        if parts and len(x) <= FEW_TOKENS and not graph:
            options = (call.routing.pairs, None, call.seed, call.drop)
            rows = [bank.rows(x.dtype) for bank in call.banks]
            return [reference.add_adapters(base(x), x, mine, *options) for base, mine in zip(bases, rows)]
    return function.linears(call, x, weights, bases)


def add_one(y: Tensor, x: Tensor, bank: LoraBank, adapter: int, seed: Tensor | None, drop: int) -> Tensor:
    """Adds one adapter to all tokens, in place, in operations that autograd knows."""
    a, b = bank.adapters[adapter]
    if a.dtype != y.dtype:
        a, b = a.to(y.dtype), b.to(y.dtype)
    shrunk = x @ a.T if seed is None else dropout.dropped_product(x, a, seed, drop)
    rows = y if y.ndim == 2 else y.view(x.shape[0], -1)
    rows.addmm_(shrunk, b.T, alpha=bank.scalings[adapter] * dropout.scale(drop))
    if len(bank.names) > 1 and torch.is_grad_enabled():
        others = [t for e, pair in enumerate(bank.adapters) for t in pair if e != adapter and t.requires_grad]
        return _WithZeroGradients.apply(y, *others) if others else y
    return y


class _WithZeroGradients(torch.autograd.Function):
    """y, for which the other tensors have the gradient zero instead of none."""

    @staticmethod
    def forward(ctx, y: Tensor, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        return y.view_as(y)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, ...]:
        return grad, *(torch.zeros_like(t) for t in ctx.saved_tensors)


def add(ys, x, banks, routing, weights, seed, drop) -> list[Tensor]:
    """Adds the adapters of each bank to its y, in place; returns scaling A x of each bank and part."""
    shrunk = []
    x = drop_out(x, seed, drop)
    for y, bank in zip(ys, banks):
        for part in routing.parts:
            a, b = bank.adapters[part.adapter]
            # Scaled in the accumulator, before anything is rounded.
            h = scaled_product(bank.scalings[part.adapter] * dropout.scale(drop), part.of(x), a.to(y.dtype).T)
            shrunk.append(h)
            rows = part.of(y)
            rows.addmm_(weighted(h, part, weights), b.to(y.dtype).T)
            if isinstance(part.tokens, Tensor):
                y.index_copy_(0, part.tokens, rows)
    return shrunk


def gradients(dys, dx, x, banks, routing, weights, seed, drop, shrunk, wanted: Gradients) -> Gradients:
    """The gradients for upstream gradients ``dys``, one per bank; the adapters' share of that of x is added to ``dx``.

    ``shrunk`` is what `add` returned. None for ``dx`` and what ``wanted`` (a `Gradients` of bools) does not name.
    """
    x = drop_out(x, seed, drop)
    into = torch.zeros_like(dx) if dx is not None and seed is not None else dx
    to_weights = torch.zeros_like(weights) if wanted.weights else None
    found = Gradients([[None] * len(b.adapters) for b in banks], [[None] * len(b.adapters) for b in banks], to_weights)
    shrunk = iter(shrunk)
    for j, (dy, bank) in enumerate(zip(dys, banks)):
        for part in routing.parts:
            e, h, mine = part.adapter, next(shrunk), part.of(dy)
            a, b = bank.adapters[e]
            scaling = bank.scalings[e] * dropout.scale(drop)
            if weights is None:
                g = scaled_product(scaling, mine, b.to(dy.dtype))
            else:
                g = mine @ b.to(dy.dtype)
                if wanted.weights:
                    share = torch.linalg.vecdot(h.to(weights.dtype), g.to(weights.dtype))
                    to_weights[:, part.slot].index_add_(0, tokens_of(part, len(dy)), share)
                g = weighted(g, part, weights * scaling)
                h = weighted(h, part, weights)
            if dx is not None:
                rows = part.of(into)
                rows.addmm_(g, a.to(dy.dtype))
                if isinstance(part.tokens, Tensor):
                    into.index_copy_(0, part.tokens, rows)
            if wanted.a[j][e]:
                found.a[j][e] = accumulated(found.a[j][e], g.T, part.of(x), a.dtype)
            if wanted.b[j][e]:
                found.b[j][e] = accumulated(found.b[j][e], mine.T, h, b.dtype)
    if into is not dx:
        dx += drop_out(into, seed, drop)
    for j, bank in enumerate(banks):
        for e, (a, b) in enumerate(bank.adapters):
            for got, want, like in ((found.a, wanted.a, a), (found.b, wanted.b, b)):
                if want[j][e]:  # zeros, not None, for adapters without tokens
                    got[j][e] = torch.zeros_like(like) if got[j][e] is None else got[j][e].to(like.dtype)
    return found


def drop_out(x: Tensor, seed: Tensor | None, drop: int) -> Tensor:
    """`dropout.drop_out`, compiled; without the compiled library the same elements, more slowly."""
    if seed is None or missing_kernel("multi_lora_dropout", "cpu"):
        return dropout.drop_out(x, seed, drop)
    return torch.ops.lyra.multi_lora_dropout(x, seed, drop)


def scaled_product(scaling: float, left: Tensor, right: Tensor) -> Tensor:
    """scaling left right, rounded once."""
    return torch.addmm(left.new_empty(()), left, right, beta=0, alpha=scaling)


def weighted(h: Tensor, part: Part, weights: Tensor | None) -> Tensor:
    return h if weights is None else (h * part.of(weights)[:, part.slot, None]).to(h.dtype)


def tokens_of(part: Part, tokens: int) -> Tensor:
    return part.tokens if isinstance(part.tokens, Tensor) else torch.arange(tokens)[part.tokens or slice(None)]


def accumulated(total: Tensor | None, left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """total + left right. Parts of 16 bits are added up in 32."""
    if total is None:
        return left @ right
    if total.dtype == left.dtype and total.dtype in (torch.float32, torch.float64):
        return total.addmm_(left, right)
    return total.float().add_(left @ right)
