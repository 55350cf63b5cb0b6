"""token_select: scoring, selection, gathering and the whole of it, at the shapes of Qwen2-VL-7B."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

import lyra_ops
from bench.harness import FORWARD, Cost, Workload
from bench.peers import token_select as peers

HEADS, KV_HEADS, DIM, HIDDEN = 28, 4, 128, 3584
KEEP = 0.5


def workloads(device: str, quick: bool) -> Iterator[Workload]:
    if quick:
        yield scoring(device, torch.float32, 8, 300, heads=4, kv_heads=2, dim=16)
        yield selection(device, 1000)
        yield gathering(device, 300, hidden=64)
        yield whole(device, torch.float32, 8, 300, heads=4, kv_heads=2, dim=16, hidden=64)
    elif device == "cuda":
        for rows, length in ((64, 32768), (64, 131072), (16, 131072)):
            yield scoring(device, torch.bfloat16, rows, length)
            yield scoring(device, torch.bfloat16, rows, length, given_lse=True)
        for length in (4096, 131072, 1 << 20):
            yield selection(device, length)
        for k in (1, 2048, 131071):
            yield selection(device, 131072, k)
        for length in (4096, 32768, 131072):
            yield gathering(device, length)
        for length in (576, 4096, 16384, 32768):
            yield whole(device, torch.bfloat16, 64, length)
    else:
        for rows in (16, 64):
            for length in (1024, 4096, 32768):
                yield scoring(device, torch.float32, rows, length)
        for length in (4096, 32768):
            yield scoring(device, torch.bfloat16, 64, length)
        yield scoring(device, torch.float32, 64, 4096, given_lse=True)
        for length in (4096, 131072):
            yield selection(device, length)
        yield gathering(device, 4096)
        for length in (576, 4096):
            yield whole(device, torch.float32, 16, length)


def tokens(device: str, dtype: torch.dtype, heads: int, length: int, dim: int) -> Tensor:
    """(1, heads, length, dim) as attention layers make it: a transposed view of (1, length, heads, dim)."""
    return torch.randn(1, length, heads, dim, device=device, dtype=dtype).transpose(1, 2)


def scoring(
    device: str,
    dtype: torch.dtype,
    rows: int,
    length: int,
    heads: int = HEADS,
    kv_heads: int = KV_HEADS,
    dim: int = DIM,
    given_lse: bool = False,
) -> Workload:
    def inputs() -> tuple[Tensor, ...]:
        query, key = tokens(device, dtype, heads, rows, dim), tokens(device, dtype, kv_heads, length, dim)
        if not given_lse:
            return query, key
        keys = key.float().repeat_interleave(heads // kv_heads, dim=1)
        lse = torch.cat([(q @ keys.mT * dim**-0.5).logsumexp(-1, keepdim=True) for q in query.float().split(8, 2)], 2)
        return query, key, lse.squeeze(-1)

    def ours(query: Tensor, key: Tensor, lse: Tensor | None = None, backend: str = device) -> Tensor:
        return lyra_ops.token_scores(query, key, lse=lse, backend=backend)

    grouped = peers.grouped_shares if given_lse else peers.grouped_scores
    others = {"grouped torch": grouped, "grouped torch, compiled": peers.compiled(grouped)}
    if not given_lse:
        others = {"published formula": peers.published_scores, **others}
    if device == "cuda" and given_lse:
        others["keys_values (triton)"] = peers.keys_values_shares
    elif device == "cuda":
        others["attention's backward"] = peers.scores_by_attention
        others["FlagAttention"] = peers.flag_attention_scores
    item = dtype.itemsize
    lse_given = ", lse given" if given_lse else ""
    return Workload(
        name=f"scores, {rows} x {length}, {heads}/{kv_heads} heads of {dim}, {str(dtype)[6:]}{lse_given}",
        inputs=inputs,
        implementations={f"lyra ({device})": ours} | others,
        plain=partial(ours, backend="reference") if given_lse else formula,
        costs={
            FORWARD: Cost(
                item * dim * (heads * rows + kv_heads * length) + 4 * length,
                (2 * dim + 3) * heads * rows * length,
            )
        },
        items=("keys", length),
    )


def formula(query: Tensor, key: Tensor) -> Tensor:
    """In the dtype of the inputs, but at least float32, which the scores of ours are."""
    if query.dtype.itemsize == 2:
        query, key = query.float(), key.float()
    batch, heads, rows, dim = query.shape
    logits = query.reshape(batch, key.shape[1], -1, dim) @ key.mT * dim**-0.5
    return logits.softmax(-1).sum((1, 2)) / (heads * rows)


def as_floats(places: Tensor) -> Tensor:
    """int64 places as float64, which is what can be compared: exact."""
    return places.double()


def selection(device: str, length: int, k: int | None = None) -> Workload:
    k = int(KEEP * length) if k is None else k
    everything = torch.ones(1, length, dtype=torch.bool, device=device)

    def inputs() -> tuple[Tensor]:
        return (torch.rand(1, length, device=device),)

    def ours(scores: Tensor, backend: str = device) -> Tensor:
        return as_floats(lyra_ops.select_tokens(scores, everything, keep=k, capacity=k, backend=backend).index)

    others = {
        "torch.topk, sort": lambda scores: as_floats(peers.topk_and_sort(scores, k)),
        "torch stable sort": lambda scores: as_floats(peers.stable_sort(scores, k)),
    }
    if device == "cuda":
        others["FlashInfer top_k, sort"] = lambda scores: as_floats(peers.flashinfer_topk_and_sort(scores, k))
    return Workload(
        name=f"select {k} of {length}",
        inputs=inputs,
        implementations={f"lyra ({device})": ours} | others,
        plain=lambda scores: as_floats(peers.stable_sort(scores, k)),
        costs={FORWARD: Cost((4 + 1 + 8) * length + 8 * k, length)},
        items=("keys", length),
    )


def gathering(device: str, length: int, hidden: int = HIDDEN) -> Workload:
    """Hidden states, rotary cos and sin, position ids of three planes and a mask, half of the tokens kept."""
    k = int(KEEP * length)
    selected = lyra_ops.select_tokens(
        torch.rand(1, length, device=device),
        torch.ones(1, length, dtype=torch.bool, device=device),
        keep=k,
        capacity=k,
    )
    positions = torch.arange(length, device=device).expand(3, 1, length).contiguous()
    mask = torch.ones(1, length, dtype=torch.bool, device=device)
    dtype = torch.bfloat16

    def inputs() -> tuple[Tensor, ...]:
        return tuple(torch.randn(1, length, size, device=device, dtype=dtype) for size in (hidden, DIM, DIM))

    def ours(*tensors: Tensor, backend: str = device) -> Tensor:
        return lyra_ops.gather_tokens(selected, *tensors, positions, mask, backend=backend)[0]

    def by(gather):
        def run(*tensors: Tensor) -> Tensor:
            gather(selected.index, positions[0], positions[1], positions[2], mask)
            return gather(selected.index, *tensors)[0]

        return run

    per_token = dtype.itemsize * (hidden + 2 * DIM) + 3 * 8 + 1
    return Workload(
        name=f"gather {k} of {length}, hidden {hidden} bfloat16, cos, sin, positions, mask",
        inputs=inputs,
        implementations={
            f"lyra ({device})": ours,
            "torch.gather each": by(peers.gather_each),
            "torch indexing each": by(peers.index_each),
        },
        plain=partial(ours, backend="reference"),
        costs={FORWARD: Cost(2 * k * per_token + 8 * k, 0)},
        items=("tokens", k),
    )


def whole(
    device: str,
    dtype: torch.dtype,
    rows: int,
    length: int,
    heads: int = HEADS,
    kv_heads: int = KV_HEADS,
    dim: int = DIM,
    hidden: int = HIDDEN,
) -> Workload:
    """Score, select and gather the hidden states: what a layer that drops tokens adds."""
    k = int(KEEP * length)
    everything = torch.ones(1, length, dtype=torch.bool, device=device)

    def inputs() -> tuple[Tensor, ...]:
        # Always the same: rounding may swap two tokens whose scores all but tie, which would be no error.
        torch.manual_seed(length)
        query, key = tokens(device, dtype, heads, rows, dim), tokens(device, dtype, kv_heads, length, dim)
        return query, key, torch.randn(1, length, hidden, device=device, dtype=dtype)

    def ours(query: Tensor, key: Tensor, states: Tensor) -> Tensor:
        _, (kept,) = lyra_ops.extract_tokens(
            query, key, everything, states, keep=k, min_keep=32, capacity=k, backend=device
        )
        return kept

    def by(score):
        def run(query: Tensor, key: Tensor, states: Tensor) -> Tensor:
            return peers.index_each(peers.topk_and_sort(score(query, key), k), states)[0]

        return run

    def step_by_step(query: Tensor, key: Tensor, states: Tensor) -> Tensor:
        scores = lyra_ops.token_scores(query, key, backend=device)
        selected = lyra_ops.select_tokens(scores, everything, keep=k, min_keep=32, capacity=k, backend=device)
        return lyra_ops.gather_tokens(selected, states, backend=device)[0]

    item, shape = dtype.itemsize, f"{rows} x {length}, {heads}/{kv_heads} heads of {dim}, hidden {hidden}"
    return Workload(
        name=f"extract {k}, {shape}, {str(dtype)[6:]}",
        inputs=inputs,
        implementations={
            f"lyra ({device})": ours,
            f"lyra ({device}), step by step": step_by_step,
            "published formula, topk, indexing": by(peers.published_scores),
            "grouped torch, topk, indexing": by(peers.grouped_scores),
            "grouped torch, compiled, topk, indexing": by(peers.compiled(peers.grouped_scores)),
        },
        plain=by(formula),
        costs={
            FORWARD: Cost(
                item * dim * (heads * rows + kv_heads * length) + 2 * item * k * hidden,
                (2 * dim + 3) * heads * rows * length,
            )
        },
        items=("keys", length),
    )
