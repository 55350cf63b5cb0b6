"""The kernels of multi_lora in Triton: for GPUs that the compiled library has no code for, and as its cross-check.

`shrink_`, `expand_` and `outer` compute what those of `kernels` do, in float32, bfloat16 or float16, from the same plan
and with the same dropout mask. None waits for the GPU; all sums have a fixed order, which for a token's row depends on
the row's length alone.
"""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 64  # tokens of a tile, pairs of a chunk: the plan's
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@triton.jit
def _dot(a, b, WIDE: tl.constexpr):
    if WIDE:  # the interpreter's product takes the bits of bfloat16 for whole numbers
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def _rounded(x, like, WIDE: tl.constexpr):
    """x float32 in the dtype of `like`, to nearest even."""
    if WIDE and like.dtype == tl.bfloat16:  # the interpreter cuts off
        bits = x.to(tl.uint32, bitcast=True)
        x = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)
    return x.to(like.dtype)


@triton.jit
def _kept(seed, tokens, first_column, drop, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """(ROWS, COLUMNS) bool: what dropout keeps; first_column and COLUMNS are multiples of 8."""
    eighths = first_column // 8 + tl.arange(0, COLUMNS // 8)
    c0 = tl.broadcast_to(eighths[None, :], (ROWS, COLUMNS // 8)).to(tl.uint32)
    c1 = tl.broadcast_to(tokens[:, None], (ROWS, COLUMNS // 8)).to(tl.uint32)
    zero = c0 * 0
    w0, w1, w2, w3 = tl.philox(tl.load(seed), c0, c1, zero, zero)
    # Each word is two numbers of 16 bits, the lower one first; joining adds the fastest dimension last.
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))
    numbers = tl.join(words & 0xFFFF, words >> 16).to(tl.int32)
    signed = tl.where(numbers >= 32768, numbers - 65536, numbers)
    return tl.reshape(signed, (ROWS, COLUMNS)) >= drop - 32768


@triton.jit
def _shrink_kernel(
    h, x, bank, table, starts, pairs, chunks, seed, drop, x_row, size, width, per_token,
    MASKED: tl.constexpr, PAIRS: tl.constexpr, RANKS: tl.constexpr, COLUMNS: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """A chunk of pairs by RANKS ranks."""
    e = tl.load(chunks + 2 * tl.program_id(0))
    if e < 0:
        return
    first_pair = tl.load(chunks + 2 * tl.program_id(0) + 1)
    row, rank, column = tl.load(table + 3 * e), tl.load(table + 3 * e + 1), tl.load(table + 3 * e + 2)
    ranks = tl.program_id(1) * RANKS + tl.arange(0, RANKS)
    if tl.program_id(1) * RANKS >= rank:
        return
    places = tl.arange(0, PAIRS)
    real = places < tl.load(starts + e + 1) - first_pair
    pair = tl.load(pairs + first_pair + places, mask=real, other=0).to(tl.int64)
    token = pair // per_token
    bank_rows = bank + (row + ranks).to(tl.int64)[:, None] * size
    acc = tl.zeros((PAIRS, RANKS), dtype=tl.float32)
    for k in range(0, size, COLUMNS):
        columns = k + tl.arange(0, COLUMNS)
        inside = (columns < size)[None, :]
        values = tl.load(x + token[:, None] * x_row + columns[None, :], mask=real[:, None] & inside, other=0.0)
        if MASKED:
            values = tl.where(_kept(seed, token, k, drop, PAIRS, COLUMNS), values, 0.0)
        rows = tl.load(bank_rows + columns[None, :], mask=(ranks < rank)[:, None] & inside, other=0.0)
        acc += _dot(values, tl.trans(rows), WIDE)
    tl.store(h + pair[:, None] * width + column + ranks[None, :], acc, mask=real[:, None] & (ranks < rank)[None, :])


@triton.jit
def _expand_kernel(
    y, h, bank, table, scaling, ids, weights, present, seed, drop, tokens, size, width, per_token, adapters,
    WEIGHTED: tl.constexpr, MASKED: tl.constexpr, TOKENS: tl.constexpr, RANKS: tl.constexpr, COLUMNS: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """TOKENS tokens by COLUMNS columns of y, over the adapters that are present."""
    tile, first_column = tl.program_id(0), tl.program_id(1) * COLUMNS
    token = tile.to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    columns = first_column + tl.arange(0, COLUMNS)
    inside = (columns < size)[None, :]
    words = (adapters + 31) // 32
    acc = tl.zeros((TOKENS, COLUMNS), dtype=tl.float32)
    some = 0
    for e in range(adapters):
        if (tl.load(present + tile * words + e // 32) >> (e % 32)) & 1:
            some = 1
            row, rank, column = tl.load(table + 3 * e), tl.load(table + 3 * e + 1), tl.load(table + 3 * e + 2)
            factor = tl.load(scaling + e)
            for first_rank in range(0, rank, RANKS):
                ranks = first_rank + tl.arange(0, RANKS)
                mine = tl.zeros((TOKENS, RANKS), dtype=tl.float32)
                for s in range(per_token):
                    pair = token * per_token + s
                    has = tl.load(ids + pair, mask=token < tokens, other=-1) == e
                    part = tl.load(
                        h + pair[:, None] * width + column + ranks[None, :],
                        mask=has[:, None] & (ranks < rank)[None, :],
                        other=0.0,
                    )
                    if WEIGHTED:
                        part *= tl.load(weights + pair, mask=has, other=0.0)[:, None]
                    mine += part * factor
                rows = tl.load(
                    bank + (row + ranks).to(tl.int64)[:, None] * size + columns[None, :],
                    mask=(ranks < rank)[:, None] & inside,
                    other=0.0,
                )
                acc += _dot(_rounded(mine, rows, WIDE), rows, WIDE)
    if some:
        if MASKED:
            acc = tl.where(_kept(seed, token, first_column, drop, TOKENS, COLUMNS), acc, 0.0)
        routed = token < 0
        for s in range(per_token):
            routed |= tl.load(ids + token * per_token + s, mask=token < tokens, other=-1) >= 0
        at = y + token[:, None] * size + columns[None, :]
        keep = routed[:, None] & inside
        base = tl.load(at, mask=keep, other=0.0)
        tl.store(at, _rounded(base.to(tl.float32) + acc, base, WIDE), mask=keep)


@triton.jit
def _outer_kernel(
    out, h, z, table, scaling, weights, starts, pairs, seed, drop, z_row, size, width, per_token,
    WEIGHTED: tl.constexpr, MASKED: tl.constexpr, PAIRS: tl.constexpr, RANKS: tl.constexpr, COLUMNS: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """RANKS rows by COLUMNS columns of an adapter's gradient, over all of its pairs in order."""
    first_column, e = tl.program_id(0) * COLUMNS, tl.program_id(2)
    row, rank, column = tl.load(table + 3 * e), tl.load(table + 3 * e + 1), tl.load(table + 3 * e + 2)
    ranks = tl.program_id(1) * RANKS + tl.arange(0, RANKS)
    if tl.program_id(1) * RANKS >= rank:
        return
    columns = first_column + tl.arange(0, COLUMNS)
    inside = (columns < size)[None, :]
    factor, end = tl.load(scaling + e), tl.load(starts + e + 1)
    acc = tl.zeros((RANKS, COLUMNS), dtype=tl.float32)
    for first in range(tl.load(starts + e), end, PAIRS):
        places = first + tl.arange(0, PAIRS)
        real = places < end
        pair = tl.load(pairs + places, mask=real, other=0).to(tl.int64)
        token = pair // per_token
        part = tl.load(
            h + pair[:, None] * width + column + ranks[None, :],
            mask=real[:, None] & (ranks < rank)[None, :],
            other=0.0,
        )
        if WEIGHTED:
            part *= tl.load(weights + pair, mask=real, other=0.0)[:, None]
        values = tl.load(z + token[:, None] * z_row + columns[None, :], mask=real[:, None] & inside, other=0.0)
        if MASKED:
            values = tl.where(_kept(seed, token, first_column, drop, PAIRS, COLUMNS), values, 0.0)
        acc += _dot(tl.trans(_rounded(part * factor, values, WIDE)), values, WIDE)
    at = out + (row + ranks).to(tl.int64)[:, None] * size + columns[None, :]
    tl.store(at, acc, mask=(ranks < rank)[:, None] & inside)


def _ranks(width: int) -> int:
    """Ranks of a block: a power of two from 16, the least that tl.dot takes, to 64."""
    return min(64, max(16, triton.next_power_of_2(width)))


@torch.library.custom_op("lyra_triton::multi_lora_shrink_", mutates_args=("h",))
def shrink_(
    h: Tensor,
    x: Tensor,
    bank: Tensor,
    table: Tensor,
    ids: Tensor,
    starts: Tensor,
    pairs: Tensor,
    chunks: Tensor,
    present: Tensor,
    seed: Tensor | None,
    drop: int,
) -> None:
    """See `kernels.shrink_`."""
    (_, per_token, width), size = h.shape, x.shape[1]
    if h.numel() == 0:
        return
    ranks = _ranks(width)
    _shrink_kernel[len(chunks), triton.cdiv(width, ranks)](
        h, x, bank, table, starts, pairs, chunks, seed, drop, x.stride(0), size, width, per_token,
        MASKED=seed is not None, PAIRS=TILE, RANKS=ranks, COLUMNS=64, WIDE=INTERPRETED,
    )  # fmt: skip


@torch.library.custom_op("lyra_triton::multi_lora_expand_", mutates_args=("y",))
def expand_(
    y: Tensor,
    h: Tensor,
    bank: Tensor,
    table: Tensor,
    scaling: Tensor,
    ids: Tensor,
    weights: Tensor | None,
    present: Tensor,
    seed: Tensor | None,
    drop: int,
) -> None:
    """See `kernels.expand_`."""
    (tokens, per_token, width), size = h.shape, y.shape[1]
    if y.numel() == 0:
        return
    columns = 128
    _expand_kernel[len(present), triton.cdiv(size, columns)](
        y, h, bank, table, scaling, ids, weights, present, seed, drop, tokens, size, width, per_token, len(table),
        WEIGHTED=weights is not None, MASKED=seed is not None, WIDE=INTERPRETED,
        TOKENS=TILE, RANKS=_ranks(width), COLUMNS=columns,
    )  # fmt: skip


@torch.library.custom_op("lyra_triton::multi_lora_outer", mutates_args=())
def outer(
    h: Tensor,
    z: Tensor,
    table: Tensor,
    scaling: Tensor,
    weights: Tensor | None,
    starts: Tensor,
    pairs: Tensor,
    chunks: Tensor,
    seed: Tensor | None,
    drop: int,
    rows: int,
) -> Tensor:
    """See `kernels.outer`."""
    (_, per_token, width), size = h.shape, z.shape[1]
    out = torch.empty(rows, size, dtype=torch.float32, device=z.device)
    if out.numel():
        ranks, columns = _ranks(width), 64
        _outer_kernel[triton.cdiv(size, columns), triton.cdiv(width, ranks), len(table)](
            out, h, z, table, scaling, weights, starts, pairs, seed, drop, z.stride(0), size, width, per_token,
            WEIGHTED=weights is not None, MASKED=seed is not None, WIDE=INTERPRETED,
            PAIRS=TILE, RANKS=ranks, COLUMNS=columns,
        )  # fmt: skip
    return out


@shrink_.register_fake
def _(h, x, bank, table, ids, starts, pairs, chunks, present, seed, drop):
    pass


@expand_.register_fake
def _(y, h, bank, table, scaling, ids, weights, present, seed, drop):
    pass


@outer.register_fake
def _(h, z, table, scaling, weights, starts, pairs, chunks, seed, drop, rows):
    return h.new_empty(rows, z.shape[1])


def add_outer_(out: Tensor, h: Tensor, z: Tensor, *rest) -> None:
    """See `kernels.add_outer_`."""
    out += outer(h, z, *rest, out.shape[0])
