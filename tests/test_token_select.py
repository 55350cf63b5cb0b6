"""select_tokens against a sort in Python, and gather_tokens against indexing."""

from __future__ import annotations

import math
import re
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import lyra_ops
from lyra_ops import TokenSelection, _loader, gather_tokens, select_tokens, select_tokens_packed

compiled = pytest.mark.skipif(_loader.failure() is not None, reason=str(_loader.failure()))
on_each_backend = pytest.mark.parametrize("backend", [pytest.param("cpu", marks=compiled), "reference"])
NUMBERS = [0.0, -0.0, 0.5, -0.5, 0.25, 1e-45, -1e-45, 3e38, math.inf, -math.inf, math.nan]


def rank(score: float, index: int) -> tuple:
    """Sorts the best first: NaN last, of equals the lower index first."""
    return (math.isnan(score), 0.0 if math.isnan(score) else -score, index)


def kept(scores: list, candidates: list, real: list, segments: list, budgets: dict) -> list[int]:
    """One sample by a sort of Python: budgets[segment](number of candidates) is how many stay."""
    stay = [i for i, token in enumerate(real) if token and not candidates[i]]
    for segment, budget in budgets.items():
        mine = [i for i in range(len(scores)) if real[i] and candidates[i] and segments[i] == segment]
        stay += sorted(mine, key=lambda i: rank(scores[i], i))[: min(len(mine), budget(len(mine)))]
    return sorted(stay)


def assert_selects(selection: TokenSelection, expected: list[list[int]], length: int, width: int | None = None):
    assert selection.lengths.tolist() == [len(row) for row in expected]
    width = max(map(len, expected), default=0) if width is None else width
    assert selection.index.tolist() == [row + [-1] * (width - len(row)) for row in expected]
    places = [{token: place for place, token in enumerate(row)} for row in expected]
    assert selection.inverse.tolist() == [[row.get(i, -1) for i in range(length)] for row in places]
    assert {t.dtype for t in selection} == {torch.int64}


@st.composite
def selections(draw) -> dict:
    batch, length = draw(st.integers(1, 3)), draw(st.integers(0, 12))

    def grid(element: st.SearchStrategy) -> list:
        return draw(st.lists(st.lists(element, min_size=length, max_size=length), min_size=batch, max_size=batch))

    n_segments = draw(st.integers(1, min(3, max(1, length))))
    case = {
        "scores": grid(st.sampled_from(NUMBERS)),
        "candidates": grid(st.booleans()),
        "key_mask": grid(st.booleans()) if draw(st.booleans()) else None,
        "segments": grid(st.integers(0, n_segments - 1)) if draw(st.booleans()) else None,
        "n_segments": n_segments,
        "min_keep": draw(st.integers(0, 4)),
    }
    counts, shares = st.integers(0, 13), st.floats(0, 1)
    kind = draw(st.sampled_from(["share", "count", "counts", "shares", "per segment"]))
    if kind == "per segment" and case["segments"] is not None:
        case["keep"] = draw(
            st.lists(st.lists(counts, min_size=n_segments, max_size=n_segments), min_size=batch, max_size=batch)
        )
    elif kind in ("counts", "shares"):
        case["keep"] = draw(st.lists(counts if kind == "counts" else shares, min_size=batch, max_size=batch))
    else:
        case["keep"] = draw(counts if kind == "count" else shares)
    return case


