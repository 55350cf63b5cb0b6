"""python -m bench.model.recall: which score keeps the tokens that a question needs, on a task learned in a minute.

Each of 16 modality tokens carries a key and a value (the sum of two embeddings). Then the text names four of the keys,
and the model has to say the value of each. It is a Llama of two layers. The first has the queries and keys of the
second and adds nothing to the hidden states: so the extractor sees behind layer 0 what the reader will look at, and
nothing has been read before tokens are dropped. A pair that goes is lost:

    right answers = kept + (1 - kept) / 16        kept = k / 16 for random and uniform, min(1, k / 4) at best

One model is trained without dropping, another one with (text-guided, half of the tokens kept), and each is asked under
all scores and shares. Counted are the asked tokens that stayed and the right answers. The JSON holds each seed. Beside
it: the plot.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from bench import records
from lyra_ops.integrations import apply_token_extractor

PAIRS, ASKED, KEYS, VALUES = 16, 4, 64, 16
BEGIN = KEYS + VALUES  # words: keys, values, this one
WIDTH, BATCH, RATE, TRAINED_KEEP = 64, 64, 1e-2, 0.5
SCORES = ("text", "last_row", "uniform", "random")
SHARES = tuple(k / PAIRS for k in (1, 2, 4, 8, 12, 16))


class Recall(nn.Module):
    """A Llama that reads in its second layer alone. What stands for an image: a word's embedding and a value's."""

    def __init__(self) -> None:
        super().__init__()
        self.llm = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=BEGIN + 1, hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=2,
                num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=64, pad_token_id=None,
                bos_token_id=None, eos_token_id=None, rope_parameters={"rope_type": "default", "rope_theta": 1e8},
            )
        )  # fmt: skip
        looks, reads = self.llm.model.layers
        looks.input_layernorm = reads.input_layernorm
        looks.self_attn.q_proj, looks.self_attn.k_proj = reads.self_attn.q_proj, reads.self_attn.k_proj
        for part in (reads.self_attn.q_proj, reads.self_attn.k_proj):
            nn.init.eye_(part.weight)  # a word looks for what is like it; else that alone takes most of the training
        for part in (looks.self_attn.o_proj, looks.mlp.down_proj):
            nn.init.zeros_(part.weight)
            part.weight.requires_grad_(False)
        self.value = nn.Embedding(VALUES, WIDTH)
        for table in (self.value, self.llm.get_input_embeddings()):
            nn.init.normal_(table.weight)

    def forward(self, keys: Tensor, values: Tensor, places: Tensor) -> Tensor:
        """Logits (B, ASKED, words) at the keys that the text names."""
        words = self.llm.get_input_embeddings()
        begin, asked = torch.full_like(keys[:, :1], BEGIN), keys.gather(1, places)
        inputs = torch.cat([words(begin), words(keys) + self.value(values), words(asked)], dim=1)
        return self.llm(inputs_embeds=inputs, use_cache=False, logits_to_keep=ASKED).logits


def questions(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Keys, all different; their values; the places of those that are asked for, all different."""
    keys = torch.rand(count, KEYS, generator=generator).argsort(dim=1)[:, :PAIRS]
    values = torch.randint(VALUES, (count, PAIRS), generator=generator)
    return keys, values, torch.rand(count, PAIRS, generator=generator).argsort(dim=1)[:, :ASKED]


def modality(count: int) -> Tensor:
    places = torch.arange(1 + PAIRS + ASKED)
    return ((places >= 1) & (places <= PAIRS)).expand(count, -1)


def train(dropping: bool, seed: int, steps: int) -> Recall:
    torch.manual_seed(seed)
    model, generator = Recall(), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps, pct_start=0.1)
    extractor = apply_token_extractor(model.llm, keep={0: TRAINED_KEEP if dropping else 1.0}, min_keep=0)
    for _ in range(steps):
        keys, values, places = questions(BATCH, generator)
        with extractor.modality(modality(BATCH)):
            logits = model(keys, values, places)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), KEYS + values.gather(1, places).flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    extractor.remove()
    return model.eval()


@torch.inference_mode()
def judge(model: Recall, score: str, share: float, count: int) -> dict[str, float]:
    keys, values, places = questions(count, torch.Generator().manual_seed(1_000_000))
    extractor = apply_token_extractor(model.llm, keep={0: share}, min_keep=0, score=score)
    with extractor.modality(modality(count)):
        said = model(keys, values, places).argmax(-1)
    kept = (extractor.positions[:, None] == 1 + places[:, :, None]).any(dim=2)
    extractor.remove()
    right = said == KEYS + values.gather(1, places)
    return {"kept": round(kept.double().mean().item(), 4), "right": round(right.double().mean().item(), 4)}


def table(seed: int, dropping: bool, steps: int, count: int) -> list[dict]:
    model, rows = train(dropping, seed, steps), []
    for score in SCORES:
        found = {share: judge(model, score, share, count) for share in SHARES}
        whose = {"trained_with_dropping": dropping, "seed": seed, "score": score}
        rows += [whose | {"share": share} | result for share, result in found.items()]
        told = "  ".join(f"{s:.3f}: {r['kept']:.2f} {r['right']:.2f}" for s, r in found.items())
        how = "with" if dropping else "without"
        print(f"seed {seed}, trained {how} dropping, {score:9} {told}", flush=True)
    return rows


def by_chance(kept: float) -> float:
    """Right answers, where those whose pair is lost are guessed."""
    return kept + (1 - kept) / VALUES


def plot(rows: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(9.5, 4), sharey=True)
    for dropping, panel in zip((False, True), panels):
        own = [r for r in rows if r["trained_with_dropping"] == dropping]
        for kept, label in ((SHARES, "theory"), ([min(1, s * PAIRS / ASKED) for s in SHARES], None)):
            panel.plot(SHARES, list(map(by_chance, kept)), "--", color="0.7", linewidth=4, label=label)
        for score in SCORES:
            means = [
                statistics.mean(r["right"] for r in own if (r["share"], r["score"]) == (share, score))
                for share in SHARES
            ]
            panel.plot(SHARES, means, color=f"C{SCORES.index(score)}", marker=".", label=score)
        panel.axvline(ASKED / PAIRS, color="0.8", linewidth=1)
        panel.set_xscale("log", base=2)
        panel.set_xlabel(f"share of the modality tokens kept (line: the {ASKED} asked ones)")
        panel.set_title(f"trained {'with' if dropping else 'without'} dropping", fontsize=10)
    panels[0].set_ylabel("right answers")
    panels[0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=80)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.model.recall", description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3, help="default %(default)s")
    parser.add_argument("--steps", type=int, default=300, help="of training, default %(default)s")
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
    out = args.out or records.folder("cpu")
    record = {
        "table": "recall",
        **records.origin("cpu", "bench.model.recall", arguments),
        "seconds": round(time.monotonic() - began),
        "task": {"pairs": PAIRS, "asked": ASKED, "keys": KEYS, "values": VALUES, "trained_keep": TRAINED_KEEP},
        "rows": rows,
    }
    records.write(out / "recall.json", record)
    plot(rows, out / "recall.png")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
