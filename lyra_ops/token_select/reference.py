"""Scoring, selection and gathering in plain torch: the oracle, and the path that runs everywhere.

Arguments have been checked by the public functions of this package. B samples, L tokens (keys), Lq query rows.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# One step of the scoring handles this many query rows of all heads against this many keys. The sizes are constants,
# never fitted to the input: then each step of a sample is the same computation, bit for bit, in whatever batch it is.
ROWS, KEYS = 16, 512


@torch.library.custom_op("lyra::token_scores_reference", mutates_args=())
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
    """Scores (B, L), or (B, Hq, L) with per_head, float64 for float64 inputs, else float32.

    head_weights (samples, Hq) sum to 1 in every sample. cu_seqlens: the samples stand one after the other in a batch of
    one. An op of its own, so that torch.compile need not unroll the loops.
    """
    scores = _new_scores(query, key, per_head)
    rows, keys = query.shape[2], key.shape[2]
    if rows == 0 or keys == 0:
        return scores
    if cu_seqlens_q is None:
        places = [(b, slice(0, rows), slice(0, keys)) for b in range(query.shape[0])]
    else:
        starts_q, starts_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
        spans = zip(starts_q, starts_q[1:], starts_k, starts_k[1:])
        places = [(0, slice(q, q_end), slice(k, k_end)) for q, q_end, k, k_end in spans]
    with torch.autocast(query.device.type, enabled=False):
        for b, (row, q, k) in enumerate(places):
            if q.start == q.stop or k.start == k.stop:
                continue

            def mine(t: Tensor | None, span: slice, row: int = row) -> Tensor | None:
                return None if t is None else t[row][..., span]

            _score_sample(
                scores[row][..., k],
                query[row][:, q],
                key[row][:, k],
                mine(query_mask, q),
                mine(key_mask, k),
                mine(key_limits, q),
                mine(key_bias, k),
                None if head_weights is None or per_head else head_weights[b],
                scale,
                causal,
                mine(lse, q),
            )
    return scores


@token_scores.register_fake
def _(query, key, query_mask, key_mask, key_limits, key_bias, head_weights, scale, causal, lse, per_head, *packed):
    return _new_scores(query, key, per_head)


def _new_scores(query: Tensor, key: Tensor, per_head: bool) -> Tensor:
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    heads = (query.shape[1],) if per_head else ()
    return query.new_zeros((query.shape[0], *heads, key.shape[2]), dtype=dtype)


def _score_sample(
    scores: Tensor,
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
) -> None:
    """Writes the scores (L,) or (Hq, L) of query (Hq, Lq, D) and key (Hkv, L, D)."""
    heads, n_rows, _ = query.shape
    kv_heads, n_keys, _ = key.shape
    dtype, device = scores.dtype, scores.device

    # A row sees the keys whose place is at most its own. Padding gets places that see nothing and are never seen.
    row_place = torch.arange(n_keys - n_rows, n_keys, device=device)
    if not causal:
        row_place = torch.full_like(row_place, n_keys - 1)
    if key_limits is not None:
        row_place = row_place.minimum(key_limits - 1)
    key_place = torch.arange(n_keys, device=device)
    if query_mask is not None:
        row_place = row_place.masked_fill(~query_mask, -1)
    if key_mask is not None:
        key_place = key_place.masked_fill(~key_mask, n_keys)
    if key_bias is not None:
        key_place = key_place.masked_fill(key_bias == -torch.inf, n_keys)

    # Padding goes behind, so that neither its side nor its amount moves a block boundary.
    row_order = (row_place < 0).byte().argsort(stable=True)
    key_order = (key_place == n_keys).byte().argsort(stable=True)
    row_place, key_place = row_place[row_order], key_place[key_order]
    n_counted = (row_place >= key_place[0]).sum()  # rows that see at least one key
    if device.type == "cpu":  # reading is free here: leave out blocks of padding, which would add exact zeros
        n_rows, n_keys = int((row_place >= 0).sum()), int((key_place < n_keys).sum())
    row_order, row_place = _fill_block(row_order, 0, ROWS), _fill_block(row_place, -1, ROWS)
    key_order, key_place = _fill_block(key_order, 0, KEYS), _fill_block(key_place, scores.shape[-1], KEYS)
    if head_weights is None:
        head_weights = scores.new_full((heads,), 1 / heads if scores.ndim == 1 else 1)

    def logits(q: Tensor, place: Tensor, j: int) -> tuple[Tensor, Tensor]:
        """Cells (Hq, ROWS, KEYS) of the rows q at keys j..., and which (ROWS, KEYS) of them are not visible."""
        k = key.index_select(1, key_order[j : j + KEYS]).to(dtype)
        hidden = key_place[j : j + KEYS] > place[:, None]
        cells = (q @ k.mT).view(heads, ROWS, KEYS)
        if key_bias is not None:
            cells += key_bias.to(dtype)[key_order[j : j + KEYS]]
        return cells.masked_fill_(hidden, -torch.inf), hidden

    total = scores.new_zeros((*scores.shape[:-1], len(key_order)))
    over = (0, 1) if scores.ndim == 1 else 1
    for i in range(0, n_rows, ROWS):
        rows, place = row_order[i : i + ROWS], row_place[i : i + ROWS]
        q = (query.index_select(1, rows).to(dtype) * scale).reshape(kv_heads, -1, query.shape[2])
        # A largest logit and a sum of powers, not its logarithm, whose own rounding would be an error of every share.
        if lse is None:
            largest, power = scores.new_full((heads, ROWS), -torch.inf), scores.new_zeros((heads, ROWS))
            for j in range(0, n_keys, KEYS):
                cells = logits(q, place, j)[0]
                top = largest.maximum(cells.amax(-1))
                base = top.masked_fill(top == -torch.inf, 0)
                power = power * (largest - base).exp() + (cells - base[..., None]).exp().sum(-1)
                largest = top
        else:
            base, power = lse.index_select(1, rows).to(dtype), scores.new_ones((heads, ROWS))
        weight = head_weights[:, None] / power
        for j in range(0, n_keys, KEYS):
            cells, hidden = logits(q, place, j)
            share = cells.sub_(base[..., None]).exp_().mul_(weight[..., None]).masked_fill_(hidden, 0)
            total[..., j : j + KEYS] += share.sum(over)
    length = scores.shape[-1]
    scores[..., key_order[:length]] = total[..., :length] / n_counted.clamp(min=1)


def _fill_block(values: Tensor, value: int, size: int) -> Tensor:
    return F.pad(values, (0, -len(values) % size), value=value)


def select_tokens(
    scores: Tensor,
    candidates: Tensor,
    keep: float | int | Tensor,
    min_keep: int,
    key_mask: Tensor | None,
    segments: Tensor | None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Which tokens (B, L) stay, and how many of each sample. Only sorts and gathers: no order of writes matters.

    With cu_seqlens (N + 1,) the samples stand one after the other in a batch of one, each with segments of its own.
    """
    batch, length = scores.shape
    real = torch.ones_like(candidates) if key_mask is None else key_mask
    if segments is None:
        n_segments, segment = 1, torch.zeros_like(candidates, dtype=torch.int64)
    else:
        n_segments = keep.shape[1] if isinstance(keep, Tensor) and keep.ndim == 2 else length
        segment = segments.to(torch.int64)
    in_range = (segment >= 0) & (segment < n_segments)
    samples = batch
    if cu_seqlens is not None:
        samples = len(cu_seqlens) - 1
        place = torch.arange(length, device=scores.device, dtype=cu_seqlens.dtype)
        sample = torch.searchsorted(cu_seqlens, place, right=True) - 1
        real = real & (sample >= 0) & (sample < samples)
        segment = segment + n_segments * sample
    ranked = candidates & real & in_range
    n_ranges = samples * n_segments // max(batch, 1)  # in a row: of one sample, or of all of them
    segment = segment.masked_fill(~ranked, n_ranges)  # behind all others

    # By segment; inside it by falling score; inside that, both sorts being stable, by rising index.
    order = _ordered(scores).argsort(dim=1, descending=True, stable=True)
    order = order.gather(1, segment.gather(1, order).argsort(dim=1, stable=True))
    segment = segment.gather(1, order)
    bounds = torch.arange(n_ranges + 1, device=scores.device).expand(batch, -1).contiguous()
    starts = torch.searchsorted(segment, bounds)
    counts = starts.diff(dim=1)
    rank = torch.arange(length, device=scores.device) - starts.gather(1, segment)

    if isinstance(keep, Tensor):
        keep = keep.view(samples, -1).expand(samples, n_segments).reshape(batch, -1)
    if isinstance(keep, float) or (isinstance(keep, Tensor) and keep.is_floating_point()):
        keep = (counts.double() * keep).floor()
    budget = torch.zeros_like(counts) + keep
    budget = budget.to(torch.int64).clamp(min=min_keep).minimum(counts)

    chosen = rank < F.pad(budget, (0, 1)).gather(1, segment)
    mask = real & (~ranked | chosen.gather(1, order.argsort(dim=1)))
    if cu_seqlens is None:
        return mask, mask.sum(dim=1)
    return mask, F.pad(mask[0].cumsum(0), (1, 0))[cu_seqlens.long()].diff()


