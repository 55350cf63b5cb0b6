"""Soft dynamic time warping of padded batches, differentiable.

Cuturi & Blondel, "Soft-DTW: a Differentiable Loss Function for Time-Series", ICML 2017. With D the cost of a pair,

    R_ij = D_ij + softmin_gamma(R_{i-1,j-1}, R_{i-1,j}, R_{i,j-1}),    R_{0,0} = 0,  R_{i,0} = R_{0,j} = inf,
    softmin_gamma(a, b, ..) = -gamma log(exp(-a/gamma) + exp(-b/gamma) + ..),    value = R_{n,m}

for the pair's own lengths n <= N, m <= M. gamma has the unit of the cost; gamma = 0 is hard DTW (softmin = min; of
equal paths the one that, seen from the end, prefers diagonal, then row, then column steps). The value can be negative.

With ``drop_cost`` a row may be left out of the alignment at a price (soft Drop-DTW, after Dvornik et al., "Drop-DTW",
NeurIPS 2021): M_ij = D_ij + softmin(A_{i-1,j-1}, A_{i-1,j}, M_{i,j-1}), A_ij = softmin(M_ij, A_{i-1,j} + drop_i),
A_{i,0} = drop_1 + .. + drop_i, A_{0,j} = M_{i,0} = inf, value = A_{n,m}. A price of inf is plain soft-DTW.

Common to all functions here:

* ``x_lengths``, ``y_lengths``: int (B,), from 1 to N and M; None: nothing is padded. Padding may hold anything, also
  NaN. Lengths on a GPU are not read back: a bad one gives NaN for its sample alone.
* ``gamma``: float >= 0, or a tensor () or (B,) of positive values, which may require grad.
* ``band``: None; or an int w >= 0, which keeps the cells (i, j from 0) around the pair's diagonal with
  |j - i s| <= max(w, s/2 + 1/2), s = (m-1)/(n-1); or a pair (low, high) of int (B, N), the first and last column that
  each row may match.
* ``drop_cost``: None, a float, or a float tensor () or (B, N), which may require grad.
* ``backend``: None chooses; by name: "cuda", "cpu", "reference". The compiled ones serve gamma > 0, a float or a
  tensor, and any band, but no drop_cost; "reference" serves the rest. `lyra_ops.backend_of` tells. There an int band
  saves work, a pair of tensors saves none (it closes cells in a copy of the cost), and a gamma tensor takes a copy of
  the cost, too, rounded once more. Second derivatives need backend="reference": through a compiled one they raise
  NotImplementedError.
* A pair without any path (a band with a gap, infinite costs) has value +inf and gradient zero. NaN or -inf in a cell of
  the pair makes its value and gradient NaN, and no other's.
* 16-bit inputs are computed, and results returned, in float32; float64 in float64.
* ValueError or TypeError names the argument that has a wrong shape, dtype, device or value.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lyra_ops._backend import choose, missing_kernel
from lyra_ops._checks import FLOAT_DTYPES, INT_DTYPES, check_lengths, check_option, check_tensor, readable
from lyra_ops.soft_dtw import reference

COSTS = ("sqeuclidean", "l1", "cosine", "contrastive")


def soft_dtw(
    x: Tensor,
    y: Tensor,
    x_lengths: Tensor | None = None,
    y_lengths: Tensor | None = None,
    *,
    cost: str = "sqeuclidean",
    temperature: float = 1.0,
    gamma: float | Tensor = 1.0,
    band: reference.Band = None,
    drop_cost: float | Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Soft-DTW of the token sequences x (B, N, D) and y (B, M, D): (B,). Arguments as in the package's docstring.

    cost D_ij between x_i and y_j:

    * "sqeuclidean": |x_i - y_j|^2,
    * "l1": sum_d |x_id - y_jd|,
    * "cosine": 1 - x_i . y_j / (|x_i| |y_j|),
    * "contrastive": -log softmax_j(x_i . y_j / temperature), the softmax running over the pair's own m tokens of y, in
      or out of the band (Lyra's regularizer: speech tokens x, transcript tokens y, temperature 0.06, gamma 0.1,
      value / n; Zhong et al., "Lyra: An Efficient and Speech-Centric Framework for Omni-Cognition", 2024).

    ``temperature`` > 0 belongs to "contrastive" alone.
    """
    shape = check_features(x, y, cost, temperature)
    x_lengths, y_lengths, gamma, band, drop_cost = _check(
        shape, x.device, x_lengths, y_lengths, gamma, band, drop_cost, names=("x", "y")
    )
    backend = _choose("soft_dtw", x.device, gamma, drop_cost, backend)
    pairs = reference.pair_cost(x, y, x_lengths, y_lengths, cost, temperature)
    return _run(backend, pairs, x_lengths, y_lengths, gamma, band, drop_cost)


