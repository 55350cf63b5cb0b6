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
* ``bits``: 16 or 8, of each probability that the compiled backends keep for backward: 4 or 2 bytes per cell (half as
  much again with ``drop_cost``), with an int band per cell inside it. Relative L2 error of a gradient: at most 1e-4 and
  1e-2 on the inputs of bench/accuracy. The value does not depend on it. float64 keeps doubles.
* ``backend``: None chooses; by name: "cuda", "cpu", "reference" (slowly). `lyra_ops.backend_of` tells.
* Differentiable twice, in cost, gamma and drop_cost.
* A pair without any path (a band with a gap, infinite costs) has value +inf and gradient zero. NaN or -inf in a cell of
  the pair makes its value and gradient NaN, and no other's.
* 16-bit inputs are computed, and results returned, in float32; float64 in float64.
* ValueError or TypeError names the argument that has a wrong shape, dtype, device or value.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lyra_ops._backend import choose, missing_kernel, register_fake
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
    bits: int = 16,
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

    On a GPU the products of 16-bit tokens run on tensor cores, with sums in float32. Second derivatives, "l1" and
    float64 go through a dense cost (B, N, M) there.
    """
    shape = check_features(x, y, cost, temperature)
    arguments = _check(shape, x.device, x_lengths, y_lengths, gamma, band, drop_cost, bits, names=("x", "y"))
    backend = _choose("soft_dtw", x.device, backend)
    if backend == "cpu" and not torch.compiler.is_compiling():
        from lyra_ops.soft_dtw import features

        return features.soft_dtw(x, y, arguments, cost, temperature)
    if backend == "cuda":
        from lyra_ops.soft_dtw import features_cuda

        if features_cuda.serves(x, y, cost):
            return features_cuda.soft_dtw(x, y, arguments, cost, temperature)
    return _run(backend, reference.pair_cost(x, y, *arguments[:2], cost, temperature), arguments)


def soft_dtw_from_cost(
    cost: Tensor,
    x_lengths: Tensor | None = None,
    y_lengths: Tensor | None = None,
    *,
    gamma: float | Tensor = 1.0,
    band: reference.Band = None,
    drop_cost: float | Tensor | None = None,
    bits: int = 16,
    backend: str | None = None,
) -> Tensor:
    """Soft-DTW of a cost (B, N, M): (B,). Arguments as in the package's docstring."""
    cost = _check_cost(cost)
    arguments = _check(cost.shape, cost.device, x_lengths, y_lengths, gamma, band, drop_cost, bits)
    return _run(_choose("soft_dtw_from_cost", cost.device, backend), cost, arguments)


def soft_dtw_alignment(
    cost: Tensor,
    x_lengths: Tensor | None = None,
    y_lengths: Tensor | None = None,
    *,
    gamma: float | Tensor = 1.0,
    band: reference.Band = None,
    drop_cost: float | Tensor | None = None,
    bits: int = 16,
    backend: str | None = None,
) -> Tensor:
    """Expected alignment E = d soft_dtw / d cost, (B, N, M): how likely each cell is on the path, zero on padding.

    Arguments as in the package's docstring. Paths are distributed as exp(-cost of path / gamma); with ``drop_cost`` a
    row's sum is the expected number of its matches. E itself is differentiable where grad mode is on and an argument
    requires grad.
    """
    cost = _check_cost(cost)
    arguments = _check(cost.shape, cost.device, x_lengths, y_lengths, gamma, band, drop_cost, bits)
    sources = (cost, *(a for a in arguments if isinstance(a, Tensor)))
    differentiable = torch.is_grad_enabled() and any(t.requires_grad for t in sources)
    backend = _choose("soft_dtw_alignment", cost.device, backend)
    if backend == "reference":
        return reference.alignment(cost, *arguments[:5], differentiable=differentiable)
    if differentiable:
        cost = cost if cost.requires_grad else cost.detach().requires_grad_()
        return torch.autograd.grad(_run(backend, cost, arguments).sum(), cost, create_graph=True)[0]
    sources, problem, options, store = _raw(cost, arguments)
    if backend == "cpu":
        return _with_gradient(*sources, *problem, *options, store)[1]
    value, probs = _forward(*sources, *problem, *options, store)
    return _backward(torch.ones_like(value), *sources, *problem, value, probs, *options)[0]


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
    if not isinstance(temperature, (int, float)):
        raise TypeError(f"temperature: got {type(temperature).__name__}, expected a float")
    if not 0 < temperature < math.inf or (cost != "contrastive" and temperature != 1.0):
        raise ValueError(
            f"temperature: got {temperature} with cost={cost!r}, expected > 0, and 1.0 if not 'contrastive'"
        )
    return x.shape[0], x.shape[1], y.shape[1]


