"""The CUDA kernels of multi_lora, run on the CPU: right whichever thread goes first, and wrong without any barrier."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from barriers import assert_needed, barriers
from multi_lora_oracles import BF16, COMMON_CASES, Case, Problem, build_plan, expand, make, outer, philox, shrink
from torch import Tensor

from lyra_ops import LoraBank, LoraRouting
from lyra_ops.multi_lora import fused, reference
from lyra_ops.multi_lora.function import Base, Call, linears
from lyra_ops.testing import assert_within_reference_error

KERNELS = Path(__file__).parents[2] / "csrc" / "multi_lora"
GUARDS = barriers(*(KERNELS / f"{name}.cuh" for name in ("plan", "shrink", "expand", "outer")))
ORDERS = {"forward": ("forward", 0), "reverse": ("reverse", 0), "shuffled": ("shuffled", 1)}
MANY = 132  # multiprocessors: enough to cut D in parts, and to give the chunks to several workers


@pytest.fixture(scope="module")
def kernels(build_switched) -> ModuleType:
    return build_switched("multi_lora.cpp", list(GUARDS.values()))


def array(t: Tensor) -> np.ndarray:
    """The same memory; 16-bit floats as the bits that they are."""
    return t.numpy() if t.dtype.itemsize > 2 else t.view(torch.int16).numpy().view(np.uint16)


def bits(t: Tensor) -> Tensor:
    return torch.from_numpy(array(t.contiguous()).view(np.uint16).astype(np.int32))


def plan_of(p: Problem) -> dict:
    tensors = {**p.plan, "weights": p.weights, "seed": p.seed}
    return {name: None if t is None else t.numpy() for name, t in tensors.items()} | {"drop": p.drop}


def name_of(t: Tensor) -> str:
    return str(t.dtype).removeprefix("torch.")


def run_shrink(kernels: ModuleType, p: Problem, multiprocessors: int = MANY) -> Tensor:
    h = torch.full(p.h.shape, torch.nan)
    kernels.shrink(name_of(p.x), h.numpy(), array(p.x), array(p.bank), p.table.numpy(), plan_of(p), multiprocessors)
    return h


def run_expand(kernels: ModuleType, p: Problem, y: Tensor) -> Tensor:
    y = y.clone()
    kernels.expand(name_of(y), array(y), p.h.numpy(), array(p.bank), p.table.numpy(), p.scaling.numpy(), plan_of(p))
    return y


def run_outer(kernels: ModuleType, p: Problem, multiprocessors: int = MANY, add_to: Tensor | None = None) -> Tensor:
    out = torch.full((p.rows, p.x.shape[1]), torch.nan) if add_to is None else add_to.clone()
    given = (name_of(p.x), p.h.numpy(), array(p.x), p.table.numpy(), p.scaling.numpy(), plan_of(p), multiprocessors)
    kernels.outer(out.numpy(), *given, add_to is not None)
    return out


def base(p: Problem) -> Tensor:
    return torch.randn(p.x.shape, generator=torch.Generator().manual_seed(9)).to(p.x.dtype)


CASES = [*COMMON_CASES, Case(5, (16,), 700, BF16, drop=65536)]


@functools.cache
def problem_and_truth(case: Case) -> tuple[Problem, dict[str, Tensor]]:
    """By plain torch in float32, and exactly."""
    p = make(case)
    y = base(p)
    truth = {}
    for kind, dtype in (("plain", torch.float32), ("exact", torch.float64)):
        truth |= {f"shrink {kind}": shrink(p, dtype), f"outer {kind}": outer(p, dtype)}
        truth[f"expand {kind}"] = expand(p, y, dtype)
    return p, truth


def check_case(case: Case, kernels: ModuleType) -> None:
    p, truth = problem_and_truth(case)
    y = base(p)
    for multiprocessors in (1, MANY):
        h, out = run_shrink(kernels, p, multiprocessors), run_outer(kernels, p, multiprocessors)
        assert_within_reference_error(h, truth["shrink plain"], truth["shrink exact"], name="shrink")
        assert_within_reference_error(out, truth["outer plain"], truth["outer exact"], name="outer")
    got = run_expand(kernels, p, y)
    assert_within_reference_error(got, truth["expand plain"], truth["expand exact"], name="expand")
    idle = (p.ids < 0).all(1)
    assert torch.equal(bits(got[idle]), bits(y[idle]))


def check_plan(kernels: ModuleType) -> None:
    for tokens, per_token, adapters in [
        (0, 1, 3),
        (1, 1, 1),
        (7, 2, 5),
        (63, 1, 1),
        (64, 1, 2),
        (1300, 1, 4),
        (200, 3, 70),
    ]:
        for share, dtype in ((0.0, torch.int64), (0.3, torch.int32), (1.0, torch.int64)):
            g = torch.Generator().manual_seed(tokens)
            ids = torch.randint(adapters, (tokens, per_token), generator=g, dtype=dtype)
            wrong = torch.tensor([-1, -5, adapters, adapters + 1000, torch.iinfo(dtype).max, torch.iinfo(dtype).min])
            ids = torch.where(torch.rand(ids.shape, generator=g) < share, wrong[ids % 6].to(dtype), ids)
            got, want = kernels.plan(ids.numpy(), adapters), build_plan(ids, adapters)
            for name in want:
                assert torch.equal(torch.from_numpy(got[name]), want[name]), name


def check_parts_of_the_sum_do_not_show(kernels: ModuleType) -> None:
    for case in (Case(9, (16,), 700, BF16), Case(9, (5,), 300, unrouted=0), Case(3, (4,), 2100, BF16, unrouted=0)):
        p = make(case)
        assert torch.equal(run_shrink(kernels, p, 1).nan_to_num(), run_shrink(kernels, p, MANY).nan_to_num())


def check_gradients_accumulate(kernels: ModuleType) -> None:
    """In float32: what is there plus what is new, absent adapters left as they are."""
    p = make(Case(130, (20, 1, 70), 136, BF16, runs=True, absent=(1,)))
    before = torch.randn(p.rows, p.x.shape[1], generator=torch.Generator().manual_seed(4))
    plain, exact = (before.to(dtype) + outer(p, dtype) for dtype in (torch.float32, torch.float64))
    for multiprocessors in (1, MANY):
        got = run_outer(kernels, p, multiprocessors, add_to=before)
        assert_within_reference_error(got, plain, exact)
        row, rank, _ = p.table[1].tolist()
        assert torch.equal(got[row : row + rank], before[row : row + rank])


def check_a_token_alone(kernels: ModuleType) -> None:
    p = make(Case(70, (8, 20), 300, BF16))
    p.h = run_shrink(kernels, p, 1)
    y = base(p)
    together = run_expand(kernels, p, y)
    for t in (0, 33, 69):
        mine = slice(t, t + 1)
        alone = replace(p, x=p.x[mine], h=p.h[mine], ids=p.ids[mine], plan=build_plan(p.ids[mine], 2))
        assert torch.equal(run_shrink(kernels, alone).nan_to_num(), p.h[mine].nan_to_num())
        assert torch.equal(bits(run_expand(kernels, alone, y[mine])), bits(together[mine]))


CHECKS: dict[str, Callable[[ModuleType], None]] = {
    **{
        name.removeprefix("check_"): f
        for name, f in list(globals().items())
        if name.startswith("check_") and name != "check_case"
    },
    **{str(case): functools.partial(check_case, case) for case in CASES},
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("check", CHECKS)
def test_kernels(kernels: ModuleType, check: str, order: str) -> None:
    kernels.configure(*ORDERS[order])
    CHECKS[check](kernels)


def test_orders_agree_bitwise(kernels: ModuleType) -> None:
    p = make(Case(130, (20, 9), 136, BF16, per_token=2, drop=9000))
    results = []
    for order in ORDERS.values():
        kernels.configure(*order)
        results.append((run_shrink(kernels, p), run_outer(kernels, p), run_expand(kernels, p, base(p))))
    for others in results[1:]:
        for got, want in zip(others, results[0]):
            assert torch.equal(bits(got), bits(want))


def test_philox_of_the_oracle() -> None:
    assert philox((0, 0, 0, 0), (0, 0)) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]  # Random123's own vector


class Shim:
    """The kernels as `fused.Engine` calls them."""

    def __init__(self, kernels: ModuleType) -> None:
        self.kernels = kernels

    def shrink_(self, h, x, bank, table, ids, starts, pairs, chunks, present, seed, drop) -> None:
        plan = {"ids": ids, "starts": starts, "pairs": pairs, "chunks": chunks, "present": present}
        p = Problem(x, h, bank, table, None, ids, None, seed, drop, plan)
        self.kernels.shrink(name_of(x), h.numpy(), array(x), array(bank), table.numpy(), plan_of(p), MANY)

    def expand_(self, y, h, bank, table, scaling, ids, weights, present, seed, drop) -> None:
        nothing = torch.zeros(len(table) + 1, dtype=torch.int32)
        plan = {"ids": ids, "starts": nothing, "pairs": nothing, "chunks": nothing, "present": present}
        plan = plan_of(Problem(y, h, bank, table, scaling, ids, weights, seed, drop, plan))
        self.kernels.expand(name_of(y), array(y), h.numpy(), array(bank), table.numpy(), scaling.numpy(), plan)

    def outer(self, h, z, table, scaling, weights, starts, pairs, chunks, seed, drop, rows) -> Tensor:
        ids = torch.zeros(h.shape[:2], dtype=torch.int32)
        plan = {"ids": ids, "starts": starts, "pairs": pairs, "chunks": chunks, "present": ids}
        plan = plan_of(Problem(z, h, z, table, scaling, ids, weights, seed, drop, plan))
        out = torch.full((rows, z.shape[1]), torch.nan)
        given = (name_of(z), h.numpy(), array(z), table.numpy(), scaling.numpy(), plan, MANY, False)
        self.kernels.outer(out.numpy(), *given)
        return out


@pytest.mark.parametrize("drop", [0, 1 << 14])
@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
def test_the_whole_op(kernels: ModuleType, dtype: torch.dtype, drop: int) -> None:
    """Two layers with one input, weighted adapters of which one is absent: forward and backward."""
    kernels.configure(*ORDERS["shuffled"])
    engine = fused.Engine(Shim(kernels))

    def run(kind: str) -> list[Tensor]:
        g = torch.Generator().manual_seed(0)

        def leaf(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            t = (torch.randn(*shape, generator=g) / shape[-1] ** 0.5).to(dtype)
            return (t.double() if kind == "exact" else t).requires_grad_()

        x, shares = leaf(70, 40), leaf(70, 2, dtype=torch.float32)
        ids = torch.randint(-1, 2, (70, 2), generator=g)
        seed = torch.tensor([3]) if drop else None
        bases, banks, leaves = [], [], [x, shares]
        for outputs in (24, 17):
            weight = leaf(outputs, 40)
            pairs = [(leaf(r, 40), leaf(outputs, r)) for r in (5, 20, 3)]
            banks.append(LoraBank.pack({f"{e}": (a, b, 2.0 - e) for e, (a, b) in enumerate(pairs)}))
            bases.append(Base(weight, None, None))
            leaves += [t for pair in pairs for t in pair]
        routing = LoraRouting(ids, banks[0], shares)
        if kind == "kernels":
            ys = linears(Call(engine, banks, routing, seed, drop), x, shares, bases)
        else:
            ys = [
                reference.add_adapters(base(x), x, bank.rows(x.dtype), routing.pairs, shares, seed, drop)
                for base, bank in zip(bases, banks)
            ]
        upstream = [torch.randn(y.shape, generator=g).to(dtype).to(y.dtype) for y in ys]
        return [*ys, *torch.autograd.grad(ys, leaves, upstream)]

    for got, plain, exact in zip(run("kernels"), run("plain"), run("exact")):
        assert_within_reference_error(got, plain, exact)


def test_there_are_guards_to_take_out() -> None:
    assert len(GUARDS) == 15


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(GUARDS)), ids=GUARDS)
def test_every_guard_is_needed(kernels: ModuleType, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def run(check: Callable[[ModuleType], None], order: tuple) -> None:
        kernels.configure(*order)
        check(kernels)

    runs = (functools.partial(run, check, order) for check in CHECKS.values() for order in ORDERS.values())
    assert_needed(number, monkeypatch, runs)
