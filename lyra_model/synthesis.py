"""Speech for training and evaluation, made once and kept in shards.

A folder holds shards of 500 utterances, in the order of the texts: ``00000.npy``, all samples one after the other
(int16, 16 kHz mono), and ``00000.jsonl``, a line per utterance: {"index", "text", "kind", "voice", "start", "stop"},
where [start, stop) are its samples. The ``.jsonl`` is written last, by a rename: where it lies, the shard is complete.

    python -m lyra_model.synthesis --out .cache/speech --utterances 40000
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soxr
from tqdm import tqdm

from lyra_model.corpus import Text, load_texts
from lyra_model.voices import UNSEEN_VOICE, draw_voice, seed_piper, speak

SAMPLE_RATE = 16_000
SHARD_UTTERANCES = 500

_KEPT_SILENCE_SECONDS = 0.1
_SILENCE = 0.01  # of the loudest sample, -40 dB


class Utterance(NamedTuple):
    """Spoken text: `audio` int16 of shape (samples,) at 16 kHz."""

    audio: np.ndarray
    text: str
    kind: str
    voice: str


def synthesize(
    texts: Sequence[Text],
    out_dir: Path,
    *,
    seed: int = 0,
    workers: int = 1,
    voices: Sequence[str] | None = None,
    start: int = 0,
) -> None:
    """Speak `texts` into shards in `out_dir`; complete shards that are there already are kept.

    Each utterance depends on its text, its place and `seed` alone, save for Piper's noise, which depends on the
    shard's earlier utterances too. So 5,000 texts make the same ten shards as the first 5,000 of 40,000 do, whatever
    the number of workers and interruptions.

    Args:
        texts: what to say, in order.
        out_dir: the folder for the shards.
        seed: of the voices, their variations and Piper's noise.
        workers: processes.
        voices: one voice per text, each in its own plain settings; None draws from the training voices and varies
            speed, pitch and noise.
        start: place of the first text in the order that it comes from, a multiple of 500: the shards are numbered by
            it, so that a folder may hold any stretch of that order.

    Raises:
        ValueError: `voices` of another length, `start` within a shard, or `out_dir` holds a shard of other texts or
            voices.
    """
    if start < 0 or start % SHARD_UTTERANCES:
        raise ValueError(f"start: got {start}, expected a multiple of {SHARD_UTTERANCES}, the utterances of a shard")
    if voices is not None and len(voices) != len(texts):
        raise ValueError(f"voices: got {len(voices)} for {len(texts)} texts, expected one per text")
    out_dir.mkdir(parents=True, exist_ok=True)
    missing = []
    for first in range(0, len(texts), SHARD_UTTERANCES):
        part = list(texts[first : first + SHARD_UTTERANCES])
        fixed = None if voices is None else list(voices[first : first + SHARD_UTTERANCES])
        place = start + first
        shard = out_dir / f"{place // SHARD_UTTERANCES:05d}.npy"
        if not _is_complete(shard, part, fixed):
            missing.append((shard, place, part, fixed, seed))
    # Not forked: onnxruntime's threads do not survive a fork.
    context = multiprocessing.get_context("spawn")
    count = sum(len(part) for _, _, part, _, _ in missing)
    with ProcessPoolExecutor(workers, mp_context=context) as pool, tqdm(total=count, unit="utterance") as progress:
        for done in as_completed([pool.submit(_make_shard, *job) for job in missing]):
            progress.update(done.result())


def shard_paths(folder: Path) -> list[Path]:
    """The complete shards in `folder`, in order."""
    return [index.with_suffix(".npy") for index in sorted(folder.glob("[0-9]*.jsonl"))]


def read_shard(shard: Path) -> Iterator[Utterance]:
    """The utterances of a shard, in order; the samples stay on disk until they are used."""
    samples = np.load(shard, mmap_mode="r")
    for line in shard.with_suffix(".jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        yield Utterance(samples[row["start"] : row["stop"]], row["text"], row["kind"], row["voice"])


def to_speech_samples(waveform: np.ndarray, sample_rate: int) -> np.ndarray:
    """`waveform` (samples,) float at any rate as int16 at 16 kHz, without the silence around it beyond 0.1 s."""
    resampled = soxr.resample(waveform, sample_rate, SAMPLE_RATE)
    loudness = np.abs(resampled)
    audible = np.flatnonzero(loudness > _SILENCE * loudness.max())
    if not audible.size:
        raise ValueError("waveform: got silence, expected speech")
    kept = round(_KEPT_SILENCE_SECONDS * SAMPLE_RATE)
    trimmed = resampled[max(audible[0] - kept, 0) : audible[-1] + 1 + kept]
    return np.clip(np.round(trimmed * 32767), -32768, 32767).astype(np.int16)


def _is_complete(shard: Path, texts: list[Text], voices: list[str] | None) -> bool:
    """Whether the shard lies there with all of `texts`; a shorter one, the end of a smaller run, is made again."""
    if not shard.with_suffix(".jsonl").exists():
        return False
    spoken = list(read_shard(shard))
    wanted = [utterance.voice for utterance in spoken] if voices is None else voices
    for utterance, text, voice in zip(spoken, texts, wanted, strict=False):
        if (utterance.text, utterance.kind, utterance.voice) != (*text, voice):
            raise ValueError(
                f"out_dir: {shard} says {utterance.text!r} ({utterance.voice}), expected {text.text!r} ({voice}): "
                "it comes from other texts or another seed; remove the folder or choose another"
            )
    return len(spoken) >= len(texts)


def _make_shard(shard: Path, first: int, texts: list[Text], voices: list[str] | None, seed: int) -> int:
    seed_piper(int(np.random.default_rng((seed, first, 1)).integers(2**31)))
    pieces, rows, start = [], [], 0
    for place, (text, kind) in enumerate(texts):
        index = first + place
        rng = np.random.default_rng((seed, index))
        voice = draw_voice(rng) if voices is None else voices[place]
        piece = to_speech_samples(*speak(text, voice, rng if voices is None else None))
        pieces.append(piece)
        stop = start + len(piece)
        rows.append({"index": index, "text": text, "kind": kind, "voice": voice, "start": start, "stop": stop})
        start = stop
    shard.with_suffix(".jsonl").unlink(missing_ok=True)
    unfinished = shard.with_suffix(f".{os.getpid()}.tmp")
    with unfinished.open("wb") as file:
        np.save(file, np.concatenate(pieces))
    unfinished.rename(shard)
    unfinished.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    unfinished.rename(shard.with_suffix(".jsonl"))
    return len(texts)


def synthesize_evaluation(out_dir: Path, *, seed: int = 0, workers: int = 1) -> None:
    """Speak the texts to judge by into a folder per split, half of them by Piper's joe, half by the unseen voice."""
    for split in ("dev", "heldout", "everyday", "demo"):
        texts = load_texts(split, seed)
        voices = [("piper:joe", UNSEEN_VOICE)[place % 2] for place in range(len(texts))]
        synthesize(texts, out_dir / split, seed=seed, workers=workers, voices=voices)


def main() -> None:
    """Make the evaluation speech, then the training speech."""
    parser = argparse.ArgumentParser(prog="python -m lyra_model.synthesis", description=main.__doc__)
    parser.add_argument("--out", type=Path, default=Path(".cache/speech"), help="folder (default: %(default)s)")
    parser.add_argument("--utterances", type=int, default=40_000, help="for training (default: %(default)s)")
    parser.add_argument("--start", type=int, default=0, help="place of the first of them (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of texts and voices (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=1, help="processes (default: %(default)s)")
    options = parser.parse_args()
    synthesize_evaluation(options.out, seed=options.seed, workers=options.workers)
    texts = load_texts("train", options.seed)[options.start :][: options.utterances]
    synthesize(texts, options.out / "train", seed=options.seed, workers=options.workers, start=options.start)


if __name__ == "__main__":
    main()
