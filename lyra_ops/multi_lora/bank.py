"""The adapters of one linear layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import NamedTuple

import torch
from torch import Tensor

from lyra_ops._checks import FLOAT_DTYPES, check_tensor

MAX_RANK = 512


class Rows(NamedTuple):
    """A bank as products with all adapters at once want it: row after row, without padding to a common rank.

    R is the sum of the ranks.
    """

    a: Tensor  # (R, K): the A matrices, one below the other
    b: Tensor  # (R, N): the transposed B matrices, one below the other
    owner: Tensor  # (R,) int32: the adapter that each row belongs to
    scaling: Tensor  # (R,) float32 (float64 for float64 adapters): the scaling of that adapter


class Sums(NamedTuple):
    """Where the gradients of a bank's adapters are added up: row after row as in `Rows`."""

    a: Tensor  # (R, K)
    b: Tensor  # (R, N)


@dataclass(frozen=True, eq=False)
class LoraBank:
    """The adapters of one linear layer. Made by `LoraBank.pack`.

    names     E names; a token's adapter id is a place in this tuple
    adapters  E pairs of A (r, K) and B (N, r)
    ranks     E ranks
    scalings  E scalings

    The bank holds no parameters and copies none: it refers to them, so gradients flow to each adapter's own A and B
    wherever these live (peft modules, say), and saving, merging and optimizers know nothing of it. It may be kept while
    they are trained.
    """

    names: tuple[str, ...]
    adapters: tuple[tuple[Tensor, Tensor], ...]
    ranks: tuple[int, ...]
    scalings: tuple[float, ...]
    tables: dict = field(default_factory=dict, repr=False)  # of `fused`, which do not depend on values
    kept: dict = field(default_factory=dict, repr=False)  # of `keep`
    sums: list[Sums] = field(default_factory=list, repr=False)  # one, after `accumulate`

    @classmethod
    def pack(cls, adapters: Mapping[str, tuple[Tensor, Tensor, float]]) -> LoraBank:
        """Of {name: (A, B, scaling)} with A (r, K) and B (N, r), as peft keeps lora_A.weight and lora_B.weight.

        Ranks r may differ, 1 to 512, and so may the floating dtype, of adapters, not of A and B; scaling is a number
        (alpha / r, or alpha / sqrt(r) for rslora). All adapters share K, N and the device; they may be strided views.

        Raises TypeError or ValueError that names the adapter.
        """
        if not isinstance(adapters, Mapping):
            raise TypeError(f"adapters: got {type(adapters).__name__}, expected a dict of name: (A, B, scaling)")
        if not adapters:
            raise ValueError("adapters: got none, expected at least one")
        first = None
        for name, adapter in adapters.items():
            checked = _check_adapter(name, adapter, first)
            first = first or checked
        return cls(
            names=tuple(adapters),
            adapters=tuple((a, b) for a, b, _ in adapters.values()),
            ranks=tuple(a.shape[0] for a, _, _ in adapters.values()),
            scalings=tuple(float(scaling) for _, _, scaling in adapters.values()),
        )

    def accumulate(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Lets backward add the gradients up in float32 (float64 for float64 adapters) whatever the adapters' dtype.

        Returns {name: (sum for A (r, K), sum for B (N, r))}, zero at first. From now on backward adds to them and
        leaves ``A.grad`` and ``B.grad`` as they are; an optimizer step follows the batches that are to count together,
        and ``zero_()`` begins anew. On a GPU the kernels add in place, in their fixed order. Not with the backend
        "reference" (hence not under torch.compile on a CPU), and not of gradients that are differentiated themselves.
        """
        if not self.sums:
            (a, b), total = self.adapters[0], sum(self.ranks)
            self.sums.append(Sums(*(a.new_zeros(total, size, dtype=self.wide) for size in (a.shape[1], b.shape[0]))))
        views = zip(*(rows.split(self.ranks) for rows in self.sums[0]))
        return {name: (a, b.T) for name, (a, b) in zip(self.names, views)}

    @property
    def wide(self) -> torch.dtype:
        """float32, or float64 where an adapter is of that."""
        return torch.float64 if any(a.dtype == torch.float64 for a, _ in self.adapters) else torch.float32

    @property
    def gradient_dtypes(self) -> list[torch.dtype]:
        """In which backward gives the gradients of each adapter: its own, or that of the sums."""
        return [self.sums[0].a.dtype if self.sums else a.dtype for a, _ in self.adapters]

    def rows(self, dtype: torch.dtype) -> Rows:
        """All adapters row after row, in ``dtype``: a differentiable copy, kept as `keep` says; no device sync."""
        return keep("rows", dtype, [self], lambda: self._rows(dtype))

    def with_adapters(self, adapters: list[tuple[Tensor, Tensor]]) -> LoraBank:
        """The same bank with other tensors of the same shapes."""
        return LoraBank(self.names, tuple(adapters), self.ranks, self.scalings)

    def _rows(self, dtype: torch.dtype) -> Rows:
        a = [a for a, _ in self.adapters]
        # Filled on the device: a table copied from the host would make the host wait at every step of a training.
        owner = [a[0].new_full((rank,), e, dtype=torch.int32) for e, rank in enumerate(self.ranks)]
        scaling = [a[0].new_full((rank,), s, dtype=self.wide) for rank, s in zip(self.ranks, self.scalings)]
        b = torch.cat([b.T for _, b in self.adapters])
        return Rows(torch.cat(a).to(dtype), b.to(dtype), torch.cat(owner), torch.cat(scaling))


def keep(what: str, dtype: torch.dtype, banks: list[LoraBank], make: Callable, others: Sequence[Tensor] = ()):
    """What ``make()`` makes of the adapters of ``banks``, and of ``others``, in ``dtype``.

    Of tensors that want no gradient it is kept until one of them changes. That is told from where a tensor lies, its
    dtype and its version: optimizers, load_state_dict, ``.to()`` and swapped tensors are seen, but not what is written
    through ``.data`` into the same memory.
    """
    weights = [*(t for bank in banks for pair in bank.adapters for t in pair), *others]
    trained = torch.is_grad_enabled() and any(t.requires_grad for t in weights)
    # Inference tensors have no version.
    if trained or torch.compiler.is_compiling() or any(t.is_inference() for t in weights):
        return make()
    key = (
        dtype,
        torch.is_inference_mode_enabled(),  # what is made there cannot be used with autograd later
        [(t.data_ptr(), t.device, t.dtype, t.shape, t.stride(), t._version) for t in weights],
    )
    kept = banks[0].kept
    if what not in kept or kept[what][0] != key:
        # The aliases keep the memory taken, so that nothing new can lie where the key says these did.
        kept[what] = (key, make(), [t.detach() for t in weights])
    return kept[what][1]


class BankKeeper:
    """Keeps the bank of a layer for as long as the layer's adapters are the same tensors, with the same scalings."""

    def __init__(self) -> None:
        self._bank: LoraBank | None = None

    def bank(self, adapters: Mapping[str, tuple[Tensor, Tensor, float]]) -> LoraBank:
        """`LoraBank.pack`, or what it returned before."""
        if torch.compiler.is_compiling():
            return LoraBank.pack(adapters)
        kept = self._bank
        if kept is None or not _same(kept, adapters):
            self._bank = kept = LoraBank.pack(adapters)
        return kept

    def __deepcopy__(self, memo: dict) -> BankKeeper:
        return BankKeeper()

    def __reduce__(self) -> tuple:
        return BankKeeper, ()


def _same(bank: LoraBank, adapters: Mapping[str, tuple[Tensor, Tensor, float]]) -> bool:
    if len(adapters) != len(bank.names):
        return False
    for name, known, (a, b), rank, scaling in zip(adapters, bank.names, bank.adapters, bank.ranks, bank.scalings):
        new_a, new_b, new_scaling = adapters[name]
        # The shape, because ``.data`` can change it.
        if name != known or new_a is not a or new_b is not b or new_scaling != scaling or a.shape[0] != rank:
            return False
    return True


def _check_adapter(name: object, adapter: object, like: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
    """Checks one adapter, and that it fits ``like``, the A and B of the first one; returns its own A and B."""
    if not isinstance(name, str):
        raise TypeError(f"adapters: got the name {name!r}, expected a str")
    if not isinstance(adapter, (tuple, list)) or len(adapter) != 3:
        raise TypeError(f"adapters[{name!r}]: got {adapter!r:.80}, expected (A, B, scaling)")
    a, b, scaling = adapter
    like_a, like_b = like or (a, b)
    of = f"of adapter {name!r}"
    check_tensor(f"A {of}", a, shape=("r", "K"), dtypes=FLOAT_DTYPES)
    rank = a.shape[0]
    if not 1 <= rank <= MAX_RANK:
        raise ValueError(f"A {of}: got rank {rank}, expected 1 to {MAX_RANK}")
    check_tensor(f"B {of}", b, shape=("N", rank), dtypes=(a.dtype,), device=a.device)
    check_tensor(f"A {of}", a, shape=("r", like_a.shape[1]), device=like_a.device)
    check_tensor(f"B {of}", b, shape=(like_b.shape[0], rank))
    if isinstance(scaling, bool) or not isinstance(scaling, Real):
        raise TypeError(f"scaling {of}: got {type(scaling).__name__}, expected a number")
    if not abs(scaling) < math.inf:
        raise ValueError(f"scaling {of}: got {scaling}, expected a finite number")
    return a, b
