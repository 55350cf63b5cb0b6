"""soft_dtw on a GPU, what only a GPU can show; what holds on every backend is tested in test_soft_dtw.py."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from soft_dtw_oracles import poisoned, ragged, random
from torch import Tensor

import lyra_ops

pytestmark = pytest.mark.gpu


def value_and_gradient(cost: Tensor, *lengths: Tensor, **options) -> tuple[Tensor, Tensor]:
    cost = cost.detach().requires_grad_()
    value = lyra_ops.soft_dtw_from_cost(cost, *lengths, backend="cuda", **options)
    (gradient,) = torch.autograd.grad(value.sum(), cost)
    return value.detach(), gradient


def on_gpu(*tensors: Tensor) -> Iterator[Tensor]:
    return (t.cuda() for t in tensors)


BARS = {16: 1e-4, 8: 1e-2}  # relative L2 error of the alignment


def relative_error(got: Tensor, want: Tensor) -> float:
    return float((got.cpu().double() - want).norm() / want.norm().clamp(min=torch.finfo(torch.float64).tiny))


def windows(x_lengths: Tensor, y_lengths: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    middle = torch.arange(rows) * ((y_lengths - 1.0) / (x_lengths - 1).clamp(min=1))[:, None]
    reach = 9 + 5 * torch.rand(2, len(x_lengths), rows, generator=torch.Generator().manual_seed(3))
    return (middle - reach[0]).long(), (middle + reach[1]).long()


@pytest.mark.sanitize
@pytest.mark.parametrize(
    ("rows", "columns", "gamma", "band", "scale", "drop"),
    [
        (1, 1, 1.0, None, 1, False),
        (5, 7, 1.0, None, 1, False),
        (33, 31, 0.1, None, 1, False),
        (300, 64, 0.1, None, 1, False),
        (70, 600, 0.1, None, 1, False),
        (130, 300, 1.0, 2, 1, False),
        (300, 130, 0.01, 20, 1, False),
        (60, 90, 1e-4, None, 1e4, False),
        (90, 130, 1.0, "windows", 1, False),
        (90, 130, 0.1, 4, 1, True),
        (60, 70, 1.0, "windows", 1, True),
        (150, 40, 1.0, None, 1, True),
        (60, 90, 0.0, None, 1, False),
        (60, 90, 0.0, 5, 1, True),
    ],
)
@pytest.mark.parametrize(("dtype", "bits"), [(torch.float32, 16), (torch.float32, 8), (torch.float64, 16)])
def test_every_kind_of_call_is_right(rows, columns, gamma, band, scale, drop, dtype, bits):
    lengths = ragged(3, rows, columns)
    given = [(scale * random(3, rows, columns)).to(dtype)]
    if drop:
        given.append((scale * random(3, rows, seed=2).abs()).to(dtype))
    if gamma:
        given.append(gamma * torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64))
    band = windows(*lengths, rows) if band == "windows" else band

    def results(leaves: list[Tensor], lengths, band, **options) -> tuple[Tensor, ...]:
        leaves = [leaf.clone().requires_grad_() for leaf in leaves]
        names = ["drop_cost"] * drop + ["gamma"] * (gamma > 0)
        options = {"gamma": gamma, **options, **dict(zip(names, leaves[1:]))}
        value = lyra_ops.soft_dtw_from_cost(leaves[0], *lengths, band=band, **options)
        return value.detach(), *torch.autograd.grad(value.sum(), leaves)

    exact = results([leaf.double() for leaf in given], lengths, band, backend="reference")
    moved = [poisoned(given[0], *lengths), *given[1:]]
    on_device = tuple(on_gpu(*band)) if isinstance(band, tuple) else band
    got = results(list(on_gpu(*moved)), tuple(on_gpu(*lengths)), on_device, bits=bits, backend="cuda")
    for ours, truth in zip(got, exact):
        if dtype == torch.float64:
            torch.testing.assert_close(ours.cpu(), truth, rtol=1e-9, atol=1e-9)
        else:
            assert relative_error(ours, truth) <= (1e-6 if ours is got[0] else BARS[bits])


@pytest.mark.sanitize
@pytest.mark.parametrize("band", [None, 4, "windows"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_second_derivatives_are_those_of_the_reference(band, dtype):
    lengths = ragged(3, 60, 70)
    given = [random(3, 60, 70), random(3, 60, seed=2).abs(), torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)]
    given = [leaf.to(dtype) for leaf in given]
    along = [random(3, 60, 70, seed=5), random(3, 60, seed=6), random(3, seed=7)]
    band = windows(*lengths, 60) if band == "windows" else band

    def results(leaves: list[Tensor], along: list[Tensor], lengths, band, backend: str) -> tuple[Tensor, ...]:
        leaves = [leaf.clone().requires_grad_() for leaf in leaves]
        options = {"band": band, "drop_cost": leaves[1], "gamma": leaves[2], "backend": backend}
        value = lyra_ops.soft_dtw_from_cost(leaves[0], *lengths, **options)
        first = torch.autograd.grad(value.sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum((a * g).sum() for a, g in zip(along, first)), leaves)

    exact = results([leaf.double() for leaf in given], along, lengths, band, "reference")
    on_device = tuple(on_gpu(*band)) if isinstance(band, tuple) else band
    moved = [list(on_gpu(*(t.to(dtype) for t in tensors))) for tensors in (given, along)]
    got = results(*moved, tuple(on_gpu(*lengths)), on_device, "cuda")
    for ours, truth in zip(got, exact):
        if dtype == torch.float64:
            torch.testing.assert_close(ours.cpu(), truth, rtol=1e-8, atol=1e-8)
        else:
            assert relative_error(ours, truth) <= 10 * BARS[16]


@pytest.mark.parametrize("bits", [16, 8])
@pytest.mark.parametrize(("rows", "columns", "band"), [(1500, 200, None), (4096, 1024, None), (8192, 8192, 512)])
def test_long_pairs_lose_no_accuracy(rows, columns, band, bits):
    cost = torch.randn(2, rows, columns, device="cuda").square() * 64
    value, gradient = value_and_gradient(cost, gamma=0.1, band=band, bits=bits)
    exact = value_and_gradient(cost.double(), gamma=0.1, band=band)
    assert ((value - exact[0]) / exact[0]).abs().max() <= 1e-6
    assert (gradient - exact[1]).norm() / exact[1].norm() <= BARS[bits]


def test_ties_do_not_drift():
    cost = torch.zeros(1, 4096, 4096, device="cuda")
    gradient, exact = (value_and_gradient(c, band=256)[1] for c in (cost, cost.double()))
    assert (gradient - exact).norm() / exact.norm() <= BARS[16]


def test_more_strips_than_the_device_holds_at_once():
    """Each block waits for its left neighbour: right only if blocks are begun in the order of their tickets."""
    cost = torch.rand(64, 100, 32 * 100, device="cuda")
    value, gradient = value_and_gradient(cost)
    alone = value_and_gradient(cost[-1:])
    assert torch.equal(value[-1:], alone[0])
    assert torch.equal(gradient[-1:], alone[1])


def test_an_int_band_keeps_what_is_inside_it():
    cost, full = torch.rand(1, 4096, 4096, device="cuda"), torch.tensor([4096], device="cuda")
    options = (1.0, None, 256, None, None, None, 16)
    _, probs = torch.ops.lyra.soft_dtw_forward(cost, full, full, *options)
    assert probs.numel() <= 4 * 4096 * (2 * 256 + 1) * 1.3  # 64-step skew and a strip's corners
    _, nothing = torch.ops.lyra.soft_dtw_forward(cost, full, full, *options[:-1], 0)
    assert nothing.numel() == 0


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


@pytest.mark.parametrize("options", ["plain", "gamma, windows and drop"])
def test_never_waits_for_the_gpu(options: str):
    cost, lengths = torch.randn(4, 90, 70, device="cuda"), tuple(on_gpu(*ragged(4, 90, 70)))
    given = {}
    if options != "plain":
        low, high = (torch.full((4, 90), column, device="cuda") for column in (0, 60))
        given = {"gamma": torch.rand(4, device="cuda").add(0.1).requires_grad_(), "band": (low, high)}
        given["drop_cost"] = torch.rand(4, 90, device="cuda").requires_grad_()
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
