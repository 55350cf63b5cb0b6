"""soft_dtw from a given cost and from features, at the shapes of Lyra's regularizer: speech by transcript tokens."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F

import lyra_ops
from bench.harness import BOTH, FORWARD, Cost, Workload
from bench.peers import soft_dtw as peers
from lyra_ops.soft_dtw import reference

GAMMA, TEMPERATURE = 0.1, 0.06


def workloads(device: str, quick: bool) -> Iterator[Workload]:
    if quick:
        yield from_cost(device, 4, (60, 60), (30, 30))
        yield from_cost(device, 4, (30, 60), (10, 30))
        yield with_shares(device, 4, 60, 30)
        yield long_pairs(device, 1, 300, 200, 16)
        yield long_pairs(device, 1, 200, 200, 16)
        yield from_features(device, 4, (30, 60), (10, 30), 64)
        yield banded_features(device, 1, 300, 16, 64, torch.float32)
        return
    yield from_cost(device, 32, (300, 300), (64, 64))
    yield from_cost(device, 32, (1500, 1500), (200, 200))
    yield from_cost(device, 1, (1500, 1500), (200, 200))
    yield from_cost(device, 120, (150, 375), (20, 110))
    yield with_shares(device, 32, 300, 64)
    yield with_shares(device, 32, 1500, 200)
    yield long_pairs(device, 8 if device == "cuda" else 1, 8192, 8192, 512)  # 8 pairs and their truth would take 13 GB
    yield long_pairs(device, 1, 36000, 9000, 512)
    yield long_pairs(device, 1, 8192, 8192, None)
    for dim in (576, 3584):
        yield from_features(device, 32, (150, 300), (20, 64), dim)
        yield products(device, 32, (150, 300), (20, 64), dim)
    if device == "cuda":  # a language model's tokens, at the shapes of the floors in csrc/soft_dtw/features.cuh
        for rows, columns in ((300, 300), (64, 64)), ((1500, 1500), (200, 200)):
            yield from_features(device, 32, rows, columns, 3584, torch.bfloat16)
            yield products(device, 32, rows, columns, 3584, torch.bfloat16)
        yield banded_features(device, 8, 8192, 512, 3584, torch.bfloat16)
    else:
        yield banded_features(device, 1, 8192, 512, 576, torch.float32)


def bounds(ours: torch.Tensor, plain: torch.Tensor, exact: torch.Tensor, name: str) -> None:
    """What is promised: 1e-6 for the value, 1e-4 (relative L2) for a gradient, besides its rounding; NaN nowhere."""
    error = ((ours.double() - exact).norm() / exact.norm()).item()
    rounding = 0 if ours.dtype == torch.float32 else torch.finfo(ours.dtype).eps / 2
    if not error <= (1e-6 if name == "output" else 1e-4 + rounding):
        raise AssertionError(f"{name}: relative L2 error {error:.1e}")


def lengths(device: str, batch: int, least_and_most: tuple[int, int]) -> torch.Tensor:
    least, most = least_and_most
    found = torch.randint(least, most + 1, (batch,), generator=torch.Generator().manual_seed(0))
    found[0] = most
    return found.to(device)


def from_cost(device: str, batch: int, rows: tuple[int, int], columns: tuple[int, int]) -> Workload:
    """Contrastive cost of random tokens, as in the regularizer."""
    n, m = lengths(device, batch, rows), lengths(device, batch, columns)
    cells = int((n * m).sum())

    def inputs() -> tuple[torch.Tensor]:
        return (-F.log_softmax(torch.randn(batch, rows[1], columns[1], device=device), dim=-1),)

    ours = {f"lyra ({device})": lambda cost: lyra_ops.soft_dtw_from_cost(cost, n, m, gamma=GAMMA, backend=device)}
    named = peers.implementations(device, ragged=rows[0] < rows[1])
    theirs = {name: partial(adapt, peer, n, m) for name, peer in named.items()}
    shape = f"{batch} x {span(rows)} x {span(columns)}"
    return Workload(
        name=f"cost given, {shape}, gamma {GAMMA}",
        inputs=inputs,
        implementations=ours | theirs,
        plain=lambda cost: reference.soft_dtw(cost, n, m, GAMMA),
        # The shares kept for backward (4 bytes) are the kernels' own choice, so they are no part of the floor.
        costs={FORWARD: Cost(4 * cells, 25 * cells), BOTH: Cost(8 * cells, 31 * cells)},
        items=("cells", cells),
        judge=bounds,
    )


def with_shares(device: str, batch: int, rows: int, columns: int) -> Workload:
    """Forward that keeps all shares, as under torch.compile: `from_cost` keeps none forward, or on a CPU a pair's."""
    plain = from_cost(device, batch, (rows, rows), (columns, columns))
    n, m = (torch.full((batch,), size, device=device) for size in (rows, columns))
    cells = batch * rows * columns

    def ours(cost: torch.Tensor) -> torch.Tensor:
        return torch.ops.lyra.soft_dtw_forward(cost, n, m, GAMMA, None, -1, None, None, None, 16)[0]

    return replace(
        plain,
        name=plain.name.replace("cost given", "cost given, shares kept"),
        implementations={f"lyra ({device})": ours},
        costs={FORWARD: Cost(8 * cells, 25 * cells)},
    )


