"""select and gather of token_select, run on the CPU: right whichever thread goes first, wrong without any barrier."""

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
from barriers import assert_needed, barriers
from torch import Tensor

HEADER = Path(__file__).parents[2] / "csrc" / "token_select" / "select.cuh"
BARRIERS = barriers(HEADER)
ORDERS = {"forward": ("forward", 0), "reverse": ("reverse", 0), "shuffled": ("shuffled", 1)}
RIGHT, LEFT, PACKED = range(3)


@pytest.fixture(scope="module")
def kernels(build_switched) -> ModuleType:
    return build_switched("token_select.cpp", list(BARRIERS.values()))


# --- select ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    length: int
    batch: int = 2
    segments: int = 1
    keep: object = 0.5  # a share, a count, or "counts" / "shares" per sample and segment
    min_keep: int = 0
    values: str = "random"
    planes: int = 1
    layout: int = RIGHT
    packed_in: bool = False
    split: bool = False
    spare: int = 3  # capacity above need


LONG = 5000  # three blocks of a split sample
CASES = [
    Case(0),
    Case(1),
    Case(31, keep=7),
    Case(33, keep=0),
    Case(64, keep=1.0, spare=0),
    Case(100, keep=1000),
    Case(576, min_keep=300),
    Case(576, values="equal"),
    Case(576, values="few", planes=4),
    Case(100, values="special", keep=30),
    Case(100, values="special", keep="counts"),
    Case(300, segments=3, keep="shares"),
    Case(300, segments=20, keep="counts", values="few"),
    Case(120, segments=120, keep=0.3, values="few", batch=1),
    Case(150, segments=40, keep="counts", min_keep=1, layout=PACKED),
    Case(300, layout=LEFT, values="few"),
    Case(300, layout=PACKED, batch=3, keep="counts"),
    Case(300, layout=PACKED, batch=3, segments=3, packed_in=True, keep="shares"),
    Case(LONG, split=True, batch=1),
    Case(LONG, split=True, values="equal", keep=2100),
    Case(LONG, split=True, segments=5, values="few", keep="shares", layout=LEFT),
    Case(LONG, split=True, values="special", keep="counts", layout=PACKED),
    Case(LONG, split=True, values="few", batch=3, packed_in=True, layout=PACKED),
]
SPECIAL = [0.0, -0.0, 1e-45, -1e-45, math.inf, -math.inf, math.nan, -math.nan, 1.0, -1.0, 3e38]


def scores_like(values: str, *shape: int, generator: torch.Generator) -> Tensor:
    if values == "random":
        return torch.rand(*shape, generator=generator) ** 8
    if values == "few":
        return torch.randint(-2, 3, shape, generator=generator) / 8
    choices = torch.tensor(SPECIAL if values == "special" else [0.125])
    return choices[torch.randint(0, len(choices), shape, generator=generator)]


def best(scores: list[float], among: list[int], k: int) -> list[int]:
    """By a sort of Python: NaN last, of equal scores the lower index first."""
    order = sorted(among, key=lambda i: (math.isnan(scores[i]), 0.0 if math.isnan(scores[i]) else -scores[i], i))
    return order[:k]


