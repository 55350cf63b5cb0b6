"""soft_dtw and its relatives, what a user relies on: the formula, lengths, bands, dropping, derivatives."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from soft_dtw_oracles import BACKENDS, device_of, enumerated, in_band, looped, paths, poisoned, ragged, random, same
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.utils.checkpoint import checkpoint

import lyra_ops
from lyra_ops import backend_of, dtw_path, soft_dtw, soft_dtw_alignment, soft_dtw_from_cost

SMALL = [(1, 1), (1, 4), (4, 1), (3, 5), (5, 4)]


def value_and_gradient(cost: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
    cost = cost.clone().requires_grad_()
    value = soft_dtw_from_cost(cost, *args, **kwargs)
    (gradient,) = torch.autograd.grad(value.sum(), cost)
    return value.detach(), gradient


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("gamma", [10.0, 1.0, 0.05])
@pytest.mark.parametrize(("n", "m"), SMALL)
def test_sums_over_all_paths(n: int, m: int, gamma: float, backend: str) -> None:
    cost = random(1, n, m)
    value, gradient = value_and_gradient(cost.to(device_of(backend)), gamma=gamma, backend=backend)
    want, alignment = enumerated(cost[0], gamma)
    same(value[0], want)
    same(gradient[0], alignment)


@pytest.mark.parametrize("drop", ["float", "rows"])
@pytest.mark.parametrize("gamma", [1.0, 0.05, 0.0])
@pytest.mark.parametrize(("n", "m"), SMALL)
def test_dropping_sums_over_all_paths_of_all_kept_rows(n: int, m: int, gamma: float, drop: str) -> None:
    cost = random(1, n, m)
    drop_cost = random(1, n, seed=1) + 0.3 if drop == "rows" else 0.4
    price = drop_cost[0] if drop == "rows" else [0.4] * n
    value, gradient = value_and_gradient(cost, gamma=gamma, drop_cost=drop_cost)
    want, alignment = enumerated(cost[0], gamma, price)
    same(value[0], want)
    same(gradient[0], alignment)
    same(soft_dtw_alignment(cost, gamma=gamma, drop_cost=drop_cost)[0], alignment)


def test_dropping_at_an_infinite_price_is_plain_soft_dtw() -> None:
    cost, lengths = random(4, 7, 5), ragged(4, 7, 5)
    free = value_and_gradient(cost, *lengths, gamma=0.3, backend="reference")
    dropping = value_and_gradient(cost, *lengths, gamma=0.3, drop_cost=math.inf)
    for a, b in zip(dropping, free):
        same(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dropping", [False, True])
@pytest.mark.parametrize(("n", "m", "gamma"), [(40, 17, 0.1), (17, 40, 5.0), (30, 30, 0.5)])
def test_matches_a_loop_over_the_cells(n: int, m: int, gamma: float, dropping: bool, backend: str) -> None:
    cost, drop = random(1, n, m).square(), random(1, n, seed=1).abs() if dropping else None
    on = {} if drop is None else {"drop_cost": drop.to(device_of(backend))}
    value, gradient = value_and_gradient(cost.to(device_of(backend)), gamma=gamma, backend=backend, **on)
    want, alignment = looped(cost[0], gamma, drop[0] if dropping else None)
    same(value[0], want)
    same(gradient[0], alignment)


@pytest.mark.parametrize("backend", BACKENDS)
def test_matches_tslearn(backend: str) -> None:
    tslearn = pytest.importorskip("tslearn.metrics")
    x, y, (x_lengths, y_lengths) = random(3, 40, 4), random(3, 17, 4, seed=1), ragged(3, 40, 17)
    on = [t.to(device_of(backend)) for t in (x, y, x_lengths, y_lengths)]
    value = soft_dtw(*on, gamma=0.1, backend=backend)
    cost = torch.cdist(x, y).square().to(device_of(backend))
    alignment = soft_dtw_alignment(cost, *on[2:], gamma=0.1, backend=backend).cpu()
    for b, (n, m) in enumerate(zip(x_lengths.tolist(), y_lengths.tolist())):
        expected, want = tslearn.soft_dtw_alignment(x[b, :n].numpy(), y[b, :m].numpy(), gamma=0.1)
        assert value[b].item() == pytest.approx(want, rel=1e-10)
        torch.testing.assert_close(alignment[b, :n, :m], torch.from_numpy(expected), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("backend", BACKENDS)
def test_matches_ddtw(backend: str) -> None:
    ddtw = pytest.importorskip("ddtw")
    x, y, (x_lengths, y_lengths) = random(3, 30, 4), random(3, 30, 4, seed=1), ragged(3, 30, 30)
    cost = torch.cdist(x, y).square()
    theirs = cost.clone().requires_grad_()
    peer = ddtw.SDTW(gamma=0.5, normalization="none", backend="torch", dtype_float=torch.float64)
    mean = peer(C=theirs, list_N=x_lengths, list_M=y_lengths)
    mean.backward()
    on = [t.to(device_of(backend)) for t in (cost, x_lengths, y_lengths)]
    value, gradient = value_and_gradient(*on, gamma=0.5, backend=backend)
    same(value.mean(), mean.detach())
    same(gradient, 3 * theirs.grad)


@pytest.mark.parametrize("n", [1, 2, 5, 9])
@pytest.mark.parametrize("m", [1, 2, 6, 9])
@pytest.mark.parametrize("backend", BACKENDS)
def test_int_band_keeps_the_documented_cells_and_always_a_path(n: int, m: int, backend: str) -> None:
    cost = random(1, n, m).abs()
    for w in (0, 1, 3, 2**62):
        outside = cost.masked_fill(~in_band(n, m, w), math.inf)
        value, gradient = value_and_gradient(cost.to(device_of(backend)), gamma=0.5, band=w, backend=backend)
        want, alignment = value_and_gradient(outside, gamma=0.5, backend="reference")
        assert value.isfinite().all()
        same(value, want)
        same(gradient, alignment)


def test_int_band_follows_each_pairs_own_diagonal() -> None:
    cost, (x_lengths, y_lengths) = random(6, 9, 12), ragged(6, 9, 12)
    for backend in ("reference", "cpu"):
        value = soft_dtw_from_cost(cost, x_lengths, y_lengths, band=1, backend=backend)
        for b, (n, m) in enumerate(zip(x_lengths.tolist(), y_lengths.tolist())):
            same(value[b], soft_dtw_from_cost(cost[b : b + 1, :n, :m], band=1, backend="reference")[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_row_windows_are_inclusive_and_per_sample(backend: str) -> None:
    on = device_of(backend)
    cost = random(2, 4, 5).to(on)
    low = torch.tensor([[0, 0, 1, 2], [0, 2, 2, 4]], device=on)
    high = torch.tensor([[1, 2, 4, 4], [3, 3, 4, 4]], device=on)
    columns = torch.arange(5, device=on)
    outside = (columns < low[..., None]) | (columns > high[..., None])
    value, gradient = value_and_gradient(cost, band=(low, high), gamma=0.7, backend=backend)
    want, alignment = value_and_gradient(cost.masked_fill(outside, math.inf), gamma=0.7, backend="reference")
    same(value, want)
    same(gradient, alignment)
    same(soft_dtw_alignment(cost, band=(low, high), gamma=0.7, backend=backend), alignment)
    same(value_and_gradient(cost.masked_fill(outside, math.nan), band=(low, high), gamma=0.7, backend=backend)[0], want)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_pair_without_a_path_is_infinite_and_without_gradient(backend: str) -> None:
    cost = random(3, 4, 5).to(device_of(backend))
    cost[1, 2] = math.inf
    value, gradient = value_and_gradient(cost, backend=backend)
    assert value.isinf().tolist() == [False, True, False] and value[1] > 0
    assert (gradient[1] == 0).all() and gradient.isfinite().all() and gradient[0].sum() > 1
    assert (soft_dtw_alignment(cost, backend=backend)[1] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_gap_in_the_row_windows_leaves_no_path(backend: str) -> None:
    low, high, cost = (
        t.to(device_of(backend)) for t in (torch.tensor([[0, 0, 3]]), torch.tensor([[1, 1, 4]]), random(1, 3, 5))
    )
    value, gradient = value_and_gradient(cost, band=(low, high), backend=backend)
    assert value.item() == math.inf and (gradient == 0).all()


@pytest.mark.parametrize("bad", [math.nan, -math.inf])
@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_stays_with_its_pair(bad: float, backend: str) -> None:
    cost = random(3, 4, 5).to(device_of(backend))
    clean = value_and_gradient(cost, backend=backend)
    cost[1, 3, 0] = bad
    value, gradient = value_and_gradient(cost, backend=backend)
    assert value.isnan().tolist() == [False, True, False] and gradient[1].isnan().any()
    for got, want in zip((value, gradient), clean):
        assert torch.equal(got[[0, 2]], want[[0, 2]])


@pytest.mark.parametrize("band", [None, 1])
@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_may_hold_nan_and_gets_no_gradient(band: int | None, backend: str) -> None:
    cost, lengths = random(5, 7, 6), ragged(5, 7, 6)
    on = [t.to(device_of(backend)) for t in lengths]
    clean = value_and_gradient(cost.to(device_of(backend)), *on, band=band, backend=backend)
    dirty = value_and_gradient(poisoned(cost, *lengths).to(device_of(backend)), *on, band=band, backend=backend)
    for got, want in zip(dirty, clean):
        assert torch.equal(got, want)
    assert (dirty[1].cpu()[poisoned(cost, *lengths).isnan()] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_out_of_band_cells_may_hold_nan(backend: str) -> None:
    cost = random(1, 7, 6)
    dirty = cost.masked_fill(~in_band(7, 6, 1), math.nan).to(device_of(backend))
    value, gradient = value_and_gradient(dirty, band=1, backend=backend)
    assert torch.equal(value, soft_dtw_from_cost(cost.to(device_of(backend)), band=1, backend=backend))
    assert (gradient[dirty.isnan()] == 0).all()


@pytest.mark.parametrize("per_sample", [False, True])
def test_derivatives_in_cost_gamma_and_drop_cost(per_sample: bool) -> None:
    gamma = torch.tensor([0.5, 2.0] if per_sample else 0.5, dtype=torch.float64, requires_grad=True)
    cost, drop, lengths = random(2, 4, 3).requires_grad_(), random(2, 4, seed=1).requires_grad_(), ragged(2, 4, 3)

    def loss(cost: Tensor, gamma: Tensor, drop: Tensor) -> Tensor:
        return soft_dtw_from_cost(cost, *lengths, gamma=gamma, drop_cost=drop)

    assert gradcheck(loss, (cost, gamma, drop))
    assert gradgradcheck(loss, (cost, gamma, drop))
    for b in range(2):
        one = soft_dtw_from_cost(
            cost[b : b + 1], lengths[0][b : b + 1], lengths[1][b : b + 1], gamma=gamma[b].item() if per_sample else 0.5
        )
        same(soft_dtw_from_cost(cost, *lengths, gamma=gamma)[b], one[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_derivative_in_gamma_is_minus_the_entropy_of_the_paths(backend: str) -> None:
    cost, gamma = random(1, 4, 3), torch.tensor(0.5, dtype=torch.float64, device=device_of(backend), requires_grad=True)
    value = soft_dtw_from_cost(cost.to(gamma.device), gamma=gamma, backend=backend)
    slope = torch.autograd.grad(value.sum(), gamma)[0].cpu()
    prices = torch.stack([sum(cost[0, i, j] for i, j in path) for path in paths(4, 3)])
    p = torch.softmax(-prices / 0.5, dim=0)
    same(slope, (p * p.log()).sum())


def test_alignment_is_differentiable() -> None:
    cost = random(2, 4, 3).requires_grad_()
    assert gradcheck(lambda c: soft_dtw_alignment(c, gamma=0.6), (cost,))
    assert backend_of(soft_dtw_alignment, cost) == "cpu"


@pytest.mark.parametrize("band", [None, 1, "windows"])
@pytest.mark.parametrize("dropping", [False, True])
@pytest.mark.parametrize("per_pair", [False, True])
def test_second_derivatives_are_those_of_the_reference(band, dropping: bool, per_pair: bool) -> None:
    n, m = 19, 11
    lengths = ragged(3, n, m)
    if band == "windows":
        middle = torch.arange(n).expand(3, n) * (lengths[1] - 1)[:, None] // (lengths[0] - 1).clamp(min=1)[:, None]
        band = middle - 2, middle + 2
    cost = random(3, n, m).requires_grad_()
    sources = [cost]
    gamma, drop = 0.7, None
    if per_pair:
        sources.append(gamma := torch.tensor([0.3, 0.7, 2.0], dtype=torch.float64, requires_grad=True))
    if dropping:
        sources.append(drop := (random(3, n, seed=1).abs() + 0.2).requires_grad_())
    along = [random(*t.shape, seed=2) for t in sources]
    results = []
    for backend in ("cpu", "reference"):
        value = soft_dtw_from_cost(cost, *lengths, gamma=gamma, band=band, drop_cost=drop, backend=backend)
        first = torch.autograd.grad(value @ torch.arange(1.0, 4).double(), sources, create_graph=True)
        results.append(torch.autograd.grad(first, sources, along))
    for got, want in zip(*results):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10)


def test_second_derivatives_in_float32_and_through_quantised_shares() -> None:
    cost = random(2, 120, 40).square()
    results = []
    for leaf, bits in ((cost.clone(), 16), (cost.float(), 16), (cost.float(), 8)):
        leaf.requires_grad_()
        value = soft_dtw_from_cost(leaf, gamma=1.0, bits=bits, backend="cpu")
        (first,) = torch.autograd.grad(value.sum(), leaf, create_graph=True)
        results.append(torch.autograd.grad(first, leaf, random(2, 120, 40, seed=1).to(leaf.dtype))[0].double())
    exact, sixteen, eight = results
    assert (sixteen - exact).norm() <= 1e-3 * exact.norm()
    assert (eight - exact).norm() <= 1e-1 * exact.norm()


def test_hard_dtw_is_the_limit_and_its_gradient_the_path() -> None:
    cost, (x_lengths, y_lengths) = random(5, 6, 5).abs(), ragged(5, 6, 5)
    value, gradient = value_and_gradient(cost, x_lengths, y_lengths, gamma=0)
    same(value, soft_dtw_from_cost(cost, x_lengths, y_lengths, gamma=1e-13, backend="reference"))
    steps = dtw_path(cost, x_lengths, y_lengths)
    for b, (n, m) in enumerate(zip(x_lengths.tolist(), y_lengths.tolist())):
        assert steps[b].dtype == torch.int64 and steps[b].tolist() in [[list(c) for c in p] for p in paths(n, m)]
        i, j = steps[b].T
        same(cost[b, i, j].sum(), value[b])
        assert torch.equal(torch.zeros(6, 5).double().index_put((i, j), torch.ones(len(i)).double()), gradient[b])


def test_path_with_ties_drops_and_nothing_at_all() -> None:
    assert dtw_path(torch.zeros(1, 3, 2))[0].tolist() == [[0, 0], [1, 0], [2, 1]]
    cost = torch.tensor([[[0.0, 9.0], [7.0, 7.0], [9.0, 0.0]]])
    assert dtw_path(cost, drop_cost=1.0)[0].tolist() == [[0, 0], [2, 1]]
    assert dtw_path(torch.full((1, 3, 2), math.inf))[0].shape == (0, 2)
    with pytest.raises(ValueError, match="cost: sample 1 holds NaN"):
        dtw_path(torch.stack([torch.zeros(3, 2), torch.full((3, 2), math.nan)]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_inputs_are_computed_in_float32(dtype: torch.dtype) -> None:
    x, y = random(2, 6, 8).to(dtype).requires_grad_(), random(2, 5, 8, seed=1).to(dtype).requires_grad_()
    value = soft_dtw(x, y, gamma=0.2)
    assert value.dtype == torch.float32
    assert torch.equal(value, soft_dtw(x.float(), y.float(), gamma=0.2))
    value.sum().backward()
    assert x.grad.dtype == y.grad.dtype == dtype
    cost = random(2, 6, 5).to(dtype)
    assert torch.equal(soft_dtw_from_cost(cost), soft_dtw_from_cost(cost.float()))


def test_autocast_does_not_round_the_cost() -> None:
    x, y = random(2, 6, 8).float(), random(2, 5, 8, seed=1).float()
    for backend in ("reference", "cpu"):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            inside = soft_dtw(x, y, cost="contrastive", temperature=0.06, gamma=0.1, backend=backend)
        assert torch.equal(inside, soft_dtw(x, y, cost="contrastive", temperature=0.06, gamma=0.1, backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("n", "m"), [(4, 3), (0, 0)])
def test_empty_batch(n: int, m: int, backend: str) -> None:
    x = torch.zeros(0, n, 3, device=device_of(backend), requires_grad=True)
    y = torch.zeros(0, m, 3, device=device_of(backend))
    value = soft_dtw(x, y, backend=backend)
    assert value.shape == (0,)
    value.sum().backward()
    assert x.grad.shape == x.shape
    cost = torch.zeros(0, n, m, device=device_of(backend))
    assert soft_dtw_alignment(cost, backend=backend).shape == (0, n, m)
    assert dtw_path(cost) == []


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_costs_are_taken_as_they_are(backend: str) -> None:
    cost = random(2, 6, 5).to(device_of(backend))
    want = value_and_gradient(cost, gamma=0.4, backend=backend)
    wide = torch.full((2, 12, 9), math.nan, dtype=torch.float64, device=cost.device)
    wide[:, ::2, 2:7] = cost
    for strided in (wide[:, ::2, 2:7], cost.mT.contiguous().mT):
        leaf = strided.detach().requires_grad_()
        value = soft_dtw_from_cost(leaf, gamma=0.4, backend=backend)
        assert torch.equal(value, want[0])
        assert torch.equal(torch.autograd.grad(value.sum(), leaf)[0], want[1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_alignment_and_path_in_inference_mode(backend: str) -> None:
    cost = random(2, 4, 3).to(device_of(backend))
    want, steps = soft_dtw_alignment(cost, gamma=0.5, backend=backend), dtw_path(cost)
    with torch.inference_mode():
        cost, lengths = cost.clone(), torch.full((2,), 4)
        assert torch.equal(soft_dtw_alignment(cost, lengths, gamma=0.5, backend=backend), want)
        assert all(torch.equal(a, b) for a, b in zip(dtw_path(cost, lengths), steps))


@pytest.mark.parametrize("backend", BACKENDS)
def test_lengths_may_be_a_list_strided_or_int32(backend: str) -> None:
    cost = random(3, 6, 5).to(device_of(backend))
    strided = torch.tensor([6, 0, 2, 0, 3, 0], device=cost.device)[::2]
    want = soft_dtw_from_cost(cost, torch.tensor([6, 2, 3], device=cost.device), backend=backend)
    for lengths in ([6, 2, 3], strided, strided.int()):
        assert torch.equal(soft_dtw_from_cost(cost, lengths, backend=backend), want)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant: bool) -> None:
    x, y = random(2, 6, 4).requires_grad_(), random(2, 5, 4, seed=1)
    cost = random(2, 6, 4).requires_grad_()
    for function, *inputs in ((soft_dtw, x, y), (soft_dtw_from_cost, cost)):
        (want,) = torch.autograd.grad(function(*inputs).sum(), inputs[0])
        value = checkpoint(function, *inputs, use_reentrant=reentrant)
        inputs[0].grad = None
        value.sum().backward()
        assert torch.equal(inputs[0].grad, want)


@pytest.mark.parametrize("bits", [16, 8])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_retained_graph_gives_gradients_again_and_leaves_those_alone_that_it_gave(backend: str, bits: int) -> None:
    cost = random(3, 6, 5).to(device_of(backend)).requires_grad_()
    gamma, drop = (
        torch.full((3,), 0.5, device=cost.device).double(),
        torch.full((3, 6), 0.7, device=cost.device).double(),
    )
    sources = cost, gamma.requires_grad_(), drop.requires_grad_()
    value = soft_dtw_from_cost(cost, gamma=gamma, drop_cost=drop, bits=bits, backend=backend)
    weights = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64, device=cost.device)
    first = torch.autograd.grad(value, sources, weights, retain_graph=True)
    kept = [g.clone() for g in first]
    again = torch.autograd.grad(value, sources, weights, retain_graph=True)
    others = torch.autograd.grad(value, sources, 3 * weights, create_graph=True)
    last = torch.autograd.grad(value, sources, torch.zeros_like(weights))
    for one, before, two, other, zero in zip(first, kept, again, others, last):
        assert torch.equal(one, before)
        torch.testing.assert_close(two, one, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(other, 3 * one, rtol=1e-12, atol=1e-14)
        assert (zero == 0).all()


def test_many_upstream_gradients_in_one_call() -> None:
    cost = random(3, 6, 5).requires_grad_()
    value = soft_dtw_from_cost(cost)
    upstream = random(4, 3)
    got = torch.autograd.grad(value, cost, upstream, is_grads_batched=True, retain_graph=True)[0]
    for one, weights in zip(got, upstream):
        assert torch.equal(one, torch.autograd.grad(value, cost, weights, retain_graph=True)[0])


def test_a_cost_that_was_changed_before_backward_is_noticed() -> None:
    leaf = random(2, 6, 5).requires_grad_()
    cost = leaf * 1
    value = soft_dtw_from_cost(cost)
    cost.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.sum().backward()


@pytest.mark.parametrize("source", ["cost", "gamma", "drop"])
def test_a_third_derivative_is_refused_wherever_it_is_asked_for(source: str) -> None:
    """A second derivative that only kept silent of its own would leave its part out of a sum."""
    sources = {
        "cost": random(1, 3, 4),
        "gamma": torch.tensor(0.7, dtype=torch.float64),
        "drop": random(1, 3, seed=1).abs(),
    }
    leaf = sources[source].requires_grad_()
    value = soft_dtw_from_cost(
        sources["cost"] ** 2, gamma=sources["gamma"] ** 2, drop_cost=sources["drop"] ** 2, backend="cpu"
    )
    (first,) = torch.autograd.grad(value.sum(), leaf, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="soft_dtw: third derivatives .* backend='reference'"):
        torch.autograd.grad(second.sum(), leaf)


def test_what_the_kernels_know_nothing_of_is_left_to_the_reference() -> None:
    """torch.func's transforms and forward-mode differentiation: a kernel would take the tangent for zero."""
    cost, along = random(2, 4, 3), random(2, 4, 3, seed=1)
    value, gradient = value_and_gradient(cost, gamma=0.5)

    def loss(cost: Tensor, **options) -> Tensor:
        return soft_dtw_from_cost(cost, gamma=0.5, **options)

    same(torch.func.grad(lambda c: loss(c).sum())(cost), gradient)
    same(torch.func.vmap(lambda c: loss(c[None])[0])(cost), value)
    same(torch.func.jvp(loss, (cost,), (along,))[1], (gradient * along).sum((1, 2)))
    with torch.autograd.forward_ad.dual_level():
        dual = loss(torch.autograd.forward_ad.make_dual(cost, along))
        same(torch.autograd.forward_ad.unpack_dual(dual).tangent, (gradient * along).sum((1, 2)))
    with pytest.raises(ValueError, match="backend: 'cpu' cannot serve this call .* torch.func"):
        torch.func.jvp(lambda c: loss(c, backend="cpu"), (cost,), (along,))
    assert backend_of(soft_dtw_from_cost, cost) == "cpu"