@on_each_backend
@settings(max_examples=200, deadline=None)
@given(case=selections(), dtype=st.sampled_from([torch.float32, torch.float64]))
def test_same_as_sorting(case: dict, dtype: torch.dtype, backend: str):
    batch, length = len(case["scores"]), len(case["scores"][0])
    scores = torch.tensor(case["scores"], dtype=dtype).view(batch, length)
    options = {
        name: None if case[name] is None else torch.tensor(case[name], dtype=kind).view(batch, length)
        for name, kind in (("key_mask", torch.bool), ("segments", torch.int32))
    }
    keep = case["keep"]
    if isinstance(keep, list):
        keep = torch.tensor(keep, dtype=torch.float64 if isinstance(keep[0], float) else torch.int64)
    candidates = torch.tensor(case["candidates"], dtype=torch.bool).view(batch, length)

    def budget(b: int, segment: int, n: int) -> int:
        keep = case["keep"]
        for at in (b, segment):
            keep = keep[at] if isinstance(keep, list) else keep
        return max(case["min_keep"], math.floor(keep * n) if isinstance(keep, float) else keep)

    expected = [
        kept(
            scores[b].tolist(),
            case["candidates"][b],
            case["key_mask"][b] if case["key_mask"] else [True] * length,
            case["segments"][b] if case["segments"] else [0] * length,
            {segment: partial(budget, b, segment) for segment in range(case["n_segments"])},
        )
        for b in range(batch)
    ]
    arguments = {"keep": keep, "min_keep": case["min_keep"], "backend": backend, **options}
    selection = select_tokens(scores, candidates, **arguments)
    assert_selects(selection, expected, length)
    assert_selects(select_tokens(scores, candidates, capacity=length, **arguments), expected, length, width=length)
    assert_laid_out(selection, partial(select_tokens, scores, candidates, **arguments))

    # The same samples one after the other, with tokens in front and behind that belong to none.
    packed = {name: None if t is None else F.pad(t.flatten(), (1, 2), value=1) for name, t in options.items()} | {
        "keep": keep,
        "min_keep": case["min_keep"],
        "backend": backend,
    }
    if options["segments"] is None or not isinstance(keep, Tensor) or keep.ndim == 1:
        starts = torch.arange(batch + 1, dtype=torch.int32) * length + 1
        flat = [F.pad(t.flatten(), (1, 2), value=1) for t in (scores, candidates)]
        got = select_tokens_packed(*flat, starts, **packed)
        alike = select_tokens(scores, candidates, layout="packed", **arguments)
        assert torch.equal(got.index, alike.index + 1)
        assert torch.equal(got.lengths, alike.lengths)
        assert torch.equal(got.inverse[1:-2], alike.inverse.flatten())
        assert got.inverse[[0, -2, -1]].tolist() == [-1, -1, -1]


def assert_laid_out(selection: TokenSelection, select):
    """The same tokens, padded on the left and packed."""
    for capacity in (None, selection.inverse.shape[1]):
        left = select(layout="left", capacity=capacity)
        assert torch.equal(left.lengths, selection.lengths)
        for b, n in enumerate(selection.lengths.tolist()):
            pad = left.index.shape[1] - n
            assert left.index[b].tolist() == [-1] * pad + selection.index[b, :n].tolist()
            assert torch.equal(left.inverse[b], (selection.inverse[b] + pad).where(selection.mask[b], -1))
    packed = select(layout="packed")
    length = selection.inverse.shape[1]
    flat = [b * length + i for b, row in enumerate(selection.index.tolist()) for i in row if i >= 0]
    assert packed.index.tolist() == flat
    assert packed.inverse.flatten()[packed.index].tolist() == list(range(len(flat)))
    assert torch.equal(packed.mask, selection.mask)
    roomy = select(layout="packed", capacity=selection.inverse.numel())
    assert torch.equal(roomy.index[: len(flat)], packed.index) and (roomy.index[len(flat) :] == -1).all()
    assert torch.equal(roomy.inverse, packed.inverse)


