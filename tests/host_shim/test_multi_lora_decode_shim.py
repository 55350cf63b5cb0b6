"""The launch of layer and adapters for few tokens, run on the CPU: right whichever block or thread goes first."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from barriers import assert_needed, barriers
from multi_lora_oracles import BF16, FP16, Case, Problem, build_plan, expand, make, shrink
from test_multi_lora_shim import array, bits, name_of, plan_of
from torch import Tensor

from lyra_ops import LoraBank, LoraRouting, _loader
from lyra_ops.multi_lora import decode, reference
from lyra_ops.multi_lora.function import Base
from lyra_ops.testing import assert_within_reference_error

GUARDS = barriers(Path(__file__).parents[2] / "csrc" / "multi_lora" / "decode.cuh")
ORDERS = {  # the last number: how many blocks run at once
    "forward": ("forward", 0, 0),
    "reverse": ("reverse", 0, 3),
    "shuffled": ("shuffled", 1, 2),
    "lazy": ("lazy", 0, 3),
}


@pytest.fixture(scope="module")
def kernels(build_switched) -> ModuleType:
    return build_switched("multi_lora.cpp", list(GUARDS.values()))


@dataclass(frozen=True)
class Layer:
    adapters: Case  # `size` is K
    outputs: int
    bias: bool = False

    def __str__(self) -> str:
        return f"{self.adapters}-{self.outputs}" + "-bias" * self.bias


CASES = [
    Layer(Case(1, (4,), 24, BF16, unrouted=0), 20),
    Layer(Case(16, (8, 3, 40), 264, BF16), 70, bias=True),
    Layer(Case(13, (5, 33), 520, FP16, per_token=3), 33),
    Layer(Case(9, tuple(range(1, 36)), 40, BF16, runs=True), 64),
    Layer(Case(5, (70, 9), 4104, BF16, absent=(1,)), 8),  # parts of more than one step of the cutting
    Layer(Case(7, (9, 2), 24, BF16, unrouted=1.0), 40, bias=True),
]


@dataclass
class Problems:
    problem: Problem
    weight: Tensor
    bias: Tensor | None
    b: Tensor


@functools.cache
def problem_of(layer: Layer) -> Problems:
    p, g = make(layer.adapters), torch.Generator().manual_seed(5)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g).to(p.x.dtype)

    weight = normal(layer.outputs, layer.adapters.size) / layer.adapters.size**0.5
    return Problems(p, weight, normal(layer.outputs) if layer.bias else None, normal(p.rows, layer.outputs))


def truth(q: Problems, dtype: torch.dtype) -> Tensor:
    """y in float64, or in float32 but for what the 16 bits of c and y take away."""
    p = q.problem
    y = p.x.to(dtype) @ q.weight.to(dtype).T + (0 if q.bias is None else q.bias.to(dtype))
    outputs = replace(p, x=torch.zeros(y.shape, dtype=p.x.dtype), bank=q.b, h=shrink(p, dtype))
    added = expand(outputs, y, dtype)
    return added if dtype == torch.float64 else added.to(p.x.dtype)


def run(kernels: ModuleType, q: Problems) -> Tensor:
    p, counters = q.problem, torch.zeros(3, dtype=torch.int32)
    y = torch.full((len(p.x), len(q.weight)), torch.nan, dtype=p.x.dtype)
    bias = None if q.bias is None else array(q.bias)
    banks = (array(p.bank), array(q.b), p.table.numpy(), p.scaling.numpy())
    given = (array(y), array(p.x), array(q.weight), bias, *banks, plan_of(p), counters.numpy())
    kernels.decode(name_of(y), *given, int(p.table[:, 1].max()))
    assert counters.tolist() == [0, 0, 0]
    return y


def check_case(layer: Layer, kernels: ModuleType) -> None:
    q = problem_of(layer)
    got, plain, exact = run(kernels, q), truth(q, torch.float32), truth(q, torch.float64)
    known = ~exact.isnan().any(1)  # tokens without an adapter come with NaN
    assert known.any() or layer.adapters.unrouted == 1
    assert got[~known].isnan().all()
    assert_within_reference_error(got[known], plain[known], exact[known])


def part_of(q: Problems, tokens: slice) -> Problems:
    p = q.problem
    weights = None if p.weights is None else p.weights[tokens].contiguous()
    ids = p.ids[tokens].contiguous()
    part = replace(p, x=p.x[tokens], ids=ids, weights=weights, h=p.h[tokens], plan=build_plan(ids, len(p.table)))
    return replace(q, problem=part)


def check_a_token_alone(kernels: ModuleType) -> None:
    for layer in (CASES[1], CASES[2], CASES[4]):
        q = problem_of(layer)
        together = run(kernels, q)
        for tokens in (slice(0, 1), slice(2, 5)):
            assert torch.equal(bits(run(kernels, part_of(q, tokens))), bits(together[tokens]))


CHECKS: dict[str, Callable[[ModuleType], None]] = {
    **{str(layer): functools.partial(check_case, layer) for layer in CASES},
    "a_token_alone": check_a_token_alone,
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("check", CHECKS)
def test_kernels(kernels: ModuleType, check: str, order: str) -> None:
    kernels.configure(*ORDERS[order])
    CHECKS[check](kernels)


def test_orders_agree_bitwise(kernels: ModuleType) -> None:
    results = []
    for order in ORDERS.values():
        kernels.configure(*order)
        results.append(run(kernels, problem_of(CASES[2])))
    for other in results[1:]:
        assert torch.equal(bits(other), bits(results[0]))


def test_there_are_guards_to_take_out() -> None:
    assert len(GUARDS) == 7


@pytest.mark.parametrize("number", range(len(GUARDS)), ids=GUARDS)
def test_every_guard_is_needed(kernels: ModuleType, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def run(check: Callable[[ModuleType], None], order: tuple) -> None:
        kernels.configure(*order)
        check(kernels)

    runs = (functools.partial(run, check, order) for check in CHECKS.values() for order in ORDERS.values())
    assert_needed(number, monkeypatch, runs)


@pytest.fixture(scope="module")
def raw_op(load_ops) -> None:
    load_ops("multi_lora_decode_ops.cpp")


# A library older than this op fails: it was not built from this tree.
needs_schema = pytest.mark.skipif(_loader.failure() is not None, reason=str(_loader.failure()))


@needs_schema
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_two_layers_with_one_input(raw_op, dtype: torch.dtype, weighted: bool) -> None:
    def run(kind: str) -> list[Tensor]:
        g = torch.Generator().manual_seed(0)

        def normal(*shape: int, of: torch.dtype = dtype) -> Tensor:
            t = (torch.randn(*shape, generator=g) / shape[-1] ** 0.5).to(of)
            return t.double() if kind == "exact" else t

        x, bases, banks = normal(6, 48), [], []
        for outputs in (24, 40):
            bases.append(Base(normal(outputs, 48), normal(outputs), None))
            adapters = {
                name: (normal(r, 48, of=torch.float32), normal(outputs, r, of=torch.float32), s)
                for name, r, s in (("image", 5, 2.0), ("speech", 40, -0.5), ("both", 9, 1.0))
            }
            banks.append(LoraBank.pack(adapters))
        ids = torch.tensor([0, 1, -1, 1, 1, 0])
        ids, weights = (ids[:, None].repeat(1, 2), normal(6, 2, of=torch.float32)) if weighted else (ids, None)
        routing = LoraRouting(ids, banks[0], weights)
        with torch.no_grad():
            if kind == "ours":
                assert decode.takes(x, bases, None)
                for _ in range(2):  # the counters are zero again
                    ys = decode.linears(bases, banks, routing, x, weights)
                return ys
            rows = [bank.rows(x.dtype) for bank in banks]
            return [reference.add_adapters(b(x), x, r, routing.pairs, weights, None, 0) for b, r in zip(bases, rows)]

    for got, plain, exact in zip(run("ours"), run("plain"), run("exact")):
        assert_within_reference_error(got, plain, exact)


@needs_schema
def test_the_raw_op_names_what_is_wrong(raw_op) -> None:
    q = problem_of(CASES[1])
    p = q.problem
    good = {
        "x": p.x, "weight": q.weight, "bias": q.bias, "a": p.bank, "b": q.b, "table": p.table, "scaling": p.scaling,
        "ids": p.plan["ids"], "weights": None, "present": p.plan["present"],
        "counters": torch.zeros(3, dtype=torch.int32), "rank": 40,
    }  # fmt: skip
    assert_within_reference_error(
        torch.ops.lyra.multi_lora_decode(**good)[~truth(q, torch.float64).isnan().any(1)],
        *(truth(q, dtype)[~truth(q, torch.float64).isnan().any(1)] for dtype in (torch.float32, torch.float64)),
    )
    for name, wrong, told in (
        ("x", p.x.repeat(2, 1), "x: got 32 tokens"),
        ("x", p.x.float(), "weight: got dtype"),
        ("x", p.x.new_zeros(16, 265)[:, 1:], "x: got 264 columns, 265 from row to row"),
        ("weight", q.weight.T.contiguous().T, "weight: got shape"),
        ("bias", q.bias.float(), "bias: got dtype"),
        ("b", q.b[:-1], "b: got shape"),
        ("counters", torch.zeros(3), "counters: got dtype"),
        ("rank", 0, "rank: got 0"),
    ):
        with pytest.raises(RuntimeError, match=re.escape(told)):
            torch.ops.lyra.multi_lora_decode(**good | {name: wrong})


@needs_schema
def test_who_takes_a_call() -> None:
    x, base = torch.zeros(16, 64, dtype=BF16), Base(torch.zeros(40, 64, dtype=BF16), None, None)
    assert not decode.takes(x, [base], None)  # a graph may be wanted
    with torch.no_grad():
        assert decode.takes(x, [base, base], None) == (_loader.missing("multi_lora_decode", "cuda") is None)
        assert not decode.takes(torch.zeros(17, 64, dtype=BF16), [base], None)
        assert not decode.takes(x, [base], torch.zeros(1, dtype=torch.int64))  # dropout
        assert not decode.takes(x.float(), [Base(base.weight.float(), None, None)], None)
        assert not decode.takes(x, [base, Base(None, None, torch.zeros(16, 40, dtype=BF16))], None)
        assert not decode.takes(torch.zeros(16, 72, dtype=BF16)[:, 4:68], [base], None)
        assert not decode.takes(x[:, :60], [Base(base.weight[:, :60], None, None)], None)
