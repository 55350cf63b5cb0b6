"""multi_lora_linear against the formula token by token, and against unpatched peft."""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import lyra_ops
from lyra_ops import LoraBank, LoraRouting, multi_lora_linear, multi_lora_linears
from lyra_ops.multi_lora import add_adapters, cpu, dropout, few, reference
from lyra_ops.multi_lora.function import Base, Call, linears
from lyra_ops.testing import assert_within_reference_error

Adapters = dict[str, tuple[Tensor, Tensor, float]]


def layer(
    ranks: tuple[int, ...], tokens: int, *, inputs: int = 24, outputs: int = 17, dtype=torch.float64, seed: int = 0
):
    """x, weight, bias, adapters and ids of a random layer; the last adapter of several has no token."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return (torch.randn(*shape, generator=g, dtype=torch.float64) / shape[-1] ** 0.5).to(dtype)

    adapters = {
        f"adapter {e}": (normal(r, inputs), normal(outputs, r), (2.0, 1 / 3, -0.5)[e % 3]) for e, r in enumerate(ranks)
    }
    ids = torch.randint(-1, max(1, len(ranks) - 1), (tokens,), generator=g)
    return normal(tokens, inputs), normal(outputs, inputs), normal(outputs), adapters, ids


@pytest.fixture(params=["reference", "cpu"])
def backend(request, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(few, "TOKENS", 0)
    return request.param


@pytest.fixture(params=["reference", "cpu", "cpu, few tokens"])
def backend16(request, monkeypatch: pytest.MonkeyPatch) -> str:
    """For float32 and bfloat16: the ops for few tokens as well."""
    monkeypatch.setattr(few, "TOKENS", 10**9 if "few" in request.param else 0)
    return request.param.split(",")[0]


def run(x: Tensor, weight: Tensor, bias: Tensor | None, adapters: Adapters, ids: Tensor, **options) -> Tensor:
    bank = LoraBank.pack(adapters)
    return multi_lora_linear(x, weight, bank, LoraRouting(ids, bank), bias, **options)


def formula(x: Tensor, weight: Tensor, bias: Tensor, adapters: Adapters, ids: Tensor) -> Tensor:
    """The formula of the docstring in numpy, token by token, in more than float64."""

    def exact(t: Tensor) -> np.ndarray:
        return t.detach().double().numpy().astype(np.longdouble)

    y = exact(x) @ exact(weight).T + exact(bias)
    for t, row in enumerate(exact(x)):
        if ids[t] >= 0:
            a, b, scaling = list(adapters.values())[ids[t]]
            y[t] += np.longdouble(scaling) * (exact(b) @ (exact(a) @ row))
    return torch.from_numpy(y.astype(np.float64))


def each_adapter_and_mask(x: Tensor, weight: Tensor, bias: Tensor, adapters: Adapters, ids: Tensor) -> Tensor:
    """The same in plain torch at the precision of x, as one would write it first."""
    y = F.linear(x, weight, bias)
    for e, (a, b, scaling) in enumerate(adapters.values()):
        y = y + (ids == e)[:, None] * (x @ a.T @ b.T * scaling)
    return y


def leaves(*arguments) -> list[Tensor]:
    """All tensors of a layer that may require grad, now requiring it."""
    x, weight, bias, adapters = arguments[:4]
    return [t.requires_grad_() for t in (x, weight, bias, *(t for a in adapters.values() for t in a[:2]))]


RANKS = pytest.mark.parametrize("ranks", [(4,), (1, 8, 13, 64, 320), (64, 1, 8), (512,), tuple(range(1, 33))], ids=str)


@RANKS
@pytest.mark.parametrize("tokens", [1, 7, 64])
def test_formula(ranks: tuple[int, ...], tokens: int, backend: str):
    arguments = layer(ranks, tokens)
    assert_within_reference_error(
        run(*arguments, backend=backend), each_adapter_and_mask(*arguments), formula(*arguments)
    )


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=5), st.integers(0, 20), st.integers(1, 20), st.integers(0, 99))
def test_formula_at_any_size(ranks: list[int], tokens: int, size: int, seed: int):
    # Of small integers every order of adding gives the same, so nothing but the result itself will do.
    x, weight, bias, adapters, ids = layer(tuple(ranks), tokens, inputs=size, outputs=21 - size, seed=seed)
    x, weight, bias = (t.mul(8).round() for t in (x, weight, bias))
    adapters = {
        name: (a.mul(8).round(), b.mul(8).round(), 2.0**-e) for e, (name, (a, b, _)) in enumerate(adapters.items())
    }
    for backend in ("reference", "cpu"):
        got = run(x, weight, bias, adapters, ids, backend=backend)
        assert torch.equal(got, formula(x, weight, bias, adapters, ids))


def peft_layer(weight: Tensor, bias: Tensor, adapters: Adapters) -> torch.nn.Module:
    lora = pytest.importorskip("peft.tuners.lora")
    base = torch.nn.Linear(weight.shape[1], weight.shape[0], dtype=weight.dtype)
    base.requires_grad_(False)
    base.weight.copy_(weight.detach())
    base.bias.copy_(bias.detach())
    module = None
    for name, (a, b, scaling) in adapters.items():
        config = pytest.importorskip("peft").LoraConfig(r=len(a), lora_alpha=1, init_lora_weights=False)
        if module is None:
            module = lora.Linear(base, name, config=config, r=len(a), lora_alpha=1)
        else:
            module.update_layer(name, len(a), 1, config=config)
        module.scaling[name] = scaling
        module.lora_A[name].to(a.dtype).weight.data.copy_(a)
        module.lora_B[name].to(b.dtype).weight.data.copy_(b)
    return module


def run_peft(module: torch.nn.Module, x: Tensor, names: list[str], ids: Tensor) -> Tensor:
    """Unpatched peft, with the name of an adapter per token."""
    return module.eval()(x[:, None], adapter_names=[[*names, "__base__"][e] for e in ids.tolist()])[:, 0]


def results_beside_peft(x, weight, bias, adapters, ids, upstream: Tensor, **options) -> dict[str, list[Tensor]]:
    """y, dx, dA and dB: ours, unpatched peft's, and those of plain torch in float64."""

    def results(y: Tensor, x: Tensor, a: list[Tensor], b: list[Tensor]) -> list[Tensor]:
        asked = {"allow_unused": True, "materialize_grads": True}  # peft gives an adapter without tokens none
        of_x, *of_adapters = torch.autograd.grad(y, [x, *a, *b], upstream.to(y.dtype), **asked)
        return [
            y,
            of_x,
            *(torch.cat([g.flatten() for g in of]) for of in (of_adapters[: len(a)], of_adapters[len(a) :])),
        ]

    def of(function, dtype: torch.dtype) -> list[Tensor]:
        mine = {
            name: (a.to(dtype).requires_grad_(), b.to(dtype).requires_grad_(), s)
            for name, (a, b, s) in adapters.items()
        }
        given = x.detach().to(dtype).requires_grad_()
        y = function(given, weight.to(dtype), bias.to(dtype), mine, ids)
        return results(y, given, [a for a, _, _ in mine.values()], [b for _, b, _ in mine.values()])

    module = peft_layer(weight, bias, adapters).requires_grad_()
    a, b = ([matrices[name].weight for name in adapters] for matrices in (module.lora_A, module.lora_B))
    given = x.detach().requires_grad_()
    peft = results(run_peft(module, given, list(adapters), ids), given, a, b)
    ours = of(functools.partial(run, **options), x.dtype)
    return dict(zip(("y", "dx", "dA", "dB"), map(list, zip(ours, peft, of(each_adapter_and_mask, torch.float64)))))


