"""soft_dtw from features: its costs, their derivatives, and what is neither held in memory nor multiplied."""

from __future__ import annotations

import math

import pytest
import torch
from soft_dtw_oracles import ragged, random, same
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from lyra_ops import soft_dtw, soft_dtw_from_cost
from lyra_ops.soft_dtw import features

COSTS = ["sqeuclidean", "l1", "cosine", "contrastive"]


@pytest.mark.parametrize("cost", COSTS)
def test_feature_costs(cost: str) -> None:
    """Each cost as its formula says it, sample by sample without padding, against a batch padded with NaN."""
    x, y, (x_lengths, y_lengths) = random(3, 6, 4), random(3, 5, 4, seed=1), ragged(3, 6, 5)
    for b, (n, m) in enumerate(zip(x_lengths.tolist(), y_lengths.tolist())):
        x[b, n:], y[b, m:] = math.nan, math.nan
    x.requires_grad_()
    y.requires_grad_()
    temperature = 0.7 if cost == "contrastive" else 1.0
    value = soft_dtw(x, y, x_lengths, y_lengths, cost=cost, temperature=temperature, gamma=0.3)
    gradients = torch.autograd.grad(value.sum(), (x, y))
    for b, (n, m) in enumerate(zip(x_lengths.tolist(), y_lengths.tolist())):
        a, c = x[b, :n].detach().requires_grad_(), y[b, :m].detach().requires_grad_()
        difference = a[:, None] - c[None]
        pairs = {
            "sqeuclidean": difference.square().sum(-1),
            "l1": difference.abs().sum(-1),
            "cosine": 1 - torch.cosine_similarity(a[:, None], c[None], dim=-1),
            "contrastive": -torch.softmax((a[:, None] * c[None]).sum(-1) / 0.7, dim=1).log(),
        }[cost]
        want = soft_dtw_from_cost(pairs[None], gamma=0.3, backend="reference")
        same(value[b], want[0].detach())
        for got, padded in zip(torch.autograd.grad(want.sum(), (a, c)), gradients):
            same(padded[b, : len(got)], got)
            assert (padded[b, len(got) :] == 0).all()


def test_sqeuclidean_survives_a_common_offset() -> None:
    """|x|^2 + |y|^2 - 2 x.y alone would lose the distances here."""
    x, y = random(2, 9, 16).float(), random(2, 7, 16, seed=1).float()
    # 1024 and multiples of 1/8 add up without rounding
    x, y = (x * 8).round() / 8, (y * 8).round() / 8
    assert torch.equal(soft_dtw(x + 1024, y + 1024), soft_dtw(x, y))


class _LargestTensor(TorchDispatchMode):
    """Of all that come up, views of ``known`` ones aside."""

    nbytes = 0

    def __init__(self, *known: Tensor) -> None:
        super().__init__()
        self.known = {t.untyped_storage().data_ptr() for t in known}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, Tensor) and t.untyped_storage().data_ptr() not in self.known:
                self.nbytes = max(self.nbytes, t.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize("cost", COSTS)
def test_no_cost_expands_the_features(cost: str) -> None:
    x, y = random(2, 20, 64).requires_grad_(), random(2, 10, 64).requires_grad_()
    with _LargestTensor() as seen:
        soft_dtw(x, y, cost=cost).sum().backward()
    assert seen.nbytes < 8 * 2 * 20 * 10 * 64 / 2


def test_features_in_blocks_are_the_reference_whatever_the_block(monkeypatch) -> None:
    n, m = ragged(7, 19, 11)
    gamma = torch.linspace(0.5, 1.5, 7).double().requires_grad_()
    drop = (random(7, 19, seed=3).abs() + 0.3).requires_grad_()
    for cost in COSTS:
        results = []
        for backend, block in (("reference", None), ("cpu", 1), ("cpu", 2 * 8 * 19 * 11), ("cpu", 1 << 30)):
            monkeypatch.setattr(features, "BLOCK_BYTES", block)
            x, y = random(7, 19, 5).requires_grad_(), random(7, 11, 5, seed=1).requires_grad_()
            with torch.no_grad():  # padding may hold anything
                x[n[:, None] <= torch.arange(19)] = math.nan
                y[m[:, None] <= torch.arange(11)] = math.nan
            value = soft_dtw(x, y, n, m, cost=cost, gamma=gamma, drop_cost=drop, backend=backend)
            sources = (x, y, gamma, drop)
            results.append((value.detach(), *torch.autograd.grad(value @ torch.arange(1.0, 8).double(), sources)))
        for got in results[1:]:
            for a, b in zip(got, results[0]):
                torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)
        for a, b in zip(results[1], results[3]):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("band", [None, 2, "windows"])
