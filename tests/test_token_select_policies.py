"""Scores, budgets and schedules of other methods, against their formulas."""

from __future__ import annotations

import math
import re
import statistics

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import lyra_ops
from lyra_ops.testing import assert_within_reference_error
from lyra_ops.token_select import policies


def attention(query: torch.Tensor, key: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Causal attention weights (B, Hq, Lq, L) of the last Lq positions, the whole matrix."""
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    logits = query.to(dtype) @ key.to(dtype).mT / math.sqrt(query.shape[-1])
    rows, length = logits.shape[-2:]
    hidden = torch.ones(rows, length, dtype=torch.bool).triu(length - rows + 1)
    return logits.masked_fill(hidden, -torch.inf).softmax(-1)


def tensors(rows: int = 70, length: int = 300) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return torch.randn(2, 6, rows, 16, generator=g), torch.randn(2, 2, length, 16, generator=g)


def test_fastv_looks_from_the_last_real_row():
    query, key = tensors()
    counted = torch.ones(2, 70, dtype=torch.bool)
    counted[1, 60:] = False
    got = lyra_ops.token_scores(query, key, query_mask=policies.last_row(counted), causal=True)
    plain, exact = (
        torch.stack([attention(query, key, dtype)[b, :, row].mean(0) for b, row in enumerate((69, 59))])
        for dtype in (torch.float32, torch.float64)
    )
    assert_within_reference_error(got, plain, exact)
    assert not policies.last_row(torch.zeros(2, 5, dtype=torch.bool)).any()


def test_snapkv_pools_the_window_of_each_head():
    query, key = tensors()
    window, kernel = 32, 5
    got = lyra_ops.token_scores(query[:, :, -window:], key, causal=True, per_head=True) * window
    got = F.avg_pool1d(got[..., :-window], kernel, stride=1, padding=kernel // 2)
    votes = {d: attention(query, key, d)[:, :, -window:, :-window].sum(2) for d in (torch.float32, torch.float64)}
    plain, exact = (F.avg_pool1d(v, kernel, stride=1, padding=kernel // 2) for v in votes.values())
    assert_within_reference_error(got, plain, exact)
    kept = lyra_ops.select_tokens(got[0], torch.ones(6, 268, dtype=torch.bool), keep=100).index
    assert torch.equal(kept, exact[0].topk(100).indices.sort().values)


def test_pyramiddrop_looks_from_the_instruction_and_counts_from_the_original():
    query, key = tensors(rows=300)
    image = torch.zeros(2, 300, dtype=torch.bool)
    image[:, 20:277] = True
    last_instruction = torch.zeros(2, 300, dtype=torch.bool)
    last_instruction[:, 290] = True
    scores = lyra_ops.token_scores(query, key, query_mask=last_instruction, causal=True)
    exact = attention(query, key, torch.float64)[:, :, 290].mean(1)
    assert_within_reference_error(scores, attention(query, key, torch.float32)[:, :, 290].mean(1), exact)
    schedule = policies.pyramid_schedule([8, 16, 24])
    assert schedule == {8: 0.5, 16: 0.5, 24: 0.5}
    assert policies.pyramid_schedule([2, 4], [0.8, 0.2]) == {2: 0.8, 4: pytest.approx(0.25)}
    # Its counts: floors of shares of the original number.
    counts = [math.floor(257 * 0.5**stage) for stage in (1, 2, 3)]
    for count in counts:
        kept = lyra_ops.select_tokens(scores, image, keep=count)
        best = (exact[0].masked_fill(~image[0], -1)).topk(count).indices.sort().values
        assert torch.equal(kept.index[0][image[0][kept.index[0]]], best)


def test_random_and_uniform():
    candidates = torch.zeros(2, 40, dtype=torch.bool)
    candidates[0, 5:37] = True
    candidates[1, 1:33] = True
    draws = policies.random_scores(candidates, seed=3)
    assert torch.equal(draws[0, 5:37], draws[1, 1:33])  # the same tokens wherever they stand
    assert not torch.equal(draws, policies.random_scores(candidates, seed=4))
    for keep, min_keep, n in ((0.25, 0, 8), (5, 0, 5), (0.1, 7, 7), (1.0, 0, 32), (50, 0, 32)):
        scores = policies.uniform_scores(candidates, keep, min_keep=min_keep)
        selection = lyra_ops.select_tokens(scores, candidates, keep=keep, min_keep=min_keep)
        assert torch.equal(selection.mask, scores.bool() | ~candidates)
        gaps = scores[0].nonzero()[:, 0].diff()
        assert len(gaps) == n - 1 and gaps.max() - gaps.min() <= 1


def test_uniform_takes_what_select_tokens_takes():
    candidates = torch.ones(2, 10, dtype=torch.bool)
    for keep in (torch.tensor([3, 20]), torch.tensor([0.39, 1.0], dtype=torch.float64), np.float32(0.5), np.int64(3)):
        scores = policies.uniform_scores(candidates, keep)
        assert torch.equal(lyra_ops.select_tokens(scores, candidates, keep=keep).mask, scores.bool())


def test_heads_that_look_at_the_candidates():
    scores = torch.zeros(1, 4, 6)
    scores[0, :, 0] = torch.tensor([0.2, 0.9, 0.2, 0.5])
    scores[0, :, 5] = 1 - scores[0, :, 0]
    candidates = torch.arange(6)[None] < 3
    assert policies.top_heads(scores, candidates).tolist() == [[0, 1, 0, 1]]
    assert policies.top_heads(scores, candidates, share=0.75).tolist() == [[1, 1, 0, 1]]  # the lower of equals
    query, key = tensors()
    each = lyra_ops.token_scores(query, key, per_head=True)
    weights = policies.top_heads(each, torch.arange(300).expand(2, -1) < 100)
    got = lyra_ops.token_scores(query, key, head_weights=weights)
    expected = torch.stack([each[b][weights[b].bool()].mean(0) for b in range(2)])
    torch.testing.assert_close(got, expected)
    with pytest.raises(ValueError, match="^share: got 0"):
        policies.top_heads(scores, candidates, share=0)


def test_budgets_follow_relevance():
    scores = torch.tensor([[0.4, 0.1, 0.05, 0.05, 0.1, 0.1, 0.2, 0.0]])
    segments = torch.tensor([[0, 0, 1, 1, 1, 1, 2, 2]])
    candidates = torch.ones(1, 8, dtype=torch.bool)
    # half of eight: 4 x (0.5, 0.3, 0.2) = 2, 1.2, 0.8
    budgets = policies.relevance_budgets(scores, candidates, segments, 0.5, 3)
    assert budgets.tolist() == [[2, 1, 1]]
    selection = lyra_ops.select_tokens(scores, candidates, keep=budgets, segments=segments)
    assert selection.index.tolist() == [[0, 1, 4, 6]]
    # A full segment takes no more than it has, and nothing is kept of what nobody looks at.
    assert policies.relevance_budgets(scores, candidates, segments, 0.75, 3).tolist() == [[2, 2, 1]]
    assert policies.relevance_budgets(scores, candidates & (segments > 0), segments, 0.5, 3).tolist() == [[0, 2, 1]]
    assert policies.relevance_budgets(scores * 0, candidates, segments, 0.5, 3).tolist() == [[0, 0, 0]]


def left(schedule: dict[int, float]) -> list[float]:
    """Shares of the original that a schedule leaves."""
    return torch.tensor(list(schedule.values()), dtype=torch.float64).cumprod(0).tolist()


def test_schedules():
    layers = list(range(28))
    sigmoid = policies.sigmoid_schedule(layers, 0.1, middle=14, width=2)
    assert left(sigmoid)[14] == pytest.approx(0.55)
    assert left(sigmoid)[0] > 0.99 and left(sigmoid)[27] == pytest.approx(0.1, rel=0.02)
    assert all(0 <= share <= 1 for share in sigmoid.values())
    blocks = policies.blockwise_schedule({4: 0.8, 12: 0.4, 20: 0.1}, drop_all_after=18)
    assert blocks == {4: 0.8, 12: 0.5, 18: 0.0}
    assert policies.blockwise_schedule({}, drop_all_after=3) == {3: 0.0}
    with pytest.raises(ValueError, match="^left: got 0.9 after layer 5, expected shares from 0 to 1 that do not grow"):
        policies.blockwise_schedule({4: 0.8, 5: 0.9})
    with pytest.raises(ValueError, match="^left: got 1 shares, expected one for each of 2 layers"):
        policies.pyramid_schedule([1, 2], [0.5])


@pytest.mark.parametrize(
    ("n_layers", "drops", "late", "average"),
    [(28, (16, 18, 20), 24, 0.1), (28, (16, 18, 20), 24, 0.45), (48, (27, 31, 35), 40, 0.3)],
)
def test_schedule_of_seats(n_layers: int, drops: tuple[int, ...], late: int, average: float):
    schedule = policies.seats_schedule(average, n_layers=n_layers, drops=drops, late=late)
    assert list(schedule) == [*(drop - 1 for drop in drops), late - 2] and schedule[late - 2] == 0
    shares, left = [], min(1.4 * average, 1)
    for layer in range(n_layers):
        shares.append(left)
        left *= schedule.get(layer, 1)
    assert statistics.mean(shares) == pytest.approx(average)
    steps = [shares[drop - 1] - shares[drop] for drop in drops]
    assert steps[1] / steps[0] == pytest.approx(math.e) and steps[2] / steps[1] == pytest.approx(math.e)


def test_published_numbers_of_seats():
    # Worked out by hand: 0.14 x 23 - 0.1 x 28 = 0.42 to drop, of at most 0.14 x (2 x 0.090 + 2 x 0.335 + 3).
    schedule = policies.seats_schedule(0.1)
    assert schedule == {15: pytest.approx(0.9298, abs=1e-4), 17: pytest.approx(0.7949, abs=1e-4),
                        19: pytest.approx(0.2986, abs=1e-4), 22: 0}  # fmt: skip
    # Of a model into which all tokens go, 0.7 of them are left on average.
    shares = [1.0, *left(policies.seats_schedule(0.7, entering=1.0))]
    assert statistics.mean(share for share, n in zip(shares, (16, 2, 2, 3, 5)) for _ in range(n)) == pytest.approx(0.7)
    with pytest.raises(ValueError, match="^average: got 0.1, expected 0.342 to 0.411, since 0.5 enter"):
        policies.seats_schedule(0.1, entering=0.5)


def test_schedule_of_omnidrop():
    schedule = policies.omnidrop_schedule()
    assert list(schedule) == list(range(27))  # behind the last layer nothing is left to save
    assert schedule[14] == pytest.approx(0.9)
    assert schedule[0] == pytest.approx(1, abs=1e-4) and schedule[26] == pytest.approx(0.8, abs=1e-3)
    # 45 % enter; the paper aims at a mean of 30 %.
    shares = [0.45 * left for left in (1.0, *torch.tensor(list(schedule.values())).cumprod(0).tolist())]
    assert statistics.mean(shares) == pytest.approx(0.302, abs=5e-4)
    steep = policies.omnidrop_schedule(36, first=0.02, final=0.5, middle=0.55)
    assert steep[0] == pytest.approx(0.98, abs=1e-3) and steep[34] < 0.51


MASK, SCORES = torch.ones(1, 4, dtype=torch.bool), torch.full((1, 4), 0.25)
ERRORS = {
    "keep: got 1.5, expected a share from 0 to 1": lambda: policies.uniform_scores(MASK, 1.5),
    "keep: got -1, expected at least 0": lambda: policies.uniform_scores(MASK, -1),
    "keep: got shape (2,), expected (1,)": lambda: policies.uniform_scores(MASK, torch.tensor([2, 1])),
    "min_keep: got -1, expected at least 0": lambda: policies.uniform_scores(MASK, 2, min_keep=-1),
    "share: got 2, expected more than 0 and at most 1": lambda: policies.top_heads(SCORES[None], MASK, share=2),
    "keep: got 3, expected a share from 0 to 1": lambda: policies.relevance_budgets(SCORES, MASK, MASK.long(), 3, 2),
    "segments: candidate 0 of sample 0 has 1, expected 0 to 0": lambda: policies.relevance_budgets(
        SCORES, MASK, MASK.long(), 0.5, 1
    ),
    "final: got 1.5, expected a share from 0 to 1": lambda: policies.omnidrop_schedule(final=1.5),
    "first: got str, expected a share from 0 to 1": lambda: policies.omnidrop_schedule(first="0"),
    "final: got -0.1, expected a share from 0 to 1": lambda: policies.sigmoid_schedule([1], -0.1),
    "width: got 0, expected more than 0": lambda: policies.sigmoid_schedule([1], 0.5, width=0),
    "average: got -0.1, expected a share from 0 to 1": lambda: policies.seats_schedule(-0.1),
    "average: got str, expected a share from 0 to 1": lambda: policies.seats_schedule("0.1"),
    "entering: got 2, expected a share from 0 to 1": lambda: policies.seats_schedule(0.5, entering=2),
    "average: got 0.15, expected 0.0901 to 0.14, since 0.21 enter; `entering` changes that": lambda: (
        policies.seats_schedule(0.15, n_layers=6, drops=(1, 2, 3), late=5)
    ),
}


@pytest.mark.parametrize("message", ERRORS)
def test_errors_name_the_argument(message: str):
    with pytest.raises((ValueError, TypeError), match="^" + re.escape(message)):
        ERRORS[message]()