@RANKS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_is_not_above_that_of_peft(ranks: tuple[int, ...], dtype: torch.dtype, backend16: str):
    x, weight, bias, adapters, ids = layer(ranks, 64, inputs=96, outputs=80, dtype=dtype)
    adapters = {name: (a, b, s / 3) for name, (a, b, s) in adapters.items()}  # as alpha / sqrt(r): not a power of two
    arguments = (x, weight, bias, adapters, ids)
    upstream = layer((1,), 64, inputs=80, dtype=dtype, seed=1)[0]
    for name, (ours, peft, exact) in results_beside_peft(*arguments, upstream, backend=backend16).items():
        assert_within_reference_error(ours, peft, exact, name=name)
        # In 16 bits roundings count, not the order of a sum; the reference rounds its gradients as often as peft does.
        if dtype != torch.float32 and (name == "y" or backend16 != "reference"):
            errors = [(value.double() - exact).square().mean().item() for value in (ours, peft)]
            assert errors[0] <= errors[1], name


def test_long_sums_of_the_ops_for_few_tokens_are_as_exact_as_those_of_peft(monkeypatch: pytest.MonkeyPatch):
    """Upstream gradients of one: partial sums over the outputs grow, and with them the rounding of each step."""
    monkeypatch.setattr(few, "TOKENS", 10**9)
    arguments = layer((64, 13, 8, 4), 16, inputs=2048, outputs=2048, dtype=torch.float32)
    for name, values in results_beside_peft(*arguments, torch.ones(16, 2048)).items():
        ours, theirs = ((value.double() - values[-1]).norm().item() for value in values[:2])
        assert ours <= theirs, name


