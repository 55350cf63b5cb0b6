"""Inputs of token_scores, and the formula in plain torch, for the tests of its kernels."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Case:
    rows: int
    length: int
    dim: int = 16
    batch: int = 1
    heads: int = 2
    kv_heads: int = 1
    dtype: torch.dtype = torch.bfloat16
    masked: bool = False
    limits: bool = False
    bias: bool = False
    weights: bool = False
    lse: bool = False
    causal: bool = False
    per_head: bool = False
    strided: bool = False


CASES = [
    Case(1, 1),
    Case(3, 70, heads=4, kv_heads=2, weights=True),
    Case(40, 150, causal=True, batch=2),
    Case(9, 1100, dtype=torch.float16),
    Case(70, 40, dim=40, masked=True, batch=2, heads=6, kv_heads=2),
    Case(20, 90, dim=72, masked=True, limits=True, bias=True, strided=True),
    Case(5, 2100, masked=True, causal=True),
    Case(2, 4200),
    Case(2, 4200, masked=True, lse=True, causal=True),
    Case(2, 4500, masked=True),
    Case(2100, 5, masked=True, heads=1),
    Case(33, 66, dim=130, masked=True, per_head=True, heads=4, kv_heads=2, weights=True),
    Case(33, 66, lse=True, causal=True, masked=True, heads=4, kv_heads=2),
    Case(3, 130, dim=10, dtype=torch.float32, masked=True, bias=True),
    Case(18, 70, dim=100, dtype=torch.float32, heads=1, strided=True),
]


def logits_of(query: Tensor, key: Tensor, scale: float, hidden: Tensor, bias: Tensor | None) -> Tensor:
    logits = query @ key.repeat_interleave(query.shape[1] // key.shape[1], dim=1).mT * scale
    if bias is not None:
        logits = logits + bias[:, None, None]
    return logits.masked_fill(hidden[:, None], -torch.inf)


def formula(inputs: dict, per_head: bool, dtype: torch.dtype) -> Tensor:
    """Scores (B, L), or (B, Hq, L), in plain torch."""
    bias = inputs["bias"] if inputs["bias"] is None else inputs["bias"].to(dtype)
    hidden, query, key = inputs["hidden"], inputs["query"].to(dtype), inputs["key"].to(dtype)
    if bias is not None:
        hidden = hidden | (bias == -torch.inf)[:, None]
    logits = logits_of(query, key, inputs["scale"], hidden, bias)
    counted = (~hidden).any(-1)
    cells = logits.softmax(-1).masked_fill(~counted[:, None, :, None], 0)
    heads = cells.sum(2) / counted.sum(-1).clamp(min=1)[:, None, None]
    if per_head:
        return heads
    weights = inputs["weights"]
    return (heads * weights[..., None].to(dtype)).sum(1) if weights is not None else heads.mean(1)


@functools.cache
def made(case: Case) -> dict:
    g = torch.Generator().manual_seed(case.rows * 1000 + case.length)
    b, hq, hkv, n, m, d = case.batch, case.heads, case.kv_heads, case.rows, case.length, case.dim
    query = torch.randn(b, hq, n, d, generator=g).to(case.dtype)
    key = torch.randn(b, hkv, m, d, generator=g).to(case.dtype)
    query_mask, key_mask = torch.rand(b, n, generator=g) < 0.7, torch.rand(b, m, generator=g) < 0.7
    key_mask[:, :20] &= m < 20  # where there are many, the first real key is not the first thread's
    limits = torch.randint(-2, m + 3, (b, n), generator=g).int() if case.limits else None
    bias = torch.randn(b, m, generator=g) if case.bias else None
    if case.bias:
        bias[torch.rand(b, m, generator=g) < 0.1] = -torch.inf
    weights = torch.rand(b, hq, generator=g).softmax(-1) if case.weights else None
    hidden = torch.zeros(b, n, m, dtype=torch.bool)
    if case.masked:
        hidden = ~(query_mask[:, :, None] & key_mask[:, None])
        query[~query_mask[:, None].expand(b, hq, n)] = torch.nan  # what does not count may hold anything
        key[~key_mask[:, None].expand(b, hkv, m)] = torch.inf
    if case.causal:
        hidden = hidden | torch.ones(n, m, dtype=torch.bool).triu(m - n + 1)
    if case.limits:
        hidden = hidden | (torch.arange(m) >= limits[:, :, None])
    scale = d**-0.5
    inputs = {
        "query": query,
        "key": key,
        "hidden": hidden,
        "bias": bias,
        "weights": weights,
        "limits": limits,
        "scale": scale,
        "masks": (query_mask, key_mask) if case.masked else (None, None),
        "lse": None,
    }
    clean = {**inputs, "query": query.nan_to_num(0, 0, 0), "key": key.nan_to_num(0, 0, 0)}
    if case.lse:
        logits = logits_of(clean["query"].double(), clean["key"].double(), scale, hidden, bias)
        inputs["lse"] = logits.logsumexp(-1)
    plain, exact = (formula(clean, case.per_head, dtype) for dtype in (torch.float32, torch.float64))
    return {**inputs, "plain": plain, "exact": exact}


def blocked_scores(query: Tensor, key: Tensor, *, causal: bool = False, block: int = 4096) -> Tensor:
    """Scores (B, L) in float64, from blocks of keys: for lengths whose attention map does not fit into memory."""
    query, key = query.double(), key.double().repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    rows, length = query.shape[2], key.shape[2]
    last = torch.arange(length - rows, length) if causal else torch.full((rows,), length - 1)

    def logits(start: int) -> Tensor:
        places = torch.arange(start, min(start + block, length))
        cells = query @ key[:, :, places].mT * query.shape[-1] ** -0.5
        return cells.masked_fill(places > last[:, None], -torch.inf)

    norm = torch.full(query.shape[:3], -torch.inf, dtype=torch.float64)
    for start in range(0, length, block):
        norm = torch.logaddexp(norm, logits(start).logsumexp(-1))
    shares = [(logits(start) - norm[..., None]).exp().mean((1, 2)) for start in range(0, length, block)]
    return torch.cat(shares, dim=1)
