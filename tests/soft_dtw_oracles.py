"""Soft-DTW as slowly and as plainly as it can be said, and inputs to say it about."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

Cell = tuple[int, int]

COMPILED = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
BACKENDS = ["reference", *COMPILED]


def device_of(backend: str) -> str:
    return "cuda" if backend == "cuda" else "cpu"


def paths(n: int, m: int) -> Iterator[list[Cell]]:
    """Every way from (0, 0) to (n-1, m-1) by steps (1, 1), (1, 0) and (0, 1)."""
    if n == 1 and m == 1:
        yield [(0, 0)]
        return
    for before in ((n - 1, m - 1), (n - 1, m), (n, m - 1)):
        if min(before) > 0:
            for path in paths(*before):
                yield [*path, (n - 1, m - 1)]


def enumerated(cost: Tensor, gamma: float, drop: Tensor | list[float] | None = None) -> tuple[Tensor, Tensor]:
    """Value and expected alignment of one pair (n, m): the sum over all paths over all rows that are kept."""
    n, m = cost.shape
    prices, visits = [], []
    for kept in range(n, 0, -1):
        for rows in itertools.combinations(range(n), kept):
            for path in paths(kept, m):
                visited = torch.zeros_like(cost)
                for i, j in path:
                    visited[rows[i], j] = 1
                dropped = 0.0 if drop is None else sum(float(drop[i]) for i in range(n) if i not in rows)
                prices.append(cost[visited > 0].sum() + dropped)
                visits.append(visited)
        if drop is None:
            break
    prices, visits = torch.stack(prices), torch.stack(visits)
    if gamma == 0:
        return prices.min(), visits[prices.argmin()]
    value = -gamma * torch.logsumexp(-prices / gamma, dim=0)
    return value, torch.einsum("p,pnm->nm", torch.softmax(-prices / gamma, dim=0), visits)


def looped(cost: Tensor, gamma: float, drop: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Value and expected alignment of one pair (n, m), cell by cell, in more than float64."""
    n, m = cost.shape
    cost = cost.numpy().astype(np.longdouble)
    drop = np.full(n, np.inf, dtype=np.longdouble) if drop is None else drop.numpy().astype(np.longdouble)
    match = np.full((n + 1, m + 1), np.inf, dtype=np.longdouble)  # ends in a match of row i and column j,
    total = match.copy()  # or else drops rows after it
    share, kept = np.zeros((n + 2, m + 2, 3), dtype=np.longdouble), np.zeros((n + 2, m + 2, 2), dtype=np.longdouble)

    def softmin(*terms: np.longdouble) -> tuple[np.longdouble, np.ndarray | float]:
        terms = np.array(terms)
        if terms.min() == np.inf:
            return terms.min(), 0.0
        weight = np.exp((terms.min() - terms) / np.longdouble(gamma))
        return terms.min() - np.longdouble(gamma) * np.log(weight.sum()), weight / weight.sum()

    total[0, 0] = 0
    for i in range(1, n + 1):
        total[i, 0] = total[i - 1, 0] + drop[i - 1]
        for j in range(1, m + 1):
            best, share[i, j] = softmin(total[i - 1, j - 1], total[i - 1, j], match[i, j - 1])
            match[i, j] = cost[i - 1, j - 1] + best
            total[i, j], kept[i, j] = softmin(match[i, j], total[i - 1, j] + drop[i - 1])
    expected, of_total = (np.zeros((n + 2, m + 2), dtype=np.longdouble) for _ in range(2))
    of_total[n, m] = 1
    for i in range(n, 0, -1):
        for j in range(m, 0, -1):
            of_total[i, j] += (
                expected[i + 1, j + 1] * share[i + 1, j + 1, 0]
                + expected[i + 1, j] * share[i + 1, j, 1]
                + of_total[i + 1, j] * kept[i + 1, j, 1]
            )
            expected[i, j] = of_total[i, j] * kept[i, j, 0] + expected[i, j + 1] * share[i, j + 1, 2]
    return torch.tensor(float(total[n, m]), dtype=torch.float64), torch.tensor(expected[1:-1, 1:-1].astype(np.float64))


def in_band(n: int, m: int, w: int) -> Tensor:
    """The cells of an int band, by the rule as the documentation says it."""
    slope = (m - 1) / max(n - 1, 1)
    reach = max(w, slope / 2 + 0.5)
    if n == 1:
        reach = math.inf
    return torch.tensor([[abs(j - i * slope) <= reach + 1e-9 for j in range(m)] for i in range(n)])


def ragged(batch: int, rows: int, columns: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Lengths of which the first sample's are full."""
    g = torch.Generator().manual_seed(seed)
    x_lengths = torch.randint(1, rows + 1, (batch,), generator=g)
    y_lengths = torch.randint(1, columns + 1, (batch,), generator=g)
    x_lengths[:1], y_lengths[:1] = rows, columns
    return x_lengths, y_lengths


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def poisoned(cost: Tensor, x_lengths: Tensor, y_lengths: Tensor) -> Tensor:
    """The cost with NaN in all padding."""
    cost = cost.clone()
    for b, (n, m) in enumerate(zip(x_lengths.tolist(), y_lengths.tolist())):
        cost[b, n:] = math.nan
        cost[b, :, m:] = math.nan
    return cost


def assert_gradient_close(got: Tensor, exact: Tensor, bits: int = 16) -> None:
    """What is promised of a gradient in float32: NaN at its places, relative L2 error 1e-4, with 8 bits 1e-2."""
    got, exact = got.detach().cpu().double(), exact.detach().cpu().double()
    assert torch.equal(got.isnan(), exact.isnan())
    got, exact = got.nan_to_num(), exact.nan_to_num()
    error = (got - exact).norm().item()
    assert error <= {16: 1e-4, 8: 1e-2}[bits] * exact.norm().item(), f"error {error:.1e}, norm {exact.norm():.1e}"


def same(got: Tensor, want: Tensor) -> None:
    """Equal up to float64 rounding."""
    torch.testing.assert_close(got.cpu(), want, rtol=1e-10, atol=1e-12)
