"""What the tables about nano's training count."""

from collections import Counter

import pytest

pytest.importorskip("jiwer")
pytest.importorskip("accelerate")
from bench.model.nano import heard_words, learned_texts
from lyra_model.corpus import load_texts
from lyra_model.wordnet import WORDNET_DIR


def test_heard_words_are_told_apart_by_how_often_training_held_them():
    counts = Counter({"the": 5000, "cat": 30, "sat": 30, "zany": 2})
    rows = [
        {"voice": "a", "said": "The zany cat sat.", "heard": "the cat sat"},
        {"voice": "a", "said": "the ogre", "heard": "the ogre"},
        {"voice": "b", "said": "the zany cat", "heard": "zany cat"},
    ]
    got = {(row["voice"], *row["times in training"]): (row["words"], row["heard"]) for row in heard_words(rows, counts)}
    assert got == {
        ("a", 0, 0): (1, 1.0),
        ("a", 1, 2): (1, 0.0),
        ("a", 21, 100): (2, 1.0),
        ("a", 1001, 10**9): (2, 1.0),
        ("b", 1, 2): (1, 1.0),
        ("b", 21, 100): (1, 1.0),
        ("b", 1001, 10**9): (1, 0.0),
    }


@pytest.mark.skipif(not (WORDNET_DIR / "data.noun").exists(), reason="no WordNet data files: apt install wordnet-base")
def test_learned_texts_are_those_of_all_runs_in_a_chain():
    texts = [text.text for text in load_texts("train")]
    first = {"utterances": 3}
    assert learned_texts(first) == texts[:3]
    assert learned_texts({"utterances": 2, "start": 500, "init": first}) == texts[:3] + texts[500:502]