def test_features_in_pieces_of_rows_are_the_reference(monkeypatch, cost: str, band: int | str | None) -> None:
    """Equal lengths too, which are multiplied together, and a windowless row in the middle of a gap."""
    monkeypatch.setattr(features, "ROWS", 4)
    n, m = torch.tensor([19, 19, 12, 1]), torch.tensor([11, 11, 7, 5])
    if band == "windows":
        middle = torch.arange(19) * 11 // 19
        band = ((middle - 3).expand(4, 19), (middle + 3).expand(4, 19).clone())
        band[1][3, 0] = 4  # all columns of the pair of one row
        band[1][2] = -1  # a pair without a path
    results = []
    for backend in ("reference", "cpu"):
        x, y = random(4, 19, 5).requires_grad_(), random(4, 11, 5, seed=1).requires_grad_()
        value = soft_dtw(x, y, n, m, cost=cost, gamma=0.5, band=band, backend=backend)
        results.append((value.detach(), *torch.autograd.grad(value[value.isfinite()].sum(), (x, y))))
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


def test_features_outside_the_band_and_of_padding_are_not_multiplied() -> None:
    x, y = random(2, 600, 8).float().requires_grad_(), random(2, 600, 8, seed=1).float().requires_grad_()

    def flops(band: int | None, n: int) -> int:
        lengths = torch.tensor([n, n])
        with FlopCounterMode(display=False) as counter:
            soft_dtw(x, y, lengths, lengths, cost="cosine", gamma=0.5, band=band).sum().backward()
        return counter.get_total_flops()

    assert flops(None, 600) == 3 * 2 * 2 * 600 * 600 * 8
    assert flops(None, 300) == flops(None, 600) / 4
    assert flops(10, 600) < flops(None, 600) * 0.6  # pieces of 256 rows


@pytest.mark.parametrize("cost", ["cosine", "contrastive"])
def test_frozen_features_keep_nothing_for_their_gradient(cost: str) -> None:
    x, y, gamma = random(2, 9, 4), random(2, 7, 4, seed=1), torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    drop, kept = torch.full((2, 9), 0.7, dtype=torch.float64, requires_grad=True), []
    results = []
    for backend in ("cpu", "reference"):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
            value = soft_dtw(x, y, cost=cost, gamma=gamma, drop_cost=drop, backend=backend)
        if backend == "cpu":
            assert max(kept) <= x.numel() < 2 * 9 * 7  # no matrix of pairs
        results.append(torch.autograd.grad(value.sum(), (gamma, drop)))
    for got, want in zip(*results):
        same(got, want)


def test_features_are_multiplied_where_they_lie() -> None:
    x, y = random(8, 50, 400).float().requires_grad_(), random(8, 30, 400, seed=1).float().requires_grad_()
    lengths = ragged(8, 50, 30)
    with _LargestTensor(x, y) as seen:
        soft_dtw(x, y, *lengths, cost="contrastive", gamma=0.5)
    assert seen.nbytes <= 8 * 50 * 30 * 4 * 1.7  # costs, or the shares of rows in eights, each with 14 steps more


def test_features_never_hold_the_cost_of_the_whole_batch(monkeypatch) -> None:
    monkeypatch.setattr(features, "BLOCK_BYTES", 1 << 20)
    x, y = random(64, 200, 8).float().requires_grad_(), random(64, 100, 8).float().requires_grad_()
    with _LargestTensor() as seen:
        soft_dtw(x, y, gamma=0.5).sum().backward()
    assert seen.nbytes < 64 * 200 * 100 * 4 / 2


@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("gamma", [0.7, 0.0])
def test_derivatives_in_the_features(cost: str, gamma: float) -> None:
    x, y, lengths = random(2, 5, 3).requires_grad_(), random(2, 4, 3, seed=1).requires_grad_(), ragged(2, 5, 4)

    def loss(x: Tensor, y: Tensor, backend: str | None = None) -> Tensor:
        return soft_dtw(x, y, *lengths, cost=cost, gamma=gamma, band=1, backend=backend)

    assert gradcheck(loss, (x, y))
    assert gradgradcheck(loss, (x, y))
