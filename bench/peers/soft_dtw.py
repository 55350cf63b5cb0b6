"""Other people's soft-DTW from a given cost: {name: function(cost, x_lengths, y_lengths, gamma) -> (B,)}.

A package that is not installed is left out, as is one that cannot do what is asked for: see `implementations`.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import Tensor

Peer = Callable[[Tensor, Tensor, Tensor, float], Tensor]


def implementations(device: str, ragged: bool) -> dict[str, Peer]:
    """``ragged``: the lengths of the samples differ, which tslearn cannot take, and pysdtw only as packed sequences."""
    peers: dict[str, Peer] = {"plain torch (anti-diagonals)": torch_antidiagonals}
    if find_spec("ddtw"):
        backend = "cuda_cpp" if device == "cuda" else "cpu_numba"  # its torch backend takes a second for 60 x 30
        peers[f"ddtw ({backend})"] = ddtw(backend)
    if not ragged and find_spec("pysdtw") and find_spec("numba"):
        peers["pysdtw (numba)"] = pysdtw(device)
    if not ragged and device == "cpu" and find_spec("tslearn"):
        peers["tslearn (numba)"] = tslearn
    return peers


def torch_antidiagonals(cost: Tensor, x_lengths: Tensor, y_lengths: Tensor, gamma: float) -> Tensor:
    """The usual way to write it in torch: one logsumexp per anti-diagonal, the gradient left to autograd."""
    batch, rows, columns = cost.shape
    big = 1e10  # a true infinity would make NaN gradients
    before = cost.new_full((batch, columns + 1), big)
    before[:, 0] = 0
    last = cost.new_full((batch, columns + 1), big)
    edge = cost.new_full((batch, 1), big)
    j = torch.arange(columns, device=cost.device)
    diagonals = []
    for k in range(rows + columns - 1):
        i = k - j
        step = torch.where((i >= 0) & (i < rows), cost[:, i.clamp(0, rows - 1), j], big)
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


def pysdtw(device: str) -> Peer:
    def run(cost: Tensor, x_lengths: Tensor, y_lengths: Tensor, gamma: float) -> Tensor:
        from pysdtw import SoftDTW

        x, y = (cost.new_empty(cost.shape[0], size, 1) for size in cost.shape[1:])
        return SoftDTW(gamma=gamma, dist_func=lambda x, y: cost, use_cuda=device == "cuda")(x, y)

    return run


def tslearn(cost: Tensor, x_lengths: Tensor, y_lengths: Tensor, gamma: float) -> Tensor:
    from tslearn.metrics import SoftDTWLossPyTorch

    x, y = (cost.new_empty(cost.shape[0], size, 1) for size in cost.shape[1:])
    return SoftDTWLossPyTorch(gamma=gamma, dist_func=lambda x, y: cost)(x, y)