@on_each_backend
@pytest.mark.parametrize("n", [0, 1, 2, 31, 32, 33, 100, 4097, 131072])
def test_same_as_a_stable_sort_of_torch(n: int, backend: str):
    scores = torch.randn(2, n, generator=torch.Generator().manual_seed(n))
    everything = torch.ones(2, n, dtype=torch.bool)
    for values in (scores, scores.mul(8).round().div(8), scores * 1e-40):  # all different, many ties, subnormal
        for k in {0, min(1, n), n // 2, max(n - 1, 0), n}:
            best = values.argsort(dim=1, descending=True, stable=True)[:, :k].sort(dim=1).values
            assert torch.equal(select_tokens(values, everything, keep=k, backend=backend).index, best)


@compiled
def test_many_small_segments():
    g = torch.Generator().manual_seed(2)
    scores, everything = torch.rand(2, 4000, generator=g), torch.ones(2, 4000, dtype=torch.bool)
    segments = torch.randint(0, 900, (2, 4000), generator=g)
    options = {"keep": 0.4, "min_keep": 1, "segments": segments, "bias": torch.rand(4000, generator=g)}
    got, plain = (select_tokens(scores, everything, backend=b, **options) for b in ("cpu", "reference"))
    assert all(map(torch.equal, got, plain))


def test_all_equal_keeps_the_first():
    assert select_tokens(torch.zeros(1, 9), torch.ones(1, 9, dtype=torch.bool), keep=4).index.tolist() == [[0, 1, 2, 3]]


@pytest.mark.parametrize(
    ("keep", "min_keep", "n", "expected"),
    [
        (0.7, 0, 10, 7),  # 0.7 * 10 is 7 in float64, and 6.9999998 with a share in float32
        (0.29, 0, 100, 28),  # 28.999999999999996
        (0.7, 32, 50, 35),
        (0.7, 32, 40, 32),
        (0.7, 32, 20, 20),
        (0.0, 0, 5, 0),
        (1.0, 0, 5, 5),
        (1, 0, 5, 1),
        (9, 0, 5, 5),
        (2, 3, 5, 3),
        (torch.tensor([0.7], dtype=torch.float64), 0, 10, 7),
        (torch.tensor([3], dtype=torch.int32), 0, 10, 3),
    ],
)
def test_how_many_stay(keep: float | int | Tensor, min_keep: int, n: int, expected: int):
    candidates = torch.zeros(1, n + 3, dtype=torch.bool)
    candidates[:, 2 : 2 + n] = True
    selection = select_tokens(torch.rand(1, n + 3), candidates, keep=keep, min_keep=min_keep)
    assert selection.lengths.tolist() == [expected + 3]
    assert set(selection.index[0].tolist()) >= {0, 1, n + 2}


def test_budgets_per_segment():
    scores = torch.tensor([[9.0, 8, 7, 6, 5, 4, 3, 2, 1, 0]])
    candidates = torch.ones(1, 10, dtype=torch.bool)
    candidates[0, 5] = False
    segments = torch.tensor([[0, 0, 0, 0, 0, -7, 2, 2, 1, 1]])  # what a token outside has is not looked at

    def select(keep: float | int | Tensor, **more: int) -> list[int]:
        return select_tokens(scores, candidates, keep=keep, segments=segments, **more).index[0].tolist()

    assert select(0.5) == [0, 1, 5, 6, 8]
    assert select(1) == [0, 5, 6, 8]
    assert select(0.5, min_keep=2) == [0, 1, 5, 6, 7, 8, 9]
    assert select(torch.tensor([[3, 0, 1]])) == [0, 1, 2, 5, 6]
    assert select(torch.tensor([[0.2, 1.0, 0.0]], dtype=torch.float64)) == [0, 5, 8, 9]
    assert select(torch.tensor([2])) == [0, 1, 5, 6, 7, 8, 9]


def test_bias_is_added():
    scores, everything = torch.tensor([[0.1, 0.2, 0.3, 0.4]]).bfloat16(), torch.ones(1, 4, dtype=torch.bool)
    recency = torch.tensor([1.0, 0.0, 0.0, -1.0])
    for bias in (recency, recency[None], recency.double()):
        assert select_tokens(scores, everything, keep=2, bias=bias).index.tolist() == [[0, 2]]
    # The sum is not rounded to the scores' 16 bits.
    slight = torch.tensor([0.0, 1e-6, 0.0, 2e-6])
    assert select_tokens(torch.ones(1, 4).bfloat16(), everything, keep=2, bias=slight).index.tolist() == [[1, 3]]


def random_case(batch: int = 3, length: int = 50) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(5)
    scores = torch.randn(batch, length, generator=g)
    return scores, torch.rand(batch, length, generator=g) < 0.8, torch.rand(batch, length, generator=g) < 0.9


def test_what_a_selection_tells():
    scores, candidates, real = random_case()
    selection = select_tokens(scores, candidates, keep=0.4, key_mask=real)
    _, lengths, inverse = selection
    assert torch.equal(selection.mask, inverse >= 0)
    assert torch.equal(selection.mask.sum(1), lengths)
    assert torch.equal(selection.key_mask.sum(1), lengths)
    assert not (selection.mask & ~real).any()
    assert selection.mask[real & ~candidates].all()
    assert selection.cu_seqlens.tolist() == [0, *lengths.cumsum(0).tolist()]
    assert selection.cu_seqlens.dtype == torch.int32
    dropped = real & candidates & ~selection.mask
    for b in range(3):
        assert scores[b][selection.mask[b] & candidates[b]].min() >= scores[b][dropped[b]].max()


def test_alone_and_in_any_batch():
    scores, candidates, real = random_case()
    scores = scores.mul(4).round()
    together = select_tokens(scores, candidates, keep=0.4, key_mask=real)
    for b in range(3):
        alone = select_tokens(scores[[b]], candidates[[b]], keep=0.4, key_mask=real[[b]])
        assert torch.equal(alone.inverse[0], together.inverse[b])


def test_everything_kept_changes_no_bit():
    scores, candidates, _ = random_case()
    hidden = torch.randn(3, 50, 8).bfloat16()
    selection = select_tokens(scores, candidates, keep=1.0)
    assert torch.equal(gather_tokens(selection, hidden)[0], hidden)


def test_nothing_to_select_from():
    for batch, length in ((0, 5), (2, 0), (0, 0)):
        selection = select_tokens(torch.zeros(batch, length), torch.ones(batch, length, dtype=torch.bool), keep=0.5)
        assert_selects(selection, [[]] * batch if length == 0 else [], length)
        (hidden,) = gather_tokens(selection, torch.zeros(batch, length, 4, requires_grad=True))
        assert hidden.shape == (batch, 0, 4)
        hidden.sum().backward()
    selection = select_tokens(torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool), keep=0)
    (hidden,) = gather_tokens(selection, torch.ones(2, 3, 4, requires_grad=True))
    assert hidden.shape == (2, 0, 4)


