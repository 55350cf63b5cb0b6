"""Other rules than Lyra's, through the same three functions: scores to compare with, weights, budgets and schedules.

    last row (FastV)        token_scores(query, key, query_mask=last_row(query_mask), causal=True)
    random, uniform         select_tokens(random_scores(candidates, seed=0), candidates, keep=k)
    the heads that look     token_scores(query, key, head_weights=top_heads(per_head_scores, candidates))
    per window or modality  select_tokens(scores, candidates, segments=segments, keep=relevance_budgets(...))
    shares per layer        apply_token_extractor(model, keep=sigmoid_schedule(...))

Random and uniform selection are strong: no rule is worth its cost that does not beat them on the task at hand.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lyra_ops._checks import FLOAT_DTYPES, INT_DTYPES, check_tensor


def last_row(query_mask: Tensor) -> Tensor:
    """(B, Lq) bool: of the rows that count, the last one alone.

    Source: FastV (ECCV 2024), whose score is the attention of a prompt's last token, mean over heads, causal.
    """
    check_tensor("query_mask", query_mask, shape=("B", "Lq"), dtypes=(torch.bool,))
    return query_mask & (query_mask.flip(1).cumsum(1).flip(1) == 1)


def random_scores(candidates: Tensor, *, seed: int = 0) -> Tensor:
    """(B, L) float32: the same uniform numbers for the 1st, 2nd, ... candidate of every sample, so that neither padding
    nor batch nor device changes what is kept."""
    rank = _rank(candidates)
    numbers = torch.rand(candidates.shape[1], generator=torch.Generator().manual_seed(seed))
    return numbers.to(candidates.device)[rank]


def uniform_scores(candidates: Tensor, keep: float | int, *, min_keep: int = 0) -> Tensor:
    """(B, L) float32: 1 for as many evenly spaced candidates as ``select_tokens(..., keep=keep, min_keep=min_keep)``
    keeps, 0 for the others."""
    rank = _rank(candidates).double()
    n = candidates.sum(1, keepdim=True).double()
    k = (keep * n).floor() if isinstance(keep, float) else torch.full_like(n, keep)
    k = k.clamp(min=min_keep).minimum(n)
    n = n.clamp(min=1)
    return (((rank + 1) * k / n).floor() > (rank * k / n).floor()).float() * candidates


def _rank(candidates: Tensor) -> Tensor:
    check_tensor("candidates", candidates, shape=("B", "L"), dtypes=(torch.bool,))
    return (candidates.cumsum(1) - 1).clamp(min=0)


def top_heads(scores: Tensor, candidates: Tensor, *, share: float = 0.5) -> Tensor:
    """(B, Hq) float32, the ``head_weights`` that leave the heads which look at the candidates most.

    scores (B, Hq, L) of ``token_scores(..., per_head=True)``; of the Hq heads the ceil(share Hq) with the largest sum
    of scores over the candidates get weight 1, the others 0. Of equal sums the lower head wins.

    Source: SparseVLM+ takes the half of the heads with the most mass; HeadRouter (arXiv 2604.23717) weighs them.
    """
    check_tensor("scores", scores, shape=("B", "Hq", "L"), dtypes=FLOAT_DTYPES)
    batch, heads, length = scores.shape
    check_tensor("candidates", candidates, shape=(batch, length), dtypes=(torch.bool,), device=scores.device)
    if not 0 < share <= 1:
        raise ValueError(f"share: got {share}, expected more than 0 and at most 1")
    mass = scores.masked_fill(~candidates[:, None], 0).sum(-1)
    place = mass.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return (place < math.ceil(share * heads)).float()


def relevance_budgets(scores: Tensor, candidates: Tensor, segments: Tensor, keep: float, n_segments: int) -> Tensor:
    """(B, S) int64 for ``keep``: a budget shared out among segments by how much the query looks at each.

    Of floor(keep n) tokens of a sample with n candidates, segment s gets the share that its candidates have in the sum
    of scores: rounded down, at most all of its candidates; what rounding left goes, one each, to the segments with the
    largest remainders that still have room. What a full segment could not take is not given to others.

    scores (B, L) float, not negative; candidates (B, L) bool; segments (B, L) int, 0 to n_segments - 1.

    Source: SEATS (arXiv 2605.20035) shares a budget among temporal windows, then modalities, by query relevance; the
    paper's further rules are not part of it.
    """
    check_tensor("scores", scores, shape=("B", "L"), dtypes=FLOAT_DTYPES)
    shape, device = tuple(scores.shape), scores.device
    check_tensor("candidates", candidates, shape=shape, dtypes=(torch.bool,), device=device)
    check_tensor("segments", segments, shape=shape, dtypes=INT_DTYPES, device=device)
    if not 0 <= keep <= 1:
        raise ValueError(f"keep: got {keep}, expected a share from 0 to 1")
    member = (segments[:, None] == torch.arange(n_segments, device=device)[:, None]) & candidates[:, None]
    counts = member.sum(2)
    mass = torch.where(member, scores[:, None].double(), 0).sum(2)
    total = (keep * candidates.sum(1, keepdim=True).double()).floor()
    quota = (total * mass / mass.sum(1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)).minimum(counts)
    budgets = quota.floor()
    left = (quota.sum(1, keepdim=True) - budgets.sum(1, keepdim=True)).round()
    remainder = torch.where(budgets < counts, quota - budgets, -1.0)
    place = remainder.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return (budgets + ((place < left) & (remainder > 0))).long()


def pyramid_schedule(layers: Sequence[int], left: float | Sequence[float] = 0.5) -> dict[int, float]:
    """{layer: share of what is still there} for drops after these layers, given what shall be left of the original.

    ``left`` one number r: r, r^2, r^3, ... of the original stay; or a share of the original per layer, falling.

    Source: PyramidDrop (CVPR 2025) drops after layers 8, 16 and 24 of 32 to 1/2, 1/4 and 1/8.
    """
    of_original = [left**i for i in range(1, len(layers) + 1)] if isinstance(left, (int, float)) else list(left)
    if len(of_original) != len(layers):
        raise ValueError(f"left: got {len(of_original)} shares, expected one for each of {len(layers)} layers")
    return _relative(dict(zip(layers, of_original)))


def sigmoid_schedule(
    layers: Sequence[int], final: float, *, middle: float | None = None, width: float = 2.0
) -> dict[int, float]:
    """{layer: share of what is still there}, where 1 - (1 - final) / (1 + exp((middle - layer) / width)) is left.

    final   share of the original that the deepest layers would keep
    middle  layer at which half of the drop is done; default: the mean of ``layers``
    width   of the fall, in layers

    Source: the shape of OmniDrop's schedule (arXiv 2605.14458): hardly any drop while modalities are being fused, then
    a steep one. Its constants depend on the model and are the caller's.
    """
    middle = sum(layers) / max(len(layers), 1) if middle is None else middle
    return _relative({i: 1 - (1 - final) / (1 + math.exp((middle - i) / width)) for i in layers})


def blockwise_schedule(left: Mapping[int, float], *, drop_all_after: int | None = None) -> dict[int, float]:
    """{layer: share of what is still there} from {layer: share of the original}, and nothing behind ``drop_all_after``.

    Use with ``min_keep=0``, or ``drop_all_after`` leaves that many.

    Source: the shape of SEATS' schedule (arXiv 2605.20035): blocks of layers with falling shares, and no modality
    tokens in the last ones, where the text has taken in what it needs.
    """
    schedule = _relative(dict(left))
    if drop_all_after is not None:
        schedule = {layer: share for layer, share in schedule.items() if layer < drop_all_after} | {drop_all_after: 0.0}
    return schedule


def _relative(left: Mapping[int, float]) -> dict[int, float]:
    """Shares of what is still there from shares of the original."""
    before, schedule = 1.0, {}
    for layer, share in sorted(left.items()):
        if not 0 <= share <= before:
            raise ValueError(f"left: got {share} after layer {layer}, expected shares from 0 to 1 that do not grow")
        schedule[layer] = share / before if before else 0.0
        before = share
    return schedule
