"""The CUDA kernels of soft_dtw on the CPU: right whichever thread or block goes first, wrong without any barrier."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
import torch
from barriers import assert_needed, barriers
from soft_dtw_oracles import looped, poisoned, ragged, random
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from lyra_ops._backend import missing_kernel
from lyra_ops.soft_dtw import reference
from lyra_ops.testing import assert_within_reference_error

SOURCES = Path(__file__).parents[2] / "csrc" / "soft_dtw"
# Which thread goes first, and how many blocks the device has room for: one at a time, the last first, is where a block
# that waits for one that is not begun yet waits for ever.
ORDERS = {
    "forward": ("forward", 0, 0),
    "reverse": ("reverse", 0, 1),
    "shuffled": ("shuffled", 1, 4),
    "lazy": ("lazy", 0, 4),
}
# Relative L2 error of the alignment: what shares of 16 and 8 bits are promised to keep to.
BARS = {16: 1e-4, 8: 1e-2}


def guard(file: str, text: str, instead: str) -> tuple[Path, int, int, str]:
    source = (SOURCES / file).read_text()
    assert source.count(text) == 1, text
    start = source.index(text)
    return SOURCES / file, start, start + len(text), instead


# What keeps threads and blocks in order: each barrier, the tickets, the waiting for letters and for other strips' sums.
HEADERS = [*sorted(SOURCES.glob("*.h")), SOURCES / "soft_dtw.cuh"]
GUARDS = barriers(*HEADERS) | {
    "ticket": guard(
        "sweep.h",
        "if (threadIdx.x == 0) ticket = atomicAdd(tickets, 1);",
        "if (WITHOUT) ticket = blockIdx.x; else if (threadIdx.x == 0) ticket = atomicAdd(tickets, 1);",
    ),
    "letter": guard("sweep.h", "while (!__all_sync(", "while (!WITHOUT && !__all_sync("),
    "sum": guard("sweep.h", "while (found == kAbsent)", "while (!WITHOUT && found == kAbsent)"),
    "absent": guard("soft_dtw.cuh", "slots[k] = kAbsent;", "slots[k] = WITHOUT ? 0 : kAbsent;"),
    "skew": guard("sweep.h", "left = on_its_way;", "left = WITHOUT ? mine : on_its_way;"),
}


@pytest.fixture(scope="module")
def kernels(build_switched) -> ModuleType:
    return build_switched("soft_dtw.cpp", list(GUARDS.values()))


@dataclass
class Result:
    value: Tensor
    gradient: Tensor
    drop: Tensor
    entropy: Tensor
    probs: Tensor

    def all(self) -> tuple[Tensor, ...]:
        return self.value, self.gradient, self.drop, self.entropy


def given(tensor: Tensor | None, dtype: torch.dtype | None = None):
    return None if tensor is None else tensor.to(dtype or tensor.dtype).contiguous().numpy()


def run(
    kernels: ModuleType,
    cost: Tensor,
    x_lengths: Tensor,
    y_lengths: Tensor,
    gamma: float | Tensor = 1.0,
    band: int | tuple[Tensor, Tensor] | None = None,
    drop: Tensor | None = None,
    grad: Tensor | None = None,
    order: str = "forward",
    bits: int = 16,
    keep: bool = True,
) -> Result:
    """Value, gradients and entropy, computed in float64 with ``bits`` = 64 and in float32 otherwise."""
    kernels.configure(*ORDERS[order])
    dtype = torch.float64 if bits == 64 else torch.float32
    grad = torch.ones(cost.shape[0]) if grad is None else grad
    low, high = band if isinstance(band, tuple) else (None, None)
    width = band if isinstance(band, int) else -1
    arguments = kernels.Arguments(*cost.shape, x_lengths.numpy(), y_lengths.numpy(), width, given(low), given(high))
    number, numbers = (1.0, given(gamma, torch.float64)) if isinstance(gamma, Tensor) else (gamma, None)
    value, probs = getattr(kernels, f"forward{bits}")(
        arguments, given(cost, dtype), number, numbers, given(drop, dtype), keep
    )
    if not keep:
        return Result(torch.from_numpy(value), *(torch.empty(0),) * 4)
    rest = getattr(kernels, f"backward{bits}")(arguments, given(grad, dtype), value, probs, drop is not None, True)
    return Result(torch.from_numpy(value), *map(torch.from_numpy, rest), torch.from_numpy(probs))


@dataclass(frozen=True)
class Case:
    rows: int
    columns: int
    gamma: float = 1.0
    band: int | str | None = None  # "windows" around the diagonal
    drop: bool = False
    bits: int = 16
    scale: float = 1.0

    @property
    def name(self) -> str:
        extras = [f"gamma{self.gamma:g}", f"band{self.band}", "drop" * self.drop, f"{self.bits}bits"]
        return "-".join([f"{self.rows}x{self.columns}", *filter(None, extras)])


CASES = [
    Case(90, 130, drop=True, band=4),
    Case(60, 70, drop=True, band="windows"),
    *(Case(n, m) for n, m in [(1, 1), (1, 40), (40, 1), (5, 7), (16, 32), (17, 33), (33, 17)]),
    *(Case(n, m, gamma=0.1) for n, m in [(70, 20), (20, 200)]),
    Case(50, 65, bits=8),
    *(Case(60, 45, band=w) for w in (0, 3, 200)),
    *(Case(n, m, band=1) for n, m in [(130, 30), (30, 170), (100, 100)]),
    Case(60, 70, band="windows"),
    Case(40, 40, bits=64),
    Case(60, 90, gamma=0.1, band=5, bits=64),
    *(Case(n, m, drop=True) for n, m in [(1, 1), (1, 5), (40, 1), (40, 70)]),
    Case(100, 30, drop=True, band=2),
    Case(40, 50, drop=True, bits=8),
    Case(40, 50, drop=True, bits=64),
    Case(70, 40, drop=True, gamma=0.05, bits=64),
    *(Case(40, 70, gamma=0.0, drop=drop, bits=bits) for drop in (False, True) for bits in (16, 64)),
    Case(60, 70, gamma=0.0, band="windows", drop=True),
    # Exponents that fit 32 bits barely, not at all, and that a double's 53 bits hold barely.
    Case(30, 40, gamma=1e-3, scale=1e3),
    Case(30, 70, gamma=1e-4, scale=1e4),
    Case(30, 40, gamma=1e-4, scale=1e4, drop=True),
    Case(10, 40, gamma=1e-4, scale=1e8, bits=64),
]


def windows_around_the_diagonal(x_lengths: Tensor, y_lengths: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Ragged, neither end monotone; some stick out of the pair on either side."""
    slope = (y_lengths - 1.0) / (x_lengths - 1).clamp(min=1)
    middle = torch.arange(rows) * slope[:, None]
    reach = 7 + 5 * torch.rand(2, len(x_lengths), rows, generator=torch.Generator().manual_seed(3))
    return (middle - reach[0]).long(), (middle + reach[1]).long()