def long_pairs(device: str, batch: int, rows: int, columns: int, band: int | None) -> Workload:
    """With an int band or none. pysdtw limits its work to it, but not its memory: the longest are too much for it.

    The truth is our own kernel in float64: the reference would need the memory of a graph over all cells.
    """
    n, m = (torch.full((batch,), size, device=device) for size in (rows, columns))
    i = torch.arange(rows, device=device)
    middle = i * (columns - 1) / (rows - 1)
    reach = max(columns if band is None else band, (columns - 1) / (rows - 1) / 2 + 0.5)
    high, low = (middle + reach).floor().clamp(max=columns - 1), (middle - reach).ceil().clamp(min=0)
    cells = batch * int((high - low + 1).sum())

    def inputs() -> tuple[torch.Tensor]:
        return (10 * torch.rand(batch, rows, columns, device=device),)

    def ours(cost: torch.Tensor) -> torch.Tensor:
        return lyra_ops.soft_dtw_from_cost(cost, n, m, gamma=GAMMA, band=band, backend=device)

    named = peers.implementations(device, ragged=False, band=band) if band is not None and rows == columns else {}
    theirs = {name: partial(adapt, peer, n, m) for name, peer in named.items() if name.startswith("pysdtw")}
    limit = "no band" if band is None else f"band {band}"
    return Workload(
        name=f"cost given, {batch} x {rows} x {columns}, {limit}, gamma {GAMMA}",
        inputs=inputs,
        implementations={f"lyra ({device})": ours} | theirs,
        plain=lambda cost: ours(cost.double()),
        costs={FORWARD: Cost(4 * cells, 25 * cells), BOTH: Cost(8 * cells, 31 * cells)},
        items=("cells", cells),
        budget=(3, 1.0),
        judge=bounds,
    )


def adapt(peer: peers.Peer, n: torch.Tensor, m: torch.Tensor, cost: torch.Tensor) -> torch.Tensor:
    return peer(cost, n, m, GAMMA)


