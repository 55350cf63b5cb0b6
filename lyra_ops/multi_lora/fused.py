"""Routed LoRA made of three kernels, `shrink_`, `expand_` and `outer` (see `kernels`), in CUDA, Triton or plain torch.

No host sync and no size that depends on the ids, so a CUDA graph can hold it. Layers with one input share one shrink,
and in the backward pass one sum into the gradient of x and one pass over x. Arguments have been checked by the public
functions of this package. T tokens, S adapters per token, E adapters.
"""

from __future__ import annotations

import importlib.util
import os
from typing import NamedTuple

import torch
from torch import Tensor

from lyra_ops._backend import missing_kernel, register_fake
from lyra_ops.multi_lora import dropout
from lyra_ops.multi_lora.bank import LoraBank, keep
from lyra_ops.multi_lora.function import Gradients
from lyra_ops.multi_lora.plan import TILE, Plan, build


class Group(NamedTuple):
    """The tables of the banks of layers with one input.

    A rows of all layers lie adapter after adapter in one bank, so that an adapter's columns of h are one run.
    """

    of_a: Tensor  # (E, 3) int32: an adapter's first row in the common bank of A, its rows, its first column in h: 0
    of_b: list[Tensor]  # per layer (E, 3) int32: first row in the layer's bank of B, rank, first column in h
    scaling: list[Tensor]  # per layer (E,) float32
    columns: Tensor  # (E, G) float32: the scaling of each column of h, 0 where an adapter has none
    banks: list[LoraBank]  # what the tables tell of; held so that nothing else can take their place in memory

    @classmethod
    def of(cls, banks: list[LoraBank]) -> Group:
        """Made once for banks that are kept. On the device: a copy from the host would make the host wait."""
        key = ("group", *map(id, banks))
        if key not in banks[0].tables:
            banks[0].tables[key] = cls._made(banks)
        return banks[0].tables[key]

    @classmethod
    def _made(cls, banks: list[LoraBank]) -> Group:
        like, adapters = banks[0].adapters[0][0], range(len(banks[0].names))

        def filled(values, dtype) -> Tensor:
            return torch.cat([like.new_full((1,), value, dtype=dtype) for value in values])

        def table(rows: list[int], columns: list[int]) -> Tensor:
            firsts = [sum(rows[:e]) for e in adapters]
            entries = [value for triple in zip(firsts, rows, columns) for value in triple]
            return filled(entries, torch.int32).view(-1, 3)

        together = [sum(bank.ranks[e] for bank in banks) for e in adapters]
        before = [[sum(bank.ranks[e] for bank in banks[:j]) for e in adapters] for j in range(len(banks))]
        columns = like.new_zeros(len(adapters), max(together), dtype=torch.float32)
        for bank, firsts in zip(banks, before):
            for e, (first, rank) in enumerate(zip(firsts, bank.ranks)):
                columns[e, first : first + rank] = bank.scalings[e]
        return cls(
            of_a=table(together, [0] * len(together)),
            of_b=[table(list(bank.ranks), firsts) for bank, firsts in zip(banks, before)],
            scaling=[filled(bank.scalings, torch.float32) for bank in banks],
            columns=columns,
            banks=banks[1:],
        )


class Compiled:
    """The kernels of the compiled library."""

    @staticmethod
    def shrink_(*arguments) -> None:
        torch.ops.lyra.multi_lora_shrink_(*arguments)

    @staticmethod
    def expand_(*arguments) -> None:
        torch.ops.lyra.multi_lora_expand_(*arguments)

    @staticmethod
    def outer(*arguments) -> Tensor:
        return torch.ops.lyra.multi_lora_outer(*arguments)

    @staticmethod
    def add_outer_(*arguments) -> None:
        torch.ops.lyra.multi_lora_add_outer_(*arguments)


