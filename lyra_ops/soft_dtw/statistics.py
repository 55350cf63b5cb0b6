"""What the distribution over alignments says beyond soft-DTW's value. Arguments as in the package's docstring."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lyra_ops._checks import FLOAT_DTYPES, check_lengths, check_tensor
from lyra_ops.soft_dtw import check_features, reference, soft_dtw_from_cost


class SoftDTWStatistics(NamedTuple):
    """Of paths drawn with probability p = exp((value - cost of path) / gamma); see `soft_dtw_statistics`."""

    value: Tensor
    expected_cost: Tensor
    entropy: Tensor
    path_length: Tensor
    durations: Tensor
    alignment: Tensor


def soft_dtw_statistics(
    cost: Tensor,
    x_lengths: Tensor | None = None,
    y_lengths: Tensor | None = None,
    *,
    gamma: float | Tensor = 1.0,
    band: reference.Band = None,
    drop_cost: float | Tensor | None = None,
    bits: int = 16,
    backend: str | None = None,
) -> SoftDTWStatistics:
    """Statistics of the alignments of a cost (B, N, M), by one forward and one backward pass.

    Paths have the probability p = exp((value - cost of path) / gamma), so that all follows from two derivatives:

    * ``value`` (B,): soft-DTW, = ``expected_cost`` - gamma ``entropy``;
    * ``expected_cost`` (B,): sum p (cost of path) = value - gamma d value / d gamma, the *sharp* soft-DTW <cost, E> of
      Blondel, Mensch & Vert, "Differentiable Divergences Between Time Series", AISTATS 2021. Prices of dropped rows
      belong to the cost of a path. Unit of the cost, never below hard DTW;
    * ``entropy`` (B,): -sum p log p = -d value / d gamma, in nats; from 0 (one path) to the log of the number of paths;
    * ``path_length`` (B,): expected number of matched cells, the sum of ``alignment``; in [max(n, m), n + m - 1] where
      nothing can be dropped;
    * ``durations`` (B, M): expected number of x tokens matched with each y token, column sums of ``alignment``; they
      add up to ``path_length``, not to n, because an x token may belong to several y tokens;
    * ``alignment`` (B, N, M): E = d value / d cost, as `soft_dtw_alignment`.

    gamma = 0: the best path alone, entropy 0. A pair without any path: value and expected cost +inf, the rest 0.

    All fields are differentiable where grad mode is on and cost, gamma or drop_cost requires grad. These are second
    derivatives of the value.
    """
    check_tensor("cost", cost, shape=("B", "N", "M"), dtypes=FLOAT_DTYPES)
    cost = cost.to(torch.promote_types(cost.dtype, torch.float32))
    differentiable = torch.is_grad_enabled() and any(
        isinstance(t, Tensor) and t.requires_grad for t in (cost, gamma, drop_cost)
    )
    batch = cost.shape[0]
    if isinstance(gamma, Tensor):
        check_tensor("gamma", gamma, shape=(batch,) if gamma.dim() else (), dtypes=FLOAT_DTYPES, device=cost.device)
    soft = isinstance(gamma, Tensor) or (isinstance(gamma, (int, float)) and 0 < gamma < math.inf)

    # Tensors of inference mode can take no part in a derivative, so what was made there is copied.
    with torch.inference_mode(False), torch.enable_grad():
        cost, gamma, drop_cost, x_lengths, y_lengths = map(_normal, (cost, gamma, drop_cost, x_lengths, y_lengths))
        band = tuple(map(_normal, band)) if isinstance(band, (tuple, list)) else band
        if not differentiable:
            gamma, drop_cost = (t.detach() if isinstance(t, Tensor) else t for t in (gamma, drop_cost))
        if not (differentiable and cost.requires_grad):
            cost = cost.detach().requires_grad_()
        if soft:  # a gamma per sample, so that one backward pass gives the slope of each
            gamma = torch.as_tensor(gamma, dtype=None if isinstance(gamma, Tensor) else torch.float64).to(cost.device)
            gamma = gamma.expand(batch) if gamma.requires_grad else gamma.expand(batch).clone().requires_grad_()
        options = {"gamma": gamma, "band": band, "drop_cost": drop_cost, "bits": bits, "backend": backend}
        value = soft_dtw_from_cost(cost, x_lengths, y_lengths, **options)
        sources = (cost, gamma) if soft else (cost,)
        alignment, *slope = torch.autograd.grad(value.sum(), sources, create_graph=differentiable)
        if not differentiable:
            value = value.detach()
        entropy = -slope[0].to(value.dtype) if soft else torch.zeros_like(value)
        durations = alignment.sum(dim=1)
        return SoftDTWStatistics(
            value=value,
            expected_cost=value + (gamma.detach() if not differentiable else gamma) * entropy if soft else value,
            entropy=entropy,
            path_length=durations.sum(dim=1),
            durations=durations,
            alignment=alignment,
        )


def pair_cost(
    x: Tensor,
    y: Tensor,
    x_lengths: Tensor | None = None,
    y_lengths: Tensor | None = None,
    *,
    cost: str = "sqeuclidean",
    temperature: float = 1.0,
) -> Tensor:
    """The cost (B, N, M) that `soft_dtw` aligns x (B, N, D) and y (B, M, D) by; its arguments, formulas and errors.

    For what takes a cost: `soft_dtw_alignment`, `soft_dtw_statistics`, `dtw_path`. Padding holds finite numbers or inf.
    """
    batch, rows, columns = check_features(x, y, cost, temperature)
    x_lengths = check_lengths("x_lengths" if x_lengths is not None else "x", x_lengths, batch, rows, x.device)
    y_lengths = check_lengths("y_lengths" if y_lengths is not None else "y", y_lengths, batch, columns, x.device)
    return reference.pair_cost(x, y, x_lengths, y_lengths, cost, temperature)


def _normal(value: object) -> object:
    return value.clone() if isinstance(value, Tensor) and value.is_inference() else value
