"""The texts that the nano Lyra learns from and is judged by.

Training texts come from three sources, so that the vocabulary is open (a closed grammar teaches its grammar alone):

- "phrase": the example phrases of WordNet, about 42,000.
- "question": questions and requests, from data/question_templates.txt filled with words of WordNet.
- "gloss": definitions of WordNet.

They come in random order; behind them stand some 3,500 questions more, from data/close_questions.txt.

Texts to judge by: "heldout", 200 example phrases, and the files data/everyday_questions.txt and
data/demo_questions.txt, all written or fixed before any training. No training text shares five words in a row with
any of them (nor holds one of them whole, where it is shorter than that). To choose between settings there is "dev", 400
texts of the training's own kinds.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from lyra_model.wordnet import WORDNET_DIR, Synset, WordNet, read_wordnet

SPLITS = ("train", "dev", "heldout", "everyday", "demo")

_DATA = Path(__file__).parent / "data"
_HELDOUT_PHRASES = 200
_DEV_TEXTS = 400
_QUESTIONS = 15_000
_CLOSE_QUESTIONS = 3_600
_GLOSSES = 20_000
_SHARED_WORDS = 5
_SPEAKABLE = re.compile(r"[A-Za-z][A-Za-z ,'?!;:-]*[A-Za-z'][.?!]?")
_WORDS = re.compile(r"[a-z']+")


class Text(NamedTuple):
    """Something to say, and its kind: "phrase", "question" (or request) or "gloss"."""

    text: str
    kind: str


def load_texts(split: str, seed: int = 0, wordnet_dir: Path = WORDNET_DIR) -> list[Text]:
    """The texts of a split.

    Args:
        split: "train" and "dev" (all kinds, in random order), "heldout" (phrases), "everyday" or "demo" (questions).
        seed: draws the questions and the order of train and dev together; the other splits never change.
        wordnet_dir: where the data files of WordNet 3.0 lie; "everyday" and "demo" do without.

    Raises:
        ValueError: an unknown split.
        WordNetMissingError: WordNet is not installed; the message names the package.
    """
    if split not in SPLITS:
        raise ValueError(f"split: got {split!r}, expected one of {', '.join(SPLITS)}")
    if split in ("everyday", "demo"):
        return [Text(question, "question") for question in _read_lines(f"{split}_questions.txt")]
    wordnet = read_wordnet(wordnet_dir)
    phrases = list(_unique(_example_phrases(wordnet)))
    heldout = _choose_heldout(phrases)
    if split == "heldout":
        return [Text(phrase, "phrase") for phrase in heldout]

    rng = random.Random(seed)
    common_words = Counter(word for phrase in phrases for word in words_of(phrase))
    slots = _slot_words(wordnet, common_words)
    questions = _questions("question_templates.txt", _QUESTIONS, slots, wordnet.irregular_plurals, rng)
    glosses = list(_unique(_glosses(wordnet)))
    rng.shuffle(glosses)
    candidates = [
        *(Text(phrase, "phrase") for phrase in phrases),
        *(Text(question, "question") for question in questions),
        *(Text(gloss, "gloss") for gloss in glosses[:_GLOSSES]),
    ]
    kept_apart = _Overlap([*heldout, *_read_lines("everyday_questions.txt"), *_read_lines("demo_questions.txt")])
    texts = [candidate for candidate in candidates if not kept_apart.found_in(candidate.text)]
    rng.shuffle(texts)
    if split == "dev":
        return texts[-_DEV_TEXTS:]
    more = _questions("close_questions.txt", _CLOSE_QUESTIONS, slots, wordnet.irregular_plurals, rng)
    known = {tuple(words_of(text.text)) for text in texts}
    new = [Text(q, "question") for q in more if tuple(words_of(q)) not in known and not kept_apart.found_in(q)]
    rng.shuffle(new)
    return texts[:-_DEV_TEXTS] + new


def words_of(text: str) -> list[str]:
    """The words of `text` in lower case, without punctuation: what counts as the same text."""
    return _WORDS.findall(text.lower().replace("-", " "))


class _Overlap:
    """Finds what texts share with the texts to judge by: five words in a row, or the whole of a shorter one."""

    def __init__(self, judged: Iterable[str]) -> None:
        self._runs = {run for text in judged for run in _runs(words_of(text), _SHARED_WORDS)}
        self._lengths = {len(run) for run in self._runs}

    def found_in(self, text: str) -> bool:
        words = words_of(text)
        return any(run in self._runs for length in self._lengths for run in _runs(words, length))


def _runs(words: list[str], length: int) -> Iterator[tuple[str, ...]]:
    length = min(length, len(words))
    return (tuple(words[start : start + length]) for start in range(len(words) - length + 1))


def _choose_heldout(phrases: list[str]) -> list[str]:
    """Phrases of at least four words, chosen by a hash of the text, hence whatever else the corpus holds."""
    long_enough = [phrase for phrase in phrases if len(words_of(phrase)) >= 4]
    return sorted(long_enough, key=lambda phrase: hashlib.sha256(phrase.encode()).digest())[:_HELDOUT_PHRASES]


def _example_phrases(wordnet: WordNet) -> Iterator[str]:
    for synset in wordnet.synsets.values():
        if not _has_usage_note(synset):
            for phrase in re.findall(r'"([^"]*)"', synset.gloss):
                phrase = phrase.strip()
                if _is_speakable(phrase) and 2 <= len(phrase.split()) <= 14:
                    yield phrase


def _glosses(wordnet: WordNet) -> Iterator[str]:
    for synset in wordnet.synsets.values():
        if _has_usage_note(synset):
            continue
        definition = re.sub(r"\([^)]*\)", "", synset.gloss.partition('"')[0]).partition(";")[0]
        definition = " ".join(definition.split()).strip(" ,:")
        while len(definition.split()) > 14 and "," in definition:
            definition = definition.rpartition(",")[0]
        if 4 <= len(definition.split()) <= 14 and definition.islower() and _is_speakable(definition):
            yield definition


def _is_speakable(text: str) -> bool:
    """Plain words that every voice reads the same way: no digits, abbreviations, capitals in a row."""
    return bool(_SPEAKABLE.fullmatch(text)) and not re.search(
        r"[A-Z]{2}|--|\s\s| '\w+'|\b[b-hj-zB-HJ-Z]\b(?<!'.)", text
    )


def _has_usage_note(synset: Synset) -> bool:
    """Slurs, obscenities and slang carry one (";u"); the few plain phrases that do as well are not missed."""
    return any(symbol == ";u" for symbol, _ in synset.pointers)


# Slots of the question templates: the nouns below these meanings of these words.
_KINDS = {
    "animal": [("animal", 1)],
    "bird": [("bird", 1)],
    "food": [("food", 2)],
    "drink": [("beverage", 1)],
    "tool": [("tool", 1), ("kitchen utensil", 1)],
    "vehicle": [("vehicle", 1)],
    "instrument": [("musical instrument", 1)],
    "furniture": [("furniture", 1)],
    "clothing": [("garment", 1), ("footwear", 2), ("hat", 1)],
    "bodypart": [("external body part", 1)],
    "job": [("worker", 1), ("professional", 1), ("artist", 1), ("scientist", 1)],
    "building": [("building", 1)],
    "room": [("room", 1)],
    "sport": [("sport", 1)],
    "plant": [("tree", 1), ("flower", 1), ("herb", 1)],
    "emotion": [("emotion", 1)],
    "disease": [("disease", 1)],
}
_INSTANCES = {
    "country": [("country", 2)],
    "city": [("city", 1)],
    "person": [("person", 1)],
}
_SLOT = re.compile(r"\{(?:(a|s):)?(\w+)\}")
_CHOICE = re.compile(r"\[([^\[\]]*)\]")


def _questions(
    name: str, count: int, slots: dict[str, list[str]], plurals: dict[str, str], rng: random.Random
) -> list[str]:
    """Every template without slots once, then the others in turn until there are ``count`` different questions."""
    templates = [line for line in _read_lines(name) if not line.startswith("@")]
    open_templates = [template for template in templates if "{" in template]
    questions = dict.fromkeys(template for template in templates if "{" not in template and "[" not in template)
    while len(questions) < count:
        for template in open_templates:
            questions[_fill(template, slots, plurals, rng)] = None
    return list(_unique(questions))[:count]


def _slot_words(wordnet: WordNet, common_words: Counter[str]) -> dict[str, list[str]]:
    def is_common(word: str, synset: Synset) -> bool:
        return word.isalpha() and common_words[word] > 0 and wordnet.is_usual(word, synset)

    def words(synsets: Iterable[Synset], accept: Callable[[str, Synset], bool]) -> list[str]:
        allowed = [synset for synset in synsets if not _has_usage_note(synset)]
        return list(dict.fromkeys(word for synset in allowed for word in synset.words if accept(word, synset)))

    slots = {}
    for name, roots in _KINDS.items():
        synsets = wordnet.nouns_below([wordnet.sense(*root) for root in roots], ("~",))
        slots[name] = words(synsets, is_common)
    for name, roots in _INSTANCES.items():
        synsets = wordnet.nouns_below([wordnet.sense(*root) for root in roots], ("~", "~i"))
        proper = [synset for synset in synsets if any(symbol == "@i" for symbol, _ in synset.pointers)]
        slots[name] = [synset.words[0] for synset in proper if _is_speakable(synset.words[0])]
    for name, part_of_speech in (("noun", "noun"), ("verb", "verb"), ("adjective", "adj")):
        synsets = [synset for synset in wordnet.synsets.values() if synset.part_of_speech == part_of_speech]
        slots[name] = words(
            synsets, lambda word, synset: len(word) > 2 and common_words[word] > 2 and is_common(word, synset)
        )
    for name in ("question_templates.txt", "close_questions.txt"):
        for line in _read_lines(name):
            if line.startswith("@"):
                slot, _, own = line[1:].partition(":")
                slots[slot] = [word.strip() for word in own.split(",")]
    return slots


def _fill(template: str, slots: dict[str, list[str]], plurals: dict[str, str], rng: random.Random) -> str:
    def slot_word(match: re.Match[str]) -> str:
        form, name = match.groups()
        word = rng.choice(slots[name])
        if form == "a":
            return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"
        return _plural(word, plurals) if form == "s" else word

    chosen = _CHOICE.sub(lambda match: rng.choice(match.group(1).split("|")), template)
    filled = " ".join(_SLOT.sub(slot_word, chosen).split())
    return re.sub(r" (?=[?.,])", "", filled[0].upper() + filled[1:])


def _plural(noun: str, irregular: dict[str, str]) -> str:
    if noun in irregular:
        return irregular[noun]
    if re.search(r"(s|x|z|ch|sh)$", noun):
        return noun + "es"
    return noun[:-1] + "ies" if re.search(r"[^aeiou]y$", noun) else noun + "s"


def _unique(texts: Iterable[str]) -> Iterator[str]:
    """The first of all texts with the same words."""
    seen: set[tuple[str, ...]] = set()
    for text in texts:
        words = tuple(words_of(text))
        if words not in seen:
            seen.add(words)
            yield text


def _read_lines(name: str) -> list[str]:
    lines = (_DATA / name).read_text(encoding="ascii").splitlines()
    return [line for line in lines if line and not line.startswith("#")]
