"""What goes around the kernels on a GPU, run with their twins in plain torch: plan, tables, forward and backward."""

from __future__ import annotations

import math
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_multi_lora import each_adapter_and_mask, formula, layer, leaves, sum_of_formulas
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lyra_ops import LoraBank, LoraRouting, multi_lora_linear
from lyra_ops.multi_lora import dropout, fused, kernels, plan, reference
from lyra_ops.multi_lora.function import Base, Call, linears
from lyra_ops.testing import assert_within_reference_error

ENGINE = fused.Engine(kernels)


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 70), st.integers(0, 300), st.integers(1, 3), st.integers(0, 99))
def test_plan(adapters: int, tokens: int, slots: int, seed: int):
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(-2, adapters + 2, (tokens, slots), generator=g)
    ids[torch.rand(ids.shape, generator=g) < 0.5] = int(torch.randint(adapters, (), generator=g))
    made = plan.build(ids, adapters)
    assert {t.dtype for t in made} == {torch.int32}
    clean = [[e if 0 <= e < adapters else -1 for e in row] for row in ids.tolist()]
    assert made.ids.tolist() == clean

    flat = [e for row in clean for e in row]
    lists = [[p for p, owner in enumerate(flat) if owner == e] for e in range(adapters)]
    starts, pairs = made.starts.tolist(), made.pairs.tolist()
    assert [pairs[begin:end] for begin, end in pairwise(starts)] == lists
    assert pairs[starts[-1] :] == [-1] * flat.count(-1)

    chunks = [[e, starts[e] + k] for e in range(adapters) for k in range(0, len(lists[e]), plan.TILE)]
    room = math.ceil(tokens * slots / plan.TILE) + adapters
    assert made.chunks.tolist() == chunks + [[-1, 0]] * (room - len(chunks))

    shapes = [t.shape for t in fused.FAKES["multi_lora_plan"](ids, adapters)]
    assert shapes == [t.shape for t in made]
    for tile, words in enumerate(made.present.tolist()):
        inside = {e for row in clean[tile * plan.TILE : (tile + 1) * plan.TILE] for e in row} - {-1}
        assert {e for e in range(32 * len(words)) if words[e // 32] >> (e % 32) & 1} == inside
    assert made.present.shape == (math.ceil(tokens / plan.TILE), math.ceil(adapters / 32))


def run(x, weight, bias, adapters, ids, weights=None, seed=None, drop=0) -> Tensor:
    bank = LoraBank.pack(adapters)
    routing = LoraRouting(ids, bank, weights)
    return linears(Call(ENGINE, [bank], routing, seed, drop), x, weights, [Base(weight, bias, None)])[0]


@pytest.mark.parametrize("ranks", [(4,), (1, 8, 13, 64, 320), (64, 1, 8), (512,), tuple(range(1, 33))], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_forward_and_backward(ranks: tuple[int, ...], dtype: torch.dtype):
    arguments = layer(ranks, 200, inputs=48, outputs=40, dtype=dtype)
    assert_within_reference_error(run(*arguments), each_adapter_and_mask(*arguments), formula(*arguments))
    upstream = torch.randn(200, 40, dtype=torch.float64)

    def gradients(function, run_in: torch.dtype) -> tuple[Tensor, ...]:
        x, weight, bias, adapters, ids = arguments
        adapters = {name: (a.detach().to(run_in), b.detach().to(run_in), s) for name, (a, b, s) in adapters.items()}
        x, weight, bias = (t.detach().to(run_in) for t in (x, weight, bias))
        inputs = leaves(x, weight, bias, adapters)
        return torch.autograd.grad(function(x, weight, bias, adapters, ids), inputs, upstream.to(run_in))

    for got, plain, exact in zip(
        gradients(run, dtype), gradients(each_adapter_and_mask, dtype), gradients(each_adapter_and_mask, torch.float64)
    ):
        assert_within_reference_error(got, plain, exact)


def test_weights():
    x, weight, bias, adapters, _ = layer((4, 8, 2), 150, dtype=torch.float32)
    g = torch.Generator().manual_seed(0)
    ids, shares = torch.randint(-1, 2, (150, 3), generator=g), torch.rand(150, 3, generator=g)
    results = []
    for function in (run, sum_of_formulas):
        inputs = [*leaves(x, weight, bias, adapters), shares.requires_grad_()]
        y = function(x, weight, bias, adapters, ids, shares)
        results.append([y, *torch.autograd.grad(y.square().sum(), inputs)])
    for got, want in zip(*results):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("scalings", [(2.0, 2.0), (2.0, -0.5)], ids=["equal scalings", "unequal scalings"])
@pytest.mark.parametrize("drop", [0, 1 << 14, 1 << 16])
def test_layers_with_one_input(scalings: tuple[float, float], drop: int):
    x, *_, ids = layer((4, 8, 2), 150, dtype=torch.float32)
    seed = torch.tensor([5]) if drop else None
    bases, banks, inputs = [], [], [x.requires_grad_()]
    for j, scaling in enumerate(scalings):
        _, weight, bias, adapters, _ = layer((4, 8, 2), 1, outputs=9 + j, dtype=torch.float32, seed=j)
        inputs += leaves(torch.empty(0), weight, bias, adapters)[1:]
        banks.append(LoraBank.pack({name: (a, b, scaling) for name, (a, b, _) in adapters.items()}))
        bases.append(Base(weight, bias, None))
    routing = LoraRouting(ids, banks[0])
    got = linears(Call(ENGINE, banks, routing, seed, drop), x, None, bases)
    want = [
        reference.add_adapters(base(x), x, bank.rows(torch.float32), routing.pairs, None, seed, drop)
        for base, bank in zip(bases, banks)
    ]
    torch.testing.assert_close(list(got), want)
    upstream = [torch.randn_like(y) for y in want]
    torch.testing.assert_close(*(torch.autograd.grad(ys, inputs, upstream) for ys in (got, want)))


@pytest.mark.parametrize("layers", [1, 2])
def test_gradients_accumulate_in_float32(layers: int):
    x, *_, ids = layer((4, 8, 2), 150, dtype=torch.float32)
    made = [layer((4, 8, 2), 1, outputs=9 + j, dtype=torch.float32, seed=j) for j in range(layers)]
    parameters = [t for one in made for t in leaves(torch.empty(0), *one[1:4])[3:]]
    banks, bases = [LoraBank.pack(one[3]) for one in made], [Base(one[1].detach(), None, None) for one in made]

    def backward() -> tuple[Tensor, ...]:
        ys = linears(Call(ENGINE, banks, LoraRouting(ids, banks[0]), None, 0), x, None, bases)
        return torch.autograd.grad(sum(y.square().sum() for y in ys), parameters, allow_unused=True)

    once = backward()
    sums = [t for bank in banks for pair in bank.accumulate().values() for t in pair]
    assert all(g is None for _ in range(3) for g in backward())
    for total, one in zip(sums, once):
        torch.testing.assert_close(total, 3 * one)


@pytest.mark.parametrize("layers", [1, 2])
def test_gradients_of_frozen_adapters_are_not_accumulated(layers: int):
    x, *_, ids = layer((4, 8, 2), 150, dtype=torch.float32)
    made = [layer((4, 8, 2), 1, outputs=9 + j, dtype=torch.float32, seed=j) for j in range(layers)]
    banks, bases = [LoraBank.pack(one[3]) for one in made], [Base(one[1], None, None) for one in made]
    sums = [list(bank.accumulate().values()) for bank in banks]
    for bank in banks:  # A of the first and B of the second are trained
        bank.adapters[0][0].requires_grad_()
        bank.adapters[1][1].requires_grad_()
    ys = linears(Call(ENGINE, banks, LoraRouting(ids, banks[0]), None, 0), x, None, bases)
    sum(y.square().sum() for y in ys).backward()
    for totals in sums:
        assert [[bool(t.any()) for t in pair] for pair in totals] == [[True, False], [False, True], [False, False]]


@pytest.mark.parametrize("tokens", [0, 9])
def test_adapters_without_tokens_get_zeros(tokens: int):
    x, weight, bias, adapters, _ = layer((2, 3), tokens, dtype=torch.float32)
    weights = leaves(x, weight, bias, adapters)[3:]
    y = run(x, weight, bias, adapters, torch.full((tokens,), -1))
    assert torch.equal(y, torch.nn.functional.linear(x, weight, bias))
    y.sum().backward()
    assert all(torch.equal(t.grad, torch.zeros_like(t)) for t in weights)


def test_adapters_of_unequal_dtypes():
    x, weight, _, adapters, ids = layer((4, 8), 200, dtype=torch.bfloat16)
    (a, b, s), (c, d, t) = adapters.values()
    narrow = {"a": (a, b, s), "c": (c, d, t)}
    mixed = {"a": (a.float(), b.float(), s), "c": (c, d, t)}
    assert torch.equal(run(x, weight, None, mixed, ids), run(x, weight, None, narrow, ids))
    leaves(x, weight, weight, mixed)
    run(x, weight, None, mixed, ids).sum().backward()
    assert all(t.grad.dtype == t.dtype for pair in mixed.values() for t in pair[:2])


def test_a_base_with_its_own_forward():
    x, weight, bias, adapters, ids = layer((4, 8), 30, dtype=torch.float32)
    inputs, bank = leaves(x, weight, bias, adapters), LoraBank.pack(adapters)
    y = torch.nn.functional.linear(x, weight, bias).view(3, 10, 17).clone()
    got = linears(Call(ENGINE, [bank], LoraRouting(ids, bank), None, 0), x, None, [Base(None, None, y)])[0]
    want = each_adapter_and_mask(x, weight, bias, adapters, ids)
    torch.testing.assert_close(got.flatten(0, 1), want)
    for mine, theirs in zip(*(torch.autograd.grad(out.square().sum(), inputs) for out in (got, want))):
        torch.testing.assert_close(mine, theirs)


def test_rows_are_kept_while_the_adapters_stay(monkeypatch):
    """Forward and backward of a step use one copy, and a change of an adapter makes a new one."""
    x, weight, bias, adapters, ids = layer((4, 8), 30, dtype=torch.bfloat16)
    masters = {
        name: (a.float().requires_grad_(), b.float().requires_grad_(), s) for name, (a, b, s) in adapters.items()
    }
    bank = LoraBank.pack(masters)
    seen: list[int] = []
    expand_ = kernels.expand_

    def counting(y, h, rows, *rest) -> None:
        seen.append(rows.data_ptr())
        expand_(y, h, rows, *rest)

    monkeypatch.setattr(kernels, "expand_", counting)
    for _ in range(2):
        routing = LoraRouting(ids, bank)
        y = linears(Call(ENGINE, [bank], routing, None, 0), x.requires_grad_(), None, [Base(weight, bias, None)])[0]
        y.sum().backward()
        y = linears(Call(ENGINE, [bank], routing, None, 0), x, None, [Base(weight, bias, None)])[0]
    b_before, a_before, b_again, b, a, _ = seen
    assert (b_before, b_again, b, a_before) == (b, b, b, a)
    with torch.no_grad():
        masters["adapter 0"][0].add_(1)
        got = linears(Call(ENGINE, [bank], LoraRouting(ids, bank), None, 0), x, None, [Base(weight, bias, None)])[0]
    want = {name: (a.bfloat16(), b.bfloat16(), s) for name, (a, b, s) in masters.items()}
    assert torch.equal(got, run(x, weight, bias, want, ids))


@pytest.fixture(scope="module")
def ops():
    """The twins as torch sees compiled kernels: registered ops, of which it knows the schema and a fake alone."""
    plan_of = "Tensor starts, Tensor pairs, Tensor chunks"
    mask = "Tensor? seed, int drop"
    schemas = {
        "shrink_": f"Tensor(a!) h, Tensor x, Tensor bank, Tensor table, Tensor ids, {plan_of}, Tensor present, {mask}",
        "expand_": "Tensor(a!) y, Tensor h, Tensor bank, Tensor table, Tensor scaling, Tensor ids, Tensor? weights,"
        f" Tensor present, {mask}",
        "outer": f"Tensor h, Tensor z, Tensor table, Tensor scaling, Tensor? weights, {plan_of}, {mask}, int rows",
    }
    library = torch.library.Library("lyra_twins", "DEF")
    for name, schema in schemas.items():
        library.define(f"{name}({schema}) -> {'Tensor' if name == 'outer' else '()'}")
        library.impl(name, getattr(kernels, name), "CPU")
    fakes = {name: fused.FAKES[f"multi_lora_{name}"] for name in schemas}
    for name, fake in fakes.items():
        torch.library.register_fake(f"lyra_twins::{name}", fake, lib=library)
    yield torch.ops.lyra_twins
    library._destroy()


def test_compiles_as_a_whole(ops):
    engine = fused.Engine(ops)

    def whole(x, weight, bias, adapters, ids, seed) -> Tensor:
        bank = LoraBank.pack(adapters)
        call = Call(engine, [bank], LoraRouting(ids, bank), seed, 1 << 14)
        return linears(call, x, None, [Base(weight, bias, None)])[0]

    compiled = torch.compile(whole, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (30, 21):
        x, weight, bias, adapters, ids = layer((4, 8, 2), tokens, dtype=torch.float32)
        inputs, seed, results = leaves(x, weight, bias, adapters), torch.tensor([tokens]), []
        for function in (whole, compiled):
            y = function(x, weight, bias, adapters, ids, seed)
            results.append([y, *torch.autograd.grad(y.square().sum(), inputs)])
        for got, want in zip(*results):
            torch.testing.assert_close(got, want)


class OnTheDevice(TorchFunctionMode):
    """Refuses what brings something from the host; of tensors on "meta" nothing can be read back."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        assert func not in (torch.tensor, torch.as_tensor, torch.from_numpy), f"{func.__name__}{args}"
        result = func(*args, **(kwargs or {}))
        assert not isinstance(result, Tensor) or result.device.type == "meta", func
        return result


@pytest.mark.parametrize("drop", [0, 1 << 14])
def test_neither_waits_for_the_other(drop: int):
    """Host and GPU, from the ids to the gradients, so that a CUDA graph can hold all of it."""
    engine = fused.Engine(SimpleNamespace(**{name.removeprefix("multi_lora_"): f for name, f in fused.FAKES.items()}))

    def leaf(*shape: int) -> Tensor:
        return torch.randn(*shape, device="meta", requires_grad=True)

    x, weight, shares = leaf(200, 24), leaf(17, 24), leaf(200, 2)
    adapters = {f"{rank}": (leaf(rank, 24), leaf(17, rank), 1 / rank) for rank in (4, 8)}
    ids = torch.zeros(200, 2, dtype=torch.int64, device="meta")
    with OnTheDevice():
        bank = LoraBank.pack(adapters)
        call = Call(engine, [bank], LoraRouting(ids, bank, shares), dropout.new_seed(ids.device), drop)
        (y,) = linears(call, x, shares, [Base(weight, None, None)])
        inputs = [x, weight, shares, *(t for pair in bank.adapters for t in pair)]
        assert [g.shape for g in torch.autograd.grad(y.sum(), inputs)] == [t.shape for t in inputs]


def test_dropout_in_the_twins_is_the_mask():
    x, weight, bias, adapters, ids = layer((4, 8), 90, dtype=torch.float32)
    seed, drop = torch.tensor([9]), 30000
    dropped = torch.where(dropout.kept(seed, drop, *x.shape), x, 0) * dropout.scale(drop)
    got = run(x, weight, bias, adapters, ids, seed=seed, drop=drop)
    base = torch.nn.functional.linear(x, weight, bias)
    want = base + each_adapter_and_mask(dropped, weight, bias, adapters, ids) - base.sub(0) * 0
    want = want - torch.nn.functional.linear(dropped, weight, bias)
    torch.testing.assert_close(got, want)


@pytest.mark.interp
@pytest.mark.skipif(not fused.INTERPRETED, reason="needs TRITON_INTERPRET=1")
@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
def test_triton_through_the_public_function(dropout_p: float):
    pytest.importorskip("triton")
    x, weight, bias, adapters, _ = layer((4, 8, 2), 90, dtype=torch.float32)
    bank, ids, shares = LoraBank.pack(adapters), torch.randint(-1, 2, (90, 2)), torch.rand(90, 2)
    results = []
    for backend in ("triton", "reference"):
        torch.manual_seed(0)
        inputs = [*leaves(x, weight, bias, adapters), shares.requires_grad_()]
        routing, options = LoraRouting(ids, bank, shares), {"dropout_p": dropout_p, "training": True}
        y = multi_lora_linear(x, weight, bank, routing, bias, backend=backend, **options)
        results.append([y, *torch.autograd.grad(y.square().sum(), inputs)])
    for got, want in zip(*results):
        torch.testing.assert_close(got, want)