S, C = torch.zeros(2, 4), torch.ones(2, 4, dtype=torch.bool)
SELECT_ERRORS = {
    "scores: got shape (4,), expected (B, L)": (S[0], C, {"keep": 1}),
    "scores: got dtype int64": (S.long(), C, {"keep": 1}),
    "candidates: got shape (1, 4), expected (2, 4)": (S, C[:1], {"keep": 1}),
    "candidates: got dtype int64, expected bool": (S, C.long(), {"keep": 1}),
    "key_mask: got shape (2, 3), expected (2, 4)": (S, C, {"keep": 1, "key_mask": C[:, :3]}),
    "bias: got shape (3,), expected (4,)": (S, C, {"keep": 1, "bias": torch.zeros(3)}),
    "bias: got float, expected a torch.Tensor": (S, C, {"keep": 1, "bias": 0.5}),
    "keep: got 1.5, expected a share from 0 to 1": (S, C, {"keep": 1.5}),
    "keep: got nan, expected a share from 0 to 1": (S, C, {"keep": math.nan}),
    "keep: got -1, expected at least 0": (S, C, {"keep": -1}),
    "keep: got bool, expected a float share": (S, C, {"keep": True}),
    "keep: got dtype float32, expected int64 or int32 or float64": (S, C, {"keep": torch.ones(2)}),
    "keep: got shape (3,), expected (2,)": (S, C, {"keep": torch.ones(3).long()}),
    "keep: got shape (2, 1), expected (2,)": (S, C, {"keep": torch.ones(2, 1).long()}),
    "keep: got -2, expected counts of at least 0": (S, C, {"keep": torch.tensor([1, -2])}),
    "keep: got 1.25, expected shares from 0 to 1": (S, C, {"keep": torch.tensor([1, 1.25]).double()}),
    "min_keep: got float, expected an int": (S, C, {"keep": 1, "min_keep": 0.5}),
    "min_keep: got -1, expected at least 0": (S, C, {"keep": 1, "min_keep": -1}),
    "segments: got dtype float32, expected int64 or int32": (S, C, {"keep": 1, "segments": S}),
    "segments: candidate 0 of sample 0 has 4, expected 0 to 3": (S, C, {"keep": 1, "segments": S.long() + 4}),
    "segments: candidate 0 of sample 0 has -1, expected 0 to 0": (
        S,
        C,
        {"keep": torch.ones(2, 1).long(), "segments": S.long() - 1},
    ),
    "capacity: got 5, expected at most the 4 tokens": (S, C, {"keep": 1, "capacity": 5}),
    "capacity: got 2, but sample 0 keeps 3 tokens": (S, C, {"keep": 3, "capacity": 2}),
    "capacity: got 5, but the samples keep 6 tokens": (S, C, {"keep": 3, "capacity": 5, "layout": "packed"}),
    "layout: got 'up', expected one of 'right', 'left', 'packed'": (S, C, {"keep": 3, "layout": "up"}),
    "backend: 'triton' cannot serve this call of select_tokens": (S, C, {"keep": 1, "backend": "triton"}),
}


