"""The three kernels of which the fused op is made, in plain torch: what the CUDA and Triton ones are tested against.

Names are those of `plan.Plan`. Further: h (T, S, G) float32, what A makes of x for each pair (never read where a pair
has no adapter, nor beyond the adapter's columns); bank (rows, D), the rows of all adapters; table (E, 3) int32, per
adapter its first row in the bank, its rank and its first column in h; seed and drop: see `dropout`. They read sizes
back from the device, which the real ones never do.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from lyra_ops.multi_lora.dropout import drop_out


def shrink_(h, x, bank, table, ids, starts, pairs, chunks, present, seed, drop) -> None:
    """h[t, s, column + j] = sum_k mask(t, k) x[t, k] bank[row + j, k], for all pairs."""
    x, rows = drop_out(x, seed, drop), h.flatten(0, 1)
    for (row, rank, column), mine in zip(table.tolist(), _pairs_of(starts, pairs)):
        if len(mine):
            tokens = x[mine // ids.shape[1]].float()
            rows[mine, column : column + rank] = tokens @ bank[row : row + rank].float().T


def expand_(y, h, bank, table, scaling, ids, weights, present, seed, drop) -> None:
    """y[t] += mask(t) (sum over the adapters e of token t of c_e[t] bank_e), added up in float32 and rounded once.

    c_e[t], in the dtype of y: the sum of weights[t, s] scaling[e] h[t, s] over the pairs of token t with adapter e.
    """
    added = torch.zeros(y.shape, dtype=torch.float32, device=y.device)
    for e, (row, rank, column) in enumerate(table.tolist()):
        part = h[:, :, column : column + rank] * scaling[e]
        if weights is not None:
            part = part * weights[:, :, None]
        part = torch.where((ids == e)[:, :, None], part, 0).sum(1).to(y.dtype)
        added += part.float() @ bank[row : row + rank].float()
    touched = (ids >= 0).any(1)[:, None]
    y.copy_(torch.where(touched, (y.float() + drop_out(added, seed, drop)).to(y.dtype), y))


def outer(h, z, table, scaling, weights, starts, pairs, chunks, seed, drop, rows) -> Tensor:
    """out[row + j] = sum over the pairs of adapter e of c[t, j] mask(t) z[t], c rounded to the dtype of z: float32."""
    out = torch.zeros(rows, z.shape[1], device=z.device)
    z, flat = drop_out(z, seed, drop), h.flatten(0, 1)
    for e, mine in enumerate(_pairs_of(starts, pairs)):
        row, rank, column = table[e].tolist()
        if len(mine):
            part = flat[mine, column : column + rank] * scaling[e]
            if weights is not None:
                part = part * weights.flatten()[mine, None]
            out[row : row + rank] = part.to(z.dtype).float().T @ z[mine // h.shape[1]].float()
    return out


def add_outer_(out, h, z, *rest) -> None:
    """out += `outer`."""
    out += outer(h, z, *rest, len(out))


def _pairs_of(starts: Tensor, pairs: Tensor) -> list[Tensor]:
    bounds = starts.tolist()
    return [pairs[begin:end].long() for begin, end in pairwise(bounds)]
