"""python -m bench.model.recall: which score keeps the token that a question needs, on a task learned in a minute.

Each of 16 modality tokens carries a key and a value (the sum of two embeddings). The text says "ask" and a key; the
model, of three layers, answers with the value. A model is trained without dropping, another one with (text-guided, a
quarter kept behind layer 0), and each is asked under all scores and shares, with tokens dropped behind layer 0 or 1.
Counted are the samples whose asked token stayed, which by chance are the share, and the right answers, of which 1 / 16
come by chance. The JSON holds each seed. Beside it: the plot.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from datetime import datetime, timezone
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from bench.__main__ import HERE, commit, device_name, slug
from lyra_ops.integrations import apply_token_extractor

PAIRS, KEYS, VALUES = 16, 64, 16
ASK, BEGIN = KEYS + VALUES, KEYS + VALUES + 1  # words: keys, values, these two
WIDTH, BATCH, TRAINED_KEEP = 64, 128, 0.25
SCORES = ("text", "last_row", "uniform", "random")
SHARES = tuple(k / PAIRS for k in (1, 2, 4, 8, 12, 16))
LAYERS, TRAINED_LAYER = (0, 1), 0


class Recall(nn.Module):
    """A small Llama, and the features that stand for images."""

    def __init__(self) -> None:
        super().__init__()
        self.llm = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=BEGIN + 1, hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=3,
                num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=64, pad_token_id=None,
                bos_token_id=None, eos_token_id=None,
            )
        )  # fmt: skip
        self.key, self.value = nn.Embedding(KEYS, WIDTH), nn.Embedding(VALUES, WIDTH)
        for table in (self.key, self.value, self.llm.get_input_embeddings()):
            nn.init.normal_(table.weight, std=0.5)

    def forward(self, keys: Tensor, values: Tensor, place: Tensor, answered: bool):
        """Begin, the pairs, "ask", the key at ``place`` and, if answered, its value."""
        words = self.llm.get_input_embeddings()
        asked, answer = keys.gather(1, place), KEYS + values.gather(1, place)
        begin, ask = (torch.full_like(asked, word) for word in (BEGIN, ASK))
        text = torch.cat([ask, asked, *([answer] if answered else [])], dim=1)
        inputs = torch.cat([words(begin), self.key(keys) + self.value(values), words(text)], dim=1)
        labels = None
        if answered:
            labels = torch.full(inputs.shape[:2], -100)
            labels[:, -1:] = answer
        return self.llm(inputs_embeds=inputs, labels=labels, use_cache=False)


def questions(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Keys, all different; their values; the place of the one that is asked for."""
    keys = torch.rand(count, KEYS, generator=generator).argsort(dim=1)[:, :PAIRS]
    values = torch.randint(VALUES, (count, PAIRS), generator=generator)
    return keys, values, torch.randint(PAIRS, (count, 1), generator=generator)


def modality(count: int, words: int) -> Tensor:
    places = torch.arange(1 + PAIRS + words)
    return ((places >= 1) & (places <= PAIRS)).expand(count, -1)


def train(dropping: bool, seed: int, steps: int) -> Recall:
    torch.manual_seed(seed)
    model, generator = Recall(), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps, pct_start=0.1)
    extractor = apply_token_extractor(model.llm, keep={TRAINED_LAYER: TRAINED_KEEP if dropping else 1.0}, min_keep=0)
    for _ in range(steps):
        with extractor.modality(modality(BATCH, 3)):
            loss = model(*questions(BATCH, generator), answered=True).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    extractor.remove()
    return model.eval()


@torch.inference_mode()
def judge(model: Recall, layer: int, score: str, share: float, count: int) -> dict[str, float]:
    keys, values, place = questions(count, torch.Generator().manual_seed(1_000_000))
    extractor = apply_token_extractor(model.llm, keep={layer: share}, min_keep=0, score=score)
    with extractor.modality(modality(count, 2)):
        said = model(keys, values, place, answered=False).logits[:, -1].argmax(-1)
    kept = (extractor.positions == 1 + place).any(dim=1)
    extractor.remove()
    right = said == KEYS + values.gather(1, place)[:, 0]
    return {"kept": round(kept.double().mean().item(), 4), "right": round(right.double().mean().item(), 4)}


def table(seed: int, dropping: bool, steps: int, count: int) -> list[dict]:
    model, rows = train(dropping, seed, steps), []
    for layer, score in itertools.product(LAYERS, SCORES):
        found = {share: judge(model, layer, score, share, count) for share in SHARES}
        whose = {"trained_with_dropping": dropping, "seed": seed, "layer": layer, "score": score}
        rows += [whose | {"share": share} | result for share, result in found.items()]
        told = "  ".join(f"{s:.3f}: {r['kept']:.2f} {r['right']:.2f}" for s, r in found.items())
        how = "with" if dropping else "without"
        print(f"seed {seed}, trained {how}, behind layer {layer}, {score:9} {told}", flush=True)
    return rows


def plot(rows: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(2, 2, figsize=(9.5, 6.5), sharex=True, sharey=True)
    for layer, line_of_panels in zip(LAYERS, panels):
        for dropping, panel in zip((False, True), line_of_panels):
            own = [r for r in rows if r["trained_with_dropping"] == dropping and r["layer"] == layer]
            for score in SCORES:
                for measure, style in (("kept", "--"), ("right", "-")):
                    means = [
                        statistics.mean(r[measure] for r in own if (r["share"], r["score"]) == (share, score))
                        for share in SHARES
                    ]
                    color, label = f"C{SCORES.index(score)}", score if measure == "right" else None
                    panel.plot(SHARES, means, style, color=color, marker=".", label=label)
            panel.set_xscale("log", base=2)
            panel.set_title(
                f"dropped behind layer {layer}; trained {'with' if dropping else 'without'} dropping", fontsize=10
            )
    for panel in panels[1]:
        panel.set_xlabel("share of the modality tokens kept")
    for line_of_panels in panels:
        line_of_panels[0].set_ylabel("right (dashed: asked token kept)")
    panels[0][0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=100)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.model.recall", description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3, help="default %(default)s")
    parser.add_argument("--steps", type=int, default=400, help="of training, default %(default)s")
    parser.add_argument("--questions", type=int, default=512, help="to judge by, default %(default)s")
    parser.add_argument("--jobs", type=int, default=1, help="models at a time, default %(default)s")
    parser.add_argument("--out", type=Path, help="folder; default bench/results/<device>")
    args = parser.parse_args(arguments)
    began = time.monotonic()
    models = zip(*itertools.product(range(args.seeds), (False, True)))
    columns = (*models, itertools.repeat(args.steps), itertools.repeat(args.questions))
    if args.jobs == 1:
        tables = list(map(table, *columns))
    else:
        with ProcessPoolExecutor(args.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
            tables = list(pool.map(table, *columns))
    rows = list(itertools.chain(*tables))
    out = args.out or HERE / "results" / slug(device_name("cpu"))
    out.mkdir(parents=True, exist_ok=True)
    record = {
        "table": "recall",
        "device": device_name("cpu"),
        "torch": torch.__version__,
        "commit": commit(),
        "command": "python -m bench.model.recall " + " ".join(arguments),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "seconds": round(time.monotonic() - began),
        "task": {"pairs": PAIRS, "keys": KEYS, "values": VALUES, "trained_keep": TRAINED_KEEP},
        "rows": rows,
    }
    (out / "recall.json").write_text(json.dumps(record, indent=1) + "\n")
    plot(rows, out / "recall.png")
    print(f"written to {out / 'recall.json'} and recall.png")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
