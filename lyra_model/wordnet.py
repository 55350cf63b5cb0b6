"""What the corpus needs of WordNet 3.0: its synsets, read from the data files of Debian's package wordnet-base.

File format: the manual page wndb(5WN).
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

WORDNET_DIR = Path("/usr/share/wordnet")

_PARTS_OF_SPEECH = ("noun", "verb", "adj", "adv")
_SYNSET_TYPES = {"1": "noun", "2": "verb", "3": "adj", "4": "adv", "5": "adj"}


class WordNetMissingError(FileNotFoundError):
    """The WordNet data files are not where they should be; the message names the package to install."""


@dataclass(frozen=True)
class Synset:
    """One meaning: its words (spaces, no underscores), what it points at, its definition and examples in one string."""

    part_of_speech: str
    offset: str
    words: tuple[str, ...]
    pointers: tuple[tuple[str, str], ...]  # (symbol, target offset)
    gloss: str


@dataclass
class WordNet:
    """All synsets by (part of speech, offset), and for each word its synsets, the most common meaning first."""

    synsets: dict[tuple[str, str], Synset] = field(default_factory=dict)
    senses: dict[tuple[str, str], list[str]] = field(default_factory=dict)
    uses: dict[str, Counter[str]] = field(default_factory=dict)
    """How often a word was found as noun, verb, ... in the texts whose meanings WordNet's authors tagged."""
    irregular_plurals: dict[str, str] = field(default_factory=dict)

    def sense(self, word: str, number: int, part_of_speech: str = "noun") -> Synset:
        """Meaning `number` (from 1, in order of frequency) of `word`."""
        return self.synsets[part_of_speech, self.senses[part_of_speech, word][number - 1]]

    def is_usual(self, word: str, synset: Synset) -> bool:
        """Whether `word` most often means `synset`."""
        lemma = word.lower()
        uses = self.uses.get(lemma)
        usual_part = uses.most_common(1)[0][0] if uses else synset.part_of_speech
        return usual_part == synset.part_of_speech and self.senses[synset.part_of_speech, lemma][0] == synset.offset

    def nouns_below(self, roots: list[Synset], symbols: tuple[str, ...]) -> list[Synset]:
        """The synsets reached from `roots` by pointers such as "~" (is a kind of) and "~i" (is an instance of)."""
        found: dict[str, Synset] = {}
        waiting = list(roots)
        while waiting:
            for symbol, offset in waiting.pop().pointers:
                if symbol in symbols and offset not in found:
                    found[offset] = self.synsets["noun", offset]
                    waiting.append(found[offset])
        return list(found.values())


@functools.cache
def read_wordnet(directory: Path = WORDNET_DIR) -> WordNet:
    """Read `directory`, once; WordNetMissingError if it holds no WordNet."""
    wordnet = WordNet()
    try:
        for part_of_speech in _PARTS_OF_SPEECH:
            for line in _lines(directory / f"data.{part_of_speech}"):
                synset = _parse_synset(part_of_speech, line)
                wordnet.synsets[part_of_speech, synset.offset] = synset
            for line in _lines(directory / f"index.{part_of_speech}"):
                lemma, *fields = line.split()
                wordnet.senses[part_of_speech, lemma.replace("_", " ")] = fields[-int(fields[1]) :]
        for line in _lines(directory / "cntlist.rev"):
            sense_key, _, count = line.split()
            lemma, _, lexical_sense = sense_key.partition("%")
            uses = wordnet.uses.setdefault(lemma.replace("_", " "), Counter())
            uses[_SYNSET_TYPES[lexical_sense[0]]] += int(count)
        for line in _lines(directory / "noun.exc"):
            plural, singular = line.split()[:2]
            wordnet.irregular_plurals.setdefault(singular, plural)
    except FileNotFoundError as error:
        raise WordNetMissingError(
            f"no WordNet at {error.filename}: apt install wordnet-base (or copy its data files there)"
        ) from error
    return wordnet


def _lines(path: Path) -> Iterator[str]:
    with path.open(encoding="ascii", errors="strict") as file:
        yield from (line for line in file if not line.startswith("  "))  # the licence is indented


def _parse_synset(part_of_speech: str, line: str) -> Synset:
    record, _, gloss = line.partition(" | ")
    fields = record.split()
    word_count = int(fields[3], 16)
    words = tuple(word.split("(")[0].replace("_", " ") for word in fields[4 : 4 + 2 * word_count : 2])
    pointers_at = 5 + 2 * word_count
    pointer_count = int(fields[pointers_at - 1])
    pointers = fields[pointers_at : pointers_at + 4 * pointer_count]
    return Synset(part_of_speech, fields[0], words, tuple(zip(pointers[::4], pointers[1::4])), gloss.strip())
