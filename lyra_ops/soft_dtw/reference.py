"""Soft-DTW in plain torch, vectorised over the batch and the anti-diagonals: the oracle, and the path that does it all.

Everything is ordinary autograd, so it is differentiable as often as one likes, in the cost, in gamma and in drop_cost.
Arguments have been checked by the public functions of this package. B pairs, N rows (x tokens), M columns (y tokens).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

Band = int | tuple[Tensor, Tensor] | None


def pair_cost(x: Tensor, y: Tensor, x_lengths: Tensor, y_lengths: Tensor, cost: str, temperature: float) -> Tensor:
    """Cost (B, N, M) of matching each token of x (B, N, D) with each of y (B, M, D), in float32 or better.

    Never holds B x N x M x D numbers. Padded tokens are replaced first, so that whatever they hold reaches no gradient.
    """
    dtype = torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)
    x_real, y_real = _real(x_lengths, x.shape[1]), _real(y_lengths, y.shape[1])
    # Ones, not zeros: the norm of a zero vector has no derivative.
    x = x.to(dtype).masked_fill(~x_real[..., None], 1)
    y = y.to(dtype).masked_fill(~y_real[..., None], 1)
    with torch.autocast(x.device.type, enabled=False):  # a cost rounded to 16 bits moves the whole alignment
        if cost == "sqeuclidean":
            # Distances do not change when both sides move; without a common offset the expansion cancels less.
            offset = y[:, :1].detach()
            x, y = x - offset, y - offset
            return x.square().sum(-1)[:, :, None] + y.square().sum(-1)[:, None, :] - 2 * x @ y.mT
        if cost == "l1":
            return _L1.apply(x, y)
        if cost == "cosine":
            return 1 - F.normalize(x, dim=-1) @ F.normalize(y, dim=-1).mT
        logits = x @ y.mT / temperature
        return -logits.masked_fill(~y_real[:, None, :], -math.inf).log_softmax(dim=-1)


def soft_dtw(
    cost: Tensor,
    x_lengths: Tensor,
    y_lengths: Tensor,
    gamma: float | Tensor,
    band: Band = None,
    drop_cost: Tensor | None = None,
) -> Tensor:
    """Soft-DTW value (B,) of cost (B, N, M) float32 or float64; the recursion stands in the package's docstring.

    gamma: a float >= 0, or a tensor () or (B,) of positive values; drop_cost (B, N).
    """
    batch, rows, columns = cost.shape
    if batch == 0:
        return cost.sum(dim=(1, 2))
    if isinstance(gamma, Tensor):
        gamma = gamma.to(cost.dtype).reshape(-1, 1)
    wrong_length = (x_lengths < 1) | (x_lengths > rows) | (y_lengths < 1) | (y_lengths > columns)
    inside = inside_band(x_lengths, y_lengths, rows, columns, band) | wrong_length[:, None, None]
    bad = wrong_length | ((cost.isnan() | cost.isneginf()) & inside).any(dim=(1, 2))
    # Lane j of diagonal k is the cell (k - j, j); whatever is outside costs infinity and gets no gradient.
    diagonals = _skew(cost.masked_fill(~inside, math.inf))

    start = cost.new_zeros(batch, 1)  # in front of the first column, before the first row
    if drop_cost is None:
        edge = F.pad(start, (0, len(diagonals)), value=math.inf)
        drops = [None] * len(diagonals)
    else:
        real = _real(x_lengths, rows)
        bad |= ((drop_cost.isnan() | drop_cost.isneginf()) & real).any(dim=1)
        drop_cost = drop_cost.to(cost.dtype).masked_fill(~real, math.inf)
        edge = F.pad(torch.cat([start, drop_cost.cumsum(dim=1)], dim=1), (0, columns), value=math.inf)
        drops = _skew(drop_cost[:, :, None].expand_as(cost))

    closed = cost.new_full((batch, columns), math.inf)
    match = last = before_last = closed  # M of the last diagonal, A of the last two
    history = []
    for k, (step, drop) in enumerate(zip(diagonals, drops)):
        diagonal = torch.cat([edge[:, k : k + 1], before_last[:, :-1]], dim=1)
        left = F.pad(match[:, :-1], (1, 0), value=math.inf)
        match = step + _softmin(gamma, diagonal, last, left)
        now = match if drop is None else _softmin(gamma, match, last + drop)
        before_last, last = last, now
        history.append(now)

    diagonal, lane = (x_lengths + y_lengths - 2).clamp(0, len(diagonals) - 1), (y_lengths - 1).clamp(0, columns - 1)
    value = torch.stack(history, dim=1)[torch.arange(batch, device=cost.device), diagonal, lane]
    value = value.masked_fill(value.isposinf(), math.inf)  # no gradient where there is no path
    return value * torch.ones_like(value).masked_fill(bad, math.nan)


def alignment(cost: Tensor, *args: object, differentiable: bool = False) -> Tensor:
    """Expected alignment E = d soft_dtw / d cost, (B, N, M); arguments as `soft_dtw`."""
    with torch.inference_mode(False), torch.enable_grad():
        if not differentiable:
            cost = cost.detach().clone().requires_grad_()  # a tensor of inference mode itself can never have a gradient
        value = soft_dtw(cost, *args)
        return torch.autograd.grad(value.sum(), cost, create_graph=differentiable)[0]


def inside_band(x_lengths: Tensor, y_lengths: Tensor, rows: int, columns: int, band: Band = None) -> Tensor:
    """Which cells (B, N, M) are real tokens on both sides and inside the band."""
    i = torch.arange(rows, device=x_lengths.device)[None, :, None]
    j = torch.arange(columns, device=x_lengths.device)[None, None, :]
    n, m = x_lengths[:, None, None], y_lengths[:, None, None]
    inside = (i < n) & (j < m)
    if isinstance(band, int):
        # |j - i slope| <= max(band, slope/2 + 1/2), slope = (m-1)/(n-1), times 2 (n-1) to stay in whole numbers;
        # a single row (n = 1) then is inside everywhere.
        distance = (2 * (j * (n - 1) - i * (m - 1))).abs()
        inside = inside & (distance <= torch.maximum(2 * min(band, columns) * (n - 1), n + m - 2))
    elif band is not None:
        low, high = band
        inside = inside & (j >= low[:, :, None]) & (j <= high[:, :, None])
    return inside


def _softmin(gamma: float | Tensor, *terms: Tensor) -> Tensor:
    """-gamma log sum exp(-term / gamma); gamma = 0: the minimum, of which the first of equals gets the gradient."""
    if not isinstance(gamma, Tensor) and gamma == 0:
        best = terms[0]
        for term in terms[1:]:
            best = torch.where(term < best, term, best)
        return best
    x = torch.stack(terms)
    least = x.detach().amin(dim=0)  # a constant: the result does not depend on it
    # An infinite term is taken out on both sides of exp, else its gradient would be 0 * inf.
    infinite = x.isinf()
    weight = torch.exp((least - x).masked_fill(infinite, 0) / gamma).masked_fill(infinite, 0)
    none = infinite.all(dim=0)
    total = weight.sum(dim=0).masked_fill(none, 1)
    return (least - gamma * total.log()).masked_fill(none, math.inf)


def _skew(cells: Tensor) -> tuple[Tensor, ...]:
    """(B, N, M) -> N + M - 1 anti-diagonals (B, M) with column j in lane j, infinite where there is no cell."""
    _, rows, columns = cells.shape
    # Each column, as a row of N + M, loses one place to the next: so column j slides j places to the right.
    padded = F.pad(cells.mT, (0, columns), value=math.inf).flatten(1)
    skewed = padded[:, : columns * (rows + columns - 1)].unflatten(1, (columns, rows + columns - 1))
    return skewed.permute(2, 0, 1).contiguous().unbind()


def _real(lengths: Tensor, size: int) -> Tensor:
    """(B, size): which tokens are not padding."""
    return torch.arange(size, device=lengths.device) < lengths[:, None]


class _L1(torch.autograd.Function):
    """sum_d |x_id - y_jd|. torch.cdist alone has no second derivative, and autograd would keep B x N x M x D signs."""

    @staticmethod
    def forward(ctx, x: Tensor, y: Tensor) -> Tensor:
        ctx.save_for_backward(x, y)
        return torch.cdist(x, y, p=1)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        return _L1Backward.apply(grad, *ctx.saved_tensors)


class _L1Backward(torch.autograd.Function):
    """Sums grad_ij sign(x_id - y_jd) over j for x, over i (negated) for y: linear in grad, constant in x and y."""

    @staticmethod
    def forward(ctx, grad: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, y)
        grad_x, grad_y = torch.empty_like(x), torch.empty_like(y)
        for d in range(x.shape[-1]):
            signed = grad * _signs(x, y, d)
            grad_x[..., d], grad_y[..., d] = signed.sum(2), -signed.sum(1)
        return grad_x, grad_y

    @staticmethod
    def backward(ctx, along_x: Tensor, along_y: Tensor) -> tuple[Tensor, None, None]:
        x, y = ctx.saved_tensors
        change = x.new_zeros(x.shape[0], x.shape[1], y.shape[1])
        for d in range(x.shape[-1]):
            change += (along_x[:, :, None, d] - along_y[:, None, :, d]) * _signs(x, y, d)
        return change, None, None


def _signs(x: Tensor, y: Tensor, d: int) -> Tensor:
    return (x[:, :, None, d] - y[:, None, :, d]).sign()