@dataclass
class Inputs:
    cost: Tensor
    lengths: tuple[Tensor, Tensor]
    gammas: float | Tensor
    band: int | tuple[Tensor, Tensor] | None
    drop: Tensor | None
    grad: Tensor

    def options(self) -> dict:
        return {"gamma": self.gammas, "band": self.band, "drop": self.drop, "grad": self.grad}


def inputs_of(case: Case) -> Inputs:
    lengths = ragged(3, case.rows, case.columns)
    dtype = torch.float64 if case.bits == 64 else torch.float32
    cost = (case.scale * random(3, case.rows, case.columns)).to(dtype)
    drop = (case.scale * random(3, case.rows, seed=2).abs()).to(dtype) if case.drop else None
    band = windows_around_the_diagonal(*lengths, case.rows) if case.band == "windows" else case.band
    gammas = case.gamma and case.gamma * torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)
    return Inputs(poisoned(cost, *lengths), lengths, gammas, band, drop, random(3, seed=1).to(dtype))


def plainly(inputs: Inputs, dtype: torch.dtype) -> list[Tensor | None]:
    """Value, gradients in cost and drop, entropy, by the reference in `dtype`."""
    cost = inputs.cost.to(dtype).clone().requires_grad_()
    drop = None if inputs.drop is None else inputs.drop.to(dtype).clone().requires_grad_()
    gamma = inputs.gammas
    if isinstance(gamma, Tensor):
        gamma = gamma.to(dtype).clone().requires_grad_()
    value = reference.soft_dtw(cost, *inputs.lengths, gamma, inputs.band, drop)
    leaves = [leaf for leaf in (cost, drop) if leaf is not None]
    gradients = torch.autograd.grad(value, leaves, inputs.grad.to(dtype), retain_graph=True)
    slope = torch.autograd.grad(value.sum(), gamma)[0] if isinstance(gamma, Tensor) else torch.zeros(3, dtype=dtype)
    return [value.detach(), gradients[0], gradients[1] if inputs.drop is not None else None, -slope]