def from_features(
    device: str,
    batch: int,
    rows: tuple[int, int],
    columns: tuple[int, int],
    dim: int,
    dtype: torch.dtype = torch.float32,
) -> Workload:
    """The regularizer: contrastive cost of features, then soft-DTW."""
    n, m = lengths(device, batch, rows), lengths(device, batch, columns)
    cells = int((n * m).sum())
    features = dtype.itemsize * dim * int((n + m).sum())

    def inputs() -> tuple[torch.Tensor, ...]:
        # Tokens of a model are neither unit vectors nor unrelated; this keeps x . y / temperature near +-5.
        scale = (5 * TEMPERATURE / dim**0.5) ** 0.5
        tokens = (scale * torch.randn(batch, size, dim, device=device) for size in (rows[1], columns[1]))
        return tuple(t.to(dtype) for t in tokens)

    def by(backend: str):
        options = {"cost": "contrastive", "temperature": TEMPERATURE, "gamma": GAMMA, "backend": backend}
        return lambda x, y: lyra_ops.soft_dtw(x, y, n, m, **options)

    def plain(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        cost = reference.pair_cost(x, y, n, m, "contrastive", TEMPERATURE)
        return peers.torch_antidiagonals(cost.clamp(max=1e10), n, m, GAMMA)  # padding costs infinity

    return Workload(
        name=f"features of {dim}{kind(dtype)}, contrastive, {batch} x {span(rows)} x {span(columns)}, gamma {GAMMA}",
        inputs=inputs,
        implementations={f"lyra ({device})": by(device), "plain torch (anti-diagonals)": plain},
        plain=by("reference"),
        costs={
            FORWARD: Cost(features, (2 * dim + 25) * cells),
            BOTH: Cost(2 * features, (6 * dim + 31) * cells),
        },
        items=("cells", cells),
        judge=bounds,
    )


def banded_features(device: str, batch: int, size: int, band: int, dim: int, dtype: torch.dtype) -> Workload:
    """Long pairs of one length, squared distances, an int band: what is outside of it is never multiplied."""
    i = torch.arange(size)
    cells = batch * int(((i + band).clamp(max=size - 1) - (i - band).clamp(min=0) + 1).sum())
    features = 2 * dtype.itemsize * batch * size * dim

    def inputs() -> tuple[torch.Tensor, ...]:
        tokens = (dim**-0.5 * torch.randn(batch, size, dim, device=device) for _ in range(2))
        return tuple(t.to(dtype) for t in tokens)

    def ours(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return lyra_ops.soft_dtw(x, y, gamma=GAMMA, band=band, backend=device)

    return Workload(
        name=f"features of {dim}{kind(dtype)}, sqeuclidean, {batch} x {size} x {size}, band {band}",
        inputs=inputs,
        implementations={f"lyra ({device})": ours},
        plain=lambda x, y: ours(x.double(), y.double()),
        costs={
            FORWARD: Cost(features, (2 * dim + 25) * cells),
            BOTH: Cost(2 * features, (6 * dim + 31) * cells),
        },
        items=("cells", cells),
        budget=(3, 1.0),
        judge=bounds,
    )


def products(
    device: str,
    batch: int,
    rows: tuple[int, int],
    columns: tuple[int, int],
    dim: int,
    dtype: torch.dtype = torch.float32,
) -> Workload:
    """What no soft-DTW from features can do without: one product forward, two more backward, of real tokens alone.

    What `from_features` takes beyond it is the time outside the matrix products. A GPU multiplies the padding, too.
    """
    n, m = lengths(device, batch, rows), lengths(device, batch, columns)
    cells, features = int((n * m).sum()), dtype.itemsize * dim * int((n + m).sum())

    def inputs() -> tuple[torch.Tensor, ...]:
        return tuple(torch.randn(batch, size, dim, device=device, dtype=dtype) for size in (rows[1], columns[1]))

    def padded(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        product = torch.bmm(x, y.mT)
        return product * inside if rows[0] < rows[1] else product

    inside = (torch.arange(rows[1], device=device) < n[:, None])[:, :, None] & (
        torch.arange(columns[1], device=device) < m[:, None]
    )[:, None]

    def product(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return _Products.apply(x, y, n.tolist(), m.tolist())

    return Workload(
        name=f"matrix products alone, features of {dim}{kind(dtype)}, {batch} x {span(rows)} x {span(columns)}",
        inputs=inputs,
        implementations={"torch.bmm": padded} if device == "cuda" else {"torch.mm per pair": product},
        plain=padded,
        costs={
            FORWARD: Cost(features + 4 * cells, 2 * dim * cells),
            BOTH: Cost(2 * features + 8 * cells, 6 * dim * cells),
        },
        items=("cells", cells),
    )


class _Products(torch.autograd.Function):
    """x y^T of each pair, zero on padding."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, y: torch.Tensor, n: list[int], m: list[int]) -> torch.Tensor:
        ctx.save_for_backward(x, y)
        ctx.lengths = list(zip(n, m))
        cost = x.new_zeros(x.shape[0], x.shape[1], y.shape[1])
        for k, (n, m) in enumerate(ctx.lengths):
            torch.mm(x[k, :n], y[k, :m].T, out=cost[k, :n, :m])
        return cost

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, y = ctx.saved_tensors
        of_x, of_y = torch.empty_like(x), torch.empty_like(y)
        for k, (n, m) in enumerate(ctx.lengths):
            torch.mm(grad[k, :n, :m], y[k, :m], out=of_x[k, :n])
            torch.mm(grad[k, :n, :m].T, x[k, :n], out=of_y[k, :m])
            of_x[k, n:], of_y[k, m:] = 0, 0
        return of_x, of_y, None, None


def kind(dtype: torch.dtype) -> str:
    return "" if dtype == torch.float32 else " " + str(dtype).removeprefix("torch.")


def span(least_and_most: tuple[int, int]) -> str:
    least, most = least_and_most
    return str(most) if least == most else f"{least}..{most}"