def _check_cost(cost: object) -> Tensor:
    cost = check_tensor("cost", cost, shape=("B", "N", "M"), dtypes=FLOAT_DTYPES)
    return cost.float() if cost.dtype.itemsize < 4 else cost


class _Arguments(NamedTuple):
    """What is common to all functions, checked, in the form that `reference.soft_dtw` takes; then what it does not."""

    x_lengths: Tensor
    y_lengths: Tensor
    gamma: float | Tensor
    band: reference.Band
    drop_cost: Tensor | None
    bits: int


def _check(
    shape, device, x_lengths, y_lengths, gamma, band, drop_cost, bits, names=("cost's rows", "cost's columns")
) -> _Arguments:
    batch, rows, columns = shape
    x_lengths = check_lengths("x_lengths" if x_lengths is not None else names[0], x_lengths, batch, rows, device)
    y_lengths = check_lengths("y_lengths" if y_lengths is not None else names[1], y_lengths, batch, columns, device)

    if isinstance(gamma, Tensor):
        check_tensor("gamma", gamma, shape=(batch,) if gamma.dim() else (), dtypes=FLOAT_DTYPES, device=device)
        if readable(gamma) and not bool(((gamma > 0) & (gamma < math.inf)).all()):
            raise ValueError("gamma: got a tensor with values <= 0, inf or NaN, expected > 0 (hard DTW is the float 0)")
    elif not isinstance(gamma, (int, float)):
        raise TypeError(f"gamma: got {type(gamma).__name__}, expected a float or a tensor")
    elif not 0 <= gamma <= sys.float_info.max:
        raise ValueError(f"gamma: got {gamma}, expected 0 <= gamma < inf")
    elif 0 < gamma < sys.float_info.min:
        raise ValueError(f"gamma: got {gamma}, expected 0 or at least {sys.float_info.min}")

    if isinstance(band, (tuple, list)):
        if len(band) != 2:
            raise ValueError(f"band: got {len(band)} entries, expected the pair (low, high)")
        for name, bound in zip(("band[0]", "band[1]"), band):
            check_tensor(name, bound, shape=(batch, rows), dtypes=INT_DTYPES, device=device)
        band = tuple(band)
    elif isinstance(band, bool) or not isinstance(band, (int, type(None))):
        raise TypeError(f"band: got {type(band).__name__}, expected None, an int or a pair of int tensors")
    elif band is not None and not 0 <= band < 2**63:
        raise ValueError(f"band: got {band}, expected >= 0, and below 2^63")

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
    check_option("bits", bits, (16, 8))
    return _Arguments(x_lengths, y_lengths, gamma, band, drop_cost, bits)


def _choose(op: str, device: torch.device, backend: str | None) -> str:
    why_not = {"reference": None}
    for name in ("cuda", "cpu"):
        if device.type != name:
            why_not[name] = f"the tensors are on {device.type}"
        elif not torch.compiler.is_compiling() and _transformed():
            why_not[name] = "the transforms of torch.func and forward-mode differentiation look into 'reference' alone"
        else:
            why_not[name] = missing_kernel("soft_dtw_forward", name)
    return choose(op, why_not, backend)


def _transformed() -> bool:
    """Whether tensors may carry tangents or be batched by vmap: a raw op would give them a tangent of zero."""
    return torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0


