"""python -m bench.model.nano <table>: what the training of Nano Lyra rests on, measured small, several seeds.

- eval: what `lyra eval` reports, with every reply.
- size: word error rate of the vocabulary rows nearest to the speech tokens, after the align stage alone, against the
  number of training utterances.
- regularizer: the joint stage with and without the cross-modality regularizer, from one aligned projector; same
  seeds, same batches, same steps (the paper's table 3, on the scale of a laptop).

size and regularizer need the training speech that `lyra train` puts into --cache.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import statistics
import tempfile
import time
from datetime import datetime, timezone
from pathlib import Path

import jiwer
import torch

from bench.__main__ import HERE, commit, device_name, slug
from lyra_model import evaluate, nano
from lyra_model.features import encode_folder, load_features
from lyra_model.modeling import LyraForConditionalGeneration
from lyra_model.processor import LyraProcessor
from lyra_model.regularizer import nearest_tokens
from lyra_model.synthesis import synthesize_evaluation
from lyra_model.targets import answer_questions
from lyra_model.train import Settings, blank_id, train

REGULARIZERS = {
    "none": {"regularizer": 0.0},
    "published": {"regularizer": 0.5, "drop_cost": float("inf")},
    "with dropping": {"regularizer": 0.5},
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.model.nano", description=__doc__.splitlines()[0])
    parser.add_argument("table", choices=["eval", "size", "regularizer"])
    parser.add_argument("--cache", type=Path, default=Path(".cache/speech"), help="default %(default)s")
    parser.add_argument("--sizes", type=int, nargs="+", default=[500, 1500, 4500], help="default %(default)s")
    parser.add_argument("--variants", nargs="+", choices=REGULARIZERS, default=list(REGULARIZERS))
    parser.add_argument("--init", type=Path, default=Path("out/aligned"), help="`lyra train --joint-steps 0 --out` it")
    parser.add_argument("--seeds", type=int, default=3, help="default %(default)s")
    parser.add_argument("--steps", type=int, help="default: 250 of the align stage, 40 of the joint stage")
    parser.add_argument("--limit", type=int, default=100, help="phrases and questions to judge by, default %(default)s")
    args = parser.parse_args()
    began = time.monotonic()
    base = nano.assembled()
    processor = LyraProcessor.from_pretrained(base)
    synthesize_evaluation(args.cache)
    rows = {"eval": full, "size": size, "regularizer": regularizer}[args.table](args, base, processor)
    device = device_name("cpu")
    path = HERE / "results" / slug(device) / f"nano_{args.table}.json"
    record = {
        "table": args.table,
        "device": device,
        "torch": torch.__version__,
        "commit": commit(),
        "settings": {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()},
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "seconds": round(time.monotonic() - began),
        "rows": rows,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"written to {path}")


def full(args: argparse.Namespace, base: Path, processor: LyraProcessor) -> dict:
    result = evaluate.evaluate(*nano.load_nano(), *evaluate.spoken(args.cache, "test", args.limit))
    print({k: round(v, 3) for task in result.values() for k, v in task.items() if k != "rows"})
    return result


def size(args: argparse.Namespace, base: Path, processor: LyraProcessor) -> list[dict]:
    rows = []
    for count in args.sizes:
        model = fresh(base)
        settings = Settings(utterances=count, align_steps=args.steps or 250, joint_steps=0)
        utterances = load_features(encode_folder(args.cache / "train", model, processor), count)
        with tempfile.TemporaryDirectory() as out:
            train(model, processor, utterances, {}, settings, Path(out))
        rows.append({"utterances": count, "steps": settings.align_steps, **nearest(args, model.eval(), processor)})
        print(rows[-1], flush=True)
    return rows


@torch.inference_mode()
def nearest(args: argparse.Namespace, model: LyraForConditionalGeneration, processor: LyraProcessor) -> dict:
    """Word error rate by voice of the nearest vocabulary rows: no language model takes part."""
    embedding = model.get_input_embeddings().weight
    said: dict[str, tuple[list[str], list[str]]] = {}
    for utterance in load_features(encode_folder(args.cache / "dev", model, processor))[: args.limit]:
        speech = model.speech_projector(torch.from_numpy(utterance.frames.astype("float32")))
        read = processor.tokenizer.decode(nearest_tokens(speech, embedding, embedding[blank_id(processor)]))
        truth, heard = said.setdefault(utterance.voice, ([], []))
        truth.append(evaluate.normalize(utterance.text))
        heard.append(evaluate.normalize(read))
    return {f"word_error_rate {voice}": round(jiwer.wer(*pair), 4) for voice, pair in said.items()}


def regularizer(args: argparse.Namespace, base: Path, processor: LyraProcessor) -> list[dict]:
    judged = evaluate.spoken(args.cache, "test", args.limit)
    start = fresh(base)
    utterances = load_features(encode_folder(args.cache / "train", start, processor))
    asked = [u.text for u in utterances if u.kind == "question"]
    answers = answer_questions(asked, start, processor, args.cache / "answers.json")
    rows = []
    for seed in range(args.seeds):
        for variant in args.variants:
            model = copy.deepcopy(start)
            settings = Settings(
                utterances=len(utterances), joint_steps=args.steps or 40, seed=seed, **REGULARIZERS[variant]
            )
            with tempfile.TemporaryDirectory() as out:
                train(model, processor, utterances, answers, settings, Path(out), init=args.init)
            model.eval().to(torch.bfloat16)
            tasks = evaluate.evaluate(model, processor, *judged)
            figures = {k: round(v, 4) for task in tasks.values() for k, v in task.items() if k != "rows"}
            rows.append({"variant": variant, "seed": seed, **figures, "settings": dataclasses.asdict(settings)})
            print({k: v for k, v in rows[-1].items() if k != "settings"}, flush=True)
    for variant in args.variants:
        own = [row for row in rows if row["variant"] == variant]
        for key in ("word_error_rate", "same"):
            values = [row[key] for row in own]
            spread = statistics.stdev(values) if len(values) > 1 else float("nan")
            print(f"{variant:14} {key:16} {statistics.mean(values):.3f} +- {spread:.3f} over {len(values)} seeds")
    return rows


def fresh(base: Path) -> LyraForConditionalGeneration:
    model = LyraForConditionalGeneration.from_pretrained(base, attn_implementation="eager")
    model.language_model.to(torch.bfloat16)
    return model


if __name__ == "__main__":
    main()
