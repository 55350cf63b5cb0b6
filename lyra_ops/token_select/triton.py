"""token_scores and gather_tokens in Triton: for GPUs that the compiled library has no code for, and as its cross-check.

Scores: the plan of csrc/token_select/scores.cuh. Rows that count and keys that are real are listed first, and all later
work is cut in that order into blocks of constant sizes; one kernel finds each row's largest logit and sum of powers
over a split of the keys, one merges the splits, one adds up the shares of each key over all rows. No atomics, no host
sync; a sample gets the same bits alone, in any batch, padded or packed.

Gather: elements as integers of their size, one launch per tensor.
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


def why_not_on(tensor: Tensor) -> str | None:
    """Why these kernels cannot run where this tensor is; None if they can."""
    if triton is None:
        return "triton is not installed: pip install triton"
    if tensor.device.type != "cuda" and not INTERPRETED:
        return f"the tensors are on {tensor.device}"
    return None


def why_not(query: Tensor) -> str | None:
    """Why the scoring kernels cannot serve a call with this query; None if they can."""
    if (reason := why_not_on(query)) is not None:
        return reason
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
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
) -> Tensor:
    """Scores (B, L) float32, or (B, Hq, L); arguments as those of lyra::token_select_scores.

    An op of its own, so that torch.compile need not look inside.
    """
    out_batch, heads, rows, dim = query.shape
    kv_heads, length = key.shape[1:3]
    packed = cu_seqlens_q is not None
    batch = cu_seqlens_q.shape[0] - 1 if packed else out_batch
    outputs = heads if per_head else 1
    scores = query.new_zeros((out_batch, outputs, length), dtype=torch.float32)
    if scores.numel() and rows and batch:
        starts_q = _starts(cu_seqlens_q, batch, rows, query.device)
        starts_k = _starts(cu_seqlens_k, batch, length, query.device)
        row_sample, row_list, key_list, numbers, ends = _lists(
            query_mask, key_mask, key_limits, key_bias, causal, starts_q, out_batch * rows, starts_k, out_batch * length
        )
        lists = (starts_q, starts_k, row_list, key_list, numbers, ends)
        shape = (heads, kv_heads, rows, length, dim, scale / math.log(2))
        strides = (*query.stride(), *key.stride())
        tiles = {"ROWS": ROWS, "KEYS": KEYS, "D": max(16, triton.next_power_of_2(dim))}
        tiles |= {"WIDE": INTERPRETED, "PACKED": packed}
        bias = query if key_bias is None else key_bias.contiguous()
        has_bias = key_bias is not None

        if per_head:
            weights = torch.ones((batch, heads), dtype=torch.float32, device=query.device)
        elif head_weights is None:
            weights = torch.full((batch, heads), 1 / heads, dtype=torch.float32, device=query.device)
        else:
            weights = head_weights.contiguous()
        shape_of_norms = (out_batch, heads, rows)
        base, factor = (torch.empty(shape_of_norms, dtype=torch.float32, device=query.device) for _ in range(2))
        if lse is not None:
            # Of the listed rows, one list after the other.
            sample = row_sample.view(out_batch, rows)
            places = row_list.long() + (starts_q[row_sample] if packed else 0)
            places = places.clamp(0, rows - 1).view(out_batch, 1, rows)
            in_twos = (lse.double() / math.log(2)).gather(2, places.expand(lse.shape))
            base.copy_(in_twos)
            shares = (weights / numbers[:, :1])[sample].mT  # (out_batch, heads, rows)
            factor.copy_((base - in_twos).exp2() * shares)
        else:
            n_splits = (numbers[:, 1] + SPLIT - 1) // SPLIT
            first_splits = n_splits.cumsum(0, dtype=torch.int32) - n_splits
            most = triton.cdiv(length, SPLIT)
            room = length // SPLIT + batch if packed else batch * most
            parts = torch.empty((2, room, heads, rows), dtype=torch.float32, device=query.device)
            blocks = triton.cdiv(heads // kv_heads * rows, ROWS)
            _norms_kernel[blocks, batch * kv_heads, most](
                *parts, first_splits, query, key, *lists, bias, *strides, *shape, has_bias, SPLIT=SPLIT, **tiles
            )
            _merge_kernel[triton.cdiv(rows, ROWS), heads, batch](
                base, factor, *parts, first_splits, starts_q, numbers, weights, heads, rows,
                SPLIT=SPLIT, ROWS=ROWS, PACKED=packed,
            )  # fmt: skip
        _shares_kernel[triton.cdiv(length, KEYS), outputs, batch](
            scores, base, factor, query, key, *lists, bias, *strides, *shape, has_bias, PER_HEAD=per_head, **tiles
        )
    return scores if per_head else scores.view(out_batch, length)


@token_scores.register_fake
def _(query, key, query_mask, key_mask, key_limits, key_bias, head_weights, scale, causal, lse, per_head, *packed):
    heads = (query.shape[1],) if per_head else ()
    return query.new_empty((query.shape[0], *heads, key.shape[2]), dtype=torch.float32)


def _starts(cu_seqlens: Tensor | None, samples: int, size: int, device: torch.device) -> Tensor:
    """(B + 1,) int64: where each sample begins among the tokens of all, and where the last ends."""
    if cu_seqlens is None:
        return torch.arange(samples + 1, device=device) * size
    return cu_seqlens.long().clamp(0, size).cummax(0).values  # inside, whatever it holds


def _lists(
    query_mask: Tensor | None,
    key_mask: Tensor | None,
    key_limits: Tensor | None,
    key_bias: Tensor | None,
    causal: bool,
    starts_q: Tensor,
    rows: int,
    starts_k: Tensor,
    keys: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """For all rows, one sample after the other: their sample; those that count, by their place in the sample, first in
    their sample's part; for all keys, the real ones likewise; how many of each a sample has (B, 2); before which of its
    keys each row's sight ends. int32, the first int64."""
    own_rows, own_keys = starts_q.diff(), starts_k.diff()
    row_group, row_place = _places(starts_q, rows)
    key_group, key_place = _places(starts_k, keys)
    samples = own_rows.shape[0]
    real = (key_group > 0) & (key_group <= samples)
    if key_mask is not None:
        real = real & key_mask.flatten()
    if key_bias is not None:
        real = real & (key_bias.flatten() != -torch.inf)
    key_list, n_real = _listed(real, key_group, key_place, starts_k)
    row_sample = (row_group - 1).clamp(0, samples - 1)
    end = own_keys[row_sample]
    if causal:
        end = end.minimum((own_keys - own_rows)[row_sample] + row_place + 1)
    if key_limits is not None:
        end = end.minimum(key_limits.flatten())
    first_real = key_list[starts_k[:-1].clamp(max=keys - 1)][row_sample]
    counted = (row_group > 0) & (row_group <= samples) & (end > first_real) & (n_real > 0)[row_sample]
    if query_mask is not None:
        counted = counted & query_mask.flatten()
    row_list, n_rows = _listed(counted, row_group, row_place, starts_q)
    return row_sample, row_list.int(), key_list.int(), torch.stack([n_rows, n_real], 1).int(), end.int()


