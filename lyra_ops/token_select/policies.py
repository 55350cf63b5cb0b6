"""Other rules than Lyra's, through the same three functions: scores to compare with, weights, budgets and schedules.

    last row (FastV)        token_scores(query, key, query_mask=last_row(query_mask), causal=True)
    last window (SnapKV)    token_scores(query[:, :, -32:], key, causal=True, per_head=True), then pooled along the keys
    random, uniform         select_tokens(random_scores(candidates, seed=0), candidates, keep=k)
    the heads that look     token_scores(query, key, head_weights=top_heads(per_head_scores, candidates))
    per window or modality  select_tokens(scores, candidates, segments=segments, keep=relevance_budgets(...))
    shares per layer        apply_token_extractor(model, keep=seats_schedule(0.7, entering=1.0), min_keep=0)

Random and uniform selection are strong: no rule is worth its cost that does not beat them on the task at hand.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lyra_ops._checks import FLOAT_DTYPES, INT_DTYPES, check_tensor, readable
from lyra_ops.token_select.checks import check_share
from lyra_ops.token_select.selection import check_count, check_keep, check_segments


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


def uniform_scores(candidates: Tensor, keep: float | int | Tensor, *, min_keep: int = 0) -> Tensor:
    """(B, L) float32: 1 for as many evenly spaced candidates as ``select_tokens(..., keep=keep, min_keep=min_keep)``
    keeps, 0 for the others."""
    rank = _rank(candidates).double()
    keep = check_keep(keep, candidates.shape[0], None, candidates.device)
    check_count("min_keep", min_keep)
    n = candidates.sum(1, keepdim=True).double()
    shares = isinstance(keep, float) or (isinstance(keep, Tensor) and keep.is_floating_point())
    keep = keep[:, None] if isinstance(keep, Tensor) else keep
    k = (keep * n).floor() if shares else torch.zeros_like(n) + keep
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
    check_share("keep", keep)
    check_count("n_segments", n_segments)
    if readable(segments):
        check_segments(segments, candidates, n_segments)
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

    A fall in depth of your own; `omnidrop_schedule` is the published one.
    """
    check_share("final", final)
    if not width > 0:
        raise ValueError(f"width: got {width}, expected more than 0")
    middle = sum(layers) / max(len(layers), 1) if middle is None else middle
    return _relative({i: 1 - (1 - final) / (1 + math.exp((middle - i) / width)) for i in layers})


def blockwise_schedule(left: Mapping[int, float], *, drop_all_after: int | None = None) -> dict[int, float]:
    """{layer: share of what is still there} from {layer: share of the original}, and nothing behind ``drop_all_after``.

    Use with ``min_keep=0``, or ``drop_all_after`` leaves that many.

    Blocks of your own; `seats_schedule` are the published ones.
    """
    schedule = _relative(dict(left))
    if drop_all_after is not None:
        schedule = {layer: share for layer, share in schedule.items() if layer < drop_all_after} | {drop_all_after: 0.0}
    return schedule


def omnidrop_schedule(
    n_layers: int = 28, *, first: float = 0.0, final: float = 0.2, middle: float = 0.5, steepness: float = 20.0
) -> dict[int, float]:
    """{layer: share of what is still there} behind every layer l but the last: 1 - p_l, where

        p_l = first + (final - first) / (1 + exp(steepness (middle - l / n_layers)))

    Published, for what enters the decoder having been cut to some 45 %, and for 30 or 20 % on average over its layers:

        Qwen2.5-Omni-7B, n_layers=28     30 %: the defaults     20 %: first=0.02, final=0.5
        Qwen2.5-Omni-3B, n_layers=36     30 %: final=0.15       20 %: first=0.02, final=0.5, middle=0.55

    The paper drops floor(p_l n) of n tokens; floor((1 - p_l) n) of them kept is at most one less. Its bonus for
    distance in time is a ``bias`` of `select_tokens`.

    Source: OmniDrop (arXiv 2605.14458), equations 3 and 4 and section 4, as a reproduction by others quotes them.
    """
    check_share("first", first)
    check_share("final", final)
    falls = (1 / (1 + math.exp(steepness * (middle - layer / n_layers))) for layer in range(n_layers - 1))
    return {layer: 1 - first - (final - first) * fall for layer, fall in enumerate(falls)}


def seats_schedule(
    average: float,
    *,
    entering: float | None = None,
    n_layers: int = 28,
    drops: Sequence[int] = (16, 18, 20),
    late: int = 24,
) -> dict[int, float]:
    """{layer: share of what is still there} by which ``average`` of the tokens is left, mean over all layers.

    average   share of the original number of modality tokens
    entering  share of it that enters the decoder; published: 1.4 ``average``, at most 1
    drops     layers in front of which tokens are dropped, counted from 0; of all that go there, the i-th drop takes the
              share exp(i) / (1 + e + e^2 + ...)
    late      layer, counted from 1, which like all deeper ones and the one in front of it sees no modality tokens

    Published: the defaults for Qwen2.5-Omni-7B; n_layers=48, drops=(27, 31, 35), late=40 for Qwen3-Omni-30B-A3B; video
    0.1 and audio 0.45 for 15 % in all, which differ in what enters alone: in the decoder both lose the same shares. Use
    with ``min_keep=0``. `apply_token_extractor` drops nothing in front of the decoder; where nothing else does, all
    tokens enter: ``seats_schedule(0.7, entering=1.0)``.

    Raises ValueError where the tokens that enter are too few or too many for that average.

    Source: SEATS (arXiv 2605.20035), the schedule and the constants of its published code.
    """
    check_share("average", average)
    entering = min(1.0, 1.4 * average) if entering is None else entering
    check_share("entering", entering)
    ends = [*drops, late - 1]
    weights = [math.exp(i) for i in range(len(drops))]
    gone = [sum(weights[: i + 1]) / sum(weights) for i in range(len(drops))]  # behind each drop, of all that go
    most = entering * ends[-1]
    most_dropped = entering * sum((end - start) * g for start, end, g in zip(ends, ends[1:], gone))
    if not most - most_dropped <= average * n_layers <= most:
        low, high = (most - most_dropped) / n_layers, most / n_layers
        raise ValueError(
            f"average: got {average}, expected {low:.3g} to {high:.3g}, since {entering:.3g} enter; "
            "`entering` changes that"
        )
    dropped = (most - average * n_layers) / most_dropped
    return blockwise_schedule({drop - 1: 1 - dropped * g for drop, g in zip(drops, gone)}, drop_all_after=ends[-1] - 1)


def _relative(left: Mapping[int, float]) -> dict[int, float]:
    """Shares of what is still there from shares of the original."""
    before, schedule = 1.0, {}
    for layer, share in sorted(left.items()):
        if not 0 <= share <= before:
            raise ValueError(f"left: got {share} after layer {layer}, expected shares from 0 to 1 that do not grow")
        schedule[layer] = share / before if before else 0.0
        before = share
    return schedule
