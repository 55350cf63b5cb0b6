"""The compiled soft-DTW: its error against plain torch, what must not change a bit of it, and its place in torch."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from soft_dtw_oracles import COMPILED, device_of, looped, poisoned, ragged, random
from torch import Tensor

import lyra_ops
from lyra_ops import soft_dtw, soft_dtw_from_cost
from lyra_ops.soft_dtw import reference
from lyra_ops.testing import assert_within_reference_error

forward = torch.ops.lyra.soft_dtw_forward
backward = torch.ops.lyra.soft_dtw_backward


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
def test_float32_error_is_that_of_plain_torch(make, shape, gamma: float, band: int | None, backend: str) -> None:
    lengths = ragged(*shape)
    cost = poisoned(make(*shape).float(), *lengths)  # rounded first: all three compute the same pair
    exact = value_and_gradient(cost.double(), *lengths, gamma=gamma, band=band, backend="reference")
    plain = value_and_gradient(cost, *lengths, gamma=gamma, band=band, backend="reference")
    on = [t.to(device_of(backend)) for t in (cost, *lengths)]
    got = value_and_gradient(*on, gamma=gamma, band=band, backend=backend)
    for name, *results in zip(("value", "gradient"), got, plain, exact):
        assert_within_reference_error(*results, name=name)
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
    for name, *results in zip(("value", "gradient", "gradient in gamma"), got, plain, exact):
        assert_within_reference_error(*results, name=name)


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
def test_second_derivative_in_gamma_says_what_to_do(backend: str) -> None:
    cost, gamma = random(1, 4, 3).to(device_of(backend)), torch.ones(1, device=device_of(backend)).requires_grad_()
    value = soft_dtw_from_cost(cost, gamma=gamma, backend=backend)
    (slope,) = torch.autograd.grad(value.sum(), gamma, create_graph=True)
    with pytest.raises(NotImplementedError, match="backend='reference'"):
        slope.sum().backward()


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


@pytest.mark.parametrize("backend", COMPILED)
@given(pair=pairs, dtype=dtypes, band=bands)
@many
def test_every_path_crosses_every_antidiagonal_cut_once(backend: str, pair, dtype, band) -> None:
    """E of a diagonal, plus what steps diagonally over it, is all the mass there is; and there is none below zero."""
    n, m, seed, gamma = pair
    cost = random(1, n, m, seed=seed, dtype=dtype).square().to(device_of(backend))
    lengths = torch.tensor([n], device=cost.device), torch.tensor([m], device=cost.device)
    band = -1 if band is None else band
    value, probs = forward(cost, *lengths, gamma, band)
    expected = backward(torch.ones_like(value), probs, *lengths, band)[0].cpu().double()
    stepping = expected * probs[0, ..., 0].cpu().double()
    i, j = torch.meshgrid(torch.arange(n), torch.arange(m), indexing="ij")
    for k in range(n + m - 1):
        mass = expected[i + j == k].sum() + stepping[i + j == k + 1].sum()
        assert mass.item() == pytest.approx(1, abs=8 * (n + m) * torch.finfo(dtype).eps)
    assert (expected >= 0).all()
    assert (probs >= 0).all() and ((1 - probs[..., 0]) - probs[..., 1] >= 0).all()


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
    plain = lyra_ops.soft_dtw_alignment(cost, backend="reference")
    got = turn(lyra_ops.soft_dtw_alignment(turn(cost).to(device_of(backend)), backend=backend))
    assert_within_reference_error(got, plain, exact)


@pytest.mark.parametrize("backend", COMPILED)
def test_a_wide_band_is_no_band(backend: str) -> None:
    cost, lengths = random(5, 20, 30).float(), ragged(5, 20, 30)
    on = [t.to(device_of(backend)) for t in (cost, *lengths)]
    free = value_and_gradient(*on, backend=backend)
    for band in (30, 2**62):
        for a, b in zip(value_and_gradient(*on, band=band, backend=backend), free):
            assert torch.equal(a, b)


def test_threads_change_nothing() -> None:
    cost, lengths = random(40, 30, 20).float(), ragged(40, 30, 20)
    threads = torch.get_num_threads()
    try:
        results = []
        for n in (1, 2):
            torch.set_num_threads(n)
            results.append(value_and_gradient(cost, *lengths, backend="cpu"))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results))


@pytest.mark.parametrize("backend", COMPILED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("band", [-1, 2])
def test_opcheck(dtype: torch.dtype, band: int, backend: str) -> None:
    device = device_of(backend)
    lengths = [t.to(device) for t in ragged(3, 6, 5)]
    for cost in (random(3, 6, 5).to(device, dtype), random(3, 5, 12).to(device, dtype)[:, :, ::2].mT):
        torch.library.opcheck(forward, (cost, *lengths, 0.5, band))
        value, probs = forward(cost, *lengths, 0.5, band)
        for grad in (torch.ones_like(value), value.new_ones(()).expand(3)):
            torch.library.opcheck(backward, (grad, probs, *lengths, band))


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
        value, probs = forward(cost, lengths, lengths, 0.5, -1)
        gradient = backward(value, probs, lengths, lengths, -1)
    assert (value.shape, probs.shape, gradient.shape) == ((3,), (3, 6, 5, 2), (3, 6, 5))
    assert {(t.device.type, t.dtype) for t in (value, probs, gradient)} == {(device, torch.float64)}


@pytest.mark.parametrize("backend", COMPILED)
def test_the_raw_ops_survive_any_length(backend: str) -> None:
    cost = random(6, 5, 4).to(device_of(backend))
    x_lengths = torch.tensor([5, 0, 6, 3, -(2**62), 5], device=cost.device)
    y_lengths = torch.tensor([4, 4, 4, 2**62, 4, 0], device=cost.device)
    value, probs = forward(cost, x_lengths, y_lengths, 1.0, -1)
    gradient = backward(torch.ones_like(value), probs, x_lengths, y_lengths, -1)
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
        ({"gamma": 0.0}, "gamma: got 0"),
        ({"gamma": math.nan}, "gamma: got nan"),
        ({"gamma": 1e-320}, "gamma: got"),
        ({"band": -2}, "band: got -2"),
    ],
)
def test_the_raw_forward_op_refuses(change, message: str) -> None:
    ones = torch.ones(2, dtype=torch.int64)
    arguments = {"cost": torch.zeros(2, 3, 4), "x_lengths": ones, "y_lengths": ones, "gamma": 1.0, "band": -1}
    with pytest.raises(RuntimeError, match=message):
        forward(**{**arguments, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grad_value": torch.zeros(3)}, "grad_value: got shape"),
        ({"grad_value": torch.zeros(2, dtype=torch.float64)}, "grad_value: got dtype"),
        ({"probs": torch.zeros(2, 3, 4)}, "probs: got shape"),
        ({"probs": torch.zeros(2, 3, 2, 4).mT}, "probs: got strided memory"),
        ({"x_lengths": torch.ones(3, dtype=torch.int64)}, "x_lengths: got shape"),
    ],
)
def test_the_raw_backward_op_refuses(change, message: str) -> None:
    ones = torch.ones(2, dtype=torch.int64)
    arguments = {"grad_value": torch.zeros(2), "probs": torch.zeros(2, 3, 4, 2), "x_lengths": ones, "y_lengths": ones}
    with pytest.raises(RuntimeError, match=message):
        backward(**{**arguments, "band": -1, **change})
