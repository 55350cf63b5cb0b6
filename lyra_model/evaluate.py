"""``lyra eval``: how well speech is understood, on texts never seen in training, by a known and an unknown voice.

- repeat: word error rate when asked to repeat 200 open-vocabulary phrases.
- answer: how often a spoken everyday question gets the answer of the same question typed, over 200 of them.

``--split dev`` judges by 400 other texts, of the training's kinds: those to choose settings by.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter
from pathlib import Path

import jiwer
import numpy as np
from tqdm import tqdm

from . import load
from .chat import reply, user_message
from .modeling import LyraForConditionalGeneration
from .processor import LyraProcessor
from .synthesis import Utterance, read_shard, shard_paths, synthesize_evaluation
from .targets import REPEAT

BATCH = 20
ANSWER_TOKENS = 32
AGREEMENT = 0.5  # word F1 from which two answers count as the same


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="nano", help="nano, or a folder written by lyra train; default nano")
    parser.add_argument("--cache", type=Path, default=Path(".cache/speech"), help="folder of the evaluation speech")
    parser.add_argument("--split", choices=["test", "dev"], default="test", help="texts to judge by; default test")
    parser.add_argument("--limit", type=int, default=200, help="utterances of each kind, default 200")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write figures and all replies to this file")


def run(args: argparse.Namespace) -> int:
    synthesize_evaluation(args.cache)
    model, processor = load(args.model)
    result = evaluate(model, processor, *spoken(args.cache, args.split, args.limit))
    for task, figures in result.items():
        for name, value in figures.items():
            if name != "rows":
                print(f"{task:7} {name:28} {value:.3f}")
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


def spoken(cache: Path, split: str, limit: int) -> tuple[list[Utterance], list[Utterance]]:
    """What to repeat and what to answer, at most ``limit`` of each, from the folders that synthesis made."""
    if split == "test":
        phrases, questions = _utterances(cache / "heldout"), _utterances(cache / "everyday")
    else:
        dev = _utterances(cache / "dev")
        phrases = [u for u in dev if u.kind != "question"]
        questions = [u for u in dev if u.kind == "question"]
    return phrases[:limit], questions[:limit]


def evaluate(
    model: LyraForConditionalGeneration,
    processor: LyraProcessor,
    phrases: list[Utterance],
    questions: list[Utterance],
) -> dict[str, dict]:
    """The figures of both tasks and every reply."""
    return {"repeat": repeat(model, processor, phrases), "answer": answer(model, processor, questions)}


def repeat(model: LyraForConditionalGeneration, processor: LyraProcessor, utterances: list[Utterance]) -> dict:
    """Word error rates of repeated phrases, in all and by voice."""
    heard = _replies(model, processor, [user_message(_clip(u), REPEAT) for u in utterances], "repeat")
    said = [normalize(u.text) for u in utterances]
    rows = [{"voice": u.voice, "said": u.text, "heard": h} for u, h in zip(utterances, heard)]
    result = {"word_error_rate": jiwer.wer(said, [normalize(h) for h in heard])}
    for voice in sorted({u.voice for u in utterances}):
        own = [i for i, u in enumerate(utterances) if u.voice == voice]
        result[f"word_error_rate {voice}"] = jiwer.wer([said[i] for i in own], [normalize(heard[i]) for i in own])
    return result | {"rows": rows}


def answer(model: LyraForConditionalGeneration, processor: LyraProcessor, questions: list[Utterance]) -> dict:
    """Shares of spoken questions that are answered as the typed ones.

    ``same`` counts answers with a word F1 of at least ``AGREEMENT``, ``identical`` those with the same words, and
    ``same_by_chance`` the answers that are the ``same`` as that of the next question: how lenient the measure is.
    """
    typed = _replies(model, processor, [user_message(text=u.text) for u in questions], "typed")
    spoken = _replies(model, processor, [user_message(_clip(u)) for u in questions], "spoken")
    scores = np.array([word_f1(s, t) for s, t in zip(spoken, typed)])
    chance = np.array([word_f1(s, t) for s, t in zip(spoken, typed[1:] + typed[:1])])
    result = {
        "same": float((scores >= AGREEMENT).mean()),
        "identical": float(np.mean([normalize(s) == normalize(t) for s, t in zip(spoken, typed)])),
        "same_by_chance": float((chance >= AGREEMENT).mean()),
    }
    for voice in sorted({u.voice for u in questions}):
        own = np.array([u.voice == voice for u in questions])
        result[f"same {voice}"] = float((scores[own] >= AGREEMENT).mean())
    rows = [
        {"voice": u.voice, "question": u.text, "typed": t, "spoken": s, "word_f1": round(float(f), 3)}
        for u, t, s, f in zip(questions, typed, spoken, scores)
    ]
    return result | {"rows": rows}


def normalize(text: str) -> str:
    """Lower case words, nothing else; never empty, so that a rate over it is defined."""
    return " ".join(re.findall(r"[a-z0-9']+", text.lower())) or "-"


def word_f1(a: str, b: str) -> float:
    """2 x shared words / all words of both, as in SQuAD's answer score."""
    a_words, b_words = normalize(a).split(), normalize(b).split()
    return 2 * sum((Counter(a_words) & Counter(b_words)).values()) / (len(a_words) + len(b_words))


def _utterances(folder: Path) -> list[Utterance]:
    return [utterance for shard in shard_paths(folder) for utterance in read_shard(shard)]


def _clip(utterance: Utterance) -> np.ndarray:
    return utterance.audio.astype(np.float32) / 32768


def _replies(model, processor, conversations: list, name: str) -> list[str]:
    replies = []
    for start in tqdm(range(0, len(conversations), BATCH), desc=name, leave=False):
        batch = conversations[start : start + BATCH]
        replies += reply(model, processor, batch, max_new_tokens=ANSWER_TOKENS)
    return replies
