"""The benchmarks of token dropping: their arithmetic, and that their commands run."""

from __future__ import annotations

import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen2Config, Qwen2ForCausalLM

from bench.model import prefill, recall


@pytest.fixture
def small(monkeypatch) -> None:
    config = Qwen2Config(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=8, num_attention_heads=4,
        num_key_value_heads=2, bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    monkeypatch.setattr(prefill, "shapes", lambda: {"small": (Qwen2ForCausalLM, config)})


@pytest.mark.parametrize("early", [True, False])
@pytest.mark.parametrize("keep, logits", [(1.0, 0), (1.0, 1), (0.7, 1)])
def test_the_flops_are_the_products_that_torch_makes(small, keep, logits, early):
    model = prefill.build("small", "cpu", torch.float32)
    ids = torch.zeros(1, 300, dtype=torch.long)
    with (
        torch.inference_mode(),
        prefill.dropping(model, torch.arange(300)[None] < 300 - prefill.TEXT_TOKENS, keep, early),
        FlopCounterMode(display=False) as counted,
    ):
        model(input_ids=ids, logits_to_keep=logits)
    by_op = counted.get_flop_counts()["Global"]
    linear = sum(n for op, n in by_op.items() if op in (torch.ops.aten.mm, torch.ops.aten.addmm))
    assert linear == prefill.flops(model.config, 300, keep, early, logits)[0]


def test_prefill_writes_what_it_measured(small, tmp_path):
    for lengths in (["200"], ["150", "200"]):
        command = ["small", "--lengths", *lengths, "--keep", "0.7", "--repeats", "1", "--device", "cpu"]
        assert prefill.main([*command, "--json", f"{tmp_path}/p.json"]) == 0
    runs = json.loads((tmp_path / "p.json").read_text())["runs"]
    assert [run["length"] for run in runs] == [150, 200]
    for run in runs:
        assert [row["variant"] for row in run["rows"]] == [name for name, *_ in prefill.variants([0.7])]
        assert all(row["seconds"]["median"] > 0 for row in run["rows"])


def test_recall_writes_figures_and_a_plot(tmp_path):
    assert recall.main(["--seeds", "1", "--steps", "2", "--questions", "16", "--out", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "recall.json").read_text())["rows"]
    assert len(rows) == 2 * len(recall.SCORES) * len(recall.SHARES)
    whole = [r for r in rows if r["share"] == 1]
    assert all(r["kept"] == 1 for r in whole)
    assert len({(r["trained_with_dropping"], r["right"]) for r in whole}) <= 2  # the score has no say
    for row in rows:
        if row["score"] == "uniform" and row["share"] == 0.5:
            assert 0.1 < row["kept"] < 0.9
    assert (tmp_path / "recall.png").stat().st_size > 10_000


@pytest.mark.parametrize("dropping", [False, True])
def test_recall_falls_with_chance_and_holds_under_the_text_guided_score(dropping):
    """Trains for some 7 s: the whole of what the extractor is for."""
    model = recall.train(dropping, seed=0, steps=300)
    fits = recall.ASKED / recall.PAIRS
    expected = [("text", 1, 1), ("text", 2 * fits, 1), ("random", fits, fits), ("uniform", fits, fits)]
    if not dropping:
        expected.append(("text", fits / 2, 0.5))
    for score, share, kept in expected:
        got = recall.judge(model, score, share, 256)
        assert got["kept"] == pytest.approx(kept, abs=0.05), (score, share)
        assert got["right"] == pytest.approx(recall.by_chance(got["kept"]), abs=0.05), (score, share)
    # As well as the text-guided score holds, the last row falls: it finds one of the four.
    text, last = (recall.judge(model, score, fits, 256)["right"] for score in ("text", "last_row"))
    assert text > 0.75 and last < 0.55


def test_a_question_asks_for_some_of_its_pairs():
    keys, values, places = recall.questions(50, torch.Generator().manual_seed(0))
    assert all(len(set(row.tolist())) == recall.PAIRS for row in keys)
    assert all(len(set(row.tolist())) == recall.ASKED for row in places)
    assert keys.max() < recall.KEYS and values.max() < recall.VALUES and places.max() < recall.PAIRS