@functools.cache
def inputs_and_truth(case: Case) -> tuple[Inputs, list[Tensor | None], list[Tensor | None]]:
    """Inputs, then the results by plain torch in the case's dtype, and exactly."""
    inputs = inputs_of(case)
    exact = plainly(inputs, torch.float64)
    if case.bits != 64:
        return inputs, plainly(inputs, torch.float32), exact
    if not case.drop and case.gamma:
        n, m = inputs.lengths
        inside = reference.inside_band(n, m, case.rows, case.columns, inputs.band)
        for b in range(3):
            cell = inputs.cost[b].masked_fill(~inside[b], math.inf)[: n[b], : m[b]]
            value, expected = looped(cell, float(inputs.gammas[b]))
            exact[0] = exact[0].clone()
            exact[0][b], exact[1][b, : n[b], : m[b]] = value, inputs.grad[b] * expected
    return inputs, plainly(inputs, torch.float64), exact


def relative_error(got: Tensor, want: Tensor) -> float:
    got, want = got.double(), want.double()
    return float((got - want).norm() / want.norm().clamp(min=torch.finfo(torch.float64).tiny))


def check_case(case: Case, kernels: ModuleType, order: str) -> None:
    inputs, plain, exact = inputs_and_truth(case)
    got = run(kernels, inputs.cost, *inputs.lengths, order=order, bits=case.bits, **inputs.options())
    assert_within_reference_error(got.value, plain[0], exact[0], name="value")
    names = ("gradient", "gradient in drop", "entropy")
    for name, result, by_torch, truth in zip(names, got.all()[1:], plain[1:], exact[1:]):
        if truth is None:
            continue
        if case.bits != 64:
            assert relative_error(result, truth) <= BARS[case.bits], name
        elif truth is exact[1] and not case.drop and case.gamma:
            assert_within_reference_error(result, by_torch, truth, name=name)
        else:  # the reference itself is the truth, so all that can be asked is that rounding alone parts them
            torch.testing.assert_close(result, truth, rtol=1e-10, atol=1e-11)
    if case.bits == 64:
        return
    value_alone = run(
        kernels, inputs.cost, *inputs.lengths, order=order, bits=case.bits, keep=False, **inputs.options()
    )
    assert torch.equal(value_alone.value, got.value)


def check_nan_stays_in_its_pair(kernels: ModuleType, order: str) -> None:
    clean = random(3, 40, 70, dtype=torch.float32)
    lengths = torch.tensor([40, 33, 40]), torch.tensor([70, 66, 10])
    want = run(kernels, clean, *lengths, order=order)
    for place in [(0, 0), (32, 65), (20, 40)]:
        for poison in (math.nan, -math.inf):
            cost = clean.clone()
            cost[1][place] = poison
            got = run(kernels, cost, *lengths, order=order)
            assert got.value[1].isnan()
            assert got.entropy[1].isnan()
            assert got.gradient[1, :33, :66].isnan().all()
            assert (got.gradient[1, 33:] == 0).all()
            assert (got.gradient[1, :, 66:] == 0).all()
            for b in (0, 2):
                assert torch.equal(got.value[b], want.value[b])
                assert torch.equal(got.gradient[b], want.gradient[b])


