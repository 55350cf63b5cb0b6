"""The autograd function around the engines: base layers, and what the adapters add to them, in one node.

One node, because the gradient of x is then made once, by the base layer, and the adapters add to it where it lies; and
because the graph of several operations costs more time than their work where there are few tokens.

An engine has ``prepare(banks, routing)``, which makes what the others need of the routing outside of the node;
``add(ys, x, banks, prepared, weights, seed, drop)``, which adds the adapters of each bank
to its y in place and returns the tensors that ``gradients`` wants to see again. `cpu` and `fused.Kernels` are engines.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lyra_ops.multi_lora import reference
from lyra_ops.multi_lora.bank import LoraBank


class Base(NamedTuple):
    """A base layer: its weight and bias, or what it has already made of x, to be added to in place."""

    weight: Tensor | None
    bias: Tensor | None
    y: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        return self.y if self.weight is None else F.linear(x, self.weight, self.bias)


class Call(NamedTuple):
    """One call of an op: all but the tensors that may want gradients."""

    engine: object
    banks: list[LoraBank]
    routing: object
    seed: Tensor | None
    drop: int


class Gradients(NamedTuple):
    """Of the adapters, by bank and adapter, and of the weights; or which of them are wanted."""

    a: list[list]
    b: list[list]
    weights: object


def linears(call: Call, x: Tensor, weights: Tensor | None, bases: list[Base]) -> tuple[Tensor, ...]:
    """y (T, N) for each base layer and its bank, x (T, K) being in the dtype of y."""
    prepared = call.engine.prepare(call.banks, call.routing)
    tensors = [t for base in bases for t in base] + [t for bank in call.banks for pair in bank.adapters for t in pair]
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weights, *tensors)):
        return _Linears.apply(call, prepared, x, weights, *tensors)
    ys = tuple(base(x) for base in bases)
    call.engine.add([y.flatten(0, -2) for y in ys], x, call.banks, prepared, weights, call.seed, call.drop)
    return ys


class _Linears(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, call: Call, prepared, x: Tensor, weights: Tensor | None, *tensors: Tensor | None
    ) -> tuple[Tensor, ...]:
        bases, adapters = _split(call, tensors)
        ctx.mark_dirty(*[base.y for base in bases if base.y is not None])
        ys = tuple(base(x) for base in bases)
        kept = call.engine.add([y.flatten(0, -2) for y in ys], x, call.banks, prepared, weights, call.seed, call.drop)
        layers = [t for base in bases for t in (base.weight, base.bias, None)]
        ctx.save_for_backward(x, weights, *layers, *adapters, *kept)
        ctx.call, ctx.prepared = call, prepared
        return ys

    @staticmethod
    def backward(ctx, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        call, (x, weights, *tensors) = ctx.call, ctx.saved_tensors
        bases, rest = _split(call, tensors)
        adapters, kept = rest[: 2 * _adapters(call)], rest[2 * _adapters(call) :]
        _, _, of_x, of_weights, *needs = ctx.needs_input_grad
        if torch.is_grad_enabled():  # create_graph: these gradients will be differentiated themselves
            return None, None, *_differentiable(call, x, weights, bases, adapters, upstream, ctx.needs_input_grad[2:])
        dys, dx, of_bases = [dy.contiguous().flatten(0, -2) for dy in upstream], None, []
        for j, (base, dy, given) in enumerate(zip(bases, dys, upstream)):
            if of_x and base.weight is not None:
                weight = base.weight.to(dy.dtype)
                dx = dy @ weight if dx is None else dx.addmm_(dy, weight)
            of_weight, of_bias, of_y = needs[3 * j : 3 * j + 3]
            of_bases.append((dy.T @ x).to(base.weight.dtype) if of_weight else None)
            of_bases.append(dy.sum(0).to(base.bias.dtype) if of_bias else None)
            of_bases.append(given if of_y else None)
        if of_x and dx is None:
            dx = torch.zeros_like(x)
        of_adapters = iter(needs[3 * len(bases) :])
        pairs = [[(next(of_adapters), next(of_adapters)) for _ in bank.names] for bank in call.banks]
        wanted = Gradients([[a for a, _ in p] for p in pairs], [[b for _, b in p] for p in pairs], of_weights)
        found = call.engine.gradients(dys, dx, x, call.banks, ctx.prepared, weights, call.seed, call.drop, kept, wanted)
        for j, bank in enumerate(call.banks):
            if bank.sums:
                for e, (sum_of_a, sum_of_b) in enumerate(bank.accumulate().values()):
                    for of, total in ((found.a[j], sum_of_a), (found.b[j], sum_of_b)):
                        if of[e] is not None:  # what the engine has not added itself
                            total += of[e]
                            of[e] = None
        of_adapters = [g for j in range(len(bases)) for pair in zip(found.a[j], found.b[j]) for g in pair]
        return None, None, dx, found.weights, *of_bases, *of_adapters


def _split(call: Call, tensors: Sequence[Tensor | None]) -> tuple[list[Base], Sequence[Tensor]]:
    """The base layers, and what comes after them."""
    layers = 3 * len(call.banks)
    return [Base(*tensors[k : k + 3]) for k in range(0, layers, 3)], tensors[layers:]


def _adapters(call: Call) -> int:
    return sum(len(bank.names) for bank in call.banks)


def _differentiable(call: Call, x, weights, bases, adapters, upstream, needs) -> list[Tensor | None]:
    """The gradients as the reference gives them, with a graph of their own."""
    results, layers, given = [], [], iter(adapters)
    dys = [dy.flatten(0, -2) for dy in upstream]
    for base, bank, dy in zip(bases, call.banks, dys):
        y = torch.zeros_like(dy) if base.weight is None else base(x)
        rows = bank.with_adapters([(next(given), next(given)) for _ in bank.names]).rows(dy.dtype)
        results.append(reference.add_adapters(y, x, rows, call.routing.pairs, weights, call.seed, call.drop))
        layers += [base.weight, base.bias, None]
    inputs = [x, weights, *layers, *adapters]
    wanted = [t for t, need in zip(inputs, needs) if need and t is not None]
    found = iter(torch.autograd.grad(results, wanted, dys, create_graph=True, materialize_grads=True))
    of_y = {2 + 3 * j + 2: dy for j, dy in enumerate(upstream)}  # what was given as y has the gradient of the result
    return [(of_y[k] if k in of_y else next(found)) if need else None for k, need in enumerate(needs)]
