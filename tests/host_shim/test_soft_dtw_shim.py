"""The CUDA kernels of soft_dtw, run on the CPU: right whichever thread goes first, and wrong without any barrier."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
import torch
from soft_dtw_oracles import looped, poisoned, ragged, random
from torch import Tensor

from lyra_ops.soft_dtw import reference
from lyra_ops.testing import assert_within_reference_error

KERNELS = Path(__file__).parents[2] / "csrc" / "soft_dtw" / "soft_dtw.cuh"
ORDERS = {"forward": ("forward", 0), "reverse": ("reverse", 0), "shuffled": ("shuffled", 1)}


@pytest.fixture(scope="module")
def kernels(build) -> ModuleType:
    return build("soft_dtw.cpp")


def run(
    kernels: ModuleType,
    cost: Tensor,
    x_lengths: Tensor,
    y_lengths: Tensor,
    gamma: float = 1.0,
    band: int = -1,
    grad: Tensor | None = None,
    order: str = "forward",
    warps: int = 8,
) -> tuple[Tensor, Tensor]:
    """Value (B,) and gradient (B, N, M), with shared memory for ``warps`` warps to a block."""
    grad = torch.ones(cost.shape[0], dtype=cost.dtype) if grad is None else grad
    kernels.configure(*ORDERS[order], warps * kernels.RING * kernels.LANES * 3 * cost.dtype.itemsize)
    lengths = x_lengths.numpy(), y_lengths.numpy()
    value, probs = kernels.forward(cost.numpy(), *lengths, gamma, band)
    gradient = kernels.backward(grad.numpy(), probs, *lengths, band)
    return torch.from_numpy(value), torch.from_numpy(gradient)


@dataclass(frozen=True)
class Case:
    rows: int
    columns: int
    gamma: float = 1.0
    band: int = -1
    dtype: torch.dtype = torch.float32
    scale: float = 1.0
    warps: int = 8


CASES = [
    *(Case(n, m) for n, m in [(1, 1), (1, 40), (40, 1), (5, 7), (15, 31), (16, 32), (17, 33), (33, 17), (50, 65)]),
    *(Case(n, m, gamma=0.1) for n, m in [(70, 20), (20, 300)]),
    Case(40, 100, warps=1),
    Case(9, 200, warps=2),
    Case(90, 130, gamma=0.01, warps=2),
    *(Case(60, 45, band=w) for w in (0, 3, 20, 200)),
    *(Case(n, m, band=1, warps=2) for n, m in [(130, 30), (30, 170), (100, 100)]),
    Case(40, 40, dtype=torch.float64),
    Case(60, 90, gamma=0.1, band=5, dtype=torch.float64, warps=1),
    # Exponents that fit 32 bits barely, not at all, and that a double's 53 bits hold barely.
    Case(30, 40, gamma=1e-3, scale=1e3),
    Case(30, 70, gamma=1e-4, scale=1e4),
    Case(10, 40, gamma=1e-4, scale=1e8, dtype=torch.float64),
]


@functools.cache
def inputs_and_truth(case: Case) -> tuple[Tensor, ...]:
    """Cost, lengths, gradient; then value and gradient by plain torch in the case's dtype, and exactly."""
    x_lengths, y_lengths = ragged(3, case.rows, case.columns)
    cost = (case.scale * random(3, case.rows, case.columns)).to(case.dtype)
    grad = random(3, seed=1).to(case.dtype)
    band = None if case.band < 0 else case.band

    leaf = cost.clone().requires_grad_()
    plain = reference.soft_dtw(leaf, x_lengths, y_lengths, case.gamma, band)
    plain.backward(grad)

    inside = reference.inside_band(x_lengths, y_lengths, case.rows, case.columns, band)
    value, gradient = torch.empty(3, dtype=torch.float64), torch.zeros(cost.shape, dtype=torch.float64)
    for b, (n, m) in enumerate(zip(x_lengths.tolist(), y_lengths.tolist())):
        value[b], expected = looped(cost.double().masked_fill(~inside, math.inf)[b, :n, :m], case.gamma)
        gradient[b, :n, :m] = grad[b] * expected
    return poisoned(cost, x_lengths, y_lengths), x_lengths, y_lengths, grad, plain, leaf.grad, value, gradient


def check_case(case: Case, kernels: ModuleType, order: str) -> None:
    cost, x_lengths, y_lengths, grad, plain_value, plain_gradient, value, gradient = inputs_and_truth(case)
    got = run(kernels, cost, x_lengths, y_lengths, case.gamma, case.band, grad, order, case.warps)
    assert_within_reference_error(got[0], plain_value, value, name="value")
    assert_within_reference_error(got[1], plain_gradient, gradient, name="gradient")


def check_nan_stays_in_its_pair(kernels: ModuleType, order: str) -> None:
    clean = random(3, 40, 70, dtype=torch.float32)
    x_lengths, y_lengths = torch.tensor([40, 33, 40]), torch.tensor([70, 66, 10])
    want = run(kernels, clean, x_lengths, y_lengths, order=order)
    for place in [(0, 0), (32, 65), (20, 40), (5, 1)]:
        for poison in (math.nan, -math.inf):
            cost = clean.clone()
            cost[1][place] = poison
            value, gradient = run(kernels, cost, x_lengths, y_lengths, order=order)
            assert value[1].isnan()
            assert gradient[1, :33, :66].isnan().all()
            assert (gradient[1, 33:] == 0).all()
            assert (gradient[1, :, 66:] == 0).all()
            for b in (0, 2):
                assert torch.equal(value[b], want[0][b])
                assert torch.equal(gradient[b], want[1][b])


