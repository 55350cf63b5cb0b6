"""Soft-DTW as training losses. Arguments that are not explained here: the package's docstring."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lyra_ops._checks import check_lengths, check_option, check_tensor, readable
from lyra_ops.soft_dtw import COSTS, check_features, reference, soft_dtw, soft_dtw_from_cost
from lyra_ops.soft_dtw.statistics import pair_cost, soft_dtw_statistics

SYMMETRIC_COSTS = tuple(name for name in COSTS if name != "contrastive")


def soft_dtw_divergence(
    x: Tensor,
    y: Tensor,
    x_lengths: Tensor | None = None,
    y_lengths: Tensor | None = None,
    *,
    cost: str = "sqeuclidean",
    gamma: float | Tensor = 1.0,
    band: int | None = None,
    bits: int = 16,
    sharp: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Debiased soft-DTW of x (B, N, D) and y (B, M, D), any N and M: (B,), zero where x equals y.

        S(x, y) - S(x, x) / 2 - S(y, y) / 2

    with S soft-DTW or, ``sharp``, the expected cost of a path (`soft_dtw_statistics`). Soft-DTW itself is neither zero
    nor least at x = y (Blondel, Mensch & Vert, "Differentiable Divergences Between Time Series", AISTATS 2021).
    "sqeuclidean" gives the least value, zero, at x = y in practice; "l1" and "cosine" are not known to.

    ``cost``: a symmetric one, so not "contrastive". ``band``: None or an int, which holds for all three pairs.
    """
    check_option("cost", cost, SYMMETRIC_COSTS)
    if isinstance(band, (tuple, list)):
        raise TypeError("band: got a pair of tensors, expected None or an int: x is aligned with itself, too")

    def value(a: Tensor, b: Tensor, a_lengths: Tensor | None, b_lengths: Tensor | None) -> Tensor:
        options = {"gamma": gamma, "band": band, "bits": bits, "backend": backend}
        if not sharp:
            return soft_dtw(a, b, a_lengths, b_lengths, cost=cost, **options)
        pairs = pair_cost(a, b, a_lengths, b_lengths, cost=cost)
        return soft_dtw_statistics(pairs, a_lengths, b_lengths, **options).expected_cost

    check_features(x, y, cost, 1.0)
    itself = value(x, x, x_lengths, x_lengths) + value(y, y, y_lengths, y_lengths)
    return value(x, y, x_lengths, y_lengths) - itself / 2


class SoftDTWLoss(nn.Module):
    """Soft-DTW of a batch as one number; samples that have nothing to align are left out.

        mean over samples with n > 0 and m > 0 of  S(x, y) / length

    >>> loss = lyra_ops.SoftDTWLoss(cost="contrastive", temperature=0.06, gamma=0.1, normalize="x")
    >>> loss(speech, transcript, speech_lengths, transcript_lengths)

    is the latent cross-modality regularizer of Lyra (Zhong et al., arXiv 2412.09501, equations 1 and 2).

    Args:
        cost, temperature, gamma, band, drop_cost, bits, backend: as for `soft_dtw`. A gamma that is an nn.Parameter is
            learned.
        divergence: S is `soft_dtw_divergence` (band: None or an int; no contrastive cost, no drop_cost).
        normalize: length that each sample's value is divided by: None (1), "x" (n), "y" (m) or "path", the expected
            number of matched cells of x with y (`soft_dtw_statistics`).
        reduction: "mean" or "sum" of the samples that are not left out, or "none": (B,), 0 for those left out.

    A sample whose x or y has length 0 adds nothing to value or gradient, whatever its tensors hold; a batch of nothing
    else gives 0. The mean is over the samples of this call, so over each process's own under DistributedDataParallel.
    """

    def __init__(
        self,
        *,
        cost: str = "sqeuclidean",
        temperature: float = 1.0,
        gamma: float | Tensor = 1.0,
        band: reference.Band = None,
        drop_cost: float | Tensor | None = None,
        bits: int = 16,
        divergence: bool = False,
        normalize: str | None = None,
        reduction: str = "mean",
        backend: str | None = None,
    ) -> None:
        super().__init__()
        check_option("normalize", normalize, (None, "x", "y", "path"))
        check_option("reduction", reduction, ("mean", "sum", "none"))
        check_option("bits", bits, (16, 8))
        check_option("cost", cost, SYMMETRIC_COSTS if divergence else COSTS)
        if divergence and drop_cost is not None:
            raise ValueError(f"drop_cost: got {drop_cost} with divergence=True, expected None")
        self.cost, self.temperature, self.gamma, self.band, self.drop_cost = cost, temperature, gamma, band, drop_cost
        self.bits, self.divergence, self.normalize = bits, divergence, normalize
        self.reduction, self.backend = reduction, backend

    def forward(self, x: Tensor, y: Tensor, x_lengths: Tensor | None = None, y_lengths: Tensor | None = None) -> Tensor:
        """x (B, N, D), y (B, M, D), lengths from 0 to N and M: (), or (B,) for reduction "none"."""
        batch, rows, columns = check_features(x, y, self.cost, self.temperature)
        x_lengths = check_lengths("x_lengths", x_lengths, batch, rows, x.device, least=0)
        y_lengths = check_lengths("y_lengths", y_lengths, batch, columns, x.device, least=0)
        real = (x_lengths != 0) & (y_lengths != 0)
        if not readable(real) or not bool(real.all()):
            # Each of the others becomes a pair of one harmless token: a kernel would carry a NaN past a gradient of 0.
            x, y = (F.pad(t, (0, 0, 0, max(1 - t.shape[1], 0))) for t in (x, y))
            x, y = (torch.where(real[:, None, None], t, torch.ones_like(t)) for t in (x, y))
            x_lengths, y_lengths = (n.masked_fill(~real, 1) for n in (x_lengths, y_lengths))
        values = self._values(x, y, x_lengths, y_lengths).masked_fill(~real, 0)
        if self.reduction == "none":
            return values
        return values.sum() / (real.sum().clamp(min=1) if self.reduction == "mean" else 1)

    def _values(self, x: Tensor, y: Tensor, x_lengths: Tensor, y_lengths: Tensor) -> Tensor:
        options = {"gamma": self.gamma, "band": self.band, "bits": self.bits, "backend": self.backend}
        statistics = None
        if self.normalize == "path":
            pairs = pair_cost(x, y, x_lengths, y_lengths, cost=self.cost, temperature=self.temperature)
            statistics = soft_dtw_statistics(pairs, x_lengths, y_lengths, drop_cost=self.drop_cost, **options)
        if self.divergence:
            value = soft_dtw_divergence(x, y, x_lengths, y_lengths, cost=self.cost, **options)
        elif statistics is not None:
            value = statistics.value
        else:
            options |= {"cost": self.cost, "temperature": self.temperature, "drop_cost": self.drop_cost}
            value = soft_dtw(x, y, x_lengths, y_lengths, **options)
        if self.normalize is None:
            return value
        if statistics is not None:
            return value / statistics.path_length.masked_fill(statistics.value.isposinf(), 1)  # no path has no length
        return value / (x_lengths if self.normalize == "x" else y_lengths)

    def extra_repr(self) -> str:
        names = ("cost", "temperature", "gamma", "band", "drop_cost", "divergence", "normalize", "reduction")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)


