"""What the kernels of multi_lora compute, as loops over tokens and adapters, and inputs that catch what they miss."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

TILE = 64
BF16, FP16 = torch.bfloat16, torch.float16


@dataclass(frozen=True)
class Case:
    """Sizes of a problem. `runs`: tokens come in runs of one adapter; `absent`: adapters that no token has."""

    tokens: int
    ranks: tuple[int, ...]
    size: int
    dtype: torch.dtype = torch.float32
    per_token: int = 1
    drop: int | None = None
    runs: bool = False
    unrouted: float = 0.2
    absent: tuple[int, ...] = ()
    column: int = 0  # first column of h that is in use
    strided: bool = False
    seed: int = 0

    def __str__(self) -> str:
        told = [f"{self.tokens}x{self.size}", "r" + "_".join(map(str, self.ranks[:5])), str(self.dtype)[6:]]
        extra = {"s": self.per_token != 1 and self.per_token, "drop": self.drop, "column": self.column}
        return "-".join(told + [f"{k}{v}" for k, v in extra.items() if v] + ["runs"] * self.runs)


COMMON_CASES = [
    Case(1, (4,), 24, unrouted=0),
    Case(7, (1, 13), 20, strided=True),
    Case(70, (8, 3), 40, BF16),
    Case(70, (8, 3), 40, FP16, strided=True, drop=20000),
    Case(130, (20, 1, 70), 136, BF16, runs=True, absent=(1,), column=5),
    Case(66, (5, 33), 140, BF16, per_token=3, drop=6554),
    Case(66, (5, 33), 70, per_token=2, drop=30000, column=2),
    Case(20, tuple(range(1, 36)), 33, BF16),
    Case(40, (9, 2), 24, BF16, unrouted=1.0),
]


@dataclass
class Problem:
    x: Tensor  # (T, D), NaN in the rows of tokens without an adapter
    h: Tensor  # (T, S, G), NaN where no adapter has its columns
    bank: Tensor
    table: Tensor
    scaling: Tensor
    ids: Tensor  # (T, S) as the user gives them
    weights: Tensor | None
    seed: Tensor | None
    drop: int
    plan: dict[str, Tensor] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        return self.bank.shape[0]


def make(case: Case) -> Problem:
    g = torch.Generator().manual_seed(case.seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    adapters, shape = len(case.ranks), (case.tokens, case.per_token)
    ids = torch.randint(adapters, shape, generator=g)
    if case.runs:
        ids = ids.sort(0).values
    ids[torch.rand(shape, generator=g) < case.unrouted] = -1
    for e in case.absent:
        ids[ids == e] = -1
    weights = torch.rand(shape, generator=g) if case.per_token > 1 else None

    starts = [sum(case.ranks[:e]) for e in range(adapters)]
    table = torch.tensor([[s, r, case.column] for s, r in zip(starts, case.ranks)], dtype=torch.int32)
    scaling = torch.tensor([(2.0, 1 / 3, -0.5)[e % 3] for e in range(adapters)])
    bank = (normal(sum(case.ranks), case.size) / case.size**0.5).to(case.dtype)
    wide = normal(case.tokens, case.size + 9)
    x = wide.to(case.dtype)[:, 3 : 3 + case.size] if case.strided else wide[:, : case.size].to(case.dtype).contiguous()
    x[(ids < 0).all(1)] = torch.nan

    h = torch.full((*shape, case.column + max(case.ranks) + 3), torch.nan)
    for t, s in (ids >= 0).nonzero().tolist():
        rank = case.ranks[ids[t, s]]
        h[t, s, case.column : case.column + rank] = normal(rank)
    seed = None if case.drop is None else torch.tensor([(1 << 40) + 7])
    plan = build_plan(ids, adapters)
    return Problem(x, h, bank, table, scaling, ids, weights, seed, case.drop or 0, plan)


def build_plan(ids: Tensor, adapters: int) -> dict[str, Tensor]:
    """The plan of /lyra_ops/multi_lora/plan.py, in loops. Ids out of range count as -1."""
    tokens, per_token = ids.shape
    clean = [[e if 0 <= e < adapters else -1 for e in row] for row in ids.tolist()]
    flat = [e for row in clean for e in row]
    pairs, starts, chunks = [], [0], []
    for e in range(adapters):
        pairs += [p for p, owner in enumerate(flat) if owner == e]
        chunks += [[e, at] for at in range(starts[-1], len(pairs), TILE)]
        starts.append(len(pairs))
    pairs += [-1] * (len(flat) - len(pairs))
    chunks += [[-1, 0]] * (-(-len(flat) // TILE) + adapters - len(chunks))
    present = [[0] * -(-adapters // 32) for _ in range(-(-tokens // TILE))]
    for t, row in enumerate(clean):
        for e in row:
            if e >= 0:
                present[t // TILE][e // 32] |= 1 << e % 32
    return {
        "ids": torch.tensor(clean, dtype=torch.int32).view(tokens, per_token),
        "starts": torch.tensor(starts, dtype=torch.int32),
        "pairs": torch.tensor(pairs, dtype=torch.int32),
        "chunks": torch.tensor(chunks, dtype=torch.int32).view(-1, 2),
        # Through int64: bit 31 is a sign.
        "present": torch.tensor(present, dtype=torch.int64).view(len(present), -(-adapters // 32)).to(torch.int32),
    }


def philox(counter: tuple[int, int, int, int], key: tuple[int, int]) -> list[int]:
    """Philox4x32 with 10 rounds, as Salmon et al. (2011) write it."""
    low = 0xFFFFFFFF
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = p1 >> 32 ^ c1 ^ k0, p1 & low, p0 >> 32 ^ c3 ^ k1, p0 & low
        k0, k1 = k0 + 0x9E3779B9 & low, k1 + 0xBB67AE85 & low
    return [c0, c1, c2, c3]


def mask(problem: Problem) -> Tensor:
    """(T, D) bool: what dropout keeps."""
    tokens, size = problem.x.shape
    kept = torch.ones(tokens, size, dtype=torch.bool)
    if problem.seed is None:
        return kept
    seed = problem.seed.item()
    for t in range(tokens):
        for block in range(-(-size // 8)):
            words = philox((block, t, 0, 0), (seed & 0xFFFFFFFF, seed >> 32))
            for i in range(min(8, size - 8 * block)):
                value = words[i // 2] >> 16 * (i % 2) & 0xFFFF
                value -= (value >= 1 << 15) << 16  # as a signed number
                kept[t, 8 * block + i] = value >= problem.drop - (1 << 15)
    return kept


def _pairs(problem: Problem):
    """Token, place and adapter's rows of each pair; rows of the bank; columns of h."""
    for t, s in (problem.ids >= 0).nonzero().tolist():
        e = problem.ids[t, s].item()
        row, rank, column = problem.table[e].tolist()
        yield t, s, e, slice(row, row + rank), slice(column, column + rank)