def check_no_path(kernels: ModuleType, order: str) -> None:
    cost = random(2, 40, 70, dtype=torch.float32)
    cost[0, :, 50] = math.inf
    lengths = torch.tensor([40, 40]), torch.tensor([70, 70])
    value, gradient = run(kernels, cost, *lengths, order=order)
    assert value[0] == math.inf
    assert (gradient[0] == 0).all()
    assert gradient[1].sum() >= 70


def check_forbidden_cells_get_no_gradient(kernels: ModuleType, order: str) -> None:
    cost = random(1, 60, 40, dtype=torch.float32)
    blocked = torch.rand(cost.shape, generator=torch.Generator().manual_seed(2)) < 0.2
    blocked[0, 0, 0] = blocked[0, -1, -1] = False
    blocked[0, range(40), range(40)] = blocked[0, 39:, 39] = False
    cost.masked_fill_(blocked, math.inf)
    lengths = torch.tensor([60]), torch.tensor([40])
    value, gradient = run(kernels, cost, *lengths, order=order)
    assert value.isfinite().all()
    assert (gradient[blocked] == 0).all()
    assert (gradient >= 0).all()


def check_lengths_out_of_range(kernels: ModuleType, order: str) -> None:
    cost = random(7, 20, 40, dtype=torch.float32)
    x_lengths = torch.tensor([20, 0, -3, 21, 2**40, 20, 20])
    y_lengths = torch.tensor([40, 40, 40, 40, 40, 41, -(2**62)])
    value, gradient = run(kernels, cost, x_lengths, y_lengths, order=order)
    assert value[0].isfinite()
    assert value[1:].isnan().all()
    assert gradient[0].isfinite().all()
    assert gradient[1:].isnan().all()


def check_ties_count_paths(kernels: ModuleType, order: str) -> None:
    value, gradient = run(
        kernels, torch.zeros(1, 4, 4, dtype=torch.float64), torch.tensor([4]), torch.tensor([4]), order=order
    )
    assert value.item() == pytest.approx(-math.log(63), rel=1e-15)  # Delannoy number D(3, 3)
    assert gradient[0, 1, 1].item() == pytest.approx(3 * 13 / 63, rel=1e-14)


def check_same_alone_and_in_a_batch(kernels: ModuleType, order: str) -> None:
    cost, lengths = random(4, 40, 70, dtype=torch.float32), ragged(4, 40, 70)
    value, gradient = run(kernels, cost, *lengths, order=order)
    for b in range(4):
        n, m = lengths[0][b], lengths[1][b]
        alone = run(kernels, cost[b : b + 1, :n, :m].contiguous(), n[None], m[None], order=order)
        assert torch.equal(alone[0][0], value[b])
        assert torch.equal(alone[1][0], gradient[b, :n, :m])


def check_one_pair_of_large_costs_in_one_strip(kernels: ModuleType, order: str) -> None:
    case = Case(30, 70)
    cost = random(1, 30, 70, dtype=torch.float32)
    cost[0, 5, 3] = 1e9
    lengths = torch.tensor([30]), torch.tensor([70])
    value, gradient = run(kernels, cost, *lengths, case.gamma, order=order)
    want = looped(cost[0].double(), case.gamma)
    assert value.item() == pytest.approx(want[0].item(), rel=1e-6)
    assert gradient[0, 5, 3] == 0
    torch.testing.assert_close(gradient[0].double(), want[1], rtol=1e-4, atol=1e-6)


Check = Callable[[ModuleType, str], None]
CHECKS: dict[str, Check] = {
    **{
        f"{c.rows}x{c.columns}-gamma{c.gamma:g}-band{c.band}-{str(c.dtype)[6:]}-{c.warps}warps": functools.partial(
            check_case, c
        )
        for c in CASES
    },
    **{
        name.removeprefix("check_"): f
        for name, f in list(globals().items())
        if name.startswith("check_") and name != "check_case"
    },
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("check", CHECKS)
def test_kernels(kernels: ModuleType, check: str, order: str) -> None:
    CHECKS[check](kernels, order)


def test_orders_agree_bitwise(kernels: ModuleType) -> None:
    cost, lengths = random(3, 50, 150, dtype=torch.float32), ragged(3, 50, 150)
    results = [run(kernels, cost, *lengths, order=order, warps=warps) for order in ORDERS for warps in (1, 2, 8)]
    for value, gradient in results[1:]:
        assert torch.equal(value, results[0][0])
        assert torch.equal(gradient, results[0][1])


# Each barrier of the source, and the constant that says how far apart barriers keep the strips.
BARRIERS = [m.span() for m in re.finditer(r"__sync\w+(?=\()", KERNELS.read_text())]
LAG = ("kLag = kDelay + 2", "kLag = kDelay + 1")


def mutants() -> dict[str, str]:
    source = KERNELS.read_text()
    made = {}
    for start, end in BARRIERS:
        line = source.count("\n", 0, start) + 1
        rest = source[end:].removeprefix("()")  # f(x) leaves (x)
        made[f"{source[start:end]}-line{line}"] = source[:start] + rest
    assert source.count(LAG[0]) == 1
    return {**made, "kLag": source.replace(*LAG)}


def test_there_are_barriers_to_take_out() -> None:
    assert len(BARRIERS) >= 3


@pytest.mark.slow
@pytest.mark.parametrize("name", mutants())
def test_every_barrier_is_needed(build, tmp_path: Path, name: str) -> None:
    (tmp_path / "soft_dtw").mkdir()
    (tmp_path / "soft_dtw" / "soft_dtw.cuh").write_text(mutants()[name])
    mutant = build("soft_dtw.cpp", first=tmp_path)
    with pytest.raises((AssertionError, RuntimeError)):
        for check in CHECKS.values():
            for order in ORDERS:
                check(mutant, order)
