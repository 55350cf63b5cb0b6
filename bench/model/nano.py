"""python -m bench.model.nano <table>: what the training of Nano Lyra rests on, measured small, several seeds.

- eval: what `lyra eval` reports, with every reply, and the share of words heard by how often training held them.
- size: word error rate of what the projector reads without the language model, after the align stage alone, against
  the number of training utterances; on texts never seen and, for comparison, on some of those learned from.
- reading: the same of trained weights (--model), on texts never seen and on the training texts from --start on: only a
  gap between the two speaks of too little data.
- alignment: the same after as many steps with each loss of the align stage.
- regularizer: the joint stage with and without the cross-modality regularizer, from one aligned projector; same
  seeds, same batches, same steps (the paper's table 3, on the scale of a laptop).
- share: the part of a joint step that the regularizer takes, on the plain-torch reference and on the compiled kernel.

All but eval need the training speech that `lyra train` puts into --cache. Word error rates of size, reading and
alignment are on the dev split, regularizer is judged by held-out phrases and everyday questions; half of each is spoken
by a voice never trained on.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import functools
import json
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import jiwer
import torch

from bench import records
from lyra_model import evaluate, nano
from lyra_model.corpus import load_texts, words_of
from lyra_model.features import Utterance, encode_folder, load_features
from lyra_model.modeling import LyraForConditionalGeneration
from lyra_model.processor import LyraProcessor
from lyra_model.regularizer import ALIGNMENTS
from lyra_model.synthesis import synthesize_evaluation
from lyra_model.targets import answer_questions
from lyra_model.train import JointStage, Settings, batches, join_features, train

REGULARIZERS = {
    "none": {"regularizer": 0.0},
    "published": {"regularizer": 0.5, "temperature": 0.06, "gamma": 0.1, "drop_cost": float("inf")},
    "with dropping": {"regularizer": 0.5, "temperature": 1.0, "gamma": 0.1, "drop_cost": 1.0},
}
# How often training held a word.
OFTEN = ((0, 0), (1, 2), (3, 5), (6, 20), (21, 100), (101, 1000), (1001, 10**9))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.model.nano", description=__doc__.splitlines()[0])
    parser.add_argument("table", choices=TABLES)
    parser.add_argument("--model", default="nano", help="of eval and reading: nano, or a folder written by lyra train")
    parser.add_argument("--cache", type=Path, default=Path(".cache/speech"), help="default %(default)s")
    parser.add_argument("--start", type=int, default=0, help="place of the first training text, default %(default)s")
    parser.add_argument("--sizes", type=int, nargs="+", default=[500, 1000, 2000, 4000], help="default %(default)s")
    parser.add_argument("--utterances", type=int, default=4000, help="of the other tables, default %(default)s")
    parser.add_argument("--variants", nargs="+", choices=[*REGULARIZERS, *ALIGNMENTS], help="default: all of the table")
    parser.add_argument("--init", type=Path, default=Path("out/aligned"), help="`lyra train --joint-steps 0 --out` it")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default %(default)s")
    parser.add_argument("--steps", type=int, help="default: 300 of size, 150 of alignment, 40 of regularizer")
    parser.add_argument("--out", type=Path, default=Path("out/regularizer"), help="regularizer keeps each row here")
    parser.add_argument("--batch", type=int, help="utterances per step; default: those of lyra train")
    parser.add_argument("--limit", type=int, default=200, help="phrases and questions to judge by, default %(default)s")
    args = parser.parse_args()
    began = time.monotonic()
    base = nano.assembled()
    processor = LyraProcessor.from_pretrained(base)
    synthesize_evaluation(args.cache)
    rows = TABLES[args.table](args, base, processor)
    settings = {k: v for k, v in vars(args).items() if not isinstance(v, Path)} | {"model": Path(args.model).name}
    record = {"table": args.table, **records.origin("cpu"), "settings": settings}
    record |= {"seconds": round(time.monotonic() - began), "rows": rows}
    records.write(records.folder("cpu") / f"nano_{args.table}.json", record)


def full(args: argparse.Namespace, base: Path, processor: LyraProcessor) -> dict:
    model, processor = evaluate.load(args.model)
    result = evaluate.evaluate(model, processor, *evaluate.spoken(args.cache, "test", args.limit))
    folder = nano.TRAINED if args.model == "nano" else Path(args.model)
    learned = learned_texts(json.loads((folder / "training.json").read_text()))
    result["words"] = heard_words(result["repeat"]["rows"], Counter(w for text in learned for w in words_of(text)))
    print({k: round(v, 3) for task in ("repeat", "answer") for k, v in result[task].items() if k != "rows"})
    for row in result["words"]:
        print(row)
    return result


def learned_texts(settings: dict) -> list[str]:
    """The texts that weights have learned from: their own and, through `lyra train --init`, those before."""
    own = load_texts("train", 0)[settings.get("start", 0) :][: settings["utterances"]]
    before = learned_texts(settings["init"]) if "init" in settings else []
    return before + [text.text for text in own]


def heard_words(rows: list[dict], counts: Counter[str]) -> list[dict]:
    """The share of the words said that were repeated, by voice and by how often training held the word."""
    said, heard = Counter(), Counter()
    for row in rows:
        words = evaluate.normalize(row["said"]).split()
        right = set()
        alignment = jiwer.process_words(" ".join(words), evaluate.normalize(row["heard"])).alignments[0]
        for chunk in alignment:
            if chunk.type == "equal":
                right |= set(range(chunk.ref_start_idx, chunk.ref_end_idx))
        for place, word in enumerate(words):
            key = row["voice"], next(often for often in OFTEN if often[0] <= counts[word] <= often[1])
            said[key] += 1
            heard[key] += place in right
    return [
        {"voice": voice, "times in training": list(often), "words": said[voice, often],
         "heard": round(heard[voice, often] / said[voice, often], 4)}
        for voice, often in sorted(said)
    ]  # fmt: skip


def size(args: argparse.Namespace, base: Path, processor: LyraProcessor) -> list[dict]:
    settings = Settings(start=args.start, align_steps=args.steps or 300)
    settings = dataclasses.replace(settings, align_batch=args.batch or settings.align_batch)
    return [aligned(args, base, processor, dataclasses.replace(settings, utterances=count)) for count in args.sizes]


def reading(args: argparse.Namespace, base: Path, processor: LyraProcessor) -> list[dict]:
    model = fresh(base)
    folder = nano.TRAINED if args.model == "nano" else Path(args.model)
    nano.load_projector(model, folder)
    rows = []
    for split, start in (("dev", 0), ("train", args.start)):
        utterances = load_features(encode_folder(args.cache / split, model, processor), args.limit, start)
        for reading in range(model.config.readings):
            row = {"texts": split, "utterances": len(utterances), "reading": reading + 1}
            rows.append(row | reads(model, utterances, reading))
            print(rows[-1])
    return rows


def alignment(args: argparse.Namespace, base: Path, processor: LyraProcessor) -> list[dict]:
    settings = Settings(utterances=args.utterances, start=args.start, align_steps=args.steps or 150)
    settings = dataclasses.replace(settings, align_batch=args.batch or settings.align_batch)
    rows = [
        aligned(args, base, processor, dataclasses.replace(settings, alignment=method, seed=seed))
        for seed in args.seeds
        for method in args.variants or ALIGNMENTS
    ]
    summarize(rows, "alignment", ("word_error_rate",))
    return rows


def aligned(args: argparse.Namespace, base: Path, processor: LyraProcessor, settings: Settings) -> dict:
    """The align stage alone, and the projector's first reading after it."""
    model = fresh(base)
    learned = load_features(encode_folder(args.cache / "train", model, processor), settings.utterances, settings.start)
    judged = load_features(encode_folder(args.cache / "dev", model, processor))[: args.limit]
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as out:
        train(
            model,
            processor,
            nano.speech_tokenizer(),
            learned,
            {},
            dataclasses.replace(settings, reread_steps=0, joint_steps=0),
            Path(out),
        )
    row = {
        "alignment": settings.alignment,
        "seed": settings.seed,
        "utterances": settings.utterances,
        "steps": settings.align_steps,
        "batch": settings.align_batch,
        "seconds": round(time.monotonic() - began),
        **reads(model.eval(), judged, reading=0),
        "word_error_rate learned": reads(model, learned[: args.limit], reading=0)["word_error_rate"],
    }
    print(row, flush=True)
    return row