@pytest.mark.parametrize("message", SELECT_ERRORS)
def test_select_errors_name_the_argument(message: str):
    scores, candidates, options = SELECT_ERRORS[message]
    with pytest.raises((ValueError, TypeError), match="^" + re.escape(message)):
        select_tokens(scores, candidates, **options)


@on_each_backend
@pytest.mark.parametrize("layout", ["right", "left", "packed", "packed in"])
def test_gather_is_indexing(layout: str, backend: str):
    scores, candidates, real = random_case()
    options = {"keep": 0.4, "backend": backend}
    if packed_in := layout == "packed in":
        flat = (t.flatten() for t in (scores, candidates))
        cu_seqlens = torch.tensor([0, 50, 100, 150], dtype=torch.int32)
        selection = select_tokens_packed(*flat, cu_seqlens, key_mask=real.flatten(), **options)
    else:
        selection = select_tokens(scores, candidates, key_mask=real, layout=layout, **options)
    tensors = {
        "hidden": torch.randn(3, 50, 8).bfloat16(),
        "labels": torch.randint(0, 99, (3, 50)),
        "mask": torch.rand(3, 50) < 0.5,
        "positions": torch.randint(0, 99, (3, 3, 50)),
        "planes": torch.randint(0, 99, (4, 3, 50), dtype=torch.int32),
        "cos": torch.randn(3, 3, 50, 4),
        "key": torch.randn(3, 2, 50, 6).transpose(1, 2),
        "strided": torch.randn(50, 6, 3).permute(2, 0, 1)[:, :, ::2],
        "transposed": torch.randn(5, 3, 50, 3, 4).transpose(-1, -2),
        "expanded": torch.randn(50, 1).expand(3, 50, 5),
        "complex": torch.randn(3, 50, dtype=torch.complex128),
        "empty": torch.randn(3, 50, 0),
    }
    planes = {name: int(t.shape[1:3] == (3, 50)) for name, t in tensors.items()}
    given = {name: t.flatten(planes[name], planes[name] + 1) if packed_in else t for name, t in tensors.items()}
    got = gather_tokens(selection, *given.values(), fill=[-1 if n == "labels" else 0 for n in given], backend=backend)
    assert isinstance(got, tuple)
    for (name, tensor), result in zip(tensors.items(), got):
        lead = tensor.shape[: planes[name]]
        assert result.dtype == tensor.dtype
        assert result.shape == (*lead, *selection.index.shape, *tensor.shape[len(lead) + 2 :])
        result, tensor = (result, tensor) if lead else (result[None], tensor[None])
        real = selection.key_mask
        assert torch.equal(result[:, real], tensor[:, selection.mask.view(3, 50)]), name
        assert (result[:, ~real] == (-1 if name == "labels" else 0)).all(), name


@on_each_backend
@pytest.mark.parametrize("layout", ["right", "left", "packed"])
def test_gather_gradients(layout: str, backend: str):
    scores, candidates, real = random_case(2, 9)
    capacity = 18 if layout == "packed" else 9
    selection = select_tokens(scores, candidates, keep=0.4, key_mask=real, layout=layout, capacity=capacity)
    assert selection.lengths[0] != selection.lengths[1]
    hidden = torch.randn(2, 9, 3, dtype=torch.float64, requires_grad=True)
    cos = torch.randn(3, 2, 9, 2, dtype=torch.float64, requires_grad=True)

    def gather(*tensors: Tensor) -> tuple[Tensor, ...]:
        return gather_tokens(selection, *tensors, torch.arange(18).view(2, 9), fill=2, backend=backend)[:2]

    assert torch.autograd.gradcheck(gather, (hidden, cos))
    assert torch.autograd.gradgradcheck(gather, (hidden, cos))
    assert torch.autograd.gradcheck(gather, (hidden, cos.detach()))
    # What nobody asks the gradient of is not computed, and what has none does not stand in the way.
    (grad,) = torch.autograd.grad(gather(hidden, cos)[1].sum(), cos)
    assert torch.equal(grad, selection.mask.double()[None, ..., None].expand_as(cos))


