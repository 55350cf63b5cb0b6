"""peft's LoRA layers, routed: every token of a batch through the adapter of its own, in training and generation.

    routed = lyra_ops.integrations.apply_multi_lora(model)     # a PeftModel, or a transformers model with adapters
    with routed.route(["image", "speech", None]):              # one name per sample; None: the base model
        loss = model(**batch).loss
    routed.remove()

The parameters stay peft's own, in their places: optimizers, saving, loading, merging, adding and deleting adapters and
data parallelism know nothing of it. Outside of `route` the model computes what peft computes.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from peft.tuners import lora
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from lyra_ops._checks import INT_DTYPES, check_tensor
from lyra_ops.multi_lora import BankKeeper, LoraBank, LoraRouting, add_adapters, multi_lora_linear


def apply_multi_lora(model: nn.Module) -> RoutedLora:
    """Makes all LoRA layers of ``model`` routable, in place; the result routes, and removes itself.

    Layers are peft's ``lora.Linear`` (peft >= 0.18) around any base layer: an ``nn.Linear`` runs fused with its
    adapters, any other base (quantised ones, say) runs its own forward, to which the adapters are added in place.
    Adapters may differ in rank, scaling (rslora too) and layers: one that a layer does not have adds nothing there.

    Raises ValueError for a model without LoRA layers or one that is routable already, for LoRA on other kinds of layers
    (embeddings, convolutions, bitsandbytes) and, when they are used, for adapters whose variant (DoRA, aLoRA, ..), bias
    or dropout cannot share one product.
    """
    layers = [(name, m) for name, m in model.named_modules() if isinstance(m, lora.LoraLayer)]
    if not layers:
        raise ValueError(f"model: got {type(model).__name__} without a LoRA layer, expected one with peft adapters")
    for name, layer in layers:
        if isinstance(layer, _RoutedLinear):
            raise ValueError(f"model: {name} is routable already; call remove() on what apply_multi_lora returned")
        if type(layer) is not lora.Linear:
            raise ValueError(f"model: {name} is a LoRA layer of type {type(layer).__name__}, expected lora.Linear")
    routed = RoutedLora(model, [layer for _, layer in layers])
    for module in model.modules():
        if isinstance(module, (lora.Linear, GradientCheckpointingLayer)):
            module.__dict__["_lyra_before"] = type(module)
            module.__dict__["_lyra_routed"] = routed
            module.__class__ = _RoutedLinear if isinstance(module, lora.Linear) else _routed_block(type(module))
    return routed


class RoutedLora:
    """Handle of a model whose LoRA layers are routable; made by `apply_multi_lora`."""

    def __init__(self, model: nn.Module, layers: list[lora.Linear]) -> None:
        self._model, self._layers = model, layers
        self._now: _Assignment | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The adapters of the model in the order of their ids: that in which peft has added them."""
        return tuple(dict.fromkeys(name for layer in self._layers for name in layer.lora_A))

    @contextmanager
    def route(
        self, adapters: Sequence[str | None] | Tensor, *, new_tokens: Sequence[str | None] | None = None
    ) -> Iterator:
        """Within this context every token goes through its own adapter, forward and backward.

        Args:
            adapters: a name per sample, None for the base model alone, or int ids (B, L) or (T,) per token, places in
                `names`, -1 for the base model alone. (T,) serves models whose layers see (1, T, K) or (T, K).
            new_tokens: with ids, a name per sample for the tokens that are generated after the L given ones.

        Backward may run after the context has been left, also under gradient checkpointing of transformers layers,
        whose recomputation finds the routing of its forward again. (Own calls of torch.utils.checkpoint: run backward
        inside.) Contexts may be nested; an exception leaves no trace.

        Raises ValueError for a name or an id that does not exist; layers raise it for ids that fit no tokens of theirs.
        """
        names = self.names
        if isinstance(adapters, Tensor):
            shape = ("B", "L") if adapters.ndim == 2 else ("T",)
            ids = check_tensor("adapters", adapters, shape=shape, dtypes=INT_DTYPES)
            after = None if new_tokens is None else self._ids("new_tokens", new_tokens)
            assignment = _Assignment(names, per_token=ids, per_sample=after)
        elif new_tokens is not None:
            raise ValueError("new_tokens: got names beside names per sample, expected them beside ids per token")
        else:
            assignment = _Assignment(names, per_token=None, per_sample=self._ids("adapters", adapters))
        with self._using(assignment):
            yield

    def remove(self) -> None:
        """Gives the model back as it was; nothing happens the second time."""
        for module in self._model.modules():
            if module.__dict__.get("_lyra_routed") is self:
                module.__class__ = module.__dict__.pop("_lyra_before")
                del module.__dict__["_lyra_routed"]
                module.__dict__.pop("_lyra_bank", None)

    def _ids(self, argument: str, names: Sequence[str | None]) -> Tensor:
        known = {None: -1, **{name: e for e, name in enumerate(self.names)}}
        if isinstance(names, str):
            raise TypeError(f"{argument}: got the str {names!r}, expected a list of names, one per sample")
        for name in names:
            if name not in known:
                raise ValueError(f"{argument}: got {name!r}, expected None or one of {', '.join(self.names)}")
        return torch.tensor([known[name] for name in names], dtype=torch.int64)

    @contextmanager
    def _using(self, assignment: _Assignment | None) -> Iterator:
        before, self._now = self._now, assignment
        try:
            yield
        finally:
            self._now = before