def check_nan_among_prices_and_gammas(kernels: ModuleType, order: str) -> None:
    cost, lengths = random(4, 30, 40), (torch.tensor([30, 30, 20, 30]), torch.tensor([40, 40, 40, 40]))
    drop, gamma = random(4, 30, seed=1).abs(), torch.tensor([1.0, 1.0, 1.0, 0.0])
    drop[0, 29], drop[2, 25] = math.nan, math.nan  # the second is padding
    got = run(kernels, cost, *lengths, gamma, drop=drop, order=order)
    assert got.value.isnan().tolist() == [True, False, False, True]
    assert got.drop.isnan().any(1).tolist() == [True, False, False, True]
    assert (got.drop[2, 20:] == 0).all()


def check_no_path(kernels: ModuleType, order: str) -> None:
    cost = random(2, 40, 70, dtype=torch.float32)
    cost[0, :, 50] = math.inf
    lengths = torch.tensor([40, 40]), torch.tensor([70, 70])
    gap = torch.zeros(2, 40, dtype=torch.int64), torch.full((2, 40), 69)
    gap[0][1, 20:], gap[1][1, :20] = 36, 34
    for drop in (None, random(2, 40, seed=1).abs()):
        for gamma in (1.0, 0.0):
            got = run(kernels, cost, *lengths, gamma, band=gap, drop=drop, order=order)
            assert (got.value == math.inf).all()
            assert (got.gradient == 0).all()
            assert (got.drop == 0).all()
    got = run(kernels, cost, *lengths, order=order)
    assert got.value[0] == math.inf
    assert (got.gradient[0] == 0).all()
    assert got.entropy[0] == 0
    assert got.gradient[1].sum() >= 70


def check_forbidden_cells_get_no_gradient(kernels: ModuleType, order: str) -> None:
    cost = random(1, 60, 40, dtype=torch.float32)
    blocked = torch.rand(cost.shape, generator=torch.Generator().manual_seed(2)) < 0.2
    blocked[0, 0, 0] = blocked[0, -1, -1] = False
    blocked[0, range(40), range(40)] = blocked[0, 39:, 39] = False
    cost.masked_fill_(blocked, math.inf)
    lengths = torch.tensor([60]), torch.tensor([40])
    for bits in (8, 16, 64):
        for drop in (None, random(1, 60, seed=1).abs()):
            got = run(kernels, cost, *lengths, drop=drop, order=order, bits=bits)
            assert got.value.isfinite().all()
            assert (got.gradient[blocked] == 0).all()
            assert (got.gradient >= 0).all()


def check_lengths_out_of_range(kernels: ModuleType, order: str) -> None:
    cost, drop = random(7, 20, 40, dtype=torch.float32), random(7, 20, seed=1).abs()
    x_lengths = torch.tensor([20, 0, -3, 21, 2**40, 20, 20])
    y_lengths = torch.tensor([40, 40, 40, 40, 40, 41, -(2**62)])
    got = run(kernels, cost, x_lengths, y_lengths, drop=drop, order=order)
    for result in got.all():
        assert result[0].isfinite().all()
        assert result[1:].isnan().all()


def check_ties_count_paths(kernels: ModuleType, order: str) -> None:
    got = run(kernels, torch.zeros(1, 4, 4), torch.tensor([4]), torch.tensor([4]), order=order, bits=64)
    assert got.value.item() == pytest.approx(-math.log(63), rel=1e-15)  # Delannoy number D(3, 3)
    assert got.gradient[0, 1, 1].item() == pytest.approx(3 * 13 / 63, rel=1e-14)


def check_same_alone_and_in_a_batch(kernels: ModuleType, order: str) -> None:
    cost, lengths, drop = random(4, 40, 70), ragged(4, 40, 70), random(4, 40, seed=1).abs()
    batch = run(kernels, cost, *lengths, drop=drop, band=6, order=order)
    for b in range(4):
        n, m = lengths[0][b], lengths[1][b]
        alone = run(kernels, cost[b : b + 1, :n, :m], n[None], m[None], drop=drop[b : b + 1, :n], band=6, order=order)
        assert torch.equal(alone.value[0], batch.value[b])
        assert torch.equal(alone.gradient[0], batch.gradient[b, :n, :m])
        assert torch.equal(alone.drop[0], batch.drop[b, :n])
        assert torch.equal(alone.entropy[0], batch.entropy[b])