def check_select(case: Case, kernels: ModuleType) -> None:
    g = torch.Generator().manual_seed(case.length + case.segments)
    rows, length, batch = (1 if case.packed_in else case.batch), case.length, case.batch
    scores = scores_like(case.values, rows, case.planes, length, generator=g)
    candidates, key_mask = (torch.rand(rows, length, generator=g) < share for share in (0.8, 0.9))
    segment = torch.randint(-1, case.segments + 1, (rows, length), generator=g)
    cu = None
    starts = [(b, 0, length) for b in range(batch)]
    if case.packed_in:  # with a token in front, and two behind, that are in no sample
        cu = torch.tensor([1, *torch.randint(1, length - 2, (batch - 1,), generator=g).sort()[0].tolist(), length - 2])
        starts = [(0, int(cu[b]), int(cu[b + 1])) for b in range(batch)]
    shape = (batch, case.segments)
    counts = torch.randint(-2, max(2, length // 2 // case.segments), shape, generator=g)
    shares = torch.rand(shape, generator=g, dtype=torch.float64) * 1.4 - 0.2
    shares[0, 0] = math.nan

    def budget(b: int, s: int, n: int) -> int:
        if case.keep == "counts":
            k = int(counts[b, s])
        elif case.keep == "shares" or isinstance(case.keep, float):
            share = float(shares[b, s]) if case.keep == "shares" else case.keep
            k = 0 if math.isnan(share) else math.floor(share * n)
        else:
            k = case.keep
        return min(n, max(0, case.min_keep, k))

    total, stay = torch.zeros(rows, length), []
    for plane in range(case.planes):
        total += scores[:, plane]
    for b, (row, begin, end) in enumerate(starts):
        real = [i for i in range(begin, end) if key_mask[row, i]]
        where = {i: int(segment[row, i]) if case.segments > 1 else 0 for i in real if candidates[row, i]}
        ranked = {i: s for i, s in where.items() if 0 <= s < case.segments}
        kept = [i for i in real if i not in ranked]
        for s in range(case.segments):
            among = [i for i, t in ranked.items() if t == s]
            kept += best(total[row].tolist(), among, budget(b, s, len(among)))
        stay.append(sorted(kept))

    needed = sum(map(len, stay)) if case.layout == PACKED else max(map(len, stay))
    capacity = needed + case.spare
    index = torch.full((1 if case.layout == PACKED else batch, capacity), -1)
    inverse = torch.full((rows, length), -1)
    offset = 0
    for b, ((row, _, _), kept) in enumerate(zip(starts, stay)):
        first = {RIGHT: 0, LEFT: capacity - len(kept), PACKED: offset}[case.layout]
        zero = row * length if case.layout == PACKED else 0
        columns = torch.arange(first, first + len(kept))
        index[0 if case.layout == PACKED else b, columns] = torch.tensor(kept, dtype=torch.int64) + zero
        inverse[row, torch.tensor(kept, dtype=torch.int64)] = columns
        offset += len(kept)

    scalars = (case.keep if isinstance(case.keep, float) else -1.0, case.keep if isinstance(case.keep, int) else 0)
    got = kernels.select(
        scores.numpy(),
        candidates.numpy(),
        key_mask.numpy(),
        segment.numpy() if case.segments > 1 else None,
        case.segments,
        counts.numpy() if case.keep == "counts" else None,
        shares.numpy() if case.keep == "shares" else None,
        *scalars,
        case.min_keep,
        capacity,
        case.layout,
        None if cu is None else cu.int().numpy(),
        case.split,
    )
    assert got[0].tolist() == index.tolist()
    assert got[1].tolist() == [len(kept) for kept in stay]
    assert got[2].tolist() == inverse.tolist()


def check_more_kept_than_there_is_room(kernels: ModuleType) -> None:
    scores, all_of_them = torch.rand(1, 1, 40), torch.ones(1, 40, dtype=torch.bool).numpy()
    for layout in (RIGHT, LEFT, PACKED):
        index, lengths, _ = kernels.select(
            scores.numpy(), all_of_them, None, None, 1, None, None, -1.0, 30, 0, 7, layout, None, False
        )
        assert lengths.tolist() == [30]
        assert index.shape == (1, 7)
        with pytest.raises(RuntimeError, match="keeps more tokens"):
            kernels.select(
                scores.numpy(), all_of_them, None, None, 1, None, None, -1.0, 30, 0, 29, layout, None, False, True
            )


def check_cu_seqlens_of_no_sense_touch_nothing_outside(kernels: ModuleType) -> None:
    scores, candidates = torch.rand(1, 1, 40).numpy(), torch.ones(1, 40, dtype=torch.bool).numpy()
    cu = torch.tensor([-5, 30, 10, 2**31 - 1], dtype=torch.int32).numpy()
    for split in (False, True):
        _, lengths, _ = kernels.select(scores, candidates, None, None, 1, None, None, 1.0, 0, 0, 80, PACKED, cu, split)
        assert lengths.tolist() == [30, 0, 30]


Check = Callable[[ModuleType], None]
SELECT_CHECKS: dict[str, Check] = {
    **{re.sub(r"[^\w.,=]+", "", str(c).removeprefix("Case")): functools.partial(check_select, c) for c in CASES},
    "more kept than there is room": check_more_kept_than_there_is_room,
    "senseless cu_seqlens": check_cu_seqlens_of_no_sense_touch_nothing_outside,
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("check", SELECT_CHECKS)
def test_select(kernels: ModuleType, check: str, order: str) -> None:
    kernels.configure(*ORDERS[order])
    SELECT_CHECKS[check](kernels)


# --- gather ----------------------------------------------------------------------------------------------------------


def gathered(
    kernels: ModuleType, tensors: list[Tensor], index: Tensor, batch: int, length: int, flat: bool, fill: float
):
    """Outputs and vector widths. Each tensor is (P, B, L, H, R), R adjacent."""
    out, table = [], []
    for tensor in tensors:
        planes, _, _, heads, row = tensor.shape
        item = tensor.element_size()
        out.append(torch.full((planes, *index.shape, heads, row), 99).to(tensor.dtype))
        strides = [stride * item for stride in tensor.stride()[:4]]
        pattern = torch.full((16 // item,), fill).to(tensor.dtype).view(torch.uint8).numpy().tobytes()
        table.append((tensor.data_ptr(), out[-1].data_ptr(), planes, heads, row * item, *strides, pattern))
    return out, kernels.gather(table, index.numpy(), batch, length, flat)


@pytest.mark.parametrize("flat", [False, True])
def test_gather_of_many_tensors_at_once(kernels: ModuleType, flat: bool) -> None:
    kernels.configure("forward", 0)
    batch, length, columns = 3, 21, 17
    g = torch.Generator().manual_seed(0)
    tensors = [
        torch.randn(1, batch, length, 1, 300, generator=g),
        torch.randn(1, batch, length, 1, 8, generator=g).to(torch.bfloat16),
        torch.randn(1, batch, 2, length, 12, generator=g).half().transpose(2, 3),  # keys: heads outside of tokens
        torch.randint(0, 99, (3, batch, length, 1, 1), generator=g),  # position ids of three planes
        torch.rand(1, batch, length, 1, 1, generator=g) < 0.5,
        torch.randint(0, 99, (1, batch, length, 1, 3), generator=g).to(torch.uint8),
        torch.randn(1, batch, length, 1, 9, generator=g)[..., 1:],  # every other row is not aligned
        torch.randn(2, batch, length + 4, 1, 2, generator=g, dtype=torch.float64)[:, :, 3:-1],
    ]
    index = torch.randint(-2, (batch * length if flat else length) + 2, (2 if flat else batch, columns), generator=g)
    out, widths = gathered(kernels, tensors, index, batch, length, flat, -3)
    assert widths == [16, 16, 8, 8, 1, 1, 4, 16]
    for tensor, got in zip(tensors, out):
        for (b, k), v in zip(((b, k) for b in range(index.shape[0]) for k in range(columns)), index.flatten().tolist()):
            inside = 0 <= v < (batch * length if flat else length)
            row, place = divmod(v, length) if flat else (b, v)
            want = tensor[:, row, place] if inside else torch.full_like(tensor[:, 0, 0], -3)
            assert torch.equal(got[:, b, k], want)


def test_gather_by_the_inverse_map_undoes_it(kernels: ModuleType) -> None:
    kernels.configure("shuffled", 1)
    length, kept = 3000, torch.arange(0, 3000, 3)[None]
    inverse = torch.full((1, length), -1)
    inverse[0, kept[0]] = torch.arange(1000)
    tensor = torch.randn(1, 1, length, 1, 7)
    (out,), _ = gathered(kernels, [tensor], kept, 1, length, False, 0)
    (back,), _ = gathered(kernels, [out], inverse, 1, 1000, False, 0)
    assert torch.equal(back[0, 0, ::3], tensor[0, 0, ::3])
    assert back.count_nonzero() == 7000


# --- barriers --------------------------------------------------------------------------------------------------------


def test_there_are_barriers_to_take_out() -> None:
    assert len(BARRIERS) >= 7


@pytest.mark.parametrize("number", range(len(BARRIERS)), ids=BARRIERS)
def test_every_barrier_is_needed(kernels: ModuleType, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def run(check: Check, order: tuple[str, int]) -> None:
        kernels.configure(*order)
        check(kernels)

    runs = (functools.partial(run, check, order) for check in SELECT_CHECKS.values() for order in ORDERS.values())
    assert_needed(number, monkeypatch, runs)