@torch.inference_mode()
def reads(model: LyraForConditionalGeneration, utterances: list[Utterance], reading: int) -> dict[str, float]:
    """Word error rate, in all and by voice, of a reading of the projector's own: no language model takes part."""
    clips = [torch.from_numpy(u.stacked.astype("float32")) for u in utterances]
    read = nano.speech_tokenizer().decode_batch([model.speech_projector.greedy(clip, reading) for clip in clips])
    said: dict[str, tuple[list[str], list[str]]] = {}
    for utterance, heard in zip(utterances, read):
        for key in ("", f" {utterance.voice}"):
            truths, replies = said.setdefault(key, ([], []))
            truths.append(evaluate.normalize(utterance.text))
            replies.append(evaluate.normalize(heard))
    return {f"word_error_rate{voice}": round(jiwer.wer(*pair), 4) for voice, pair in said.items()}


def regularizer(args: argparse.Namespace, base: Path, processor: LyraProcessor) -> list[dict]:
    phrases, questions = evaluate.spoken(args.cache, "test", args.limit)
    start, utterances, answers = joint_stage(args, base, processor)
    settings = Settings(utterances=args.utterances, start=args.start, joint_steps=args.steps or 40)
    settings = dataclasses.replace(
        settings, align_steps=0, reread_steps=0, joint_batch=args.batch or Settings.joint_batch
    )
    args.out.mkdir(parents=True, exist_ok=True)
    rows = []
    for seed in args.seeds:
        for variant in args.variants or REGULARIZERS:
            own = dataclasses.replace(settings, seed=seed, **REGULARIZERS[variant])
            row = {"variant": variant, "seed": seed, "settings": dataclasses.asdict(own)}
            row |= {"phrases": len(phrases), "questions": len(questions)}
            kept = args.out / f"{variant.replace(' ', '_')}-{seed}.json"
            if kept.exists() and (known := json.loads(kept.read_text())).items() >= row.items():
                rows.append(known)
                continue
            model = copy.deepcopy(start)
            with tempfile.TemporaryDirectory() as out:
                train(model, processor, nano.speech_tokenizer(), utterances, answers, own, Path(out), init=args.init)
                log = [json.loads(line) for line in (Path(out) / "joint.jsonl").read_text().splitlines()]
            model.eval().to(torch.bfloat16)
            for task in evaluate.evaluate(model, processor, phrases, questions).values():
                row |= {k: round(v, 4) for k, v in task.items() if k != "rows"}
            rows.append(row | {"last losses": log[-1]})
            kept.write_text(json.dumps(rows[-1]))
            print({k: v for k, v in rows[-1].items() if k != "settings"}, flush=True)
    summarize(rows, "variant", ("word_error_rate", "same"))
    return rows