def _ordered(scores: Tensor) -> Tensor:
    """Integers in the order of the floats: -0 equals 0, and NaN is below -inf."""
    if scores.dtype != torch.float64:
        scores = scores.float()
    bits = torch.where(scores == 0, 0, scores).view(torch.int64 if scores.dtype == torch.float64 else torch.int32)
    limits = torch.iinfo(bits.dtype)
    return torch.where(bits < 0, bits ^ limits.max, bits).masked_fill(scores.isnan(), limits.min)


def compact(mask: Tensor, lengths: Tensor, capacity: int, layout: str) -> tuple[Tensor, Tensor]:
    """Places of the True tokens of mask (B, L), and the column of each among them: index (B, capacity), inverse (B, L).

    layout "right", "left": -1 stands behind or in front. "packed": one row (1, capacity) of places in the flat batch.
    """
    if layout == "packed":
        index, inverse = compact(mask.view(1, -1), lengths.sum().view(1), capacity, "right")
        return index, inverse.view(mask.shape)
    index = (~mask).byte().argsort(dim=1, stable=True)[:, :capacity]
    index = index.masked_fill(torch.arange(capacity, device=mask.device) >= lengths[:, None], -1)
    inverse = mask.cumsum(dim=1) - 1
    if layout == "left":
        shift = (capacity - lengths)[:, None]
        place = torch.arange(capacity, device=mask.device) - shift
        index = index.gather(1, place.clamp(min=0)).masked_fill(place < 0, -1)
        inverse = inverse + shift
    return index, inverse.masked_fill(~mask, -1)


def take(tensor: Tensor, index: Tensor, fill: float, planes: bool, flat: bool) -> Tensor:
    """tensor (B, L, ...), or (P, B, L, ...) with planes, at index (B', K); ``fill`` where that is -1.

    The places of index are those of its own sample, or with ``flat`` those of the flat batch of B L.
    """
    length = tensor.shape[1 + planes]
    if length == 0:
        lead = tensor.shape[:planes]
        return tensor.new_full((*lead, *index.shape, *tensor.shape[2 + planes :]), fill)
    place = index.clamp(min=0)
    sample = torch.arange(index.shape[0], device=index.device)[:, None]
    if flat:
        sample, place = place // length, place % length
    taken = tensor[:, sample, place] if planes else tensor[sample, place]
    absent = (index < 0).view(*index.shape, *[1] * (taken.ndim - 2 - planes))
    return taken.masked_fill_(absent, fill)
