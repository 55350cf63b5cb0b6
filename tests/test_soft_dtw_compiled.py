"""The compiled soft-DTW: its error against plain torch, what must not change a bit of it, and its place in torch."""

from __future__ import annotations

import math
import platform
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from soft_dtw_oracles import COMPILED, assert_gradient_close, device_of, looped, poisoned, ragged, random
from torch import Tensor

import lyra_ops
from lyra_ops import soft_dtw, soft_dtw_from_cost
from lyra_ops.soft_dtw import reference
from lyra_ops.testing import assert_within_reference_error

STORE = {torch.float32: 16, torch.float64: 64}


def forward(cost: Tensor, *lengths: Tensor, gamma: float = 1.0, band: int = -1, drop: Tensor | None = None) -> tuple:
    return torch.ops.lyra.soft_dtw_forward(
        cost, *lengths, gamma, None, band, None, None, drop, STORE.get(cost.dtype, 16)
    )


def backward(grad_value: Tensor, value: Tensor, probs: Tensor, *lengths: Tensor, shape, band: int = -1, drop=False):
    return torch.ops.lyra.soft_dtw_backward(
        grad_value, value, probs, *lengths, *shape, band, None, None, drop, False, False
    )


def squared_distances(batch: int, rows: int, columns: int, dim: int = 64) -> Tensor:
    return torch.cdist(random(batch, rows, dim), random(batch, columns, dim, seed=1)).square()


def contrastive(batch: int, rows: int, columns: int, dim: int = 64) -> Tensor:
    """The regularizer's cost at its published temperature, on features whose dot products have unit variance."""
    x, y = random(batch, rows, dim) / dim**0.25, random(batch, columns, dim, seed=1) / dim**0.25
    lengths = torch.full((batch,), rows), torch.full((batch,), columns)
    return reference.pair_cost(x, y, *lengths, "contrastive", 0.06)


