"""soft_dtw from features on a GPU: costs, gradients and what only a GPU can show."""

from __future__ import annotations

import math

import pytest
import torch
from soft_dtw_oracles import ragged, random
from torch import Tensor

import lyra_ops

pytestmark = pytest.mark.gpu

BFLOAT, HALF, FLOAT = torch.bfloat16, torch.float16, torch.float32


def results(x: Tensor, y: Tensor, *lengths: Tensor, drop: Tensor | None = None, **options) -> tuple[Tensor, ...]:
    """Value and gradients in x, y and drop."""
    leaves = [t.detach().clone().requires_grad_() for t in (x, y, drop) if t is not None]
    extra = {} if drop is None else {"drop_cost": leaves[2]}
    value = lyra_ops.soft_dtw(*leaves[:2], *lengths, **extra, **options)
    return value.detach(), *torch.autograd.grad(value.sum(), leaves)


def tokens(batch: int, rows: int, columns: int, dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    common = random(batch, 1, dim, seed=4)
    return tuple(
        ((random(batch, size, dim, seed=seed) + common) / dim**0.5).to(dtype)
        for seed, size in enumerate((rows, columns))
    )


def relative_error(got: Tensor, want: Tensor) -> float:
    return float((got.cpu().double() - want).norm() / want.norm().clamp(min=torch.finfo(torch.float64).tiny))


COSTS = ["sqeuclidean", "cosine", "contrastive"]


@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", [BFLOAT, HALF, FLOAT])
@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize(("rows", "columns", "dim", "band", "drop"), [(70, 33, 64, None, False), (40, 80, 37, 4, True)])
def test_small_calls_are_right(cost, dtype, rows, columns, dim, band, drop):
    check(cost, dtype, rows, columns, dim, band, drop)


@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize(
    ("rows", "columns", "dim", "band", "drop"),
    [
        (1, 1, 3, None, False),
        (130, 200, 577, None, True),
        (40, 300, 136, None, False),
        (300, 150, 3584, 4, False),
        (150, 300, 72, 20, True),
        (90, 130, 40, "windows", True),
    ],
)
def test_every_kind_of_call_is_right(cost, rows, columns, dim, band, drop):
    check(cost, BFLOAT, rows, columns, dim, band, drop)


def check(cost, dtype, rows, columns, dim, band, drop) -> None:
    lengths = ragged(3, rows, columns)
    x, y = tokens(3, rows, columns, dim, dtype)
    drop = random(3, rows, seed=7).abs().float() if drop else None
    if band == "windows":
        middle = torch.arange(rows) * ((lengths[1] - 1.0) / (lengths[0] - 1).clamp(min=1))[:, None]
        band = (middle - 12).long(), (middle + 12).long()
    options = {"cost": cost, "gamma": 0.2, "temperature": 0.3 if cost == "contrastive" else 1.0}
    wide = None if drop is None else drop.double()
    exact = results(x.double(), y.double(), *lengths, drop=wide, band=band, backend="reference", **options)
    for given, counts in zip((x, y), lengths):
        for b, count in enumerate(counts):
            given[b, count:] = math.nan
    on_device = tuple(t.cuda() for t in band) if isinstance(band, tuple) else band
    moved = x.cuda(), y.cuda(), *(n.cuda() for n in lengths)
    got = results(*moved, drop=None if drop is None else drop.cuda(), band=on_device, backend="cuda", **options)
    assert relative_error(got[0], exact[0]) <= 1e-5
    for ours, truth in zip(got[1:], exact[1:]):
        assert relative_error(ours, truth) <= 2e-4 + 1.1 * relative_error(truth.to(ours.dtype), truth)


@pytest.mark.parametrize("cost", COSTS)
def test_bitwise_the_same_each_time_and_alone_or_in_a_batch(cost):
    x, y = (t.cuda() for t in tokens(32, 300, 150, 264, BFLOAT))
    lengths = tuple(n.cuda() for n in ragged(32, 300, 150))
    first = results(x, y, *lengths, cost=cost)
    for _ in range(10):
        assert all(torch.equal(a, b) for a, b in zip(results(x, y, *lengths, cost=cost), first))
    for b in (0, 31):
        n, m = (int(counts[b]) for counts in lengths)
        alone = results(x[b : b + 1, :n], y[b : b + 1, :m], cost=cost)
        assert torch.equal(alone[0][0], first[0][b])
        assert torch.equal(alone[1][0], first[1][b, :n])
        assert torch.equal(alone[2][0], first[2][b, :m])


def test_takes_strided_tokens_as_they_are():
    wide = torch.randn(4, 90, 3, 72, device="cuda", dtype=BFLOAT)
    x, y = wide[:, :, 1, :65], wide[:, 10:50, 2, 3:68]  # rows aligned with a tail, rows not aligned
    want = results(x.contiguous(), y.contiguous(), cost="contrastive")
    assert all(torch.equal(a, b) for a, b in zip(results(x, y, cost="contrastive"), want))


def test_never_waits_for_the_gpu_and_can_be_captured_in_a_graph():
    x, y = (t.cuda().requires_grad_() for t in tokens(4, 90, 70, 64, BFLOAT))
    lengths = tuple(n.cuda() for n in ragged(4, 90, 70))

    def step() -> tuple[Tensor, ...]:
        value = lyra_ops.soft_dtw(x, y, *lengths, cost="contrastive", gamma=0.1, band=20)
        return value.detach(), *torch.autograd.grad(value.sum(), (x, y))

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        x.copy_(torch.randn_like(x))
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, step()))


@pytest.mark.parametrize("cost", COSTS)
def test_second_derivatives_are_right(cost):
    given = [t.float() for t in tokens(2, 20, 15, 12, FLOAT)]
    along = [random(*t.shape, seed=9) for t in given]

    def second(device: str, dtype: torch.dtype, backend: str) -> tuple[Tensor, ...]:
        leaves = [t.to(device, dtype).requires_grad_() for t in given]
        value = lyra_ops.soft_dtw(*leaves, cost=cost, backend=backend)
        first = torch.autograd.grad(value.sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum((a.to(device, dtype) * g).sum() for a, g in zip(along, first)), leaves)

    for ours, truth in zip(second("cuda", FLOAT, "cuda"), second("cpu", torch.float64, "reference")):
        assert relative_error(ours, truth) <= 1e-3


def test_a_band_limits_the_memory_of_costs_too():
    x, y = (torch.randn(1, 16384, 64, device="cuda", dtype=BFLOAT, requires_grad=True) for _ in range(2))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    lyra_ops.soft_dtw(x, y, band=64).sum().backward()
    cells = 16384 * 129
    assert torch.cuda.max_memory_allocated() - before <= 40 * cells  # the matrix alone would take 4 * 16384^2


def test_the_raw_ops_keep_to_their_schemas():
    # Full lengths and no band: so there is no part of the kept costs that nobody writes and nobody reads.
    x, y = (t.cuda() for t in tokens(3, 50, 40, 24, BFLOAT))
    lengths = tuple(torch.full((3,), size, device="cuda") for size in (50, 40))
    forward, backward = torch.ops.lyra.soft_dtw_features_forward, torch.ops.lyra.soft_dtw_features_backward
    for cost in COSTS:
        given = x, y, *lengths, cost, 0.5, 0.1, None, -1, None, None, None, 16
        torch.library.opcheck(forward.default, given)
        rest = x, y, *lengths, cost, 0.5, -1, None, None, False, True, True, True
        torch.library.opcheck(backward.default, (torch.ones(3, device="cuda"), *forward(*given), *rest))
