"""What is built on soft_dtw: statistics, divergence, packed batches, losses; and how all of it behaves in training."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.multiprocessing as multiprocessing
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from soft_dtw_oracles import enumerated, in_band, looped, paths, ragged, random
from torch import Tensor, nn
from torch.autograd import gradcheck
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import lyra_ops
from lyra_ops import soft_dtw, soft_dtw_alignment, soft_dtw_from_cost, soft_dtw_statistics


def same(got: Tensor, want: Tensor | float) -> None:
    """Equal up to float64 rounding."""
    torch.testing.assert_close(got, torch.as_tensor(want, dtype=got.dtype), rtol=1e-9, atol=1e-11)


def packed(tensor: Tensor, lengths: Tensor) -> Tensor:
    return torch.cat([row[:n] for row, n in zip(tensor, lengths.tolist())])


def bounds(lengths: Tensor) -> Tensor:
    return F.pad(lengths.cumsum(0), (1, 0))


# --- statistics --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gamma", [2.0, 0.3])
def test_statistics_are_those_of_the_paths(gamma: float) -> None:
    cost = random(1, 4, 5)
    prices = torch.stack([torch.stack([cost[0, i, j] for i, j in path]).sum() for path in paths(4, 5)])
    steps = torch.tensor([len(path) for path in paths(4, 5)], dtype=torch.float64)
    p = torch.softmax(-prices / gamma, 0)
    value, alignment = enumerated(cost[0], gamma)
    got = soft_dtw_statistics(cost, gamma=gamma)
    same(got.value[0], value)
    same(got.expected_cost[0], p @ prices)
    same(got.entropy[0], -(p * p.log()).sum())
    same(got.path_length[0], p @ steps)
    same(got.durations[0], alignment.sum(0))
    same(got.alignment[0], alignment)


def test_statistics_of_the_best_path_alone() -> None:
    cost = random(3, 6, 4)
    got = soft_dtw_statistics(cost, gamma=0.0)
    assert torch.equal(got.entropy, torch.zeros(3, dtype=torch.float64))
    same(got.expected_cost, got.value)
    same(got.path_length, torch.tensor([len(path) for path in lyra_ops.dtw_path(cost)]))


def test_statistics_of_a_pair_without_a_path() -> None:
    cost = random(2, 4, 3)
    cost[0, 2] = math.inf
    got = soft_dtw_statistics(cost)
    assert got.value[0] == got.expected_cost[0] == math.inf
    assert got.entropy[0] == got.path_length[0] == 0 and got.alignment[0].eq(0).all()
    assert got.value[1].isfinite()


@pytest.mark.parametrize("field", ["expected_cost", "entropy", "path_length", "durations"])
def test_statistics_are_differentiable(field: str) -> None:
    cost = random(2, 4, 3).requires_grad_()
    gamma = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    lengths = torch.tensor([4, 3]), torch.tensor([3, 2])
    assert gradcheck(lambda c, g: getattr(soft_dtw_statistics(c, *lengths, gamma=g), field), (cost, gamma))


def test_statistics_in_inference_mode() -> None:
    cost, lengths = random(2, 5, 4), ragged(2, 5, 4)
    with torch.inference_mode():
        got = soft_dtw_statistics(cost.clone(), *lengths, gamma=0.5)
    want = soft_dtw_statistics(cost, *lengths, gamma=0.5)
    for a, b in zip(got, want):
        same(a, b)


# --- divergence --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sharp", [False, True])
def test_divergence_is_debiased(sharp: bool) -> None:
    x, y = random(2, 5, 3), random(2, 4, 3, seed=1)
    xn, ym = ragged(2, 5, 4, seed=3)

    def part(a: Tensor, b: Tensor, n: Tensor, m: Tensor) -> Tensor:
        values = []
        for k in range(2):
            cost = torch.cdist(a[k, : n[k]], b[k, : m[k]]).square()
            value, alignment = looped(cost, 0.5)
            values.append((cost * alignment).sum() if sharp else value)
        return torch.stack(values)

    want = part(x, y, xn, ym) - (part(x, x, xn, xn) + part(y, y, ym, ym)) / 2
    same(lyra_ops.soft_dtw_divergence(x, y, xn, ym, gamma=0.5, sharp=sharp), want)
    same(lyra_ops.soft_dtw_divergence(x, x, xn, xn, gamma=0.5, sharp=sharp), torch.zeros(2))


def test_divergence_refuses_what_has_no_itself() -> None:
    x, y = random(1, 3, 2), random(1, 3, 2)
    with pytest.raises(ValueError, match="cost: got 'contrastive'"):
        lyra_ops.soft_dtw_divergence(x, y, cost="contrastive")
    with pytest.raises(TypeError, match="band: got a pair"):
        lyra_ops.soft_dtw_divergence(x, y, band=(torch.zeros(1, 3).long(), torch.ones(1, 3).long()))


# --- packed ------------------------------------------------------------------------------------------------------


PACKED = [{}, {"drop_cost": 0.8}, {"band": 1}, {"cost": "contrastive", "temperature": 0.5}, {"bits": 8}]


@pytest.mark.parametrize("options", PACKED)
def test_packed_is_padded_bit_for_bit(options: dict) -> None:
    x, y = random(4, 7, 3), random(4, 5, 3, seed=1)
    if "bits" in options:  # which float64 has no use for
        x, y = x.float(), y.float()
    n, m = ragged(4, 7, 5)
    tokens = [packed(x, n).requires_grad_(), packed(y, m).requires_grad_()]
    got = lyra_ops.soft_dtw_packed(*tokens, bounds(n), bounds(m), gamma=0.5, **options)
    x, y = x.requires_grad_(), y.requires_grad_()
    want = soft_dtw(x, y, n, m, gamma=0.5, **options)
    assert torch.equal(got, want)
    for a, b, lengths in zip(torch.autograd.grad(got.sum(), tokens), torch.autograd.grad(want.sum(), (x, y)), (n, m)):
        assert torch.equal(a, packed(b, lengths))


def test_packed_alignment_is_padded_bit_for_bit() -> None:
    cost, (n, m) = random(3, 6, 4), ragged(3, 6, 4)
    cells = torch.cat([c[:a, :b].flatten() for c, a, b in zip(cost, n.tolist(), m.tolist())])
    got = lyra_ops.soft_dtw_alignment_packed(cells, bounds(n), bounds(m), gamma=0.5)
    want = soft_dtw_alignment(cost, n, m, gamma=0.5)
    assert torch.equal(got, torch.cat([e[:a, :b].flatten() for e, a, b in zip(want, n.tolist(), m.tolist())]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cu_seqlens_x": torch.tensor([0, 2, 2, 5])}, "cu_seqlens_x: sample 1 has length 0"),
        ({"cu_seqlens_x": torch.tensor([0, 2, 4, 6])}, "cu_seqlens_x: begins and ends with 0 and 6"),
        ({"cu_seqlens_y": torch.tensor([0, 1])}, "cu_seqlens_y: got shape"),
        ({"max_seqlen_x": 1}, "max_seqlen_x: got 1"),
        ({"max_seqlen_y": "4"}, "max_seqlen_y: got .4., expected an int"),
    ],
)
def test_packed_errors_name_the_argument(change: dict, message: str) -> None:
    arguments = {
        "x": random(5, 2),
        "y": random(4, 2),
        "cu_seqlens_x": torch.tensor([0, 2, 3, 5]),
        "cu_seqlens_y": torch.tensor([0, 1, 2, 4]),
    }
    with pytest.raises((ValueError, TypeError), match=message):
        lyra_ops.soft_dtw_packed(**arguments | change)


# --- bits ----------------------------------------------------------------------------------------------------------


def test_bits_reach_the_shares_and_leave_the_value_alone() -> None:
    """Everything that takes `bits` gives what the function under it gives for them."""
    x, y, (n, m) = random(3, 20, 4).float().requires_grad_(), random(3, 9, 4, seed=1).float(), ragged(3, 20, 9)
    cost = lyra_ops.pair_cost(x, y, n, m).detach()
    cells = torch.cat([c[:a, :b].flatten() for c, a, b in zip(cost, n.tolist(), m.tolist())])

    def gradient(value: Tensor) -> Tensor:
        return torch.autograd.grad(value.sum(), x)[0]

    def results(bits: int) -> list[Tensor]:
        direct = gradient(soft_dtw(x, y, n, m, gamma=2.0, bits=bits))
        loss = lyra_ops.SoftDTWLoss(gamma=2.0, reduction="sum", bits=bits)(x, y, n, m)
        assert torch.equal(gradient(loss), direct)
        alignment = soft_dtw_alignment(cost, n, m, gamma=2.0, bits=bits)
        assert torch.equal(soft_dtw_statistics(cost, n, m, gamma=2.0, bits=bits).alignment, alignment)
        row_by_row = lyra_ops.soft_dtw_alignment_packed(cells, bounds(n), bounds(m), gamma=2.0, bits=bits)
        assert torch.equal(row_by_row, torch.cat([e[:a, :b].flatten() for e, a, b in zip(alignment, n, m)]))
        divergence = gradient(lyra_ops.soft_dtw_divergence(x, y, n, m, gamma=2.0, bits=bits))
        path = gradient(lyra_ops.SoftDTWLoss(gamma=2.0, normalize="path", bits=bits)(x, y, n, m))
        return [direct, alignment, divergence, path]

    for wide, narrow in zip(results(16), results(8)):
        assert 1e-5 < (wide - narrow).norm() / wide.norm() < 1e-2
    assert torch.equal(soft_dtw(x, y, n, m, bits=8), soft_dtw(x, y, n, m))
    with pytest.raises(ValueError, match="bits: got 4, expected one of 16, 8"):
        lyra_ops.SoftDTWLoss(bits=4)


# --- losses ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalize", [None, "x", "y", "path"])
def test_loss_leaves_out_samples_without_tokens(normalize: str | None) -> None:
    x, y = random(3, 6, 4), random(3, 5, 4, seed=1)
    n, m = torch.tensor([6, 4, 3]), torch.tensor([5, 0, 2])
    x[1], y[1] = math.nan, math.nan
    x, y = x.requires_grad_(), y.requires_grad_()
    loss = lyra_ops.SoftDTWLoss(cost="cosine", gamma=0.2, normalize=normalize)(x, y, n, m)
    want = 0.0
    for k in (0, 2):
        cost = 1 - F.normalize(x[k, : n[k]], dim=-1) @ F.normalize(y[k, : m[k]], dim=-1).T
        value, alignment = looped(cost.detach(), 0.2)
        lengths = {None: 1, "x": n[k], "y": m[k], "path": alignment.sum()}
        want += value / lengths[normalize] / 2
    same(loss.detach(), want)
    for gradient in torch.autograd.grad(loss, (x, y)):
        assert gradient[1].eq(0).all() and gradient.isfinite().all() and gradient[0].ne(0).any()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_loss_of_nothing_is_zero(reduction: str) -> None:
    x, y = random(2, 3, 4).requires_grad_(), random(2, 3, 4)
    loss = lyra_ops.SoftDTWLoss(reduction=reduction)(x, y, torch.zeros(2).long(), torch.ones(2).long())
    assert loss.eq(0).all() and loss.shape == ((2,) if reduction == "none" else ())
    assert torch.autograd.grad(loss.sum(), x)[0].eq(0).all()


def test_loss_learns_its_gamma() -> None:
    loss = lyra_ops.SoftDTWLoss(gamma=nn.Parameter(torch.tensor(0.5)))
    loss(random(2, 4, 3).float(), random(2, 3, 3).float()).backward()
    assert [name for name, _ in loss.named_parameters()] == ["gamma"] and loss.gamma.grad < 0


@pytest.mark.parametrize("bandwidth", [None, 0, 3])
@pytest.mark.parametrize("normalize", [False, True])
def test_drop_in_class_computes_what_the_original_does(normalize: bool, bandwidth: int | None) -> None:
    x, y = random(2, 6, 3), random(2, 5, 3, seed=1)

    def part(a: Tensor, b: Tensor) -> Tensor:
        cost = torch.cdist(a, b).square()
        if bandwidth:
            i, j = torch.arange(cost.shape[1])[:, None], torch.arange(cost.shape[2])
            cost = cost.masked_fill((i - j).abs() > bandwidth, math.inf)
        return torch.stack([looped(c, 0.7)[0] for c in cost])

    want = part(x, y) - (part(x, x) + part(y, y)) / 2 if normalize else part(x, y)
    same(lyra_ops.SoftDTW(False, 0.7, normalize, bandwidth)(x, y), want)


def test_drop_in_class_takes_a_distance_function() -> None:
    x, y = random(2, 6, 3), random(2, 5, 3, seed=1)
    got = lyra_ops.SoftDTW(use_cuda=False, gamma=0.7, dist_func=lambda a, b: torch.cdist(a, b, p=1))(x, y)
    same(got, soft_dtw(x, y, cost="l1", gamma=0.7))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"dist_func": lambda a, b: a}, ValueError, "dist_func's result: got shape (1, 3, 4), expected (1, 3, 2)"),
        ({"dist_func": "l1"}, TypeError, "dist_func: got str, expected None or a function"),
        ({"bandwidth": "1"}, TypeError, "bandwidth: got str, expected None or a number"),
        ({"bandwidth": -1}, ValueError, "bandwidth: got -1"),
        ({"gamma": -1.0}, ValueError, "gamma: got -1.0"),
    ],
)
def test_drop_in_class_refuses(arguments: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error) as raised:
        lyra_ops.SoftDTW(use_cuda=False, **arguments)(random(1, 3, 4), random(1, 2, 4))
    assert message in str(raised.value)


def test_drop_in_class_refuses_a_cpu_tensor_where_cuda_was_asked_for() -> None:
    with pytest.raises(ValueError, match="X: got a tensor on cpu"):
        lyra_ops.SoftDTW(use_cuda=True)(random(1, 2, 2), random(1, 2, 2))


@pytest.mark.parametrize("cost", ["sqeuclidean", "contrastive"])
def test_pair_cost_is_what_soft_dtw_aligns_by(cost: str) -> None:
    x, y, lengths = random(3, 6, 4), random(3, 5, 4, seed=1), ragged(3, 6, 5)
    pairs = lyra_ops.pair_cost(x, y, *lengths, cost=cost)
    value = soft_dtw(x, y, *lengths, cost=cost, gamma=0.3)  # which rounds the cost in another order
    torch.testing.assert_close(soft_dtw_from_cost(pairs, *lengths, gamma=0.3), value, rtol=1e-13, atol=1e-13)
    with pytest.raises(ValueError, match="x_lengths: sample 1 has length 9"):
        lyra_ops.pair_cost(x, y, torch.tensor([6, 9, 1]))


def test_packed_tokens_of_no_sample_are_refused() -> None:
    with pytest.raises(ValueError, match="cu_seqlens_x: "):
        lyra_ops.soft_dtw_packed(random(5, 2), random(0, 2), torch.tensor([0]), torch.tensor([0]), max_seqlen_x=5)


def test_matches_aeon_and_ott() -> None:
    """Too large, or too strict about versions, to be asked for: compared with where they are installed."""
    aeon = pytest.importorskip("aeon.distances")
    jax, costs = pytest.importorskip("jax"), pytest.importorskip("ott.geometry.costs")
    jax.config.update("jax_enable_x64", True)
    x, y = random(1, 30, 4), random(1, 17, 4, seed=1)
    x.requires_grad_()
    value = soft_dtw(x, y, gamma=0.5)
    (gradient,) = torch.autograd.grad(value, x)
    a, b = x[0].detach().numpy(), y[0].numpy()
    assert aeon.soft_dtw_distance(a.T, b.T, gamma=0.5) == pytest.approx(value.item(), rel=1e-10)
    theirs = costs.SoftDTW(gamma=0.5, ground_cost=costs.SqEuclidean())
    ott, slope = jax.value_and_grad(theirs)(jax.numpy.asarray(a), jax.numpy.asarray(b))
    assert float(ott) == pytest.approx(value.item(), rel=1e-10)
    torch.testing.assert_close(gradient[0], torch.tensor(slope.tolist(), dtype=torch.float64), rtol=1e-10, atol=1e-10)
    debiased = costs.SoftDTW(gamma=0.5, ground_cost=costs.SqEuclidean(), debiased=True)
    divergence = lyra_ops.soft_dtw_divergence(x, y, gamma=0.5).item()
    assert float(debiased(jax.numpy.asarray(a), jax.numpy.asarray(b))) == pytest.approx(divergence, rel=1e-10)


# --- in training -------------------------------------------------------------------------------------------------


def loss_of(x: Tensor, y: Tensor, n: Tensor, m: Tensor) -> Tensor:
    return lyra_ops.SoftDTWLoss(cost="contrastive", temperature=0.5, gamma=0.1, normalize="x")(x, y, n, m)


def test_compiles_into_one_graph() -> None:
    x, y, (n, m) = random(3, 6, 4).float(), random(3, 5, 4, seed=1).float(), ragged(3, 6, 5)
    x.requires_grad_()
    loss = torch.compile(loss_of, fullgraph=True, backend="aot_eager")(x, y, n, m)
    plain = loss_of(x, y, n, m)
    torch.testing.assert_close(loss, plain)
    torch.testing.assert_close(torch.autograd.grad(loss, x), torch.autograd.grad(plain, x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_changes_no_bit(dtype: torch.dtype) -> None:
    x, y, (n, m) = random(2, 6, 4).to(dtype), random(2, 5, 4, seed=1).to(dtype), ragged(2, 6, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = loss_of(x, y, n, m)
    assert inside.dtype == torch.float32 and torch.equal(inside, loss_of(x, y, n, m))


def test_checkpointing_changes_no_bit() -> None:
    x, y, (n, m) = random(2, 6, 4).requires_grad_(), random(2, 5, 4, seed=1), ragged(2, 6, 5)
    (want,) = torch.autograd.grad(loss_of(x, y, n, m), x)
    (got,) = torch.autograd.grad(checkpoint(loss_of, x, y, n, m, use_reentrant=False), x)
    assert torch.equal(got, want)


def test_strides_change_no_bit() -> None:
    x, y = random(2, 6, 4), random(2, 5, 4, seed=1)
    wide = random(2, 12, 8)
    wide[:, ::2, ::2] = x
    want = soft_dtw(x, y, cost="l1")
    assert torch.equal(soft_dtw(wide[:, ::2, ::2], y.mT.contiguous().mT, cost="l1"), want)


def test_empty_batch() -> None:
    x, y = torch.zeros(0, 6, 4, requires_grad=True), torch.zeros(0, 5, 4)
    assert soft_dtw(x, y).shape == (0,)
    assert lyra_ops.soft_dtw_divergence(x, y).shape == (0,)
    loss = lyra_ops.SoftDTWLoss()(x, y)
    assert loss == 0 and torch.autograd.grad(loss, x)[0].shape == x.shape


def _data_parallel(rank: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    gradient = _gradient_over_two(rank)  # its model gone before the group is; see test_multi_lora_ddp.py
    torch.distributed.destroy_process_group()
    if rank == 0:
        torch.save(gradient, f"{folder}/gradient.pt")


def _gradient_over_two(rank: int) -> Tensor:
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Linear(4, 4))
    x, y, n, m = (t[2 * rank : 2 * rank + 2] for t in _batch())
    loss_of(model(x), y, n, m).backward()
    return model.module.weight.grad


def _batch() -> tuple[Tensor, ...]:
    return (
        random(4, 6, 4).float(),
        random(4, 5, 4, seed=1).float(),
        torch.tensor([6, 2, 3, 5]),
        torch.tensor([1, 5, 0, 2]),
    )


def test_data_parallel_over_unequal_lengths(tmp_path) -> None:
    multiprocessing.spawn(_data_parallel, (str(tmp_path),), nprocs=2)
    torch.manual_seed(0)
    model = nn.Linear(4, 4)
    x, y, n, m = _batch()
    halves = [loss_of(model(x[h]), y[h], n[h], m[h]) for h in (slice(0, 2), slice(2, 4))]
    (sum(halves) / 2).backward()
    torch.testing.assert_close(torch.load(tmp_path / "gradient.pt"), model.weight.grad)


# --- properties --------------------------------------------------------------------------------------------------

pairs = st.tuples(st.integers(1, 12), st.integers(1, 12), st.integers(0, 10**6), st.sampled_from([0.05, 0.5, 4.0]))
exactly = settings(max_examples=40, deadline=None)


@exactly
@given(pairs)
def test_every_path_crosses_every_pair_of_diagonals(pair) -> None:
    n, m, seed, gamma = pair
    cost = random(1, n, m, seed=seed)
    expected = soft_dtw_alignment(cost, gamma=gamma)[0]
    prefix = [[soft_dtw_from_cost(cost[:, : i + 1, : j + 1], gamma=gamma)[0] for j in range(m)] for i in range(n)]
    diagonal = torch.zeros(n + m)
    mass = torch.zeros(n + m)
    for i in range(n):
        for j in range(m):
            mass[i + j] += expected[i, j]
            if i and j:  # what came over the diagonal skipped one anti-diagonal
                share = torch.exp((prefix[i][j] - cost[0, i, j] - prefix[i - 1][j - 1]) / gamma)
                diagonal[i + j] += expected[i, j] * share
    for k in range(n + m - 1):
        torch.testing.assert_close(mass[k] + diagonal[k + 1], torch.tensor(1.0), rtol=1e-5, atol=1e-5)


@exactly
@given(pairs)
def test_transposed_and_reversed(pair) -> None:
    n, m, seed, gamma = pair
    cost = random(1, n, m, seed=seed)
    value = soft_dtw_from_cost(cost, gamma=gamma)
    same(soft_dtw_from_cost(cost.mT, gamma=gamma), value)
    same(soft_dtw_from_cost(cost.flip(1, 2), gamma=gamma), value)
    alignment = soft_dtw_alignment(cost, gamma=gamma)
    same(soft_dtw_alignment(cost.mT, gamma=gamma), alignment.mT)
    same(soft_dtw_alignment(cost.flip(1, 2), gamma=gamma), alignment.flip(1, 2))


@exactly
@given(pairs, st.integers(-3, 3))
def test_scale_by_a_power_of_two_is_exact(pair, power) -> None:
    n, m, seed, gamma = pair
    cost, scale = random(1, n, m, seed=seed).float(), 2.0**power
    assert torch.equal(
        soft_dtw_from_cost(cost * scale, gamma=gamma * scale), soft_dtw_from_cost(cost, gamma=gamma) * scale
    )
    assert torch.equal(soft_dtw_alignment(cost * scale, gamma=gamma * scale), soft_dtw_alignment(cost, gamma=gamma))


@exactly
@given(pairs)
def test_padding_and_place_in_the_batch_change_no_bit(pair) -> None:
    n, m, seed, gamma = pair
    cost = random(1, n, m, seed=seed).float()
    batch = torch.full((3, n + 3, m + 2), math.nan)
    batch[0, :1, :1], batch[1, :n, :m], batch[2] = 1.0, cost[0], 0.5
    lengths = torch.tensor([1, n, n + 3]), torch.tensor([1, m, m + 2])
    assert torch.equal(soft_dtw_from_cost(batch, *lengths, gamma=gamma)[1:2], soft_dtw_from_cost(cost, gamma=gamma))
    alignment = soft_dtw_alignment(batch, *lengths, gamma=gamma)[1]
    assert torch.equal(alignment[:n, :m], soft_dtw_alignment(cost, gamma=gamma)[0])
    assert alignment[n:].eq(0).all() and alignment[:, m:].eq(0).all()


@exactly
@given(pairs)
def test_a_wide_band_is_no_band_and_a_narrow_one_costs_more(pair) -> None:
    n, m, seed, gamma = pair
    cost = random(1, n, m, seed=seed)
    values = [soft_dtw_from_cost(cost, gamma=gamma, band=w) for w in range(max(n, m) + 1)]
    assert torch.equal(values[-1], soft_dtw_from_cost(cost, gamma=gamma))
    assert all(narrow >= wide - 1e-9 * wide.abs() for narrow, wide in itertools.pairwise(values))
    same(values[0], soft_dtw_from_cost(cost.masked_fill(~in_band(n, m, 0), math.inf), gamma=gamma))
