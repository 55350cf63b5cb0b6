"""``lyra ask``: answers one question given as audio, text or both."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import soundfile

from . import load
from .audio import load_audio, save_audio
from .chat import MAX_NEW_TOKENS, reply, user_message

SPEECH_OUTPUT = "Piper text-to-speech (not yet Lyra's own speech generator)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--audio", type=Path, help="the question: wav, flac, ogg or mp3, any rate, mono or stereo")
    parser.add_argument("--text", help="the question as text; with --audio, what to do with the audio")
    parser.add_argument("--speak", type=Path, metavar="OUT.wav", help=f"also write speech, by {SPEECH_OUTPUT}")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the answer")
    parser.add_argument("--model", default="nano", help="nano, a checkpoint folder or a hub id; default nano")
    parser.add_argument(
        "--max-new-tokens", type=int, default=MAX_NEW_TOKENS, help="longest answer, default %(default)s"
    )


def run(args: argparse.Namespace) -> int:
    if args.max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens: got {args.max_new_tokens}, expected at least 1")
    clip = load_audio(args.audio) if args.audio else None  # first: a bad file should not wait for the model
    question = user_message(clip, args.text)
    if args.speak:
        _check_writable(args.speak)
    began = time.perf_counter()
    model, processor = load(args.model)
    loaded = time.perf_counter()
    answer = reply(model, processor, [question], max_new_tokens=args.max_new_tokens)[0]
    seconds = time.perf_counter() - loaded
    result = {"answer": answer, "seconds": round(seconds, 2), "load_seconds": round(loaded - began, 2)}
    if args.speak:
        if not any(character.isalnum() for character in answer):
            raise ValueError("--speak: the answer is empty, there is nothing to say")
        from .voices import speak

        save_audio(args.speak, *speak(answer, "piper:joe"))
        result |= {"speech": str(args.speak), "speech_by": SPEECH_OUTPUT}
    if args.json:
        print(json.dumps(result))
    else:
        print(answer)
        if args.speak:
            print(f"[spoken by {SPEECH_OUTPUT}: {args.speak}]")
    return 0


def _check_writable(path: Path) -> None:
    if not path.parent.is_dir():
        raise FileNotFoundError(f"--speak: no folder {path.parent}")
    if path.suffix[1:].upper() not in soundfile.available_formats():
        raise ValueError(f"--speak: got {path.name}, expected a file whose name ends in wav, flac, ogg or mp3")