def check_one_pair_of_large_costs_in_one_strip(kernels: ModuleType, order: str) -> None:
    cost = random(1, 30, 70, dtype=torch.float32)
    cost[0, 5, 3] = 1e9
    got = run(kernels, cost, torch.tensor([30]), torch.tensor([70]), order=order)
    value, expected = looped(cost[0].double(), 1.0)
    assert got.value.item() == pytest.approx(value.item(), rel=1e-6)
    assert got.gradient[0, 5, 3] == 0
    assert relative_error(got.gradient[0], expected) <= BARS[16]


def check_one_row_of_large_costs(kernels: ModuleType, order: str) -> None:
    cost = random(1, 30, 70, dtype=torch.float32)
    cost[0, 5] += 1e10  # every path crosses it, and few threads see it
    got = run(kernels, cost, torch.tensor([30]), torch.tensor([70]), order=order)
    value, expected = looped(cost[0].double(), 1.0)
    assert got.value.item() == pytest.approx(value.item(), rel=1e-6)
    assert relative_error(got.gradient[0], expected) <= BARS[16]


def check_hard_ties_prefer_diagonal_then_row_then_column(kernels: ModuleType, order: str) -> None:
    cost = torch.randint(0, 2, (3, 40, 50), generator=torch.Generator().manual_seed(0)).double()
    lengths = ragged(3, 40, 50)
    leaf = cost.clone().requires_grad_()
    want = reference.soft_dtw(leaf, *lengths, 0.0)
    (path,) = torch.autograd.grad(want.sum(), leaf)
    got = run(kernels, cost, *lengths, 0.0, order=order)
    assert torch.equal(got.value.double(), want.detach())
    assert torch.equal(got.gradient.double(), path)


def curvature_by_torch(case: Case, inputs: Inputs, along: list[Tensor | None], dtype: torch.dtype) -> list[Tensor]:
    """Slope of the value along a direction, and its gradients in cost, drop and gamma."""
    leaves = [inputs.cost, inputs.drop, inputs.gammas if isinstance(inputs.gammas, Tensor) else None]
    leaves = [None if leaf is None else leaf.to(dtype).clone().requires_grad_() for leaf in leaves]
    value = reference.soft_dtw(leaves[0], *inputs.lengths, leaves[2] if case.gamma else 0.0, inputs.band, leaves[1])
    real = [leaf for leaf in leaves if leaf is not None]
    gradients = torch.autograd.grad(value.sum(), real, create_graph=bool(case.gamma))
    parts = zip(gradients, [a.to(dtype) for a, leaf in zip(along, leaves) if leaf is not None])
    slope = sum((g * a).flatten(1).sum(1) if g.dim() > 1 else g * a for g, a in parts)
    if not case.gamma:
        return [slope, *(torch.zeros_like(leaf) for leaf in real), torch.zeros(3, dtype=dtype)]
    second = torch.autograd.grad((slope * inputs.grad.to(dtype)).sum(), real)
    return [slope.detach(), *second]


@functools.cache
def curvature_truth(case: Case) -> tuple[Inputs, list[Tensor | None], list[Tensor], list[Tensor]]:
    inputs = inputs_of(case)
    shape = inputs.cost.shape
    inside = reference.inside_band(*inputs.lengths, *shape[1:], inputs.band)
    along = [
        random(*shape, seed=5).masked_fill(~inside, 0),
        random(*shape[:2], seed=6).masked_fill(torch.arange(shape[1]) >= inputs.lengths[0][:, None], 0),
        random(3, seed=7),
    ]
    if not case.drop:
        along[1] = None
    if not case.gamma:
        along[2] = None
    results = [curvature_by_torch(case, inputs, along, dtype) for dtype in (torch.float32, torch.float64)]
    return inputs, along, *results


CURVES = [
    Case(5, 7, bits=64),
    Case(40, 70, bits=64, gamma=0.5),
    Case(60, 45, bits=64, band=3),
    Case(60, 70, bits=64, band="windows", drop=True),
    Case(40, 50, bits=64, drop=True, band=4),
    Case(30, 40, bits=64, gamma=0.0, drop=True),
    Case(40, 70),
    Case(50, 40, drop=True),
    Case(40, 70, bits=8),
]


