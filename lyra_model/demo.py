"""``lyra demo``: spoken questions in, answers out, and a picture of how speech and transcript are aligned."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

import lyra_ops

from . import load
from .audio import load_audio, save_audio
from .chat import reply, user_message
from .corpus import load_texts
from .modeling import LyraForConditionalGeneration
from .processor import LyraProcessor
from .targets import REPEAT
from .voices import seed_piper, speak

VOICE = "piper:joe"
ANSWER_TOKENS = 24


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=Path("out/demo"), help="folder for the sound files and the picture")
    parser.add_argument("--questions", type=int, default=5, help="how many of the eight questions to ask, default 5")
    parser.add_argument("--model", default="nano", help="nano, a checkpoint folder or a hub id; default nano")


def run(args: argparse.Namespace) -> int:
    if args.questions < 1:
        raise ValueError(f"--questions: got {args.questions}, expected at least 1")
    args.out.mkdir(parents=True, exist_ok=True)
    print("Loading the model (put together from its packages the first time: half a minute) ...", flush=True)
    model, processor = load(args.model)
    questions = [t.text for t in load_texts("demo")][: args.questions]
    seed_piper(0)  # the same questions sound the same in every run
    for number, text in enumerate(questions, start=1):
        path = args.out / f"question_{number}.wav"
        save_audio(path, *speak(text, VOICE))
        clip = load_audio(path)
        began = time.perf_counter()
        spoken = reply(model, processor, [user_message(clip)], max_new_tokens=ANSWER_TOKENS)[0]
        seconds = time.perf_counter() - began
        heard = reply(model, processor, [user_message(clip, REPEAT)])[0]
        typed = reply(model, processor, [user_message(text=text)], max_new_tokens=ANSWER_TOKENS)[0]
        print(f"\n{number}. said   : {text}   ({len(clip) / 16000:.1f} s of speech, {path})")
        print(f"   heard  : {heard}")
        print(f"   spoken : {spoken}   ({seconds:.1f} s)")
        print(f"   typed  : {typed}", flush=True)
        if number == 1:
            picture = args.out / "alignment.png"
            draw_alignment(model, processor, clip, text, picture)
    print(f"\nSound files: {args.out}/question_*.wav (questions spoken by {VOICE})")
    print(f"Expected alignment of speech and transcript (soft-DTW) for question 1: {picture}")
    return 0


@torch.inference_mode()
def draw_alignment(
    model: LyraForConditionalGeneration, processor: LyraProcessor, clip, transcript: str, path: Path
) -> None:
    """Draws E = d soft_dtw / d cost between the clip's speech tokens and the transcript's tokens as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    inputs = processor.apply_chat_template(user_message(clip), tokenize=True)
    speech = model.get_speech_features(inputs["input_features"], inputs["feature_frames"], inputs["speech_tokens"])
    ids = processor.tokenizer(transcript, add_special_tokens=False, return_tensors="pt")["input_ids"][0]
    text = model.get_input_embeddings()(ids)
    cost = -torch.log_softmax(speech.float() @ text.float().T, dim=-1)  # the contrastive cost that it was trained with
    alignment = lyra_ops.soft_dtw_alignment(cost[None], gamma=0.1)[0]

    figure, axes = pyplot.subplots(figsize=(9, 4.5), layout="constrained")
    image = axes.imshow(alignment.T, aspect="auto", origin="lower", interpolation="nearest", vmin=0, vmax=1)
    axes.set_yticks(range(len(ids)), [processor.tokenizer.decode(i) for i in ids])
    axes.set_xlabel("speech token (0.1 s each)")
    axes.set_ylabel("transcript token")
    axes.set_title(f"Expected soft-DTW alignment: {transcript}")
    figure.colorbar(image, label="probability that the pair is on the path")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
