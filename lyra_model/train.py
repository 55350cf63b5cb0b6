"""``lyra train``: trains the speech path of nano Lyra on synthetic speech, in three stages.

1. *align*: the projector's first reading, CTC between it and the transcript, no language model pass: cheap.
2. *reread*: the same for its second reading, which takes the first one as it is.
3. *joint*: projector and a small peft LoRA, cross-entropy of the reply + lambda * cross-modality regularizer
   (Lyra, arXiv 2412.09501, equations 1 and 2) + the loss of the first stages. Replies: repeat what was said; answer a
   question as the language model itself answers it when it is typed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from peft import LoraConfig, set_peft_model_state_dict
from peft.helpers import disable_input_dtype_casting
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import PreTrainedModel

from . import nano
from .corpus import load_texts
from .features import Utterance, encode_folder, load_features
from .modeling import LyraForConditionalGeneration
from .processor import SPEECH_TOKEN, LyraProcessor
from .regularizer import alignment_loss, cross_modality_loss
from .synthesis import synthesize
from .targets import REPEAT, answer_questions
from .vocabulary import VocabularyProjector

ADAPTER = "speech"
CHECKPOINT_STEPS = 200
NEGATIVES = 2000  # random tokens that a speech token is told apart from
MISTAKEN, MISTAKES = 256, 6  # speech tokens of a step, and the likeliest of each, that are added to them
READINGS = (("linear_1", "linear_2"), ("linear_3", "linear_4"))  # layers of the projector's two readings
SPAN = 50  # batches sorted by length together: little padding, still random order


def _setting(default: float | str, text: str) -> Any:
    return dataclasses.field(default=default, metadata={"help": text})


@dataclass
class Settings:
    """Everything that decides the trained weights, and is written beside them."""

    utterances: int = _setting(12_000, "texts to speak and to learn from, out of a fixed order")
    start: int = _setting(0, "place of the first of them in that order, a multiple of 500")
    align_steps: int = _setting(1600, "optimizer steps of the align stage; 0 leaves it out")
    align_batch: int = _setting(64, "utterances per step of the align stage")
    align_lr: float = _setting(1e-3, "peak learning rate of the align stage")
    reread_steps: int = _setting(
        500, "optimizer steps of the reread stage, in batches of the align stage; 0 leaves it out"
    )
    alignment: str = _setting("ctc", "loss of the align stage: ctc, soft_dtw or drop_dtw")
    joint_steps: int = _setting(700, "optimizer steps of the joint stage; 0 leaves it out")
    joint_batch: int = _setting(16, "utterances per step of the joint stage")
    joint_lr: float = _setting(1e-3, "peak learning rate of the adapter")
    question_repeats: int = _setting(
        5, "times a question is drawn in a round of the joint stage, others once; 0: it is repeated like them"
    )
    # Lower than the adapter's, so that the projector keeps what the align stage prepared.
    projector_lr: float = _setting(2e-4, "peak learning rate of the projector in the joint stage; 0: it rests")
    regularizer: float = _setting(0.5, "lambda, weight of the cross-modality regularizer; 0 leaves it out")
    # Published: 0.06, on embeddings of a quarter of this norm; the products grow with its square.
    temperature: float = _setting(1.0, "temperature of the regularizer's contrastive cost")
    gamma: float = _setting(0.1, "smoothing of the regularizer's soft-DTW")
    drop_cost: float = _setting(1.0, "price of a speech token left unaligned; inf is the published regularizer")
    joint_alignment: float = _setting(1.0, "weight of the align stage's loss in the joint stage; 0 leaves it out")
    lora_rank: int = _setting(12, "rank of the adapter on the attention projections")
    frame_dropout: float = _setting(0.1, "dropout on what the projector takes")
    seed: int = _setting(0, "of initial weights, batches and dropout")


class AlignStage(nn.Module):
    """Pre-alignment of the projector, in the vocabulary of its own that it reads speech in: of one of its readings."""

    def __init__(
        self, model: LyraForConditionalGeneration, speech_tokenizer: Tokenizer, settings: Settings, reading: int = 0
    ):
        super().__init__()
        if not isinstance(model.speech_projector, VocabularyProjector):
            raise ValueError(
                f"align_steps, reread_steps, joint_alignment: got {settings.align_steps}, {settings.reread_steps} and "
                f"{settings.joint_alignment}, expected 0 for a model with the {model.config.projector!r} projector, "
                "which has no vocabulary"
            )
        self.projector = model.speech_projector
        self.tokenizer = speech_tokenizer
        self.method = settings.alignment
        self.reading = reading

    def forward(self, batch: list[Utterance]) -> dict[str, Tensor]:
        stacked, lengths = join_features(batch)
        reading = self.projector.read(stacked)
        if self.reading:
            reading = self.projector.reread(stacked, reading, reading, lengths)
        return {"loss": self.loss(batch, lengths, *reading)}

    def loss(self, batch: list[Utterance], lengths: list[int], state: Tensor, blank: Tensor) -> Tensor:
        """Of a reading of ``batch``."""
        # As Whisper was taught: every word after a space, the first one too.
        said = [torch.tensor(self.tokenizer.encode(f" {u.text}", add_special_tokens=False).ids) for u in batch]
        classes, targets = self.classes(state, blank, torch.cat(said))
        log_probs = self.projector.log_probs(state, blank, classes)
        return alignment_loss(
            pad_sequence(log_probs.split(lengths), batch_first=True),
            (targets + 1).split([len(ids) for ids in said]),
            torch.tensor(lengths),
            method=self.method,
        )

    def classes(self, state: Tensor, blank: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """The tokens to tell apart: the batch's own, random ones, and those that some of the speech tokens are mistaken
        for; and where among them the ``targets`` are."""
        text = self.projector.blank
        some = torch.randint(len(state), (MISTAKEN,))
        mistaken = self.projector.likeliest(state[some], blank[some], count=MISTAKES).flatten()
        random = torch.randint(text, (NEGATIVES,))
        classes, places = torch.cat([targets, mistaken[mistaken < text], random]).unique(return_inverse=True)
        return classes, places[: len(targets)]


class JointStage(nn.Module):
    """Cross-entropy of the reply plus ``settings.regularizer`` times the cross-modality regularizer.

    With ``align`` its loss is added, ``settings.joint_alignment`` times: the other two alone unlearn the reading.
    """

    def __init__(
        self,
        model: LyraForConditionalGeneration,
        processor: LyraProcessor,
        settings: Settings,
        answers: dict[str, str],
        align: AlignStage | None = None,
    ):
        super().__init__()
        self.model, self.settings, self.answers, self.align = model, settings, answers, align
        self.tokenizer = processor.tokenizer
        self.processor = processor

    def forward(self, batch: list[Utterance]) -> dict[str, Tensor]:
        model, settings = self.model, self.settings
        stacked, lengths = join_features(batch)
        if self.align:
            readings = model.speech_projector.readings(stacked, lengths)
            speech, new = model.speech_projector.tokens(readings[-1], lengths)
        else:
            speech, new = model.speech_projector(stacked, lengths)
        speech = speech.split(lengths)
        # What is hidden from the language model need not be there at all.
        shown = speech if new is None else [own[n] for own, n in zip(speech, new.split(lengths))]
        cross_entropy, count = 0.0, 0
        # Repeating last: backward needs the adapter to be switched on.
        for asked in (True, False):
            own = [i for i, u in enumerate(batch) if (u.text in self.answers) == asked]
            if own:
                logits, targets = self.replies([batch[i] for i in own], [shown[i] for i in own], asked)
                cross_entropy = cross_entropy + nn.functional.cross_entropy(logits, targets, reduction="sum")
                count += len(logits)
        losses = {"cross_entropy": cross_entropy / count}
        losses["loss"] = losses["cross_entropy"]
        if settings.regularizer:
            losses["regularizer"] = self.regularizer(speech, batch)
            losses["loss"] = losses["loss"] + settings.regularizer * losses["regularizer"]
        if self.align:
            ends = [self.align.loss(batch, lengths, *reading) for reading in (readings[0], readings[-1])]
            losses["alignment"] = sum(ends) / 2
            losses["loss"] = losses["loss"] + settings.joint_alignment * losses["alignment"]
        return losses

    def replies(self, batch: list[Utterance], speech: list[Tensor], asked: bool) -> tuple[Tensor, Tensor]:
        """Logits and targets of the replies to utterances that are all questions to answer, or all to repeat."""
        pairs = []
        for utterance, own in zip(batch, speech):
            said = SPEECH_TOKEN * len(own)
            answer = self.answers[utterance.text] if asked else f"{utterance.text}<|im_end|>"
            pairs.append((said if asked else f"{said}\n{REPEAT}", answer))
        ids, labels = self.tokenize(pairs)
        embeds = self.model.embed(ids, torch.cat(speech))
        if not asked:
            return self.reply_logits(embeds, ids, labels), labels[labels != -100]
        typed_ids, typed_labels = self.tokenize([(u.text, self.answers[u.text]) for u in batch])
        self.model.disable_adapters()
        try:
            with torch.no_grad():
                typed = self.reply_logits(self.model.embed(typed_ids), typed_ids, typed_labels)
            if self.model.config.adapters == "speech":
                self.model.enable_adapters()
            return self.reply_logits(embeds, ids, labels), typed.softmax(-1)
        finally:
            self.model.enable_adapters()

    def reply_logits(self, embeds: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
        """In float32, of all tokens of all replies, one after the other."""
        mask = (ids != self.tokenizer.pad_token_id).long()
        decoder = self.model.language_model.get_decoder()
        with disable_input_dtype_casting(self.model):
            hidden = decoder(inputs_embeds=embeds, attention_mask=mask, use_cache=False).last_hidden_state
        return self.model.get_output_embeddings()(hidden[:, :-1][labels[:, 1:] != -100]).float()

    def regularizer(self, speech: Sequence[Tensor], batch: list[Utterance], backend: str | None = None) -> Tensor:
        """The cross-modality regularizer between the speech tokens (N, d) of each utterance and what was said."""
        said = [torch.tensor(self.tokenizer(u.text, add_special_tokens=False)["input_ids"]) for u in batch]
        return cross_modality_loss(
            pad_sequence(speech, batch_first=True),
            self.model.get_input_embeddings()(pad_sequence(said, batch_first=True)).detach(),
            torch.tensor([len(s) for s in speech]),
            torch.tensor([len(s) for s in said]),
            temperature=self.settings.temperature,
            gamma=self.settings.gamma,
            drop_cost=self.settings.drop_cost,
            backend=backend,
        )

    def tokenize(self, pairs: list[tuple[str, str]]) -> tuple[Tensor, Tensor]:
        """Token ids of questions and replies, and labels (-100 outside the reply), padded on the right."""
        ids, labels = [], []
        for question, answer in pairs:
            content = [{"type": "text", "text": question}]
            prompt = self.processor.apply_chat_template(
                [{"role": "user", "content": content}], add_generation_prompt=True
            )
            prompt_ids = self.tokenizer(prompt, add_special_tokens=False)["input_ids"]
            reply = self.tokenizer(answer, add_special_tokens=False)["input_ids"]
            ids.append(torch.tensor(prompt_ids + reply))
            labels.append(torch.tensor([-100] * len(prompt_ids) + reply))
        pad = self.tokenizer.pad_token_id
        return (
            pad_sequence(ids, batch_first=True, padding_value=pad),
            pad_sequence(labels, batch_first=True, padding_value=-100),
        )


def join_features(batch: list[Utterance]) -> tuple[Tensor, list[int]]:
    """All features (T, width) one after the other, in float32, and the number of speech tokens of each utterance."""
    rows = [torch.from_numpy(u.stacked.astype(np.float32)) for u in batch]
    return torch.cat(rows), [len(r) for r in rows]


def batches(utterances: list[Utterance], size: int, seed: int) -> Iterator[list[Utterance]]:
    """Endless batches of utterances of like length, every utterance once per round."""
    rng = np.random.default_rng(seed)
    while True:
        order = rng.permutation(len(utterances))
        for start in range(0, len(order), size * SPAN):
            span = sorted(order[start : start + size * SPAN], key=lambda u: len(utterances[u].stacked))
            rows = [span[i : i + size] for i in range(0, len(span), size)]
            for r in rng.permutation(len(rows)):
                yield [utterances[u] for u in rows[r]]


def fit(
    stage: nn.Module,
    data: Iterator[list[Utterance]],
    *,
    steps: int,
    lr: float,
    out: Path,
    name: str,
    projector_lr: float | None = None,
) -> None:
    """Runs ``steps`` steps of AdamW with warm-up and cosine decay; resumes from ``out/name.pt`` if it is there."""
    accelerator = Accelerator(mixed_precision="bf16")
    trained = {n: p for n, p in stage.named_parameters() if p.requires_grad}
    groups = [{"params": [p], "lr": projector_lr or lr if "projector" in n else lr} for n, p in trained.items()]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    warmup = max(1, min(100, steps // 10))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min((s + 1) / warmup, 0.5 * (1 + math.cos(math.pi * min(1.0, s / steps))) + 0.01)
    )
    checkpoint, log = out / f"{name}.pt", out / f"{name}.jsonl"
    done = 0
    if checkpoint.exists():
        state = torch.load(checkpoint)
        done = state["step"]
        with torch.no_grad():
            for n, p in trained.items():
                p.copy_(state["weights"][n])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        torch.set_rng_state(state["rng"])
    stage, optimizer = accelerator.prepare(stage, optimizer)
    stage.train()
    for _ in range(done):
        next(data)  # the batches that the checkpoint has seen
    began = time.monotonic()
    with (
        tqdm(total=steps, initial=done, desc=name, disable=not accelerator.is_main_process) as bar,
        log.open("a") as file,
    ):
        for step in range(done, steps):
            losses = stage(next(data))
            accelerator.backward(losses["loss"])
            accelerator.clip_grad_norm_(trained.values(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            bar.update()
            if step % 20 == 19 or step + 1 == steps:
                row = {"step": step + 1, "seconds": round(time.monotonic() - began, 1)}
                row |= {k: round(v.item(), 4) for k, v in losses.items()}
                bar.set_postfix({k: row[k] for k in losses})
                file.write(json.dumps(row) + "\n")
                file.flush()
            if ((step + 1) % CHECKPOINT_STEPS == 0 or step + 1 == steps) and accelerator.is_main_process:
                state = {
                    "step": step + 1,
                    "weights": {n: p.detach() for n, p in trained.items()},
                    "optimizer": optimizer.state_dict(),
                    "schedule": schedule.state_dict(),
                    "rng": torch.get_rng_state(),
                }
                torch.save(state, checkpoint.with_suffix(".tmp"))
                checkpoint.with_suffix(".tmp").rename(checkpoint)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = __doc__.replace("``", "").replace("*", "")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--out", type=Path, default=Path("out/nano"), help="folder for weights, log and checkpoints")
    parser.add_argument("--cache", type=Path, default=Path(".cache/speech"), help="folder for speech and features")
    parser.add_argument(
        "--init",
        type=Path,
        metavar="DIR",
        help="go on from trained weights: the projector in this folder and, if there is one, its adapter, which brings "
        "its rank; all stages run, unless their steps are 0",
    )
    parser.add_argument("--workers", type=int, default=2, help="processes that synthesize speech, default 2")
    for field in dataclasses.fields(Settings):
        name = "--" + field.name.replace("_", "-")
        text = f"{field.metadata['help']}; default %(default)s"
        kind = type(field.default)
        parser.add_argument(name, type=kind, default=field.default, metavar=kind.__name__.upper(), help=text)


def run(args: argparse.Namespace) -> int:
    settings = Settings(**{f.name: getattr(args, f.name) for f in dataclasses.fields(Settings)})
    args.out.mkdir(parents=True, exist_ok=True)
    base = nano.assembled()
    model = LyraForConditionalGeneration.from_pretrained(base, attn_implementation="eager")  # fastest on a CPU in bf16
    model.language_model.to(torch.bfloat16)  # frozen, and multiplied in bfloat16 under autocast anyway
    processor = LyraProcessor.from_pretrained(base)
    speech = args.cache / "train"
    texts = load_texts("train", 0)[settings.start :][: settings.utterances]
    synthesize(texts, speech, workers=args.workers, start=settings.start)
    utterances = load_features(encode_folder(speech, model, processor), settings.utterances, settings.start)
    questions = [u.text for u in utterances if u.kind == "question"]
    answers = answer_questions(questions, model, processor, args.cache / "answers.json")
    train(model, processor, nano.speech_tokenizer(), utterances, answers, settings, args.out, init=args.init)
    return 0


def train(
    model: LyraForConditionalGeneration,
    processor: LyraProcessor,
    speech_tokenizer: Tokenizer,
    utterances: list[Utterance],
    answers: dict[str, str],
    settings: Settings,
    out: Path,
    init: Path | None = None,
) -> None:
    """Runs the stages on ``model`` and writes projector, adapter and settings to ``out``.

    With ``init``, a folder that an earlier call wrote, they go on from the weights in it.
    """
    torch.manual_seed(settings.seed)
    model.requires_grad_(False)
    model.speech_projector.dropout.p = settings.frame_dropout
    if init:
        nano.load_projector(model, init)
    else:
        model.speech_projector.reset()
    for reading, (name, steps) in enumerate((("align", settings.align_steps), ("reread", settings.reread_steps))):
        if steps:
            stage = AlignStage(model, speech_tokenizer, settings, reading)
            stage.requires_grad_(False)
            unfreeze(model.speech_projector, READINGS[reading])
            data = batches(utterances, settings.align_batch, settings.seed + 2 * reading)
            fit(stage, data, steps=steps, lr=settings.align_lr, out=out, name=name)
    trained = init if init and (init / "adapter_config.json").exists() else None
    if trained:
        settings = dataclasses.replace(settings, lora_rank=LoraConfig.from_pretrained(trained).r)
    if trained or settings.joint_steps:
        targets = r"language_model\..*\.(q_proj|k_proj|v_proj|o_proj)"
        lora = LoraConfig(r=settings.lora_rank, lora_alpha=2 * settings.lora_rank, target_modules=targets)
        model.add_adapter(lora, ADAPTER)  # freezes all but the adapter
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                # peft gives it the frozen model's dtype; in bfloat16, small steps and Adam's second moments are lost.
                parameter.data = parameter.data.float()
    if trained:
        weights = load_file(trained / "adapter_model.safetensors")
        weights = {name.removeprefix("base_model.model."): weight for name, weight in weights.items()}
        set_peft_model_state_dict(model, weights, adapter_name=ADAPTER)
    if settings.joint_steps:
        if settings.projector_lr:
            unfreeze(model.speech_projector)
        if not settings.question_repeats:
            answers = {}
        align = AlignStage(model, speech_tokenizer, settings) if settings.joint_alignment else None
        stage = JointStage(model, processor, settings, answers, align)
        questions = [u for u in utterances if u.text in answers]
        drawn = utterances + (settings.question_repeats - 1) * questions
        data = batches(drawn, settings.joint_batch, settings.seed + 1)
        fit(
            stage,
            data,
            steps=settings.joint_steps,
            lr=settings.joint_lr,
            projector_lr=settings.projector_lr,
            out=out,
            name="joint",
        )
    record = dataclasses.asdict(settings)
    if init:
        record["init"] = json.loads((init / "training.json").read_text())
    save(model, record, out)


def save(model: LyraForConditionalGeneration, record: dict, out: Path) -> None:
    """Writes what was trained: the projector, the adapter as a peft directory, the settings that made them."""
    state = {name: p.detach().to(torch.bfloat16) for name, p in learning(model.speech_projector)}
    save_file(state, out / nano.PROJECTOR_FILE)
    if model._hf_peft_config_loaded:
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.to(torch.bfloat16)
        model.peft_config[ADAPTER].base_model_name_or_path = None  # else a folder of this machine
        PreTrainedModel.save_pretrained(model, out)  # transformers' own: the adapter alone
    (out / "training.json").write_text(json.dumps(record, indent=1) + "\n")


def learning(projector: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The weights of a projector that training changes."""
    return [(name, p) for name, p in projector.named_parameters() if name.startswith("linear_")]


def unfreeze(projector: nn.Module, layers: tuple[str, ...] = ("linear_",)) -> None:
    for name, parameter in learning(projector):
        if name.startswith(layers):
            parameter.requires_grad_(True)
