"""soft_dtw on a GPU, what only a GPU can show; what holds on every backend is tested in test_soft_dtw.py."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from soft_dtw_oracles import poisoned, ragged, random
from torch import Tensor

import lyra_ops
from lyra_ops.soft_dtw import reference
from lyra_ops.testing import assert_within_reference_error

pytestmark = pytest.mark.gpu


def value_and_gradient(cost: Tensor, *lengths: Tensor, **options) -> tuple[Tensor, Tensor]:
    cost = cost.detach().requires_grad_()
    value = lyra_ops.soft_dtw_from_cost(cost, *lengths, backend="cuda", **options)
    (gradient,) = torch.autograd.grad(value.sum(), cost)
    return value.detach(), gradient


def on_gpu(*tensors: Tensor) -> Iterator[Tensor]:
    return (t.cuda() for t in tensors)


@pytest.mark.sanitize
@pytest.mark.parametrize(
    ("rows", "columns", "gamma", "band", "scale"),
    [
        (1, 1, 1.0, None, 1),
        (5, 7, 1.0, None, 1),
        (33, 31, 0.1, None, 1),
        (300, 64, 0.1, None, 1),
        (70, 600, 0.1, None, 1),
        (130, 300, 1.0, 2, 1),
        (300, 130, 0.01, 20, 1),
        (60, 90, 1e-4, None, 1e4),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_as_right_as_plain_torch(rows, columns, gamma, band, scale, dtype):
    cost, lengths = (scale * random(3, rows, columns)).to(dtype), ragged(3, rows, columns)
    got = value_and_gradient(*on_gpu(poisoned(cost, *lengths), *lengths), gamma=gamma, band=band)
    if dtype == torch.float64:
        want = lyra_ops.soft_dtw_from_cost(cost.requires_grad_(), *lengths, gamma=gamma, band=band, backend="reference")
        torch.testing.assert_close(got[0].cpu(), want.detach(), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(got[1].cpu(), torch.autograd.grad(want.sum(), cost)[0], rtol=1e-9, atol=1e-9)
        return
    results = []
    for leaf in (cost.clone().requires_grad_(), cost.double().requires_grad_()):
        value = reference.soft_dtw(leaf, *lengths, gamma, band)
        results.append((value.detach(), torch.autograd.grad(value.sum(), leaf)[0]))
    for ours, plain, exact in zip(got, *results):
        assert_within_reference_error(ours, plain, exact)


@pytest.mark.parametrize(("rows", "columns"), [(1500, 200), (4096, 1024)])
def test_long_pairs_lose_no_accuracy(rows, columns):
    cost = torch.randn(2, rows, columns, device="cuda").square() * 64
    value, gradient = value_and_gradient(cost, gamma=0.1)
    exact = value_and_gradient(cost.double(), gamma=0.1)
    assert ((value - exact[0]) / exact[0]).abs().max() <= 1e-6
    assert (gradient - exact[1]).norm() / exact[1].norm() <= 1e-4


def test_bitwise_the_same_each_time_and_alone_or_in_a_batch():
    cost, lengths = torch.randn(64, 200, 150, device="cuda"), tuple(on_gpu(*ragged(64, 200, 150)))
    first = value_and_gradient(cost, *lengths)
    for _ in range(20):
        again = value_and_gradient(cost, *lengths)
        assert torch.equal(first[0], again[0])
        assert torch.equal(first[1], again[1])
    for b in (0, 7, 63):
        alone = value_and_gradient(cost[b : b + 1], lengths[0][b : b + 1], lengths[1][b : b + 1])
        assert torch.equal(alone[0][0], first[0][b])
        assert torch.equal(alone[1][0], first[1][b])


def test_works_on_the_current_stream():
    cost = torch.empty(8, 100, 60, device="cuda").fill_(math.nan)
    truth = torch.randn(8, 100, 60, device="cuda")
    want = value_and_gradient(truth)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(50_000_000)  # whoever does not wait for this stream reads NaN
        cost.copy_(truth)
        value, gradient = value_and_gradient(cost)
        torch.cuda.current_stream().synchronize()
    assert torch.equal(value, want[0])
    assert torch.equal(gradient, want[1])


def test_can_be_captured_in_a_graph():
    cost, lengths = torch.randn(4, 90, 70, device="cuda"), tuple(on_gpu(*ragged(4, 90, 70)))
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        value_and_gradient(cost, *lengths)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        value, gradient = value_and_gradient(cost, *lengths)
    cost.copy_(torch.randn_like(cost))
    lengths[0].copy_(ragged(4, 90, 70, seed=5)[0])
    value.fill_(math.nan)
    gradient.fill_(math.nan)
    graph.replay()
    want = value_and_gradient(cost, *lengths)
    assert torch.equal(value, want[0])
    assert torch.equal(gradient, want[1])


@pytest.mark.parametrize("options", ["plain", "gamma and windows"])
def test_never_waits_for_the_gpu(options: str):
    cost, lengths = torch.randn(4, 90, 70, device="cuda"), tuple(on_gpu(*ragged(4, 90, 70)))
    given = {}
    if options != "plain":
        low, high = (torch.full((4, 90), column, device="cuda") for column in (0, 60))
        given = {"gamma": torch.rand(4, device="cuda").add(0.1).requires_grad_(), "band": (low, high)}
    value_and_gradient(cost, *lengths, **given)
    torch.cuda.set_sync_debug_mode("error")
    try:
        value_and_gradient(cost, *lengths, **given)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.sanitize
def test_a_bad_length_gives_nan_for_its_sample_alone_and_reads_nothing_outside():
    cost = torch.randn(5, 40, 70, device="cuda")
    x_lengths = torch.tensor([40, 0, 41, 2**40, 7], device="cuda")
    y_lengths = torch.tensor([70, 70, 70, 70, -1], device="cuda")
    value, gradient = value_and_gradient(cost, x_lengths, y_lengths)
    assert value[0].isfinite()
    assert gradient[0].isfinite().all()
    assert value[1:].isnan().all()
    assert gradient[1:].isnan().all()


def test_takes_strided_costs_and_broadcast_gradients_as_they_are():
    large = torch.randn(4, 50, 2, 130, device="cuda")
    view = large[:, :, 1, 20:90]
    want = value_and_gradient(view.contiguous())
    got = value_and_gradient(view)
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_a_graph_break(dynamic):
    def loss(x: Tensor, y: Tensor) -> Tensor:
        return lyra_ops.soft_dtw(x, y, cost="contrastive", temperature=0.06, gamma=0.1).mean()

    x, y = torch.randn(3, 40, 8, device="cuda"), torch.randn(3, 20, 8, device="cuda")
    want, got = ([t.clone().requires_grad_() for t in (x, y)] for _ in range(2))
    loss(*want).backward()
    torch.compile(loss, fullgraph=True, dynamic=dynamic)(*got).backward()
    for a, b in zip(got, want):
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_runs_on_the_device_of_its_input():
    cost = torch.randn(3, 40, 70, device="cuda:1")
    value, gradient = value_and_gradient(cost)
    assert value.device == gradient.device == cost.device
    want = value_and_gradient(cost.to("cuda:0"))
    assert torch.equal(value.cpu(), want[0].cpu())
    assert torch.equal(gradient.cpu(), want[1].cpu())


def test_more_than_two_to_the_31_cells():
    batch, size = 513, 2048
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GiB of free GPU memory")
    cost = torch.rand(batch, size, size, device="cuda")
    value, gradient = value_and_gradient(cost, band=8)
    alone = value_and_gradient(cost[-1:], band=8)
    assert torch.equal(value[-1:], alone[0])
    assert torch.equal(gradient[-1:], alone[1])