def soft_dtw_from_cost(
    cost: Tensor,
    x_lengths: Tensor | None = None,
    y_lengths: Tensor | None = None,
    *,
    gamma: float | Tensor = 1.0,
    band: reference.Band = None,
    drop_cost: float | Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Soft-DTW of a cost (B, N, M): (B,). Arguments as in the package's docstring."""
    cost = _check_cost(cost)
    arguments = _check(cost.shape, cost.device, x_lengths, y_lengths, gamma, band, drop_cost)
    backend = _choose("soft_dtw_from_cost", cost.device, arguments[2], arguments[4], backend)
    return _run(backend, cost, *arguments)


def soft_dtw_alignment(
    cost: Tensor,
    x_lengths: Tensor | None = None,
    y_lengths: Tensor | None = None,
    *,
    gamma: float | Tensor = 1.0,
    band: reference.Band = None,
    drop_cost: float | Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Expected alignment E = d soft_dtw / d cost, (B, N, M): how likely each cell is on the path, zero on padding.

    Arguments as in the package's docstring. Paths are distributed as exp(-cost of path / gamma); with ``drop_cost`` a
    row's sum is the expected number of its matches. E itself is differentiable where grad mode is on and an argument
    requires grad, which "reference" serves; under torch.no_grad() or with cost.detach() the compiled backends do.
    """
    cost = _check_cost(cost)
    arguments = _check(cost.shape, cost.device, x_lengths, y_lengths, gamma, band, drop_cost)
    sources = (cost, *(a for a in arguments if isinstance(a, Tensor)))
    differentiable = torch.is_grad_enabled() and any(t.requires_grad for t in sources)
    backend = _choose("soft_dtw_alignment", cost.device, arguments[2], arguments[4], backend, twice=differentiable)
    if backend == "reference":
        return reference.alignment(cost, *arguments, differentiable=differentiable)
    x_lengths, y_lengths, gamma, band, _ = arguments
    cost, band = _close_outside(cost, band)
    value, probs = _compiled_forward(cost, x_lengths, y_lengths, gamma, band)
    return torch.ops.lyra.soft_dtw_backward(torch.ones_like(value), probs, x_lengths, y_lengths, band)


def dtw_path(
    cost: Tensor,
    x_lengths: Tensor | None = None,
    y_lengths: Tensor | None = None,
    *,
    band: reference.Band = None,
    drop_cost: float | Tensor | None = None,
    backend: str | None = None,
) -> list[Tensor]:
    """The best hard alignment of each pair: B tensors int64 (n_steps, 2) of matched (row, column), from start to end.

    Arguments as in the package's docstring. Dropped rows do not appear; a pair without any path gives (0, 2).
    ValueError for a pair that holds NaN. The result's sizes depend on the data, so this waits for a GPU.
    """
    on_path = soft_dtw_alignment(
        cost.detach() if isinstance(cost, Tensor) else cost,
        x_lengths,
        y_lengths,
        gamma=0.0,
        band=band,
        drop_cost=drop_cost.detach() if isinstance(drop_cost, Tensor) else drop_cost,
        backend=backend,
    )
    for sample in on_path.isnan().any(dim=(1, 2)).nonzero().flatten().tolist():
        raise ValueError(f"cost: sample {sample} holds NaN or -inf, expected numbers on all cells that may be matched")
    # Steps never go back, so reading the cells row by row is reading the path.
    return [cells.nonzero() for cells in on_path]


def check_features(x: object, y: object, cost: str, temperature: float) -> tuple[int, int, int]:
    """Returns (B, N, M)."""
    check_tensor("x", x, shape=("B", "N", "D"), dtypes=FLOAT_DTYPES)
    check_tensor("y", y, shape=(x.shape[0], "M", x.shape[2]), dtypes=FLOAT_DTYPES, device=x.device)
    check_option("cost", cost, COSTS)
    if temperature <= 0 or (cost != "contrastive" and temperature != 1.0):
        raise ValueError(
            f"temperature: got {temperature} with cost={cost!r}, expected > 0, and 1.0 if not 'contrastive'"
        )
    return x.shape[0], x.shape[1], y.shape[1]


def _check_cost(cost: object) -> Tensor:
    cost = check_tensor("cost", cost, shape=("B", "N", "M"), dtypes=FLOAT_DTYPES)
    return cost.to(torch.promote_types(cost.dtype, torch.float32))


def _check(shape, device, x_lengths, y_lengths, gamma, band, drop_cost, names=("cost's rows", "cost's columns")):
    """Returns the arguments common to all functions in the form that `reference.soft_dtw` takes."""
    batch, rows, columns = shape
    x_lengths = check_lengths("x_lengths" if x_lengths is not None else names[0], x_lengths, batch, rows, device)
    y_lengths = check_lengths("y_lengths" if y_lengths is not None else names[1], y_lengths, batch, columns, device)

    if isinstance(gamma, Tensor):
        check_tensor("gamma", gamma, shape=(batch,) if gamma.dim() else (), dtypes=FLOAT_DTYPES, device=device)
        if readable(gamma) and not bool((gamma > 0).all()):
            raise ValueError("gamma: got a tensor with values <= 0 or NaN, expected > 0 (hard DTW is the float 0)")
    elif not isinstance(gamma, (int, float)):
        raise TypeError(f"gamma: got {type(gamma).__name__}, expected a float or a tensor")
    elif not 0 <= gamma < math.inf:
        raise ValueError(f"gamma: got {gamma}, expected 0 <= gamma < inf")

    if isinstance(band, (tuple, list)):
        if len(band) != 2:
            raise ValueError(f"band: got {len(band)} entries, expected the pair (low, high)")
        for name, bound in zip(("band[0]", "band[1]"), band):
            check_tensor(name, bound, shape=(batch, rows), dtypes=INT_DTYPES, device=device)
        band = tuple(band)
    elif isinstance(band, bool) or not isinstance(band, (int, type(None))):
        raise TypeError(f"band: got {type(band).__name__}, expected None, an int or a pair of int tensors")
    elif band is not None and band < 0:
        raise ValueError(f"band: got {band}, expected >= 0")

    if isinstance(drop_cost, Tensor):
        want = (batch, rows) if drop_cost.dim() else ()
        check_tensor("drop_cost", drop_cost, shape=want, dtypes=FLOAT_DTYPES, device=device)
        drop_cost = drop_cost.expand(batch, rows)
    elif isinstance(drop_cost, (int, float)):
        if not drop_cost > -math.inf:
            raise ValueError(f"drop_cost: got {drop_cost}, expected a number or inf")
        drop_cost = torch.full((batch, rows), float(drop_cost), dtype=torch.float64, device=device)
    elif drop_cost is not None:
        raise TypeError(f"drop_cost: got {type(drop_cost).__name__}, expected None, a float or a tensor")
    return x_lengths, y_lengths, gamma, band, drop_cost


def _choose(op, device, gamma, drop_cost, backend, *, twice=False) -> str:
    if not isinstance(gamma, Tensor) and gamma == 0:
        beyond = "gamma is 0"
    elif drop_cost is not None:
        beyond = "drop_cost is given"
    elif twice:
        beyond = "the alignment is to be differentiated"
    else:
        beyond = None
    why_not = {"reference": None}
    for name in ("cuda", "cpu"):
        if device.type != name:
            why_not[name] = f"the tensors are on {device.type}"
        elif beyond is not None:
            why_not[name] = f"{beyond}, which only 'reference' serves"
        else:
            why_not[name] = missing_kernel("soft_dtw_forward", name)
    return choose(op, why_not, backend)


def _run(backend, cost, x_lengths, y_lengths, gamma, band, drop_cost) -> Tensor:
    if backend == "reference":
        return reference.soft_dtw(cost, x_lengths, y_lengths, gamma, band, drop_cost)
    cost, band = _close_outside(cost, band)
    if torch.is_grad_enabled() and (cost.requires_grad or (isinstance(gamma, Tensor) and gamma.requires_grad)):
        return _SoftDTW.apply(cost, gamma, x_lengths, y_lengths, band)
    return _compiled_forward(cost, x_lengths, y_lengths, gamma, band)[0]


def _close_outside(cost: Tensor, band: reference.Band) -> tuple[Tensor, int]:
    """The cost and the band of the compiled ops, which know int bands alone; infinite cells say all the others."""
    if not isinstance(band, tuple):
        return cost, -1 if band is None else band
    low, high = band
    column = torch.arange(cost.shape[2], device=cost.device)
    return cost.masked_fill((column < low[:, :, None]) | (column > high[:, :, None]), math.inf), -1


def _compiled_forward(
    cost: Tensor, x_lengths: Tensor, y_lengths: Tensor, gamma: float | Tensor, band: int
) -> tuple[Tensor, Tensor]:
    if not isinstance(gamma, Tensor):
        return torch.ops.lyra.soft_dtw_forward(cost, x_lengths, y_lengths, float(gamma), band)
    # The op takes one number for all pairs. soft_dtw(C, gamma) = gamma soft_dtw(C / gamma, 1), with the same probs.
    gamma = gamma.to(cost.dtype)
    value, probs = torch.ops.lyra.soft_dtw_forward(cost / gamma.reshape(-1, 1, 1), x_lengths, y_lengths, 1.0, band)
    return value * gamma, probs


class _SoftDTW(torch.autograd.Function):
    @staticmethod
    def forward(ctx, cost: Tensor, gamma: float | Tensor, x_lengths: Tensor, y_lengths: Tensor, band: int) -> Tensor:
        value, probs = _compiled_forward(cost, x_lengths, y_lengths, gamma, band)
        ctx.save_for_backward(value, probs, x_lengths, y_lengths)
        ctx.band = band
        ctx.gamma_like = (gamma.shape, gamma.dtype) if isinstance(gamma, Tensor) else None
        return value

    @staticmethod
    def backward(ctx, grad_value: Tensor) -> tuple[Tensor | None, ...]:
        grad_cost, grad_gamma = _SoftDTWBackward.apply(grad_value, *ctx.saved_tensors, ctx.band), None
        if ctx.needs_input_grad[1]:
            # Minus the entropy of the paths, summed from that of each cell's steps: (value - <cost, E>) / gamma would
            # be the difference of two large numbers.
            shape, dtype = ctx.gamma_like
            grad_gamma = -(grad_cost * _step_entropy(ctx.saved_tensors[1])).sum(dim=(1, 2)).sum_to_size(shape).to(dtype)
        return grad_cost, grad_gamma, None, None, None


def _step_entropy(probs: Tensor) -> Tensor:
    """(B, N, M): entropy in nats of how the path came into each cell; the mark of a pair without a path counts as 0."""
    diagonal, up = probs.unbind(dim=-1)
    left = ((1 - diagonal) - up).clamp(min=0)
    return sum(torch.special.entr(share) for share in (diagonal, up, left))


class _SoftDTWBackward(torch.autograd.Function):
    """A function of its own so that a second derivative meets words instead of a missing term.

    ``value`` is here for that alone: it ties the gradient to the cost, which the probs of the forward op do not.
    """

    @staticmethod
    def forward(ctx, grad_value: Tensor, value: Tensor, probs: Tensor, x_lengths: Tensor, y_lengths: Tensor, band: int):
        return torch.ops.lyra.soft_dtw_backward(grad_value, probs, x_lengths, y_lengths, band)

    @staticmethod
    def backward(ctx, grad_cost: Tensor) -> None:
        raise NotImplementedError("soft_dtw: the compiled backends have no second derivative; pass backend='reference'")


if missing_kernel("soft_dtw_forward", "cpu") is None:

    @torch.library.register_fake("lyra::soft_dtw_forward")
    def _(cost, x_lengths, y_lengths, gamma, band):
        batch, rows, columns = cost.shape
        return cost.new_empty(batch), cost.new_empty(batch, rows, columns, 2)

    @torch.library.register_fake("lyra::soft_dtw_backward")
    def _(grad_value, probs, x_lengths, y_lengths, band):
        return probs.new_empty(probs.shape[:3])