def test_gather_backward_is_that_of_indexing():
    scores, candidates, _ = random_case()
    selection = select_tokens(scores, candidates, keep=0.4)
    hidden = torch.randn(3, 50, 8, requires_grad=True)
    (got,) = gather_tokens(selection, hidden)
    upstream = torch.randn_like(got)
    upstream[~selection.key_mask] = torch.nan  # nothing that happens to padding matters
    (grad,) = torch.autograd.grad(got, hidden, upstream)
    rows = torch.cat([hidden[b][selection.mask[b]] for b in range(3)])
    (expected,) = torch.autograd.grad(rows, hidden, upstream[selection.key_mask])
    assert torch.equal(grad, expected)
    assert (grad[~selection.mask] == 0).all()


@on_each_backend
def test_gather_of_what_needs_no_gradient_needs_none(backend: str):
    selection = select_tokens(torch.rand(2, 7), torch.ones(2, 7, dtype=torch.bool), keep=3)
    hidden, cos, labels = torch.randn(2, 7, 4, requires_grad=True), torch.randn(2, 7, 4), torch.ones(2, 7).long()
    results = gather_tokens(selection, cos, hidden, labels, backend=backend)
    assert [result.requires_grad for result in results] == [False, True, False]
    (gradient,) = torch.autograd.grad(results[1].sum(), hidden)
    assert torch.equal(gradient, selection.mask[:, :, None].expand(2, 7, 4).float())


def test_gather_under_gradient_checkpointing():
    scores, candidates, _ = random_case()
    selection = select_tokens(scores, candidates, keep=0.4)
    hidden = torch.randn(3, 50, 8, requires_grad=True)
    (plain,) = torch.autograd.grad(gather_tokens(selection, hidden.sin())[0].square().sum(), hidden)
    again = checkpoint(lambda h: gather_tokens(selection, h.sin())[0].square().sum(), hidden, use_reentrant=False)
    assert torch.equal(torch.autograd.grad(again, hidden)[0], plain)


SELECTION = select_tokens(torch.zeros(2, 4), torch.ones(2, 4, dtype=torch.bool), keep=3)
GATHER_ERRORS = {
    "selection: got tuple, expected a TokenSelection": (tuple(SELECTION), [torch.zeros(2, 4)], {}),
    "tensors[1]: got shape (4, 2), expected (2, 4, ...) or (P, 2, 4, ...)": (
        SELECTION,
        [torch.zeros(2, 4), torch.zeros(4, 2)],
        {},
    ),
    "tensors[0]: got NoneType, expected a torch.Tensor": (SELECTION, [None], {}),
    "tensors[0]: got a tensor on meta, expected cpu": (SELECTION, [torch.zeros(2, 4, device="meta")], {}),
    "fill: got 1 numbers, expected one, or one for each of 2": (SELECTION, [torch.zeros(2, 4)] * 2, {"fill": [0]}),
    "fill: got str, expected a number": (SELECTION, [torch.zeros(2, 4)], {"fill": "0"}),
    "fill: got bool for tensors[0], expected a number": (SELECTION, [torch.zeros(2, 4)], {"fill": [True]}),
    "fill: got 0.5 for tensors[1], expected a number that torch.int64 holds": (
        SELECTION,
        [torch.zeros(2, 4), torch.zeros(2, 4).long()],
        {"fill": 0.5},
    ),
    "fill: got -100 for tensors[0], expected a number that torch.uint8 holds": (
        SELECTION,
        [torch.zeros(2, 4).byte()],
        {"fill": -100},
    ),
    "backend: 'cuda' cannot serve this call of gather_tokens": (SELECTION, [torch.zeros(2, 4)], {"backend": "cuda"}),
}


