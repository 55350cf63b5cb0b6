"""Which tokens go to which adapter, as the kernels want it: built on the device, once per step for all layers.

Nothing is read back and every size depends on the numbers of tokens and adapters alone, so that a CUDA graph can hold
the plan and what follows from it. T tokens, S adapters per token, E adapters; a pair p = t S + s is one adapter of a
token.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

TILE = 64  # tokens of a tile, pairs of a chunk; a constant of the kernels, too


class Plan(NamedTuple):
    ids: Tensor  # (T, S) int32: the adapter of each pair; -1: none
    starts: Tensor  # (E + 1,) int32: pairs[starts[e] : starts[e + 1]] are those of adapter e
    pairs: Tensor  # (T S,) int32: pairs by adapter, then in order; -1 behind the last
    chunks: Tensor  # (ceil(T S / TILE) + E, 2) int32: runs of at most TILE pairs of one adapter: [adapter, first place
    #                 in pairs]; [-1, 0] behind the last
    present: Tensor  # (ceil(T / TILE), ceil(E / 32)) int32: bit e % 32 of word e // 32: the tile holds adapter e


def build(adapter_ids: Tensor, adapters: int) -> Plan:
    """The plan of ids (T, S); what is not in 0 .. E - 1 counts as -1."""
    device, tokens = adapter_ids.device, adapter_ids.shape[0]
    ids = torch.where((adapter_ids >= 0) & (adapter_ids < adapters), adapter_ids, -1).int()
    known = torch.arange(adapters, device=device, dtype=torch.int32)

    flat = ids.flatten()
    order = torch.where(flat < 0, adapters, flat).argsort(stable=True).int()
    belongs = ids[:, :, None] == known  # (T, S, E)
    counts = belongs.sum((0, 1))
    starts = _offsets(counts)
    pairs = torch.where(torch.arange(len(order), device=device) < starts[-1], order, -1)

    firsts = _offsets((counts + TILE - 1) // TILE)  # chunk places at which the adapters begin
    places = torch.arange(-(-len(order) // TILE) + adapters, device=device)
    owner = (places[:, None] >= firsts[1:]).sum(1)  # adapters that end before: whose chunk this is, or E
    inside = owner.clamp(max=max(adapters - 1, 0))
    begins = starts[inside] + (places - firsts[inside]) * TILE
    chunks = torch.stack([torch.where(owner < adapters, owner, -1), torch.where(owner < adapters, begins, 0)], 1)

    tiles, words = -(-tokens // TILE), -(-adapters // 32)
    in_tile = torch.zeros(tiles * TILE, words * 32, dtype=torch.bool, device=device)
    in_tile[:tokens, :adapters] = belongs.any(1)
    bits = in_tile.view(tiles, TILE, words, 32).any(1).long() << torch.arange(32, device=device)
    # The sum fills 32 bits; int32 takes them as they are.
    return Plan(ids, starts.int(), pairs, chunks.int(), bits.sum(2).to(torch.int32))


def _offsets(sizes: Tensor) -> Tensor:
    return torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])