def share(args: argparse.Namespace, base: Path, processor: LyraProcessor) -> list[dict]:
    """Median seconds of a joint step without regularizer, and of the regularizer, both forward and backward."""
    model, utterances, answers = joint_stage(args, base, processor)
    with tempfile.TemporaryDirectory() as out:  # gives the model its adapter
        train(
            model,
            processor,
            nano.speech_tokenizer(),
            utterances,
            answers,
            Settings(align_steps=0, reread_steps=0, joint_steps=1),
            Path(out),
            init=args.init,
        )
    stages = {
        name: JointStage(model, processor, dataclasses.replace(Settings(), **own), answers)
        for name, own in REGULARIZERS.items()
    }
    data = batches(utterances, Settings.joint_batch, Settings.seed)
    seconds: dict[tuple[str, str], list[float]] = {}
    for step in range(1 + (args.steps or 15)):
        batch = next(data)
        stacked, lengths = join_features(batch)
        runs = {("none", ""): lambda batch=batch: stages["none"](batch)["loss"]}
        for name in ("published", "with dropping"):
            for backend in ("reference", "cpu"):
                speech = model.speech_projector(stacked, lengths)[0].detach().requires_grad_().split(lengths)
                runs[name, backend] = functools.partial(stages[name].regularizer, speech, batch, backend)
        for key, loss in runs.items():
            began = time.perf_counter()
            try:
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    value = loss()
                value.backward()
            except ValueError as error:
                if "cannot serve" not in str(error):
                    raise
                continue  # dropping is not compiled on this device
            if step:  # the first warms up
                seconds.setdefault(key, []).append(time.perf_counter() - began)
    step = statistics.median(seconds.pop(("none", "")))
    rows = []
    for (name, backend), times in seconds.items():
        own = statistics.median(times)
        rows.append({"variant": name, "backend": backend, "regularizer seconds": round(own, 5),
                     "rest of the step seconds": round(step, 4), "share": round(own / (own + step), 4)})  # fmt: skip
        print(rows[-1])
    return rows


def joint_stage(args: argparse.Namespace, base: Path, processor: LyraProcessor):
    """The untrained model, the training utterances and the typed answers to the questions among them."""
    model = fresh(base)
    utterances = load_features(encode_folder(args.cache / "train", model, processor), args.utterances, args.start)
    asked = [u.text for u in utterances if u.kind == "question"]
    return model, utterances, answer_questions(asked, model, processor, args.cache / "answers.json")


def summarize(rows: list[dict], by: str, keys: Iterable[str]) -> None:
    for variant in dict.fromkeys(row[by] for row in rows):
        for key in keys:
            values = [row[key] for row in rows if row[by] == variant]
            spread = statistics.stdev(values) if len(values) > 1 else float("nan")
            print(f"{variant:14} {key:16} {statistics.mean(values):.3f} +- {spread:.3f} over {len(values)} seeds")


def fresh(base: Path) -> LyraForConditionalGeneration:
    model = LyraForConditionalGeneration.from_pretrained(base, attn_implementation="eager")
    model.language_model.to(torch.bfloat16)
    return model


TABLES = {
    "eval": full,
    "size": size,
    "reading": reading,
    "alignment": alignment,
    "regularizer": regularizer,
    "share": share,
}

if __name__ == "__main__":
    main()
