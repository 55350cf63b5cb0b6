"""token_scores in Triton: for GPUs that the compiled library has no code for, and as its cross-check.

The plan of csrc/token_select/scores.cuh: rows that count and keys that are real are listed first, and all later work is
cut in that order into blocks of constant sizes; one kernel finds each row's largest logit and sum of powers over a
split of the keys, one merges the splits, one adds up the shares of each key over all rows. No atomics, no host sync; a
sample gets the same bits alone and in any batch.
"""

from __future__ import annotations

import math
import os

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

ROWS = KEYS = 64  # of a tile
SPLIT = 512  # keys of a program of the first pass
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def why_not(query: Tensor) -> str | None:
    """Why these kernels cannot serve a call with this query; None if they can."""
    if triton is None:
        return "triton is not installed: pip install triton"
    if query.device.type != "cuda" and not INTERPRETED:
        return f"query is on {query.device}"
    if query.dtype not in DTYPES:
        return f"it computes in float32, and query is {str(query.dtype).removeprefix('torch.')}"
    if query.shape[3] > 256:
        return f"its tiles hold 256 channels, and query has {query.shape[3]}"
    return None


@torch.library.custom_op("lyra::token_select_scores_triton", mutates_args=())
def token_scores(
    query: Tensor,
    key: Tensor,
    query_mask: Tensor | None,
    key_mask: Tensor | None,
    key_limits: Tensor | None,
    key_bias: Tensor | None,
    head_weights: Tensor | None,
    scale: float,
    causal: bool,
    lse: Tensor | None,
    per_head: bool,
) -> Tensor:
    """Scores (B, L) float32, or (B, Hq, L); arguments as those of lyra::token_select_scores, padded.

    An op of its own, so that torch.compile need not look inside.
    """
    batch, heads, rows, dim = query.shape
    kv_heads, length = key.shape[1:3]
    outputs = heads if per_head else 1
    scores = query.new_zeros((batch, outputs, length), dtype=torch.float32)
    if scores.numel() and rows:
        lists = _lists(query, length, query_mask, key_mask, key_limits, key_bias, causal)
        shape = (heads, kv_heads, rows, length, dim, scale / math.log(2))
        strides = (*query.stride(), *key.stride())
        tiles = {"ROWS": ROWS, "KEYS": KEYS, "D": max(16, triton.next_power_of_2(dim)), "WIDE": INTERPRETED}
        bias = query if key_bias is None else key_bias.contiguous()
        has_bias = key_bias is not None

        if per_head:
            weights = torch.ones((batch, heads), dtype=torch.float32, device=query.device)
        elif head_weights is None:
            weights = torch.full((batch, heads), 1 / heads, dtype=torch.float32, device=query.device)
        else:
            weights = head_weights.contiguous()
        base, factor = (torch.empty((batch, heads, rows), dtype=torch.float32, device=query.device) for _ in range(2))
        if lse is not None:
            in_twos = (lse.double() / math.log(2)).gather(2, lists[0].long()[:, None].expand(lse.shape))
            base.copy_(in_twos)
            factor.copy_((base - in_twos).exp2() * weights[..., None] / lists[2][:, None, :1])
        else:
            splits = triton.cdiv(length, SPLIT)
            parts = torch.empty((2, batch, splits, heads, rows), dtype=torch.float32, device=query.device)
            blocks = triton.cdiv(heads // kv_heads * rows, ROWS)
            _norms_kernel[blocks, batch * kv_heads, splits](
                *parts, query, key, *lists, bias, *strides, *shape, has_bias, SPLIT=SPLIT, **tiles
            )
            _merge_kernel[triton.cdiv(rows, ROWS), heads, batch](
                base, factor, *parts, lists[2], weights, heads, rows, splits, SPLIT=SPLIT, ROWS=ROWS
            )
        _shares_kernel[triton.cdiv(length, KEYS), outputs, batch](
            scores, base, factor, query, key, *lists, bias, *strides, *shape, has_bias, PER_HEAD=per_head, **tiles
        )
    return scores if per_head else scores.view(batch, length)


@token_scores.register_fake
def _(query, key, query_mask, key_mask, key_limits, key_bias, head_weights, scale, causal, lse, per_head):
    heads = (query.shape[1],) if per_head else ()
    return query.new_empty((query.shape[0], *heads, key.shape[2]), dtype=torch.float32)


def _lists(
    query: Tensor,
    length: int,
    query_mask: Tensor | None,
    key_mask: Tensor | None,
    key_limits: Tensor | None,
    key_bias: Tensor | None,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows that count (B, Lq) and keys that are real (B, L), first in their lists; how many of each (B, 2); and before
    which key each row's sight ends (B, Lq). All int32."""
    batch, _, rows, _ = query.shape
    end = torch.full((batch, rows), length, dtype=torch.int32, device=query.device)
    if causal:
        end = end.minimum(torch.arange(length - rows + 1, length + 1, dtype=torch.int32, device=query.device))
    if key_limits is not None:
        end = end.minimum(key_limits)
    real = torch.ones((batch, length), dtype=torch.bool, device=query.device) if key_mask is None else key_mask
    if key_bias is not None:
        real = real & (key_bias != -torch.inf)
    key_list, n_keys = (~real).byte().argsort(dim=1, stable=True), real.sum(1, dtype=torch.int32)
    counted = (end > key_list[:, :1]) & (n_keys > 0)[:, None]
    if query_mask is not None:
        counted = counted & query_mask
    row_list = (~counted).byte().argsort(dim=1, stable=True)
    numbers = torch.stack([counted.sum(1, dtype=torch.int32), n_keys], 1)
    return row_list.int(), key_list.int(), numbers, end.contiguous()


def _jit(kernel):
    return kernel if triton is None else triton.jit(kernel)


@_jit
def _rows(
    i, n, first_head, b, query, row_list, ends, q_batch, q_head, q_row, q_channel, rows, dim, D: tl.constexpr
):  # fmt: skip
    """Packed rows i of the heads from first_head on, n of each: their values, where their sight ends, and their places
    among all rows of all heads."""
    n = tl.maximum(n, 1)
    head, number = first_head + i // n, i % n
    place = tl.load(row_list + b * rows + number)
    d = tl.arange(0, D)
    at = b * q_batch + head.to(tl.int64) * q_head + place.to(tl.int64) * q_row
    q = tl.load(query + at[:, None] + d[None, :] * q_channel, mask=d[None, :] < dim, other=0)
    return q, tl.load(ends + b * rows + place), head * rows + number


@_jit
def _keys(
    j, n, kv_head, b, key, key_list, bias, k_batch, k_head, k_row, k_channel, length, dim, has_bias, D: tl.constexpr
):  # fmt: skip
    """Real keys j of n (b is of 64 bits, and makes the offsets so): their places, length where there is none; their
    values; what is added to their logits."""
    exists = j < n
    place = tl.load(key_list + b * length + j, mask=exists, other=length)
    d = tl.arange(0, D)
    at = b * k_batch + (b * 0 + kv_head) * k_head + place.to(tl.int64) * k_row
    k = tl.load(key + at[:, None] + d[None, :] * k_channel, mask=exists[:, None] & (d[None, :] < dim), other=0)
    added = tl.load(bias + b * length + place, mask=j < n * has_bias, other=0).to(tl.float32)
    return place, k, added * 1.4426950408889634


@_jit
def _logits(q, k, added, place, end, scale, WIDE: tl.constexpr):
    """(rows, keys) in units of log 2; -inf where a row does not see a key."""
    if WIDE:  # the interpreter's product takes the bits of bfloat16 for whole numbers
        q, k = q.to(tl.float32), k.to(tl.float32)
    logits = tl.dot(q, tl.trans(k), input_precision="ieee") * scale + added[None, :]
    return tl.where(place[None, :] < end[:, None], logits, float("-inf"))


@_jit
def _norms_kernel(
    part_largest, part_sum, query, key, row_list, key_list, numbers, ends, bias,
    q_batch, q_head, q_row, q_channel, k_batch, k_head, k_row, k_channel,
    heads, kv_heads, rows, length, dim, scale, has_bias,
    SPLIT: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, D: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """A tile of the packed rows of a key head, over a split of the keys."""
    b, kv_head, split = (tl.program_id(1) // kv_heads).to(tl.int64), tl.program_id(1) % kv_heads, tl.program_id(2)
    n_rows, n_keys = tl.load(numbers + 2 * b), tl.load(numbers + 2 * b + 1)
    group = heads // kv_heads
    first = tl.program_id(0) * ROWS
    if first >= group * n_rows or split * SPLIT >= n_keys:
        return
    i = first + tl.arange(0, ROWS)
    exists = i < group * n_rows
    q, end, at = _rows(
        tl.where(exists, i, 0), n_rows, kv_head * group, b, query, row_list, ends,
        q_batch, q_head, q_row, q_channel, rows, dim, D,
    )  # fmt: skip
    largest = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    for begin in range(split * SPLIT, tl.minimum(n_keys, (split + 1) * SPLIT), KEYS):
        place, k, added = _keys(
            begin + tl.arange(0, KEYS), n_keys, kv_head, b, key, key_list, bias,
            k_batch, k_head, k_row, k_channel, length, dim, has_bias, D,
        )  # fmt: skip
        logits = _logits(q, k, added, place, end, scale, WIDE)
        top = tl.maximum(largest, tl.max(logits, 1))
        base = tl.where(top == float("-inf"), 0.0, top)
        total = total * tl.exp2(largest - base) + tl.sum(tl.exp2(logits - base[:, None]), 1)
        largest = top
    to = (b * tl.cdiv(length, SPLIT) + split) * heads * rows + at
    tl.store(part_largest + to, largest, mask=exists)
    tl.store(part_sum + to, total, mask=exists)


@_jit
def _merge_kernel(
    base, factor, part_largest, part_sum, numbers, weights, heads, rows, splits,
    SPLIT: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """A tile of the counted rows of a query head: the splits one after the other."""
    b, head = tl.program_id(2).to(tl.int64), tl.program_id(1)
    n_rows, n_keys = tl.load(numbers + 2 * b), tl.load(numbers + 2 * b + 1)
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    largest = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    for split in range(tl.cdiv(n_keys, SPLIT)):
        at = ((b * splits + split) * heads + head) * rows + r
        part, more = tl.load(part_largest + at, mask=r < n_rows), tl.load(part_sum + at, mask=r < n_rows)
        top = tl.maximum(largest, part)
        zero = tl.where(top == float("-inf"), 0.0, top)
        total = total * tl.exp2(largest - zero) + more * tl.exp2(part - zero)
        largest = top
    to = (b * heads + head) * rows + r
    tl.store(base + to, largest, mask=r < n_rows)
    tl.store(factor + to, tl.load(weights + b * heads + head) / (n_rows * total), mask=r < n_rows)


@_jit
def _shares_kernel(
    scores, base, factor, query, key, row_list, key_list, numbers, ends, bias,
    q_batch, q_head, q_row, q_channel, k_batch, k_head, k_row, k_channel,
    heads, kv_heads, rows, length, dim, scale, has_bias,
    PER_HEAD: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, D: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """A block of real keys: over all rows of a query head, or of all of them, one key head after the other."""
    b, output = tl.program_id(2).to(tl.int64), tl.program_id(1)
    n_rows, n_keys = tl.load(numbers + 2 * b), tl.load(numbers + 2 * b + 1)
    j = tl.program_id(0) * KEYS + tl.arange(0, KEYS)
    if tl.program_id(0) * KEYS >= n_keys:
        return
    group = heads // kv_heads
    if PER_HEAD:
        first_kv, last_kv, together = output // group, output // group + 1, n_rows
    else:
        first_kv, last_kv, together = 0, kv_heads, group * n_rows
    result = tl.zeros((KEYS,), tl.float32)
    for kv_head in range(first_kv, last_kv):
        first_head = output if PER_HEAD else kv_head * group
        place, k, added = _keys(
            j, n_keys, kv_head, b, key, key_list, bias, k_batch, k_head, k_row, k_channel, length, dim, has_bias, D
        )  # fmt: skip
        total = tl.zeros((KEYS,), tl.float32)
        for begin in range(0, together, ROWS):
            i = begin + tl.arange(0, ROWS)
            exists = i < together
            q, end, at = _rows(
                tl.where(exists, i, 0), n_rows, first_head, b, query, row_list, ends,
                q_batch, q_head, q_row, q_channel, rows, dim, D,
            )  # fmt: skip
            logits = _logits(q, k, added, place, end, scale, WIDE)
            at += b * heads * rows
            zero, share = tl.load(base + at), tl.load(factor + at)
            seen = (place[None, :] < end[:, None]) & exists[:, None]
            total += tl.sum(tl.where(seen, tl.exp2(logits - zero[:, None]) * share[:, None], 0.0), 0)
        result += total
    place = tl.load(key_list + b * length + j, mask=j < n_keys, other=0)
    heads_out = heads if PER_HEAD else 1
    tl.store(scores + (b * heads_out + output) * length + place, result, mask=j < n_keys)
