"""Soft-DTW of packed batches: the sequences one after the other, ``cu_seqlens`` int (B + 1,) telling where each begins.

Sample b has the tokens cu_seqlens[b] .. cu_seqlens[b+1] - 1, as in flash-attn's varlen functions. The padded functions
do the work, and the result is theirs bit for bit; nothing is read back from a GPU.

Common to both functions, beside the arguments in the package's docstring:

* ``max_seqlen_x``, ``max_seqlen_y``: the longest sequences, at least. Needed where cu_seqlens are on a GPU or under
  torch.compile; else None reads them off.
* ``band`` as a pair is one of int (T_x,) tensors, ``drop_cost`` may be a tensor () or (T_x,): one entry per x token.
* cu_seqlens on a GPU are not read back: a sample whose length is below 1 or above its max_seqlen gets NaN, alone.
"""

from __future__ import annotations

import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from lyra_ops._checks import FLOAT_DTYPES, INT_DTYPES, check_tensor, readable
from lyra_ops.soft_dtw import soft_dtw, soft_dtw_alignment

PackedBand = int | tuple[Tensor, Tensor] | None


def soft_dtw_packed(
    x: Tensor,
    y: Tensor,
    cu_seqlens_x: Tensor,
    cu_seqlens_y: Tensor,
    *,
    max_seqlen_x: int | None = None,
    max_seqlen_y: int | None = None,
    cost: str = "sqeuclidean",
    temperature: float = 1.0,
    gamma: float | Tensor = 1.0,
    band: PackedBand = None,
    drop_cost: float | Tensor | None = None,
    bits: int = 16,
    backend: str | None = None,
) -> Tensor:
    """`soft_dtw` of the packed tokens x (T_x, D) and y (T_y, D): (B,)."""
    check_tensor("x", x, shape=("T_x", "D"), dtypes=FLOAT_DTYPES)
    check_tensor("y", y, shape=("T_y", x.shape[1]), dtypes=FLOAT_DTYPES, device=x.device)
    rows = _Sequences("x", cu_seqlens_x, max_seqlen_x, x.device, tokens=x.shape[0])
    columns = _Sequences("y", cu_seqlens_y, max_seqlen_y, x.device, tokens=y.shape[0], batch=rows.batch)
    return soft_dtw(
        rows.padded(x),
        columns.padded(y),
        rows.lengths,
        columns.lengths,
        cost=cost,
        temperature=temperature,
        gamma=gamma,
        band=_padded_band(rows, band),
        drop_cost=_padded_drop_cost(rows, drop_cost),
        bits=bits,
        backend=backend,
    )


def soft_dtw_alignment_packed(
    cost: Tensor,
    cu_seqlens_x: Tensor,
    cu_seqlens_y: Tensor,
    *,
    max_seqlen_x: int | None = None,
    max_seqlen_y: int | None = None,
    gamma: float | Tensor = 1.0,
    band: PackedBand = None,
    drop_cost: float | Tensor | None = None,
    bits: int = 16,
    backend: str | None = None,
) -> Tensor:
    """`soft_dtw_alignment` of a packed cost: the n x m matrices of the samples, row by row, one after the other.

    cost (P,), P = sum over samples of n m; the result has the same shape and order.
    """
    check_tensor("cost", cost, shape=("P",), dtypes=FLOAT_DTYPES)
    rows = _Sequences("x", cu_seqlens_x, max_seqlen_x, cost.device)
    columns = _Sequences("y", cu_seqlens_y, max_seqlen_y, cost.device, batch=rows.batch)
    sizes = rows.lengths * columns.lengths
    if readable(sizes) and int(sizes.sum()) != len(cost):
        raise ValueError(f"cost: got {len(cost)} cells, expected {int(sizes.sum())}, the sum of n m over the samples")
    sample, cell = _split(F.pad(sizes.cumsum(0), (1, 0)), len(cost))
    width = columns.lengths[sample].clamp(min=1)
    i, j = cell // width, cell % width
    shape = (rows.batch, rows.size, columns.size)
    fits = (cell >= 0) & (cell < sizes[sample]) & (i < rows.size) & (j < columns.size)
    place = torch.where(fits, (sample * rows.size + i) * columns.size + j, math.prod(shape))
    expected = soft_dtw_alignment(
        _placed(cost, place, shape),
        rows.lengths,
        columns.lengths,
        gamma=gamma,
        band=_padded_band(rows, band),
        drop_cost=_padded_drop_cost(rows, drop_cost),
        bits=bits,
        backend=backend,
    )
    return F.pad(expected.flatten(), (0, 1), value=math.nan).index_select(0, place)


