"""Routed LoRA on a CPU: each adapter multiplies its own tokens, as they lie in memory where they lie in runs.

The matrix products are torch's own, on the adapters' own memory. Which way a call goes is decided in `linears`, and
before that in `few`, by three numbers that may be set to others. Arguments have been checked by the public functions of
this package. T tokens, S adapters per token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lyra_ops._backend import missing_kernel, register_fake
from lyra_ops.multi_lora import dropout, function
from lyra_ops.multi_lora.bank import LoraBank
from lyra_ops.multi_lora.function import Gradients

# Measured by `python -m bench multi_lora` on two cores of an AMD EPYC.
RUN = 16  # an adapter's tokens in runs of at least so many on average are multiplied run by run, shorter ones together
ONE_NODE = 256  # from so many tokens on one autograd node is faster than one per operation


class Block(NamedTuple):
    """Tokens, none of them twice, and the adapters of their runs."""

    slot: int  # which of a token's S adapters this is about
    order: Tensor | None  # the tokens, where they have to be brought together first; None: all, as they lie
    runs: list[tuple[int, slice | None]]  # an adapter and its rows of the block; None: all of them

    def of(self, matrix: Tensor) -> Tensor:
        return matrix if self.order is None else matrix.index_select(0, self.order)

    def put(self, matrix: Tensor, rows: Tensor) -> None:
        if self.order is not None:
            matrix.index_copy_(0, self.order, rows)


def rows_of(matrix: Tensor, rows: slice | None) -> Tensor:
    return matrix if rows is None else matrix[rows]


def plan(adapter_ids: Tensor) -> list[Block]:
    """What there is to multiply for ids (T, S), slot after slot, adapter after adapter, in the order of tokens."""
    blocks: list[Block] = []
    for slot, ids in enumerate(adapter_ids.T):
        bounds = [0, *(ids.diff().nonzero().flatten() + 1).tolist(), len(ids)]
        found: dict[int, list[slice]] = {}
        for begin, end, e in zip(bounds, bounds[1:], ids[bounds[:-1]].tolist() if len(ids) else []):
            found.setdefault(e, []).append(slice(begin, end))
        found.pop(-1, None)
        if found and len(bounds) == 2:
            blocks.append(Block(slot, None, [(e, None) for e in found]))
            continue
        as_they_lie, together, tokens = [], [], []
        for e, runs in sorted(found.items()):
            count = sum(run.stop - run.start for run in runs)
            if len(runs) == 1 or count >= RUN * len(runs):
                as_they_lie += [(e, run) for run in runs]
            else:
                before = sum(map(len, tokens))
                together.append((e, slice(before, before + count)))
                tokens.append((ids == e).nonzero().flatten())
        if as_they_lie:
            blocks.append(Block(slot, None, as_they_lie))
        if together:
            blocks.append(Block(slot, torch.cat(tokens), together))
    return blocks


def is_uniform(routing) -> bool:
    """Whether one adapter serves all tokens."""
    blocks = routing.blocks
    return len(blocks) == 1 and blocks[0].runs[0][1] is None and routing.weights is None


def linears(call: function.Call, x: Tensor, weights: Tensor | None, bases: Sequence[function.Base]) -> list[Tensor]:
    """y (T, N) for each base layer and its bank, x (T, K) being in the dtype of y."""
    accumulates = any(bank.sums for bank in call.banks)  # which takes the node
    if is_uniform(call.routing) and not (torch.is_grad_enabled() and (len(x) >= ONE_NODE or accumulates)):
        options = (call.routing.blocks[0].runs[0][0], call.seed, call.drop)
        return [add_one(base(x), x, bank, *options) for base, bank in zip(bases, call.banks)]
    return function.linears(call, x, weights, bases)


def add_one(y: Tensor, x: Tensor, bank: LoraBank, adapter: int, seed: Tensor | None, drop: int) -> Tensor:
    """Adds one adapter to all tokens, in place, in operations that autograd knows."""
    a, b = bank.adapters[adapter]
    if a.dtype != y.dtype:
        a, b = a.to(y.dtype), b.to(y.dtype)
    graph, scaling = torch.is_grad_enabled(), bank.scalings[adapter] * dropout.scale(drop)
    shrunk = F.linear(x, a) if seed is None else dropout.dropped_product(x, a, seed, drop)
    rows = y if y.ndim == 2 else y.view(x.shape[0], -1)
    if graph and y.dtype.itemsize > 2:
        rows.add_(F.linear(shrunk, b), alpha=scaling)  # addmm_ would let autograd scale the whole gradients of A and B
    else:
        rows.addmm_(shrunk, b.T, alpha=scaling)  # scaled in the accumulator, before anything is rounded
    if graph and len(bank.names) > 1:
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


def prepare(banks, routing) -> list[Block]:
    return routing.blocks


def add(ys, x, banks, blocks, weights, seed, drop) -> list[Tensor]:
    """Adds the adapters of each bank to its y, in place; returns scaling A x of each bank and run."""
    kept = []
    x, scale = drop_out(x, seed, drop), dropout.scale(drop)
    for block in blocks:
        inputs, shares = block.of(x), shares_of(block, weights)
        for y, bank in zip(ys, banks):
            outputs = block.of(y)
            for e, rows in block.runs:
                a, b = bank.adapters[e]
                shrunk = scaled_product(bank.scalings[e] * scale, rows_of(inputs, rows), in_dtype(a, y.dtype).T)
                kept.append(shrunk)
                rows_of(outputs, rows).addmm_(weighted(shrunk, shares, rows), in_dtype(b, y.dtype).T)
            block.put(y, outputs)
    return kept


def gradients(dys, dx, x, banks, blocks, weights, seed, drop, kept, wanted: Gradients) -> Gradients:
    """The gradients for upstream gradients ``dys``, one per bank; the adapters' share of that of x is added to ``dx``.

    ``kept`` is what `add` returned. None for ``dx`` and what ``wanted`` does not name.
    """
    x, scale, kept = drop_out(x, seed, drop), dropout.scale(drop), iter(kept)
    into = torch.zeros_like(dx) if dx is not None and seed is not None else dx
    of_a, of_b = ([[None] * len(bank.names) for bank in banks] for _ in range(2))
    of_weights = torch.zeros_like(weights) if wanted.weights else None
    for block in blocks:
        inputs, shares = block.of(x), shares_of(block, weights)
        of_inputs = None if dx is None else block.of(into)
        of_shares = None if of_weights is None else torch.zeros_like(shares)
        for j, (dy, bank) in enumerate(zip(dys, banks)):
            upstream = block.of(dy)
            for e, rows in block.runs:
                (a, b), scaling, shrunk = bank.adapters[e], bank.scalings[e] * scale, next(kept)
                mine = rows_of(upstream, rows)
                if weights is None:
                    g = scaled_product(scaling, mine, in_dtype(b, dy.dtype))
                else:
                    g = mine @ in_dtype(b, dy.dtype)
                    if of_shares is not None:
                        rows_of(of_shares, rows).add_(torch.linalg.vecdot(shrunk.to(shares.dtype), g.to(shares.dtype)))
                    g, shrunk = weighted(g, shares * scaling, rows), weighted(shrunk, shares, rows)
                if of_inputs is not None:
                    rows_of(of_inputs, rows).addmm_(g, in_dtype(a, dy.dtype))
                if wanted.a[j][e]:
                    of_a[j][e] = accumulated(of_a[j][e], g.T, rows_of(inputs, rows))
                if wanted.b[j][e]:
                    of_b[j][e] = accumulated(of_b[j][e], mine.T, shrunk)
        if of_inputs is not None:
            block.put(into, of_inputs)
        if of_shares is not None:
            column = of_weights[:, block.slot]
            if block.order is None:
                column += of_shares
            else:
                column.index_copy_(0, block.order, of_shares)
    if into is not dx:
        dx += drop_out(into, seed, drop)
    for j, bank in enumerate(banks):
        for e, ((a, b), dtype) in enumerate(zip(bank.adapters, bank.gradient_dtypes)):
            for found, want, like in ((of_a, wanted.a, a), (of_b, wanted.b, b)):
                if want[j][e]:  # zeros, not None, for adapters without tokens
                    missing = found[j][e] is None
                    found[j][e] = torch.zeros_like(like) if missing else in_dtype(found[j][e], dtype)
    return Gradients(of_a, of_b, of_weights)


def in_dtype(t: Tensor, dtype: torch.dtype) -> Tensor:
    """`Tensor.to`, which costs a microsecond even where there is nothing to do."""
    return t if t.dtype == dtype else t.to(dtype)


def drop_out(x: Tensor, seed: Tensor | None, drop: int) -> Tensor:
    """`dropout.drop_out`, compiled; without the compiled library the same elements, more slowly."""
    if seed is None or missing_kernel("multi_lora_dropout", "cpu"):
        return dropout.drop_out(x, seed, drop)
    return torch.ops.lyra.multi_lora_dropout(x, seed, drop)


@register_fake("multi_lora_dropout")
def _dropout_fake(x: Tensor, seed: Tensor, drop: int) -> Tensor:
    return x.new_empty(x.shape)


def scaled_product(scaling: float, left: Tensor, right: Tensor) -> Tensor:
    """scaling left right, rounded once."""
    return torch.addmm(left.new_empty(()), left, right, beta=0, alpha=scaling)


def shares_of(block: Block, weights: Tensor | None) -> Tensor | None:
    """The weights of the block's tokens."""
    return None if weights is None else block.of(weights[:, block.slot])


def weighted(rows: Tensor, shares: Tensor | None, which: slice | None) -> Tensor:
    return rows if shares is None else (rows * rows_of(shares, which)[:, None]).to(rows.dtype)


def accumulated(total: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    """total + left right. Parts of 16 bits are added up in 32."""
    if total is None:
        return left @ right
    if total.dtype == left.dtype and total.dtype.itemsize > 2:
        return total.addmm_(left, right)
    return total.float().add_(left @ right)
