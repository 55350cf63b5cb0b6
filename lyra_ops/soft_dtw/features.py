"""soft_dtw from features on a CPU, a few pairs at a time, so that their costs are used while they are in the cache.

The whole batch's cost (B, N, M) never exists; what is kept for backward are the shares and, for "contrastive", whose
gradient needs them, the costs. The gradients of the features are two matrix products with E, written out here: autograd
would go over each block several times more. A second derivative goes through the ordinary graph instead.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lyra_ops.soft_dtw import _Arguments, _backward, _forward, _raw, _run, reference

BLOCK_BYTES = 4 << 20  # of costs


def soft_dtw(x: Tensor, y: Tensor, arguments: _Arguments, cost: str, temperature: float) -> Tensor:
    """`lyra_ops.soft_dtw` on the backend "cpu"; arguments have been checked."""
    dtype = torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)
    (_, gammas, drop), problem, options, store = _raw(x.new_empty(x.shape[0], 0, 0, dtype=dtype), arguments)
    sources = x, y, gammas, drop
    keeps = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in sources)
    rest = *problem, options, store if keeps else 0, dtype, arguments, cost, temperature
    return _FromFeatures.apply(*sources, *rest)


class _FromFeatures(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, y, gammas, drop, x_lengths, y_lengths, low, high, options, store, dtype, arguments, cost, tau):
        values, kept = [], []
        with torch.autocast("cpu", enabled=False):
            for part in _blocks(x.shape[0], x.shape[1] * y.shape[1] * dtype.itemsize):
                tensors = _part(part, gammas, drop, x_lengths, y_lengths, low, high)
                pairs = _Pairs(x[part], y[part], *tensors[2:4], dtype, cost, tau)
                costs = pairs.cost()
                value, probs = _forward(costs, *tensors, *options, store)
                values.append(value)
                if store:
                    kept += [probs, costs] if cost == "contrastive" else [probs]
        value = torch.cat(values) if values else x.new_empty(0, dtype=dtype)
        ctx.save_for_backward(x, y, gammas, drop, x_lengths, y_lengths, low, high, value, *kept)
        ctx.rest = options, dtype, arguments, cost, tau
        return value

    @staticmethod
    def backward(ctx, grad_value: Tensor) -> tuple[Tensor | None, ...]:
        x, y, gammas, drop, x_lengths, y_lengths, low, high, value, *kept = ctx.saved_tensors
        if torch.is_grad_enabled():
            return *_through_the_graph(ctx, grad_value), *[None] * 10
        options, dtype, _, cost, tau = ctx.rest
        of_gamma = gammas is not None and ctx.needs_input_grad[2]
        grads = [torch.empty_like(t) if needed else None for t, needed in zip((x, y), ctx.needs_input_grad)]
        grad_drop, entropy = [], []
        kept = iter(kept)
        with torch.autocast("cpu", enabled=False):
            for part in _blocks(x.shape[0], x.shape[1] * y.shape[1] * dtype.itemsize):
                tensors = _part(part, gammas, drop, x_lengths, y_lengths, low, high)
                pairs = _Pairs(x[part], y[part], *tensors[2:4], dtype, cost, tau)
                probs = next(kept)
                costs = next(kept) if cost == "contrastive" else None
                shape = value.new_empty(()).expand(len(probs), x.shape[1], y.shape[1])
                expected, dropped, bits = _backward(
                    grad_value[part], shape, *tensors, value[part], probs, *options, of_gamma
                )
                pairs.take(expected, costs)
                for grad, of_tokens in zip(grads, (pairs.gradient_of_x, pairs.gradient_of_y)):
                    if grad is not None:
                        grad[part] = of_tokens()
                grad_drop.append(dropped)
                entropy.append(bits)
        grad_gamma = (-grad_value * torch.cat(entropy)).to(gammas.dtype) if of_gamma and entropy else None
        grad_drop = torch.cat(grad_drop) if drop is not None and grad_drop else None
        return *grads, grad_gamma, grad_drop, *[None] * 10


def _through_the_graph(ctx, grad_value: Tensor) -> list[Tensor | None]:
    x, y, gammas, drop = sources = ctx.saved_tensors[:4]
    *_, arguments, cost, tau = ctx.rest
    # In the arguments as they came, gamma and drop are what these two were made of; here they stand for themselves.
    arguments = arguments._replace(gamma=arguments.gamma if gammas is None else gammas, drop_cost=drop)
    value = _run("cpu", reference.pair_cost(x, y, arguments.x_lengths, arguments.y_lengths, cost, tau), arguments)
    wanted = [t for t, needed in zip(sources, ctx.needs_input_grad) if needed]
    found = iter(torch.autograd.grad(value, wanted, grad_value, create_graph=True))
    return [next(found) if needed else None for needed in ctx.needs_input_grad[:4]]


def _blocks(batch: int, pair_bytes: int) -> Iterator[slice]:
    """Consecutive pairs, as many as there are threads at least."""
    size = max(BLOCK_BYTES // max(pair_bytes, 1), torch.get_num_threads())
    for start in range(0, batch, size):
        yield slice(start, start + size)


def _part(part: slice, *tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t[part] for t in tensors]


class _Pairs:
    """The tokens of some pairs as their cost needs them; see `reference.pair_cost` for the formulas."""

    def __init__(self, x: Tensor, y: Tensor, x_lengths: Tensor, y_lengths: Tensor, dtype, cost: str, tau: float):
        self.kind, self.tau = cost, tau
        self.x, self.y = _clean(x.to(dtype), x_lengths), _clean(y.to(dtype), y_lengths)
        self.y_lengths = y_lengths
        if cost == "sqeuclidean":
            # Distances do not change when both sides move; without a common offset the expansion cancels less.
            offset = self.y[:, :1]
            self.x, self.y = self.x - offset, self.y - offset
        elif cost == "cosine":
            self.norms = [t.norm(dim=-1, keepdim=True).clamp(min=1e-12) for t in (self.x, self.y)]
            self.x, self.y = (t / norm for t, norm in zip((self.x, self.y), self.norms))

    def cost(self) -> Tensor:
        x, y = self.x, self.y
        if self.kind == "l1":
            return torch.cdist(x, y, p=1)
        if self.kind == "sqeuclidean":
            squares = y.square().sum(-1)[:, None, :].expand(-1, x.shape[1], -1)
            return torch.baddbmm(squares, x, y.mT, alpha=-2).add_(x.square().sum(-1)[:, :, None])
        if self.kind == "cosine":
            return torch.bmm(x, y.mT).neg_().add_(1)
        logits = torch.bmm(x, y.mT).div_(self.tau)
        if int(self.y_lengths.min()) < y.shape[1]:
            padding = torch.arange(y.shape[1]) >= self.y_lengths[:, None]
            logits.masked_fill_(padding[:, None, :], -torch.inf)
        return logits.log_softmax(dim=-1).neg_()

    def take(self, grad: Tensor, costs: Tensor | None) -> None:
        """Takes the gradient of the cost, and for "contrastive" the costs."""
        if self.kind == "contrastive":  # what is kept is the gradient of x . y
            grad = costs.neg().exp_().mul_(grad.sum(2)[:, :, None]).sub_(grad).div_(self.tau)
        self.grad = grad

    def gradient_of_x(self) -> Tensor:
        return self._gradient(self.grad, 0)

    def gradient_of_y(self) -> Tensor:
        return self._gradient(self.grad.mT, 1)

    def _gradient(self, grad: Tensor, side: int) -> Tensor:
        own, other = (self.x, self.y) if side == 0 else (self.y, self.x)
        if self.kind == "contrastive":
            return torch.bmm(grad, other)
        if self.kind == "l1":
            grad = grad.contiguous()
            return torch.ops.aten._cdist_backward(grad, own, other, 1.0, torch.zeros_like(grad))
        if self.kind == "sqeuclidean":
            return torch.baddbmm(own * grad.sum(2)[:, :, None], grad, other, alpha=-1).mul_(2)
        of_unit = torch.bmm(grad, other).neg_()
        return of_unit.sub_(own * (own * of_unit).sum(-1, keepdim=True)).div_(self.norms[side])


def _clean(tokens: Tensor, lengths: Tensor) -> Tensor:
    """The tokens with ones for padding, so that whatever it holds reaches no gradient."""
    if not len(lengths) or int(lengths.min()) == tokens.shape[1]:
        return tokens
    padding = torch.arange(tokens.shape[1]) >= lengths[:, None]
    return tokens.masked_fill(padding[:, :, None], 1)