def one_closed_column(batch: int, rows: int, columns: int) -> Tensor:
    cost = squared_distances(batch, rows, columns)
    cost[:, 1:-1, columns // 2] = math.inf
    return cost


def value_and_gradient(cost: Tensor, *lengths: Tensor, **kwargs) -> tuple[Tensor, Tensor]:
    cost = cost.clone().requires_grad_()
    value = soft_dtw_from_cost(cost, *lengths, **kwargs)
    weights = 1 + torch.arange(len(value), device=value.device, dtype=value.dtype)  # a backward per sample of its own
    (gradient,) = torch.autograd.grad(value @ weights if len(value) else value.sum(), cost)
    return value.detach(), gradient


STRESS = [
    pytest.param(squared_distances, (3, 300, 64), 10.0, None, id="300x64-10"),
    pytest.param(squared_distances, (3, 300, 64), 1.0, None, id="300x64-1"),
    pytest.param(squared_distances, (3, 300, 64), 0.1, None, id="300x64-.1"),
    pytest.param(squared_distances, (3, 64, 300), 0.01, None, id="64x300-.01"),
    pytest.param(squared_distances, (1, 1500, 200), 1.0, None, id="1500x200-1"),
    pytest.param(squared_distances, (1, 1500, 200), 0.1, 20, id="1500x200-.1-band"),
    pytest.param(contrastive, (2, 300, 64), 0.1, None, id="contrastive-300x64"),
    pytest.param(contrastive, (1, 1500, 200), 0.1, None, id="contrastive-1500x200"),
    pytest.param(lambda *s: random(*s).abs(), (3, 60, 41), 1.0, None, id="cost-like-gamma"),
    pytest.param(squared_distances, (2, 60, 41), 1e-4, None, id="tiny-gamma"),
    pytest.param(squared_distances, (2, 60, 41), 1e4, None, id="huge-gamma"),
    pytest.param(lambda *s: 1e4 * squared_distances(*s), (2, 60, 41), 1e-4, None, id="exponents-beyond-32-bits"),
    pytest.param(lambda *s: -squared_distances(*s), (2, 60, 41), 1.0, 5, id="negative"),
    pytest.param(lambda *s: random(*s).new_zeros(s), (2, 40, 40), 1.0, None, id="ties"),
    pytest.param(one_closed_column, (2, 60, 41), 1.0, None, id="infinite-column"),
    pytest.param(squared_distances, (9, 33, 65), 1.0, None, id="9x33x65"),
    pytest.param(squared_distances, (17, 1, 7), 1.0, 0, id="one-row"),
    pytest.param(squared_distances, (8, 7, 1), 1.0, 0, id="one-column"),
]


@pytest.mark.parametrize("backend", COMPILED)
@pytest.mark.parametrize(("make", "shape", "gamma", "band"), STRESS)
def test_float32_value_is_as_right_as_plain_torch(make, shape, gamma: float, band: int | None, backend: str) -> None:
    lengths = ragged(*shape)
    cost = poisoned(make(*shape).float(), *lengths)  # rounded first: all three compute the same pair
    exact = value_and_gradient(cost.double(), *lengths, gamma=gamma, band=band, backend="reference")
    plain = value_and_gradient(cost, *lengths, gamma=gamma, band=band, backend="reference")
    on = [t.to(device_of(backend)) for t in (cost, *lengths)]
    for bits in (16, 8):
        got = value_and_gradient(*on, gamma=gamma, band=band, bits=bits, backend=backend)
        assert_within_reference_error(got[0], plain[0], exact[0], name="value")
        assert_gradient_close(got[1], exact[1], bits)
        assert (got[1].cpu()[cost.isnan()] == 0).all()


@pytest.mark.parametrize("backend", COMPILED)
@pytest.mark.parametrize("gamma", [10.0, 0.1, 0.01])
def test_float64_error_is_that_of_plain_torch(gamma: float, backend: str) -> None:
    cost = squared_distances(1, 60, 41)
    got = value_and_gradient(cost.to(device_of(backend)), gamma=gamma, backend=backend)
    plain = value_and_gradient(cost, gamma=gamma, backend="reference")
    for name, a, b, exact in zip(("value", "gradient"), got, plain, looped(cost[0], gamma)):
        assert_within_reference_error(a[0], b[0], exact, name=name)


def value_and_gradients(cost: Tensor, gamma: Tensor, *lengths: Tensor, **kwargs) -> tuple[Tensor, ...]:
    cost, gamma = cost.clone().requires_grad_(), gamma.clone().requires_grad_()
    value = soft_dtw_from_cost(cost, *lengths, gamma=gamma, **kwargs)
    weights = 1 + torch.arange(len(value), device=value.device, dtype=value.dtype)
    return value.detach(), *torch.autograd.grad(value @ weights, (cost, gamma))


@pytest.mark.parametrize("backend", COMPILED)
@pytest.mark.parametrize(("make", "shape", "gamma", "band"), STRESS)
def test_gamma_per_pair_is_as_right_as_plain_torch(make, shape, gamma, band, backend: str) -> None:
    lengths = ragged(*shape)
    cost = poisoned(make(*shape).float(), *lengths)
    gammas = gamma * torch.linspace(1, 2, shape[0])
    exact = value_and_gradients(cost.double(), gammas.double(), *lengths, band=band, backend="reference")
    plain = value_and_gradients(cost, gammas, *lengths, band=band, backend="reference")
    on = [t.to(device_of(backend)) for t in (cost, gammas, *lengths)]
    got = value_and_gradients(*on, band=band, backend=backend)
    assert_within_reference_error(got[0], plain[0], exact[0], name="value")
    assert_gradient_close(got[1], exact[1])
    assert (got[2].cpu() - exact[2]).norm() <= 1e-2 * exact[2].norm() + 1e-6  # the entropy of rounded shares


@pytest.mark.parametrize("backend", COMPILED)
def test_gamma_of_a_pair_without_a_path_and_of_one_with_nan(backend: str) -> None:
    cost, gamma = random(3, 5, 4).to(device_of(backend)), torch.ones(3, dtype=torch.float64, device=device_of(backend))
    cost[0, 2], cost[1, 2, 2] = math.inf, math.nan
    value, gradient, slope = value_and_gradients(cost, gamma, backend=backend)
    assert value[0] == math.inf
    assert (gradient[0] == 0).all()
    assert slope[0] == 0
    assert value[1].isnan()
    assert slope[1].isnan()
    assert gradient[2].isfinite().all()
    assert slope[2] < 0


@pytest.mark.parametrize("backend", COMPILED)
def test_gamma_per_pair_and_windows_compile_as_one_graph(backend: str) -> None:
    on = device_of(backend)
    cost, gamma = random(2, 9, 7).to(on), torch.tensor([0.5, 2.0], dtype=torch.float64, device=on)
    band = torch.zeros(2, 9, dtype=torch.int64, device=on), torch.full((2, 9), 6, device=on)

    def loss(cost: Tensor, gamma: Tensor) -> Tensor:
        return soft_dtw_from_cost(cost, gamma=gamma, band=band, backend=backend).sum()

    results = []
    for run in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        leaves = cost.clone().requires_grad_(), gamma.clone().requires_grad_()
        results.append((run(*leaves).detach(), *torch.autograd.grad(run(*leaves), leaves)))
    for a, b in zip(*results):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", COMPILED)
def test_float64_costs_come_back_as_float64(backend: str) -> None:
    cost = random(2, 5, 4).to(device_of(backend))
    assert {t.dtype for t in value_and_gradient(cost, backend=backend)} == {torch.float64}
    assert {t.dtype for t in value_and_gradient(cost.float(), backend=backend)} == {torch.float32}


@pytest.mark.parametrize("backend", COMPILED)
@pytest.mark.parametrize("mask", [1e30, torch.finfo(torch.float32).max])
def test_a_prohibitive_cost_closes_a_cell(mask: float, backend: str) -> None:
    cost = squared_distances(2, 30, 20).float().to(device_of(backend))
    closed = torch.rand(30, 20, generator=torch.Generator().manual_seed(0)).to(cost.device) < 0.2
    closed[0, 0] = closed[-1, -1] = False
    # A gamma that spreads the paths: shares of 0 and 1 would hide a weight that rounding leaves over.
    got = value_and_gradient(cost.masked_fill(closed, mask), gamma=30.0, backend=backend)
    want = value_and_gradient(cost.masked_fill(closed, math.inf), gamma=30.0, backend=backend)
    for a, b in zip(got, want):
        assert torch.equal(a, b)
    assert (got[1][:, closed] == 0).all()


sizes = st.integers(1, 40)
pairs = st.tuples(sizes, sizes, st.integers(0, 2**31), st.sampled_from([1e-3, 0.1, 1.0, 30.0]))
dtypes = st.sampled_from([torch.float32, torch.float64])
bands = st.one_of(st.none(), st.integers(0, 20))
many = settings(max_examples=40, deadline=None, derandomize=True)


@given(pair=pairs, dtype=dtypes, band=bands)
@many
def test_every_path_crosses_every_antidiagonal_cut_once(pair, dtype, band) -> None:
    """E of a diagonal, plus what steps diagonally over it, is all the mass there is; and there is none below zero."""
    n, m, seed, gamma = pair
    cost = random(1, n, m, seed=seed, dtype=dtype).square()
    lengths = torch.tensor([n]), torch.tensor([m])
    value, probs = forward(cost, *lengths, gamma=gamma, band=-1 if band is None else band)
    expected = backward(
        torch.ones_like(value), value, probs, *lengths, shape=(n, m), band=-1 if band is None else band
    )[0][0].double()
    stepping = expected * diagonal_shares(probs[0], reference.inside_band(*lengths, n, m, band)[0], dtype)
    i, j = torch.meshgrid(torch.arange(n), torch.arange(m), indexing="ij")
    for k in range(n + m - 1):
        mass = expected[i + j == k].sum() + stepping[i + j == k + 1].sum()
        assert mass.item() == pytest.approx(1, abs=8 * (n + m) * torch.finfo(dtype).eps)
    assert (expected >= 0).all()


def diagonal_shares(record: Tensor, inside: Tensor, dtype: torch.dtype) -> Tensor:
    """(n, m) from the records of the CPU kernel, laid out as csrc/soft_dtw/cpu/records.h says."""
    lanes, skew, size = 8, 2, 16 if dtype == torch.float64 else 4
    shares, at = torch.zeros(inside.shape, dtype=torch.float64), 0
    for row in range(0, len(inside), lanes):
        stripe = inside[row : row + lanes]
        steps = stripe.nonzero() @ torch.tensor([skew, 1])  # of the lanes' cells
        count = int(steps.max() - steps.min()) + 1
        words = record[at : at + count * lanes * size].view(count, lanes * size)
        if dtype == torch.float64:
            found = words[:, : lanes * 8].contiguous().view(torch.float64)
        else:
            found = (words.contiguous().view(torch.int32) & 65535).double() / 65535
        lane, column = stripe.nonzero().T
        shares[row + lane, column] = found[steps - steps.min(), lane]
        at += count * lanes * size
    return shares


@pytest.mark.parametrize("backend", COMPILED)
@given(data=st.data(), batch=st.integers(1, 20), pair=pairs, dtype=dtypes, band=bands)
@many
def test_a_pair_is_the_same_alone_in_any_order_and_with_any_padding(backend, data, batch, pair, dtype, band) -> None:
    rows, columns, seed, gamma = pair
    lengths = ragged(batch, rows, columns, seed=seed)
    cost = poisoned(random(batch, rows, columns, seed=seed, dtype=dtype), *lengths).to(device_of(backend))
    cost[0] *= data.draw(st.sampled_from([1.0, 1e8]))  # one that may need wider exponents than its neighbours
    lengths = [t.to(cost.device) for t in lengths]
    kwargs = {"gamma": gamma, "band": band, "backend": backend}
    value, expected = (
        soft_dtw_from_cost(cost, *lengths, **kwargs),
        lyra_ops.soft_dtw_alignment(cost, *lengths, **kwargs),
    )
    order = torch.tensor(data.draw(st.permutations(range(batch))), device=cost.device)
    assert torch.equal(soft_dtw_from_cost(cost[order], *(t[order] for t in lengths), **kwargs), value[order])
    b = data.draw(st.integers(0, batch - 1))
    n, m = lengths[0][b].item(), lengths[1][b].item()
    alone = cost[b : b + 1, :n, :m]
    assert torch.equal(soft_dtw_from_cost(alone, **kwargs), value[b : b + 1])
    assert torch.equal(lyra_ops.soft_dtw_alignment(alone, **kwargs)[0], expected[b, :n, :m])


@pytest.mark.parametrize("backend", COMPILED)
@given(pair=pairs, dtype=dtypes, power=st.integers(-20, 20))
@many
def test_a_power_of_two_scales_exactly(backend: str, pair, dtype, power: int) -> None:
    n, m, seed, gamma = pair
    cost = random(2, n, m, seed=seed, dtype=dtype).to(device_of(backend))
    value, expected = value_and_gradient(cost, gamma=gamma, backend=backend)
    scaled = value_and_gradient(cost * 2.0**power, gamma=gamma * 2.0**power, backend=backend)
    assert torch.equal(scaled[0], value * 2.0**power)
    assert torch.equal(scaled[1], expected)


@pytest.mark.parametrize("backend", COMPILED)
@given(pair=pairs, dtype=dtypes)
@many
def test_value_is_the_same_transposed(backend: str, pair, dtype) -> None:
    n, m, seed, gamma = pair
    cost = random(2, n, m, seed=seed, dtype=dtype).to(device_of(backend))
    value = soft_dtw_from_cost(cost, gamma=gamma, backend=backend)
    assert torch.equal(soft_dtw_from_cost(cost.mT, gamma=gamma, backend=backend), value)


@pytest.mark.parametrize("backend", COMPILED)
@pytest.mark.parametrize("turn", [lambda t: t.mT, lambda t: t.flip(1, 2)], ids=["transposed", "reversed"])
def test_alignment_turns_with_the_cost(turn, backend: str) -> None:
    cost = squared_distances(2, 60, 41).float()
    exact = lyra_ops.soft_dtw_alignment(cost.double(), backend="reference")
    assert_gradient_close(turn(lyra_ops.soft_dtw_alignment(turn(cost).to(device_of(backend)), backend=backend)), exact)


@pytest.mark.parametrize("backend", COMPILED)
def test_a_wide_band_is_no_band(backend: str) -> None:
    cost, lengths = random(5, 20, 30).float(), ragged(5, 20, 30)
    on = [t.to(device_of(backend)) for t in (cost, *lengths)]
    free = value_and_gradient(*on, backend=backend)
    for band in (30, 2**62):
        for a, b in zip(value_and_gradient(*on, band=band, backend=backend), free):
            assert torch.equal(a, b)


@pytest.mark.parametrize(("bits", "dropping", "most"), [(16, False, 5), (8, False, 2.5), (16, True, 7.5)])
def test_backward_keeps_a_few_bytes_per_cell_of_the_band(bits: int, dropping: bool, most: float) -> None:
    n, w = 2048, 128
    cost = random(1, n, n, dtype=torch.float32).requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        value = soft_dtw_from_cost(cost, band=w, bits=bits, drop_cost=1.0 if dropping else None, backend="cpu")
    ours = sum(t.nbytes for t in kept if t.data_ptr() != cost.data_ptr())
    cells = int(reference.inside_band(torch.tensor([n]), torch.tensor([n]), n, n, w).sum())
    assert ours <= most * cells
    assert torch.autograd.grad(value.sum(), cost)[0].isfinite().all()


def test_without_a_band_the_gradient_is_kept_instead_of_shares() -> None:
    cost = random(3, 300, 64, dtype=torch.float32).requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        value = soft_dtw_from_cost(cost, backend="cpu")
    assert sum(t.nbytes for t in kept if t.data_ptr() != cost.data_ptr()) <= cost.nbytes + 100
    (gradient,) = torch.autograd.grad(value.sum(), cost)
    assert gradient.data_ptr() in [t.data_ptr() for t in kept]  # turned into the result where it lay


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("dropping", [False, True])
@pytest.mark.parametrize("band", [-1, 3, "windows"])
@pytest.mark.parametrize("batch", [5, 1])  # threads share the batch, or the pair
def test_forward_and_backward_at_once_are_those_two(batch: int, band: int | str, dropping: bool, dtype) -> None:
    n, m = 41, 23
    lengths, drop, low, high = ragged(batch, n, m), None, None, None
    cost = poisoned(random(batch, n, m).to(dtype), *lengths)
    cost[0, 1, 1] = 1e30  # a pair that needs wider exponents
    if batch > 1:
        cost[1, 0] = math.inf
        cost[2, 0, 0] = math.nan
    if dropping:
        drop = random(batch, n, seed=1).abs().to(dtype)
    if band == "windows":
        band, low = -1, (torch.arange(n) * m // n - 4).expand(batch, n).contiguous()
        high = low + 9
    gammas = torch.linspace(0.2, 1, batch)
    for store in (64,) if dtype == torch.float64 else (16, 8):
        value, probs = torch.ops.lyra.soft_dtw_forward(cost, *lengths, 1.0, gammas, band, low, high, drop, store)
        rest = *lengths, n, m, band, low, high, dropping, False, True
        want = value, *torch.ops.lyra.soft_dtw_backward(torch.ones_like(value), value, probs, *rest)
        arguments = cost, *lengths, 1.0, gammas, band, low, high, drop, store, True
        for a, b in zip(torch.ops.lyra.soft_dtw_gradient(*arguments), want, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
        torch.library.opcheck(torch.ops.lyra.soft_dtw_gradient, arguments, test_utils="test_faketensor")
    with pytest.raises(RuntimeError, match="store: got 0"):
        torch.ops.lyra.soft_dtw_gradient(*arguments[:-2], 0, True)


@pytest.mark.parametrize(
    ("kind", "batch"),  # of 3, threads share the batch, of 1 the pair
    [(kind, 1) for kind in ("plain", "wide", "float64", "hard", "dropping", "band", "windows")] + [("plain", 3)],
)
def test_long_pairs_whose_shares_are_made_twice_are_those_whose_shares_are_kept(kind: str, batch: int) -> None:
    dtype, store = (torch.float64, 64) if kind == "float64" else (torch.float32, 16)
    n, m = (2203, 2000) if kind == "float64" else (6301, 4100) if kind in ("band", "windows") else (4301, 4100)
    lengths = torch.full((batch,), n - 1), torch.full((batch,), m - 2)
    cost, drop, low, high = random(batch, n, m).to(dtype), None, None, None
    cost[:, n // 2, m // 2] = 1e30 if kind == "wide" else math.inf
    if kind == "dropping":
        drop = random(batch, n, seed=1).abs().to(dtype)
    if kind == "windows":
        low = (torch.arange(n) * m // n - 2050).expand(batch, n).contiguous()
        high = low + 4100
    gamma, band = 0.0 if kind == "hard" else 0.3, 3000 if kind == "band" else -1
    value, probs = torch.ops.lyra.soft_dtw_forward(cost, *lengths, gamma, None, band, low, high, drop, store)
    assert probs.shape[1] > 2**26  # a long pair: csrc/soft_dtw/cpu/pair.h
    rest = *lengths, n, m, band, low, high, drop is not None, gamma == 0, True
    want = value, *torch.ops.lyra.soft_dtw_backward(torch.ones_like(value), value, probs, *rest)
    got = torch.ops.lyra.soft_dtw_gradient(cost, *lengths, gamma, None, band, low, high, drop, store, True)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def test_a_long_pair_takes_little_more_memory_than_its_gradient() -> None:
    n = 4200
    code = f"""
import resource, torch
from lyra_ops.soft_dtw import soft_dtw_from_cost
cost = torch.rand(2, {n}, {n})
soft_dtw_from_cost(cost[:, :64, :64].requires_grad_()).sum().backward()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
soft_dtw_from_cost(cost[:1].requires_grad_()).sum().backward()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    peak = int(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout) * 1024
    assert peak - 4 * n * n < n * n  # the shares alone would take 4 n^2


@pytest.mark.parametrize(("dtype", "store"), [(torch.float32, 16), (torch.float32, 8), (torch.float64, 64)])
@pytest.mark.parametrize("gamma", [1.0, 0.05, 0.0])
@pytest.mark.parametrize(
    ("n", "m", "padding"),
    [(9, 8, 3), (16, 22, 3), (17, 23, 0), (41, 24, 3), (40, 64, 0), (33, 65, 3), (24, 256, 0)],
)
def test_large_batches_whose_rows_follow_without_a_gap_are_small_ones(n, m, padding, gamma, dtype, store) -> None:
    batch, parts = 20, 5
    x_lengths, y_lengths = ragged(batch, n, m)
    x_lengths[4:8], y_lengths[8:12] = n, m
    cost = random(batch, n, m, dtype=dtype).square()
    cost[5, n // 2, 2], cost[6, 3, 1], cost[7, 0, 0] = math.inf, 1e30, math.nan
    cost = torch.cat([poisoned(cost, x_lengths, y_lengths), cost.new_full((batch, n, padding), math.nan)], dim=2)

    def results(cost: Tensor, along: Tensor, *lengths: Tensor) -> tuple[Tensor, ...]:
        options = gamma, None, -1, None, None
        value, probs = torch.ops.lyra.soft_dtw_forward(cost, *lengths, *options, None, store)
        alone, _ = torch.ops.lyra.soft_dtw_forward(cost, *lengths, *options, None, 0)
        kept = torch.ones_like(value), value, probs, *lengths
        rest = *cost.shape[1:], -1, None, None, False, gamma == 0, True
        gradient, _, entropy = torch.ops.lyra.soft_dtw_backward(*kept, *rest)
        at_once = torch.ops.lyra.soft_dtw_gradient(cost, *lengths, *options, None, store, True)
        curvature = torch.ops.lyra.soft_dtw_curvature(*kept, *options, False, along, None, None)
        for a, b in zip((alone, at_once[1], at_once[3]), (value, gradient, entropy), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
        return value, gradient, *curvature[:2], entropy

    given = cost, random(*cost.shape, seed=1, dtype=dtype), x_lengths, y_lengths
    pieces = zip(*(results(*part) for part in zip(*(t.chunk(parts) for t in given))))
    for k, (got, want) in enumerate(zip(results(*given), map(torch.cat, pieces), strict=True)):
        rounding = 1e-6 if k == 4 else 0  # of the entropies, whose sum has another order
        torch.testing.assert_close(got, want, rtol=rounding, atol=rounding, equal_nan=True)


def test_large_batches_may_hold_one_row_many_times() -> None:
    cost = random(20, 1, 24).float().expand(20, 40, 24)
    assert torch.equal(lyra_ops.soft_dtw_alignment(cost), lyra_ops.soft_dtw_alignment(cost.contiguous()))


@pytest.mark.skipif(platform.machine() != "x86_64", reason="results are flushed there alone")
def test_no_gradient_is_slowed_down_by_subnormal_numbers() -> None:
    cost = random(2, 200, 100).square()
    exact, found = lyra_ops.soft_dtw_alignment(cost), lyra_ops.soft_dtw_alignment(cost.float())
    tiny = torch.finfo(torch.float32).tiny
    assert ((exact > 0) & (exact < tiny)).any() and not ((found > 0) & (found < tiny)).any()


@pytest.mark.parametrize(
    ("batch", "n", "m", "options"),
    [
        (40, 150, 70, {}),
        (1, 4096, 300, {}),
        (1, 4096, 300, {"drop_cost": 0.5, "bits": 8}),
        (1, 2500, 2400, {"band": 256}),
    ],
)
def test_threads_change_nothing(batch: int, n: int, m: int, options: dict) -> None:
    """Threads share the batch, or the pair."""
    cost, lengths = random(batch, n, m).float(), ragged(batch, n, m)
    threads = torch.get_num_threads()
    try:
        results = []
        for n in (1, 2):
            torch.set_num_threads(n)
            results.append(value_and_gradient(cost, *lengths, **options, backend="cpu"))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("options", ["plain", "band", "everything"])
def test_opcheck(dtype: torch.dtype, options: str) -> None:
    lengths, store = ragged(3, 6, 5), STORE[dtype]
    gammas, band, low, high, drop = None, 2 if options == "band" else -1, None, None, None
    if options == "everything":
        gammas, drop = torch.rand(3) + 0.5, random(3, 6).to(dtype)
        low, high = torch.zeros(3, 6, dtype=torch.int64), torch.full((3, 6), 4)
    for cost in (random(3, 6, 5).to(dtype), random(3, 5, 12).to(dtype)[:, :, ::2].mT):
        for stored in (0, store):
            arguments = (cost, *lengths, 0.5, gammas, band, low, high, drop, stored)
            torch.library.opcheck(torch.ops.lyra.soft_dtw_forward, arguments)
        value, probs = torch.ops.lyra.soft_dtw_forward(*arguments)
        for grad in (torch.ones_like(value), value.new_ones(()).expand(3)):
            rest = (*lengths, 6, 5, band, low, high, drop is not None, False, gammas is not None)
            torch.library.opcheck(torch.ops.lyra.soft_dtw_backward, (grad, value, probs, *rest))
        torch.library.opcheck(torch.ops.lyra.soft_dtw_gradient, (*arguments, gammas is not None))
        along = random(3, 6, 5, seed=2).to(dtype), None if drop is None else random(3, 6, seed=3).to(dtype), None
        rest = (*lengths, 0.5, gammas, band, low, high, drop is not None, *along)
        torch.library.opcheck(torch.ops.lyra.soft_dtw_curvature, (torch.ones_like(value), value, probs, *rest))


@pytest.mark.parametrize("backend", COMPILED)
def test_compiles_as_one_graph_for_all_sizes(backend: str) -> None:
    device = device_of(backend)

    def loss(x: Tensor, y: Tensor, x_lengths: Tensor, y_lengths: Tensor, name: str | None = None) -> Tensor:
        kwargs = {"cost": "contrastive", "temperature": 0.5, "gamma": 0.1, "band": 3, "backend": name}
        return (soft_dtw(x, y, x_lengths, y_lengths, **kwargs) / x_lengths).mean()

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch, rows, columns in ((3, 9, 5), (4, 12, 7), (5, 30, 8)):
        x, y = random(batch, rows, 6).to(device).requires_grad_(), random(batch, columns, 6, seed=1).to(device)
        lengths = [t.to(device) for t in ragged(batch, rows, columns)]
        got, want = compiled(x, y, *lengths), loss(x, y, *lengths, backend)
        torch.testing.assert_close(got, want)
        (a,), (b,) = torch.autograd.grad(got, x), torch.autograd.grad(want, x)
        torch.testing.assert_close(a, b)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("backend", COMPILED)
def test_inductor_gives_the_same(backend: str) -> None:
    cost, lengths = random(3, 9, 5).to(device_of(backend)), [t.to(device_of(backend)) for t in ragged(3, 9, 5)]
    cost.requires_grad_()

    def loss(cost: Tensor, *lengths: Tensor) -> Tensor:
        return soft_dtw_from_cost(cost, *lengths, gamma=0.3).sum()

    got, want = torch.compile(loss, fullgraph=True, dynamic=True)(cost, *lengths), loss(cost, *lengths)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, cost), torch.autograd.grad(want, cost))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_fake_tensors_keep_device_dtype_and_shape(device: str) -> None:
    with torch._subclasses.FakeTensorMode():
        cost = torch.empty(3, 6, 5, device=device, dtype=torch.float64)
        lengths = torch.empty(3, dtype=torch.int64, device=device)
        value, probs = forward(cost, lengths, lengths)
        gradient = backward(value, value, probs, lengths, lengths, shape=(6, 5))[0]
    assert (value.shape, gradient.shape) == ((3,), (3, 6, 5))
    assert {(t.device.type, t.dtype) for t in (value, gradient)} == {(device, torch.float64)}


def test_memory_can_be_estimated_with_fake_tensors_that_have_lengths() -> None:
    with torch._subclasses.FakeTensorMode():
        cost = torch.empty(3, 6, 5, requires_grad=True)
        lyra_ops.soft_dtw_from_cost(cost, torch.empty(3, dtype=torch.int64), backend="cpu").sum().backward()
        assert cost.grad.shape == cost.shape


@pytest.mark.parametrize("upstream", [[1.0, 1.0, 1.0], [1.0, 1.0, 0.5], [0.0, 1.0, float("nan")]])
def test_upstream_gradients_of_one_and_others(upstream: list[float]) -> None:
    cost, factor = random(3, 6, 5).requires_grad_(), torch.tensor(upstream, dtype=torch.float64)
    got, want = (
        torch.autograd.grad(lyra_ops.soft_dtw_from_cost(cost, backend=name), cost, factor)[0]
        for name in ("cpu", "reference")
    )
    torch.testing.assert_close(got, want, equal_nan=True)


@pytest.mark.parametrize("backend", COMPILED)
def test_the_raw_ops_survive_any_length(backend: str) -> None:
    cost = random(6, 5, 4).to(device_of(backend))
    x_lengths = torch.tensor([5, 0, 6, 3, -(2**62), 5], device=cost.device)
    y_lengths = torch.tensor([4, 4, 4, 2**62, 4, 0], device=cost.device)
    value, probs = forward(cost, x_lengths, y_lengths)
    gradient = backward(torch.ones_like(value), value, probs, x_lengths, y_lengths, shape=(5, 4))[0]
    assert value.isnan().tolist() == [False, True, True, True, True, True]
    assert gradient.isnan().all(dim=(1, 2)).tolist() == [False, True, True, True, True, True]
    assert torch.equal(value[:1], soft_dtw_from_cost(cost[:1], backend=backend))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cost": torch.zeros(2, 3)}, "cost: got shape"),
        ({"cost": torch.zeros(2, 3, 4, dtype=torch.int64)}, "cost: got dtype"),
        ({"x_lengths": torch.ones(3, dtype=torch.int64)}, "x_lengths: got shape"),
        ({"y_lengths": torch.ones(2)}, "y_lengths: got dtype"),
        ({"gamma": -1.0}, "gamma: got -1"),
        ({"gamma": math.nan}, "gamma: got nan"),
        ({"gamma": 1e-320}, "gamma: got"),
        ({"gammas": torch.ones(3)}, "gammas: got shape"),
        ({"gammas": torch.ones(2, dtype=torch.int64)}, "gammas: got dtype"),
        ({"band": -2}, "band: got -2"),
        ({"low": torch.zeros(2, 3, dtype=torch.int64)}, "low, high: got one of them"),
        ({"low": torch.zeros(2, 3), "high": torch.zeros(2, 3)}, "low: got dtype"),
        ({"drop": torch.zeros(2, 4)}, "drop: got shape"),
        ({"drop": torch.zeros(2, 3, dtype=torch.float64)}, "drop: got dtype"),
        ({"store": 64}, "store: got 64"),
    ],
)
def test_the_raw_forward_op_refuses(change, message: str) -> None:
    ones = torch.ones(2, dtype=torch.int64)
    arguments = {"cost": torch.zeros(2, 3, 4), "x_lengths": ones, "y_lengths": ones, "gamma": 1.0, "gammas": None}
    arguments |= {"band": -1, "low": None, "high": None, "drop": None, "store": 16}
    with pytest.raises(RuntimeError, match=message):
        torch.ops.lyra.soft_dtw_forward(**{**arguments, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grad_value": torch.zeros(3)}, "grad_value: got shape"),
        ({"grad_value": torch.zeros(2, dtype=torch.float64)}, "grad_value: got dtype"),
        ({"value": torch.zeros(2, 1)}, "value: got shape"),
        ({"probs": torch.zeros(2, 3, 4)}, "probs: got dtype"),
        ({"probs": torch.zeros(2, 3, dtype=torch.uint8)}, "probs: got shape"),
        ({"rows": 30}, "probs: got shape"),
        ({"rows": -1}, "rows, columns: got -1"),
        ({"x_lengths": torch.ones(3, dtype=torch.int64)}, "x_lengths: got shape"),
    ],
)
def test_the_raw_backward_op_refuses(change, message: str) -> None:
    ones = torch.ones(2, dtype=torch.int64)
    value, probs = forward(torch.zeros(2, 3, 4), ones, ones)
    arguments = {"grad_value": torch.zeros(2), "value": value, "probs": probs, "x_lengths": ones, "y_lengths": ones}
    arguments |= {"rows": 3, "columns": 4, "band": -1, "low": None, "high": None}
    arguments |= {"dropping": False, "hard": False, "with_entropy": False}
    with pytest.raises(RuntimeError, match=message):
        torch.ops.lyra.soft_dtw_backward(**{**arguments, **change})


@pytest.mark.slow  # a pair of more than 2^31 cells; no memory but for those of the band, in a file that is holes else
def test_a_cell_may_be_more_than_2_31_cells_away(tmp_path) -> None:
    n, w, gamma = 46_400, 3, 1.0
    assert n * n > 2**31
    cost = torch.from_file(str(tmp_path / "cost"), shared=True, size=n * n).view(1, n, n)
    rows = torch.full((n, 2 * w + 1), math.inf, dtype=torch.float64)  # column k of row i is cell i, i + k - w
    for k in range(2 * w + 1):
        values = random(n - abs(k - w), seed=k).float()
        cost[0].diagonal(k - w).copy_(values)
        rows[max(w - k, 0) :, k][: len(values)] = values.double()
    above = [math.inf] * w + [0.0] + [math.inf] * (w + 1)  # one row up, of which the first is entered diagonally
    for row in rows.tolist():
        here, left = [], math.inf
        for k, price in enumerate(row):
            least = min(above[k], above[k + 1], left)
            if price < math.inf and least < math.inf:
                ways = sum(math.exp((least - way) / gamma) for way in (above[k], above[k + 1], left))
                left = price + least - gamma * math.log(ways)
            else:
                left = math.inf
            here.append(left)
        above = [*here, math.inf]
    value = soft_dtw_from_cost(cost, gamma=gamma, band=w, backend="cpu")
    assert value.item() == pytest.approx(here[w], rel=1e-6)
