"""The scoring kernels of token_select, run on the CPU: right whichever thread goes first, wrong without any barrier."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from barriers import assert_needed, barriers
from token_select_oracles import CASES, Case, made
from torch import Tensor

from lyra_ops.testing import assert_within_reference_error

SOURCES = Path(__file__).parents[2] / "csrc" / "token_select"
BARRIERS = barriers(SOURCES / "scores.cuh", SOURCES / "score_operands.h")
ORDERS = {"forward": ("forward", 0), "reverse": ("reverse", 0), "shuffled": ("shuffled", 1)}


@pytest.fixture(scope="module")
def kernels(build_switched) -> ModuleType:
    return build_switched("token_select_scores.cpp", list(BARRIERS.values()))


def run(kernels: ModuleType, case: Case, made: dict, cu: tuple = (None, None), weights: Tensor | None = None) -> tuple:
    """Planes and their sum."""
    query, key = made["query"], made["key"]
    vectors = not case.strided and case.dim % 8 == 0
    if case.strided:  # channels apart, heads inside of tokens
        query, key = (t.transpose(1, 2)[..., None].repeat(1, 1, 1, 1, 2)[..., 0].transpose(1, 2) for t in (query, key))
    arrays = [None if t is None else t.numpy() for t in (*made["masks"], made["limits"], made["bias"])]
    weights = made["weights"] if weights is None else weights
    samples = query.shape[0] if cu[0] is None else len(cu[0]) - 1
    planes, scores = kernels.run(
        str(case.dtype).removeprefix("torch."),
        (samples, query.shape[1], key.shape[1], query.shape[2], key.shape[2], case.dim),
        query.data_ptr(),
        query.stride(),
        key.data_ptr(),
        key.stride(),
        vectors,
        *arrays,
        None if weights is None else weights.numpy(),
        None if made["lse"] is None else made["lse"].numpy(),
        made["scale"],
        case.causal,
        case.per_head,
        *(None if c is None else torch.tensor(c).int().numpy() for c in cu),
    )
    return torch.from_numpy(planes), torch.from_numpy(scores)


def check_case(case: Case, kernels: ModuleType) -> None:
    inputs = made(case)
    planes, scores = run(kernels, case, inputs)
    assert_within_reference_error(planes if case.per_head else scores, inputs["plain"], inputs["exact"])
    if case.masked:
        assert (planes[~inputs["masks"][1][:, None].expand(planes.shape)] == 0).all()


def padded(t: Tensor, left: int, right: int, value: object, dim: int) -> Tensor:
    shape = list(t.shape)
    parts = []
    for size in (left, right):
        shape[dim] = size
        parts.append(torch.full(shape, value, dtype=t.dtype))
    return torch.cat([parts[0], t, parts[1]], dim)


def check_alone_in_a_batch_and_packed_bitwise(kernels: ModuleType) -> None:
    case = Case(21, 600, dim=8, heads=4, kv_heads=2)
    alone = {**made(case), "masks": (torch.ones(1, 21, dtype=torch.bool), torch.ones(1, 600, dtype=torch.bool))}
    want = run(kernels, case, alone)[1][0]
    assert torch.equal(run(kernels, case, made(case))[1][0], want)  # without lists of rows and keys
    batch = {**alone}
    batch["query"] = padded(alone["query"], 7, 40, math.nan, 2).repeat(2, 1, 1, 1)
    batch["key"] = padded(alone["key"], 100, 9, math.nan, 2).repeat(2, 1, 1, 1)
    batch["query"][0] = batch["key"][0] = 0.5
    batch["masks"] = (padded(alone["masks"][0], 7, 40, False, 1), padded(alone["masks"][1], 100, 9, False, 1))
    batch["masks"] = tuple(mask.repeat(2, 1) for mask in batch["masks"])
    assert torch.equal(run(kernels, case, batch)[1][1, 100:700], want)
    packed = {**alone, "masks": (None, None)}
    packed["query"] = torch.cat([torch.randn(1, 4, 30, 8).bfloat16(), alone["query"]], 2)
    packed["key"] = torch.cat([torch.randn(1, 2, 570, 8).bfloat16(), alone["key"]], 2)
    cu = ([0, 30, 30, 51], [5, 570, 570, 1170])
    got = run(kernels, case, packed, cu)[1][0]
    assert torch.equal(got[570:], want)
    assert (got[:5] == 0).all()  # keys of no sample


def check_nan_stays_in_its_sample(kernels: ModuleType) -> None:
    case = Case(5, 90, batch=2)
    clean = made(case)
    want = run(kernels, case, clean)[1]
    for poison in (math.nan, math.inf):
        for name, place in (("key", (0, 0, 70, 3)), ("query", (0, 1, 4, 0))):
            bad = {**clean, name: clean[name].clone()}
            bad[name][place] = poison
            got = run(kernels, case, bad)[1]
            assert got[0].isnan().all()
            assert torch.equal(got[1], want[1])


def check_nothing_counts(kernels: ModuleType) -> None:
    case = Case(5, 40, batch=2)
    for masks in (
        (torch.zeros(2, 5, dtype=torch.bool), torch.ones(2, 40, dtype=torch.bool)),
        (torch.ones(2, 5, dtype=torch.bool), torch.zeros(2, 40, dtype=torch.bool)),
    ):
        assert (run(kernels, case, {**made(case), "masks": masks})[1] == 0).all()


Check = Callable[[ModuleType], None]
CHECKS: dict[str, Check] = {
    **{re.sub(r"\w+=False,? ?|[()]|torch\.", "", str(c)): functools.partial(check_case, c) for c in CASES},
    "alone, in a batch, packed": check_alone_in_a_batch_and_packed_bitwise,
    "nan": check_nan_stays_in_its_sample,
    "nothing counts": check_nothing_counts,
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("check", CHECKS)
def test_scores(kernels: ModuleType, check: str, order: str) -> None:
    kernels.configure(*ORDERS[order])
    CHECKS[check](kernels)


def test_there_are_barriers_to_take_out() -> None:
    assert len(BARRIERS) == 8


@pytest.mark.parametrize("number", range(len(BARRIERS)), ids=BARRIERS)
def test_every_barrier_is_needed(kernels: ModuleType, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def run(check: Check, order: tuple[str, int]) -> None:
        kernels.configure(*order)
        check(kernels)

    runs = (functools.partial(run, check, order) for check in CHECKS.values() for order in ORDERS.values())
    assert_needed(number, monkeypatch, runs)
