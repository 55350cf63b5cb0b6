"""python -m bench.model.prefill MODEL: what dropping modality tokens saves of a prefill, beside what it can save.

Models of random weights; prompts of modality tokens with 64 tokens of text behind them; blocks=4 as in the paper's
table 4a. Each figure is of one forward that fills the KV cache. The baseline and all others take the logits of the
last token alone; "all logits" shows what that is worth. Beside each speedup stands that of the FLOPs alone: of
projections, attention over the keys that a token sees, MLPs and the head; scoring, with its 64 rows, is not counted.
The time can gain more than the FLOPs do where attention, which shrinks with the square, runs at a lower rate.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedConfig, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from bench import records
from bench.harness import peak_cpu, peak_gpu
from lyra_ops.integrations import apply_token_extractor

TEXT_TOKENS, BLOCKS = 64, 4
BASE, ALL = "baseline", "baseline, all logits"


def shapes() -> dict[str, tuple[type[PreTrainedModel], PreTrainedConfig]]:
    common = {"max_position_embeddings": 1 << 18, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
    return {
        "nano": (  # SmolLM2-135M
            LlamaForCausalLM,
            LlamaConfig(
                vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
                num_key_value_heads=3, tie_word_embeddings=True, **common,
            ),
        ),
        "thin": (  # as many layers as a 7B model, a fourteenth of its width
            Qwen2ForCausalLM,
            Qwen2Config(
                vocab_size=8192, hidden_size=256, intermediate_size=1024, num_hidden_layers=28, num_attention_heads=4,
                num_key_value_heads=2, **common,
            ),
        ),
        "7b": (  # Qwen2-VL-7B
            Qwen2ForCausalLM,
            Qwen2Config(
                vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28,
                num_attention_heads=28, num_key_value_heads=4, **common,
            ),
        ),
    }  # fmt: skip


def build(name: str, device: str, dtype: torch.dtype) -> PreTrainedModel:
    kind, config = shapes()[name]
    torch.manual_seed(0)
    with torch.device(device):
        model = kind._from_config(config, dtype=dtype, attn_implementation="sdpa")
    return model.eval()


def flops(config: PreTrainedConfig, length: int, keep: float, early: bool, rows_of_logits: int = 1) -> tuple[int, int]:
    """(of projections, MLPs and the head; of attention, over the keys that a token sees)"""
    width, heads = config.hidden_size, config.num_attention_heads
    dim = getattr(config, "head_dim", None) or width // heads
    ends = [config.num_hidden_layers * b // BLOCKS - 1 for b in range(1, BLOCKS)]
    tokens, linear, attention = length, 0, 0
    for layer in range(config.num_hidden_layers):
        after = tokens
        if layer in ends:
            after = TEXT_TOKENS + max(math.floor(keep * (tokens - TEXT_TOKENS)), 32)
        linear += 2 * tokens * width * (heads + 2 * config.num_key_value_heads) * dim
        attention += 2 * tokens * (tokens + 1) * heads * dim
        linear += 2 * (after if early else tokens) * width * (heads * dim + 3 * config.intermediate_size)
        tokens = after
    return linear + 2 * width * config.vocab_size * (rows_of_logits or tokens), attention


def variants(keeps: list[float]) -> Iterator[tuple[str, float, bool]]:
    yield BASE, 1.0, True
    yield ALL, 1.0, True
    for keep in keeps:
        for early in (True, False):
            yield f"keep {keep}, {'early' if early else 'late'}", keep, early


@torch.inference_mode()
def measure(model: PreTrainedModel, length: int, keeps: list[float], repeats: int, device: str) -> list[dict]:
    """Rounds of one run of each variant, so that a slow minute of the machine meets all of them."""
    ids = torch.randint(model.config.vocab_size, (1, length), device=device)
    modality = torch.arange(length, device=device)[None] < length - TEXT_TOKENS
    seconds: dict[str, list[float]] = {}
    memory: dict[str, int | None] = {}
    model(input_ids=ids[:, :256], use_cache=True, logits_to_keep=1)
    for turn in range(repeats):
        for name, keep, early in variants(keeps):
            own = seconds.setdefault(name, [])
            run = partial(timed, model, ids, 0 if name == ALL else 1, device, own)
            with dropping(model, modality, keep, early) if keep < 1 else nullcontext():
                if turn:
                    run()
                else:
                    memory[name] = (peak_gpu if device == "cuda" else peak_cpu)(run)
    base = statistics.median(seconds[BASE])
    whole = sum(flops(model.config, length, 1.0, True))
    rows = []
    for name, keep, early in variants(keeps):
        share = sum(flops(model.config, length, keep, early, 0 if name == ALL else 1)) / whole
        median = statistics.median(seconds[name])
        rows.append(
            {
                "length": length,
                "variant": name,
                "seconds": {"median": median, "least": min(seconds[name]), "most": max(seconds[name])},
                "repeats": len(seconds[name]),
                "speedup": base / median,
                "speedup_of_flops": 1 / share,
                "peak_bytes": memory[name],
            }
        )
        print(
            f"{length:7} {name:22} {median:9.3f} s   {base / median:5.2f}x, FLOPs {1 / share:5.2f}x   "
            f"{(memory[name] or 0) / 2**20:8.0f} MiB",
            flush=True,
        )
    return rows


@contextmanager
def dropping(model: PreTrainedModel, modality: Tensor, keep: float, early: bool) -> Iterator[None]:
    extractor = apply_token_extractor(model, blocks=BLOCKS, keep=keep, early=early)
    with extractor.modality(modality):
        yield
    extractor.remove()


def timed(model: PreTrainedModel, ids: Tensor, logits: int, device: str, seconds: list[float]) -> None:
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    model(input_ids=ids, use_cache=True, logits_to_keep=logits)
    wait()
    seconds.append(time.perf_counter() - start)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.model.prefill", description=__doc__.splitlines()[0])
    parser.add_argument("model", choices=shapes())
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--lengths", type=int, nargs="+", help="default 1k to 8k; for 7b 2^11 to 2^17")
    parser.add_argument("--keep", type=float, nargs="+", default=[0.8, 0.7], help="default %(default)s")
    parser.add_argument("--repeats", type=int, default=3, help="default %(default)s")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: bfloat16 on a GPU")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the CPU, default %(default)s")
    parser.add_argument("--json", type=Path, help="default bench/results/<device>/prefill_<model>.json; runs add up")
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    lengths = args.lengths or ([1 << k for k in range(11, 18)] if args.model == "7b" else [1024, 2048, 4096, 8192])
    dtype = args.dtype or ("bfloat16" if args.device == "cuda" else "float32")
    path = args.json or records.folder(args.device) / f"prefill_{args.model}.json"
    model = build(args.model, args.device, getattr(torch, dtype))
    print(f"{args.model} on {records.device_name(args.device)}, {dtype}, {args.threads} CPU threads")
    for length in lengths:
        rows = measure(model, length, args.keep, args.repeats, args.device)
        run = {
            "length": length,
            "keep": args.keep,
            "dtype": dtype,
            **records.origin(args.device, "bench.model.prefill", arguments),
            "rows": rows,
        }
        old = json.loads(path.read_text())["runs"] if path.exists() else []
        others = [r for r in old if (r["length"], r["keep"]) != (length, args.keep)]
        runs = sorted([*others, run], key=lambda r: (r["length"], r["keep"]))
        records.write(path, {"table": "prefill", "model": args.model, "runs": runs})
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