class SoftDTW(nn.Module):
    """Soft-DTW with the signature of Maghoumi's pytorch-softdtw-cuda and its many copies: one import to change.

    Called as there: (X (B, N, D), Y (B, M, D)) -> (B,). What is the same, and what is better:

    Args:
        use_cuda: the device of the tensors decides what runs. True refuses tensors that are not on a GPU, as there;
            False on a GPU stays there, where the original moves to the CPU and back.
        gamma: > 0; here also 0, which is hard DTW.
        normalize: SD(X, Y) - (SD(X, X) + SD(Y, Y)) / 2. Here X and Y may differ in length.
        bandwidth: cells with |i - j| > bandwidth are closed; None and 0 close none. So no path is left where
            |N - M| > bandwidth, and the value +inf, here with gradient 0 instead of NaN. (`soft_dtw`'s int band
            follows the diagonal of the pair and always leaves one.)
        dist_func: function of (X, Y) that returns the cost (B, N, M); None: squared Euclidean distance, here without
            the (B, N, M, D) tensor.

    There the backward pass rebuilds its weights from differences of rounded sums, so that the gradient in float32 is
    wrong by more, the longer the pair and the smaller gamma (`python -m bench.accuracy.soft_dtw`), and a side
    of more than 1024 tokens moves to the CPU. Neither happens here. 16-bit inputs give a float32 result.
    """

    def __init__(
        self,
        use_cuda: bool,
        gamma: float = 1.0,
        normalize: bool = False,
        bandwidth: float | None = None,
        dist_func: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(bandwidth, (int, float, type(None))):
            raise TypeError(f"bandwidth: got {type(bandwidth).__name__}, expected None or a number >= 0")
        if bandwidth is not None and not bandwidth >= 0:
            raise ValueError(f"bandwidth: got {bandwidth}, expected None or a number >= 0")
        if dist_func is not None and not callable(dist_func):
            raise TypeError(f"dist_func: got {type(dist_func).__name__}, expected None or a function")
        self.use_cuda, self.gamma, self.normalize = use_cuda, gamma, normalize
        self.bandwidth, self.dist_func = bandwidth or 0, dist_func

    def forward(self, X: Tensor, Y: Tensor) -> Tensor:
        check_features(X, Y, "sqeuclidean", 1.0)
        if self.use_cuda and X.device.type != "cuda":
            raise ValueError(f"X: got a tensor on {X.device}, expected one on a GPU, as use_cuda=True says")
        value = self._value(X, Y)
        if not self.normalize:
            return value
        return value - (self._value(X, X) + self._value(Y, Y)) / 2

    def _value(self, x: Tensor, y: Tensor) -> Tensor:
        band = None
        if 0 < self.bandwidth < math.inf:
            i, reach = torch.arange(x.shape[1], device=x.device), math.floor(self.bandwidth)
            low, high = (i - reach).clamp(min=0), (i + reach).clamp(max=y.shape[1] - 1)
            band = tuple(bound.expand(x.shape[0], -1) for bound in (low, high))
        if self.dist_func is None:
            return soft_dtw(x, y, gamma=self.gamma, band=band)
        shape = x.shape[0], x.shape[1], y.shape[1]
        cost = check_tensor("dist_func's result", self.dist_func(x, y), shape=shape)
        return soft_dtw_from_cost(cost, gamma=self.gamma, band=band)