def _masked(problem: Problem, x: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.where(mask(problem), x.to(dtype), 0)


def _coefficient(problem: Problem, t: int, s: int, e: int, columns: slice, dtype: torch.dtype) -> Tensor:
    weight = 1.0 if problem.weights is None else problem.weights[t, s].to(dtype)
    exact = problem.h[t, s, columns].to(dtype) * problem.scaling[e].to(dtype) * weight
    return exact if dtype == torch.float64 else exact.to(problem.x.dtype).to(dtype)


def shrink(problem: Problem, dtype: torch.dtype) -> Tensor:
    """h (T, S, G) in `dtype`, float64 or float32; NaN where there is nothing to be computed."""
    h = torch.full(problem.h.shape, torch.nan, dtype=dtype)
    x, bank = _masked(problem, problem.x, dtype), problem.bank.to(dtype)
    for t, s, _, rows, columns in _pairs(problem):
        h[t, s, columns] = bank[rows] @ x[t]
    return h


def expand(problem: Problem, y: Tensor, dtype: torch.dtype) -> Tensor:
    """y plus what the adapters add, in `dtype`: float64, or float32, then rounded to that of y."""
    added, bank = torch.zeros(y.shape, dtype=dtype), problem.bank.to(dtype)
    for t, s, e, rows, columns in _pairs(problem):
        added[t] += _coefficient(problem, t, s, e, columns, dtype) @ bank[rows]
    result = y.to(dtype) + torch.where(mask(problem), added, 0)
    return result if dtype == torch.float64 else result.to(y.dtype)


def outer(problem: Problem, dtype: torch.dtype) -> Tensor:
    """(rows, D) in `dtype`: float64 or float32."""
    out = torch.zeros(problem.bank.shape, dtype=dtype)
    x = _masked(problem, problem.x, dtype)
    for t, s, e, rows, columns in _pairs(problem):
        out[rows] += torch.outer(_coefficient(problem, t, s, e, columns, dtype), x[t])
    return out
