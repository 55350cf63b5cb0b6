import re

import pytest

from lyra_model.corpus import load_texts, words_of
from lyra_model.wordnet import WORDNET_DIR, WordNetMissingError, read_wordnet

needs_wordnet = pytest.mark.skipif(
    not (WORDNET_DIR / "data.noun").exists(), reason="no WordNet data files: apt install wordnet-base"
)
JUDGED = ("heldout", "everyday", "demo")


@pytest.fixture(scope="module")
def train():
    return load_texts("train")


@needs_wordnet
def test_training_texts_are_many_and_open(train):
    kinds = [text.kind for text in train]
    assert kinds.count("phrase") > 40_000
    assert kinds.count("question") > 14_000
    assert kinds.count("gloss") > 19_000
    assert len({word for text in train for word in words_of(text.text)}) > 30_000


@needs_wordnet
def test_kinds_are_mixed_from_the_start(train):
    start = [text.kind for text in train[:500]]
    assert all(start.count(kind) > 50 for kind in ("phrase", "question", "gloss"))


@needs_wordnet
def test_same_seed_same_texts(train):
    assert load_texts("train") == train


@needs_wordnet
def test_other_seed_other_questions_and_order(train):
    other = load_texts("train", seed=1)
    assert other[:100] != train[:100]
    assert {text for text in other if text.kind == "question"} != {text for text in train if text.kind == "question"}


@needs_wordnet
def test_no_training_text_shares_five_words_in_a_row_with_a_judged_one(train):
    def runs(words, length):
        return {" ".join(words[start : start + length]) for start in range(len(words) - length + 1)}

    judged = [words_of(text.text) for split in JUDGED for text in load_texts(split)]
    short = {" ".join(words) for words in judged if len(words) < 5}
    five = set().union(*(runs(words, 5) for words in judged))
    assert len(short) > 20 and len(five) > 200
    for text, _ in train:
        words = words_of(text)
        assert not five & runs(words, 5), text
        assert not short & set().union(*(runs(words, length) for length in range(1, 5))), text


@needs_wordnet
def test_dev_texts_are_of_the_same_kinds_but_not_among_the_training_texts(train):
    dev = load_texts("dev")
    assert len(dev) == 400
    assert {text.kind for text in dev} == {text.kind for text in train}
    assert not set(dev) & set(train)


@needs_wordnet
def test_training_texts_can_be_spoken_by_every_voice(train):
    odd = [text.text for text in train if not re.fullmatch(r"[A-Za-z ,.'?!;:-]+", text.text) or "  " in text.text]
    assert odd == []
    assert max(len(text.text.split()) for text in train) <= 20


@needs_wordnet
def test_questions_are_filled_in(train):
    questions = [text.text for text in train if text.kind == "question"]
    openings = {" ".join(words_of(question)[:2]) for question in questions}
    assert len(openings) > 300
    assert all(question[0].isupper() and question[-1] in ".?" for question in questions)


@needs_wordnet
def test_heldout_is_200_phrases_whatever_the_seed():
    heldout = load_texts("heldout")
    assert len(heldout) == len(set(heldout)) == 200
    assert load_texts("heldout", seed=5) == heldout
    assert {text.kind for text in heldout} == {"phrase"}


@pytest.mark.parametrize(("split", "at_least"), [("everyday", 200), ("demo", 6)])
def test_written_questions_need_no_wordnet(split, at_least, tmp_path):
    questions = load_texts(split, wordnet_dir=tmp_path)
    assert len(set(questions)) == len(questions) >= at_least
    assert all(3 <= len(question.text.split()) <= 12 for question in questions)


def test_demo_questions_are_not_among_the_everyday_ones():
    everyday = {tuple(words_of(text.text)) for text in load_texts("everyday")}
    assert not [text for text in load_texts("demo") if tuple(words_of(text.text)) in everyday]


def test_missing_wordnet_names_the_package(tmp_path):
    with pytest.raises(WordNetMissingError, match="wordnet-base"):
        load_texts("train", wordnet_dir=tmp_path)


def test_unknown_split():
    with pytest.raises(ValueError, match=r"split: got 'test', expected one of train"):
        load_texts("test")


@needs_wordnet
def test_wordnet_reads_meanings_and_what_is_below_them():
    wordnet = read_wordnet()
    dog, animal = wordnet.sense("dog", 1), wordnet.sense("animal", 1)
    assert "domestic dog" in dog.words
    assert dog in wordnet.nouns_below([animal], ("~",))
    assert wordnet.is_usual("dog", dog)
    assert not wordnet.is_usual("orderly", wordnet.sense("orderly", 1)), "an adjective more often than a noun"
    assert wordnet.irregular_plurals["mouse"] == "mice"