def _places(starts: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Of each token the number of its sample, from 1 (0: in front of all; B + 1: behind), and its place in it."""
    token = torch.arange(size, device=starts.device)
    group = torch.searchsorted(starts, token, right=True)
    return group, token - starts[(group - 1).clamp(0)]


def _listed(is_one: Tensor, group: Tensor, place: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
    """The places of those that are, in order, first in the part of their sample, and how many there are in each."""
    order = (2 * group + ~is_one).argsort(stable=True)
    before = torch.nn.functional.pad(is_one.cumsum(0), (1, 0))
    return place[order], before[starts[1:]] - before[starts[:-1]]


def _jit(kernel):
    return kernel if triton is None else triton.jit(kernel)


@_jit
def _first(starts, b, batch_stride, row_stride, PACKED: tl.constexpr):
    """Where the sample begins: its number among all tokens, and its offset in a tensor of these strides."""
    first = tl.load(starts + b)
    return first, first * row_stride if PACKED else b * batch_stride


@_jit
def _rows(
    i, n, first_head, b, starts_q, query, row_list, ends, q_batch, q_head, q_row, q_channel, heads, rows, dim,
    D: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Packed rows i of the heads from first_head on, n of each: their values, where their sight ends, and their places
    among all rows of all heads, listed rows first in each sample."""
    n = tl.maximum(n, 1)
    head, number = first_head + i // n, i % n
    first, offset = _first(starts_q, b, q_batch, q_row, PACKED)
    place = tl.load(row_list + first + number)
    d = tl.arange(0, D)
    at = offset + head.to(tl.int64) * q_head + place.to(tl.int64) * q_row
    q = tl.load(query + at[:, None] + d[None, :] * q_channel, mask=d[None, :] < dim, other=0)
    among = head * rows + number + (first if PACKED else b * heads * rows)
    return q, tl.load(ends + first + place), among


@_jit
def _keys(
    j, n, kv_head, b, starts_k, key, key_list, bias, k_batch, k_head, k_row, k_channel, length, dim, has_bias,
    D: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Real keys j of n (b is of 64 bits, and makes the offsets so): their places, length where there is none; their
    values; what is added to their logits."""
    exists = j < n
    first, offset = _first(starts_k, b, k_batch, k_row, PACKED)
    place = tl.load(key_list + first + j, mask=exists, other=length)
    d = tl.arange(0, D)
    at = offset + (b * 0 + kv_head) * k_head + place.to(tl.int64) * k_row
    k = tl.load(key + at[:, None] + d[None, :] * k_channel, mask=exists[:, None] & (d[None, :] < dim), other=0)
    added = tl.load(bias + first + place, mask=j < n * has_bias, other=0).to(tl.float32)
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
    part_largest, part_sum, first_splits, query, key, starts_q, starts_k, row_list, key_list, numbers, ends, bias,
    q_batch, q_head, q_row, q_channel, k_batch, k_head, k_row, k_channel,
    heads, kv_heads, rows, length, dim, scale, has_bias,
    SPLIT: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, D: tl.constexpr, WIDE: tl.constexpr,
    PACKED: tl.constexpr,
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
        tl.where(exists, i, 0), n_rows, kv_head * group, b, starts_q, query, row_list, ends,
        q_batch, q_head, q_row, q_channel, heads, rows, dim, D, PACKED,
    )  # fmt: skip
    largest = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    for begin in range(split * SPLIT, tl.minimum(n_keys, (split + 1) * SPLIT), KEYS):
        place, k, added = _keys(
            begin + tl.arange(0, KEYS), n_keys, kv_head, b, starts_k, key, key_list, bias,
            k_batch, k_head, k_row, k_channel, length, dim, has_bias, D, PACKED,
        )  # fmt: skip
        logits = _logits(q, k, added, place, end, scale, WIDE)
        top = tl.maximum(largest, tl.max(logits, 1))
        base = tl.where(top == float("-inf"), 0.0, top)
        total = total * tl.exp2(largest - base) + tl.sum(tl.exp2(logits - base[:, None]), 1)
        largest = top
    # `at` counts from the sample's rows, which padded are those of a split.
    to = (b * 0 + tl.load(first_splits + b) + split) * heads * rows + (at if PACKED else at - b * heads * rows)
    tl.store(part_largest + to, largest, mask=exists)
    tl.store(part_sum + to, total, mask=exists)


@_jit
def _merge_kernel(
    base, factor, part_largest, part_sum, first_splits, starts_q, numbers, weights, heads, rows,
    SPLIT: tl.constexpr, ROWS: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """A tile of the counted rows of a query head: the splits one after the other."""
    b, head = tl.program_id(2).to(tl.int64), tl.program_id(1)
    n_rows, n_keys = tl.load(numbers + 2 * b), tl.load(numbers + 2 * b + 1)
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    mine = head * rows + r + (tl.load(starts_q + b) if PACKED else b * 0)  # of a split's
    largest = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    for split in range(tl.cdiv(n_keys, SPLIT)):
        at = (b * 0 + tl.load(first_splits + b) + split) * heads * rows + mine
        part, more = tl.load(part_largest + at, mask=r < n_rows), tl.load(part_sum + at, mask=r < n_rows)
        top = tl.maximum(largest, part)
        zero = tl.where(top == float("-inf"), 0.0, top)
        total = total * tl.exp2(largest - zero) + more * tl.exp2(part - zero)
        largest = top
    to = mine if PACKED else mine + b * heads * rows
    tl.store(base + to, largest, mask=r < n_rows)
    tl.store(factor + to, tl.load(weights + b * heads + head) / (n_rows * total), mask=r < n_rows)


@_jit
def _shares_kernel(
    scores, base, factor, query, key, starts_q, starts_k, row_list, key_list, numbers, ends, bias,
    q_batch, q_head, q_row, q_channel, k_batch, k_head, k_row, k_channel,
    heads, kv_heads, rows, length, dim, scale, has_bias,
    PER_HEAD: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, D: tl.constexpr, WIDE: tl.constexpr,
    PACKED: tl.constexpr,
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
            j, n_keys, kv_head, b, starts_k, key, key_list, bias,
            k_batch, k_head, k_row, k_channel, length, dim, has_bias, D, PACKED,
        )  # fmt: skip
        total = tl.zeros((KEYS,), tl.float32)
        for begin in range(0, together, ROWS):
            i = begin + tl.arange(0, ROWS)
            exists = i < together
            q, end, at = _rows(
                tl.where(exists, i, 0), n_rows, first_head, b, starts_q, query, row_list, ends,
                q_batch, q_head, q_row, q_channel, heads, rows, dim, D, PACKED,
            )  # fmt: skip
            logits = _logits(q, k, added, place, end, scale, WIDE)
            zero, share = tl.load(base + at), tl.load(factor + at)
            seen = (place[None, :] < end[:, None]) & exists[:, None]
            total += tl.sum(tl.where(seen, tl.exp2(logits - zero[:, None]) * share[:, None], 0.0), 0)
        result += total
    first = tl.load(starts_k + b)
    place = first + tl.load(key_list + first + j, mask=j < n_keys, other=0)  # among the keys of all samples
    heads_out = heads if PER_HEAD else 1
    to = output * length + place if PACKED else (b * heads_out + output) * length + place - first
    tl.store(scores + to, result, mask=j < n_keys)


# --- gather ----------------------------------------------------------------------------------------------------------


@torch.library.custom_op("lyra::token_select_gather_triton", mutates_args=())
def gather_tokens(
    tensors: list[Tensor], index: Tensor, planes: list[bool], fill: list[float], flat: bool
) -> list[Tensor]:
    """The rows of each tensor at the places of index; arguments as those of lyra::token_select_gather."""
    index = index.contiguous()
    return [_gather(t, index, p, value, flat) for t, p, value in zip(tensors, planes, fill)]


@gather_tokens.register_fake
def _(tensors, index, planes, fill, flat):
    return [t.new_empty((*t.shape[:p], *index.shape, *t.shape[2 + p :])) for t, p in zip(tensors, planes)]


def _gather(tensor: Tensor, index: Tensor, has_planes: bool, fill: float, flat: bool) -> Tensor:
    shape = (*tensor.shape[:has_planes], *index.shape, *tensor.shape[2 + has_planes :])
    out = tensor.new_empty(shape)
    if out.numel() == 0:
        return out
    value = torch.full((1,), fill, dtype=tensor.dtype)
    given, to = tensor.resolve_conj().resolve_neg(), out
    if tensor.dtype.itemsize == 16:  # two halves
        given, to, value = (torch.view_as_real(t) for t in (given, to, value))
    whole = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[given.dtype.itemsize]
    given, to, value = given.view(whole), to.view(whole), value.view(whole)
    given = given if has_planes else given[None]
    # (P, B, L, heads, channels), without a copy where there are no more dimensions than that, or where they lie close.
    given = given[..., None, :] if given.ndim == 4 else given[..., None, None] if given.ndim == 3 else given.flatten(4)
    n_planes, batch, length, heads, channels = given.shape
    rows = n_planes * index.numel() * heads
    width = min(1024, triton.next_power_of_2(channels))
    tile = {"ROWS": max(1, 1024 // width), "CHANNELS": width}
    _gather_kernel[triton.cdiv(rows, tile["ROWS"]), triton.cdiv(channels, width)](
        to, given, index, *given.stride(), value.flatten()[0].item(), value.flatten()[-1].item(),
        rows, index.numel(), index.shape[1], batch, length, heads, channels, FLAT=flat, **tile,
    )  # fmt: skip
    return out


@_jit
def _gather_kernel(
    to, tensor, index, plane_stride, sample_stride, token_stride, head_stride, channel_stride, fill, fill_odd,
    rows, all_columns, columns, batch, length, heads, channels,
    FLAT: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """A tile of the output's rows, which number plane, column and head."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    head, token = row % heads, row // heads
    column, plane = token % all_columns, token // all_columns
    known = tl.load(index + column, mask=row < rows, other=-1)
    exists = (known >= 0) & (known < (length * batch if FLAT else length))
    sample = known // length if FLAT else column // columns
    place = known % length if FLAT else known
    at = plane * plane_stride + sample * sample_stride + place * token_stride + head * head_stride
    inside = (row < rows)[:, None] & (channel < channels)[None, :]
    where = tensor + at[:, None] + channel[None, :].to(tl.int64) * channel_stride
    values = tl.load(where, mask=inside & exists[:, None], other=0)
    filling = tl.where(channel % 2 == 0, fill, fill_odd)  # halves of complex numbers
    values = tl.where(exists[:, None], values, filling[None, :].to(values.dtype))
    tl.store(to + row[:, None] * channels + channel[None, :], values, mask=inside)
