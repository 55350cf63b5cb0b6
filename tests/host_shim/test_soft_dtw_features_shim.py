"""The CUDA kernels of soft_dtw from features on the CPU, whichever thread goes first; wrong without any barrier."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from barriers import assert_needed, barriers
from soft_dtw_oracles import ragged, random
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from lyra_ops import _loader
from lyra_ops.soft_dtw import _check, features_cuda, reference
from lyra_ops.testing import assert_within_reference_error

GUARDS = barriers(Path(__file__).parents[2] / "csrc" / "soft_dtw" / "features.cuh")
ORDERS = {"forward": ("forward", 0, 0), "reverse": ("reverse", 0, 1), "shuffled": ("shuffled", 1, 4)}
TAU = 0.5


@pytest.fixture(scope="module")
def kernels(build_switched) -> ModuleType:
    return build_switched("soft_dtw_features.cpp", list(GUARDS.values()))


@dataclass(frozen=True)
class Case:
    cost: str
    dtype: torch.dtype
    rows: int
    columns: int
    dim: int
    band: int | str | None = None  # "windows" around the diagonal
    drop: bool = False
    gap: int = 0  # numbers between the rows of x

    @property
    def name(self) -> str:
        size = f"{self.rows}x{self.columns}x{self.dim + self.gap}"
        return f"{self.cost}-{name_of(self.dtype)}-{size}-band{self.band}{'-drop' * self.drop}"


HALF, BFLOAT, FLOAT = torch.float16, torch.bfloat16, torch.float32
CASES = [
    # Several row tiles; 64, 128 or 256 columns at a time, and more; odd D, D of less and more than a slab; unaligned.
    Case("contrastive", BFLOAT, 70, 20, 72),
    Case("cosine", BFLOAT, 70, 20, 72),
    Case("sqeuclidean", BFLOAT, 70, 20, 72),
    Case("contrastive", BFLOAT, 20, 100, 130),
    Case("contrastive", HALF, 10, 270, 33),
    Case("contrastive", FLOAT, 70, 66, 37),
    Case("contrastive", BFLOAT, 70, 70, 24, band=3),
    Case("contrastive", FLOAT, 20, 40, 12, band="windows", drop=True),
    Case("contrastive", BFLOAT, 20, 40, 0),
    Case("sqeuclidean", HALF, 30, 130, 40, drop=True),
    Case("sqeuclidean", FLOAT, 20, 70, 37),
    Case("sqeuclidean", BFLOAT, 140, 150, 9, band=2),
    Case("sqeuclidean", FLOAT, 130, 40, 33, band=1, drop=True),
    Case("sqeuclidean", BFLOAT, 70, 140, 16, band="windows"),
    Case("cosine", FLOAT, 20, 70, 37, drop=True),
    Case("cosine", FLOAT, 70, 100, 16, band=3),
    Case("cosine", BFLOAT, 20, 70, 264, band="windows", drop=True),
    Case("cosine", FLOAT, 1, 1, 3),
    Case("sqeuclidean", BFLOAT, 1, 33, 8),
    Case("sqeuclidean", BFLOAT, 40, 20, 64, gap=8),
    Case("contrastive", BFLOAT, 40, 20, 65, gap=7),  # rows aligned, with a tail
]


def windows(x_lengths: Tensor, y_lengths: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    middle = torch.arange(rows) * ((y_lengths - 1.0) / (x_lengths - 1).clamp(min=1))[:, None]
    reach = 7 + 5 * torch.rand(2, len(x_lengths), rows, generator=torch.Generator().manual_seed(3))
    return (middle - reach[0]).long(), (middle + reach[1]).long()


def bits(tokens: Tensor, gap: int = 0) -> np.ndarray:
    """As the module takes them; `gap` numbers, NaN, behind each row."""
    wide = torch.full((*tokens.shape[:2], tokens.shape[2] + gap), math.nan, dtype=tokens.dtype)
    wide[..., : tokens.shape[2]] = tokens
    array = (wide if tokens.dtype == torch.float32 else wide.view(torch.int16)).numpy()
    return (array if tokens.dtype == torch.float32 else array.view(np.uint16))[..., : tokens.shape[2]]


def tensor(array: np.ndarray, dtype: torch.dtype) -> Tensor:
    return torch.from_numpy(array if dtype == torch.float32 else array.view(np.int16)).view(dtype)


@dataclass
class Inputs:
    x: Tensor
    y: Tensor
    lengths: tuple[Tensor, Tensor]
    band: int | tuple[Tensor, Tensor] | None
    drop: Tensor | None
    grad: Tensor
    gamma: float = 0.5

    def arguments(self, kernels: ModuleType, cost: str):
        low, high = (t.numpy() for t in self.band) if isinstance(self.band, tuple) else (None, None)
        width = self.band if isinstance(self.band, int) else -1
        return kernels.Arguments(cost, TAU, *(n.numpy() for n in self.lengths), width, low, high)


def inputs_of(case: Case) -> Inputs:
    """Tokens of three pairs that have something in common, with NaN for padding."""
    lengths = ragged(3, case.rows, case.columns, seed=2)
    common = random(3, 1, case.dim, seed=4)
    scale = 1.5 / max(case.dim, 1) ** 0.5
    x = (scale * (random(3, case.rows, case.dim) + common)).to(case.dtype)
    y = (scale * (random(3, case.columns, case.dim, seed=1) + common)).to(case.dtype)
    for tokens, counts in zip((x, y), lengths):
        for b, count in enumerate(counts):
            tokens[b, count:] = math.nan
    band = windows(*lengths, case.rows) if case.band == "windows" else case.band
    drop = random(3, case.rows, seed=5).abs().float() if case.drop else None
    return Inputs(x, y, lengths, band, drop, random(3, seed=6).float())


def plain_cost(case: Case, x: Tensor, y: Tensor, lengths: tuple[Tensor, Tensor]) -> Tensor:
    """The formulas of the kernels' header in the dtype of x and y."""
    x_real, y_real = (torch.arange(t.shape[1]) < n[:, None] for t, n in zip((x, y), lengths))
    x, y = x.masked_fill(~x_real[..., None], 1), y.masked_fill(~y_real[..., None], 1)
    if case.cost == "sqeuclidean":
        return x.square().sum(-1)[:, :, None] + y.square().sum(-1)[:, None, :] - 2 * x @ y.mT
    return reference.pair_cost(x, y, *lengths, case.cost, TAU if case.cost == "contrastive" else 1.0)


