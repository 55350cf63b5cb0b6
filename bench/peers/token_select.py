"""Scoring, selection and gathering as others write them in plain torch, for query (B,Hq,Lq,D) and key (B,Hkv,L,D)."""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor


def published_scores(query: Tensor, key: Tensor) -> Tensor:
    """As the code of Lyra scores: keys repeated for all heads, softmax in float32, mean over heads and rows: (B, L)."""
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    logits = query.float() @ key.float().mT / math.sqrt(query.shape[-1])
    return logits.softmax(-1).mean(1).mean(1)


def grouped_scores(query: Tensor, key: Tensor) -> Tensor:
    """The same with the query heads of a key head side by side, so that no key is repeated; logits in their dtype."""
    batch, heads, rows, dim = query.shape
    logits = query.reshape(batch, key.shape[1], -1, dim) @ key.mT
    return (logits.float() * dim**-0.5).softmax(-1).sum((1, 2)) / (heads * rows)


def scores_by_attention(query: Tensor, key: Tensor) -> Tensor:
    """Column sums without a matrix: the gradient of attention in its values, for an upstream gradient of ones."""
    value = torch.zeros(*key.shape, dtype=key.dtype, device=key.device, requires_grad=True)
    with torch.enable_grad():
        attention = torch.nn.functional.scaled_dot_product_attention(query, key, value, enable_gqa=True)
        (columns,) = torch.autograd.grad(attention, value, torch.ones_like(attention))
    return columns[..., 0].float().sum(1) / (query.shape[1] * query.shape[2])


@cache
def compiled(function):
    """Compiled anew for each shape: the fastest that torch.compile makes of it."""
    return torch.compile(function, dynamic=False)


def topk_and_sort(scores: Tensor, keep: int) -> Tensor:
    """Places of the ``keep`` best of each sample, in order; of equal scores any."""
    return scores.topk(keep, dim=1, sorted=False).indices.sort(dim=1).values


def stable_sort(scores: Tensor, keep: int) -> Tensor:
    """The same with a rule for equal scores: the lower place wins."""
    return scores.argsort(dim=1, descending=True, stable=True)[:, :keep].sort(dim=1).values


def gather_each(index: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    """One gather for each tensor (B, L, ...)."""
    expanded = [index.view(*index.shape, *[1] * (t.ndim - 2)).expand(*index.shape, *t.shape[2:]) for t in tensors]
    return tuple(t.gather(1, i) for t, i in zip(tensors, expanded))


def index_each(index: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    """The same by advanced indexing."""
    sample = torch.arange(index.shape[0], device=index.device)[:, None]
    return tuple(t[sample, index] for t in tensors)