def test_the_compiled_kernels_of_a_cpu_serve_every_call() -> None:
    cost = random(2, 3, 4).float()
    bounds = torch.zeros(2, 3, dtype=torch.int64), torch.full((2, 3), 3)
    for options in ({}, {"gamma": 0.0}, {"gamma": torch.ones(2)}, {"drop_cost": 1.0}, {"band": 1}, {"band": bounds}):
        assert backend_of(soft_dtw_from_cost, cost, **options) == "cpu"


def test_backend_of_computes_nothing_and_checks_everything() -> None:
    x = torch.zeros(1, 4, 3, requires_grad=True)
    assert backend_of(soft_dtw, x, x) == "cpu"
    assert backend_of(dtw_path, torch.zeros(1, 3, 4)) == "cpu"
    with pytest.raises(ValueError, match="gamma"):
        backend_of(soft_dtw, x, x, gamma=-1.0)
    with pytest.raises(TypeError, match="expected a function of lyra_ops"):
        backend_of(math.sqrt, 2.0)
    assert soft_dtw(x, x).requires_grad  # asking has left nothing behind


def test_public_face() -> None:
    assert {"soft_dtw", "soft_dtw_from_cost", "soft_dtw_alignment", "dtw_path", "backend_of"} <= set(lyra_ops.__all__)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert soft_dtw(torch.rand(2, 5, 3), torch.rand(2, 4, 3)).shape == (2,)