class _Sequences:
    """One side of a packed batch: ``lengths`` (B,), ``size`` of the longest, and where each token goes when padded."""

    def __init__(
        self,
        side: str,
        cu_seqlens: Tensor,
        max_seqlen: int | None,
        device: torch.device,
        *,
        tokens: int | None = None,
        batch: int | None = None,
    ) -> None:
        name = f"cu_seqlens_{side}"
        check_tensor(name, cu_seqlens, shape=("B + 1" if batch is None else batch + 1,), dtypes=INT_DTYPES)
        if len(cu_seqlens) == 0:
            raise ValueError(f"{name}: got shape (0,), expected (B + 1,)")
        self.batch = len(cu_seqlens) - 1
        if not isinstance(max_seqlen, (int, type(None))):
            raise TypeError(f"max_seqlen_{side}: got {max_seqlen!r}, expected an int")
        if self.batch == 0 and tokens:
            raise ValueError(f"{name}: got shape (1,), which says no samples, but there are {tokens} tokens")
        if readable(cu_seqlens):
            longest = self._check(name, cu_seqlens.tolist(), tokens)
            if max_seqlen is not None and max_seqlen < longest:
                raise ValueError(f"max_seqlen_{side}: got {max_seqlen}, but a sequence has length {longest}")
            max_seqlen = longest if max_seqlen is None else max_seqlen
        elif max_seqlen is None:
            raise ValueError(f"max_seqlen_{side}: got None, expected an int where {name} cannot be read for free")
        self.size = max_seqlen
        self.bounds = cu_seqlens.to(device=device, dtype=torch.int64)
        self.lengths = self.bounds.diff()

    @staticmethod
    def _check(name: str, bounds: list[int], tokens: int | None) -> int:
        lengths = [end - start for start, end in itertools.pairwise(bounds)]
        for b, length in enumerate(lengths):
            if length < 1:
                raise ValueError(f"{name}: sample {b} has length {length}, expected at least 1")
        if bounds[0] != 0 or (tokens is not None and bounds[-1] != tokens):
            want = "0" if tokens is None else f"0 and {tokens}, the number of tokens"
            raise ValueError(f"{name}: begins and ends with {bounds[0]} and {bounds[-1]}, expected {want}")
        return max(lengths, default=0)

    def padded(self, tokens: Tensor) -> Tensor:
        """(T, ..) -> (B, size, ..), padded with zeros."""
        sample, token = _split(self.bounds, len(tokens))
        fits = (token >= 0) & (token < self.lengths[sample]) & (token < self.size)
        place = torch.where(fits, sample * self.size + token, self.batch * self.size)
        return _placed(tokens, place, (self.batch, self.size))


def _split(bounds: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """For 0 .. count - 1: between which two bounds, and how far after the first."""
    everything = torch.arange(count, device=bounds.device)
    part = (torch.searchsorted(bounds, everything, right=True) - 1).clamp(0, max(len(bounds) - 2, 0))
    return part, everything - bounds[part]


def _placed(values: Tensor, place: Tensor, shape: tuple[int, ...]) -> Tensor:
    """``values`` at their places in zeros of ``shape``; the place behind the last takes what belongs nowhere."""
    # index_copy, because its gradient is a plain gather: no atomics, the same bits each time.
    flat = values.new_zeros(math.prod(shape) + 1, *values.shape[1:]).index_copy(0, place, values)
    return flat[:-1].reshape(*shape, *values.shape[1:])


def _padded_band(rows: _Sequences, band: PackedBand) -> PackedBand:
    if not isinstance(band, (tuple, list)):
        return band
    for k, bound in enumerate(band):
        check_tensor(f"band[{k}]", bound, shape=("T_x",), dtypes=INT_DTYPES, device=rows.bounds.device)
    return tuple(rows.padded(bound) for bound in band)


def _padded_drop_cost(rows: _Sequences, drop_cost: float | Tensor | None) -> float | Tensor | None:
    if not isinstance(drop_cost, Tensor) or drop_cost.dim() == 0:
        return drop_cost
    return rows.padded(
        check_tensor("drop_cost", drop_cost, shape=("T_x",), dtypes=FLOAT_DTYPES, device=rows.bounds.device)
    )