def _run(backend: str, cost: Tensor, arguments: _Arguments) -> Tensor:
    if backend == "reference":
        return reference.soft_dtw(cost, *arguments[:5])
    sources, problem, options, store = _raw(cost, arguments)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in sources):
        # The gradient takes 4 bytes a cell, as 16-bit shares do; those of a band and of 8 bits take less.
        at_once = backend == "cpu" and options[1] < 0 and store != 8 and not torch.compiler.is_compiling()
        return (_SoftDTWAtOnce if at_once else _SoftDTW).apply(*sources, *problem, *options, store)
    return _forward(*sources, *problem, *options, 0)[0]


def _raw(cost: Tensor, arguments: _Arguments) -> tuple[tuple, tuple, tuple, int]:
    """The arguments as the raw ops take them: (cost, gammas, drop), (lengths, windows), (gamma, band), store."""
    x_lengths, y_lengths, gamma, band, drop, bits = arguments
    gammas, low, high = None, None, None
    if isinstance(gamma, Tensor):
        gammas = gamma.to(torch.promote_types(gamma.dtype, torch.float32)).expand(cost.shape[0]).contiguous()
        gamma = 1.0  # not used
    if isinstance(band, tuple):
        low, high = (bound.to(torch.int64).contiguous() for bound in band)
    if drop is not None:
        drop = drop.to(cost.dtype).contiguous()
    store = 64 if cost.dtype == torch.float64 else bits
    options = float(gamma), band if isinstance(band, int) else -1
    return (cost, gammas, drop), (x_lengths, y_lengths, low, high), options, store


def _forward(
    cost: Tensor,
    gammas: Tensor | None,
    drop: Tensor | None,
    x_lengths: Tensor,
    y_lengths: Tensor,
    low: Tensor | None,
    high: Tensor | None,
    gamma: float,
    band: int,
    store: int,
) -> tuple[Tensor, Tensor]:
    return torch.ops.lyra.soft_dtw_forward(cost, x_lengths, y_lengths, gamma, gammas, band, low, high, drop, store)


