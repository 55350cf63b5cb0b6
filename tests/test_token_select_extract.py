"""extract_tokens: with a capacity one raw op, bit for bit what scoring, selecting and gathering give one by one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import lyra_ops

LENGTH = 50


def inputs() -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(11)
    return {
        "query": torch.randn(3, 4, 6, 8, generator=g),
        "key": torch.randn(3, 2, LENGTH, 8, generator=g),
        "candidates": torch.rand(3, LENGTH, generator=g) < 0.8,
        "key_mask": torch.rand(3, LENGTH, generator=g) < 0.9,
        "query_mask": torch.rand(3, 6, generator=g) < 0.8,
        "bias": torch.randn(3, LENGTH, generator=g) / 50,
        "segments": torch.randint(0, 4, (3, LENGTH), generator=g),
        "hidden": torch.randn(3, LENGTH, 5, generator=g),
        "labels": torch.randint(0, 9, (3, LENGTH), generator=g),
        "positions": torch.randint(0, 9, (3, 3, LENGTH), generator=g),
    }


SELECTIONS = {
    "share": {"keep": 0.3, "min_keep": 3},
    "counts": {"keep": torch.tensor([4, 0, 9]), "bias": "bias"},
    "segments": {"keep": torch.rand(3, 4, generator=torch.Generator().manual_seed(1)).double(), "segments": "segments"},
    "one bias for all": {"keep": 7, "bias": torch.arange(LENGTH) / 999},
}


@pytest.mark.parametrize("layout", ["right", "left", "packed"])
@pytest.mark.parametrize("name", SELECTIONS)
def test_the_same_as_step_by_step(name: str, layout: str):
    t = inputs()
    capacity = 3 * LENGTH if layout == "packed" else LENGTH
    options = {key: t[value] if isinstance(value, str) else value for key, value in SELECTIONS[name].items()}
    options |= {"layout": layout, "capacity": capacity}
    scoring = {"query_mask": t["query_mask"], "causal": True, "scale": 0.5}
    hidden = [t["hidden"].clone().requires_grad_() for _ in range(2)]
    rest = t["labels"], t["positions"]
    got, moved = lyra_ops.extract_tokens(
        t["query"], t["key"], t["candidates"], hidden[0], *rest,
        key_mask=t["key_mask"], fill=[0, -100, 1], **scoring, **options,
    )  # fmt: skip
    scores = lyra_ops.token_scores(t["query"], t["key"], key_mask=t["key_mask"], **scoring)
    want = lyra_ops.select_tokens(scores, t["candidates"], key_mask=t["key_mask"], **options)
    want_moved = lyra_ops.gather_tokens(want, hidden[1], *rest, fill=[0, -100, 1])
    for ours, theirs in zip((*got, *moved), (*want, *want_moved)):
        assert torch.equal(ours, theirs)
        assert ours.requires_grad == theirs.requires_grad
    upstream = torch.randn(moved[0].shape)
    assert torch.equal(*(torch.autograd.grad(m[0], h, upstream)[0] for m, h in zip((moved, want_moved), hidden)))


CU = torch.tensor([3, 50, 50, 120, 148], dtype=torch.int32)  # with tokens in front and behind that are in no sample


@pytest.mark.parametrize("capacity", [None, 150])
@pytest.mark.parametrize("name", SELECTIONS)
def test_packed_the_same_as_step_by_step(name: str, capacity: int | None):
    t = {key: value.flatten(0, 1) for key, value in inputs().items() if key not in ("query", "key", "positions")}
    g = torch.Generator().manual_seed(5)
    query, key = torch.randn(18, 4, 8, generator=g), torch.randn(150, 2, 8, generator=g)
    cu_q = torch.tensor([0, 4, 4, 11, 17], dtype=torch.int32)
    options = {key: t[value] if isinstance(value, str) else value for key, value in SELECTIONS[name].items()}
    if name == "counts":
        options["keep"] = torch.tensor([4, 0, 9, 2])
    elif name == "segments":
        options["keep"] = torch.rand(4, 4, generator=g).double()
    elif name == "one bias for all":
        options["bias"] = torch.arange(150) / 999
    options |= {"capacity": capacity}
    scoring = {"query_mask": t["query_mask"], "causal": True, "scale": 0.5}
    hidden = [t["hidden"].clone().requires_grad_() for _ in range(2)]
    rest = t["labels"], torch.randint(0, 9, (3, 150), generator=g)
    got, moved = lyra_ops.extract_tokens_packed(
        query, key, cu_q, CU, t["candidates"], hidden[0], *rest,
        key_mask=t["key_mask"], fill=[0, -100, 1], **scoring, **options,
    )  # fmt: skip
    scores = lyra_ops.token_scores_packed(query, key, cu_q, CU, key_mask=t["key_mask"], **scoring)
    want = lyra_ops.select_tokens_packed(scores, t["candidates"], CU, key_mask=t["key_mask"], **options)
    want_moved = lyra_ops.gather_tokens(want, hidden[1], *rest, fill=[0, -100, 1])
    for ours, theirs in zip((*got, *moved), (*want, *want_moved)):
        assert torch.equal(ours, theirs)
        assert ours.requires_grad == theirs.requires_grad
    upstream = torch.randn(moved[0].shape)
    assert torch.equal(*(torch.autograd.grad(m[0], h, upstream)[0] for m, h in zip((moved, want_moved), hidden)))


@pytest.mark.parametrize("layout", ["right", "packed"])
def test_more_than_the_capacity_is_an_error(layout: str):
    t = inputs()
    with pytest.raises(ValueError, match="capacity: got 9, but"):
        lyra_ops.extract_tokens(t["query"], t["key"], t["candidates"], keep=10, capacity=9, layout=layout)
    if layout == "packed":
        query, key = (t[name][0].transpose(0, 1) for name in ("query", "key"))
        cu = [torch.tensor([0, n], dtype=torch.int32) for n in (6, LENGTH)]
        with pytest.raises(ValueError, match="capacity: got 9, but"):
            lyra_ops.extract_tokens_packed(query, key, *cu, t["candidates"][0], keep=10, capacity=9)


def test_twice_differentiable():
    query, key, candidates = torch.randn(1, 2, 3, 8), torch.randn(1, 1, 6, 8), torch.ones(1, 6, dtype=torch.bool)
    hidden = torch.randn(1, 6, 2, dtype=torch.float64, requires_grad=True)

    def kept(hidden: Tensor) -> Tensor:
        return lyra_ops.extract_tokens(query, key, candidates, hidden, keep=3, capacity=4)[1][0]

    assert torch.autograd.gradcheck(kept, hidden)
    assert torch.autograd.gradgradcheck(kept, hidden)


def test_opcheck():
    t = inputs()
    raw = torch.ops.lyra.token_select_extract.default
    tensors = [t["hidden"], t["positions"]]
    masks = t["query_mask"], t["key_mask"], None, None, None
    for layout, capacity in ((0, LENGTH), (1, LENGTH), (2, 3 * LENGTH)):
        selecting = t["bias"], None, None, 0.4, None, 2, capacity, layout, [False, True], [0.0, 3.0]
        torch.library.opcheck(
            raw, (t["query"], t["key"], t["candidates"], tensors, *masks, 0.3, False, None, *selecting, None, None)
        )
    one = [x[:1] for x in (t["query"], t["key"], t["candidates"])]
    cu = [torch.tensor([0, half, 2 * half], dtype=torch.int32) for half in (3, LENGTH // 2)]
    selecting = None, None, None, 0.4, None, 2, LENGTH, 2, [False], [0.0], *cu
    torch.library.opcheck(raw, (*one, [t["hidden"][:1]], *[None] * 5, 0.3, False, None, *selecting))


def test_nothing_to_do():
    query, key = torch.randn(0, 2, 3, 8), torch.randn(0, 1, 7, 8)
    candidates, hidden = torch.ones(0, 7, dtype=torch.bool), torch.randn(0, 7, 4)
    selection, (kept,) = lyra_ops.extract_tokens(query, key, candidates, hidden, keep=2, capacity=7)
    assert kept.shape == (0, 7, 4) and selection.inverse.shape == (0, 7)
    selection, () = lyra_ops.extract_tokens(query, key, candidates, keep=2, capacity=7)
    assert selection.lengths.shape == (0,)
    nobody, packed = torch.zeros(1, dtype=torch.int32), (torch.randn(3, 2, 8), torch.randn(7, 1, 8))
    selection, (kept,) = lyra_ops.extract_tokens_packed(
        *packed, nobody, nobody, torch.ones(7, dtype=torch.bool), torch.randn(7, 4), keep=2, capacity=5, fill=9
    )
    assert selection.index.tolist() == [-1] * 5 and selection.inverse.tolist() == [-1] * 7 and (kept == 9).all()