def test_gradients_of_peft(backend: str):
    """peft trains one adapter at a time: each sees the whole batch, and only its own tokens get a gradient."""
    upstream = torch.randn(40, 17, dtype=torch.float64)

    def ours(dtype: torch.dtype) -> list[Tensor]:
        x, weight, bias, adapters, ids = layer((3, 8, 5, 4), 40, dtype=dtype)
        inputs = leaves(x, weight, bias, adapters)
        return torch.autograd.grad(run(x, weight, bias, adapters, ids, backend=backend), inputs, upstream.to(dtype))

    def theirs(dtype: torch.dtype) -> list[Tensor]:
        x, weight, bias, adapters, ids = layer((3, 8, 5, 4), 40, dtype=dtype)
        module = peft_layer(weight, bias, adapters).train()
        shared = [
            x.requires_grad_(),
            module.base_layer.weight.requires_grad_(),
            module.base_layer.bias.requires_grad_(),
        ]
        base = torch.autograd.grad(module.base_layer(x), shared, (ids == -1)[:, None] * upstream.to(dtype))
        grads = []
        for e, name in enumerate(adapters):
            module.set_adapter(name)
            own = [module.lora_A[name].weight, module.lora_B[name].weight]
            got = torch.autograd.grad(module(x), shared + own, (ids == e)[:, None] * upstream.to(dtype))
            base = [total + part for total, part in zip(base, got)]
            grads += got[3:]
        return [*base, *grads]

    for got, plain, exact in zip(ours(torch.float32), theirs(torch.float32), theirs(torch.float64)):
        assert_within_reference_error(got, plain, exact)


def test_gradcheck(backend: str):
    x, weight, bias, adapters, ids = layer((2, 1, 3), 6, inputs=5, outputs=4)
    inputs = leaves(x, weight, bias, adapters)

    def function(x: Tensor, weight: Tensor, bias: Tensor, *ab: Tensor) -> Tensor:
        rebuilt = {name: (*ab[2 * e : 2 * e + 2], adapters[name][2]) for e, name in enumerate(adapters)}
        return run(x, weight, bias, rebuilt, ids, backend=backend)

    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("tokens", [0, 9])