def plainly(case: Case, inputs: Inputs, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Cost, value, then grad times the gradients in x, y and drop."""
    leaves = [t.to(dtype).clone().requires_grad_() for t in (inputs.x, inputs.y, inputs.drop) if t is not None]
    cost = plain_cost(case, *leaves[:2], inputs.lengths)
    drop = leaves[2] if case.drop else None
    value = reference.soft_dtw(cost, *inputs.lengths, inputs.gamma, inputs.band, drop)
    gradients = torch.autograd.grad(value, leaves, inputs.grad.to(dtype))
    return cost.detach(), value.detach(), *gradients


@functools.cache
def inputs_and_truth(case: Case) -> tuple[Inputs, tuple[Tensor, ...], tuple[Tensor, ...]]:
    inputs = inputs_of(case)
    return inputs, plainly(case, inputs, torch.float32), plainly(case, inputs, torch.float64)


def relative_error(got: Tensor, want: Tensor) -> float:
    got, want = got.double(), want.double()
    return float((got - want).norm() / want.norm().clamp(min=torch.finfo(torch.float64).tiny))


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def run_whole(kernels: ModuleType, case: Case, inputs: Inputs, of_x: bool = True, of_y: bool = True) -> list[Tensor]:
    """Value, then grad times its gradients in x, y and drop."""
    drop = None if inputs.drop is None else inputs.drop.numpy()
    which = name_of(case.dtype), inputs.arguments(kernels, case.cost)
    x, y, grad = bits(inputs.x, case.gap), bits(inputs.y), inputs.grad
    value, *kept = kernels.forward(*which, x, y, inputs.gamma, None, drop)
    options = inputs.drop is not None, False, of_x, of_y
    grad_x, grad_y, grad_drop, _ = kernels.backward(*which, grad.numpy(), value, *kept, x, y, *options)
    grads = [tensor(grad_x, case.dtype), tensor(grad_y, case.dtype), torch.from_numpy(grad_drop) * grad[:, None]]
    return [torch.from_numpy(value), *grads]


def run_cost(kernels: ModuleType, case: Case, inputs: Inputs) -> Tensor:
    arguments = inputs.arguments(kernels, case.cost)
    return torch.from_numpy(kernels.cost(name_of(case.dtype), arguments, bits(inputs.x, case.gap), bits(inputs.y)))


def check_case(case: Case, kernels: ModuleType) -> None:
    inputs, plain, exact = inputs_and_truth(case)
    inside = reference.inside_band(*inputs.lengths, case.rows, case.columns, inputs.band)
    costs = [t.masked_fill(~inside, 0) for t in (run_cost(kernels, case, inputs), plain[0], exact[0])]
    assert_within_reference_error(*costs, name="cost")
    got = run_whole(kernels, case, inputs)
    assert_within_reference_error(got[0], plain[1], exact[1], name="value")
    # A gradient is right up to the shares' 16 bits and its own rounding.
    for name, result, truth in zip(("grad_x", "grad_y"), got[1:], exact[2:]):
        rounded = relative_error(truth.to(case.dtype), truth)
        assert relative_error(result, truth) <= 1e-4 + 1.1 * rounded, name
        assert not result.isnan().any()
    for b, (n, m) in enumerate(zip(*inputs.lengths)):
        assert (got[1][b, n:] == 0).all()
        assert (got[2][b, m:] == 0).all()
    if case.drop:
        assert relative_error(got[3], exact[4]) <= 1e-4


def check_alone_in_a_batch_and_wider_padded(kernels: ModuleType) -> None:
    for cost, dtype in [("contrastive", BFLOAT), ("sqeuclidean", BFLOAT), ("cosine", FLOAT), ("sqeuclidean", FLOAT)]:
        case = Case(cost, dtype, 30, 40, 24, drop=True)
        inputs = inputs_of(case)
        want = run_whole(kernels, case, inputs)
        wide = inputs_of(Case(cost, dtype, 70, 280, 24, drop=True))
        wide.x.fill_(math.nan)
        wide.y.fill_(math.nan)
        wide.x[:, :30], wide.y[:, :40], wide.drop[:, :30] = inputs.x, inputs.y, inputs.drop
        wide.lengths = inputs.lengths
        got = run_whole(kernels, case, wide)
        for ours, theirs, size in zip(got, want, (None, 30, 40, 30)):
            assert torch.equal(ours[:, :size] if size else ours, theirs)
        n, m = (int(lengths[1]) for lengths in inputs.lengths)
        own = [t[1:2] for t in inputs.lengths]
        alone = Inputs(inputs.x[1:2, :n], inputs.y[1:2, :m], own, None, inputs.drop[1:2, :n], inputs.grad[1:2])
        for ours, theirs, size in zip(run_whole(kernels, case, alone), want, (None, n, m, n)):
            assert torch.equal(ours[0], theirs[1, :size] if size else theirs[1])


def check_nan_stays_in_its_pair(kernels: ModuleType) -> None:
    for cost, band in [("contrastive", None), ("sqeuclidean", 3), ("cosine", 3)]:
        case = Case(cost, BFLOAT, 40, 70, 24, band=band)
        inputs = inputs_of(case)
        inputs.lengths = torch.tensor([40, 33, 40]), torch.tensor([70, 66, 10])
        inputs.x, inputs.y = (random(3, size, 24, seed=size).to(BFLOAT) for size in (40, 70))
        want = run_whole(kernels, case, inputs)
        inputs.x[1, 20, 3] = math.nan
        got = run_whole(kernels, case, inputs)
        assert got[0].isnan().tolist() == [False, True, False]
        for result, clean, size in zip(got[1:3], want[1:3], (33, 66)):
            assert result[1, :size].isnan().all()
            assert (result[1, size:] == 0).all()
            assert torch.equal(result[0], clean[0])
            assert torch.equal(result[2], clean[2])


def check_lengths_out_of_range(kernels: ModuleType) -> None:
    for cost in ("contrastive", "sqeuclidean"):
        case = Case(cost, BFLOAT, 20, 40, 16)
        inputs = inputs_of(case)
        inputs.x, inputs.y = (random(3, size, 16, seed=size).to(BFLOAT) for size in (20, 40))
        inputs.lengths = torch.tensor([20, 0, 2**40]), torch.tensor([40, 40, 30])
        for result in run_whole(kernels, case, inputs)[:3]:
            assert result[0].isfinite().all()
            assert result[1:].isnan().all()


def check_no_path(kernels: ModuleType) -> None:
    case = Case("cosine", FLOAT, 40, 70, 16, band="windows")
    inputs = inputs_of(case)
    inputs.lengths = torch.tensor([40, 40, 40]), torch.tensor([70, 70, 70])
    inputs.x, inputs.y = (random(3, size, 16, seed=size).float() for size in (40, 70))
    inputs.band = torch.zeros(3, 40, dtype=torch.int64), torch.full((3, 40), 69)
    inputs.band[0][1, 20:], inputs.band[1][1, :20] = 36, 34
    got = run_whole(kernels, case, inputs)
    assert (got[0] == math.inf).tolist() == [False, True, False]
    for result in got[1:3]:
        assert (result[1] == 0).all()
        assert result[0].isfinite().all()
        assert result[0].abs().sum() > 0


def check_zero_vectors_have_a_cosine(kernels: ModuleType) -> None:
    case = Case("cosine", FLOAT, 20, 30, 16)
    inputs = inputs_of(case)
    inputs.x[0, 3], inputs.y[0, 5] = 0, 0
    got, exact = run_whole(kernels, case, inputs), plainly(case, inputs, torch.float64)
    assert_within_reference_error(got[0], plainly(case, inputs, torch.float32)[1], exact[1])
    for result, truth in zip(got[1:3], exact[2:]):
        for rows in (slice(0, 3), slice(6, None)):
            assert relative_error(result[0, rows], truth[0, rows]) <= 1e-4
        assert result.isfinite().all()


def check_equal_tokens_are_at_no_distance(kernels: ModuleType) -> None:
    for dtype in (BFLOAT, FLOAT):
        case = Case("sqeuclidean", dtype, 40, 40, 72)
        inputs = inputs_of(case)
        inputs.lengths = torch.full((3,), 40), torch.full((3,), 40)
        inputs.x = inputs.y = (100 + random(3, 40, 72)).to(dtype)
        cost = run_cost(kernels, case, inputs)
        assert (cost >= 0).all()
        diagonal = cost.diagonal(dim1=1, dim2=2)
        assert (diagonal <= (0 if dtype == FLOAT else 2**-21 * 72 * 100**2)).all()


def check_one_side_alone(kernels: ModuleType) -> None:
    for cost in ("contrastive", "sqeuclidean"):
        case = Case(cost, BFLOAT, 40, 20, 24)
        inputs = inputs_of(case)
        both = run_whole(kernels, case, inputs)
        assert torch.equal(run_whole(kernels, case, inputs, of_y=False)[1], both[1])
        assert torch.equal(run_whole(kernels, case, inputs, of_x=False)[2], both[2])


Check = Callable[[ModuleType], None]
CHECKS: dict[str, Check] = {
    **{case.name: functools.partial(check_case, case) for case in CASES},
    **{k.removeprefix("check_"): f for k, f in list(globals().items()) if k.startswith("check_") and k != "check_case"},
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("check", CHECKS)
def test_kernels(kernels: ModuleType, check: str, order: str) -> None:
    kernels.configure(*ORDERS[order])
    CHECKS[check](kernels)


# --- the face, on CPU tensors: the ops of soft_dtw.cu with their checks and allocations, and these kernels


@pytest.fixture(scope="module")
def raw_ops(load_ops) -> None:
    load_ops("soft_dtw_features_ops.cpp")


# A library older than these ops fails: it was not built from this tree.
needs_schema = pytest.mark.skipif(_loader.failure() is not None, reason=str(_loader.failure()))


def by_face(x: Tensor, y: Tensor, gamma: float | Tensor, drop: Tensor | None, cost: str, lengths, band=None) -> Tensor:
    temperature = TAU if cost == "contrastive" else 1.0
    arguments = _check((len(x), x.shape[1], y.shape[1]), x.device, *lengths, gamma, band, drop, 16)
    return features_cuda.soft_dtw(x, y, arguments, cost, temperature)


@needs_schema
@pytest.mark.parametrize("band", [None, 3])
@pytest.mark.parametrize("cost", ["sqeuclidean", "cosine", "contrastive"])
def test_the_face_gives_all_gradients_once_and_twice(raw_ops, cost: str, band: int | None) -> None:
    case = Case(cost, FLOAT, 20, 15, 6)
    inputs = inputs_of(case)
    leaves = [inputs.x.nan_to_num(), inputs.y.nan_to_num(), torch.tensor([0.5, 1.0, 2.0]), random(3, 20, seed=8).abs()]
    along = [random(*leaf.shape, seed=9 + k) for k, leaf in enumerate(leaves)]

    def results(function, dtype: torch.dtype) -> list[Tensor]:
        own = [leaf.to(dtype).requires_grad_() for leaf in leaves]
        value = function(*own)
        first = torch.autograd.grad(value, own, inputs.grad.to(dtype), create_graph=True)
        second = torch.autograd.grad(sum((a.to(dtype) * g).sum() for a, g in zip(along, first)), own)
        return [value.detach(), *(g.detach() for g in first), *second]

    def plain(x: Tensor, y: Tensor, gamma: Tensor, drop: Tensor) -> Tensor:
        return reference.soft_dtw(plain_cost(case, x, y, inputs.lengths), *inputs.lengths, gamma, band, drop)

    got = results(lambda *own: by_face(*own, cost, inputs.lengths, band), FLOAT)
    for k, (ours, truth) in enumerate(zip(got, results(plain, torch.float64))):
        assert relative_error(ours, truth) <= (1e-6 if k == 0 else 2e-3 if k > 4 else 1e-2 if k == 3 else 1e-4), k


@needs_schema
def test_the_face_refuses_a_third_derivative(raw_ops) -> None:
    inputs = inputs_of(Case("cosine", FLOAT, 20, 15, 6))
    x, y = inputs.x.nan_to_num().requires_grad_(), inputs.y.nan_to_num()
    value = by_face(x, y, 0.5, None, "cosine", inputs.lengths)
    (first,) = torch.autograd.grad(value.sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="third derivatives"):
        torch.autograd.grad(second.sum(), x)


@needs_schema
def test_the_face_computes_what_is_wanted_alone(raw_ops) -> None:
    inputs = inputs_of(Case("contrastive", BFLOAT, 20, 15, 8))
    x, y = inputs.x, inputs.y
    both = [t.clone().requires_grad_() for t in (x, y)]
    value = by_face(*both, 0.5, None, "contrastive", inputs.lengths)
    value.sum().backward()
    for alone, other, given in ((x.clone().requires_grad_(), y, 0), (y.clone().requires_grad_(), x, 1)):
        pair = (alone, other) if given == 0 else (other, alone)
        again = by_face(*pair, 0.5, None, "contrastive", inputs.lengths)
        again.sum().backward()
        assert torch.equal(again, value)
        assert torch.equal(alone.grad, both[given].grad)
    assert not by_face(x, y, 0.5, None, "contrastive", inputs.lengths).requires_grad


@needs_schema
@pytest.mark.parametrize("cost", ["sqeuclidean", "cosine", "contrastive"])
def test_the_fake_ops_know_all_shapes(raw_ops, cost: str) -> None:
    for band, drop in [(-1, None), (2, torch.ones(3, 20))]:
        inputs = inputs_of(Case(cost, FLOAT, 20, 45, 8))
        kept = (inputs.x, inputs.y, *inputs.lengths, cost, 1.0, 0.5, None, band, None, None, drop)
        real = torch.ops.lyra.soft_dtw_features_forward(*kept, 16)
        options = inputs.x, inputs.y, *inputs.lengths, cost, 1.0, band, None, None, drop is not None, True, True, True
        grads = torch.ops.lyra.soft_dtw_features_backward(inputs.grad, *real, *options)
        with FakeTensorMode(allow_non_fake_inputs=True):
            fake = torch.ops.lyra.soft_dtw_features_forward(*kept, 16)
            fake_grads = torch.ops.lyra.soft_dtw_features_backward(inputs.grad, *fake, *options)
        for ours, told in zip((*real, *grads), (*fake, *fake_grads)):
            assert ours.shape == told.shape
            assert ours.dtype == told.dtype


@needs_schema
def test_the_raw_op_says_what_it_cannot_serve(raw_ops) -> None:
    x, y, lengths = torch.rand(2, 5, 4), torch.rand(2, 6, 4), [torch.tensor([5, 4]), torch.tensor([6, 3])]
    for tokens, cost, band, message in [
        ((x.double(), y.double()), "cosine", -1, "x: got dtype Double, expected float32, bfloat16 or float16"),
        ((x, y.bfloat16()), "cosine", -1, "y: got dtype BFloat16, expected Float"),
        ((x, y[:, :, :3]), "cosine", -1, r"y: got shape \(2, 6, 3\), expected \(2, any, 4\)"),
        ((x, y), "l1", -1, "cost: got l1, expected sqeuclidean, cosine or contrastive"),
        ((x, y), "cosine", -2, "band: got -2, expected -1"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            torch.ops.lyra.soft_dtw_features_forward(
                *tokens, *lengths, cost, 1.0, 1.0, None, band, None, None, None, 16
            )


@needs_schema
@pytest.mark.parametrize("dynamic", [False, True])
def test_the_face_compiles_to_one_graph(raw_ops, dynamic: bool) -> None:
    inputs = inputs_of(Case("contrastive", BFLOAT, 20, 15, 8))
    x, y = inputs.x.nan_to_num(), inputs.y.nan_to_num()

    def loss(x: Tensor, y: Tensor) -> Tensor:
        return by_face(x, y, 0.5, None, "contrastive", (None, None), 4).mean()

    want, got = ([t.clone().requires_grad_() for t in (x, y)] for _ in range(2))
    loss(*want).backward()
    torch.compile(loss, fullgraph=True, dynamic=dynamic, backend="aot_eager")(*got).backward()
    for ours, theirs in zip(got, want):
        assert torch.equal(ours.grad, theirs.grad)


def test_there_are_guards_to_take_out() -> None:
    assert len(GUARDS) == 11


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(GUARDS)), ids=GUARDS)
def test_every_guard_is_needed(kernels: ModuleType, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def run(check: Callable[[ModuleType], None], order: tuple) -> None:
        kernels.configure(*order)
        check(kernels)

    runs = (functools.partial(run, check, order) for check in CHECKS.values() for order in ORDERS.values())
    assert_needed(number, monkeypatch, runs)
