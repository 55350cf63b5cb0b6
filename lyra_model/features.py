"""Cached features: the frozen part of the speech path runs once over the training speech, not once per epoch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from .modeling import LyraForConditionalGeneration
from .processor import LyraProcessor
from .speech import cut_windows
from .synthesis import SHARD_UTTERANCES, read_shard, shard_paths

BATCH = 16


@dataclass
class Utterance:
    """``stacked`` (N, width) float16, what the projector takes: a row for each speech token."""

    stacked: np.ndarray
    text: str
    voice: str
    kind: str


@torch.inference_mode()
def encode_shard(shard: Path, out: Path, model: LyraForConditionalGeneration, processor: LyraProcessor) -> None:
    """Writes the features of one shard of speech: ``out`` holds all rows, ``out.json`` where each utterance ends."""
    utterances = list(read_shard(shard))
    order = sorted(range(len(utterances)), key=lambda u: len(utterances[u].audio))
    rows: list[np.ndarray] = [None] * len(utterances)
    for start in range(0, len(order), BATCH):
        batch = order[start : start + BATCH]
        clips = [utterances[u].audio.astype(np.float32) / 32768 for u in batch]
        windows = cut_windows(
            clips,
            processor.feature_extractor,
            frames_per_token=processor.frames_per_token,
            window_seconds=processor.window_seconds,
            pad_seconds=processor.pad_seconds,
        )
        with torch.autocast("cpu", dtype=torch.bfloat16):  # nearly twice as fast; they are kept in 16 bits anyway
            encoded = model.encode_speech(windows.features, windows.frames)
            pieces = [f[: n * processor.frames_per_token] for f, n in zip(encoded, windows.tokens.tolist())]
            stacked = model.speech_projector.stack(pieces)
        for u, own in zip(batch, stacked.split(windows.clip_tokens)):
            rows[u] = own.half().numpy()
    ends = np.cumsum([len(r) for r in rows]).tolist()
    partial = out.with_name(f"partial-{out.name}")
    np.save(partial, np.concatenate(rows))
    index = [{"end": e, "text": u.text, "voice": u.voice, "kind": u.kind} for e, u in zip(ends, utterances)]
    out.with_suffix(".json").write_text(json.dumps(index))
    partial.rename(out)  # last: where it lies, the shard is complete


def encode_folder(folder: Path, model: LyraForConditionalGeneration, processor: LyraProcessor) -> Path:
    """Encodes the shards of speech in ``folder`` that are not encoded yet; returns the folder of the features."""
    out = folder / f"features-{model.config.projector}-{processor.pad_seconds:g}s"
    out.mkdir(exist_ok=True)
    missing = [shard for shard in shard_paths(folder) if not (out / shard.name).exists()]
    for shard in tqdm(missing, desc=f"encoding {folder.name}", unit="shard", disable=not missing):
        encode_shard(shard, out / shard.name, model, processor)
    return out


def load_features(folder: Path, count: int | None = None, start: int = 0) -> list[Utterance]:
    """``count`` utterances encoded in ``folder``, in order, from place ``start`` (a multiple of the shards' 500) on.

    The features stay on disk until they are read.
    """
    utterances: list[Utterance] = []
    for path in sorted(folder.glob("[0-9]*.npy")):
        if int(path.stem) < start // SHARD_UTTERANCES:
            continue
        if count is not None and len(utterances) >= count:
            break
        rows = np.load(path, mmap_mode="r")
        begin = 0
        for row in json.loads(path.with_suffix(".json").read_text()):
            end = row.pop("end")
            utterances.append(Utterance(rows[begin:end], **row))
            begin = end
    if count is not None and len(utterances) < count:
        raise ValueError(f"utterances: got {len(utterances)} encoded in {folder} from {start} on, expected {count}")
    return utterances[:count]
