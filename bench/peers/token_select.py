"""Scoring, selection and gathering as others do them, for query (B,Hq,Lq,D) and key (B,Hkv,L,D).

Packages are imported when they are called: one that is missing says so, and is left out.
"""

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


def grouped_shares(query: Tensor, key: Tensor, lse: Tensor) -> Tensor:
    """`grouped_scores` where the log-sum-exp (B,Hq,Lq) is known."""
    batch, heads, rows, dim = query.shape
    logits = query.reshape(batch, key.shape[1], -1, dim) @ key.mT
    shares = (logits.float() * dim**-0.5 - lse.reshape(batch, key.shape[1], -1, 1)).exp()
    return shares.sum((1, 2)) / (heads * rows)


def keys_values_shares(query: Tensor, key: Tensor, lse: Tensor) -> Tensor:
    """The Triton kernel of awslabs/keys_values, which wants the log-sum-exp in powers of two."""
    from keys_values.attention.flashinfer_wrapper import triton_score_sum

    heads, rows, dim = query.shape[1:]
    kv_heads, query, key = key.shape[1], query.transpose(1, 2), key.transpose(1, 2)
    lse = lse.transpose(1, 2) * math.log2(math.e)
    means = triton_score_sum(query, key, lse, dim**-0.5, kv_heads, heads // kv_heads, causal_masking=False)
    return means.sum(1) / (kv_heads * rows)  # of the heads of a key head


def flag_attention_scores(query: Tensor, key: Tensor) -> Tensor:
    """FlagAttention's sums over the rows, each query head's, which come with attention; any value will do for it."""
    from flag_attn import flash_attention

    _, _, sums, *_ = flash_attention(query, key, key, causal=False, return_total_attention=True)
    return sums.sum(1) / (query.shape[1] * query.shape[2])


@cache
def compiled(function):
    """Compiled anew for each shape: the fastest that torch.compile makes of it."""
    return torch.compile(function, dynamic=False)


def topk_and_sort(scores: Tensor, keep: int) -> Tensor:
    """Places of the ``keep`` best of each sample, in order; of equal scores any."""
    return scores.topk(keep, dim=1, sorted=False).indices.sort(dim=1).values


def flashinfer_topk_and_sort(scores: Tensor, keep: int) -> Tensor:
    """The same with the top-k of FlashInfer."""
    from flashinfer import top_k

    return top_k(scores, keep)[1].sort(dim=1).values


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