def check_curvature(case: Case, kernels: ModuleType, order: str) -> None:
    inputs, along, plain, exact = curvature_truth(case)
    forward = run(kernels, inputs.cost, *inputs.lengths, order=order, bits=case.bits, **inputs.options())
    dtype = torch.float64 if case.bits == 64 else torch.float32
    low, high = inputs.band if isinstance(inputs.band, tuple) else (None, None)
    width = inputs.band if isinstance(inputs.band, int) else -1
    arguments = kernels.Arguments(*inputs.cost.shape, *map(given, inputs.lengths), width, given(low), given(high))
    gammas = given(inputs.gammas, torch.float64) if case.gamma else None
    poison = [None if a is None else a.to(dtype) for a in along]
    poison[0] = poisoned(poison[0], *inputs.lengths)
    got = getattr(kernels, f"curvature{case.bits}")(
        arguments, given(inputs.grad, dtype), given(forward.value), forward.probs.numpy(), case.gamma, gammas,
        case.drop, given(poison[0]), given(poison[1]), given(poison[2], torch.float64),
    )  # fmt: skip
    got = [torch.from_numpy(a) for i, a in enumerate(got) if i != 2 or case.drop]
    assert len(got) == len(exact)
    for result, by_torch, truth in zip(got, plain, exact):
        if case.bits == 64:
            torch.testing.assert_close(result, truth, rtol=1e-9, atol=1e-10)
        else:
            assert relative_error(result, truth) <= max(10 * BARS[case.bits], 2 * relative_error(by_torch, truth))


Check = Callable[[ModuleType, str], None]
CHECKS: dict[str, Check] = {
    **{case.name + f"-scale{case.scale:g}": functools.partial(check_case, case) for case in CASES},
    **{"curvature-" + case.name: functools.partial(check_curvature, case) for case in CURVES},
    **{
        name.removeprefix("check_"): f
        for name, f in list(globals().items())
        if name.startswith("check_") and name not in ("check_case", "check_curvature")
    },
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("check", CHECKS)
def test_kernels(kernels: ModuleType, check: str, order: str) -> None:
    CHECKS[check](kernels, order)


def test_orders_agree_bitwise(kernels: ModuleType) -> None:
    cost, lengths, drop = random(3, 50, 150), ragged(3, 50, 150), random(3, 50, seed=1).abs()
    results = [run(kernels, cost, *lengths, drop=drop, order=order) for order in ORDERS]
    for result in results[1:]:
        for ours, first in zip(result.all(), results[0].all()):
            assert torch.equal(ours, first)


@pytest.mark.skipif(missing_kernel("soft_dtw_forward", "cpu") is not None, reason="needs the compiled library")
@pytest.mark.parametrize("band", [None, 0, 5, 40, 500])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (40, 70), (300, 33), (33, 300)])
def test_the_fake_op_knows_how_much_is_kept(kernels: ModuleType, rows: int, columns: int, band: int | None) -> None:
    for drop, bits in [(False, 16), (True, 16), (True, 8), (False, 64)]:
        cost, lengths = torch.zeros(1, rows, columns), (torch.tensor([rows]), torch.tensor([columns]))
        prices = torch.zeros(1, rows) if drop else None
        kept = run(kernels, cost, *lengths, band=band, drop=prices, bits=bits).probs.shape
        dtype = torch.float64 if bits == 64 else torch.float32
        with FakeTensorMode():
            cost, prices = (torch.empty(shape, device="cuda", dtype=dtype) for shape in ((1, rows, columns), (1, rows)))
            lengths = [torch.empty(1, dtype=torch.int64, device="cuda") for _ in range(2)]
            width = -1 if band is None else band
            _, probs = torch.ops.lyra.soft_dtw_forward(
                cost, *lengths, 1.0, None, width, None, None, prices if drop else None, bits
            )
        assert probs.shape == kept


def test_there_are_guards_to_take_out() -> None:
    assert len(barriers(*HEADERS)) == 7


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(GUARDS)), ids=GUARDS)
def test_every_guard_is_needed(kernels: ModuleType, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    runs = (functools.partial(check, kernels, order) for check in CHECKS.values() for order in ORDERS)
    assert_needed(number, monkeypatch, runs)
