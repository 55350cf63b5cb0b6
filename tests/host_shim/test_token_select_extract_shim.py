"""Score, select and gather in one call, run on the CPU: the bits of the three steps alone, in three launches."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
import torch
from barriers import assert_needed, barriers

HEADER = Path(__file__).parents[2] / "csrc" / "token_select" / "extract.cuh"
BARRIERS = barriers(HEADER)
ORDERS = {"forward": ("forward", 0), "reverse": ("reverse", 0), "shuffled": ("shuffled", 1)}
RIGHT, LEFT, PACKED = range(3)


@pytest.fixture(scope="module")
def kernels(build_switched) -> ModuleType:
    return build_switched("token_select_extract.cpp", list(BARRIERS.values()))


@dataclass(frozen=True)
class Case:
    rows: int
    length: int
    batch: int = 1
    masked: bool = False
    key_bias: bool = False
    weights: bool = False
    lse: bool = False
    causal: bool = False
    bias: bool = False
    segments: int = 1
    keep: float | str = 0.4  # a share, or "counts" on the device
    min_keep: int = 3
    layout: int = RIGHT
    spare: int = 2  # capacity above need
    tied: bool = False  # many keys are the same, so that ties cut across the budget
    packed: tuple[int, ...] = ()  # tokens at which samples begin and end; rows in proportion
    launches: int = 3


CASES = [
    Case(1, 1, keep=1.0, spare=0),
    Case(5, 130, batch=3, masked=True, layout=LEFT),
    Case(40, 600, bias=True),
    Case(7, 300, batch=2, masked=True, key_bias=True, weights=True, segments=3, keep="counts", layout=LEFT),
    Case(9, 100, batch=2, lse=True, causal=True, masked=True),
    Case(6, 90, lse=True, keep="counts", tied=True),
    Case(3, 70, batch=2, tied=True, keep=0.0, min_keep=0, spare=-11),
    Case(4, 80, batch=2, masked=True, layout=PACKED, launches=5),
    Case(2, 2100, masked=True),
    Case(1, 4096, masked=True, segments=3, keep="counts"),
    Case(1, 4100, launches=5),
    Case(2, 4100, masked=True, lse=True, launches=5),
    Case(2, 60, segments=60, launches=4),
    Case(12, 120, packed=(0, 40, 40, 110), masked=True, bias=True, layout=PACKED, launches=7),
    Case(12, 120, packed=(10, 120), segments=3, keep="counts", layout=PACKED, launches=7),
]


def check_case(case: Case, kernels: ModuleType) -> None:
    g = torch.Generator().manual_seed(case.rows * 1000 + case.length)
    b, n, m = case.batch, case.rows, case.length
    cu = [torch.tensor(case.packed).mul(size).div(m, rounding_mode="floor").int() for size in (n, m)]
    cu = [places.numpy() if case.packed else None for places in cu]
    samples = len(case.packed) - 1 if case.packed else b
    query = torch.randn(b, 4, n, 16, generator=g)
    key = torch.randn(b, 2, m, 16, generator=g)
    if case.tied:
        key = key[:, :, :4].repeat(1, 1, m // 4 + 1, 1)[:, :, :m]
    query, key = query.bfloat16(), key.bfloat16()
    query_mask, key_mask = torch.rand(b, n, generator=g) < 0.7, torch.rand(b, m, generator=g) < 0.8
    if case.masked:
        query_mask[-1], key_mask[0, :5] = case.batch == 1, False  # in a batch, one where no row counts
        key[~key_mask[:, None].expand(b, 2, m)] = torch.nan
    key_bias = torch.randn(b, m, generator=g)
    key_bias[torch.rand(b, m, generator=g) < 0.1] = -torch.inf
    candidates = torch.rand(b, m, generator=g) < (0.8 if m > 1 else 2)
    segment = torch.randint(-1, case.segments + 1, (b, m), generator=g)
    counts = torch.randint(-1, max(2, m // 3), (samples, case.segments)[: 1 + (case.segments > 1)], generator=g)
    tensors = [
        torch.randn(1, b, m, 40, generator=g),
        torch.randint(0, 99, (3, b, m, 1), generator=g),  # position ids of three planes
        torch.rand(1, b, m, 1, generator=g) < 0.5,
        torch.randn(1, b, m, 7, generator=g),
    ]

    def run(fused: bool, capacity: int, complete: bool) -> tuple:
        out, table = [], []
        rows = 1 if case.layout == PACKED else b
        for t in tensors:
            out.append(torch.full((t.shape[0], rows, capacity, t.shape[3]), 77).to(t.dtype))
            strides = [stride * t.element_size() for stride in t.stride()[:3]]
            table.append((t.data_ptr(), out[-1].data_ptr(), t.shape[0], t.shape[3] * t.element_size(), *strides))
        options = (
            query_mask.numpy() if case.masked else None,
            key_mask.numpy() if case.masked else None,
            key_bias.numpy() if case.key_bias else None,
            torch.rand(samples, 4, generator=torch.Generator().manual_seed(1)).numpy() if case.weights else None,
            torch.full((b, 4, n), 3.0).numpy() if case.lse else None,
            case.causal,
            candidates.numpy(),
            torch.randn(b, m, generator=torch.Generator().manual_seed(2)).numpy() / 99 if case.bias else None,
            segment.numpy() if case.segments > 1 else None,
            case.segments,
            counts.numpy() if case.keep == "counts" else None,
            case.keep if isinstance(case.keep, float) else -1.0,
            case.min_keep,
        )
        bits = (query.view(torch.uint16).numpy(), key.view(torch.uint16).numpy())
        *selection, launches = kernels.run(fused, *bits, *options, capacity, case.layout, complete, table, *cu)
        return [torch.from_numpy(t) for t in selection], out, launches

    lengths = run(False, b * m if case.layout == PACKED else m, True)[0][1]
    needed = int(lengths.sum() if case.layout == PACKED else lengths.max())
    capacity = min(needed + case.spare, b * m if case.layout == PACKED else m)
    want, want_moved, _ = run(False, capacity, False)
    got, moved, launches = run(True, capacity, case.spare >= 0)
    for ours, theirs in zip((*got, *moved), (*want, *want_moved)):
        assert torch.equal(ours, theirs)
    assert launches == case.launches
    if case.spare < 0:
        with pytest.raises(RuntimeError, match="keeps more tokens"):
            run(True, capacity, True)


Check = Callable[[ModuleType], None]
CHECKS: dict[str, Check] = {re.sub(r"[^\w.,=]+", "", str(c)): functools.partial(check_case, c) for c in CASES}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("check", CHECKS)
def test_extract(kernels: ModuleType, check: str, order: str) -> None:
    kernels.configure(*ORDERS[order])
    CHECKS[check](kernels)


def test_there_are_barriers_to_take_out() -> None:
    assert len(BARRIERS) == 2


@pytest.mark.parametrize("number", range(len(BARRIERS)), ids=BARRIERS)
def test_every_barrier_is_needed(kernels: ModuleType, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def run(check: Check, order: tuple[str, int]) -> None:
        kernels.configure(*order)
        check(kernels)

    runs = (functools.partial(run, check, order) for check in CHECKS.values() for order in ORDERS.values())
    assert_needed(number, monkeypatch, runs)