class Engine:
    """What `function.linears` needs, of a module or namespace with the kernels."""

    def __init__(self, kernels: object) -> None:
        self._kernels = kernels

    def prepare(self, banks, routing) -> tuple[Group, Plan]:
        return Group.of(banks), routing.plan()

    def add(self, ys, x, banks, prepared, weights, seed, drop) -> list[Tensor]:
        """Adds the adapters of each bank to its y, in place; returns what A makes of x."""
        group, plan = prepared
        h = x.new_empty(*plan.ids.shape, group.columns.shape[1], dtype=torch.float32)
        self._kernels.shrink_(h, _rows_of(x), a_of(banks, x.dtype), group.of_a, *plan, seed, drop)
        for y, bank, table, scaling in zip(ys, banks, group.of_b, group.scaling):
            b = b_of(bank, x.dtype)
            self._kernels.expand_(y, h, b, table, _made_up(scaling, drop), plan.ids, weights, plan.present, None, 0)
        return [h]

    def gradients(self, dys, dx, x, banks, prepared, weights, seed, drop, kept, wanted: Gradients) -> Gradients:
        """As `cpu.gradients`."""
        (h,), (group, plan), kernels = kept, prepared, self._kernels
        lists = (plan.starts, plan.pairs, plan.chunks)
        dh = torch.empty_like(h)  # what B^T makes of dy, without scaling
        of_b = []
        for j, (dy, bank) in enumerate(zip(dys, banks)):
            b, scaling = b_of(bank, dy.dtype), _made_up(group.scaling[j], drop)
            kernels.shrink_(dh, dy, b, group.of_b[j], *plan, None, 0)
            if all(wanted.b[j]) and bank.sums:
                kernels.add_outer_(bank.sums[0].b, h, dy, group.of_b[j], scaling, weights, *lists, None, 0)
                of_b.append([None] * len(bank.names))
            elif any(wanted.b[j]):
                grad = kernels.outer(h, dy, group.of_b[j], scaling, weights, *lists, None, 0, len(b))
                parts = zip(grad.split(bank.ranks), wanted.b[j], bank.gradient_dtypes)
                of_b.append([part.T.to(dtype) if want else None for part, want, dtype in parts])
            else:
                of_b.append([None] * len(bank.names))
        factor, of_weights, differ = None, None, any(bank.scalings != banks[0].scalings for bank in banks)
        if wanted.weights or differ:
            factor = _made_up(group.columns[plan.ids.clamp(min=0).long()], drop)  # (T, S, G)
        if wanted.weights:
            known = (plan.ids >= 0)[:, :, None] & (factor != 0)
            of_weights = torch.where(known, h * dh * factor, 0).sum(2)
        scaling = _made_up(group.scaling[0], drop)
        if differ:
            dh, scaling = dh * factor, torch.ones_like(scaling)
        if dx is not None:
            a = a_of(banks, x.dtype)
            kernels.expand_(dx, dh, a, group.of_a, scaling, plan.ids, weights, plan.present, seed, drop)
        of_a = [[None] * len(bank.names) for bank in banks]
        if all(wanted.a[0]) and len(banks) == 1 and banks[0].sums:
            kernels.add_outer_(banks[0].sums[0].a, dh, _rows_of(x), group.of_a, scaling, weights, *lists, seed, drop)
        elif any(map(any, wanted.a)):
            rows = sum(sum(bank.ranks) for bank in banks)
            grad = kernels.outer(dh, _rows_of(x), group.of_a, scaling, weights, *lists, seed, drop, rows)
            parts = iter(grad.split([bank.ranks[e] for e in range(len(banks[0].names)) for bank in banks]))
            for e in range(len(banks[0].names)):
                for j, bank in enumerate(banks):
                    part = next(parts)
                    of_a[j][e] = part.to(bank.gradient_dtypes[e]) if wanted.a[j][e] else None
        return Gradients(of_a, of_b, of_weights)


def _made_up(scaling: Tensor, drop: int) -> Tensor:
    """Times 1 / (1 - p) of the dropout, in a kernel of its own only where there is one."""
    return scaling * dropout.scale(drop) if drop else scaling


def _rows_of(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def a_of(banks: list[LoraBank], dtype: torch.dtype) -> Tensor:
    in_order = [bank.adapters[e][0] for e in range(len(banks[0].names)) for bank in banks]
    return keep(f"a of {len(banks)}", dtype, banks, lambda: torch.cat(in_order).to(dtype))


def b_of(bank: LoraBank, dtype: torch.dtype) -> Tensor:
    return keep("b", dtype, [bank], lambda: torch.cat([b.T for _, b in bank.adapters]).to(dtype))


INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def engine(backend: str) -> Engine:
    """Of "cuda" or "triton"."""
    if backend == "cuda":
        return Engine(Compiled)
    from lyra_ops.multi_lora import triton  # here, because importing Triton takes longer than importing the rest

    return Engine(triton)


@torch.compiler.assume_constant_result
def triton_missing() -> str | None:
    return None if importlib.util.find_spec("triton") else "triton is not installed: pip install triton"


def plan(adapter_ids: Tensor, adapters: int) -> Plan:
    """`plan.build`, in one kernel where there is one."""
    if adapter_ids.is_cuda and adapters <= 1024 and missing_kernel("multi_lora_plan", "cuda") is None:
        return Plan(*torch.ops.lyra.multi_lora_plan(adapter_ids.contiguous(), adapters))
    return build(adapter_ids, adapters)


def _plan_fake(ids: Tensor, adapters: int) -> tuple[Tensor, ...]:
    tokens, pairs = ids.shape[0], ids.numel()
    shapes = (
        ids.shape,
        (adapters + 1,),
        (pairs,),
        ((pairs + TILE - 1) // TILE + adapters, 2),
        ((tokens + TILE - 1) // TILE, (adapters + 31) // 32),
    )
    return tuple(ids.new_empty(shape, dtype=torch.int32) for shape in shapes)


def _outer_fake(h, z, table, scaling, weights, starts, pairs, chunks, seed, drop, rows) -> Tensor:
    return h.new_empty(rows, z.shape[1])


FAKES = {
    "multi_lora_plan": _plan_fake,
    "multi_lora_shrink_": lambda h, *rest: None,
    "multi_lora_expand_": lambda y, *rest: None,
    "multi_lora_outer": _outer_fake,
    "multi_lora_add_outer_": lambda out, *rest: None,
}
for _name, _fake in FAKES.items():
    register_fake(_name)(_fake)