def test_adapters_without_tokens_get_zeros(tokens: int, backend: str):
    x, weight, bias, adapters, _ = layer((2, 3), tokens)
    leaves(x, weight, bias, adapters)
    weight.requires_grad_(False)
    ids = torch.full((tokens,), -1)
    ids[: tokens // 2] = 0
    y = run(x, weight, bias, adapters, ids, backend=backend)
    assert y.shape == (tokens, 17)
    y.sum().backward()
    assert weight.grad is None
    assert all(torch.equal(t.grad, torch.zeros_like(t)) for t in adapters["adapter 1"][:2])
    assert all(t.grad.any() == (tokens > 0) for t in adapters["adapter 0"][:2])


def test_base_only_is_the_plain_layer(backend: str):
    x, weight, bias, adapters, _ = layer((4, 8), 9, dtype=torch.bfloat16)
    assert torch.equal(run(x, weight, bias, adapters, torch.full((9,), -1), backend=backend), F.linear(x, weight, bias))
    assert torch.equal(run(x, weight, None, adapters, torch.full((9,), -1), backend=backend), F.linear(x, weight))


def test_shapes_and_strides(backend: str):
    x, weight, bias, adapters, ids = layer((4, 8, 2), 30)
    flat = run(x, weight, bias, adapters, ids, backend=backend)
    assert torch.equal(
        run(x.view(5, 6, 24), weight, bias, adapters, ids.view(5, 6), backend=backend), flat.view(5, 6, 17)
    )
    assert torch.equal(run(x, weight, bias, adapters, ids.view(5, 6).int(), backend=backend), flat)
    wide = torch.full((24, 60), math.nan, dtype=torch.float64)
    wide[:, ::2] = x.T
    weights = weight.T.contiguous().T
    strided = {name: (a.T.contiguous().T, b.repeat(1, 2)[:, : b.shape[1]], s) for name, (a, b, s) in adapters.items()}
    spread = torch.stack([ids, ids], 1)[:, 0]
    exact = formula(x, weight, bias, adapters, ids)
    assert_within_reference_error(run(wide.T[::2], weights, bias, strided, spread, backend=backend), flat, exact)
    transposed = x.view(6, 5, 24).transpose(0, 1)
    got = run(transposed, weight, bias, adapters, ids.view(6, 5).T, backend=backend)
    assert_within_reference_error(got, flat.view(6, 5, 17).transpose(0, 1), exact.view(6, 5, 17).transpose(0, 1))


def test_one_routing_serves_layers_of_other_ranks():
    x, weight, bias, adapters, ids = layer((4, 8), 12)
    routing = LoraRouting(ids, LoraBank.pack(adapters))
    x, weight, bias, others, _ = layer((16, 1), 12, seed=1)
    got = multi_lora_linear(x, weight, LoraBank.pack(others), routing, bias)
    assert torch.equal(got, run(x, weight, bias, others, ids))


def test_the_bank_is_packed_without_padding():
    _, _, _, adapters, _ = layer((1, 13, 320), 1)
    bank = LoraBank.pack(adapters)
    assert bank.ranks == (1, 13, 320)
    assert bank.names == ("adapter 0", "adapter 1", "adapter 2")
    assert all(mine is given for pair, own in zip(bank.adapters, adapters.values()) for mine, given in zip(pair, own))
    rows = bank.rows(torch.float32)
    assert rows.a.shape == (334, 24)
    assert rows.b.shape == (334, 17)
    assert rows.owner.tolist() == [0] + [1] * 13 + [2] * 320


def test_dropout_reaches_the_adapters_alone(backend: str):
    x, weight, bias, adapters, ids = layer((4, 8, 2), 400)
    inputs = leaves(x, weight, bias, adapters)
    base = F.linear(x, weight, bias)
    plain = run(x, weight, bias, adapters, ids, backend=backend)
    assert torch.equal(run(x, weight, bias, adapters, ids, dropout_p=0.5, backend=backend), plain)  # not training
    assert torch.equal(run(x, weight, bias, adapters, ids, dropout_p=1.0, training=True, backend=backend), base)
    torch.manual_seed(0)
    got = run(x, weight, bias, adapters, ids, dropout_p=0.25, training=True, backend=backend)
    assert torch.equal(got[ids == -1], base[ids == -1])
    torch.manual_seed(0)
    dropped = x * dropout.kept(dropout.new_seed(x.device), 1 << 14, *x.shape) / 0.75
    want = each_adapter_and_mask(dropped, weight, bias, adapters, ids) + F.linear(x - dropped, weight)
    torch.testing.assert_close(got, want)
    upstream = torch.randn_like(got)
    torch.testing.assert_close(*(torch.autograd.grad(y, inputs, upstream) for y in (got, want)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_dropout_mask(dtype: torch.dtype):
    """Of the compiled kernel and of plain torch: Philox4x32-10, the same wherever the element lies."""

    def number(row: int, column: int, seed: int) -> int:
        """The 16 bits of an element: the largest probability at which it is kept."""
        key, low, high = torch.tensor([seed]), 0, 1 << 16
        while high - low > 1:
            middle = (low + high) // 2
            kept = dropout.kept(key, middle, 1, column + 1, first=row)[0, column]
            low, high = (middle, high) if kept else (low, middle)
        return (low - (1 << 15)) & 0xFFFF

    # The first known answer of Random123, https://github.com/DEShawResearch/random123, tests/kat_vectors.
    words = [number(0, 2 * i, 0) | number(0, 2 * i + 1, 0) << 16 for i in range(4)]
    assert words == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]

    x, seed = torch.randn(300, 1003).to(dtype), torch.tensor([(1 << 61) + 12345])
    kept = dropout.kept(seed, 6554, *x.shape)
    assert torch.equal(dropout.kept(seed, 6554, 100, 1003, first=200), kept[200:])
    assert torch.equal(cpu.drop_out(x, seed, 6554), torch.where(kept, x, 0))
    assert torch.equal(cpu.drop_out(x.T, seed, 6554), dropout.drop_out(x.T, seed, 6554))
    deviation = (0.1 * 0.9 / kept.numel()) ** 0.5
    assert abs((~kept).double().mean() - 0.1) < 5 * deviation
    again = dropout.kept(seed + 1, 6554, *x.shape)
    assert abs((kept & again).double().mean() - 0.81) < 5 * (0.81 * 0.19 / kept.numel()) ** 0.5


def test_dropout_keeps_no_mask(backend16: str):
    x, weight, bias, adapters, ids = layer((4, 8), 200, inputs=256, dtype=torch.float32)
    leaves(x, weight, bias, adapters)
    saved: dict[int, int] = {}

    def save(t: Tensor) -> Tensor:
        saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    sizes = []
    for p in (0.0, 0.5):
        saved.clear()
        with torch.autograd.graph.saved_tensors_hooks(save, lambda t: t):
            y = run(x, weight, bias, adapters, ids, dropout_p=p, training=True, backend=backend16)
        sizes.append(sum(saved.values()))
        del y
    assert sizes[1] - sizes[0] < x.numel()  # less than a byte per element


def sum_of_formulas(x, weight, bias, adapters, ids: Tensor, weights: Tensor) -> Tensor:
    """One adapter after the other, in float64: differentiable in everything."""
    y = F.linear(x, weight, bias)
    for mine, w in zip(ids.T, weights.T):
        for e, (a, b, scaling) in enumerate(adapters.values()):
            y = y + ((mine == e) * w)[:, None] * (x @ a.T @ b.T * scaling)
    return y


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [0, 1, 70])
def test_several_weighted_adapters_per_token(tokens: int, dtype: torch.dtype, backend16: str):
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(-1, 3, (tokens, 3), generator=g)  # the same adapter twice at times, and the last one never
    shares = torch.rand(tokens, 3, generator=g, dtype=torch.float64)
    shares[ids == 2] = 0  # a weight of zero takes an adapter away, but not its weight's gradient
    upstream = torch.randn(tokens, 17, generator=g, dtype=torch.float64)

    def results(run_in: torch.dtype, function) -> list[Tensor]:
        x, weight, bias, adapters, _ = layer((3, 8, 5, 4), tokens, dtype=dtype)
        x, weight, bias = (t.to(run_in) for t in (x, weight, bias))
        adapters = {name: (a.to(run_in), b.to(run_in), s) for name, (a, b, s) in adapters.items()}
        inputs = [*leaves(x, weight, bias, adapters), shares.to(run_in).requires_grad_()]
        y = function(x, weight, bias, adapters, ids, inputs[-1])
        return [y, *torch.autograd.grad(y, inputs, upstream.to(run_in))]

    def ours(x, weight, bias, adapters, ids, shares) -> Tensor:
        bank = LoraBank.pack(adapters)
        return multi_lora_linear(x, weight, bank, LoraRouting(ids, bank, shares), bias, backend=backend16)

    for got, plain, exact in zip(
        results(dtype, ours), results(dtype, sum_of_formulas), results(torch.float64, sum_of_formulas)
    ):
        assert_within_reference_error(got, plain, exact)


def test_weights_per_sample_and_token():
    x, weight, bias, adapters, ids = layer((3, 8), 12)
    bank = LoraBank.pack(adapters)
    ids, shares = torch.stack([ids, ids * 0 + 1], 1), torch.rand(12, 2)
    flat = multi_lora_linear(x, weight, bank, LoraRouting(ids, bank, shares), bias)
    routing = LoraRouting(ids.view(3, 4, 2), bank, shares.view(3, 4, 2))
    assert torch.equal(multi_lora_linear(x.view(3, 4, 24), weight, bank, routing, bias), flat.view(3, 4, 17))
    assert torch.equal(multi_lora_linear(x, weight, bank, routing, bias), flat)


def test_gradcheck_of_weights(backend: str):
    x, weight, bias, adapters, ids = layer((2, 1), 4, inputs=5, outputs=3)
    ids, shares = torch.stack([ids, ids * 0 + 1], 1), torch.rand(4, 2, dtype=torch.float64)
    inputs = [*leaves(x, weight, bias, adapters), shares.requires_grad_()]

    def function(x: Tensor, weight: Tensor, bias: Tensor, *rest: Tensor) -> Tensor:
        *ab, shares = rest
        bank = LoraBank.pack({name: (*ab[2 * e : 2 * e + 2], adapters[name][2]) for e, name in enumerate(adapters)})
        return multi_lora_linear(x, weight, bank, LoraRouting(ids, bank, shares), bias, backend=backend)

    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
def test_layers_with_one_input(dropout_p: float, backend: str):
    x, *_, ids = layer((4, 8, 2), 40)
    layers = [layer((4, 8, 2), 1, outputs=n, seed=n) for n in (17, 9, 9)]
    banks = [LoraBank.pack(adapters) for _, _, _, adapters, _ in layers]
    inputs = [x.requires_grad_(), *(t for made in layers for t in leaves(torch.empty(0), *made[1:4])[1:])]
    routing, options = LoraRouting(ids, banks[0]), {"dropout_p": dropout_p, "training": True, "backend": backend}

    def each() -> list[Tensor]:
        ys = []
        for (_, weight, bias, _, _), bank in zip(layers, banks):
            torch.manual_seed(0)  # they share one mask
            ys.append(multi_lora_linear(x, weight, bank, routing, bias, **options))
        return ys

    torch.manual_seed(0)
    weights, biases = ([made[k] for made in layers] for k in (1, 2))
    together = multi_lora_linears(x, weights, banks, routing, biases, **options)
    assert [y.shape for y in together] == [(40, 17), (40, 9), (40, 9)]
    upstream = [torch.randn_like(y) for y in together]
    want = each()
    for got, y in zip(together, want):
        torch.testing.assert_close(got, y)
    for got, y in zip(*(torch.autograd.grad(ys, inputs, upstream) for ys in (together, want))):
        torch.testing.assert_close(got, y)
    assert torch.equal(multi_lora_linears(x, weights[1:2], banks[1:2], routing, backend=backend)[0],
                       multi_lora_linear(x, weights[1], banks[1], routing, backend=backend))  # fmt: skip


def test_a_run_more_or_less():
    """Tokens that lie in runs are multiplied where they lie, others are brought together: the same result."""
    x, weight, bias, adapters, _ = layer((4, 8, 2), 600)
    for length in (1, 2, cpu.RUN - 1, cpu.RUN, 100, 600):
        ids = (torch.arange(600) // length) % 4 - 1
        inputs = leaves(x, weight, bias, adapters)
        got, want = (run(x, weight, bias, adapters, ids, backend=backend) for backend in ("cpu", "reference"))
        torch.testing.assert_close(got, want)
        upstream = torch.randn_like(got)
        torch.testing.assert_close(*(torch.autograd.grad(y, inputs, upstream) for y in (got, want)))


class LargestFloat32(TorchDispatchMode):
    """The number of elements of the largest float32 result of any operation."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for t in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(t, Tensor) and t.dtype == torch.float32:
                self.largest = max(self.largest, t.numel())
        return result


def test_float32_masters_widen_no_activation(backend16: str):
    x, weight, bias, adapters, ids = layer((4, 8, 2), 200, dtype=torch.bfloat16)
    narrow = run(x, weight, bias, adapters, ids, backend=backend16)
    masters = {
        name: (a.float().requires_grad_(), b.float().requires_grad_(), s) for name, (a, b, s) in adapters.items()
    }
    x.requires_grad_()
    with LargestFloat32() as seen:
        y = run(x, weight, bias, masters, ids, backend=backend16)
        y.sum().backward()
    assert torch.equal(y, narrow)
    assert seen.largest < min(x.numel(), y.numel())
    assert x.grad.dtype == torch.bfloat16
    assert {t.grad.dtype for m in masters.values() for t in m[:2]} == {torch.float32}


@pytest.mark.parametrize("uniform", [False, True])
def test_adapters_of_unequal_dtypes(uniform: bool, backend16: str):
    """As in peft, where each is loaded by itself: each gets the gradients that it gets among its like."""
    x, weight, bias, adapters, ids = layer((4, 8, 2), 40, dtype=torch.bfloat16)
    ids = ids * 0 + 1 if uniform else ids

    def results(*dtypes: torch.dtype) -> list[Tensor]:
        mine = {
            name: (a.to(d).requires_grad_(), b.to(d).requires_grad_(), s)
            for (name, (a, b, s)), d in zip(adapters.items(), dtypes)
        }
        given = x.detach().requires_grad_()
        y = run(given, weight, bias, mine, ids, backend=backend16)
        return [y, *torch.autograd.grad(y.sum(), [given, *(t for pair in mine.values() for t in pair[:2])])]

    narrow, wide = (results(*[dtype] * 3) for dtype in (torch.bfloat16, torch.float32))
    got = results(torch.bfloat16, torch.float32, torch.bfloat16)
    for value, expected in zip(got, [*narrow[:4], *wide[4:6], *narrow[6:]]):
        assert value.dtype == expected.dtype and torch.equal(value, expected)


def test_scaling_is_not_rounded_to_16_bits(backend16: str):
    # 32 / 24 is 0.2 % off in bfloat16. A and B of one leave the rounding of the result alone.
    x = torch.arange(1, 257)[:, None].bfloat16()
    one = torch.ones(1, 1, dtype=torch.bfloat16)
    y = run(x, one * 0, None, {"a": (one, one, 32 / 24)}, torch.zeros(256, dtype=torch.int64), backend=backend16)
    assert torch.equal(y, (x.float() * (32 / 24)).bfloat16())


def test_autocast(backend16: str):
    x, weight, bias, adapters, ids = layer((4, 8, 2), 30, dtype=torch.float32)
    narrow = run(
        *(t.bfloat16() for t in (x, weight, bias)),
        {name: (a.bfloat16(), b.bfloat16(), s) for name, (a, b, s) in adapters.items()},
        ids,
        backend=backend16,
    )
    inputs = leaves(x, weight, bias, adapters)
    with torch.autocast("cpu", torch.bfloat16):
        got = run(x, weight, bias, adapters, ids, backend=backend16)
        mixed = run(x, weight.bfloat16(), bias.bfloat16(), adapters, ids, backend=backend16)
    assert torch.equal(got, narrow)
    assert torch.equal(mixed, narrow)
    got.sum().backward()
    assert all(t.grad.dtype == torch.float32 for t in inputs)


def test_same_bits_from_run_to_run(backend16: str):
    results = []
    for _ in range(2):
        x, weight, bias, adapters, ids = layer((4, 64, 13), 300, inputs=256, outputs=192, dtype=torch.float32)
        inputs = leaves(x, weight, bias, adapters)
        y = run(x, weight, bias, adapters, ids, backend=backend16)
        results.append([y, *torch.autograd.grad(y.square().sum(), inputs)])
    assert all(torch.equal(a, b) for a, b in zip(*results))


@pytest.mark.parametrize("drop", [0, 1 << 14])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("ranks", [(4,), (64, 1, 13, 70), (8, 16)], ids=str)
def test_ops_for_few_tokens(ranks: tuple[int, ...], dtype: torch.dtype, drop: int):
    """Forward and backward as exact as plain torch, whatever the ranks, and with widths that fill no vector."""
    tokens, width, outputs = {1: (1, 5, 3), 2: (6, 130, 48), 4: (37, 70, 83)}[len(ranks)]
    x, _, _, adapters, ids = layer(ranks, tokens, inputs=width, outputs=outputs, dtype=dtype)
    upstream, seed = torch.randn(tokens, outputs, dtype=torch.float64), torch.tensor([3]) if drop else None

    def results(run_in: torch.dtype, engine) -> list[Tensor]:
        mine = {name: (a.to(run_in), b.to(run_in), s) for name, (a, b, s) in adapters.items()}
        inputs = [x.to(run_in).requires_grad_(), *(t.requires_grad_() for m in mine.values() for t in m[:2])]
        bank, y = LoraBank.pack(mine), torch.zeros(tokens, outputs, dtype=run_in)
        routing = LoraRouting(ids, bank)
        if engine is few:
            got = linears(Call(few, [bank], routing, seed, drop), inputs[0], None, [Base(None, None, y)])[0]
        else:
            got = reference.add_adapters(y, inputs[0], bank.rows(run_in), routing.pairs, None, seed, drop)
        return [got, *torch.autograd.grad(got, inputs, upstream.to(run_in))]

    for got, plain, exact in zip(results(dtype, few), results(dtype, reference), results(torch.float64, reference)):
        assert_within_reference_error(got, plain, exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_the_adapters_add_does_not_depend_on_the_batch(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    """To a token and to its gradient, for few tokens. (What torch's products add may: docs/multi_lora.md.)"""
    monkeypatch.setattr(few, "TOKENS", 10**9)
    x, _, _, adapters, ids = layer((64, 13, 8), 33, inputs=150, outputs=70, dtype=dtype)
    ids, weights = torch.stack([ids, ids.flip(0)], 1), torch.rand(33, 2)
    upstream = torch.randn(33, 70).to(dtype)

    def run_rows(rows: slice) -> list[Tensor]:
        bank, mine = LoraBank.pack(adapters), x[rows].detach().requires_grad_()
        y = torch.zeros(len(mine), 70, dtype=dtype)
        got = add_adapters(y, mine, bank, LoraRouting(ids[rows], bank, weights[rows]))
        return [got, *torch.autograd.grad(got, mine, upstream[rows])]

    together = run_rows(slice(None))
    for rows in (slice(0, 1), slice(5, 7), slice(12, 32)):
        assert all(torch.equal(got, want[rows]) for got, want in zip(run_rows(rows), together))


@pytest.mark.parametrize("few_tokens", [0, 10**9])
@pytest.mark.parametrize("uniform", [False, True])
def test_gradients_accumulate_in_float32(few_tokens: int, uniform: bool, monkeypatch: pytest.MonkeyPatch):
    """Of many small batches in bfloat16: what a sum in bfloat16 would lose is there."""
    monkeypatch.setattr(few, "TOKENS", few_tokens)
    x, weight, bias, adapters, ids = layer((4, 8, 2), 20, dtype=torch.bfloat16)
    ids = ids * 0 if uniform else ids
    masters = {
        name: (a.float().requires_grad_(), b.float().requires_grad_(), s) for name, (a, b, s) in adapters.items()
    }
    with monkeypatch.context() as patch:
        patch.setattr(cpu, "ONE_NODE", 0)
        y = run(x, weight, bias, masters, ids)
    once = torch.autograd.grad(y.sum(), [t for m in masters.values() for t in m[:2]])

    bank = LoraBank.pack({name: (a.requires_grad_(), b.requires_grad_(), s) for name, (a, b, s) in adapters.items()})
    parameters = [t for pair in bank.adapters for t in pair]
    sums = [t for pair in bank.accumulate().values() for t in pair]
    assert all(torch.equal(total, torch.zeros(p.shape)) for total, p in zip(sums, parameters))
    for _ in range(300):
        multi_lora_linear(x, weight, bank, LoraRouting(ids, bank), bias).sum().backward()
    assert all(p.grad is None for p in parameters)
    for total, one in zip(sums, once):
        want = torch.zeros_like(one)
        for _ in range(300):
            want += one
        torch.testing.assert_close(total, want)
    again = [t for pair in bank.accumulate().values() for t in pair]
    assert all(torch.equal(total, same) for total, same in zip(sums, again))
    with pytest.raises(ValueError, match="bank: got one that accumulates its gradients, which the backend 'reference'"):
        multi_lora_linear(x, weight, bank, LoraRouting(ids, bank), bias, backend="reference")


def test_raw_ops_for_few_tokens_keep_their_schema():
    x, _, _, adapters, ids = layer((4, 8), 9, dtype=torch.float32)
    a, b = ([pair[k] for pair in adapters.values()] for k in (0, 1))
    given = (a, b, [2.0, 0.5], ids[:, None])
    y, dx = torch.zeros(9, 17), torch.zeros(9, 24)
    h = torch.ops.lyra.multi_lora_few_(y, x, *given, None)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.lyra.multi_lora_few_, (y, x, *given, None), test_utils=tests)
    gradients = (dx, y, x, h, *given, torch.rand(9, 1), True, False)
    torch.library.opcheck(torch.ops.lyra.multi_lora_few_gradients_, gradients, test_utils=tests)
    with pytest.raises(RuntimeError, match="ids: got 2, expected -1 to 1"):
        torch.ops.lyra.multi_lora_few_(y, x, a, b, [2.0, 0.5], ids[:, None] + 2, None)
    with pytest.raises(RuntimeError, match="h: got shape"):
        torch.ops.lyra.multi_lora_few_gradients_(dx, y, x, h[:3], *given, None, True, True)


@pytest.mark.parametrize("x", [torch.rand(9, 24), torch.rand(24, 9).T, torch.rand(0, 24).bfloat16()])
def test_the_raw_op_of_dropout_keeps_its_schema(x: Tensor):
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.lyra.multi_lora_dropout, (x, torch.tensor([3]), 9000), test_utils=tests)


def test_gradient_checkpointing_keeps_the_routing(backend: str):
    x, weight, bias, adapters, ids = layer((4, 8, 2), 30)
    inputs = leaves(x, weight, bias, adapters)
    plain = torch.autograd.grad(run(x, weight, bias, adapters, ids, backend=backend).square().sum(), inputs)
    routing = LoraRouting(ids, LoraBank.pack(adapters))

    def block(x: Tensor) -> Tensor:
        return multi_lora_linear(x, weight, LoraBank.pack(adapters), routing, bias, backend=backend).square().sum()

    again = torch.autograd.grad(checkpoint(block, x, use_reentrant=False), inputs)
    assert all(torch.equal(a, b) for a, b in zip(plain, again))


def test_compiles_as_a_whole():
    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (30, 21):
        x, weight, bias, adapters, ids = layer((4, 8, 2), tokens)
        inputs = leaves(x, weight, bias, adapters)
        plain = run(x, weight, bias, adapters, ids, backend="reference")
        got = compiled(x, weight, bias, adapters, ids)
        assert torch.equal(got, plain)
        for a, b in zip(*(torch.autograd.grad(y.square().sum(), inputs) for y in (got, plain))):
            assert torch.equal(a, b)


def test_adding_to_the_result_of_a_base_layer_compiles_as_a_whole():
    x, weight, bias, adapters, ids = layer((4, 8, 2), 30)
    bank = LoraBank.pack(adapters)
    routing = LoraRouting(ids, bank)

    def function(x: Tensor) -> Tensor:
        return add_adapters(2 * F.linear(x, weight, bias), x, bank, routing)

    got = torch.compile(function, fullgraph=True, backend="aot_eager")(x.requires_grad_())
    torch.testing.assert_close(got, function(x))
    torch.testing.assert_close(*(torch.autograd.grad(y.sum(), x) for y in (got, function(x))))


def test_backend_by_name():
    x, weight, bias, adapters, ids = layer((4,), 3)
    bank = LoraBank.pack(adapters)
    assert lyra_ops.backend_of(multi_lora_linear, x, weight, bank, LoraRouting(ids, bank), bias) == "cpu"
    with pytest.raises(ValueError, match="backend: 'cuda' cannot serve this call of multi_lora_linear"):
        run(x, weight, bias, adapters, ids, backend="cuda")


@pytest.mark.gpu
def test_no_sync_and_no_read_outside_the_bank_on_a_gpu():
    x, weight, bias, adapters, ids = layer((4, 8, 2), 30, dtype=torch.float32)
    base_only = ids.clone()
    ids[:3] = torch.tensor([3, 2**31, -(2**31)])
    base_only[:3] = -1
    expected = run(x, weight, bias, adapters, base_only)
    exact = formula(x, weight, bias, adapters, base_only)
    x, weight, bias, ids = (t.cuda() for t in (x, weight, bias, ids))
    adapters = {name: (a.cuda(), b.cuda(), s) for name, (a, b, s) in adapters.items()}
    inputs = leaves(x, weight, bias, adapters)
    run(x, weight, bias, adapters, ids).sum().backward()  # cuBLAS sets itself up
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = run(x, weight, bias, adapters, ids)
        got.sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(t.grad is not None for t in inputs)
    assert_within_reference_error(got, expected, exact)