@dataclass
class _Assignment:
    """The ids of one `route`, and the routings made of them, which all layers of the same adapters share."""

    names: tuple[str, ...]
    per_token: Tensor | None  # (B, L) or (T,)
    per_sample: Tensor | None  # (B,)
    routings: dict = field(default_factory=dict)

    def routing(self, x: Tensor, bank: LoraBank) -> LoraRouting:
        shape = tuple(x.shape[:-1])
        key = (shape, bank.names, x.device)
        if key not in self.routings:
            self.routings[key] = LoraRouting(self._places(bank.names)[self._ids(shape)].to(x.device), bank)
        return self.routings[key]

    def _ids(self, shape: tuple[int, ...]) -> Tensor:
        if self.per_token is not None and tuple(self.per_token.shape) in (shape, (math.prod(shape),)):
            return self.per_token.view(shape)
        if self.per_sample is not None and len(shape) == 2 and shape[0] == len(self.per_sample):
            return self.per_sample[:, None].expand(shape)
        got = [f"{tuple(ids.shape)}" for ids in (self.per_token, self.per_sample) if ids is not None]
        raise ValueError(f"adapters: got ids for {' and '.join(got)}, expected them to fit a layer that sees {shape}")

    def _places(self, present: tuple[str, ...]) -> Tensor:
        """By id: the place of the adapter among ``present``, -1 where it is not; the last entry is that of id -1."""
        return torch.tensor([present.index(name) if name in present else -1 for name in self.names] + [-1])


class _RoutedLinear(lora.Linear):
    """peft's layer; while a route is set, each token goes through its own adapter. Made by a change of class alone."""

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        assignment = self._lyra_routed._now
        present = [name for name in self.lora_A if assignment is not None and name in assignment.names]
        if not present or self.disable_adapters or self.merged or kwargs.get("adapter_names") is not None:
            return super().forward(x, *args, **kwargs)
        bank = self._bank(present)
        routing = assignment.routing(x, bank)
        options = {"dropout_p": self._dropout(present), "training": self.training}
        base = self.base_layer
        if type(base) is nn.Linear and not (args or kwargs or base._forward_hooks or base._forward_pre_hooks):
            return multi_lora_linear(x, base.weight, bank, routing, base.bias, **options)
        return add_adapters(base(x, *args, **kwargs), x, bank, routing, **options)

    def _bank(self, present: list[str]) -> LoraBank:
        for name in present:
            if name in self.lora_variant:
                raise ValueError(f"adapter {name!r}: got {type(self.lora_variant[name]).__name__}, expected plain LoRA")
            if self.lora_B[name].bias is not None:
                raise ValueError(f"adapter {name!r}: got lora_bias=True, expected False")
        keeper = self.__dict__.setdefault("_lyra_bank", BankKeeper())
        return keeper.bank(
            {name: (self.lora_A[name].weight, self.lora_B[name].weight, self.scaling[name]) for name in present}
        )

    def _dropout(self, present: list[str]) -> float:
        chances = {name: getattr(self.lora_dropout[name], "p", 0.0) for name in present}
        if self.training and len(set(chances.values())) > 1:
            raise ValueError(f"lora_dropout: got {chances}, expected the same for all adapters of a batch")
        return next(iter(chances.values()))


class _RoutedBlock:
    """A layer that transformers may checkpoint: it takes the routing along, so that its recomputation has it, too."""

    def __call__(self, *args: object, **kwargs: object) -> object:
        if self.gradient_checkpointing and self.training:
            kwargs["_lyra_assignment"] = self._lyra_routed._now
        return super().__call__(*args, **kwargs)

    def forward(self, *args: object, **kwargs: object) -> object:
        if "_lyra_assignment" not in kwargs:
            return super().forward(*args, **kwargs)
        with self._lyra_routed._using(kwargs.pop("_lyra_assignment")):
            return super().forward(*args, **kwargs)


@functools.cache
def _routed_block(block: type) -> type:
    return type(block.__name__, (_RoutedBlock, block), {})


def modality_adapters(present: Mapping[str, Tensor], adapters: Mapping[frozenset[str], str | None]) -> list[str | None]:
    """The paper's M(x): which adapter the combination of modalities in each sample selects.

    >>> modality_adapters(
    ...     {"image": torch.tensor([[True, False], [False, False]]), "speech": torch.tensor([True, False])},
    ...     {frozenset(): None, frozenset({"image", "speech"}): "image+speech"},
    ... )
    ['image+speech', None]

    Args:
        present: per modality a bool tensor (B, L), which tokens are of it, or (B,), which samples hold it.
        adapters: name of the adapter (None: the base model) by combination.

    Returns a name per sample, for `RoutedLora.route`. Raises ValueError for a combination without an adapter.

    Source: Lyra (arXiv 2412.09501), section 3.2.
    """
    found = {name: mask.reshape(len(mask), -1).any(dim=1).tolist() for name, mask in present.items()}
    chosen = []
    for sample in range(len(next(iter(found.values()), []))):
        combination = frozenset(name for name, samples in found.items() if samples[sample])
        if combination not in adapters:
            known = ", ".join("+".join(sorted(key)) or "text alone" for key in adapters)
            got = "+".join(sorted(combination)) or "text alone"
            raise ValueError(f"adapters: got none for sample {sample} of {got}, expected one of {known}")
        chosen.append(adapters[combination])
    return chosen
