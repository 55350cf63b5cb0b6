"""Other people's soft-DTW from a given cost: {name: function(cost, x_lengths, y_lengths, gamma) -> (B,)}.

A package that is not installed is left out, as is one that cannot do what is asked for: see `implementations`.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import Tensor

Peer = Callable[[Tensor, Tensor, Tensor, float], Tensor]
BIG = 1e10  # a true infinity makes NaN gradients


def implementations(device: str, ragged: bool, band: int | None = None) -> dict[str, Peer]:
    """``ragged``: the lengths of the samples differ, which tslearn cannot take, and pysdtw only as packed sequences.

    ``band``: of pairs with as many rows as columns. pysdtw has one, which limits its work. ddtw gets closed cells, but
    beside these tslearn's gradient is NaN. Plain torch would copy the whole cost in backward once per anti-diagonal.
    """
    peers: dict[str, Peer] = {} if band is not None else {"plain torch (anti-diagonals)": torch_antidiagonals}
    if find_spec("ddtw"):
        backend = "cuda_cpp" if device == "cuda" else "cpu_numba"  # its torch backend takes a minute for 32 x 60 x 30
        peers[f"ddtw ({backend})"] = ddtw(backend) if band is None else closing(band, ddtw(backend))
    if not ragged and find_spec("pysdtw") and find_spec("numba"):
        peers["pysdtw (numba)"] = pysdtw(device, band)
    if band is None and not ragged and device == "cpu" and find_spec("tslearn"):
        peers["tslearn (numba)"] = tslearn
    return peers


def closing(band: int, peer: Peer) -> Peer:
    """``peer``, with a prohibitive cost outside of a band that it does not have."""

    def run(cost: Tensor, x_lengths: Tensor, y_lengths: Tensor, gamma: float) -> Tensor:
        i, j = (torch.arange(size, device=cost.device) for size in cost.shape[1:])
        return peer(cost.masked_fill((i[:, None] - j).abs() > band, BIG), x_lengths, y_lengths, gamma)

    return run


def torch_antidiagonals(cost: Tensor, x_lengths: Tensor, y_lengths: Tensor, gamma: float) -> Tensor:
    """The usual way to write it in torch: one logsumexp per anti-diagonal, the gradient left to autograd."""
    batch, rows, columns = cost.shape
    before = cost.new_full((batch, columns + 1), BIG)
    before[:, 0] = 0
    last = cost.new_full((batch, columns + 1), BIG)
    edge = cost.new_full((batch, 1), BIG)
    j = torch.arange(columns, device=cost.device)
    diagonals = []
    for k in range(rows + columns - 1):
        i = k - j
        step = torch.where((i >= 0) & (i < rows), cost[:, i.clamp(0, rows - 1), j], BIG)
        choices = torch.stack([before[:, :-1], last[:, 1:], last[:, :-1]])
        now = step - gamma * torch.logsumexp(-choices / gamma, dim=0)
        before, last = last, torch.cat([edge, now], dim=1)
        diagonals.append(now)
    ends = torch.stack(diagonals)
    return ends[x_lengths + y_lengths - 2, torch.arange(batch, device=cost.device), y_lengths - 1]


def ddtw(backend: str) -> Peer:
    def run(cost: Tensor, x_lengths: Tensor, y_lengths: Tensor, gamma: float) -> Tensor:
        from ddtw import SDTW

        mean = SDTW(gamma=gamma, normalization="none", backend=backend)(C=cost, list_N=x_lengths, list_M=y_lengths)
        return mean.expand(cost.shape[0])  # it gives the mean alone; its gradient is what counts

    return run


def pysdtw(device: str, band: int | None = None) -> Peer:
    def run(cost: Tensor, x_lengths: Tensor, y_lengths: Tensor, gamma: float) -> Tensor:
        from pysdtw import SoftDTW

        x, y = (cost.new_empty(cost.shape[0], size, 1) for size in cost.shape[1:])
        return SoftDTW(gamma=gamma, dist_func=lambda x, y: cost, use_cuda=device == "cuda", bandwidth=band)(x, y)

    return run


def tslearn(cost: Tensor, x_lengths: Tensor, y_lengths: Tensor, gamma: float) -> Tensor:
    from tslearn.metrics import SoftDTWLossPyTorch

    x, y = (cost.new_empty(cost.shape[0], size, 1) for size in cost.shape[1:])
    return SoftDTWLossPyTorch(gamma=gamma, dist_func=lambda x, y: cost)(x, y)