@pytest.mark.parametrize("message", GATHER_ERRORS)
def test_gather_errors_name_the_argument(message: str):
    selection, tensors, options = GATHER_ERRORS[message]
    with pytest.raises((ValueError, TypeError), match="^" + re.escape(message)):
        gather_tokens(selection, *tensors, **options)


PACKED = torch.arange(2, dtype=torch.int32) * 4
PACKED_ERRORS = {
    "scores: got shape (2, 4), expected (T,)": (S, C, PACKED, {}),
    "cu_seqlens: got dtype int64, expected int32": (S[0], C[0], PACKED.long(), {}),
    "cu_seqlens: got [0, 5], expected increasing places from 0 to 4": (S[0], C[0], PACKED * 5 // 4, {}),
    "cu_seqlens: got [4, 0], expected increasing": (S[0], C[0], PACKED.flip(0), {}),
    "cu_seqlens: got no numbers": (S[0], C[0], PACKED[:0], {}),
    "keep: got shape (2,), expected (1,)": (S[0], C[0], PACKED, {"keep": torch.ones(2).long()}),
    "segments: candidate 0 has 9, expected 0 to 3": (S[0], C[0], PACKED, {"segments": S[0].long() + 9}),
    "capacity: got 2, but the samples keep 3": (S[0], C[0], PACKED, {"capacity": 2}),
}


@pytest.mark.parametrize("message", PACKED_ERRORS)
def test_packed_errors_name_the_argument(message: str):
    scores, candidates, cu_seqlens, options = PACKED_ERRORS[message]
    with pytest.raises((ValueError, TypeError), match="^" + re.escape(message)):
        select_tokens_packed(scores, candidates, cu_seqlens, **{"keep": 3, **options})


@compiled
def test_raw_ops_pass_opcheck():
    scores, candidates, real = random_case(2, 9)
    raw = torch.ops.lyra.token_select_select
    for layout in (0, 1, 2):
        torch.library.opcheck(raw, (scores, candidates, real, None, None, 0.5, None, 2, 9, layout, None))
    segments, counts = torch.randint(0, 3, (2, 9)), torch.randint(0, 3, (2, 3))
    torch.library.opcheck(raw, (scores.double(), candidates, None, segments, counts, None, None, 0, 9, 0, None))
    starts = torch.tensor([0, 4, 9], dtype=torch.int32)
    torch.library.opcheck(raw, (scores[:1], candidates[:1], None, None, None, None, 3, 0, 9, 2, starts))
    index = torch.tensor([[0, 8, -1], [3, -1, -1]])
    tensors = [torch.randn(2, 9, 4), torch.randn(3, 2, 9).bfloat16(), torch.rand(2, 9) < 0.5]
    raw = torch.ops.lyra.token_select_gather
    torch.library.opcheck(raw, (tensors, index, [False, True, False], [0.0, -1.5, 1.0], False))
    torch.library.opcheck(raw, (tensors, index.view(1, 6), [False, True, False], [0.0, -1.5, 1.0], True))
    with pytest.raises(RuntimeError, match="index: got 9, expected -1 to 8"):
        raw(tensors[:1], index + 1, [False], [0.0], False)


@on_each_backend
def test_extract_is_the_three_in_a_row(backend: str):
    g = torch.Generator().manual_seed(7)
    query, key = torch.randn(3, 4, 6, 8, generator=g), torch.randn(3, 2, 50, 8, generator=g)
    bias, candidates, real = random_case()
    hidden, labels = torch.randn(3, 50, 5, requires_grad=True), torch.randint(0, 9, (3, 50), generator=g)
    scoring = {"query_mask": torch.rand(3, 6, generator=g) < 0.8, "causal": True, "scale": 0.5, "key_bias": bias}
    selecting = {"keep": 0.3, "min_keep": 3, "bias": bias / 50, "layout": "left", "segments": labels}
    filling = {"fill": [0, -100], "backend": backend}
    got, tensors = lyra_ops.extract_tokens(
        query, key, candidates, hidden, labels, key_mask=real, **scoring, **selecting, **filling
    )
    scores = lyra_ops.token_scores(query, key, key_mask=real, backend=backend, **scoring)
    expected = select_tokens(scores, candidates, key_mask=real, backend=backend, **selecting)
    assert all(map(torch.equal, got, expected))
    assert all(map(torch.equal, tensors, gather_tokens(expected, hidden, labels, **filling)))
    (grad,) = torch.autograd.grad(tensors[0].sum(), hidden)
    assert torch.equal(grad, expected.mask[..., None].float().expand(3, 50, 5))


def drop(query: Tensor, key: Tensor, candidates: Tensor, keep: Tensor, hidden: Tensor) -> tuple[Tensor, ...]:
    """The whole extractor, at the capacity that serves every sample."""
    options = {"keep": keep, "min_keep": 1, "causal": True, "capacity": hidden.shape[1]}
    selection, (kept,) = lyra_ops.extract_tokens(query, key, candidates, hidden, **options)
    return kept, *selection


def test_compiles_as_a_whole():
    compiled = torch.compile(drop, fullgraph=True, dynamic=True)
    for length in (12, 15):
        query, key = torch.randn(2, 4, 3, 8), torch.randn(2, 2, length, 8)
        candidates, keep = torch.rand(2, length) < 0.7, torch.tensor([2, 5])
        hidden = torch.randn(2, length, 6, requires_grad=True)
        plain = drop(query, key, candidates, keep, hidden)
        got = compiled(query, key, candidates, keep, hidden)
        assert all(torch.equal(a, b) for a, b in zip(got, plain))
        upstream = torch.randn_like(plain[0])
        grads = [torch.autograd.grad(out[0], hidden, upstream)[0] for out in (got, plain)]
        assert torch.equal(*grads)


def test_forward_mode_is_refused():
    """A tangent that got lost would be a derivative of zero."""
    selection = select_tokens(torch.rand(1, 6), torch.ones(1, 6, dtype=torch.bool), keep=2)
    with pytest.raises(NotImplementedError, match="forward mode"):
        torch.func.jvp(lambda x: gather_tokens(selection, x)[0], (torch.ones(1, 6, 2),), (torch.ones(1, 6, 2),))


@pytest.mark.parametrize(("count", "wanted"), [(1, ()), (2, ()), (3, ()), (2, (0,)), (3, (0, 2))])
def test_any_number_of_tensors_compiles(count: int, wanted: tuple[int, ...]):
    """In inference, too: torch.compile takes the arguments of an autograd.Function amiss if nothing requires grad."""
    query, key, candidates = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 12, 8), torch.rand(2, 12) < 0.7

    def extract(*tensors: Tensor) -> tuple[Tensor, ...]:
        selection, moved = lyra_ops.extract_tokens(query, key, candidates, *tensors, keep=4, capacity=12)
        return (*moved, *gather_tokens(selection, *tensors))

    tensors = [torch.randn(2, 12, 3), torch.rand(2, 12) < 0.5, torch.randn(2, 12)][:count]
    inputs = [tensors[i].requires_grad_() for i in wanted]
    torch.compiler.reset()  # few recompilations of one function are allowed
    compiled, plain = torch.compile(extract, fullgraph=True), extract(*tensors)
    with torch.no_grad():
        assert all(map(torch.equal, compiled(*tensors), plain))
    got = compiled(*tensors)
    assert all(map(torch.equal, got, plain))
    assert [t.requires_grad for t in got] == [t.requires_grad for t in plain]
    if inputs:
        squares = ([(t * t).sum() for t in out if t.requires_grad] for out in (got, plain))
        assert all(map(torch.equal, *(torch.autograd.grad(each, inputs) for each in squares)))


@pytest.mark.gpu
def test_no_sync_and_capturable_on_a_gpu():
    query, key = torch.randn(2, 4, 3, 8, device="cuda"), torch.randn(2, 2, 40, 8, device="cuda")
    candidates = torch.rand(2, 40, device="cuda") < 0.7
    keep, hidden = torch.tensor([2, 5], device="cuda"), torch.randn(2, 40, 6, device="cuda")
    torch.use_deterministic_algorithms(False)  # some of torch's own deterministic modes wait for the device
    expected = drop(query, key, candidates, keep, hidden)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        drop(query, key, candidates, keep, hidden)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = drop(query, key, candidates, keep, hidden)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(got, expected))