def _backward(
    grad_value: Tensor,
    cost: Tensor,
    gammas: Tensor | None,
    drop: Tensor | None,
    x_lengths: Tensor,
    y_lengths: Tensor,
    low: Tensor | None,
    high: Tensor | None,
    value: Tensor,
    probs: Tensor,
    gamma: float,
    band: int,
    with_entropy: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    problem = x_lengths, y_lengths, cost.shape[1], cost.shape[2], band, low, high
    return torch.ops.lyra.soft_dtw_backward(
        grad_value, value, probs, *problem, drop is not None, gamma == 0, with_entropy
    )


def _with_gradient(
    cost: Tensor,
    gammas: Tensor | None,
    drop: Tensor | None,
    x_lengths: Tensor,
    y_lengths: Tensor,
    low: Tensor | None,
    high: Tensor | None,
    gamma: float,
    band: int,
    store: int,
    with_entropy: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`_forward` and, for a grad_value of ones, `_backward`; on a CPU."""
    return torch.ops.lyra.soft_dtw_gradient(
        cost, x_lengths, y_lengths, gamma, gammas, band, low, high, drop, store, with_entropy
    )


class _SoftDTW(torch.autograd.Function):
    @staticmethod
    def forward(ctx, cost, gammas, drop, x_lengths, y_lengths, low, high, gamma, band, store) -> Tensor:
        value, probs = _forward(cost, gammas, drop, x_lengths, y_lengths, low, high, gamma, band, store)
        ctx.save_for_backward(cost, gammas, drop, x_lengths, y_lengths, low, high, value, probs)
        ctx.options = gamma, band
        return value

    @staticmethod
    def backward(ctx, grad_value: Tensor) -> tuple[Tensor | None, ...]:
        arguments = grad_value, *ctx.saved_tensors, *ctx.options
        if torch.is_grad_enabled():
            return *_Gradient.apply(*arguments), *[None] * 7
        return *_gradients(*arguments, of_gamma=ctx.needs_input_grad[1]), *[None] * 7


class _SoftDTWAtOnce(torch.autograd.Function):
    """Keeps, instead of shares, the gradient, worked out pair by pair while the shares are in the cache.

    Backward turns it, where it lies, into its result, since new memory takes longer to get than to fill. Whoever
    then wants the gradient again (of a retained graph), or another derivative, waits for shares to be made after all.
    """

    @staticmethod
    def forward(ctx, cost, gammas, drop, x_lengths, y_lengths, low, high, gamma, band, store) -> Tensor:
        arguments = cost, gammas, drop, x_lengths, y_lengths, low, high, gamma, band, store
        value, *gradients = _with_gradient(*arguments, ctx.needs_input_grad[1])
        ctx.save_for_backward(*arguments[:7], *gradients)
        ctx.options, ctx.taken = arguments[7:], False
        return value

    @staticmethod
    def backward(ctx, grad_value: Tensor) -> tuple[Tensor | None, ...]:
        *arguments, grad_cost, grad_drop, entropy = ctx.saved_tensors
        gamma, band, store = ctx.options
        if ctx.taken or torch.is_grad_enabled():
            with torch.no_grad():
                kept = _forward(*arguments, gamma, band, store)
            arguments = grad_value, *arguments, *kept, gamma, band
            if torch.is_grad_enabled():
                return *_Gradient.apply(*arguments), *[None] * 7
            return *_gradients(*arguments, of_gamma=ctx.needs_input_grad[1]), *[None] * 7
        _, gammas, drop, *_ = arguments
        if torch._C._has_storage(grad_value):
            ctx.taken = True
            grad_cost = grad_cost.data  # what is saved is not asked for again
            if not readable(grad_value) or grad_value.tolist().count(1) < len(grad_value):  # not of a plain sum
                grad_cost.mul_(grad_value[:, None, None])
        else:  # of vmap (is_grads_batched): many gradients in one call
            grad_cost = grad_cost * grad_value[:, None, None]
        grad_gamma = (-grad_value * entropy).to(gammas.dtype) if ctx.needs_input_grad[1] else None
        return grad_cost, grad_gamma, None if drop is None else grad_value[:, None] * grad_drop, *[None] * 7


def _gradients(grad_value, cost, gammas, drop, *rest, of_gamma: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """grad_value times the gradient of the value in cost, gammas (if ``of_gamma``) and drop."""
    grad_cost, grad_drop, entropy = _backward(grad_value, cost, gammas, drop, *rest, of_gamma)
    # d value / d gamma is minus the entropy of the paths, summed from that of each cell's steps:
    # (value - <cost, E>) / gamma would be the difference of two large numbers.
    grad_gamma = (-grad_value * entropy).to(gammas.dtype) if of_gamma else None
    return grad_cost, grad_gamma, None if drop is None else grad_drop


class _Gradient(torch.autograd.Function):
    """`_gradients`, whose own derivative is the second one.

    The cost is here for its place in the graph alone: all that is needed of it is in the shares.
    """

    @staticmethod
    def forward(ctx, grad_value, cost, gammas, drop, *rest) -> tuple[Tensor | None, ...]:
        tensors, options = rest[:6], rest[6:]
        ctx.save_for_backward(grad_value, cost, gammas, drop, *tensors)
        ctx.options = options
        ctx.set_materialize_grads(False)
        return _gradients(grad_value, cost, gammas, drop, *rest, of_gamma=ctx.needs_input_grad[2])

    @staticmethod
    def backward(
        ctx, along: Tensor | None, along_gamma: Tensor | None, along_drop: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        if along is None and along_gamma is None and along_drop is None:
            return (None,) * 12
        grad_value, cost, gammas, drop, x_lengths, y_lengths, low, high, value, probs = ctx.saved_tensors
        with torch.no_grad():
            slope, grad_cost, grad_drop, grad_gamma = torch.ops.lyra.soft_dtw_curvature(
                grad_value,
                value,
                probs,
                x_lengths,
                y_lengths,
                ctx.options[0],
                gammas,
                ctx.options[1],
                low,
                high,
                drop is not None,
                value.new_zeros(cost.shape) if along is None else along,
                along_drop,
                None if along_gamma is None else along_gamma.to(value.dtype),
            )
            grad_gamma = None if gammas is None else grad_gamma.to(gammas.dtype)
        second = slope, grad_cost, grad_gamma, None if drop is None else grad_drop
        sources = grad_value, cost, gammas, drop, along, along_gamma, along_drop
        return *without_derivative(second, sources), *[None] * 8


def without_derivative(second: Sequence[Tensor | None], sources: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
    """Second derivatives that refuse to be differentiated in what they were made of.

    `torch.autograd.function.once_differentiable` refuses only where a backward pass comes by: `torch.autograd.grad` of
    these sources does not, and would leave out this part of a sum.
    """
    if not torch.is_grad_enabled():
        return second
    real = iter(_SecondDerivative.apply(len(second), *second, *sources))
    return [None if t is None else next(real) for t in second]


class _SecondDerivative(torch.autograd.Function):
    @staticmethod
    def forward(ctx, count: int, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        return tuple(t.view_as(t) for t in tensors[:count] if t is not None)

    @staticmethod
    def backward(ctx, *along: Tensor) -> None:
        raise RuntimeError(
            "soft_dtw: third derivatives are none of the compiled backends'; backend='reference' has them"
        )


def band_rows_on_cuda(rows: int, columns: int, band: int) -> int:
    """Of a pair's strips, at most; csrc/soft_dtw/pairs.h: band_rows_per_pair."""
    width = torch.sym_max(2 * torch.sym_min(band, columns) * rows, rows + columns)
    return width // 32 + 2 * rows + columns // 8 + 1


def kept_bytes_on_cuda(rows: int, columns: int, band: int, store: int, dropping: bool) -> int:
    """Of a pair's shares; csrc/soft_dtw/pairs.h: steps_per_pair; cells.h: Kept::bytes."""
    lanes, tail, block = 32, 62, 16
    strips = torch.sym_max((columns + lanes - 1) // lanes, 1)
    steps = strips * ((rows + tail + block - 1) // block * block)
    if band >= 0:
        steps = torch.sym_min(steps, band_rows_on_cuda(rows, columns, band) + strips * (tail + block - 1))
    return lanes * steps * (8 if store == 64 else store // 8) * (3 if dropping else 2)


@register_fake("soft_dtw_forward")
def _(cost, x_lengths, y_lengths, gamma, gammas, band, low, high, drop, store):
    batch, rows, columns = cost.shape
    bytes_per_share = 8 if store == 64 else store // 8
    if cost.device.type == "cuda":
        kept = kept_bytes_on_cuda(rows, columns, band, store, drop is not None)
        return cost.new_empty(batch), cost.new_empty(batch, kept, dtype=torch.uint8)
    # csrc/soft_dtw/cpu/stripe.h: most_steps, record_bytes
    lanes, reach = 8, 15
    stripes = (rows + lanes - 1) // lanes
    steps = stripes * (columns + reach)
    if band >= 0:
        steps = torch.sym_min(steps, stripes * (2 * torch.sym_min(band, columns) + 2 + reach) + 2 * columns)
    record = lanes * bytes_per_share * (2 if drop is None else 3)
    return cost.new_empty(batch), cost.new_empty(batch, steps * record, dtype=torch.uint8)


@register_fake("soft_dtw_backward")
def _(grad_value, value, probs, x_lengths, y_lengths, rows, columns, band, low, high, dropping, hard, with_entropy):
    batch = value.shape[0]
    return (
        value.new_empty(batch, rows, columns),
        value.new_empty((batch, rows) if dropping else 0),
        value.new_empty(batch if with_entropy else 0),
    )


@register_fake("soft_dtw_gradient")
def _(cost, x_lengths, y_lengths, gamma, gammas, band, low, high, drop, store, with_entropy):
    batch, rows, _ = cost.shape
    return (
        cost.new_empty(batch),
        cost.new_empty(cost.shape),
        cost.new_empty((batch, rows) if drop is not None else 0),
        cost.new_empty(batch if with_entropy else 0),
    )


@register_fake("soft_dtw_curvature")
def _(grad_value, value, probs, *rest):
    dropping, along = rest[7:9]
    batch, rows, _ = along.shape
    grad_drop = value.new_empty((batch, rows) if dropping else 0)
    return value.new_empty(batch), value.new_empty(along.shape), grad_drop, value.new_empty(batch)
