"""soft_dtw from features on a GPU: one op from tokens to values, one back to the tokens' gradients.

Products run on tensor cores (bfloat16, float16) or by multiply-add (float32), limited to the pair's lengths and, except
for "contrastive", to its band; sums are in float32, every one in a fixed order. Kept for backward are the shares and,
for "cosine" and "contrastive", the costs. A second derivative goes through dense costs and torch's ordinary graph.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lyra_ops._backend import register_fake
from lyra_ops.soft_dtw import (
    _Arguments,
    _raw,
    _run,
    band_rows_on_cuda,
    kept_bytes_on_cuda,
    reference,
    without_derivative,
)


def serves(x: Tensor, y: Tensor, cost: str) -> bool:
    """Not "l1", which is no product, and not float64, which has no kernels: these go through dense costs."""
    return cost != "l1" and torch.float64 not in (x.dtype, y.dtype)


def soft_dtw(x: Tensor, y: Tensor, arguments: _Arguments, cost: str, temperature: float) -> Tensor:
    """`lyra_ops.soft_dtw` on the backend "cuda" for what `serves` says; arguments have been checked."""
    dtype = torch.promote_types(x.dtype, y.dtype)
    if cost == "cosine" and dtype == torch.float16:
        dtype = torch.float32  # the gradient holds 1 / (|x| |y|), for which float16 has no range
    x, y = x.to(dtype), y.to(dtype)
    (_, gammas, drop), problem, options, store = _raw(x.new_empty(x.shape[0], 0, 0, dtype=torch.float32), arguments)
    sources = x, y, gammas, drop
    rest = *problem, *options, cost, temperature
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in sources):
        return _FromFeatures.apply(*sources, *rest, store)
    return _forward(*sources, *rest, 0)[0]


def _forward(x, y, gammas, drop, x_lengths, y_lengths, low, high, gamma, band, cost, temperature, store):
    return torch.ops.lyra.soft_dtw_features_forward(
        x, y, x_lengths, y_lengths, cost, temperature, gamma, gammas, band, low, high, drop, store
    )


class _FromFeatures(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, y, gammas, drop, x_lengths, y_lengths, low, high, *rest) -> Tensor:
        *options, store = rest
        tensors = x, y, gammas, drop, x_lengths, y_lengths, low, high
        value, probs, costs, norms = _forward(*tensors, *options, store)
        ctx.save_for_backward(*tensors, value, probs, costs, norms)
        ctx.rest = *options, 8 if store == 8 else 16
        return value

    @staticmethod
    def backward(ctx, grad_value: Tensor) -> tuple[Tensor | None, ...]:
        wanted = tuple(ctx.needs_input_grad[:4])
        return *_Gradient.apply(grad_value, *ctx.saved_tensors, *ctx.rest, wanted), *[None] * 9


class _Gradient(torch.autograd.Function):
    """grad_value times the gradients in x, y, gammas and drop, of which None are those not wanted."""

    @staticmethod
    def forward(ctx, grad_value, *rest) -> tuple[Tensor | None, ...]:
        x, y, gammas, drop, x_lengths, y_lengths, low, high = tensors = rest[:8]
        value, probs, costs, norms = rest[8:12]
        _, band, cost, temperature, _, wanted = ctx.rest = rest[12:]
        ctx.save_for_backward(grad_value, *tensors)
        ctx.set_materialize_grads(False)
        problem = x, y, x_lengths, y_lengths, cost, temperature, band, low, high, drop is not None
        grad_x, grad_y, dropped, entropy = torch.ops.lyra.soft_dtw_features_backward(
            grad_value, value, probs, costs, norms, *problem, wanted[2], wanted[0], wanted[1]
        )
        return (
            grad_x if wanted[0] else None,
            grad_y if wanted[1] else None,
            (-grad_value * entropy).to(gammas.dtype) if wanted[2] else None,
            grad_value[:, None] * dropped if wanted[3] else None,
        )

    @staticmethod
    def backward(ctx, *along: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_value, x, y, gammas, drop, x_lengths, y_lengths, low, high = ctx.saved_tensors
        sources = grad_value, x, y, gammas, drop, *along
        gamma, band, cost, temperature, bits, wanted = ctx.rest
        leaves = [None if t is None else t.detach().requires_grad_() for t in (grad_value, x, y, gammas, drop)]
        grad_value, x, y, gammas, drop = leaves
        window = (low, high) if low is not None else band if band >= 0 else None
        arguments = _Arguments(x_lengths, y_lengths, gamma if gammas is None else gammas, window, drop, bits)
        with torch.enable_grad():
            costs = reference.pair_cost(x, y, x_lengths, y_lengths, cost, temperature)
            value = _run(x.device.type, costs, arguments)
            asked = [(leaf, a) for leaf, a, is_one in zip(leaves[1:], along, wanted) if is_one and a is not None]
            if not asked:
                return (None,) * 19
            first = torch.autograd.grad(value, [leaf for leaf, _ in asked], grad_value, create_graph=True)
            real = [leaf for leaf in leaves if leaf is not None]
            found = iter(torch.autograd.grad(first, real, [a for _, a in asked], allow_unused=True))
        second = [None if leaf is None else next(found) for leaf in leaves]
        return *without_derivative(second, sources), *[None] * 14


@register_fake("soft_dtw_features_forward")
def _(x, y, x_lengths, y_lengths, cost, temperature, gamma, gammas, band, low, high, drop, store):
    (batch, rows, _), columns = x.shape, y.shape[1]
    kept = kept_bytes_on_cuda(rows, columns, band, store, drop is not None)
    cells = 0 if store == 0 or cost == "sqeuclidean" else _cells(rows, columns, band if cost == "cosine" else -1)
    return (
        x.new_empty(batch, dtype=torch.float32),
        x.new_empty(batch, kept, dtype=torch.uint8),
        x.new_empty(batch, cells, dtype=torch.float32),
        x.new_empty(batch, rows + columns if cost == "cosine" else 0, dtype=torch.float32),
    )


def _cells(rows: int, columns: int, band: int) -> int:
    """Of a pair, in strips; csrc/soft_dtw/pairs.h: Cells::rows_in_strips."""
    lanes = 32
    in_strips = torch.sym_max((columns + lanes - 1) // lanes, 1) * rows
    if band >= 0:
        in_strips = torch.sym_min(in_strips, band_rows_on_cuda(rows, columns, band))
    return lanes * in_strips


@register_fake("soft_dtw_features_backward")
def _(grad_value, value, probs, costs, norms, x, y, x_lengths, y_lengths, cost, temperature, band, low, high, *rest):
    dropping, with_entropy, of_x, of_y = rest
    (batch, rows, size), columns = x.shape, y.shape[1]
    return (
        x.new_empty(batch if of_x else 0, rows, size),
        y.new_empty(batch if of_y else 0, columns, size),
        value.new_empty((batch, rows) if dropping else 0),
        value.new_empty(batch if with_entropy else 0),
    )
