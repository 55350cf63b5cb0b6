"""soft_dtw from features on a CPU: products of the tokens where they lie, costs of a few pairs at a time in the cache.

Forward makes the costs of a few pairs, aligns them and, where a gradient will be wanted, goes on at once to that of the
costs (for "contrastive": of the logits), which is all that is kept: 4 bytes a cell. Backward is two matrix products.
Neither copies the batch's tokens, nor multiplies padding, nor (contrastive aside, whose softmax needs all columns) what
is outside the band. A second derivative goes through the ordinary graph instead.
"""

from __future__ import annotations

import ctypes
import itertools
import mmap
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lyra_ops.soft_dtw import _Arguments, _forward, _raw, _run, _with_gradient, reference

BLOCK_BYTES = 4 << 20  # of costs
ROWS = 256  # of x in one product
LARGE_BYTES = 32 << 20  # what malloc takes anew from the system each time


class _Metric(NamedTuple):
    """A cost of `reference.pair_cost`, which has the formulas. Tensors are of some pairs with the same lengths."""

    kind: str
    tau: float
    dtype: torch.dtype

    def operands(self, x: Tensor, y: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
        """The tokens that are multiplied."""
        x, y = x.to(self.dtype), y.to(self.dtype)
        if self.kind == "sqeuclidean":
            # Distances do not change when both sides move; without a common offset the expansion cancels less.
            return x - offset, y - offset
        if self.kind == "cosine":
            return F.normalize(x, dim=-1), F.normalize(y, dim=-1)
        return x, y

    def write_cost(self, x: Tensor, y: Tensor, out: Tensor) -> None:
        """From operands; of "contrastive" the logits."""
        if self.kind == "l1":
            out.copy_(torch.cdist(x, y, p=1))
        elif self.kind == "sqeuclidean":
            out.copy_(y.square().sum(-1)[:, None, :].expand_as(out))
            out.baddbmm_(x, y.mT, alpha=-2).add_(x.square().sum(-1)[:, :, None])
        elif self.kind == "cosine":
            torch.baddbmm(out, x, y.mT, beta=0, alpha=-1, out=out).add_(1)
        else:
            torch.baddbmm(out, x, y.mT, beta=0, alpha=1 / self.tau, out=out)

    def factor(self) -> float:
        """What the gradient of the cost is multiplied by before `write_gradients` takes it."""
        return {"sqeuclidean": 2.0, "cosine": -1.0, "contrastive": 1 / self.tau}.get(self.kind, 1.0)

    def write_gradients(
        self, x: Tensor, y: Tensor, grad: Tensor, of_x: Tensor | None, of_y: Tensor | None, add_y: bool
    ) -> None:
        """From operands and their share of the cost's gradient: writes that of x, writes or adds that of y.

        Of "cosine" in the operands, not yet in the tokens.
        """
        for own, other, g, out, add in ((x, y, grad, of_x, False), (y, x, grad.mT, of_y, add_y)):
            if out is None:
                continue
            if self.kind == "l1":
                g = g.contiguous()
                part = torch.ops.aten._cdist_backward(g, own.contiguous(), other.contiguous(), 1.0, torch.zeros_like(g))
                out.add_(part) if add else out.copy_(part)
            elif self.kind == "sqeuclidean":
                sums = g.sum(2)[:, :, None]
                out.addcmul_(own, sums) if add else torch.mul(own, sums, out=out)
                out.baddbmm_(g, other, alpha=-1)
            else:
                torch.baddbmm(out, g, other, beta=1 if add else 0, out=out)

    def of_tokens(self, tokens: Tensor, of_operands: Tensor) -> None:
        """Turns the gradient of the operands into that of the tokens."""
        if self.kind == "cosine":
            norm = tokens.to(self.dtype).norm(dim=-1, keepdim=True).clamp_(min=1e-12)
            unit = tokens.to(self.dtype) / norm
            of_operands.addcmul_(unit, (unit * of_operands).sum(-1, keepdim=True), value=-1).div_(norm)


class _Group(NamedTuple):
    """Pairs of a block, one after the other, that have the same lengths."""

    pairs: slice  # in the batch
    place: slice  # in the block
    n: int
    m: int

    def pieces(self, band: int, low: Tensor | None, high: Tensor | None) -> Iterator[tuple[slice, slice]]:
        """Rows and columns that together hold all cells inside the band."""
        rise, run = self.n - 1, self.m - 1
        for start in range(0, self.n, ROWS):
            stop = min(start + ROWS, self.n)
            first, last = 0, run
            if low is not None:
                first = max(int(low[self.pairs, start:stop].min()), 0)
                last = min(int(high[self.pairs, start:stop].max()), run)
            elif band >= 0 and rise > 0:
                width = max(2 * min(band, self.m) * rise, rise + run) // 2
                first = max(-((width - start * run) // rise), 0)
                last = min(((stop - 1) * run + width) // rise, run)
            if first <= last:
                yield slice(start, stop), slice(first, last + 1)


def soft_dtw(x: Tensor, y: Tensor, arguments: _Arguments, cost: str, temperature: float) -> Tensor:
    """`lyra_ops.soft_dtw` on the backend "cpu"; arguments have been checked."""
    dtype = torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)
    (_, gammas, drop), problem, options, store = _raw(x.new_empty(x.shape[0], 0, 0, dtype=dtype), arguments)
    sources, metric = (x, y, gammas, drop), _Metric(cost, temperature, dtype)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in sources):
        return _FromFeatures.apply(*sources, *problem, options, store, metric, arguments)
    return _aligned(*sources, problem, options, 0, metric)[0]


class _FromFeatures(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, y, gammas, drop, x_lengths, y_lengths, low, high, options, store, metric, arguments):
        problem, of_gamma = (x_lengths, y_lengths, low, high), gammas is not None and ctx.needs_input_grad[2]
        wanted = any(ctx.needs_input_grad[:2]), of_gamma
        value, dropped, entropy, kept = _aligned(x, y, gammas, drop, problem, options, store, metric, *wanted)
        ctx.save_for_backward(x, y, gammas, drop, *problem, dropped, entropy, *kept)
        ctx.rest = options, metric, arguments
        return value

    @staticmethod
    def backward(ctx, grad_value: Tensor) -> tuple[Tensor | None, ...]:
        x, y, gammas, drop, x_lengths, y_lengths, low, high, dropped, entropy, *kept = ctx.saved_tensors
        if torch.is_grad_enabled():
            return *_through_the_graph(ctx, grad_value), *[None] * 8
        (_, band), metric, _ = ctx.rest
        grads = [_new_like(t) if needed else None for t, needed in zip((x, y), ctx.needs_input_grad)]
        scale, kept = (grad_value * metric.factor())[:, None, None], iter(kept)
        groups = _groups(x, y, x_lengths, y_lengths, metric) if any(ctx.needs_input_grad[:2]) else ()
        with torch.autocast("cpu", enabled=False):
            for group in itertools.chain.from_iterable(groups):
                pieces = list(_pieces(group, metric, band, low, high))
                _write_gradients(group, pieces, kept, x, y, grads, scale[group.pairs], metric)
        grad_gamma = (-grad_value * entropy).to(gammas.dtype) if len(entropy) else None
        grad_drop = None if drop is None else grad_value[:, None] * dropped
        return *grads, grad_gamma, grad_drop, *[None] * 8


def _aligned(x, y, gammas, drop, problem, options, store, metric, of_tokens=False, of_gamma=False):
    """Values (B,); if ``store``, their derivatives in drop; and if wanted, in the products of each piece and -gamma."""
    found, kept = [], []
    (x_lengths, y_lengths, low, high), band = problem, options[1]
    with torch.autocast("cpu", enabled=False):
        for groups in _groups(x, y, x_lengths, y_lengths, metric):
            part = slice(groups[0].pairs.start, groups[-1].pairs.stop)
            costs = x.new_empty(part.stop - part.start, x.shape[1], y.shape[1], dtype=metric.dtype)
            pieces = [(group, list(_pieces(group, metric, band, low, high))) for group in groups]
            for group, cells in pieces:
                offset = y[group.pairs, :1].to(metric.dtype)
                for rows, columns in cells:
                    operands = metric.operands(x[group.pairs, rows], y[group.pairs, columns], offset)
                    metric.write_cost(*operands, costs[group.place, rows, columns])
                if metric.kind == "contrastive":
                    costs[group.place, :, group.m :] = -torch.inf
            if metric.kind == "contrastive":
                costs = costs.log_softmax(dim=-1).neg_()
            tensors = [None if t is None else t[part] for t in (gammas, drop, *problem)]
            if not store:
                value, _ = _forward(costs, *tensors, *options, 0)
                found.append((value, value[:0], value[:0]))
                continue
            value, grad, dropped, entropy = _with_gradient(costs, *tensors, *options, store, of_gamma)
            found.append((value, dropped, entropy))
            if not of_tokens:
                continue
            if metric.kind == "contrastive":  # softmax_ij sum_k E_ik - E_ij, over temperature
                grad = costs.neg_().exp_().mul_(grad.sum(2, keepdim=True)).sub_(grad)
            for group, cells in pieces:
                for rows, columns in cells:
                    piece = grad[group.place, rows, columns]
                    kept.append(piece if columns == slice(0, group.m) else piece.clone())
    nothing = (x.new_empty(0, dtype=metric.dtype),) * 3
    value, dropped, entropy = map(torch.cat, zip(*found or [nothing]))
    return value, dropped, entropy, kept


def _write_gradients(group, pieces, kept, x, y, grads, scale, metric) -> None:
    """Of one group, into ``grads``, from the kept gradients of its products times ``scale``."""
    tokens = x[group.pairs, : group.n], y[group.pairs, : group.m]
    outs = [None if g is None else g[group.pairs, :size] for g, size in zip(grads, (group.n, group.m))]
    sums = [
        out if out is None or out.dtype == metric.dtype else torch.empty_like(out, dtype=metric.dtype) for out in outs
    ]
    of_x, of_y = sums
    whole = len(pieces) == 1 and pieces[0][1] == slice(0, group.m)
    if of_y is not None and not whole:
        of_y.zero_()
    if of_x is not None and sum(rows.stop - rows.start for rows, _ in pieces) < group.n:
        of_x.zero_()
    offset = tokens[1][:, :1].to(metric.dtype)
    for rows, columns in pieces:
        operands = metric.operands(tokens[0][:, rows], tokens[1][:, columns], offset)
        part_x, part_y = (None if s is None else s[:, at] for s, at in zip(sums, (rows, columns)))
        metric.write_gradients(*operands, next(kept) * scale, part_x, part_y, add_y=not whole)
    for size, token, grad, out, total in zip((group.n, group.m), tokens, grads, outs, sums):
        if grad is None:
            continue
        metric.of_tokens(token, total)
        if total is not out:
            out.copy_(total)
        grad[group.pairs, size:] = 0


def _new_like(tokens: Tensor) -> Tensor:
    """Uninitialised; in large pages where it is large, since pages of 4 KiB take longer to get than to fill."""
    new = torch.empty_like(tokens)
    size, page = new.untyped_storage().nbytes(), 2 << 20
    if size >= LARGE_BYTES and hasattr(mmap, "MADV_HUGEPAGE"):
        first = -new.data_ptr() % page
        length = (size - first) // page * page
        ctypes.CDLL(None).madvise(ctypes.c_void_p(new.data_ptr() + first), ctypes.c_size_t(length), mmap.MADV_HUGEPAGE)
    return new


def _through_the_graph(ctx, grad_value: Tensor) -> list[Tensor | None]:
    x, y, gammas, drop = sources = ctx.saved_tensors[:4]
    _, metric, arguments = ctx.rest
    # In the arguments as they came, gamma and drop are what these two were made of; here they stand for themselves.
    arguments = arguments._replace(gamma=arguments.gamma if gammas is None else gammas, drop_cost=drop)
    cost = reference.pair_cost(x, y, arguments.x_lengths, arguments.y_lengths, metric.kind, metric.tau)
    value = _run("cpu", cost, arguments)
    wanted = [t for t, needed in zip(sources, ctx.needs_input_grad) if needed]
    found = iter(torch.autograd.grad(value, wanted, grad_value, create_graph=True))
    return [next(found) if needed else None for needed in ctx.needs_input_grad[:4]]


def _groups(x: Tensor, y: Tensor, x_lengths: Tensor, y_lengths: Tensor, metric: _Metric) -> Iterator[list[_Group]]:
    """The batch in blocks of at least as many pairs as there are threads, each in groups of equal lengths."""
    (batch, rows, dim), columns = x.shape, y.shape[1]
    size = max(BLOCK_BYTES // max(rows * columns * metric.dtype.itemsize, 1), torch.get_num_threads())
    most = max(BLOCK_BYTES // max((rows + columns) * dim * metric.dtype.itemsize, 1), 1)  # of operands
    lengths = list(zip(x_lengths.tolist(), y_lengths.tolist()))
    for start in range(0, batch, size):
        groups, stop = [], min(start + size, batch)
        first = start
        for k in range(start + 1, stop + 1):
            if k == stop or k - first == most or lengths[k] != lengths[first]:
                groups.append(_Group(slice(first, k), slice(first - start, k - start), *lengths[first]))
                first = k
        yield groups


def _pieces(group: _Group, metric: _Metric, band: int, low: Tensor | None, high: Tensor | None):
    if metric.kind == "contrastive":  # its softmax runs over all columns
        return group.pieces(-1, None, None)
    return group.pieces(band, low, high)
