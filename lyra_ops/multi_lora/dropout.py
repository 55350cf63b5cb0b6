"""A dropout mask that is computed from a seed wherever it is needed, and never stored.

Element (t, k) of a matrix is kept if a 16-bit number is at least ``drop``, the probability in units of 2^-16. The
number is bits 16 j to 16 j + 15, j = k % 8, of Philox4x32-10 with counter (k // 8, t, 0, 0) and the seed as key, so
every backend finds the same mask (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011).
"""

from __future__ import annotations

import torch
from torch import Tensor

ALL = 1 << 16


def units(dropout_p: float) -> int:
    """The probability as the mask knows it."""
    return round(dropout_p * ALL)


def scale(drop: int) -> float:
    """What makes up for the elements that are dropped."""
    return ALL / (ALL - drop) if drop < ALL else 0.0


def new_seed(device: torch.device) -> Tensor:
    """(1,) int64 from torch's generator: new in each replay of a CUDA graph, the same under checkpointing."""
    return torch.randint(1 << 62, (1,), device=device)


@torch.no_grad()
def kept(seed: Tensor, drop: int, rows: int, columns: int, first: int = 0) -> Tensor:
    """The mask of rows ``first`` .. ``first`` + rows - 1: bool (rows, columns), true where an element is kept."""
    if drop >= ALL:
        return torch.zeros(rows, columns, dtype=torch.bool, device=seed.device)
    device, eighths = seed.device, -(-columns // 8)
    low = 0xFFFFFFFF
    # Unsigned 32-bit numbers in int64, which holds their products: it wraps around, but the bits are the right ones.
    c0 = torch.arange(eighths, device=device).expand(rows, eighths)
    c1 = torch.arange(first, first + rows, device=device)[:, None]
    c2 = c3 = torch.zeros((), dtype=torch.int64, device=device)
    k0, k1 = seed & low, (seed >> 32) & low
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (p1 >> 32) & low ^ c1 ^ k0, p1 & low, (p0 >> 32) & low ^ c3 ^ k1, p0 & low
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    words = torch.stack([c.expand(rows, eighths) for c in (c0, c1, c2, c3)], 2)
    lanes = torch.stack([words << 48 >> 48, words << 32 >> 48], 3)  # 16 bits each, with their sign
    return lanes.view(rows, eighths * 8)[:, :columns] >= drop - ALL // 2


def drop_out(x: Tensor, seed: Tensor | None, drop: int) -> Tensor:
    """x (T, D), zero where the mask drops it, not scaled; x itself without a seed. Differentiable at will."""
    return x if seed is None else _Dropped.apply(x, seed, drop)


class _Dropped(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, seed: Tensor, drop: int) -> Tensor:
        ctx.save_for_backward(seed)
        ctx.drop = drop
        return torch.where(kept(seed, drop, *x.shape), x, 0)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        return _Dropped.apply(grad, *ctx.saved_tensors, ctx.drop), None, None


def dropped_product(x: Tensor, a: Tensor, seed: Tensor | None, drop: int) -> Tensor:
    """`drop_out` of x (T, D), times a^T (D, R). Only x and the seed are kept for the backward pass."""
    return x @ a.T if seed is None else _DroppedProduct.apply(x, a, seed, drop)


class _DroppedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, a: Tensor, seed: Tensor, drop: int) -> Tensor:
        ctx.save_for_backward(x, a, seed)
        ctx.drop = drop
        return drop_out(x, seed, drop) @ a.T

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, a, seed = ctx.saved_tensors
        return drop_out(grad @ a, seed, ctx.drop), grad.T @ drop_out(x, seed, ctx.drop), None, None
